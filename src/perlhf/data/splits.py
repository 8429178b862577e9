"""From a data configuration to the records of one split.

Splits are made by group, so that no conversation is on two sides.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perlhf.config.stages import DataConfig
from perlhf.data import files, read
from perlhf.data.read import KINDS, Kind
from perlhf.data.readers.judged import TIE
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating, Record, Text
from perlhf.data.store import NO_LABEL, PROMPT, Facts, Records, count_groups, hold, warnings
from perlhf.errors import DataError, nearest
from perlhf.system.console import note
from perlhf.system.files import directory_atomic, write_atomic
from perlhf.system.hashes import hash_of
from perlhf.system.progress import counted

Split = Literal["train", "validation", "test"]
TIES = (read.SAME_TEXT, TIE)
"""Reasons for which comparisons without a preference are left out."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """All records of the asked kinds, read once; `of` gives those of one side."""

    config: DataConfig
    records: Records
    """Of all sides, in file order."""
    skipped: Mapping[str, int]
    """How many rows were left out for each reason."""

    def of(self, split: Split | Literal["all"]) -> Records:
        """The records of one side (`load`).

        Raises:
            DataError: there are none.
        """
        config, chosen = self.config, self.records
        if split != "all":
            chosen = chosen.take(self.sides == SPLITS.index(split))
        if not chosen:
            raise _empty_split(split, config, count_groups(self.records.facts))
        chosen = limited(chosen, config.limit)
        if split != "train":
            return chosen
        chosen = limited(chosen, config.limit_train)
        return with_label_noise(chosen, config) if config.label_noise else chosen

    @property
    def sides(self) -> NDArray[np.intp]:
        """Each record's side, as its number in SPLITS (`split_of`)."""
        return sides_of(self.records.facts, self.config)


def load(config: DataConfig, kinds: Sequence[str], split: Split | Literal["all"]) -> Records:
    """Records of the asked kinds in one split, in file order: a sequence whose records are made when asked for.

    Rule: a record of an asked kind stays as it is. Otherwise, when demonstrations are asked for, a thumbs-up rating
    becomes one, and so does the chosen side of a comparison; when prompts are asked for, every record gives its
    prompt, each different prompt once. The embedded set has records of each kind and is never converted. `limit`
    keeps the records whose content hashes lowest, whatever their order, and so does `limit_train` of the training
    side, whose labels `label_noise` turns round after that.

    Args:
        kinds: among "comparison", "rating", "demonstration", "prompt".
        split: "train", "validation", "test" or "all".

    Raises:
        DataError: a file or row is wrong, nothing can serve as one of the kinds, or the split is empty.
        StorageError: the temporary file that holds the records can't be written.
    """
    if split not in (*SPLITS, "all"):
        raise DataError(f"no split is called {split!r}", where="split", allowed=", ".join((*SPLITS, "all")))
    return read_splits(config, kinds).of(split)


def read_splits(config: DataConfig, kinds: Sequence[str]) -> Splits:
    """All records of the asked kinds (as `load` has them), read once for all sides.

    Raises:
        DataError: a file or row is wrong, or nothing can serve as one of the kinds.
        StorageError: the temporary file that holds the records can't be written.
    """
    wanted = _checked_kinds(kinds)
    if config.label_noise and not {"comparison", "rating"} & set(wanted):
        allowed = "a stage that learns from comparisons or ratings"
        raise DataError(f"{' and '.join(wanted)} records have no labels", where="data.label_noise", allowed=allowed)
    reading = read.Reading()
    records = _with_unique_prompts(hold(_converted(config, wanted, reading), config.split_seed))
    if not records:
        raise DataError(
            f"no record can serve as {' or '.join(wanted)}{_left_out(reading.skipped)}",
            where=", ".join(config.paths),
            hint="`perlhf data inspect` shows which kinds a file holds",
        )
    return Splits(config, records, reading.skipped)


