"""Adapters on disk. LoRA lies there in PEFT's layout: other tools load ours and we load theirs.

    adapter_config.json        rank, alpha, dropout, targets, task type, name of the base     (read by peft)
    adapter_model.safetensors  float32 `base_model.model.<module path>.lora_A.weight` and so on   (read by peft)
    full_weights.safetensors   instead of the two, where all weights were trained: float32 `base.<name>`
    perlhf.json                role, bias of the score head, base, encoding, SHA-256 of the tensors; sealed

Reward and value adapters are sequence-classification adapters whose head is `base_model.model.score.weight`. The head's
bias is the one thing that peft doesn't see, so its scores are ours up to that constant.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perlhf.errors import AdapterError, ModelError
from perlhf.kernels.modules import is_transposed
from perlhf.method import lora
from perlhf.method.lora import LowRank
from perlhf.model.adapter import Adapter
from perlhf.model.bases.found import Base, changed_files
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.peft_config import Shape, check_plain, patterns, settings_of, targets_of, wrong
from perlhf.runs.earlier import ADAPTER_CONFIG as CONFIG
from perlhf.runs.earlier import ADAPTER_DETAILS as DETAILS
from perlhf.runs.earlier import ADAPTER_FILES
from perlhf.runs.earlier import ADAPTER_TENSORS as TENSORS
from perlhf.runs.earlier import ADAPTER_WEIGHTS as FULL_WEIGHTS
from perlhf.system.console import note
from perlhf.system.files import directory_atomic, sealed, sha256, storage_error, unsealed

_PICKLED = "adapter_model.bin"
ENCODING = ("system", "template_sha256", "template_kwargs", "end_token")
"""What of the encoding must agree wherever an adapter is used."""
_PREFIX, _HEAD = "base_model.model.", "score.weight"
_FORMAT = 2


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter directory holds.

    Args:
        adapter: on the CPU, float32, with nothing beneath it.
        base: fingerprint of the base it was trained on (`Base.fingerprint`); "" where unknown (made by other tools).
        encoding: how records became tokens (the `encoding` section of its recipe); {} where unknown.
        targets: module names (or path endings) that have a pair, as PEFT is told them; empty for full tuning.
        transposed: whether layers of the base keep their weights as [in, out] (PEFT's `fan_in_fan_out`).
    """

    adapter: Adapter
    base: dict[str, Any]
    encoding: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    transposed: bool = False


def save_adapter(model: Model, name: str, directory: Path, encoder: Encoder) -> None:
    """Writes adapter `name`, with whatever stays active beneath it stacked in, so that it loads on its own.

    Raises:
        AdapterError, StorageError: as `write_adapter`.
    """
    adapter = with_those_beneath(model, name)
    targets = sorted(adapter.pairs)
    transposed = any(is_transposed(model.base.get_submodule(path)) for path in targets)
    write_adapter(directory, SavedAdapter(adapter, model.fingerprint, encoder.identity(), targets, transposed))


def save_members(model: Model, names: Sequence[str], directory: Path, encoder: Encoder) -> None:
    """Writes one adapter as `save_adapter`; of several each into a directory of its own, `0`, `1`, .., all or none.

    Raises:
        AdapterError, StorageError: as `write_adapter`.
    """
    if len(names) == 1:
        save_adapter(model, names[0], directory, encoder)
        return
    with directory_atomic(directory) as temporary:
        for number, name in enumerate(names):
            save_adapter(model, name, temporary / str(number), encoder)


def load_adapter(model: Model, directory: Path, name: str, encoder: Encoder | None = None) -> Adapter:
    """Reads an adapter into the model as `name`.

    Args:
        encoder: when given, its template, system message and end token must be those the adapter was trained with.

    Raises:
        AdapterError: missing, damaged, made for another base, or trained with another encoding.
    """
    saved = read_adapter(directory, name)
    check_base(saved, model.fingerprint)
    _check_encoding(saved.encoding, encoder, directory)
    adapter = saved.adapter
    adapter.source = directory
    _check_fits(model, adapter, directory)
    if adapter.weights:  # optimisers know their parameters by the order
        adapter.weights = {path: adapter.weights[path] for path, _ in model.base.named_parameters()}
    return model.adopt(adapter)


