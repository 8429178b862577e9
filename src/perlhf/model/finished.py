"""A finished run put back to use: its configuration, its base, and its adapter under the name of its stage.

A directory with an adapter in PEFT's layout is read as a run, too: what a run's configuration would say is given by
whoever reads it, or found beside the adapter.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from perlhf.config.recipe import load_recipe
from perlhf.config.stages import (
    DataConfig,
    EncodingConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    StageConfig,
)
from perlhf.data.splits import content_hash, hashes_beside
from perlhf.errors import AdapterError, ModelError, RunError
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import (
    load_tokenizer,
)
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.open import STAGE_CONFIGS, open_model, template_beside, tokenizer_of
from perlhf.parallel.shard import Shard
from perlhf.parallel.workers import ALONE, Workers
from perlhf.runs import places
from perlhf.runs.earlier import adapter_of, adapters_of, earlier_runs, files_hash, is_adapter, several_adapters
from perlhf.runs.evaluations import mapping
from perlhf.runs.manifest import CONFIG, MANIFEST, RESULT, read_manifest
from perlhf.runs.recorded import changes, own_changes
from perlhf.system.console import note
from perlhf.system.files import read_json

StageName = Literal["sft", "reward", "policy"]


@dataclass(frozen=True)
class Given:
    """What a command says of a run that it reads: where its base is now, and what peft's directories don't say."""

    base: str | None = None
    data: DataConfig | None = None
    encoding: EncodingConfig | None = None
    dtype: str = "run"
    """Of the base: another one than the run's."""
    reward: tuple[str, ...] = ()
    """What scores the answers of peft's adapter: it is then read as a policy."""
    accept_changes: bool = False
    """To go on where something isn't as the run recorded it."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended, or an adapter of another tool."""

    path: Path
    stage: StageName
    config: SftConfig | RewardConfig | PolicyConfig
    foreign: bool = False
    """No run but an adapter's directory: nobody knows what it was trained on."""
    written: StageConfig | None = None
    """The configuration as config.yaml has it, whose paths are the names in the manifest; None of an adapter."""
    accept_changes: bool = False

    @property
    def adapter(self) -> Path:
        """The adapter's directory.

        Raises:
            RunError: there are several members, of which one is wanted.
        """
        if (error := several_adapters(self.path)) is not None:
            raise error
        return adapter_of(self.path) or self.path / "adapter"

    @property
    def members(self) -> dict[str, Path]:
        """Directories of its adapters by their names in the model: the stage's, or reward_0, reward_1, .."""
        directories = adapters_of(self.path) or [self.path / "adapter"]
        if len(directories) == 1:
            return {self.stage: directories[0]}
        return {f"{self.stage}_{number}": directory for number, directory in enumerate(directories)}

    @property
    def started_in(self) -> Path | None:
        """The directory that the run was started in, if that is known."""
        return None if self.foreign else places.origin_of(read_json(self.path / MANIFEST), self.path)

    @cached_property
    def base(self) -> Base:
        """What it was trained on, found once.

        Raises:
            ModelError: it isn't here any more.
        """
        return _find_base(self.config.base, self.path, saved.CONFIG if self.foreign else CONFIG)

    def check(
        self, *, data: bool = False, runs: Iterable[str] = (), code: Mapping[str, str] | None = None
    ) -> list[str]:
        """What isn't as the run recorded it, where that is accepted, which is told; checks base and adapter.

        Args:
            data: whether the run's own data are used.
            runs: keys of the configuration that name earlier runs which are used.
            code: of its reward functions, as it is now (`rollout.functions.code_of`).

        Raises:
            RunError: something was changed, and nobody accepted that; DataError, ModelError: what isn't there.
        """
        if self.foreign or self.written is None:
            return []
        now: dict[str, Any] = {"base": self.base.fingerprint, "code": dict(code or {})}
        if data:
            now["data"] = content_hash(self.config.data, self.written.data.paths)
            now["beside"] = hashes_beside(self.config.data)
        then, here = earlier_runs(self.written), earlier_runs(self.config)
        pairs = [pair for key in runs for pair in zip(then[key], here[key], strict=True)]
        found = {str(name): adapter_of(path) for name, path in pairs}
        now["adapters"] = {name: files_hash(directory) for name, directory in found.items() if directory is not None}
        changed = own_changes(self.path) + changes(mapping(read_manifest(self.path).get("facts")), now)
        if changed and not self.accept_changes:
            rest = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            hint = "put back what was there, or train the run again; --accept-changes goes on with what is there now"
            raise RunError(f"{changed[0]} since the run was trained{rest}", where=str(self.path), hint=hint)
        for sentence in changed:
            note(f"{self.path}: {sentence} since the run was trained")
        return changed

    def open(self, device: str, shard: Shard = "none", workers: Workers = ALONE) -> tuple[Model, Encoder]:
        """The base with the run's adapters, frozen and named as `members` says, and the encoder they were trained with.

        Sets the number of CPU threads where the run's configuration does.

        Args:
            device: of the base.
            shard: how it is spread over these workers, which needn't be as it was in training.

        Raises:
            ModelError: the base isn't there; AdapterError: the adapter is damaged or for another base.
        """
        # Another number of threads adds up in another order: scores would differ in the last bits.
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        config = self.config.model_copy(update={"device": device, "shard": shard})
        model, encoder = open_model(config, self.base, self.adapter if self.foreign else None, workers)
        if self.accept_changes:  # adapters are still refused on other weights
            model.fingerprint = {key: value for key, value in model.fingerprint.items() if key != "files"}
        for name, directory in self.members.items():
            saved.load_adapter(model, directory, name, encoder)
            model.freeze(name)
        return model, encoder

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, with the chat template and end token that came with an adapter of another tool."""
        return tokenizer_of(self.base, self.adapter if self.foreign else None)


def read_run(path: Path, stages: Sequence[StageName] = get_args(StageName), given: Given | None = None) -> FinishedRun:
    """Reads a run directory, or one with an adapter in PEFT's layout; loads no network.

    Args:
        path: the directory.
        stages: what is of use to the caller.
        given: what the command says of it.

    Raises:
        RunError: no run directory, a run that isn't finished, or one of another stage or an earlier version.
        ConfigError: its config.yaml is damaged.
        AdapterError, ModelError: an adapter's directory that can't be used, or whose base isn't named.
    """
    where, given = str(path), given or Given()
    if is_adapter(path):
        return _as_run(path, stages, given)
    if adapter_of(path) is None and (error := several_adapters(path)) is not None:
        raise error
    if not (path / MANIFEST).is_file():
        what = "not a run directory" if path.exists() else "there is no such directory"
        hint = "perlhf sft, reward or policy makes one"
        allowed = f"a directory with {CONFIG}, {MANIFEST} and {RESULT}, or with {saved.CONFIG} as peft saves it"
        raise RunError(what, where=where, allowed=allowed, hint=hint)
    manifest = read_manifest(path)
    stage = manifest.get("stage")
    if stage not in STAGE_CONFIGS:
        raise RunError(f"unknown stage {stage!r}", where=str(path / MANIFEST), allowed=", ".join(STAGE_CONFIGS))
    if not (path / RESULT).is_file():
        hint = f"run perlhf {stage} with the same recipe and options again: it continues where it stopped"
        raise RunError("the run isn't finished", where=where, hint=hint)
    _check_stage(path, stage, stages)
    written = load_recipe(path / CONFIG, STAGE_CONFIGS[stage])
    config = places.resolved(written, manifest, path).model_copy(update=_changes(given))
    return FinishedRun(path, stage, config, written=written, accept_changes=given.accept_changes)


def _changes(given: Given) -> dict[str, Any]:
    """What a command changes in the configuration of any run."""
    changes = {"base": given.base} if given.base else {}
    return changes | ({} if given.dtype == "run" else {"dtype": given.dtype})


def _find_base(name: str, path: Path, file: str) -> Base:
    """A base that a file of the directory `path` names."""
    try:
        return Base.find(name)
    except ModelError as error:
        hint = "name where it is now: --base BASE" + (f"; or {error.hint}" if error.hint else "")
        what = f"{error.what} (the base that {file} names)"
        raise ModelError(what, where=str(path), allowed=error.allowed, hint=hint) from error


def _check_stage(path: Path, stage: StageName, stages: Sequence[StageName]) -> None:
    if stage not in stages:
        allowed = f"a run of stage {' or '.join(stages)}"
        raise RunError(f"holds a run of stage {stage}", where=str(path), allowed=allowed)


def _as_run(path: Path, stages: Sequence[StageName], given: Given) -> FinishedRun:
    """An adapter's directory as the run that might have written it."""
    read = saved.read_adapter(path)
    stage: StageName = "policy" if given.reward else "sft"
    if read.adapter.score_head is not None:
        stage = "reward"
    _check_stage(path, stage, stages)
    base = given.base or read.base["name"]
    if not base:
        what = f"{saved.CONFIG} names no base (base_model_name_or_path)"
        raise ModelError(what, where=str(path), hint="name what it adapts: --base BASE")
    known = {key: value for key, value in read.encoding.items() if key in EncodingConfig.model_fields}
    common: dict[str, Any] = {"run": path, "data": given.data or DataConfig(), **_changes(given), "base": base}
    common["tuning"] = "full" if read.adapter.weights else "lora"
    if given.encoding or known:
        common["encoding"] = given.encoding or _encoding_of(path, known)
    elif template_beside(path) is None:
        tokenizer = load_tokenizer(_find_base(base, path, saved.CONFIG))
        template = "tokenizer" if tokenizer.chat_template else "plain"
        common["encoding"] = EncodingConfig(template=template)
    match stage:
        case "sft":
            config = SftConfig(**common)
        case "reward":
            config = RewardConfig(**common)
        case "policy":
            config = PolicyConfig(**common, reward=given.reward)
    return FinishedRun(path, stage, config, foreign=True)


def _encoding_of(path: Path, known: dict[str, Any]) -> EncodingConfig:
    """How records became tokens, as an adapter of ours says."""
    try:
        return EncodingConfig.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"encoding.{'.'.join(map(str, first['loc']))}: {first['msg']}"
        where, hint = str(path / saved.DETAILS), "--encoding.template and so on give another one"
        raise AdapterError(what, where=where, hint=hint) from error
