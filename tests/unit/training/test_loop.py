"""What the stages share: encoding, which adapter starts from what, an optimiser step, saving and restoring."""

import contextlib
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import answers, apart, digest, open_encoder, open_model, randomise

from perlhf.config.stages import AdapterConfig, DataConfig, EncodingConfig, OptimConfig, RewardConfig, SftConfig
from perlhf.data.records import Comparison, Demonstration, Rating
from perlhf.data.splits import split_of
from perlhf.data.store import hold
from perlhf.data.tools import validate
from perlhf.errors import AdapterError, ConfigError, DataError, DivergenceError
from perlhf.method import linear_probe
from perlhf.model.encoding.encode import TooLong
from perlhf.model.model import Model
from perlhf.model.open import new_adapter
from perlhf.rollout.scorers import score_batches
from perlhf.runs.run import open_run
from perlhf.training import loop, optim
from perlhf.training import reward as reward_stage
from perlhf.training import sft as sft_stage
from perlhf.training.loop import Keeper

TEMPLATE_WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}"
)
PROMPT = 20  # tokens of "hi" in ChatML; "yes" and its end token make 4


@pytest.fixture
def model(tiny_base: Path) -> Model:
    torch.set_num_threads(1)
    return open_model(tiny_base)


class TestEncodeAll:
    RECORDS = tuple(
        Demonstration("hi", text, "group", source=f"a:{line}")
        for line, text in enumerate(("yes", "longer", "x" * 40), 1)
    )

    def test_counts_what_is_cut_and_dropped(self, tiny_base: Path) -> None:
        encoder = open_encoder(tiny_base, EncodingConfig(max_tokens=PROMPT + 4))
        examples, counts = loop.encode_all(encoder, self.RECORDS, drop_long=True)
        assert counts == {"cut_prompts": 1, "dropped_long": 1}
        assert examples[0] is not None and examples[0][0].cut == 0
        assert examples[1] is not None and examples[1][0].cut > 0
        assert examples[2] is None

    def test_both_sides_of_a_comparison_keep_the_same_prompt(self, tiny_base: Path) -> None:
        encoder = open_encoder(tiny_base, EncodingConfig(max_tokens=PROMPT + 4))
        examples, counts = loop.encode_all(encoder, [Comparison("hi", "no", "longer", "group")], drop_long=False)
        assert counts == {"cut_prompts": 1, "dropped_long": 0}
        assert examples[0] is not None
        short, long = examples[0]
        assert short.prompt == long.prompt == tuple(encoder.prompt("hi")[long.cut :])
        assert long.cut > 0

    def test_too_long_is_an_error_unless_asked_otherwise(self, tiny_base: Path) -> None:
        encoder = open_encoder(tiny_base, EncodingConfig(max_tokens=PROMPT + 4))
        with pytest.raises(TooLong, match="a:3"):
            loop.encode_all(encoder, self.RECORDS, drop_long=False)

    def test_nothing_left(self, tiny_base: Path) -> None:
        encoder = open_encoder(tiny_base, EncodingConfig(max_tokens=3))
        with pytest.raises(DataError, match="every example is longer"):
            loop.encode_all(encoder, self.RECORDS, drop_long=True)


