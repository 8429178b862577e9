"""Which networks can be a base, and which way goes through each: decoder-only language models of any kind.

What a configuration gives away is refused by name before any weight is read (`check_supported`). The rest is found out
by running a few tokens once the network is loaded (`choose_way`): whether a tree of prefixes can be computed at once,
how far back each layer sees, what becomes of the products of the output head. A network for which there is no tree is
computed in rows, by its own forward.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from perlhf.config.stages import DEFAULT_BASE
from perlhf.errors import ModelError
from perlhf.kernels import modules
from perlhf.kernels.attention import tree_attention
from perlhf.kernels.attention.sight import FULL, Sight, watching
from perlhf.kernels.modules import AdaptedLinear, features, match_targets
from perlhf.method.logprobs import PLAIN, Logits
from perlhf.method.packing import Packing, pad
from perlhf.parallel.watch import connection_broke
from perlhf.system.unforeseen import memory_is_full

if TYPE_CHECKING:
    from perlhf.model.model import Model

_ALLOWED = "decoder-only language models (Llama, Qwen, Gemma, Mistral, Mamba, OPT, GPT-NeoX, ...)"
_NUMBERS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_scale", "output_multiplier")
"""Configuration keys that networks multiply or divide their logits by."""
_MIXED = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers that mix tokens by attention under a mask."""
_TOLERANCE = 0.08
"""In bfloat16. On a CPU, SmolLM2-135M's states differ by up to 0.03 (2e-6 in float32) where all is well, by 0.1 with
positions off by one, and by 0.4 for sampled tokens where positions are ignored."""
_TOLERANCE_INT8 = 0.2
"""Where activations are rounded to 8 bits, the last bit of a sum moves them by a step: SmolLM2's states by 0.09."""
FAULTS = (TypeError, ValueError, RuntimeError, LookupError, StopIteration, AttributeError, NotImplementedError)
"""What networks raise for arguments that they don't take."""


@dataclass(frozen=True)
class Way:
    """How a network is computed."""

    packing: Packing = "tree"
    """A tree of prefixes, each token once; or `none`, rows by its own forward."""
    why: str = ""
    """What keeps it from a tree."""
    sights: Mapping[int, Sight] = field(default_factory=dict)
    """How far back each layer sees in a tree; those that are missing see all."""
    logits: Logits = PLAIN
    """What it makes of the output head's products."""
    cache_name: str = "past_key_values"
    """Its forward's argument for its own cache, which rows are sampled with."""
    uncalled: tuple[str, ...] = ()
    """Linear layers where an adapter would do nothing: the network reads their weights without calling them, or they
    are of a part that text never reaches, such as an encoder of images."""
    reuses_cache: bool = True
    """Whether that cache can be repeated for many completions; else each step computes all tokens anew."""
    measured: bool = False
    """Whether `why` is a number that was too large on these weights: other weights might have another way."""


Packed = Literal["auto", "tree", "none"]
"""What can be asked for."""


def packing_of(way: Way, asked: Packed) -> Packing:
    """How sequences are computed together, by what was asked for and what a network can.

    Raises:
        ModelError: a tree was asked for, which it can't.
    """
    if asked == "tree" and way.packing == "none":
        what = f"this base can't be computed as a tree: {way.why}"
        raise ModelError(what, where="packing", allowed="auto, none")
    return way.packing if asked == "auto" else asked


