"""AdamW for each adapter: learning-rate schedule, clipping, and state as plain tensors for checkpoints."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

from perlhf.config import OptimConfig
from perlhf.errors import CheckpointError, DivergenceError

_STATE_NAMES = ("step", "exp_avg", "exp_avg_sq")


def build(groups: dict[str, tuple[list[Parameter], float]], config: OptimConfig) -> dict[str, AdamW]:
    """One AdamW per adapter (Loshchilov & Hutter, arXiv 1711.05101).

    Args:
        groups: adapter name -> (its trainable parameters, its peak learning rate).
        config: betas and weight decay for all of them.
    """
    optimizers = {}
    for name, (parameters, learning_rate) in groups.items():
        assert parameters, f"adapter {name} has no trainable parameter"
        optimizers[name] = AdamW(
            parameters, lr=learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
    return optimizers


def learning_rate_at(step: int, total: int, peak: float, config: OptimConfig) -> float:
    """The learning rate of update `step` of `total`, both counted from 1.

    Warm-up update s of w uses `peak * s / w`. After it, with `left = (total - step + 1) / (total - w)`: `linear` is
    `peak * left` and `cosine` is `peak * (1 - cos(pi * left)) / 2`, so the first update after it has the peak and the
    one after the last would have 0.
    """
    assert 1 <= step <= total, f"update {step} of {total}"
    warmup = config.warmup_updates
    if step <= warmup:
        return peak * step / warmup
    left = (total - step + 1) / (total - warmup)
    match config.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * left
        case "cosine":
            return peak * (1 - math.cos(math.pi * left)) / 2


@torch.no_grad()
def clip(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scales gradients to a joint 2-norm of at most `max_norm`; returns the norm before, computed in float32.

    Parameters without a gradient are skipped; with none at all the norm is 0.

    Raises:
        DivergenceError: the norm is not finite; gradients are left as they are.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms])).item()
    if not math.isfinite(norm):
        raise DivergenceError(
            f"the gradient norm is {norm}",
            allowed="a finite number",
            hint="lower optim.learning_rate; the last checkpoint is kept",
        )
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm


def state_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """The optimiser's state by position of the parameter: `0.step`, `0.exp_avg`, `0.exp_avg_sq`, `1.step`, ...

    The tensors are the optimiser's own, not copies. A parameter that was never updated has none.
    """
    tensors = {}
    for position, parameter in enumerate(_parameters(optimizer)):
        for name in _STATE_NAMES if parameter in optimizer.state else ():
            tensors[f"{position}.{name}"] = optimizer.state[parameter][name]
    return tensors


def load_state_tensors(optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    """Puts back copies of what `state_tensors` gave; further updates are bit-equal to those of the saved optimiser.

    Learning rates are not part of it: set them from `learning_rate_at` before each update.

    Raises:
        CheckpointError: the tensors belong to other parameters; the optimiser is left as it was.
    """
    parameters = _parameters(optimizer)
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        position, _, name = key.partition(".")
        assert position.isdigit() and name in _STATE_NAMES, f"not an optimiser tensor: {key}"
        index = int(position)
        if index >= len(parameters):
            raise CheckpointError(f"optimiser state for parameter {index}", allowed=f"{len(parameters)} parameters")
        expected = torch.Size() if name == "step" else parameters[index].shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"optimiser state {key} has shape {tuple(tensor.shape)}", allowed=f"{tuple(expected)}"
            )
        # AdamW counts its steps on the CPU; the moments live with the parameter.
        device = "cpu" if name == "step" else parameters[index].device
        states.setdefault(index, {})[name] = tensor.to(device, copy=True)
    assert all(len(state) == len(_STATE_NAMES) for state in states.values()), (
        "a parameter's optimiser state is incomplete"
    )
    optimizer.state.clear()
    for index, state in states.items():
        optimizer.state[parameters[index]] = state


def _parameters(optimizer: AdamW) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
