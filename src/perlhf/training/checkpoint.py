"""Checkpoints of a run: `RUN/checkpoints/00000020/{name}.safetensors` and `state.json`.

A checkpoint is a directory that gets its name by a rename once everything in it is on disk, so a process killed at any
moment leaves the previous one as the newest. `state.json` holds the SHA-256 of each tensor file, and a seal of its own.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from perlhf.errors import CheckpointError
from perlhf.model import saved
from perlhf.parallel.workers import Workers
from perlhf.runs.manifest import CHECKPOINTS
from perlhf.system.files import directory_atomic, remove_directory, sealed, sha256, storage_errors, unsealed

STATE_FILE, KEEP_LAST = "state.json", 2


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, on the CPU."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save(
    run_dir: Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    keep_last: int = KEEP_LAST,
    pinned: int | None = None,
) -> Path:
    """Saves a checkpoint and deletes older ones.

    Args:
        run_dir: run directory.
        step: number of updates done; a checkpoint of the same step is replaced.
        tensors: file name (without suffix) -> tensor name -> tensor of any dtype and device.
        state: whatever else is needed to continue; must survive JSON unchanged (string keys, lists, no tuples).
        keep_last: the newest checkpoints to keep, this one included.
        pinned: a step to keep besides (the best one).

    Returns:
        The checkpoint's directory.

    Raises:
        StorageError: it can't be written; older checkpoints are untouched and nothing half-written is left.
    """
    assert step >= 0 and keep_last >= 1, f"step {step}, keep_last {keep_last}"
    assert _survives_json(state), "state must have string keys, lists (no tuples) and plain numbers"
    target = _directory(run_dir, step)
    with directory_atomic(target) as temporary:
        sums = {}
        for name, named_tensors in tensors.items():
            file = temporary / f"{name}.safetensors"
            saved.write_tensors(file, named_tensors, target)
            sums[file.name] = sha256(file)
        (temporary / STATE_FILE).write_bytes(sealed({"step": step, "files": sums, "state": state}))
    prune(run_dir, step, pinned, keep_last)
    return target


def prune(run_dir: Path, step: int, pinned: int | None, keep_last: int = KEEP_LAST) -> None:
    """Deletes checkpoints older than the newest `keep_last` up to `step`, but for the pinned one.

    Raises:
        StorageError: one can't be deleted.
    """
    steps = [older for older in _steps(run_dir) if older <= step]
    with storage_errors(run_dir / CHECKPOINTS):
        for older in steps[:-keep_last]:
            if older != pinned:
                remove_directory(_directory(run_dir, older))


def load(run_dir: Path, step: int | None = None) -> Checkpoint | None:
    """Loads the newest checkpoint, or the one of `step`; None when the run has none.

    Raises:
        CheckpointError: a file of it is damaged or missing, or there is no checkpoint of `step`. Nothing older is
            loaded instead: the message names the newest one that is intact.
    """
    steps = _steps(run_dir)
    if step is None:
        if not steps:
            return None
        step = steps[-1]
    if step not in steps:
        existing = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"no checkpoint of step {step}", where=str(run_dir / CHECKPOINTS), allowed=f"steps: {existing}"
        )
    directory = _directory(run_dir, step)
    try:
        said = _intact(directory)
    except CheckpointError as error:
        raise CheckpointError(
            error.what, where=error.where, allowed=error.allowed, hint=_way_back(run_dir, step)
        ) from error
    tensors = {Path(name).stem: load_file(directory / name) for name in said["files"]}
    return Checkpoint(step=step, tensors=tensors, state=said["state"])


def load_together(run_dir: Path, step: int | None, workers: Workers) -> Checkpoint | None:
    """`load` by the first worker, whose disk alone may have it; the others get it from there."""
    if workers.count == 1:
        return load(run_dir, step)
    found = load(run_dir, step) if workers.first else None
    said = workers.once(lambda: _described(found))
    if said is None:
        return None
    if found is None:
        tensors = {
            file: {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in named.items()}
            for file, named in said["tensors"].items()
        }
        found = Checkpoint(said["step"], tensors, said["state"])
    workers.spread([found.tensors[file][name] for file, named in said["tensors"].items() for name in named])
    return found


def _described(found: Checkpoint | None) -> dict[str, Any] | None:
    """A checkpoint with the dtypes and shapes of its tensors instead of them."""
    if found is None:
        return None
    shapes = {
        file: {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in named.items()}
        for file, named in found.tensors.items()
    }
    return {"step": found.step, "state": found.state, "tensors": shapes}


def _directory(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"{step:08d}"


def _steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending. A directory without its last file doesn't exist."""
    state_files = (run_dir / CHECKPOINTS).glob(f"*/{STATE_FILE}")
    return sorted(int(file.parent.name) for file in state_files if re.fullmatch(r"\d{8,}", file.parent.name))


def _intact(directory: Path) -> dict[str, Any]:
    """What `state.json` says, once it and every file that it names are seen to be as they were written.

    Raises:
        CheckpointError: the first file that isn't.
    """
    try:
        said = unsealed(directory / STATE_FILE)
    except ValueError as error:
        what = f"the checkpoint's state is damaged: {error}"
        raise CheckpointError(what, where=str(directory / STATE_FILE)) from error
    step, files = said.get("step"), said.get("files")
    if type(step) is not int or not isinstance(files, dict) or not isinstance(said.get("state"), dict):
        raise CheckpointError(
            "not what a checkpoint's state says", where=str(directory / STATE_FILE), allowed="step, files and state"
        )
    if step != int(directory.name):
        what = f"the directory is named for step {int(directory.name)}, but holds the checkpoint of step {step}"
        raise CheckpointError(what, where=str(directory), allowed=f"{step:08d}")
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError("a file of the checkpoint is missing", where=str(file))
        if (actual := sha256(file)) != expected:
            what = f"the checkpoint is damaged: SHA-256 {actual[:12]}… instead of {str(expected)[:12]}…"
            raise CheckpointError(what, where=str(file))
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"no file of tensors: {error}", where=str(file)) from error
    return said


def _way_back(run_dir: Path, damaged: int) -> str:
    for older in reversed([step for step in _steps(run_dir) if step < damaged]):
        with suppress(CheckpointError):
            _intact(_directory(run_dir, older))
            bad = _directory(run_dir, damaged)
            return f"step {older} is still good: delete {bad} and run the same command to continue from it"
    return f"no older checkpoint is intact; delete {run_dir} to start again"


def _survives_json(value: object) -> bool:
    match value:
        case dict():
            return all(isinstance(key, str) and _survives_json(item) for key, item in value.items())
        case list():
            return all(_survives_json(item) for item in value)
        case _:
            return value is None or isinstance(value, str | int | float)
