"""Small finished runs on the tiny base, made by the real stages from a local data file."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from perlhf.config.stages import (
    AdapterConfig,
    DataConfig,
    EncodingConfig,
    OptimConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
)
from perlhf.data.splits import load
from perlhf.model import saved
from perlhf.rollout.scorers import score_batches
from perlhf.training import reward as reward_stage
from perlhf.training.policy import train_policy
from perlhf.training.sft import train_sft

SYSTEM = 'You sell coffee.\nBe "brief" – ☕'
DRINKS = ("coffee", "tea", "water", "milk", "cocoa", "juice", "soda", "cider", "broth", "mate")
SIZES = ("small", "large", "iced")
KINDS = ("comparison", "rating")


@dataclass(frozen=True)
class TinyRuns:
    """Run directories, and what the reward model scored in memory at the end of its training."""

    data: DataConfig
    ratings: str
    comparisons: str
    sft: Path
    reward: Path
    policy: Path
    scores_in_memory: list[list[float]]
    reward_result: dict[str, Any]


@cache
def tiny_runs(directory: Path, base: Path) -> TinyRuns:
    """SFT, reward (comparisons and ratings) and policy, a few updates each; 30 groups. Made once a directory."""
    directory.mkdir()
    ratings, comparisons = directory / "ratings.jsonl", directory / "comparisons.jsonl"
    rated, compared = [], []
    for number, (drink, size) in enumerate((drink, size) for drink in DRINKS for size in SIZES):
        prompt = [{"role": "user", "content": f"a {size} {drink} please"}]
        # `sure` and `never` give the label away, so that a bag of words must get it right.
        good, bad = f"sure one {size} {drink}", f"never {drink}" + " again" * (number % 3)
        rated.append({"prompt": prompt, "completion": good, "label": True, "group": f"g{number}"})
        rated.append({"prompt": prompt, "completion": bad, "label": False, "group": f"g{number}"})
        if number % 3 == 0:
            rated.append({"prompt": prompt, "completion": f"sure {drink}", "label": True, "group": f"g{number}"})
        compared.append({"prompt": prompt, "chosen": good, "rejected": bad, "group": f"g{number}"})
    for path, rows in ((ratings, rated), (comparisons, compared)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(paths=(str(comparisons), str(ratings)), validation=0.25, test=0.3)
    shared: dict[str, Any] = {
        "base": str(base),
        "dtype": "float32",
        "threads": 1,
        "data": data,
        "encoding": EncodingConfig(system=SYSTEM, max_tokens=256),
        "adapter": AdapterConfig(rank=4, alpha=8),
        "optim": OptimConfig(learning_rate=1e-2),
    }
    sft, reward, policy = directory / "sft", directory / "reward", directory / "policy"
    train_sft(SftConfig(run=sft, max_updates=4, **shared))
    config = RewardConfig(run=reward, sft=sft, max_updates=4, **shared)
    result, scores = _train_reward_and_look(config)
    # The first update is the value head's alone.
    shared |= SHORT | {"updates": 3}
    train_policy(PolicyConfig(run=policy, sft=sft, reward=(str(reward),), **shared))
    return TinyRuns(data, str(ratings), str(comparisons), sft, reward, policy, scores, result)


SHORT: dict[str, Any] = {
    "prompts_per_update": 2,
    "completions_per_prompt": 2,
    "max_completion_tokens": 6,
    "value": {"warmup_updates": 1},
    "centre_prompts": 2,
    "validation_prompts": 2,
    "packing": "tree",
}


def _train_reward_and_look(config: RewardConfig) -> tuple[dict[str, Any], list[list[float]]]:
    """Trains, and scores all records with the model as it is in memory when its adapter is saved."""
    seen: list[list[float]] = []
    save = saved.save_adapter

    def save_and_look(model: Any, name: str, directory: Path, encoder: Any) -> None:
        items, _ = reward_stage.encode_items(encoder, load(config.data, KINDS, "all"))
        seen.extend(score_batches(model, reward_stage.laid_out(items, config, model), name))
        save(model, name, directory, encoder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "save_adapter", save_and_look)
        result = reward_stage.train_reward(config)
    return result, seen
