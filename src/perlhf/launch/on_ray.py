"""Starts the workers of a command as actors of Ray, one for each bundle of a placement group: `perlhf launch --ray`.

Ray finds the places and keeps them; each actor runs the same command in a process of its own, with the environment that
torchrun would give it.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from perlhf.errors import ConfigError, WorkerError
from perlhf.launch.local import LOST, prepare
from perlhf.system.waiting import PARENT

PLACED_SECONDS = 300
"""How long is waited for a cluster to have room for all workers."""
REACHED_SECONDS = 10
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No statistics are sent, every line is shown, and a worker without a GPU leaves CUDA_VISIBLE_DEVICES as it is."""


class Worker:
    """What an actor does: one worker, in a process that ends with the actor."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._asked = threading.Event()

    def place(self) -> tuple[str, str, int]:
        """Its node, the address by which others reach it, and a port that is free there."""
        import ray  # pyright: ignore[reportMissingImports] -- an extra

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, words: Sequence[str], environment: Mapping[str, str], directory: str) -> int:
        """The command's exit code."""
        alive, ours = os.pipe()  # nobody writes: it is closed when this process ends, however
        ours_alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "perlhf", *words],
            env=ours_alone | dict(environment) | {PARENT: str(alive)},
            cwd=directory,
            pass_fds=(alive,),
            start_new_session=True,
        )
        os.close(alive)
        try:
            if self._asked.is_set():
                self.interrupt()
            return self._child.wait()
        finally:
            os.close(ours)

    def interrupt(self) -> None:
        """Ctrl-C for the command."""
        self._asked.set()
        if self._child is not None:
            self._child.send_signal(signal.SIGINT)


def launch(words: Sequence[str], workers: int, restarts: int = 0, address: str | None = None) -> int:
    """Runs the command `words` as so many actors of a cluster; the exit code of all, or of the first that failed.

    Args:
        words: of the command, such as `("policy", "recipe.yaml")`.
        restarts: how often all are started again after one was lost; they go on from the last checkpoint.
        address: of the cluster (`auto`: the one that this machine is part of); None starts one on this machine.

    Raises:
        ConfigError: Ray isn't installed, there is no such cluster, or it has no room for so many workers.
        WorkerError: workers were lost, more often than they may be started again.
    """
    os.environ.update(SETTINGS)
    try:
        import ray  # pyright: ignore[reportMissingImports] -- an extra
    except ImportError as error:
        raise ConfigError("Ray isn't installed", where="--ray", hint="pip install 'perlhf[ray]'") from error
    _check_reachable(address)
    local = {} if address else {"include_dashboard": False, "num_cpus": max(workers, os.cpu_count() or 1)}
    try:
        ray.init(address=address, logging_level=logging.ERROR, configure_logging=True, log_to_driver=True, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address) from error
    try:
        return _started(ray, words, workers, restarts)
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raises ConfigError where nobody listens at an address, for which Ray would wait for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), REACHED_SECONDS).close()
        except OSError as error:
            raise _no_cluster(address) from error


def _no_cluster(address: str | None) -> ConfigError:
    hint = "start one with `ray start --head`, or leave --address out for one on this machine"
    return ConfigError(f"no cluster of Ray's at {address}", where="--address", allowed="auto, or HOST:PORT", hint=hint)


def _started(ray: Any, words: Sequence[str], workers: int, restarts: int) -> int:
    from ray.util.placement_group import (  # pyright: ignore[reportMissingImports] -- an extra
        placement_group,
        remove_placement_group,
    )

    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    group = placement_group([{"CPU": 1, **({"GPU": 1} if gpus else {})}] * workers, strategy="PACK")
    if not group.wait(PLACED_SECONDS):
        there = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 0))
        what = f"the cluster has no room for {workers} workers: {there} {'GPUs' if gpus else 'CPUs'} in all"
        raise ConfigError(what, where="--workers", allowed=f"at most {there}", hint="start fewer, or wait for others")
    try:
        for attempt in range(restarts + 1):
            codes = _attempt(ray, group, words, workers, gpus, attempt)
            lost = [number for number, code in enumerate(codes) if code is None or code < 0 or code == LOST]
            if not lost or attempt == restarts:
                return _code(codes)
    finally:
        remove_placement_group(group)
    raise AssertionError("each attempt returns or is followed by another")


def _attempt(ray: Any, group: Any, words: Sequence[str], workers: int, gpus: int, attempt: int) -> list[int | None]:
    """Exit codes of all workers; None where an actor was lost."""
    from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports] -- an extra
        PlacementGroupSchedulingStrategy,
    )

    actors = [
        # Two calls at a time: one runs, one may interrupt it.
        ray.remote(Worker)
        .options(
            num_cpus=1,
            num_gpus=gpus,
            max_concurrency=2,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        )
        .remote()
        for number in range(workers)
    ]
    places = ray.get([actor.place.remote() for actor in actors])
    _, address, port = places[0]
    common = {"WORLD_SIZE": str(workers), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    common |= {"TORCHELASTIC_RESTART_COUNT": str(attempt)}
    prepare(common, workers)
    running = []
    for number, (actor, (node, _, _)) in enumerate(zip(actors, places, strict=True)):
        beside = [other for other, place in enumerate(places) if place[0] == node]
        own = {"RANK": str(number), "LOCAL_RANK": str(beside.index(number)), "LOCAL_WORLD_SIZE": str(len(beside))}
        running.append(actor.run.remote(list(words), common | own, os.getcwd()))
    try:
        return [_code_of(ray, one) for one in running]
    except KeyboardInterrupt:
        ray.get([actor.interrupt.remote() for actor in actors])
        return [_code_of(ray, one) for one in running]


def _code_of(ray: Any, running: Any) -> int | None:
    try:
        return ray.get(running)
    except ray.exceptions.RayActorError:
        return None


def _code(codes: Sequence[int | None]) -> int:
    """The exit code that workers ended with by themselves; 0 where all did well.

    Raises:
        WorkerError: none said what happened.
    """
    own = [code for code in codes if code is not None and code > 0]
    if own:
        return max(set(own), key=own.count)
    if all(code == 0 for code in codes):
        return 0
    gone = next(number for number, code in enumerate(codes) if code is None or code < 0)
    hint = "run the same command to continue from the last checkpoint"
    raise WorkerError(f"worker {gone} was lost, and with it all others\n  try: {hint}", LOST)
