"""Which reader a file needs, and reading it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

from perlhf.config.stages import LayoutConfig
from perlhf.data import files
from perlhf.data.fields import Row, Skipped, checked
from perlhf.data.files import BUILTIN, Choice, DataFile
from perlhf.data.readers import android, dialogs, exports, layouts, pairs
from perlhf.data.readers.messages import transcript
from perlhf.data.readers.trl import folded, slip_of, trl
from perlhf.data.records import Comparison, Record
from perlhf.errors import DataError, nearest
from perlhf.system.progress import counted

Reader = Callable[[Iterable[Row]], Iterator[Record | Skipped]]
Kind = Literal["rating", "comparison", "demonstration", "prompt"]
KINDS: tuple[Kind, ...] = ("comparison", "rating", "demonstration", "prompt")


@dataclass(frozen=True, slots=True)
class Format:
    """One layout: its name, what it gives, the sets of columns that tell it apart, and its reader."""

    name: str
    gives: str
    columns: tuple[frozenset[str], ...]
    """A file has this layout when its first row has all columns of one of these."""
    reader: Callable[..., Iterator[Record | Skipped]]
    published: bool = True
    """A set with a rule of its own; the others are layouts of people's own files, read by `LayoutConfig`."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Records in file order, how many rows were skipped for each reason, and the formats that were found."""

    records: list[Record] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)


def _published(name: str, gives: str, columns: str, reader: Callable[..., Iterator[Record | Skipped]]) -> Format:
    return Format(name, gives, _alternatives(columns), reader)


def _layout(name: str, gives: str, columns: str, reader: Callable[..., Iterator[Record | Skipped]]) -> Format:
    return Format(name, gives, _alternatives(columns), reader, published=False)


def _alternatives(columns: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in columns.split("|") if names.strip())


_OPENAI = "input preferred_output non_preferred_output | input preferred_completion non_preferred_completion"
_SWIFT = "messages rejected_response | messages rejected_messages | query response"
_HELPSTEER = "prompt response helpfulness | response1 response2 overall_preference"
_HELPSTEER += " | response_1 response_2 preference_strength"
_ULTRAFEEDBACK = "instruction completions | prompt answers | prompt completions models"
_ULTRAFEEDBACK += " | prompt responses scores | prompt completions scores | prompt responses ranks"
_ULTRAFEEDBACK += " | prompt completions ranks | prompt responses ratings | prompt completions ratings"
_ULTRAFEEDBACK += " | instruction generations ratings | prompt generations ratings | prompt responses rewards"
_ALPACA = "instruction output | instruction response | instruction chosen rejected | instruction input | input output"
_ARENA = "conversation_a conversation_b winner | response_a response_b winner | response_a response_b winner_model_a"
_ARENA += " | answer_a answer_b winner | response_0 response_1 better_response_id | answer_0 answer_1 score_0 score_1"
_ARENA += " | response_1 response_2 preference | response1 response2 preference | answer1 answer2 winner"
_ARENA += " | response_1 response_2 winner | response1 response2 winner | completion_a completion_b winner"
_ARENA += " | output_a output_b winner | response_a response_b preference | output_1 output_2 preference"

