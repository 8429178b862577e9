"""What bringing members to one level changes (`perlhf.rollout.scorers.centred`): which member is the minimum, and
how well the combined scores follow the gold score, for the same answers of a policy run on the embedded set.

Levels come from the completions of update 1, which are the reference's own; shares and rank correlations are those of
the completions of update 2 (still the reference's, after one warm-up update of the value) and of all from there on.
Prints one JSON line.
Run: python benchmarks/members.py --run runs/hacking-0.25/min --members runs/bar-0.25-0 runs/bar-0.25-1 ...
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from perlhf.data.coffee_bar.gold import gold
from perlhf.method.packing import batches
from perlhf.model.finished import read_run
from perlhf.model.open import load_earlier
from perlhf.rollout.scorers import Combine, Level, centred, combine, score_batches

HOW: tuple[Combine, ...] = ("mean", "min", "mean_minus_std")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished policy run on the embedded set")
    parser.add_argument("--members", type=Path, nargs="+", required=True, help="reward runs")
    arguments = parser.parse_args()
    files = sorted((arguments.run / "rollouts").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    table, steps = _scores(arguments.run, arguments.members, rows), np.array([row["step"] for row in rows])
    golden = np.array([gold(row["prompt"], row["completion"]) for row in rows])
    first = table[:, steps == 1]
    levels = [(float(row.mean()), float(row.std())) for row in first]
    found = {"levels": levels} | {
        name: _both(table[:, chosen], levels, golden[chosen])
        for name, chosen in (("update 2", steps == 2), ("updates 2 to the last", steps > 1))
    }
    print(json.dumps(found | {"answers": int((steps > 1).sum())}))


def _scores(run: Path, members: Sequence[Path], rows: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """[member, answer]."""
    model, encoder = read_run(run).open("cpu")
    examples = [[encoder.example(row["prompt"], row["completion"]).tokens] for row in rows]
    table = []
    for number, member in enumerate(members):
        adapter = load_earlier(model, member, f"reward_{number}", encoder)
        laid_out = batches(examples, 1024, "tree", model.device)
        table.append([score for (score,) in score_batches(model, laid_out, adapter.name)])
    return np.array(table)


def _both(table: NDArray[np.float64], levels: Sequence[Level], golden: NDArray[np.float64]) -> dict[str, Any]:
    """Shares of the minimum and rank correlations with the gold score, of scores as they are and at one level."""
    found = {}
    for name, scores in (("as they are", table), ("at one level", centred(table, levels))):
        lowest = np.bincount(scores.argmin(0), minlength=len(scores)) / scores.shape[1]
        follows = {how: float(np.asarray(spearmanr(combine(scores, how), golden))[0]) for how in HOW}
        found[name] = {"share of the minimum": lowest.tolist(), "rank correlation with gold": follows}
    return found


if __name__ == "__main__":
    main()
