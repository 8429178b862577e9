"""How speed grows: tokens a second against sequence length, batch size, rank, completions a prompt and reward adapters.

Random tokens on the packaged base, one process, medians after a warm-up. Training is the forward and backward of a
score under a LoRA adapter on attention; learning is that of completions' log-probabilities; scoring has no backward.
Run: python benchmarks/growth.py --output benchmarks/growth.json --plot docs/images/growth.svg
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
from perlhf.config.stages import DEFAULT_BASE
from perlhf.method.packing import Packing, Tokens, completed, pack
from perlhf.model.bases.found import Base
from perlhf.system import before_torch

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
    before_torch.restart(sys.orig_argv[1:])
    curves = measure(arguments.repeats)
    found = {"machine": harness.machine(None), "tokens_per_second": curves}
    print(json.dumps(found))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.plot:
        plot(curves, arguments.plot)


def measure(repeats: int) -> dict[str, dict[str, Curve]]:
    """Curves by panel and name."""
    from perlhf.model.model import Model

    model = Model.load(Base.find(DEFAULT_BASE), device="cpu")
    for rank in RANKS:
        model.add_adapter(f"rank{rank}", "reward", rank=rank)
    for number in range(max(ADAPTERS)):
        model.add_adapter(f"reward_{number}", "reward", rank=16)
        model.freeze(f"reward_{number}")

    def curve(work: Callable[..., int], values: Sequence[int], *arguments: Any) -> Curve:
        return {x: rate(partial(work, model, x, *arguments), repeats) for x in values}

    return {
        "training: tokens in a sequence": {f"packing {p}": curve(train_length, LENGTHS, p) for p in ("tree", "none")},
        f"training: sequences of {LENGTH} in an update": {"": curve(train, BATCHES)},
        "training: rank": {"": curve(train_rank, RANKS)},
        f"learning: completions of a prompt ({PROMPT} + {COMPLETION} tokens)": {
            f"packing {p}": curve(learn, COMPLETIONS, p) for p in ("tree", "none")
        },
        f"sampling: completions of each of {PROMPTS} prompts": {"": curve(draw, COMPLETIONS)},
        "scoring: reward adapters on one base": {"": curve(score, ADAPTERS)},
    }


def train(model: Any, count: int, length: int = LENGTH, packing: Packing = "tree", rank: int = 16) -> int:
    """Forward and backward of `count` sequences, in micro-batches; their tokens."""
    at_once = max(1, TOKENS // length)
    sequences = [tokens(length, seed) for seed in range(count)]
    for start in range(0, count, at_once):
        model.scores(
            pack([[Tokens(ids)] for ids in sequences[start : start + at_once]], packing), f"rank{rank}"
        ).sum().backward()
    clear(model)
    return count * length


def train_length(model: Any, length: int, packing: Packing) -> int:
    """As `train`, a micro-batch of sequences of this length."""
    return train(model, max(1, TOKENS // length), length, packing)


def train_rank(model: Any, rank: int) -> int:
    """As `train`, under an adapter of this rank."""
    return train(model, TOKENS // LENGTH, rank=rank)


def learn(model: Any, samples: int, packing: Packing) -> int:
    """Forward and backward of the completions of one prompt; their tokens."""
    completions = [tokens(COMPLETION, seed + 1) for seed in range(samples)]
    batch = pack([[completed(tokens(PROMPT, 0), completion)] for completion in completions], packing)
    model.logprobs(batch, "rank16").logprobs.sum().backward()
    clear(model)
    return samples * COMPLETION


def draw(model: Any, samples: int) -> int:
    """Sampled tokens."""
    from perlhf.rollout.local import Ends, sample, uniforms

    return sample(
        model,
        [tokens(PROMPT, seed) for seed in range(PROMPTS)],
        adapter="rank16",
        draws=uniforms(0, 1, range(PROMPTS), samples, SAMPLED),
        ends=Ends([-1]),
        temperature=1.0,
        max_completion_tokens=SAMPLED,
    ).tokens


def score(model: Any, adapters: int) -> int:
    """Tokens scored by all of these adapters, without a backward."""
    import torch

    sequences = [tokens(LENGTH, seed) for seed in range(TOKENS // LENGTH)]
    with torch.no_grad():
        for number in range(adapters):
            model.scores(pack([[Tokens(ids)] for ids in sequences], "tree"), f"reward_{number}")
    return adapters * TOKENS


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
    import matplotlib  # pyright: ignore[reportMissingImports]  of the extra `bench`

    matplotlib.use("agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    matplotlib.rcParams["svg.hashsalt"] = "growth"
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, curves.items(), strict=True):
        for name, values in lines.items():
            axis.plot(list(values), list(values.values()), marker="o", label=name or None)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(next(iter(lines.values()))), labels=[str(x) for x in next(iter(lines.values()))])
        axis.set_ylim(0, 1.08 * max(max(values.values()) for values in lines.values()))
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("tokens/s")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
