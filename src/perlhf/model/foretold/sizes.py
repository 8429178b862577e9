"""Sizes of a network's parts, and what computing with it takes, in bytes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from perlhf.config.stages import PolicyConfig, RewardConfig
from perlhf.kernels import cpu
from perlhf.kernels.modules import gated_parts
from perlhf.kernels.recomputed import layers_of
from perlhf.method.logprobs import chunk_tokens
from perlhf.parallel.traffic import Gathers, Lengths, Stage, passes_of
from perlhf.system import before_torch
from perlhf.system.machine import cpu_computes_in_bf16

HOLES = 2.0
"""What activations take where memory grows holes, in units of their size: on a CPU without our own kernels, in bfloat16
or under glibc's allocator."""
MASK_BYTES = 4
"""Of each pair of a tree's tokens, on a GPU: the mask of all tokens by all tokens."""


@dataclass(frozen=True)
class Devices:
    """What a run is spread over."""

    count: int = 1
    """Workers, of one device each."""
    shards: int = 1
    """Devices that have the base's weights between them; 1: each device has them all."""


ONE = Devices()
"""A single device."""


def dtype_in_force(dtype: str, device: str) -> str:
    """`auto` resolved, also for a device that isn't here: bfloat16 on CUDA or where the CPU is faster in it,
    float32 on Apple's GPUs."""
    if dtype != "auto":
        return dtype
    if device.startswith("mps"):
        return "float32"
    return "bfloat16" if device.startswith("cuda") or cpu_computes_in_bf16()[0] else "float32"


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


def gathers_of(network: PreTrainedModel, width: int, shards: int) -> Gathers | None:
    """Bytes that a device receives of a base which so many devices have in parts; None where each has it whole.

    Args:
        width: bytes of a weight.
    """
    if shards == 1:
        return None
    inside, _ = _inside_and_around(network)
    return Gathers((shards - 1) * width * _piece(inside, shards))


def weights_in_parts(network: PreTrainedModel, shards: int) -> int:
    """Weights that each of so many devices holds of a base that they have in parts."""
    inside, around = _inside_and_around(network)
    return _piece(inside, shards) + sum(p.numel() for p in around)


def _inside_and_around(network: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What lies in parts; and embedding and output head, which each device has whole (`bases.sharded`), each once."""
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    assert isinstance(head, nn.Module) and isinstance(embedding, nn.Module)
    around = list(dict.fromkeys([*head.parameters(), *embedding.parameters()]))
    return [p for p in network.parameters() if not any(p is one for one in around)], around


def _piece(parameters: Iterable[nn.Parameter], shards: int) -> int:
    """Weights of one device's parts: parameters are cut along their first dimension."""
    return sum(-(-p.shape[0] // shards) * p[0].numel() if p.ndim else 1 for p in parameters)


def gathered_weights(network: PreTrainedModel) -> int:
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


def learning_bytes(config: Stage, network: PreTrainedModel, devices: Devices, lengths: Lengths) -> int:
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


def sampling_bytes(config: PolicyConfig, network: PreTrainedModel, width: int, workers: int, lengths: Lengths) -> int:
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
