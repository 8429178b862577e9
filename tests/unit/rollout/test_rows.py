"""Rows that come and go: each has what it would have alone, whatever else is computed with it."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import merged_network, open_model, random_ids, randomise, reference_logprobs

from perlhf.kernels import cpu
from perlhf.model.model import Model
from perlhf.rollout import rows as rows_module
from perlhf.rollout.local import Ends, sample, uniforms
from perlhf.rollout.rows import Groups, Row, Rows, Token, Under, Wish

LENGTH = 6
WAYS = {"native": nullcontext, "masked": cpu.off}


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Model:
    """Two adapters of other ranks and layers, one of them above a third, and one of whole weights."""
    model = open_model(tiny_base)
    model.add_adapter("sft", "sft", rank=2, targets="all")
    randomise(model, "sft", 1)
    model.add_adapter("above", "policy", rank=3, targets="attention", beneath="sft")
    randomise(model, "above", 2)
    model.add_adapter("alone", "policy", rank=5, targets=("q_proj", "down_proj"), layers="last:1")
    randomise(model, "alone", 3)
    model.add_adapter("whole", "policy", tuning="full")
    randomise(model, "whole", 4)
    return model


def under(model: Model, name: str | None) -> Under:
    return Under(name or "base", model.hold(name))


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    """Those of `uniforms(seed, 0, [0], count, ..)`."""
    import hashlib

    keys = [hashlib.sha256(f"{seed}:0:0:{number}".encode()).digest()[:16] for number in range(count)]
    return [np.random.Generator(np.random.Philox(key=int.from_bytes(key))) for key in keys]


def to_the_end(rows: Rows | Groups, length: int = LENGTH) -> dict[Row, list[Token]]:
    """Steps until all have left."""
    found: dict[Row, list[Token]] = {}
    for _ in range(1000):
        if not len(rows):
            return found
        for token in rows.step():
            found.setdefault(token.row, []).append(token)
            if len(token.row.ids) == length:
                rows.leave(token.row)
    raise AssertionError("rows that never end")


def all_came_back(rows: Rows) -> None:
    kept = {part for kept in rows.places._kept.values() for part, _ in kept.parts}
    assert rows.places.free + sum(part.length for part in kept) == rows.places.count
    for key in {kept.key for kept in rows.places._kept.values()}:
        rows.places.forget(key)
    assert rows.places.free == rows.places.count


def alone(model: Model, prompt: Sequence[int], name: str | None, count: int, seed: int = 0, temperature: float = 1.0):
    draws = uniforms(seed, 0, [0], count, LENGTH)
    return sample(
        model,
        [prompt],
        adapter=name,
        draws=draws,
        ends=Ends(()),
        temperature=temperature,
        max_completion_tokens=LENGTH,
    )


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from([None, "sft", "above", "alone"]), st.integers(1, 30), st.integers(1, 3)),
        min_size=1,
        max_size=6,
    ),
    alike=st.lists(st.integers(0, 30), min_size=6, max_size=6),
    pass_tokens=st.sampled_from([1, 7, 256]),
    every=st.integers(0, 4),
)
def test_each_has_what_it_would_have_alone(
    model: Model,
    way: str,
    asked: list[tuple[str | None, int, int]],
    alike: list[int],
    pass_tokens: int,
    every: int,
) -> None:
    rows = Rows(model, 400, pass_tokens)
    beginning, *prompts = random_ids([30, *(length for _, length, _ in asked)])
    prompts = [[*beginning[:same], *own[same:]][: len(own)] for same, own in zip(alike, prompts, strict=False)]
    waiting = list(zip(asked, prompts, strict=True))
    joined: list[list[Row]] = []
    found: dict[Row, list[Token]] = {}
    with WAYS[way]():
        for step in range(1000):
            while waiting and step % max(every, 1) == 0:
                (name, _, count), prompt = waiting.pop(0)
                own = rows.join(prompt, generators(count), LENGTH, under(model, name), Wish())
                assert own is not None
                joined.append(own)
                if every:  # else all at once
                    break
            if not waiting and not len(rows):
                break
            for token in rows.step():
                found.setdefault(token.row, []).append(token)
                if len(token.row.ids) == LENGTH:
                    rows.leave(token.row)
        for (name, _, count), prompt, own in zip(asked, prompts, joined, strict=True):
            expected = alone(model, prompt, name, count)
            for row, ids, logprobs in zip(own, expected.completions, expected.sampler_logprobs, strict=True):
                assert row.ids == ids
                assert [token.logprob for token in found[row]] == pytest.approx(logprobs, abs=5e-4)
    all_came_back(rows)


def test_against_the_merged_network_of_transformers(tiny_base: Path, model: Model) -> None:
    rows = Rows(model, 200)
    names = {"above": ("sft", "above"), "alone": ("alone",), None: ()}
    prompts = random_ids([9, 4, 13])
    for (name, _), prompt in zip(names.items(), prompts, strict=True):
        rows.join(prompt, generators(1), LENGTH, under(model, name), Wish(temperature=0.7))
    found = to_the_end(rows)
    for (row, tokens), (_, chain), prompt in zip(found.items(), names.items(), prompts, strict=True):
        expected = reference_logprobs(merged_network(tiny_base, model, *chain), prompt, row.ids, 0.7)
        assert [token.logprob for token in tokens] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass."""
    counts: list[int] = []
    extend = Model.extend

    def counted(self: Model, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        counts.append(len(ids))
        return extend(self, ids, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Model, "extend", counted)
    return counts


def test_a_prompt_that_begins_as_an_earlier_one_is_not_computed_again(model: Model, computed: list[int]) -> None:
    rows = Rows(model, 300)
    (prompt,) = random_ids([20])
    rows.join(prompt, generators(1), LENGTH, under(model, "above"), Wish())
    (first,) = to_the_end(rows)
    assert computed == [20, 1, 1, 1, 1, 1]
    # The next turn of the conversation: all but the last sampled token is there, and its own seven tokens are new.
    computed.clear()
    longer = [*prompt, *first.ids, *random_ids([6], seed=5)[0]]
    rows.join(longer, generators(2), LENGTH, under(model, "above"), Wish())
    found = to_the_end(rows)
    assert computed == [7, 2, 2, 2, 2, 2]
    expected = alone(model, longer, "above", 2)
    assert [row.ids for row in found] == expected.completions
    # Another adapter's keys are other keys.
    computed.clear()
    rows.join(longer, generators(1), LENGTH, under(model, "alone"), Wish())
    to_the_end(rows)
    assert computed[0] == len(longer)
    rows.forget(under(model, "above"))
    computed.clear()
    rows.join(longer, generators(1), LENGTH, under(model, "above"), Wish())
    to_the_end(rows)
    assert computed[0] == len(longer)


def test_what_prompts_that_come_together_have_in_common_is_computed_once(model: Model, computed: list[int]) -> None:
    beginning, *ends = random_ids([12, 8, 8, 5])
    prompts = [[*beginning, *ends[0]], [*beginning, *ends[1]], [*beginning[:4], *ends[2]], [*beginning, *ends[0]]]
    names = ["above", "above", "above", "alone"]
    rows = Rows(model, 300)
    for prompt, name in zip(prompts, names, strict=True):
        rows.join(prompt, generators(1), LENGTH, under(model, name), Wish())
    found = to_the_end(rows)
    assert computed == [20 + 8 + 5 + 20, 4, 4, 4, 4, 4], "another adapter's keys are other keys"
    for row, prompt, name in zip(found, prompts, names, strict=True):
        assert [row.ids] == alone(model, prompt, name, 1).completions
    all_came_back(rows)
    # In pieces of five: until the first twelve are computed, the second prompt waits for them; the third goes on.
    computed.clear()
    rows = Rows(model, 300, pass_tokens=5)
    own = [rows.join(prompt, generators(1), LENGTH, under(model, "above"), Wish()) for prompt in prompts[:3]]
    found = to_the_end(rows)
    assert sum(computed) == 20 + 8 + 5 + 3 * (LENGTH - 1)
    for rows_of, prompt in zip(own, prompts[:3], strict=True):
        assert rows_of and [rows_of[0].ids] == alone(model, prompt, "above", 1).completions
    all_came_back(rows)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5])
