"""Adapters between the model and run directories: LoRA in PEFT's layout, full tuning as float32 weights beside a
perlhf.json.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perlhf.errors import AdapterError, CheckpointError
from perlhf.method.lora import LowRank
from perlhf.model.adapter import Adapter
from perlhf.model.adapter_files import AdapterFiles, check_base, read_adapter, write_adapter
from perlhf.model.encode import Encoder
from perlhf.model.model import Model
from perlhf.system.files import directory_atomic, storage_error

FULL_WEIGHTS = "full_weights.safetensors"
FULL_META = "perlhf_full.json"


def save_adapter(
    model: Model, name: str, directory: Path, encoder: Encoder, extra: dict[str, Any] | None = None
) -> None:
    """Writes adapter `name`, with whatever stays active beneath it concatenated in, so that it loads on its own.

    Raises:
        StorageError: it can't be written; nothing half-written is left.
    """
    adapter = model.adapters[name]
    if adapter.weights:
        meta = {"role": adapter.role, "base": model.fingerprint, "encoding": encoder.identity(), "extra": extra or {}}
        write_full(directory, adapter.tensors(), meta)
        return
    rank, pairs = stacked_pairs(model, name)
    scaled = len({pair.scale for pair in adapter.pairs.values()}) == 1 and adapter.beneath is None
    write_adapter(
        directory,
        AdapterFiles(
            weights={path: (a.cpu(), b.cpu()) for path, (a, b) in pairs.items()},
            rank=rank,
            alpha=adapter.alpha if scaled else float(rank),
            dropout=adapter.dropout,
            targets=sorted(pairs),
            head=adapter.head.detach().cpu() if adapter.head is not None else None,
            bias=adapter.bias.item() if adapter.bias is not None else 0.0,
            role=adapter.role,
            base=model.fingerprint,
            encoding=encoder.identity(),
            extra=extra or {},
        ),
    )


def load_adapter(model: Model, directory: Path, name: str, encoder: Encoder | None = None) -> Adapter:
    """Reads an adapter into the model as `name`.

    Args:
        encoder: when given, its template, system message and end token must be those the adapter was trained with.

    Raises:
        AdapterError: missing, damaged, made for another base, or trained with another encoding.
    """
    if (directory / FULL_META).is_file():
        return _load_full(model, directory, name, encoder)
    if not directory.is_dir():
        raise AdapterError(f"no adapter at {directory}", hint="name a finished run directory")
    files = read_adapter(directory)
    check_base(files, model.fingerprint)
    _check_encoding(files.encoding, encoder, directory)
    adapter = Adapter(name, files.role, files.rank, files.alpha, files.dropout)
    for path, (a, b) in files.weights.items():
        scale = files.alpha / a.shape[0]
        adapter.pairs[path] = LowRank(
            nn.Parameter(a.float().clone()), nn.Parameter(b.float().clone()), scale, files.dropout
        )
    if files.head is not None:
        adapter.head = nn.Parameter(files.head.float().clone())
        adapter.bias = nn.Parameter(
            torch.tensor([files.bias], dtype=torch.float32), requires_grad=files.role == "value"
        )
    return model.adopt(adapter)


def files_hash(directory: Path) -> str:
    """SHA-256 over the names and bytes of an adapter directory's files."""
    digest = hashlib.sha256()
    for file in sorted(part for part in directory.iterdir() if part.is_file()):
        digest.update(f"{file.name}:{_sha256(file)}\n".encode())
    return digest.hexdigest()


def encoding_of(directory: Path) -> dict[str, Any]:
    """The encoding that an adapter on disk was trained with ({} when it says none)."""
    if (directory / FULL_META).is_file():
        return dict(full_meta(directory)["encoding"])
    return dict(read_adapter(directory).encoding)


