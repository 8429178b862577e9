"""Which questions are worth a label: how far reward models disagree about two answers, and what a label would tell.

Member k of the ensemble prefers the first answer with probability p_k = sigmoid(s_k(first) - s_k(second))
(Bradley-Terry). Members stand for draws from what is believed about the labeller:

    disagreement   the variance of p_k over the members ("infomax" of arXiv 2402.00396)
    information    H(mean of p_k) - mean of H(p_k), with H(p) = -p ln p - (1 - p) ln (1 - p): the mutual information in
                   nats between the label and the member that is right (BALD, arXiv 1112.5745)

Both are of the two answers together, as arXiv 2603.17378 explores between answers; that paper draws its members from an
epistemic network, ours are adapters of other seeds. A pair on which all are equally undecided has neither: no label
would settle it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, expit

from perlhf.config.labelling import Order
from perlhf.labelling.questions import uniform

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """A pair that is asked about."""

    at: int
    """Its number among the candidates."""
    drawn: Order
    """By what it was chosen."""


def preferences(scores: Floats) -> Floats:
    """p_k of each pair, [members, pairs], from the scores [members, pairs, 2] of both answers."""
    return expit(scores[:, :, 0] - scores[:, :, 1])


def disagreement(scores: Floats) -> Floats:
    """Variance over the members of the probability that the first answer is preferred: [pairs], at most 1/4.

    Two members that prefer it with 0.9 and 0.5 have the mean 0.7 and the variance 0.04.

    Args:
        scores: [members, pairs, 2].
    """
    return preferences(scores).var(axis=0)


def information(scores: Floats) -> Floats:
    """Nats that a label of each pair tells about which member is right: [pairs], between 0 and ln 2.

    Members that are sure of opposite answers (1 and 0) give ln 2; members that agree give 0.

    Args:
        scores: [members, pairs, 2].
    """
    chances = preferences(scores)
    mean = chances.mean(axis=0)
    within = (entr(chances) + entr(1 - chances)).mean(axis=0)
    return np.maximum(entr(mean) + entr(1 - mean) - within, 0.0)


def choose(
    prompts: Sequence[Hashable],
    worth: Sequence[float] | Floats | None,
    order: Order,
    count: int,
    random_share: float,
    *key: object,
) -> list[Choice]:
    """At most `count` pairs, no two of one prompt: the random share first, whatever they are worth, then the best.

    Args:
        prompts: of each candidate, what it asks about.
        worth: of each candidate, nan (too long for the models) below all others; None draws all at random, as the
            first round does, which has no reward models.
        order: what `worth` is.
        count: pairs wanted; there are fewer where prompts are.
        random_share: of them.
        key: of the draws, which depend on nothing else.
    """
    places = [uniform(*key, at) for at in range(len(prompts))]
    worth = None if worth is None else np.nan_to_num(np.asarray(worth, dtype=float), nan=-np.inf)
    at_random = sorted(range(len(prompts)), key=lambda at: places[at])
    wanted = count if worth is None or order == "random" else round(count * random_share)
    chosen = _of_new_prompts(at_random, prompts, set(), wanted, "random")
    if worth is None or len(chosen) == count:
        return chosen
    best = sorted(range(len(prompts)), key=lambda at: (-worth[at], places[at]))
    taken = {prompts[choice.at] for choice in chosen}
    return chosen + _of_new_prompts(best, prompts, taken, count - len(chosen), order)


def _of_new_prompts(
    numbers: Sequence[int], prompts: Sequence[Hashable], taken: set[Hashable], count: int, drawn: Order
) -> list[Choice]:
    """The first `count` of prompts that aren't taken, one of each."""
    chosen: list[Choice] = []
    for at in numbers:
        if len(chosen) == count:
            break
        if prompts[at] not in taken:
            taken.add(prompts[at])
            chosen.append(Choice(at, drawn))
    return chosen
