"""How many labels a reward model needs, by how its questions are chosen: on the embedded set, judged by its rules with
10 % wrong answers. An ensemble of reward adapters learns

    all           from N random labels at once
    random        from N random labels in rounds, warm
    disagreement  from N labels in rounds, a quarter of each round random, the rest where members disagree most
    information   likewise, where a label tells most

and its accuracy (mean preference of the members) is measured against the rules, without noise, on unseen pairs.
Questions come from pairs of the embedded answers; half of the groups are held out. It goes on where it was stopped;
`OUTPUT/results.json` has a line an arm, seed and number of labels, and a table is printed. Seeds may be run beside each
other: the run that names them all then only gathers what they found.
Run: python benchmarks/loop.py --output runs/loop-evidence --labels 20 40 80 160 320 --rounds 20 40 80 160
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from perlhf.config.loop import LoopConfig, LoopRewardConfig
from perlhf.config.stages import AdapterConfig, DataConfig, EncodingConfig, OptimConfig
from perlhf.data.coffee_bar.gold import gold
from perlhf.data.order import choose as choose_some
from perlhf.data.order import keyed_seed
from perlhf.data.records import Comparison, Rating, completions_of, text_of
from perlhf.data.splits import load, split_of
from perlhf.evaluation.shared import plain
from perlhf.labelling.questions import uniform
from perlhf.labelling.rounds import figures, network
from perlhf.labelling.rounds.network import Pair
from perlhf.labelling.rounds.order import choose, disagreement, information
from perlhf.runs.manifest import CHECKPOINTS, RESULT
from perlhf.system.files import remove_directory, write_atomic, write_json
from perlhf.system.machine import peak_memory_bytes
from perlhf.training.reward import train_reward

ARMS = ("all", "random", "disagreement", "information")
VALIDATED = 16
"""Held-out pairs that a reward run wants to have; they choose nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base", default=LoopConfig().base)
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 40, 80, 160, 320], help="of the arm all")
    parser.add_argument("--rounds", type=int, nargs="+", help="the other arms' rounds end at these (default: --labels)")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--layers", default="all", help="of the network: all, or last:N")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--pairs", type=int, default=500, help="unseen pairs")
    parser.add_argument("--candidates", type=int, default=400, help="pairs among which a round chooses, drawn anew")
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        config = LoopConfig(
            base=arguments.base,
            seed=seed,
            data=DataConfig(validation=0.1, test=0.4),
            encoding=EncodingConfig(system="You take orders in a coffee bar.", max_tokens=512),
            reward=LoopRewardConfig(
                members=arguments.members,
                adapter=AdapterConfig(rank=8, targets="all", layers=arguments.layers),
                optim=OptimConfig(learning_rate=1e-3),
                epochs=arguments.epochs,
            ),
        )
        pool, unseen = pairs_of(config, arguments.pairs)
        for arm in arguments.arms:
            place = arguments.output / f"{arm}-seed{seed}"
            for labels, said in run(config, arm, place, arguments, pool, unseen):
                correct = np.array(said.pop("correct"))
                interval = figures.measured(correct, [pair.group for pair in unseen], 1000, seed)
                found.append({"arm": arm, "seed": seed, "labels": labels, "accuracy": interval} | said)
                write_json(arguments.output / "results.json", {"pairs": len(unseen), "pool": len(pool), "found": found})
    table(found)


