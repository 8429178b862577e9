"""The completions of a policy's prompts, sampled and scored: by each of several workers its share, known to all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perlhf.config.stages import PolicyConfig
from perlhf.data import order
from perlhf.data.records import Prompt
from perlhf.method import shaping
from perlhf.method.packing import Ids, Packing
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.parallel.shares import balanced
from perlhf.parallel.workers import ALONE, Workers
from perlhf.rollout import local
from perlhf.rollout.functions import TrainerState
from perlhf.rollout.local import Ends, Rollout, probe, uniforms
from perlhf.rollout.scorers import Scorers
from perlhf.rollout.vllm.server import Server, seeds_of


@dataclass(frozen=True)
class Setup:
    """What every step uses and nothing changes."""

    config: PolicyConfig
    model: Model
    encoder: Encoder
    scorers: Scorers
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    """Held-out prompts that choose the checkpoint to keep."""
    reference: str | None
    reported_on: Sequence[Prompt] = ()
    """Held-out prompts that choose nothing: what is kept is reported on them."""
    workers: Workers = ALONE
    """Who shares each update."""
    server: Server | None = None
    """What samples, where that isn't this process (`sampler: vllm`)."""

    @property
    def packing(self) -> Packing:
        """How the network computes sequences together."""
        return self.model.packing(self.config.packing)


@dataclass(frozen=True)
class Centre:
    """The reference's scores before training: what is subtracted, and the price of a missing end token."""

    mean: float
    std: float
    penalty: float
    members: list[list[float]] | None = None
    """Mean and deviation of each reward's own scores, where combining them needs these (`Scorers.on_level`)."""

    def level(self, scorers: Scorers) -> Scorers:
        """The scorers with their members at the levels that were found before training."""
        if self.members is None:
            return scorers
        return replace(scorers, levels=tuple((mean, deviation) for mean, deviation in self.members))


@dataclass(frozen=True)
class Scored:
    """Completions and what they are paid."""

    rollout: Rollout
    scores: NDArray[np.float64]
    """As the rewards combine [batch], before centring and penalty; nan where no source gave one."""
    paid: NDArray[np.float64]
    """Centred (or `bounded`), missing ends penalised: [batch]; 0 where there is no score."""
    disagreement: float | None = None
    """Of the reward models about completions of one prompt (`shaping.disagreement`), where the configuration asks."""

    @property
    def given(self) -> NDArray[np.bool_]:
        """Which completions have a score: [batch]. From the others nothing is learned."""
        return ~np.isnan(self.scores)


@dataclass(frozen=True)
class Share:
    """What this worker sampled of an update's completions."""

    prompts: Sequence[Ids]
    """All of them, with `samples` completions each."""
    samples: int
    own: Sequence[int]
    """Places in `prompts` of those that were sampled here."""
    rollout: Rollout | None
    """Their completions; None where there are none."""
    ends: Ends


Work = Callable[..., Share]
"""Samples this worker's share; `cancelled`, its only argument, may be left out (`rollout.local.sample`)."""


def prompt_numbers(setup: Setup, step: int) -> list[int]:
    """Of the prompts of an update."""
    return order.cycle(len(setup.prompts), setup.config.prompts_per_update, step, setup.config.seed)


def asked(setup: Setup, adapter: str, step: int) -> Work:
    """What samples the completions of an update with an adapter, and proves that it did."""
    numbers = prompt_numbers(setup, step)
    check = proof(setup, adapter)
    prompts, samples = [setup.prompts[i] for i in numbers], setup.config.completions_per_prompt
    return to_sample(setup, prompts, adapter, samples, step, numbers, check)


def proof(setup: Setup, adapter: str) -> Callable[[Rollout], None]:
    """What proves that a rollout was sampled from the adapter as it is; a server's versions are probed themselves."""
    return partial(probe, setup.model, adapter=adapter) if setup.server is None else lambda own: None


def to_sample(
    setup: Setup,
    prompts: Sequence[Prompt],
    adapter: str | None,
    samples: int,
    step: int,
    numbers: Sequence[int],
    check: Callable[[Rollout], None],
) -> Work:
    """What samples this worker's share of `samples` completions of each prompt: `local.sample`, or a server that gets
    the adapter as it is now, from all workers together.

    Raises:
        StaleSamplerError, ServiceError, ConfigError, StorageError: as `Server.version`.
    """
    config, longest = setup.config, setup.config.max_completion_tokens
    ids = [setup.encoder.cut_prompt(record.prompt, longest, record.tools) for record in prompts]
    ends = Ends.of(setup.encoder, config.stop)
    given: dict[str, Any] = {"ends": ends, "temperature": config.temperature, "max_completion_tokens": longest}
    version = None if setup.server is None else setup.server.version(adapter)

    def sample(own: Sequence[int], cancelled: Callable[[], bool]) -> Rollout:
        chosen = [ids[at] for at in own]
        if setup.server is None or version is None:
            draws = uniforms(config.seed, step, numbers, samples, longest, own)
            own_given = given | {"adapter": adapter, "draws": draws, "max_rows": config.max_rows}
            return local.sample(setup.model, chosen, cancelled=cancelled, **own_given)
        seeds = seeds_of(config.seed, step, numbers, samples, own)
        return setup.server.sample(version, chosen, seeds, samples=samples, cancelled=cancelled, **given)

    in_step = setup.workers.in_step and setup.server is None
    shared = {"longest": longest, "ends": ends, "workers": setup.workers, "in_step": in_step, "check": check}
    return partial(sample_share, sample, ids, samples, **shared)


