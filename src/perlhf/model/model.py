"""One frozen base, any number of named adapters. Callers pass a `Batch` and the name of an adapter.

`adapter=None` is the bare base. LoRA and full tuning differ in `add_adapter` (what is trainable) and `_run` (how the
forward uses it) and nowhere else.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from perlhf.errors import AdapterError, ModelError
from perlhf.kernels import cpu, modules
from perlhf.kernels.attention import tree_attention
from perlhf.kernels.call import Call, HeldPair, Turns, calling, current_call
from perlhf.kernels.kv_cache import KeyValueCache, Placed
from perlhf.kernels.members import Mixed
from perlhf.kernels.modules import AdaptedLinear, adapted, features, update_of
from perlhf.kernels.recomputed import layers_of, recompute
from perlhf.kernels.rows_cache import Forward, RowsCache
from perlhf.method.logprobs import token_logprobs
from perlhf.method.lora import dropout_keys, new_pair
from perlhf.method.packing import Batch, Ids, Packing, Tokens, pack, spread
from perlhf.model.adapter import Adapter, Role
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_base, pick_device, pick_dtype
from perlhf.model.bases.quantised import Quantize, identity, is_quantised
from perlhf.model.supported import (
    Packed,
    Way,
    choose_way,
    longest_alone,
    network_below,
    packing_of,
    states_width,
    target_paths,
)
from perlhf.model.ways import recall, remember
from perlhf.parallel.shard import Shards
from perlhf.parallel.workers import ALONE

Cache = KeyValueCache | RowsCache
"""What is kept of prompts and sampled tokens, by the way of the base."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Per completion token, [batch, time], 0 beyond each completion."""

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Held:
    """An adapter's weights converted once, for passes without gradients between which they don't change."""

    adapters: tuple[str, ...]
    """The active ones, from the lowest to the uppermost."""
    pairs: Mapping[nn.Module, HeldPair]
    weights: Mapping[str, Tensor]
    """Those of a full adapter by name, in the base's dtype."""


