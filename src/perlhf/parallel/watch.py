"""One worker that fails, stops or is killed ends all of them, with one message.

Workers meet at a store of torch's (`TCPStore`). A thread of each writes there every second that it is alive, and looks
whether somebody failed: whoever fails first leaves its message and exit code. The first worker also notices who gave no
sign for `SILENT_SECONDS`, and all others notice that of the first. A main thread that waits for others learns it
at once (`check`), and unwinds as after any error; one that doesn't within `GRACE_SECONDS` is ended.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from perlhf.errors import ConfigError, WorkerError
from perlhf.parallel.place import Place

PERIOD_SECONDS = 1.0
SILENT_SECONDS = 24.0
"""Without a sign for so long a worker is lost; with the 30 seconds that torchrun gives a stopped one it is a minute."""
GRACE_SECONDS = 15.0
"""What the main thread has to unwind once somebody failed: enough to end the file that it writes."""
JOIN_SECONDS = 300.0
"""How long workers wait for one another at the start."""
BROKEN_SECONDS = 8.0
"""How long a worker whose connection broke waits for the message of who broke it."""
ENDED = 3
"""Exit code where a worker was lost: training had to stop."""


@dataclass(frozen=True)
class Failure:
    """Why all workers end."""

    worker: int
    """Who failed."""
    code: int
    """Exit code of all."""
    message: str
    lost: bool = False
    """Whether it was found missing, and couldn't say anything itself."""


