"""Rows of Parquet, of Arrow's files and streams, of directories that `datasets` saved, and of sets of the hub.

Rule: a null counts as absent, and so does NaN in a column of numbers. Keys that are null in the objects of a list
(messages lie there with all keys of all messages) are left out, `role` and `content` excepted. A struct of lists with a
role and a content is a list of messages. Dates become text, bytes become text where they are UTF-8. A number that
stands for a name (`ClassLabel` of `datasets`) becomes that name, since only the names say which number is good.
"""

import datetime
import decimal
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perlhf.data.containers import authors
from perlhf.data.containers.json_rows import decode
from perlhf.errors import DataError

if TYPE_CHECKING:
    import pyarrow

PARQUET, FEATHER, FILE, STREAM = b"PAR1", b"FEA1", b"ARROW1", b"\xff\xff\xff\xff"
_ROWS = 1000
"""Rows that are made into Python objects at a time."""
_TURNS = ({"role", "content"}, {"from", "value"})
_MARK, _STATE, _SPLITS = "dataset_dict.json", "state.json", "splits"
Found = tuple[str, Any]


def is_arrow(head: bytes) -> bool:
    """True when a file begins like Parquet, Feather or Arrow."""
    return head.startswith((PARQUET, FEATHER, FILE)) or (head.startswith(STREAM) and len(head) > 8 and head[7] == 0)


def is_saved(directory: Path) -> bool:
    """True for a directory that `datasets` wrote: one set, or one for each split."""
    return (directory / _MARK).is_file() or (directory / _STATE).is_file()


def file_rows(source: Path | bytes, head: bytes, name: str) -> Iterator[Found]:
    """Rows of one file (its content where it was packed), each with `file[index]`.

    Raises:
        DataError: the file is damaged.
    """
    what = "Parquet" if head.startswith(PARQUET) else "Arrow"
    index = 0
    for row in _readable(_batches(source, head), what, name):
        yield f"{name}[{index}]", row
        index += 1


def saved_rows(directory: Path, name: str, split: str | None) -> Iterator[Found]:
    """Rows of a directory that `datasets` saved, those of the splits that authors.choose takes.

    Raises:
        DataError: a file is missing or damaged, or there is no such split.
    """
    if not (directory / _MARK).is_file():
        if split is not None and split != "all" and not authors.matches(_split_name(directory), split):
            raise authors.no_splits(name, split)
        yield from _one_saved(directory, name)
        return
    names = _json_object(directory / _MARK, name).get(_SPLITS)
    if not isinstance(names, list) or not all(isinstance(part, str) for part in names):
        raise _unreadable_directory(name, f"{_MARK} lists no splits")
    parts = [(part, _one_saved(directory / part, f"{name}/{part}")) for part in authors.choose(names, split, name)]
    yield from authors.once(parts, name) if len(parts) > 1 else parts[0][1] if parts else ()


def hub_rows(name: str, config: str | None, split: str | None, revision: str | None) -> Iterator[Found]:
    """Rows of a set of the hub, those of the splits that authors.choose takes.

    Raises:
        DataError: the hub gives no such set, configuration, split or revision.
    """
    import datasets
    import datasets.exceptions
    import pyarrow

    options = {"revision": revision} if revision else {}
    try:
        loaded = datasets.load_dataset(name, *([config] if config else []), **options)
    except (
        OSError,
        ValueError,
        KeyError,
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
    ) as error:
        raise _hub_error(name, config, error) from error
    if not isinstance(loaded, dict):
        loaded = {"": loaded}
    chosen = authors.choose(list(map(str, loaded)), split, name) if list(loaded) != [""] else [""]
    parts = [(part, _set_rows(loaded[part], f"{name}/{part}" if part else name)) for part in chosen]
    yield from authors.once(parts, name) if len(parts) > 1 else parts[0][1] if parts else ()


