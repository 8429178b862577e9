"""The four kinds of record that perlhf learns from (docs/data.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, str]
"""One chat turn: `{"role": ..., "content": ...}`."""

Text = str | Sequence[Message]
"""A prompt or completion: plain text, or chat messages."""


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


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion to imitate."""

    prompt: Text
    completion: Text
    group: str
    weight: float = 1.0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer."""

    prompt: Text
    group: str
    source: str = ""


Record = Comparison | Rating | Demonstration | Prompt


def text_of(text: Text) -> str:
    """Plain text as it is; chat messages as `role: content` lines."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)
