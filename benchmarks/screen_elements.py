"""What the reward models of docs/results/uibert know beyond "the element that has a description is the right one".

Most elements of a screen are boxes without text; those that people name in an instruction rarely are. Prints how often
that tells the right element, and each kept cell's accuracy on all test comparisons and on those that it can't tell:
both elements are described, or neither is. Run, with the data under $PERLHF_DATA:

    python benchmarks/screen_elements.py
"""

import json
import re

import numpy as np

from harness import REPOSITORY
from perlhf.config.stages import DataConfig
from perlhf.data.records import Comparison, Text
from perlhf.data.splits import load
from perlhf.evaluation.baselines import bag_of_words
from perlhf.method.metrics import pairwise_accuracy

BOX_ALONE = re.compile(r"\d+: \([\d ]+\)")
KEPT = REPOSITORY / "docs" / "results" / "uibert"


def described(element: Text) -> bool:
    """Whether a line has more than the number and the box."""
    return BOX_ALONE.fullmatch(str(element)) is None


def main() -> None:
    config = DataConfig(paths=("uibert",), format="uibert-pairs")
    train, test = (
        [record for record in load(config, ("comparison",), part) if isinstance(record, Comparison)]
        for part in ("train", "test")
    )
    sides = np.array([(described(record.chosen), described(record.rejected)) for record in test])
    alike = sides[:, 0] == sides[:, 1]
    right, wrong = sides.mean(axis=0)
    print(f"{len(test)} test comparisons: {right:.3f} of the right and {wrong:.3f} of the wrong elements are described")
    print(
        f"{alike.sum()} have both or neither described; of the others the right one is in {sides[~alike, 0].mean():.3f}"
    )
    scores = {"bag of words": bag_of_words(train, test)}
    for file in sorted(KEPT.glob("*/evaluation.json")):
        kept = json.loads(file.read_text(encoding="utf-8"))["records"]["comparisons"]
        assert kept["group"] == [record.group for record in test], f"{file} is of other comparisons"
        scores[file.parent.name] = np.array(kept["scores"])
    for name, pairs in scores.items():
        all_of, some = (pairwise_accuracy(*pairs[rows].T) for rows in (slice(None), alike))
        print(f"{name}: {all_of:.3f} of all, {some:.3f} of those that are alike")


if __name__ == "__main__":
    main()