def _left_out(skipped: Mapping[str, int]) -> str:
    rows = "; ".join(f"{count} rows: {reason}" for reason, count in skipped.items())
    return rows and f" (left out are {rows})"


def oddities(facts: Facts, skipped: Mapping[str, int]) -> Iterator[str]:
    """What is odd about records that can be used and about rows that can't: one sentence each (`store.warnings`)."""
    if ties := sum(skipped.get(reason, 0) for reason in TIES):
        yield f"{ties} comparisons are ties or have the same text on both sides; they are left out (`data.ties`)"
    yield from warnings(facts)


def split_of(group: str, config: DataConfig) -> Split:
    """The split of a group; depends on nothing but the group and `split_seed`, `test`, `validation`.

    u = sha256("{split_seed}:{group}") read as a fraction of [0, 1): below `test` is test, then validation, the rest
    train.
    """
    position = _position(f"{config.split_seed}:{group}")
    if position < config.test:
        return "test"
    return "validation" if position < config.test + config.validation else "train"


def sides_of(facts: Facts, config: DataConfig) -> NDArray[np.intp]:
    """As `split_of`, for facts that were noted under the configuration's `split_seed`: numbers in SPLITS."""
    position = facts.group.astype(np.float64) / 2**64
    held_out = np.where(position < config.test + config.validation, SPLITS.index("validation"), SPLITS.index("train"))
    return np.where(position < config.test, SPLITS.index("test"), held_out)


def check_sides(output: Path, paths: Sequence[str]) -> None:
    """Refuses to write the sides of a split where those of another one would stay beside them, or be what is split.

    Raises:
        DataError: `output` is a file, holds an earlier split among other files, or is where the records are from.
    """
    if output.exists() and not output.is_dir():
        raise DataError("the output is a file", where=str(output), allowed="a directory")
    old = _old_sides(output)
    if not old:
        return
    inside = [path for path in paths if output.resolve() in (Path(path).resolve(), *Path(path).resolve().parents)]
    others = sorted(entry.name for entry in output.iterdir() if entry.name not in old)
    if inside or others:
        why = f"{inside[0]} is read from it" if inside else f"{others[0]} is there, too"
        raise DataError(
            f"it holds {', '.join(old)} of an earlier split, and {why}",
            where=str(output),
            allowed="a new directory, or one that holds a split and nothing else, which is replaced",
            hint="name another --output",
        )


def write_sides(output: Path, sides: Iterable[tuple[str, Iterable[bytes]]], paths: Sequence[str]) -> None:
    """Writes SIDE.jsonl for each side. A directory that holds another split is replaced as a whole, which is told.

    Raises:
        DataError: as `check_sides`; StorageError: the files can't be written.
    """
    check_sides(output, paths)
    old = _old_sides(output)
    if output.is_dir() and not old and any(output.iterdir()):
        for side, lines in sides:
            write_atomic(output / f"{side}.jsonl", lines)
        return
    with directory_atomic(output) as temporary:
        for side, lines in sides:
            write_atomic(temporary / f"{side}.jsonl", lines)
    if old:
        note(f"{', '.join(old)} in {output} were of an earlier split and are replaced")


def _old_sides(output: Path) -> list[str]:
    return [f"{side}.jsonl" for side in SPLITS if (output / f"{side}.jsonl").exists()]


def content_hash(config: DataConfig, named: Sequence[str] | None = None) -> dict[str, str]:
    """SHA-256 by path: of a file's bytes, a directory's names and hashes, the records of a hub name or embedded set.

    Args:
        named: what the paths are called in the result, and in the names of a directory's files: where a run's
            configuration, written in another working directory, gives them.

    Raises:
        DataError: a path leads nowhere, or a file can't be read.
    """
    names = config.paths if named is None else named
    return {name: _path_hash(path, config, name) for path, name in zip(config.paths, names, strict=True)}


