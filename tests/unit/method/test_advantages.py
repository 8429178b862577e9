"""From scores to advantages, with numbers worked by hand."""

import pytest
import torch
from torch import Tensor

from perlhf.method.advantages import completion_kl, gae, group_baseline, normalise, returns_to_go, token_rewards

MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
"""A completion of three tokens, one of one, one of none."""


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


class TestTokenRewards:
    LOGPROBS = table([-1.0, -2.0, -3.0], [-1.0, 7.0, 7.0], [7.0, 7.0, 7.0])
    REFERENCE = table([-2.0, -2.0, -1.0], [-0.5, 3.0, 3.0], [3.0, 3.0, 3.0])

    def test_kl_at_each_token_and_the_score_at_the_last(self) -> None:
        scores = torch.tensor([10.0, -4.0, 100.0])
        rewards = token_rewards(scores, self.LOGPROBS, self.REFERENCE, MASK, kl_coef=0.1)
        # row 0: KL terms 1, 0, -2 -> -0.1, 0, 0.2 + 0.9 * 10
        # row 1: KL -0.5 -> 0.05 + 0.9 * -4; row 2 has no token and pays nothing
        torch.testing.assert_close(rewards, table([-0.1, 0, 9.2], [-3.55, 0, 0], [0, 0, 0]))

    @pytest.mark.parametrize(("kl_coef", "first"), [(0.0, [0.0, 0.0, 10.0]), (1.0, [-1.0, 0.0, 2.0])])
    def test_ends_of_the_range(self, kl_coef: float, first: list[float]) -> None:
        """kl_coef 0 pays the score alone, 1 the negative KL alone."""
        scores = torch.tensor([10.0, 0.0, 0.0])
        assert token_rewards(scores, self.LOGPROBS, self.REFERENCE, MASK, kl_coef=kl_coef)[0].tolist() == first

    def test_detached(self) -> None:
        logprobs, scores = self.LOGPROBS.clone().requires_grad_(), torch.ones(3, requires_grad=True)
        rewards = token_rewards(scores, logprobs, self.REFERENCE, MASK, kl_coef=0.5)
        assert not rewards.requires_grad
        assert not completion_kl(logprobs, self.REFERENCE, MASK).requires_grad

    def test_zero_tokens(self) -> None:
        empty = torch.zeros(2, 0)
        assert token_rewards(torch.ones(2), empty, empty, empty.bool(), kl_coef=0.1).shape == (2, 0)

    def test_kl_of_a_completion_is_the_sum_over_its_tokens(self) -> None:
        # 1 + 0 - 2, -0.5, nothing
        assert completion_kl(self.LOGPROBS, self.REFERENCE, MASK).tolist() == [-1.0, -0.5, 0.0]


def test_returns_to_go() -> None:
    # 1 + 2 + 4, 2 + 4, 4
    assert returns_to_go(table([1, 2, 4], [-3, 0, 0])).tolist() == [[7, 6, 4], [-3, 0, 0]]
    assert returns_to_go(torch.zeros(2, 0)).shape == (2, 0)


class TestGae:
    REWARDS = table([1, 2, 4], [-3, 0, 0], [0, 0, 0])
    VALUES = table([0.5, 1, 2], [1, 99, 99], [99, 99, 99])

    def test_lambda_one_is_return_minus_value(self) -> None:
        found = gae(self.REWARDS, self.VALUES, MASK, gae_lambda=1.0)
        # 7 - 0.5, 6 - 1, 4 - 2; -3 - 1
        torch.testing.assert_close(found, table([6.5, 5, 2], [-4, 0, 0], [0, 0, 0]))

    def test_lambda_zero_is_the_one_step_error(self) -> None:
        # 1 + 1 - 0.5, 2 + 2 - 1, 4 + 0 - 2; -3 + 0 - 1 (values after the end count 0)
        found = gae(self.REWARDS, self.VALUES, MASK, gae_lambda=0.0)
        torch.testing.assert_close(found, table([1.5, 3, 2], [-4, 0, 0], [0, 0, 0]))

    def test_lambda_half(self) -> None:
        # from the end: 2; 3 + 2 / 2 = 4; 1.5 + 4 / 2 = 3.5
        found = gae(self.REWARDS, self.VALUES, MASK, gae_lambda=0.5)
        torch.testing.assert_close(found, table([3.5, 4, 2], [-4, 0, 0], [0, 0, 0]))

    def test_no_gradient_reaches_the_values(self) -> None:
        assert not gae(self.REWARDS, self.VALUES.clone().requires_grad_(), MASK, gae_lambda=0.7).requires_grad

    @pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
    def test_one_token_and_none(self, gae_lambda: float) -> None:
        one = gae(table([3.0]), table([1.0]), torch.tensor([[True]]), gae_lambda=gae_lambda)
        assert one.tolist() == [[2.0]]
        empty = torch.zeros(2, 0)
        assert gae(empty, empty, empty.bool(), gae_lambda=gae_lambda).shape == (2, 0)


class TestGroupBaseline:
    TOTALS = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])

    def test_mean_of_the_others(self) -> None:
        # of 1, 2, 6: 8/2, 7/2, 3/2; equal rewards: the same number, so no advantage
        found = group_baseline(self.TOTALS, 3, baseline="leave_one_out")
        assert found.tolist() == [4.0, 3.5, 1.5, 4.0, 4.0, 4.0]

    def test_mean_of_the_group(self) -> None:
        assert group_baseline(self.TOTALS, 3, baseline="group_mean").tolist() == [3.0, 3.0, 3.0, 4.0, 4.0, 4.0]

    def test_one_completion_a_group(self) -> None:
        """The group's mean is then the completion itself; leaving it out leaves nothing, which the config refuses."""
        assert torch.equal(group_baseline(self.TOTALS, 1, baseline="group_mean"), self.TOTALS)
        assert group_baseline(self.TOTALS[:0], 3, baseline="leave_one_out").shape == (0,)
        with pytest.raises(AssertionError, match="two completions"):
            group_baseline(self.TOTALS, 1, baseline="leave_one_out")

    def test_completions_without_a_score_are_nobodys_baseline(self) -> None:
        """Of 1, 5, 3 the last has no score; of the other group only the first has one, and is its own baseline."""
        totals, scored = torch.tensor([1.0, 5, 3, 4, 7, 7]), torch.tensor([True, True, False, True, False, False])
        others = group_baseline(totals, 3, baseline="leave_one_out", scored=scored)
        assert others[scored].tolist() == [5.0, 1.0, 4.0]
        mean = group_baseline(totals, 3, baseline="group_mean", scored=scored)
        assert mean[scored].tolist() == [3.0, 3.0, 4.0]
        whole = torch.ones(6, dtype=torch.bool)
        assert torch.equal(
            group_baseline(totals, 3, baseline="leave_one_out", scored=whole),
            group_baseline(totals, 3, baseline="leave_one_out"),
        )


class TestNormalise:
    ADVANTAGES = table([1, 2, 3], [6, 50, 50], [50, 50, 50])

    def test_none_changes_nothing(self) -> None:
        assert torch.equal(normalise(self.ADVANTAGES, MASK, "none"), self.ADVANTAGES)

    def test_center_subtracts_the_mean_over_tokens(self) -> None:
        # (1 + 2 + 3 + 6) / 4 = 3, not the mean of row means (2 + 6) / 2
        assert normalise(self.ADVANTAGES, MASK, "center").tolist() == [[-2, -1, 0], [3, 0, 0], [0, 0, 0]]

    def test_whiten_also_divides_by_the_deviation(self) -> None:
        # variance (4 + 1 + 0 + 9) / 4 = 3.5
        expected = table([-2, -1, 0], [3, 0, 0], [0, 0, 0]) / 3.5**0.5
        torch.testing.assert_close(normalise(self.ADVANTAGES, MASK, "whiten"), expected)

    @pytest.mark.parametrize("value", [0.0, 0.3, 1.7, -1000.3])
    @pytest.mark.parametrize("tokens", [1, 3, 7, 11])
    def test_equal_advantages_whiten_to_zero(self, value: float, tokens: int) -> None:
        """The mean of equal float32 numbers is off by a rounding error, which must not be blown up to +-1."""
        equal = torch.full((1, tokens), value)
        assert not normalise(equal, torch.ones(1, tokens, dtype=torch.bool), "whiten").any()

    def test_rounding_left_by_a_baseline_is_not_whitened(self) -> None:
        rewards = torch.tensor([0.1, 0.1, 0.1 + 1e-8, 0.1])
        left = (rewards - group_baseline(rewards, 4, baseline="leave_one_out"))[:, None]
        assert not normalise(left, torch.ones(4, 1, dtype=torch.bool), "whiten").any()

    def test_small_but_real_differences_are_whitened(self) -> None:
        # mean 1.0005, deviation 0.0005
        found = normalise(table([1.0, 1.001]), torch.ones(1, 2, dtype=torch.bool), "whiten")
        torch.testing.assert_close(found, table([-1, 1]), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("how", ["none", "center", "whiten"])
    def test_no_tokens(self, how: str) -> None:
        empty = torch.zeros(2, 0)
        assert normalise(empty, empty.bool(), how).shape == (2, 0)  # pyright: ignore[reportArgumentType]
