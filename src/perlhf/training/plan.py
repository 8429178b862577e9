"""What a stage would do: from its configuration, the record counts and the base's network without weights.

Trainable parameters are exact: rank * (inputs + outputs) for each adapted layer, all weights for `tuning: full`, and
hidden for a score head, hidden + 1 for a value head. Memory is an estimate (`_activation_bytes` has the formula).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from perlhf.config.stages import AdapterConfig, PolicyConfig, RewardConfig, SftConfig
from perlhf.data.records import Prompt, completions_of
from perlhf.errors import ModelError
from perlhf.kernels import cpu
from perlhf.method.logprobs import chunk_tokens
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import end_ids, load_tokenizer, pick_device, without_weights
from perlhf.model.bases.quantised import layer_bytes, weight_bytes
from perlhf.model.encoding.encode import Encoder, TooLong
from perlhf.model.encoding.lengths import telling
from perlhf.model.foretold import Foretold, foretell
from perlhf.model.open import left_out, with_day
from perlhf.model.supported import packing_of, states_width, target_paths
from perlhf.rollout.scorers import load_functions
from perlhf.runs.earlier import check_runs, earlier_runs, is_adapter
from perlhf.system import before_torch
from perlhf.system.machine import cpu_computes_in_bf16
from perlhf.training.loop import Sides, read_sides, tell, updates_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Stage = SftConfig | RewardConfig | PolicyConfig

OVERHEAD_BYTES = 450 * 2**20
"""The interpreter with torch and transformers loaded, measured on Linux."""
OPTIMISER_BYTES = 16
"""Of one trainable parameter: float32 weight, gradient and AdamW's two moments."""
HOLES = 2.0
"""What activations take where memory grows holes, in units of their size: under glibc's allocator, and in bfloat16 on a
CPU."""

TRIED_RECORDS = 64
"""Of each side, however large it is: well under a second for long conversations."""
COMPILED_BYTES = 480 * 2**20
"""What a run in bfloat16 on a CPU takes beside: kernels that oneDNN compiles for each shape, and its buffers (fitted to
whole runs, docs/performance.md)."""


@dataclass(frozen=True)
class Plan:
    """What a stage would do. Memory is in bytes, by what holds it."""

    stage: str
    records: dict[str, int]
    updates: int
    learning_rate: float
    base_parameters: int
    trainable: dict[str, int]
    way: str
    """How sequences are computed together, why, and how that is known."""
    notes: tuple[str, ...]
    """What isn't as one might think."""
    dtype: str
    allocator: str
    kernels: str
    memory_bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Estimated peak."""
        return sum(self.memory_bytes.values())


def plan(config: Stage) -> Plan:
    """The plan of a training stage.

    Raises:
        RunError: an SFT or reward run that isn't there.
        DataError: no records of the kind, or an empty split.
        ModelError: the base isn't here, or isn't supported.
        AdapterError: a target that matches no layer; an adapter of another tool that can't be taken.
        ConfigError, RewardFunctionError: a reward function that can't be imported or called, a service's address.
        DataError, ConfigError, TooLong: what the encoder says of the records that are tried (`TRIED_RECORDS`).
    """
    network = without_weights(config.base, config.quantize, config.device)
    stage, kinds = _stage(config)
    for key, runs in earlier_runs(config).items():
        check_runs(key, runs)
        for run in runs:
            if is_adapter(run):  # of another tool, as like as not: is it one that can be taken?
                saved.read_adapter(run)
    sides = read_sides(config, kinds)
    if isinstance(config, PolicyConfig):
        prompts = cast(Sequence[Prompt], sides.train)
        for key, sources in {"reward": config.reward, "validation_reward": config.validation_reward}.items():
            load_functions(sources, key, prompts)
    _try_out(config, sides)
    records = count_records(sides)
    dtype = dtype_in_force(config.dtype, config.device)
    foretold = foretell_way(config, network)
    if foretold.way is not None:
        packing_of(foretold.way, config.packing)
    trainable = trainable_parameters(config, network, foretold.uncalled)
    note = left_out(network, config.adapter) if config.tuning == "lora" else None
    updates = count_updates(config, sides)
    tell(sides)
    return Plan(
        stage,
        records,
        updates,
        config.learning_rate,
        network.num_parameters(),
        trainable,
        way_in_words(foretold, config.packing),
        () if note is None else (note,),
        dtype if config.quantize == "none" else f"{dtype}, linear layers in {config.quantize}",
        before_torch.expected(),
        "not for a GPU" if config.device.startswith(("cuda", "mps")) else cpu.compiler()[1],
        memory_of(config, network, trainable),
    )


def foretell_way(config: Stage, network: "PreTrainedModel") -> Foretold:
    """The way of the base on the stage's device, which need not be here."""
    device = pick_device("auto") if config.device == "auto" else torch.device(config.device)
    return foretell(network.config, getattr(torch, dtype_in_force(config.dtype, config.device)), device)