def pairs_of(config: LoopConfig, count: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs of different answers whose gold scores differ: those that may be asked about, and `count` unseen ones."""
    answers: dict[str, tuple[Any, str, list[str]]] = {}
    for record in load(DataConfig(paths=("builtin:coffee-bar",)), ("comparison", "rating"), "all"):
        assert isinstance(record, Comparison | Rating)
        _, _, texts = answers.setdefault(text_of(record.prompt), (record.prompt, record.group, []))
        texts += [text_of(text) for text in completions_of(record)]
    sides: dict[bool, list[Pair]] = defaultdict(list)
    for prompt, group, texts in answers.values():
        for first, second in combinations(dict.fromkeys(texts), 2):
            if gold(prompt, first) != gold(prompt, second):
                sides[split_of(group, config.data) == "train"].append(Pair(plain(prompt), first, second, group))
    return sides[True], choose_some(sides[False], count, 0)


def run(
    config: LoopConfig,
    arm: str,
    place: Path,
    arguments: argparse.Namespace,
    pool: Sequence[Pair],
    unseen: Sequence[Pair],
) -> list[tuple[int, dict[str, Any]]]:
    """For each number of labels, whether each unseen pair is ranked as by the rules, what share each member alone ranks
    so, how far members disagree, and seconds."""
    asked: list[int] = []
    before: Path | None = None
    results: list[tuple[int, dict[str, Any]]] = []
    better = np.array([gold(pair.prompt, pair.first) > gold(pair.prompt, pair.second) for pair in unseen])
    judged = figures.Judged(better, [pair.group for pair in unseen])
    for number, labels in enumerate(sorted(arguments.labels if arm == "all" else arguments.rounds or arguments.labels)):
        # The first round is the same for all arms.
        here = (place if number else arguments.output / f"{ARMS[0]}-seed{config.seed}") / f"labels-{labels:04d}"
        measured = here / "correct.json"
        chosen = here / "asked.json"
        if not chosen.exists():
            here.mkdir(parents=True, exist_ok=True)
            new = more(config, arm, asked, before, labels, number, pool, arguments.candidates)
            write_json(chosen, {"asked": asked + new})
        asked = json.loads(chosen.read_text())["asked"]
        rows = [row(config, pool[at], arguments.noise) for at in asked]
        rows += [row(config, pair, 0.0) for pair in unseen[:VALIDATED]]
        reward = here / "reward"
        if not measured.exists():
            records = here / "records.jsonl"
            write_atomic(records, "".join(json.dumps(one) + "\n" for one in rows))
            began = time.monotonic()
            if not (reward / RESULT).exists():
                start = None if arm == "all" else before
                train_reward(config.reward_stage(reward, records, start, keyed_seed(config.seed, "reward") % 2**31))
            learned = time.monotonic()
            remove_directory(reward / CHECKPOINTS)
            scores = network.score_pairs(config, [reward], unseen)
            said = {"correct": figures.right(scores, judged).tolist(), "each": each_right(scores, better)}
            said["disagreement"] = figures.spread(scores)
            said["quarters"] = quarters(scores, figures.right(scores, judged))
            said["memory"] = peak_memory_bytes()
            said["seconds"] = {"learning": learned - began, "scoring": time.monotonic() - learned}
            write_json(measured, said)
        results.append((labels, json.loads(measured.read_text())))
        before = reward
    return results


def more(
    config: LoopConfig,
    arm: str,
    asked: list[int],
    before: Path | None,
    labels: int,
    number: int,
    pool: Sequence[Pair],
    candidates: int,
) -> list[int]:
    """Numbers of the pairs that are asked about next, at most one of a prompt in a round. All arms begin alike."""
    taken = set(asked)
    left = [at for at in range(len(pool)) if at not in taken]
    worth = None
    if before is not None and arm in ("disagreement", "information"):
        left = sorted(left, key=lambda at: uniform(config.seed, "candidates", number, at))[:candidates]
        scores = network.score_pairs(config, [before], [pool[at] for at in left])
        worth = disagreement(scores) if arm == "disagreement" else information(scores)
    prompts = [text_of(pool[at].prompt) for at in left]
    order = "information" if arm == "information" else "disagreement" if arm == "disagreement" else "random"
    chosen = choose(prompts, worth, order, labels - len(asked), 0.25, config.seed, number)
    return [left[choice.at] for choice in chosen]


def each_right(scores: np.ndarray, better: np.ndarray) -> list[float]:
    """The share of the pairs that each member alone ranks as the rules do."""
    return ((scores[:, :, 0] > scores[:, :, 1]) == better).mean(axis=1).tolist()


def quarters(scores: np.ndarray, right: np.ndarray) -> list[float]:
    """The share of pairs that are ranked rightly in each quarter of them, from those on which members agree most to
    those on which they disagree most: it falls where disagreement says how far to trust them."""
    order = np.argsort(disagreement(scores), kind="stable")
    return [float(right[part].mean()) for part in np.array_split(order, 4)]


def row(config: LoopConfig, pair: Pair, noise: float) -> dict[str, Any]:
    """A comparison as the labeller judges it."""
    first = gold(pair.prompt, pair.first) > gold(pair.prompt, pair.second)
    if uniform(config.seed, "noise", text_of(pair.prompt), pair.first, pair.second) < noise:
        first = not first
    chosen, rejected = (pair.first, pair.second) if first else (pair.second, pair.first)
    return {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected, "group": pair.group}


def table(found: Sequence[dict[str, Any]]) -> None:
    """Mean accuracy of the seeds, and the mean difference to all labels at once with as many."""
    by: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for one in found:
        by[one["arm"], one["labels"]][one["seed"]] = one["accuracy"]["value"]
    for (arm, labels), seeds in by.items():
        paired = [value - by["all", labels][seed] for seed, value in seeds.items() if seed in by["all", labels]]
        difference = f"{fmean(paired):+.3f} against all at once" if paired else ""
        each = ", ".join(f"{value:.3f}" for value in seeds.values())
        print(f"{arm:<13} {labels:>4} labels  {fmean(seeds.values()):.3f}  ({each})  {difference}")
        same = [one for one in found if (one["arm"], one["labels"]) == (arm, labels)]
        alone, apart = fmean(fmean(one["each"]) for one in same), fmean(one["disagreement"] for one in same)
        learning, scoring = (fmean(one["seconds"][what] for one in same) for what in ("learning", "scoring"))
        print(f"{'':<13} a member alone {alone:.3f}, disagreement {apart:.3f}, {learning:.0f} s + {scoring:.0f} s")
        if all("quarters" in one for one in same):
            by_quarter = ", ".join(
                f"{fmean(each):.2f}" for each in zip(*(one["quarters"] for one in same), strict=True)
            )
            memory = max(one["memory"] for one in same) / 2**30
            print(f"{'':<13} from agreement to disagreement {by_quarter}; {memory:.2f} GiB")


if __name__ == "__main__":
    main()