def _hub_error(name: str, config: str | None, error: Exception) -> DataError:
    text = str(error)
    first_line = (text.splitlines() or [type(error).__name__])[0]
    if "Config name is missing" in text or "BuilderConfig" in text:
        listed = text[text.find("[") + 1 : text.find("]")].replace("'", "") if "[" in text else None
        first = (listed or "NAME").split(",")[0].strip()
        return DataError(
            f"the set has no configuration {config!r}" if config else "the set has several configurations",
            where=name,
            allowed=listed,
            hint=f"data.config {first!r} reads that one (`--config {first}` for `perlhf data`)",
        )
    return DataError(
        f"no local file or directory has this name, and the hub gave none: {first_line}",
        where=name,
        hint="check the name and the connection, or download the set and give its path",
    )


def _set_rows(split: Any, name: str) -> Iterator[Found]:
    index = 0
    for table in split.with_format("arrow").iter(_ROWS):
        for batch in table.to_batches():
            for row in _batch_rows(batch):
                yield f"{name}[{index}]", row
                index += 1


def _one_saved(directory: Path, name: str) -> Iterator[Found]:
    state = _json_object(directory / _STATE, name)
    listed = state.get("_data_files")
    try:
        places = [directory / entry["filename"] for entry in listed or ()]
    except (TypeError, KeyError) as error:
        raise _unreadable_directory(name, f"{_STATE} lists no data files") from error
    index = 0
    for place in places:
        try:
            with place.open("rb") as opened:
                head = opened.read(16)
        except OSError as error:
            raise _unreadable_directory(name, f"{place.name}: {error.strerror}") from error
        for row in _readable(_batches(place, head), "Arrow", f"{name}/{place.name}"):
            yield f"{name}[{index}]", row
            index += 1