def told(way: Way, asked: Packed) -> dict[str, str]:
    """The way in force and why, as a manifest has it."""
    packing = packing_of(way, asked)
    if packing == "tree":
        return {"packing": packing, "why": "it mixes tokens by attention alone, which a tree of prefixes can be given"}
    return {"packing": packing, "why": way.why or "packing: none was asked for"}


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses architectures that are no decoder-only language models.

    Raises:
        ModelError: naming the architecture and the property.
    """
    reason = next(_unsupported(config), None)
    if reason:
        what = f"{config.model_type} can't be a base: {reason}"
        raise ModelError(what, where="base", allowed=_ALLOWED, hint=f"perlhf pull {DEFAULT_BASE}, which is a small one")


def longest_alone(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a sequence is computed as if it were alone; None without a limit.

    LongRoPE and dynamic scaling turn all positions of a pass otherwise as soon as one of its rows is longer.
    """
    text: Any = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    limits = []
    for rope in (given, *(inner for inner in given.values() if isinstance(inner, dict))):
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings", text.max_position_embeddings))
        if rope.get("rope_type") == "dynamic":
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)


def decoder_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The network below the head (gives `last_hidden_state`) and the linear layer that makes logits of it.

    Raises:
        ModelError: there is no such layer.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise _refusal(model, "it has no output layer")
    return network_below(model), head


def states_width(model: PreTrainedModel) -> int:
    """Of the states that the output head reads: inside, some networks are wider.

    Raises:
        ModelError: there is no such head.
    """
    weight: Any = decoder_and_head(model)[1].weight
    return int(weight.shape[1])


def network_below(model: PreTrainedModel) -> nn.Module:
    """The part that turns tokens into states."""
    below = model.base_model
    return below if below is not model else next(iter(model.children()))


def target_paths(
    network: PreTrainedModel, targets: str | tuple[str, ...], layers: str = "all", uncalled: Sequence[str] = ()
) -> list[str]:
    """Paths of the linear layers below the output head that `targets` names in `layers` (`modules.match_targets`).
    Layers whose weights are read without a call (`Way.uncalled`) are none of them.

    Raises:
        AdapterError: a target that matches nothing, or names what is never adapted.
    """
    head = network.get_output_embeddings()
    skip = [path for path, module in network.named_modules() if module is head]
    skip += _of_shared_weights(network)
    return match_targets(network.named_modules(), targets, (*skip, *uncalled), layers)


def _of_shared_weights(network: nn.Module) -> list[str]:
    """Linear layers that have one weight between them (Zamba's blocks): an update of each can't be merged into it."""
    paths: dict[int, list[str]] = {}
    for path, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if features(module) is not None and isinstance(weight, nn.Parameter):
            paths.setdefault(id(weight), []).append(path)
    return [path for same in paths.values() if len(same) > 1 for path in same]


@torch.no_grad()
def choose_way(model: "Model", known: Way | None = None) -> None:
    """Sets `model.way` by computing four short sequences in each way that training and sampling do.

    1. all states are numbers, and logits come from head(last hidden state) by a scale and a cap;
    2. a later token changes no earlier state: two rows agree as far as they share a prefix;
    3. in a tree, where a shared prefix is computed once, position ids and our attention are obeyed;
    4. one more token, of which a cache has what comes before, is computed as in its row.

    Where 3 or 4 fails for a tree, the network's own forward and cache are tried, and then its forward alone.

    Args:
        known: the way of other weights of this configuration (`ways.recall`). 1 to 4 are seen to hold on these weights
            all the same; what the code and the configuration alone decide isn't found out again: masks, layers that
            aren't called, and ways that don't exist. Where it doesn't hold, it is as if nothing were known.

    Raises:
        ModelError: naming what differs in all ways.
    """
    network = model.base
    probe = _probe(network, model.device)
    own = network.config._attn_implementation or "eager"
    try:
        states = _as_it_is(model.decoder, network, probe.ids)
        if not states.isfinite().all():
            raise _NoWay(f"its states aren't numbers in {model.dtype}: were its weights damaged?".replace("torch.", ""))
        own = network.config._attn_implementation or own
        shape = _shape_of(network, probe.ids, states)
        if _far(states[2, :3], states[0, :3], _tolerance(model)):
            raise _NoWay("a later token changes earlier logits, so attention is not causal")
        if known is not None and _holds(model, replace(known, logits=shape), probe, states):
            return
        network.set_attn_implementation(own)
        _search(model, Way(logits=shape, uncalled=_uncalled(model.decoder, network, probe.ids)), probe, states)
    except _NoWay as none:
        raise _refusal(network, none.why) from none


