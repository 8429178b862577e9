"""From a path to rows: JSON array, JSON lines, gzip, Parquet, TSV, TFRecord, `datasets` directories and hub names.

A row is a dictionary with the place where it was found. What a row means is the readers' business (readers/).
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlhf.data import pull
from perlhf.data.readers.tfrecord import is_tfrecord, read_examples
from perlhf.errors import DataError, nearest

BUILTIN = "builtin:coffee-bar"
SUFFIXES = (".json", ".jsonl", ".ndjson", ".tsv", ".tfrecord", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}")
"""Names of TFRecord shards, which need no suffix."""
_NOT_DATA = ("MANIFEST.json", "dataset_infos.json", "package.json", "splits.json")


@dataclass(frozen=True, slots=True)
class DataFile:
    """One source of rows. `path` is None for a name on the hub."""

    name: str
    path: Path | None


def find(path: str, root: Path | None = None) -> list[DataFile]:
    """The data files that `path` names, sorted by name.

    Args:
        path: a file, a directory (searched recursively), or `owner/name` on the hub where nothing local has that name.
        root: relative paths are looked up in the working directory, then here; None means $PERLHF_DATA.

    Raises:
        DataError: nothing has that name, or the directory holds no data file.
    """
    place = _local(path, root)
    if place is None:
        if _published(path):
            raise _missing(path, root)  # not a name on the hub, though it looks like one
        if _HUB_NAME.fullmatch(path) and not _stem(path).endswith(SUFFIXES):
            return [DataFile(path, None)]
        raise _missing(path, root)
    if not place.is_dir() or _is_saved_dataset(place):
        return [DataFile(path, place)]
    inside = sorted(part for part in place.rglob("*") if _is_data(part, place))
    if not inside:
        raise DataError(
            "the directory holds no data file",
            where=path,
            allowed=f"files ending in {', '.join(SUFFIXES)} (.gz may follow)",
        )
    return [DataFile(f"{path.rstrip('/')}/{part.relative_to(place).as_posix()}", part) for part in inside]


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
    """Like `rows`, but a JSON line or array element that can't be used is yielded as an error, so that all are seen."""
    empty = True
    for where, row in _all_rows(file):
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
    if empty:
        raise DataError("the file is empty", where=file.name, allowed="at least one record")


def read_bytes(path: Path, name: str) -> bytes:
    """Content of a file, unzipped when it begins like gzip.

    Raises:
        DataError: the file can't be read, or the gzip stream is truncated or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"the file can't be read: {error.strerror}", where=name) from error
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise DataError("the gzip file is truncated", where=name, hint="download or copy it again") from error
    except (OSError, zlib.error) as error:
        raise DataError(f"the gzip file is damaged: {error}", where=name, hint="download or copy it again") from error


def _all_rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    if file.path is None or file.path.is_dir():
        yield from _dataset_rows(file)
        return
    content = read_bytes(file.path, file.name)
    if content[:4] == b"PAR1":
        yield from _parquet_rows(content, file.name)
    elif _stem(file.name).endswith(".tfrecord") or is_tfrecord(content):
        yield from ((f"{file.name}[{index}]", row) for index, row in enumerate(read_examples(content, file.name)))
    elif _stem(file.name).endswith(".tsv"):
        yield from _tsv_rows(_decode(content, file.name), file.name)
    else:
        decoded = _decode(content, file.name)
        yield from (_array_rows if decoded.lstrip()[:1] == "[" else _line_rows)(decoded, file.name)


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"byte 0x{content[error.start]:02x} is not valid UTF-8",
            where=f"{name}:{line}",
            hint="save the file as UTF-8 (for example `iconv -f latin1 -t utf-8`)",
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} appears twice in one object")
    return members


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not valid JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _decode_one(document: str, start: int, where: str) -> tuple[Any, int]:
    """One JSON value of `document` and where it ends; ValueErrors become DataErrors at `where`."""
    try:
        return _DECODER.raw_decode(document, start)
    except RecursionError as error:
        raise DataError("JSON is nested too deeply", where=where) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"bad JSON: {error.msg} at column {error.colno}",
            where=where,
            allowed="a JSON array, or one JSON object per line",
        ) from error
    except ValueError as error:
        raise DataError(str(error), where=where) from error


def _line_rows(document: str, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(document.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row, end = _decode_one(line, len(line) - len(line.lstrip()), where)
            if line[end:].strip():
                raise DataError(
                    f"bad JSON: extra text after column {end}", where=where, allowed="one JSON object per line"
                )
        except DataError as error:
            row = error
        yield where, row


def _array_rows(document: str, name: str) -> Iterator[tuple[str, Any]]:
    position = _skip_space(document, document.index("[") + 1)
    index, closed = 0, document[position : position + 1] == "]"
    while not closed:
        try:
            row, position = _decode_one(document, position, f"{name}[{index}]")
        except DataError as error:
            if not isinstance(error.__cause__, json.JSONDecodeError):
                raise
            raise DataError(error.what, where=f"{name}:{error.__cause__.lineno}", allowed=error.allowed) from error
        yield f"{name}[{index}]", row
        index, position = index + 1, _skip_space(document, position)
        mark = document[position : position + 1]
        if mark not in (",", "]"):
            raise _bad_array(document, position, name, "',' or ']' is expected")
        closed = mark == "]"
        position = position if closed else _skip_space(document, position + 1)
    end = _skip_space(document, position + 1)
    if document[end:]:
        raise _bad_array(document, end, name, "extra text after the array")


def _skip_space(document: str, position: int) -> int:
    space = _SPACE.match(document, position)
    return space.end() if space else position


def _bad_array(document: str, position: int, name: str, what: str) -> DataError:
    line = document.count("\n", 0, position) + 1
    return DataError(f"bad JSON: {what}", where=f"{name}:{line}", allowed="a JSON array, or one JSON object per line")


def _tsv_rows(document: str, name: str) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Rows of the three-column TSV of the Taskmaster ticketing splits; values may be quoted as in CSV."""
    for number, line in enumerate(document.split("\n"), start=1):
        where = f"{name}:{number}"
        columns = line.rstrip("\r").split("\t")
        if columns == [""]:
            continue
        if len(columns) != 3:
            yield (
                where,
                DataError(
                    f"found {len(columns)} tab-separated columns", where=where, allowed="source, target, dialog id"
                ),
            )
            continue
        unquoted = [
            part[1:-1].replace('""', '"') if len(part) > 1 and part[0] == part[-1] == '"' else part for part in columns
        ]
        yield where, dict(zip(("source", "target", "dialog_id"), unquoted, strict=True))


