"""From scores to advantages: pure functions over [batch, time] tensors of completion tokens.

One KL convention: k1 = logprobs - ref_logprobs per token, subtracted from the reward.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def token_rewards(
    scores: Float[Tensor, " batch"],
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    completion_mask: Bool[Tensor, "batch time"],
    *,
    kl_coef: float,
) -> Float[Tensor, "batch time"]:
    """-kl_coef * (logprobs - ref_logprobs) at each token, plus (1 - kl_coef) * score at the last one.

    The objective J of arXiv 2403.10704, section 3.3. Detached: the KL enters through the reward, not through its own
    gradient. A row without tokens pays nothing.
    """
    kl = (logprobs - ref_logprobs).detach()
    rewards = torch.where(completion_mask, -kl_coef * kl, 0.0)
    lengths = completion_mask.sum(-1)
    rows = torch.nonzero(lengths > 0).squeeze(-1)
    rewards[rows, lengths[rows] - 1] += (1 - kl_coef) * scores[rows].detach()
    return rewards


def returns_to_go(rewards: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """Z_t = sum of rewards from t on (gamma = 1). Rewards after the completion must be 0."""
    return rewards.flip(-1).cumsum(-1).flip(-1)


def gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    completion_mask: Bool[Tensor, "batch time"],
    *,
    gae_lambda: float,
) -> Float[Tensor, "batch time"]:
    """Generalised advantage estimation (arXiv 1506.02438) with gamma = 1; lambda = 1 is returns_to_go - values.

    `values[t]` is read where token t is predicted; the value after the last token is 0.
    """
    values = torch.where(completion_mask, values.detach(), 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = torch.where(completion_mask, rewards + following - values, 0.0)
    advantages = torch.zeros_like(delta)
    running = torch.zeros_like(delta[:, :1]).squeeze(-1) if delta.shape[1] else delta.sum(-1)
    for time in reversed(range(delta.shape[1])):
        running = delta[:, time] + gae_lambda * running
        advantages[:, time] = running
    return torch.where(completion_mask, advantages, 0.0)


def group_baseline(
    totals: Float[Tensor, " batch"],
    group_size: int,
    *,
    baseline: Literal["leave_one_out", "group_mean"],
    scored: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean total reward of a prompt's other completions (`leave_one_out`) or of all of them (`group_mean`).

    Leave-one-out is RLOO's (arXiv 2402.14740). Rows are ordered by prompt, `group_size` completions each. Where some
    weren't `scored`, means are over those that were; a completion that has no other one is its own baseline.
    """
    grouped = totals.view(len(totals) // group_size, group_size)
    assert group_size > 1 or baseline == "group_mean", "leave_one_out needs two completions of a prompt"
    if scored is not None and not scored.all():
        counted = scored.view(grouped.shape)
        grouped = torch.where(counted, grouped, 0.0)
        number = counted.sum(-1, keepdim=True)
        if baseline == "group_mean":
            return (grouped.sum(-1, keepdim=True) / number.clamp_min(1)).expand_as(grouped).reshape(-1)
        others = (grouped.sum(-1, keepdim=True) - grouped) / (number - counted.int()).clamp_min(1)
        return torch.where(number > 1, others, grouped).reshape(-1)
    if baseline == "group_mean":
        return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(-1)
    return ((grouped.sum(-1, keepdim=True) - grouped) / (group_size - 1)).reshape(-1)


def normalise(
    advantages: Float[Tensor, "batch time"],
    completion_mask: Bool[Tensor, "batch time"],
    how: Literal["none", "center", "whiten"],
) -> Float[Tensor, "batch time"]:
    """`center` subtracts the mean over all tokens of the update, `whiten` also divides by their standard deviation.

    Masked positions become 0. So do whitened advantages that are equal but for float32 rounding: a deviation below 1e-6
    of the largest advantage (or of 1) counts as none.
    """
    if how == "none" or not completion_mask.any():
        return advantages
    chosen = advantages[completion_mask]
    centred = advantages - chosen.mean()
    if how == "whiten":
        deviation = chosen.std(correction=0)
        rounding = 1e-6 * chosen.abs().max().clamp_min(1.0)
        centred = centred / deviation if deviation > rounding else torch.zeros_like(centred)
    return torch.where(completion_mask, centred, 0.0)


def completion_kl(
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    completion_mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, " batch"]:
    """k1 estimate of KL(policy || reference) of each completion: sum_t logprobs - ref_logprobs."""
    return torch.where(completion_mask, logprobs - ref_logprobs, 0.0).sum(-1).detach()
