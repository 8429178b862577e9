"""A policy's stage on the tiny base, and completions for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import END, open_encoder, open_model, random_ids, randomise
from torch import Tensor

from perlhf.config.stages import AdapterConfig, OptimConfig, PolicyConfig, ValueConfig
from perlhf.data.records import Prompt
from perlhf.model.open import new_adapter
from perlhf.rollout.completions import Centre, Setup
from perlhf.rollout.functions import Asked, Scorer
from perlhf.rollout.local import Rollout
from perlhf.rollout.scorers import Scorers
from perlhf.training import optim

POLICY, VALUE, SFT = "policy", "value", "sft"
# With beta1 = 0 AdamW's first moment is the gradient itself, as long as nothing is clipped.
PLAIN = OptimConfig(beta1=0.0, max_grad_norm=1e9)
ROWS = random_ids([5, 5, 3, 3], seed=1)
COMPLETIONS = [[*ids, END] for ids in random_ids([2, 4, 1], seed=2)] + random_ids([6], seed=3)
ENDED = [True, True, True, False]


def number(asked: Asked) -> list[float]:
    """The prompt's own number is every completion's score."""
    return [float(str(prompt)) for prompt in asked.prompts]


def constant(value: float) -> Scorer:
    return lambda asked: [value] * len(asked.completions)


def new_stage(
    directory: Path, scorer: Scorer = number, prompts: Sequence[str] = ("1", "2", "3", "6"), **options: Any
) -> Setup:
    """A stage on the tiny base with an SFT adapter as its reference, as `_open` leaves it."""
    options = {
        "reward": ("given:directly",),
        "optim": PLAIN,
        "adapter": AdapterConfig(rank=4, alpha=8.0),
        "value": ValueConfig(warmup_updates=0),
    } | options
    sizes: dict[str, Any] = {"prompts_per_update": 2, "completions_per_prompt": 2, "max_completion_tokens": 6}
    config = PolicyConfig(**(sizes | options))
    model = open_model(directory)
    model.add_adapter(SFT, "sft", rank=4, alpha=8.0, dropout=0.3)
    randomise(model, SFT, 1)
    model.freeze(SFT)
    new_adapter(model, POLICY, "policy", config, start=SFT)
    if config.baseline == "value":
        new_adapter(model, VALUE, "value", config, start=SFT)
    records = [Prompt(text, text) for text in prompts]
    return Setup(config, model, open_encoder(directory), Scorers((), (scorer,), "mean"), records, records, SFT)


def optimizers(stage: Setup) -> dict[str, torch.optim.AdamW]:
    rates = {POLICY: stage.config.learning_rate, VALUE: stage.config.value_learning_rate}
    adapters = stage.model.adapters
    return optim.build(
        {n: (adapters[n].trainable_by_name(), rates[n]) for n in rates if n in adapters}, stage.config.optim
    )


def gradients(optimizer: torch.optim.AdamW) -> list[Tensor]:
    return [optimizer.state[p]["exp_avg"] for group in optimizer.param_groups for p in group["params"]]


def rollout(ended: list[bool] = ENDED) -> Rollout:
    return Rollout(ROWS, COMPLETIONS, [[0.0] * len(c) for c in COMPLETIONS], ended, torch.zeros(2, 64), ())


UNCENTRED = Centre(mean=0.0, std=1.0, penalty=0.0)