def way_in_words(foretold: Foretold, asked: str = "auto") -> str:
    """How sequences are computed together, and how that is known.

    Args:
        asked: `packing` of the stage.
    """
    way = foretold.way
    if way is None:
        return foretold.source
    if way.packing == "none":
        return f"rows, slower than a tree: {way.why} ({foretold.source})"
    return "rows, as packing: none asks" if asked == "none" else f"tree of shared prefixes ({foretold.source})"


def memory_of(config: Stage, network: "PreTrainedModel", trainable: dict[str, int]) -> dict[str, int]:
    """Estimated bytes by what holds them.

    Args:
        network: the base, without weights.
        trainable: parameters by adapter.
    """
    size, dtype = network.num_parameters(), dtype_in_force(config.dtype, config.device)
    compiles = dtype == "bfloat16" and not config.device.startswith(("cuda", "mps"))
    holes = HOLES if before_torch.expected() == "system" or compiles else 1.0
    memory = {
        "libraries": OVERHEAD_BYTES,
        "base": weight_bytes(network, config.quantize, _size(dtype)),
        "adapters and optimiser": sum(trainable.values()) * OPTIMISER_BYTES,
        "frozen adapters": _frozen_adapters(config) * next(iter(trainable.values())) * 4,
        "activations": _activation_bytes(config, network, dtype, holes),
    }
    if config.tuning == "full":
        # While they are used in another dtype than they are learned in, and while they are written to a file.
        memory["copies of the weights"] = size * (4 + (_size(dtype) if dtype != "float32" else 0))
    if read_back := layer_bytes(network, config.quantize, _size(dtype)):
        memory["a layer read back"] = read_back
    if compiles:
        memory["compiled products"] = COMPILED_BYTES
    return memory


def _try_out(config: Stage, sides: Sides) -> None:
    """Encodes some records of each side that training encodes; none where the packaged base isn't here yet."""
    try:
        base = Base.find(config.base)
    except ModelError:
        return
    config = with_day(config, base)
    encoder = Encoder(load_tokenizer(base), config.encoding, end_ids(base))
    of_policy = isinstance(config, PolicyConfig)
    for records in (sides.train, sides.validation, None if of_policy else sides.test):
        for record in (records[number] for number in telling(records, TRIED_RECORDS).tolist()) if records else ():
            if of_policy:
                encoder.cut_prompt(record.prompt, config.max_completion_tokens, record.tools)
                continue
            try:
                encoder.examples(record.prompt, completions_of(record), record.source, record.tools)
            except TooLong:
                if not config.encoding.drop_long:
                    raise


def _stage(config: Stage) -> tuple[str, tuple[str, ...]]:
    match config:
        case SftConfig():
            return "sft", ("demonstration",)
        case RewardConfig():
            return "reward", ("comparison", "rating")
        case PolicyConfig():
            return "policy", ("prompt",)


def count_records(sides: Sides) -> dict[str, int]:
    """Records of each split, limits applied."""
    test = 0 if sides.test is None else len(sides.test)
    return {"train": len(sides.train), "validation": len(sides.validation), "test": test}


