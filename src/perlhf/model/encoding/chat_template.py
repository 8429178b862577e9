"""From messages to token ids: the same ones that transformers' `apply_chat_template` gives.

The template sees people's texts as they are, so whatever it does with them (trimming, dropping earlier reasoning,
deciding by what they say) happens as it will where the network is used. Only where a text holds a control token, such
as `<|im_end|>`, does it differ: there the token is written as ordinary text (transformers' `sanitize_control_tokens`),
so that nobody can end a turn or begin one by typing it.
"""

import datetime
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from perlhf.config.stages import EncodingConfig
from perlhf.data.records import Message, Tools, content_of
from perlhf.errors import ConfigError, DataError, nearest

Ending = Literal["answer", "closed", "unfinished"]
"""Whether an answer is to follow, the conversation is over, or its last message is to be gone on with."""

PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if add_generation_prompt or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""`encoding.template: plain` as Jinja: `role: text` lines."""
PLAIN_TEXT = "{{ messages[0]['content'] }}{% for m in messages[1:] %}{{ ' ' + m['content'] }}{% endfor %}"
"""The same for a prompt that is text and no conversation: its completion follows after a space."""
TEXT_ROLE = "text"
"""Role of such a prompt's only message."""
NAMED = "name:"
"""What `encoding.template` begins with where it picks one of several templates of a tokenizer."""

_BEGIN, _END = "\U000f0000", "\U000f0001"
"""What transformers puts around text that is to make no control token (`mark_control_tokens`)."""
_RESERVED = frozenset(
    "messages conversation tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "sanitize_control_tokens padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs strftime_now".split()
)
_MEANINGFUL = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Keys of a message, besides its content, that say something to the network."""
_ALIASES = {"reasoning": "reasoning_content", "thinking": "reasoning_content"}
"""Names under which transformers gives a template the same thing."""
_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""What a template or transformers raises for a conversation that it can't render."""
_PROBE, _OTHER_PROBE = "Perlhfprobe", "Otherprobe"
_THOUGHT, _REASONING = "</think>", "the reasoning"
_DIRECTIVES = "aAwdbBmyYHIMSpfjUWcxXeFDGuVTR"
"""Of strftime."""


