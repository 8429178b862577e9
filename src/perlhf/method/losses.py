"""Losses as pure functions. Each returns `(loss, metrics)`; metrics are detached sums.

The loss is a sum over its arguments divided by `divisor`, the number of items in the whole update, so that adding the
losses of micro-batches gives the update's loss.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Metrics = dict[str, float]


def bradley_terry(
    chosen_scores: Float[Tensor, " batch"],
    rejected_scores: Float[Tensor, " batch"],
    *,
    weights: Float[Tensor, " batch"],
    margins: Float[Tensor, " batch"],
    label_smoothing: float,
    divisor: int | float,
) -> tuple[Float[Tensor, ""], Metrics]:
    """-log sigmoid(r(x, y_w) - r(x, y_l) - margin), the paper's pairwise loss (arXiv 2403.10704, section 3).

    `label_smoothing` eps mixes in the swapped pair: (1 - eps) * loss + eps * loss of the swapped pair. Whichever of the
    two is the better one, it is to be better by the margin, which is why the margin is subtracted from either gap: at
    eps = 1/2 the label says nothing, and the loss is least at equal scores.
    Divisor: comparisons.
    """
    gap = chosen_scores - rejected_scores
    loss = -(1 - label_smoothing) * F.logsigmoid(gap - margins) - label_smoothing * F.logsigmoid(-gap - margins)
    right = (chosen_scores > rejected_scores).float() + 0.5 * (chosen_scores == rejected_scores).float()
    return (weights * loss).sum() / divisor, {"right": right.sum().item(), "count": float(len(right))}


def rating_cross_entropy(
    scores: Float[Tensor, " batch"],
    labels: Bool[Tensor, " batch"],
    *,
    weights: Float[Tensor, " batch"],
    label_smoothing: float,
    divisor: int | float,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Binary cross-entropy on sigmoid(score): -p log s - (1 - p) log(1 - s), s = sigmoid(score).

    The paper prints the second term as (1 - p) log sigmoid(1 - r); this is the correct one. Smoothing eps turns
    labels 0 and 1 into eps and 1 - eps. Divisor: ratings.
    """
    target = labels.float() * (1 - 2 * label_smoothing) + label_smoothing
    loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    right = ((scores > 0) == labels).float()
    return (weights * loss).sum() / divisor, {"right": right.sum().item(), "count": float(len(right))}


def sft_loss(
    logprobs: Float[Tensor, "batch time"],
    completion_mask: Bool[Tensor, "batch time"],
    *,
    weights: Float[Tensor, " batch"],
    divisor: int | float,
) -> tuple[Float[Tensor, ""], Metrics]:
    """-sum of completion log-probabilities, end token included. Divisor: completion tokens."""
    loss = -(torch.where(completion_mask, logprobs, 0.0).sum(-1) * weights).sum() / divisor
    return loss, {"tokens": float(completion_mask.sum().item())}


def policy_loss(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    completion_mask: Bool[Tensor, "batch time"],
    *,
    clip: float | None,
    divisor: int | float,
) -> tuple[Float[Tensor, ""], Metrics]:
    """REINFORCE (arXiv 2309.00267, appendix), or PPO's clipped ratio (arXiv 1707.06347) with `clip`.

    REINFORCE: -sum_t logprobs_t * stopgrad(advantage_t). With `clip`: -sum_t min(ratio_t A_t, clamp(ratio_t, 1 - clip,
    1 + clip) A_t), ratio = exp(logprobs - old_logprobs); at ratio 1 its gradient is REINFORCE's. Divisor: completions.
    """
    advantages = advantages.detach()
    if clip is None:
        objective, clipped = logprobs * advantages, torch.zeros_like(completion_mask)
    else:
        ratio = torch.exp(logprobs - old_logprobs.detach())
        limited = ratio.clamp(1 - clip, 1 + clip) * advantages
        objective, clipped = torch.minimum(ratio * advantages, limited), limited < ratio * advantages
    loss = -torch.where(completion_mask, objective, 0.0).sum() / divisor
    return loss, {"clipped": float((clipped & completion_mask).sum().item())}


def completion_ratio(
    logprobs: Float[Tensor, "batch time"],
    sampler_logprobs: Float[Tensor, "batch time"],
    completion_mask: Bool[Tensor, "batch time"],
    *,
    limit: float | None,
) -> Float[Tensor, " batch"]:
    """w = policy(y | x) / sampler(y | x) = exp(sum_t logprobs_t - sampler_logprobs_t), at most `limit`; detached.

    A completion is rewarded as a whole and its return from any token on depends on all that follow, so what an older
    policy sampled stands for the newer one with the ratio of whole completions: E_sampler[w f(y)] = E_policy[f(y)]. The
    product of fewer tokens' ratios would be the expectation under neither. With a limit large ratios are too small,
    and expectations no longer exact.
    """
    ratio = torch.where(completion_mask, logprobs - sampler_logprobs, 0.0).sum(-1).exp().detach()
    return ratio if limit is None else ratio.clamp_max(limit)


def value_loss(
    values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    completion_mask: Bool[Tensor, "batch time"],
    *,
    divisor: int | float,
    weights: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """weight * sum_t (V_t - stopgrad(Z_t))^2, Z the return-to-go (arXiv 2309.00267, appendix). Divisor: completions.

    The weights, 1 without, are those of `completion_ratio`.
    """
    error = torch.where(completion_mask, values - returns.detach(), 0.0)
    squared = error.square() if weights is None else error.square() * weights[:, None]
    return squared.sum() / divisor, {"squared_error": float(error.square().sum().item())}
