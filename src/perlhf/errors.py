"""Error model: a user mistake raises a `PerlhfError`, a broken internal invariant is an `assert`.

A `PerlhfError` says what failed, where (file:line or key), what is allowed and what to try. The command line prints it
without a traceback and exits with its `exit_code` (2 for bad input); anything else that reaches it is a mistake of
perlhf's own, with exit code 70 and the traceback in a file. Each class also inherits the matching built-in, so
that library users can catch `ValueError` or `OSError` as usual.
"""

import difflib
import re
from collections.abc import Iterable

_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys or can't show: control characters, marks that turn text's direction, half surrogate pairs."""


class PerlhfError(Exception):
    """A mistake that the user can mend.

    Args:
        what: what failed, with the value found.
        where: `file:line` or the configuration key.
        allowed: what would have been accepted.
        hint: what to try.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        allowed: str | None = None,
        hint: str | None = None,
    ):
        self.what, self.where, self.allowed, self.hint = what, where, allowed, hint
        lines = [f"{visible(where)}: {visible(what, lines=True)}" if where else visible(what, lines=True)]
        if allowed:
            lines.append(f"  allowed: {visible(allowed, lines=True)}")
        if hint:
            lines.append(f"  try: {visible(hint, lines=True)}")
        super().__init__("\n".join(lines))


class ConfigError(PerlhfError, ValueError):
    """A recipe or an option has a wrong key or value."""


class DataError(PerlhfError, ValueError):
    """A data file, record or split can't be used."""


class ModelError(PerlhfError, ValueError):
    """A base can't be found, loaded or trained here."""


class AdapterError(PerlhfError, ValueError):
    """An adapter doesn't fit: wrong base, unmatched targets, missing files."""


class RunError(PerlhfError, RuntimeError):
    """A run directory can't be used: locked, of another config, unfinished."""


class CheckpointError(PerlhfError, ValueError):
    """A checkpoint is damaged or incomplete."""


class StorageError(PerlhfError, OSError):
    """A file couldn't be written (disk full, no permission); nothing half-written is left."""


class ServiceError(PerlhfError, RuntimeError):
    """A service that was asked over HTTP (judge, reward, sampler) doesn't answer, or answers nonsense."""

    status: int | None = None
    """Of the answer that was a refusal."""
    passing = False
    """Whether it may go by: nobody listens there, or who does is overloaded or broken."""


class RewardFunctionError(PerlhfError, RuntimeError):
    """A reward function of the user's failed, or returned what are no scores; it names the lines of their own files."""


class Interrupted(PerlhfError):
    """Ctrl-C or SIGTERM; the same command continues from the last checkpoint."""

    exit_code = 130


class DivergenceError(PerlhfError, ArithmeticError):
    """Training produced a value that is not finite or exploded; the last good checkpoint is kept."""

    exit_code = 3


class WorkerError(PerlhfError, RuntimeError):
    """Another of several workers failed, or was lost; all end with its message and exit code."""

    def __init__(self, what: str, exit_code: int):
        super().__init__(what)
        self.exit_code = exit_code


class StaleSamplerError(PerlhfError, RuntimeError):
    """The sampler did not use the adapter that is being trained: a mistake of perlhf's own."""

    exit_code = 4


def visible(text: str, lines: bool = False) -> str:
    """Text of a file, or a file's name, as it can be printed: what a terminal would obey is shown as an escape.

    Args:
        lines: line breaks and tabs stay.
    """
    return _HIDDEN.sub(lambda found: found[0] if lines and found[0] in "\n\t" else _escape(found[0]), text)


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode() if sign < "\ud800" else f"\\u{ord(sign):04x}"


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that looks most like `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return matches[0] if matches else None