class ChatTemplate:
    """A tokenizer's chat template, a file's, or `plain`.

    Args:
        tell: is given each thing worth knowing, as a sentence; the same one may come again.

    Raises:
        ConfigError: there is no such template, or it doesn't use a variable of `encoding.template_kwargs`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, tell: Callable[[str], None] = lambda _: None
    ):
        self.tokenizer, self.config, self._tell = tokenizer, config, tell
        self.is_plain = config.template == "plain"
        self._templates = templates_of(tokenizer, config.template)
        self.text = "\0".join(text for _, text in sorted(self._templates.items()))
        self._check_kwargs()
        self._day = on_day(config.day) if config.day and "strftime_now" in self.text else ""
        added = tokenizer.added_tokens_decoder
        self._visible = {token.content: number for number, token in added.items() if token.content.strip()}
        self._any_added = _alternatives(self._visible)
        # A tokenizer cuts text at these before anything else, and takes no space around them.
        simple = [t for t in added.values() if not (t.normalized or t.lstrip or t.rstrip or t.single_word)]
        self._cuts = {token.content: self._visible[token.content] for token in simple if token.content.strip()}
        self._can_cut = bool(tokenizer.is_fast and self._cuts) and not any(t.normalized for t in added.values())
        self._all_added = _alternatives(token.content for token in added.values())
        self._piece_ids = lru_cache(maxsize=100_000)(self._tokenise)
        self._checked: set[Any] = set()
        self._quotes_arguments = bool(re.search(r"arguments\s*\|\s*tojson", self.text)) and not re.search(
            r"arguments\s+is\s+(string|not\s+mapping|mapping)", self.text
        )
        self._takes_parts = False
        self._takes_parts = self._wants_parts()
        self._control = re.compile("(?!)")
        self._markers = self._turn_markers()
        special = [token.content for token in added.values() if token.special and token.content.strip()]
        self._control = _alternatives({*special, *self._markers}, self._any_case())
        tokenizer.chat_control_tokens = sorted(self._markers)
        self.end_id = self._end_of_turn()
        """What ends the last turn of a conversation."""
        earlier = self._added_after_answer({"role": "user", "content": _OTHER_PROBE})
        self.earlier_end_id = self.end_id if earlier is None else self._visible[earlier]
        """What ends an assistant's turn that others follow; seldom another one."""

    def ids(self, messages: Sequence[Message], ending: Ending, tools: Tools | None = None) -> list[int]:
        """Token ids of a conversation.

        Raises:
            DataError: the template refuses it.
        """
        if typed := self.control_token_in([messages, tools]):
            if typed in self._markers:
                self._tell(
                    f"a text holds {typed!r}, which the chat template writes itself: it is read as text and makes no "
                    "turn (conversations are lists of messages)"
                )
            return self._sanitised(messages, ending, tools)
        return self.tokenised(self.rendered(messages, ending, tools))

    def rendered(self, messages: Sequence[Message], ending: Ending, tools: Tools | None = None) -> str:
        """A conversation as the template writes it.

        Raises:
            DataError: the template refuses it.
        """
        return self._render([dict(message) for message in messages], ending, tools, self.config.template_kwargs)

    def tokenised(self, rendered: str) -> list[int]:
        """Ids of rendered text, whose control tokens are the template's.

        What lies between two added tokens has the same ids whatever is around it, so turns that conversations share
        are tokenised once.
        """
        if not self._can_cut:
            return list(self._piece_ids(None, rendered))
        ids, before, start = list[int](), None, 0
        for match in self._all_added.finditer(rendered):
            if match[0] in self._cuts:
                ids += [*self._piece_ids(before, rendered[start : match.start()]), self._cuts[match[0]]]
                before, start = match[0], match.end()
        return [*ids, *self._piece_ids(before, rendered[start:])]

    def tokenised_after(self, text: str, rendered: bool) -> list[int]:
        """Ids of text that follows something, so that no space is put before it.

        Args:
            rendered: its control tokens are the template's; those in people's text are read as text.
        """

        def ids_of(text: str) -> list[int]:
            if rendered or not self._control.search(text):
                return self.tokenised(text)
            marked = self._control.sub(f"{_BEGIN}\\g<0>{_END}", text.replace(_BEGIN, "").replace(_END, ""))
            return self._ids_of_marked(marked)

        # What SentencePiece puts before the beginning goes with the line break.
        line_break, ids = self.tokenised("\n"), ids_of(f"\n{text}")
        return ids[len(line_break) :] if ids[: len(line_break)] == line_break else ids_of(text)

    def control_token_in(self, content: Any) -> str | None:
        """The first control token that a person typed in messages, tools or text."""
        return next((match[0] for text in _strings(content) if (match := self._control.search(text))), None)

    def check(self, messages: Sequence[Message], tools: Tools | None = None) -> None:
        """Makes sure that nothing which says something to the network is left out.

        The rule: each message's content, `tool_calls` and `reasoning_content`, and the tools, have to be rendered,
        unless `encoding.unrendered` is `warn`. A template that strips the reasoning of earlier turns has a place for
        it, and is taken at its word; one that strips the last turn's is told of. Other keys, such as ids, may be left
        out, and are told of.

        Raises:
            DataError: naming the message and the key.
        """
        for number, message in enumerate(messages, start=1):
            _check_types(message, number)
            if typed := self._control.search(str(message["role"])):
                what = f"the role of message {number} holds {typed[0]!r}, which would make a turn of its own"
                raise DataError(what, allowed="roles such as system, user, assistant, tool")
        rendered = cache(lambda: self.rendered(messages, _ending_of(messages), tools))
        kinds = [(self._kind(messages, number), bool(tools)) for number in range(len(messages))]
        unseen = [number for number, kind in enumerate(kinds) if kind not in self._checked]
        # Keys first: a template without a place for one may refuse the conversation because of it, in other words.
        for number in unseen:
            message, place = messages[number], _place(messages, number)
            if self._quotes_arguments and any(isinstance(text, str) for text in _arguments(message)):
                self._tell(
                    "the chat template writes the arguments of tool_calls as JSON, and those that are JSON text "
                    "already are quoted once more: give them as objects"
                )
            for key in message.keys() - {"role", "content"}:
                if message[key] and not self._mentions(key) and not self._mentions(_ALIASES.get(key, key)):
                    self._left_out(f"{key!r} {place}" if key in _MEANINGFUL else repr(key), key in _MEANINGFUL)
        for number in unseen:
            for what, changed in _changes(messages[number], last=number == len(messages) - 1):
                if not self._differs([*messages[:number], changed, *messages[number + 1 :]], tools, rendered()):
                    self._left_out(f"{what} {_place(messages, number)}", what != _REASONING)
            self._checked.add(kinds[number])
        roles = tuple(message["role"] for message in messages)
        if tools and roles not in self._checked:
            if not self._differs(messages, [_renamed(tool) for tool in tools], rendered()):
                self._left_out("the tools", True)
            self._checked.add(roles)

    def after_answer(self, *later: Message) -> str:
        """What the template puts after an assistant's content, where `later` messages follow it."""
        messages = [{"role": "user", "content": _OTHER_PROBE}, {"role": "assistant", "content": _PROBE}, *later]
        try:
            after = _around_probes(self.rendered(messages, "closed"))[1:]
        except DataError:
            return ""  # it takes no such conversation, and says so where one comes
        return after[-1] if after else ""

    def added_after_call(self) -> list[int]:
        """The added tokens that the template puts after the arguments of an assistant's last call."""
        call = {"id": "perlhfcal", "type": "function", "function": {"name": "find", "arguments": {"what": _PROBE}}}
        asked = {"role": "user", "content": _OTHER_PROBE}
        try:
            rendered = self.rendered([asked, {"role": "assistant", "content": "", "tool_calls": [call]}], "closed")
        except DataError:
            return []
        after = _around_probes(rendered)[1:]
        return [self._visible[token] for token in self._any_added.findall(after[-1])] if after else []

    # inside

    def _sanitised(self, messages: Sequence[Message], ending: Ending, tools: Tools | None) -> list[int]:
        """Ids of a conversation in which people typed control tokens, which are read as text.

        Signs around them tell them from the template's own. transformers' are lost where a template writes Python's or
        ASCII's escapes of them (`tool | string`), so these are others, put in their place afterwards.
        """
        given = [messages, tools, self.config.template_kwargs]
        begin, end = _unused_signs("\0".join([self.text, *_strings(given)]))
        marked = _substituted(given, self._control, f"{begin}\\g<0>{end}")
        rendered = self._render(marked[0], ending, marked[1], marked[2])
        for sign, theirs in ((begin, _BEGIN), (end, _END)):
            rendered = re.sub(rf"{sign}|\\+u{ord(sign):04x}", theirs, rendered.replace(theirs, ""))
        return self._ids_of_marked(rendered)

    def _ids_of_marked(self, text: str) -> list[int]:
        """Ids of text whose marked control tokens are read as text."""

        def ids_of(text: str) -> list[int]:
            ids: Any = self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
            return list(ids)

        def spelled(text: str, known: Mapping[str, int]) -> str:
            """With marks between the letters of those that transformers wouldn't know, so that they can't join."""

            def spell(found: re.Match[str]) -> str:
                return found[0] if found[1] in known else _BEGIN.join(found[1])

            return re.sub(f"{_BEGIN}([^{_BEGIN}{_END}]*){_END}", spell, text)

        text = spelled(text, self._visible)
        try:
            return ids_of(text)
        except ValueError:  # the tokenizer makes them of plain text as well
            return ids_of(spelled(text, {}))

    def _render(
        self, messages: list[dict[str, Any]], ending: Ending, tools: Tools | None, variables: dict[str, Any]
    ) -> str:
        given = [_in_parts(message) for message in messages] if self._takes_parts else messages

        def applied(given: list[dict[str, Any]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    given,
                    tools=[dict(tool) for tool in tools] if tools else None,
                    chat_template=self._day + self._template_for(tools, given),
                    add_generation_prompt=ending == "answer",
                    continue_final_message=ending == "unfinished",
                    tokenize=False,
                    **variables,
                )
            )

        try:
            try:
                return applied(given)
            except _REFUSALS:
                if all(message.get("content") is not None for message in given):
                    raise
                # Many templates take a call without content only if it is there, and empty.
                return applied([{**message, "content": message.get("content") or ""} for message in given])
        except _REFUSALS as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"the chat template refuses the roles {roles}: {error}",
                where="encoding.template",
                allowed="a template that takes these messages",
                hint="set encoding.template: plain, or name a Jinja file",
            ) from error

    def _template_for(self, tools: Tools | None, messages: Sequence[Mapping[str, Any]]) -> str:
        if self.is_plain:
            return PLAIN_TEXT if messages[0].get("role") == TEXT_ROLE else PLAIN
        return self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]

    def _tokenise(self, before: str | None, piece: str) -> tuple[int, ...]:
        """Ids of text, as they are after an added token."""
        if not piece:
            return ()
        ids: Any = self.tokenizer((before or "") + piece, add_special_tokens=False)["input_ids"]
        return tuple(ids[1:] if before else ids)

    def _wants_parts(self) -> bool:
        """Whether the template renders `[{"type": "text", "text": ...}]` alone and loses plain text."""

        def renders(parts: bool) -> bool:
            self._takes_parts = parts
            try:
                return _PROBE in self.rendered([{"role": "user", "content": _PROBE}], "answer")
            except DataError:
                return False

        return not self.is_plain and not renders(parts=False) and renders(parts=True)

    def _turn_markers(self) -> set[str]:
        """The added tokens that the template puts around turns, of whatever role.

        An empty thought that it puts before an answer is none: the network writes thoughts itself. Nor are tokens that
        enclose what a tool says within its turn.
        """
        if self.is_plain:
            return set()

        def tokens(text: str) -> set[str]:
            return set(self._any_added.findall(text))

        alone = self._probed("user")
        found, thoughts, after = tokens(alone), set[str](), set[str]()
        for roles in (("user", "assistant"), ("user", "assistant", "user")):
            if len(parts := _around_probes(self._probed(*roles))) > 2:
                thoughts |= {token for token in tokens(parts[1]) if _partner(token) in self._visible}
                after |= tokens(parts[2])
            found |= tokens("".join(parts))
        markers = found - (thoughts - tokens(alone) - after)
        for role in ("system", "developer"):
            markers |= tokens(self._probed(role, "user"))
        told = tokens(self._probed("user", "assistant", "tool")) - found
        return markers | {token for token in told if _partner(token) not in self._visible}

    def _any_case(self) -> bool:
        """Whether `<|END|>` becomes the token `<|end|>`: the tokenizer writes all text in small letters first."""
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = backend.normalizer if backend is not None else None
        lowers = normalizer is not None and normalizer.normalize_str("A") == normalizer.normalize_str("a")
        return lowers and any(token.normalized for token in self.tokenizer.added_tokens_decoder.values())

    def _probed(self, *roles: str) -> str:
        """A conversation of these roles; "" where the template takes none of the kind."""
        try:
            return self.rendered([{"role": role, "content": _PROBE} for role in roles], "closed")
        except DataError:
            return ""

    def _end_of_turn(self) -> int:
        """The added token that the template puts after an assistant's last content, else the tokenizer's end token."""
        eos: Any = self.tokenizer.eos_token_id
        end = self._added_after_answer()
        if end is None:
            if eos is None:
                hint = "set eos_token in its tokenizer_config.json"
                raise ConfigError("the tokenizer has no end token", where="base", hint=hint)
            return int(eos)
        if eos is not None and self._visible[end] != eos:
            self._tell(
                f"the chat template ends a turn with {end!r}, and the tokenizer's end token is "
                f"{self.tokenizer.eos_token!r}: completions learn to end with {end!r}, and both end one"
            )
        return self._visible[end]

    def _added_after_answer(self, *later: Message) -> str | None:
        """The first added token after an assistant's content, where `later` messages follow it."""
        first = self._any_added.search(self.after_answer(*later))
        return None if first is None or self.is_plain else first[0]

    def _check_kwargs(self) -> None:
        words = set(re.findall(r"[A-Za-z_]\w*", self.text))
        for key in self.config.template_kwargs:
            if key in _RESERVED or self.is_plain or key not in words:
                near = nearest(key, words - _RESERVED)
                raise ConfigError(
                    f"the chat template has no variable {key!r}",
                    where="encoding.template_kwargs",
                    allowed="variables that the template itself asks for",
                    hint=f"did you mean {near!r}?" if near else None,
                )

    def _mentions(self, word: str) -> bool:
        return (self.is_plain and word == "content") or re.search(rf"\b{re.escape(word)}\b", self.text) is not None

    def _kind(self, messages: Sequence[Message], number: int) -> tuple[object, ...]:
        """What a template may go by when it decides whether to render a message."""
        message, before = messages[number], messages[number - 1]["role"] if number else None
        keys = frozenset(key for key in message if message[key])
        calls = len(message.get("tool_calls") or ())
        return message["role"], keys, calls, before, number == len(messages) - 1, _THOUGHT in content_of(message)

    def _differs(self, messages: Sequence[Message], tools: Tools | None, rendered: str) -> bool:
        """Whether this is another conversation for the template, so that what was changed is read."""
        try:
            return rendered != self.rendered(messages, _ending_of(messages), tools)
        except DataError:
            return True

    def _left_out(self, what: str, meaningful: bool) -> None:
        problem = f"the chat template leaves out {what}"
        if not meaningful or self.config.unrendered == "warn":
            self._tell(problem)
            return
        raise DataError(
            problem,
            allowed="what the template has a place for",
            hint="name a template that renders it (encoding.template), or set encoding.unrendered: warn to go on "
            "without it",
        )


