"""How an update is cut into forward passes changes nothing: packed = padded, and 1x8 = 8x1 for gradients.

The policy's accumulation is in test_policy_objective.py.
"""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny_models import END, answers, apart, open_model, random_ids, randomise
from torch import Tensor
from torch.nn import functional as F

from perlhf.config.stages import OptimConfig, RewardConfig, SftConfig
from perlhf.method.packing import Packing, Tokens, batches, completed, pack
from perlhf.model.model import Model
from perlhf.training import optim
from perlhf.training import reward as reward_stage
from perlhf.training import sft as sft_stage

# With beta1 = 0 AdamW's first moment is the gradient itself, as long as nothing is clipped.
PLAIN = OptimConfig(beta1=0.0, max_grad_norm=1e9)
CUTS = [(10_000, "none"), (1, "none"), (40, "none"), (10_000, "tree"), (1, "tree"), (40, "tree")]

# Two prompts with several completions each, and one conversation that goes on.
ROOT_A, ROOT_B = random_ids([9, 4], seed=5)
TAILS = [[*ids, END] for ids in random_ids([3, 6, 1, 5, 2, 4], seed=6)]
SEQUENCES = [
    [*ROOT_A, *TAILS[0]],
    [*ROOT_A, *TAILS[1]],
    [*ROOT_A, *TAILS[0], *TAILS[2]],
    [*ROOT_B, *TAILS[3]],
    [*ROOT_B, *TAILS[4]],
    [*ROOT_B, *TAILS[3]],
    [*ROOT_A, *TAILS[0], *TAILS[5]],
    TAILS[5],
]


def gradients(optimizer: torch.optim.AdamW) -> list[Tensor]:
    return [optimizer.state[p]["exp_avg"] for group in optimizer.param_groups for p in group["params"]]


def check_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 5e-5 * other.norm()


