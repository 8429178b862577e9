"""From messages to token ids: the same ones that transformers' `apply_chat_template` gives.

The template sees people's texts as they are, so whatever it does with them (trimming, dropping earlier reasoning,
deciding by what they say) happens as it will where the network is used. Only where a text makes a control token, such
as `<|im_end|>`, does it differ: there the token is written as ordinary text (control_tokens.py), so that nobody can end
a turn or begin one by typing it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from perlhf.config.stages import PLAIN_TEMPLATES, EncodingConfig
from perlhf.data.records import Message, Tools
from perlhf.errors import ConfigError, DataError
from perlhf.model.encoding.control_tokens import BEGIN, END, ControlTokens, alternatives, unused_signs
from perlhf.model.encoding.templates import TEXT_ROLE, check_variables, on_day, templates_of, without_begin
from perlhf.model.encoding.unrendered import PROBE as _OTHER_PROBE
from perlhf.model.encoding.unrendered import Checks

Ending = Literal["answer", "closed", "unfinished"]
"""Whether an answer is to follow, the conversation is over, or its last message is to be gone on with."""

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
_PROBE = "Perlhfprobe"
_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates open a thought in a prompt, or close it there."""


class ChatTemplate:
    """A tokenizer's chat template, a file's, `plain` or `plain-bos`.

    Args:
        tell: is given each thing worth knowing, as a sentence; the same one may come again.

    Raises:
        ConfigError: there is no such template, or it doesn't use a variable of `encoding.template_kwargs`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: EncodingConfig,
        tell: Callable[[str], None] = lambda _: None,
        *,
        remembers: bool = True,
    ):
        self.tokenizer, self.config, self._tell = tokenizer, config, tell
        self.is_plain = config.template in PLAIN_TEMPLATES
        self._templates = templates_of(tokenizer, config.template)
        self.text = "\0".join(text for _, text in sorted(self._templates.items()))
        check_variables(self.text, config.template_kwargs, plain=self.is_plain)
        if begin := without_begin(tokenizer, config.template):
            tell(
                f"texts of this base begin with {begin!r}, and `plain` leaves it out: answers can be much worse; "
                "encoding.template: plain-bos puts it there"
            )
        self._day = on_day(config.day) if config.day and "strftime_now" in self.text else ""
        added = tokenizer.added_tokens_decoder
        self._visible = {token.content: number for number, token in added.items() if token.content.strip()}
        self._any_added = alternatives(self._visible)
        # A tokenizer cuts text at these before anything else, and takes no space around them.
        simple = [t for t in added.values() if not (t.normalized or t.lstrip or t.rstrip or t.single_word)]
        self._cuts = {token.content: self._visible[token.content] for token in simple if token.content.strip()}
        self._can_cut = bool(tokenizer.is_fast and self._cuts) and not any(t.normalized for t in added.values())
        self._all_added = alternatives(token.content for token in added.values())
        self._piece_ids = lru_cache(maxsize=100_000 if remembers else 0)(self._tokenise)
        self._takes_parts = False
        self._takes_parts = self._wants_parts()
        self._markers = self._turn_markers()
        special = [token.content for token in added.values() if token.special and token.content.strip()]
        self._control = ControlTokens(tokenizer, {*special, *self._markers}, self.text)
        tokenizer.chat_control_tokens = sorted(self._markers)
        self._checks = Checks(
            self.text,
            lambda messages, tools: self.rendered(messages, _ending_of(messages), tools),
            self._control,
            plain=self.is_plain,
            lenient=config.unrendered == "warn",
            tell=tell,
        )
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
        if typed := self._control.literal_in([messages, tools]):
            if typed in self._markers:
                self._tell(
                    f"a text holds {typed!r}, which the chat template writes itself: it is read as text and makes no "
                    "turn (conversations are lists of messages)"
                )
            return self._control.ids(self._marked(messages, ending, tools))
        rendered = self.rendered(messages, ending, tools)
        if self._control.may_join([messages, tools]):
            marked = self._marked(messages, ending, tools, parts=True)
            if self._control.written_in(rendered) != self._control.written_in(marked):
                return self._control.ids(marked)
        return self.tokenised(rendered)

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
            if rendered or not self._control.first_in(text):
                return self.tokenised(text)
            return self._control.ids(self._control.marked(text))

        # What SentencePiece puts before the beginning goes with the anchor; a line break may join one of the text.
        for anchor in ("\n", ".", "a"):
            before, ids = self.tokenised(anchor), ids_of(f"{anchor}{text}")
            if ids[: len(before)] == before:
                return ids[len(before) :]
            alone = ids_of(text)
            if self.tokenizer.decode(alone, clean_up_tokenization_spaces=False) == text:
                return alone
        return ids_of(text)

    def control_token_in(self, content: Any) -> str | None:
        """The first control token that a person typed in messages, tools or text."""
        return self._control.first_in(content)

    def check(self, messages: Sequence[Message], tools: Tools | None = None) -> None:
        """Makes sure that nothing which says something to the network is left out (`unrendered.Checks.check`).

        Raises:
            DataError: naming the message and the key.
        """
        self._checks.check(messages, tools)

    def after_answer(self, *later: Message) -> str:
        """What the template puts after an assistant's content, where `later` messages follow it."""
        messages = [{"role": "user", "content": _OTHER_PROBE}, {"role": "assistant", "content": _PROBE}, *later]
        try:
            after = _around_probes(self.rendered(messages, "closed"))[1:]
        except DataError:
            return ""  # it takes no such conversation, and says so where one comes
        return after[-1] if after else ""

    def header(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """What the template puts between the content of a prompt's last message and the answer; "" for nothing."""
        if messages[-1]["role"] == "assistant":
            return ""
        try:
            opened = self.rendered([*messages[:-1], {**messages[-1], "content": _PROBE}], "answer", tools)
        except DataError:
            return ""
        after = _around_probes(opened)[1:]
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

    def switch_for(
        self, messages: Sequence[Message], before: Sequence[Message], answer: Sequence[Message], tools: Tools | None
    ) -> str | None:
        """What of `encoding.template_kwargs` makes the closed conversation begin as its prompt; None for nothing."""
        for name in [name for name in _SWITCHES if re.search(rf"\b{name}\b", self.text)]:
            for value in (True, False):
                variables = {**self.config.template_kwargs, name: value}
                try:
                    opened = self._render([dict(m) for m in messages], "answer", tools, variables)
                    closed = self._render([dict(m) for m in (*before, *answer)], "closed", tools, variables)
                except DataError:
                    continue
                if closed.startswith(opened):
                    return f"{name}: {str(value).lower()}"
        return None

    # inside

    def _marked(self, messages: Sequence[Message], ending: Ending, tools: Tools | None, *, parts: bool = False) -> str:
        """A rendered conversation with signs around what people typed of control tokens (`ControlTokens.ids`).

        transformers' own signs are lost where a template writes Python's or ASCII's escapes of them (`tool | string`),
        so these are others, put in their place afterwards.
        """
        given = [messages, tools, self.config.template_kwargs]
        begin, end = unused_signs([self.text, given])
        marked = self._control.marked(given, begin, end, parts=parts)
        rendered = self._render(marked[0], ending, marked[1], marked[2])
        for sign, theirs in ((begin, BEGIN), (end, END)):
            rendered = re.sub(rf"{sign}|\\+u{ord(sign):04x}", theirs, rendered.replace(theirs, ""))
        return rendered

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
            return self._templates[TEXT_ROLE if messages[0].get("role") == TEXT_ROLE else "plain"]
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


def _around_probes(rendered: str) -> list[str]:
    """What stands before, between and after the probes of a rendered conversation."""
    return re.split(_PROBE, rendered, flags=re.IGNORECASE)


def _partner(token: str) -> str:
    """`</x>` of `<x>`, and the other way round; of brackets likewise."""
    return token[:1] + token[2:] if token[1:2] == "/" else f"{token[:1]}/{token[1:]}"


def _in_parts(message: Message) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


def _ending_of(messages: Sequence[Message]) -> Ending:
    return "closed" if messages[-1]["role"] == "assistant" else "answer"
