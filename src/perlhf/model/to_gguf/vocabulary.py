"""A tokenizer as the tables of a GGUF file: tokens, their kinds, how texts are cut and joined, begin and end.

llama.cpp knows two kinds of these networks' tokenizers. Byte-level BPE has its merges, and cuts texts in a way that it
knows by a name. SentencePiece joins the pair whose token has the best score: scores are the order of merges here, so
that both join alike. Any other tokenizer is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from perlhf.errors import ModelError
from perlhf.model.bases.gguf.tokenizer import WHOLE_FIRST, cuts

_CUTS = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")
"""Names of `tokenizer.ggml.pre`, one for each way of cutting that llama.cpp and our reader both know."""
_SPACE = "\u2581"
"""What stands for a space in SentencePiece's tokens."""
_ALLOWED = f"byte-level BPE that cuts words as {', '.join(_CUTS)} do, or SentencePiece's BPE with bytes"
_HINT = "leave out --gguf: --format merged writes the tokenizer as it is, for transformers"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = (
    gguf.TokenType.NORMAL.value,
    gguf.TokenType.UNKNOWN.value,
    gguf.TokenType.CONTROL.value,
    gguf.TokenType.USER_DEFINED.value,
    gguf.TokenType.UNUSED.value,
    gguf.TokenType.BYTE.value,
)
ENDS = ("eos", "eot", "eom")
"""End of a text, of a turn, of a message: what llama.cpp has a place for."""


@dataclass(frozen=True)
class Vocabulary:
    """Tables of `tokenizer.ggml`.

    Args:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
        pre: how texts are cut, by llama.cpp's name.
        tokens: one for each row of the embedding.
        types: of tokens, as `gguf.TokenType` has them.
        merges: of byte-level BPE, best first.
        scores: of SentencePiece.
        ids: of tokens with a name: bos, eos, eot, eom, unknown, padding.
        flags: add_bos_token, add_eos_token, add_space_prefix.
        chat_template: Jinja.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    chat_template: str | None = None

    def add(self, writer: gguf.GGUFWriter) -> None:
        """Writes the tables."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
        for name, number in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int]) -> Vocabulary:
    """The tables of a tokenizer.

    Args:
        tokenizer: with its chat template, one text.
        rows: of the embedding; those without a token get an unused one.
        ends: ids that end an answer, the one that a turn is trained to end with first.

    Raises:
        ModelError: llama.cpp has nothing like it.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("the tokenizer isn't one of the tokenizers library")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused(f"the tokenizer is {model['type']} of another kind")
    template = tokenizer.chat_template
    assert template is None or isinstance(template, str)
    first: Any = tokenizer("a")["input_ids"]
    flags = {"add_bos_token": first[0] == tokenizer.bos_token_id, "add_eos_token": first[-1] == tokenizer.eos_token_id}
    ids = _named(tokenizer, ends)
    if model.get("byte_fallback"):
        flags["add_space_prefix"] = _space_before(state, tokenizer)
        tokens, types, scores = _sentencepiece(tokenizer, model, rows)
        return Vocabulary("llama", "default", tokens, types, [], scores, ids, flags, template)
    pre = _name_of_cuts(state)
    tokens, types = _tokens(tokenizer, rows)
    merges = [" ".join(_pair(merge)) for merge in model["merges"]]
    return Vocabulary("gpt2", pre, tokens, types, merges, [], ids, flags, template)


def ends_left_out(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[str]:
    """End tokens beyond those that a file has a place for."""
    ids = _named(tokenizer, ends)
    return [str(tokenizer.convert_ids_to_tokens(end)) for end in ends if end not in ids.values()]


def _named(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> dict[str, int]:
    """Ids of the tokens that a file has a name for."""
    eos: Any = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0]
    others = [end for end in ends if end != eos]
    # Without an end of a turn, llama.cpp takes any token whose text it knows as one.
    named = {"bos": tokenizer.bos_token_id, **dict(zip(ENDS, [eos, *(others or [eos])], strict=False))}
    named |= {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    return {name: int(number) for name, number in named.items() if isinstance(number, int)}


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of the token of each row."""
    vocabulary = tokenizer.get_vocab()
    texts = {number: token for token, number in vocabulary.items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = list[str](), list[int]()
    for row in range(rows):
        text = texts.get(row)
        if text is None:
            text = f"[PAD{row}]"
            while text in vocabulary:
                text = f"[{text}]"
            kind = _UNUSED
        else:
            kind = _NORMAL if row not in added else _CONTROL if added[row].special else _USER
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _sentencepiece(
    tokenizer: PreTrainedTokenizerBase, model: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int], list[float]]:
    """Tokens, kinds and scores: the earlier a token is merged, the better is its score."""
    tokens, types = _tokens(tokenizer, rows)
    best: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        best.setdefault("".join(_pair(merge)), place)
    missing = {f"<0x{byte:02X}>" for byte in range(256)}
    for row, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if token in missing:
            missing.discard(token)
            types[row] = _BYTE
        elif row == tokenizer.unk_token_id:
            types[row] = _UNKNOWN
        elif kind == _USER and _SPACE in token and token in best:
            types[row] = (
                _NORMAL  # looked for before spaces become what it is written with, so that merges alone make it
            )
    if missing:
        raise _refused(f"the tokenizer has no token for {len(missing)} bytes, such as {min(missing)}")
    last = len(model["merges"])
    return (
        tokens,
        types,
        [-float(best.get(token, last)) if kind == _NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)],
    )


