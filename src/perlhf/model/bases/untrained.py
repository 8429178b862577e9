"""Added tokens that a network never learned: what their rows of the embedding give away.

A checkpoint gets tokens without training when its tokenizer is given some and its embedding rows for them, or when its
authors keep rows in reserve. Such a row is zero, one of many equal ones, or the mean of all rows, as transformers'
resize_token_embeddings makes it. A row that was drawn at random, and one that was copied from a trained row on purpose,
can't be told from a trained one.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLE, _CHUNK = 2048, 8192
_ZERO = 1e-3
"""Norm over the median norm. Trained rows of SmolLM2 have 0.6 at least."""
_MEAN = 0.05
"""Distance from the mean over the median distance; those that transformers makes have less than 0.001, rounding to
bfloat16 included 0.01."""


@torch.no_grad()
def untrained_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids of added tokens that were never trained, with what shows it, as a clause after `its embedding`."""
    embedding: Any = network.get_input_embeddings()
    weight, padding = embedding.weight, getattr(embedding, "padding_idx", None)  # whose row torch makes zero
    added = sorted(n for n in tokenizer.added_tokens_decoder if n < len(weight) and n != padding)
    if not added or weight.is_meta:
        return {}
    rows = weight[added].float()
    sample = weight[:: max(1, len(weight) // _SAMPLE)].float()
    mean = sum(part.float().sum(0) for part in weight.split(_CHUNK)) / len(weight)
    zero = rows.norm(dim=-1) < _ZERO * sample.norm(dim=-1).median()
    middle = (rows - mean).norm(dim=-1) < _MEAN * (sample - mean).norm(dim=-1).median()
    spare = weight[len(tokenizer) :][:_SAMPLE]
    shared = _shared([*weight[added], *spare])[: len(added)]
    found: dict[int, str] = {}
    for number, is_zero, is_mean, is_shared in zip(added, zero.tolist(), middle.tolist(), shared, strict=True):
        if is_zero:
            found[number] = "is zero"
        elif is_mean:
            found[number] = "is the mean of all tokens', as adding it made it"
        elif is_shared:
            found[number] = "is the same as that of other tokens in reserve"
    return found


def _shared(rows: list[Tensor]) -> list[bool]:
    """Of each row, whether another one has the same bits."""
    keys = [row.contiguous().cpu().view(torch.uint8).numpy().tobytes() for row in rows]
    counts: dict[bytes, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return [counts[key] > 1 for key in keys]
