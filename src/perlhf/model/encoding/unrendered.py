"""What is checked before a conversation is rendered: that nothing which says something to the network is left out."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from perlhf.data.readers.messages import ROLES
from perlhf.data.records import Message, Tools, content_of
from perlhf.errors import DataError
from perlhf.model.encoding.control_tokens import ControlTokens
from perlhf.model.encoding.templates import TEXT_ROLE

PROBE = "Otherprobe"
"""Text that nobody writes."""
_MEANINGFUL = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Keys of a message, besides its content, that say something to the network."""
_ALIASES = {"reasoning": "reasoning_content", "thinking": "reasoning_content"}
"""Names under which transformers gives a template the same thing."""
_IS_NULL = re.compile(r"content['\"]?\]?\s+is\s+(not\s+)?none\b")
_NO_NULL = (
    "it writes calls where the content `is none`, and transformers gives templates no null: in a copy of the template, "
    "named as encoding.template: FILE, write `not message.content` instead (and `message.content` for `is not none`)"
)
_THOUGHT, _REASONING, _CALLS = "</think>", "the reasoning", "'tool_calls'"


class Checks:
    """The checks of one chat template.

    Args:
        template: Jinja.
        rendered: gives a conversation as it writes it; raises DataError where it refuses one.
        control: its control tokens.
        plain: it is `encoding.template: plain`.
        lenient: what is left out is told, and is no error.
        tell: is given each thing worth knowing.
    """

    def __init__(
        self,
        template: str,
        rendered: Callable[[Sequence[Message], Tools | None], str],
        control: ControlTokens,
        *,
        plain: bool,
        lenient: bool,
        tell: Callable[[str], None],
    ):
        self._template, self._rendered, self._control = template, rendered, control
        self._plain, self._lenient, self._tell = plain, lenient, tell
        self._checked: set[Any] = set()
        self._quotes_arguments = bool(re.search(r"arguments\s*\|\s*tojson", template)) and not re.search(
            r"arguments\s+is\s+(string|not\s+mapping|mapping)", template
        )

    def check(self, messages: Sequence[Message], tools: Tools | None = None) -> None:
        """Makes sure that nothing which says something to the network is left out.

        The rule: each message's content, `tool_calls` and `reasoning_content`, and the tools, have to be rendered,
        unless `encoding.unrendered` is `warn`. A template that strips the reasoning of earlier turns has a place for
        it, and is taken at its word; one that strips the last turn's is told of. Other keys, such as ids, may be left
        out, and are told of. A role makes no control token, unless the template or everybody knows it.

        Raises:
            DataError: naming the message and the key.
        """
        for number, message in enumerate(messages, start=1):
            _check_types(message, number)
            if typed := self._control.first_in(str(message["role"])):
                what = f"the role of message {number} holds {typed!r}, which would make a turn of its own"
                raise DataError(what, allowed="roles such as system, user, assistant, tool")
        rendered = cache(lambda: self._rendered(messages, tools))
        kinds = [(self._kind(messages, number), bool(tools)) for number in range(len(messages))]
        unseen = [number for number, kind in enumerate(kinds) if kind not in self._checked]
        for number in unseen:
            self._check_role(messages, number, tools, rendered)
        # Keys first: a template without a place for one may refuse the conversation because of it, in other words.
        for number in unseen:
            self._check_keys(messages, number)
        for number in unseen:
            for what, changed in _changes(messages[number], last=number == len(messages) - 1):
                if not self._differs([*messages[:number], changed, *messages[number + 1 :]], tools, rendered()):
                    hint = _NO_NULL if what == _CALLS and _IS_NULL.search(self._template) else None
                    self._left_out(f"{what} {_place(messages, number)}", what != _REASONING, hint)
            self._checked.add(kinds[number])
        roles = tuple(message["role"] for message in messages)
        if tools and roles not in self._checked:
            if not self._differs(messages, [_renamed(tool) for tool in tools], rendered()):
                self._left_out("the tools", True)
            self._checked.add(roles)

    def _check_role(
        self, messages: Sequence[Message], number: int, tools: Tools | None, rendered: Callable[[], str]
    ) -> None:
        """A template that writes `'<|' + role + '|>'` ends the turn where the role is `end`."""
        role = str(messages[number]["role"])
        quoted = re.search(rf"(['\"]){re.escape(role)}\1", self._template)
        if role.lower() in ROLES or role == TEXT_ROLE or quoted:
            return
        other = [*messages[:number], {**messages[number], "role": PROBE}, *messages[number + 1 :]]
        try:
            expected = self._control.written_in(self._rendered(other, tools))
        except DataError:
            return  # the template knows its roles, and takes this one
        made = Counter(self._control.written_in(rendered())) - Counter(expected)
        if made := [token for token in made if role.strip().lower() in token.lower()]:
            raise DataError(
                f"the chat template makes the control token {made[0]!r} of the role of message {number + 1}, {role!r}",
                allowed=", ".join(ROLES),
                hint="rename the role, or name it in the template (encoding.template: FILE)",
            )

    def _check_keys(self, messages: Sequence[Message], number: int) -> None:
        message, place = messages[number], _place(messages, number)
        if self._quotes_arguments and any(isinstance(text, str) for text in _arguments(message)):
            self._tell(
                "the chat template writes the arguments of tool_calls as JSON, and those that are JSON text "
                "already are quoted once more: give them as objects"
            )
        for key in message.keys() - {"role", "content"}:
            if message[key] and not self._mentions(key) and not self._mentions(_ALIASES.get(key, key)):
                self._left_out(f"{key!r} {place}" if key in _MEANINGFUL else repr(key), key in _MEANINGFUL)

    def _mentions(self, word: str) -> bool:
        return (self._plain and word == "content") or re.search(rf"\b{re.escape(word)}\b", self._template) is not None

    def _kind(self, messages: Sequence[Message], number: int) -> tuple[object, ...]:
        """What a template may go by when it decides whether to render a message."""
        message, before = messages[number], messages[number - 1]["role"] if number else None
        keys = frozenset(key for key in message if message[key])
        calls = len(message.get("tool_calls") or ())
        return message["role"], keys, calls, before, number == len(messages) - 1, _THOUGHT in content_of(message)

    def _differs(self, messages: Sequence[Message], tools: Tools | None, rendered: str) -> bool:
        """Whether this is another conversation for the template, so that what was changed is read."""
        try:
            return rendered != self._rendered(messages, tools)
        except DataError:
            return True

    def _left_out(self, what: str, meaningful: bool, hint: str | None = None) -> None:
        problem = f"the chat template leaves out {what}"
        if not meaningful or self._lenient:
            self._tell(problem)
            return
        raise DataError(
            problem,
            allowed="what the template has a place for",
            hint=hint
            or "name a template that renders it (encoding.template), or set encoding.unrendered: warn to go on "
            "without it",
        )


