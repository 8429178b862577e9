"""Reader of the columns that TRL uses: prompt, chosen, rejected, completion, label, messages."""

from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from typing import Any

from perlhf.data.fields import (
    ROLES,
    Row,
    Skipped,
    checked,
    mapping,
    message,
    number,
    prompt_group,
    text,
    value,
    wrong_type,
)
from perlhf.data.records import Comparison, Demonstration, Message, Prompt, Rating, Record, Text
from perlhf.errors import DataError, nearest

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "messages",
    "weight",
    "margin",
    "annotator",
    "group",
    "source",
)
_LIKELY_TYPO = 0.75


def trl(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """Files with TRL's column names; each row by itself decides what it is.

    Rule: `chosen` and `rejected` make a comparison; `completion` with `label` a rating; `completion` alone, or
    `messages`, a demonstration (of the last turn); `prompt` alone a prompt. Text may be a string (a single user
    message) or a list of chat messages. Whole conversations in `chosen` and `rejected` without `prompt` are split
    after their common beginning; a conversation that repeats the prompt loses it. Optional: `weight`, `margin`,
    `annotator`, `group` (default: the first user turn). A null counts as absent; other columns are ignored, unless
    one looks like a misspelt name.
    """
    for where, row in rows:
        row = {key: content for key, content in row.items() if content is not None}
        kinds = set(row)
        if kinds & {"chosen", "rejected"}:
            yield checked(_comparison(row, where), where)
        elif kinds & {"completion", "label"}:
            yield checked(_completion(row, where), where)
        elif "messages" in row and "prompt" not in row:
            yield checked(_last_turn(row, where), where)
        else:
            _refuse_misspelt(row, COLUMNS, where)
            prompt = _prompt(row, where)
            yield checked(Prompt(prompt, _group(row, prompt, where), source=_source(row, where)), where)


def _comparison(row: dict[str, Any], where: str) -> Comparison:
    sides = value(row, "chosen", where, COLUMNS), value(row, "rejected", where, COLUMNS)
    _refuse_misspelt(row, ("prompt", "weight", "margin", "annotator", "group"), where)
    if "prompt" not in row and all(isinstance(side, list) for side in sides):
        prompt, chosen, rejected = _split_conversations(*sides, where)
    else:
        prompt = _prompt(row, where)
        chosen, rejected = _answer(sides[0], prompt, "chosen", where), _answer(sides[1], prompt, "rejected", where)
    return Comparison(
        prompt,
        chosen,
        rejected,
        _group(row, prompt, where),
        weight=number(row, "weight", 1.0, where, least=0.0),
        margin=number(row, "margin", 0.0, where),
        annotator=text(row, "annotator", where) if "annotator" in row else None,
        source=_source(row, where),
    )


def _completion(row: dict[str, Any], where: str) -> Rating | Demonstration:
    prompt = _prompt(row, where)
    completion = _answer(value(row, "completion", where, COLUMNS), prompt, "completion", where)
    group, weight = _group(row, prompt, where), number(row, "weight", 1.0, where, least=0.0)
    _refuse_misspelt(row, ("label", "weight", "annotator", "group"), where)
    if "label" not in row:
        return Demonstration(prompt, completion, group, weight=weight, source=_source(row, where))
    label = row["label"]
    if not isinstance(label, bool):
        raise DataError(
            f"label is {label!r:.60}, which is no boolean",
            where=where,
            allowed="true (thumbs up) or false (thumbs down), without quotes",
        )
    annotator = text(row, "annotator", where) if "annotator" in row else None
    return Rating(prompt, completion, label, group, weight=weight, annotator=annotator, source=_source(row, where))


def _last_turn(row: dict[str, Any], where: str) -> Demonstration:
    messages = _messages(row["messages"], "messages", where)
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(
            "messages does not end with an assistant message",
            where=where,
            allowed="a conversation whose last message is the answer",
        )
    prompt = messages[:-1]
    weight = number(row, "weight", 1.0, where, least=0.0)
    return Demonstration(
        prompt, messages[-1]["content"], _group(row, prompt, where), weight=weight, source=_source(row, where)
    )


def _prompt(row: dict[str, Any], where: str) -> Text:
    prompt = value(row, "prompt", where, COLUMNS)
    return prompt if isinstance(prompt, str) else _messages(prompt, "prompt", where)


def _answer(content: Any, prompt: Text, column: str, where: str) -> str:
    """The text of a completion given as text, as one assistant message, or as the whole conversation."""
    if isinstance(content, str):
        return content
    messages = _messages(content, column, where)
    before = (message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    if len(messages) > len(before) and messages[: len(before)] == before:
        messages = messages[len(before) :]
    return _one_assistant_message(messages, column, where)


def _split_conversations(chosen: list[Any], rejected: list[Any], where: str) -> tuple[tuple[Message, ...], str, str]:
    chosen_turns, rejected_turns = _messages(chosen, "chosen", where), _messages(rejected, "rejected", where)
    shared = 0
    while shared < min(len(chosen_turns), len(rejected_turns)) - 1 and chosen_turns[shared] == rejected_turns[shared]:
        shared += 1
    if not shared:
        raise DataError(
            "chosen and rejected share no beginning",
            where=where,
            allowed="a `prompt` column, or conversations that begin alike",
        )
    return (
        chosen_turns[:shared],
        _one_assistant_message(chosen_turns[shared:], "chosen", where),
        _one_assistant_message(rejected_turns[shared:], "rejected", where),
    )


def _one_assistant_message(messages: tuple[Message, ...], column: str, where: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(part["role"] for part in messages) or "nothing"
        raise DataError(
            f"{column} holds {roles} after the prompt", where=where, allowed="text or exactly one assistant message"
        )
    return messages[0]["content"]


def _messages(conversation: Any, column: str, where: str) -> tuple[Message, ...]:
    if not isinstance(conversation, list):
        wrong_type(conversation, f"column {column!r}", "text or a list of messages", where)
    messages = []
    for part in conversation:
        part = mapping(part, f"a message of {column!r}", where)
        role = text(part, "role", where)
        if role not in ROLES:
            near = nearest(role, ROLES)
            raise DataError(
                f"{column} has a message of role {role!r:.40}",
                where=where,
                allowed=", ".join(ROLES),
                hint=f"did you mean {near!r}?" if near else None,
            )
        messages.append(message(role, text(part, "content", where)))
    return tuple(messages)


def _group(row: dict[str, Any], prompt: Text, where: str) -> str:
    if "group" not in row:
        return prompt_group(prompt)
    return text(row, "group", where).strip() or prompt_group(prompt)


def _source(row: dict[str, Any], where: str) -> str:
    return row["source"] if isinstance(row.get("source"), str) and row["source"].isprintable() else where


def _refuse_misspelt(row: dict[str, Any], optional: tuple[str, ...], where: str) -> None:
    """A column that is nearly the name of an absent one would otherwise be ignored without a word."""
    for name in optional:
        for column in row:
            likeness = SequenceMatcher(None, name, column.lower()).ratio()
            if name not in row and column not in COLUMNS and likeness >= _LIKELY_TYPO:
                raise DataError(
                    f"column {column!r} is unknown",
                    where=where,
                    allowed=", ".join(COLUMNS),
                    hint=f"rename {column!r} to {name!r}",
                )
