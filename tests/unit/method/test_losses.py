"""Losses with numbers worked by hand. sigmoid(ln 3) = 3/4, so -log sigmoid(+-ln 3) = ln(4/3) and ln 4."""

import math

import pytest
import torch
from torch import Tensor

from perlhf.method.losses import (
    bradley_terry,
    completion_ratio,
    policy_loss,
    rating_cross_entropy,
    sft_loss,
    value_loss,
)

LN3, RIGHT, WRONG = math.log(3), math.log(4 / 3), math.log(4)


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def compare(
    chosen: Tensor,
    rejected: Tensor,
    *,
    weights: Tensor | None = None,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
    divisor: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    return bradley_terry(
        chosen,
        rejected,
        weights=torch.ones_like(chosen) if weights is None else weights,
        margins=torch.zeros_like(chosen) if margins is None else margins,
        label_smoothing=label_smoothing,
        divisor=divisor,
    )


def rate(
    scores: Tensor,
    labels: list[bool],
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    divisor: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    return rating_cross_entropy(
        scores,
        torch.tensor(labels, dtype=torch.bool),
        weights=torch.ones_like(scores) if weights is None else weights,
        label_smoothing=label_smoothing,
        divisor=divisor,
    )


class TestBradleyTerry:
    def test_right_and_wrong_pair(self) -> None:
        loss, metrics = compare(row(LN3, 0), row(0, LN3), divisor=2)
        assert loss.item() == pytest.approx((RIGHT + WRONG) / 2)
        assert metrics == {"right": 1.0, "count": 2.0}

    def test_a_tie_is_half_right(self) -> None:
        loss, metrics = compare(row(5, 1), row(5, 0))
        assert metrics == {"right": 1.5, "count": 2.0}
        # log sigmoid(0) = -ln 2; -log sigmoid(1) = ln(1 + e^-1)
        assert loss.item() == pytest.approx(math.log(2) + math.log(1 + math.exp(-1)))

    def test_weights_multiply_before_the_divisor(self) -> None:
        loss, _ = compare(row(LN3, 0), row(0, LN3), weights=row(2, 0.5), divisor=4)
        assert loss.item() == pytest.approx((2 * RIGHT + 0.5 * WRONG) / 4)

    def test_margin_is_subtracted_from_the_gap(self) -> None:
        # 2 ln 3 - 0 - ln 3 = ln 3, and ln 3 - 0 - 2 ln 3 = -ln 3
        loss, metrics = compare(row(2 * LN3, LN3), row(0, 0), margins=row(LN3, 2 * LN3))
        assert loss.item() == pytest.approx(RIGHT + WRONG)
        assert metrics["right"] == 2.0  # accuracy asks for the order, not for the margin

    def test_label_smoothing_mixes_in_the_swapped_pair(self) -> None:
        loss, _ = compare(row(LN3), row(0), label_smoothing=0.1)
        assert loss.item() == pytest.approx(0.9 * RIGHT + 0.1 * WRONG)

    def test_the_swapped_pair_has_its_margin_on_its_own_side(self) -> None:
        # gap 2 ln 3, margin ln 3: sigmoid(ln 3) = 3/4 as labelled, sigmoid(-3 ln 3) = 1/28 swapped
        loss, _ = compare(row(2 * LN3), row(0), margins=row(LN3), label_smoothing=0.1)
        assert loss.item() == pytest.approx(0.9 * RIGHT + 0.1 * math.log(28))

    @pytest.mark.parametrize("margin", [0.0, 1.5])
    def test_a_label_that_says_nothing_leaves_the_scores_equal(self, margin: float) -> None:
        # at eps = 1/2: (sigmoid(margin) - sigmoid(margin)) / 2 is the slope at gap 0
        chosen = row(0).requires_grad_()
        compare(chosen, row(0), margins=row(margin), label_smoothing=0.5)[0].backward()
        assert chosen.grad is not None and chosen.grad.item() == pytest.approx(0, abs=1e-7)

    def test_gradient_is_the_probability_of_being_wrong(self) -> None:
        # d/dgap -log sigmoid(gap) = -(1 - sigmoid(gap)) = -1/4 at gap ln 3, over divisor 2
        chosen, rejected = row(LN3).requires_grad_(), row(0).requires_grad_()
        compare(chosen, rejected, divisor=2)[0].backward()
        assert chosen.grad is not None and rejected.grad is not None
        assert chosen.grad.tolist() == pytest.approx([-0.125])
        assert rejected.grad.tolist() == pytest.approx([0.125])

    def test_huge_gaps_stay_finite(self) -> None:
        assert compare(row(1e4), row(0))[0].item() == 0
        assert compare(row(0), row(1e4))[0].item() == pytest.approx(1e4)

    def test_no_pair_is_no_loss(self) -> None:
        loss, metrics = compare(row(), row(), divisor=3)
        assert loss.item() == 0 and metrics == {"right": 0.0, "count": 0.0}


class TestRatings:
    def test_up_and_down(self) -> None:
        # up at ln 3: ln(4/3); down at ln 3: -log(1 - 3/4) = ln 4
        loss, metrics = rate(row(LN3, LN3), [True, False], divisor=2)
        assert loss.item() == pytest.approx((RIGHT + WRONG) / 2)
        assert metrics == {"right": 1.0, "count": 2.0}

    def test_the_second_term_is_log_of_one_minus_sigmoid(self) -> None:
        # the paper prints log sigmoid(1 - r), which at r = 0 would give ln(1 + e^-1) = 0.313
        assert rate(row(0), [False])[0].item() == pytest.approx(math.log(2))

    def test_weights(self) -> None:
        loss, _ = rate(row(LN3, LN3), [True, False], row(3, 0.5), divisor=2)
        assert loss.item() == pytest.approx((3 * RIGHT + 0.5 * WRONG) / 2)

    def test_label_smoothing_moves_both_labels_inwards(self) -> None:
        up, _ = rate(row(LN3), [True], label_smoothing=0.1)
        down, _ = rate(row(LN3), [False], label_smoothing=0.1)
        assert up.item() == pytest.approx(0.9 * RIGHT + 0.1 * WRONG)
        assert down.item() == pytest.approx(0.1 * RIGHT + 0.9 * WRONG)

    def test_gradient_is_probability_minus_label(self) -> None:
        scores = row(LN3, LN3).requires_grad_()
        rate(scores, [True, False])[0].backward()
        assert scores.grad is not None
        assert scores.grad.tolist() == pytest.approx([0.75 - 1, 0.75 - 0])

    def test_no_rating_is_no_loss(self) -> None:
        assert rate(row(), [])[0].item() == 0


class TestSft:
    def test_sums_only_completion_tokens(self) -> None:
        logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -9.0, -9.0]])
        mask = torch.tensor([[True, True, True], [True, False, False]])
        loss, metrics = sft_loss(logprobs, mask, weights=row(1, 2), divisor=4)
        assert loss.item() == pytest.approx((7 + 2 * 0.5) / 4)
        assert metrics == {"tokens": 4.0}

    def test_one_token_and_none(self) -> None:
        one = sft_loss(torch.tensor([[-3.0]]), torch.tensor([[True]]), weights=row(1), divisor=1)
        assert one[0].item() == 3.0
        none, metrics = sft_loss(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), weights=row(1, 1), divisor=1)
        assert none.item() == 0 and metrics == {"tokens": 0.0}

    def test_masked_infinity_does_no_harm(self) -> None:
        logprobs = torch.tensor([[-1.0, -math.inf]], requires_grad=True)
        loss, _ = sft_loss(logprobs, torch.tensor([[True, False]]), weights=row(1), divisor=1)
        loss.backward()
        assert loss.item() == 1.0 and logprobs.grad is not None and logprobs.grad.tolist() == [[-1.0, 0.0]]


