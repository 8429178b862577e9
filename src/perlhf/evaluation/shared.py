"""What the evaluations of the three stages share: intervals, sampling in batches (by this process or by a vLLM server),
progress.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perlhf.config.commands import EvaluateConfig
from perlhf.config.labelling import LabelAnswersConfig
from perlhf.config.loop import LoopConfig
from perlhf.config.stages import PolicyConfig
from perlhf.data.records import Record, Text
from perlhf.data.splits import read_splits
from perlhf.data.store import Records
from perlhf.errors import ConfigError, DataError
from perlhf.method import metrics
from perlhf.method.metrics import Statistic
from perlhf.method.packing import Ids
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import FinishedRun
from perlhf.model.model import Model
from perlhf.parallel.shares import balanced
from perlhf.parallel.workers import ALONE, Workers
from perlhf.rollout.local import Ends, Rollout, sample, uniforms
from perlhf.rollout.vllm.probe import PROBE_TOKENS
from perlhf.rollout.vllm.server import Server, seeds_of
from perlhf.runs.evaluations import Measured
from perlhf.system.machine import peak_memory_bytes
from perlhf.system.progress import Progress

ROWS = 32
"""Prompts sampled at a time."""
DRAWS_STEP = -2
"""Key of the random draws; training uses 0 and up, its validation -1."""
MAX_GAP: float = PolicyConfig.model_fields["max_sampler_gap"].default
"""Nats a token by which a server's log-probabilities may differ from ours, where no policy's configuration says."""


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
    server: Server | None = None
    """What samples, where that isn't this process (`server_of`)."""
    workers: Workers = ALONE
    """Who asks the server together."""

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
        prompts, longest = [self.prompts[i] for i in batch], self.max_completion_tokens
        given: dict[str, Any] = {"ends": self.ends, "temperature": temperature, "max_completion_tokens": longest}
        if self.server is None:
            draws = uniforms(self.seed, DRAWS_STEP, batch, samples, longest)
            return sample(self.model, prompts, adapter=adapter, draws=draws, **given)
        seeds = seeds_of(self.seed, DRAWS_STEP, batch, samples, range(len(batch)))
        ask = partial(self.server.sample, self.server.version(adapter), prompts, seeds, samples=samples, **given)
        return self._asked_once(ask, prompts, samples) if self.workers.in_step else ask()

    def texts(self, adapter: str | None, temperature: float, samples: int, name: str) -> list[list[str]]:
        """The texts of so many answers to each prompt, under a bar that says whose they are."""
        found: list[list[str]] = [[] for _ in self.prompts]
        with progress(len(self.batches), f"answers of {name}") as bar:
            for batch in self.batches:
                for number, texts in zip(batch, self.texts_of(batch, adapter, temperature, samples), strict=True):
                    found[number] = texts
                bar.advance()
        return found

    def texts_of(self, batch: Sequence[int], adapter: str | None, temperature: float, samples: int) -> list[list[str]]:
        """The texts of so many answers to each prompt that `batch` numbers."""
        texts = list(map(self.text, self.answer(batch, adapter, temperature, samples).completions))
        return [texts[start : start + samples] for start in range(0, len(texts), samples)]

    def _asked_once(self, ask: Callable[[], Rollout], prompts: Sequence[Ids], samples: int) -> Rollout:
        """What one worker is told, for all: a server may answer again with other tokens, and passes in step are of the
        same ones.
        """

        def told() -> tuple[list[list[int]], list[list[float]], list[bool]]:
            found = ask()
            return found.completions, found.sampler_logprobs, found.ended

        completions, logprobs, ended = self.workers.once(told)
        whole, states = [list(ids) for ids in prompts for _ in range(samples)], torch.zeros(0, self.model.hidden_size)
        return Rollout(whole, completions, logprobs, ended, states, (), self.ends)


@contextmanager
def server_of(
    config: EvaluateConfig | LoopConfig | LabelAnswersConfig,
    model: Model,
    encoder: Encoder,
    prompts: Sequence[Ids],
    adapters: Iterable[str | None],
    *,
    run: Path,
    key: Path,
    max_gap: float = MAX_GAP,
    workers: Workers = ALONE,
    slots: int = 0,
    temperature: float = 1.0,
) -> Iterator[Server | None]:
    """The server of `sampler: vllm`, which has been seen to sample with each of the adapters; None of `sampler: local`.

    What it was sent is unloaded and deleted at the end.

    Args:
        prompts: the probe answers the first two.
        adapters: all that will answer; None is the base.
        run: beside whose files adapters are written for it, where `vllm.directory` says nothing.
        key: a path that names them: no other process asks under it meanwhile.
        slots: adapters that the server must hold at a time, should that be more than answer here.
        temperature: as `Server.check`: of a policy that will be trained through it.

    Raises:
        ConfigError: an adapter that no files for it could hold; ServiceError, ConfigError, StaleSamplerError: as
            `Server.check`.
    """
    if config.sampler == "local":
        yield None
        return
    names = list(dict.fromkeys(name for name in adapters if name is not None))
    for name in names:
        if any(model.adapters[one].weights for one, _ in model.version(name)):
            raise ConfigError(
                f"adapter '{name}' holds all weights of a network (tuning: full), and a vLLM server is sent adapters",
                where="sampler",
                allowed="local",
                hint="leave sampler out",
            )
    # Whatever limits their completions, the probe's answers fit beside them.
    room = encoder.max_tokens - PROBE_TOKENS
    with Server(
        model,
        encoder,
        workers,
        url=config.vllm.url,
        directory=config.vllm.directory or run / "sampler",
        run=key,
        prompts=[ids[-room:] for ids in prompts[:2]],
        max_gap=max_gap,
        timeout_seconds=config.vllm.timeout_seconds,
    ) as server:
        server.check(*names, slots=max(slots, len(names)), temperature=temperature)
        yield server


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
