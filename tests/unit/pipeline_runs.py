"""Run directories as the sft, reward and policy stages leave them, with made-up but plausible numbers."""

import json
import math
import random
from pathlib import Path
from typing import Any

from perlhf.config.stages import DataConfig, EncodingConfig, PolicyConfig, RewardConfig, SftConfig, StageConfig
from perlhf.system.files import strict_json

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
"""A completion that would take the page over if it were ever read as HTML."""

SYSTEM = "You take orders in a coffee bar. Confirm the whole order, then ask one question if something is missing."
DRINKS = ("flat white", "cappuccino", "oat latte", "iced americano", "mocha", "cortado", "chai latte")
SIZES = ("small", "medium", "large")


def pipeline(directory: Path, *, updates: int = 60, prompts: int = 240) -> list[Path]:
    """Writes three finished and evaluated runs below `directory`; returns them in the order of the pipeline."""
    draw = random.Random(7)
    return [
        _sft(directory / "sft", draw),
        _reward(directory / "reward", draw),
        _policy(directory / "policy", draw, updates, prompts),
    ]


def write_run(
    path: Path,
    stage: str,
    *,
    config: StageConfig | None = None,
    manifest: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    result: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> Path:
    """Writes those files of a run directory that are given, and a manifest that names the stage."""
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"format": 2, "stage": stage} | (manifest or {})))
    if config is not None:
        # JSON is YAML.
        (path / "config.yaml").write_text(_yaml(config.model_dump(mode="json")), encoding="utf-8")
    if metrics is not None:
        (path / "metrics.jsonl").write_text("".join(strict_json(row) + "\n" for row in metrics))
    for name, value in (("result", result), ("evaluation", evaluation)):
        if value is not None:
            (path / f"{name}.json").write_text(strict_json(value), encoding="utf-8")
    return path


def about(value: float, half: float) -> dict[str, float]:
    """A value with a symmetric interval."""
    return {"value": round(value, 4), "low": round(value - half, 4), "high": round(value + half, 4)}


def _sft(path: Path, draw: random.Random) -> Path:
    metrics = []
    for step in range(1, 121):
        loss = 0.9 + 1.7 * math.exp(-step / 25) + draw.gauss(0, 0.07)
        row = {"step": step, "loss": loss, "grad_norm": 1.5 + draw.random(), "tokens_per_second": draw.gauss(1450, 60)}
        row["learning_rate"] = 2e-4 * min(1, step / 10)
        if step % 20 == 0:
            row["validation_loss"] = 0.98 + 1.6 * math.exp(-step / 27) + 0.0006 * max(0, step - 80)
        metrics.append(row)
    result = {
        "stage": "sft",
        "updates": 120,
        "best_step": 120,
        "validation_loss": 1.0208,
        "validation_examples": 120,
        "train_examples": 1920,
        "tokens": 412_330,
        "trainable_parameters": 921_600,
        "tuning": "lora",
        "seconds": 131.4,
        "peak_memory_bytes": 1_180_000_000,
    }
    config = SftConfig(run=path, encoding=EncodingConfig(system=SYSTEM))
    return write_run(path, "sft", config=config, manifest=_manifest(0), metrics=metrics, result=result)


