"""Sampling one update ahead (`staleness: 1`): while an update is learned from, a copy of the adapter samples the next.

The copy is an adapter of the same base, `sampler`, with the policy's weights as they were when the update before began.
So update u learns from what the policy wrote after u - 2 updates (the first two: before any), and what it wrote counts
by the ratio of the policy that learns to the one that wrote (`method.losses.completion_ratio`). On a CPU a thread of
its own samples, or waits for a server that does (`sampler: vllm`); elsewhere completions are sampled in turn, when they
are asked for, by the same copy.

A checkpoint holds the copy: completions are a function of it, the seed and the update, and are sampled again.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch
from torch import Tensor

from perlhf.errors import DivergenceError
from perlhf.model.adapter import Adapter
from perlhf.model.model import Model
from perlhf.parallel.workers import Workers
from perlhf.rollout.completions import Share, Work, of_all
from perlhf.rollout.local import Rollout
from perlhf.system.console import note

SAMPLER = "sampler"


def add_sampler(model: Model, policy: str) -> None:
    """Adds the adapter that samples ahead, a frozen copy of the policy."""
    model.copy_adapter(policy, SAMPLER, "policy")
    model.freeze(SAMPLER)


class Ahead:
    """The completions of one update after the other, each sampled while the one before is learned from.

    `take` an update's completions, then `begin` the next one's. Leaving the context waits for nobody.

    Args:
        model: has the copy (`add_sampler`).
        ask: what samples an update, made in the caller's thread; called in another one.
        last: update after which nothing is sampled.
        learned: updates that the copy has learned from.
        elsewhere: whether another process computes what is sampled, so that a thread can wait for it on any device.
    """

    def __init__(
        self,
        model: Model,
        policy: str,
        ask: Callable[[int], Work],
        last: int,
        workers: Workers,
        learned: int,
        elsewhere: bool = False,
    ):
        self.learned, self.seconds = learned, 0.0
        """Updates that what samples has learned from; how long the completions that were taken last took to sample."""
        self._model, self._policy, self._ask, self._last, self._workers = model, policy, ask, last, workers
        self._before: tuple[list[Tensor], int] | None = None
        self._future: Future[Share] | None = None
        self._cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(1, "perlhf-sampler") if elsewhere or model.device.type == "cpu" else None
        if self._pool is None:
            what = f"staleness: 1 gains no time on {model.device.type}"
            note(f"{what}: it samples and learns in turn there, from the same older policy as on a CPU")

    @property
    def adapter(self) -> Adapter:
        """The copy that samples."""
        return self._model.adapters[SAMPLER]

    def take(self, update: int) -> Rollout:
        """The completions of an update, waited for, or sampled now where nobody began: the first, or after a restart.

        Raises:
            what sampling them says.
        """
        self._before = None  # should this fail, the copy stays what samples this update
        if self._future is None:
            share = self._sample(self._ask(update), torch.get_num_threads())
        else:
            share, self._future = self._future.result(), None
        return of_all(share, self._model.hidden_size, self._workers)

    def begin(self, update: int, learned: int) -> None:
        """Copies the policy as it is, which has learned from so many updates, and begins to sample an update."""
        own = self.adapter.tensors()
        self._before = [tensor.detach().clone() for tensor in own.values()], self.learned
        self._put([tensor.detach() for tensor in self._model.adapters[self._policy].tensors().values()], learned)
        if update <= self._last and self._pool is not None:
            self._future = self._pool.submit(self._sample, self._ask(update), torch.get_num_threads())

    def back(self) -> None:
        """Takes `begin` back where it was called: the update before isn't learned from after all."""
        self._stop()
        if self._before is not None:
            self._put(*self._before)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        if self._pool is not None:
            self._pool.shutdown()

    def _sample(self, work: Work, threads: int) -> Share:
        began = time.perf_counter()
        torch.set_num_threads(threads)  # a thread of OpenMP's has its own number, by which sums are added up
        share = work(cancelled=self._cancelled.is_set)
        self.seconds = time.perf_counter() - began
        return share

    @torch.no_grad()
    def _put(self, tensors: Sequence[Tensor], learned: int) -> None:
        assert self._future is None, "somebody samples with these weights"
        for own, tensor in zip(self.adapter.tensors().values(), tensors, strict=True):
            own.copy_(tensor)
        self.adapter.version += 1
        self.learned = learned

    def _stop(self) -> None:
        """Ends what is being sampled, within the time of a token."""
        if self._future is not None:
            self._cancelled.set()
            wait([self._future])
            self._cancelled.clear()
            self._future = None


def padded(rollout: Rollout, like: Tensor) -> Tensor:
    """The sampler's log-probabilities in the shape of `like` [batch, time], 0 beyond each completion."""
    out = torch.zeros(like.shape, device=like.device)
    for row, values in enumerate(rollout.sampler_logprobs):
        out[row, : len(values)] = torch.tensor(values, device=like.device)
    return out


def check_gap(gap: float, limit: float, update: int, elsewhere: bool) -> None:
    """Raises DivergenceError where sampler and policy differ by more than `limit` nats a token.

    Args:
        elsewhere: whether another engine sampled.
    """
    hint = "lower optim.learning_rate, or start again with staleness: 0"
    if elsewhere:
        hint = "have the server compute in this run's dtype, with --logprobs-mode processed_logprobs; else " + hint
    if not gap <= limit:
        raise DivergenceError(
            f"the policy's log-probabilities are {gap:.3g} nats a token from those it was sampled with, in the mean of "
            f"update {update}: too far for a ratio of the two to correct",
            where="max_sampler_gap",
            allowed=f"at most {limit:g}",
            hint=f"{hint}; the last checkpoint is kept",
        )
