"""From a path to rows: JSON, CSV, TSV, Parquet, Arrow, TFRecord, packed or not, `datasets` directories, hub names.

A row is a dictionary with the place where it was found. What a row means is the readers' business (readers/), how
the containers are read is in containers/. Nothing holds a whole file, packed Parquet and TFRecord excepted.
"""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from perlhf.data import pull
from perlhf.data.containers import arrow, authors, delimited, json_rows
from perlhf.data.containers.decoded import text_blocks
from perlhf.data.containers.packed import PACKED_SUFFIXES, blocks, member_name
from perlhf.data.containers.tfrecord import is_tfrecord, read_examples
from perlhf.errors import DataError, nearest

BUILTIN = "builtin:coffee-bar"
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".tfrecord", ".parquet", ".arrow", ".feather")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}")
"""Names of TFRecord shards, which need no suffix."""
_LIKE_JSON = re.compile(rb"(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*\"[^\"]*\"\s*:")
_GLOB = re.compile(r"[*?\[]")
_NOT_DATA = (
    "MANIFEST.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "package.json",
    "splits.json",
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What is read of a set: `data.config`, `data.split`, `data.revision`."""

    config: str | None = None
    split: str | None = None
    revision: str | None = None


FOR_TRAINING = Choice()


@dataclass(frozen=True, slots=True)
class DataFile:
    """One source of rows. `path` is None for a name on the hub.

    `choice` is what is still to be chosen inside it, and `after` are files of other splits, whose rows are left out.
    """

    name: str
    path: Path | None
    choice: Choice = FOR_TRAINING
    after: tuple["DataFile", ...] = ()


def find(path: str, root: Path | None = None, choice: Choice = FOR_TRAINING) -> list[DataFile]:
    """The data files that `path` names, sorted by name.

    Args:
        path: a file, a directory (searched recursively), a pattern (`data/*.jsonl`, `**` for any folders), or
            `owner/name` on the hub where nothing local has that name.
        root: relative paths are looked up in the working directory, then here; None means $PERLHF_DATA.
        choice: of a set's configurations, splits and revisions.

    Raises:
        DataError: nothing has that name, the directory holds no data file, or no such split.
    """
    place = _local(path, root)
    if place is None:
        if _GLOB.search(path):
            return _split_files(_matching(path, root), path, choice)
        if _published(path):
            raise _missing(path, root)  # not a name on the hub, though it looks like one
        if _HUB_NAME.fullmatch(path) and not _stem(path).endswith(SUFFIXES):
            return [DataFile(path, None, choice)]
        raise _missing(path, root)
    if choice.revision is not None:
        raise DataError(
            "a local file or directory has no revisions",
            where=f"{path}: data.revision",
            allowed="names on the hub",
            hint="leave data.revision out",
        )
    if place.is_dir() and not arrow.is_saved(place):
        if choice.config is None and len(configs := authors.configs(place)) > 1:
            authors.tell(f"{path}: all configurations are read: {', '.join(configs)} (data.config names one)")
        inside = _inside(place, path) if choice.config is None else _configured(place, path, choice.config)
        return _split_files(inside, path, choice)
    if choice.config is not None:
        raise DataError(
            "there are no configurations",
            where=f"{path}: data.config",
            allowed="names on the hub, and directories of such sets",
            hint="leave data.config out",
        )
    return [DataFile(path, place, choice)]


def refuse_choice(path: str, choice: Choice) -> None:
    """Raises DataError where a configuration, split or revision is asked of the embedded set, which has none."""
    if choice != FOR_TRAINING:
        raise DataError(
            "the embedded set has no configurations, splits or revisions",
            where=path,
            allowed="names on the hub, directories and files with splits",
            hint="leave data.config, data.split and data.revision out",
        )


def rows(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file in order, each with `file:line` or `file[index]`.

    Raises:
        DataError: the file is empty or damaged; the message names the line or index.
    """
    for where, row in rows_or_errors(file):
        if isinstance(row, DataError):
            raise row
        yield where, row


def rows_or_errors(file: DataFile) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Like `rows`, but a line or array element that can't be used is yielded as an error, so that all are seen."""
    empty = True
    for where, row in _first_time(file):
        empty = False
        if isinstance(row, dict | DataError):
            yield where, row
        else:
            yield (
                where,
                DataError(
                    f"found a {type(row).__name__} where a record is expected",
                    where=where,
                    allowed="a JSON object per record",
                ),
            )
    if empty and not file.after:
        raise DataError("the file is empty", where=file.name, allowed="at least one record")


def _first_time(file: DataFile) -> Iterator[tuple[str, Any]]:
    """The rows of a file without those that the files of earlier splits have."""
    if not file.after:
        yield from _all_rows(file)
        return
    earlier = _keys(file.after)
    repeated = 0
    for where, row in _all_rows(file):
        if authors.key_of(row) in earlier:
            repeated += 1
        else:
            yield where, row
    if repeated:
        authors.tell(f"{file.name}: {repeated:,} rows are those of an earlier split and are read once")


@lru_cache(maxsize=1)
def _keys(earlier: tuple[DataFile, ...]) -> frozenset[bytes]:
    """Keys of the rows of these files, which all files of a later split ask for."""
    return frozenset(authors.key_of(row) for other in earlier for _, row in _all_rows(other))


def _all_rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    choice = file.choice
    if file.path is None:
        yield from arrow.hub_rows(file.name, choice.config, choice.split, choice.revision)
        return
    if file.path.is_dir():
        yield from arrow.saved_rows(file.path, file.name, choice.split)
        return
    suffix = _stem(member_name(file.path, file.name)).removesuffix(".txt")
    content = blocks(file.path, file.name)
    head = next(content, b"")
    everything = chain([head], content)
    table = suffix.endswith((".csv", ".tsv")) and not _LIKE_JSON.match(head)
    named = choice.split is None or _is_asked(file, choice.split)
    if arrow.is_arrow(head):
        packed = _begins_otherwise(file.path, head)
        found = arrow.file_rows(b"".join(everything) if packed else file.path, head, file.name)
    elif suffix.endswith(".tfrecord") or is_tfrecord(head):
        examples = read_examples(b"".join(everything), file.name)
        found = ((f"{file.name}[{index}]", row) for index, row in enumerate(examples))
    elif table:
        found = delimited.rows(text_blocks(everything, file.name), file.name, suffix.endswith(".tsv"))
    else:
        split, named = None if named else choice.split, True
        found = json_rows.rows(text_blocks(everything, file.name), file.name, split)
    if not named and choice.split is not None:
        raise authors.no_splits(file.name, choice.split)
    yield from found


def _begins_otherwise(path: Path, head: bytes) -> bool:
    """True when what was read isn't what lies on disk: it was packed, or can't be read twice."""
    if not path.is_file():
        return True
    with path.open("rb") as opened:
        return opened.read(4) != head[:4]


def _is_asked(file: DataFile, split: str) -> bool:
    name = authors.split_of_file(PurePosixPath(PurePosixPath(file.name).name)) or ""
    return split == "all" or any(authors.matches(name, wanted) for wanted in split.split("+"))


def _inside(place: Path, path: str) -> list[DataFile]:
    inside = _each_once(sorted(part for part in place.rglob("*") if _is_data(part, place)), path)
    if not inside:
        others = sorted(part.relative_to(place).as_posix() for part in place.rglob("*") if part.is_file())
        found = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise DataError(
            "the directory holds no data file" + (f" (found {found})" if others else ""),
            where=path,
            allowed=f"files ending in {', '.join(SUFFIXES)} ({', '.join(PACKED_SUFFIXES)} may follow)",
        )
    filled = [part for part in inside if part.stat().st_size]
    if filled and len(filled) < len(inside):  # as tools that write in parts leave them
        empty = [part.relative_to(place).as_posix() for part in inside if part not in filled]
        authors.tell(f"{path}: {len(empty)} empty files are left out: {', '.join(empty[:5])}")
        inside = filled
    return [DataFile(f"{path.rstrip('/')}/{part.relative_to(place).as_posix()}", part) for part in inside]


def _each_once(parts: list[Path], path: str) -> list[Path]:
    """The files without those that are links to others among them."""
    real = {part.resolve(): part for part in reversed(parts)}
    own = {target: part for part in parts if (target := part.resolve()) == part.absolute()}
    kept = [part for part in parts if (real | own)[part.resolve()] == part]
    if len(kept) < len(parts):
        twice = next(part.name for part in parts if part not in kept)
        authors.tell(f"{path}: {twice} is a link to another of its files, and is read once")
    return kept


def _split_files(found: list[DataFile], path: str, choice: Choice) -> list[DataFile]:
    """The files of the authors' splits that are read (authors.py has the rule), in the order of their names."""
    splits = {file: _split_of(file, path) for file in found}
    names = list(dict.fromkeys(name for name in splits.values() if name))
    training = [name for name in names if authors.side_of(name) == "train"]
    if choice.split is None:
        unnamed = [file.name for file, name in splits.items() if name is None]
        if len(training) == len(names) or not (training or unnamed):
            if names and not training:
                authors.tell(f"{path}: all its files are named as held out ({', '.join(names)}), and are read")
            return found
        if not training:  # of prefs.jsonl and prefs_test.jsonl, the first is for training
            authors.tell_left_out(path, unnamed, names)
            return [file for file, name in splits.items() if name is None]
        left = [name or file.name for file, name in splits.items() if name not in training]
        authors.tell_left_out(path, training, list(dict.fromkeys(left)))
        taken = training
    elif choice.split == "all":
        return found
    elif not names:
        # A single JSON file may hold the splits.
        return [replace(file, choice=Choice(split=choice.split)) for file in found]
    else:
        taken = authors.choose(names, choice.split, path)
    kept = [file for file, name in splits.items() if name in taken]
    if len(taken) == 1:
        return kept
    return [
        replace(file, after=tuple(other for other in kept[:index] if splits[other] != splits[file]))
        for index, file in enumerate(kept)
    ]


def _split_of(file: DataFile, path: str) -> str | None:
    """The split of a file by its name below `path` (what the directory itself is called says nothing)."""
    fixed = _GLOB.split(path)[0].rpartition("/")[0] if _GLOB.search(path) else path.rstrip("/")
    below = file.name.removeprefix(fixed).lstrip("/")
    return authors.split_of_file(PurePosixPath(below))


def _matching(pattern: str, root: Path | None) -> list[DataFile]:
    """The files that a pattern finds in the working directory, else below the root; directories are searched."""
    for base in (None, _root(root)):
        if base is None and pattern.startswith("~"):
            pattern = str(Path(pattern).expanduser())
        matches = sorted(glob.glob(pattern, root_dir=base, recursive=True))
        places = [(match, Path(base or "") / match) for match in matches]
        files = [(match, place) for match, place in places if place.is_file()]
        known = [(match, place) for match, place in files if _is_data(place, place.parent)]
        found = [DataFile(match, place) for match, place in known or files]
        if not found:
            directories = [(match, place) for match, place in places if place.is_dir()]
            found = [file for match, place in directories for file in _found_in(place, match)]
        if found:
            kept = _each_once([file.path for file in found if file.path], pattern)
            return list(dict.fromkeys(file for file in found if file.path in kept))
    raise DataError(
        "no file matches this pattern",
        where=pattern,
        allowed="a pattern that finds files, `*` within a name and `**` for any folders",
        hint=f"look below {_GLOB.split(pattern)[0].rpartition('/')[0] or 'the working directory'}",
    )


def _found_in(place: Path, path: str) -> list[DataFile]:
    return [DataFile(path, place)] if arrow.is_saved(place) else _inside(place, path)


def _configured(place: Path, path: str, config: str) -> list[DataFile]:
    """The files of one configuration."""
    inside = _inside(place, path)
    wanted = authors.files_of_config(place, path, config, [file.path for file in inside if file.path])
    return [file for file in inside if file.path in wanted]


def _root(root: Path | None) -> Path | None:
    return root or (Path(os.environ["PERLHF_DATA"]) if os.environ.get("PERLHF_DATA") else None)


def _local(path: str, root: Path | None) -> Path | None:
    root = _root(root)
    if "\0" in path or not path:
        return None
    candidates = [Path(path).expanduser() if path.startswith("~") else Path(path), *([root / path] if root else [])]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _missing(path: str, root: Path | None) -> DataError:
    if path and "\0" not in path and Path(path).is_symlink():
        return DataError(
            f"this is a link to {os.readlink(path)!r}, which doesn't exist",
            where=path,
            hint="mend the link, or name the file itself",
        )
    parent = Path(path).parent
    near = nearest(Path(path).name, [part.name for part in parent.iterdir()]) if parent.is_dir() and path else None
    places = "the working directory" + (
        f" or {root or os.environ.get('PERLHF_DATA')}" if root or os.environ.get("PERLHF_DATA") else ""
    )
    hint = f"{parent / near}" if near else "set PERLHF_DATA to the directory that relative paths start from"
    if name := _published(path):
        hint = f"`perlhf data pull {name}` fetches it into data/, then PERLHF_DATA=data; or {hint}"
    return DataError(
        f"nothing has this name in {places}",
        where=path or "''",
        allowed=f"a file, a directory, a pattern, `owner/name` on the hub, or {BUILTIN}",
        hint=hint,
    )


def _published(path: str) -> str | None:
    """The set of `perlhf data pull` that a relative path starts with."""
    first = Path(path).parts[0] if path and not Path(path).is_absolute() else ""
    return first if first in pull.sources() else None


def _is_data(part: Path, directory: Path) -> bool:
    hidden = any(name.startswith(".") for name in part.relative_to(directory).parts)
    stem = _stem(part.name).removesuffix(".txt")
    named = stem.endswith(SUFFIXES) or _SHARD.fullmatch(stem) is not None
    return part.is_file() and not hidden and part.name not in _NOT_DATA and named


def _stem(name: str) -> str:
    lowered = name.lower()
    packed = next((suffix for suffix in PACKED_SUFFIXES if lowered.endswith(suffix)), "")
    return lowered.removesuffix(packed)