def _reward(path: Path, draw: random.Random) -> Path:
    metrics = []
    for step in range(1, 181):
        learned = 1 - math.exp(-step / 50)
        row = {"step": step, "loss": 0.69 - 0.3 * learned + draw.gauss(0, 0.05)}
        row["accuracy"] = min(1.0, 0.55 + 0.27 * learned + draw.gauss(0, 0.06))
        row |= {"grad_norm": 2 + draw.random(), "learning_rate": 2e-4, "tokens_per_second": draw.gauss(1830, 70)}
        if step % 20 == 0:
            row |= {"validation_loss": 0.68 - 0.27 * learned, "validation_accuracy": 0.58 + 0.22 * learned}
            row |= {"validation_auc": 0.6 + 0.27 * learned, "validation_balanced_accuracy": 0.57 + 0.22 * learned}
        metrics.append(row)
    validation = {"auc": 0.861, "accuracy": 0.792, "balanced_accuracy": 0.781, "loss": 0.438}
    result = {
        "stage": "reward",
        "updates": 180,
        "best_step": 160,
        "validation": validation,
        "validation_examples": 288,
        "train_examples": 2880,
        "class_balance": {"up": 1612, "down": 1268, "comparisons": 0},
        "tokens": 655_010,
        "trainable_parameters": 922_176,
        "tuning": "lora",
        "seconds": 204.8,
        "peak_memory_bytes": 1_305_000_000,
    }
    samples = []
    for _ in range(90):
        label = draw.random() < 0.55
        text = _answer(draw, 0.8 if label else 0.25)
        score = draw.gauss(1.1 if label else -1.0, 1.1)
        samples.append({"prompt": _prompt(draw), "completion": text, "label": label, "score": score})
    bins = []
    for index in range(10):
        predicted = (index + 0.5) / 10
        observed = min(1.0, max(0.0, predicted + 0.12 * (predicted - 0.5) + draw.gauss(0, 0.03)))
        low, high, n = index / 10, (index + 1) / 10, 30 + 12 * abs(index - 4)
        bins.append({"low": low, "high": high, "mean_predicted": predicted, "observed": observed, "n": n})
    evaluation = {
        "kind": "reward",
        "split": "test",
        "n": 576,
        "groups": 144,
        "metrics": {
            "auc": about(0.847, 0.032),
            "accuracy": about(0.779, 0.034),
            "balanced_accuracy": about(0.771, 0.036),
            "pairwise_accuracy": None,
        },
        "calibration": bins,
        "baselines": {
            "bag_of_words": {"auc": 0.774, "accuracy": 0.707, "balanced_accuracy": 0.698},
            "position": {"auc": 0.561},
            "length": {"auc": 0.604},
            "majority": {"auc": 0.5, "accuracy": 0.551, "balanced_accuracy": 0.5},
        },
        "samples": samples,
    }
    config = RewardConfig(run=path, sft=path.parent / "sft", encoding=EncodingConfig(system=SYSTEM))
    return write_run(
        path, "reward", config=config, manifest=_manifest(1), metrics=metrics, result=result, evaluation=evaluation
    )


def _policy(path: Path, draw: random.Random, updates: int, prompts: int) -> Path:
    metrics, rollouts = [], {}
    for step in range(1, updates + 1):
        learned = 1 - math.exp(-step / 22)
        row = {"step": step, "score_mean": -0.35 + 1.5 * learned + draw.gauss(0, 0.16), "kl": 3.4 * learned**1.5}
        row |= {"reward_mean": -0.1 + 1.2 * learned + draw.gauss(0, 0.16), "entropy": 1.32 - 0.5 * learned}
        row |= {"completion_tokens": 31 - 6 * learned + draw.gauss(0, 1), "end_rate": min(1.0, 0.86 + 0.13 * learned)}
        row |= {"sampler_gap_mean": 0.002 + 0.0004 * draw.random(), "sampler_gap_max": 0.03 + 0.02 * draw.random()}
        row |= {"policy_loss": draw.gauss(0, 0.3), "value_loss": 0.2 + 1.1 * math.exp(-step / 8), "learning_rate": 1e-4}
        row |= {"grad_norm": 0.8 + 0.3 * draw.random(), "tokens_per_second": draw.gauss(182, 9)}
        row |= {"seconds_sample": draw.gauss(2.6, 0.2), "seconds_score": draw.gauss(0.9, 0.1), "seconds_learn": 1.8}
        if step % 10 == 0:
            row |= {"validation_score": -0.3 + 1.4 * learned, "validation_kl": 3.2 * learned**1.5}
        metrics.append(row)
        rollouts[step] = [_rollout(draw, step, index, learned) for index in range(32)]
    result = {
        "stage": "policy",
        "updates": updates,
        "stopped": None,
        "best_step": updates,
        "score_before": -0.31,
        "score_after": 1.02,
        "kl": 2.9,
        "tokens": 53_120,
        "trainable_parameters": 1_843_776,
        "tuning": "lora",
        "seconds": 338.2,
        "peak_memory_bytes": 1_620_000_000,
    }
    samples = [_pair(draw) for _ in range(prompts)]
    evaluation = {
        "kind": "policy",
        "split": "test",
        "n": prompts,
        "groups": prompts // 2,
        "before": {
            "score": about(-0.327, 0.094),
            "gold": about(0.431, 0.029),
            "kl": about(0, 0),
            "tokens": about(30.9, 1.2),
            "end_rate": about(0.858, 0.04),
            "distinct_1": 0.211,
            "distinct_2": 0.523,
        },
        "after": {
            "score": about(1.034, 0.081),
            "gold": about(0.664, 0.027),
            "kl": about(3.12, 0.21),
            "tokens": about(25.3, 0.9),
            "end_rate": about(0.992, 0.008),
            "distinct_1": 0.164,
            "distinct_2": 0.398,
        },
        "win_rate": about(0.742, 0.041) | {"by": "reward"},
        "samples": samples,
    }
    config = PolicyConfig(
        run=path,
        sft=path.parent / "sft",
        reward=(str(path.parent / "reward"),),
        updates=updates,
        data=DataConfig(limit=2000),
        encoding=EncodingConfig(system=SYSTEM),
    )
    write_run(
        path, "policy", config=config, manifest=_manifest(2), metrics=metrics, result=result, evaluation=evaluation
    )
    (path / "rollouts").mkdir()
    for step, rows in rollouts.items():
        (path / "rollouts" / f"{step:08d}.jsonl").write_text("".join(strict_json(row) + "\n" for row in rows))
    return path


