"""Questions: what records and rows with several answers ask of people, and in which order."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, cast

from perlhf.config.labelling import ProjectConfig, QuestionsConfig
from perlhf.config.stages import DataConfig
from perlhf.data.fields import prompt_group, refuse_surrogates
from perlhf.data.read import read_all
from perlhf.data.readers.messages import messages
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating, Record, Text, content_of
from perlhf.data.splits import Split, load
from perlhf.errors import DataError
from perlhf.labelling.redact import redacted

SERVED = "served"
"""What `drawn` says of questions that nobody asked: people said something about an answer that was served to them."""
OF_A_ROUND = re.compile(r"round \d+: ")
"""The source of a question that `perlhf loop` asks: it is in its prompt's group, and wants one label whatever the
project's overlap."""
_LISTS = ("completions", "answers", "responses", "candidates", "generations")
_PAIRS = (("a", "b"), ("1", "2"), ("0", "1"))
_PAIR_NAMES = ("completion", "answer", "response", "output")


@dataclass(frozen=True)
class Question:
    """One thing that a person is asked."""

    key: str
    """A hash of what is asked; the same question is stored once."""
    prompt: Text
    answers: tuple[Text, ...]
    """Two for a comparison, else one."""
    group: str
    source: str
    place: float
    """In [0, 1): questions are asked in this order."""
    drawn: str = "random"
    """`random`, or by what its place was chosen; `served` where nobody was asked."""
    wanted: int = 1
    """Labels wanted, of as many people."""
    known: str | None = None
    """The right verdict of a hidden test."""

    @property
    def served(self) -> bool:
        """Whether it is no question of the page, but an answer that somebody was served and said something about."""
        return self.drawn == SERVED


def questions(project: ProjectConfig) -> list[Question]:
    """All questions of a project, without those whose sides are equal.

    Raises:
        DataError: a file can't be read, or holds nothing that can be asked about.
    """
    rules = project.questions
    found = list(asked(_read(rules.paths, project), project))
    tests = list(asked(_read(rules.tests, project), project, known=True)) if rules.tests else []
    known = {question.key for question in tests}
    unique = {question.key: question for question in found if question.key not in known}
    chosen = sorted(unique.values(), key=lambda question: question.place)[: rules.limit]
    if not chosen:
        needed = "two answers of one prompt" if project.kind == "comparison" else "an answer"
        raise DataError(
            f"nothing to ask: no row has {needed}",
            where=", ".join(rules.paths),
            allowed="comparisons, ratings, or prompts with a list `completions` (or `completion_a`, `completion_b`)",
            hint="perlhf data inspect shows what the file holds",
        )
    return chosen + tests


def asked(records: Iterable[Record], project: ProjectConfig, known: bool = False) -> Iterator[Question]:
    """What records ask in a project; of hidden tests the right verdict is `known`.

    Raises:
        DataError: a hidden test has no verdict.
    """
    rules = project.questions
    for record in records:
        for answers, verdict in _answers(record, project.kind):
            found = question(project, record.prompt, answers, record.group, record.source)
            if found is None:
                continue
            if known and verdict is None:
                raise DataError("a hidden test has no verdict", where=record.source, allowed="comparisons or ratings")
            yield replace(found, wanted=labels_wanted(rules, found.key), known=verdict if known else None)


def labels_wanted(rules: QuestionsConfig, key: str) -> int:
    """Of how many people the question of this key wants a label: of two in the share `overlap`."""
    return 1 + (uniform(rules.seed, "overlap", key) < rules.overlap)


def served_key(source: str, key: str) -> str:
    """The key of what is said about a served answer, of who wrote that and the question's key by its texts."""
    return hashlib.sha256(json.dumps([SERVED, source, key]).encode()).hexdigest()


def prompts_of(data: DataConfig, split: Split | Literal["all"]) -> list[Prompt]:
    """Prompts of one side, whose answers people can be asked about.

    Raises:
        DataError: there is none, or one comes with tools, which no page shows.
    """
    found = cast("Sequence[Prompt]", load(data, ("prompt",), split))
    for record in found:
        if record.tools:
            raise DataError("its prompt comes with tools, which the labelling page can't show", where=record.source)
    return list(found)


