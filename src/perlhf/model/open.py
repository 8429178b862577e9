"""A finished run put back to use: its configuration, its base, and its adapter under the name of its stage.

A directory with an adapter in PEFT's layout is read as a run, too: what a run's configuration would say is given by
whoever reads it, or found beside the adapter.
"""

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perlhf.config.recipe import load_recipe
from perlhf.config.stages import (
    AdapterConfig,
    DataConfig,
    EncodingConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    StageConfig,
)
from perlhf.data import order
from perlhf.data.splits import content_hash, hashes_beside
from perlhf.errors import AdapterError, ConfigError, ModelError, RunError
from perlhf.kernels.modules import fused_experts
from perlhf.model import saved
from perlhf.model.adapter import Adapter
from perlhf.model.bases.found import Base, template_depends_on_day
from perlhf.model.bases.loading import (
    end_ids,
    load_tokenizer,
    pick_device,
    quantisation_note,
    vocabulary,
    will_be_quantised,
)
from perlhf.model.bases.untrained import untrained_tokens
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.parallel.shard import Shard, shards_of
from perlhf.parallel.workers import ALONE, Workers
from perlhf.runs import places
from perlhf.runs.earlier import adapter_of, adapters_of, earlier_runs, files_hash, is_adapter, several_adapters
from perlhf.runs.evaluations import mapping
from perlhf.runs.manifest import CONFIG, MANIFEST, RESULT, read_manifest
from perlhf.runs.recorded import changes, own_changes
from perlhf.system.console import note
from perlhf.system.files import read_json

StageName = Literal["sft", "reward", "policy"]
Stage = TypeVar("Stage", bound=StageConfig)
_CONFIGS = {"sft": SftConfig, "reward": RewardConfig, "policy": PolicyConfig}
_TEMPLATE, _TOKENIZER = "chat_template.jinja", "tokenizer_config.json"


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
        return _tokenizer(self.base, self.adapter if self.foreign else None)


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
    if stage not in _CONFIGS:
        raise RunError(f"unknown stage {stage!r}", where=str(path / MANIFEST), allowed=", ".join(_CONFIGS))
    if not (path / RESULT).is_file():
        hint = f"run perlhf {stage} with the same recipe and options again: it continues where it stopped"
        raise RunError("the run isn't finished", where=where, hint=hint)
    _check_stage(path, stage, stages)
    written = load_recipe(path / CONFIG, _CONFIGS[stage])
    config = places.resolved(written, manifest, path).model_copy(update=_changes(given))
    return FinishedRun(path, stage, config, written=written, accept_changes=given.accept_changes)


def load_sft(model: Model, run: Path, encoder: Encoder) -> str:
    """The frozen adapter of an SFT run, or of a directory of peft's; its name.

    Raises:
        ConfigError: a run of another stage; AdapterError: as `saved.load_adapter`.
    """
    adapter = load_earlier(model, run, "sft", encoder)
    if adapter.score_head is not None:
        raise ConfigError(f"{run} holds a {adapter.role} adapter", where="sft", allowed="an SFT run")
    return adapter.name


def load_earlier(model: Model, run: Path, name: str, encoder: Encoder, key: str | None = None) -> Adapter:
    """The adapter of an earlier run, or of a directory of peft's, frozen under `name`.

    Args:
        model: gets the adapter.
        run: the directory.
        name: of the adapter in the model.
        encoder: whose template, system message and end token must be those that the adapter was trained with.
        key: of the configuration that names the run, if that isn't `name`.

    Raises:
        RunError: there is no adapter, or several; AdapterError: as `saved.load_adapter`.
    """
    if (error := several_adapters(run)) is not None:
        raise error
    directory = adapter_of(run)
    if directory is None:
        raise RunError(f"{run} is no finished run", where=key or name, hint="name a finished run directory")
    adapter = saved.load_adapter(model, directory, name, encoder)
    if not (directory / saved.DETAILS).is_file() and encoder.config.template == "tokenizer":
        beside, used = _template_beside(directory), encoder.tokenizer.chat_template
        if isinstance(beside, str) and isinstance(used, str) and beside.strip() != used.strip():
            what = f"{directory} came with another chat template than the base's, which is used here"
            note(f"{what}; encoding.template: {directory / _TEMPLATE} takes it")
    model.freeze(name)
    return adapter