def ratios(*values: float) -> Tensor:
    return torch.tensor([values]).log().requires_grad_()


class TestPolicy:
    MASK = torch.tensor([[True, True, True], [True, False, False]])

    def test_reinforce(self) -> None:
        logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], requires_grad=True)
        advantages = torch.tensor([[0.5, -1.0, 2.0], [3.0, 100.0, 100.0]])
        loss, metrics = policy_loss(logprobs, torch.zeros(2, 3), advantages, self.MASK, clip=None, divisor=2)
        # -( -0.5 + 2 - 6 - 12 ) / 2
        assert loss.item() == pytest.approx(16.5 / 2)
        loss.backward()
        assert logprobs.grad is not None
        assert logprobs.grad.tolist() == [[-0.25, 0.5, -1.0], [-1.5, 0.0, 0.0]]
        assert metrics == {"clipped": 0.0}

    def test_no_gradient_through_advantage_or_old_logprobs(self) -> None:
        logprobs, old, advantages = (torch.full((1, 1), v, requires_grad=True) for v in (-1.0, -1.5, 2.0))
        for clip in (None, 0.9):
            loss, _ = policy_loss(logprobs, old, advantages, torch.tensor([[True]]), clip=clip, divisor=1)
            loss.backward()
        assert logprobs.grad is not None and old.grad is None and advantages.grad is None

    @pytest.mark.parametrize(
        ("ratio", "advantage", "objective", "slope", "clipped"),
        [
            (1.5, 2.0, 2.4, 0.0, 1.0),  # min(3, 1.2 * 2)
            (1.5, -2.0, -3.0, -3.0, 0.0),  # min(-3, -2.4)
            (0.5, 2.0, 1.0, 1.0, 0.0),  # min(1, 0.8 * 2)
            (0.5, -2.0, -1.6, 0.0, 1.0),  # min(-1, -1.6)
            (1.1, 2.0, 2.2, 2.2, 0.0),  # inside
        ],
    )
    def test_clip(self, ratio: float, advantage: float, objective: float, slope: float, clipped: float) -> None:
        logprobs = ratios(ratio)
        zeros, mask = torch.zeros(1, 1), torch.tensor([[True]])
        loss, metrics = policy_loss(logprobs, zeros, torch.tensor([[advantage]]), mask, clip=0.2, divisor=4)
        loss.backward()
        assert loss.item() == pytest.approx(-objective / 4)
        # d ratio / d logprob = ratio
        assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(-slope / 4)
        assert metrics["clipped"] == clipped

    def test_clip_at_ratio_one_has_the_gradient_of_reinforce(self) -> None:
        old = torch.tensor([[-1.0, -0.25, -2.0], [-3.0, -1.0, -1.0]])
        advantages = torch.tensor([[0.5, -1.0, 2.0], [-3.0, 100.0, 100.0]])
        gradients = []
        for clip in (None, 0.2):
            logprobs = old.clone().requires_grad_()
            policy_loss(logprobs, old, advantages, self.MASK, clip=clip, divisor=2)[0].backward()
            gradients.append(logprobs.grad)
        # -advantage / 2 where the mask is True
        assert gradients[0].tolist() == [[-0.25, 0.5, -1.0], [1.5, 0.0, 0.0]]
        assert torch.equal(gradients[0], gradients[1])

    def test_a_clipped_token_outside_the_mask_is_not_counted(self) -> None:
        logprobs = torch.tensor([[0.0, 5.0]])
        mask = torch.tensor([[True, False]])
        assert policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), mask, clip=0.2, divisor=1)[1] == {
            "clipped": 0
        }

    def test_zero_tokens(self) -> None:
        empty = torch.zeros(2, 0)
        loss, _ = policy_loss(empty, empty, empty, empty.bool(), clip=0.2, divisor=2)
        assert loss.item() == 0


