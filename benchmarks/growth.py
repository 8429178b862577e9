"""How speed grows: tokens a second against sequence length, batch size, rank, completions a prompt and reward adapters.

Random tokens on the packaged base, one process, medians after a warm-up. Training is the forward and backward of a score
under a LoRA adapter on attention; learning is that of completions' log-probabilities; scoring has no backward.
Run: python benchmarks/growth.py --output benchmarks/growth.json --plot docs/images/growth.svg
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import harness

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16)
RANKS = (1, 2, 4, 8, 16, 32, 64)
COMPLETIONS = (1, 2, 4, 8, 16)
ADAPTERS = (1, 2, 4, 8)
TOKENS, LENGTH, PROMPT, COMPLETION, SAMPLED, PROMPTS = 1024, 256, 256, 64, 32, 4

Curve = dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="times of which the median is taken")
    parser.add_argument("--output", type=Path, help="JSON file that gets the numbers")
    parser.add_argument("--plot", type=Path, help="SVG or PNG that gets the curves")
    arguments = parser.parse_args()
    curves = measure(arguments.repeats)
    found = {"machine": harness.machine(None), "tokens_per_second": curves}
    print(json.dumps(found))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.plot:
        plot(curves, arguments.plot)


def measure(repeats: int) -> dict[str, dict[str, Curve]]:
    """Curves by panel and name."""
    from perlhf.model import Model
    from perlhf.packing import Packing
    from perlhf.sampler import sample, uniforms

    model = Model.load("smollm2-135m-instruct-q4_1", device="cpu")
    for rank in RANKS:
        model.add_adapter(f"rank{rank}", "reward", rank=rank)
    for number in range(max(ADAPTERS)):
        model.add_adapter(f"reward_{number}", "reward", rank=16)
        model.freeze(f"reward_{number}")

    def train(count: int, length: int, packing: Packing = "tree", rank: int = 16) -> Callable[[], int]:
        sequences = [tokens(length, seed) for seed in range(count)]
        at_once = max(1, TOKENS // length)

        def work() -> int:
            for start in range(0, count, at_once):
                model.scores(sequences[start : start + at_once], f"rank{rank}", packing=packing).sum().backward()
            clear(model)
            return count * length

        return work

    def learn(samples: int, packing: Packing) -> Callable[[], int]:
        prompts = [tokens(PROMPT, 0)] * samples
        completions = [tokens(COMPLETION, seed + 1) for seed in range(samples)]

        def work() -> int:
            model.logprobs(prompts, completions, "rank16", packing=packing).logprobs.sum().backward()
            clear(model)
            return samples * COMPLETION

        return work

    def draw(samples: int) -> Callable[[], int]:
        prompts = [tokens(PROMPT, seed) for seed in range(PROMPTS)]
        draws = uniforms(0, 1, range(PROMPTS), samples, SAMPLED)
        return lambda: (
            sample(
                model,
                prompts,
                adapter="rank16",
                draws=draws,
                end_id=-1,
                temperature=1.0,
                max_completion_tokens=SAMPLED,
            ).tokens
        )

    def score(adapters: int) -> Callable[[], int]:
        sequences = [tokens(LENGTH, seed) for seed in range(TOKENS // LENGTH)]

        def work() -> int:
            import torch

            with torch.no_grad():
                for number in range(adapters):
                    model.scores(sequences, f"reward_{number}")
            return adapters * TOKENS

        return work

    def curve(works: dict[int, Callable[[], int]]) -> Curve:
        return {x: rate(work, repeats) for x, work in works.items()}

    packings: tuple[Literal["tree", "none"], ...] = ("tree", "none")
    return {
        "training: tokens in a sequence": {
            f"packing {p}": curve({n: train(max(1, TOKENS // n), n, p) for n in LENGTHS}) for p in packings
        },
        f"training: sequences of {LENGTH} in an update": {"": curve({n: train(n, LENGTH) for n in BATCHES})},
        "training: rank": {"": curve({n: train(TOKENS // LENGTH, LENGTH, rank=n) for n in RANKS})},
        f"learning: completions of a prompt ({PROMPT} + {COMPLETION} tokens)": {
            f"packing {p}": curve({n: learn(n, p) for n in COMPLETIONS}) for p in packings
        },
        f"sampling: completions of each of {PROMPTS} prompts": {"": curve({n: draw(n) for n in COMPLETIONS})},
        "scoring: reward adapters on one base": {"": curve({n: score(n) for n in ADAPTERS})},
    }


def rate(work: Callable[[], int], repeats: int) -> float:
    """Tokens a second, median after one run that warms up."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        done = work()
        found.append(done / (time.perf_counter() - began))
    return statistics.median(found)


def tokens(count: int, seed: int) -> list[int]:
    """Random ids; sequences of different seeds share no prefix."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, 49_000, count).tolist()


def clear(model: Any) -> None:
    """Drops all gradients."""
    for adapter in model.adapters.values():
        for parameter in adapter.trainable():
            parameter.grad = None


def plot(curves: dict[str, dict[str, Curve]], file: Path) -> None:
    """One panel a quantity, tokens a second from 0 upwards."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "growth"
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, curves.items(), strict=True):
        for name, values in lines.items():
            axis.plot(list(values), list(values.values()), marker="o", label=name or None)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(next(iter(lines.values()))), labels=[str(x) for x in next(iter(lines.values()))])
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("tokens/s")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