def count_updates(config: Stage, sides: Sides) -> int:
    """Optimiser steps of the whole run, by the same plan that the stage follows."""
    if isinstance(config, PolicyConfig):
        return config.updates * config.steps_per_rollout
    return updates_of(config, sides.train).total


def trainable_parameters(config: Stage, network: "PreTrainedModel", uncalled: Sequence[str] = ()) -> dict[str, int]:
    """Trainable parameters of each adapter, head included.

    Args:
        uncalled: layers that are never adapted (`Way.uncalled`).

    Raises:
        AdapterError: a target that matches no linear layer.
    """
    hidden = states_width(network)
    full = config.tuning == "full"
    body = network.num_parameters() if full else lora_parameters(config.adapter, network, uncalled)
    match config:
        case SftConfig():
            return {"sft": body}
        case RewardConfig():
            return {"reward": body + hidden}
        case PolicyConfig() if config.baseline == "value":
            return {"policy": body, "value": body + hidden + 1}
        case PolicyConfig():
            return {"policy": body}


def lora_parameters(adapter: AdapterConfig, network: "PreTrainedModel", uncalled: Sequence[str] = ()) -> int:
    """Sum of rank * (inputs + outputs) over the layers that `targets` names.

    Raises:
        AdapterError: a name that matches no linear layer.
    """
    paths = target_paths(network, adapter.targets, adapter.layers, uncalled)
    return adapter.rank * sum(sum(network.get_parameter(f"{path}.weight").shape) for path in paths)


def _frozen_adapters(config: Stage) -> int:
    """Adapters held without gradients: the reference and the reward models of a policy."""
    if not isinstance(config, PolicyConfig):
        return 0
    return sum(map(len, earlier_runs(config).values()))


def dtype_in_force(dtype: str, device: str) -> str:
    """`auto` resolved, also for a device that isn't here: bfloat16 on CUDA or where the CPU is faster in it,
    float32 on Apple's GPUs."""
    if dtype != "auto":
        return dtype
    if device.startswith("mps"):
        return "float32"
    return "bfloat16" if device.startswith("cuda") or cpu_computes_in_bf16()[0] else "float32"


def _size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def _activation_bytes(config: Stage, network: "PreTrainedModel", dtype: str, holes: float) -> int:
    """Kept for the backward pass of one micro-batch, plus one chunk of float32 logits and their exponentials.

    Per token and layer of an adapter on attention: three vectors of the hidden size (inputs of two norms and of the
    adapters), q, k, v and their mixture, and two of the feed-forward size (gate and up). Adapters on all linear layers
    and full tuning keep the inputs of the feed-forward layers as well. Layers below `adapter.layers` keep nothing.
    Layers without heads (of a recurrence) count as four vectors of twice the hidden size in the place of q, k, v.
    """
    shape = network.config.get_text_config()
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    heads = _most(getattr(shape, "num_attention_heads", None))
    kv_heads = _most(getattr(shape, "num_key_value_heads", None)) or heads
    head_size = _most(getattr(shape, "head_dim", None)) or hidden // (heads or 1)
    feed_forward = _most(getattr(shape, "intermediate_size", None)) or 4 * hidden
    mixed = 2 * (heads + kv_heads) * head_size if heads else 8 * hidden
    per_token = 3 * hidden + mixed + 2 * feed_forward
    if config.tuning == "full" or config.adapter.targets != "attention":
        per_token += hidden + feed_forward
    if config.tuning == "lora" and config.adapter.layers != "all":
        layers = min(layers, int(config.adapter.layers.removeprefix("last:")))
    logits = 0 if isinstance(config, RewardConfig) else 2 * chunk_tokens(shape.vocab_size) * shape.vocab_size * 4
    return int(config.microbatch_tokens * layers * per_token * _size(dtype) * holes) + logits


def _most(said: Any) -> int:
    """A number of a configuration, the largest where each layer has its own; 0 where there is none."""
    numbers = said if isinstance(said, list | tuple) else [said]
    return max((number for number in numbers if isinstance(number, int)), default=0)