@torch.no_grad()
def stacked_pairs(model: Model, name: str) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    """Rank and (A, B) of an adapter together with the ones beneath it.

    One adapter alone is given as it is. Of several, A is their concatenation along the rank and B that of scale *
    B, to be used with
    scale 1; a layer that one of them lacks gets zeros.
    """
    chain: list[Adapter] = []
    at: str | None = name
    while at is not None:
        chain.insert(0, model.adapters[at])
        at = chain[0].beneath
    if len(chain) == 1:
        return chain[0].rank, {path: (p.a.detach(), p.b.detach()) for path, p in chain[0].pairs.items()}
    paths = dict.fromkeys(path for adapter in chain for path in adapter.pairs)
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for path in paths:
        example = next(adapter.pairs[path] for adapter in chain if path in adapter.pairs)
        a, b = [], []
        for adapter in chain:
            pair = adapter.pairs.get(path)
            a.append(pair.a if pair else example.a.new_zeros(adapter.rank, example.a.shape[1]))
            b.append(pair.b * pair.scale if pair else example.b.new_zeros(example.b.shape[0], adapter.rank))
        out[path] = torch.cat(a), torch.cat(b, 1)
    return sum(adapter.rank for adapter in chain), out


def write_full(directory: Path, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """A fully tuned adapter, whole or not at all: its tensors, and role, base, encoding and extra in `meta`."""
    with directory_atomic(directory) as temporary:
        write_tensors(temporary / FULL_WEIGHTS, tensors, directory)
        sealed = meta | {"sha256": _sha256(temporary / FULL_WEIGHTS)}
        (temporary / FULL_META).write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")


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
        save_file(plain, file)
    except SafetensorError as error:
        # The Rust library reports what the system refused as text only.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise storage_error(target, int(number[1]), str(error)) from error


def _load_full(model: Model, directory: Path, name: str, encoder: Encoder | None) -> Adapter:
    meta = full_meta(directory)
    if meta["base"]["sha256"] != model.fingerprint["sha256"]:
        raise AdapterError(
            f"trained on base {meta['base']['name']}, not on {model.fingerprint['name']}",
            where=str(directory),
            hint=f"--base {meta['base']['name']}",
        )
    _check_encoding(meta["encoding"], encoder, directory)
    adapter = Adapter(name, meta["role"])
    for key, tensor in full_tensors(directory, meta).items():
        if key == "score.weight":
            adapter.head = nn.Parameter(tensor)
        elif key == "score.bias":
            adapter.bias = nn.Parameter(tensor, requires_grad=meta["role"] == "value")
        else:
            adapter.weights[key.removeprefix("base.")] = nn.Parameter(tensor)
    order = [n for n, _ in model.base.named_parameters()]
    adapter.weights = {n: adapter.weights[n] for n in order}
    return model.adopt(adapter)


def full_tensors(directory: Path, meta: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a fully tuned adapter, which must be those that `full_meta` speaks of.

    Raises:
        CheckpointError: missing, or changed after saving.
    """
    file = directory / FULL_WEIGHTS
    if not file.is_file():
        raise CheckpointError("the weights are missing", where=str(file))
    if _sha256(file) != meta["sha256"]:
        raise CheckpointError("SHA-256 differs from the recorded one", where=str(file))
    return load_file(file)


def full_meta(directory: Path) -> dict[str, Any]:
    """What is said of a fully tuned adapter: role, base, encoding, SHA-256 of the weights.

    Raises:
        CheckpointError: damaged.
    """
    try:
        meta = json.loads((directory / FULL_META).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"damaged: {error}", where=str(directory / FULL_META)) from error
    if not isinstance(meta, dict) or not {"role", "base", "encoding", "sha256"} <= meta.keys():
        raise CheckpointError("damaged: a key is missing", where=str(directory / FULL_META))
    return meta


def _check_encoding(trained: dict[str, Any], encoder: Encoder | None, directory: Path) -> None:
    if encoder is None or not trained:
        return
    now = encoder.identity()
    for key in ("system", "template_sha256", "end_token"):
        if key in trained and trained[key] != now[key]:
            option = "encoding.template" if key != "system" else "encoding.system"
            raise AdapterError(
                f"the adapter in {directory} was trained with {key} = {trained[key]!r}, this run uses {now[key]!r}",
                where=option,
                hint="use the same encoding in every stage",
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