class TestFitting:
    """What is found from bytes and few tokens is what tokenising everything finds."""

    @pytest.mark.parametrize("max_tokens", [PROMPT + 4, 60, 200, 400])
    @pytest.mark.parametrize("seed", range(3))
    def test_as_encode_all_counts_and_drops(self, tiny_base: Path, max_tokens: int, seed: int) -> None:
        encoder, draw = open_encoder(tiny_base, EncodingConfig(max_tokens=max_tokens)), random.Random(seed)
        chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "é" * draw.randint(1, 90)})
        records = [
            Comparison(
                draw.choice(["x" * draw.randint(1, 150), (*chat, *chat[:1])]),
                "y" * draw.randint(1, 90),
                "z" * draw.randint(1, 90),
                "g",
                source=f"a:{line}",
            )
            for line in range(40)
        ]
        encoded, expected = loop.encode_all(encoder, records, drop_long=True)
        fitting, counts = loop.fitting(encoder, hold(records), drop_long=True)
        assert counts == expected
        assert fitting == [record for record, examples in zip(records, encoded, strict=True) if examples is not None]
        items, _ = reward_stage.encode_items(open_encoder(tiny_base, EncodingConfig(max_tokens=400)), fitting)
        assert [items[i].sequences for i in range(len(items))] == [item.sequences for item in items]
        if expected["dropped_long"]:
            with pytest.raises(TooLong, match="a:"):
                loop.fitting(encoder, hold(records), drop_long=False)

    def test_few_texts_are_tokenised(self, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = open_encoder(tiny_base, EncodingConfig(max_tokens=400))
        seen: list[Any] = []
        examples = encoder.examples
        monkeypatch.setattr(encoder, "examples", lambda *given: (seen.append(given[2:3]), examples(*given))[1])
        records = [
            Demonstration(f"{line}", "x" * (390 if line == 7 else 3), "g", source=f"{line}") for line in range(50)
        ]
        items, counts = sft_stage.encode_items(encoder, records)
        assert [where for where in seen if where] == [("0",), ("7",)] and counts["cut_prompts"] == 1
        assert len(items) == 50 and items[49].tokens == examples("49", ["xxx"])[0].tokens and seen[-1] == ("49",)

    def test_a_template_that_refuses_a_conversation_says_so_before_training(
        self, tiny_base: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "chat.jinja").write_text(TEMPLATE_WITHOUT_SYSTEM)
        encoder = open_encoder(tiny_base, EncodingConfig(template=str(tmp_path / "chat.jinja"), max_tokens=256))
        system = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"})
        records = [Demonstration("hi", "yes", "g"), Demonstration(system, "yes", "g")]
        with pytest.raises(DataError, match="no system role here"):
            loop.fitting(encoder, hold(records), drop_long=False)


class TestSides:
    @staticmethod
    def config(path: Path, rows: list[dict[str, Any]], **data: Any) -> RewardConfig:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return RewardConfig(data=DataConfig(paths=(str(path),), **data))

    def test_what_validate_warns_of_is_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(40)]
        config = self.config(tmp_path / "a.jsonl", [*rows, rows[0], {"prompt": "1", "chosen": "b", "rejected": "a"}])
        loop.tell(loop.read_sides(config, ("comparison",)))
        told = capsys.readouterr().err.splitlines()
        assert told == [f"warning: {warning}" for warning in validate(config.data.paths).warnings]
        assert told[0] == "warning: 1 records repeat another one exactly" and len(told) == 2

    def test_a_test_side_without_records_is_an_error_unless_none_is_wanted(self, tmp_path: Path) -> None:
        rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(20)]
        config = self.config(tmp_path / "a.jsonl", rows, validation=0.5, test=0.0001)
        with pytest.raises(DataError, match="the test split is empty") as caught:
            loop.read_sides(config, ("comparison",))
        assert "set it to 0" in (caught.value.hint or "")
        assert (
            loop.read_sides(self.config(tmp_path / "a.jsonl", rows, validation=0.5, test=0), ("comparison",)).test
            is None
        )

    def test_what_the_evaluation_would_leave_out_is_told(self, tmp_path: Path) -> None:
        names = [f"{n}" for n in range(60)]
        test = [name for name in names if split_of(name, DataConfig()) == "test"]
        rows = [
            {"prompt": "p", "completion": f"{name} {up}", "label": up, "group": name}
            for name in names
            if name not in test
            for up in (True, False)
        ]
        for groups, told in ((test, False), (test[:1], True)):
            more = [{"prompt": "p", "completion": name, "label": False, "group": name} for name in groups]
            sides = loop.read_sides(self.config(tmp_path / "a.jsonl", [*rows, *more]), ("rating",))
            count = f"all {len(groups)} ratings of the test side are false: `perlhf evaluate` will give no AUC"
            single = "the test side is a single group: `perlhf evaluate` will give no intervals"
            assert list(sides.warnings) == ([single] if told else []) + [count]

    def test_long_test_answers_are_found(self, tiny_base: Path, tmp_path: Path) -> None:
        rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(40)]
        config = self.config(tmp_path / "a.jsonl", rows)
        number = next(n for n in range(40) if split_of(f"{n}", config.data) == "test")
        rows[number]["chosen"] = "x" * 300
        config = self.config(tmp_path / "a.jsonl", rows)
        sides = loop.read_sides(config, ("comparison",))
        with pytest.raises(TooLong, match=f"a.jsonl:{number + 1}"):
            loop.check_test_side(open_encoder(tiny_base), sides)
        loop.check_test_side(open_encoder(tiny_base, EncodingConfig(max_tokens=256, drop_long=True)), sides)

    def test_slow_validation_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        loop.note_slow_validation(RewardConfig(), 4 * 20 * 16)
        assert capsys.readouterr().err == ""
        loop.note_slow_validation(RewardConfig(), 100_000)
        assert "100000 held-out records are validated every 20 updates" in capsys.readouterr().err

    def test_select_that_the_held_out_records_cannot_give(self) -> None:
        rated, compared = hold([Rating("p", "a", True, "g")]), hold([Comparison("p", "a", "b", "g")])
        both = hold([Rating("p", "a", True, "g"), Rating("p", "a", False, "g")])
        for select, records in (("auto", rated), ("loss", rated), ("auc", both), ("pairwise_accuracy", compared)):
            reward_stage.check_select(RewardConfig(select=select), records)  # pyright: ignore[reportArgumentType]
        for records, allowed in ((rated, "loss"), (compared, "loss, pairwise_accuracy")):
            with pytest.raises(DataError, match="give no auc") as caught:
                reward_stage.check_select(RewardConfig(select="auc"), records)
            assert caught.value.allowed == allowed


