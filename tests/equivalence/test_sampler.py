"""The cached, batched sampler against plain forward passes; its randomness; the probe that catches a stale adapter."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_models import END, VOCAB, answers, apart, merged_network, random_ids, randomise, reference_logprobs
from transformers import AutoConfig, AutoModelForCausalLM

from perlhf.errors import DivergenceError, StaleSamplerError
from perlhf.kernels import cpu, kv_cache
from perlhf.kernels.attention.sight import FULL, Sight
from perlhf.method.packing import Ids
from perlhf.model.model import Held, Model
from perlhf.rollout.local import Ends, Rollout, draw, probe, sample, uniforms

PROMPTS = random_ids([7, 2, 11], seed=3)
LENGTH = 8


@pytest.fixture
def adapted(model: Model) -> Model:
    """A policy adapter that is well away from the base."""
    model.add_adapter("policy", "policy", rank=4)
    randomise(model, "policy", size=0.15)
    return model


def roll(
    model: Model,
    prompts: list[list[int]] = PROMPTS,
    *,
    numbers: tuple[int, ...] = (0, 1, 2),
    samples: int = 3,
    end_id: int = END,
    temperature: float = 1.0,
    adapter: str | None = "policy",
    max_rows: int | None = None,
) -> Rollout:
    return sample(
        model,
        prompts,
        adapter=adapter,
        draws=uniforms(5, 1, numbers, samples, LENGTH),
        ends=Ends([end_id]),
        temperature=temperature,
        max_completion_tokens=LENGTH,
        max_rows=max_rows,
    )


@torch.no_grad()
def greedy(network: torch.nn.Module, prompt: Ids) -> list[int]:
    """The most likely token again and again, each by a forward pass over everything."""
    ids = list(prompt)
    for _ in range(LENGTH):
        ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class TestAgainstForwardPasses:
    @pytest.mark.parametrize("adapter", [None, "policy"])
    def test_greedy_is_step_by_step_argmax(self, adapted: Model, tiny_base: Path, adapter: str | None) -> None:
        network = merged_network(tiny_base, adapted, *([adapter] if adapter else []))
        expected = [greedy(network, prompt) for prompt in PROMPTS]
        found = roll(adapted, samples=2, temperature=0, end_id=-1, adapter=adapter)
        assert found.completions == [ids for ids in expected for _ in range(2)]
        assert found.ended == [False] * 6

    @pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
    def test_logprobs_are_the_models(self, adapted: Model, tiny_base: Path, temperature: float) -> None:
        found = roll(adapted, temperature=temperature)
        with torch.no_grad():
            trainer = adapted.logprobs(answers(found.prompts, found.completions), "policy", temperature=temperature)
        network = merged_network(tiny_base, adapted, "policy")
        for row, (prompt, ids) in enumerate(zip(found.prompts, found.completions, strict=True)):
            reported = torch.tensor(found.sampler_logprobs[row])
            torch.testing.assert_close(reported, trainer.logprobs[row, : len(ids)], rtol=0, atol=1e-4)
            expected = reference_logprobs(network, prompt, ids, temperature)
            torch.testing.assert_close(reported, expected, rtol=0, atol=1e-4)

    def test_greedy_logprobs_are_at_temperature_one(self, adapted: Model) -> None:
        found = roll(adapted, samples=1, temperature=0)
        with torch.no_grad():
            batch = answers(found.prompts, found.completions)
            trainer = adapted.logprobs(batch, "policy").logprobs[batch.completion_mask]
        flat = torch.tensor([value for row in found.sampler_logprobs for value in row])
        torch.testing.assert_close(flat, trainer, rtol=0, atol=1e-4)

    def test_full_tuning_samples_its_own_weights(self, model: Model) -> None:
        model.add_adapter("policy", "policy", tuning="full")
        randomise(model, "policy")
        found = roll(model)
        with torch.no_grad():
            trainer = model.logprobs(answers(found.prompts, found.completions), "policy").logprobs
            base = model.logprobs(answers(found.prompts, found.completions), None).logprobs
        reported = torch.zeros_like(trainer)
        for row, values in enumerate(found.sampler_logprobs):
            reported[row, : len(values)] = torch.tensor(values)
        torch.testing.assert_close(reported, trainer, rtol=0, atol=1e-4)
        assert not torch.allclose(reported, base, atol=0.1)


class TestEnds:
    def test_the_end_token_is_kept_and_other_rows_do_not_notice(self, adapted: Model) -> None:
        endless = roll(adapted, samples=8, temperature=0.7, end_id=-1)
        assert all(len(ids) == LENGTH for ids in endless.completions)
        # The token that comes in most rows before their last place ends some of them early, at different times.
        early = [token for ids in endless.completions for token in set(ids[:-1])]
        end = int(np.bincount(early).argmax())
        found = roll(adapted, samples=8, temperature=0.7, end_id=end)
        lengths = []
        for row, whole in enumerate(endless.completions):
            expected = whole[: whole.index(end) + 1] if end in whole else whole
            assert found.completions[row] == expected
            assert found.ended[row] == (end in whole)
            assert len(found.sampler_logprobs[row]) == len(expected)
            assert found.sampler_logprobs[row] == pytest.approx(
                endless.sampler_logprobs[row][: len(expected)], abs=1e-4
            )
            lengths.append(len(expected))
        assert min(lengths) < LENGTH and len(set(lengths)) > 1
        assert found.tokens == sum(lengths)

    def test_an_end_token_in_the_last_place_counts(self, adapted: Model) -> None:
        endless = roll(adapted, samples=1, end_id=-1)
        last = endless.completions[0][-1]
        if last not in endless.completions[0][:-1]:
            assert roll(adapted, samples=1, end_id=last).ended[0]
        first = endless.completions[1][0]
        found = roll(adapted, samples=1, end_id=first)
        assert found.completions[1] == [first] and found.ended[1]


class TestRandomness:
    def test_a_rollout_does_not_depend_on_its_company(self, adapted: Model) -> None:
        together = roll(adapted)
        for number, prompt in enumerate(PROMPTS):
            alone = roll(adapted, [prompt], numbers=(number,))
            rows = slice(3 * number, 3 * number + 3)
            assert alone.completions == together.completions[rows]
            for one, other in zip(alone.sampler_logprobs, together.sampler_logprobs[rows], strict=True):
                assert one == pytest.approx(other, abs=1e-4)
        backwards = roll(adapted, PROMPTS[::-1], numbers=(2, 1, 0))
        assert backwards.completions[:3] == together.completions[6:]

    def test_draws_are_keyed_by_seed_step_prompt_and_sample(self) -> None:
        rows = uniforms(5, 1, [0, 4], 3, 6)
        assert rows.shape == (6, 6) and rows.dtype == torch.float64
        assert ((rows >= 0) & (rows < 1)).all() and rows.unique().numel() == 36
        assert torch.equal(uniforms(5, 1, [4], 2, 6), rows[3:5])
        assert torch.equal(uniforms(5, 1, [4], 2, 3), rows[3:5, :3])
        for other in (uniforms(6, 1, [0], 1, 6), uniforms(5, 2, [0], 1, 6)):
            assert not torch.equal(other[0], rows[0])

    def test_a_prompt_that_occurs_twice_gets_other_completions(self) -> None:
        """Few prompts, many a rollout: the second visit must not repeat the first one's random numbers."""
        rows = uniforms(5, 1, [7, 2, 7], 2, 4)
        assert torch.equal(rows[[0, 1, 4, 5]], uniforms(5, 1, [7], 4, 4))

    def test_inverse_cdf_by_hand(self) -> None:
        # 0.1 | 0.2 | 0 | 0.3 | 0.4: cumulative 0.1, 0.3, 0.3, 0.6, 1
        logits = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).log().expand(7, 5)
        draws = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.61, 1 - 2**-53], dtype=torch.float64)
        tokens, logprobs = draw(logits, draws, 1.0)
        assert tokens.tolist() == [0, 0, 1, 1, 3, 4, 4]
        expected = [math.log(p) for p in (0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.4)]
        assert logprobs.tolist() == pytest.approx(expected, rel=1e-5)

    def test_impossible_tokens_are_never_drawn(self) -> None:
        logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(2, 3)
        assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0)[0].tolist() == [1, 1]

    def test_the_vocabulary_may_have_any_size(self) -> None:
        """Blocks of 256: below, at and above their ends, the same tokens as by sums over the whole vocabulary."""
        for size in (1, 255, 256, 257, 700):
            logits = torch.randn(9, size, generator=torch.Generator().manual_seed(size)) * 3
            draws = torch.linspace(0, 1 - 2**-53, 9, dtype=torch.float64)
            cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
            expected = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
            tokens, logprobs = draw(logits, draws, 1.0)
            assert tokens[:-1].tolist() == expected[:-1].tolist() and int(tokens[-1]) < size
            picked = torch.log_softmax(logits, -1).gather(-1, tokens[:, None]).squeeze(-1)
            torch.testing.assert_close(logprobs, picked, rtol=0, atol=1e-5)

    def test_temperature_by_hand(self) -> None:
        # at temperature 1/2 probabilities 1/3, 2/3 become 1/5, 4/5
        logits = torch.tensor([1 / 3, 2 / 3]).log().expand(2, 2)
        tokens, logprobs = draw(logits, torch.tensor([0.19, 0.21], dtype=torch.float64), 0.5)
        assert tokens.tolist() == [0, 1]
        assert logprobs.tolist() == pytest.approx([math.log(0.2), math.log(0.8)], rel=1e-5)

    @pytest.mark.parametrize(("actual", "claimed", "agrees"), [(0.7, 0.7, True), (1.0, 0.7, False)])
    def test_frequencies(self, adapted: Model, tiny_base: Path, actual: float, claimed: float, agrees: bool) -> None:
        """Chi-square of 4,000 first tokens against softmax(logits / temperature); rare tokens pooled."""
        count = 4000
        found = sample(
            adapted,
            [PROMPTS[1]],
            adapter="policy",
            draws=uniforms(11, 1, [0], count, 1),
            ends=Ends([END]),
            temperature=actual,
            max_completion_tokens=1,
        )
        network = merged_network(tiny_base, adapted, "policy")
        with torch.no_grad():
            logits = network(torch.tensor([PROMPTS[1]])).logits[0, -1].double()
        expected = torch.softmax(logits / claimed, -1).numpy() * count
        observed = np.bincount([ids[0] for ids in found.completions], minlength=VOCAB)
        common = expected >= 5
        table = np.append(observed[common], observed[~common].sum())
        p_value = chisquare(table, np.append(expected[common], expected[~common].sum())).pvalue
        assert common.sum() > 10
        assert (p_value > 1e-3) if agrees else (p_value < 1e-9)