def hashes_beside(config: DataConfig) -> dict[str, str]:
    """SHA-256 by name of the files that readers read besides those of `content_hash` (`read.beside`).

    Raises:
        DataError: as `content_hash`.
    """
    found = [file for path in config.paths for file in read.beside(path, config.format, config)]
    return {f"{file.parent.name}/{file.name}": _file_hash(file) for file in found}


def check_labels(records: Records, config: DataConfig) -> None:
    """Raises DataError when there are ratings and all have the same label: a reward model would learn a constant."""
    labels = records.labels[records.labels != NO_LABEL]
    if len(labels) and (labels == labels[0]).all():
        raise DataError(
            f"all {len(labels)} ratings have the label {str(bool(labels[0])).lower()}",
            where=", ".join(config.paths),
            allowed="ratings of both labels",
            hint="add records of the other label, or raise the limit if one is set",
        )


def record_hash(record: Record) -> str:
    """SHA-256 of a record's kind and content; `source` and `columns` are left out, so are tools where there are none.

    Which records a limit keeps and whose labels are turned goes by it, so it stays what it is.
    """
    content = {
        part.name: getattr(record, part.name) for part in fields(record) if part.name not in ("source", "columns")
    }
    content = {name: part for name, part in content.items() if name != "tools" or part}
    return hashlib.sha256(_canonical([kind_of(record), content]).encode()).hexdigest()


def limited(records: Records, limit: int | None) -> Records:
    """At most `limit` records: those whose hashes are lowest, in the order given."""
    if limit is None or len(records) <= limit:
        return records
    # As bytes, of which 32 are enough for each: a stable sort goes by the digest, then by the place.
    digests = np.array([bytes.fromhex(record_hash(record)) for record in _counted(records, "limit")], dtype="S32")
    return records.take(np.sort(np.argsort(digests, kind="stable")[:limit]))


def with_label_noise(records: Records, config: DataConfig) -> Records:
    """The records, about `label_noise` of the comparisons and ratings with the other label.

    u = sha256("{split_seed}:label_noise:{record_hash}") read as a fraction of [0, 1): below `label_noise` is turned.
    """
    seed, share = config.split_seed, config.label_noise
    turned = (
        _position(f"{seed}:label_noise:{record_hash(record)}") < share for record in _counted(records, "label noise")
    )
    return records.with_turned(np.fromiter(turned, dtype=bool, count=len(records)))


def kind_of(record: Record) -> Kind:
    """The kind's name in configuration and summaries."""
    match record:
        case Comparison():
            return "comparison"
        case Rating():
            return "rating"
        case Demonstration():
            return "demonstration"
        case Prompt():
            return "prompt"


def prompt_text(prompt: Text) -> str:
    """A text that is the same for equal prompts and differs for different ones."""
    return _canonical(prompt)


