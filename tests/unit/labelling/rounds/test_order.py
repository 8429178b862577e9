"""Which questions are worth a label: formulas by hand, and who is chosen."""

import math

import numpy as np
import pytest

from perlhf.labelling.rounds.order import Choice, choose, disagreement, information, preferences


def scores(*members: list[float]) -> np.ndarray:
    """[members, pairs, 2] in which member k prefers the first answer of a pair with the given probability."""
    return np.array([[[math.log(p / (1 - p)), 0.0] for p in member] for member in members])


def test_preferences_are_bradley_terrys() -> None:
    found = preferences(np.array([[[2.0, 2.0], [math.log(3), 0.0], [0.0, math.log(4)]]]))
    assert found == pytest.approx(np.array([[0.5, 0.75, 0.2]]))


def test_disagreement_is_the_variance_over_members() -> None:
    # Means 0.7, 0.5, 0.5; deviations 0.2, 0.4, 0.
    found = disagreement(scores([0.9, 0.9, 0.5], [0.5, 0.1, 0.5]))
    assert found == pytest.approx([0.04, 0.16, 0.0])


def test_information_is_the_entropy_of_the_mean_less_the_mean_entropy() -> None:
    def entropy(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    found = information(scores([0.9, 0.9, 0.5], [0.5, 0.1, 0.5]))
    by_hand = [entropy(0.7) - (entropy(0.9) + entropy(0.5)) / 2, math.log(2) - entropy(0.9), 0.0]
    assert found == pytest.approx(by_hand) and by_hand[0] == pytest.approx(0.1018, abs=1e-4)
    sure = information(np.array([[[900.0, -900.0]], [[-900.0, 900.0]]]))
    assert sure == pytest.approx([math.log(2)])


def test_all_undecided_and_all_sure_tell_nothing() -> None:
    for p in (0.5, 0.99):
        same = scores([p], [p], [p])
        assert disagreement(same)[0] == pytest.approx(0) and information(same)[0] == pytest.approx(0, abs=1e-12)


def test_best_of_each_prompt_once() -> None:
    prompts = [0, 0, 1, 1, 2, 3]
    worth = [0.5, 0.9, 0.8, 0.7, 0.1, 0.2]
    found = choose(prompts, worth, "information", 3, 0.0, "key")
    assert found == [Choice(1, "information"), Choice(2, "information"), Choice(5, "information")]


def test_the_random_share_does_not_look_at_the_worth() -> None:
    prompts = list(range(100))
    rising, falling = [float(at) for at in prompts], [float(-at) for at in prompts]
    one, other = (choose(prompts, worth, "disagreement", 20, 0.25, "key") for worth in (rising, falling))
    at_random = [choice for choice in one if choice.drawn == "random"]
    assert len(one) == 20 and len(at_random) == 5
    assert at_random == [choice for choice in other if choice.drawn == "random"]
    assert sorted(c.at for c in one if c.drawn == "disagreement")[0] >= 80
    assert {c.at for c in one}.isdisjoint({c.at for c in other if c.drawn == "disagreement"})
    again = choose(prompts, rising, "disagreement", 20, 0.25, "another key")
    assert at_random != [choice for choice in again if choice.drawn == "random"]


def test_what_models_cannot_score_comes_last() -> None:
    worth = [0.1, math.nan, 0.3, math.nan, 0.2]
    assert [choice.at for choice in choose(list(range(5)), worth, "information", 3, 0.0, "key")] == [2, 4, 0]


def test_without_reward_models_all_are_random() -> None:
    found = choose(list(range(9)), None, "information", 4, 0.0, "key")
    assert len(found) == 4 and {choice.drawn for choice in found} == {"random"}
    assert len(choose([0, 0, 1], [1.0, 2.0, 3.0], "information", 5, 0.5, "key")) == 2