def _search(model: "Model", plain: Way, probe: "_Probe", states: Tensor) -> None:
    """Takes the first way that holds: the tree, rows with a cache of either name, rows that compute all tokens anew.

    Raises:
        _NoWay: none does.
    """
    network, own = model.base, model.base.config._attn_implementation or "eager"
    try:
        with _tried("it doesn't take our attention"):
            network.set_attn_implementation(tree_attention.NAME)
            model.way = replace(plain, sights=_sights(network, model.decoder, probe.ids))
            alike = model.decoder(input_ids=probe.ids, use_cache=False).last_hidden_state
        if off := _far(alike, states, _tolerance(model)):
            raise _NoWay(f"by our attention its states are off by {off:.1%}", measured=True)
        return _verify_tree(model, probe, states)
    except _NoWay as none:
        rows = replace(plain, packing="none", why=none.why, measured=none.measured)
    network.set_attn_implementation(own)
    for name in ("past_key_values", "cache_params"):
        model.way = replace(rows, cache_name=name)
        try:
            return _verify(model, probe, states)
        except _NoWay:
            continue
    model.way = replace(rows, reuses_cache=False)
    _verify(model, probe, states)


def _holds(model: "Model", known: Way, probe: "_Probe", states: Tensor) -> bool:
    """Whether a known way is one of these weights, too; it is then taken."""
    layers = dict(model.base.named_modules())
    if not all(isinstance(layers.get(path), nn.Linear | AdaptedLinear) for path in known.uncalled):
        return False
    try:
        with _tried("it doesn't take our attention"):
            if known.packing == "tree":
                model.base.set_attn_implementation(tree_attention.NAME)
        model.way = known
        (_verify_tree if known.packing == "tree" else _verify)(model, probe, states)
    except _NoWay:
        return False
    return True


class _NoWay(Exception):
    """A network can't be computed in a way; `why` ends a sentence that names it."""

    def __init__(self, why: str, *, measured: bool = False):
        self.why, self.measured = why, measured
        super().__init__(why)


@contextmanager
def _tried(what: str) -> Iterator[None]:
    """What networks raise for arguments that they don't take is no way; full memory and a broken GPU are told as that.

    Raises:
        _NoWay: it says `what`, and the fault.
    """
    try:
        yield
    except FAULTS as error:
        if memory_is_full(error) or isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            raise
        if connection_broke(error):
            raise
        raise _NoWay(f"{what} ({error!r:.300})") from error


@dataclass(frozen=True)
class _Probe:
    """Sequences of which the last shares a prefix with the first, and one is the beginning of another."""

    sequences: Sequence[Sequence[int]]
    ids: Tensor


def _probe(network: PreTrainedModel, device: torch.device) -> _Probe:
    vocab = int(network.config.get_text_config().vocab_size)
    sequences = [[(37 * t + 11 * s) % vocab for t in range(5)] for s in (40, 41)]
    sequences += [sequences[0][:3], [*sequences[0][:2], *sequences[1][:3]]]
    return _Probe(sequences, pad(sequences, 0, device))


def _as_it_is(decoder: nn.Module, network: PreTrainedModel, ids: Tensor) -> Tensor:
    """States by transformers alone; where its fast attention can't, by its plain one.

    Raises:
        _NoWay: neither can.
    """
    try:
        with _tried("its own forward fails"):
            return decoder(input_ids=ids, use_cache=False).last_hidden_state
    except _NoWay:
        with _tried("its own forward fails"):
            network.set_attn_implementation("eager")
            return decoder(input_ids=ids, use_cache=False).last_hidden_state