class Model:
    """The base with its adapters, on one device.

    Args:
        base: a causal language model of transformers; frozen here.
        fingerprint: name and hashes of the base, recorded with every adapter.
        vocabulary: tokens that the tokenizer has; null takes all rows of the embedding. The rows beyond, which padding
            has left, have probability 0 in sampling and in log-probabilities alike.
        known: the way of other weights of the same configuration, which is seen to hold on these (`choose_way`).
        shards: the workers over which the base was spread while it was loaded; all of them call the same methods.

    Raises:
        ModelError: its forward pass isn't what training assumes.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        fingerprint: dict[str, Any],
        vocabulary: int | None = None,
        known: Way | None = None,
        shards: Shards | None = None,
    ):
        self.base, self.shards = base.eval().requires_grad_(False), shards
        if shards is None:
            modules.fuse(self.base)
        self.fingerprint, self.vocabulary = fingerprint, vocabulary
        head = base.get_output_embeddings()
        self._head_path = tuple(name for name, module in base.named_modules() if module is head)
        self.decoder = network_below(base)
        self.prefix = next(name for name, module in base.named_modules() if module is self.decoder) + "."
        self.adapters: dict[str, Adapter] = {}
        self._turns = Turns()
        self.dtype, self.device = base.dtype, base.device
        self.hidden_size = states_width(base)
        self.longest = longest_alone(base.config)
        """Tokens of a sequence beyond which a result would depend on what is computed beside it; None without such."""
        tree_attention.register()
        self.way = Way()
        choose_way(self, known)

    @classmethod
    def load(
        cls,
        base: Base,
        dtype: str = "auto",
        device: str = "auto",
        vocabulary: int | None = None,
        quantize: Quantize = "none",
        shards: Shards | None = None,
    ) -> "Model":
        """The base's weights on `device`, without adapters.

        Args:
            shards: the workers over which they are spread; None for all of them in this process.

        Raises:
            ModelError: no such device or dtype; a network that can't be loaded, isn't supported, or can't be spread.
        """
        target = pick_device(device)
        chosen, _ = pick_dtype(dtype, target.type)
        if shards is not None and shards.workers.count > 1:
            shards.workers.in_step = True
        network = load_base(base, chosen, target, quantize, shards)
        config = copy.deepcopy(network.config)  # what is computed with it is written into it
        # Workers that hold parts of one base must go the same way to find the way.
        kept = recall(config, chosen, target, ALONE if shards is None else shards.workers)
        try:
            model = cls(network, identity(base, quantize), vocabulary, kept, shards)
            if shards is not None and model.way.packing == "none":
                raise ModelError(f"it is computed in rows, not as a tree: {model.way.why}")
        except ModelError as error:
            name = type(network).__name__
            if shards is not None:
                why = error.what.rpartition("can't be a base: ")[2]
                what, hint = f"{name} can't be spread over workers: {why}", "shard: none keeps it whole on each"
                raise ModelError(what, where="shard", allowed="none", hint=hint) from error
            if quantize == "none" or not is_quantised(network):
                raise
            what = f"{name} doesn't compute with quantised layers: {error.what}"
            raise ModelError(what, where="quantize", allowed="none", hint="leave quantize out") from error
        if model.way != kept:
            remember(config, chosen, target, model.way)
        return model

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
            assert self.shards is None, "the configuration refuses it"
            if is_quantised(self.base):
                what = "tuning: full learns all weights, and those of this base are quantised"
                raise AdapterError(what, where="tuning", allowed="lora", hint="or take a base with whole weights")
            adapter.rank, adapter.beneath = 0, None
            adapter.weights = {n: nn.Parameter(w) for n, w in self._merged(beneath).items()}
        else:
            generator = torch.Generator().manual_seed(seed)
            for path in self.targets(targets, layers):
                layer = adapted(self.base, path)
                outputs, inputs = layer.out_features, layer.in_features
                adapter.pairs[path] = new_pair(outputs, inputs, rank, alpha, dropout, generator, self.device)
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
        layers = dict(self.base.named_modules())
        for path, pair in adapter.pairs.items():
            if path in self._head_path:
                raise AdapterError(
                    f"the adapter adapts the output head '{path}'", allowed="linear layers below the head"
                )
            expected = features(layers.get(path))
            if expected is None:
                raise AdapterError(
                    f"the adapter adapts '{path}', which the base lacks", hint="use the base it was trained on"
                )
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
        return target_paths(self.base, targets, layers, self.way.uncalled)

    def freeze(self, name: str) -> None:
        """No tensor of the adapter gets a gradient any more."""
        for tensor in self.adapters[name].tensors().values():
            tensor.requires_grad_(False)

    def recompute_layers(self) -> bool:
        """From now on layers keep their input alone for the backward pass, and compute once more there; whether they
        can. Adapters of all weights, which stand in the network while a pass runs, must not learn then.
        """
        assert self.shards is None, "the configuration refuses it"
        layers = layers_of(self.base)
        for layer in layers or ():
            recompute(layer, self._again)
        return layers is not None

    def version(self, name: str | None) -> tuple[tuple[str, int], ...]:
        """Name and version of each adapter that `name` makes active: whoever changes weights raises the version."""
        return tuple((adapter.name, adapter.version) for adapter in self._chain(name))

    def anybody(self, goes_on: bool) -> bool:
        """Whether passes go on: those of this process, or of any worker that holds a part of the base."""
        return goes_on if self.shards is None else self.shards.anybody(goes_on)

    # forward passes

    def packing(self, asked: Packed) -> Packing:
        """How sequences are computed together, by what was asked for and what the network can.

        Raises:
            ModelError: a tree was asked for, which the network can't.
        """
        return packing_of(self.way, asked)

    def check_length(self, tokens: int) -> None:
        """Refuses sequences that would change what becomes of those beside them (`supported.longest_alone`).

        Raises:
            ModelError: there are too many tokens.
        """
        if self.longest is not None and tokens > self.longest:
            what = f"a sequence of {tokens} tokens: beyond {self.longest} this base turns the positions of all rows"
            raise ModelError(
                f"{what} otherwise, so that results would depend on what is computed together",
                where="base",
                allowed=f"prompt and completion of at most {self.longest} tokens",
                hint="lower encoding.max_tokens, and max_completion_tokens of a policy",
            )

    def scores(self, batch: Batch, adapter: str, *, dropout: bool = False, dropout_key: int | None = None) -> Tensor:
        """Scalar head on the state of each sequence's last token, float32 [batch].

        Args:
            dropout: whether the adapter's input is dropped where it has a dropout.
            dropout_key: what is dropped is a function of it and of the tokens; None: it is drawn.
        """
        states = self._states(batch, adapter, dropout=dropout, dropout_key=dropout_key)
        return self._head(states[batch.ends], adapter)

    def last_states(self, batch: Batch, adapter: str | None) -> Tensor:
        """State of each sequence's last token, what the score head reads: [batch, hidden]."""
        return self._states(batch, adapter, dropout=False)[batch.ends]

    def scores_at(self, batch: Batch, adapter: str, places: Tensor) -> Tensor:
        """Scalar head on the states at these flat positions (`Batch.places`), float32 [places]."""
        return self._head(self._states(batch, adapter)[places], adapter)

    def values(self, batch: Batch, adapter: str) -> Tensor:
        """Scalar head where each completion token is predicted, float32 [batch, time]; values[t] can't see t."""
        states = self._states(batch, adapter, dropout=False)[batch.predicting]
        return spread(self._head(states, adapter), batch.completion_mask)

    def logprobs(
        self,
        batch: Batch,
        adapter: str | None,
        *,
        temperature: float = 1.0,
        dropout: bool = False,
        dropout_key: int | None = None,
    ) -> TokenLogprobs:
        """log softmax(logits / temperature) of the completion tokens and the entropy there; no full logits are kept.

        Args:
            dropout, dropout_key: as those of `scores`.
        """
        states = self._states(batch, adapter, dropout=dropout, dropout_key=dropout_key)[batch.predicting]
        weight, shape = self._output_weight(adapter), self.way.logits
        logprobs, entropy = token_logprobs(states, weight, batch.targets, temperature, shape)
        return TokenLogprobs(spread(logprobs, batch.completion_mask), spread(entropy, batch.completion_mask))

    @torch.no_grad()
    def hold(self, adapter: str | None) -> Held:
        """What `prefill`, `decode` and `logits` take for the adapter's name, to convert nothing again."""
        chain = self._chain(adapter)
        names = tuple(a.name for a in chain)
        layers = [layer for layer in self.base.modules() if isinstance(layer, AdaptedLinear)]
        pairs: dict[nn.Module, HeldPair] = {layer: pair for layer in layers if (pair := layer.hold(names))}
        return Held(names, pairs, self._full_weights(chain))

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Ids], adapter: str | Held | None) -> tuple[Tensor, Cache]:
        """States of each prompt's last token [prompt, hidden] and the cache of them, to be forked."""
        if self.way.packing == "none":
            return RowsCache.of(prompts, self._own_forward(adapter), self.device, reused=self.way.reuses_cache)
        batch = pack([[Tokens(ids)] for ids in prompts], "tree", self.device)
        cache = KeyValueCache([batch.places(row) for row in range(len(prompts))], self.device, self.way.sights)
        return self._states(batch, adapter, cache=cache)[batch.ends], cache

    @torch.no_grad()
    def decode(self, ids: Tensor, cache: Cache, adapter: str | Held | None) -> Tensor:
        """One more token [row] for each row of the cache; its states [row, hidden]."""
        with cpu.sampling():
            if isinstance(cache, RowsCache):
                return cache.step(ids, self._own_forward(adapter))
            states = self._run(
                adapter,
                input_ids=ids[:, None],
                position_ids=cache.positions()[:, None],
                attention_mask=torch.zeros(1, 1, 1, 1, device=self.device),
                use_cache=False,
                cache=cache,
            ).last_hidden_state
        cache.advance()
        return states[:, -1]

    @torch.no_grad()
    def extend(
        self, ids: Tensor, positions: Tensor, tree: tree_attention.Tree, placed: Placed, adapter: Held | Mixed
    ) -> Tensor:
        """States [token, hidden] of tokens that go on with sequences of a pool, each where the tree says.

        Args:
            ids, positions: [token] the tokens, and their depths in their sequences.
            tree: whose keys are apart, in the pool.
            placed: takes the tokens' own.
            adapter: of all of them, or another one for each; none may hold whole weights.
        """
        given = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
        given["attention_mask"] = torch.zeros(1, 1, 1, 1, device=self.device)
        with cpu.sampling():
            states = self._run(adapter, tree=tree, cache=placed, **given).last_hidden_state
        return states[0].to(self.dtype)

    @torch.no_grad()
    def logits(self, states: Tensor, adapter: str | Held | None) -> Tensor:
        """Logits of the vocabulary's tokens from states [..., hidden], float32, to sample from."""
        weight = self._output_weight(adapter)
        with cpu.sampling():
            logits = cpu.linear(states, weight) if cpu.few_rows(states, weight) else states @ weight.t()
        return self.way.logits.of(logits.float())

    # inside

    def _own_forward(self, adapter: str | Held | None) -> Forward:
        """The network as it computes rows by itself, with the cache that it keeps."""
        name = self.way.cache_name

        def forward(ids: Tensor, state: Any) -> tuple[Tensor, Any]:
            given = {} if state is None else {name: state}
            output = self._run(adapter, input_ids=ids, use_cache=self.way.reuses_cache, **given)
            return output.last_hidden_state.to(self.dtype), getattr(output, name, None)

        return forward

    def _run(
        self,
        adapter: str | Held | Mixed | None,
        *,
        dropout: bool = False,
        dropout_keys: Tensor | None = None,
        tree: tree_attention.Tree | None = None,
        cache: KeyValueCache | Placed | None = None,
        **inputs: Any,
    ) -> Any:
        """The network's output below its head."""
        mixed = adapter if isinstance(adapter, Mixed) else None
        if isinstance(adapter, Held):
            names, pairs, weights = adapter.adapters, adapter.pairs, adapter.weights
        elif isinstance(adapter, Mixed):
            names, pairs, weights = (), {}, {}
        else:
            chain = self._chain(adapter)
            names, pairs, weights = tuple(a.name for a in chain), None, self._full_weights(chain, self.prefix)
        inside = {n.removeprefix(self.prefix): w for n, w in weights.items() if n.startswith(self.prefix)}
        # Full weights stand in the network itself while it runs.
        turn = self._turns.alone() if inside else self._turns.shared()
        dropping = {"dropout": dropout, "dropout_keys": dropout_keys}
        call = replace(current_call(), adapters=names, held=pairs, tree=tree, sampled=cache, mixed=mixed, **dropping)
        with calling(call), turn:
            if inside:
                return functional_call(self.decoder, inside, kwargs=inputs)
            return self.decoder(**inputs)

    @contextmanager
    def _again(self, call: Call) -> Iterator[None]:
        """A layer is computed once more, beside passes of other threads."""
        with self._turns.shared(), calling(call):
            yield

    def _full_weights(self, chain: Sequence[Adapter], prefix: str = "") -> dict[str, Tensor]:
        """The uppermost full adapter's weights below `prefix` in the base's dtype; {} without one."""
        named = _uppermost_weights(chain).items()
        return {name: weight.to(self.dtype) for name, weight in named if name.startswith(prefix)}

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
        batch: Batch,
        adapter: str | Held | None,
        *,
        dropout: bool = False,
        dropout_key: int | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """States [rows * width, hidden] of all tokens; `cache` gets the keys and values."""
        self.check_length(max((sum(length for _, length in spans) for spans in batch.spans), default=0))
        inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
        tree = None
        if batch.nodes is not None:
            # A four-dimensional mask is passed on as it is: the tree's attention needs none and no [T, T] one is built.
            inputs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=self.device)
            inputs["position_ids"] = batch.positions
            tree = tree_attention.Tree(batch.nodes, self.way.sights)
        keys = None
        if dropout and dropout_key is not None:
            keys = dropout_keys(batch.ids, [batch.places(row) for row in range(len(batch.spans))], dropout_key)
        given = {"dropout": dropout, "dropout_keys": keys, "tree": tree, "cache": cache, **inputs}
        states = self._run(adapter, **given).last_hidden_state.to(self.dtype)
        return states.reshape(-1, states.shape[-1])

    def _head(self, states: Tensor, adapter: str) -> Tensor:
        head = self.adapters[adapter]
        assert head.score_head is not None and head.bias is not None, f"adapter '{adapter}' has no score head"
        return (states.float() @ head.score_head.t()).squeeze(-1) + head.bias

    def _output_weight(self, adapter: str | Held | None) -> Tensor:
        """Rows of the output head, of the tokens that there are."""
        return self._head_weight(adapter)[: self.vocabulary]

    def _head_weight(self, adapter: str | Held | None) -> Tensor:
        weights = adapter.weights if isinstance(adapter, Held) else _uppermost_weights(self._chain(adapter))
        if not weights:
            return self.base.get_output_embeddings().weight  # pyright: ignore[reportReturnType,reportOptionalMemberAccess]
        path = self._head_path[0] + ".weight"
        tied = path not in weights
        return weights[f"{self.prefix}{self._embedding_path()}.weight" if tied else path].to(self.dtype)

    def _embedding_path(self) -> str:
        embedding = self.base.get_input_embeddings()
        return next(name for name, module in self.decoder.named_modules() if module is embedding)

    def _register(self, adapter: Adapter) -> None:
        assert adapter.name not in self.adapters, f"adapter '{adapter.name}' exists"
        if adapter.weights and self.shards is not None:
            what = "an adapter of all weights (tuning: full) has no place in a base that is spread over workers"
            hint = "shard: none; or perlhf export --format merged makes a base of it"
            raise AdapterError(what, where="shard", allowed="none", hint=hint)
        self.adapters[adapter.name] = adapter
        for path, pair in adapter.pairs.items():
            adapted(self.base, path).pairs[adapter.name] = pair

    @torch.no_grad()
    def _merged(self, name: str | None) -> dict[str, Tensor]:
        """Float32 weights of the base with everything that `name` makes active added in."""
        chain = self._chain(name)
        full = [a for a in chain if a.weights]
        source: Any = full[-1].weights.items() if full else self.base.named_parameters()
        merged = {n: w.detach().float().clone() for n, w in source}
        for adapter in chain:
            for path, pair in adapter.pairs.items():
                merged[path + ".weight"] += update_of(self.base.get_submodule(path), pair)
        return merged


def _uppermost_weights(chain: Sequence[Adapter]) -> Mapping[str, Tensor]:
    """The uppermost full adapter's own weights; {} without one."""
    return next((adapter.weights for adapter in reversed(chain) if adapter.weights), {})