class TestValue:
    def test_squared_error_of_completion_tokens(self) -> None:
        values = torch.tensor([[1.0, 2.0], [3.0, 50.0]], requires_grad=True)
        returns = torch.tensor([[0.0, 4.0], [2.5, 0.0]], requires_grad=True)
        mask = torch.tensor([[True, True], [True, False]])
        loss, metrics = value_loss(values, returns, mask, divisor=2)
        assert loss.item() == pytest.approx((1 + 4 + 0.25) / 2)
        assert metrics == {"squared_error": 5.25}
        loss.backward()
        # 2 (V - Z) / 2, and none to the returns
        assert values.grad is not None and values.grad.tolist() == [[1.0, -2.0], [0.5, 0.0]]
        assert returns.grad is None

    def test_zero_tokens(self) -> None:
        assert value_loss(torch.zeros(1, 0), torch.zeros(1, 0), torch.zeros(1, 0).bool(), divisor=1)[0].item() == 0


@pytest.mark.parametrize("clip", [None, 0.1])
def test_losses_of_micro_batches_add_up(clip: float | None) -> None:
    """The divisor is the update's, so parts of unequal size need no weights of their own."""
    draw = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(7, 5, generator=draw) for _ in range(3))
    mask = torch.arange(5)[None] < torch.tensor([5, 1, 0, 3, 2, 5, 4])[:, None]
    weights, margins = torch.rand(7, generator=draw), torch.rand(7, generator=draw)

    def losses(rows: slice) -> Tensor:
        x, y, z, m, w = a[rows], b[rows], c[rows], mask[rows], weights[rows]
        found = [
            bradley_terry(x[:, 0], y[:, 0], weights=w, margins=margins[rows], label_smoothing=0.1, divisor=7)[0],
            rating_cross_entropy(x[:, 0], y[:, 0] > 0, weights=w, label_smoothing=0.1, divisor=7)[0],
            sft_loss(x, m, weights=w, divisor=20)[0],
            policy_loss(x, y, z, m, clip=clip, divisor=7)[0],
            value_loss(x, y, m, divisor=7)[0],
        ]
        return torch.stack(found)

    whole = losses(slice(0, 7))
    parts = losses(slice(0, 1)) + losses(slice(1, 5)) + losses(slice(5, 7))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert whole.abs().min() > 1e-3


