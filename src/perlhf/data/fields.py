"""Small checked accessors that every reader uses, so that each mistake in a file is reported in the same words.

`where` is always `file:line` (JSON lines, TSV) or `file[index]` (arrays, Parquet, TFRecord).
"""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from perlhf.data.records import Comparison, Message, Prompt, Record, Text, content_of
from perlhf.errors import DataError, nearest

Row = tuple[str, dict[str, Any]]
"""Where a row was found, and the row."""

_UP = {"true", "yes", "y", "1", "1.0", "+1", "up", "thumbs up", "thumbsup", "thumb up", "👍", "good", "positive", "pos"}
_UP |= {
    "like",
    "liked",
    "upvote",
    "upvoted",
    "accept",
    "accepted",
    "approved",
    "desirable",
    "correct",
    "pass",
    "passed",
}
_UP |= {"t", "chosen", "preferred", "helpful", "harmless", "unharmful", "not harmful", "safe", "satisfied"}
_DOWN = {"false", "no", "n", "0", "0.0", "-1", "-1.0", "down", "thumbs down", "thumbsdown", "thumb down", "👎", "bad"}
_DOWN |= {"negative", "neg", "dislike", "disliked", "downvote", "downvoted", "reject", "rejected", "undesirable"}
_DOWN |= {"incorrect", "fail", "failed", "f", "dispreferred", "unhelpful", "not helpful", "harmful", "unsafe"}
_DOWN |= {"unsatisfied", "dissatisfied", "not safe", "not good", "not correct", "wrong"}
"""Words between which `_` and `-` are read as spaces."""


TIE, EQUAL_GRADES, EQUAL_MEANS = "tie", "equal grades", "equal mean grades"
TIES = (TIE, EQUAL_GRADES, EQUAL_MEANS)
"""Why a comparison without a preference is skipped; `data.ties: error` refuses it instead."""
_MARKS = re.compile(r"[^\w\s]")
_ASCII_MARKS = bytes(code for code in range(128) if _MARKS.match(chr(code)))
_LOWERED = bytes(ord(" " if chr(code).isspace() else chr(code).lower()) for code in range(128)) + bytes(128)
"""ASCII in lower case, all white space as a space."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row of a published file that a reader's stated rule leaves out."""

    reason: str
    source: str


@dataclass(frozen=True, slots=True)
class Told(Skipped):
    """Not a row that is left out, but what is told of one that was read: a sentence about so many of them."""


class MissingColumn(DataError):
    """A row lacks a column that its others ask for."""


def group_key(text: str) -> str:
    """Lower-cased, punctuation-free words of `text`; the text itself where nothing else is left (`?!`)."""
    if not text.isascii():
        return " ".join(_MARKS.sub("", text.lower()).split()) or text.strip()
    spaced = text.encode().translate(_LOWERED, _ASCII_MARKS)
    words = b" ".join(spaced.split()) if b"  " in spaced else spaced.strip()
    return words.decode() or text.strip()


def prompt_group(prompt: Text) -> str:
    """Group of a prompt: the key of its first user turn (of all its text where there is none)."""
    if isinstance(prompt, str):
        return group_key(prompt)
    first_user = next((content_of(message) for message in prompt if message["role"] == "user"), None)
    return group_key(first_user or " ".join(map(content_of, prompt)))


def is_blank(text: Text) -> bool:
    """True when there is nothing but white space; a message that calls tools is not blank."""
    if isinstance(text, str):
        return not text or text.isspace()
    return not any(content_of(message).strip() or message.get("tool_calls") for message in text)


def value(row: Mapping[str, Any], key: str, where: str, known: Sequence[str] = ()) -> Any:
    """The value of a column that must be there; a missing one is reported with the nearest name that isn't `known`."""
    if key not in row:
        near = nearest(key, [name for name in row if name not in known])
        raise MissingColumn(
            f"column {key!r} is missing",
            where=where,
            allowed=f"found columns {', '.join(map(repr, row)) or 'none'}",
            hint=f"rename {near!r} to {key!r}"
            if near
            else f"add {key!r}, or name another format (`perlhf data formats`)",
        )
    return row[key]


def text(row: Mapping[str, Any], key: str, where: str) -> str:
    """A column that must hold text."""
    content = value(row, key, where)
    if not isinstance(content, str):
        wrong_type(content, f"column {key!r}", "text", where)
    return content


def mapping(content: Any, what: str, where: str) -> dict[str, Any]:
    """`content` as an object with text keys, else a DataError that calls it `what`."""
    found = decoded(content)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        wrong_type(content, what, "an object", where)
    return found


def decoded(content: Any) -> Any:
    """A list or an object that text holds as JSON, or as Python prints it; anything else as it is.

    Cells of CSV files are text, and some tools write what JSON lines could hold as text, too.
    """
    if not isinstance(content, str) or not (begun := content.lstrip()).startswith(("[", "{")):
        return content
    for decode in (json.loads, ast.literal_eval):
        try:
            found = decode(begun)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return found if isinstance(found, list | dict) else content
    return content


