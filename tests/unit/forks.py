"""Work in a forked process, which has what was imported already."""

import os
import warnings
from collections.abc import Callable


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
