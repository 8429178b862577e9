"""What the frozen base knows of a rated set: a linear probe against the bag of words, cross-validated over groups.

Reads the records of a reward recipe (all splits), computes the state that a score head reads once for each under the
frozen base, and fits logistic regression on the other folds' groups. Both sides use the same five folds; the interval
of their difference is a bootstrap over groups. Prints one JSON line.
Run: python scripts/cross_validate_probe.py recipes/coffee/reward.yaml
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from perlhf.config.recipe import load_recipe
from perlhf.config.stages import RewardConfig
from perlhf.data.records import Rating
from perlhf.data.splits import load
from perlhf.evaluation import baselines
from perlhf.method import linear_probe, metrics
from perlhf.model.bases.found import Base
from perlhf.model.open import open_model
from perlhf.training.reward import encode_items, laid_out

FOLDS = 5
Fold = NDArray[np.intp]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="reward recipe whose data and encoding are used")
    parser.add_argument("--threads", type=int, help="torch threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = load_recipe(arguments.recipe, RewardConfig)
    records = [record for record in load(config.data, ("rating",), "all") if isinstance(record, Rating)]
    labels, groups = np.array([record.label for record in records]), [record.group for record in records]
    found = last_states(config, records)

    def probe(fitted: Fold, tested: Fold) -> NDArray[np.float64]:
        head = linear_probe.fit(
            [found[i : i + 1] for i in fitted],
            labels[fitted].tolist(),
            [groups[i] for i in fitted],
            [1.0] * len(fitted),
        )
        return found[tested] @ head.weight + head.bias

    def words(fitted: Fold, tested: Fold) -> NDArray[np.float64]:
        return baselines.bag_of_words([records[i] for i in fitted], [records[i] for i in tested])

    scores = {"probe": cross_validated(probe, groups), "bag_of_words": cross_validated(words, groups)}
    result: dict[str, object] = {"recipe": str(arguments.recipe), "ratings": len(records), "groups": len(set(groups))}
    curves = {name: (lambda i, own=own: metrics.auc(own[i], labels[i])) for name, own in scores.items()}
    for name, own in scores.items():
        interval = metrics.cluster_bootstrap(curves[name], groups)
        result[name] = [metrics.auc(own, labels), *interval]
    difference = metrics.auc(scores["probe"], labels) - metrics.auc(scores["bag_of_words"], labels)
    interval = metrics.paired_bootstrap(curves["probe"], curves["bag_of_words"], groups)
    result["probe_minus_bag_of_words"] = [difference, *interval]
    print(json.dumps(result))


def last_states(config: RewardConfig, records: Sequence[Rating]) -> NDArray[np.float64]:
    """[record, hidden] states of the end tokens under the frozen base."""
    model, encoder = open_model(config, Base.find(config.base))
    items, _ = encode_items(encoder, records)
    assert len(items) == len(records), "no record is dropped"
    states = np.zeros((len(items), model.hidden_size))
    with torch.no_grad():
        for batch in laid_out(items, config, model):
            states[list(batch.examples)] = model.last_states(batch, None).double().cpu().numpy()
    return states


def cross_validated(fit: Callable[[Fold, Fold], NDArray[np.float64]], groups: Sequence[str]) -> NDArray[np.float64]:
    """Scores of every record by what was fitted on the other folds, as ranks within its fold; a group is in one fold.

    Five fits have five scales, which pooled scores would mix.
    """
    fold_of = np.array([int(hashlib.sha256(group.encode()).hexdigest(), 16) % FOLDS for group in groups])
    scores = np.zeros(len(groups))
    for fold in range(FOLDS):
        tested = np.flatnonzero(fold_of == fold)
        scores[tested] = rankdata(fit(np.flatnonzero(fold_of != fold), tested)) / len(tested)
    return scores


if __name__ == "__main__":
    main()
