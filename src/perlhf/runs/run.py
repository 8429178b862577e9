"""A run directory: config.yaml, manifest.json, metrics.jsonl, rollouts/, checkpoints/, and at last result.json.

`open_run` locks the directory, so that one process at a time writes to it; the system drops the lock when that process
dies. The same command continues a run: `rewind` takes metrics and rollouts back to the checkpoint that training
continues from.
This module imports no torch; it only looks at it where it is already loaded.
"""

import contextlib
import importlib.util
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from perlhf.errors import ConfigError, PerlhfError, RunError
from perlhf.runs.earlier import adapter_of, files_hash
from perlhf.runs.manifest import (
    ADAPTER,
    MANIFEST,
    RESULT,
    check_is_run_directory,
    discard_unstarted,
    locked,
    start_or_continue,
    utc_now,
)
from perlhf.system import console
from perlhf.system.files import (
    damaged,
    from_json,
    read_json,
    remove_leftovers,
    storage_errors,
    strict_json,
    write_atomic,
    write_json,
)
from perlhf.system.machine import cuda_peak_bytes, gpu_name, peak_memory_bytes, reset_peak_memory
from perlhf.system.progress import Progress
from perlhf.system.waiting import STOP_ASKED, leave_closed_terminal

METRICS = "metrics.jsonl"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def open_run(path: Path, stage: str, config: BaseModel, facts: dict[str, Any], workers: int = 1) -> Iterator["Run"]:
    """Opens a run directory, new or to be continued, for this process alone.

    A `PerlhfError` raised inside before anything was logged or saved leaves no run directory behind.

    Inside, the first Ctrl-C, SIGTERM or SIGHUP (the terminal was closed) sets `Run.stop_requested`; Ctrl-C after that
    raises KeyboardInterrupt. Only the main thread can have this; in another one signals stay as they are.

    Args:
        path: the run directory.
        stage: name of the stage; a directory of another one is refused.
        config: resolved configuration; one that differs in more than `FREE_KEYS` is refused.
        facts: what else the result depends on, such as data hashes and the base's fingerprint; refused when it differs.
        workers: how many train it.

    Raises:
        RunError: the directory is in use, is no run directory, or belongs to another stage, configuration or data.
        ConfigError: an optional writer's package is missing.
        StorageError: something can't be written.
    """
    settings = config.model_dump(mode="json")
    log = settings.get("log") or {}
    _check_writers(log)
    check_is_run_directory(path)
    is_new = not path.exists()
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        reset_peak_memory()
        for directory in (path, path / "checkpoints", path / "rollouts"):
            with storage_errors(directory):
                remove_leftovers(directory)
        manifest = start_or_continue(path, stage, settings, facts, workers)
        run = Run(path, stage, settings, manifest)
        try:
            with hearing_signals(run):
                if not run.finished:
                    run._open_wandb()
                yield run
                if not run.finished:
                    run._record_session()
        except PerlhfError:
            # Mostly a mistake in the data or the base; the corrected command must not meet a directory of other data.
            discard_unstarted(path, is_new)
            raise
        finally:
            run._close()