def load_starts(model: Model, config: RewardConfig, encoder: Encoder) -> list[str]:
    """The frozen adapters of the reward run that `start` names, one for each member; their names.

    Raises:
        ConfigError: it has no score head, or another number of members.
    """
    assert config.start is not None
    directories = adapters_of(config.start) or [config.start]
    if len(directories) != config.members:
        what = f"{config.start} has {len(directories)} member{'s' if directories[1:] else ''}, and members is"
        hint = f"members: {len(directories)} trains all of them on"
        hint += f"; {directories[0]} is the first one alone" if directories[1:] else ""
        raise ConfigError(f"{what} {config.members}", where="members", allowed=str(len(directories)), hint=hint)
    names = [f"start_{number}" for number in range(1, config.members)]
    return [
        load_start(model, config.model_copy(update={"start": directory}), encoder, "reward", name)
        for name, directory in zip(["start", *names], directories, strict=True)
    ]


def load_start(
    model: Model,
    config: StageConfig,
    encoder: Encoder,
    role: Literal["sft", "reward", "policy"],
    name: str = "start",
) -> str:
    """The frozen adapter of the run that `start` names, under `name`, which is returned.

    Raises:
        ConfigError: it has no score head, or has one, where `role` wants the other.
    """
    assert config.start is not None
    adapter = load_earlier(model, config.start, name, encoder, "start")
    if (adapter.score_head is not None) != (role == "reward"):
        allowed = "a reward run" if role == "reward" else "an SFT or policy run"
        hint = "sft: RUN lets a reward model start from an SFT run" if role == "reward" else None
        raise ConfigError(f"{config.start} holds a {adapter.role} adapter", where="start", allowed=allowed, hint=hint)
    return adapter.name


def open_model(
    config: StageConfig, base: Base, beside: Path | None = None, workers: Workers = ALONE
) -> tuple[Model, Encoder]:
    """The model and the encoder that a stage's configuration names, on its base.

    Args:
        config: of the stage.
        base: the network.
        beside: an adapter's directory whose own chat template and end token are used, if it has some.
        workers: over whom the base is spread, where the configuration's `shard` asks for it.

    Raises:
        ConfigError: it can't be spread over them; ModelError: as `Model.load`.
    """
    tokenizer = _tokenizer(base, beside)
    shards = shards_of(config.shard, workers, pick_device(config.device))
    if shards is not None and will_be_quantised(base, config.quantize):
        note(f"shard: {config.shard} spreads no quantised weights: each worker holds all of them")
        shards = None
    model = Model.load(base, config.dtype, config.device, vocabulary(tokenizer), config.quantize, shards)
    if (said := quantisation_note(base, model.base, config.quantize)) is not None:
        note(said)
    if model.way.packing == "none":
        note(f"no tree of prefixes, but rows, which are slower: {model.way.why}")
    return model, Encoder(tokenizer, config.encoding, end_ids(base), untrained_tokens(model.base, tokenizer))


def with_day(config: Stage, base: Base, workers: Workers = ALONE) -> Stage:
    """The configuration with the day that its chat template is rendered for, where that writes the date.

    It is the day of the run that is continued, else that of a run which it builds on, else today by the first worker's
    clock; a run records it.

    Raises:
        ConfigError: the config.yaml of such a run is damaged.
    """
    today = workers.once(lambda: datetime.date.today().isoformat())
    if config.encoding.day is not None or not template_depends_on_day(base, config.encoding.template):
        return config
    built_on = [run for named in earlier_runs(config).values() for run in named]
    known = [load_recipe(run / CONFIG, _CONFIGS[stage]).encoding.day for run, stage in _stages([config.run, *built_on])]
    day = next((day for day in known if day is not None), today)
    return config.model_copy(update={"encoding": config.encoding.model_copy(update={"day": day})})


