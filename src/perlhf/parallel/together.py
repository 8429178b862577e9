"""How several workers begin and end: `together` joins them, and leaves nobody behind whatever happens.

    with together() as workers: ...

The first worker raises what went wrong with any of them; the others say nothing and end with the same exit code.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist

from perlhf.errors import ConfigError, PerlhfError, WorkerError
from perlhf.parallel.place import Place, place
from perlhf.parallel.watch import Failure, Watch, connection_broke, end_at_once
from perlhf.parallel.workers import ALONE, NEVER, Workers
from perlhf.system import unforeseen

_joined: ContextVar[Workers | None] = ContextVar("workers", default=None)
Said = Callable[[BaseException], tuple[str, int]]


def said_of(error: BaseException) -> tuple[str, int]:
    """What an error says, and the exit code."""
    match error:
        case PerlhfError():
            return str(error), error.exit_code
        case KeyboardInterrupt():
            return "interrupted", 130
        case SystemExit():
            return f"ended with exit code {error.code}", error.code if isinstance(error.code, int) else 1
        case Exception():
            return unforeseen.said_of(error, "perlhf")
        case _:
            return type(error).__name__, unforeseen.SOFTWARE


@contextlib.contextmanager
def together(said: Said = said_of) -> Iterator[Workers]:
    """The workers that this process is one of, joined once a process; `ALONE` where it is the only one.

    Args:
        said: message and exit code of an error.

    Raises:
        ConfigError: they can't meet.
        WorkerError: on the first worker, what another one failed with.
        SystemExit: on all others, whoever failed; its exit code is the same.
    """
    if (joined := _joined.get()) is not None:
        yield joined
        return
    streams = sys.stdout, sys.stderr
    try:
        own = place()
    except ConfigError as error:
        _leave(os.environ.get("RANK", "").strip() in ("", "0"), error, streams)
    if own is None:
        yield ALONE
        return
    _set_streams(streams if own.number == 0 else (_nowhere(), _nowhere()))
    try:
        watch = Watch(own, lambda failure: _end(failure, own, streams))
    except WorkerError as error:
        _leave(own.number == 0, error, streams)
    except ConfigError as error:
        # Of workers that can't reach the first one the second one speaks, since nobody else would.
        _leave(own.number <= 1, error, streams)
    token = None
    try:
        workers = _group(own, watch)
        token = _joined.set(workers)
        yield workers
        workers.wait()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            watch.leave()
            raise
        if connection_broke(error):  # while a part of the base was gathered
            error = watch.error(watch.broken())
        _failed(error, watch, said, streams)
    finally:
        if token is not None:
            _joined.reset(token)
        _set_streams(streams)
    watch.leave()
    dist.destroy_process_group()


def _failed(error: BaseException, watch: Watch, said: Said, streams: tuple[TextIO, TextIO]) -> NoReturn:
    """Publishes what happened, and raises what this worker has to say of it."""
    message, code = said(error)
    failure = watch.fail(message, code)
    if not watch.speaks:
        watch.wait_for_first()
        watch.leave()
        raise SystemExit(failure.code) from None
    _set_streams(streams)
    watch.leave()
    if failure.message == message or failure.worker == watch.place.number:
        raise error
    raise watch.error(failure) from None


def _leave(speaks: bool, error: PerlhfError, streams: tuple[TextIO, TextIO]) -> NoReturn:
    _set_streams(streams)
    if speaks:
        raise error
    raise SystemExit(error.exit_code) from None


def _group(own: Place, watch: Watch) -> Workers:
    """The process group, on a device for each worker where there are as many."""
    device, count = "", torch.cuda.device_count()  # by the driver's library: CUDA itself isn't loaded yet
    if count:
        # Each sees one device alone, which is then `cuda:0`, whoever asks. Ray has seen to that already.
        seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        seen = seen or [str(number) for number in range(count)]
        device = os.environ["CUDA_VISIBLE_DEVICES"] = seen[own.local % len(seen)]
    watch.store.set(f"device/{own.number}", f"{socket.gethostname()} {device}" if device else "")
    devices = watch.store.multi_get([f"device/{number}" for number in range(own.count)])
    apart = all(devices) and len(set(devices)) == own.count and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if apart else "gloo"
    dist.init_process_group(backend, store=watch.store, rank=own.number, world_size=own.count, timeout=NEVER)
    return Workers(own.number, own.count, watch, on_cpu=not apart, local=(own.local, own.local_count))


def _end(failure: Failure, own: Place, streams: tuple[TextIO, TextIO]) -> None:
    """Ends a process whose main thread doesn't: one that computes for long, or waits for what is gone."""
    lost_first = failure.lost and failure.worker == 0
    if own.number == (1 if lost_first else 0):
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {failure.message}", file=streams[1])
    end_at_once(failure.code)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _set_streams(streams: tuple[TextIO, TextIO]) -> None:
    sys.stdout, sys.stderr = streams