class TestProbe:
    def test_passes_for_the_current_adapter(self, adapted: Model) -> None:
        probe(adapted, roll(adapted), "policy")
        probe(adapted, roll(adapted, adapter=None), None)

    def test_catches_weights_that_changed_after_sampling(self, adapted: Model) -> None:
        rollout = roll(adapted)
        with torch.no_grad():
            next(iter(adapted.adapters["policy"].pairs.values())).b[0, 0] += 1e-4
        with pytest.raises(StaleSamplerError, match="versions agree, prompt states differ"):
            probe(adapted, rollout, "policy")

    def test_catches_an_update_that_hardly_changed_a_state(self, adapted: Model) -> None:
        rollout = roll(adapted)
        adapted.adapters["policy"].version += 1
        with pytest.raises(StaleSamplerError, match="versions differ, prompt states differ by up to 0"):
            probe(adapted, rollout, "policy")

    @pytest.mark.parametrize("stale", [None, "old"])
    def test_catches_a_sampler_that_claims_the_right_version(self, adapted: Model, stale: str | None) -> None:
        """It sampled from the base, or from a copy that missed the last update, yet reports the current version."""
        adapted.copy_adapter("policy", "old", "policy")
        with torch.no_grad():
            for pair in adapted.adapters["policy"].pairs.values():
                pair.b.add_(1e-3)
        rollout = dataclasses.replace(roll(adapted, adapter=stale), adapter_version=adapted.version("policy"))
        with pytest.raises(StaleSamplerError, match=r"versions agree, prompt states differ by up to \d"):
            probe(adapted, rollout, "policy")

    def test_says_so_when_states_are_no_numbers(self, adapted: Model) -> None:
        with torch.no_grad():
            for tensor in adapted.adapters["policy"].trainable():
                tensor.fill_(1e30)
        with pytest.raises(DivergenceError, match="states that are not finite"):
            probe(adapted, roll(adapted), "policy")

    def test_compares_prompts_in_their_own_layout(self, adapted: Model) -> None:
        """One state a prompt, however many samples; prompts that are equal stay apart."""
        rollout = roll(adapted, [PROMPTS[0], PROMPTS[0]], numbers=(0, 1), samples=2)
        assert rollout.prompt_states.shape == (2, 64)
        probe(adapted, rollout, "policy")


