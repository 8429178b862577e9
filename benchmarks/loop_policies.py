"""What policies make of reward models that few or many labels taught: gold scores on held-out prompts of the set.

`benchmarks/loop.py` trained the reward models. Each policy named, such as `all:320 all:80 disagreement:80`, learns from
those of each seed, from one SFT start, and answers held-out prompts once; so does the start. Goes on where it stopped.
Run: perlhf sft recipes/coffee-bar/sft.yaml
     python benchmarks/loop_policies.py --output runs/loop-evidence --policies all:320 all:80 disagreement:80
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import numpy as np

from perlhf.config.loop import LoopConfig, LoopEncodingConfig, LoopPolicyConfig
from perlhf.config.stages import AdapterConfig, DataConfig, OptimConfig
from perlhf.data.coffee_bar.gold import gold
from perlhf.data.order import choose, keyed_seed
from perlhf.data.records import Prompt
from perlhf.evaluation.shared import plain
from perlhf.labelling.questions import prompts_of
from perlhf.labelling.rounds import network
from perlhf.method.metrics import cluster_bootstrap
from perlhf.runs.manifest import CHECKPOINTS, RESULT
from perlhf.system.files import remove_directory, write_json
from perlhf.training.policy import train_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="of benchmarks/loop.py")
    parser.add_argument("--policies", nargs="+", required=True, help="ARM:LABELS")
    parser.add_argument("--sft", type=Path, default=Path("runs/coffee-bar-sft"), help="what policies start from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts")
    arguments = parser.parse_args()
    found = {name: [measured(name, seed, arguments) for seed in arguments.seeds] for name in arguments.policies}
    write_json(arguments.output / "policies.json", found)
    for name, rows in found.items():
        policy, start = ([fmean(row[side]) for row in rows] for side in ("policy", "start"))
        each = ", ".join(f"{value:.3f}" for value in policy)
        low, high = interval(rows)
        gain = fmean(policy) - fmean(start)
        print(
            f"{name:<18} gold {fmean(policy):.3f} ({each}), {gain:+.3f} against the start ({low:+.3f} to {high:+.3f})"
        )


def measured(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Gold scores of both sides' answers to the same held-out prompts."""
    arm, _, labels = name.partition(":")
    place = arguments.output / "policies" / f"{arm}-{labels}-seed{seed}"
    if (place / "gold.json").exists():
        return json.loads((place / "gold.json").read_text())
    config = LoopConfig(
        seed=seed,
        sft=arguments.sft,
        data=DataConfig(validation=0.1, test=0.4),
        encoding=LoopEncodingConfig(system="You take orders in a coffee bar.", max_tokens=512),
        policy=LoopPolicyConfig(
            updates=arguments.updates,
            adapter=AdapterConfig(rank=8, targets="all"),
            optim=OptimConfig(learning_rate=3e-4),
            max_completion_tokens=48,
            bounded=True,
        ),
    )
    reward = arguments.output / f"{arm}-seed{seed}" / f"labels-{int(labels):04d}" / "reward"
    run = place / "policy"
    if not (run / RESULT).exists():
        train_policy(config.policy_stage(run, reward, None, keyed_seed(seed, "policy") % 2**31))
    remove_directory(run / CHECKPOINTS)
    prompts: list[Prompt] = choose(prompts_of(config.data, "test"), arguments.prompts, 0)
    said = network.sample_answers(config, prompts, {"policy": (run, 1), "start": (None, 1)}, "evidence")
    scores: dict[str, list[float]] = {
        side: [gold(plain(prompt.prompt), answer) for prompt, (answer,) in zip(prompts, answers, strict=True)]
        for side, answers in said.items()
    }
    write_json(place / "gold.json", scores)
    return scores


def interval(rows: list[dict[str, list[float]]]) -> tuple[float, float]:
    """Of the mean gain over seeds, by prompts: those of all seeds are the same ones."""
    gains = np.array([np.subtract(row["policy"], row["start"]) for row in rows]).mean(axis=0)
    return cluster_bootstrap(lambda at: float(gains[at].mean()), [str(i) for i in range(len(gains))], 2000, 0)


if __name__ == "__main__":
    main()
