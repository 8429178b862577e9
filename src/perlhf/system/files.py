"""Files: written complete or not at all (temporary name, fsync, rename), as JSON, and their SHA-256.

A process killed half-way leaves only names that start with `TEMPORARY`. Readers ignore them, and the next command that
writes there deletes them: whoever writes one holds a lock on it, which the system drops when that process dies, so that
what a living process writes stays. Whatever the system refuses (disk full, no permission) becomes a `StorageError`,
with the old content still in place.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from perlhf.errors import RunError, StorageError

TEMPORARY = ".tmp-"
_OLD = "old-"
"""What begins the rest of such a name where a directory was put out of another's way: killed then, it is put back."""
_OURS = re.compile(rf"{re.escape(TEMPORARY)}({_OLD})?[0-9a-f]{{16}}-")
"""What names of ours begin with; people have files whose names start with `.tmp-`, too."""
_EXCHANGE, _FROM_HERE = 2, -100
"""RENAME_EXCHANGE, which macOS calls RENAME_SWAP, and AT_FDCWD."""
MOST_NESTED = 1000
"""libyaml overflows the stack, which ends the process, where YAML is nested some ten thousand deep."""
_FAST_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast, and not everywhere
_DEEPER = re.compile(r"^[ \t?:-]+", re.MULTILINE)
"""What a line's nesting is at most as deep as, brackets apart."""
_NAME_BYTES = 200
"""Of a name, in the temporary one: a name may have 255 bytes."""


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

    A file that is there keeps its permissions, a link stays and its target is written; a pipe or a device such as
    `/dev/null` is written to. Half a surrogate pair, which UTF-8 can't hold, becomes JSON's escape for it.

    Raises:
        StorageError: it can't be written; the old file, if any, is untouched and nothing else is left.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    parts = [content] if isinstance(content, bytes) else content
    with storage_errors(path):
        before = _status(path)
        if before is not None and _is_stream(path, before):
            with open(path, "wb") as stream:
                stream.writelines(parts)
            return
        target = _behind_links(path)
        if before is not None and not stat.S_ISREG(before.st_mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(before.st_mode) else errno.EINVAL, "it is no file")
        with _temporary(target, _new_file) as (temporary, descriptor):
            with open(descriptor, "wb", closefd=False) as file:
                file.writelines(parts)
            if before is not None:
                _keep_owner_and_mode(descriptor, before)
            os.fsync(descriptor)
            os.replace(temporary, target)
        sync(target.parent)


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
        value = from_json(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, f"a {type(value).__name__} instead of an object")
    return value


def from_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it isn't JSON, or is nested so deeply that nobody wrote it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def from_yaml(text: str | bytes) -> Any:
    """What YAML says.

    Raises:
        ValueError: it isn't YAML, holds something else than its tags say (`!!bool maybe`), or is nested too deeply.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        nested = text.count("[") + text.count("{") + max(map(len, _DEEPER.findall(text)), default=0)
        return yaml.load(text, _FAST_YAML if nested < MOST_NESTED else yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:  # of its readers of tags
        raise ValueError(f"not valid YAML: a tag doesn't fit ({error})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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
    said = from_json(content)
    if isinstance(said, dict):
        said.pop("seal", None)
        if content == sealed(said):
            return said
    raise ValueError("it was changed after saving")


@contextmanager
def directory_atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `path` that becomes `path` when the block ends without an exception.

    A directory that is already there is replaced and its permissions are kept; a link stays, and the directory that it
    leads to is replaced. On an exception the temporary directory is deleted and `path` keeps its content. A reader sees
    the old directory or the new one, never a part; where a file system can't exchange two directories there is a moment
    with none, and the old one is put back by the next command that writes there, should the process be killed then.
    Files in it have the permissions of new files: safetensors makes its own for their owner alone.

    Raises:
        StorageError: something can't be written, or there is a file.
    """
    with storage_errors(path):
        target = _behind_links(path if path.name else Path(os.path.abspath(path)))
        if os.path.realpath(target) == os.path.realpath(os.curdir):
            raise OSError(errno.EBUSY, "it is the working directory, which isn't replaced")
        _sweep_once(target.parent, os.getpid())
        before = _status(path)
        if before is not None and not stat.S_ISDIR(before.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "a file is there")
        if _OURS.match(target.name):  # a temporary directory, which isn't there for anybody yet
            yield target
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target, _new_directory) as (temporary, descriptor):
            yield temporary
            allowed = stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o666  # what the umask leaves to a new file
            for file in temporary.rglob("*"):
                _permit(file, allowed)
                sync(file)
            if before is not None:
                _keep_owner_and_mode(descriptor, before)
            os.fsync(descriptor)
            _put_in_place(temporary, target)
        sync(target.parent)