def _check_fits(model: Model, adapter: Adapter, directory: Path) -> None:
    """Refuses a head of another width, and whole weights of another network; pairs are `Model.adopt`'s matter."""
    head = adapter.score_head
    if head is not None and head.shape != (1, model.hidden_size):
        what, allowed = f"the score head is {list(head.shape)}", f"[1, {model.hidden_size}]"
        raise AdapterError(what, where=str(directory), allowed=allowed, hint="use the base it was trained on")
    if (head is not None) != (adapter.role in ("reward", "value")):
        raise AdapterError(
            f"a {adapter.role} adapter with{'' if head is not None else 'out'} a head", where=str(directory)
        )
    if not adapter.weights:
        return
    expected = {path: weight.shape for path, weight in model.base.named_parameters()}
    for path in [*expected, *adapter.weights]:
        there = adapter.weights.get(path)
        if path not in expected or there is None or there.shape != expected[path]:
            raise AdapterError(
                f"'{path}' isn't the base's", where=str(directory), hint="use the base it was trained on"
            )


def with_those_beneath(model: Model, name: str) -> Adapter:
    """The adapter as one that needs none beneath it: where there are some, the pairs of each layer are stacked.

    A layer that one of them lacks gets zeros from it, so that pairs have the same rank where those of each have.
    """
    chain = [model.adapters[name]]
    while (beneath := chain[0].beneath) is not None:
        chain.insert(0, model.adapters[beneath])
    top = chain[-1]
    if len(chain) == 1:
        return top
    rank = sum(adapter.rank for adapter in chain)
    # Every pair has scale 1: alpha is the rank, be it the adapter's or, of a layer with another rank, the pair's own.
    whole = Adapter(name, top.role, rank, float(rank), top.dropout, score_head=top.score_head, bias=top.bias)
    for path, example in {path: pair for adapter in chain for path, pair in adapter.pairs.items()}.items():
        whole.pairs[path] = lora.stacked([adapter.pairs.get(path) or _zeros(adapter, example) for adapter in chain])
    return whole


