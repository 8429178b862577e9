"""The network's modules as we compute them: adapted linear layers, norms, gated MLPs, attention with rotary positions.

`fuse` puts them in the place of the network's own. They do what those do, operation by operation, so that their
outputs are the same bit for bit; a module whose output differs on random input stays as it is. Parameters keep their
names.
"""

import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from perlhf.errors import AdapterError
from perlhf.kernels import cpu, members
from perlhf.kernels.attention import tree_attention
from perlhf.kernels.call import HeldPair, current_call
from perlhf.kernels.elementwise import rms_norm, rotated, silu_product
from perlhf.kernels.quantised import QuantisedLinear, dtype_of
from perlhf.method.lora import (
    LowRank,
    Quantised,
    adapted_linear,
    ends_with,
    joined,
    keyed_dropout,
    match,
    quantised_linear,
)
from perlhf.parallel.shard import whole_around
from perlhf.system.unforeseen import memory_is_full

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
KNOWN = ("config", "layer_idx", "head_dim", "scaling", "num_key_value_groups")
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of modules that choose experts, and of what they are made of, in networks that have some."""
SHARED = ("shared_expert", "shared_experts", "shared_mlp")
"""Names of modules beside the experts, that all tokens go through."""


class AdaptedLinear(nn.Module):
    """Replaces a linear layer of the base, under the adapters of the call. Without any it is that layer exactly.

    The adapters in `pairs` are deliberately not registered as parameters: the base's names and parameters stay its own.
    """

    def __init__(self, linear: nn.Linear | Conv1D):
        super().__init__()
        self.weight = linear.weight
        self.bias: nn.Parameter | None = linear.bias
        self.quantised = linear.quantised if isinstance(linear, QuantisedLinear) else None
        self._dtype = dtype_of(linear) if isinstance(linear, QuantisedLinear) else None
        self.transposed = isinstance(linear, Conv1D)
        shape = features(linear)
        assert shape is not None
        self.in_features, self.out_features = shape
        self.pairs: dict[str, LowRank] = {}
        self.number = 0
        """Among the base's adapted layers, so that what is dropped isn't the same in all of them."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, which isn't what a quantised weight is kept in."""
        return self._dtype or self.weight.dtype

    def dense(self) -> Tensor:
        """The base's weight, [out, in]: GPT-2 keeps it the other way round; a quantised one is read back."""
        if self.quantised is not None:
            return self.quantised.weight()
        return self.weight.t() if self.transposed else self.weight

    def hold(self, adapters: Sequence[str]) -> HeldPair | None:
        """These adapters' pairs converted once, for passes between which they don't change; None without any here."""
        pairs = self._pairs(adapters)
        if not pairs:
            return None
        a, b = joined(pairs, self.dtype)
        return HeldPair((a, b), cpu.padded(a, b))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        call, frozen = current_call(), self.quantised or self.dense()
        if call.members and any(own := [self._pairs(names) for names in call.members]):
            return members.linear(x, frozen, self.bias, own, self.dtype)
        held = call.held.get(self) if call.held is not None else None
        pairs = self._pairs(call.adapters) if call.held is None else []
        if isinstance(frozen, Tensor) and not pairs and self.bias is None and cpu.few_rows(x, frozen):
            if call.mixed is not None:
                return call.mixed.of_few_rows(x, frozen, self)
            return cpu.linear(x, frozen, held.padded if held else None)
        if call.mixed is not None:
            return call.mixed.added(self._frozen(x, frozen), x, self)
        if held:
            return adapted_linear(x, frozen, self.bias, *held.pair)
        if not pairs:
            return self._frozen(x, frozen)
        dtype, top = self.dtype, self.pairs.get(call.adapters[-1])
        if top is not None and top.dropout and call.dropout:
            keys = call.dropout_keys
            if keys is not None and keys.shape == x.shape[:-1]:
                keep = keyed_dropout(keys, self.number, x.shape[-1], top.dropout).to(x.dtype)
            else:
                keep = F.dropout(torch.ones_like(x), top.dropout)
            a, b = top.a.to(dtype), (top.b * top.scale).to(dtype)
            if len(pairs) == 1:
                return adapted_linear(x, frozen, self.bias, a, b, keep)
            # What lies beneath is frozen: its input isn't dropped.
            return self._adapted(x, pairs[:-1]) + F.linear(F.linear(x * keep, a), b)
        return self._adapted(x, pairs)

    def _frozen(self, x: Tensor, frozen: Tensor | Quantised) -> Tensor:
        if not isinstance(frozen, Tensor):
            return quantised_linear(x, frozen)
        if self.bias is None and cpu.few_rows(x, frozen):
            return cpu.linear(x, frozen)
        return F.linear(x, frozen, self.bias)

    def _pairs(self, adapters: Sequence[str]) -> list[LowRank]:
        return [self.pairs[name] for name in adapters if name in self.pairs]

    def _adapted(self, x: Tensor, pairs: Sequence[LowRank]) -> Tensor:
        return adapted_linear(x, self.quantised or self.dense(), self.bias, *joined(pairs, self.dtype))


class RmsNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), in float32, over the last dimension."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) of three linear layers, which may be adapted later."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same shape."""
        return self.down_proj(silu_product(self.gate_proj(x), self.up_proj(x)))


class Linear(nn.Linear):
    """A linear layer that is faster while sampling, where there is a kernel for few rows."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.bias is None and cpu.few_rows(input, self.weight):
            return cpu.linear(input, self.weight)
        return F.linear(input, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Queries, keys and values of linear layers, turned by their positions; parameters keep their names.

    Args:
        stock: the network's own module, with the layers of `LAYERS`.
    """

    def __init__(self, stock: nn.Module):
        super().__init__()
        known: Any = stock
        self.q_proj: nn.Module = known.q_proj
        self.k_proj: nn.Module = known.k_proj
        self.v_proj: nn.Module = known.v_proj
        self.o_proj: nn.Module = known.o_proj
        self.config, self.layer_idx, self.head_dim = known.config, known.layer_idx, known.head_dim
        self.scaling, self.num_key_value_groups, self.is_causal = known.scaling, known.num_key_value_groups, True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[batch, time, hidden] to the same shape; what transformers' layers call."""
        shape = hidden_states.shape[:-1]
        layers = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (layer(hidden_states).view(*shape, -1, self.head_dim) for layer in layers)
        if position_embeddings is not None:
            query, key = (rotated(x, *position_embeddings) for x in (query, key))
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, _ = tree_attention.attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*shape, -1)), None


def match_targets(
    modules: Iterable[tuple[str, nn.Module]],
    targets: str | tuple[str, ...],
    skip: tuple[str, ...] = (),
    layers: str = "all",
) -> list[str]:
    """Module paths that `targets` names in `layers`, in module order (`lora.match`).

    Of a mixture of experts `attention` takes the projections that all tokens share, too, `all` the experts that are
    linear layers; routers are never adapted.

    Args:
        modules: `named_modules()` of the base.
        skip: paths never adapted (the output head).

    Raises:
        AdapterError: a target that matches nothing, or names fused experts or a router.
    """
    modules = list(modules)
    linear = [n for n, m in modules if is_linear(m) and n not in skip]
    fused, routers, shared = fused_experts(modules), [], []
    if fused or any("experts" in path.split(".") for path in linear):
        routers = [path for path, _ in modules if not {*path.split(".")}.isdisjoint(ROUTERS)]
        linear = [path for path in linear if path not in routers]
        shared = [path for path in linear if not {*path.split(".")}.isdisjoint(SHARED)]
    for target in () if targets in ("all", "attention") else (targets,) if isinstance(targets, str) else targets:
        if not any(ends_with(path, target) for path in linear):
            hint = "--adapter.targets all"
            if any(ends_with(path, target) for path in (*fused, *(path.rpartition(".")[0] for path in fused))):
                what = f"adapter target '{target}' names experts that are fused into one tensor, which can't be adapted"
                hint += " takes every layer beside them"
                raise AdapterError(what, where="adapter.targets", allowed=_names(linear), hint=hint)
            if any(ends_with(path, target) for path in routers):
                what = f"adapter target '{target}' names a router, which chooses experts and is never adapted"
                raise AdapterError(what, where="adapter.targets", allowed=_names(linear), hint=hint)
    return match(linear, targets, layers, shared)


