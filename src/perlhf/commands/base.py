"""What a base is, and what training on it takes, before anything is trained: `perlhf base` and `perlhf plan`.

Weights aren't read; a plan needs none.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from perlhf.config.commands import BaseConfig, PlanConfig, amount
from perlhf.config.stages import AdapterConfig, EncodingConfig, PolicyConfig, RewardConfig, SftConfig
from perlhf.errors import AdapterError, ModelError
from perlhf.kernels.attention.sight import FULL, Sight
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import (
    by_configuration,
    end_ids,
    load_tokenizer,
    pick_device,
    pick_dtype,
    vocabulary,
    without_weights,
)
from perlhf.model.bases.quantised import is_kept
from perlhf.model.encoding.encode import Encoder
from perlhf.model.foretold.memory import Memory, memory_of, with_recompute
from perlhf.model.foretold.sizes import Devices, dtype_in_force, gathers_of
from perlhf.model.open import left_out
from perlhf.model.supported import Way, target_paths
from perlhf.parallel.traffic import Lengths, Stage, exchanged
from perlhf.system.machine import memory_bytes
from perlhf.training.plan import (
    Part,
    Rates,
    foretell_way,
    lora_parameters,
    parts_of,
    seconds_of,
    server_of,
    trainable_parameters,
    trained_tensors,
    way_in_words,
)

_WINDOWS, _CHUNKS = ("sliding_window", "sliding_window_size", "window_size"), ("attention_chunk_size",)
"""Configuration keys of how far back a layer sees."""


def describe(config: BaseConfig) -> dict[str, Any]:
    """What `perlhf base` tells, as `--json` has it; memory is in bytes, by stage and by what holds it.

    Raises:
        ModelError: the base isn't here, can't be read or can't be a base; no such device.
    """
    base = Base.find(config.base)
    network = without_weights(config.base)
    tokenizer = load_tokenizer(base)
    chosen, why = pick_dtype(config.dtype, config.device)
    settings: dict[str, Any] = {"base": config.base, "dtype": config.dtype, "device": config.device}
    foretold = foretell_way(SftConfig(**settings), network)
    way, text = foretold.way, network.config.get_text_config()
    adapters = {targets: _adapted(targets, network, foretold.uncalled) for targets in ("attention", "all")}
    targets = "all" if "error" in adapters["attention"] else "attention"
    rows = int(text.vocab_size)
    return {
        "base": config.base,
        "directory": str(base.directory),
        "family": network.config.model_type,
        "class": type(network).__name__,
        "parameters": network.num_parameters(),
        "layers": layers_by_kind(network, way),
        "way": {
            "packing": way.packing if way else None,
            "why": way.why if way else None,
            "source": foretold.source,
            "said": way_in_words(foretold),
        },
        "logits": {"scale": way.logits.scale, "cap": way.logits.cap} if way else None,
        "dtype": {"dtype": str(chosen).removeprefix("torch."), "said": why},
        "quantisation": _quantisation(network.config),
        "context": getattr(text, "max_position_embeddings", None),
        "vocabulary": {"rows": rows, "tokens": vocabulary(tokenizer), "tied": _is_tied(network)},
        "chat_template": _template(base.directory, tokenizer),
        "end_tokens": _ends(base, tokenizer),
        "adapters": adapters,
        "notes": [note for note in [left_out(network, AdapterConfig(targets="all"))] if note],
        "memory_bytes": _memory(settings | {"adapter": AdapterConfig(targets=targets)}, network, foretold.uncalled),
    }


def layers_by_kind(network: PreTrainedModel, way: Way | None) -> dict[str, int]:
    """How many layers mix tokens in which way, in the order of their first.

    In a tree that is what their masks are; otherwise what the configuration calls them, else their modules' class.
    """
    config = network.config.get_text_config()
    count = int(config.num_hidden_layers)
    if way is not None and way.packing == "tree":
        return dict(Counter(_sight_in_words(way.sights.get(layer, FULL)) for layer in range(count)))
    for key in ("layer_types", "layers_block_type"):
        kinds = getattr(config, key, None)
        if kinds and len(kinds) == count and all(isinstance(kind, str) for kind in kinds):
            return dict(Counter(_kind_in_words(kind, config) for kind in kinds))
    lists = (part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return dict(Counter(type(layer).__name__ for layer in next(lists, ())))


def _sight_in_words(sight: Sight) -> str:
    if sight.window is not None:
        return f"window of {sight.window:,}"
    return "full attention" if sight.chunk is None else f"chunks of {sight.chunk:,}"


def _kind_in_words(kind: str, config: PreTrainedConfig) -> str:
    """A layer type of transformers, with how far back it sees where the configuration says that."""
    for part, keys, words in (("sliding", _WINDOWS, "window of"), ("chunked", _CHUNKS, "chunks of")):
        sizes = [size for key in keys if isinstance(size := getattr(config, key, None), int)]
        if part in kind and sizes:
            return f"{words} {sizes[0]:,}"
    return kind.replace("_", " ")


def _adapted(targets: Any, network: PreTrainedModel, uncalled: Sequence[str]) -> dict[str, Any]:
    """Layers by last name and trainable parameters at the default rank; why none, where there are none."""
    shape = AdapterConfig(targets=targets)
    try:
        paths = target_paths(network, targets, uncalled=uncalled)
    except AdapterError as error:
        return {"error": f"nothing: {error.what}"}
    names = dict(Counter(path.rpartition(".")[2] for path in paths))
    return {"layers": names, "rank": shape.rank, "parameters": lora_parameters(shape, network, uncalled)}


def _quantisation(config: PreTrainedConfig) -> str:
    """How the weights come, by the configuration."""
    said: Any = getattr(config, "quantization_config", None)
    said = said if said is None or isinstance(said, dict) else said.to_dict()
    return "none" if not said else str(said.get("quant_method") or "of an unknown kind")


def _is_tied(network: PreTrainedModel) -> bool:
    head: Any = network.get_output_embeddings()
    embedding: Any = network.get_input_embeddings()
    tied = bool(network.config.get_text_config().tie_word_embeddings)
    return tied and head is not None and embedding is not None and head.weight.shape == embedding.weight.shape


def _template(directory: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Whose chat template conversations are rendered by, and where it is."""
    own: Any = tokenizer.chat_template
    if not own:
        return "none of its own: encoding.template names plain or a file"
    files = [file.name for file in sorted(directory.glob("chat_template*")) if file.is_file()]
    several = f", several: {', '.join(own)}" if isinstance(own, dict) else ""
    return f"its own ({files[0] if files else 'tokenizer_config.json'}{several})"