def _position(key: str) -> float:
    """Where a hash of the key falls in [0, 1)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _counted(records: Records, description: str) -> Iterator[Record]:
    return counted(records, description, len(records))


def _converted(config: DataConfig, kinds: Sequence[Kind], reading: read.Reading) -> Iterator[Record]:
    for path in config.paths:
        if read.is_builtin(path):
            files.refuse_choice(path, read.choice_of(config))
            from perlhf.data.coffee_bar import feedback

            available = read.builtin_kinds(path)
            yield from (record for kind in kinds if kind in available for record in feedback.records(kind))
        else:
            found = read.stream(path, config.format, rules=config, into=reading)
            yield from _as_kinds(found, kinds, reading.skipped)


def _as_kinds(records: Iterable[Record], kinds: Sequence[Kind], skipped: dict[str, int]) -> Iterator[Record]:
    """The records as one of the kinds; `skipped` counts those that can be none."""
    for record in records:
        if kind_of(record) in kinds:
            yield record
        elif "demonstration" in kinds and isinstance(record, Comparison):
            yield Demonstration(
                record.prompt, record.chosen, record.group, record.weight, source=record.source, tools=record.tools
            )
        elif "demonstration" in kinds and isinstance(record, Rating) and record.label:
            yield Demonstration(
                record.prompt, record.completion, record.group, record.weight, source=record.source, tools=record.tools
            )
        elif "prompt" in kinds:
            yield Prompt(record.prompt, record.group, source=record.source, tools=record.tools)
        else:
            what = "rating with thumbs down" if isinstance(record, Rating) and not record.label else kind_of(record)
            reason = f"a {what} is no {' or '.join(kinds)}"
            skipped[reason] = skipped.get(reason, 0) + 1


def _with_unique_prompts(records: Records) -> Records:
    """Each different prompt once, where it comes first; records of other kinds all stay."""
    facts = records.facts
    prompts = np.flatnonzero(facts.kind == PROMPT)
    _, first = np.unique(facts.subject[prompts], return_index=True)
    if len(first) == len(prompts):
        return records
    kept = facts.kind != PROMPT
    kept[prompts[first]] = True
    return records.take(kept)


def _checked_kinds(kinds: Sequence[str]) -> list[Kind]:
    for kind in kinds:
        if kind not in KINDS:
            near = nearest(kind, KINDS)
            raise DataError(
                f"no kind of record is called {kind!r}",
                where="kinds",
                allowed=", ".join(KINDS),
                hint=near and f"did you mean {near!r}?",
            )
    return [kind for kind in KINDS if kind in kinds]


def _empty_split(split: str, config: DataConfig, groups: int) -> DataError:
    share = {"test": config.test, "validation": config.validation}.get(split, 1 - config.test - config.validation)
    change = "lower data.validation or data.test" if split == "train" else f"raise data.{split}"
    change += ", or set it to 0 for a run that isn't evaluated" if split == "test" else ""
    return DataError(
        f"the {split} split is empty: none of {groups} groups falls into it (share {share:g})",
        where=", ".join(config.paths),
        allowed="at least one group on each side",
        hint=f"{change}, give more data, or change data.split_seed",
    )


def _path_hash(path: str, config: DataConfig, named: str) -> str:
    if read.is_builtin(path):
        return _embedded_hash(path)
    data_files = files.find(path, choice=read.choice_of(config))
    if any(file.path is None for file in data_files):
        return _records_hash(read.stream(path, config.format, rules=config))
    here, there = _prefixes(path.rstrip("/"), named.rstrip("/"))
    names = [there + file.name.removeprefix(here) for file in data_files]
    hashes = [(name, _file_hash(file.path)) for name, file in zip(names, data_files, strict=True) if file.path]
    return hashes[0][1] if len(hashes) == 1 and hashes[0][0] == named else _sha256_of(json.dumps(hashes).encode())


@cache
def _embedded_hash(path: str) -> str:
    """A second of work, for what stays the same while a process lives."""
    return _records_hash(read.read(path))


def _prefixes(path: str, named: str) -> tuple[str, str]:
    """What comes before the part that both end with."""
    pairs = zip(reversed(path), reversed(named), strict=False)
    same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return path[: len(path) - same], named[: len(named) - same]


def _records_hash(records: Iterable[Record]) -> str:
    digest, between = hashlib.sha256(), b""
    for record in records:
        digest.update(between + record_hash(record).encode())
        between = b"\n"
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    if path.is_dir():
        inside = sorted(part for part in path.rglob("*") if part.is_file())
        hashes = [(part.relative_to(path).as_posix(), _file_hash(part)) for part in inside]
        return _sha256_of(json.dumps(hashes).encode())
    try:
        return hash_of(path)
    except OSError as error:
        raise DataError(
            f"can't be read: {error.strerror}", where=str(path), hint="check the file's permissions"
        ) from error


def _sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=True, default=_as_json)


def _as_json(content: Any) -> Any:
    """What JSON has no word for: any mapping as an object, a date or bytes that a Parquet file holds as text."""
    return dict(content) if isinstance(content, Mapping) else repr(content)