def _name_of_cuts(state: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer cuts texts.

    Raises:
        ModelError: it has none.
    """
    normalizers = [step["type"] for step in _steps(state["normalizer"])]
    if normalizers not in ([], ["NFC"]):  # NFC of Qwen's is left out by llama.cpp
        raise _refused(f"the tokenizer changes texts before it cuts them ({', '.join(normalizers)})")
    own = list(_steps(state["pre_tokenizer"]))
    whole = bool(state["model"].get("ignore_merges"))
    for name in _CUTS:
        known = json.loads(cuts(name, "").__getstate__())
        if list(_steps(known)) == own and (name in WHOLE_FIRST) == whole:
            return name
    raise _refused("the tokenizer cuts words in a way that has no name in llama.cpp")


def _space_before(state: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a space is put before texts.

    llama.cpp then puts one after each control token as well. Tokenizers that put one at the very beginning alone put
    none into conversations which begin with a control token; where the chat template makes such, none is put.

    Raises:
        ModelError: spaces are handled in a way that SentencePiece has not.
    """
    before = False
    for step in [*_steps(state["normalizer"]), *_steps(state["pre_tokenizer"])]:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                before = True
            case {"type": "Metaspace", "replacement": "\u2581", "split": False, "prepend_scheme": scheme}:
                before = scheme == "always" or (scheme == "first" and not _talks_begin_with_control(tokenizer))
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}}:  # Gemma's: no space is left to split at
                pass
            case _:
                raise _refused(f"the tokenizer has a step that SentencePiece has not ({step['type']})")
    return before


def _talks_begin_with_control(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template begins conversations with a token that is found whole."""
    if not tokenizer.chat_template:
        return False
    try:
        talk = str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    except TemplateError:  # it wants more than one question, and is asked by nobody here
        return False
    return any(talk.startswith(token.content) for token in tokenizer.added_tokens_decoder.values())


def _steps(state: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Steps of a normalizer or pre-tokenizer, without what concerns places in a text alone."""
    if state is None:
        return
    if state["type"] == "Sequence":
        for step in state.get("normalizers") or state.get("pretokenizers") or ():
            yield from _steps(step)
        return
    yield {key: value for key, value in state.items() if key != "trim_offsets"}


def _pair(merge: Any) -> list[str]:
    """The two tokens of a merge, which older files write as one text."""
    return merge.split(" ", 1) if isinstance(merge, str) else list(merge)


def _refused(what: str) -> ModelError:
    return ModelError(f"{what}, which llama.cpp doesn't know", where="gguf", allowed=_ALLOWED, hint=_HINT)
