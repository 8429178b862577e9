"""Adapters on disk, in PEFT's layout: other tools load ours and we load theirs.

    adapter_config.json        rank, alpha, dropout, targets, task type, name of the base     (read by peft)
    adapter_model.safetensors  float32 `base_model.model.<module path>.lora_A.weight` and so on   (read by peft)
    perlhf.json                role, bias of the score head, fingerprint of the base, encoding, SHA-256 of the tensors

Reward and value adapters are sequence-classification adapters whose head is `base_model.model.score.weight`. The head's
bias is the one thing that peft doesn't see, so its scores are ours up to that constant.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from perlhf.errors import AdapterError
from perlhf.model.adapter import Role
from perlhf.system.files import directory_atomic

CONFIG, TENSORS, DETAILS = "adapter_config.json", "adapter_model.safetensors", "perlhf.json"
_PREFIX = "base_model.model."
_HEAD = _PREFIX + "score.weight"
_FORMAT = 1
_OURS = {CONFIG, TENSORS, DETAILS, "README.md"}
_READ = {
    "base_model_name_or_path",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
    "use_rslora",
    "layers_to_transform",
}
_WITHOUT_EFFECT = {  # on what an adapter computes, given its tensors
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights as well


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter directory holds.

    Args:
        weights: module path (`model.layers.0.self_attn.q_proj`) -> (A [rank, in], B [out, rank]), float32.
        rank: of every pair.
        alpha: the update is (alpha / rank) B A.
        dropout: on the adapter's input, in training.
        targets: module names (or path endings) that have a pair.
        head: score or value head [1, hidden], float32; None for sft and policy.
        bias: of the head.
        role: what the adapter is for.
        base: fingerprint {"name", "sha256"} of the base it was trained on; "" where unknown (made by other tools).
        encoding: how records became tokens (the `encoding` section of its recipe); {} where unknown.
        extra: anything else worth keeping, as JSON.
    """

    weights: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    head: Tensor | None
    bias: float
    role: Role
    base: dict[str, str]
    encoding: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def write_adapter(directory: Path, files: AdapterFiles) -> None:
    """Writes an adapter directory, whole or not at all; replaces an adapter that is there.

    Raises:
        AdapterError: the directory holds something else.
        StorageError: it can't be written; what was there stays.
    """
    assert (files.head is not None) == (files.role in ("reward", "value")), f"role {files.role} and head don't fit"
    assert files.weights, "an adapter without weights"
    if directory.exists() and (strange := _strangers(directory)):
        hint = "name a new directory, or delete this one"
        raise AdapterError(f"not overwritten: it holds {strange[0]}", where=str(directory), hint=hint)
    tensors = {} if files.head is None else {_HEAD: _plain(files.head)}
    for path, (a, b) in files.weights.items():
        assert a.shape[0] == b.shape[1] == files.rank, (
            f"{path}: A {tuple(a.shape)}, B {tuple(b.shape)}, rank {files.rank}"
        )
        assert any(path == target or path.endswith(f".{target}") for target in files.targets), f"{path} is no target"
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = _plain(a)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = _plain(b)
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    details = {
        "format": _FORMAT,
        "role": files.role,
        "bias": files.bias,
        "base": files.base,
        "encoding": files.encoding,
        "extra": files.extra,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    config = _peft_config(files)
    details["seal"] = _seal(details, config)
    with directory_atomic(directory) as temporary:
        (temporary / TENSORS).write_bytes(data)
        (temporary / CONFIG).write_text(_json(config), "utf-8")
        (temporary / DETAILS).write_text(_json(details), "utf-8")


def read_adapter(directory: Path) -> AdapterFiles:
    """Reads an adapter directory, ours or one that `peft` saved.

    Raises:
        AdapterError: files missing or damaged, or an adapter that needs more than (alpha / rank) B A on linear layers.
    """
    config = _read_json(directory / CONFIG)
    details = _read_json(directory / DETAILS) if (directory / DETAILS).is_file() else None
    _check_reproducible(config, str(directory / CONFIG))
    data = _read_tensors(directory)
    if details is not None and hashlib.sha256(data).hexdigest() != details.get("sha256"):
        raise _damaged(directory / TENSORS, f"its SHA-256 is not the one in {DETAILS}")
    if details is not None and details.get("seal") != _seal(details, config):
        raise _damaged(directory / DETAILS, f"it, or rank and alpha in {CONFIG}, were changed after saving")
    try:
        # safetensors gives another order in every process; optimisers know their parameters by it.
        tensors = {name: tensor.float() for name, tensor in sorted(safetensors.torch.load(data).items())}
    except SafetensorError as error:
        raise _damaged(directory / TENSORS, str(error)) from error
    head = tensors.pop(_HEAD, None)
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        dropout = float(config.get("lora_dropout") or 0)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(directory / CONFIG, f"no number: {error}") from error
    weights = _pairs(tensors, rank, directory / TENSORS)
    details = details or _details_of_peft(config, head)
    _check_head(head, details, directory)
    return AdapterFiles(
        weights=weights,
        rank=rank,
        alpha=alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
        dropout=dropout,
        targets=_targets(config, weights),
        head=head,
        bias=float(details.get("bias", 0.0)),
        role=cast(Role, details["role"]),
        base=details["base"],
        encoding=details.get("encoding", {}),
        extra=details.get("extra", {}),
    )


def check_base(files: AdapterFiles, fingerprint: dict[str, str]) -> None:
    """Refuses an adapter that was trained on another base.

    The SHA-256 of the weights decides; the name does for adapters of other tools, which record nothing else.

    Raises:
        AdapterError: with both names.
    """
    name, sha256 = files.base.get("name", ""), files.base.get("sha256", "")
    same = sha256 == fingerprint["sha256"] if sha256 else name in ("", fingerprint["name"])
    if same:
        return
    theirs = f"{name} (SHA-256 {sha256[:12] or 'unknown'})"
    ours = f"{fingerprint['name']} (SHA-256 {fingerprint['sha256'][:12]})"
    hint = f"name that base, or train on {fingerprint['name']} again"
    if not sha256:
        hint += f"; if the two are the same, correct base_model_name_or_path in {CONFIG}"
    raise AdapterError(f"the adapter is for base {theirs}, not for {ours}", where="base", allowed=name, hint=hint)


def _seal(details: dict[str, Any], config: dict[str, Any]) -> str:
    """SHA-256 over what perlhf.json says and the numbers of PEFT's configuration that change scores."""
    said = {key: value for key, value in details.items() if key != "seal"}
    numbers = [config.get(key) for key in ("r", "lora_alpha", "use_rslora")]
    return hashlib.sha256(json.dumps([said, numbers], sort_keys=True).encode()).hexdigest()


def _peft_config(files: AdapterFiles) -> dict[str, Any]:
    classifier = files.head is not None
    alpha = int(files.alpha) if float(files.alpha).is_integer() else files.alpha
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM",
        "base_model_name_or_path": files.base.get("name") or None,
        "r": files.rank,
        "lora_alpha": alpha,
        "lora_dropout": files.dropout,
        "target_modules": sorted(files.targets),
        "modules_to_save": ["score"] if classifier else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _check_reproducible(config: dict[str, Any], where: str) -> None:
    """Refuses every setting that isn't known to be plain LoRA, those of later peft versions included."""
    allowed = "plain LoRA on linear layers"
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {config.get('peft_type')}", where=where, allowed="LORA")
    if config.get("task_type") not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise AdapterError(f"task_type is {config['task_type']}", where=where, allowed="CAUSAL_LM or SEQ_CLS")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias: {config['bias']} isn't supported", where=where, allowed="none")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        what = f"init_lora_weights: {config['init_lora_weights']} changes the base's weights"
        raise AdapterError(what, where=where, allowed=allowed, hint="convert it to plain LoRA with peft first")
    extra = set(config.get("modules_to_save") or ()) - {"score", "classifier"}
    if extra:
        raise AdapterError(f"modules_to_save has {sorted(extra)[0]}", where=where, allowed="score")
    known = _READ | _WITHOUT_EFFECT | {"bias", "init_lora_weights"}
    for key in sorted(config.keys() - known):
        if config[key]:
            raise AdapterError(f"{key}: {config[key]} isn't supported", where=where, allowed=allowed)


def _pairs(tensors: dict[str, Tensor], rank: int, where: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A, B); every tensor must belong to a pair of the right shape."""
    a_end, b_end = ".lora_A.weight", ".lora_B.weight"
    paths = [name[len(_PREFIX) : -len(a_end)] for name in tensors if name.startswith(_PREFIX) and name.endswith(a_end)]
    pairs = {}
    for path in paths:
        a, b = tensors.pop(f"{_PREFIX}{path}{a_end}"), tensors.pop(f"{_PREFIX}{path}{b_end}", None)
        if b is None:
            raise AdapterError(f"{path} has lora_A without lora_B", where=str(where))
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            what = f"{path}: A {list(a.shape)} and B {list(b.shape)} are no pair of rank {rank}"
            raise AdapterError(what, where=str(where), allowed="A [rank, in] and B [out, rank] of linear layers")
        pairs[path] = (a, b)
    if tensors:
        what = f"unknown tensor {sorted(tensors)[0]}"
        raise AdapterError(what, where=str(where), allowed=f"lora_A, lora_B, {_HEAD.removeprefix(_PREFIX)}")
    if not pairs:
        raise AdapterError("no lora_A and lora_B in it", where=str(where))
    return pairs


def _targets(config: dict[str, Any], weights: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """The listed module names; full paths where peft chose modules by a pattern or by layer."""
    names = config.get("target_modules")
    everywhere = config.get("layers_to_transform") is None and not config.get("exclude_modules")
    return sorted(names) if isinstance(names, list) and everywhere else sorted(weights)


def _details_of_peft(config: dict[str, Any], head: Tensor | None) -> dict[str, Any]:
    name = config.get("base_model_name_or_path") or ""
    return {"role": "sft" if head is None else "reward", "base": {"name": name, "sha256": ""}}


def _check_head(head: Tensor | None, details: dict[str, Any], directory: Path) -> None:
    role, base = details.get("role"), details.get("base")
    if role not in get_args(Role) or not isinstance(base, dict):
        raise _damaged(directory / DETAILS, f"role {role!r} or base {base!r} makes no sense")
    if (head is not None) != (role in ("reward", "value")):
        have = "no score head" if head is None else "a score head"
        raise AdapterError(f"a {role} adapter with {have}", where=str(directory / TENSORS))
    if head is not None and (head.dim() != 2 or head.shape[0] != 1):
        raise AdapterError(
            f"the score head is {list(head.shape)}", where=str(directory / TENSORS), allowed="[1, hidden]"
        )


def _read_tensors(directory: Path) -> bytes:
    try:
        return (directory / TENSORS).read_bytes()
    except FileNotFoundError as error:
        hint = "save it again as safetensors; pickled adapters (.bin) are never read"
        raise AdapterError(f"no {TENSORS} in it", where=str(directory), hint=hint) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"no {path.name} in it", where=str(path.parent), allowed="an adapter directory") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, "it is no JSON object")
    return value


def _damaged(path: Path, why: str) -> AdapterError:
    return AdapterError(f"damaged: {why}", where=str(path), hint="copy or export the adapter again")


def _strangers(directory: Path) -> list[str]:
    if not directory.is_dir():
        return [directory.name]
    return sorted(entry.name for entry in directory.iterdir() if entry.name not in _OURS)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
