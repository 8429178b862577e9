"""Adapters on one base: off, zero, copied, stacked, saved and loaded give what they must."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny_models import (
    END,
    answers,
    apart,
    open_encoder,
    open_model,
    random_ids,
    randomise,
    reference_logprobs,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from perlhf.config.stages import EncodingConfig
from perlhf.errors import AdapterError
from perlhf.kernels.call import Call, current_call
from perlhf.method.lora import LowRank
from perlhf.model import saved
from perlhf.model.adapter import Adapter
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Held, Model
from perlhf.rollout.local import Ends, Rollout, sample, stream, uniforms

PROMPTS = random_ids([5, 9, 1], seed=1)
COMPLETIONS = random_ids([4, 1, 7], seed=2)


def logprobs(model: Model, adapter: str | None, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        return model.logprobs(answers(PROMPTS, COMPLETIONS), adapter, temperature=temperature).logprobs


def states(model: Model, adapter: str | None) -> Tensor:
    return model.prefill(PROMPTS, adapter)[0]


def sampled_logits(model: Model, adapter: str | Held | None) -> Tensor:
    """Logits after the prompts and one more token each, by the sampler's passes: [prompt, vocab]."""
    _, cache = model.prefill(PROMPTS, adapter)
    cache.fork(1)
    return model.logits(model.decode(torch.tensor([7, 8, 9]), cache, adapter), adapter)


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks give, each in a thread of its own; they begin together."""
    begin = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        begin.wait(60)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def untouched(directory: Path) -> list[Tensor]:
    """What transformers itself computes, one completion at a time."""
    network = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return [reference_logprobs(network, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


class TestOff:
    def test_the_base_is_what_transformers_computes(self, model: Model, tiny_base: Path) -> None:
        found = logprobs(model, None)
        for row, expected in zip(found, untouched(tiny_base), strict=True):
            torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=2e-5)
            assert not row[len(expected) :].any()

    @pytest.mark.parametrize("targets", ["attention", "all"])
    def test_adapter_off_is_the_base_exactly(self, model: Model, targets: str) -> None:
        before, before_states = logprobs(model, None), states(model, None)
        model.add_adapter("policy", "policy", rank=4, targets=targets)
        randomise(model, "policy")
        assert not torch.allclose(logprobs(model, "policy"), before, atol=0.1)
        assert torch.equal(logprobs(model, None), before)
        assert torch.equal(states(model, None), before_states)

    @pytest.mark.parametrize("targets", ["attention", "all", ("q_proj", "layers.1.mlp.down_proj")])
    def test_a_new_adapter_is_the_base_exactly(self, model: Model, targets: str | tuple[str, ...]) -> None:
        before, before_states = logprobs(model, None), states(model, None)
        model.add_adapter("policy", "policy", rank=4, targets=targets)
        assert torch.equal(logprobs(model, "policy"), before)
        assert torch.equal(states(model, "policy"), before_states)

    def test_last_layers_alone_have_a_backward(self, model: Model) -> None:
        """The gradients there are those of an adapter on all layers, and nothing below the first of them is kept."""
        everywhere = model.add_adapter("everywhere", "sft", rank=4, seed=1)
        last = model.add_adapter("last", "sft", rank=4, seed=1, layers="last:1")
        assert set(last.pairs) == {path for path in everywhere.pairs if path.startswith("model.layers.1.")}
        for path, pair in last.pairs.items():
            pair.a.data, pair.b.data = everywhere.pairs[path].a.data, everywhere.pairs[path].b.data
        kept_bytes: dict[str, int] = {}
        for adapter in (everywhere, last):
            sizes: list[int] = []

            def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model.logprobs(answers(PROMPTS, COMPLETIONS), adapter.name).logprobs.sum().backward()
            kept_bytes[adapter.name] = sum(sizes)
        for path, pair in last.pairs.items():
            assert pair.b.grad is not None
            torch.testing.assert_close(pair.b.grad, everywhere.pairs[path].b.grad)
        assert kept_bytes["last"] < 0.6 * kept_bytes["everywhere"]

    def test_layers_that_hold_no_target_are_refused(self, model: Model) -> None:
        with pytest.raises(AdapterError, match="match nothing in layers last:1"):
            model.targets(("layers.0.mlp.up_proj",), "last:1")

    def test_the_head_of_the_base_is_no_target(self, model: Model) -> None:
        adapter = model.add_adapter("policy", "policy", rank=2, targets="all")
        assert len(adapter.pairs) == 2 * 7 and "lm_head" not in adapter.pairs

    def test_only_the_adapter_is_trainable(self, model: Model) -> None:
        adapter = model.add_adapter("policy", "policy", rank=4)
        model.logprobs(answers(PROMPTS, COMPLETIONS), "policy").logprobs.sum().backward()
        assert all(p.grad is None for p in model.base.parameters())
        # 2 layers, q k v o: rank * (in + out) = 4 * (128 + 96 + 96 + 128)
        assert sum(p.numel() for p in adapter.trainable()) == 2 * 4 * 448
        assert all(p.grad is not None for p in adapter.trainable())


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
    def test_logprobs_are_those_of_tempered_logits(self, model: Model, tiny_base: Path, temperature: float) -> None:
        network = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        found = logprobs(model, None, temperature)
        for row, prompt, completion in zip(found, PROMPTS, COMPLETIONS, strict=True):
            expected = reference_logprobs(network, prompt, completion, temperature)
            torch.testing.assert_close(row[: len(completion)], expected, rtol=0, atol=5e-5)

    def test_entropy_is_that_of_the_tempered_distribution(self, model: Model, tiny_base: Path) -> None:
        network = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        with torch.no_grad():
            logits = network(torch.tensor([PROMPTS[2]])).logits[0, -1]
            found = model.logprobs(answers(PROMPTS, COMPLETIONS), None, temperature=0.7).entropy[2, 0]
        expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class TestFullTuning:
    def test_step_0_of_lora_full_and_base_agree(self, model: Model) -> None:
        model.add_adapter("lora", "policy", rank=4)
        model.add_adapter("full", "policy", tuning="full")
        assert torch.equal(logprobs(model, "lora"), logprobs(model, None))
        torch.testing.assert_close(logprobs(model, "full"), logprobs(model, None), rtol=0, atol=1e-5)

    def test_starts_from_what_is_merged_beneath(self, model: Model) -> None:
        model.add_adapter("sft", "sft", rank=4)
        randomise(model, "sft")
        model.add_adapter("policy", "policy", tuning="full", beneath="sft")
        torch.testing.assert_close(logprobs(model, "policy"), logprobs(model, "sft"), rtol=0, atol=1e-4)
        assert model.adapters["policy"].beneath is None

    def test_all_weights_get_gradients_and_the_base_stays(self, model: Model) -> None:
        before = {name: p.clone() for name, p in model.base.named_parameters()}
        adapter = model.add_adapter("policy", "policy", tuning="full")
        model.logprobs(answers(PROMPTS, COMPLETIONS), "policy").logprobs.sum().backward()
        assert set(adapter.weights) == set(before)
        assert all(p.grad is not None and p.grad.any() for p in adapter.trainable())
        with torch.no_grad():
            for p in adapter.trainable():
                p.add_(0.1)
        assert all(torch.equal(p, before[name]) for name, p in model.base.named_parameters())

    def test_gradients_are_those_of_the_untied_network(self, model: Model, tiny_base: Path) -> None:
        """Embeddings are tied: their gradient has a part from the input and one from the output."""
        adapter = model.add_adapter("policy", "policy", tuning="full")
        model.logprobs(answers(PROMPTS[:1], COMPLETIONS[:1]), "policy").logprobs.sum().backward()
        network = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        ids = [*PROMPTS[0], *COMPLETIONS[0]]
        logits = network(torch.tensor([ids])).logits[0, len(PROMPTS[0]) - 1 : -1]
        torch.log_softmax(logits, -1)[torch.arange(4), torch.tensor(COMPLETIONS[0])].sum().backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(adapter.weights[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)

    def test_round_trip(self, model: Model, encoder: Encoder, tiny_base: Path, tmp_path: Path) -> None:
        model.add_adapter("reward_0", "reward", tuning="full")
        randomise(model, "reward_0")
        saved.save_adapter(model, "reward_0", tmp_path / "adapter", encoder)
        other = open_model(tiny_base)
        loaded = saved.load_adapter(other, tmp_path / "adapter", "again", encoder).tensors()
        assert all(torch.equal(loaded[key], t) for key, t in model.adapters["reward_0"].tensors().items())
        torch.testing.assert_close(other.scores(apart(PROMPTS), "again"), model.scores(apart(PROMPTS), "reward_0"))
        weights = tmp_path / "adapter" / saved.FULL_WEIGHTS
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
        with pytest.raises(AdapterError, match="SHA-256"):
            saved.load_adapter(open_model(tiny_base), tmp_path / "adapter", "again", encoder)


class TestStacked:
    @pytest.fixture
    def stacked(self, model: Model) -> Model:
        """Attention adapter of rank 4 beneath a rank-2 one on all layers."""
        model.add_adapter("sft", "sft", rank=4, alpha=8.0, seed=1)
        randomise(model, "sft", 1)
        model.freeze("sft")
        model.add_adapter("policy", "policy", rank=2, alpha=6.0, targets="all", seed=2, beneath="sft")
        return model

    def test_starts_as_the_adapter_beneath_exactly(self, stacked: Model) -> None:
        assert torch.equal(logprobs(stacked, "policy"), logprobs(stacked, "sft"))

    def test_is_the_sum_of_both_updates(self, stacked: Model, tiny_base: Path) -> None:
        randomise(stacked, "policy", 2)
        network = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        with torch.no_grad():
            for name, scale in (("sft", 8 / 4), ("policy", 6 / 2)):
                for path, pair in stacked.adapters[name].pairs.items():
                    network.get_parameter(path + ".weight").add_(scale * pair.b @ pair.a)
        found = logprobs(stacked, "policy")
        for row, prompt, completion in zip(found, PROMPTS, COMPLETIONS, strict=True):
            expected = reference_logprobs(network, prompt, completion)
            torch.testing.assert_close(row[: len(completion)], expected, rtol=0, atol=1e-4)

    def test_only_the_upper_one_learns(self, stacked: Model) -> None:
        randomise(stacked, "policy", 2)
        stacked.logprobs(answers(PROMPTS, COMPLETIONS), "policy").logprobs.sum().backward()
        assert all(p.grad is None for p in stacked.adapters["sft"].tensors().values())
        assert all(p.grad is not None for p in stacked.adapters["policy"].trainable())

    def test_saved_as_one_that_loads_alone(
        self, stacked: Model, encoder: Encoder, tiny_base: Path, tmp_path: Path
    ) -> None:
        randomise(stacked, "policy", 2)
        saved.save_adapter(stacked, "policy", tmp_path / "adapter", encoder)
        other = open_model(tiny_base)
        loaded = saved.load_adapter(other, tmp_path / "adapter", "policy", encoder)
        assert loaded.rank == 6 and loaded.beneath is None
        torch.testing.assert_close(logprobs(other, "policy"), logprobs(stacked, "policy"), rtol=0, atol=1e-5)

    def test_version_covers_the_one_beneath(self, stacked: Model) -> None:
        assert stacked.version("policy") == (("sft", 0), ("policy", 0)) and stacked.version(None) == ()
        stacked.adapters["sft"].version += 1
        assert stacked.version("policy") == (("sft", 1), ("policy", 0))

    def test_value_adapter_over_the_same_sft(self, stacked: Model) -> None:
        """The value adapter shares the frozen SFT adapter; its head starts at 0, so it predicts its bias."""
        value = stacked.add_adapter("value", "value", rank=2, beneath="sft")
        assert value.bias is not None
        value.bias.data.fill_(1.5)
        found = stacked.values(answers(PROMPTS, COMPLETIONS), "value")
        assert found[1].tolist() == [1.5, 0, 0, 0, 0, 0, 0]
        assert torch.equal(found[2], torch.full((7,), 1.5))


class TestCopy:
    def test_equals_its_source_exactly_and_shares_nothing(self, model: Model) -> None:
        model.add_adapter("sft", "sft", rank=4)
        randomise(model, "sft")
        model.freeze("sft")
        model.copy_adapter("sft", "policy", "policy")
        before = logprobs(model, "sft")
        assert torch.equal(logprobs(model, "policy"), before)
        assert model.adapters["policy"].trainable() and not model.adapters["sft"].trainable()
        randomise(model, "policy", 9)
        assert torch.equal(logprobs(model, "sft"), before)

    def test_a_value_copy_gets_a_zero_head(self, model: Model) -> None:
        model.add_adapter("sft", "sft", rank=4)
        value = model.copy_adapter("sft", "value", "value")
        assert value.score_head is not None and not value.score_head.any() and value.score_head.dtype == torch.float32
        assert value.bias is not None and value.bias.requires_grad


class TestHolding:
    """Weights converted once give the same bits, and concern the passes that they are given to alone."""

    @pytest.mark.parametrize("tuning", ["lora", "full"])
    def test_same_bits_and_then_the_new_weights(self, model: Model, tuning: Literal["lora", "full"]) -> None:
        model.add_adapter("policy", "policy", rank=4, tuning=tuning)
        for seed in (0, 1):
            randomise(model, "policy", seed)
            expected = sampled_logits(model, "policy")
            held = model.hold("policy")
            assert torch.equal(sampled_logits(model, held), expected)
            assert torch.equal(sampled_logits(model, held), expected)
            assert not expected.requires_grad

    @pytest.mark.parametrize("tuning", ["lora", "full"])
    def test_other_passes_meanwhile_are_as_ever(self, model: Model, tuning: Literal["lora", "full"]) -> None:
        model.add_adapter("policy", "policy", rank=4, tuning=tuning)
        before = logprobs(model, None)
        randomise(model, "policy")
        held = model.hold("policy")
        expected = sampled_logits(model, held)
        assert torch.equal(logprobs(model, None), before)
        assert model.logprobs(answers(PROMPTS, COMPLETIONS), "policy").logprobs.requires_grad
        assert torch.equal(sampled_logits(model, held), expected)

    def test_stacked_adapters(self, model: Model) -> None:
        model.add_adapter("sft", "sft", rank=4)
        randomise(model, "sft", 1)
        model.add_adapter("policy", "policy", rank=2, targets="all", beneath="sft")
        randomise(model, "policy", 2)
        assert torch.equal(sampled_logits(model, model.hold("policy")), sampled_logits(model, "policy"))

    def test_the_bare_base(self, model: Model) -> None:
        model.add_adapter("policy", "policy", rank=4)
        before = sampled_logits(model, None)
        randomise(model, "policy")
        assert torch.equal(sampled_logits(model, model.hold(None)), before)


class TestThreads:
    """Passes of several threads through one base at the same time give what each gives alone, bit for bit."""

    @pytest.fixture
    def shared(self, model: Model) -> Model:
        """Two adapters on all layers, one of them over a third, and one with weights of its own."""
        model.add_adapter("sft", "sft", rank=4, seed=1)
        model.add_adapter("first", "policy", rank=4, targets="all", seed=2)
        model.add_adapter("second", "policy", rank=2, seed=3, beneath="sft")
        model.add_adapter("full", "policy", tuning="full")
        for seed, name in enumerate(("sft", "first", "second", "full")):
            randomise(model, name, seed)
        model.freeze("sft")
        return model

    @pytest.mark.parametrize("other", ["second", "full", None])
    def test_two_adapters_sample(self, shared: Model, other: str | None) -> None:
        def rollout(adapter: str | None) -> Rollout:
            draws = uniforms(0, 1, [0, 1, 2], 4, 48)
            return sample(
                shared,
                PROMPTS,
                adapter=adapter,
                draws=draws,
                ends=Ends([END]),
                temperature=1.0,
                max_completion_tokens=48,
            )

        alone = [rollout(adapter) for adapter in ("first", other)]
        assert alone[0].completions != alone[1].completions
        for _ in range(3):
            for rolled, expected in zip(at_once(lambda: rollout("first"), lambda: rollout(other)), alone, strict=True):
                assert rolled.completions == expected.completions
                assert rolled.sampler_logprobs == expected.sampler_logprobs
                assert torch.equal(rolled.prompt_states, expected.prompt_states)

    @pytest.mark.parametrize(("trained", "sampled"), [("first", "second"), ("full", "first"), ("second", "full")])
    def test_training_beside_sampling(self, shared: Model, trained: str, sampled: str) -> None:
        def gradients() -> list[Tensor]:
            passes = [shared.logprobs(answers(PROMPTS, COMPLETIONS), trained).logprobs for _ in range(12)]
            return list(torch.autograd.grad(torch.stack(passes).square().sum(), shared.adapters[trained].trainable()))

        def tokens() -> list[int]:
            return list(stream(shared, PROMPTS[0], sampled, uniforms(0, 1, [0], 1, 96)[0], Ends([-1]), 1.0))

        expected_gradients, expected_tokens = gradients(), tokens()
        for _ in range(3):
            learned, streamed = at_once(gradients, tokens)
            assert all(torch.equal(*pair) for pair in zip(learned, expected_gradients, strict=True))
            assert streamed == expected_tokens


class TestSelection:
    def test_undone_after_an_exception(self, model: Model) -> None:
        model.add_adapter("policy", "policy", rank=4, tuning="full")
        randomise(model, "policy")
        before = logprobs(model, None)

        class Broken(Exception):
            pass

        def refuse(module: nn.Module, inputs: object, output: object) -> None:
            assert current_call().adapters == ("policy",) and current_call().dropout
            raise Broken

        hook = model.base.get_submodule("model.layers.1.mlp").register_forward_hook(refuse)
        with pytest.raises(Broken):
            model.logprobs(answers(PROMPTS, COMPLETIONS), "policy", dropout=True)
        hook.remove()
        assert current_call() == Call()
        assert torch.equal(logprobs(model, None), before)

    def test_unknown_adapter(self, model: Model) -> None:
        model.add_adapter("sft", "sft", rank=2)
        with pytest.raises(AdapterError, match="'policy'") as caught:
            logprobs(model, "policy")
        assert "allowed: sft" in str(caught.value)

    def test_dropout_only_when_asked(self, model: Model) -> None:
        model.add_adapter("reward_0", "reward", rank=4, dropout=0.5)
        randomise(model, "reward_0")
        still = model.scores(apart(PROMPTS), "reward_0")
        assert torch.equal(still, model.scores(apart(PROMPTS), "reward_0"))
        assert not torch.allclose(still, model.scores(apart(PROMPTS), "reward_0", dropout=True))


class TestRefused:
    @pytest.fixture
    def directory(self, model: Model, encoder: Encoder, tmp_path: Path) -> Path:
        model.add_adapter("reward_0", "reward", rank=2)
        randomise(model, "reward_0")
        saved.save_adapter(model, "reward_0", tmp_path / "adapter", encoder)
        return tmp_path / "adapter"

    def test_round_trip_with_head_and_bias(
        self, model: Model, directory: Path, encoder: Encoder, tiny_base: Path
    ) -> None:
        other = open_model(tiny_base)
        loaded = saved.load_adapter(other, directory, "mine", encoder)
        assert torch.equal(other.scores(apart(PROMPTS), "mine"), model.scores(apart(PROMPTS), "reward_0"))
        assert loaded.bias is not None and loaded.bias.item() != 0 and not loaded.bias.requires_grad
        assert saved.read_adapter(directory).encoding == encoder.identity()

    @pytest.mark.parametrize("tuning", ["lora", "full"])
    def test_adapter_of_another_base(
        self, model: Model, encoder: Encoder, tiny_base: Path, tmp_path: Path, tuning: str
    ) -> None:
        model.add_adapter("sft", "sft", rank=2, tuning=tuning)  # pyright: ignore[reportArgumentType]
        saved.save_adapter(model, "sft", tmp_path / "adapter", encoder)
        other = open_model(tiny_base)
        other.fingerprint = {"name": "another-base", "sha256": "0" * 64}
        with pytest.raises(AdapterError) as caught:
            saved.load_adapter(other, tmp_path / "adapter", "sft", encoder)
        assert "another-base" in str(caught.value) and model.fingerprint["name"] in str(caught.value)
        assert not other.adapters

    @pytest.mark.parametrize(
        ("config", "key"),
        [
            (EncodingConfig(system="Be brief."), "encoding.system"),
            (EncodingConfig(template="plain"), "encoding.template"),
        ],
    )
    def test_another_encoding(self, directory: Path, tiny_base: Path, config: EncodingConfig, key: str) -> None:
        with pytest.raises(AdapterError, match=key):
            saved.load_adapter(open_model(tiny_base), directory, "mine", open_encoder(tiny_base, config))

    def test_only_the_length_may_differ(self, directory: Path, tiny_base: Path) -> None:
        saved.load_adapter(
            open_model(tiny_base), directory, "mine", open_encoder(tiny_base, EncodingConfig(max_tokens=64))
        )

    def test_nothing_there(self, model: Model, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="no adapter at"):
            saved.load_adapter(model, tmp_path / "none", "mine")

    def test_a_damaged_description(self, model: Model, encoder: Encoder, tmp_path: Path) -> None:
        model.add_adapter("sft", "sft", tuning="full")
        saved.save_adapter(model, "sft", tmp_path / "adapter", encoder)
        (tmp_path / "adapter" / saved.DETAILS).write_text('{"role": ')
        with pytest.raises(AdapterError, match="damaged"):
            saved.load_adapter(model, tmp_path / "adapter", "again")

    @pytest.mark.parametrize(
        ("path", "inputs", "outputs", "says"),
        [
            ("model.layers.7.self_attn.q_proj", 64, 64, "which the base lacks"),
            ("model.layers.0.self_attn", 64, 64, "which the base lacks"),
            ("model.layers.0.self_attn.q_proj", 64, 32, "64 -> 32"),
            ("lm_head", 64, 272, "output head"),
        ],
    )
    def test_layers_that_do_not_fit(self, model: Model, path: str, inputs: int, outputs: int, says: str) -> None:
        pair = LowRank(nn.Parameter(torch.zeros(2, inputs)), nn.Parameter(torch.zeros(outputs, 2)), 1.0)
        with pytest.raises(AdapterError, match=says):
            model.adopt(Adapter("mine", "sft", 2, 2.0, pairs={path: pair}))
        assert not model.adapters

    def test_written_files_name_the_base(self, directory: Path, model: Model) -> None:
        details = json.loads((directory / "perlhf.json").read_text())
        assert details["base"] == model.fingerprint
