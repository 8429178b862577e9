"""A finished run put back to use: its configuration, its base, and its adapter under the name of its stage."""

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from perlhf.config.recipe import load_recipe
from perlhf.config.stages import AdapterConfig, PolicyConfig, RewardConfig, SftConfig, StageConfig
from perlhf.data import order
from perlhf.errors import ConfigError, RunError
from perlhf.model import saved
from perlhf.model.adapter import Adapter
from perlhf.model.base import Base, end_ids, load_tokenizer, template_depends_on_day
from perlhf.model.encode import Encoder
from perlhf.model.model import Model
from perlhf.runs.earlier import earlier_runs
from perlhf.runs.manifest import CONFIG, MANIFEST, RESULT, read_manifest

StageName = Literal["sft", "reward", "policy"]
Stage = TypeVar("Stage", bound=StageConfig)
_CONFIGS = {"sft": SftConfig, "reward": RewardConfig, "policy": PolicyConfig}


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended."""

    path: Path
    stage: StageName
    config: SftConfig | RewardConfig | PolicyConfig

    @cached_property
    def base(self) -> Base:
        """What it was trained on, found once.

        Raises:
            ModelError: it isn't here any more.
        """
        return Base.find(self.config.base)

    def open(self, device: str) -> tuple[Model, Encoder]:
        """The base with the run's adapter, frozen and named after the stage, and the encoder it was trained with.

        Sets the number of CPU threads where the run's configuration does.

        Raises:
            ModelError: the base isn't there; AdapterError: the adapter is damaged or for another base.
        """
        # Another number of threads adds up in another order: scores would differ in the last bits.
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        model, encoder = open_model(self.config.model_copy(update={"device": device}), self.base)
        saved.load_adapter(model, self.path / "adapter", self.stage, encoder)
        model.freeze(self.stage)
        return model, encoder


def read_run(path: Path, stages: Sequence[StageName] = get_args(StageName)) -> FinishedRun:
    """Reads a run directory; loads no network.

    Args:
        stages: what is of use to the caller.

    Raises:
        RunError: no run directory, a run that isn't finished, or one of another stage or an earlier version.
        ConfigError: its config.yaml is damaged.
    """
    where = str(path)
    if not (path / MANIFEST).is_file():
        what = "not a run directory" if path.exists() else "there is no such directory"
        hint = "perlhf sft, reward or policy makes one"
        raise RunError(what, where=where, allowed=f"a directory with {CONFIG}, {MANIFEST} and {RESULT}", hint=hint)
    stage = read_manifest(path).get("stage")
    if stage not in _CONFIGS:
        raise RunError(f"unknown stage {stage!r}", where=str(path / MANIFEST), allowed=", ".join(_CONFIGS))
    if not (path / RESULT).is_file():
        hint = f"run perlhf {stage} with the same recipe and options again: it continues where it stopped"
        raise RunError("the run isn't finished", where=where, hint=hint)
    if stage not in stages:
        raise RunError(f"holds a run of stage {stage}", where=where, allowed=f"a run of stage {' or '.join(stages)}")
    return FinishedRun(path, stage, load_recipe(path / CONFIG, _CONFIGS[stage]))


def load_sft(model: Model, run: Path, encoder: Encoder) -> str:
    """The frozen adapter of an SFT run; its name.

    Raises:
        ConfigError: a run of another stage; AdapterError: as `saved.load_adapter`.
    """
    adapter = saved.load_adapter(model, run / "adapter", "sft", encoder)
    if adapter.score_head is not None:
        raise ConfigError(f"{run} holds a {adapter.role} adapter", where="sft", allowed="an SFT run")
    model.freeze(adapter.name)
    return adapter.name


def open_model(config: StageConfig, base: Base) -> tuple[Model, Encoder]:
    """The model and the encoder that a stage's configuration names, on its base."""
    encoder = Encoder(load_tokenizer(base), config.encoding, end_ids(base))
    return Model.load(base, config.dtype, config.device), encoder


def with_day(config: Stage, base: Base) -> Stage:
    """The configuration with the day that its chat template is rendered for, where that writes the date.

    It is the day of the run that is continued, else that of a run which it builds on, else today; a run records it.

    Raises:
        ConfigError: the config.yaml of such a run is damaged.
    """
    if config.encoding.day is not None or not template_depends_on_day(base, config.encoding.template):
        return config
    built_on = [run for named in earlier_runs(config).values() for run in named]
    known = [load_recipe(run / CONFIG, _CONFIGS[stage]).encoding.day for run, stage in _stages([config.run, *built_on])]
    day = next((day for day in known if day is not None), datetime.date.today().isoformat())
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
    dropout = shape.dropout if role in ("sft", "reward") else 0.0
    if start is not None and same_shape(model.adapters[start], shape, config.tuning, model):
        copy = model.copy_adapter(start, name, role)
        copy.dropout = dropout
        for pair in copy.pairs.values():
            pair.dropout = dropout
        return copy
    return model.add_adapter(
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


def same_shape(adapter: Adapter, shape: AdapterConfig, tuning: str, model: Model) -> bool:
    """Whether a new adapter of this shape could be a copy of `adapter`."""
    if tuning == "full" or adapter.weights:
        return tuning == "full" and bool(adapter.weights)
    if (adapter.rank, adapter.alpha) != (shape.rank, shape.alpha):
        return False
    return set(adapter.pairs) == set(model.targets(shape.targets, shape.layers))