def fused_experts(modules: Iterable[tuple[str, nn.Module]], targets: str | tuple[str, ...] = "all") -> list[str]:
    """Paths of the weights that hold all experts of a layer, as far as `targets` would name them: no linear layers.

    Args:
        modules: `named_modules()` of the base.
    """
    found = []
    for path, module in modules:
        if "experts" in type(module).__name__.lower() and not isinstance(module, nn.Linear):
            held = [name for name, weight in module.named_parameters(recurse=False) if weight.ndim > 2 and len(weight)]
            found += [path if name == "weight" else f"{path}.{name}" for name in held]
    if targets == "all":
        return found
    wanted = () if targets == "attention" else (targets,) if isinstance(targets, str) else targets
    return [path for path in found if any(ends_with(path, target) for target in wanted)]


def _names(linear: Sequence[str]) -> str:
    return f"attention, all, or names among {', '.join(sorted({path.rpartition('.')[2] for path in linear}))}"


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether the module computes a linear layer and nothing more: routers of experts derive from it and do more."""
    if type(module) is Conv1D:
        return True
    if not isinstance(module, nn.Linear | AdaptedLinear):
        return False
    known = (nn.Linear.forward, Linear.forward, AdaptedLinear.forward, QuantisedLinear.forward)
    if type(module).forward in known or module.weight.is_meta:
        return True
    x = torch.linspace(-1, 1, module.in_features).to(module.weight)[None]
    try:
        out: Any = module(x)
    except (TypeError, ValueError, RuntimeError) as error:
        if memory_is_full(error):
            raise
        return False
    expected = F.linear(x, module.weight, module.bias)
    return isinstance(out, Tensor) and out.shape == expected.shape and torch.allclose(out, expected, 1e-2, 1e-2)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out]."""
    return layer.transposed if isinstance(layer, AdaptedLinear) else isinstance(layer, Conv1D)


def features(layer: nn.Module | None) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; None of what is none."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear | AdaptedLinear) else None


def update_of(layer: nn.Module, pair: LowRank) -> Tensor:
    """What a pair adds to the layer's weight, float32, in the shape that the weight has."""
    update = pair.scale * (pair.b.float() @ pair.a.float())
    return update.t() if is_transposed(layer) else update


def fuse(base: nn.Module, paths: Collection[str] | None = None) -> int:
    """Replaces linear layers, and the norms and MLPs of `base` that compute what is computed here; tells how many of
    the latter.

    Args:
        paths: of the modules that may be replaced; None for all.
    """
    for path, module in list(base.named_modules()):
        if type(module) is nn.Linear and (paths is None or path in paths):
            own = Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            own.weight, own.bias = module.weight, module.bias
            _put(base, path, own.train(module.training))
    return len(_replace(base, lambda path, module: _twin(module) if paths is None or path in paths else None, _same))


def adapted(base: nn.Module, path: str) -> AdaptedLinear:
    """The linear layer at `path` as one that takes adapters, in its place."""
    layer = base.get_submodule(path)
    if not isinstance(layer, AdaptedLinear):
        assert isinstance(layer, nn.Linear | Conv1D)
        layer = AdaptedLinear(layer)
        layer.number = zlib.crc32(path.encode()) >> 1
        _put(base, path, layer)
    return layer