def numeric(content: Any) -> Any:
    """The number that text holds, as in cells of CSV files; anything else as it is."""
    if not isinstance(content, str):
        return content
    try:
        found = float(content)
    except ValueError:
        return content
    return int(found) if found.is_integer() and abs(found) < 2**53 else found if math.isfinite(found) else content


def items(row: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """A column that must hold a list."""
    elements = decoded(value(row, key, where))
    if not isinstance(elements, list):
        wrong_type(elements, f"column {key!r}", "a list", where)
    return elements


def first_value(row: Mapping[str, Any], key: str, where: str) -> Any:
    """The first value of a feature that must have one."""
    elements = items(row, key, where)
    if not elements:
        raise DataError(f"feature {key!r} is empty", where=where)
    return elements[0]


def utf8(encoded: Any, where: str) -> str:
    """The text that a feature holds as bytes."""
    if not isinstance(encoded, bytes):
        wrong_type(encoded, "a feature", "bytes", where)
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        raise DataError("a text feature is not valid UTF-8", where=where) from error


def choice(row: Mapping[str, Any], key: str, allowed: Sequence[Any], where: str) -> Any:
    """A column that must hold one of `allowed` (booleans don't pass as 0 and 1), numbers perhaps as text."""
    content = value(row, key, where)
    if isinstance(content, str) and not any(isinstance(option, str) for option in allowed):
        content = numeric(content)
    if isinstance(content, bool) or not any(
        content == option for option in allowed if type(content) in (type(option), float)
    ):
        raise DataError(f"column {key!r} is {_show(content)}", where=where, allowed=", ".join(map(str, allowed)))
    return content


def number(row: Mapping[str, Any], key: str, default: float, where: str, least: float = -math.inf) -> float:
    """An optional column that must hold a finite number of at least `least`, perhaps as text."""
    amount = numeric(row.get(key, default))
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        wrong_type(amount, f"column {key!r}", "a number", where)
    if not -1e300 < amount < 1e300 or amount < least:
        raise DataError(
            f"column {key!r} is {_show(amount)}",
            where=where,
            allowed="a finite number" + (f" of {least:g} or more" if least > -math.inf else ""),
        )
    return float(amount)


def label_of(content: Any) -> bool | None:
    """A thumbs up or down by any of the ways that files write it (true, 1, "yes", "up", "good"); None for another."""
    if isinstance(content, bool):
        return content
    if isinstance(content, int | float):
        return True if content == 1 else False if content in (0, -1) else None
    if isinstance(content, str):
        word = content.strip().lower()
        word = word if word in _DOWN else word.replace("_", " ").replace("-", " ").strip()
        return True if word in _UP else False if word in _DOWN else None
    return None


def wrong_type(content: Any, what: str, expected: str, where: str) -> NoReturn:
    """Raises the DataError for a value of the wrong type."""
    raise DataError(
        f"{what} is {_show(content)}, which is no {expected.removeprefix('a ').removeprefix('an ')}",
        where=where,
        allowed=expected,
    )


def message(role: str, content: str) -> Message:
    """One chat message."""
    return {"role": role, "content": content}


def json_text(body: Any) -> str:
    """How API calls and responses are written as text."""
    return json.dumps(body, ensure_ascii=False)


def parse_json(encoded: str, what: str, where: str) -> Any:
    """Decodes JSON that a column holds as text."""
    try:
        return json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not valid JSON: {error}", where=where, allowed="JSON encoded as text") from error


def checked(record: Record, where: str) -> Record:
    """`record` itself when it can be trained on.

    Raises:
        DataError: the prompt or a completion is empty, or some text can't be written as UTF-8 (a lone surrogate).
    """
    if isinstance(record, Comparison):
        answers = (("chosen", record.chosen), ("rejected", record.rejected))
    elif isinstance(record, Prompt):
        answers = ()
    else:
        answers = (("completion", record.completion),)
    if is_blank(record.prompt):
        raise _empty("prompt", where)
    for name, content in answers:
        if is_blank(content if isinstance(content, str) else content[-1:]):
            raise _empty(name, where)
    refuse_surrogates(record.group, where)
    for _, content in (("prompt", record.prompt), *answers):
        if isinstance(content, str):
            refuse_surrogates(content, where)
        else:
            for turn in content:
                refuse_surrogates(content_of(turn), where)
    return record


def _empty(name: str, where: str) -> DataError:
    return DataError(f"{name} is empty", where=where, allowed="text with at least one visible character")


def refuse_surrogates(part: str, where: str) -> None:
    """Raises DataError for text that can't be written as UTF-8."""
    if part.isascii():
        return
    try:
        part.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text holds {part[error.start]!r}, half of a surrogate pair",
            where=where,
            allowed="text that can be written as UTF-8",
            hint="write the character itself, or both halves of the \\u escape",
        ) from error


def _show(content: Any) -> str:
    """A short form of a value for messages."""
    shown = repr(content)
    return shown if len(shown) <= 60 else shown[:57] + "..."
