"""How many labels a reward model needs, by how its questions are chosen: on the embedded set, judged by its rules with
10 % wrong answers, or on comparisons of people (`--data`), judged as they were. An ensemble of reward adapters learns

    all           from N random labels at once
    random        from N random labels in rounds, warm
    disagreement  from N labels in rounds, a quarter of each round random, the rest where members disagree most
    information   likewise, where a label tells most

and its accuracy (mean preference of the members) is measured against the rules, without noise, on unseen pairs.
Questions come from pairs of the embedded answers (or of the file's that have at most 1,200 letters); half of the
groups are held out. It goes on where it was stopped;
`OUTPUT/results.json` has a line an arm, seed and number of labels, and a table is printed. Seeds may be run beside each
other: the run that names them all then only gathers what they found.
Run: python benchmarks/loop.py --output runs/loop-evidence --labels 20 40 80 160 320 --rounds 20 40 80 160
     python benchmarks/loop.py --output runs/loop-hh --data FILE --layers last:4 --labels 80 320 --rounds 80 160 320
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.special import stdtrit

from perlhf.config.loop import LoopConfig, LoopEncodingConfig, LoopRewardConfig
from perlhf.config.stages import AdapterConfig, DataConfig, OptimConfig
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

SYSTEM = "You take orders in a coffee bar."
LETTERS = 1200
"""Of a file's prompt with its longer answer, so that the shortest of passes hold it."""
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
    parser.add_argument("--noise", type=float, help="share of wrong answers (default: 0.1; of --data none)")
    parser.add_argument("--data", nargs="+", help="comparisons, as `data.paths` names them; else the embedded set")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the reward adapters")
    parser.add_argument("--schedule", default="constant", choices=("constant", "linear", "cosine"))
    parser.add_argument("--warmup-updates", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    arguments = parser.parse_args()
    noise = arguments.noise if arguments.noise is not None else 0.0 if arguments.data else 0.1
    found: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        config = LoopConfig(
            base=arguments.base,
            seed=seed,
            order="random",  # arms choose by themselves, and one member alone has nobody to disagree with
            data=DataConfig(validation=0.1, test=0.4),
            encoding=LoopEncodingConfig(system=None if arguments.data else SYSTEM, max_tokens=512),
            reward=LoopRewardConfig(
                members=arguments.members,
                adapter=AdapterConfig(rank=8, targets="all", layers=arguments.layers),
                optim=OptimConfig(
                    learning_rate=arguments.learning_rate,
                    schedule=arguments.schedule,
                    warmup_updates=arguments.warmup_updates,
                ),
                epochs=arguments.epochs,
            ),
        )
        sides = published(config, arguments.data) if arguments.data else embedded(config)
        pool, unseen = sides[True], choose_some(sides[False], arguments.pairs, 0)
        for arm in arguments.arms:
            place = arguments.output / f"{arm}-seed{seed}"
            for labels, said in run(config, arm, place, arguments, pool, unseen, noise):
                correct = np.array(said.pop("correct"))
                interval = figures.measured(correct, [one.pair.group for one in unseen], 1000, seed)
                found.append({"arm": arm, "seed": seed, "labels": labels, "accuracy": interval} | said)
                write_json(arguments.output / "results.json", {"pairs": len(unseen), "pool": len(pool), "found": found})
    table(found)


@dataclass(frozen=True)
class Question:
    """A pair, and whether its first answer is the better one."""

    pair: Pair
    first: bool


def embedded(config: LoopConfig) -> dict[bool, list[Question]]:
    """Pairs of different answers whose gold scores differ: those that may be asked about, and the others."""
    answers: dict[str, tuple[Any, str, list[str]]] = {}
    for record in load(DataConfig(paths=("builtin:coffee-bar",)), ("comparison", "rating"), "all"):
        assert isinstance(record, Comparison | Rating)
        _, _, texts = answers.setdefault(text_of(record.prompt), (record.prompt, record.group, []))
        texts += [text_of(text) for text in completions_of(record)]
    sides: dict[bool, list[Question]] = defaultdict(list)
    for prompt, group, texts in answers.values():
        for first, second in combinations(dict.fromkeys(texts), 2):
            scores = gold(prompt, first), gold(prompt, second)
            if scores[0] != scores[1]:
                pair = Pair(plain(prompt), first, second, group)
                sides[split_of(group, config.data) == "train"].append(Question(pair, scores[0] > scores[1]))
    return sides


def published(config: LoopConfig, paths: Sequence[str]) -> dict[bool, list[Question]]:
    """Likewise of comparisons that people made, the better answer at a place drawn for each."""
    sides: dict[bool, list[Question]] = defaultdict(list)
    for record in load(DataConfig(paths=tuple(paths)), ("comparison",), "all"):
        assert isinstance(record, Comparison)
        prompt, texts = plain(record.prompt), [text_of(record.chosen), text_of(record.rejected)]
        if len(text_of(prompt)) + max(map(len, texts)) > LETTERS or texts[0] == texts[1]:
            continue
        if not (first := uniform(0, "side", text_of(prompt), *texts) < 0.5):
            texts.reverse()
        pair = Pair(prompt, texts[0], texts[1], record.group)
        sides[split_of(record.group, config.data) == "train"].append(Question(pair, first))
    return sides


def run(
    config: LoopConfig,
    arm: str,
    place: Path,
    arguments: argparse.Namespace,
    pool: Sequence[Question],
    unseen: Sequence[Question],
    noise: float,
) -> list[tuple[int, dict[str, Any]]]:
    """For each number of labels, whether each unseen pair is ranked as by the rules, what share each member alone ranks
    so, how far members disagree, and seconds."""
    asked: list[int] = []
    before: Path | None = None
    results: list[tuple[int, dict[str, Any]]] = []
    better, pairs = np.array([one.first for one in unseen]), [one.pair for one in unseen]
    judged = figures.Judged(better, [pair.group for pair in pairs])
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
        rows = [row(config, pool[at], noise) for at in asked]
        rows += [row(config, one, 0.0) for one in unseen[:VALIDATED]]
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
            scores = network.score_pairs(config, [reward], pairs)
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
    pool: Sequence[Question],
    candidates: int,
) -> list[int]:
    """Numbers of the pairs that are asked about next, at most one of a prompt in a round. All arms begin alike."""
    taken = set(asked)
    left = [at for at in range(len(pool)) if at not in taken]
    worth = None
    if before is not None and arm in ("disagreement", "information"):
        left = sorted(left, key=lambda at: uniform(config.seed, "candidates", number, at))[:candidates]
        scores = network.score_pairs(config, [before], [pool[at].pair for at in left])
        worth = disagreement(scores) if arm == "disagreement" else information(scores)
    prompts = [text_of(pool[at].pair.prompt) for at in left]
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