def test_a_prompt_that_others_wait_for_may_be_given_up(model: Model, computed: list[int], steps: int) -> None:
    beginning, *ends = random_ids([12, 8, 8])
    prompts = [[*beginning, *end] for end in ends]
    rows = Rows(model, 300, pass_tokens=5)
    first, second, third = (
        rows.join(prompt, generators(2), LENGTH, under(model, "above"), Wish())
        for prompt in (prompts[0], prompts[1], [*prompts[1], 7, 8])
    )
    assert first and second and third
    for _ in range(steps):
        rows.step()
    for row in (*first, *second):
        rows.leave(row)
    assert len(rows) == 2
    found = to_the_end(rows)
    assert [row.ids for row in third] == alone(model, [*prompts[1], 7, 8], "above", 2).completions
    assert set(found) == set(third)
    all_came_back(rows)
    if not steps:
        assert sum(computed) < 20 + 10 + 2 * (LENGTH - 1), "what nobody waits for isn't computed"


def test_who_leaves_early_disturbs_nobody(model: Model) -> None:
    rows = Rows(model, 300, pass_tokens=5)
    prompts = random_ids([12, 9, 11])
    staying = rows.join(prompts[0], generators(2), LENGTH, under(model, "above"), Wish())
    leaving = rows.join(prompts[1], generators(2), LENGTH, under(model, "alone"), Wish())
    unbegun = rows.join(prompts[2], generators(2), LENGTH, under(model, None), Wish())
    assert staying and leaving and unbegun
    rows.leave(unbegun[0])  # one of a prompt's rows, before the prompt is computed; then all
    while len(leaving[0].ids) < 2:
        rows.step()
    rows.leave(leaving[0])
    rows.leave(unbegun[1])
    rows.leave(leaving[1])
    found = to_the_end(rows)
    assert set(found) == set(staying)
    assert [row.ids for row in staying] == alone(model, prompts[0], "above", 2).completions


