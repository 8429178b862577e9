"""What a question looks like: text and Markdown as HTML that can hold no markup of its own, and what differs."""

import difflib
import re
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from perlhf.data.records import Text, content_of
from perlhf.labelling.store import Task

# Neither HTML, nor links that lead away, nor pictures that would be fetched.
_markdown = (
    MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink", "reference"])
)
_COMPARED_WORDS = 4000
"""Longer texts are shown without their differences: finding them would take seconds."""


@dataclass(frozen=True)
class Turn:
    """One message as HTML."""

    role: str
    html: Markup


@dataclass(frozen=True)
class Answer:
    """One answer as HTML."""

    side: str
    """`first` or `second`: which it is in the question, whatever side it is shown on."""
    name: str
    html: Markup
    differences: Markup
    """The text with the words that the other lacks marked; empty where none were sought."""
    text: str


def markdown(text: str) -> Markup:
    """Markdown as HTML; what looks like HTML in it is shown as it is written."""
    # Code that is wider than the page scrolls, also by keyboard.
    return Markup(_markdown.render(text).replace("<pre>", '<pre tabindex="0">'))


def conversation(prompt: Text) -> list[Turn]:
    """The turns of a prompt; plain text is the user's."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [Turn(str(turn["role"]), markdown(_content(turn))) for turn in turns]


def answers(task: Task) -> list[Answer]:
    """The answers in the order in which they are shown, blind."""
    texts = [_plain(answer) for answer in task.question.answers]
    if len(texts) == 1:
        return [Answer("first", "Answer", markdown(texts[0]), Markup(), texts[0])]
    both = list(zip(("first", "second"), texts, _differences(*texts), strict=True))
    shown = reversed(both) if task.turned else both
    return [
        Answer(side, name, markdown(text), marked, text)
        for name, (side, text, marked) in zip(("Left", "Right"), shown, strict=True)
    ]


def _plain(answer: Text) -> str:
    if isinstance(answer, str):
        return answer
    if len(answer) == 1:
        return _content(answer[0])
    return "\n\n".join(f"**{turn['role']}:** {_content(turn)}" for turn in answer)


def _content(turn: object) -> str:
    assert isinstance(turn, dict)
    called = turn.get("tool_calls")
    return content_of(turn) + (f"\n\n```\n{called}\n```" if called else "")


def _differences(left: str, right: str) -> tuple[Markup, Markup]:
    words = [re.findall(r"\s+|[^\s]+", text) for text in (left, right)]
    if max(map(len, words)) > _COMPARED_WORDS:
        return Markup(), Markup()
    marked: tuple[list[Markup], list[Markup]] = ([], [])
    for kind, i, j, k, m in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for into, piece in ((marked[0], words[0][i:j]), (marked[1], words[1][k:m])):
            text = escape("".join(piece))
            if piece:
                into.append(text if kind == "equal" else Markup("<mark>{}</mark>").format(text))
    return Markup().join(marked[0]), Markup().join(marked[1])