def _stages(runs: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The runs that have begun, and their stages."""
    for run in runs:
        if (run / MANIFEST).is_file() and (run / CONFIG).is_file():
            stage = read_manifest(run).get("stage")
            if stage in _CONFIGS:
                yield run, stage


def new_adapter(
    model: Model, name: str, role: Any, config: StageConfig, *, start: str | None = None, beneath: str | None = None
) -> Adapter:
    """The adapter that a stage trains: a copy of `start` when the shapes agree, else new (over `beneath`).

    A score head goes on from that of `start`, where both have one.

    Raises:
        AdapterError: a target that matches nothing.
        ConfigError: LoRA on a fully tuned start, which an adapter's files couldn't hold.
    """
    if config.tuning == "lora" and start is not None and model.adapters[start].weights:
        raise ConfigError(
            "lora can't start from an SFT run with tuning: full",
            where="tuning",
            allowed="full",
            hint="perlhf export --format merged writes that run as a checkpoint that base can name",
        )
    shape: AdapterConfig = config.adapter
    if config.tuning == "lora" and role != "value" and (unadapted := left_out(model.base, shape)):
        note(unadapted)
    dropout = shape.dropout if role in ("sft", "reward") else 0.0
    if start is not None and same_shape(model.adapters[start], shape, config.tuning, model):
        adapter = model.copy_adapter(start, name, role)
        adapter.dropout = dropout
        for pair in adapter.pairs.values():
            pair.dropout = dropout
    else:
        adapter = model.add_adapter(
            name,
            role,
            tuning=config.tuning,
            rank=shape.rank,
            alpha=shape.alpha,
            targets=shape.targets,
            layers=shape.layers,
            dropout=dropout,
            seed=order.keyed_seed(config.seed, "adapter", name) % 2**31,
            beneath=beneath if beneath is not None else start,
        )
    if start is not None and (earlier := model.adapters[start]).score_head is not None and earlier.bias is not None:
        if adapter.score_head is not None and adapter.bias is not None:
            adapter.score_head.data.copy_(earlier.score_head.data)
            adapter.bias.data.copy_(earlier.bias.data)
    return adapter


def left_out(network: PreTrainedModel, shape: AdapterConfig) -> str | None:
    """One line about the experts that an adapter's targets name and that can't be adapted; None without any."""
    paths = fused_experts(network.named_modules(), shape.targets)
    if not paths:
        return None
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return f"experts that are fused into one tensor are not adapted: {', '.join(names)} ({len(paths)} tensors)"


def same_shape(adapter: Adapter, shape: AdapterConfig, tuning: str, model: Model) -> bool:
    """Whether a new adapter of this shape could be a copy of `adapter`."""
    if tuning == "full" or adapter.weights:
        return tuning == "full" and bool(adapter.weights)
    shapes = {(len(pair.a), pair.scale) for pair in adapter.pairs.values()}
    if (adapter.rank, adapter.alpha) != (shape.rank, shape.alpha) or shapes != {(shape.rank, shape.alpha / shape.rank)}:
        return False
    return set(adapter.pairs) == set(model.targets(shape.targets, shape.layers))


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
    elif _template_beside(path) is None:
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


def _tokenizer(base: Base, beside: Path | None) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(base)
    if beside is not None:
        _take_template(tokenizer, beside)
    return tokenizer


def _take_template(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Chat template and end token that came with an adapter of another tool; ours are in the adapter's encoding."""
    if (directory / saved.DETAILS).is_file():
        return
    template = _template_beside(directory)
    if template is not None:
        tokenizer.chat_template = template
    end = _settings_beside(directory).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if isinstance(end, str) and end in tokenizer.get_vocab():
        tokenizer.eos_token = end


def _template_beside(directory: Path) -> Any:
    """The chat template in an adapter's directory, as transformers would read it (text, or by name); None for none."""
    file = directory / _TEMPLATE
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterError(f"can't be read: {error}", where=str(file), allowed="UTF-8") from error
    template = _settings_beside(directory).get("chat_template")
    if isinstance(template, list):
        try:
            template = {str(entry["name"]): entry["template"] for entry in template}
        except (KeyError, TypeError):
            template = 0
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in texts):
        allowed = "a template's text, or a list of {name, template}"
        raise AdapterError("chat_template is no template", where=str(directory / _TOKENIZER), allowed=allowed)
    return template


def _settings_beside(directory: Path) -> dict[str, Any]:
    """What tokenizer_config.json in an adapter's directory says; {} without one that can be read."""
    try:
        value = json.loads((directory / _TOKENIZER).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
