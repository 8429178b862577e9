"""What a stage would do: from its configuration, the record counts and the base's network without weights.

Trainable parameters are exact: rank * (inputs + outputs) for each adapted layer, all weights for `tuning: full`, and
hidden for a score head, hidden + 1 for a value head. Memory is an estimate (`model.foretold.memory`). What workers
exchange is counted by the rules that they follow (`parallel.traffic`); seconds follow from rates that are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from perlhf.config.stages import AdapterConfig, PolicyConfig, RewardConfig, SftConfig
from perlhf.data.records import Prompt, completions_of
from perlhf.errors import ModelError
from perlhf.kernels import cpu
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import end_ids, load_tokenizer, pick_device, without_weights
from perlhf.model.bases.quantised import is_kept, weight_bytes
from perlhf.model.encoding.encode import Encoder, TooLong
from perlhf.model.encoding.lengths import telling
from perlhf.model.foretold.memory import Memory, memory_of, with_recompute
from perlhf.model.foretold.sizes import Devices, Shape, dtype_in_force
from perlhf.model.foretold.way import Foretold, foretell
from perlhf.model.open import left_out, with_day
from perlhf.model.supported import packing_of, states_width, target_paths
from perlhf.parallel.traffic import Gathers, Lengths, Stage, microbatches_of, passes_of
from perlhf.rollout.scorers import load_functions
from perlhf.rollout.vllm.connection import Connection, introduction
from perlhf.rollout.vllm.memory import server_memory
from perlhf.runs.earlier import check_disagreement, check_runs, earlier_runs, is_adapter
from perlhf.system import before_torch
from perlhf.system.machine import free_memory_bytes
from perlhf.training.loop import Sides, read_sides, tell, updates_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIED_RECORDS = 64
"""Of each side, however large it is: well under a second for long conversations."""


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
    memory: Memory
    server: dict[str, int]
    """Memory of the vLLM server that samples, by what holds it; {} where none does."""

    @property
    def total_bytes(self) -> int:
        """Estimated peak."""
        return self.memory.total


def plan(config: Stage, workers: int = 1) -> Plan:
    """The plan of a training stage.

    Args:
        workers: of one machine, that the stage is launched with.

    Raises:
        RunError: an SFT or reward run that isn't there.
        DataError: no records of the kind, or an empty split.
        ModelError: the base isn't here, or isn't supported.
        AdapterError: a target that matches no layer; an adapter of another tool that can't be taken.
        ConfigError, RewardFunctionError: a reward function that can't be imported or called, a service's address.
        DataError, ConfigError, TooLong: what the encoder says of the records that are tried (`TRIED_RECORDS`).
        ServiceError, ConfigError: a server that is to sample isn't there, or can't (`rollout.vllm.connection`).
    """
    config = _on_a_device(config)
    network = without_weights(config.base, config.quantize, config.device)
    stage, kinds = _stage(config)
    for key, runs in earlier_runs(config).items():
        check_runs(key, runs)
        for run in runs:
            if is_adapter(run):  # of another tool, as like as not: is it one that can be taken?
                saved.read_adapter(run)
    sides = read_sides(config, kinds)
    if isinstance(config, PolicyConfig):
        check_disagreement(config)
        prompts = cast(Sequence[Prompt], sides.train)
        for key, sources in {"reward": config.reward, "validation_reward": config.validation_reward}.items():
            load_functions(sources, key, prompts)
    lengths = _try_out(config, sides)
    records = count_records(sides)
    dtype = dtype_in_force(config.dtype, config.device)
    foretold = foretell_way(config, network)
    if foretold.way is not None:
        packing_of(foretold.way, config.packing)
    trainable = trainable_parameters(config, network, foretold.uncalled)
    notes = [left_out(network, config.adapter) if config.tuning == "lora" else None]
    if workers > 1:
        notes.append(f"memory is that of each of {workers} workers")
    shards = 1
    if config.shard != "none" and not is_kept(network.config, config.quantize):
        shards = workers
        if workers == 1:
            how = "perlhf launch --workers N, or perlhf plan --devices N, tells it in parts"
            notes.append(f"memory is that of a device with the whole base; {how}")
    updates, devices = count_updates(config, sides), Devices(workers, shards)
    if (free := free_memory_bytes(config.device)) is not None and config.recompute == "auto":
        config = with_recompute(config, network, trainable, devices, lengths, free // workers)
        if config.recompute == "always":
            notes.append("layers are computed once more in the backward pass: a step wouldn't fit into what is free")
    tell(sides)
    return Plan(
        stage,
        records,
        updates,
        config.learning_rate,
        network.num_parameters(),
        trainable,
        way_in_words(foretold, config.packing),
        tuple(note for note in notes if note is not None),
        dtype if config.quantize == "none" else f"{dtype}, linear layers in {config.quantize}",
        before_torch.expected(),
        "not for a GPU" if config.device.startswith(("cuda", "mps")) else cpu.compiler()[1],
        memory_of(config, network, trainable, devices, lengths, updates),
        server_of(config, network, lengths),
    )


def _on_a_device(config: Stage) -> Stage:
    """With the device that `auto` takes, whose memory counts; one that is named need not be here."""
    return config.model_copy(update={"device": str(pick_device("auto"))}) if config.device == "auto" else config


def server_of(config: Stage, network: "PreTrainedModel", lengths: Lengths) -> dict[str, int]:
    """Estimated bytes of a vLLM server that samples for the stage, by what holds them; {} where none does."""
    if isinstance(config, PolicyConfig) and config.sampler == "vllm":
        return server_memory(config, network, lengths)
    return {}


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


def _try_out(config: Stage, sides: Sides) -> Lengths:
    """Encodes some records of each side that training encodes, and asks a server that is to sample whether it can; not
    where the packaged base isn't here yet.

    Gives the longest that there are: of a policy's prompts those that were tried.
    """
    most, longest = Lengths.longest(config), 0
    try:
        base = Base.find(config.base)
    except ModelError:
        return most
    config = with_day(config, base)
    encoder = Encoder(load_tokenizer(base), config.encoding, end_ids(base))
    of_policy = isinstance(config, PolicyConfig)
    if isinstance(config, PolicyConfig) and config.sampler == "vllm":
        introduction(Connection(config.vllm.url, config.vllm.timeout_seconds), encoder)
    for records in (sides.train, sides.validation, None if of_policy else sides.test):
        for record in (records[number] for number in telling(records, TRIED_RECORDS).tolist()) if records else ():
            if of_policy:
                ids = encoder.cut_prompt(record.prompt, config.max_completion_tokens, record.tools)
                longest = max(longest, len(ids))
                continue
            try:
                encoder.examples(record.prompt, completions_of(record), record.source, record.tools)
            except TooLong:
                if not config.encoding.drop_long:
                    raise
    return Lengths(longest, most.completion) if longest else most


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
            return {"reward": config.members * (body + hidden)}
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


def trained_tensors(config: Stage, network: "PreTrainedModel", uncalled: Sequence[str] = ()) -> int:
    """Tensors with gradients, of all adapters: a pair for each adapted layer, or all weights; heads."""
    if config.tuning == "full":
        body = len(list(network.parameters()))
    else:
        body = 2 * len(target_paths(network, config.adapter.targets, config.adapter.layers, uncalled))
    heads = {SftConfig: 0, RewardConfig: 1, PolicyConfig: 2}[type(config)]  # a value's bias is trained as well
    if isinstance(config, PolicyConfig) and config.baseline != "value":
        return body
    if isinstance(config, RewardConfig):
        return config.members * (body + heads)
    return body * (2 if isinstance(config, PolicyConfig) else 1) + heads


# ---- how long an update takes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What one device reaches, a second. A link that isn't known takes no time."""

    flops: float
    """Floating-point operations in passes through the network."""
    read: float
    """Bytes from its memory."""
    link: float = float("inf")
    """Bytes that it receives from devices of its machine."""
    node_link: float = float("inf")
    """Bytes that it receives from those of other machines."""
    node: int = 8
    """Devices of a machine."""

    def to(self, devices: int) -> float:
        """Of the link between so many devices that lie as close together as they can."""
        return self.link if devices <= self.node else self.node_link