FORMATS = (
    _layout("trl", "any kind, by its columns", "", trl),
    _published("taskmaster-rewards", "ratings", "context generation reward", dialogs.taskmaster_rewards),
    _published("taskmaster-dialogs", "demonstrations", "conversation_id utterances", dialogs.taskmaster_dialogs),
    _published("taskmaster-tsv", "demonstrations", "source target dialog_id", dialogs.taskmaster_tsv),
    _published("hh", "comparisons", "", dialogs.hh),
    _published("hhh", "comparisons", "chosen_instruction rejected_instruction", dialogs.hhh),
    _published("oasst", "comparisons", "message_tree_id prompt", dialogs.oasst),
    _published("pandalm", "comparisons", "response1 response2 annotator1", pairs.pandalm),
    _published("llmbar", "comparisons (also the layout of MT-bench)", "input output_1 output_2 label", pairs.llmbar),
    _published("shp", "comparisons", "post_id history human_ref_A human_ref_B labels", pairs.shp),
    _published("tldr", "comparisons", "info summaries choice", pairs.tldr),
    _published("feedbackqa", "comparisons", "question passage rating", pairs.feedbackqa),
    _published("feedbackqa-ratings", "ratings", "", pairs.feedbackqa_ratings),
    _published("squality", "comparisons", "passage-id questions", pairs.squality),
    _published("squality-questions", "comparisons", "", pairs.squality_questions),
    _published("squality-summaries", "demonstrations", "metadata document questions", pairs.squality_summaries),
    _published("uibert", "demonstrations", "image/ref_exp/text image/ref_exp/label", pairs.uibert),
    _published("uibert-pairs", "comparisons", "", pairs.uibert_pairs),
    _published("android-control", "demonstrations", "accessibility_trees step_instructions", android.android_control),
    _published("android-control-pairs", "comparisons", "", android.android_control_pairs),
    _layout("open-webui", "ratings", "data snapshot meta | data snapshot type", exports.open_webui),
    _layout("label-studio", "any kind", "data annotations | annotation_id lead_time", exports.label_studio),
    _layout("argilla", "any kind", "fields responses", exports.argilla),
    _layout("openai", "comparisons and demonstrations", _OPENAI, layouts.openai),
    _layout("swift", "any kind", _SWIFT, layouts.swift),
    _layout("sharegpt", "any kind", "conversations | conversation", layouts.sharegpt),
    _layout("arena", "comparisons", _ARENA, layouts.arena),
    _layout("helpsteer", "comparisons, or what grades become", _HELPSTEER, layouts.helpsteer),
    _layout("ultrafeedback", "comparisons", _ULTRAFEEDBACK, layouts.ultrafeedback),
    _layout("alpaca", "any kind", _ALPACA, layouts.alpaca),
)
PUBLISHED = frozenset(format.name for format in FORMATS if format.published)
"""Readers that leave it to their caller to check what they found (`fields.checked`)."""
NEED_STORIES = ("squality", "squality-questions")
WHOLE_FILE = ("feedbackqa",)
"""Formats whose records come of several rows; in all others a row says by itself what it is."""
LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
"""Suffixes of files with a row on each line (or nearly)."""
_SAMPLE_BYTES = 2**18
_TRL = ("prompt chosen rejected", "prompt completion", "chosen_response rejected_response")
"""Sets of columns that are read as `trl` whatever stands beside them."""
_COMMON = frozenset(("prompt", "messages"))
"""Columns of so many layouts that they show none."""
_EXPORT = frozenset(("annotation_id", "lead_time"))
SAME_TEXT = "the same text on both sides"
MAPPED_ROWS = 1000
"""Rows in which a name of `data.columns` must occur."""


def read(path: str, format: str = "auto", root: Path | None = None, rules: LayoutConfig | None = None) -> list[Record]:
    """The records of a file, directory, hub name or `builtin:coffee-bar`, in file order.

    Args:
        path: `builtin:coffee-bar` gives all kinds, `builtin:coffee-bar/rating` one of them.
        format: a name of `FORMATS`; `auto` goes by the columns of each file's first row.
        root: where relative paths are also looked up; None means $PERLHF_DATA.
        rules: what is read of a set with several parts, names of columns, and what becomes of grades and ties.

    Raises:
        DataError: nothing has that name, or a file, row or format is wrong; the message says where.
    """
    return read_all(path, format, root, rules).records


def read_all(path: str, format: str = "auto", root: Path | None = None, rules: LayoutConfig | None = None) -> Reading:
    """Like `read`, with the number of skipped rows and the formats that were found."""
    reading = Reading()
    reading.records.extend(stream(path, format, root, rules, reading))
    return reading


