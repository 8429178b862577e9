"""Chat messages as files have them: roles, content in parts, tool calls, ShareGPT's turns, transcripts in one text.

What becomes of a message is the same in every layout (`messages`): a mapping with `role`, `content` and whatever else
the file gave, nulls left out, since Arrow fills every message with the keys of all others.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from perlhf.data.fields import decoded, mapping, message, refuse_surrogates, text, wrong_type
from perlhf.data.records import Message, Text
from perlhf.errors import DataError, nearest

ROLES = ("system", "user", "assistant", "tool", "developer", "function")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Who speaks in ShareGPT's turns (`from`), by the names that files have."""

_CALLERS = ("function_call", "tool_call")
_OF_CALLS = (*_CALLERS, "tool_response", "function_response", "observation")
"""Roles of ms-swift's messages that are ShareGPT's speakers."""
_SPEAKING = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys that make a turn without content no empty one."""
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA_PARTS = ("image", "audio", "video", "file", "document")
_HUMANS = ("Human", "User", "HUMAN", "USER")
_BEGINS = re.compile(r"\s*(?:### )?(?:Human|User|HUMAN|USER|System|SYSTEM):")
_SYSTEM = re.compile(r"(?:System|SYSTEM):(?P<text>.*?)\n+(?=(?:Human|User|HUMAN|USER):)", re.DOTALL)
_DEEPEST = 40


def messages(conversation: Any, column: str, where: str) -> tuple[Message, ...]:
    """A conversation: a list of messages or ShareGPT turns, or the same as JSON text, as CSV files have it."""
    conversation = listed(conversation)
    if isinstance(conversation, Mapping) and ("role" in conversation or "from" in conversation):
        conversation = _rows_of_struct(conversation)
    if not isinstance(conversation, list):
        wrong_type(conversation, f"column {column!r}", "text or a list of messages", where)
    return tuple(_message(mapping(part, f"a message of {column!r}", where), column, where) for part in conversation)


def listed(content: Any) -> Any:
    """A list that a cell of a CSV file holds as JSON, or as Python prints it; anything else as it is."""
    if not isinstance(content, str) or not _may_begin(content, "[{"):
        return content
    if not content.lstrip()[:2].startswith(("[{", "[ ", "[\n", "{")):
        return content
    if not re.search(r"['\"](?:role|from)['\"]", content):
        return content
    for decode in (json.loads, ast.literal_eval):
        try:
            decoded = decode(content)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(decoded, list | dict):
            return decoded
    return content


def as_messages(prompt: Text) -> tuple[Message, ...]:
    """A prompt as messages: text is one user message."""
    return (message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)


def completion(turns: Sequence[Message]) -> Text:
    """A completion as records have it: text where it is one assistant message of nothing but text."""
    if len(turns) == 1 and set(turns[0]) == {"role", "content"} and isinstance(turns[0]["content"], str):
        return turns[0]["content"]
    return tuple(turns)


def transcript(content: str) -> tuple[Message, ...] | None:
    """The turns of a text that is a whole dialog: `Human: ...` (or `User:`), `Assistant: ...`, blank lines between.

    Where nowhere a blank line precedes the assistant, one line break does; `### Human: ... ### Assistant: ...` needs
    none. A last `Assistant:` with nothing after it, where the answer belongs, is no turn. None for any other text.
    """
    if not _may_begin(content, "HUS#") or not _BEGINS.match(content):
        return None
    if "\r" in content:
        content = content.replace("\r\n", "\n")
    begun = content.lstrip()
    system, begun = _system_before(begun)
    first = next((name for name in _HUMANS if begun.startswith((f"{name}:", f"### {name}:"))), None)
    if first is None:
        return None
    answering = "ASSISTANT" if first.isupper() else "Assistant"
    gap = "### " if begun.startswith("###") else "\n\n" if f"\n\n{answering}:" in begun else "\n"
    _, *parts = re.split(rf"{gap}({first}|{answering}):", begun if gap == "### " else gap + begun)
    turns = [
        message("assistant" if mark == answering else "user", part.strip())
        for mark, part in zip(parts[::2], parts[1::2], strict=True)
    ]
    if system:
        turns.insert(0, message("system", system))
    if not content.startswith("\n\nHuman:") and all(turn["role"] != "assistant" for turn in turns):
        return None
    return tuple(turns[:-1] if turns[-1] == message("assistant", "") else turns)


def _may_begin(content: str, marks: str) -> bool:
    """Whether the first character is one of `marks` or white space: what most texts are told apart by."""
    first = content[:1]
    return first in marks or first.isspace()


def _system_before(content: str) -> tuple[str, str]:
    """The text after a first `System:`, and what follows it from the first turn on."""
    match = _SYSTEM.match(content)
    return (match["text"].strip(), content[match.end() :]) if match else ("", content)


def transcript_prompt(content: str) -> tuple[Message, ...] | None:
    """The turns of a prompt that is surely a transcript: it asks for the assistant's turn, or begins as HH's do."""
    if not _may_begin(content, "HUS#"):
        return None
    surely = content.rstrip().endswith(("Assistant:", "ASSISTANT:")) or content.startswith(
        ("\n\nHuman:", "\r\n\r\nHuman:")
    )
    if not surely:
        return None
    return transcript(content) or line_transcript(content)


def line_transcript(content: str) -> tuple[Message, ...] | None:
    """The turns of a transcript whose line breaks are gone: each speaker follows a space. None where some are there.

    The user and the assistant speak in turn, and the assistant last; a last `Assistant:` with nothing after it is no
    turn.
    """
    line = content.strip() if _may_begin(content, "HU") else ""
    first = next((name for name in _HUMANS if line.startswith(f"{name}:")), None)
    if first is None or "\n" in line:
        return None
    answering = "ASSISTANT" if first.isupper() else "Assistant"
    _, *parts = re.split(rf"(?:^|\s)({first}|{answering}):(?=\s|$)", line)
    if len(parts) % 4 or parts[::2] != [first, answering] * (len(parts) // 4):
        return None
    turns = [
        message("assistant" if mark == answering else "user", part.strip())
        for mark, part in zip(parts[::2], parts[1::2], strict=True)
    ]
    return tuple(turns if turns[-1]["content"] else turns[:-1]) or None


def tools(content: Any, where: str) -> tuple[Mapping[str, Any], ...] | None:
    """The schemas of a `tools` column: a list, or JSON text of one; bare functions get the wrapper of templates."""
    if isinstance(content, str):
        if not content.strip():
            return None
        try:
            content = found if (found := decoded(content)) is not content else json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"column 'tools' is not valid JSON: {error}", where=where, allowed="a list of tools, or JSON of one"
            ) from error
    if isinstance(content, Mapping):
        content = [content]
    if content is None or content == []:
        return None
    if not isinstance(content, list):
        wrong_type(content, "column 'tools'", "a list of tools", where)
    schemas = [without_nulls(_json_object(tool), where) for tool in content]
    for tool in schemas:
        mapping(tool, "a tool", where)
    bare = ("name" in tool and "function" not in tool for tool in schemas)
    return tuple(
        {"type": "function", "function": tool} if is_bare else tool for tool, is_bare in zip(schemas, bare, strict=True)
    )


def without_nulls(content: Any, where: str, depth: int = 0) -> Any:
    """`content` without the nulls that Arrow fills into objects, at every depth."""
    if depth > _DEEPEST:
        raise DataError("a message is nested too deeply", where=where, allowed=f"{_DEEPEST} levels")
    if isinstance(content, Mapping):
        for key in content:
            refuse_surrogates(str(key), where)
        return {key: without_nulls(part, where, depth + 1) for key, part in content.items() if part is not None}
    if isinstance(content, list):
        return [without_nulls(part, where, depth + 1) for part in content]
    if isinstance(content, str):
        refuse_surrogates(content, where)
    return content


def _rows_of_struct(conversation: Mapping[str, Any]) -> list[Any]:
    """One message as a list of it; a struct of lists, as `datasets` stored sequences of objects, as those objects."""
    lists = {name: cells for name, cells in conversation.items() if isinstance(cells, list)}
    speakers = lists.get("role", lists.get("from"))
    if speakers is None:
        return [conversation]
    return [
        {name: cells[at] for name, cells in lists.items() if at < len(cells) and cells[at] is not None}
        for at in range(len(speakers))
    ]


def _message(part: dict[str, Any], column: str, where: str) -> Message:
    if "role" not in part and ("from" in part or "value" in part):
        return _turn(part, column, where)
    role = text(part, "role", where)
    if role.lower() in _OF_CALLS:
        return _turn({**part, "from": role}, column, where)
    if role.lower() not in ROLES:
        near = nearest(role, ROLES)
        raise DataError(
            f"{column} has a message of role {role!r:.40}",
            where=where,
            allowed=", ".join(ROLES),
            hint=f"did you mean {near!r}?" if near else None,
        )
    role = role.lower()
    return _built("tool" if role == "function" else role, part, "content", column, where)


def _turn(part: dict[str, Any], column: str, where: str) -> Message:
    """One of ShareGPT's turns; what a call's text holds becomes `tool_calls`, as templates render it."""
    speaker = text(part, "from", where)
    role = SPEAKERS.get(speaker.lower())
    if role is None:
        near = nearest(speaker, SPEAKERS)
        raise DataError(
            f"{column} has a turn from {speaker!r:.40}",
            where=where,
            allowed=", ".join(SPEAKERS),
            hint=f"did you mean {near!r}?" if near else None,
        )
    built = _built(role, part, "value" if "value" in part else "content", column, where)
    calls = _calls_in(built["content"], where) if speaker.lower() in _CALLERS else None
    return dict(built) | {"content": "", "tool_calls": calls} if calls else built


def _built(role: str, part: dict[str, Any], key: str, column: str, where: str) -> Message:
    extra = without_nulls({name: given for name, given in part.items() if name not in ("role", "from", key)}, where)
    if "function_call" in extra and "tool_calls" not in extra:
        extra["tool_calls"] = [extra["function_call"]]
    extra.pop("function_call", None)
    if "tool_calls" in extra:
        calls = _calls(extra.pop("tool_calls"), where)
        extra |= {"tool_calls": calls} if calls else {}
    content = part.get(key)
    if content is None and isinstance(extra.get("refusal"), str):
        content = extra.pop("refusal")
    if content is None and any(extra.get(name) for name in _SPEAKING):
        return {"role": role, "content": None} | extra
    if isinstance(content, list) or (isinstance(content, dict) and "type" in content):
        content = "".join(_part(one, column, where) for one in (content if isinstance(content, list) else [content]))
    return {"role": role, "content": content if isinstance(content, str) else text(part, key, where)} | extra


def _part(part: Any, column: str, where: str) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, str):
        return part
    part = mapping(part, f"a part of a message of {column!r}", where)
    kind = str(part.get("type", "text"))
    if kind in _TEXT_PARTS:
        return text(part, _TEXT_PARTS[kind], where)
    shown = next((name for name in _MEDIA_PARTS if name in kind), None)
    raise DataError(
        f"{column} has a message with a part of type {kind!r:.40}" + (f": perlhf reads no {shown}s" if shown else ""),
        where=where,
        allowed="parts of type text",
        hint="leave such records out, or take those parts out of them",
    )


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in the wrapper that templates expect; their arguments are what the file has, objects or JSON text."""
    content = _json_object(content)
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        wrong_type(content, "tool_calls", "a list of calls", where)
    calls = []
    for call in content:
        call = dict(mapping(_json_object(call), "a tool call", where))
        if "function" not in call:
            call = {"type": "function", "function": call}
        function = dict(mapping(_json_object(call["function"]), "a tool call's function", where))
        text(function, "name", where)
        calls.append(call | {"function": function})
    without_nulls(calls, where)  # JSON text's nulls stay, and what else is refused is refused there, too
    return calls


def _calls_in(content: str | None, where: str) -> list[dict[str, Any]] | None:
    """The calls that a `function_call` turn's text holds as JSON; None when it holds something else."""
    decoded = _json_object(content)
    found = [decoded] if isinstance(decoded, dict) else decoded
    if not isinstance(found, list) or not found:
        return None
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in found):
        return None
    return _calls(found, where)


def _json_object(content: Any) -> Any:
    """What JSON text of an object or list holds; anything else as it is."""
    if not isinstance(content, str) or not content.lstrip().startswith(("{", "[")):
        return content
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content