class TestCache:
    """Prompts kept once and shared by their rows against each row's own forward pass."""

    def test_buffers_grow_and_rows_end(self, adapted: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv_cache, "GROW", 3)
        endless = roll(adapted, samples=4, end_id=-1)
        for end in (endless.completions[0][1], -1):
            found = roll(adapted, samples=4, end_id=end)
            with torch.no_grad():
                batch = answers(found.prompts, found.completions)
                trainer = adapted.logprobs(batch, "policy").logprobs[batch.completion_mask]
            flat = torch.tensor([value for row in found.sampler_logprobs for value in row])
            torch.testing.assert_close(flat, trainer, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("end", [None, -1])
    def test_steps_of_one_shape_sample_the_same(
        self, adapted: Model, monkeypatch: pytest.MonkeyPatch, end: int | None
    ) -> None:
        """What a GPU records as a graph: full buffers under a mask, ended rows that stay until half have."""
        end_id = roll(adapted, samples=4, end_id=-1).completions[0][1] if end is None else end
        with cpu.off():
            expected = roll(adapted, samples=4, end_id=end_id)
            monkeypatch.setattr(kv_cache, "FIXED", ("cpu",))
            found = roll(adapted, samples=4, end_id=end_id)
        assert (found.completions, found.ended) == (expected.completions, expected.ended)
        for one, other in zip(found.sampler_logprobs, expected.sampler_logprobs, strict=True):
            assert one == pytest.approx(other, abs=1e-5)

    @pytest.mark.parametrize(("max_rows", "places"), [(1, 1), (4, 1), (11, 2), (100, 5)])
    def test_prompts_take_turns_in_places_that_stay(
        self, adapted: Model, monkeypatch: pytest.MonkeyPatch, max_rows: int, places: int
    ) -> None:
        """Completions are those of all rows at once, and no step has another shape or another tensor until the last
        prompt has a place."""
        prompts = random_ids([7, 2, 11, 4, 9], seed=3)
        given = {"prompts": prompts, "numbers": (0, 1, 2, 3, 4), "samples": 4}
        end_id = roll(adapted, **given, end_id=-1).completions[0][1]
        steps: list[tuple[int, int]] = []
        decode, put, turns = Model.decode, kv_cache.KeyValueCache.put, list[int]()

        def noted(self: Model, ids: torch.Tensor, cache: kv_cache.KeyValueCache, held: Held) -> torch.Tensor:
            if len(turns) < len(prompts) - places:
                steps.append((len(ids), next(iter(cache._own.values()))[0].data_ptr()))
            return decode(self, ids, cache, held)

        def turned(self: kv_cache.KeyValueCache, place: int, prompt: int) -> None:
            turns.append(prompt)
            put(self, place, prompt)

        with cpu.off():
            expected = roll(adapted, **given, end_id=end_id)
            monkeypatch.setattr(kv_cache, "FIXED", ("cpu",))
            monkeypatch.setattr(Model, "decode", noted)
            monkeypatch.setattr(kv_cache.KeyValueCache, "put", turned)
            found = roll(adapted, **given, end_id=end_id, max_rows=max_rows)
            probe(adapted, found, "policy")
        assert turns == list(range(places, 5))
        assert {rows for rows, _ in steps} == ({places * 4} if turns else set()) and len(set(steps)) <= 1
        assert (found.completions, found.ended) == (expected.completions, expected.ended)
        for one, other in zip(found.sampler_logprobs, expected.sampler_logprobs, strict=True):
            assert one == pytest.approx(other, abs=1e-5)

    @pytest.mark.parametrize("sight", [FULL, Sight(window=3), Sight(chunk=4)])
    def test_a_prompt_in_anothers_place_is_seen_as_one_alone(
        self, monkeypatch: pytest.MonkeyPatch, sight: Sight
    ) -> None:
        lengths, draw, device = [4, 2, 5], torch.Generator().manual_seed(0), torch.device("cpu")
        places = [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
        keys, values = (torch.randn(2, sum(lengths), 8, generator=draw) for _ in range(2))
        query, key, value = (torch.randn(6, 2, heads, 1, 8, generator=draw) for heads in (4, 2, 2))

        def began(positions: list[list[int]]) -> kv_cache.KeyValueCache:
            cache = kv_cache.KeyValueCache(positions, device, {0: sight})
            cache.record(0, keys, values)
            return cache

        def stepped(cache: kv_cache.KeyValueCache, steps: range) -> list[torch.Tensor]:
            found = list[torch.Tensor]()
            for at in steps:
                found.append(cache.attend(0, query[at], key[at], value[at], 0.3))
                cache.advance()
            return found

        with cpu.off():
            alone = began(places[2:])
            alone.fork(2)
            expected = stepped(alone, range(3, 6))
            monkeypatch.setattr(kv_cache, "FIXED", ("cpu",))
            cache = began(places)
            cache.fork(2, 4, places=1)
            stepped(cache, range(3))
            for keys_and_values in cache._own.values():
                for own in keys_and_values:
                    own[1, 0, 1] = torch.nan  # of a row that diverged
            cache.put(0, 2)
            assert cache.positions().tolist() == [5, 5]
            for one, other in zip(stepped(cache, range(3, 6)), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)

    def test_rows_that_have_ended_stay_at_their_last_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """While others go on: a position beyond is one that the network may not have."""
        monkeypatch.setattr(kv_cache, "FIXED", ("cpu",))
        cache = kv_cache.KeyValueCache([[0, 1, 2], [3]], torch.device("cpu"))
        cache.record(0, torch.randn(1, 4, 8), torch.randn(1, 4, 8))
        cache.fork(1, 5)
        for _ in range(20):
            cache.advance()
        assert cache.positions().tolist() == [3 + 4, 1 + 4]

    def test_buffers_of_one_shape_grow(self, adapted: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv_cache, "FIXED", ("cpu",))
        monkeypatch.setattr(kv_cache, "GROW", 3)
        ids = [5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17]
        with cpu.off():
            _, kept = adapted.prefill([ids[:4]], "policy")
            kept.fork(1)
            for token in ids[4:]:
                found = adapted.decode(torch.tensor([token]), kept, "policy")
        torch.testing.assert_close(found, adapted.last_states(apart([ids]), "policy"), rtol=0, atol=1e-5)

    def test_rows_and_prompts_that_end_leave_the_others(self, adapted: Model) -> None:
        prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 9]]
        states, kept = adapted.prefill(prompts, "policy")
        assert isinstance(kept, kv_cache.KeyValueCache)
        kept.fork(2)
        tokens = torch.tensor([11, 12, 13, 14, 15, 16])
        adapted.decode(tokens, kept, "policy")
        left = torch.tensor([1, 4, 5])  # one row of the first prompt, none of the second, both of the third
        kept.keep(left)
        assert kept.rows.tolist() == [0, 1, 1] and kept.positions().tolist() == [5, 4, 4]
        found = adapted.decode(torch.tensor([21, 22, 23]), kept, "policy")
        whole = [[5, 6, 7, 8, 12, 21], [5, 6, 9, 15, 22], [5, 6, 9, 16, 23]]
        expected = adapted.last_states(apart(whole, packing="none"), "policy")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            states, adapted.last_states(apart(prompts, packing="none"), "policy"), rtol=0, atol=1e-5
        )

    def test_attention_by_hand(self) -> None:
        """One prompt of two tokens, two rows, one head of width 1, scale 1: softmax over [ln 1, ln 3, ln 4] q."""
        kept = kv_cache.KeyValueCache([[0, 1]], torch.device("cpu"))
        logs = torch.tensor([1.0, 3.0]).log()
        kept.record(0, logs.view(1, 2, 1), torch.tensor([8.0, 16.0]).view(1, 2, 1))
        kept.fork(2)
        own = torch.tensor([4.0, 4.0]).log().view(2, 1, 1, 1)
        query, value = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1), torch.tensor([24.0, 0.0]).view(2, 1, 1, 1)
        found = kept.attend(0, query, own, value, 1.0)
        # Row 0: (1 * 8 + 3 * 16 + 4 * 24) / 8 = 19; row 1 looks at all alike: (8 + 16 + 0) / 3 = 8.
        assert found.flatten().tolist() == pytest.approx([19.0, 8.0])


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "gemma", "gpt_neox", "gpt2", "opt"])
def test_other_networks_sample_what_they_compute(kind: str) -> None:
    """Learned and rotary positions, fused and shared projections: opening a model compares shared prefixes and the
    sampler's cache with separate sequences; here the tokens of a few steps as well.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {
        "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
        "opt": {**sizes, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "gpt_neox": sizes,
    }.get(kind, {**sizes, "num_key_value_heads": 2, "head_dim": 8})
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": END}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCAB, **ends, **own)).float()
    expected = [greedy(network.eval(), prompt) for prompt in PROMPTS]
    found = roll(Model(network, {"name": kind, "sha256": ""}), samples=2, temperature=0, end_id=-1, adapter=None)
    assert found.completions == [ids for ids in expected for _ in range(2)]
