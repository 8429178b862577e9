"""What ends a command and is no `PerlhfError`: what the system refused, full memory, mistakes of perlhf's own."""

import contextlib
import os
import re
import sys
import tempfile
import traceback

from perlhf import __version__
from perlhf.errors import StorageError

SOFTWARE = 70
"""Exit code of a mistake of perlhf's own, as in sysexits.h."""
_FULL = ("out of memory", "not enough memory", "can't allocate memory", "Storage size calculation overflowed")
"""What torch says, of a GPU and of a CPU."""
_SECRET = re.compile("key|token|secret|passw|credential", re.IGNORECASE)
_ADDRESS = re.compile(r"(\w+://)[^\s\"'/]*@|([?&#])[^\s\"']+")
"""In an address, what may be a password or a key."""


def open_streams() -> None:
    """Opens what was closed of 0, 1 and 2: else the next file has that number, and messages would go into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def discard_output() -> None:
    """Has nothing more written to standard output, so that the interpreter doesn't fail on it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def said_of(error: Exception, command: str) -> tuple[str, int]:
    """What happened, in one sentence, and the exit code; a traceback goes into a file that the sentence names.

    Args:
        command: what was run, without its options.
    """
    said = str(error)
    if memory_is_full(error):
        whose = "the GPU's memory" if "CUDA" in said else "memory"
        hint = "lower tokens_per_microbatch, or jobs of a comparison; --dry-run estimates what a run needs"
        first = said.split(". ")[0].splitlines()[0] if said else "no room for more"
        return f"{whose} is full: {first}\n  try: {hint}", StorageError.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return _refused(error)
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
        hint = "run it with PYTHONUTF8=1, or under a locale of UTF-8"
        return f"no file can be called {error.object!r} here: names are {error.encoding}\n  try: {hint}", 2
    return f"a mistake of perlhf's own, {type(error).__name__}: {_told(said)}\n  {_kept(error, command)}", SOFTWARE


def memory_is_full(error: BaseException) -> bool:
    """Whether that is what an error says: Python's own, or torch's RuntimeError of a CPU or a GPU."""
    said = str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in said for word in _FULL))


def _refused(error: OSError) -> tuple[str, int]:
    """The system said no, mostly to a file."""
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    if isinstance(error.filename, str | bytes):
        hint = "check the path and its permissions"
        return f"{os.fsdecode(error.filename)}: can't be used: {reason}\n  try: {hint}", StorageError.exit_code
    discard_output()
    hint = "see where the command's output goes, and whether a disk is full"
    return f"can't read or write: {reason}\n  try: {hint}", StorageError.exit_code


def _told(text: str) -> str:
    """The first line of a message, no longer than a line."""
    line = _without_secrets(text).strip().partition("\n")[0]
    return line if len(line) <= 200 else line[:200] + "…"


def _kept(error: Exception, command: str) -> str:
    """Writes the traceback to a file that only this user can read; says where."""
    lines = traceback.format_exception(error)
    text = f"{command}, perlhf {__version__}, Python {sys.version}\n\n{_without_secrets(''.join(lines))}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="perlhf-error-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as refused:
        return f"the traceback can't be kept: {refused.strerror}"
    return f"the traceback is in {path}; please report it"


def _without_secrets(text: str) -> str:
    """The text without what the environment keeps under a name like a key's, and without what addresses may hold."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "[hidden]")
    return _ADDRESS.sub(lambda found: f"{found[1] or found[2]}[hidden]", text) if "://" in text else text
