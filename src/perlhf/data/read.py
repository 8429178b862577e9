"""From a path to records: each file's rows, given to the reader that its columns ask for."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from perlhf.config.stages import LayoutConfig
from perlhf.data import files
from perlhf.data.containers.authors import tell
from perlhf.data.fields import TIES, Row, Skipped, Told, checked
from perlhf.data.files import BUILTIN, Choice, DataFile
from perlhf.data.readers.columns import folded, slip_of
from perlhf.data.readers.formats import (
    NEED_STORIES,
    PUBLISHED,
    WHOLE_FILE,
    Reader,
    by_row,
    check_format,
    detect,
    format_of,
)
from perlhf.data.records import Comparison, Record
from perlhf.errors import DataError, nearest
from perlhf.system.progress import counted

Kind = Literal["rating", "comparison", "demonstration", "prompt"]
KINDS: tuple[Kind, ...] = ("comparison", "rating", "demonstration", "prompt")


@dataclass(frozen=True, slots=True)
class Reading:
    """Records in file order, how many rows were skipped for each reason, and the formats that were found."""

    records: list[Record] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    """How many rows were read by a rule that their author may not expect, for each such rule."""

    def leave_out(self, row: Skipped) -> None:
        """Counts a row that is left out, or one of which something is told."""
        counts = self.told if isinstance(row, Told) else self.skipped
        counts[row.reason] = counts.get(row.reason, 0) + 1

    def sentences(self) -> list[str]:
        """What is told of rows that were read."""
        return [f"{count:,} {what}" for what, count in self.told.items()]


LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
"""Suffixes of files with a row on each line (or nearly)."""
_SAMPLE_BYTES = 2**18
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
        settle = _settled_and_checked if name in PUBLISHED else settled
        for found in _reader(name, format, file, rules)(chain([first], rows)):
            record = settle(found, rules)
            if isinstance(record, Skipped):
                reading.leave_out(record)
            else:
                yield record
    for sentence in reading.sentences():
        tell(f"{path}: {sentence}")
    reading.told.clear()


def about_rows(file: DataFile) -> int | None:
    """About how many rows a file has, by the length of its first lines; None where they don't tell."""
    if file.path is None or not file.path.is_file() or not file.name.lower().endswith(LINES):
        return None
    with file.path.open("rb") as opened:
        begin = opened.read(_SAMPLE_BYTES)
    lines, size = begin.count(b"\n"), file.path.stat().st_size
    return round(size * lines / len(begin)) if lines else None


def settled(found: Record | Skipped, rules: LayoutConfig) -> Record | Skipped:
    """What a reader found, by the rule for ties: comparisons without a preference teach nothing.

    Raises:
        DataError: `ties: error`, and this is one.
    """
    equal = isinstance(found, Comparison) and found.chosen == found.rejected
    tie = isinstance(found, Skipped) and found.reason in TIES
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


def _settled_and_checked(found: Record | Skipped, rules: LayoutConfig) -> Record | Skipped:
    """As `settled`, for readers that leave it to their caller to check what they found."""
    outcome = settled(found, rules)
    return outcome if isinstance(outcome, Skipped) else checked(outcome, outcome.source)


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
        missing = {ours: theirs for ours, theirs in missing.items() if not _found(row, _spelt(theirs, row))[0]}
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
        spelt = {ours: _spelt(theirs, row) for ours, theirs in rules.columns.items()}
        values = {ours: _found(row, theirs)[1] for ours, theirs in spelt.items()}
        moved = set(spelt.values())
        yield where, {key: content for key, content in row.items() if key not in moved} | values


def _spelt(name: str, row: Mapping[str, Any]) -> str:
    """A column as the row spells it: with capitals and spaces, where errors have called it by our letters."""
    if name in row:
        return name
    return next((theirs for theirs, ours in folded(tuple(row)).items() if ours == name), name)


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


def _reader(name: str, format: str, file: DataFile, rules: LayoutConfig) -> Reader:
    """The reader of a file whose first row has the layout `name`, where `format` is what was asked for."""
    return by_row(name, rules) if format == "auto" and name not in PUBLISHED else reader_of(name, file, rules)


def reader_of(name: str, file: DataFile, rules: LayoutConfig | None = None) -> Reader:
    """The reader called `name`; SQuALITY's are given the stories, which lie in another file of that set."""
    format = format_of(name)
    if not format.published:
        return partial(format.reader, rules=rules or LayoutConfig())
    return partial(format.reader, stories=_stories(file)) if name in NEED_STORIES else format.reader


