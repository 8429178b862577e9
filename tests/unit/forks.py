"""Work in forked processes, which have what was imported already."""

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def forked(work: Callable[[], object]) -> int:
    """Starts `work` in a fork and returns its process id; it ends there without whatever the parent does at its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: none of ours is used in it
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def talk(count: int, work: Callable[[Any], Any], directory: Path) -> list[Any]:
    """What each of `count` workers gives."""
    import torch

    from perlhf.parallel.together import together

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(number: int) -> None:
        os.environ |= {"WORLD_SIZE": str(count), "RANK": str(number), "LOCAL_WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with together() as workers:
            torch.save(work(workers), directory / f"{number}.pt")

    for child in [forked(lambda number=number: run(number)) for number in range(count)]:
        _, status = os.waitpid(child, 0)
        assert status == 0
    return [torch.load(directory / f"{number}.pt") for number in range(count)]
