"""Files: written complete or not at all (temporary name, fsync, rename), as JSON, and their SHA-256.

A process killed half-way leaves only names that start with `TEMPORARY`; readers ignore them and `remove_leftovers`
deletes them. Whatever the system refuses (disk full, no permission) becomes a `StorageError`, with the old content
still in place.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perlhf.errors import RunError, StorageError

TEMPORARY = ".tmp-"


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an `OSError` raised inside into a `StorageError` that names `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(path, error.errno, error.strerror or str(error)) from error


def storage_error(path: Path, number: int | None, reason: str) -> StorageError:
    """The `StorageError` for a write to `path` that failed with errno `number`."""
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "free some disk space and run the same command again" if full else "check the path and its permissions"
    return StorageError(f"can't write: {reason}", where=str(path), hint=hint)


def write_atomic(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Writes `path` (text as UTF-8, or parts as they come) so that a reader sees the old content or the new, never a
    part.

    Raises:
        StorageError: it can't be written; the old file, if any, is untouched and nothing else is left.
    """
    temporary = _temporary(path)
    parts = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    with storage_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def write_json(path: Path, value: object, indent: int | None = 2) -> None:
    """Writes `value` by `strict_json` and a line break, whole or not at all.

    Raises:
        StorageError: as `write_atomic`.
    """
    write_atomic(path, strict_json(value, indent) + "\n")


def strict_json(value: object, indent: int | None = None) -> str:
    """Strict JSON: a number that isn't finite becomes null, so that browsers can read it too."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run directory.

    Raises:
        RunError: the file is missing, isn't JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, f"a {type(value).__name__} instead of an object")
    return value


def damaged(path: Path, reason: str) -> RunError:
    """The error for a file of a run directory that can't be used as it is."""
    hint = f"restore the file, use another run directory, or delete {path.parent} to start again"
    return RunError(f"missing or damaged: {reason}", where=str(path), hint=hint)


def sha256(*files: Path) -> str:
    """SHA-256 (hexadecimal) over the bytes of the files, one after the other.

    Raises:
        OSError: a file can't be read.
    """
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest()


def sealed(said: dict[str, Any]) -> bytes:
    """JSON of `said` with a last key `seal`, the SHA-256 of all the rest, by which `unsealed` sees every change."""
    seal = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return (json.dumps(said | {"seal": seal}, indent=2) + "\n").encode()


def unsealed(path: Path) -> dict[str, Any]:
    """What `sealed` was given when it made the content of this file.

    Raises:
        ValueError: a byte of the file was changed since, or it never was sealed.
        OSError: it can't be read.
    """
    content = path.read_bytes()
    said = json.loads(content)
    if isinstance(said, dict):
        said.pop("seal", None)
        if content == sealed(said):
            return said
    raise ValueError("it was changed after saving")


@contextmanager
def directory_atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `path` that becomes `path` when the block ends without an exception.

    A directory that is already there is replaced. On an exception the temporary directory is deleted and `path` keeps
    its content.

    Raises:
        StorageError: something can't be written.
    """
    temporary = _temporary(path)
    with storage_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            remove_directory(path)
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _sync(path.parent)


def remove_directory(path: Path) -> None:
    """Deletes a directory if it is there; killed half-way it leaves a temporary name, never a part of `path`."""
    if path.exists():
        doomed = _temporary(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(directory: Path) -> None:
    """Deletes what killed processes left directly inside `directory`; nobody may be writing there."""
    for leftover in directory.glob(f"{TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    """Has the system write a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
