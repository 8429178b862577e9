"""Layers that keep their input alone for the backward pass, and compute once more there (arXiv 1604.06174).

Memory of learning then grows with a layer's activations instead of all layers', for about a third more time. The second
time computes by the same call, so that values and gradients are the same bits.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from perlhf.kernels.call import Call, current_call


def layers_of(network: PreTrainedModel) -> nn.ModuleList | None:
    """The network's layers, one module each; None where they aren't in one list."""
    count = getattr(network.config.get_text_config(), "num_hidden_layers", None)
    return next((part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part) == count), None)


def recompute(layer: nn.Module, again: Callable[[Call], AbstractContextManager[None]]) -> None:
    """From now on the layer is computed once more in the backward pass of what has gradients.

    Args:
        again: what it is then computed inside of, by the call of the first time: a backward pass may run in a thread
            of its own, and knows no call.
    """
    once = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return once(*args, **kwargs)
        call = current_call()
        return checkpoint(
            partial(once, **kwargs),
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), again(call)),
            preserve_rng_state=call.dropout,  # nothing else is drawn
        )

    layer.forward = forward
