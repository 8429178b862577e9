"""A finished run put back to use: its configuration, its base, and its adapter under the name of its stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from perlhf import store, training
from perlhf.config import PolicyConfig, RewardConfig, SftConfig
from perlhf.encode import Encoder
from perlhf.errors import RunError
from perlhf.model import Model
from perlhf.recipe import load_recipe
from perlhf.run_directory import CONFIG, MANIFEST, RESULT, read_json

StageName = Literal["sft", "reward", "policy"]
_CONFIGS = {"sft": SftConfig, "reward": RewardConfig, "policy": PolicyConfig}


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    path: Path
    stage: StageName
    config: SftConfig | RewardConfig | PolicyConfig

    def open(self, device: str) -> tuple[Model, Encoder]:
        """The base with the run's adapter, frozen and named after the stage, and the encoder it was trained with.

        Sets the number of CPU threads where the run's configuration does.

        Raises:
            ModelError: the base isn't there; AdapterError, CheckpointError: the adapter is damaged or for another base.
        """
        # Another number of threads adds up in another order: scores would differ in the last bits.
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        model, encoder = training.open_model(self.config.model_copy(update={"device": device}))
        store.load_adapter(model, self.path / "adapter", self.stage, encoder)
        model.freeze(self.stage)
        return model, encoder


def read_finished(path: Path, stages: Sequence[StageName] = get_args(StageName)) -> Finished:
    """Reads a run directory; loads no network.

    Args:
        stages: what is of use to the caller.

    Raises:
        RunError: no run directory, a run that isn't finished, or one of another stage.
        ConfigError: its config.yaml is damaged.
    """
    where = str(path)
    if not (path / MANIFEST).is_file():
        found = "not a run directory" if path.exists() else "there is no such directory"
        hint = "perlhf sft, reward or policy makes one"
        raise RunError(found, where=where, allowed=f"a directory with {CONFIG}, {MANIFEST} and {RESULT}", hint=hint)
    stage = read_json(path / MANIFEST).get("stage")
    if stage not in _CONFIGS:
        raise RunError(f"unknown stage {stage!r}", where=str(path / MANIFEST), allowed=", ".join(_CONFIGS))
    if not (path / RESULT).is_file():
        hint = f"run perlhf {stage} with the same recipe and options again: it continues where it stopped"
        raise RunError("the run isn't finished", where=where, hint=hint)
    if stage not in stages:
        raise RunError(f"holds a run of stage {stage}", where=where, allowed=f"a run of stage {' or '.join(stages)}")
    return Finished(path, stage, load_recipe(path / CONFIG, _CONFIGS[stage]))