def beside(path: str, format: str, rules: LayoutConfig) -> list[Path]:
    """Files that are read besides those that `path` names: SQuALITY's stories, and splits whose rows are left out.

    Raises:
        DataError: nothing has that name, or a file is damaged.
    """
    found: list[Path] = []
    for file in [] if is_builtin(path) else files.find(path, choice=choice_of(rules)):
        found += [other.path for other in file.after if other.path]
        if (stories := _stories_file(file)) is not None and stories != file.path:
            first = None if format != "auto" else next(renamed(files.rows(file), rules, file.name), None)
            if (detect(first[1]) if first else format) in NEED_STORIES:
                found.append(stories)
    return found


def choice_of(rules: LayoutConfig) -> Choice:
    """What is read of a set with configurations, authors' splits or revisions."""
    return Choice(rules.config, rules.split, rules.revision)


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


def _stories_file(file: DataFile) -> Path | None:
    """Where the stories of a file of judgements are, in SQuALITY's own layout or beside it."""
    folder = file.path.parent if file.path else Path()
    places = [
        near / name for near in (folder, folder.parent / "v1-3" / "txt") for name in ("test.jsonl", "test.jsonl.gz")
    ]
    return next((place for place in places if place.is_file()), None) if file.path else None


def _stories(file: DataFile) -> dict[str, dict[str, Any]]:
    stories_file = _stories_file(file)
    if stories_file is None:
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


Outcome = Record | Skipped | DataError
Settle = Callable[[Record | Skipped], Record | Skipped]


def records_or_problems(file: DataFile, format: str, rules: LayoutConfig | None = None) -> Iterator[Outcome]:
    """Every record of a file, with an error in place of each row that can't be read."""
    rules, unreadable = rules or LayoutConfig(), list[DataError]()
    try:
        rows = _readable(file, rules, unreadable)
        if (first := next(rows, None)) is not None:
            name = detect(first[1]) if format == "auto" else format
            settle = partial(_settled_and_checked if name in PUBLISHED else settled, rules=rules)
            reader = _reader(name, format, file, rules)
            source = chain([first], rows)
            if name in WHOLE_FILE or rules.grades == "comparisons":
                yield from _of_whole_file(reader, source, file, settle, rules)
            else:
                yield from _of_each_row(reader, source, settle, unreadable)
    except DataError as error:
        unreadable.append(error)
    yield from unreadable


def _readable(file: DataFile, rules: LayoutConfig, unreadable: list[DataError]) -> Iterator[Row]:
    """The rows of a file by our names of columns; those that are none go to `unreadable`."""

    def readable() -> Iterator[Row]:
        for where, row in files.rows_or_errors(file):
            if isinstance(row, DataError):
                unreadable.append(row)
            else:
                yield where, row

    return renamed(counted(readable(), f"reading {file.name}", about_rows(file)), rules, file.name)


def _of_each_row(reader: Reader, rows: Iterator[Row], settle: Settle, unreadable: list[DataError]) -> Iterator[Outcome]:
    """What a reader makes of rows that stand each for itself; it goes on after one that it refuses.

    A row counts with all its records or not at all, so what it gave waits until the reader asks for the next one.
    """
    waiting: list[Outcome] = []
    began, refused = 0, False  # where the outcomes of the newest row begin, and whether it was refused

    def one_by_one() -> Iterator[Row]:
        nonlocal began, refused
        for row in rows:
            waiting.extend(unreadable)
            unreadable.clear()
            began, refused = len(waiting), False
            yield row
            began = len(waiting)  # all that it gave has come

    def refuse(error: DataError) -> None:
        nonlocal refused
        refused = True
        waiting[began:] = [error]

    source, going_on = one_by_one(), True
    while going_on:
        try:
            for found in reader(source):
                if began:
                    yield from waiting[:began]
                    del waiting[:began]
                    began = 0
                if refused:
                    continue
                try:
                    waiting.append(settle(found))
                except DataError as error:
                    refuse(error)
            going_on = False
        except DataError as error:
            refuse(error)
    yield from waiting


def _of_whole_file(
    reader: Reader, source: Iterator[Row], file: DataFile, settle: Settle, rules: LayoutConfig
) -> Iterator[Outcome]:
    """What a reader makes of all the rows that it doesn't refuse alone; the file is read twice for that."""
    refused: set[str] = set()
    for where, row in source:
        for outcome in _of_each_row(reader, iter([(where, row)]), settle, []):
            if isinstance(outcome, DataError):
                refused.add(where)
                yield outcome
    for found in reader((where, row) for where, row in _readable(file, rules, []) if where not in refused):
        try:
            yield settle(found)
        except DataError as error:
            yield error