class TestNewAdapter:
    @pytest.fixture
    def with_sft(self, model: Model) -> Model:
        model.add_adapter("sft", "sft", rank=4, alpha=8.0, dropout=0.3)
        randomise(model, "sft")
        model.freeze("sft")
        return model

    def test_same_shape_is_a_copy(self, with_sft: Model) -> None:
        config = RewardConfig(adapter=AdapterConfig(rank=4, alpha=8.0, dropout=0.1))
        adapter = new_adapter(with_sft, "reward_0", "reward", config, start="sft")
        assert adapter.beneath is None
        source = with_sft.adapters["sft"].tensors()
        assert all(torch.equal(t, source[key]) for key, t in adapter.tensors().items() if key in source)
        # Its dropout is what its own recipe says, not what SFT had.
        assert adapter.dropout == 0.1 and {p.dropout for p in adapter.pairs.values()} == {0.1}
        assert {p.dropout for p in with_sft.adapters["sft"].pairs.values()} == {0.3}

    @pytest.mark.parametrize(
        "shape",
        [
            AdapterConfig(rank=2, alpha=8.0),
            AdapterConfig(rank=4, alpha=4.0),
            AdapterConfig(rank=4, alpha=8.0, targets="all"),
        ],
    )
    def test_another_shape_is_new_over_it(self, with_sft: Model, shape: AdapterConfig) -> None:
        adapter = new_adapter(with_sft, "reward_0", "reward", RewardConfig(adapter=shape), start="sft")
        assert adapter.beneath == "sft" and adapter.rank == shape.rank
        assert not any(pair.b.any() for pair in adapter.pairs.values())

    def test_without_a_start(self, model: Model) -> None:
        config = SftConfig(adapter=AdapterConfig(rank=3, dropout=0.2))
        adapter = new_adapter(model, "sft", "sft", config)
        assert adapter.beneath is None and adapter.score_head is None and adapter.dropout == 0.2
        assert not any(pair.b.any() for pair in adapter.pairs.values())

    def test_depends_on_seed_and_name_alone(self, model: Model, tiny_base: Path) -> None:
        def first(where: Model, name: str, seed: int) -> torch.Tensor:
            config = SftConfig(seed=seed, adapter=AdapterConfig(rank=3))
            return next(iter(new_adapter(where, name, "sft", config).pairs.values())).a

        other = open_model(tiny_base)
        torch.rand(7)  # the global generator has no say
        one = first(model, "a", 0)
        assert torch.equal(one, first(other, "a", 0))
        assert not torch.equal(one, first(model, "b", 0)) and not torch.equal(one, first(model, "c", 1))

    def test_full_tuning(self, with_sft: Model) -> None:
        config = RewardConfig(tuning="full")
        merged = new_adapter(with_sft, "full_sft", "sft", config, start="sft")
        assert merged.weights and not merged.pairs and merged.beneath is None
        copy = new_adapter(with_sft, "reward_0", "reward", config, start="full_sft")
        assert all(torch.equal(copy.weights[name], w) for name, w in merged.weights.items())
        assert copy.score_head is not None and not copy.score_head.any()

    def test_lora_on_a_fully_tuned_start_is_refused(self, model: Model) -> None:
        """An adapter directory could not hold both; saved alone, the LoRA part would load onto the wrong network."""
        model.add_adapter("sft", "sft", tuning="full")
        with pytest.raises(ConfigError, match="tuning: lora can't start"):
            new_adapter(model, "reward_0", "reward", RewardConfig(), start="sft")

    def test_misspelt_target(self, model: Model) -> None:
        with pytest.raises(AdapterError, match="q_porj"):
            new_adapter(model, "sft", "sft", SftConfig(adapter=AdapterConfig(targets=("q_porj",))))


