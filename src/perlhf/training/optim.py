"""AdamW for each adapter: learning-rate schedule, clipping, and state as plain tensors for checkpoints."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

from perlhf.config.stages import OptimConfig
from perlhf.errors import CheckpointError, DivergenceError

_STATE_NAMES = ("step", "exp_avg", "exp_avg_sq")


def build(groups: dict[str, tuple[dict[str, Parameter], float]], config: OptimConfig) -> dict[str, AdamW]:
    """One AdamW per adapter (Loshchilov & Hutter, arXiv 1711.05101).

    Args:
        groups: adapter name -> (its trainable parameters by name, its peak learning rate).
        config: betas and weight decay for all of them.
    """
    optimizers = {}
    for name, (parameters, learning_rate) in groups.items():
        assert parameters, f"adapter {name} has no trainable parameter"
        optimizers[name] = AdamW(
            parameters.items(), lr=learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
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
    norm = torch.linalg.vector_norm(torch.stack([part.to(norms[0].device) for part in norms])).item()
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
    """The optimiser's state by name of the parameter: `NAME.step`, `NAME.exp_avg`, `NAME.exp_avg_sq`.

    By name, since moments put back by position go to another parameter where the order differs, and nothing tells. The
    tensors are the optimiser's own, not copies. A parameter that was never updated has none.
    """
    return {
        f"{name}.{part}": optimizer.state[parameter][part]
        for name, parameter in _parameters(optimizer).items()
        for part in (_STATE_NAMES if parameter in optimizer.state else ())
    }


def load_state_tensors(optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    """Puts back copies of what `state_tensors` gave; further updates are bit-equal to those of the saved optimiser.

    Learning rates are not part of it: set them from `learning_rate_at` before each update.

    Raises:
        CheckpointError: the tensors belong to other parameters; the optimiser is left as it was.
    """
    parameters = _parameters(optimizer)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        assert part in _STATE_NAMES, f"not an optimiser tensor: {key}"
        if name not in parameters:
            raise CheckpointError(
                f"optimiser state for a parameter {name!r}",
                allowed=f"names such as {next(iter(parameters))!r}",
                hint="a run that an earlier version began can't go on: start it again in another directory",
            )
        expected = torch.Size() if part == "step" else parameters[name].shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"optimiser state {key} has shape {tuple(tensor.shape)}", allowed=f"{tuple(expected)}"
            )
        # AdamW counts its steps on the CPU; the moments live with the parameter.
        device = "cpu" if part == "step" else parameters[name].device
        states.setdefault(name, {})[part] = tensor.to(device, copy=True)
    assert all(len(state) == len(_STATE_NAMES) for state in states.values()), (
        "a parameter's optimiser state is incomplete"
    )
    optimizer.state.clear()
    for name, state in states.items():
        optimizer.state[parameters[name]] = state


def _parameters(optimizer: AdamW) -> dict[str, Tensor]:
    (group,) = optimizer.param_groups
    return dict(zip(group["param_names"], group["params"], strict=True))
