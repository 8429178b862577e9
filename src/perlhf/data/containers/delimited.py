"""CSV and TSV: a header, then cells of text, quoted as spreadsheets and pandas quote them.

Rule: of tab, comma, semicolon and bar the delimiter is the one that parts the header into most columns (always the tab
in a .tsv file). An empty cell counts as absent; `weight` and `margin` are numbers. A cell that holds a list of messages
or tools, as JSON or as Python prints it, is read as that list, and JSON lists of texts and numbers are in columns that
have one for each of several answers. A header that is repeated further down, as in files put one after the other, is
no row. A .tsv file whose first line is a Taskmaster dialog
(`source`, `target`, dialog id) has no header.
"""

import ast
import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from perlhf.data.containers.decoded import LONGEST, lines
from perlhf.data.containers.json_rows import decode
from perlhf.errors import DataError

_DELIMITERS = "\t,;|"
_TASKMASTER = re.compile(r"[<\[](U|A|PN|PAN|PAV|PR|PRAN|PRAV|S|C)[>\]]")
_STRUCTURED = ("messages", "conversations", "conversation", "tools")
_LISTS = ("responses", "completions", "answers", "generations", "scores", "ratings", "ranks", "rewards", "history")
_NUMBERS = ("weight", "margin")
_LIST_OF_TURNS = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value|name|tool_calls)['"]\s*:""")


def rows(texts: Iterable[str], name: str, tabs: bool) -> Iterator[tuple[str, Any]]:
    """Rows by the header's names, each with `file:line`; one that can't be read comes as an error.

    Raises:
        DataError: the header is wrong or the quoting never ends.
    """
    texts = iter(texts)
    head = next(texts, "")
    whole = chain([head], texts)
    if "\r" in head and "\n" not in head:  # as old Macs end lines, and Excel's "CSV (Macintosh)"
        whole = (text.replace("\r", "\n") for text in whole)
    numbered = lines(whole, name)
    begun = next(((number, line) for number, line in numbered if line.strip()), None)
    if begun is None:
        return
    number, header = begun
    if tabs and _TASKMASTER.search(header.rpartition("\t")[0]):
        yield from _taskmaster_rows(chain([begun], numbered), name)
        return
    separator = re.fullmatch(r"sep=(.)\r?", header)  # the first line of Excel's files in some countries
    if separator:
        number, header = next(numbered, (number, ""))
    delimiter = "\t" if tabs else separator.group(1) if separator else _delimiter(header)
    yield from _table_rows(chain([(number, header)], numbered), delimiter, name)


def _delimiter(header: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    return max(_DELIMITERS, key=unquoted.count)


def _table_rows(numbered: Iterator[tuple[int, str]], delimiter: str, name: str) -> Iterator[tuple[str, Any]]:
    first_number, first_line = next(numbered)
    lines_read = 0

    def terminated() -> Iterator[str]:
        nonlocal lines_read
        for _, line in chain([(first_number, first_line)], numbered):
            lines_read += 1
            yield line + "\n"

    csv.field_size_limit(LONGEST)  # of the whole process; its default refuses long texts
    spaced = len(parts := first_line.split(delimiter)) > 1 and all(part[:1] == " " for part in parts[1:])
    reader = csv.reader(terminated(), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    columns: list[str] | None = None
    empty, start = True, first_number
    try:
        for cells in reader:
            where, start = f"{name}:{start}", first_number + lines_read
            if columns is None:
                columns = _checked_header(cells, where)
            elif cells and any(cells) and not _is_header(cells, columns):
                empty = False
                yield where, _row(columns, cells, where, delimiter)
    except csv.Error as error:
        raise DataError(
            f"bad quoting: {error}",
            where=f"{name}:{start}",
            allowed='a cell with a quote, a newline or the delimiter in quotes, and "" for a quote inside it',
            hint="save it from a spreadsheet or with pandas' to_csv, or write JSON lines",
        ) from error
    if empty:
        raise DataError(
            f"found {len(columns or ())} {_called(delimiter)}-separated columns and no row below them",
            where=f"{name}:{first_number}",
            allowed="a header and at least one row",
        )


def _is_header(cells: list[str], columns: list[str]) -> bool:
    return len(cells) == len(columns) > 1 and _names(cells) == columns


def _names(cells: list[str]) -> list[str]:
    return [cell.strip().lstrip("\ufeff") for cell in cells]


def _checked_header(cells: list[str], where: str) -> list[str]:
    columns = _names(cells)
    named = [column for column in columns if column]
    if twice := next((column for column in named if named.count(column) > 1), None):
        raise DataError(f"column {twice!r} appears twice in the header", where=where, allowed="each name once")
    return columns


def _row(columns: list[str], cells: list[str], where: str, delimiter: str) -> Any:
    if len(cells) != len(columns):
        hint = f"put a text with a {_called(delimiter)} or a newline in quotes"
        return DataError(
            f"found {len(cells)} cell{'s' * (len(cells) != 1)}",
            where=where,
            allowed=f"{len(columns)}, as in the header: {', '.join(columns)}",
            hint=hint,
        )
    row: dict[str, Any] = {}
    for position, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        if column:
            try:
                row[column] = _cell(column, cell) if cell else None
            except ValueError as error:
                return DataError(
                    f"column {column!r} holds a list that can't be read: {error}",
                    where=where,
                    allowed="a list as JSON",
                    hint="write JSON lines instead: to_json(PATH, orient='records', lines=True)",
                )
        elif cell and position:  # pandas' index is the first column, without a name
            return DataError(
                f"column {position + 1} has no name in the header",
                where=where,
                allowed="a name for each column that holds text",
            )
    return row


def _cell(column: str, cell: str) -> Any:
    """The cell's text, or the list or number that it holds.

    Raises:
        ValueError: it begins like a list of messages or tools, and is none.
    """
    if column in _NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell  # the reader says what is wrong with it
    if column in _LISTS and cell.lstrip()[:1] == "[":
        try:
            return decode(cell)
        except (ValueError, RecursionError):
            pass  # a text, or a list as Python prints it
    if cell[0] not in "[{ " or not (
        _LIST_OF_TURNS.match(cell) or (column in _STRUCTURED and cell.lstrip()[:1] in ("[", "{"))
    ):
        return cell
    try:
        return decode(cell)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        try:
            return ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            if re.search(r"\}\s*\n\s*\{", cell):
                raise ValueError("it is printed by NumPy, without commas") from error
            raise ValueError(f"neither JSON ({error}) nor as Python prints it") from error


def _called(delimiter: str) -> str:
    return {"\t": "tab", ",": "comma", ";": "semicolon"}.get(delimiter, repr(delimiter))


def _taskmaster_rows(numbered: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[str, Any]]:
    """Rows of the three-column TSV of the Taskmaster ticketing splits; values may be quoted as in CSV."""
    for number, line in numbered:
        where = f"{name}:{number}"
        columns = line.rstrip("\r").split("\t")
        if columns == [""]:
            continue
        if len(columns) != 3:
            what = f"found {len(columns)} tab-separated columns"
            yield where, DataError(what, where=where, allowed="source, target, dialog id")
            continue
        unquoted = [
            part[1:-1].replace('""', '"') if len(part) > 1 and part[0] == part[-1] == '"' else part for part in columns
        ]
        yield where, dict(zip(("source", "target", "dialog_id"), unquoted, strict=True))
