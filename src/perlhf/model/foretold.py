"""What a base is told to be before its weights are read: the way through it, and the memory that a stage takes.

The way is as it was found when the weights were last read, else on a small copy. The copy has the base's configuration,
all its layers and their kinds, but is narrow and has random weights: which modules are called with what is decided by
code and configuration, not by how wide they are. Loading the weights tells for certain.

Memory is one estimate for `perlhf plan`, `perlhf base` and `--dry-run`: `memory_of`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from perlhf.config.stages import PolicyConfig, RewardConfig
from perlhf.errors import ModelError
from perlhf.kernels import cpu
from perlhf.kernels.modules import gated_parts
from perlhf.kernels.recomputed import layers_of
from perlhf.method.logprobs import chunk_tokens
from perlhf.model.bases.found import first_line
from perlhf.model.bases.packaged import quiet
from perlhf.model.bases.quantised import layer_bytes, weight_bytes
from perlhf.model.model import Model
from perlhf.model.supported import FAULTS, Way
from perlhf.model.ways import recall
from perlhf.parallel.traffic import Gathers, Lengths, Stage, microbatches_of, passes_of
from perlhf.parallel.workers import ALONE, Workers
from perlhf.runs.earlier import earlier_runs, reward_adapters
from perlhf.system import before_torch
from perlhf.system.console import note
from perlhf.system.machine import cpu_computes_in_bf16, free_memory_bytes

KEPT, COPIED = "as found when it was last loaded", "as found on a small copy with random weights"
UNKNOWN = "found out when it is loaded"
_SIZE = 4.0
"""Matrices are so many times as large as they are initialised: attention then tells tokens and positions apart."""
_SIZES: dict[str, int] = {
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), 256),
    **dict.fromkeys("hidden_size d_model n_embd dim embed_dim attention_hidden_size".split(), 32),
    **dict.fromkeys("embedding_size word_embed_proj_dim".split(), 32),
    **dict.fromkeys("intermediate_size ffn_dim n_inner ffn_hidden_size mamba_d_ssm intermediate_size_mlp".split(), 64),
    "dff": 64,
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads linear_num_value_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads num_kv_heads n_head_kv linear_num_key_heads".split(), 2),
    **dict.fromkeys("head_dim global_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim".split(), 8),
    **dict.fromkeys("hidden_size_per_layer_input index_head_dim".split(), 8),
    **dict.fromkeys("q_lora_rank kv_lora_rank moe_intermediate_size moe_hidden_size mamba_d_head".split(), 16),
    **dict.fromkeys("shared_expert_intermediate_size moe_shared_expert_intermediate_size mamba_head_dim".split(), 16),
    **dict.fromkeys("shared_intermediate_size expert_ffn_hidden_size".split(), 16),
    **dict.fromkeys("zero_expert_num num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("mamba_dt_rank laurel_rank time_step_rank rotary_dim lora_rank".split(), 4),
    **dict.fromkeys("mamba_n_heads mamba_num_heads".split(), 4),
    **dict.fromkeys(
        "num_experts_per_tok top_k_experts moe_topk num_experts_per_token moe_k mamba_num_heads".split(), 4
    ),
    **dict.fromkeys("n_group topk_group n_groups mamba_n_groups".split(), 1),
    **dict.fromkeys("mamba_expand expand index_n_heads".split(), 2),
    **dict.fromkeys("mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size".split(), 8),
}
"""At most so much, by configuration key."""
_MOST = 2**26
"""Parameters of a copy that is still small."""


@dataclass(frozen=True)
class Foretold:
    """What is known of the way before the weights are read."""

    way: Way | None
    """None: nobody can tell."""
    source: str
    """How it was found, or why it can't be told."""

    @property
    def uncalled(self) -> tuple[str, ...]:
        """Layers that are never adapted, as far as that is known (`Way.uncalled`)."""
        return self.way.uncalled if self.way else ()