def _prompt(draw: random.Random) -> list[dict[str, str]]:
    drink, size = draw.choice(DRINKS), draw.choice(SIZES)
    opening = draw.choice(("Hi, can I get a", "Good morning, one", "I'd like a", "Could you make me a"))
    turns = [{"role": "system", "content": SYSTEM}]
    if draw.random() < 0.4:
        turns += [
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Welcome, what can I get you?"},
        ]
    extra = draw.choice(("", " to go", " with an extra shot", ", and a croissant", ", not too hot please"))
    return [*turns, {"role": "user", "content": f"{opening} {size} {drink}{extra}?"}]


def _answer(draw: random.Random, quality: float) -> str:
    if draw.random() < quality:
        size, drink = draw.choice(SIZES), draw.choice(DRINKS)
        question = draw.choice(("For here or to go?", "Which milk would you like?", "What name is the order under?"))
        return f"One {size} {drink}, coming up. {question}"
    return draw.choice(
        (
            "I am a language model and can help you with many things, such as coffee, tea, and other drinks",
            "Sure! Sure! Here is the coffee.",
            "The weather is nice today. Coffee is a brewed drink prepared from roasted beans, the seeds of",
            "We have flat white, cappuccino, latte, mocha.\nWhat is it that you want to have, and why?",
        )
    )


def _pair(draw: random.Random) -> dict[str, Any]:
    gold_before, gold_after = draw.choice((0.2, 0.4, 0.4, 0.6, 0.8)), draw.choice((0.4, 0.6, 0.6, 0.8, 0.8, 1.0))
    return {
        "prompt": _prompt(draw),
        "before": _answer(draw, gold_before),
        "after": _answer(draw, gold_after),
        "score_before": draw.gauss(2.2 * gold_before - 1.2, 0.6),
        "score_after": draw.gauss(2.2 * gold_after - 0.4, 0.6),
        "gold_before": gold_before,
        "gold_after": gold_after,
    }


def _rollout(draw: random.Random, step: int, index: int, learned: float) -> dict[str, Any]:
    score = -0.35 + 1.5 * learned + draw.gauss(0, 0.7)
    prompts = random.Random(step * 100 + index // 4)
    return {
        "step": step,
        "prompt_index": index // 4,
        "sample_index": index % 4,
        "prompt": _prompt(prompts),
        "completion": _answer(draw, 0.4 + 0.4 * learned),
        "score": score,
        "reward": score - 0.1,
        "kl": max(0.0, draw.gauss(3.4 * learned, 0.8)),
        "tokens": draw.randint(12, 64),
        "ended": draw.random() < 0.9,
    }


def _manifest(number: int) -> dict[str, Any]:
    started = f"2026-01-0{number + 1}T09:00:00+00:00"
    return {
        "id": f"4be1f0c2a77{number}",
        "seed": 0,
        "facts": {"data": {"builtin:coffee-bar": "8a1d" * 16}, "base": {"name": "smollm2", "sha256": "bcc8" * 16}},
        "versions": {"perlhf": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.1.0"},
        "commit": "3f9c2d1",
        "uncommitted_changes": False,
        "threads": 2,
        "hardware": {
            "platform": "Linux-6.1-x86_64",
            "cpu": "Intel Xeon",
            "cores": 2,
            "memory_bytes": 16 * 2**30,
            "gpu": None,
        },
        "wall_seconds": 140.0 + 70 * number,
        "peak_memory_bytes": 1_180_000_000,
        "cuda_peak_memory_bytes": 0,
        "sessions": [{"started": started, "pid": 4120 + number, "ended": started.replace("09:00", "09:05")}],
    }


def _yaml(value: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
