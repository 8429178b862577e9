"""What a stage would do, from its configuration, the record counts and the shapes of the base; no torch, no training.

Trainable parameters are exact: rank * (inputs + outputs) for each adapted layer, all weights for `tuning: full`, and
hidden for a score head, hidden + 1 for a value head. Memory is an estimate (`_activation_bytes` has the formula).
"""

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlhf.config.stages import DEFAULT_BASE, AdapterConfig, PolicyConfig, RewardConfig, SftConfig
from perlhf.data import splits
from perlhf.data.order import plan_updates
from perlhf.data.splits import SPLITS
from perlhf.errors import ModelError, RunError
from perlhf.kernels import cpu
from perlhf.method.targets import match
from perlhf.system import allocator
from perlhf.system.machine import cpu_computes_in_bf16

Stage = SftConfig | RewardConfig | PolicyConfig
Shapes = Mapping[str, tuple[int, ...]]

OVERHEAD_BYTES = 450 * 2**20
"""The interpreter with torch and transformers loaded, measured on Linux."""
OPTIMISER_BYTES = 16
"""Of one trainable parameter: float32 weight, gradient and AdamW's two moments."""
HEAD_CHUNK_TOKENS = 256
"""Tokens whose logits exist at one time, as in `head.py`."""
HOLES = 2.0
"""What activations take where memory grows holes, in units of their size: under glibc's allocator (`allocator.py`), and
in bfloat16 on a CPU."""

COMPILED_BYTES = 480 * 2**20
"""What a run in bfloat16 on a CPU takes beside: kernels that oneDNN compiles for each shape, and its buffers (fitted to
whole runs, docs/performance.md)."""


@dataclass(frozen=True)
class Base:
    """The base's configuration and the shape of every tensor."""

    config: Mapping[str, Any]
    shapes: Shapes

    @property
    def parameters(self) -> int:
        """Number of weights; a tied output head counts once."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Plan:
    """What a stage would do. Memory is in bytes, by what holds it."""

    stage: str
    records: dict[str, int]
    updates: int
    learning_rate: float
    base_parameters: int
    trainable: dict[str, int]
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
        ModelError: the base isn't here.
        AdapterError: a target that matches no layer.
    """
    base = read_base(config.base)
    stage, kinds = _stage(config)
    _check_earlier_runs(config)
    records = count_records(config, kinds)
    trainable = trainable_parameters(config, base)
    dtype = dtype_in_force(config.dtype, config.device)
    used = allocator.expected()
    compiles = dtype == "bfloat16" and not config.device.startswith("cuda")
    memory = {
        "libraries": OVERHEAD_BYTES,
        "base": base.parameters * _size(dtype),
        "adapters and optimiser": sum(trainable.values()) * OPTIMISER_BYTES,
        "frozen adapters": _frozen_adapters(config) * next(iter(trainable.values())) * 4,
        "activations": _activation_bytes(config, base, dtype, HOLES if used == "system" or compiles else 1.0),
    }
    if config.tuning == "full":
        # While they are used in another dtype than they are learned in, and while they are written to a file.
        memory["copies of the weights"] = base.parameters * (4 + (_size(dtype) if dtype != "float32" else 0))
    if compiles:
        memory["compiled products"] = COMPILED_BYTES
    updates = count_updates(config, kinds)
    kernels = "not for a GPU" if config.device.startswith("cuda") else cpu.compiler()[1]
    rate, size = config.learning_rate, base.parameters
    return Plan(stage, records, updates, rate, size, trainable, dtype, used, kernels, memory)


def _check_earlier_runs(config: Stage) -> None:
    """Raises RunError for an SFT or reward run that isn't there: the stage itself would stop at it."""
    if not isinstance(config, SftConfig) and config.sft:
        check_runs("sft", [config.sft])
    if isinstance(config, PolicyConfig):
        check_runs("reward", reward_runs(config.reward))
        check_runs("validation_reward", reward_runs(config.validation_reward))


def reward_runs(sources: Sequence[str]) -> list[Path]:
    """Those of a policy's rewards, or of what judges it, that are run directories: neither functions nor addresses."""
    return [Path(source) for source in sources if ":" not in source]


def check_runs(key: str, runs: Sequence[Path]) -> None:
    """Raises RunError, which names `key`, for one of `runs` that isn't finished."""
    for run in runs:
        if not (run / "adapter").is_dir():
            stage = "sft" if key == "sft" else "reward"
            raise RunError(f"{run} is no finished run", where=key, hint=f"train it: perlhf {stage}")


def _stage(config: Stage) -> tuple[str, tuple[str, ...]]:
    match config:
        case SftConfig():
            return "sft", ("demonstration",)
        case RewardConfig():
            return "reward", ("comparison", "rating")
        case PolicyConfig():
            return "policy", ("prompt",)


def count_records(config: Stage, kinds: tuple[str, ...]) -> dict[str, int]:
    """Records of each split, at most `limit` of each and `limit_train` of training.

    Raises:
        DataError: no records of these kinds, or a split that should have some is empty.
    """
    unlimited = config.data.model_copy(update={"limit": None})
    found = Counter(splits.split_of(record.group, config.data) for record in splits.load(unlimited, kinds, "all"))
    for split in SPLITS:
        if not found[split] and (split != "test" or config.data.test > 0):
            splits.load(config.data, kinds, split)  # raises, saying what is empty and what to change
    limits = {split: [config.data.limit] for split in SPLITS}
    limits["train"].append(config.data.limit_train)
    return {split: min([found[split], *(limit for limit in limits[split] if limit)]) for split in SPLITS}


