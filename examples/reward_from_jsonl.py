"""From a file of ratings to a reward adapter to scores, all in Python.

    python examples/reward_from_jsonl.py
    python examples/reward_from_jsonl.py --base path/to/my-model --updates 40

The ratings are made up here, so that the script needs no file: an answer that repeats the order is up, one that
doesn't is down. Replace `write_ratings` by your own file with the columns prompt, completion and label.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import perlhf

DRINKS = ("tea", "latte", "cocoa", "juice", "cider", "espresso", "lemonade", "mocha")
SIZES = ("small", "medium", "large")


def write_ratings(path: Path) -> None:
    """Two ratings for each order; both belong to the group of their prompt, so a split never parts them."""
    rows = []
    for drink in DRINKS:
        for size in SIZES:
            prompt = f"A {size} {drink}, please."
            rows.append({"prompt": prompt, "completion": f"One {size} {drink}, coming up!", "label": True})
            rows.append({"prompt": prompt, "completion": "We are closed.", "label": False})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Trains, scores two new answers, and returns their scores."""
    parser = argparse.ArgumentParser(description="Train a reward adapter on a small JSONL file and score with it.")
    parser.add_argument("--base", default=perlhf.RewardConfig().base, help="packaged name, hub id or local directory")
    parser.add_argument("--directory", type=Path, default=Path("runs/example-reward"), help="where everything goes")
    parser.add_argument("--updates", type=int, default=20, help="optimiser steps")
    options = parser.parse_args(arguments)

    options.directory.mkdir(parents=True, exist_ok=True)
    ratings, answers = options.directory / "ratings.jsonl", options.directory / "answers.jsonl"
    write_ratings(ratings)
    perlhf.pull(options.base)  # does nothing when the base is there

    run = options.directory / "run"
    result = perlhf.reward(
        perlhf.RewardConfig(
            run=run,
            base=options.base,
            data={"paths": (str(ratings),), "validation": 0.25, "test": 0.1},
            encoding={"max_tokens": 128},
            adapter={"rank": 8, "targets": "all"},
            optim={"learning_rate": 1e-3},
            epochs=options.updates,
            max_updates=options.updates,
        )
    )
    print(f"validation AUC {result['validation']['auc']:.2f} after {result['updates']} updates")

    rows = [
        {"prompt": "A large chai, please.", "completion": "One large chai, coming up!"},
        {"prompt": "A large chai, please.", "completion": "We are closed."},
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scored = perlhf.score(
        perlhf.ScoreConfig(run=run, data={"paths": (str(answers),)}, output=options.directory / "scores.jsonl")
    )
    for row in scored:
        print(f"{row['score']:+.2f}  {row['completion']}")
    return [row["score"] for row in scored]


if __name__ == "__main__":
    main()