class TestOptimiserStep:
    def test_clips_steps_and_clears(self, model: Model) -> None:
        adapter = model.add_adapter("sft", "sft", rank=2)
        optimizer = optim.build({"x": (adapter.trainable_by_name(), 9.9)}, OptimConfig(beta1=0.0))["x"]
        before = [p.detach().clone() for p in adapter.trainable()]
        for parameter in adapter.trainable():
            parameter.grad = torch.ones_like(parameter)
        count = sum(p.numel() for p in adapter.trainable())
        norm = loop.optimiser_step(optimizer, adapter, 0.01, 0.5)
        assert norm == pytest.approx(math.sqrt(count), rel=1e-5)
        # AdamW's first step is the learning rate against the gradient's sign, whatever its size
        for parameter, old in zip(adapter.trainable(), before, strict=True):
            torch.testing.assert_close(parameter.detach(), old - 0.01, rtol=0, atol=1e-5)
            assert parameter.grad is None
        assert optimizer.state[adapter.trainable()[0]]["exp_avg"].max().item() == pytest.approx(0.5 / math.sqrt(count))

    def test_a_gradient_that_is_not_finite_changes_nothing(self, model: Model) -> None:
        adapter = model.add_adapter("sft", "sft", rank=2)
        optimizer = optim.build({"x": (adapter.trainable_by_name(), 0.1)}, OptimConfig())["x"]
        before = digest(model, "sft")
        for parameter in adapter.trainable():
            parameter.grad = torch.full_like(parameter, math.inf)
        with pytest.raises(DivergenceError, match="gradient norm"):
            loop.optimiser_step(optimizer, adapter, 0.1, 1.0)
        assert digest(model, "sft") == before

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_check_bounded(self, value: float) -> None:
        loop.check_bounded("loss", 1e30, 3)
        loop.check_bounded("loss", 100.0, 3, 100.0)
        with pytest.raises(DivergenceError, match=r"loss is .* at update 3"):
            loop.check_bounded("loss", value, 3)
        with pytest.raises(DivergenceError, match=r"loss is 100\.1 at update 3"):
            loop.check_bounded("loss", 100.1, 3, 100.0)


