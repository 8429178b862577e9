"""The way of a base, kept from the time its weights were last loaded, by its configuration.

It says which way a network of this configuration goes before any weight is read, and spares the search for it: whoever
loads weights sees it hold on them all the same (`supported.choose_way`).
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedConfig

from perlhf.model.supported import Way
from perlhf.parallel.workers import ALONE, Workers
from perlhf.system.files import write_atomic
from perlhf.system.hashes import UNIMPORTANT
from perlhf.system.machine import cache_dir, version

_OURS = ("method", "kernels", "model")
"""Folders whose code decides."""
_WAY = TypeAdapter(Way)


def recall(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, workers: Workers = ALONE) -> Way | None:
    """The way that `remember` was given; None where there is none, or where its file isn't as it was written.

    Args:
        workers: all get what the first one recalls.
    """
    key = _key(config, dtype, device)
    said = workers.once(lambda: _said(key))
    with contextlib.suppress(ValueError):
        return None if said is None else _WAY.validate_json(said)
    return None


def _said(key: str) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        checksum, _, said = _file(key).read_text("utf-8").partition("\n")
        if checksum == _checksum(key, said):
            return said
    return None


def remember(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, way: Way) -> None:
    """Keeps a way that holds, unless it was measured: that says nothing about other weights."""
    if way.measured:
        return
    key, said = _key(config, dtype, device), _WAY.dump_json(way).decode()
    with contextlib.suppress(OSError):  # a cache that can't be written costs time only
        _file(key).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_file(key), f"{_checksum(key, said)}\n{said}")


def _key(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> str:
    """SHA-256 over all that decides, but the weights."""
    decides = {
        "config": _without_names(config.to_dict()),
        "dtype": str(dtype),
        "device": device.type,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()


def _without_names(said: Any) -> Any:
    """Of a configuration, what decides what is computed: not who wrote it, nor in which dtype it was kept."""
    if isinstance(said, dict):
        unimportant = (*UNIMPORTANT, "dtype", "torch_dtype", "architectures")
        return {str(key): _without_names(value) for key, value in said.items() if key not in unimportant}
    return [_without_names(value) for value in said] if isinstance(said, list | tuple) else said


def _code() -> str:
    """SHA-256 of our own modules: their version's number doesn't change with each of their lines."""
    digest = hashlib.sha256()
    for folder in _OURS:
        for file in sorted((Path(__file__).parents[1] / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _file(key: str) -> Path:
    return cache_dir() / "ways" / f"{key[:32]}.json"


def _checksum(key: str, said: str) -> str:
    return hashlib.sha256(f"{key}{said}".encode()).hexdigest()