class Watch:
    """What a worker knows of the others' lives."""

    def __init__(self, place: Place, end: Callable[[Failure], None]):
        """Joins the others.

        Args:
            end: is called in the thread where the main thread doesn't unwind, and doesn't return.

        Raises:
            ConfigError: the place where they meet can't be opened or reached, or somebody didn't come.
            WorkerError: somebody failed already.
        """
        self.place, self._end = place, end
        self.store = self._meet(place.number == 0 and not place.hosted)
        self._own = self._meet(False)
        self._failure: Failure | None = None
        self._stopping = threading.Event()
        self._left, self._silent = False, SILENT_SECONDS
        self._own.compare_set("failed", "", "")
        self._own.set(f"process/{place.number}", _this_process())
        self._own.set(f"alive/{place.number}", "0")
        self._wait_for_all()
        self._first = self._own.get("process/0").decode()
        self._answered = time.monotonic()
        """When the store last did: one that a stopped worker holds leaves whoever asks it waiting for ever."""
        for work in (self._look, self._guard):
            threading.Thread(target=work, name="perlhf-watch", daemon=True).start()

    @property
    def speaks(self) -> bool:
        """Whether this worker tells of a failure: the first, or the second where the first is lost."""
        return self.place.number == (1 if self._lost_the_first else 0)

    @property
    def _lost_the_first(self) -> bool:
        return self._failure is not None and self._failure.lost and self._failure.worker == 0

    def check(self) -> None:
        """Raises WorkerError where somebody failed."""
        if self._failure is not None:
            raise self.error(self._failure)

    def error(self, failure: Failure) -> WorkerError:
        """What the workers that didn't fail themselves raise."""
        said = failure.message if failure.lost else f"worker {failure.worker} of {self.place.count}: {failure.message}"
        return WorkerError(said, failure.code)

    def fail(self, message: str, code: int) -> Failure:
        """This worker failed, unless another one did before: all end for the reason that is returned."""
        return self._publish(Failure(self.place.number, code, message))

    def broken(self) -> Failure:
        """Why a connection broke: whoever ended says so, else whoever gives no sign any more is lost."""
        self._silent = min(self._silent, BROKEN_SECONDS / 2)
        until = time.monotonic() + BROKEN_SECONDS
        while time.monotonic() < until:
            if self._failure is not None:
                return self._failure
            time.sleep(0.1)
        return self._publish(self._lost((self.place.number + 1) % self.place.count, "can't be reached any more"))

    def wait_for_first(self) -> None:
        """Waits a little until the first worker has told what happened, since launchers end all when one ends."""
        until = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(RuntimeError):
            while not self._lost_the_first and time.monotonic() < until and not self.store.check(["left/0"]):
                time.sleep(0.05)

    def leave(self) -> None:
        """This worker is done; where it holds the place to meet, it stays until the others have left."""
        self._left = True
        self._stopping.set()
        if self._lost_the_first:
            return
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.place.number}", "1")
            if self.place.number == 0 and not self.place.hosted:
                until = time.monotonic() + GRACE_SECONDS
                keys = [f"left/{number}" for number in range(self.place.count)]
                while time.monotonic() < until and not self.store.check(keys):
                    time.sleep(0.02)

    # inside

    def _meet(self, hosts: bool) -> Any:
        place = self.place
        try:
            store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage] -- documented
                place.address, place.port, None, hosts, timedelta(seconds=JOIN_SECONDS), False, multi_tenant=True
            )
        except (RuntimeError, ValueError) as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
            said = f"{place.address}:{place.port}"
            if "EADDRINUSE" in str(error) or "in use" in str(error):
                hint = "end what listens there, or set MASTER_PORT (torchrun: --master-port) to another number"
                raise ConfigError(f"the port of {said} is in use", where="$MASTER_PORT", hint=hint) from error
            hint = "MASTER_ADDR and MASTER_PORT must name the machine of the first worker, as all machines reach it"
            raise ConfigError(f"worker {place.number} can't meet the others at {said}", hint=hint) from error
        return dist.PrefixStore(f"perlhf/{place.attempt}", store)  # pyright: ignore[reportPrivateImportUsage]

    def _wait_for_all(self) -> None:
        missing, until = list(range(self.place.count)), time.monotonic() + JOIN_SECONDS
        while missing := [number for number in missing if not self.store.check([f"alive/{number}"])]:
            if failed := self.store.get("failed"):
                self._failure = Failure(**json.loads(failed))
                self.check()
            if time.monotonic() > until:
                named = ", ".join(map(str, missing[:5]))
                what = f"after {JOIN_SECONDS:g} seconds worker {named} of {self.place.count} hasn't come"
                raise ConfigError(what, hint="see whether all were started, and reach the address of the first")
            time.sleep(0.05)

    def _look(self) -> None:
        """A thread that gives signs, and looks for those of others."""
        others = list(range(1, self.place.count)) if self.place.number == 0 else [0]
        keys = ["failed", *(f"alive/{number}" for number in others)]
        seen: dict[int, tuple[bytes, float]] = {}
        count = 0
        while self._failure is None and not self._stopping.wait(PERIOD_SECONDS):
            count += 1
            try:
                self._own.set(f"alive/{self.place.number}", str(count))
                failed, *signs = self._own.multi_get(keys)
                self._answered = time.monotonic()
                if failed:
                    self._failure = Failure(**json.loads(failed))
                else:
                    self._notice(dict(zip(others, signs, strict=True)), seen)
            except RuntimeError:  # the store is gone or stopped, and with it whoever holds it
                if not self._stopping.is_set():
                    self._failure = self._failure or self._lost(0, "is gone, or what launched it")

    def _guard(self) -> None:
        """A thread that ends this worker where its main thread doesn't, or where the store no longer answers."""
        while self._failure is None and not self._stopping.wait(PERIOD_SECONDS):
            if time.monotonic() - self._answered > self._silent + 2 * PERIOD_SECONDS:
                self._failure = self._failure or self._lost(0, "was stopped, or what launched it")
                self._end_stopped(self._first)
        if self._failure is not None and not self._left:
            time.sleep(GRACE_SECONDS)
            if not self._left:
                self._end(self._failure)

    def _notice(self, signs: dict[int, bytes], seen: dict[int, tuple[bytes, float]]) -> None:
        now = time.monotonic()
        for number, sign in signs.items():
            if number not in seen or seen[number][0] != sign:
                seen[number] = sign, now
            elif now - seen[number][1] > self._silent and not self._own.check([f"left/{number}"]):
                what = "gives no sign any more: killed or stopped, by full memory perhaps, or its machine is gone"
                self._publish(self._lost(number, what))
                self._end_stopped(self._own.get(f"process/{number}").decode())
                return

    def _end_stopped(self, said: str) -> None:
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            _end_if_stopped(said)

    def _lost(self, number: int, what: str) -> Failure:
        hint = "the last checkpoint is kept; run the same command to continue"
        return Failure(number, ENDED, f"worker {number} of {self.place.count} {what}\n  try: {hint}", lost=True)

    def _publish(self, failure: Failure) -> Failure:
        """The failure that stands: the first that was published."""
        if self._failure is not None:
            return self._failure
        with contextlib.suppress(RuntimeError):
            stands = self.store.compare_set("failed", "", json.dumps(asdict(failure)))
            failure = Failure(**json.loads(stands))
        self._failure = failure
        return failure


def connection_broke(error: BaseException) -> bool:
    """Whether torch says by an error that another worker can't be reached any more."""
    backend = isinstance(error, dist.DistError | dist.DistBackendError)  # pyright: ignore[reportPrivateImportUsage]
    return backend or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _this_process() -> str:
    """Machine, process id and when it began, which tells it from a later one with the same id."""
    own = psutil.Process()
    return f"{socket.gethostname()} {own.pid} {own.create_time()}"


def _end_if_stopped(said: str) -> None:
    """Ends a worker of this machine that is stopped, and so can't end itself."""
    machine, process, began = said.split()
    if machine == socket.gethostname() and int(process) != os.getpid():
        found = psutil.Process(int(process))
        if str(found.create_time()) == began and found.status() == psutil.STATUS_STOPPED:
            found.kill()


def end_at_once(code: int) -> None:
    """Ends the process without waiting for threads of torch's that wait for workers which are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