def row(config: LoopConfig, question: Question, noise: float) -> dict[str, Any]:
    """A comparison as the labeller judges it."""
    pair, first = question.pair, question.first
    if uniform(config.seed, "noise", text_of(pair.prompt), pair.first, pair.second) < noise:
        first = not first
    chosen, rejected = (pair.first, pair.second) if first else (pair.second, pair.first)
    return {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected, "group": pair.group}


def table(found: Sequence[dict[str, Any]]) -> None:
    """Means over seeds, and paired differences to all labels at once: to as many, and to four times as many."""
    by: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for one in found:
        by[one["arm"], one["labels"]][one["seed"]] = one["accuracy"]["value"]
    for (arm, labels), seeds in by.items():
        each = ", ".join(f"{seeds[seed]:.3f}" for seed in sorted(seeds))
        print(f"{arm:<13} {labels:>4} labels  {fmean(seeds.values()):.3f}  ({each})")
        for others in (labels, 4 * labels):
            if said := paired(seeds, by.get(("all", others), {})):
                print(f"{'':<13} {said} against all {others} at once")
        same = [one for one in found if (one["arm"], one["labels"]) == (arm, labels)]
        alone, apart = fmean(fmean(one["each"]) for one in same), fmean(one["disagreement"] for one in same)
        learning, scoring = (fmean(one["seconds"][what] for one in same) for what in ("learning", "scoring"))
        print(f"{'':<13} a member alone {alone:.3f}, disagreement {apart:.3f}, {learning:.0f} s + {scoring:.0f} s")
        by_quarter = ", ".join(f"{fmean(each):.2f}" for each in zip(*(one["quarters"] for one in same), strict=True))
        memory = max(one["memory"] for one in same) / 2**30
        print(f"{'':<13} from agreement to disagreement {by_quarter}; {memory:.2f} GiB")


def paired(one: dict[int, float], other: dict[int, float]) -> str:
    """The mean difference of the seeds that both have, with its 95 % interval by t; empty where it is of itself."""
    differences = np.array([one[seed] - other[seed] for seed in sorted(one) if seed in other])
    if not differences.any():
        return ""
    if len(differences) == 1:
        return f"{differences[0]:+.3f} (one seed)"
    half = stdtrit(len(differences) - 1, 0.975) * differences.std(ddof=1) / len(differences) ** 0.5
    return f"{differences.mean():+.3f} ({differences.mean() - half:+.3f} to {differences.mean() + half:+.3f})"


if __name__ == "__main__":
    main()
