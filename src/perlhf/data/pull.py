"""Fetching published data sets: from the address that their authors publish, or from a checked local copy.

A set is whole or absent: files gather in a temporary directory that is renamed last. Beside them lies `MANIFEST.json`
with the SHA-256 of each file as it arrived, so that a second pull can tell that everything is there.
"""

import errno
import http.client
import json
import lzma
import os
import shutil
import stat
import struct
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from perlhf.data import files
from perlhf.errors import DataError, nearest
from perlhf.system.console import note
from perlhf.system.files import directory_atomic, sha256

ADDRESS = "https://raw.githubusercontent.com"
"""Files are at ADDRESS/{repository}/{commit}/{path}; $PERLHF_DATA_ADDRESS takes its place when set."""

MANIFEST = "MANIFEST.json"
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
)
_NAMES_REFUSED = (None, errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""What the system says to a name that can't be; None for packed bytes that can't be unpacked."""
_BLOCK = 1 << 16
_TIMEOUT_SECONDS = 60


def sources() -> dict[str, dict[str, Any]]:
    """The sets that can be pulled:

    {name: {repository, commit, licence, files: {local path: path in the repository}}}, and where it is known
    sha256: {local path: SHA-256 of the file}.
    """
    return json.loads(resources.files("perlhf.data").joinpath("sources.json").read_text(encoding="utf-8"))


def pull(name: str, output: Path, source: Path | None = None, address: str | None = None) -> Path:
    """Puts the set `name` into `output/name` and returns that directory.

    Args:
        source: directory with a local copy and its MANIFEST.json (entries with `file` and `sha256`), taken instead of
            downloading.
        address: where downloads begin instead of ADDRESS or $PERLHF_DATA_ADDRESS.

    Raises:
        DataError: unknown name, no connection, an unsafe archive, a file that differs from its SHA-256, or one that
            holds no data.
        StorageError: the place can't be written. Nothing half-written is left in any of these cases.
    """
    known = sources()
    if name not in known:
        near = nearest(name, known)
        raise DataError(
            f"no set is called {name!r}",
            where="pull",
            allowed=", ".join(known),
            hint=f"did you mean {near!r}?" if near else None,
        )
    target = output / name
    if target.exists():
        return _check_present(target)
    with directory_atomic(target) as stage:
        if source is None:
            entries = _download(known[name], stage, address or os.environ.get("PERLHF_DATA_ADDRESS") or ADDRESS)
            if unknown := [entry["file"] for entry in entries if entry["file"] not in known[name].get("sha256", {})]:
                note(
                    f"no SHA-256 is known beforehand of {len(unknown)} files of {name} (such as {unknown[0]}); "
                    f"those of the files that came are in {target / MANIFEST}"
                )
        else:
            entries = _copy(name, source, stage)
        for entry in entries:
            if entry["file"].endswith(_ARCHIVES):
                safe_extract(stage / entry["file"], (stage / entry["file"]).parent)
        manifest = {"name": name, "licence": known[name]["licence"], "files": entries}
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return target


def safe_extract(archive: Path, directory: Path) -> list[Path]:
    """Unpacks the regular files of a zip or tar archive below `directory` and returns their paths.

    Raises:
        DataError: a member would land outside `directory`, is a link or device, or the archive is damaged; every
            member is checked before the first one is written.
    """
    try:
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as opened:
                members = [member for member in opened.infolist() if not member.is_dir()]
                for member in members:
                    regular = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
                    _place(directory, member.filename, archive, regular)
                return [Path(opened.extract(member, directory)) for member in members]
        with tarfile.open(archive) as opened:
            inside = [member for member in opened.getmembers() if not member.isdir()]
            for member in inside:
                _place(directory, member.name, archive, member.isreg())
            # The filter alone would refuse what leaves the directory, but write an absolute name below it.
            opened.extractall(directory, inside, filter="data")
            return [directory / member.name for member in inside]
    except DataError:
        raise
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NAMES_REFUSED:
            raise  # a full disk, no permission
        raise DataError(f"the archive is damaged: {error}", where=archive.name, hint="download it again") from error


def _place(directory: Path, member: str, archive: Path, regular: bool) -> Path:
    parts = PurePosixPath(member.replace("\\", "/"))
    if not regular or parts.is_absolute() or ".." in parts.parts or not parts.parts or ":" in parts.parts[0]:
        raise DataError(
            f"the archive holds {member!r}, which would be written outside its directory"
            if regular
            else f"the archive holds {member!r}, a link or device",
            where=archive.name,
            allowed="regular files with relative paths without '..'",
            hint="don't unpack it; it may be an attack",
        )
    return directory / parts


def _download(known: dict[str, Any], stage: Path, address: str) -> list[dict[str, Any]]:
    entries = []
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        for local, path in known["files"].items():
            url = f"{address.rstrip('/')}/{known['repository']}/{known['commit']}/{urllib.parse.quote(path)}"
            place = stage / local
            place.parent.mkdir(parents=True, exist_ok=True)
            _download_one(url, place, progress)
            if (pinned := known.get("sha256", {}).get(local)) is not None:
                _check_hash(place, pinned, url, "the published file's")
            _check_plausible(place, url)
            published = {"source": known["repository"], "commit": known["commit"], "path": path}
            arrived = {"file": local, "bytes": place.stat().st_size, "sha256": sha256(place), "address": url}
            entries.append(arrived | published)
    return entries


def _download_one(url: str, place: Path, progress: Progress) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, place.open("wb") as out:
            length = response.headers["Content-Length"] or ""
            expected = int(length) if length.isdecimal() else None
            task = progress.add_task(place.name, total=expected)
            while block := response.read(_BLOCK):
                progress.advance(task, out.write(block))
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(
            f"the server answered {error.code} {error.reason}", where=url, hint="check the address, or use --source DIR"
        ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"the download failed: {reason}",
            where=url,
            hint="check the connection, or take a local copy with --source DIR",
        ) from error
    # urllib takes a connection that breaks off for the end of the file.
    if expected is not None and (received := place.stat().st_size) != expected:
        raise DataError(
            f"the download ended after {received} of {expected} bytes", where=url, hint="run the command again"
        )


def _check_plausible(place: Path, url: str) -> None:
    """Refuses what is no data: an empty file, an empty list, a page that says that there is nothing."""
    if place.name.endswith(_ARCHIVES):
        return  # unpacked later, which a damaged one doesn't survive
    what, first = None, None
    try:
        first = next(files.rows(files.DataFile(place.name, place)), None)
    except DataError as error:
        what = error.what
    if what is None and (first is None or not first[1]):
        what = "it has no rows"
    if what is not None:
        raise DataError(
            f"what came is no data: {what}",
            where=url,
            hint="open the address in a browser, try again later, or take a local copy with --source DIR",
        )


def _copy(name: str, source: Path, stage: Path) -> list[dict[str, Any]]:
    entries = []
    for entry in _manifest_entries(source):
        local = entry["file"].removeprefix(f"{name}/")
        if local == entry["file"]:
            continue
        origin, place = source / entry["file"], _place(stage, local, source / MANIFEST, regular=True)
        if not origin.is_file():
            raise DataError(
                "the file is listed in MANIFEST.json but missing", where=str(origin), hint="copy the set again"
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, place)
        _check_hash(place, entry["sha256"], str(origin))
        published = {key: entry[key] for key in ("source", "commit", "path") if isinstance(entry.get(key), str)}
        entries.append({"file": local, "bytes": place.stat().st_size, "sha256": entry["sha256"]} | published)
    if not entries:
        raise DataError(
            f"MANIFEST.json lists no file below {name}/",
            where=str(source / MANIFEST),
            hint="name the directory that holds all the sets",
        )
    return entries


def _manifest_entries(directory: Path) -> list[dict[str, Any]]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"can't read MANIFEST.json: {error.strerror}", where=str(path), allowed="a directory with a MANIFEST.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"MANIFEST.json is not valid JSON: {error}", where=str(path)) from error
    entries = manifest.get("files") if isinstance(manifest, dict) else manifest
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("file"), str) and isinstance(entry.get("sha256"), str)
        for entry in entries
    ):
        raise DataError(
            "MANIFEST.json is not a list of files", where=str(path), allowed="objects with `file` and `sha256`"
        )
    return entries


def _check_present(target: Path) -> Path:
    """A directory that is already there is fine when it is what an earlier pull left."""
    if not (target / MANIFEST).is_file():
        raise DataError(
            "the directory exists but was not made by pull",
            where=str(target),
            hint="name another --output, or move it away",
        )
    for entry in _manifest_entries(target):
        place = _place(target, entry["file"], target / MANIFEST, regular=True)
        if not place.is_file():
            raise DataError("a pulled file is missing", where=str(place), hint=f"delete {target} and pull again")
        _check_hash(place, entry["sha256"], str(place))
    return target


def _check_hash(place: Path, expected: str, where: str, whose: str = "as MANIFEST.json says") -> None:
    if (actual := sha256(place)) != expected:
        raise DataError(
            f"the SHA-256 is {actual}",
            where=where,
            allowed=f"{expected}, {whose}",
            hint="the file was changed or damaged; copy it again",
        )
