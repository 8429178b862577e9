"""Which reader a file needs, and reading it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from perlhf.data import files
from perlhf.data.fields import Row, Skipped, checked
from perlhf.data.files import BUILTIN, FOR_TRAINING, Choice, DataFile
from perlhf.data.readers import android, dialogs, pairs
from perlhf.data.readers.trl import trl
from perlhf.data.records import Record
from perlhf.errors import DataError, nearest
from perlhf.system.progress import counted

Reader = Callable[[Iterable[Row]], Iterator[Record | Skipped]]
Kind = Literal["rating", "comparison", "demonstration", "prompt"]
KINDS: tuple[Kind, ...] = ("comparison", "rating", "demonstration", "prompt")


@dataclass(frozen=True, slots=True)
class Format:
    """One published layout: its name, what it gives, the columns that tell it apart, and its reader."""

    name: str
    gives: str
    columns: frozenset[str]
    reader: Callable[..., Iterator[Record | Skipped]]


@dataclass(frozen=True, slots=True)
class Reading:
    """Records in file order, how many rows were skipped for each reason, and the formats that were found."""

    records: list[Record] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)


def _format(name: str, gives: str, columns: str, reader: Callable[..., Iterator[Record | Skipped]]) -> Format:
    return Format(name, gives, frozenset(columns.split()), reader)


FORMATS = (
    _format("trl", "any kind, by its columns", "", trl),
    _format("taskmaster-rewards", "ratings", "context generation reward", dialogs.taskmaster_rewards),
    _format("taskmaster-dialogs", "demonstrations", "conversation_id utterances", dialogs.taskmaster_dialogs),
    _format("taskmaster-tsv", "demonstrations", "source target dialog_id", dialogs.taskmaster_tsv),
    _format("hh", "comparisons", "", dialogs.hh),
    _format("hhh", "comparisons", "chosen_instruction rejected_instruction", dialogs.hhh),
    _format("oasst", "comparisons", "message_tree_id prompt", dialogs.oasst),
    _format("pandalm", "comparisons", "response1 response2 annotator1", pairs.pandalm),
    _format("llmbar", "comparisons (also the layout of MT-bench)", "input output_1 output_2 label", pairs.llmbar),
    _format("shp", "comparisons", "post_id history human_ref_A human_ref_B labels", pairs.shp),
    _format("tldr", "comparisons", "info summaries choice", pairs.tldr),
    _format("feedbackqa", "comparisons", "question passage rating", pairs.feedbackqa),
    _format("feedbackqa-ratings", "ratings", "", pairs.feedbackqa_ratings),
    _format("squality", "comparisons", "passage-id questions", pairs.squality),
    _format("squality-questions", "comparisons", "", pairs.squality_questions),
    _format("squality-summaries", "demonstrations", "metadata document questions", pairs.squality_summaries),
    _format("uibert", "demonstrations", "image/ref_exp/text image/ref_exp/label", pairs.uibert),
    _format("uibert-pairs", "comparisons", "", pairs.uibert_pairs),
    _format("android-control", "demonstrations", "accessibility_trees step_instructions", android.android_control),
    _format("android-control-pairs", "comparisons", "", android.android_control_pairs),
)
NEED_STORIES = ("squality", "squality-questions")
WHOLE_FILE = ("feedbackqa",)
"""Formats whose records come of several rows; in all others a row says by itself what it is."""
LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
"""Suffixes of files with a row on each line (or nearly)."""
_SAMPLE_BYTES = 2**18


def read(path: str, format: str = "auto", root: Path | None = None, choice: Choice = FOR_TRAINING) -> list[Record]:
    """The records of a file, directory, hub name or `builtin:coffee-bar`, in file order.

    Args:
        path: `builtin:coffee-bar` gives all kinds, `builtin:coffee-bar/rating` one of them.
        format: a name of `FORMATS`; `auto` goes by the columns of each file's first row.
        root: where relative paths are also looked up; None means $PERLHF_DATA.
        choice: of a set's configurations, splits and revisions.

    Raises:
        DataError: nothing has that name, or a file, row or format is wrong; the message says where.
    """
    return read_all(path, format, root, choice).records


def read_all(path: str, format: str = "auto", root: Path | None = None, choice: Choice = FOR_TRAINING) -> Reading:
    """Like `read`, with the number of skipped rows and the formats that were found."""
    reading = Reading()
    reading.records.extend(stream(path, format, root, choice, into=reading))
    return reading


def stream(
    path: str,
    format: str = "auto",
    root: Path | None = None,
    choice: Choice = FOR_TRAINING,
    into: Reading | None = None,
) -> Iterator[Record]:
    """The records of `read`, one at a time.

    Args:
        into: takes the number of skipped rows and the formats that were found; None is for those who don't ask.
    """
    check_format(format)
    reading = into or Reading()
    if is_builtin(path):
        files.refuse_choice(path, choice)
        from perlhf.data.coffee_bar import feedback

        reading.formats[path] = "builtin"
        yield from (record for kind in builtin_kinds(path) for record in feedback.records(kind))
        return
    for file in files.find(path, root, choice):
        rows = counted(files.rows(file), f"reading {file.name}", about_rows(file))
        first = next(rows, None)
        if first is None:  # all its rows are those of another split
            continue
        name = detect(first[1]) if format == "auto" else format
        reading.formats[file.name] = name
        for record in reader_of(name, file)(_chain(first, rows)):
            if isinstance(record, Skipped):
                reading.skipped[record.reason] = reading.skipped.get(record.reason, 0) + 1
            else:
                yield checked(record, record.source or file.name)


def about_rows(file: DataFile) -> int | None:
    """About how many rows a file has, by the length of its first lines; None where they don't tell."""
    if file.path is None or not file.path.is_file() or not file.name.lower().endswith(LINES):
        return None
    with file.path.open("rb") as opened:
        begin = opened.read(_SAMPLE_BYTES)
    lines, size = begin.count(b"\n"), file.path.stat().st_size
    return round(size * lines / len(begin)) if lines else None