def _uncalled(decoder: nn.Module, network: PreTrainedModel, ids: Tensor) -> tuple[str, ...]:
    """`Way.uncalled`: layers that weren't called, and whose weights have a gradient all the same; and those of parts
    beside the numbered layers of which none was called. (An expert that wasn't chosen now is within a layer.)

    Raises:
        _NoWay: there is such a layer in a base in parts, whose weights can have no gradient.
    """
    called: set[nn.Module] = set()
    kinds = nn.Linear | AdaptedLinear
    layers = {path: module for path, module in network.named_modules() if isinstance(module, kinds)}
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in layers.values()]
    try:
        decoder(input_ids=ids, use_cache=False)
        inside = set(decoder.modules())
        missed = [path for path, module in layers.items() if module in inside and module not in called]
        silent = {path: module for path in missed if isinstance(module := layers[path], nn.Linear)}
        if len(silent) < len(missed):
            raise _NoWay(f"some weights are read without a call to their layer, or are left out ({missed[0]})")
        for module in silent.values():
            module.weight.requires_grad_(True)
        if silent:
            with torch.enable_grad():
                state = decoder(input_ids=ids[:1], use_cache=False).last_hidden_state
                weights = [module.weight for module in silent.values()]
                grads = (
                    torch.autograd.grad(state.float().sum(), weights, allow_unused=True) if state.requires_grad else ()
                )
            read = {path for path, grad in zip(silent, grads, strict=False) if grad is not None}
            reached = {part for path, module in layers.items() if module in called for part in _parts(path)}
            return tuple(path for path in silent if path in read or _is_apart(path, reached))
        return ()
    finally:
        for hook in hooks:
            hook.remove()
        network.requires_grad_(False)


def _parts(path: str) -> list[str]:
    """A module's path and those of what it lies in, the outermost first."""
    names = path.split(".")
    return [".".join(names[: end + 1]) for end in range(len(names))]


def _is_apart(path: str, reached: set[str]) -> bool:
    """Whether the largest part around a layer in which nothing was called lies in no numbered layer."""
    return not any(name.isdigit() for name in next(part for part in _parts(path) if part not in reached).split("."))


def _sights(network: PreTrainedModel, decoder: nn.Module, ids: Tensor) -> dict[int, Sight]:
    """How far back each layer sees.

    Raises:
        _NoWay: a layer mixes tokens otherwise.
    """
    config = network.config.get_text_config()
    kinds = [kind for kind in getattr(config, "layer_types", None) or () if kind not in _MIXED]
    if kinds:
        raise _NoWay(f"it has {kinds[0]} layers")
    if getattr(config, "attn_temperature_tuning", None):  # shows beyond thousands of tokens only
        raise _NoWay("it scales scores by a token's place in the row")
    with watching() as watch:
        decoder(input_ids=ids, use_cache=False)
    if not watch.layers:
        raise _NoWay("it has no attention that transformers lets others compute")
    if None in watch.layers.values():
        raise _NoWay("its layers' masks are of no known form")
    return {layer: sight for layer, sight in watch.layers.items() if sight is not None and sight != FULL}


def _verify(model: "Model", probe: _Probe, states: Tensor) -> None:
    """Compares the states of prompts and of one sampled token with those of padded rows.

    Raises:
        _NoWay: they differ, or can't be computed.
    """
    obeyed = "position ids or a four-dimensional attention mask are not"
    if model.way.packing == "none":
        obeyed = "its own cache is not"
    with _tried(f"{obeyed} accepted"):
        shared, cache = model.prefill([row[:-1] for row in probe.sequences], None)
        cache.fork(2)
        last = torch.tensor([row[-1] for row in probe.sequences], device=model.device)
        sampled = model.decode(last.repeat_interleave(2), cache, None)[::2]
    for what, of, other, back in (("tree", "shared prefixes", shared, 2), ("cache", "sampled tokens", sampled, 1)):
        separate = torch.stack([row[len(ids) - back] for ids, row in zip(probe.sequences, states, strict=True)])
        if off := _far(other, separate, _tolerance(model)):
            reason = f"or our attention isn't handed its {what}: states of {of} are off by {off:.1%}"
            raise _NoWay(f"{obeyed} obeyed, {reason}", measured=True)


