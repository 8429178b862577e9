"""Whose a run directory is: its lock, config.yaml and manifest.json.

A directory belongs to one stage, configuration and data. Any other is refused before more than its lock is written.
"""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from perlhf.errors import RunError
from perlhf.runs import places
from perlhf.runs.evaluations import EVALUATION, mapping
from perlhf.system.before_torch import waiting
from perlhf.system.console import note
from perlhf.system.files import (
    TEMPORARY,
    damaged,
    from_yaml,
    read_json,
    storage_errors,
    strict_json,
    write_atomic,
    write_json,
)
from perlhf.system.machine import environment

LOCK, CONFIG, MANIFEST, RESULT = ".lock", "config.yaml", "manifest.json", "result.json"
FORMAT = 2
"""Number of what a run directory looks like; raised when older ones can't be continued or used any more."""
TOTALS = ("updates", "max_updates", "epochs")
"""Keys that may grow: a run that has them goes on to what one that had them from the start would have become."""
ADAPTER = "adapter_sha256"
"""Key of the manifest of a finished run: of what it made (`runs.earlier.files_hash`)."""
CHECKPOINTS = "checkpoints"
"""Directory of a run's checkpoints; a finished run needs none."""
FREE_KEYS = ("check_every", "checkpoint_every", "log", "recompute", "reward_timeout_seconds", "shard", "vllm", "run")
"""Keys that may differ when a run continues: they change no result (`run` is the directory itself)."""