class TestPacking:
    """`tree` against its slow twin `none`, values and gradients, on sequences that share much."""

    @staticmethod
    def results(directory: Path, what: str, packing: Packing, targets: str) -> list[Tensor]:
        model = open_model(directory)
        adapter = model.add_adapter("a", "value", rank=4, targets=targets)
        randomise(model, "a")
        # prompts of equal and different lengths, completions of one token among them
        prompts = [ids[: len(ids) // 2] for ids in SEQUENCES]
        completions = [ids[len(ids) // 2 :] for ids in SEQUENCES]
        if what == "scores":
            out = model.scores(apart(SEQUENCES, packing=packing), "a")
        elif what == "values":
            out = model.values(answers(prompts, completions, packing=packing), "a")
        else:
            out = model.logprobs(answers(prompts, completions, packing=packing), "a", temperature=0.7).logprobs
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        (out * weights).sum().backward()
        return [out.detach(), *(p.grad for p in adapter.trainable() if p.grad is not None)]

    @pytest.mark.parametrize("targets", ["attention", "all"])
    @pytest.mark.parametrize("what", ["scores", "values", "logprobs"])
    def test_tree_is_none(self, tiny_base: Path, what: str, targets: str) -> None:
        found = self.results(tiny_base, what, "tree", targets)
        expected = self.results(tiny_base, what, "none", targets)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
        check_close(found, expected)

    def test_a_sequence_scores_the_same_in_any_company(self, model: Model) -> None:
        model.add_adapter("a", "reward", rank=4)
        randomise(model, "a")
        together = model.scores(apart(SEQUENCES), "a")
        alone = torch.cat([model.scores(apart([ids], packing="none"), "a") for ids in SEQUENCES])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
        assert together[3] == together[5]

    def test_one_token(self, model: Model) -> None:
        model.add_adapter("a", "reward", rank=2)
        randomise(model, "a")
        torch.testing.assert_close(
            model.scores(apart([[5]]), "a"), model.scores(apart([[5], [5, 6]], packing="none"), "a")[:1]
        )


class TestReward:
    ITEMS = (
        reward_stage.Item((Tokens(SEQUENCES[0]), Tokens(SEQUENCES[1])), None, 1.0, 0.5, "a"),
        reward_stage.Item((Tokens(SEQUENCES[3]), Tokens(SEQUENCES[4])), None, 2.0, 0.0, "b"),
        reward_stage.Item((Tokens(SEQUENCES[6]), Tokens(SEQUENCES[2])), None, 1.0, 1.0, "a"),
        *(
            reward_stage.Item((Tokens(SEQUENCES[i]),), label, weight, 0.0, group)
            for i, label, weight, group in (
                (0, True, 1.0, "a"),
                (2, False, 1.0, "a"),
                (3, True, 0.5, "b"),
                (5, False, 1.0, "b"),
                (7, True, 1.0, "c"),
            )
        ),
    )
    CLASS_WEIGHT: ClassVar = {True: 0.8, False: 1.25}
    SHARES = reward_stage.Shares(0.25, 0.75)
    """Of the whole set: eight of its records hold 2 comparisons and 6 ratings on average, here 3 and 5."""

    def update(self, directory: Path, max_tokens: int, packing: Packing) -> tuple[dict[str, float], list[Tensor]]:
        model = open_model(directory)
        adapter = model.add_adapter(reward_stage.NAME, "reward", rank=4)
        randomise(model, reward_stage.NAME)
        config = RewardConfig(
            tokens_per_microbatch=max_tokens,
            packing=packing,
            optim=PLAIN,
            label_smoothing=0.1,
            margin=0.7,
            comparison_weight=0.5,
            rating_weight=2.0,
        )
        optimizer = optim.build({"x": (adapter.trainable_by_name(), 1e-3)}, config.optim)["x"]
        given = model, [adapter], {adapter.name: optimizer}, self.ITEMS, self.CLASS_WEIGHT, self.SHARES
        return reward_stage._update(*given, 1, 10, config), gradients(optimizer)

    def by_formula(self, directory: Path) -> tuple[float, list[Tensor]]:
        """Every sequence alone, the loss written out for the whole update."""
        model = open_model(directory)
        adapter = model.add_adapter(reward_stage.NAME, "reward", rank=4)
        randomise(model, reward_stage.NAME)
        total = torch.zeros(())
        for item in self.ITEMS:
            scores = [
                model.scores(apart([tokens.ids], packing="none"), reward_stage.NAME)[0] for tokens in item.sequences
            ]
            if item.label is None:
                gap, margin = scores[0] - scores[1], 0.7 * item.margin
                loss = 0.9 * F.softplus(margin - gap) + 0.1 * F.softplus(margin + gap)
                total = total + 0.5 * item.weight * loss / 2
            else:
                up = 0.9 if item.label else 0.1
                loss = up * F.softplus(-scores[0]) + (1 - up) * F.softplus(scores[0])
                total = total + 2.0 * item.weight * self.CLASS_WEIGHT[item.label] * loss / 6
        total.backward()
        return total.item(), [p.grad for p in adapter.trainable() if p.grad is not None]

    @pytest.mark.parametrize(("max_tokens", "packing"), CUTS)
    def test_update(self, tiny_base: Path, max_tokens: int, packing: Packing) -> None:
        loss, expected = self.by_formula(tiny_base)
        values, found = self.update(tiny_base, max_tokens, packing)
        assert values["loss"] == pytest.approx(loss, rel=1e-5)
        assert values["examples"] == 8 and values["groups"] == 3
        check_close(found, expected)


class TestSft:
    ITEMS = tuple(
        sft_stage.Item(completed(ids[:-cut], ids[-cut:]), weight, "g")
        for ids, cut, weight in zip(
            SEQUENCES, (4, 7, 2, 6, 3, 1, 5, 4), (1.0, 1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 1.0), strict=True
        )
    )

    def by_formula(self, directory: Path) -> tuple[float, list[Tensor]]:
        model = open_model(directory)
        adapter = model.add_adapter(sft_stage.NAME, "sft", rank=4)
        randomise(model, sft_stage.NAME)
        tokens = sum(length for item in self.ITEMS for _, length in item.tokens.completions)
        assert tokens == 4 + 7 + 2 + 6 + 3 + 1 + 5 + 4
        total = torch.zeros(())
        for item in self.ITEMS:
            out = model.logprobs(pack([[item.tokens]], "none"), sft_stage.NAME)
            total = total - item.weight * out.logprobs.sum() / tokens
        total.backward()
        return total.item(), [p.grad for p in adapter.trainable() if p.grad is not None]

    @pytest.mark.parametrize(("max_tokens", "packing"), CUTS)
    def test_update(self, tiny_base: Path, max_tokens: int, packing: Packing) -> None:
        loss, expected = self.by_formula(tiny_base)
        model = open_model(tiny_base)
        adapter = model.add_adapter(sft_stage.NAME, "sft", rank=4)
        randomise(model, sft_stage.NAME)
        config = SftConfig(tokens_per_microbatch=max_tokens, packing=packing, optim=PLAIN)
        optimizer = optim.build({"x": (adapter.trainable_by_name(), 1e-3)}, config.optim)["x"]
        values = sft_stage._update(model, adapter, optimizer, self.ITEMS, 1, 10, config)
        assert values["loss"] == pytest.approx(loss, rel=1e-5)
        check_close(gradients(optimizer), expected)

    @pytest.mark.parametrize("packing", ["none", "tree"])
    def test_validation_loss_is_a_mean_over_tokens(self, model: Model, packing: Packing) -> None:
        model.add_adapter(sft_stage.NAME, "sft", rank=4)
        examples = [[item.tokens] for item in self.ITEMS]
        whole, parts = (
            sft_stage.validation_loss(model, batches(examples, max_tokens, packing)) for max_tokens in (10_000, 1)
        )
        with torch.no_grad():
            out = [model.logprobs(pack([example], "tree"), None).logprobs.sum().item() for example in examples]
        assert whole == pytest.approx(-sum(out) / 32, rel=1e-5) and parts == pytest.approx(whole, rel=1e-5)
