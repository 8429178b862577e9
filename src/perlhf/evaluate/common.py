"""What the evaluations of the three stages share: intervals, plain copies of texts, progress."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perlhf import statistics
from perlhf.config import EvaluateConfig
from perlhf.data.records import Record, Text
from perlhf.environment import peak_memory_bytes
from perlhf.errors import DataError
from perlhf.progress import Progress

Statistic = Callable[[NDArray[np.intp]], float]
"""A number from the records at these indices."""
Measured = dict[str, float]
"""`value`, `low`, `high`."""


@contextmanager
def progress(total: int, description: str) -> Iterator[Progress]:
    """A bar with ETA on standard error; `advance()` after each of `total` parts."""
    bar = Progress(total, 0, description, peak_memory_bytes)
    with bar.shown():
        yield bar


def with_interval(statistic: Statistic, groups: Sequence[str], config: EvaluateConfig) -> Measured | None:
    """A statistic of all records with its cluster-bootstrap interval; None where it isn't defined (AUC of one class)."""
    try:
        value = statistic(np.arange(len(groups)))
    except DataError:
        return None
    if not np.isfinite(value):
        return None
    low, high = statistics.cluster_bootstrap(statistic, groups, config.bootstrap, config.seed)
    return {"value": value, "low": low, "high": high}


def mean_of(values: NDArray[np.float64]) -> Statistic:
    """The mean, as a statistic."""
    return lambda indices: float(values[indices].mean())


def seen_groups(records: Iterable[Record], trained_on: Iterable[Record]) -> int:
    """Number of groups of `records` that the run was trained on."""
    return len({record.group for record in records} & {record.group for record in trained_on})


def plain(text: Text) -> str | list[dict[str, str]]:
    """A text as JSON holds it."""
    return text if isinstance(text, str) else [dict(message) for message in text]
