"""How long a thread without work spins before it sleeps: what OpenMP is told before torch loads it.

A network of this size is thousands of short parallel regions a second. Between two of them a thread spins, by default
for milliseconds, since waking costs some 10 microseconds. Alone on a machine that is the fastest; beside other jobs
threads spin for one that isn't running, and take its core from it. A short spin is hardly slower on a quiet machine
(docs/performance.md, "Beside other jobs").
"""

import os
import sys
from collections.abc import MutableMapping

SHORT = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
"""GNU's library, which torch brings along on Linux, counts turns of a loop (a few tens of microseconds); LLVM's and
Intel's count milliseconds, 200 by default."""
VARIABLES = ("OMP_WAIT_POLICY", *SHORT)
"""Whoever sets one of them has decided."""


def spin_shortly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets `SHORT`, unless the user set one of `VARIABLES` or torch is loaded: its library read them by then."""
    if "torch" not in sys.modules and not any(name in environment for name in VARIABLES):
        environment.update(SHORT)


def waiting(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Those of `VARIABLES` that are set, as a run's manifest tells them."""
    return {name: environment[name] for name in VARIABLES if name in environment}
