"""From a file to its bytes, block by block: gzip, zstd, bzip2, xz and zip are unpacked on the way.

What is neither text nor one of our containers is refused by its name, so that nobody reads "bad JSON" of a PDF.
"""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from perlhf.errors import DataError

BLOCK = 1 << 20
MOST_UNPACKED, MOST_RATIO = 512 << 20, 200
"""A packed file that grows beyond so many bytes, and beyond so many times its own size, is refused."""
PACKED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".zip")
_GZIP, _ZSTD, _BZIP2, _XZ, _ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00", b"PK\x03\x04"
_KINDS = {_GZIP: "gzip", _ZSTD: "zstd", _BZIP2: "bzip2", _XZ: "xz", _ZIP: "zip"}
_HEAD = 512
_FOREIGN = (
    (0, b"%PDF", "a PDF"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office document"),
    (0, b"SQLite format 3", "an SQLite database"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"\x04\x22\x4d\x18", "packed by lz4"),
    (0, b"\x80\x02", "a pickle"),
    (0, b"\x80\x04\x95", "a pickle"),
    (0, b"\x80\x05\x95", "a pickle"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"ORC", "an ORC file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x89PNG", "a picture"),
    (0, b"\xff\xd8\xff", "a picture"),
    (257, b"ustar", "a tar archive"),
)
_SPREADSHEET = "[Content_Types].xml"


def blocks(path: Path, name: str) -> Iterator[bytes]:
    """The bytes of a file, unpacked when it begins like a packed one.

    Raises:
        DataError: the file can't be read, its packing is truncated, damaged or suspicious, or it is no data file.
    """
    kind = "packed"
    try:
        with path.open("rb") as raw:
            kind, stream = _unpacked(raw, name)
            size = 0 if kind == "plain" else path.stat().st_size
            yield from _limited(stream, size, name)
    except DataError:
        raise
    except EOFError as error:
        raise DataError(f"the {kind} file is truncated", where=name, hint="download or copy it again") from error
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, NotImplementedError) as error:
        raise _damaged(kind, name, error) from error
    except (OSError, ValueError) as error:
        if kind in ("plain", "packed") or getattr(error, "errno", None):
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"the file can't be read: {reason}", where=name) from error
        raise _damaged(kind, name, error) from error


def member_name(path: Path, name: str) -> str:
    """The name whose suffix tells what is inside: that of a zip archive's only file, else the file's own."""
    if not path.is_file():
        return name  # a pipe can be opened once
    try:
        with path.open("rb") as raw:
            if raw.read(4) == _ZIP:
                return _only_member(zipfile.ZipFile(raw), name).filename
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        pass  # told when the file is read
    return name


def refuse_foreign(head: bytes, name: str) -> None:
    """Raises DataError when the first bytes are those of a well-known kind of file that holds no rows for us."""
    for position, magic, what in _FOREIGN:
        if head.startswith(magic, position):
            raise DataError(
                f"this is {what}, which can't be read",
                where=name,
                allowed="JSON, JSON lines, CSV, TSV, Parquet, Arrow, TFRecord, packed by gzip, zstd, bzip2 or xz",
                hint="unpack it, or write its rows as JSON lines",
            )


def _unpacked(raw: IO[bytes], name: str) -> tuple[str, Any]:
    assert isinstance(raw, io.BufferedReader)
    head = raw.peek(_HEAD)[:_HEAD]
    kind = next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), "plain")
    match kind:
        case "gzip":
            return kind, gzip.GzipFile(fileobj=raw)
        case "zstd":
            import pyarrow

            return kind, pyarrow.CompressedInputStream(raw, "zstd")
        case "bzip2":
            return kind, bz2.BZ2File(raw)
        case "xz":
            return kind, lzma.LZMAFile(raw)
        case "zip":
            return kind, _opened_member(zipfile.ZipFile(raw), name)
        case _:
            return kind, raw


def _limited(stream: Any, packed_size: int, name: str) -> Iterator[bytes]:
    """Blocks of the stream; an unpacked one (`packed_size` 0) may be of any length."""
    total = 0
    while block := stream.read(BLOCK):
        if not total:
            refuse_foreign(block[:_HEAD], name)
        total += len(block)
        if packed_size and total > MOST_UNPACKED and total > MOST_RATIO * packed_size:
            raise DataError(
                f"the file of {packed_size:,} bytes unpacks to more than {total - len(block):,}, "
                f"over {MOST_RATIO} times its size",
                where=name,
                allowed=f"packed files that grow to {MOST_UNPACKED >> 20} MiB, or to {MOST_RATIO} times their size",
                hint="if you trust it, unpack it yourself and name the unpacked file",
            )
        yield block


def _only_member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and not member.filename.startswith("__MACOSX/") and ".DS_Store" not in member.filename
    ]
    names = [member.filename for member in members]
    if _SPREADSHEET in names:
        raise DataError(
            "this is an Excel workbook or another Office document", where=name, hint="save the sheet as CSV (UTF-8)"
        )
    if len(members) != 1:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"the zip archive holds {len(members)} files: {shown or 'none'}",
            where=name,
            allowed="an archive with one data file",
            hint=f"unpack it (`python -m zipfile -e {Path(name).name} DIRECTORY`) and name the directory",
        )
    return members[0]


def _opened_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    member = _only_member(archive, name)
    if member.flag_bits & 1:
        raise DataError("the zip archive is encrypted", where=name, hint="unpack it and name the unpacked file")
    return archive.open(member)


def _damaged(kind: str, name: str, error: Exception) -> DataError:
    return DataError(f"the {kind} file is damaged: {error}", where=name, hint="download or copy it again")