def templates_of(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, str]:
    """The Jinja texts that `encoding.template` names: `default`, and `tool_use` where records with tools have another.

    Raises:
        ConfigError: there are none, or the file can't be read.
    """
    own: Any = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {"default": own} if own else {}
    if name == "plain":
        return {"plain": PLAIN, TEXT_ROLE: PLAIN_TEXT}
    if name == "tokenizer":
        if not named:
            raise ConfigError(
                "the base's tokenizer has no chat template",
                where="encoding.template",
                allowed="plain, or the path of a Jinja file",
                hint="encoding.template: plain",
            )
        if "default" not in named:
            raise _no_template("the base's tokenizer has several chat templates and none is called default", named)
        return {key: text for key, text in named.items() if key in ("default", "tool_use")}
    if name.startswith(NAMED):
        wanted = name.removeprefix(NAMED)
        if wanted not in named:
            raise _no_template(f"the base's tokenizer has no chat template called {wanted!r}", named)
        return {"default": named[wanted]}
    try:
        return {"default": Path(name).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"can't read the template '{name}': {why}",
            where="encoding.template",
            allowed=f"tokenizer, plain, {NAMED}NAME of one of the tokenizer's, or the path of a Jinja file",
        ) from error


def _no_template(what: str, named: Mapping[str, str]) -> ConfigError:
    names = ", ".join(f"{NAMED}{name}" for name in named) or "none: it has no chat template"
    return ConfigError(what, where="encoding.template", allowed=names)


