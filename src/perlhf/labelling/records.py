"""From labels to records that stages learn from, with a statement of how they came about; and back."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from perlhf.config.labelling import ProjectConfig
from perlhf.data.fields import is_blank
from perlhf.data.records import Text
from perlhf.errors import DataError
from perlhf.labelling.labels import Label, as_json, from_json
from perlhf.labelling.progress import Progress, verdict
from perlhf.system.files import directory_atomic, write_atomic

LABELS, RECORDS, EDITS, STATEMENT = "labels.jsonl", "records.jsonl", "edits.jsonl", "statement.md"
_EXPLAINED = ["- After an answer labellers could see how a reward model scores it, which may have moved later answers."]


def labelled_rows(
    labels: Sequence[Label], project: ProjectConfig, overlap: Literal["all", "majority"]
) -> Iterator[tuple[dict[str, Any], Label]]:
    """Rows of records that `perlhf data` reads, comparisons or ratings, each with a label that it comes from. A project
    of comparisons has ratings too where people gave thumbs to served answers.

    Labels of one question weigh 1 in all: with `all` each has 1/n, and a tie takes its share away; with `majority` the
    most frequent verdict stands for all, and a question without one gives none. "About equal" and
    "both bad" teach no preference, and nobody learns from an empty answer: they are in labels.jsonl alone.
    """
    by_question: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        if label.question.known is None and label.said.verdict not in ("skip", "edited"):  # which judge nothing
            by_question[label.question.key].append(label)
    for found in by_question.values():
        verdicts = [verdict(label, project.up) for label in found]
        if overlap == "majority":
            (most, number), *others = Counter(verdicts).most_common()
            if others and others[0][1] == number:
                continue
            row = _row(found[0], most)
            if row is not None:
                yield row | {"annotator": "majority", "weight": 1.0}, found[0]
            continue
        for label, said in zip(found, verdicts, strict=True):
            row = _row(label, said)
            if row is not None:
                yield row | {"annotator": label.labeller.pseudonym, "weight": 1 / len(found)}, label


def edit_rows(labels: Iterable[Label]) -> Iterator[dict[str, Any]]:
    """Better answers that labellers wrote, as demonstrations."""
    for label in labels:
        if label.said.edit.strip():
            question = label.question
            yield {"prompt": question.prompt, "completion": _like(question.answers[0], label.said.edit)} | {
                "group": question.group
            }


def is_exported(name: str) -> bool:
    """Whether a file of this name is one that `write` writes."""
    table = name in ("dataset_info.json", "state.json") or (name.startswith("data-") and name.endswith(".arrow"))
    return table or name in (RECORDS, EDITS, LABELS, STATEMENT)


def write(
    output: Path,
    labels: Sequence[Label],
    project: ProjectConfig,
    numbers: Progress,
    *,
    overlap: Literal["all", "majority"] = "all",
    datasets: bool = False,
) -> dict[str, int]:
    """Writes a directory: records.jsonl, edits.jsonl where there are any, labels.jsonl (all that was said, to be taken
    into another copy) and statement.md; returns how many lines each has.

    Raises:
        StorageError: it can't be written; nothing half-written is left.
    """
    records, edits = [row for row, _ in labelled_rows(labels, project, overlap)], list(edit_rows(labels))
    with directory_atomic(output) as directory:
        if datasets:
            _as_dataset(labels, project, overlap).save_to_disk(str(directory))
        else:
            write_atomic(directory / RECORDS, _lines(records))
        if edits:
            write_atomic(directory / EDITS, _lines(edits))
        write_atomic(directory / LABELS, "".join(as_json(label) + "\n" for label in labels))
        write_atomic(directory / STATEMENT, statement(project, numbers, len(records), overlap, labels))
    return {"records": len(records), "edits": len(edits), "labels": len(labels)}


def read(source: Path) -> list[Label]:
    """The labels of a directory that `write` made.

    Raises:
        DataError: there is no such file, or a line isn't a label (`from_json`).
    """
    file = source / LABELS
    try:
        lines = file.read_text("utf-8").removesuffix("\n").split("\n")  # texts may hold other ends of lines
    except (OSError, UnicodeError) as error:
        hint = "give a directory that `perlhf label export` wrote"
        raise DataError(f"the labels can't be read: {error}", where=str(file), hint=hint) from error
    return [from_json(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if lines != [""]]


def statement(project: ProjectConfig, numbers: Progress, records: int, overlap: str, labels: Iterable[Label]) -> str:
    """How the labels came about, in the words of a data statement (Bender and Friedman, TACL 2018)."""
    asked = {one.question.key: one.question for one in labels if one.question.known is None}.values()
    sources = Counter(_source(question.source) for question in asked if not question.served)
    drawn = Counter(question.drawn for question in asked)
    used = [share for share in numbers.shares if share.labels and not share.labeller.left_out]
    by_source = ", ".join(f"{source} ({count})" for source, count in sorted(numbers.served.items()))
    in_use = [f"- Said about served answers, besides: {sum(numbers.served.values())}, of {by_source}."]
    shares = sorted((share.labels for share in used), reverse=True)
    most = f"{shares[0] / sum(shares):.0%} of them by one person" if shares else "none by anybody"
    alpha = "not known" if numbers.alpha is None else f"{numbers.alpha:.2f}"
    lines = [
        f"# {project.title}",
        "",
        f"- What was asked: {_asked(project)}.",
        f"- Questions, with an answer or a skip, by where prompts or answers were read: {_counted(sources)}.",
        f"- Labels: {sum(shares)} of {len(used)} people, {most}; {records} records.",
        f"- Time: {sum(share.hours for share in used):.2f} hours in all; "
        f"medians of {', '.join(f'{share.median_seconds:.0f} s' for share in used) or 'nobody'} a question.",
        f"- Agreement: Krippendorff's alpha {alpha} on {numbers.several} questions that several people answered.",
        f"- Answers: {', '.join(f'{count} {name}' for name, count in sorted(numbers.verdicts.items())) or 'none'}.",
        f"- Several labels of one question: {overlap}.",
        f"- Questions were chosen by: {_counted(drawn)}.",
        f"- Mail addresses, phone and card numbers were {'masked' if project.redact else 'not masked'}.",
        *in_use[: bool(by_source)],
        *_EXPLAINED[: bool(project.explain)],
        "- Labellers are named by pseudonyms. Who they are, what they were paid and which languages they speak isn't"
        " known here: add it.",
        "",
        "## What labellers were told",
        "",
        project.instructions,
        "",
    ]
    return "\n".join(lines)


def _asked(project: ProjectConfig) -> str:
    """What people were asked, and what they couldn't see."""
    match project.kind:
        case "comparison":
            return "comparison of two answers, blind, sides in random order"
        case "rating":
            return "rating of one answer as good or bad, blind"
        case "scale":
            criteria = ", ".join(project.criteria)
            return (
                f"grades of one answer, 1 to 5 on {criteria}, blind; a mean of {project.up:g} or more is up, else down"
            )