class TestSaved:
    def test_restore_puts_back_weights_optimiser_best_and_state(
        self, model: Model, tiny_base: Path, tmp_path: Path
    ) -> None:
        config = SftConfig(run=tmp_path / "run")

        def opened(where: Model):
            adapter = where.add_adapter("sft", "sft", rank=2)
            return optim.build({"sft": (adapter.trainable_by_name(), 1e-2)}, config.optim)

        def learn(where: Model, optimizer: torch.optim.AdamW, times: int) -> None:
            for _ in range(times):
                where.logprobs(answers([[5, 6]], [[7, 8, 9]]), "sft").logprobs.sum().backward()
                loop.optimiser_step(optimizer, where.adapters["sft"], 1e-2, 1.0)

        with open_run(config.run, "sft", config, {}) as run:
            assert loop.restore(run, model, {}) == (0, Keeper(), {})
            optimizers = opened(model)
            learn(model, optimizers["sft"], 2)
            best = Keeper(2, 0.75, {"loss": 0.5})
            loop.save(run, 2, model, optimizers, best, {"tokens": 12})
            best_digest = digest(model, "sft")
            learn(model, optimizers["sft"], 1)
            loop.save(run, 3, model, optimizers, best, {"tokens": 18})
            saved_digest = digest(model, "sft")
            learn(model, optimizers["sft"], 2)

            other = open_model(tiny_base)
            again = opened(other)
            step, found, state = loop.restore(run, other, again)
            assert (step, found, state["tokens"]) == (3, best, 18)
            assert digest(other, "sft") == saved_digest
            learn(other, again["sft"], 2)
            assert digest(other, "sft") == digest(model, "sft")
            loop.restore_best(run.path, 9, best, [other.adapters["sft"]])
            assert digest(other, "sft") == best_digest

    def test_a_checkpoint_before_any_validation(self, model: Model, tmp_path: Path) -> None:
        with open_run(tmp_path / "run", "sft", SftConfig(run=tmp_path / "run"), {}) as run:
            loop.save(run, 2, model, {}, Keeper(), {})
            assert loop.restore(run, model, {}) == (2, Keeper(), {})

    def test_the_keeper_takes_what_is_better_and_counts_what_is_not(self) -> None:
        keeper = Keeper()
        offers = [(0, 0.5), (1, 0.5), (2, math.nan), (3, 0.75), (4, 0.25)]
        assert [keeper.offer(step, value, {"v": value}) for step, value in offers] == [True, False, False, True, False]
        assert keeper == Keeper(3, 0.75, {"v": 0.75}, worse=1)

    def test_the_start_is_left_for_what_is_above_it_by_more_than_a_standard_error(self) -> None:
        keeper, start = Keeper(), [0.0, 10.0, 20.0, None]
        assert keeper.offer(0, 10.0, {}, start)
        # Differences 3, -1, 1: mean 1, deviation 2, standard error 2 / sqrt(3) = 1.155. What the mean gains by an item
        # that the start has no number for says nothing.
        assert not keeper.offer(1, 99.0, {}, [3.0, 9.0, 21.0, 99.0])
        # 3, 0, 1.5: mean 1.5, deviation 1.5, standard error 0.866
        assert keeper.offer(2, 11.5, {}, [3.0, 10.0, 21.5, None])
        assert keeper.offer(3, 11.6, {}, [2.9, 10.1, 21.8, 1.0]), "among later ones the best is kept"
        assert not keeper.offer(4, 11.6, {}, [2.9, 10.1, 21.8, 1.0])
        assert (keeper.step, keeper.worse, keeper.start) == (3, 1, start)

    def test_one_item_has_no_standard_error(self) -> None:
        assert loop.clearly_above([1.0, None], [0.5, 3.0]) and not loop.clearly_above([0.5], [0.5])
        assert not loop.clearly_above([None], [0.5])

    @pytest.mark.parametrize(("gain", "kept", "shown", "reported"), [(0.0, 0.55, 0.20, 0.0), (0.5, 1.0, 0.17, 0.41)])
    def test_what_choosing_adds_where_nothing_changes(
        self, gain: float, kept: float, shown: float, reported: float
    ) -> None:
        """Six validations of a policy that gains `gain` deviations by even steps, on prompts that deviate by 1.

        `kept`: the most runs that leave the start; `shown`: what those that choose show too much; `reported`: the
        gain on prompts that didn't choose.
        """
        draw, trials = np.random.default_rng(0), 2000
        before, left, excess, others = np.zeros(trials), np.zeros(trials), np.zeros(trials), np.zeros(trials)
        for trial in range(trials):
            few, more, true = draw.normal(size=(7, 16)), draw.normal(size=(7, 32)), np.linspace(0, gain, 7)
            old, keeper = Keeper(), Keeper()
            for step in range(7):
                old.offer(step, few[step].mean() + true[step], {})
                values = more[step] + true[step]
                keeper.offer(step, values.mean(), {}, values.tolist())
            assert old.step is not None and keeper.step is not None
            before[trial] = old.value - true[old.step]
            left[trial], excess[trial] = keeper.step > 0, keeper.value - true[keeper.step]
            others[trial] = true[keeper.step] + draw.normal(0, 64**-0.5) - draw.normal(0, 64**-0.5)
        if not gain:
            assert before.mean() == pytest.approx(0.34, abs=0.02), "the mean of the largest of seven, over sqrt(16)"
        assert left.mean() < kept or gain
        assert excess.mean() == pytest.approx(shown, abs=0.03)
        assert others.mean() == pytest.approx(reported, abs=0.03)

    def test_no_best_yet(self, model: Model, tmp_path: Path) -> None:
        adapter = model.add_adapter("sft", "sft", rank=2)
        before = digest(model, "sft")
        loop.restore_best(tmp_path, 9, Keeper(), [adapter])
        assert digest(model, "sft") == before


