"""Standard output and error on any terminal, pipe or file: what they can't show is replaced, and ends nothing; what a
terminal would obey is never sent.
"""

import codecs
import io
import json
import os
import sys
import unicodedata
from collections.abc import MutableMapping, Sequence
from typing import TextIO

from perlhf.errors import visible
from perlhf.system.files import strict_json

OUTPUT = "PERLHF_OUTPUT_ENCODING"
"""Environment variable with the encoding of the output; set for the process that `restart_in_utf8` starts alone."""
_NEAR = {"·": "-", "•": "*", "–": "-", "—": "-", "−": "-", "×": "x", "…": "...", "→": "->", "⏎": "\\n", "⇥": "\\t"}
"""Signs that we print ourselves, as ASCII."""


def show_anything() -> None:
    """Makes standard output and error take every text, whatever their encoding is; a closed one swallows it.

    rich, `print` and progress bars all write to these two. A letter that the encoding lacks becomes one that looks
    like it (`é` becomes `e`), else `?`; so does half a character that came from a path or a file (a lone surrogate).
    """
    codecs.register_error("perlhf", _replaced)
    sys.stdout, sys.stderr = _open(sys.stdout), _open(sys.stderr)
    encoding = os.environ.pop(OUTPUT, None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's stand-in is none
            stream.reconfigure(encoding=encoding, errors="perlhf")


def restart_in_utf8(arguments: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Starts the interpreter anew with `arguments` in UTF-8 mode where names of files are ASCII to it; else returns.

    They are under the locale C with PYTHONUTF8=0: a name such as `größe`, whether typed or read in a recipe, would open
    no file. What is printed stays ASCII.
    """
    if sys.getfilesystemencoding() == "ascii" and sys.executable:
        environment[OUTPUT] = sys.stdout.encoding
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *arguments], environment)


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