def detect(row: dict[str, Any]) -> str:
    """Name of the format that a file's first row shows; `trl` when no published layout fits."""
    if (
        all(isinstance(row.get(side), str) and row[side].startswith("\n\nHuman:") for side in ("chosen", "rejected"))
        and "prompt" not in row
    ):
        return "hh"
    return next((format.name for format in FORMATS if format.columns and format.columns <= row.keys()), "trl")


def reader_of(name: str, file: DataFile) -> Reader:
    """The reader called `name`; SQuALITY's are given the stories, which lie in another file of that set."""
    reader = next(format.reader for format in FORMATS if format.name == name)
    return partial(reader, stories=_stories(file)) if name in NEED_STORIES else reader


def check_format(name: str) -> None:
    """Raises DataError, with the nearest name, when there is no such format."""
    names = ["auto", *(format.name for format in FORMATS)]
    if name not in names:
        near = nearest(name, names)
        raise DataError(
            f"unknown format {name!r}",
            where="format",
            allowed=", ".join(names),
            hint=f"did you mean {near!r}?" if near else None,
        )


def is_builtin(path: str) -> bool:
    """True for anything that begins with `builtin:`."""
    return path.startswith("builtin:")


def builtin_kinds(path: str) -> tuple[Kind, ...]:
    """The kinds that `builtin:coffee-bar` (all) or `builtin:coffee-bar/KIND` names."""
    kinds: dict[str, tuple[Kind, ...]] = {BUILTIN: KINDS}
    kinds |= {f"{BUILTIN}/{kind}": (kind,) for kind in KINDS}
    if path not in kinds:
        near = nearest(path, kinds)
        raise DataError(
            f"no embedded set is called {path!r}",
            where="path",
            allowed=", ".join(kinds),
            hint=f"did you mean {near!r}?" if near else None,
        )
    return kinds[path]


def _chain(first: Row, rest: Iterable[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def _stories(file: DataFile) -> dict[str, dict[str, Any]]:
    folder = file.path.parent if file.path else Path()
    places = [
        near / name for near in (folder, folder.parent / "v1-3" / "txt") for name in ("test.jsonl", "test.jsonl.gz")
    ]
    stories_file = next((place for place in places if place.is_file()), None)
    if stories_file is None or file.path is None:
        raise DataError(
            "the stories that these judgements are about are missing",
            where=file.name,
            allowed="test.jsonl[.gz] beside it or in ../v1-3/txt",
        )
    stories = {}
    for where, row in files.rows(DataFile(str(stories_file), stories_file)):
        metadata = row.get("metadata")
        if not isinstance(metadata, dict) or not isinstance(metadata.get("passage_id"), str):
            raise DataError("a story has no metadata.passage_id", where=where)
        stories[metadata["passage_id"]] = row
    return stories