def _ends(base: Base, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Tokens that end an answer, by the chat template or, without one, by the base's configuration."""
    encoding = EncodingConfig(template="tokenizer" if tokenizer.chat_template else "plain")
    numbers = Encoder(tokenizer, encoding, end_ids(base)).end_ids
    return [{"id": number, "text": str(tokenizer.convert_ids_to_tokens(number))} for number in numbers]


def _memory(settings: dict[str, Any], network: PreTrainedModel, uncalled: Sequence[str]) -> dict[str, dict[str, int]]:
    """Estimated bytes of each stage as it is by default; a policy has a reference and one reward model beside it."""
    stages = {
        "sft": SftConfig(**settings),
        "reward": RewardConfig(**settings),
        "policy": PolicyConfig(**settings, sft=Path("sft"), reward=("reward",)),
    }
    found = {}
    for name, stage in stages.items():
        found[name] = memory_of(stage, network, trainable_parameters(stage, network, uncalled)).parts()
    return found


# ---- perlhf plan ----------------------------------------------------------------------------------------------------

REACHED = 0.4
"""Share of the rate of one large product that whole updates reach (docs/performance.md: 33 to 51 %)."""
GOOD_TO = 0.15
"""How far the estimate of memory may be off (docs/scale.md)."""


def forecast(asked: PlanConfig, config: Stage) -> dict[str, Any]:
    """What `perlhf plan` tells of a stage, as `--json` has it; bytes are those of one device, or received by it.

    Raises:
        ModelError: the base's configuration isn't here and can't be fetched, or isn't supported.
        AdapterError: a target that matches no layer.
        ConfigError: the base can't be spread as asked.
    """
    if config.device == "auto" and (asked.device_memory is not None or torch.cuda.is_available()):
        config = config.model_copy(update={"device": "cuda"})
    network = by_configuration(config.base, config.quantize, config.device)
    foretold = foretell_way(config, network)
    if foretold.way is not None and foretold.way.packing == "none":
        config = config.model_copy(update={"packing": "none"})
    most, dtype = Lengths.longest(config), dtype_in_force(config.dtype, config.device)
    lengths = Lengths(asked.prompt_tokens or most.prompt, asked.completion_tokens or most.completion)
    trainable = trainable_parameters(config, network, foretold.uncalled)
    tensors, width = trained_tensors(config, network, foretold.uncalled), 2 if dtype == "bfloat16" else 4
    room = _room(asked, config.device)
    updates = config.updates if isinstance(config, PolicyConfig) else config.max_updates
    ways = _spread(asked, config, network)
    stages = dict.fromkeys(ways, config)
    if room is not None:
        stages = {
            how: with_recompute(config, network, trainable, devices, lengths, room) for how, devices in ways.items()
        }
    found = {how: memory_of(stages[how], network, trainable, ways[how], lengths, updates) for how in ways}
    how = next((how for how, memory in found.items() if room is None or memory.total <= room), None)
    chosen = how or min(found, key=lambda one: found[one].total)
    devices, memory = ways[chosen], found[chosen]
    server, on_gpu = server_of(config, network, lengths), config.device.startswith("cuda")
    gathers = gathers_of(network, width, devices.shards)
    received = exchanged(config, tensors, sum(trainable.values()), devices.count, lengths, gathers)
    rates = rates_of(asked, dtype, config.device)
    parts: dict[str, Part] = {}
    if rates is not None and (gathers is None or asked.link is not None):  # gathers take most of the time
        parts = parts_of(stages[chosen], network, devices, lengths, rates, received, gathers)
    return {
        "base": config.base,
        "parameters": network.num_parameters(),
        "trainable": trainable,
        "dtype": dtype,
        "device": config.device,
        "way": way_in_words(foretold, config.packing),
        "devices": asked.devices,
        "device_memory_bytes": room,
        "shard": chosen,
        "shards": devices.shards,
        "fits": None if room is None else how is not None,
        "recompute": stages[chosen].recompute == "always",
        "said": _verdict(chosen, devices, memory, room) + _recomputing(stages[chosen]),
        "memory_bytes": memory.parts(),
        "server_memory_bytes": server,
        "server_said": _beside(memory.total, server, room, on_gpu) if server else None,
        "memory_by_shard_bytes": {one: memory.total for one, memory in found.items()},
        "lengths": {"prompt": lengths.prompt, "completion": lengths.completion},
        "exchanged_bytes": {**received, "total": sum(received.values())},
        "seconds": {name: {"seconds": part.seconds, "bound": part.bound} for name, part in parts.items()},
        "updates_per_hour": 3600 / seconds_of(stages[chosen], parts) if parts else None,
        "rates": None if rates is None else {"flops": rates.flops, "read": rates.read},
    }


def _room(asked: PlanConfig, device: str) -> int | None:
    """Memory of one device; None for one that isn't here and whose memory nobody named. Workers of one machine share
    its memory."""
    if asked.device_memory is not None:
        return int(amount(asked.device_memory))
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return memory_bytes() // min(asked.devices, asked.devices_per_node)


def _spread(asked: PlanConfig, config: Stage, network: PreTrainedModel) -> dict[str, Devices]:
    """Ways to have the base on the devices, those that exchange less first; only the one that is asked for."""
    count, node = asked.devices, min(asked.devices, asked.devices_per_node)
    ways = {"none": Devices(count), "node": Devices(count, node), "full": Devices(count, count)}
    wanted = asked.shard if asked.shard != "auto" else config.shard
    if is_kept(network.config, config.quantize) or config.tuning == "full":
        if wanted not in ("auto", "none"):
            what = "a quantised base" if config.tuning == "lora" else "a base whose own weights are trained"
            raise ModelError(f"{what} is whole on each device", where="shard", allowed="none", hint="leave shard out")
        return {"none": ways["none"]}
    if wanted != "none" or asked.shard == "none":
        return {wanted: ways[wanted]}
    return {
        how: one for how, one in ways.items() if how == "none" or (one.shards > 1 and (how, node) != ("full", count))
    }


def _verdict(how: str, devices: Devices, memory: Memory, room: int | None) -> str:
    where = {
        "none": "the base whole on each device",
        "node": f"the base in {devices.shards} parts, on the devices of a node",
        "full": f"the base in {devices.shards} parts, on all devices",
    }[how]
    if room is None:
        return f"{where}; whether it fits isn't known without --device-memory"
    share = memory.total / room
    if share > 1:
        return f"does not fit: {where} takes {share:.0%} of a device's memory"
    near = f", within the {GOOD_TO:.0%} that the estimate may be off" if share > 1 / (1 + GOOD_TO) else ""
    return f"fits: {where} takes {share:.0%} of a device's memory{near}"


def _beside(run: int, server: dict[str, int], room: int | None, on_gpu: bool) -> str:
    """Whether a server that samples has room on the run's own device, and how it is held to its part."""
    if room is None:
        return "whether both fit on one device isn't known without --device-memory"
    both = (run + server["total"]) / room
    if both > 1:
        return f"both on one device don't fit ({both:.0%}): it needs another one, or fewer rows an update"
    part = f"--gpu-memory-utilization {math.ceil(100 * server['total'] / room) / 100:.2f}"
    if not on_gpu:
        part = f"VLLM_CPU_KVCACHE_SPACE={math.ceil(server['cache'] / 2**30)} in its environment"
    return f"both fit on one device ({both:.0%}): start it with {part} there"


def _recomputing(config: Stage) -> str:
    return "; layers are computed once more in the backward pass" if config.recompute == "always" else ""


def rates_of(asked: PlanConfig, dtype: str, device: str) -> Rates | None:
    """What is given, and what isn't as it is measured on this machine; None where the device isn't here. Workers of one
    machine's CPU share what it reaches.

    Raises:
        ModelError: no such device.
    """
    known = {name: amount(text) for name in ("flops", "read", "link") if (text := getattr(asked, name))}
    known["node_link"] = amount(asked.node_link) if asked.node_link else known.get("link", float("inf"))
    if not {"flops", "read"} <= known.keys():
        if device.startswith(("cuda", "mps")) and not torch.cuda.is_available():
            return None
        place = pick_device(device)
        sharing = min(asked.devices, asked.devices_per_node) if place.type == "cpu" else 1
        known = {name: rate / sharing for name, rate in measured(dtype, str(place)).items()} | known
    return Rates(**known, node=asked.devices_per_node)


def measured(dtype: str, device: str) -> dict[str, float]:
    """Operations a second that updates reach here (`REACHED` of a product's), and bytes a second from memory, in about
    a second."""
    left, right = (torch.randn(2048, 2048, device=device).to(getattr(torch, dtype)) for _ in range(2))
    held = torch.ones(2**26, dtype=torch.int64, device=device)
    products = _each(lambda: left @ right, device)
    return {"flops": REACHED * 2 * 2048**3 / products, "read": held.nbytes / _each(held.sum, device)}


def _each(work: Any, device: str) -> float:
    """Seconds of one of several goes, the first one left out."""
    work()
    times, began = 0, time.perf_counter()
    while times < 3 or time.perf_counter() - began < 0.3:
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times += 1
    return (time.perf_counter() - began) / times
