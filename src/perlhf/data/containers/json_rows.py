"""Rows of JSON text: one object a line, one array, objects printed over several lines, or one object that wraps them.

Rule: NaN is read as null, as a spreadsheet's or pandas' empty cell is; Infinity and a key that occurs twice in one
object are errors. A text that holds an object as JSON is read as that object.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from perlhf.data.containers import authors, shapes
from perlhf.data.containers.decoded import check_length, lines
from perlhf.errors import DataError

_ALLOWED = "a JSON array, or one JSON object per line"
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_LINE_SPACE = " \t\r\ufeff"
_LONGEST_REPR = 1 << 20
"""Characters of a line that is still tried as Python."""
_NEAR_END = 16
"""An error so near the end of what was read may be a literal that goes on in the next block."""
_NOT_JSON = (
    ("<", "a web page or XML", "download the file itself, not the page that shows it"),
    ("version https://git-lfs", "a pointer of Git LFS", "`git lfs pull` fetches the file"),
    ("---", "YAML", "write its rows as JSON lines"),
    ("- ", "YAML", "write its rows as JSON lines"),
)


def rows(texts: Iterable[str], name: str, split: str | None = None) -> Iterator[tuple[str, Any]]:
    """Rows with `file:line` (`file[index]` in arrays and tables); a line or element that is no row comes as an error.

    Args:
        split: which of the authors' splits of a wrapped file is read (authors.choose).

    Raises:
        DataError: bad JSON where nothing can be read after it, or a shape that holds no rows.
    """
    document = _Document(texts, name)
    document.skip_space()
    match document.peek():
        case "":
            return iter(())
        case "{" if document.is_one_object() or document.first_value_goes_on():
            return _object_rows(document, split)
        case '"' if (text := document.whole_text()) is not None:
            return rows([text], name, split)
        case _ if split not in (None, "all"):
            raise authors.no_splits(name, split)
        case "[":
            _refuse_lists_by_line(document)
            return _array_rows(document)
        case _:
            return _line_rows(document)


class _Document:
    """Text that is read as it is needed: `at` is the place in `text`."""

    def __init__(self, texts: Iterable[str], name: str):
        self.name, self.text, self.at = name, "", 0
        self._line, self._counted = 1, 0
        self._texts = iter(texts)

    def more(self) -> bool:
        """Reads on, at least as much again as there is; what was used up is forgotten. False at the end."""
        here = self.line()
        self.text, self.at, self._counted = self.text[self.at :], 0, 0
        parts, length, wanted = [self.text], 0, len(self.text)
        check_length(wanted, f"{self.name}:{here}")
        for text in self._texts:
            parts.append(text)
            length += len(text)
            if length >= wanted and length:
                break
        self.text = "".join(parts)
        return length > 0

    def skip_space(self) -> None:
        while True:
            space = _SPACE.match(self.text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.text) or not self.more():
                return

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def line(self) -> int:
        """The number of the line that `at` is on."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def place(self) -> str:
        return f"{self.name}:{self.line()}"

    def rest(self) -> Iterator[tuple[int, str]]:
        """The lines from here on."""
        return lines(chain([self.text[self.at :]], self._texts), self.name, self.line())

    def first_lines(self, count: int) -> list[str]:
        """At most `count` next lines that aren't blank, without using them up."""
        while True:
            begun = self.text[self.at :].split("\n", 4 * count)
            whole = [line for line in begun[:-1] if line.strip(_LINE_SPACE)][:count]
            if len(whole) == count or len(begun) > 4 * count:
                return whole
            if not self.more():
                return [line for line in begun if line.strip(_LINE_SPACE)][:count]

    def is_one_object(self) -> bool:
        """True when there is one line, and it is an object."""
        found = self.first_lines(2)
        return len(found) == 1 and isinstance(_complete(found[0]), dict)

    def whole_text(self) -> str | None:
        """The text of the one line that there is, where it holds an array or object as JSON."""
        found = self.first_lines(2)
        text = _complete(found[0]) if len(found) == 1 else None
        return text if isinstance(text, str) and text.lstrip()[:1] in ("[", "{") else None

    def first_value_goes_on(self) -> bool:
        """True when an object is printed over several lines, and the next line isn't a record by itself."""
        first, *second = self.first_lines(2)
        return bool(second) and _unfinished(first) and not isinstance(_complete(second[0]), dict)

    def value(self, where: str) -> Any:
        """The next JSON value; one that breaks a rule of ours comes as an error, and reading can go on after it.

        Raises:
            DataError: bad JSON, at its line.
        """
        decoder, problem = _STRICT, None
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end == len(self.text) and self.more():
                    continue  # a number may go on
                self.at = end
                return problem or value
            except RecursionError as error:
                raise DataError("JSON is nested too deeply", where=where) from error
            except json.JSONDecodeError as error:
                if _at_end(error, len(self.text)) and self.more():
                    continue
                self.at = min(error.pos, len(self.text))
                raise _bad_json(error, self.text, self.place()) from error
            except ValueError as error:
                if decoder is _LENIENT:  # a number of thousands of digits: nothing says where it ends
                    raise DataError(str(error), where=where) from error
                what = _with_key(str(error), self.text[self.at :])
                problem, decoder = DataError(what, where=where), _LENIENT


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} appears twice in one object")
    return members


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not valid JSON: a number must be finite")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_constant)
_LENIENT = json.JSONDecoder()