def count_updates(config: Stage, kinds: tuple[str, ...]) -> int:
    """Optimiser steps of the whole run, by the same plan that the stage follows."""
    if isinstance(config, PolicyConfig):
        return config.updates * config.steps_per_rollout
    groups = [record.group for record in splits.load(config.data, kinds, "train")]
    size, epochs = config.examples_per_update, config.epochs
    return len(plan_updates(groups, size, epochs, config.seed, config.order, config.max_updates))


def trainable_parameters(config: Stage, base: Base) -> dict[str, int]:
    """Trainable parameters of each adapter, head included."""
    hidden = int(base.config["hidden_size"])
    body = base.parameters if config.tuning == "full" else lora_parameters(config.adapter, base.shapes)
    match config:
        case SftConfig():
            return {"sft": body}
        case RewardConfig():
            return {"reward": body + hidden}
        case PolicyConfig() if config.baseline == "value":
            return {"policy": body, "value": body + hidden + 1}
        case PolicyConfig():
            return {"policy": body}


def lora_parameters(adapter: AdapterConfig, shapes: Shapes) -> int:
    """Sum of rank * (inputs + outputs) over the layers that `targets` names.

    Raises:
        AdapterError: a name that matches no linear layer.
    """
    linear = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if _is_linear(name, shape)}
    chosen = match(list(linear), adapter.targets, adapter.layers)
    return adapter.rank * sum(sum(linear[name]) for name in chosen)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer below the output head: a matrix that embeds nothing."""
    parts = name.split(".")
    embeds = any(word in part for part in parts for word in ("embed", "wte", "wpe", "lm_head"))
    return len(shape) == 2 and parts[-1] == "weight" and not embeds


def _frozen_adapters(config: Stage) -> int:
    """Adapters held without gradients: the reference and the reward models of a policy."""
    if not isinstance(config, PolicyConfig):
        return 0
    return (config.sft is not None) + len(reward_runs((*config.reward, *config.validation_reward)))


def dtype_in_force(dtype: str, device: str) -> str:
    """`auto` resolved as far as that is possible without torch: bfloat16 on CUDA or where the CPU is faster in it."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.startswith("cuda") or cpu_computes_in_bf16()[0] else "float32"


def _size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def _activation_bytes(config: Stage, base: Base, dtype: str, holes: float) -> int:
    """Kept for the backward pass of one micro-batch, plus one chunk of float32 logits and their exponentials.

    Per token and layer of an adapter on attention: three vectors of the hidden size (inputs of two norms and of the
    adapters), q, k, v and their mixture, and two of the feed-forward size (gate and up). Adapters on all linear layers
    and full tuning keep the inputs of the feed-forward layers as well. Layers below `adapter.layers` keep nothing.
    """
    layers, hidden = int(base.config["num_hidden_layers"]), int(base.config["hidden_size"])
    heads = int(base.config.get("num_attention_heads") or 1)
    kv_heads = int(base.config.get("num_key_value_heads") or heads)
    head_size = int(base.config.get("head_dim") or hidden // heads)
    feed_forward = int(base.config.get("intermediate_size") or 4 * hidden)
    per_token = 3 * hidden + 2 * (heads + kv_heads) * head_size + 2 * feed_forward
    if config.tuning == "full" or config.adapter.targets != "attention":
        per_token += hidden + feed_forward
    if config.tuning == "lora" and config.adapter.layers != "all":
        layers = min(layers, int(config.adapter.layers.removeprefix("last:")))
    logits = 0 if isinstance(config, RewardConfig) else 2 * HEAD_CHUNK_TOKENS * int(base.config["vocab_size"]) * 4
    return int(config.microbatch_tokens * layers * per_token * _size(dtype) * holes) + logits


# ---- shapes of a base ---------------------------------------------------------------------------------------------


def read_base(name: str) -> Base:
    """Configuration and tensor shapes of a base that is here; those of the packaged base are known without it.

    Raises:
        ModelError: it isn't here (says how to get it), or its files can't be read.
    """
    directory = _directory(name)
    if directory is None:
        if name == DEFAULT_BASE:
            return Base(SMOLLM2_CONFIG, llama_shapes(SMOLLM2_CONFIG))
        raise ModelError(f"base {name} is not here", where="base", hint=f"perlhf pull {name}")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        shapes = {name: shape for file in sorted(directory.glob("*.safetensors")) for name, shape in _header(file)}
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"can't read the base: {error}", where=str(directory), hint=f"perlhf pull {name}") from error
    missing = [key for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key not in config]
    if missing or not shapes:
        what = f"config.json lacks {missing[0]}" if missing else "no safetensors files"
        raise ModelError(f"the base can't be planned with: {what}", where=str(directory))
    return Base(config, shapes)


def _directory(name: str) -> Path | None:
    """Where the base's files are, by the rules of `base.resolve`, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    cache = Path(os.environ.get("PERLHF_CACHE") or "~/.cache/perlhf").expanduser()
    for directory in (cache / "bases" / name, Path(name).expanduser()):
        if (directory / "config.json").is_file():
            return directory
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _header(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes from a safetensors file: 8 bytes of length, then that much JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > 100 * 2**20:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(length))
    return [(name, tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"]


SMOLLM2_CONFIG: Mapping[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
"""Of the packaged SmolLM2-135M-Instruct, so that a plan needs no download."""


def llama_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensor shapes of a Llama network with tied embeddings."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    keys = hidden // int(config["num_attention_heads"]) * int(config["num_key_value_heads"])
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (int(config["vocab_size"]), hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(int(config["num_hidden_layers"])):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes
