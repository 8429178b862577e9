"""From bytes to text and lines: UTF-8, or UTF-16 and UTF-32 as a byte-order mark (or the zeros of ASCII) says."""

import codecs
import shlex
from collections.abc import Iterable, Iterator
from itertools import pairwise

from perlhf.errors import DataError

LONGEST = 256 << 20
"""Characters of the longest line or JSON value that is held in memory."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UNUSED_IN_CP1252 = frozenset(b"\x81\x8d\x8f\x90\x9d")


def text_blocks(blocks: Iterable[bytes], name: str) -> Iterator[str]:
    """The text of a file, block by block, without its byte-order mark.

    Raises:
        DataError: a byte can't be decoded; the line is given, and what to try.
    """
    decoder, encoding, line, beyond_ascii = None, "utf-8", 1, False
    for block in blocks:
        if decoder is None:
            encoding, mark = _encoding(block)
            decoder, block = codecs.getincrementaldecoder(encoding)(), block[mark:]
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise _undecodable(error, encoding, line, beyond_ascii, name) from error
        line += text.count("\n")
        beyond_ascii = beyond_ascii or not text.isascii()
        yield text
    if decoder is not None:
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _undecodable(error, encoding, line, beyond_ascii, name) from error


def lines(texts: Iterable[str], name: str, first: int = 1) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from `first`, without the newline (a carriage return stays).

    Raises:
        DataError: a line is longer than LONGEST.
    """
    number, begun, length = first, [], 0
    for text in texts:
        parts = text.split("\n")
        if len(parts) > 1:
            parts[0] = "".join([*begun, parts[0]])
            begun, length = [], 0
            last = parts.pop()
            yield from enumerate(parts, number)
            number += len(parts)
        else:
            last = parts[0]
        if last:
            begun.append(last)
            length += len(last)
            check_length(length, f"{name}:{number}")
    if begun:
        yield number, "".join(begun)


def check_length(length: int, where: str) -> None:
    """Raises DataError when a line or value is too long to be held."""
    if length > LONGEST:
        raise DataError(
            f"one line or JSON value is longer than {LONGEST >> 20} Mi characters",
            where=where,
            allowed="records that fit into memory",
            hint="write one record a line",
        )


def _encoding(head: bytes) -> tuple[str, int]:
    """The encoding that the first bytes show, and the length of its mark."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    # Text of ours begins with two ASCII characters, so zeros between them show UTF-16 without a mark (RFC 4627).
    match [byte > 0 for byte in head[:4]]:
        case [True, False, True, False]:
            return "utf-16-le", 0
        case [False, True, False, True]:
            return "utf-16-be", 0
        case _:
            return "utf-8", 0


def _undecodable(error: UnicodeDecodeError, encoding: str, line: int, beyond_ascii: bool, name: str) -> DataError:
    content, start = bytes(error.object), error.start
    before = content[:start].decode(encoding, "ignore")
    where = f"{name}:{line + before.count(chr(10))}"
    if encoding != "utf-8":
        what = f"the bytes from {content[start : start + 4].hex(' ')} are not valid {encoding.upper()}"
        return DataError(what, where=where, hint="the file is cut or damaged; copy it again, or save it as UTF-8")
    what = f"byte 0x{content[start]:02x} is not valid UTF-8"
    if start + 4 > len(content) and error.reason == "unexpected end of data":
        return DataError(f"{what}: the file ends inside a character", where=where, hint="download or copy it again")
    if beyond_ascii or not before.isascii():
        hint = "what comes before it is UTF-8, so mend that line alone: it was damaged, or pasted from another file"
    else:
        guess = _guess(content[start:])
        hint = f"save the file as UTF-8: `iconv -f {guess} -t UTF-8 {shlex.quote(name)} > {_mended(name)}`"
        if guess != "CP1252":
            hint += " (or the encoding that it was saved in, such as CP1251, SHIFT_JIS or EUC-KR)"
    return DataError(what, where=where, hint=hint)


def _guess(content: bytes) -> str:
    """CP1252 (Windows, and Latin-1 within it) where bytes above ASCII stand alone between letters, else GB18030."""
    sample = content[:4096]
    high = [index for index, byte in enumerate(sample) if byte >= 0x80]
    beside = sum(other == one + 1 for one, other in pairwise(high))
    unused = any(sample[index] in _UNUSED_IN_CP1252 for index in high)
    if beside * 2 > len(high):
        return "GB18030"
    return "LATIN1" if unused else "CP1252"


def _mended(name: str) -> str:
    return shlex.quote(f"utf8-{name.rsplit('/', 1)[-1]}")