@contextmanager
def working_directory(parent: Path) -> Iterator[Path]:
    """Yields an empty directory inside `parent` for what is needed for a while; it is deleted at the end.

    Raises:
        OSError: it can't be made.
    """
    with _temporary(parent / "work", _new_directory) as (temporary, _):
        yield temporary


def remove_directory(path: Path) -> None:
    """Deletes a directory if it is there; killed half-way it leaves a temporary name, never a part of `path`."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doomed = path.with_name(_temporary_name(path))
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, ours_alone: bool = False) -> None:
    """Deletes what killed processes left directly inside `directory`; what a living process writes there stays, and a
    directory that was out of another's way is put back.

    Args:
        ours_alone: only names as this module makes them, in a directory that may hold files of other programs; else all
            that start with `TEMPORARY`.

    Raises:
        OSError: one can't be deleted.
    """
    for leftover in directory.glob(f"{TEMPORARY}*"):
        if ours_alone and not _OURS.match(leftover.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if leftover.is_symlink():
                leftover.unlink()
                continue
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if leftover.name.startswith(TEMPORARY + _OLD):
                    _put_back(leftover)
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            except BlockingIOError:
                pass
            finally:
                os.close(descriptor)


def sync(path: Path) -> None:
    """Has the system write a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Renames a directory to `target`; what was there is left under the temporary name, or deleted."""
    if not os.path.lexists(target):
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        with _temporary(target, _new_directory, _OLD) as (aside, _):
            old = aside / target.name
            os.rename(target, old)
            try:
                os.rename(temporary, target)
            except OSError:
                os.rename(old, target)
                raise


def _put_back(aside: Path) -> None:
    """What `_put_in_place` had out of the way when its process was killed."""
    for old in aside.iterdir():
        if not os.path.lexists(place := aside.with_name(old.name)):
            os.rename(old, place)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the system gave each of two directories the other's name, at once."""
    libc, names = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(other))
    if hasattr(libc, "renameat2"):  # Linux
        return libc.renameat2(_FROM_HERE, names[0], _FROM_HERE, names[1], _EXCHANGE) == 0
    return hasattr(libc, "renamex_np") and libc.renamex_np(*names, _EXCHANGE) == 0  # macOS


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


def _status(path: Path) -> os.stat_result | None:
    """Of what the path leads to; None where nothing is there."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_stream(path: Path, status: os.stat_result) -> bool:
    """Whether it is written to as it is: a pipe, a device without blocks, or a name of the system's own for one."""
    kind = status.st_mode
    named = str(path).startswith(("/dev/std", "/dev/fd/"))  # of a stream that is redirected to a file
    return stat.S_ISFIFO(kind) or stat.S_ISCHR(kind) or (stat.S_ISREG(kind) and named)


def _behind_links(path: Path) -> Path:
    """Where the path leads, which need not be there; itself, unless it is a link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _permit(file: Path, allowed: int) -> None:
    mode = file.lstat().st_mode
    if stat.S_ISREG(mode) and mode & allowed != allowed:
        file.chmod(stat.S_IMODE(mode) | allowed)


def _keep_owner_and_mode(descriptor: int, before: os.stat_result) -> None:
    with contextlib.suppress(PermissionError):  # only root gives files away
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


@contextmanager
def _temporary(path: Path, new: Callable[[Path], int], kind: str = "") -> Iterator[tuple[Path, int]]:
    """A new file or directory beside `path`, locked, with its descriptor; what is left of it at the end is deleted."""
    _sweep_once(path.parent, os.getpid())
    while True:
        temporary = path.with_name(_temporary_name(path, kind))
        descriptor = new(temporary)
        _lock(descriptor)
        # Between the two lines above another process may have taken it for a leftover.
        if os.path.lexists(temporary):
            break
        os.close(descriptor)
    try:
        yield temporary, descriptor
    finally:
        if os.path.lexists(temporary):
            shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _new_directory(path: Path) -> int:
    while True:
        path.mkdir()
        with contextlib.suppress(FileNotFoundError):  # taken for a leftover
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _lock(descriptor: int) -> None:
    """Marks a temporary name as that of a living process; where a file system has no locks, nothing is swept either.

    Only `remove_leftovers` can have the lock of a new name already, and gives it back at once.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@functools.lru_cache(maxsize=256)
def _sweep_once(directory: Path, process: int) -> None:
    """Deletes what killed processes left beside a file that is about to be written; once for each process."""
    with contextlib.suppress(OSError):  # it may be somebody else's
        remove_leftovers(directory, ours_alone=True)


def _temporary_name(path: Path, kind: str = "") -> str:
    shortened = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])
    return f"{TEMPORARY}{kind}{secrets.token_hex(8)}-{shortened}"
