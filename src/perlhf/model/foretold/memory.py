"""The memory that a stage takes: one estimate for `perlhf plan`, `perlhf base` and `--dry-run`, `memory_of`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from perlhf.config.stages import PolicyConfig
from perlhf.errors import ModelError
from perlhf.kernels.recomputed import layers_of
from perlhf.model.bases.quantised import layer_bytes, weight_bytes
from perlhf.model.foretold.sizes import (
    ONE,
    Devices,
    dtype_in_force,
    gathered_weights,
    learning_bytes,
    sampling_bytes,
    weights_in_parts,
)
from perlhf.model.model import Model
from perlhf.parallel.traffic import Lengths, Stage, microbatches_of, passes_of
from perlhf.parallel.workers import ALONE, Workers
from perlhf.runs.earlier import earlier_runs, reward_adapters
from perlhf.system.console import note
from perlhf.system.machine import free_memory_bytes

LIBRARIES_BYTES = 450 * 2**20
"""The interpreter with torch and transformers loaded, measured on Linux; of a GPU, the context that they make there."""
OPTIMISER_BYTES = 16
"""Of one trainable parameter: float32 weight, gradient and AdamW's two moments."""
SUM_BYTES = 20
"""Of one trainable parameter, while several workers add up gradients: the flat float32 vector, its padded copy, the
pieces that arrive, those of the sums, and the whole (`parallel.workers.Workers.sum`)."""
COMPILED_BYTES, FEW_BYTES, SETTLED = 720 * 2**20, 100 * 2**20, 40
"""What a run in bfloat16 on a CPU takes beside: kernels that oneDNN compiles for each shape of micro-batches, and its
buffers. In the end, at the start, and after how many micro-batches 63 % of the difference is there (fitted to runs of 4
to 300 of them, docs/performance.md)."""
FREE_SHARE = 0.85
"""Of what is free: the part that a step may take by the estimate, which can be too low by so much."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what holds them."""

    held: dict[str, int]
    """All the time."""
    passing: dict[str, int]
    """One after the other: the largest counts."""

    @property
    def total(self) -> int:
        """Estimated peak."""
        return sum(self.held.values()) + max(self.passing.values())

    def parts(self) -> dict[str, int]:
        """All by name, with the `total`."""
        return {**self.held, **self.passing, "total": self.total}


def memory_of(
    config: Stage,
    network: PreTrainedModel,
    trainable: Mapping[str, int],
    devices: Devices = ONE,
    lengths: Lengths | None = None,
    updates: int | None = None,
) -> Memory:
    """Estimated bytes on each device of a training stage.

    Args:
        network: the base, without weights.
        trainable: parameters by adapter.
        lengths: the longest of the run's sequences; None takes the longest that the configuration lets through.
        updates: of the run; None: so many that memory doesn't grow any more.
    """
    size, dtype = network.num_parameters(), dtype_in_force(config.dtype, config.device)
    width = 2 if dtype == "bfloat16" else 4
    on_gpu = config.device.startswith(("cuda", "mps"))
    lengths = lengths or Lengths.longest(config)
    first = next(passes_of(config, lengths))
    held = {"libraries": LIBRARIES_BYTES, "base": weight_bytes(network, config.quantize, width)}
    if devices.shards > 1:
        held["base"] = weights_in_parts(network, devices.shards) * width
        held["gathered layers"] = gathered_weights(network) * width
    held |= {f"adapter {name}": parameters * OPTIMISER_BYTES for name, parameters in trainable.items()}
    held |= {role: count * next(iter(trainable.values())) * 4 for role, count in frozen_adapters(config).items()}
    if config.tuning == "full":
        # While they are used in another dtype than they are learned in, and, from a CPU's memory, written to a file.
        held["copies of the weights"] = size * ((0 if on_gpu else 4) + (width if dtype != "float32" else 0))
    if read_back := layer_bytes(network, config.quantize, width):
        held["a layer read back"] = read_back
    if dtype == "bfloat16" and not on_gpu:
        met = math.inf if updates is None else updates * microbatches_of(first, config, devices.count)
        held["compiled products"] = int(FEW_BYTES + (COMPILED_BYTES - FEW_BYTES) * (1 - math.exp(-met / SETTLED)))
    passing = {"activations": learning_bytes(config, network, devices, lengths)}
    if isinstance(config, PolicyConfig):
        if config.sampler == "local":
            passing["sampling"] = sampling_bytes(config, network, width, devices.count, lengths)
        if config.staleness:
            held["adapter that samples"] = trainable["policy"] * 4
        if config.staleness and config.sampler == "local" and not on_gpu:  # on a GPU they take turns
            passing["both at once"] = passing["activations"] + passing["sampling"]
    if devices.count > 1:
        passing["sums of gradients"] = SUM_BYTES * sum(trainable.values())
    return Memory(held, passing)