def _around_probes(rendered: str) -> list[str]:
    """What stands before, between and after the probes of a rendered conversation."""
    return re.split(_PROBE, rendered, flags=re.IGNORECASE)


def _partner(token: str) -> str:
    """`</x>` of `<x>`, and the other way round; of brackets likewise."""
    return token[:1] + token[2:] if token[1:2] == "/" else f"{token[:1]}/{token[1:]}"


def _alternatives(literals: Iterable[str], any_case: bool = False) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing where there is none."""
    pattern = "|".join(map(re.escape, sorted(literals, key=len, reverse=True))) or "(?!)"
    return re.compile(pattern, re.IGNORECASE if any_case else 0)


def _strings(content: Any) -> Iterator[str]:
    """All texts in messages or tools, names of arguments among them."""
    match content:
        case str():
            yield content
        case Mapping():
            for key, value in content.items():
                yield from _strings(key)
                yield from _strings(value)
        case list() | tuple():
            for value in content:
                yield from _strings(value)
        case _:
            return


def _substituted(content: Any, pattern: re.Pattern[str], by: str) -> Any:
    """The same with every match in its texts and keys replaced."""
    match content:
        case str():
            return pattern.sub(by, content)
        case Mapping():
            return {_substituted(k, pattern, by): _substituted(v, pattern, by) for k, v in content.items()}
        case list() | tuple():
            return [_substituted(value, pattern, by) for value in content]
        case _:
            return content


def _unused_signs(text: str) -> tuple[str, str]:
    """Two signs that aren't in the text, nor is their escape; printable, so that no template escapes them."""
    signs = (chr(number) for number in range(0x2801, 0x2900))  # Braille
    free = (sign for sign in signs if sign not in text and f"u{ord(sign):04x}" not in text)
    return next(free), next(free)