class Run:
    """An open run directory (made by `open_run`)."""

    writes = True
    """Whether this process is the one that writes it."""

    def __init__(self, path: Path, stage: str, settings: dict[str, Any], manifest: dict[str, Any]):
        self.path = path
        self._stage, self._settings, self._manifest = stage, settings, manifest
        self._opened = time.monotonic()
        self._seconds_before = max(manifest["wall_seconds"], _last_time(path / METRICS))
        self._signalled = False
        self._metrics: int | None = None
        self._rewound_to: int | None = None
        self._progress: Progress | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None

    @property
    def finished(self) -> bool:
        """Whether the stage has ended and its result is there."""
        return (self.path / RESULT).is_file()

    @property
    def stop_requested(self) -> bool:
        """Whether Ctrl-C, SIGTERM or SIGHUP arrived: save a checkpoint and return."""
        return self._signalled

    @property
    def seconds(self) -> float:
        """Wall time of this run so far, earlier sessions included."""
        return self._seconds_before + time.monotonic() - self._opened

    def result(self) -> dict[str, Any]:
        """The result of a finished run.

        Raises:
            RunError: it isn't finished, or result.json is damaged.
        """
        if not self.finished:
            raise RunError(
                "the run isn't finished", where=str(self.path), hint="run the same command again to continue it"
            )
        return read_json(self.path / RESULT)

    def rewind(self, step: int) -> None:
        """Drops metrics and rollouts of steps after `step`, and a last line that was only half-written.

        Call it before the first `log`: with the loaded checkpoint's step, or -1 when training starts from nothing.

        Raises:
            RunError: metrics.jsonl is damaged elsewhere than in its last line.
        """
        assert self._metrics is None, "rewind comes before the first log"
        path = self.path / METRICS
        old = path.read_bytes() if path.exists() else b""
        remaining = b"".join(line for number, line in _complete_lines(old) if _line_step(path, number, line) <= step)
        if remaining != old:
            write_atomic(path, remaining)
        for rollout in (self.path / "rollouts").glob("*.jsonl"):
            if rollout.stem.isdigit() and int(rollout.stem) > step:
                with storage_errors(rollout):
                    rollout.unlink()
        self._rewound_to = step

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values to the line of `step`, which is the last one: what was measured after its checkpoint was saved.

        Raises:
            RunError: somebody took the line away.
            StorageError: metrics.jsonl can't be written; it stays as it was.
        """
        lines = _lines(self.path / METRICS)
        last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if last.get("step") != step:
            raise damaged(self.path / METRICS, f"its last line isn't of update {step}")
        self._rewrite([*lines[:-1], (strict_json({**last, **values}) + "\n").encode()])
        self._feed(step, values)

    def withdraw(self, step: int, prefix: str) -> None:
        """Drops values whose names start with `prefix` from the line of `step`, the last one: undoes `amend`."""
        lines = _lines(self.path / METRICS)
        last = json.loads(lines[-1]) if lines else {}
        if last.get("step") == step and any(key.startswith(prefix) for key in last):
            remaining = {key: value for key, value in last.items() if not key.startswith(prefix)}
            self._rewrite([*lines[:-1], (strict_json(remaining) + "\n").encode()])

    def _rewrite(self, lines: list[bytes]) -> None:
        """Replaces metrics.jsonl; a descriptor that was open is of the file that there was."""
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None
        path = self.path / METRICS
        write_atomic(path, b"".join(lines))

    def note(self, key: str, value: dict[str, Any]) -> None:
        """Adds to the manifest what is known only now, and says so where it was another before this session."""
        before = self._manifest.get(key)
        if before == value:
            return
        if before is not None:
            console.note(f"{key} is {value!r} but was {before!r} before; the result may not be bit-equal")
        self._manifest[key] = value
        write_json(self.path / MANIFEST, self._manifest)

    def note_session(self, key: str, value: Any) -> None:
        """Adds to the manifest what is so in this session, and changes no result."""
        self._manifest["sessions"][-1][key] = value
        write_json(self.path / MANIFEST, self._manifest)

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Appends one line to metrics.jsonl, and feeds the progress bar and the optional writers.

        A value that isn't finite is written as null. Log a step before saving its checkpoint: a kill in between would
        lose the line.

        Raises:
            StorageError: the line can't be written; no part of it is left.
        """
        assert not {"step", "time_seconds"} & values.keys(), "step and time_seconds are added here"
        line = strict_json({"step": step, "time_seconds": round(self.seconds, 3), **values}) + "\n"
        if self._metrics is None:
            self._metrics = self._open_metrics()
        with storage_errors(self.path / METRICS):
            _append_whole(self._metrics, line.encode())
        self._feed(step, values)

    def _feed(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Shows values beside the progress bar, and to the optional writers."""
        if self._progress:
            self._progress.show(values)
        numbers = {
            key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
        }
        if self._tensorboard:
            with storage_errors(self.path / "tensorboard"):
                for key, value in numbers.items():
                    self._tensorboard.add_scalar(key, value, global_step=step)
                self._tensorboard.flush()
        if self._wandb:
            self._wandb.log(numbers, step=step)

    @contextmanager
    def progress(self, total: int, start: int, description: str) -> Iterator[Progress]:
        """Shows progress on standard error from `start` to `total` updates, with ETA; call `.advance()` after each."""
        self._progress = Progress(total, start, description, peak_memory_bytes)
        try:
            with self._progress.shown():
                yield self._progress
        finally:
            self._progress = None

    def write_rollout(self, step: int, rows: list[dict[str, Any]]) -> Path:
        """Writes rollouts/STEP.jsonl, one row a line.

        Raises:
            StorageError: it can't be written; nothing of it is left.
        """
        path = self.path / "rollouts" / f"{step:08d}.jsonl"
        with storage_errors(path):
            path.parent.mkdir(exist_ok=True)
        write_atomic(path, "".join(strict_json(row) + "\n" for row in rows))
        return path

    def finish(self, result: dict[str, Any]) -> None:
        """Ends the run: the manifest gets times, peaks and the adapter's hash, then result.json is written, last of all
        files.

        `stage`, `seconds` and `peak_memory_bytes` are added to the result unless given.
        """
        if (adapter := adapter_of(self.path)) is not None:
            self._manifest[ADAPTER] = files_hash(adapter)
        self._record_session()
        measured = {"stage": self._stage, "seconds": round(self.seconds, 3)}
        measured["peak_memory_bytes"] = self._manifest["peak_memory_bytes"]
        write_json(self.path / RESULT, measured | result)

    def _record_session(self) -> None:
        manifest = self._manifest
        manifest["wall_seconds"] = round(self.seconds, 3)
        manifest["peak_memory_bytes"] = max(manifest["peak_memory_bytes"], peak_memory_bytes())
        manifest["cuda_peak_memory_bytes"] = max(manifest["cuda_peak_memory_bytes"], cuda_peak_bytes())
        if gpu := gpu_name():  # not known before the network was loaded
            manifest["hardware"]["gpu"] = gpu
        manifest["sessions"][-1]["ended"] = utc_now()
        write_json(self.path / MANIFEST, manifest)

    def _open_metrics(self) -> int:
        """Opens what `log` feeds, late, so that `rewind` has said from where; returns metrics.jsonl's descriptor."""
        path = self.path / METRICS
        assert self._rewound_to is not None or not path.exists(), "a continued run is rewound before it logs"
        with storage_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        log = self._settings.get("log") or {}
        if log.get("tensorboard") and self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            # Events of an earlier session from this step on are hidden by TensorBoard.
            purge = None if self._rewound_to is None else self._rewound_to + 1
            with storage_errors(self.path / "tensorboard"):
                self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge)
        return descriptor

    def _open_wandb(self) -> None:
        """Opens the W&B writer, if asked for: when the run is opened, so that a missing login shows at once."""
        project = (self._settings.get("log") or {}).get("wandb")
        if not project:
            return
        import wandb  # pyright: ignore[reportMissingImports] -- an extra, not installed for development

        run_id, settings = self._manifest["id"], self._settings
        try:
            # The same id in every session; the service ignores steps that it already has.
            self._wandb = wandb.init(project=project, id=run_id, resume="allow", dir=str(self.path), config=settings)
        except wandb.Error as error:
            hint = "run `wandb login`, or set WANDB_MODE=offline"
            raise ConfigError(f"W&B can't be used: {error}", where="log.wandb", hint=hint) from error

    def _close(self) -> None:
        if self._metrics is not None:
            os.close(self._metrics)
        if self._tensorboard:
            with storage_errors(self.path / "tensorboard"):
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        if number == signal.SIGHUP:
            leave_closed_terminal()
        self._say_stopping()

    def _say_stopping(self) -> None:
        with contextlib.suppress(OSError):
            # os.write, since a handler may interrupt a print.
            os.write(2, b"\nstopping after this update; press Ctrl-C again to stop at once\n")


