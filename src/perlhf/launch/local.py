"""Starts the workers of a command on this machine, as torchrun does: `perlhf launch --workers 4 policy recipe.yaml`.

Each runs the command itself and finds its place in the environment (`perlhf.parallel.place`); nothing else of perlhf
knows what started it.
"""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from perlhf.errors import WorkerError
from perlhf.system.machine import available_cores

SHUTDOWN_SECONDS = 3600
"""What workers get to end their update and save after Ctrl-C; where one failed they end by themselves, at once."""
LOST = 3
"""Exit code where workers were killed: training had to stop."""


def launch(words: Sequence[str], workers: int, restarts: int = 0) -> int:
    """Runs the command `words` as so many workers of this machine; the exit code of all, or of the first that failed.

    Args:
        words: of the command, such as `("policy", "recipe.yaml")`.
        restarts: how often all are started again after one failed; they go on from the last checkpoint.

    Raises:
        WorkerError: all were killed, so that none could say anything.
    """
    prepare(os.environ, workers)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What went wrong is told by the workers.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="perlhf-launch-") as logs:
        # Of newer versions of torch alone; older ones give 30 seconds.
        patient: dict[str, Any] = (
            {"shutdown_timeout": SHUTDOWN_SECONDS} if hasattr(LaunchConfig, "shutdown_timeout") else {}
        )
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=restarts,
            **patient,
        )
        try:
            # -P: else a file of the working directory, such as yaml.py, would be run as a library.
            elastic_launch(config, sys.executable)("-P", "-m", "perlhf", *words)
        except ChildFailedError as error:
            return _code({number: failure.exitcode for number, failure in error.failures.items()})
        except (SignalException, KeyboardInterrupt):
            return 130
    return 0


def prepare(environment: MutableMapping[str, str], workers: int) -> None:
    """Sets what each worker finds: its share of the cores, unless that is said, and a quiet torch."""
    environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // workers)))
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _code(codes: Mapping[int, Any]) -> int:
    """The exit code that most workers ended with by themselves.

    Raises:
        WorkerError: none did.
    """
    own = Counter(code for code in codes.values() if code > 0)
    if own:
        return own.most_common(1)[0][0]
    number, code = next(iter(codes.items()))
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = "run the same command to continue from the last checkpoint"
    raise WorkerError(f"worker {number} was ended by {name}, and with it all others\n  try: {hint}", LOST)
