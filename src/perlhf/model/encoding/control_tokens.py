"""Control tokens that people typed, such as `<|im_end|>`: found in any text, and read as ordinary text.

A text makes a control token where it holds its letters; where the tokenizer's normaliser makes them of it (letters
in full width, capitals, whatever is replaced or stripped); and where a template puts its own letters around it
(`'<|' + name + '|>'`). All three are told from the tokens that the template itself writes by signs around the text.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from perlhf.errors import DataError

BEGIN, END = "\U000f0000", "\U000f0001"
"""Around text that is to make no control token."""
_MARKED = re.compile(f"{BEGIN}([^{BEGIN}{END}]*){END}|[{BEGIN}{END}]")
_CHANGES_CASE = re.compile(r"\b(lower|upper|title|capitalize|swapcase|casefold)\b")
"""What a template does with a text, so that `<|IM_END|>` becomes a control token."""


class ControlTokens:
    """The control tokens of a tokenizer under a chat template.

    Args:
        tokenizer: has the tokens.
        literals: how they are written; added tokens all of them.
        template: Jinja that texts go through.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, literals: Iterable[str] = (), template: str = ""):
        self._tokenizer = tokenizer
        self.literals = frozenset(literals)
        added = {token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
        self._ids = {added[literal][0]: literal for literal in self.literals}
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        normalised = self._backend is not None and self._backend.normalizer is not None
        self._normalises = normalised and any(added[literal][1].normalized for literal in self.literals)
        longest = sorted(self._ids.items(), key=lambda token: -len(token[1]))
        self._letters = {number: (literal, self._normal(literal) or literal) for number, literal in longest}
        self.pattern = alternatives(self.literals, any_case=_CHANGES_CASE.search(template) is not None)
        self._whole = "\0".join(self.literals)
        self._starts = tuple({literal[:at] for literal in self.literals for at in range(1, len(literal))})
        self._ends = tuple({literal[at:] for literal in self.literals for at in range(1, len(literal))})
        self._completed = any(
            piece.rstrip().endswith(self._starts) or piece.lstrip().startswith(self._ends)
            for piece in _written_by(template)
        )

    def first_in(self, content: Any) -> str | None:
        """The first text in messages, tools or a text that makes a control token by itself, as it is written there."""
        return next((text[start:end] for text in strings(content) for start, end in self._spans(text)), None)

    def literal_in(self, content: Any) -> str | None:
        """The control token that `first_in` finds, as the tokenizer writes it."""
        typed = self.first_in(content)
        return None if typed is None else next(iter(self._held(typed).values()), typed)

    def may_join(self, content: Any) -> bool:
        """Whether a text is a part of a control token that the template may write the rest of."""
        return self._completed and any(self._is_part(text) for text in strings(content))

    def written_in(self, rendered: str) -> list[str]:
        """The control tokens that rendered text holds, in order, as far as its letters say."""
        return self.pattern.findall(rendered)

    def marked(self, content: Any, begin: str = BEGIN, end: str = END, *, parts: bool = False) -> Any:
        """Messages, tools or a text with signs around whatever makes a control token; all else as it is.

        Args:
            content: mappings, lists and texts.
            begin: the sign before.
            end: the sign after.
            parts: around each text that is a part of one, too; roles and keys are the template's business.
        """

        def mark(text: str, free: bool) -> str:
            text = text.replace(begin, "").replace(end, "")
            spans = self._spans(text)
            if parts and free and self._is_part(text):
                start = len(text) - len(text.lstrip())
                spans = [(start, start + len(text.strip()))]
            pieces, at = list[str](), 0
            for start, stop in spans:
                pieces += [text[at:start], begin, text[start:stop], end]
                at = stop
            return "".join([*pieces, text[at:]])

        return _mapped(content, mark)

    def ids(self, text: str) -> list[int]:
        """Ids of text with BEGIN and END in it: what they enclose makes no control token, all else is read as it is.

        A sign without its other one, as a template may leave it, keeps apart what is before and after it.

        Raises:
            DataError: the tokenizer makes a control token of something that is enclosed, however it is cut.
        """
        first, *others = _MARKED.split(text)
        ids = self._tokenised(first)
        for number, piece in enumerate(others):
            if piece:  # text that was enclosed, and None for a sign alone, come in turn with what is between them
                ids += self._as_text(piece) if number % 2 == 0 else self._after_something(self._tokenised, piece)
        return ids

    def _as_text(self, piece: str) -> list[int]:
        held, ids = self._held(piece), self._after_something(self._without_added, piece)
        if held.keys() & set(ids):  # the vocabulary itself has it: its letters one by one
            ids = [number for letter in piece for number in self._after_something(self._without_added, letter)]
        if made := held.keys() & set(ids):
            what = f"the tokenizer makes the control token {held[made.pop()]!r} of the text {piece!r}"
            raise DataError(what, allowed="text that it reads as text", hint="write it otherwise in the record")
        return ids

    def _after_something(self, ids_of: Callable[[str], list[int]], text: str) -> list[int]:
        """Ids of text that isn't the first: without the space that SentencePiece puts before what is."""
        line_break, ids = self._tokenised("\n"), ids_of("\n" + text)
        return ids[len(line_break) :] if ids[: len(line_break)] == line_break else ids_of(text)

    def _tokenised(self, text: str) -> list[int]:
        ids: Any = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    def _without_added(self, text: str) -> list[int]:
        """Ids of text as if the tokenizer had no added tokens."""
        if self._backend is None:
            return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = self._backend.pre_tokenizer
        pieces = [text] if words is None else [piece for piece, _ in words.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self._backend.model.tokenize(piece)]

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where a text makes control tokens, in order and apart."""
        spans = [match.span() for match in self.pattern.finditer(text)]
        if self._normalises and text:
            encoded: Any = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            offsets = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            # A vocabulary may have tokens that are special, and made of plain text: bytes, unknown ones.
            spans += [at for number, at in offsets if number in self._ids and number in self._held(text[slice(*at)])]
            if unicodedata.combining(text[0]):  # it would become one letter with a control token's last one
                spans.append((0, 1))
        apart = list[tuple[int, int]]()
        for start, end in sorted(spans):
            if apart and start < apart[-1][1]:
                apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
            else:
                apart.append((start, end))
        return apart

    def _held(self, text: str) -> dict[int, str]:
        """The control tokens whose letters a text has once it is normalised, the longest first, by their ids."""
        normal = self._normal(text)
        return {number: literal for number, (literal, letters) in self._letters.items() if letters in normal}

    def _normal(self, text: str) -> str:
        return self._backend.normalizer.normalize_str(text).strip() if self._normalises else text

    def _is_part(self, text: str) -> bool:
        core = text.strip()
        return core != "" and (core in self._whole or core.startswith(self._ends) or core.endswith(self._starts))


def alternatives(literals: Iterable[str], *, any_case: bool = False) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing where there is none."""
    pattern = "|".join(map(re.escape, sorted(literals, key=len, reverse=True))) or "(?!)"
    return re.compile(pattern, re.IGNORECASE if any_case else 0)


def strings(content: Any) -> Iterator[str]:
    """All texts in messages or tools, names of arguments among them."""
    match content:
        case str():
            yield content
        case Mapping():
            for key, value in content.items():
                yield from strings(key)
                yield from strings(value)
        case list() | tuple():
            for value in content:
                yield from strings(value)
        case _:
            return


def unused_signs(content: Any) -> tuple[str, str]:
    """Two signs that aren't in any text, nor is their escape; printable, so that no template escapes them."""
    text = "\0".join(strings(content))
    signs = (chr(number) for number in range(0x2801, 0x2900))  # Braille
    free = (sign for sign in signs if sign not in text and f"u{ord(sign):04x}" not in text)
    return next(free), next(free)


def _mapped(content: Any, change: Callable[[str, bool], str], free: bool = True) -> Any:
    """The same with every text and key changed; `change` is told whether a text is free, neither key nor role."""
    match content:
        case str():
            return change(content, free)
        case Mapping():
            return {
                _mapped(key, change, False): _mapped(value, change, free and key not in ("role", "type"))
                for key, value in content.items()
            }
        case list() | tuple():
            return [_mapped(value, change, free) for value in content]
        case _:
            return content


def _written_by(template: str) -> list[str]:
    """What a template writes itself: its own text and the constants in its expressions, blanks at both ends apart."""
    own = re.split(r"\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\}", template, flags=re.DOTALL)
    constants = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", template)
    return [*own, *(one or other for one, other in constants)]
