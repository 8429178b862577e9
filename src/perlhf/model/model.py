"""One frozen base, any number of named adapters. Callers pass sequences of ids and an adapter name; layout stays
inside.

`adapter=None` is the bare base. LoRA and full tuning differ in `add_adapter` (what is trainable) and `_run` (how the
forward uses it) and nowhere else.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from perlhf.errors import AdapterError
from perlhf.kernels import cpu, modules, tree_attention
from perlhf.kernels.kv_cache import KeyValueCache
from perlhf.kernels.modules import AdaptedLinear
from perlhf.method.logprobs import token_logprobs
from perlhf.method.lora import new_pair
from perlhf.method.packing import Ids, Layout, Packing, lay_out, length_mask, spread
from perlhf.model.adapter import Adapter, Role
from perlhf.model.base import Base, load_base, pick_device, pick_dtype
from perlhf.model.supported import target_paths, verify_forward


@dataclass(frozen=True)
class TokenLogprobs:
    """Per completion token, [batch, time], 0 beyond each completion."""

    logprobs: Tensor
    entropy: Tensor
    mask: Tensor


class Model:
    """The base with its adapters, on one device.

    Args:
        base: a causal language model of transformers; frozen here.
        fingerprint: name and SHA-256 of the base, recorded with every adapter.

    Raises:
        ModelError: its forward pass isn't what training assumes.
    """

    def __init__(self, base: PreTrainedModel, fingerprint: dict[str, str]):
        self.base = base.eval().requires_grad_(False)
        modules.fuse(self.base)
        self.fingerprint = fingerprint
        head = base.get_output_embeddings()
        self._head_path = tuple(name for name, module in base.named_modules() if module is head)
        self.decoder: nn.Module = getattr(base, base.base_model_prefix)
        self.prefix = base.base_model_prefix + "."
        self.adapters: dict[str, Adapter] = {}
        self._held: tuple[tuple[str, ...], dict[str, Tensor]] | None = None
        self.dtype, self.device = base.dtype, base.device
        self.hidden_size = int(base.config.get_text_config().hidden_size)
        base.set_attn_implementation(tree_attention.register())
        verify_forward(self)

    @classmethod
    def load(cls, base: Base, dtype: str = "auto", device: str = "auto") -> "Model":
        """The base's weights on `device`, without adapters.

        Raises:
            ModelError: no such device or dtype; a network that can't be loaded or isn't supported.
        """
        target = pick_device(device)
        chosen, _ = pick_dtype(dtype, target.type)
        return cls(load_base(base, chosen, target), base.fingerprint)

    # adapters

    def add_adapter(
        self,
        name: str,
        role: Role,
        *,
        tuning: Literal["lora", "full"] = "lora",
        rank: int = 16,
        alpha: float = 32.0,
        targets: str | tuple[str, ...] = "attention",
        layers: str = "all",
        dropout: float = 0.0,
        seed: int = 0,
        beneath: str | None = None,
    ) -> Adapter:
        """A new adapter that leaves every output as it is: B = 0, or a float32 copy of the weights under `beneath`.

        Args:
            beneath: adapter that stays active and frozen under this one (LoRA), or is merged into the copy (full).

        Raises:
            AdapterError: a target that matches nothing.
        """
        adapter = Adapter(name, role, rank, alpha, dropout, beneath=beneath)
        if tuning == "full":
            adapter.rank, adapter.beneath = 0, None
            adapter.weights = {n: nn.Parameter(w) for n, w in self._merged(beneath).items()}
        else:
            generator = torch.Generator().manual_seed(seed)
            for path in self.targets(targets, layers):
                adapter.pairs[path] = new_pair(self._adapted(path).weight, rank, alpha, dropout, generator)
        adapter.add_head(self.hidden_size, self.device)
        self._register(adapter)
        return adapter

    def copy_adapter(self, source: str, name: str, role: Role) -> Adapter:
        """A trainable copy of `source` under another name; a new zero head where the role has one."""
        new = self.adapters[source].copied(name, role)
        new.add_head(self.hidden_size, self.device)
        self._register(new)
        return new

    def adopt(self, adapter: Adapter) -> Adapter:
        """Adds an adapter read from disk; its paths must exist in the base."""
        modules = dict(self.base.named_modules())
        for path, pair in adapter.pairs.items():
            if path in self._head_path:
                raise AdapterError(
                    f"the adapter adapts the output head '{path}'", allowed="linear layers below the head"
                )
            layer = modules.get(path)
            if not isinstance(layer, nn.Linear | AdaptedLinear):
                raise AdapterError(
                    f"the adapter adapts '{path}', which the base lacks", hint="use the base it was trained on"
                )
            expected = (layer.in_features, layer.out_features)
            if (pair.a.shape[1], pair.b.shape[0]) != expected:
                raise AdapterError(
                    f"shape {pair.a.shape[1]} -> {pair.b.shape[0]} at '{path}'",
                    allowed=f"{expected[0]} -> {expected[1]}",
                )
        for tensor in adapter.tensors().values():
            tensor.data = tensor.data.to(self.device)
        self._register(adapter)
        return adapter

    def targets(self, targets: str | tuple[str, ...], layers: str = "all") -> list[str]:
        """Paths of the base that `targets` names, in these layers (`all`, `last:N`)."""
        return target_paths(self.base, targets, layers)

    def freeze(self, name: str) -> None:
        """No tensor of the adapter gets a gradient any more."""
        for tensor in self.adapters[name].tensors().values():
            tensor.requires_grad_(False)

    def digest(self, name: str | None) -> str:
        """SHA-256 over all tensors that `name` makes active: the adapter's version."""
        digest = hashlib.sha256()
        for adapter in self._chain(name):
            for key, tensor in adapter.tensors().items():
                digest.update(key.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # forward passes

    def scores(
        self, sequences: Sequence[Ids], adapter: str, *, packing: Packing = "tree", dropout: bool = False
    ) -> Tensor:
        """Scalar head on the state of each sequence's last token, float32 [batch]."""
        return self._head(self.last_states(sequences, adapter, packing=packing, dropout=dropout), adapter)

    def last_states(
        self, sequences: Sequence[Ids], adapter: str | None, *, packing: Packing = "tree", dropout: bool = False
    ) -> Tensor:
        """State of each sequence's last token, what the score head reads: [batch, hidden]."""
        layout = lay_out(sequences, packing)
        return self._states(layout, adapter, layout.ends(), dropout=dropout)

    def values(
        self, prompts: Sequence[Ids], completions: Sequence[Ids], adapter: str, *, packing: Packing = "tree"
    ) -> Tensor:
        """Scalar head where each completion token is predicted, float32 [batch, time]; values[t] has not seen token
        t.
        """
        states, mask = self._predicting_states(prompts, completions, adapter, packing, dropout=False)
        return spread(self._head(states, adapter), mask)

    def logprobs(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        adapter: str | None,
        *,
        temperature: float = 1.0,
        packing: Packing = "tree",
        dropout: bool = False,
    ) -> TokenLogprobs:
        """log softmax(logits / temperature) of the completion tokens and the entropy there; no full logits are kept."""
        states, mask = self._predicting_states(prompts, completions, adapter, packing, dropout=dropout)
        targets = torch.tensor([token for ids in completions for token in ids], dtype=torch.long, device=self.device)
        logprobs, entropy = token_logprobs(states, self._output_weight(adapter), targets, temperature)
        return TokenLogprobs(spread(logprobs, mask), spread(entropy, mask), mask)

    @contextmanager
    def holding(self, adapter: str | None) -> Iterator[None]:
        """Passes without gradients under `adapter` alone, whose weights don't change meanwhile: converted once."""
        chain = self._chain(adapter)
        names = tuple(a.name for a in chain)
        with torch.no_grad(), self._active(names, dropout=False):
            layers = self._adapted_layers()
            try:
                for layer in layers:
                    layer.hold()
                self._held = names, self._full_weights(chain, "")
                yield
            finally:
                self._held = None
                for layer in layers:
                    layer.release()

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Ids], adapter: str | None) -> tuple[Tensor, KeyValueCache]:
        """States of each prompt's last token [prompt, hidden] and the cache of their keys and values, to be forked."""
        layout = lay_out(prompts, "tree")
        cache = KeyValueCache([layout.indices(i, 0, len(ids)) for i, ids in enumerate(prompts)], self.device)
        return self._states(layout, adapter, layout.ends(), dropout=False, cache=cache), cache

    @torch.no_grad()
    def decode(self, ids: Tensor, cache: KeyValueCache, adapter: str | None) -> Tensor:
        """One more token [row] for each row of the cache; its states [row, hidden]."""
        with cpu.sampling():
            states = self._run(
                adapter,
                input_ids=ids[:, None],
                position_ids=cache.positions()[:, None],
                attention_mask=torch.zeros(1, 1, 1, 1, device=self.device),
                use_cache=False,
                sampled=cache,
            )
        cache.advance()
        return states[:, -1]

    @torch.no_grad()
    def logits(self, states: Tensor, adapter: str | None) -> Tensor:
        """Vocabulary logits of states [..., hidden], float32, to sample from."""
        weight = self._output_weight(adapter)
        with cpu.sampling():
            found = cpu.linear(states, weight) if cpu.few_rows(states, weight) else states @ weight.t()
        return found.float()

    # inside

    def _run(self, adapter: str | None, *, dropout: bool = False, **inputs: Any) -> Tensor:
        chain = self._chain(adapter)
        names = tuple(a.name for a in chain)
        assert self._held is None or self._held[0] == names, f"{self._held and self._held[0]} held, not {names}"
        with nullcontext() if self._held else self._active(names, dropout):
            weights = self._full_weights(chain, self.prefix)
            if weights:
                inside = {n.removeprefix(self.prefix): w for n, w in weights.items() if n.startswith(self.prefix)}
                return functional_call(self.decoder, inside, kwargs=inputs).last_hidden_state
            return self.decoder(**inputs).last_hidden_state

    def _full_weights(self, chain: Sequence[Adapter], prefix: str) -> dict[str, Tensor]:
        """The uppermost full adapter's weights below `prefix` in the base's dtype; if held, all; {} without one."""
        if self._held:
            return self._held[1]
        full = [a for a in chain if a.weights]
        named = full[-1].weights.items() if full else ()
        return {name: weight.to(self.dtype) for name, weight in named if name.startswith(prefix)}

    @contextmanager
    def _active(self, names: tuple[str, ...], dropout: bool) -> Iterator[None]:
        layers = self._adapted_layers()
        before = [(layer.active, layer.training) for layer in layers]
        try:
            for layer in layers:
                layer.active, layer.training = names, dropout
            yield
        finally:
            for layer, (active, training) in zip(layers, before, strict=True):
                layer.active, layer.training = active, training

    def _adapted_layers(self) -> list[AdaptedLinear]:
        return [module for module in self.base.modules() if isinstance(module, AdaptedLinear)]

    def _chain(self, name: str | None) -> list[Adapter]:
        chain: list[Adapter] = []
        while name is not None:
            if name not in self.adapters:
                raise AdapterError(f"no adapter '{name}' is loaded", allowed=", ".join(self.adapters) or "none is")
            chain.insert(0, self.adapters[name])
            name = self.adapters[name].beneath
        return chain

    def _states(
        self,
        layout: Layout,
        adapter: str | None,
        wanted: Sequence[int],
        *,
        dropout: bool,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """States [wanted, hidden] at flat positions of the layout; `cache` gets the keys and values."""
        inputs: dict[str, Any] = {"input_ids": layout.ids.to(self.device), "use_cache": False}
        if cache is not None:
            inputs["sampled"] = cache
        if layout.nodes is not None:
            # A four-dimensional mask is passed on as it is: the tree's attention needs none and no [T, T] one is built.
            inputs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=self.device)
            inputs |= {"position_ids": layout.positions.to(self.device), "tree": layout.nodes}
        states = self._run(adapter, dropout=dropout, **inputs)
        return states.reshape(-1, states.shape[-1])[torch.tensor(list(wanted), dtype=torch.long, device=self.device)]

    def _predicting_states(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        adapter: str | None,
        packing: Packing,
        *,
        dropout: bool,
    ) -> tuple[Tensor, Tensor]:
        """States [tokens, hidden] from which each completion token is predicted, and the completion mask [batch,
        time].
        """
        assert all(len(ids) for ids in prompts), "a completion needs a token to be predicted from"
        layout = lay_out([[*p, *c] for p, c in zip(prompts, completions, strict=True)], packing)
        wanted = [
            at
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
            for at in layout.indices(i, len(p) - 1, len(c))
        ]
        mask = length_mask([len(c) for c in completions], self.device)
        return self._states(layout, adapter, wanted, dropout=dropout), mask

    def _head(self, states: Tensor, adapter: str) -> Tensor:
        head = self.adapters[adapter]
        assert head.head is not None and head.bias is not None, f"adapter '{adapter}' has no score head"
        return (states.float() @ head.head.t()).squeeze(-1) + head.bias

    def _output_weight(self, adapter: str | None) -> Tensor:
        path = self._head_path[0] + ".weight"
        for owner in reversed(self._chain(adapter)):
            if owner.weights:
                tied = path not in owner.weights
                name = f"{self.prefix}{self._embedding_path()}.weight" if tied else path
                return self._held[1][name] if self._held else owner.weights[name].to(self.dtype)
        return self.base.get_output_embeddings().weight  # pyright: ignore[reportReturnType,reportOptionalMemberAccess]

    def _embedding_path(self) -> str:
        embedding = self.base.get_input_embeddings()
        return next(name for name, module in self.decoder.named_modules() if module is embedding)

    def _adapted(self, path: str) -> AdaptedLinear:
        parent_path, _, leaf = path.rpartition(".")
        parent = self.base.get_submodule(parent_path)
        layer = getattr(parent, leaf)
        if not isinstance(layer, AdaptedLinear):
            layer = AdaptedLinear(layer)
            setattr(parent, leaf, layer)
        return layer

    def _register(self, adapter: Adapter) -> None:
        assert adapter.name not in self.adapters, f"adapter '{adapter.name}' exists"
        self.adapters[adapter.name] = adapter
        for path, pair in adapter.pairs.items():
            self._adapted(path).pairs[adapter.name] = pair

    @torch.no_grad()
    def _merged(self, name: str | None) -> dict[str, Tensor]:
        """Float32 weights of the base with everything that `name` makes active added in."""
        chain = self._chain(name)
        full = [a for a in chain if a.weights]
        source: Any = full[-1].weights.items() if full else self.base.named_parameters()
        merged = {n: w.detach().float().clone() for n, w in source}
        for adapter in chain:
            for path, pair in adapter.pairs.items():
                merged[path + ".weight"] += pair.scale * (pair.b.float() @ pair.a.float())
        return merged