def write_adapter(directory: Path, saved: SavedAdapter, base_name: str | None = None) -> None:
    """Writes an adapter directory, whole or not at all; replaces an adapter that is there.

    Args:
        base_name: what other tools are told to load as the base, where that isn't the name that the base has here.

    Raises:
        AdapterError: the directory holds something else.
        StorageError: it can't be written; what was there stays.
    """
    adapter, full = saved.adapter, bool(saved.adapter.weights)
    assert full != bool(adapter.pairs) and adapter.beneath is None, "either weights or pairs, and nothing beneath"
    assert (adapter.score_head is not None) == (adapter.role in ("reward", "value")), (
        f"head of a {adapter.role} adapter"
    )
    check_replaceable(directory)
    tensors = {name: tensor for name, tensor in adapter.tensors().items() if name != "score.bias"}
    if not full:
        tensors = {f"{_PREFIX}{name.removesuffix('.weight')}.weight": tensor for name, tensor in tensors.items()}
    with directory_atomic(directory) as temporary:
        file = temporary / (FULL_WEIGHTS if full else TENSORS)
        write_tensors(file, tensors, directory)
        if not full:
            named = base_name or saved.base.get("name") or None
            settings = settings_of(adapter, saved.targets, named) | {"fan_in_fan_out": saved.transposed}
            if "revision" in saved.base and base_name in (None, saved.base["name"]):
                settings["revision"] = saved.base["revision"]
            (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        details = {
            "format": _FORMAT,
            "tuning": "full" if full else "lora",
            "role": adapter.role,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            **patterns(adapter),
            "bias": 0.0 if adapter.bias is None else adapter.bias.item(),
            "base": saved.base,
            "encoding": saved.encoding,
            "sha256": sha256(file),
        }
        (temporary / DETAILS).write_bytes(sealed(details))


def check_replaceable(directory: Path) -> None:
    """Raises AdapterError for a directory that holds more than an adapter."""
    if directory.exists() and (strange := _strangers(directory)):
        hint = "name a new directory, or delete this one"
        raise AdapterError(f"not overwritten: it holds {strange[0]}", where=str(directory), hint=hint)


def read_adapter(directory: Path, name: str = "adapter") -> SavedAdapter:
    """Reads an adapter directory, ours or one that `peft` saved; no network is loaded.

    Raises:
        AdapterError: files missing or damaged, of an earlier version, or an adapter that needs more than
            (alpha / rank) B A on linear layers.
    """
    if not directory.is_dir():
        raise AdapterError(f"no adapter at {directory}", hint="name a finished run directory")
    details = _read_details(directory)
    if details is not None and details["tuning"] == "full":
        tensors = _read_tensors(directory / FULL_WEIGHTS, details["sha256"])
        adapter = _with_head(Adapter(name, details["role"]), tensors.pop(_HEAD, None), details["bias"])
        adapter.weights = {key.removeprefix("base."): nn.Parameter(tensor) for key, tensor in tensors.items()}
        return SavedAdapter(adapter, details["base"], details["encoding"])
    config = _read_json(directory / CONFIG)
    check_plain(config, directory / CONFIG)
    tensors = _read_tensors(directory / TENSORS, None if details is None else details["sha256"])
    shape = Shape.of(directory / CONFIG, config)
    if details is not None and not shape.agrees(details):
        raise _damaged(directory / CONFIG, f"rank or alpha were changed after saving: {DETAILS} has others")
    head = tensors.pop(_PREFIX + _HEAD, None)
    if head is not None and (head.dim() != 2 or head.shape[0] != 1):
        what = f"the score head is {list(head.shape)}"
        raise AdapterError(what, where=str(directory / TENSORS), allowed="[1, hidden]")
    details = details or _details_of_peft(config, head)
    # The same scale without rsLoRA's root.
    alpha = shape.alpha * math.sqrt(shape.rank) if shape.rslora else shape.alpha
    adapter = Adapter(name, details["role"], shape.rank, alpha, shape.dropout)
    adapter = _with_head(adapter, head, details["bias"])
    adapter.pairs = _pairs(tensors, shape, directory / TENSORS)
    targets = targets_of(config, adapter)
    transposed = bool(config.get("fan_in_fan_out"))
    return SavedAdapter(adapter, details["base"], details["encoding"], targets, transposed)


def check_base(saved: SavedAdapter, fingerprint: dict[str, Any]) -> None:
    """Refuses an adapter that was trained on another base.

    The SHA-256 of the weights decides, and where both sides have them those of configuration and tokenizer. Adapters of
    other tools record a name only: it is right where it leads to the same weights, wrong where it leads to others, and
    where it leads nowhere on this machine a note on standard error says that nothing is known.

    Raises:
        AdapterError: with both names.
    """
    name, digest = saved.base.get("name", ""), saved.base.get("sha256", "")
    then, here = saved.base.get("quantize", "none"), fingerprint.get("quantize", "none")
    if digest and then != here:  # other tools don't say
        what = f"the adapter was trained on the base with quantize: {then}, and here it is loaded with quantize: {here}"
        raise AdapterError(what, where="quantize", allowed=then, hint=f"--quantize {then}, or train it again")
    if not digest and name not in ("", fingerprint["name"]):
        try:
            digest = Base.find(name).fingerprint["sha256"]
        except ModelError:
            note(f"the adapter names {name} as its base, which isn't here; taken to be {fingerprint['name']}")
    if digest in ("", fingerprint["sha256"]):
        _check_settings(saved, fingerprint)
        return
    theirs = f"{name} (SHA-256 {digest[:12]})"
    ours = f"{fingerprint['name']} (SHA-256 {fingerprint['sha256'][:12]})"
    pinned = f"{name}@{saved.base['revision']}" if saved.base.get("revision") else name
    hint = f"--base {pinned}, or train on {fingerprint['name']} again"
    if not saved.base.get("sha256"):
        hint += f"; if the two are the same, correct base_model_name_or_path in {CONFIG}"
    raise AdapterError(f"the adapter is for base {theirs}, not for {ours}", where="base", allowed=name, hint=hint)


def _check_settings(saved: SavedAdapter, fingerprint: dict[str, Any]) -> None:
    if changed := changed_files(saved.base, fingerprint):
        what = f"{changed[0]} of base {fingerprint['name']} isn't the one that the adapter was trained with"
        hint = "put it back, or train the adapter again; commands that read a run take --accept-changes"
        raise AdapterError(what, where="base", allowed="the same configuration, tokenizer and weights", hint=hint)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], target: Path) -> None:
    """One safetensors file; tensors that share memory (tied weights) are written once each. Errors name `target`."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        held = tensor.detach().to("cpu").contiguous()
        address = held.untyped_storage().data_ptr()
        plain[name] = held.clone() if address in seen else held
        seen.add(address)
    try:
        save_file(plain, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # The Rust library reports what the system refused as text only.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise storage_error(target, int(number[1]), str(error)) from error


def _zeros(adapter: Adapter, example: LowRank) -> LowRank:
    """A pair of the adapter's rank, for the example's layer, that changes nothing."""
    a = example.a.new_zeros(adapter.rank, example.a.shape[1])
    b = example.b.new_zeros(example.b.shape[0], adapter.rank)
    return LowRank(nn.Parameter(a), nn.Parameter(b), 1.0)


def _read_details(directory: Path) -> dict[str, Any] | None:
    """What perlhf.json says, as it was written; None for a directory of other tools, which have no such file."""
    file = directory / DETAILS
    if not file.is_file():
        if (directory / FULL_WEIGHTS).is_file():
            what = f"{FULL_WEIGHTS} without {DETAILS}: copied in part, or made by an earlier version of perlhf"
            raise AdapterError(what, where=str(directory), hint="copy the directory again, or train again")
        return None
    said = _read_json(file)
    format = said.get("format")
    if format != _FORMAT:
        what = f"format {format}, of another version of perlhf"
        raise AdapterError(what, where=str(file), allowed=f"format {_FORMAT}", hint="train the adapter again")
    try:
        details = unsealed(file)
    except (ValueError, OSError) as error:
        raise _damaged(file, str(error)) from error
    _check_details(file, details)
    return details


def _read_tensors(file: Path, expected: str | None) -> dict[str, Tensor]:
    """The tensors in order of their names, in the file's own memory; `expected` is its SHA-256, where it is known."""
    if not file.is_file():
        pickled = f", but {_PICKLED}" if (file.parent / _PICKLED).is_file() else ""
        hint = "save it again as safetensors (peft: save_pretrained(..., safe_serialization=True)); "
        hint += "pickled adapters (.bin) are never read"
        raise AdapterError(f"no {file.name} in it{pickled}", where=str(file.parent), hint=hint)
    if expected is not None and sha256(file) != expected:
        raise _damaged(file, f"its SHA-256 is not the one in {DETAILS}")
    try:
        # safetensors gives another order in every process; optimisers know their parameters by it.
        tensors = dict(sorted(load_file(file).items()))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(file, str(error)) from error
    _check_tensors(file, tensors)
    return tensors