def keep_or_recompute(config: Stage, model: Model, workers: Workers = ALONE) -> dict[str, Any]:
    """Has the model recompute its layers in the backward pass, as `recompute` says; what of it a run records.

    `auto` does where a step wouldn't fit into what is free now, with the base and the adapters' weights in place. Bits
    of values and gradients are the same either way, so that workers and sessions of a run may choose apart.

    Raises:
        ModelError: `always`, of a network whose layers aren't in one list.
    """
    can = layers_of(model.base) is not None
    if config.recompute == "always" and not can:
        what = f"{type(model.base).__name__} has no list of layers that could be recomputed"
        raise ModelError(what, where="recompute", allowed="auto, never", hint="leave recompute out")
    if config.recompute == "never" or not can:
        return {"recompute": False}
    config = config.model_copy(update={"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")})
    trainable = {name: sum(p.numel() for p in one.trainable()) for name, one in model.adapters.items()}
    trainable = {name: count for name, count in trainable.items() if count}
    devices = Devices(workers.count, 1 if model.shards is None else workers.count)
    step = _step_bytes(config, model.base, trainable, devices, Lengths.longest(config))
    free = _free_bytes(model.device, workers.local[1])
    chosen = _recomputes(config, model.base, devices, step, free)
    if chosen:
        model.recompute_layers()
    if chosen and config.recompute == "auto":
        sizes = f"about {step / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        note(f"layers are computed once more in the backward pass: a step would take {sizes}; recompute: never doesn't")
    return {"recompute": chosen, "step_bytes": step, "free_bytes": free}


def with_recompute(
    config: Stage, network: PreTrainedModel, trainable: Mapping[str, int], devices: Devices, lengths: Lengths, room: int
) -> Stage:
    """The configuration with `recompute` as a run would have it on a device of `room` bytes that nothing else uses."""
    held = memory_of(config, network, trainable, devices, lengths).held
    moments = sum(trainable.values()) * (OPTIMISER_BYTES - 4)
    free = room - (sum(held.values()) - held.get("compiled products", 0) - moments)
    step = _step_bytes(config, network, trainable, devices, lengths)
    chosen = _recomputes(config, network, devices, step, free)
    return config.model_copy(update={"recompute": "always" if chosen else "never"})


def _recomputes(config: Stage, network: PreTrainedModel, devices: Devices, step: int, free: int) -> bool:
    can = config.tuning == "lora" and devices.shards == 1 and layers_of(network) is not None
    return can and (config.recompute == "always" or (config.recompute == "auto" and step > FREE_SHARE * free))


def _step_bytes(
    config: Stage, network: PreTrainedModel, trainable: Mapping[str, int], devices: Devices, lengths: Lengths
) -> int:
    """What a step that recomputes nothing takes beside the base and the adapters' weights, by the estimate: what
    learning keeps, gradients and AdamW's moments, and on a CPU products that are compiled.
    """
    config = config.model_copy(update={"recompute": "never"})
    learning = learning_bytes(config, network, devices, lengths)
    compiles = dtype_in_force(config.dtype, config.device) == "bfloat16" and not config.device.startswith(
        ("cuda", "mps")
    )
    return learning + compiles * COMPILED_BYTES + sum(trainable.values()) * (OPTIMISER_BYTES - 4)


def _free_bytes(device: torch.device, sharing: int) -> int:
    """What is free on a device: on a GPU with what torch holds unused, of a CPU's a part for each that shares it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = free_memory_bytes("cpu")
    assert free is not None, "a CPU's is known"
    return free // sharing


def frozen_adapters(config: Stage) -> dict[str, int]:
    """How many adapters a policy holds without gradients, by their role."""
    if not isinstance(config, PolicyConfig):
        return {}
    runs = earlier_runs(config)
    found = {
        "reference": len(runs["sft"]) + len(runs["start"]),
        "reward adapters": reward_adapters((*config.reward, *config.validation_reward)),
    }
    return {role: count for role, count in found.items() if count}
