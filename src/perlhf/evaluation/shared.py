"""What the evaluations of the three stages share: intervals, sampling in batches, progress."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from perlhf.config.commands import EvaluateConfig
from perlhf.data.records import Record, Text
from perlhf.data.splits import read_splits
from perlhf.data.store import Records
from perlhf.errors import DataError
from perlhf.method import metrics
from perlhf.method.metrics import Statistic
from perlhf.method.packing import Ids
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.open import FinishedRun
from perlhf.parallel.shares import balanced
from perlhf.parallel.workers import Workers
from perlhf.rollout.local import Ends, Rollout, sample, uniforms
from perlhf.runs.evaluations import Measured
from perlhf.system.machine import peak_memory_bytes
from perlhf.system.progress import Progress

ROWS = 32
"""Prompts sampled at a time."""
DRAWS_STEP = -2
"""Key of the random draws; training uses 0 and up, its validation -1."""


@contextmanager
def progress(total: int, description: str) -> Iterator[Progress]:
    """A bar with ETA on standard error; `advance()` after each of `total` parts."""
    bar = Progress(total, 0, description, peak_memory_bytes)
    with bar.shown():
        yield bar


def measure(statistic: Statistic, groups: Sequence[str], config: EvaluateConfig) -> Measured | None:
    """A statistic of all records with its cluster-bootstrap interval; None where undefined (as AUC of one class)."""
    try:
        value = statistic(np.arange(len(groups)))
    except DataError:
        return None
    if not np.isfinite(value):
        return None
    low, high = metrics.cluster_bootstrap(statistic, groups, config.bootstrap, config.seed)
    return Measured(value, low, high)


@dataclass(frozen=True)
class Sampling:
    """Held-out prompts, and how they are answered."""

    model: Model
    encoder: Encoder
    prompts: list[list[int]]
    max_completion_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""

    @cached_property
    def batches(self) -> list[list[int]]:
        """Numbers of the prompts in batches of at most `ROWS`, shortest first, so that little is padded."""
        order = sorted(range(len(self.prompts)), key=lambda i: (len(self.prompts[i]), i))
        return [order[start : start + ROWS] for start in range(0, len(order), ROWS)]

    def own(self, workers: Workers) -> list[list[int]]:
        """Those of the batches that this worker answers."""
        costs = [sum(len(self.prompts[i]) + self.max_completion_tokens for i in batch) for batch in self.batches]
        return [self.batches[i] for i in balanced(costs, workers.count)[workers.number]]

    @property
    def ends(self) -> Ends:
        """What ends an answer."""
        return Ends.of(self.encoder, self.stop)

    def text(self, completion: Ids) -> str:
        """An answer as it is shown: without end token and stop string."""
        return self.ends.text(completion)

    def answer(self, batch: Sequence[int], adapter: str | None, temperature: float, samples: int = 1) -> Rollout:
        """Completions of each prompt that `batch` numbers; draws depend on the seed and the prompt's number alone."""
        return sample(
            self.model,
            [self.prompts[i] for i in batch],
            adapter=adapter,
            draws=uniforms(self.seed, DRAWS_STEP, batch, samples, self.max_completion_tokens),
            ends=self.ends,
            temperature=temperature,
            max_completion_tokens=self.max_completion_tokens,
        )


def both_sides(run: FinishedRun, config: EvaluateConfig, kinds: Sequence[str]) -> tuple[Sequence[Record], Records]:
    """The records that a run was trained on (none where nobody knows), and those that it is evaluated on.

    Its own data are read once.

    Raises:
        DataError: as `splits.load`.
    """
    trained = run.config.data
    if run.foreign:
        return [], read_splits(config.data or trained, kinds).of(config.split)
    found = read_splits(trained, kinds)
    asked = found if config.data in (None, trained) else read_splits(config.data, kinds)
    return found.of("train"), asked.of(config.split)


def seen_groups(records: Iterable[Record], trained_on: Iterable[Record]) -> int:
    """Number of groups of `records` that the run was trained on."""
    asked = {record.group for record in records}
    return len(asked & {record.group for record in trained_on if record.group in asked})


def plain(text: Text) -> str | list[dict[str, Any]]:
    """A text as JSON holds it."""
    return text if isinstance(text, str) else [dict(message) for message in text]