def question(
    project: ProjectConfig, prompt: Text, answers: tuple[Text, ...], group: str, source: str, drawn: str = "random"
) -> Question | None:
    """One question of a project, at a random place among all; None where its two answers are the same."""
    if project.redact:
        group, prompt, answers = masked_group(prompt, group), masked(prompt), tuple(map(masked, answers))
    if len(answers) == 2 and answers[0] == answers[1]:
        return None
    key = hashlib.sha256(json.dumps([project.kind, prompt, answers], sort_keys=True).encode()).hexdigest()
    return Question(key, prompt, answers, group, source, uniform(project.questions.seed, "place", key), drawn)


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing else: the draw of a project's seed and these."""
    digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def masked(text: Text) -> Text:
    """What may be stored of a text in a project that redacts: of messages, what they call and think is masked too."""
    if isinstance(text, str):
        return redacted(text)
    return [{**_masked(turn), "role": turn["role"]} if "role" in turn else _masked(turn) for turn in text]


def _read(paths: Sequence[str], project: ProjectConfig) -> Iterator[Record]:
    for path in paths:
        yield from read_all(path, project.questions.format, rules=project.questions).records


def _answers(record: Record, kind: str) -> Iterator[tuple[tuple[Text, ...], str | None]]:
    """Answers that stand in one question, and the verdict that the record gives."""
    match record:
        case Comparison() if kind == "comparison":
            # By their texts alone, so that nothing shows which was chosen, and the same pair is the same question.
            if uniform("side", record.chosen) < uniform("side", record.rejected):
                yield (record.chosen, record.rejected), "first"
            else:
                yield (record.rejected, record.chosen), "second"
        case Comparison():
            yield (record.chosen,), None
            yield (record.rejected,), None
        case Rating() if kind != "comparison":
            yield (record.completion,), "up" if record.label else "down"
        case Demonstration() if kind != "comparison":
            yield (record.completion,), None
        case Prompt():
            listed = _listed(record)
            together = list(combinations(listed, 2)) if kind == "comparison" else [(answer,) for answer in listed]
            yield from ((answers, None) for answers in together)
        case _:
            return


def _listed(record: Prompt) -> list[Text]:
    """Answers in a row's other columns."""
    columns = record.columns
    for name in _LISTS:
        if isinstance(columns.get(name), list):
            found: list[Any] = columns[name]
            return [
                _answer(answer, name, record.source) for answer in found if answer and isinstance(answer, str | list)
            ]
    for name in _PAIR_NAMES:
        for pair in _PAIRS:
            both = [
                (of, columns.get(of)) for letter in pair for joint in ("_", "") for of in [f"{name}{joint}{letter}"]
            ]
            texts = [_answer(text, of, record.source) for of, text in both if text and isinstance(text, str | list)]
            if len(texts) == 2:
                return texts
    return []


def _answer(answer: str | list[Any], column: str, where: str) -> Text:
    """An answer that a page can show and stages can learn from; messages stay messages.

    Raises:
        DataError: it is none.
    """
    if isinstance(answer, str):
        refuse_surrogates(answer, where)
        return answer
    turns = list(messages(answer, column, where))
    for turn in turns:
        refuse_surrogates(content_of(turn), where)
    if not turns[0]["role"] == turns[-1]["role"] == "assistant":
        what = f"an answer of {column!r} holds {', '.join(turn['role'] for turn in turns)}"
        allowed = "text, an assistant message, or turns that begin and end with the assistant's"
        raise DataError(what, where=where, allowed=allowed)
    return turns


def masked_group(prompt: Text, group: str) -> str:
    """What a project that masks stores of a prompt's group: prompts that differ in what is masked alone become one.

    A group is often the first turn's words without their signs, among which no address is found any more.
    """
    return prompt_group(masked(prompt)) if group == prompt_group(prompt) else redacted(group)


def _masked(part: Any) -> Any:
    """The same with texts, numbers and names of keys masked; keys that become the same are numbered."""
    match part:
        case str():
            return redacted(part)
        case int() | float():
            number = redacted(str(part))
            return part if number == str(part) else number
        case Mapping():
            found: dict[Any, Any] = {}
            for key, value in part.items():
                name, again = _masked(key), 1
                while name in found:
                    again += 1
                    name = f"{_masked(key)} {again}"
                found[name] = _masked(value)
            return found
        case list() | tuple():
            return [_masked(value) for value in part]
        case _:
            return part
