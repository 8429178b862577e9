"""Whether a server computes with the weights that it was sent: its greedy answers and log-probabilities, and ours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perlhf.method.packing import Ids
from perlhf.model.model import Model
from perlhf.rollout import local
from perlhf.rollout.local import Ends

Answer = tuple[list[int], list[float]]
"""Sampled tokens, and the log-probability of each."""

PROBE_TOKENS = 8
"""Of each greedy answer."""
SURE = 4.0
"""Deviations of the rounding noise by which log-probabilities must point to other weights."""
LEAST_NOISE = 1e-4
"""Nats of rounding that are always there."""


@dataclass(frozen=True)
class Greedy:
    """The local engine's greedy answers to the probe's prompts, all of one length."""

    tokens: list[list[int]]
    logprobs: Tensor
    """Of every token of the vocabulary at each place: float32 [prompt, time, vocab]."""


@torch.no_grad()
def logprobs_of(
    model: Model, adapter: str | None, prompts: Sequence[Ids], completions: Sequence[Ids], temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of all tokens at each place of completions of one length: float32 [prompt, time, vocab]."""
    held = model.hold(adapter)
    pairs = zip(prompts, completions, strict=True)
    states, _ = model.prefill([[*prompt, *ids[:time]] for prompt, ids in pairs for time in range(len(ids))], held)
    logits = model.logits(states, held) / temperature
    return logits.log_softmax(-1).view(len(prompts), -1, logits.shape[-1]).cpu()


def greedy_of(model: Model, adapter: str | None, prompts: Sequence[Ids], length: int) -> Greedy:
    """The local engine's greedy answers of so many tokens, end tokens or not."""
    draws = torch.zeros(len(prompts), length, dtype=torch.float64)
    given: dict[str, Any] = {"adapter": adapter, "draws": draws, "ends": Ends(()), "temperature": 0.0}
    found = local.sample(model, prompts, max_completion_tokens=length, **given).completions
    return Greedy(found, logprobs_of(model, adapter, prompts, found))


def differs(greedy: Greedy, found: Sequence[Answer], tie: float) -> str | None:
    """The first token of the answers that is neither ours nor as likely; None where there is none.

    Args:
        tie: nats by which ours may be likelier, since rounding chooses either of two that are so near.
    """
    for tokens, table, (ids, _) in zip(greedy.tokens, greedy.logprobs, found, strict=True):
        if len(ids) != len(tokens):
            return f"it gave {len(ids)} tokens of {len(tokens)}"
        for place, (ours, theirs) in enumerate(zip(tokens, ids, strict=True)):
            if ours == theirs:
                continue
            apart = (table[place, ours] - table[place, theirs]).item() if theirs < table.shape[-1] else math.inf
            if apart > tie:
                return f"token {place + 1} of a greedy answer is {theirs}, where {ours} is {apart:.3g} nats likelier"
            break  # a tie, after which both go on from other tokens
    return None


def gap(ours: Greedy, found: Sequence[Answer]) -> float:
    """Mean difference of their log-probabilities and ours, nats a token, as far as the tokens are the same."""
    known = _known(ours, found)
    return sum(abs(found[row][1][place] - value) for (row, place), value in known.items()) / max(1, len(known))


def follows(found: Sequence[Answer], now: Greedy, other: Greedy) -> bool:
    """Whether log-probabilities are those of other weights, rather than of those as they are now.

    r = found - now and d = other - now at the same tokens: of the share t = <r, d> / <d, d> the noise r - t d leaves a
    deviation of its own over |d|. Where t is nearer to 1 (other) than to 0 (now) by more than `SURE` of these, yes.
    Versions that differ by less than rounding can't be told apart.
    """
    ours, theirs = _known(now, found), _known(other, found)
    places = [place for place in ours if place in theirs]
    r = torch.tensor([found[row][1][place] - ours[row, place] for row, place in places], dtype=torch.float64)
    d = torch.tensor([theirs[place] - ours[place] for place in places], dtype=torch.float64)
    size = d.norm().item()
    if not places or not size:
        return False
    share = (r @ d).item() / size**2
    noise = max(LEAST_NOISE, (r - share * d).square().mean().sqrt().item())
    return share > 0.5 and share * size > SURE * noise


def _known(ours: Greedy, found: Sequence[Answer]) -> dict[tuple[int, int], float]:
    """Our log-probabilities of their tokens, by row and place, as long as all tokens before are ours, too."""
    out: dict[tuple[int, int], float] = {}
    for row, (tokens, table, (ids, _)) in enumerate(zip(ours.tokens, ours.logprobs, found, strict=True)):
        for place, (token, theirs) in enumerate(zip(tokens, ids, strict=False)):
            if theirs < table.shape[-1]:
                out[row, place] = table[place, theirs].item()
            if theirs != token:
                break
    return out