def _check_details(file: Path, details: dict[str, Any]) -> None:
    """Refuses values of a wrong kind."""
    full = details.get("tuning") == "full"
    base, role = details.get("base"), details.get("role")
    names = [base.get("name"), base.get("sha256")] if isinstance(base, dict) else [None]
    kinds = {
        "tuning": details.get("tuning") in ("lora", "full"),
        "role": role in ("sft", "reward", "policy", "value"),
        "bias": type(details.get("bias")) in (int, float) and math.isfinite(details["bias"]),
        "base": all(isinstance(name, str) for name in names),
        "encoding": isinstance(details.get("encoding"), dict),
        "sha256": isinstance(details.get("sha256"), str),
        "rank": full or "rank" in details,
        "alpha": full or "alpha" in details,
    }
    for key, fits in kinds.items():
        if not fits:
            raise wrong(file, f"{key} is {details.get(key)!r:.100}", "what perlhf writes there")


def _check_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses numbers that aren't: of such an adapter every score and probability would be none, too."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            kind = "values that aren't finite" if tensor.is_floating_point() else f"{tensor.dtype} values"
            hint = "train or export the adapter again"
            raise AdapterError(
                f"{name} has {kind}", where=str(file), allowed="finite floating-point numbers", hint=hint
            )


def _with_head(adapter: Adapter, head: Tensor | None, bias: float) -> Adapter:
    if head is not None:
        adapter.score_head = nn.Parameter(head.to(torch.float32, copy=True))
        adapter.bias = nn.Parameter(torch.tensor([bias], dtype=torch.float32), adapter.role == "value")
    return adapter