def stream(
    path: str,
    format: str = "auto",
    root: Path | None = None,
    rules: LayoutConfig | None = None,
    into: Reading | None = None,
) -> Iterator[Record]:
    """The records of `read`, one at a time.

    Args:
        into: takes the number of skipped rows and the formats that were found; None is for those who don't ask.
    """
    check_format(format)
    reading, rules = into or Reading(), rules or LayoutConfig()
    if is_builtin(path):
        files.refuse_choice(path, choice_of(rules))
        from perlhf.data.coffee_bar import feedback

        reading.formats[path] = "builtin"
        yield from (record for kind in builtin_kinds(path) for record in feedback.records(kind))
        return
    for file in files.find(path, root, choice_of(rules)):
        rows = counted(files.rows(file), f"reading {file.name}", about_rows(file))
        rows = renamed(rows, rules, file.name)
        first = next(rows, None)
        if first is None:  # all its rows are those of another split
            continue
        name = detect(first[1]) if format == "auto" else format
        reading.formats[file.name] = name
        published = name in PUBLISHED
        reader = by_row(name, rules) if format == "auto" and not published else reader_of(name, file, rules)
        for found in reader(chain([first], rows)):
            record = settled(found, rules)
            if isinstance(record, Skipped):
                reading.skipped[record.reason] = reading.skipped.get(record.reason, 0) + 1
            else:
                yield checked(record, record.source or file.name) if published else record


def about_rows(file: DataFile) -> int | None:
    """About how many rows a file has, by the length of its first lines; None where they don't tell."""
    if file.path is None or not file.path.is_file() or not file.name.lower().endswith(LINES):
        return None
    with file.path.open("rb") as opened:
        begin = opened.read(_SAMPLE_BYTES)
    lines, size = begin.count(b"\n"), file.path.stat().st_size
    return round(size * lines / len(begin)) if lines else None


def detect(row: Mapping[str, Any]) -> str:
    """Name of the format that a file's first row shows; `trl` when no other layout fits.

    Published sets come first, then TRL's columns, then the layouts of people's own files.
    """
    if _holds_dialogs(row):
        return "hh"
    return _detected(*_names_of(row)) or "trl"