def sample_completions(
    setup: Setup,
    prompts: Sequence[Prompt],
    adapter: str | None,
    samples: int,
    step: int,
    numbers: Sequence[int],
    check: Callable[[Rollout], None] = lambda own: None,
) -> Rollout:
    """`samples` completions of each prompt; draws are keyed by the seed, the step and the prompt's number.

    Args:
        check: is called with what this worker sampled.
    """
    share = to_sample(setup, prompts, adapter, samples, step, numbers, check)()
    return of_all(share, setup.model.hidden_size, setup.workers)


def member_scores(setup: Setup, rollout: Rollout, prompts: Sequence[Prompt], done: int) -> NDArray[np.float64]:
    """Scores [members, batch], nan where one gave none; each prompt has equally many completions.

    Args:
        done: updates before this rollout, for functions that ask.

    Raises:
        RewardFunctionError, ServiceError, Interrupted: as the scorers say.
    """
    config, samples = setup.config, len(rollout.completions) // len(prompts)
    records, state = [record for record in prompts for _ in range(samples)], TrainerState(done, config.updates)
    given = rollout.prompts, rollout.completions, records, config.microbatch_tokens, setup.packing, state
    return setup.scorers.members(setup.model, setup.encoder, *given, ends=rollout.ends, workers=setup.workers)


@torch.no_grad()
def score(
    setup: Setup,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    centre: Centre,
    done: int,
    against: NDArray[np.float64] | None = None,
) -> Scored:
    """What each completion is paid: its score less the reference's mean, and less the penalty where no end came.

    Args:
        against: scores of the reference's answers to the prompts, where pay is `bounded` by them: [prompts].
    """
    table = member_scores(setup, rollout, prompts, done)
    raw = setup.scorers.combined(table)
    samples = len(raw) // len(prompts)
    level = raw - centre.mean if against is None else shaping.bounded(raw, np.repeat(against, samples))
    paid = level - np.where(rollout.ended, 0.0, centre.penalty)
    spread = shaping.disagreement(table, samples) if setup.config.max_disagreement is not None and samples > 1 else None
    return Scored(rollout, raw, np.where(np.isnan(raw), 0.0, paid), spread)


def reference_scores(
    setup: Setup, prompts: Sequence[Prompt], centre: Centre, step: int, numbers: Sequence[int]
) -> NDArray[np.float64]:
    """Scores of one answer of the reference to each prompt, [prompts], with the draws of the first sample.

    Where there is none, the reference's mean stands for it.
    """
    rollout = sample_completions(setup, prompts, setup.reference, 1, step, numbers)
    with torch.no_grad():
        found = setup.scorers.combined(member_scores(setup, rollout, prompts, max(0, step - 1)))
    return np.where(np.isnan(found), centre.mean, found)


def sample_share(
    sample: Callable[[Sequence[int], Callable[[], bool]], Rollout],
    prompts: Sequence[Ids],
    samples: int,
    *,
    longest: int,
    ends: Ends,
    workers: Workers,
    in_step: bool,
    check: Callable[[Rollout], None],
    cancelled: Callable[[], bool] = lambda: False,
) -> Share:
    """This worker's share of `samples` completions of each prompt (`of_all`).

    Args:
        sample: gives those of the prompts at these places; asks its second argument whether they are still wanted.
        longest: tokens of a completion.
        ends: what ends them.
        in_step: whether who has no share samples for nothing, beside the others.
        check: is called with what this worker sampled itself.

    Raises:
        what `sample` and `check` say.
    """
    own = balanced([len(ids) + samples * longest for ids in prompts], workers.count)[workers.number]
    rollout = None
    if computed := own or ([0] if in_step else []):
        rollout = sample(computed, cancelled)
        check(rollout)
    return Share(prompts, samples, own, rollout, ends)


def of_all(share: Share, hidden_size: int, workers: Workers) -> Rollout:
    """The completions of all workers, in the order of the prompts; their states stay where they are."""
    rollout, samples, count = share.rollout, share.samples, len(share.prompts) * share.samples
    if workers.count == 1:
        assert rollout is not None, "no prompt"
        return rollout
    numbers = [place * samples + sample for place in share.own for sample in range(samples)]
    given = ([], [], [])
    if share.own and rollout is not None:
        given = rollout.ended, rollout.completions, rollout.sampler_logprobs
    told = {number: [int(ended), *ids] for number, ended, ids in zip(numbers, *given[:2], strict=True)}
    whole = workers.rows(told)
    # Floats travel as the bits that they are.
    bits = {n: np.array(row, np.float64).view(np.int64).tolist() for n, row in zip(numbers, given[2], strict=True)}
    logprobs = workers.rows(bits)
    return Rollout(
        [list(ids) for ids in share.prompts for _ in range(samples)],
        [whole[number][1:] for number in range(count)],
        [np.array(logprobs[number], np.int64).view(np.float64).tolist() for number in range(count)],
        [bool(whole[number][0]) for number in range(count)],
        torch.zeros(0, hidden_size),
        () if rollout is None else rollout.adapter_version,
        share.ends,
    )
