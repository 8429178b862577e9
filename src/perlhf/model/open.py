"""The base with the adapters that a stage trains on or starts from, and the encoder of its records."""

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perlhf.config.recipe import load_recipe
from perlhf.config.stages import (
    AdapterConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    StageConfig,
)
from perlhf.data import order
from perlhf.errors import AdapterError, ConfigError, RunError
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
from perlhf.parallel.shard import shards_of
from perlhf.parallel.workers import ALONE, Workers
from perlhf.runs.earlier import adapter_of, adapters_of, earlier_runs, several_adapters
from perlhf.runs.manifest import CONFIG, MANIFEST, read_manifest
from perlhf.system.console import note

Stage = TypeVar("Stage", bound=StageConfig)
STAGE_CONFIGS = {"sft": SftConfig, "reward": RewardConfig, "policy": PolicyConfig}
_TEMPLATE, _TOKENIZER = "chat_template.jinja", "tokenizer_config.json"


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
        beside, used = template_beside(directory), encoder.tokenizer.chat_template
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
    tokenizer = tokenizer_of(base, beside)
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
    known = [
        load_recipe(run / CONFIG, STAGE_CONFIGS[stage]).encoding.day for run, stage in _stages([config.run, *built_on])
    ]
    day = next((day for day in known if day is not None), today)
    return config.model_copy(update={"encoding": config.encoding.model_copy(update={"day": day})})


def _stages(runs: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The runs that have begun, and their stages."""
    for run in runs:
        if (run / MANIFEST).is_file() and (run / CONFIG).is_file():
            stage = read_manifest(run).get("stage")
            if stage in STAGE_CONFIGS:
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


def tokenizer_of(base: Base, beside: Path | None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the chat template and end token that came with an adapter of another tool."""
    tokenizer = load_tokenizer(base)
    if beside is not None:
        _take_template(tokenizer, beside)
    return tokenizer


def _take_template(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Chat template and end token that came with an adapter of another tool; ours are in the adapter's encoding."""
    if (directory / saved.DETAILS).is_file():
        return
    template = template_beside(directory)
    if template is not None:
        tokenizer.chat_template = template
    end = _settings_beside(directory).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if isinstance(end, str) and end in tokenizer.get_vocab():
        tokenizer.eos_token = end


def template_beside(directory: Path) -> Any:
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