class TestRatio:
    def test_by_hand(self):
        """exp(0.5 - 0.2 + (-1) - (-0.7)) = 1; exp(0.3) where the second token doesn't count; no token leaves 1."""
        now = torch.tensor([[0.5, -1.0], [0.3, 9.0], [5.0, 5.0]])
        then = torch.tensor([[0.2, -0.7], [0.0, 0.0], [0.0, 0.0]])
        mask = torch.tensor([[True, True], [True, False], [False, False]])
        assert torch.allclose(completion_ratio(now, then, mask, limit=None), torch.tensor([1.0, math.exp(0.3), 1.0]))
        assert torch.allclose(completion_ratio(now, then, mask, limit=1.2), torch.tensor([1.0, 1.2, 1.0]))

    def test_makes_an_expectation_under_one_policy_one_under_another(self):
        """Completions of two tokens out of two, the second's chances hang on the first: all four are gone through."""
        first = {"policy": (0.3, 0.7), "sampler": (0.6, 0.4)}
        second = {"policy": ((0.2, 0.8), (0.9, 0.1)), "sampler": ((0.5, 0.5), (0.3, 0.7))}
        ways = [(a, b) for a in (0, 1) for b in (0, 1)]
        logs = {
            who: torch.tensor([[math.log(first[who][a]), math.log(second[who][a][b])] for a, b in ways])
            for who in ("policy", "sampler")
        }
        worth, chances = torch.tensor([1.0, -2.0, 3.0, 5.0]), {who: log.sum(-1).exp() for who, log in logs.items()}
        ratio = completion_ratio(logs["policy"], logs["sampler"], torch.ones(4, 2, dtype=torch.bool), limit=None)
        expected = 0.3 * 0.2 * 1 + 0.3 * 0.8 * -2 + 0.7 * 0.9 * 3 + 0.7 * 0.1 * 5
        assert (chances["sampler"] * ratio * worth).sum().item() == pytest.approx(expected, abs=1e-6)
        of_tokens = (logs["policy"] - logs["sampler"])[:, 1].exp()
        assert (chances["sampler"] * of_tokens * worth).sum().item() != pytest.approx(expected, abs=0.1)


def test_values_are_weighed():
    values, returns, mask = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2), torch.ones(2, 2).bool()
    values[1, 0] = 3.0
    loss, _ = value_loss(values, returns, mask, divisor=2, weights=torch.tensor([0.5, 2.0]))
    assert loss.item() == pytest.approx((0.5 * 5 + 2 * 9) / 2)