def _source(source: str) -> str:
    """The file of `file:line`, and the round of a loop without what it asked for."""
    of_loop = re.match(r"round \d+(?=: )", source)
    return f"{of_loop[0]} of a loop" if of_loop else re.sub(r":\d+$", "", source)


def _counted(names: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(names.items())) or "nothing yet"


def _row(label: Label, verdict: str) -> dict[str, Any] | None:
    question = label.question
    shared: dict[str, Any] = {"prompt": question.prompt, "group": question.group}
    if question.served:
        shared["source"] = question.source
    if any(is_blank(answer) for answer in question.answers):
        return None
    match verdict:
        case "first" | "second":
            first, second = question.answers
            chosen, rejected = (first, second) if verdict == "first" else (second, first)
            return shared | {"chosen": chosen, "rejected": rejected}
        case "up" | "down":
            return shared | {"completion": question.answers[0], "label": verdict == "up"}
        case _:
            return None


def _like(answer: Text, text: str) -> Text:
    return text if isinstance(answer, str) else [{"role": "assistant", "content": text}]


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _as_dataset(labels: Sequence[Label], project: ProjectConfig, overlap: Literal["all", "majority"]) -> Any:
    """Records with who said it, when, after how long, and how its place in the order was drawn."""
    import datasets
    import pyarrow

    rows: list[dict[str, Any]] = []
    for row, label in labelled_rows(labels, project, overlap):
        when = datetime.fromtimestamp(label.stored, UTC).isoformat(timespec="seconds")
        rows.append(row | {"labelled": when, "seconds": label.seconds, "drawn": label.question.drawn})
    # Comparisons and ratings have other columns, and a column is of one type: text becomes the message that it is.
    names = dict.fromkeys(name for row in rows for name in row)
    of_messages = {name for row in rows for name, value in row.items() if isinstance(value, list)}

    def same_type(name: str, value: Any) -> Any:
        role = "user" if name == "prompt" else "assistant"
        return [{"role": role, "content": value}] if name in of_messages and isinstance(value, str) else value

    try:
        return datasets.Dataset.from_list([{name: same_type(name, row.get(name)) for name in names} for row in rows])
    except pyarrow.ArrowException as error:
        what = f"messages of other types are in one column, which Arrow can't hold: {error}".splitlines()[0]
        raise DataError(what, where="format", allowed="messages of the same keys", hint="--format jsonl") from error
