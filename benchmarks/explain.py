"""How often `perlhf score --explain` names the sentence that is wrong, on the embedded set.

Takes answers of held-out groups of a reward run's embedded feedback in which leaving out exactly one sentence raises
the gold score by at least 0.1, and asks whether the reward model's own worst sentence is that one. Beside it: chance
(one sentence of each answer at random), the last sentence, and the one that would be named if each were replaced by
something neutral instead of left out. Prints one JSON line. Several runs on one base: by the mean of their scores.
Run: python benchmarks/explain.py --run runs/demo/reward [--split validation]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from perlhf.config.stages import DataConfig
from perlhf.data.coffee_bar.gold import gold
from perlhf.data.records import Rating, Record, Text, completions_of, text_of
from perlhf.data.splits import load
from perlhf.evaluation.explain import explain, mean_explanation, sentences
from perlhf.evaluation.reward import mean_of_members, score_by_members
from perlhf.method.metrics import cluster_bootstrap
from perlhf.model.finished import read_run
from perlhf.model.open import load_earlier

RISE = 0.1
NEUTRAL = ("Okay.", "Sure.", "Yes.", "Thank you!")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="reward runs on the embedded set")
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="validation chooses, test tells"
    )
    parser.add_argument("--answers", type=int, default=400, help="at most so many with one wrong sentence")
    arguments = parser.parse_args()
    run, *others = (read_run(path, ("reward",)) for path in arguments.run)
    own = run.config.data
    chosen: list[tuple[Record, Text, int]] = []
    for kind in ("rating", "comparison"):
        data = DataConfig(
            paths=(f"builtin:coffee-bar/{kind}",), validation=own.validation, test=own.test, split_seed=own.split_seed
        )
        for record in load(data, (kind,), arguments.split):
            for completion in completions_of(record):
                if (wrong := wrong_sentence(record.prompt, text_of(completion))) is not None:
                    chosen.append((record, completion, wrong))
    chosen = chosen[: arguments.answers]
    model, encoder = run.open("cpu")
    directories = [directory for other in others for directory in other.members.values()]
    names = [load_earlier(model, path, f"other_{at}", encoder).name for at, path in enumerate(directories)]
    names += run.members
    budget, packing = run.config.microbatch_tokens, model.packing("auto")
    asked = [(record.prompt, completion, record.tools) for record, completion, _ in chosen]
    found = [explain(model, encoder, asked, name, budget, packing) for name in names]
    means = [mean_explanation(each) for each in zip(*found, strict=True)]
    # Each sentence replaced by each neutral one, all in a row.
    whole: list[Record] = [
        Rating(record.prompt, text, True, record.group, tools=record.tools)
        for record, completion, _ in chosen
        for text in replaced(text_of(completion))
    ]
    tables, _ = score_by_members(model, encoder, whole, tuple(names), budget, packing)
    scores = iter([one[0] for one in mean_of_members(tables) if one is not None])
    rows: list[dict[str, Any]] = []
    for (record, completion, wrong), explanation in zip(chosen, means, strict=True):
        assert explanation is not None
        count = len(sentences(text_of(completion)))
        without = np.array([[next(scores) for _ in NEUTRAL] for _ in range(count)]).mean(1)
        rows.append(
            {
                "group": record.group,
                "named": explanation.worst == wrong,
                "named_replaced": int(without.argmax()) == wrong,
                "chance": 1 / count,
                "last": wrong == count - 1,
            }
        )
    print(json.dumps({"answers": len(rows)} | {name: interval(rows, name) for name in rows[0] if name != "group"}))


def replaced(completion: str) -> list[str]:
    """The text with each of its sentences replaced by each of `NEUTRAL`."""
    parts = sentences(completion)
    numbers = range(len(parts))
    return ["".join([*parts[:i], neutral + " ", *parts[i + 1 :]]).strip() for i in numbers for neutral in NEUTRAL]


def wrong_sentence(prompt: Text, completion: str) -> int | None:
    """Number of the one sentence without which the gold score is higher by `RISE`; None where none or several are."""
    parts = sentences(completion)
    if len(parts) < 2:
        return None
    whole = gold(prompt, completion)
    without = ["".join(parts[:i] + parts[i + 1 :]).strip() for i in range(len(parts))]
    raised = [i for i, text in enumerate(without) if gold(prompt, text) - whole >= RISE]
    return raised[0] if len(raised) == 1 else None


def interval(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Share and its 95 % interval over groups."""
    values = np.array([float(row[name]) for row in rows])
    low, high = cluster_bootstrap(lambda chosen: float(values[chosen].mean()), [row["group"] for row in rows])
    return [round(float(number), 3) for number in (values.mean(), low, high)]


if __name__ == "__main__":
    main()