def foretell(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Foretold:
    """The way of a base with this configuration, loaded in a dtype onto a device."""
    if kept := recall(config, dtype, device):
        return Foretold(kept, KEPT)
    narrow = dict(_narrowed(config.to_dict()))
    try:
        network = _random(type(config).from_dict(narrow))
        with quiet(), cpu.off():
            return Foretold(Model(network, {"name": "a small copy", "sha256": ""}).way, COPIED)
    except (*FAULTS, ArithmeticError, AssertionError, ImportError, StrictDataclassError) as error:
        # Of sizes that don't go together.
        reason = error.what if isinstance(error, ModelError) else f"{type(error).__name__}: {first_line(error):.200}"
        return Foretold(None, f"{UNKNOWN}, since a small copy of it doesn't compute ({reason})")


def _random(config: PreTrainedConfig) -> PreTrainedModel:
    """A network with float32 random weights on the CPU.

    Raises:
        ValueError: it isn't small.
    """
    with quiet(), torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > _MOST:
        raise ValueError(f"it would have {size:,} parameters")
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(_SIZE)
    return network


def _narrowed(said: dict[str, Any], latent: bool = False) -> Iterator[tuple[str, Any]]:
    """A configuration's values, widths among them made small, in lists of each layer's and nested ones, too.

    Args:
        latent: attention has widths of its own, which stay, and a key for each head.
    """
    latent = latent or "qk_rope_head_dim" in said
    heads = next((said[key] for key in ("num_attention_heads", "n_head", "n_heads") if said.get(key)), None)
    for key, value in said.items():
        if key == "quantization_config":
            continue
        most = _SIZES.get(key)
        if key in ("num_key_value_heads", "num_kv_heads", "n_head_kv") and (latent or value == heads):
            most = _SIZES["num_attention_heads"]
        if key == "head_dim" and latent:
            most = None
        if key == "head_dim" and {"expand", "num_heads"} <= said.keys():  # heads of a recurrence (Mamba 2)
            most = _SIZES["expand"] * _SIZES["hidden_size"] // _SIZES["num_heads"]
        if str(key).endswith("token_id"):
            most = _SIZES["vocab_size"] - 1
        if key in ("short_factor", "long_factor") and isinstance(value, list) and not latent:
            turned = int(_SIZES["head_dim"] * (said.get("partial_rotary_factor") or 1))
            value = value[: turned // 2]  # one for each pair of a head's numbers that its position turns
        yield key, dict(_narrowed(value, latent)) if isinstance(value, dict) else _at_most(value, most)


def _at_most(value: Any, most: int | None) -> Any:
    if isinstance(value, list | tuple):
        return [_at_most(one, most) for one in value]
    if most is None or isinstance(value, bool) or not isinstance(value, int):
        return value
    return min(value, most)


# ---- memory ---------------------------------------------------------------------------------------------------------

LIBRARIES_BYTES = 450 * 2**20
"""The interpreter with torch and transformers loaded, measured on Linux; of a GPU, the context that they make there."""
OPTIMISER_BYTES = 16
"""Of one trainable parameter: float32 weight, gradient and AdamW's two moments."""
SUM_BYTES = 20
"""Of one trainable parameter, while several workers add up gradients: the flat float32 vector, its padded copy, the
pieces that arrive, those of the sums, and the whole (`parallel.workers.Workers.sum`)."""
HOLES = 2.0
"""What activations take where memory grows holes, in units of their size: on a CPU without our own kernels, in bfloat16
or under glibc's allocator."""
MASK_BYTES = 4
"""Of each pair of a tree's tokens, on a GPU: the mask of all tokens by all tokens."""
COMPILED_BYTES, FEW_BYTES, SETTLED = 720 * 2**20, 100 * 2**20, 40
"""What a run in bfloat16 on a CPU takes beside: kernels that oneDNN compiles for each shape of micro-batches, and its
buffers. In the end, at the start, and after how many micro-batches 63 % of the difference is there (fitted to runs of 4
to 300 of them, docs/performance.md)."""


FREE_SHARE = 0.85
"""Of what is free: the part that a step may take by the estimate, which can be too low by so much."""


@dataclass(frozen=True)
class Devices:
    """What a run is spread over."""

    count: int = 1
    """Workers, of one device each."""
    shards: int = 1
    """Devices that have the base's weights between them; 1: each device has them all."""


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
    devices: Devices = Devices(),
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
        inside, around = _inside_and_around(network)
        held["base"] = (_piece(inside, devices.shards) + sum(p.numel() for p in around)) * width
        held["gathered layers"] = _gathered_weights(network) * width
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
    passing = {"activations": _learning_bytes(config, network, devices, lengths)}
    if isinstance(config, PolicyConfig):
        if config.sampler == "local":
            passing["sampling"] = _sampling_bytes(config, network, width, devices.count, lengths)
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
    learning = _learning_bytes(config, network, devices, lengths)
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


def dtype_in_force(dtype: str, device: str) -> str:
    """`auto` resolved, also for a device that isn't here: bfloat16 on CUDA or where the CPU is faster in it,
    float32 on Apple's GPUs."""
    if dtype != "auto":
        return dtype
    if device.startswith("mps"):
        return "float32"
    return "bfloat16" if device.startswith("cuda") or cpu_computes_in_bf16()[0] else "float32"


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


def gathers_of(network: PreTrainedModel, width: int, shards: int) -> Gathers | None:
    """Bytes that a device receives of a base which so many devices have in parts; None where each has it whole.

    Args:
        width: bytes of a weight.
    """
    if shards == 1:
        return None
    inside, _ = _inside_and_around(network)
    return Gathers((shards - 1) * width * _piece(inside, shards))


def _inside_and_around(network: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What lies in parts; and embedding and output head, which each device has whole (`bases.sharded`), each once."""
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    assert isinstance(head, nn.Module) and isinstance(embedding, nn.Module)
    around = list(dict.fromkeys([*head.parameters(), *embedding.parameters()]))
    return [p for p in network.parameters() if not any(p is one for one in around)], around


def _piece(parameters: Iterable[nn.Parameter], shards: int) -> int:
    """Weights of one device's parts: parameters are cut along their first dimension."""
    return sum(-(-p.shape[0] // shards) * p[0].numel() if p.ndim else 1 for p in parameters)


def _gathered_weights(network: PreTrainedModel) -> int:
    """Weights of a base in parts that a device has whole at one time: a layer that computes, of whose gated MLP one
    linear layer at a time, and a copy of what was gathered last, which stays until the next one is there.
    """
    most = 0
    for block in layers_of(network) or ():
        apart = [_size(part) for child in block.children() for part in gated_parts(child)]
        around, largest = _size(block) - sum(apart), max(apart, default=0)
        most = max(most, 2 * around + largest, around + 2 * largest)
    return most


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Shape:
    """Sizes of a network's layers, as its configuration says them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    """Width of a head of attention."""
    feed_forward: int
    """Width of the feed-forward layer, for a token: of all experts that it goes through together."""
    vocab: int
    experts: int
    """Of a layer; 0: it has none."""
    experts_of_token: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Shape":
        """Of a configuration; where each layer has its own size, the largest."""
        text: Any = config.get_text_config()
        parts = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]

        def said(*keys: str) -> int:
            return next((size for key in keys if (size := _most([_most(getattr(p, key, None)) for p in parts]))), 0)

        heads = said("num_attention_heads")
        experts = said("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        chosen = said("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
        plain = said("intermediate_size") or 4 * text.hidden_size
        own = said("moe_intermediate_size") or plain
        shared = said("shared_expert_intermediate_size") or said("n_shared_experts") * own
        wide = max(chosen * own + shared, plain if own != plain else 0)
        return cls(
            layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            heads=heads,
            kv_heads=said("num_key_value_heads") or heads,
            head=said("head_dim") or text.hidden_size // (heads or 1),
            feed_forward=wide if experts else plain,
            vocab=int(text.vocab_size),
            experts=experts,
            experts_of_token=chosen if experts else 0,
        )

    @property
    def cached(self) -> int:
        """Numbers that the sampler keeps of one token: keys and values of all layers."""
        return self.layers * 2 * self.kv_heads * self.head


def _learning_bytes(config: Stage, network: PreTrainedModel, devices: Devices, lengths: Lengths) -> int:
    """What a micro-batch of a worker takes while it is learned from."""
    dtype, on_gpu = dtype_in_force(config.dtype, config.device), config.device.startswith(("cuda", "mps"))
    to_holes = dtype == "bfloat16" or before_torch.expected() == "system"
    loose = not on_gpu and cpu.compiler()[0] is None and to_holes
    share = -(-next(passes_of(config, lengths)).tokens // devices.count)
    tokens = min(config.microbatch_tokens, max(lengths.prompt + lengths.completion, share))
    kept = _activation_bytes(config, network, 2 if dtype == "bfloat16" else 4, tokens)
    mask = MASK_BYTES * tokens**2 if on_gpu and config.packing != "none" else 0
    return int(kept * (HOLES if loose else 1)) + mask + _logits_bytes(config, network)


def _activation_bytes(config: Stage, network: PreTrainedModel, width: int, tokens: int) -> int:
    """Kept for the backward pass of one micro-batch of so many tokens.

    Per token and layer of an adapter on attention: three vectors of the hidden size (inputs of two norms and of the
    adapters), q, k, v and their mixture, and two of the feed-forward size (gate and up). Adapters on all linear layers
    and full tuning keep the inputs of the feed-forward layers as well. Layers below `adapter.layers` keep nothing.
    Where attention is computed under a mask, keys and values are repeated for all heads that share them. Norms beyond
    two (of queries and keys, behind attention) keep their inputs, too.
    Layers without heads (of a recurrence) count as four vectors of twice the hidden size in the place of q, k, v.
    Where layers are recomputed it is the input of each, and one layer at a time.
    """
    shape = Shape.of(network.config)
    layers = shape.layers
    masked = config.packing == "none" or config.device.startswith(("cuda", "mps")) or cpu.compiler()[0] is None
    keys = shape.heads if masked else shape.kv_heads
    mixed = 2 * (shape.heads + keys) * shape.head if shape.heads else 8 * shape.hidden
    per_token = 3 * shape.hidden + mixed + 2 * shape.feed_forward + _beside_norms(network, shape)
    if config.tuning == "full" or config.adapter.targets != "attention":
        per_token += shape.hidden + shape.feed_forward
    if config.tuning == "lora" and config.adapter.layers != "all":
        layers = min(layers, int(config.adapter.layers.removeprefix("last:")))
    if config.recompute == "always":
        return tokens * (layers * shape.hidden + per_token) * width
    return tokens * layers * per_token * width


def _beside_norms(network: PreTrainedModel, shape: Shape) -> int:
    """Numbers of one token that a layer's norms are given beyond the two of the hidden size that all layers have."""
    most = 0
    for block in layers_of(network) or ():
        found = 0
        for name, module in block.named_modules():
            weights = list(module.parameters())
            if not type(module).__name__.lower().endswith("norm") or not weights or weights[0].ndim != 1:
                continue
            of_heads = {"q": shape.heads, "k": shape.kv_heads}.get(name.rpartition(".")[2][:1], 1)
            found += len(weights[0]) * (of_heads if len(weights[0]) == shape.head != shape.hidden else 1)
        most = max(most, found - 2 * shape.hidden)
    return most


def _logits_bytes(config: Stage, network: PreTrainedModel) -> int:
    """One chunk of float32 logits and their exponentials."""
    vocab = Shape.of(network.config).vocab
    return 0 if isinstance(config, RewardConfig) else 2 * chunk_tokens(vocab) * vocab * 4


def _sampling_bytes(config: PolicyConfig, network: PreTrainedModel, width: int, workers: int, lengths: Lengths) -> int:
    """Keys and values of a worker's prompts and completions, and beside them whichever is more: all its prompts' tokens
    in one layer, or float32 logits of all rows with their exponentials.

    The reference's completions that centre scores, and those of a validation, are one for each prompt. Where prompts
    take turns (`max_rows` on a GPU), all of them are kept beside those that have a place.
    """
    shape, prompt, longest = Shape.of(network.config), lengths.prompt, config.max_completion_tokens
    on_gpu = config.device.startswith("cuda")
    mixed = 2 * (shape.heads + shape.kv_heads) * shape.head if shape.heads else 8 * shape.hidden

    def taken(prompts: int, samples: int) -> int:
        own = -(-prompts // workers)
        takes_turns = on_gpu and config.packing != "none"
        turns = takes_turns and config.max_rows is not None and config.max_rows < own * samples
        places = max(1, (config.max_rows or 0) // samples) if turns else own
        cache = (own * prompt * turns + places * (prompt + samples * longest)) * shape.cached * width
        prefill = own * prompt * (3 * shape.hidden + mixed + 3 * shape.feed_forward) * width
        return cache + max(prefill, places * samples * shape.vocab * 4 * 3)

    once = max(config.validation_prompts, config.centre_prompts)
    return max(taken(config.prompts_per_update, config.completions_per_prompt), taken(once, 1))


def _most(said: Any) -> int:
    """A number of a configuration, the largest where each layer has its own; 0 where there is none."""
    numbers = said if isinstance(said, list | tuple) else [said]
    return max((number for number in numbers if isinstance(number, int)), default=0)
