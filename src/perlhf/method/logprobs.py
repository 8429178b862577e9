"""Log-probabilities of tokens from the output head, in chunks, so that the logits of all tokens never exist at once.

The gradient of a token's log-probability by its state, (W[token] - p W) / temperature, is computed while the chunk's
probabilities are there: the backward multiplies it and computes no logits again. The token itself is left out of both
terms, where it cancels: of a token with p = 0.99 the difference is a hundredth of either, and in bfloat16 little but
their rounding would be left. A head that is trained itself (full tuning) takes the slow way, whose chunks are
recomputed.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 256
"""Tokens whose logits exist at one time, of vocabularies up to `LARGE`; half as many beyond."""
LARGE = 1 << 17
"""With Gemma's 262,144 tokens 256 of them take 768 MB at their peak, 128 take 448 MB and no more time."""


@dataclass(frozen=True)
class Logits:
    """What a network does to z = W state: logits are scale * z, or cap * tanh(scale * z / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, products: Tensor) -> Tensor:
        """Logits of float32 products."""
        scaled = products if self.scale == 1 else products * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Their derivative by the products."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap).square())


PLAIN = Logits()


def chunk_tokens(vocab: int) -> int:
    """Tokens whose logits exist at one time."""
    return CHUNK_TOKENS if vocab <= LARGE else CHUNK_TOKENS // 2


def token_logprobs(
    states: Tensor, weight: Tensor, targets: Tensor, temperature: float, shape: Logits = PLAIN
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) of the targets, and the entropy, float32 [tokens]; entropy has no gradient.

    Args:
        states: [tokens, hidden].
        weight: of the head, [vocab, hidden].
        targets: [tokens].
        shape: what logits are, given weight and states.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        size = chunk_tokens(len(weight))
        chunks = zip(states.split(size), targets.split(size), strict=True)
        parts = [
            cast(
                tuple[Tensor, Tensor],
                checkpoint(
                    slow_logprobs, s, weight, t, temperature, shape, use_reentrant=False, preserve_rng_state=False
                ),
            )
            for s, t in chunks
        ]
        empty = states.new_zeros(0).float()
        return torch.cat([empty, *(part[0] for part in parts)]), torch.cat([empty, *(part[1] for part in parts)])
    return cast(tuple[Tensor, Tensor], _TokenLogprobs.apply(states, weight, targets, temperature, shape))


def slow_logprobs(
    states: Tensor, weight: Tensor, targets: Tensor, temperature: float, shape: Logits = PLAIN
) -> tuple[Tensor, Tensor]:
    """The same, all at once."""
    log_probs = torch.log_softmax(shape.of((states @ weight.t()).float()) / temperature, -1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, temperature: float, shape: Logits
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = (torch.empty(len(states), device=states.device) for _ in range(2))
        learned = ctx.needs_input_grad[0]
        slopes = torch.empty(states.shape if learned else (0, 0), device=states.device)
        size = chunk_tokens(len(weight))
        for start in range(0, len(states), size):
            chosen = slice(start, start + size)
            logits = shape.of((states[chosen] @ weight.t()).float())
            slope = shape.slope(logits) if learned else 1.0
            if temperature != 1:
                logits /= temperature
            logits -= logits.max(-1, keepdim=True).values
            target = logits.gather(-1, targets[chosen, None])
            others = torch.exp(logits).scatter_(-1, targets[chosen, None], 0.0)
            rest, own = others.sum(-1, keepdim=True), target.exp()
            total = rest + own
            logprobs[chosen] = (target - total.log()).squeeze(-1)
            mean = torch.linalg.vecdot(others, logits)[:, None] + own * target
            entropy[chosen] = (total.log() - mean / total).squeeze(-1)
            if learned:
                at = slope.gather(-1, targets[chosen, None]) if isinstance(slope, Tensor) else slope
                others *= slope
                pull = rest * at * weight[targets[chosen]].float() - (others.to(weight.dtype) @ weight).float()
                slopes[chosen] = pull / (total * temperature)
        ctx.save_for_backward(slopes)
        ctx.dtype = states.dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slopes,) = cast(tuple[Tensor], ctx.saved_tensors)
        return (slopes * grads[0][:, None]).to(ctx.dtype), None, None, None, None