def fuse_attention(base: nn.Module) -> dict[str, nn.Module]:
    """The same for attention modules, where the tree's attention is the network's; gives those replaced, by path."""
    return _replace(
        base, lambda _, module: SelfAttention(module) if _is_llama_attention(module) else None, _same_attention
    )


def put_back(base: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Undoes `fuse_attention`."""
    for path, module in replaced.items():
        _put(base, path, module)


def _replace(
    base: nn.Module, twin: Callable[[str, nn.Module], nn.Module | None], equal: Callable[[nn.Module, nn.Module], bool]
) -> dict[str, nn.Module]:
    replaced: dict[str, nn.Module] = {}
    for path, module in list(base.named_modules()):
        own = twin(path, module)
        if own is None:
            continue
        with whole_around(base, path):
            alike = equal(module, own)
        if alike:
            _put(base, path, own.train(module.training))
            replaced[path] = module
    return replaced


def _put(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(base.get_submodule(parent), leaf, module)


def _twin(module: nn.Module) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and isinstance(eps, float):
        return RmsNorm(weight, eps)
    parts = gated_parts(module)
    return GatedMlp(*parts) if parts else None


def gated_parts(module: nn.Module) -> list[nn.Module]:
    """The linear layers of a module that `GatedMlp` may take the place of: gate, up and down; [] of any other."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if all(isinstance(part, nn.Linear) for part in parts) and len(list(module.parameters(recurse=False))) == 0:
        return cast(list[nn.Module], parts)
    return []


def _same(module: nn.Module, own: Any) -> bool:
    """Whether both give the same bits on a few random rows, with a graph and without."""
    x = _random(own.gate_proj if isinstance(own, GatedMlp) else module)
    equal = []
    for graph in (True, False):
        with torch.set_grad_enabled(graph), cpu.off():
            equal.append(torch.equal(module(x), own(x)))
    return all(equal)


def _random(module: Any) -> Tensor:
    """A few rows that the norm or linear layer takes: [1, 5, width]."""
    weight: Tensor = module.weight
    width, dtype = weight.shape[-1], weight.dtype
    if isinstance(module, nn.Linear):
        width, dtype = module.in_features, dtype_of(module)
    return torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)


def _is_llama_attention(module: nn.Module) -> bool:
    """Whether `SelfAttention` may take the place of `module`: it has the same layers and nothing else."""
    return (
        sorted(name for name, _ in module.named_children()) == sorted(LAYERS)
        and not list(module.parameters(recurse=False))
        and all(isinstance(getattr(module, name), nn.Linear | AdaptedLinear) for name in LAYERS)
        and all(hasattr(module, name) for name in KNOWN)
    )


def _same_attention(module: nn.Module, own: Any) -> bool:
    """Whether both give the same bits on a few random rows, by torch's operations: with positions that turn all of each
    head, half of it or nothing, as far as the module takes them.
    """
    x = _random(own.q_proj)
    generator = torch.Generator().manual_seed(1)
    cos, sin = (torch.randn(1, 5, own.head_dim, generator=generator).to(x) for _ in range(2))
    half = own.head_dim // 2
    turns = ((cos, sin), (cos[..., :half], sin[..., :half]), None)
    return all(_same_bits(module, own, x, turn, required=turn is turns[0]) for turn in turns)


def _same_bits(module: nn.Module, own: Any, x: Tensor, turn: tuple[Tensor, Tensor] | None, *, required: bool) -> bool:
    """Whether both attend alike; what the module doesn't take counts as alike unless it is required."""
    equal = []
    for graph in (True, False):
        with torch.set_grad_enabled(graph), cpu.off():
            try:
                expected = module(x, position_embeddings=turn, attention_mask=None)[0]
            except (TypeError, RuntimeError, IndexError, AttributeError) as error:
                if memory_is_full(error):
                    raise
                return not required
            try:
                equal.append(torch.equal(expected, own(x, turn)[0]))
            except RuntimeError as error:  # values of another width, say
                if memory_is_full(error):
                    raise
                return False
    return all(equal)