def _in_parts(message: Message) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


def _ending_of(messages: Sequence[Message]) -> Ending:
    return "closed" if messages[-1]["role"] == "assistant" else "answer"


def _arguments(message: Message) -> list[Any]:
    calls = message.get("tool_calls") or ()
    return [call["function"].get("arguments") for call in calls if isinstance(call.get("function"), Mapping)]


def _changes(message: Message, *, last: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a message says, and the message that says something else there."""
    if content := message.get("content"):
        yield "the content", {**message, "content": _OTHER_PROBE}
    calls = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        if (other := _renamed(call)) != call:
            yield "'tool_calls'", {**message, "tool_calls": [*calls[:number], other, *calls[number + 1 :]]}
    if not last:  # a template may strip the reasoning of earlier turns
        return
    for key in _MEANINGFUL[1:]:
        if message.get(key):
            reasoning = {name: _OTHER_PROBE for name in _MEANINGFUL[1:] if name in message}
            yield _REASONING, {**message, **reasoning}
    if message["role"] == "assistant" and isinstance(content, str) and _THOUGHT in content:
        thought, end, answer = content.partition(_THOUGHT)
        begin = "<think>" if "<think>" in thought else ""
        yield _REASONING, {**message, "content": f"{begin}{_OTHER_PROBE}{end}{answer}"}


def _renamed(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool, or a call of one, with another name."""
    if isinstance(inner := function.get("function"), Mapping):
        return {**function, "function": {**inner, "name": _OTHER_PROBE}}
    return {**function, "name": _OTHER_PROBE} if "name" in function else dict(function)


def _place(messages: Sequence[Message], number: int) -> str:
    return f"of message {number + 1}, of role {messages[number]['role']}"


def _check_types(message: Message, number: int) -> None:
    for key in ("name", "content"):
        value = message.get(key)
        if value is not None and not isinstance(value, str) and not (key == "content" and isinstance(value, list)):
            raise DataError(f"{key!r} of message {number} is {value!r:.60}, which is no text", allowed="text")


def on_day(day: str) -> str:
    """A macro that stands before a template and gives it that day instead of today's."""
    when = datetime.datetime.fromisoformat(day)
    directives = [*(f"%{letter}" for letter in _DIRECTIVES), "%-d", "%-m"]
    replaced = "".join(f"|replace({name!r}, {when.strftime(name)!r})" for name in directives)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro %}}\n"
