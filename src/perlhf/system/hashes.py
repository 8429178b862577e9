"""SHA-256 of files, taken once: a large file is hashed again only when the system says that it may have changed.

What the system says is size, both times, inode and device. The time of the inode's last change (ctime) can't be set by
a program, so a file whose old time stamp was put back is seen all the same. A file that changed within the granularity
of a file system's clock before it was hashed could change again without a trace, so its hash isn't kept.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perlhf.system.files import sha256, write_atomic
from perlhf.system.machine import cache_dir

SMALL_BYTES = 1 << 20
"""Below this size hashing takes a millisecond: no more than looking up what was kept."""
PIECE_BYTES = 1 << 22
GRANULARITY_NS = 2 * 10**9
"""The coarsest clock of a file system (FAT's)."""
UNIMPORTANT = ("transformers_version", "_name_or_path")
"""Keys of a model's JSON files that change when they are saved again, and nothing that is computed."""


def hash_of(*files: Path) -> str:
    """SHA-256 (hexadecimal) over the bytes of the files, one after the other, kept in the cache for large ones.

    Raises:
        OSError: a file can't be read.
    """
    before = [_state(file) for file in files]
    if sum(state[1] for state in before) < SMALL_BYTES:
        return sha256(*files)
    kept = cache_dir() / "hashes" / hashlib.sha256(json.dumps(before).encode()).hexdigest()[:32]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if len(known := kept.read_text("ascii")) == 64:
            return known
    digest = sha256(*files)
    _touched_again(files)
    changed = max(time_ns for state in before for time_ns in state[2:4])
    if before == [_state(file) for file in files] and time.time_ns() - changed > GRANULARITY_NS:
        with contextlib.suppress(OSError):  # a cache that can't be written costs time only
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, digest)
    return digest


def hash_of_settings(file: Path, keys: Sequence[str] | None = None) -> str:
    """SHA-256 of what a JSON file says: its formatting and `UNIMPORTANT` keys are left out, or all but `keys`.

    A file that holds no JSON object is hashed by its bytes.

    Raises:
        OSError: the file can't be read.
    """
    content = file.read_bytes()
    with contextlib.suppress(ValueError, RecursionError):
        said: Any = json.loads(content)
        if isinstance(said, dict):
            kept = {key: said[key] for key in said if (key not in UNIMPORTANT if keys is None else key in keys)}
            content = json.dumps(kept, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _touched_again(files: Sequence[Path]) -> None:
    """Tells the system that what it still holds of these files will be read again, from their end to their beginning.

    Files that nearly fill the memory would otherwise be read from the disk twice: whoever reads them once more finds
    their beginning pushed out by their end, and pushes out the next piece by reading it.
    """
    held: int = getattr(os, "RWF_NOWAIT", 0)  # what isn't in memory isn't read
    piece = bytearray(PIECE_BYTES)
    with contextlib.suppress(OSError):
        for file in reversed(files) if held else ():
            with file.open("rb", buffering=0) as opened:
                for start in range((file.stat().st_size - 1) // PIECE_BYTES * PIECE_BYTES, -1, -PIECE_BYTES):
                    os.preadv(opened.fileno(), [piece], start, held)


def _state(file: Path) -> tuple[str, int, int, int, int, int]:
    """What the system says of a file; its content is the same while this is."""
    status = file.stat()
    where = str(file.resolve())
    return where, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev
