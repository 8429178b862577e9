import math

import numpy as np
import pytest

from perlhf.method.shaping import bounded, disagreement


def test_pay_is_the_chance_of_being_preferred_to_the_reference() -> None:
    paid = bounded(np.array([1.0, 1 + math.log(3), -math.log(4), 500.0, -500.0]), np.array([1.0, 1.0, 0.0, 0.0, 0.0]))
    assert paid == pytest.approx([0.0, 0.25, -0.3, 0.5, -0.5])


def test_disagreement_forgets_each_members_zero() -> None:
    # (0, 2) and (5, 5) about one prompt, at (-1, 1) and (0, 0): deviations 1/2 and 1/2. The other prompt: agreed.
    table = np.array([[0.0, 2.0, 1.0, 3.0], [5.0, 5.0, 11.0, 13.0]])
    assert disagreement(table, 2) == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)
    assert disagreement(table + np.array([[100.0], [0.0]]), 2) == pytest.approx(0.25)
    assert disagreement(np.array([[math.nan, 1.0], [0.0, 1.0]]), 2) == 0.0