def decode(text: str) -> Any:
    """The JSON value that a cell holds as text, by the rules above (ValueError, RecursionError: none)."""
    return _STRICT.decode(text)


def _at_end(error: json.JSONDecodeError, length: int) -> bool:
    return error.pos >= length - _NEAR_END or error.msg.startswith("Unterminated string")


def _complete(line: str) -> Any:
    try:
        return _LENIENT.decode(line.strip(_LINE_SPACE))
    except (ValueError, RecursionError):
        return None


def _unfinished(line: str) -> bool:
    """True when the line is the beginning of a longer JSON value."""
    line = line.rstrip(_LINE_SPACE)
    try:
        _LENIENT.decode(line.lstrip(_LINE_SPACE))
    except json.JSONDecodeError as error:
        # Inside a string a newline would be written \n, so an open string doesn't go on in the next line.
        return error.pos >= len(line.lstrip(_LINE_SPACE)) - 1 and not error.msg.startswith(("Unterminated", "Extra"))
    except (ValueError, RecursionError):
        return False
    return False


def _bad_json(error: json.JSONDecodeError, text: str, where: str, column: bool = False) -> DataError:
    what, hint = f"bad JSON: {error.msg.removesuffix(' at')}" + (f" at column {error.colno}" if column else ""), None
    before, after = text[max(0, error.pos - 200) : error.pos + 1], text[error.pos : error.pos + 200].lstrip()
    # Python 3.13 is at the comma, earlier versions are at the bracket.
    trailing, bracket = re.search(r",\s*([\]}]?)$", before), after.removeprefix(",").lstrip()
    if trailing and (trailing.group(1) or bracket[:1] in ("]", "}")):
        what = f"{what}: there is a comma before the closing bracket"
        hint = "delete that comma"
    elif after.startswith("'"):
        what, hint = f"{what}: the text is in single quotes, as Python writes it", "write it with json.dumps"
    elif error.msg.startswith("Invalid control character"):
        hint = "write a newline inside a text as \\n, a tab as \\t"
    elif re.match(r"(True|False|None)\b", after):
        what, hint = f"{what}: {after.split()[0].rstrip(',}]')} is Python's word", "write true, false or null"
    elif after.startswith(("//", "/*", "#")):
        what, hint = f"{what}: JSON has no comments", "delete the comment"
    return DataError(what, where=where, allowed=_ALLOWED, hint=hint)


def _row(value: Any) -> Any:
    """A text that holds an object as JSON is that object."""
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        try:
            return _STRICT.decode(value)
        except (ValueError, RecursionError):
            return value
    return value


def _line_rows(document: _Document) -> Iterator[tuple[str, Any]]:
    name, decode_at, first = document.name, _STRICT.raw_decode, True
    for number, line in document.rest():
        line = line.strip(_LINE_SPACE)
        if not line:
            continue
        try:
            row, end = decode_at(line, 0)
            if end < len(line):
                row = _extra_text(line, end, f"{name}:{number}")
        except (ValueError, RecursionError) as error:
            row = _line_error(error, line, f"{name}:{number}")
        if first and isinstance(row, DataError):
            _refuse_shape(line, row, name)
        first = False
        yield f"{name}:{number}", _row(row) if isinstance(row, str) else row


def _extra_text(line: str, end: int, where: str) -> DataError:
    comma = line[end:].strip() == ","
    return DataError(
        f"bad JSON: extra text after column {end}",
        where=where,
        allowed="one JSON object per line",
        hint="delete the comma at the end of each line" if comma else None,
    )


def _line_error(error: Exception, line: str, where: str) -> DataError:
    if isinstance(error, RecursionError):
        problem = DataError("JSON is nested too deeply", where=where)
    elif isinstance(error, json.JSONDecodeError):
        problem = _bad_json(error, line, where, column=True)
    else:
        problem = DataError(_with_key(str(error), line), where=where)
    problem.__cause__ = error
    return problem