def _parquet_rows(content: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        if len(set(table.column_names)) < len(table.column_names):
            raise ValueError("a column name appears twice")
        table_rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        first_line = str(error).split("\n")[0]
        raise DataError(
            f"the Parquet file can't be read: {first_line}", where=name, hint="write or copy it again"
        ) from error
    yield from ((f"{name}[{index}]", row) for index, row in enumerate(table_rows))


def _dataset_rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    """Rows of all splits of a `datasets` directory or hub name (our own splits are made by group)."""
    import datasets

    try:
        if file.path is None:
            loaded = datasets.load_dataset(file.name)
        else:
            loaded = datasets.load_from_disk(str(file.path))
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if file.path is None:
            raise DataError(
                f"no local file or directory has this name, and the hub gave none: {first_line}",
                where=file.name,
                hint="check the name and the connection, or download the set and give its path",
            ) from error
        raise DataError(f"the `datasets` directory can't be read: {first_line}", where=file.name) from error
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    for split_name, split in splits.items():
        prefix = f"{file.name}/{split_name}" if split_name else file.name
        yield from ((f"{prefix}[{index}]", row) for index, row in enumerate(split.with_format(None)))


def _local(path: str, root: Path | None) -> Path | None:
    root = root or (Path(os.environ["PERLHF_DATA"]) if os.environ.get("PERLHF_DATA") else None)
    if "\0" in path or not path:
        return None
    candidates = [Path(path), *([root / path] if root else [])]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _missing(path: str, root: Path | None) -> DataError:
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
        allowed=f"a file, a directory, `owner/name` on the hub, or {BUILTIN}",
        hint=hint,
    )


def _published(path: str) -> str | None:
    """The set of `perlhf data pull` that a relative path starts with."""
    first = Path(path).parts[0] if path and not Path(path).is_absolute() else ""
    return first if first in pull.sources() else None


def _is_saved_dataset(directory: Path) -> bool:
    return (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file()


def _is_data(part: Path, directory: Path) -> bool:
    hidden = any(name.startswith(".") for name in part.relative_to(directory).parts)
    stem = _stem(part.name)
    named = stem.endswith(SUFFIXES) or _SHARD.fullmatch(stem) is not None
    return part.is_file() and not hidden and part.name not in _NOT_DATA and named


def _stem(name: str) -> str:
    return name.lower().removesuffix(".gz")