def check_is_run_directory(path: Path) -> None:
    """Refuses a file, and a directory that holds something else: nothing is written among a user's own files."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError("the run directory is a file", where=str(path), hint="name another run directory")
    if not (path / MANIFEST).exists():
        foreign = [
            entry.name
            for entry in path.iterdir()
            if entry.name not in (LOCK, CONFIG) and not entry.name.startswith(TEMPORARY)
        ]
        if foreign:
            raise RunError(
                f"not a run directory: it has no {MANIFEST} but holds {min(foreign)!r}",
                where=str(path),
                allowed="a new or empty directory, or one of an earlier run",
                hint="name another run directory",
            )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a run directory for this process alone; the system drops the lock when the process dies.

    Raises:
        RunError: another process holds it, or has given the directory up since it was found.
        StorageError: the lock can't be written.
    """
    lock = FileLock(path / LOCK, timeout=0, fallback_to_soft=False)
    with storage_errors(path / LOCK):
        try:
            lock.acquire()
        except Timeout:
            raise _refused(path) from None
    try:
        with storage_errors(path / LOCK):
            (path / LOCK).write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def start_or_continue(
    path: Path, stage: str, settings: dict[str, Any], facts: dict[str, Any], workers: int = 1
) -> dict[str, Any]:
    """Writes config.yaml and then manifest.json, or checks that they are of the same run; returns the manifest.

    Args:
        workers: how many train the run in this session, which is recorded where it isn't 1, or wasn't.
    """
    facts = json.loads(strict_json(facts))
    here = environment()
    session: dict[str, Any] = {"started": utc_now(), "pid": os.getpid(), "openmp": waiting()}
    session |= {"workers": workers} if workers > 1 else {}
    session |= {"shard": settings["shard"]} if "shard" in settings else {}
    if not (path / MANIFEST).exists():
        manifest = {
            "format": FORMAT,
            "id": uuid.uuid4().hex[:12],
            "stage": stage,
            places.STARTED_IN: places.started_in(path),
            "seed": settings.get("seed"),
            "facts": facts,
        }
        manifest |= here | {
            "wall_seconds": 0.0,
            "peak_memory_bytes": 0,
            "cuda_peak_memory_bytes": 0,
            "sessions": [session],
        }
        write_atomic(path / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        write_json(path / MANIFEST, manifest)
        return manifest
    manifest = read_manifest(path)
    if missing := next((key for key in ("stage", "facts", "sessions") if key not in manifest), None):
        raise damaged(path / MANIFEST, f"it has no {missing}")
    if manifest["stage"] != stage:
        raise RunError(
            f"the directory holds a run of stage {manifest['stage']!r}, not {stage!r}",
            where=str(path),
            hint="use another run directory",
        )
    before, now = _bound(_read_yaml(path / CONFIG)), _bound(settings)
    grown = {key: now.get(key) for key in TOTALS if _grew(before.get(key), now.get(key))}
    _check_same(path / CONFIG, before | grown, now | grown, "configuration")
    given = _as_far_as_recorded(manifest["facts"], facts)
    _check_same(path / MANIFEST, {"facts": manifest["facts"]}, {"facts": given}, "data, base, adapter or code")
    if grown:
        _check_extends(path / CONFIG, before, grown)
        session |= {"extended": {key: {"before": before.get(key), "now": value} for key, value in grown.items()}}
        _reopen(path)
    if (path / RESULT).exists():
        return manifest
    recorded = {key: manifest.get(key) for key in here}
    if difference := first_difference(recorded, here):
        key, then, now = difference
        session |= {"changed": {"key": key, "before": then, "now": now}}
        note(f"{key} is {now!r} but was {then!r} when this run started; the result may not be bit-equal")
    before_now = manifest["sessions"][-1].get("workers", 1) if manifest["sessions"] else workers
    if before_now != workers:
        session["workers"] = workers
        said = f"the number of workers is {workers} but was {before_now} before"
        note(f"{said}: sums are added up otherwise, so the result isn't bit-equal")
    manifest["sessions"].append(session)
    write_atomic(path / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_json(path / MANIFEST, manifest)
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """What manifest.json says of the run in the directory `path`.

    Raises:
        RunError: it is missing, damaged or of another format.
    """
    manifest = read_json(path / MANIFEST)
    version = manifest.get("format")
    if isinstance(version, int) and version < FORMAT:
        raise RunError(
            f"made by an earlier version of perlhf (format {version})",
            where=str(path / MANIFEST),
            allowed=f"format {FORMAT}",
            hint="run it again in another directory",
        )
    if version != FORMAT:
        raise damaged(path / MANIFEST, f"format {version!r} instead of {FORMAT}")
    for key, kind in (("stage", str), ("facts", dict)):
        if not isinstance(manifest.get(key, kind()), kind):
            raise damaged(path / MANIFEST, f"{key} is a {type(manifest[key]).__name__}")
    return manifest


def discard_unstarted(path: Path, is_new: bool) -> None:
    """Takes back what `start_or_continue` wrote, unless the directory holds anything else; the lock must be held.

    Args:
        is_new: the directory was made for this run, so it goes too.
    """
    with storage_errors(path):
        folders = [entry for entry in path.iterdir() if entry.is_dir()]
        files = {entry.name for entry in path.iterdir()} - {folder.name for folder in folders}
        if files - {MANIFEST, CONFIG, LOCK} or any(True for folder in folders for _ in folder.iterdir()):
            return
        # The manifest first: a directory without it is one of a start that was killed, which is started again.
        for name in (MANIFEST, CONFIG, LOCK):
            (path / name).unlink(missing_ok=True)
        for folder in [*folders, *([path] if is_new else [])]:
            folder.rmdir()


def _refused(path: Path) -> RunError:
    """The error for a directory whose lock can't be had; names the process that wrote itself into the lock."""
    try:
        owner = (path / LOCK).read_text(encoding="utf-8", errors="replace").strip() or "unknown"
    except FileNotFoundError:
        return RunError("another process has just given the run directory up", where=str(path), hint="try again")
    return RunError(
        f"the run directory is in use by process {owner}",
        where=str(path),
        hint=f"wait for it, stop it (kill {owner}), or name another run directory",
    )


def _bound(settings: dict[str, Any]) -> dict[str, Any]:
    bound = {key: value for key, value in settings.items() if key not in FREE_KEYS}
    # On the base of a run they are one: `auto` is `tree` where there can be one, and else `tree` never began.
    return bound | ({"packing": "tree"} if bound.get("packing") == "auto" else {})


def _grew(before: int | None, now: int | None) -> bool:
    """Whether a total allows for more updates; null is no limit."""
    return before is not None and (now is None or now > before)


def _check_extends(file: Path, before: dict[str, Any], grown: dict[str, Any]) -> None:
    """Refuses more updates where those that were made would have been others."""
    schedule = (before.get("optim") or {}).get("schedule", "constant")
    if schedule == "constant":
        return
    key, now = next(iter(grown.items()))
    raise RunError(
        f"{key} is {now!r}, but {before[key]!r} in the run that is here, whose learning rate (schedule: {schedule}) "
        "falls to 0 at the last update: with more updates those that were made would have been larger",
        where=str(file),
        allowed="more updates with optim.schedule: constant",
        hint=f"use another run directory, and start: {file.parent} to train its adapter on",
    )


def _reopen(path: Path) -> None:
    """A finished run becomes one that goes on; its evaluation, which is that of the shorter run, is put aside."""
    if not (path / RESULT).exists():
        return
    updates = read_json(path / RESULT).get("updates")
    with storage_errors(path):
        if (path / EVALUATION).exists():
            os.replace(path / EVALUATION, path / f"evaluation-of-{updates}-updates.json")
        (path / RESULT).unlink()


def _as_far_as_recorded(recorded: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without what an earlier version of perlhf, which began the run, didn't record."""
    kept = {key: value for key, value in facts.items() if key in recorded or key not in ("beside", "code")}
    if "base" in kept:
        then = mapping(recorded.get("base"))
        new = ("files", "revision") if "files" not in then else ("revision",)  # of other revisions, hashes decide
        kept["base"] = {key: value for key, value in kept["base"].items() if key not in new}
        kept["base"] |= {"revision": then["revision"]} if "revision" in then else {}
    return kept


def _check_same(file: Path, recorded: dict[str, Any], given: dict[str, Any], what: str) -> None:
    if difference := first_difference(recorded, given):
        key, then, now = difference
        raise RunError(
            f"{key} is {now!r}, but {then!r} in the run that is here: another {what}",
            where=str(file),
            allowed=f"{', '.join(FREE_KEYS[:-1])} may change when a run continues, {', '.join(TOTALS)} may grow",
            hint=f"use another run directory, or delete {file.parent} to start again",
        )


def check_continues(
    file: Path, then: dict[str, Any], now: dict[str, Any], may_grow: Sequence[str], what: str, option: str
) -> None:
    """Refuses to go on with other settings than those that `file` was written with.

    Args:
        may_grow: keys that may differ.
        what: the settings are of, such as `comparison`.
        option: that names another directory.

    Raises:
        RunError: the first other key, with both values.
    """
    old, new = ({key: value for key, value in given.items() if key not in may_grow} for given in (then, now))
    if difference := first_difference(old, new):
        key, before, given = difference
        raise RunError(
            f"{key} is {given!r}, but {before!r} in the {what} that is here",
            where=str(file),
            allowed=f"only {', '.join(may_grow)} may change when a {what} continues",
            hint=f"name another {option}",
        )


def first_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key whose values differ, with both values ("not set" for an absent one), or None."""
    for key in [*new, *(key for key in old if key not in new)]:
        then, now = old.get(key, "not set"), new.get(key, "not set")
        if isinstance(then, dict) and isinstance(now, dict):
            if deeper := first_difference(then, now, f"{prefix}{key}."):
                return deeper
        elif then != now or isinstance(then, bool) != isinstance(now, bool):
            return f"{prefix}{key}", then, now
    return None


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = from_yaml(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, f"a {type(value).__name__} instead of a mapping")
    return value