def _pairs(tensors: dict[str, Tensor], shape: Shape, where: Path) -> dict[str, LowRank]:
    """Pairs by module path; every tensor must belong to one of the right shape."""
    a_end, b_end = ".lora_A.weight", ".lora_B.weight"
    paths = [name[len(_PREFIX) : -len(a_end)] for name in tensors if name.startswith(_PREFIX) and name.endswith(a_end)]
    pairs = {}
    for path in paths:
        a, b = tensors.pop(f"{_PREFIX}{path}{a_end}"), tensors.pop(f"{_PREFIX}{path}{b_end}", None)
        rank = shape.rank_of(path)
        if b is None:
            raise AdapterError(f"{path} has lora_A without lora_B", where=str(where))
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            what = f"{path}: A {list(a.shape)} and B {list(b.shape)} are no pair of rank {rank}"
            raise AdapterError(what, where=str(where), allowed="A [rank, in] and B [out, rank] of linear layers")
        a, b = (nn.Parameter(tensor.to(torch.float32, copy=True)) for tensor in (a, b))
        pairs[path] = LowRank(a, b, shape.scale(path), shape.dropout)
    if tensors:
        what = f"unknown tensor {sorted(tensors)[0]}"
        module = re.match(rf"{re.escape(_PREFIX)}(.*)\.(base_layer\.|lora_)", sorted(tensors)[0])
        if module:  # peft saves the whole weight of an embedding or output head that it adapts
            what = f"target_modules: {module[1]} isn't a linear layer below the output head"
        raise AdapterError(what, where=str(where), allowed=f"lora_A, lora_B, {_HEAD}")
    if not pairs:
        raise AdapterError("no lora_A and lora_B in it", where=str(where))
    return pairs


def _details_of_peft(config: dict[str, Any], head: Tensor | None) -> dict[str, Any]:
    """What perlhf.json would say of an adapter of other tools, as far as it is known."""
    name, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    if name and isinstance(revision, str) and revision not in ("", "main") and not Path(name).exists():
        name = f"{name}@{revision}"
    base = {"name": name, "sha256": ""}
    return {"role": "sft" if head is None else "reward", "bias": 0.0, "base": base, "encoding": {}}


def _check_encoding(trained: dict[str, Any], encoder: Encoder | None, directory: Path) -> None:
    if encoder is None or not trained:
        return
    now = encoder.identity()
    for key in ENCODING:
        then, here = trained.get(key), now.get(key)
        if then != here:
            option = f"encoding.{key}" if key in ("system", "template_kwargs") else "encoding.template"
            raise AdapterError(
                f"the adapter in {directory} was trained with {key} = {then!r}, this run uses {here!r}",
                where=option,
                hint="use the same encoding in every stage",
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"no {path.name} in it", where=str(path.parent), allowed="an adapter directory") from error
    except (ValueError, RecursionError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, "it is no JSON object")
    return value


def _damaged(path: Path, why: str) -> AdapterError:
    return AdapterError(f"damaged: {why}", where=str(path), hint="copy or export the adapter again")


def _strangers(directory: Path) -> list[str]:
    if not directory.is_dir():
        return [directory.name]
    return sorted(entry.name for entry in directory.iterdir() if entry.name not in {*ADAPTER_FILES, "README.md"})