def by_row(name: str, rules: LayoutConfig) -> Reader:
    """The reader of a file of somebody's own whose first row has the layout `name`: its rows may be of several.

    A row that shows none is read as the rows before it where it has a column of theirs, else as `trl`. Where grades
    become comparisons, which need all answers to a prompt, the first row speaks for all.
    """
    if rules.grades == "comparisons":
        return partial(_format(name).reader, rules=rules)

    seen = None

    def layout(item: Row) -> str:
        nonlocal name, seen
        if seen == (seen := _names_of(item[1])):
            return name
        names, given = seen
        found = _detected(names, given)
        if found is None:
            found = name if _of_layout(name, given) else "trl"
        name = found if found not in PUBLISHED else name
        return name

    def reader(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
        for found, group in groupby(rows, layout):
            yield from _format(found).reader(group, rules=rules)

    return reader


def _names_of(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a row's columns, and of those that hold something."""
    names = tuple(row)
    return names, names if None not in row.values() else tuple([name for name in names if row[name] is not None])


@lru_cache(maxsize=4096)
def _detected(names: tuple[str, ...], given: tuple[str, ...]) -> str | None:
    """The format that these columns show. A null may be the missing verdict of a row, or fill a column of others."""
    every, held = frozenset(names), frozenset(given)
    for format in FORMATS:
        if format.published and any(columns <= every for columns in format.columns):
            return format.name
    if any(name.endswith((".responses", "-suggestion")) for name in names):
        return "argilla"
    if any(held.issuperset(columns.split()) for columns in _TRL) and not _EXPORT <= every:
        return "trl"
    own = [format for format in FORMATS if not format.published]
    for format in own:
        if any(columns <= held for columns in format.columns):
            return format.name
    for format in own:
        if any(columns <= every and columns & held - _COMMON for columns in format.columns):
            return format.name
    return "arena" if layouts.is_judged_pair(every) else None


@lru_cache(maxsize=4096)
def _of_layout(name: str, given: tuple[str, ...]) -> bool:
    """Whether a row has a column of this layout that others don't have."""
    return any(columns & set(given) - _COMMON for columns in _format(name).columns)


def _format(name: str) -> Format:
    return next(format for format in FORMATS if format.name == name)


def settled(found: Record | Skipped, rules: LayoutConfig) -> Record | Skipped:
    """What a reader found, by the rule for ties: comparisons without a preference teach nothing.

    Raises:
        DataError: `ties: error`, and this is one.
    """
    equal = isinstance(found, Comparison) and found.chosen == found.rejected
    tie = isinstance(found, Skipped) and found.reason == layouts.TIE
    if not equal and not tie:
        return found
    if rules.ties == "error":
        raise DataError(
            "chosen and rejected are the same" if equal else "the comparison is a tie",
            where=found.source,
            allowed="comparisons with a preference",
            hint="`data.ties: skip` leaves such rows out and counts them",
        )
    return Skipped(SAME_TEXT, found.source) if equal else found


def renamed(rows: Iterable[Row], rules: LayoutConfig, name: str) -> Iterator[Row]:
    """Rows with the names of `data.columns`: ours, with what stands under the file's; else with ours for `Prompt`.

    Raises:
        DataError: a name of ours is misspelt, or one of the file's isn't in its first MAPPED_ROWS rows.
    """
    if not rules.columns:
        names, ours = (), {}
        for where, row in rows:
            if names != (names := tuple(row)):
                ours = folded(names)
            yield where, {ours.get(key, key): content for key, content in row.items()} if ours else row
        return
    for ours in rules.columns:
        if near := slip_of(ours):
            raise DataError(f"no column is called {ours!r}", where="data.columns", hint=f"did you mean {near!r}?")
    waiting, missing = [], dict(rules.columns)
    rows = iter(rows)
    for where, row in rows:
        waiting.append((where, row))
        missing = {ours: theirs for ours, theirs in missing.items() if not _found(row, theirs)[0]}
        if not missing or len(waiting) >= MAPPED_ROWS:
            break
    if missing:
        ours, theirs = next(iter(missing.items()))
        seen = list(dict.fromkeys(key for _, row in waiting for key in row))
        near = nearest(theirs.split(".")[0], seen)
        raise DataError(
            f"there is no {theirs!r}, which data.columns names as {ours!r}",
            where=name,
            allowed=f"found columns {', '.join(map(repr, seen))}",
            hint=f"`data.columns: {{{ours}: {near}}}`" if near else None,
        )
    for where, row in chain(waiting, rows):
        values = {ours: _found(row, theirs)[1] for ours, theirs in rules.columns.items()}
        moved = set(rules.columns.values())
        yield where, {key: content for key, content in row.items() if key not in moved} | values


def _found(row: Any, name: str) -> tuple[bool, Any]:
    """Whether a row has what `name` leads to, and that: a column, or `a.b` into objects and lists."""
    if isinstance(row, Mapping) and name in row:
        return True, row[name]
    first, _, rest = name.partition(".")
    if rest and isinstance(row, Mapping) and first in row:
        return _found(row[first], rest)
    if isinstance(row, list) and first.removeprefix("-").isdecimal() and -len(row) <= int(first) < len(row):
        return _found(row[int(first)], rest) if rest else (True, row[int(first)])
    return False, None


def _holds_dialogs(row: Mapping[str, Any]) -> bool:
    """True for HH's layout: `chosen` and `rejected` are whole dialogs, and there is no prompt."""
    sides = [row.get(side) for side in ("chosen", "rejected")]
    if row.get("prompt") is not None or not all(isinstance(side, str) for side in sides):
        return False
    return all(str(side).startswith("\n\nHuman:") or _is_dialog(str(side)) for side in sides)


def _is_dialog(text: str) -> bool:
    turns = transcript(text) if text.lstrip().startswith("Human:") else None
    return turns is not None and turns[-1]["role"] == "assistant"


def reader_of(name: str, file: DataFile, rules: LayoutConfig | None = None) -> Reader:
    """The reader called `name`; SQuALITY's are given the stories, which lie in another file of that set."""
    format = _format(name)
    if not format.published:
        return partial(format.reader, rules=rules or LayoutConfig())
    return partial(format.reader, stories=_stories(file)) if name in NEED_STORIES else format.reader


def choice_of(rules: LayoutConfig) -> Choice:
    """What is read of a set with configurations, authors' splits or revisions."""
    return Choice(rules.config, rules.split, rules.revision)


def check_format(name: str) -> None:
    """Raises DataError, with the nearest name, when there is no such format."""
    names = ["auto", *(format.name for format in FORMATS)]
    if name not in names:
        near = nearest(name.lower(), names)
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