@dataclass(frozen=True)
class Part:
    """What takes time in an update."""

    seconds: float
    bound: str
    """What it waits for."""


@dataclass(frozen=True)
class Weights:
    """Of a network, by how often they are used."""

    plain: int
    """For every token: neither embedding nor head, nor experts."""
    expert: int
    """In experts, of which a token goes through some."""
    head: int

    @classmethod
    def of(cls, network: "PreTrainedModel") -> "Weights":
        """Of a network without weights."""
        embedding: Any = network.get_input_embeddings()
        head: Any = network.get_output_embeddings()
        around = embedding.weight, head.weight
        inside = [(name, p.numel()) for name, p in network.named_parameters() if not any(p is one for one in around)]
        expert = sum(size for name, size in inside if "experts" in name.split("."))
        return cls(sum(size for _, size in inside) - expert, expert, head.weight.numel())


def parts_of(
    config: Stage,
    network: "PreTrainedModel",
    devices: Devices,
    lengths: Lengths,
    rates: Rates,
    received: Mapping[str, int],
    gathers: Gathers | None = None,
) -> dict[str, Part]:
    """How long the parts of an update take: the longest of computing, reading memory and gathering a sharded base, and
    what workers exchange besides.

    A pass forward takes two operations a weight and token, and attention four for each number of a head and token that
    is seen. Its backward takes as many where adapters learn, twice as many where all weights do, and once more where
    layers are recomputed. A step of the sampler reads the weights that its rows use, and the cache.

    Args:
        received: bytes of an update (`traffic.exchanged`).
        gathers: of a base in parts.
    """
    shape, weights = Shape.of(network.config), Weights.of(network)
    share = shape.experts_of_token / shape.experts if shape.experts else 0.0
    seen = (lengths.prompt + lengths.completion) / 2
    forward = 2 * (weights.plain + weights.expert * share) + 4 * shape.layers * shape.heads * shape.head * seen
    size = weight_bytes(network, config.quantize, 2 if dtype_in_force(config.dtype, config.device) == "bfloat16" else 4)
    gathers, link = gathers or Gathers(0), rates.to(devices.shards)
    backward = (2.0 if config.tuning == "full" else 1.0) + (config.recompute == "always")
    if config.tuning == "lora" and config.adapter.layers != "all":
        backward *= min(1.0, int(config.adapter.layers.removeprefix("last:")) / shape.layers)
    found: dict[str, Part] = {}
    for one in passes_of(config, lengths):
        micro = microbatches_of(one, config, devices.count)
        work = (one.tokens * forward + one.targets * 2 * weights.head) * (1 + backward * one.learned) / devices.count
        part = _longest({"computing": work / rates.flops, "gathering the base": micro * gathers.of(one) / link})
        name = one.what if one.what in ("learning", "scoring") else "log-probabilities"
        before = found.get(name, Part(0.0, part.bound))
        found[name] = Part(before.seconds + part.seconds, part.bound)
    if isinstance(config, PolicyConfig):
        prompts = -(-config.prompts_per_update // devices.count)
        rows = prompts * config.completions_per_prompt
        bytes_of = size / network.num_parameters()
        used = weights.plain + weights.head + weights.expert * (1 - (1 - share) ** rows)
        cache = (prompts * lengths.prompt + rows * lengths.completion / 2) * shape.cached * bytes_of
        step = _longest(
            {
                "computing": rows * (forward + 2 * weights.head) / rates.flops,
                "reading weights": (used * bytes_of + cache) / rates.read,
                "gathering the base": gathers.forward / link,
            }
        )
        prefill = _longest(
            {
                "computing": 2 * prompts * lengths.prompt * forward / rates.flops,
                "gathering the base": 2 * gathers.forward / link,
            }
        )
        found = {"sampling": Part(prefill.seconds + lengths.completion * step.seconds, step.bound), **found}
    told = sum(size for what, size in received.items() if what != "base")
    if told:
        found["exchange"] = Part(told / rates.to(devices.count), "the link")
    return found


def seconds_of(config: Stage, parts: Mapping[str, Part]) -> float:
    """Of an update. With `staleness: 1` the longer of sampling and learning counts on a CPU, unless both compute; on a
    GPU they take turns. A server's sampling is that of a device like ours.
    """
    total = sum(part.seconds for part in parts.values())
    sampling = parts.get("sampling")
    if sampling is None or not isinstance(config, PolicyConfig) or not config.staleness:
        return total
    apart = sampling.bound != "computing" and not config.device.startswith(("cuda", "mps"))
    return max(sampling.seconds, total - sampling.seconds) if apart else total


def _longest(seconds: Mapping[str, float]) -> Part:
    bound = max(seconds, key=lambda name: seconds[name])
    return Part(seconds[bound], bound)
