"""Seconds and peak memory of `perlhf report` and `perlhf table` for many runs.

    python benchmarks/report.py --runs 200 2000

The runs are made first, three kinds in turn (SFT, reward, policy), with 100 updates, an evaluation and samples each, as
many numbers as the stages write. Each command runs in a process of its own.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import yaml

from large_files import measure
from perlhf.config.stages import PolicyConfig, RewardConfig, SftConfig

UPDATES, VALIDATE_EVERY, SAMPLES, ROLLOUTS = 100, 10, 100, 16
LOGGED = {
    "sft": ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"),
    "reward": ("loss", "accuracy", "grad_norm", "learning_rate", "tokens", "tokens_per_second"),
    "policy": (
        "score_mean reward_mean kl entropy completion_tokens end_rate sampler_gap_mean sampler_gap_max policy_loss "
        "value_loss grad_norm value_grad_norm learning_rate value_learning_rate tokens_per_second seconds_sample "
        "seconds_score seconds_learn"
    ).split(),
}
"""Keys of metrics.jsonl that every update has."""
VALIDATED = {
    "sft": ("loss",),
    "reward": ("loss", "accuracy", "pairwise_accuracy", "auc"),
    "policy": ("score", "kl", "reward", "completion_tokens", "end_rate"),
}
CONFIGS = {"sft": SftConfig, "reward": RewardConfig, "policy": PolicyConfig}
TEXT = "a flat white with oat milk and a croissant to take away, please. " * 3


def make(directory: Path, runs: int) -> list[Path]:
    """Writes the run directories."""
    draw = random.Random(0)
    return [_run(directory / f"run-{number}", tuple(LOGGED)[number % 3], number, draw) for number in range(runs)]


def _run(path: Path, stage: str, seed: int, draw: random.Random) -> Path:
    path.mkdir(parents=True)
    given: dict[str, Any] = {"reward": ("runs/reward",)} if stage == "policy" else {}
    config = CONFIGS[stage](run=path, seed=seed, **given).model_dump(mode="json")
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    _write(path / "manifest.json", {"format": 2, "stage": stage, "seed": seed, "versions": {"perlhf": "0.1.0"}})
    lines = []
    for step in range(1, UPDATES + 1):
        row = {"step": step} | {key: draw.random() for key in LOGGED[stage]}
        if step % VALIDATE_EVERY == 0:
            row |= {f"validation_{key}": draw.random() for key in VALIDATED[stage]}
        lines.append(json.dumps(row) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines))
    result = {"stage": stage, "updates": UPDATES, "best_step": 50, "seconds": 100 * draw.random(), "tuning": "lora"}
    _write(path / "result.json", result | {"peak_memory_bytes": 2**30, "trainable_parameters": 921_600})
    _write(path / "evaluation.json", _evaluation(stage, draw))
    if stage == "policy":
        (path / "rollouts").mkdir()
        for step in range(10, UPDATES + 1, 10):
            rows = [{"step": step, "prompt": TEXT, "completion": TEXT, "score": draw.random()} for _ in range(ROLLOUTS)]
            (path / "rollouts" / f"{step:08d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _evaluation(stage: str, draw: random.Random) -> dict[str, Any]:
    def about() -> dict[str, float]:
        value = draw.random()
        return {"value": value, "low": value - 0.03, "high": value + 0.03}

    sample: dict[str, Any] = {"prompt": TEXT, "before": TEXT, "after": TEXT}
    if stage == "reward":
        measured: dict[str, Any] = {"metrics": {key: about() for key in ("auc", "accuracy", "balanced_accuracy")}}
        bins = [{"mean_predicted": (i + 0.5) / 10, "observed": draw.random(), "n": 50} for i in range(10)]
        measured |= {"calibration": bins, "baselines": {"bag_of_words": {"auc": draw.random()}}}
        sample = {"prompt": TEXT, "completion": TEXT, "label": True}
    else:
        keys = ("loss", "perplexity") if stage == "sft" else ("score", "gold", "kl", "tokens", "end_rate")
        measured = {side: {key: about() for key in keys} for side in ("before", "after")}
    scores = ("score", "score_before", "score_after", "gold_before", "gold_after")
    samples = [sample | {key: draw.random() for key in scores} for _ in range(SAMPLES)]
    return {"kind": stage, "split": "test", "n": 240, "groups": 60, "samples": samples} | measured


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[200], help="how many; several give a row each")
    settings = parser.parse_args()
    print("| command | runs | seconds | of a processor | peak memory |\n|---|---|---|---|---|")
    for count in settings.runs:
        with tempfile.TemporaryDirectory() as directory:
            runs = [str(run) for run in make(Path(directory) / "runs", count)]
            for name, suffix in (("report", "html"), ("table", "json")):
                took = measure(name, [name, *runs, "--output", f"{directory}/{name}.{suffix}"])
                cells = f"{took['seconds']:.1f} | {took['processor']:.1f} | {took['memory']:,.0f} MiB"
                print(f"| `{name}` | {count:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