class TestRewardItems:
    RECORDS = (
        Rating("hi", "yes", True, "g1", weight=0.5),
        Comparison("hi", "yes", "no", "g2", weight=2.0, margin=1.5),
        Rating("hi", "no", False, "g1"),
        Rating("hi", "no", False, "g3"),
    )

    def test_encoded(self, tiny_base: Path) -> None:
        encoder = open_encoder(tiny_base)
        items, counts = reward_stage.encode_items(encoder, self.RECORDS)
        assert counts == {"cut_prompts": 0, "dropped_long": 0}
        assert [item.label for item in items] == [True, None, False, False]
        assert [(item.weight, item.margin, item.group) for item in items[:2]] == [(0.5, 0.0, "g1"), (2.0, 1.5, "g2")]
        yes, no = (tuple(encoder.example("hi", text).tokens.ids) for text in ("yes", "no"))
        assert [[tokens.ids for tokens in item.sequences] for item in items[:2]] == [[yes], [yes, no]]

    def test_a_comparison_with_one_completion_too_long_goes_as_a_whole(self, tiny_base: Path) -> None:
        encoder = open_encoder(tiny_base, EncodingConfig(max_tokens=PROMPT + 4, drop_long=True))
        records = [Comparison("hi", "yes", "x" * 40, "g"), Rating("hi", "yes", True, "g")]
        items, counts = reward_stage.encode_items(encoder, records)
        assert [item.label for item in items] == [True] and counts["dropped_long"] == 1

    def test_class_weights(self, tiny_base: Path) -> None:
        items, _ = reward_stage.encode_items(open_encoder(tiny_base), self.RECORDS)
        balance = {"up": 1, "down": 2, "comparisons": 1}
        # n / (2 n_class), weights counted: 2.5 / (2 * 0.5) and 2.5 / (2 * 2)
        assert reward_stage.class_weights(items, "balanced") == ({True: 2.5, False: 0.625}, balance)
        assert reward_stage.class_weights(items, "none") == ({True: 1.0, False: 1.0}, balance)
        assert reward_stage.class_weights(items[1:2], "balanced")[0] == {True: 1.0, False: 1.0}

    def test_class_weights_and_bias_count_weights(self, model: Model, tiny_base: Path) -> None:
        weights = {True: (3.0, 0.5), False: (0.25, 0.75)}
        records = [
            Rating("hi", f"{label} {weight}", label, "g", weight=weight)
            for label, own in weights.items()
            for weight in own
        ]
        items, _ = reward_stage.encode_items(open_encoder(tiny_base), records)
        balance = {"up": 2, "down": 2, "comparisons": 0}
        # 4.5 in all, 3.5 up and 1 down: 4.5 / (2 * 3.5) and 4.5 / (2 * 1)
        balanced = {True: pytest.approx(9 / 14), False: pytest.approx(9 / 4)}
        assert reward_stage.class_weights(items, "balanced") == (balanced, balance)
        (adapter,) = reward_stage._start(model, open_encoder(tiny_base), RewardConfig(), items)
        assert adapter.bias is not None and adapter.bias.item() == pytest.approx(math.log(3.5))

    def test_the_probe_weighs_kinds_as_training_does(
        self, model: Model, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One comparison of weight 2 among four records counts 2 * 4, ratings 4 / 3 of their own."""
        encoder, seen = open_encoder(tiny_base), list[Any]()
        items, _ = reward_stage.encode_items(encoder, self.RECORDS)
        config = RewardConfig(head_start="probe")
        (adapter,) = reward_stage._start(model, encoder, config, items)
        found = linear_probe.Probe(np.zeros(64), 0.0, 1.0, 0.5)
        monkeypatch.setattr(linear_probe, "fit", lambda *given: (seen.extend(given[3]), found)[1])
        bar = SimpleNamespace(advance=lambda: None)
        run: Any = SimpleNamespace(progress=lambda *_: contextlib.nullcontext(bar))
        shares, equal = reward_stage.Shares.of(items.records), {True: 1.0, False: 1.0}
        reward_stage._start_head(run, model, [adapter], items, equal, shares, config)
        assert sorted(seen) == pytest.approx([2 / 3, 4 / 3, 4 / 3, 8])

    def test_ratings_of_one_label_without_weight_are_refused(self, tiny_base: Path) -> None:
        records = [Rating("hi", "yes", True, "g"), Rating("hi", "no", False, "g", weight=0.0)]
        items, _ = reward_stage.encode_items(open_encoder(tiny_base), records)
        with pytest.raises(DataError, match="all ratings that have a weight are up"):
            reward_stage.class_weights(items, "none")

    @pytest.mark.parametrize("sizes", [[16, 16], [12, 11, 9], [4] * 8, [1] * 32])
    def test_a_rare_kind_weighs_the_same_however_large_updates_are(
        self, model: Model, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
    ) -> None:
        """Four ratings among 32 records: what an epoch's updates pay for them, added up by the records of each."""
        pairs = [Comparison("hi", f"yes {n}", "no", "g") for n in range(28)]
        rated = [Rating("hi", f"so {n}", n % 2 == 0, "g") for n in range(4)]
        mixed = [record for n in range(4) for record in (*pairs[7 * n : 7 * n + 7], rated[n])]
        items, _ = reward_stage.encode_items(open_encoder(tiny_base), mixed)
        monkeypatch.setattr(loop, "optimiser_step", lambda *_: 0.0)  # scores stay 0, and each loss ln 2
        adapter = model.add_adapter(reward_stage.NAME, "reward", rank=4)
        config, shares = RewardConfig(comparison_weight=0.0), reward_stage.Shares.of(items.records)
        paid = start = 0.0
        for size in sizes:
            part = [items[i] for i in range(int(start), int(start) + size)]
            given: Any = model, [adapter], {adapter.name: None}, part, {True: 1.0, False: 1.0}, shares, 1, 9, config
            paid, start = paid + size / 32 * reward_stage._update(*given)["loss"], start + size
        assert paid == pytest.approx(math.log(2))

    @pytest.mark.parametrize("how", ["none", "balanced"])
    def test_ratings_that_are_all_equal_are_refused(self, tiny_base: Path, how: str) -> None:
        items, _ = reward_stage.encode_items(open_encoder(tiny_base), self.RECORDS[2:])
        with pytest.raises(DataError, match="all 2 ratings are down"):
            reward_stage.class_weights(items, how)

    @pytest.mark.parametrize(("how", "bias"), [("none", math.log(0.5 / 2)), ("balanced", 0.0)])
    def test_the_bias_starts_at_the_log_odds(self, model: Model, tiny_base: Path, how: str, bias: float) -> None:
        encoder = open_encoder(tiny_base)
        items, _ = reward_stage.encode_items(encoder, self.RECORDS)
        config = RewardConfig(class_weight=how)  # pyright: ignore[reportArgumentType]
        (adapter,) = reward_stage._start(model, encoder, config, items)
        assert adapter.bias is not None and adapter.bias.item() == pytest.approx(bias)
        assert not adapter.bias.requires_grad
        scores = score_batches(model, reward_stage.laid_out(items, config, model), reward_stage.NAME)
        assert scores == [pytest.approx([bias] * len(item.sequences)) for item in items]

    def test_scores_come_back_in_order(self, model: Model, tiny_base: Path) -> None:
        items, _ = reward_stage.encode_items(open_encoder(tiny_base), self.RECORDS)
        model.add_adapter(reward_stage.NAME, "reward", rank=4)
        randomise(model, reward_stage.NAME)
        with torch.no_grad():
            alone = [
                [model.scores(apart([s.ids], packing="none"), reward_stage.NAME).item() for s in i.sequences]
                for i in items
            ]
        for max_tokens in (1, 1000):
            laid_out = reward_stage.laid_out(items, RewardConfig(tokens_per_microbatch=max_tokens), model)
            found = score_batches(model, laid_out, reward_stage.NAME)
            assert found == [pytest.approx(scores, abs=1e-5) for scores in alone]
        assert abs(alone[0][0] - alone[2][0]) > 1e-2
