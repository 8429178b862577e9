"""Files that are one JSON object: rows that it wraps, the authors' splits, pandas' layouts, or one record.

Rule: an object whose lists of objects are called as splits are holds those splits. Otherwise the rows are the one
list of objects called `data`, `rows`, `records` or the like, or the only list of objects where the object holds
nothing that a record would (texts, or messages with a role). Columns of equal keys (pandas' default `to_json`), rows by
their index, `split` and plain lists by column are put together row by row. Anything else is one record.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from perlhf.data.containers import authors
from perlhf.errors import DataError

_WRAPPERS = ("data", "rows", "records", "examples", "instances", "items", "samples", "entries", "dataset", "train")
_TURN_KEYS = frozenset(("role", "from", "speaker"))
_COLUMNS = frozenset(
    "prompt chosen rejected completion messages conversations conversation instruction input output question answer "
    "response text label query".split()
)

_PARTS = frozenset("role from speaker content value name type id".split())


def rows(value: Any, place: str, name: str, split: str | None = None) -> Iterator[tuple[str, Any]]:
    """Rows of a file that is `value`, found at `place`.

    Raises:
        DataError: several lists may be the rows, or the authors' splits are all held out.
    """
    if not isinstance(value, dict):
        yield place, value
        return
    lists = {key: part for key, part in value.items() if _is_rows(part)}
    if lists and all(authors.side_of(key) for key in lists) and (len(lists) > 1 or len(value) == 1):
        chosen = authors.choose(list(lists), split, name)
        parts = [(key, _listed(lists[key], f"{name}/{key}")) for key in chosen]
        yield from authors.once(parts, name) if len(parts) > 1 else parts[0][1]
        return
    if split is not None and split != "all":
        raise authors.no_splits(name, split)
    if (key := _wrapper(value, lists, place)) is not None:
        yield from _listed(lists[key], name)
    elif (table := _table(value)) is not None:
        yield from ((f"{name}[{index}]", row) for index, row in enumerate(table))
    else:
        yield place, value


def _is_rows(part: Any) -> bool:
    return isinstance(part, list) and bool(part) and all(isinstance(row, dict) for row in part)


def _looks_like_turns(part: list[dict[str, Any]]) -> bool:
    return all(_TURN_KEYS & row.keys() for row in part)


def _wrapper(value: Mapping[str, Any], lists: Mapping[str, list[dict[str, Any]]], place: str) -> str | None:
    """The key whose list is the rows; None where the object is a record or a table."""
    if not lists or _COLUMNS & value.keys():
        return None
    if named := [key for key in lists if key.lower() in _WRAPPERS]:
        if len(named) == 1:
            return named[0]
    elif any(map(_looks_like_turns, lists.values())) or any(
        isinstance(part, str | dict) for key, part in value.items() if key not in lists
    ):
        return None
    if len(lists) > 1:
        raise DataError(
            f"the file is one object with several lists of objects: {', '.join(map(repr, lists))}",
            where=place,
            allowed="a JSON array, one JSON object per line, or an object with one list of records",
            hint="write the list that holds the records to a file of its own",
        )
    return next(iter(lists))


def _listed(part: list[dict[str, Any]], name: str) -> Iterator[tuple[str, Any]]:
    # The rows of the hub's viewer lie in an envelope of their own.
    enveloped = all(row.keys() >= {"row_idx", "row"} and isinstance(row["row"], dict) for row in part)
    for index, row in enumerate(part):
        yield f"{name}[{index}]", row["row"] if enveloped else row


def _table(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of pandas' layouts (`columns`, `index`, `split`) and of plain lists by column; None for anything else."""
    if value.keys() >= {"columns", "data"} and isinstance(value["columns"], list) and isinstance(value["data"], list):
        columns = [str(column) for column in value["columns"]]
        if all(isinstance(cells, list) and len(cells) == len(columns) for cells in value["data"]):
            return [dict(zip(columns, cells, strict=True)) for cells in value["data"]]
    parts = list(value.values())
    if parts and all(isinstance(part, dict) and part for part in parts):
        keys = parts[0].keys()
        if any(part.keys() != keys for part in parts) and not _numbered(value):
            return None
        if _numbered(value) or (_COLUMNS & keys and not _COLUMNS & value.keys()):
            return list(parts)
        if _numbered(keys) or (_COLUMNS & value.keys() and not (_COLUMNS | _PARTS) & keys):
            return [{column: part[key] for column, part in value.items()} for key in keys]
        return None
    if len(parts) > 1 and all(isinstance(part, list) for part in parts) and any(map(_are_texts, parts)):
        turns = any(_is_rows(part) and _looks_like_turns(part) for part in parts)
        if not turns and len({len(part) for part in parts}) == 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*parts, strict=True)]
    return None


def _are_texts(part: list[Any]) -> bool:
    return bool(part) and all(isinstance(cell, str) for cell in part)


def _numbered(keys: Any) -> bool:
    return bool(keys) and all(str(key).isdecimal() for key in keys)