def _json_object(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise _unreadable_directory(name, f"{path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable_directory(name, f"{path.name} is not valid JSON") from error
    return content if isinstance(content, dict) else {}


def _unreadable_directory(name: str, reason: str) -> DataError:
    return DataError(f"the `datasets` directory can't be read: {reason}", where=name, hint="save or copy it again")


def _split_name(directory: Path) -> str:
    return directory.resolve().name


def _readable(batches: Iterable["pyarrow.RecordBatch"], what: str, name: str) -> Iterator[dict[str, Any]]:
    """Rows of the batches; what Arrow raises of a damaged file becomes one DataError."""
    import pyarrow

    try:
        for batch in batches:
            yield from _batch_rows(batch)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        first_line = str(error).split("\n")[0]
        hint = "write or copy it again"
        raise DataError(f"the {what} file can't be read: {first_line}", where=name, hint=hint) from error


def _batches(source: Path | bytes, head: bytes) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    if head.startswith(PARQUET):
        with pyarrow.parquet.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            yield from _checked(opened.iter_batches(_ROWS))
        return
    mapped = pyarrow.BufferReader(source) if isinstance(source, bytes) else pyarrow.memory_map(str(source))
    with mapped:
        if head.startswith(FEATHER):
            yield from _checked(pyarrow.feather.read_table(mapped, memory_map=False).to_batches())
        elif head.startswith(FILE):
            opened = pyarrow.ipc.open_file(mapped)
            yield from _checked(opened.get_batch(index) for index in range(opened.num_record_batches))
        else:
            yield from _checked(pyarrow.ipc.open_stream(mapped))


def _checked(batches: Iterable["pyarrow.RecordBatch"]) -> Iterator["pyarrow.RecordBatch"]:
    for batch in batches:
        if len(set(batch.schema.names)) < len(batch.schema.names):
            raise ValueError("a column name appears twice")
        batch.validate(full=True)  # offsets of a damaged file would be followed anywhere
        yield batch


def _batch_rows(batch: "pyarrow.RecordBatch") -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    classes = _class_names(batch.schema.metadata)
    mend = [_named(classes[field.name]) if field.name in classes else _mended(field.type) for field in batch.schema]
    for start in range(0, batch.num_rows, _ROWS):
        part = batch.slice(start, _ROWS)
        columns = []
        for column, change in zip(part.columns, mend, strict=True):
            cells = _storage(column).to_pylist()
            columns.append([None if cell is None else change(cell) for cell in cells] if change else cells)
        for cells in zip(*columns, strict=True):
            yield dict(zip(names, cells, strict=True))


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of the classes of each column that `datasets` says to hold numbers of classes."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: [str(one) for one in kind["names"]] for name, kind in labels.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _named(classes: list[str]) -> Callable[[Any], Any]:
    """The name of a class for its number; -1 is how `datasets` writes that there is none."""

    def name(cell: Any) -> Any:
        if not isinstance(cell, int) or isinstance(cell, bool) or cell >= len(classes):
            return cell
        return classes[cell] if cell >= 0 else None

    return name


def _storage(column: "pyarrow.Array") -> "pyarrow.Array":
    """The array below an extension type (JSON, UUID and the like)."""
    import pyarrow

    return column.storage if isinstance(column, pyarrow.ExtensionArray) else column


def _mended(kind: "pyarrow.DataType", inside_list: bool = False) -> Callable[[Any], Any] | None:
    """What makes a cell of this type into a row's value; None where it is one already."""
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _json_cell if isinstance(kind, pyarrow.JsonType) else _mended(kind.storage_type, inside_list)
    if types.is_dictionary(kind):
        return _mended(kind.value_type, inside_list)
    if types.is_floating(kind):
        return _number
    if types.is_struct(kind):
        return _mended_struct(kind, inside_list)
    if types.is_map(kind):
        key, item = _mended(kind.key_type, True), _mended(kind.item_type, True)
        return lambda cell: {_apply(key, name): _apply(item, part) for name, part in cell}
    if hasattr(kind, "value_type"):
        inner = _mended(kind.value_type, True)
        return (lambda cell: [_apply(inner, part) for part in cell]) if inner else None
    if types.is_temporal(kind) or types.is_decimal(kind):
        return _plain_cell
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return _text_if_utf8
    return None


def _mended_struct(kind: "pyarrow.StructType", inside_list: bool) -> Callable[[Any], Any] | None:
    fields = [kind.field(index) for index in range(kind.num_fields)]
    names = {field.name for field in fields}
    inner = {field.name: change for field in fields if (change := _mended(field.type, True))}
    transposed = any(turn <= names for turn in _TURNS) and all(hasattr(field.type, "value_type") for field in fields)
    if not (inner or inside_list or transposed):
        return None

    def mend(cell: dict[str, Any]) -> Any:
        if inner:
            cell = {name: _apply(inner.get(name), part) for name, part in cell.items()}
        if transposed:
            lengths = {len(part) for part in cell.values() if part is not None}
            if len(lengths) == 1:
                count = lengths.pop()
                parts = {name: part if part is not None else [None] * count for name, part in cell.items()}
                turns = [dict(zip(parts, turn, strict=True)) for turn in zip(*parts.values(), strict=True)]
                return [_without_nulls(turn) for turn in turns]
        return _without_nulls(cell) if inside_list else cell

    return mend


def _without_nulls(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in cell.items() if part is not None or name in ("role", "content")}


def _apply(change: Callable[[Any], Any] | None, part: Any) -> Any:
    return change(part) if change and part is not None else part


def _number(cell: float) -> float | None:
    return cell if cell == cell else None


def _json_cell(cell: str) -> Any:
    try:
        return decode(cell)
    except (ValueError, RecursionError):
        return cell


def _plain_cell(cell: Any) -> Any:
    if isinstance(cell, decimal.Decimal):
        return float(cell) if cell.is_finite() else None
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return str(cell)


def _text_if_utf8(cell: bytes) -> str | bytes:
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return cell
