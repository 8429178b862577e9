"""Standard output and error on any terminal, pipe or file: what they can't show is replaced, and ends nothing; what a
terminal would obey is never sent.
"""

import codecs
import io
import json
import os
import sys
import unicodedata
from typing import TextIO

from perlhf.errors import visible
from perlhf.system.files import strict_json

_NEAR = {"·": "-", "•": "*", "–": "-", "—": "-", "−": "-", "×": "x", "…": "...", "→": "->", "⏎": "\\n", "⇥": "\\t"}
"""Signs that we print ourselves, as ASCII."""


def show_anything() -> None:
    """Makes standard output and error take every text, whatever their encoding is; a closed one swallows it.

    rich, `print` and progress bars all write to these two. A letter that the encoding lacks becomes one that looks
    like it (`é` becomes `e`), else `?`; so does half a character that came from a path or a file (a lone surrogate).
    """
    codecs.register_error("perlhf", _replaced)
    sys.stdout, sys.stderr = _open(sys.stdout), _open(sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's stand-in is none
            stream.reconfigure(errors="perlhf")


def note(sentence: str) -> None:
    """Something worth knowing, on standard error; it may hold text of files, such as names and records."""
    _say(f"note: {sentence}")


def warn(sentence: str) -> None:
    """Something that is likely to be wrong, on standard error; as `note`."""
    _say(f"warning: {sentence}")


def json_line(value: object) -> str:
    """Strict JSON for standard output: with escapes for all but ASCII where that isn't UTF-8, so that no letter is
    lost, and where there is something that a terminal would obey.
    """
    line = strict_json(value)
    plain = (sys.stdout.encoding or "utf-8").lower() in ("utf-8", "utf8") and visible(line) == line
    return line if plain else json.dumps(json.loads(line))


def _say(line: str) -> None:
    print(visible(line, lines=True), file=sys.stderr, flush=True)


def _open(stream: TextIO | None) -> TextIO:
    return open(os.devnull, "w", encoding="utf-8") if stream is None else stream


def _replaced(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_shown, error.object[error.start : error.end])), error.end


def _shown(letter: str) -> str:
    near = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode("ascii")
    return _NEAR.get(letter) or near or "?"