def test_there_is_room_or_nothing_is_taken(model: Model) -> None:
    rows = Rows(model, 40)
    prompt = random_ids([10])[0]
    own = rows.join(prompt, generators(4), LENGTH, under(model, None), Wish())
    assert own is not None and rows.places.free == 40 - 10 - 4 * LENGTH
    assert rows.join(prompt, generators(1), LENGTH, under(model, None), Wish()) is None
    assert rows.places.free == 6
    to_the_end(rows)
    assert rows.join(prompt, generators(4), LENGTH, under(model, None), Wish()) is not None, "what is kept gives way"
    to_the_end(rows)


def test_other_temperatures_and_nuclei_beside_each_other(model: Model) -> None:
    prompt = random_ids([8])[0]
    wishes = [Wish(0.0), Wish(1.0), Wish(0.5, likeliest=3), Wish(1.0, top_p=1e-6), Wish(0.0, top_p=0.5)]
    rows = Rows(model, 300)
    joined = [rows.join(prompt, generators(1), LENGTH, under(model, "above"), wish) for wish in wishes]
    found = to_the_end(rows)
    greedy = alone(model, prompt, "above", 1, temperature=0.0)
    plain = alone(model, prompt, "above", 1)
    cold = alone(model, prompt, "above", 1, temperature=0.5)
    for own, expected in zip(joined, (greedy, plain, cold, greedy, greedy), strict=True):
        assert own is not None
        assert own[0].ids == expected.completions[0]
        logprobs = [token.logprob for token in found[own[0]]]
        assert logprobs == pytest.approx(expected.sampler_logprobs[0], abs=5e-4)
    assert joined[2] is not None
    for token in found[joined[2][0]]:
        values = [logprob for _, logprob in token.likeliest]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        for number, logprob in token.likeliest:
            if number == token.id:
                assert logprob == pytest.approx(token.logprob, abs=5e-4)


def test_the_nucleus_by_hand() -> None:
    # Probabilities 0.5, 0.3, 0.2: the first two reach 0.6, the first alone 0.5, all of them 0.81.
    logits = torch.tensor([[0.3, 0.5, 0.2]]).log().repeat(3, 1)
    found = rows_module._nucleus(logits, torch.tensor([0.6, 0.5, 0.81]))
    assert found.tolist() == [[True, True, False], [False, True, False], [True, True, True]]


@pytest.mark.parametrize("name", [None, "above", "whole"])
def test_groups_have_what_each_has_alone(model: Model, name: str | None) -> None:
    groups = Groups(model, 4)
    prompts = random_ids([9, 4])
    joined = [groups.join(prompt, generators(2), LENGTH, under(model, name), Wish()) for prompt in prompts]
    assert groups.join(prompts[0], generators(1), LENGTH, under(model, name), Wish()) is None, "four are there"
    groups.step()
    assert groups.join(prompts[0], generators(1), LENGTH, under(model, name), Wish()) is None, "they have begun"
    assert joined[1] is not None
    groups.leave(joined[1][0])
    found = to_the_end(groups)
    assert len(found) == 3 and len(groups) == 0
    for own, prompt in zip(joined, prompts, strict=True):
        assert own is not None
        for number, row in enumerate(own):
            if row is not joined[1][0]:
                assert row.ids == alone(model, prompt, name, 2).completions[number]
    assert groups.join(prompts[0], generators(1), LENGTH, under(model, "alone"), Wish()) is not None
    assert groups.join(prompts[0], generators(1), LENGTH, under(model, "above"), Wish()) is None, "another adapter"


def test_a_wild_adapter_harms_nobody_else(model: Model) -> None:
    wild = model.copy_adapter("alone", "wild", "policy")
    for pair in wild.pairs.values():
        pair.b.data.fill_(1e30)
    rows = Rows(model, 100)
    prompt = random_ids([5])[0]
    rows.join(prompt, generators(1), LENGTH, under(model, "wild"), Wish())
    good = rows.join(prompt, generators(1), LENGTH, under(model, "alone"), Wish())
    assert good
    to_the_end(rows)
    assert good[0].ids == alone(model, prompt, "alone", 1).completions[0]
    model.adapters.pop("wild")