def _check_writers(log: dict[str, Any]) -> None:
    for key in ("tensorboard", "wandb"):
        spec = importlib.util.find_spec(key) if log.get(key) else None
        # Without origin it is only a directory of that name, such as W&B leaves behind.
        if log.get(key) and (spec is None or spec.origin is None):
            raise ConfigError(
                f"the package {key} isn't installed",
                where=f"log.{key}",
                hint=f"pip install 'perlhf[{key}]', or leave log.{key} out",
            )


@contextmanager
def hearing_signals(run: Run) -> Iterator[None]:
    """Inside, what would end the process asks the run to stop (`open_run`)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # `nohup` has SIGHUP ignored, which stays.
    heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP]
    before = {number: signal.signal(number, run._on_signal) for number in heard}
    asked = STOP_ASKED.set(lambda: run.stop_requested)  # a service isn't waited for much longer then
    try:
        yield
    finally:
        STOP_ASKED.reset(asked)
        for number, handler in before.items():
            # None stands for a handler that wasn't set from Python and can't be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _complete_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their newline; a last one without it was cut off by a kill and is left out."""
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        yield number, line + b"\n"


def _lines(path: Path) -> list[bytes]:
    """All complete lines, with their newlines."""
    return [line for _, line in _complete_lines(path.read_bytes() if path.exists() else b"")]


def _line_step(path: Path, number: int, line: bytes) -> int:
    try:
        return int(from_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        hint = "delete the line and run the same command again"
        raise RunError(
            "not a line of metrics", where=f"{path}:{number}", allowed='{"step": ..., ...}', hint=hint
        ) from error


def _last_time(path: Path) -> float:
    """`time_seconds` of the last complete line of metrics: how long a run that was killed had run; 0 without one."""
    if not path.exists():
        return 0.0
    lines = path.read_bytes().split(b"\n")
    try:
        return float(from_json(lines[-2])["time_seconds"])
    except (IndexError, ValueError, KeyError, TypeError, OverflowError):
        return 0.0


def _append_whole(descriptor: int, data: bytes) -> None:
    """Appends all of `data`, or none of it when the system refuses a part."""
    size = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        os.ftruncate(descriptor, size)
        raise