def _arguments(message: Message) -> list[Any]:
    calls = message.get("tool_calls") or ()
    return [call["function"].get("arguments") for call in calls if isinstance(call.get("function"), Mapping)]


def _changes(message: Message, *, last: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a message says, and the message that says something else there."""
    if content := message.get("content"):
        yield "the content", {**message, "content": PROBE}
    calls = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        if (other := _renamed(call)) != call:
            yield _CALLS, {**message, "tool_calls": [*calls[:number], other, *calls[number + 1 :]]}
    if not last:  # a template may strip the reasoning of earlier turns
        return
    for key in _MEANINGFUL[1:]:
        if message.get(key):
            reasoning = {name: PROBE for name in _MEANINGFUL[1:] if name in message}
            yield _REASONING, {**message, **reasoning}
    if message["role"] == "assistant" and isinstance(content, str) and _THOUGHT in content:
        thought, end, answer = content.partition(_THOUGHT)
        begin = "<think>" if "<think>" in thought else ""
        yield _REASONING, {**message, "content": f"{begin}{PROBE}{end}{answer}"}


def _renamed(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool, or a call of one, with another name."""
    if isinstance(inner := function.get("function"), Mapping):
        return {**function, "function": {**inner, "name": PROBE}}
    return {**function, "name": PROBE} if "name" in function else dict(function)


def _place(messages: Sequence[Message], number: int) -> str:
    return f"of message {number + 1}, of role {messages[number]['role']}"


def _check_types(message: Message, number: int) -> None:
    for key in ("name", "content"):
        value = message.get(key)
        if value is not None and not isinstance(value, str) and not (key == "content" and isinstance(value, list)):
            raise DataError(f"{key!r} of message {number} is {value!r:.60}, which is no text", allowed="text")
