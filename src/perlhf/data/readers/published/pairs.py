"""Readers of published single-turn sets: PandaLM, LLMBar, MT-bench, SHP, TL;DR, FeedbackQA, SQuALITY, UIBert."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from perlhf.data.fields import (
    EQUAL_MEANS,
    TIE,
    Row,
    Skipped,
    choice,
    first_value,
    group_key,
    items,
    mapping,
    number,
    text,
    utf8,
    value,
    wrong_type,
)
from perlhf.data.records import Comparison, Demonstration, Rating, Record
from perlhf.errors import DataError

GRADES = ("Bad", "Could be Improved", "Acceptable", "Excellent")
_SYSTEMS = ("bart", "bart-dpr", "human")
_BOX = ("xmin", "ymin", "xmax", "ymax")
_SAME_ELEMENT = 0.5
"""Least overlap (intersection over union) at which a candidate box is taken to be a node of the view hierarchy."""
WRONG_ELEMENTS = 3
"""Elements of a screen that `uibert_pairs` compares with the right one."""

Story = dict[str, Any]


def pandalm(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """PandaLM test set: comparisons by majority of three annotators.

    Rule: at least two annotators must agree on the first or the second response; majority ties and three different
    labels are skipped, and so are pairs with an empty response. `weight` is the share of annotators who voted for the
    chosen one, `margin` the votes for it minus those for the other, over 3. A response that is the JSON boolean
    `true` is the text `True` (a spreadsheet's doing). The prompt is the instruction, a blank line and the input.
    Group: instruction and input.
    """
    for where, row in rows:
        votes = [choice(row, f"annotator{number}", (0, 1, 2), where) for number in (1, 2, 3)]
        first, second = (_boolean_as_text(row, f"response{number}", where).strip() for number in (1, 2))
        prompt = "\n\n".join(
            part for part in (text(row, "instruction", where).strip(), text(row, "input", where).strip()) if part
        )
        for_first, for_second = votes.count(1), votes.count(2)
        if max(for_first, for_second) < 2:
            yield Skipped(TIE if votes.count(0) > 1 else "no majority", where)
        elif not first or not second:
            yield Skipped("empty completion", where)
        else:
            chosen, rejected = (first, second) if for_first > for_second else (second, first)
            agreement, margin = max(for_first, for_second) / 3, abs(for_first - for_second) / 3
            yield Comparison(prompt, chosen, rejected, group_key(prompt), weight=agreement, margin=margin, source=where)


def llmbar(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """LLMBar and MT-bench: one comparison per row; `label` 1 or 2 says which output is better. Group: the input."""
    for where, row in rows:
        prompt = text(row, "input", where)
        outputs = text(row, "output_1", where).strip(), text(row, "output_2", where).strip()
        winner = int(choice(row, "label", (1, 2), where)) - 1
        if not all(outputs):
            yield Skipped("empty completion", where)
        else:
            yield Comparison(prompt, outputs[winner], outputs[1 - winner], group_key(prompt), source=where)


def shp(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """Stanford Human Preferences: one comparison per row; `labels` is 1 where comment A is preferred and 0 where B is.

    Rule: `margin` is the ratio of the comments' scores (at least 1); the set's authors keep 2 and more for training.
    Group: the post.
    """
    for where, row in rows:
        prompt, post = text(row, "history", where).strip(), text(row, "post_id", where)
        first, second = (text(row, f"human_ref_{side}", where).strip() for side in "AB")
        value(row, "score_ratio", where)
        ratio = number(row, "score_ratio", 0.0, where)
        chosen, rejected = (first, second) if choice(row, "labels", (0, 1), where) else (second, first)
        if not prompt or not chosen or not rejected:
            yield Skipped("empty prompt" if not prompt else "empty completion", where)
        else:
            yield Comparison(prompt, chosen, rejected, post, margin=ratio, source=where)


def tldr(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """TL;DR comparisons of summaries (and those of CNN/DailyMail articles): `choice` is the better summary's number.

    Rule: the prompt is the post as the set's authors lay it out (subreddit, title, post, then `TL;DR:`); an article
    stands alone before `TL;DR:`. Group: the post.
    """
    for where, row in rows:
        info = mapping(value(row, "info", where), "column 'info'", where)
        summaries = [mapping(summary, "a summary", where) for summary in items(row, "summaries", where)]
        if len(summaries) != 2:
            raise DataError(f"column 'summaries' holds {len(summaries)}", where=where, allowed="two summaries")
        better = int(choice(row, "choice", (0, 1), where))
        chosen, rejected = (text(summaries[at], "text", where).strip() for at in (better, 1 - better))
        if not chosen or not rejected:
            yield Skipped("empty completion", where)
        else:
            yield Comparison(_post(info, where), chosen, rejected, text(info, "id", where), source=where)


def feedbackqa(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """FeedbackQA: comparisons between the passages offered for one question, by their raters' mean grade.

    Rule: grades count Bad 0, Could be Improved 1, Acceptable 2, Excellent 3; every pair of passages with different
    means is a comparison whose `margin` is the difference of means; equal means are skipped. The completion is the
    page title, the section headings and the section's text. Group: the question.
    """
    offered: dict[str, list[tuple[float, str, str]]] = {}
    for where, row in rows:
        grades = _grades(row, where)
        offered.setdefault(text(row, "question", where), []).append(
            (sum(grades) / len(grades), _passage(row, where), where)
        )
    for question, passages in offered.items():
        for first, second in combinations(passages, 2):
            (high, chosen, where), (low, rejected, _) = (first, second) if first[0] >= second[0] else (second, first)
            if math.isclose(high, low):
                yield Skipped(EQUAL_MEANS, where)
            else:
                yield Comparison(question, chosen, rejected, group_key(question), margin=high - low, source=where)


def feedbackqa_ratings(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """FeedbackQA as ratings, one per passage.

    Rule: the label is True when most raters said Acceptable or Excellent, False when most said less; evenly divided
    raters are skipped. `weight` is the share of raters on the label's side. Otherwise as for the comparisons.
    """
    for where, row in rows:
        grades = _grades(row, where)
        up = sum(grade >= 2 for grade in grades)
        question, passage = text(row, "question", where), _passage(row, where)
        if 2 * up == len(grades):
            yield Skipped("raters evenly divided", where)
        else:
            label = 2 * up > len(grades)
            share = (up if label else len(grades) - up) / len(grades)
            yield Rating(question, passage, label, group_key(question), weight=share, source=where)


def squality(rows: Iterable[Row], stories: Mapping[str, Story]) -> Iterator[Record | Skipped]:
    """SQuALITY human evaluation: comparisons between three summaries of a story, by majority of the raters' overall
    ranks.

    Rule: for each pair of summaries, every rater votes for the one they ranked better; an even vote is skipped.
    `weight` is the winner's share of votes, `margin` the votes for minus against, over the number of raters. The
    prompt is the story, a blank line and the question, taken from `stories`: rows of the set's `test.jsonl` by
    passage id. Group: the story.
    """
    yield from _judged_summaries(rows, stories, _story_question)


def squality_questions(rows: Iterable[Row], stories: Mapping[str, Story]) -> Iterator[Record | Skipped]:
    """SQuALITY human evaluation without the stories, which are longer than most contexts.

    Rule: the prompt is the question alone; otherwise as for `squality`. Group: the story.
    """
    yield from _judged_summaries(rows, stories, _question)


def squality_summaries(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """SQuALITY stories: one demonstration per human reference summary. Group: the story."""
    for where, row in rows:
        passage = text(mapping(value(row, "metadata", where), "column 'metadata'", where), "passage_id", where)
        for at, question in enumerate(items(row, "questions", where)):
            prompt = _story_question(row, str(at), where)
            for response in items(mapping(question, "a question", where), "responses", where):
                summary = text(mapping(response, "a response", where), "response_text", where).strip()
                yield (
                    Demonstration(prompt, summary, passage, source=where)
                    if summary
                    else Skipped("empty completion", where)
                )


def uibert(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """UIBert RefExp: one demonstration per screen; the completion is the index of the element that the instruction
    means.

    Rule: candidates are listed by index with the class, text, description and id of the view-hierarchy node that
    overlaps them most (at least half, as intersection over union; otherwise only the box). Boxes are left, top,
    right, bottom in percent of the screen. Group: the screen.
    """
    for where, row in rows:
        screen = _screen(row, where)
        if not screen.instruction:
            yield Skipped("empty instruction", where)
        else:
            yield Demonstration(screen.prompt("number"), str(screen.label), screen.image, source=where)


def uibert_pairs(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """UIBert RefExp as comparisons: the right element of a screen against three wrong ones.

    Rule: prompt as for `uibert`, but that it asks for the element's line (number and description), which is the
    completion; the wrong elements are drawn by a hash of screen, instruction and index, or are all there are. An
    element that is described exactly as the right one is not a wrong one; a screen with no other is skipped. Group:
    the screen.
    """
    for where, row in rows:
        screen = _screen(row, where)
        meant = screen.elements[screen.label]
        wrong = [index for index, element in enumerate(screen.elements) if element != meant]
        if not screen.instruction:
            yield Skipped("empty instruction", where)
        elif not wrong:
            yield Skipped("no wrong element", where)
        else:
            prompt, right = screen.prompt("line"), screen.lines[screen.label]
            for index in sorted(wrong, key=screen.draw)[:WRONG_ELEMENTS]:
                yield Comparison(prompt, right, screen.lines[index], screen.image, source=where)


@dataclass(frozen=True, slots=True)
class _Screen:
    """The described elements of a UIBert screen, its instruction, and the index of the element that it means."""

    image: str
    elements: list[str]
    instruction: str
    label: int

    @property
    def lines(self) -> list[str]:
        return [f"{index}: {element}" for index, element in enumerate(self.elements)]

    def prompt(self, answer: str) -> str:
        ask = [f"Instruction: {self.instruction}", f"Which element? Answer with its {answer}."]
        return "\n".join(["Elements on the screen:", *self.lines, *ask])

    def draw(self, index: int) -> bytes:
        """Sort key of a wrong element: those with the lowest keys are drawn."""
        return hashlib.sha256(f"{self.image}:{self.instruction}:{index}".encode()).digest()


def _screen(row: dict[str, Any], where: str) -> _Screen:
    boxes = _boxes(row, "image/object/bbox", where)
    label = first_value(row, "image/ref_exp/label", where)
    if not isinstance(label, int) or not 0 <= label < len(boxes):
        raise DataError(f"the right element is {label!r}", where=where, allowed=f"0 to {len(boxes) - 1}")
    nodes = list(zip(_boxes(row, "image/view_hierarchy/bbox", where), _node_texts(row, where), strict=False))
    instruction = utf8(first_value(row, "image/ref_exp/text", where), where).strip()
    image = utf8(first_value(row, "image/id", where), where)
    return _Screen(image, [_describe(box, nodes) for box in boxes], instruction, label)


def _post(info: dict[str, Any], where: str) -> str:
    if info.get("article") is not None:
        return f"{text(info, 'article', where).strip()}\n\nTL;DR:"
    head = f"SUBREDDIT: r/{text(info, 'subreddit', where)}\n\nTITLE: {text(info, 'title', where).strip()}"
    return f"{head}\n\nPOST: {text(info, 'post', where).strip()}\n\nTL;DR:"


def _boolean_as_text(row: dict[str, Any], key: str, where: str) -> str:
    return str(row[key]) if isinstance(row.get(key), bool) else text(row, key, where)


def _grades(row: dict[str, Any], where: str) -> list[int]:
    grades = items(row, "rating", where)
    if not grades:
        raise DataError("column 'rating' is an empty list", where=where, allowed="one grade per rater")
    return [GRADES.index(choice({"rating": grade}, "rating", GRADES, where)) for grade in grades]


def _passage(row: dict[str, Any], where: str) -> str:
    reference = mapping(
        mapping(value(row, "passage", where), "column 'passage'", where).get("reference"), "passage.reference", where
    )
    headers = items(reference, "section_headers", where)
    if not all(isinstance(header, str) for header in headers):
        wrong_type(headers, "section_headers", "a list of text", where)
    parts = [text(reference, "page_title", where), *headers, text(reference, "section_content", where)]
    return "\n".join(part.strip() for part in parts if part.strip())


def _judged_summaries(
    rows: Iterable[Row], stories: Mapping[str, Story], prompt_of: Callable[[Story, str, str], str]
) -> Iterator[Record | Skipped]:
    for where, row in rows:
        passage = text(row, "passage-id", where)
        if passage not in stories:
            raise DataError(f"the story {passage!r} is not among the {len(stories)} stories of test.jsonl", where=where)
        for asked, summaries in mapping(value(row, "questions", where), "column 'questions'", where).items():
            prompt = prompt_of(stories[passage], asked, where)
            summaries = mapping(summaries, f"question {asked!r}", where)
            ranks = {name: _ranks(summaries, name, where) for name in _SYSTEMS}
            for system, other in combinations(_SYSTEMS, 2):
                raters = [rater for rater in ranks[system] if rater in ranks[other]]
                votes = sum(
                    (ranks[system][rater] < ranks[other][rater]) - (ranks[system][rater] > ranks[other][rater])
                    for rater in raters
                )
                if votes == 0:
                    yield Skipped(TIE, where)
                    continue
                winner, loser = (system, other) if votes > 0 else (other, system)
                chosen, rejected = (text(summaries[name], "response", where).strip() for name in (winner, loser))
                share = sum(ranks[winner][rater] < ranks[loser][rater] for rater in raters) / len(raters)
                margin = abs(votes) / len(raters)
                yield Comparison(prompt, chosen, rejected, passage, weight=share, margin=margin, source=where)


def _story_question(story: Story, number: str, where: str) -> str:
    question = _question(story, number, where)
    return f"{text(story, 'document', where).strip()}\n\n{question}"


def _question(story: Story, number: str, where: str) -> str:
    questions = items(story, "questions", where)
    if not number.isdecimal() or not number.isascii() or len(number) > 6 or int(number) >= len(questions):
        raise DataError(f"question {number!r} is unknown", where=where, allowed=f"0 to {len(questions) - 1}")
    return text(mapping(questions[int(number)], "a question", where), "question_text", where).strip()


def _ranks(summaries: dict[str, Any], name: str, where: str) -> dict[str, int]:
    reviews = items(mapping(value(summaries, name, where), f"summary {name!r}", where), "reviews", where)
    ranks: dict[str, int] = {}
    for review in reviews:
        review = mapping(review, "a review", where)
        rank = value(review, "overall-rank", where)
        if isinstance(rank, bool) or not isinstance(rank, int):
            wrong_type(rank, "overall-rank", "a whole number", where)
        ranks[text(review, "worker_id", where)] = rank
    return ranks


def _boxes(row: dict[str, Any], prefix: str, where: str) -> list[tuple[float, ...]]:
    sides = [items(row, f"{prefix}/{side}", where) for side in _BOX]
    if len({len(side) for side in sides}) > 1 or not all(
        isinstance(edge, float) and math.isfinite(edge) for side in sides for edge in side
    ):
        raise DataError(
            f"the sides of {prefix} don't form boxes", where=where, allowed="four lists of finite numbers, equally long"
        )
    return list(zip(*sides, strict=True))


def _node_texts(row: dict[str, Any], where: str) -> list[str]:
    columns = [
        items(row, f"image/view_hierarchy/{name}", where) for name in ("class/name", "text", "description", "id/name")
    ]
    decoded = [[utf8(encoded, where).strip() for encoded in column] for column in columns]
    return [
        " ".join(part for part in (kind, f'"{shown}"' if shown else "", about, name) if part)
        for kind, shown, about, name in zip(*decoded, strict=False)
    ]


def _describe(box: tuple[float, ...], nodes: list[tuple[tuple[float, ...], str]]) -> str:
    overlap, words = max(
        ((_overlap(box, other), words) for other, words in nodes), key=lambda pair: pair[0], default=(0.0, "")
    )
    edges = " ".join(f"{100 * edge:.0f}" for edge in box)
    return f"{words} ({edges})" if overlap >= _SAME_ELEMENT else f"({edges})"


def _overlap(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Intersection over union of two (left, top, right, bottom) boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)
