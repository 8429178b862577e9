"""The best of n answers, where what chooses among them left some out."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from perlhf.data.records import Prompt
from perlhf.evaluation.policy import Answers, Setting, _best_of_first  # pyright: ignore[reportPrivateUsage]

NAN = float("nan")


def setting(prompts: int) -> Setting:
    asked = cast(Any, SimpleNamespace(bootstrap=50, seed=0))
    records, nothing = [Prompt(str(i), f"g{i}") for i in range(prompts)], cast(Any, None)
    return Setting(asked, nothing, nothing, nothing, nothing, records, nothing, 1.0, None, "policy", nothing)


def before(scores: list[float]) -> Answers:
    found = np.array(scores)
    return Answers([""] * len(scores), found[None], found, np.ones(len(scores)), np.ones(len(scores)), None, None)


def test_a_prompt_without_any_scored_answer_is_left_out_and_counted():
    """Of four prompts the second answer is better (a win), the first (a tie), none has a score, one of two has."""
    scores = np.array([[1.0, 3.0], [5.0, 4.0], [NAN, NAN], [NAN, 6.0]])
    tokens = np.array([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0], [70.0, 80.0]])
    found = _best_of_first(2, setting(4), before([1.0, 5.0, NAN, NAN]), scores, scores, tokens, None)
    assert found["unscored"] == 1
    assert found["win_rate"].value == 0.75  # 1 and 1/2: the answer before has no score where another one is the best
    assert found["score"].value == pytest.approx((3 + 5 + 6) / 3) and found["score"] == found["chosen_by"]
    assert found["tokens"].value == (20 + 30 + 80) / 3, "its answers are in no mean"
