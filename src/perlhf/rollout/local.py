"""Local sampler: the same network and adapters that train, with a key/value cache.

Each prompt is computed once for its K completions, finished rows are dropped, the end token is kept. Randomness is
keyed by (seed, step, prompt, sample), so that a rollout doesn't depend on how rows are batched beyond rounding.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from perlhf.errors import DivergenceError, StaleSamplerError
from perlhf.method.packing import Ids
from perlhf.model.model import Model
from perlhf.rollout.decoding import Decoding

VOCAB_BLOCK = 256
"""Tokens whose probabilities are added up together before one of them is drawn."""


@dataclass(frozen=True)
class Rollout:
    """Completions of prompts, ordered by prompt, then sample."""

    prompts: list[list[int]]
    """Prompt of each completion."""
    completions: list[list[int]]
    sampler_logprobs: list[list[float]]
    ended: list[bool]
    """False where the completion was stopped by its length."""
    prompt_states: Tensor
    """[prompt, hidden] states that the first tokens were sampled from: what the probe compares."""
    adapter_version: tuple[tuple[str, int], ...]
    """Of the adapters that were active: `Model.version`."""

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return sum(map(len, self.completions))


def uniforms(seed: int, step: int, prompts: Sequence[int], samples: int, length: int) -> Tensor:
    """Random numbers in [0, 1), float64 [prompt * sample, length], each row keyed by (seed, step, prompt, sample).

    A prompt that occurs again goes on counting its samples, so that no two rows are equal.
    """
    rows = []
    seen: Counter[int] = Counter()
    for prompt in prompts:
        first = seen[prompt]
        seen[prompt] += samples
        for sample in range(first, first + samples):
            key = hashlib.sha256(f"{seed}:{step}:{prompt}:{sample}".encode()).digest()[:16]
            rows.append(np.random.Generator(np.random.Philox(key=int.from_bytes(key))).random(length))
    return torch.from_numpy(np.array(rows).reshape(len(prompts) * samples, length))


def sample(
    model: Model,
    prompts: Sequence[Ids],
    *,
    adapter: str | None,
    draws: Tensor,
    end_id: int,
    temperature: float,
    max_completion_tokens: int,
) -> Rollout:
    """Samples `len(draws) / len(prompts)` completions of each prompt.

    Args:
        draws: uniform numbers [prompt * sample, max_completion_tokens] (`uniforms`).
        temperature: 0 takes the most likely token; its log-probabilities are then at temperature 1.
    """
    samples = len(draws) // len(prompts)
    with model.holding(adapter):
        states, cache = model.prefill(prompts, adapter)
        cache.fork(samples, max_completion_tokens)
        decoding = Decoding(model, cache, adapter)
        prompt_states = states
        states = states.repeat_interleave(samples, 0)
        draws = draws.to(model.device)
        rows = torch.arange(len(draws), device=model.device)
        completions: list[list[int]] = [[] for _ in draws]
        logprobs: list[list[float]] = [[] for _ in draws]
        going = [True] * len(draws)
        for time in range(max_completion_tokens):
            tokens, chosen = draw(model.logits(states, adapter), draws[rows, time], temperature)
            numbers = rows.tolist()
            for row, token, logprob in zip(numbers, tokens.tolist(), chosen.tolist(), strict=True):
                if going[row]:
                    completions[row].append(token)
                    logprobs[row].append(logprob)
                    going[row] = token != end_id
            left = [at for at, row in enumerate(numbers) if going[row]]
            if not left or time + 1 == max_completion_tokens:
                break
            if decoding.drops(len(left), len(rows)):
                kept = torch.tensor(left, device=model.device)
                decoding.keep(kept)
                rows, tokens = rows[kept], tokens[kept]
            states = decoding(tokens)
    return Rollout(
        [list(ids) for ids in prompts for _ in range(samples)],
        completions,
        logprobs,
        [ids[-1] == end_id for ids in completions],
        prompt_states,
        model.version(adapter),
    )


@torch.no_grad()
def probe(model: Model, rollout: Rollout, adapter: str | None) -> None:
    """Proves that `rollout` was sampled from `adapter` as it is now.

    The version must agree, and the states of the same prompts in the same batch layout must be equal bit for bit.

    Raises:
        StaleSamplerError: the sampler used other weights.
        DivergenceError: the adapter's states aren't finite.
    """
    if not torch.isfinite(rollout.prompt_states).all():
        raise DivergenceError(
            f"adapter '{adapter}' gives states that are not finite",
            allowed="finite numbers",
            hint="lower optim.learning_rate; the last checkpoint is kept",
        )
    unique = [
        ids for i, ids in enumerate(rollout.prompts) if i % (len(rollout.prompts) // len(rollout.prompt_states)) == 0
    ]
    states, _ = model.prefill(unique, adapter)
    same_version = rollout.adapter_version == model.version(adapter)
    if same_version and torch.equal(states, rollout.prompt_states):
        return
    worst = (states.float() - rollout.prompt_states.float()).abs().max().item()
    raise StaleSamplerError(
        f"the sampler did not use the current adapter '{adapter}': versions {'agree' if same_version else 'differ'}, "
        f"prompt states differ by up to {worst:.3g}",
        allowed="equal versions and bit-equal states on the same batch layout",
        hint="sync the sampler's weights before every rollout",
    )


def draw(logits: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: tokens [batch] and their log-probabilities from float32 logits [batch, vocab].

    Cumulative sums are float64, over blocks of the vocabulary (whose own sums are float32) and then inside the block
    that was hit.
    """
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    top, likeliest = logits.max(-1, keepdim=True)
    weights = (logits - top).exp_()
    if missing := -weights.shape[-1] % VOCAB_BLOCK:
        weights = F.pad(weights, (0, missing))
    blocks = weights.unflatten(-1, (-1, VOCAB_BLOCK))
    cumulative = blocks.sum(-1).double().cumsum(-1)
    total = cumulative[:, -1:]
    if temperature == 0:
        tokens = likeliest
    else:
        wanted = draws[:, None] * total
        block = _first_above(cumulative, wanted)
        before = F.pad(cumulative, (1, 0)).gather(-1, block)
        inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).double().cumsum(-1)
        tokens = (block * VOCAB_BLOCK + _first_above(inside, wanted - before)).clamp_max(logits.shape[-1] - 1)
    logprobs = (logits.gather(-1, tokens) - top).double() - total.log()
    return tokens.squeeze(-1), logprobs.squeeze(-1).float()


def _first_above(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """Numbers [batch, 1] of the first entries above `wanted`; rounding of the sum's end never picks a zero weight.

    Where there is none, since a weight isn't a number, the last: `probe` says what is wrong.
    """
    below_the_end = torch.nextafter(cumulative[:, -1:], torch.zeros_like(wanted))
    found = torch.searchsorted(cumulative, torch.minimum(wanted, below_the_end), right=True)
    return found.clamp_max(cumulative.shape[-1] - 1)
