"""What a question looks like: text and Markdown as HTML that can hold no markup of its own, and what differs."""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from perlhf.data.records import Text, content_of
from perlhf.labelling.labels import Task
from perlhf.labelling.pages.explained import Explained

# Neither HTML, nor links that lead away, nor pictures that would be fetched.
_markdown = (
    MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink", "reference"])
)
_SIDES, _ALONE = ("Left", "Right"), ("Answer",)
_COMPARED_WORDS = 4000
_COMPARED_PLACES = 1_000_000
"""Longer texts, and those that repeat themselves, are shown without their differences: finding them would take seconds,
before an answer is acknowledged."""


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


@dataclass(frozen=True)
class Sentence:
    """A part of an answer, and what it adds to the score."""

    text: str
    effect: float | None
    said: str
    """The effect as it is read, or that nothing would be left."""
    remark: str
    """Whether it adds most or least of all."""
    bar: tuple[float, float]
    """Where its bar begins and how long it is, in 0 to 100 with the middle at 50."""


@dataclass(frozen=True)
class Scored:
    """What moved the score of one answer; an empty one has no sentences."""

    name: str
    score: float | None
    """None where it couldn't be scored."""
    sentences: list[Sentence]
    points: str
    """The score at each token, as a line of an SVG of 100 by 30."""
    along: str
    """The same in words."""


def explanations(task: Task, explained: Explained) -> list[Scored]:
    """What moved the scores of a task's answers, in the order in which they were shown."""
    if len(explained) == 2:
        return scored(list(reversed(explained)) if task.turned else explained, _SIDES)
    return scored(explained, _ALONE)


def scored(rows: Explained, names: Sequence[str]) -> list[Scored]:
    """What moved the scores of answers that are called so, on one scale."""
    there = [row for row in rows if row is not None]
    effects = [abs(part["effect"]) for row in there for part in row["sentences"] if part["effect"] is not None]
    heights = [score for row in there for _, score in row["tokens"]]
    largest, low, high = max(effects, default=0.0), min(heights, default=0.0), max(heights, default=0.0)
    return [
        Scored(name, None, [], "", "")
        if row is None
        else Scored(
            name,
            row["score"],
            _sentences(row["sentences"], largest or 1.0),
            _line([score for _, score in row["tokens"]], low, high),
            _in_words([score for _, score in row["tokens"]]),
        )
        for name, row in zip(names, rows, strict=True)
    ]


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
        return [Answer("first", *_ALONE, markdown(texts[0]), Markup(), texts[0])]
    both = list(zip(("first", "second"), texts, _differences(*texts), strict=True))
    shown = reversed(both) if task.turned else both
    return [
        Answer(side, name, markdown(text), marked, text)
        for name, (side, text, marked) in zip(_SIDES, shown, strict=True)
    ]


def _sentences(parts: Sequence[Mapping[str, Any]], largest: float) -> list[Sentence]:
    effects = [part["effect"] for part in parts if part["effect"] is not None]
    remarks = {max(effects): "most", min(effects): "least"} if len(effects) > 1 else {}
    found = []
    for part in parts:
        effect = part["effect"]
        length = 50 * abs(effect or 0.0) / largest
        said = "all there is" if effect is None else f"{effect:+.2f}".replace("-", "−")
        begin = 50 - length if (effect or 0.0) < 0 else 50.0
        bar = (round(begin, 1), round(length, 1))
        found.append(Sentence(part["text"].strip(), effect, said, remarks.get(effect, ""), bar))
    return found


def _line(scores: Sequence[float], low: float, high: float) -> str:
    step, height = 100 / max(len(scores) - 1, 1), (high - low) or 1.0
    return " ".join(f"{at * step:.1f},{29 - 28 * (score - low) / height:.1f}" for at, score in enumerate(scores))


def _in_words(scores: Sequence[float]) -> str:
    numbers = [f"{score:.2f}".replace("-", "−") for score in (scores[0], min(scores), max(scores), scores[-1])]
    return "begins at {}, is at least {} and at most {}, ends at {}".format(*numbers)


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
    found = [re.findall(r"\s*\S+\s*|\s+", text) for text in (left, right)]
    blocks = _alike(*([piece.strip() for piece in pieces] for pieces in found))
    if blocks is None:
        return Markup(), Markup()
    marked: tuple[list[Markup], list[Markup]] = ([], [])
    i = k = 0
    for j, m, size in [*blocks, (len(found[0]), len(found[1]), 0)]:
        for into, pieces, begin, end in ((marked[0], found[0], i, j), (marked[1], found[1], k, m)):
            other, same = "".join(pieces[begin:end]), "".join(pieces[end : end + size])
            words = other.strip()
            if words:
                before, after = other[: other.index(words)], other[other.index(words) + len(words) :]
                into.append(escape(before) + Markup("<mark>{}</mark>").format(words) + escape(after))
            into.append(escape(same if words or not other else other + same))
        i, k = j + size, m + size
    return Markup().join(marked[0]), Markup().join(marked[1])


def _alike(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int, int]] | None:
    """Words that are the same in both: where they begin in each, and how many; longest first, then on both sides of it.

    None where the words are too many, or the places that would be compared (of each word all at which the other text
    has it too), summed over all searches.
    """
    if max(len(left), len(right)) > _COMPARED_WORDS:
        return None
    times = Counter(right)
    places = list(accumulate((1 + times[word] for word in left), initial=0))
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    open_ones, found, compared = [(0, len(left), 0, len(right))], list[tuple[int, int, int]](), 0
    while open_ones:
        i, j, k, m = open_ones.pop()
        compared += places[j] - places[i]
        if compared > _COMPARED_PLACES:
            return None
        at, other, size = matcher.find_longest_match(i, j, k, m)
        if size:
            found.append((at, other, size))
            sides = ((i, at, k, other), (at + size, j, other + size, m))
            open_ones += [side for side in sides if side[0] < side[1] and side[2] < side[3]]
    return sorted(found)
