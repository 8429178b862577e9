"""What docs/results holds: comparisons, the commands that make each result, and one archive of what single runs left.

The archive is read unpacked below build/, which git ignores, and only if it is the one whose SHA-256 commands.yaml
names. The same files give the same archive, with the same zlib.
"""

import gzip
import hashlib
import io
import itertools
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perlhf.errors import DataError
from perlhf.system.files import directory_atomic, read_json, write_atomic

ARCHIVE = "cells.tar.gz"
SHA256 = re.compile(rf"^{re.escape(ARCHIVE)}: sha256:(\w+)\n", re.MULTILINE)
"""The archive's line in commands.yaml."""
MARKER = ".sha256"
"""The file beside unpacked cells that names the archive they are from."""


@dataclass(frozen=True)
class Kept:
    """Where kept numbers are."""

    results: Path
    """The page, comparisons, plots, commands.yaml and the archive."""
    cells: Path
    """What the archive holds, unpacked: RESULT/RUN/FILE."""


def unpack(kept: Kept) -> None:
    """Brings `kept.cells` to what the archive holds, unless it is there already.

    Raises:
        DataError: the archive isn't the one that commands.yaml names.
    """
    archive, marker = kept.results / ARCHIVE, kept.cells / MARKER
    packed = archive.read_bytes() if archive.is_file() else None
    found = "no such file" if packed is None else hashlib.sha256(packed).hexdigest()
    names = kept.results / "commands.yaml"
    named = SHA256.search(names.read_text(encoding="utf-8"))
    if packed is None or named is None or named[1] != found:
        raise DataError(
            f"not the archive of runs that {names.name} names by its SHA-256: {found}",
            where=str(archive),
            allowed=named[1] if named else f"what {names.name} names in a line `{ARCHIVE}: sha256:...`",
            hint=f"`git checkout HEAD -- {archive} {names}`, then keep again what was not committed",
        )
    if marker.is_file() and marker.read_text(encoding="utf-8") == found:
        return
    with directory_atomic(kept.cells) as made, tarfile.open(fileobj=io.BytesIO(packed)) as opened:
        opened.extractall(made, filter="data")
        write_atomic(made / MARKER, found)


def pack(kept: Kept) -> None:
    """Writes the archive of `kept.cells`, and its SHA-256 into commands.yaml."""
    files = (file for file in kept.cells.glob("*/**/*") if file.is_file())
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as opened:
        # Files of one name lie side by side, which saves a sixth.
        for file in sorted(files, key=lambda file: (file.name, file.as_posix())):
            member = tarfile.TarInfo(file.relative_to(kept.cells).as_posix())  # owner, time and mode are constants
            member.size = file.stat().st_size
            opened.addfile(member, io.BytesIO(file.read_bytes()))
    sha256 = hashlib.sha256(stream.getvalue()).hexdigest()
    names = kept.results / "commands.yaml"
    others = SHA256.sub("", names.read_text(encoding="utf-8"))
    write_atomic(kept.results / ARCHIVE, stream.getvalue())
    write_atomic(names, f"{ARCHIVE}: sha256:{sha256}\n{others}")
    write_atomic(kept.cells / MARKER, sha256)


def commands(results: Path) -> dict[str, list[str]]:
    """What makes each result, without the word `perlhf`; what two results share is done once."""
    written = yaml.safe_load((results / "commands.yaml").read_text(encoding="utf-8"))
    return {name: list(_each(entries)) for name, entries in written.items() if name not in (ARCHIVE, "shared")}


def _each(entry: Any) -> Iterator[str]:
    """The commands of a list of lists, in which {each: {name: values}, run: commands} stands for a grid."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list):
        for one in entry:
            yield from _each(one)
    else:
        for values in itertools.product(*entry["each"].values()):
            named = dict(zip(entry["each"], values, strict=True))
            yield from (command.format(**named) for command in entry["run"])


def finished(runs: Path) -> Iterator[Path]:
    return (path.parent for path in sorted(runs.glob("*/result.json")))


def manifest_of(cell: Path) -> dict[str, Any]:
    return read_json(cell / "manifest.json")


def machine(manifest: Mapping[str, Any]) -> str:
    """What a run was computed on, in words."""
    hardware = manifest["hardware"]
    if hardware.get("gpu") or manifest.get("cuda_peak_memory_bytes"):
        return hardware.get("gpu") or "a GPU"
    return f"{hardware['cpu']} ({manifest['threads']} threads)"