def _verify_tree(model: "Model", probe: _Probe, states: Tensor) -> None:
    """`_verify` with our own attention modules, which stay where it holds; else with the network's.

    Raises:
        _NoWay: as `_verify`.
    """
    replaced = modules.fuse_attention(model.base)
    try:
        _verify(model, probe, states)
    except _NoWay:
        modules.put_back(model.base, replaced)
        if not replaced:
            raise
        _verify(model, probe, states)


def _tolerance(model: "Model") -> float:
    if any(weight.dtype == torch.int8 for weight in model.base.parameters()):
        return _TOLERANCE_INT8
    return 1e-3 if model.dtype == torch.float32 else _TOLERANCE


def _shape_of(network: PreTrainedModel, ids: Tensor, states: Tensor) -> Logits:
    """What the network makes of the products of its head and states, told from large ones, which show a cap.

    Raises:
        ModelError: there is no head.
        _NoWay: neither a scale nor a cap.
    """
    _, head = decoder_and_head(network)
    products: list[Tensor] = []
    raw: list[Tensor] = []

    def enlarge(_: nn.Module, __: Any, found: Tensor) -> Tensor:
        raw.append(found)
        products.append(found.float() * (20 / found.float().std()))
        return products[-1].to(found.dtype)

    hook = head.register_forward_hook(enlarge)
    try:
        with _tried("its own forward fails"):
            logits = network(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    given, plain = raw[0].float(), head(states.to(raw[0].dtype)).float()
    before_head = float((given * plain).sum() / plain.square().sum())
    if _far(plain * before_head, given, 5e-3):
        raise _NoWay("its output layer isn't given the last hidden state")
    before_head = 1.0 if abs(before_head - 1) < 1e-3 else before_head
    config = network.config.get_text_config()
    known = [getattr(config, name, None) for name in _NUMBERS]
    numbers = [n for given in known if isinstance(given, int | float) and given for n in (float(given), 1 / given)]
    caps = [float(v) for k, v in config.to_dict().items() if "cap" in k and isinstance(v, int | float) and v]
    for cap in (None, *caps):
        inside = torch.ones_like(logits) if cap is None else ((logits / cap).abs() < 0.9).float()
        before = logits if cap is None else torch.atanh((logits / cap).clamp(-0.9, 0.9)) * cap
        scale = float((inside * before * products[0]).sum() / (inside * products[0].square()).sum())
        near = [number for number in (1.0, *numbers) if scale and abs(number / scale - 1) < 0.005]
        shape = Logits(near[0] if near else scale, cap)
        if not _far(shape.of(products[0]), logits, 5e-3):
            return replace(shape, scale=shape.scale * before_head)
    raise _NoWay("logits are not head(last hidden state) scaled or capped, but otherwise changed")


def _far(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Norm of the difference over the norm of `expected` where that is above `tolerance` or no number; else 0."""
    actual, expected = actual.float(), expected.float()
    off = float((actual - expected).norm() / expected.norm().clamp_min(1e-12))
    return 0.0 if off <= tolerance else off


def _refusal(model: PreTrainedModel, what: str) -> ModelError:
    name = type(model).__name__
    return ModelError(f"{name} can't be a base: {what}", where="base", allowed=_ALLOWED)


def _unsupported(config: PreTrainedConfig) -> Iterator[str]:
    """Why a configuration is refused, most telling reason first."""
    if config.is_encoder_decoder:
        yield "it is an encoder-decoder"
    if type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        yield "it attends to later tokens (is_decoder is false)"
    if config.get_text_config(decoder=True) is not config:
        yield "it joins several networks (a text model inside a multimodal one)"
    if AutoModelForCausalLM._model_mapping.get(type(config), None) is None:
        yield "transformers has no causal language model for it"