def _with_key(what: str, line: str) -> str:
    """The message about a constant, with the key that has it."""
    constant = what.split(" ")[0]
    key = re.search(rf'"((?:[^"\\]|\\.)*)"\s*:\s*{re.escape(constant)}', line) if "Infinity" in constant else None
    return f"key {key.group(1)!r}: {what}" if key else what


def _refuse_shape(line: str, problem: DataError, name: str) -> None:
    """Raises one error for a file whose first line shows that no line will be JSON; otherwise nothing."""
    if line[:1] == "{" and "control character" not in problem.what and isinstance(_python_value(line), dict):
        raise DataError(
            "each line is an object as Python prints it (repr), not JSON",
            where=problem.where,
            allowed=_ALLOWED,
            hint=f"`python -c 'import ast, json, sys; [print(json.dumps(ast.literal_eval(l))) for l in sys.stdin "
            f"if l.strip()]' < {shlex.quote(name)} > {_mended(name)}`",
        )
    if line.startswith("{'"):
        raise DataError(
            "the text is in single quotes, as Python prints objects (repr), which is not JSON",
            where=problem.where,
            allowed=_ALLOWED,
            hint="write each record with json.dumps, or a data frame with to_json(orient='records', lines=True)",
        )
    if problem.hint and "comma at the end" in problem.hint:
        raise DataError(
            "each line ends in a comma",
            where=problem.where,
            allowed=_ALLOWED,
            hint=f"`sed 's/,[[:space:]]*$//' {shlex.quote(name)} > {_mended(name)}` deletes them",
        )
    if line[:1] in ("{", "[", '"'):
        return
    for start, what, hint in _NOT_JSON:
        if line.startswith(start):
            raise DataError(f"bad JSON: this looks like {what}", where=problem.where, allowed=_ALLOWED, hint=hint)
    delimiter = next((mark for mark in ("\t", ",", ";") if _header_like(line, mark)), None)
    suffix = ".tsv" if delimiter == "\t" else ".csv"
    raise DataError(
        f"{problem.what}; the file begins with {line[:40]!r}",
        where=problem.where,
        allowed=_ALLOWED,
        hint=f"a table with a header is read when its name ends in {suffix}" if delimiter else None,
    )


def _mended(name: str) -> str:
    return shlex.quote(f"json-{name.rsplit('/', 1)[-1]}")


def _header_like(line: str, delimiter: str) -> bool:
    return delimiter in line and all(re.fullmatch(r'"?[\w .-]{1,40}"?', cell) for cell in line.split(delimiter))


def _python_value(line: str) -> Any:
    try:
        return ast.literal_eval(line) if len(line) < _LONGEST_REPR else None
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _object_rows(document: _Document, split: str | None) -> Iterator[tuple[str, Any]]:
    """Objects that follow one another, each over any number of lines, or the one object that the file is."""
    place = document.place()
    first = document.value(place)
    document.skip_space()
    if not document.peek():
        yield from shapes.rows(first, place, document.name, split)
        return
    if split not in (None, "all"):
        raise authors.no_splits(document.name, split)
    yield place, _row(first)
    while mark := document.peek():
        place = document.place()
        if mark == ",":
            raise DataError(
                "bad JSON: a comma between objects", where=place, allowed=_ALLOWED, hint="put [ and ] around them all"
            )
        yield place, _row(document.value(place))
        document.skip_space()


def _array_rows(document: _Document) -> Iterator[tuple[str, Any]]:
    name, index = document.name, 0
    document.at += 1
    document.skip_space()
    closed = document.peek() == "]"
    while not closed:
        place = f"{name}[{index}]"
        yield place, _row(document.value(place))
        index += 1
        document.skip_space()
        mark = document.peek()
        if mark not in (",", "]") or not mark:
            raise DataError("bad JSON: ',' or ']' is expected", where=document.place(), allowed=_ALLOWED)
        closed = mark == "]"
        if not closed:
            document.at += 1
            document.skip_space()
            if document.peek() == "]":
                raise DataError(
                    "bad JSON: there is a comma before the closing bracket",
                    where=document.place(),
                    allowed=_ALLOWED,
                    hint="delete that comma",
                )
    document.at += 1
    document.skip_space()
    if document.peek():
        raise DataError("bad JSON: extra text after the array", where=document.place(), allowed=_ALLOWED)


def _refuse_lists_by_line(document: _Document) -> None:
    """A list on each line is no array of records, though the first line looks like one."""
    first, *later = document.text[document.at :].split("\n", 2)  # an array on one line is not read on for this
    if later and later[0].lstrip(_LINE_SPACE)[:1] == "[" and isinstance(_complete(first), list):
        raise DataError(
            "each line is a list",
            where=document.place(),
            allowed=_ALLOWED,
            hint='write each as an object, for example {"messages": [...]}',
        )
