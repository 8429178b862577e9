"""The four kinds of record that perlhf learns from (docs/data.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
"""One chat turn: `role`, `content` (text; None where a turn has none, as one that only calls tools), and whatever else
the file gave for the chat template, such as `tool_calls`, `reasoning_content` or `name`."""

Text = str | Sequence[Message]
"""A prompt or completion: plain text, or chat messages. A completion may be several messages, of which the assistant's
are learned and scored; it ends with one of them."""

Tools = Sequence[Mapping[str, Any]]
"""What an assistant may call, as JSON schemas: the chat template renders them before the conversation."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two completions of one prompt, `chosen` preferred by a person."""

    prompt: Text
    chosen: Text
    rejected: Text
    group: str
    weight: float = 1.0
    margin: float = 0.0
    annotator: str | None = None
    source: str = ""
    tools: Tools | None = None


@dataclass(frozen=True, slots=True)
class Rating:
    """One completion with a thumbs up (`label=True`) or down."""

    prompt: Text
    completion: Text
    label: bool
    group: str
    weight: float = 1.0
    annotator: str | None = None
    source: str = ""
    tools: Tools | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion to imitate."""

    prompt: Text
    completion: Text
    group: str
    weight: float = 1.0
    source: str = ""
    tools: Tools | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer."""

    prompt: Text
    group: str
    source: str = ""
    tools: Tools | None = None
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The other columns of its row, for reward functions that ask for them by name."""


Record = Comparison | Rating | Demonstration | Prompt


def completions_of(record: Record) -> list[Text]:
    """What was judged or is imitated: chosen and rejected, the one completion, or none."""
    match record:
        case Comparison():
            return [record.chosen, record.rejected]
        case Rating() | Demonstration():
            return [record.completion]
        case Prompt():
            return []


def content_of(message: Message) -> str:
    """The text of a turn; "" where it has none."""
    return message.get("content") or ""


def text_of(text: Text) -> str:
    """Plain text as it is; chat messages as `role: content` lines."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {content_of(message)}" for message in text)
