"""Several adapters in one pass: scores and gradients are those of separate passes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from tiny_models import apart, random_ids, randomise
from torch import Tensor

from perlhf.kernels import members
from perlhf.kernels.call import Call, calling, current_call
from perlhf.model.model import Model
from perlhf.rollout.ensemble import in_one_pass, member_scores, passes

LONG, SHORT = random_ids([11, 4], seed=3)
SEQUENCES = [[*LONG, 7, 8], [*LONG, 9], SHORT, LONG[:5]]
NAMES = ("one", "two", "three")


def ensemble(model: Model, layers: str, targets: Any = ("attention", "all", "attention")) -> Model:
    """Three members of unlike ranks and layers."""
    for number, (name, chosen) in enumerate(zip(NAMES, targets, strict=True)):
        model.add_adapter(name, "reward", rank=2 + number, targets=chosen, layers=layers)
        randomise(model, name, seed=number)
    return model


def with_gradients(model: Model, scores: Tensor) -> dict[str, Tensor]:
    """Scores, and the gradients of a sum in which each of them has another weight."""
    weights = torch.linspace(0.5, 2.0, scores.numel()).view(scores.shape)
    tensors = {f"{name} {key}": t for name in NAMES for key, t in model.adapters[name].trainable_by_name().items()}
    grads = torch.autograd.grad((scores * weights).sum(), list(tensors.values()), allow_unused=True)
    return {"scores": scores.detach()} | {k: g for k, g in zip(tensors, grads, strict=True) if g is not None}


@pytest.mark.parametrize("packing", ["tree", "none"])
@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_scores_and_gradients_are_those_of_separate_passes(
    model: Model, layers: str, packing: Literal["tree", "none"]
) -> None:
    batch = apart(SEQUENCES, packing)
    ensemble(model, layers)
    assert in_one_pass(model, sorted({path for name in NAMES for path in model.adapters[name].pairs}))
    together = with_gradients(model, member_scores(model, batch, NAMES))
    alone = with_gradients(model, torch.stack([model.scores(batch, name) for name in NAMES]))
    assert set(together) == set(alone)
    assert len({tuple(row.tolist()) for row in together["scores"]}) == 3  # members differ
    for name, expected in alone.items():
        near = 1e-5 if name == "scores" else 5e-4
        assert float((together[name] - expected).norm()) <= near * float(expected.norm()), name


def test_members_that_learn_on_another_adapter(model: Model) -> None:
    model.add_adapter("sft", "policy", rank=2, targets="all")
    randomise(model, "sft", seed=9)
    for number, name in enumerate(NAMES):
        model.add_adapter(name, "reward", rank=2, beneath="sft" if number else None)
        randomise(model, name, seed=number)
    batch = apart(SEQUENCES)
    expected = torch.stack([model.scores(batch, name) for name in NAMES])
    assert torch.allclose(member_scores(model, batch, NAMES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beneath", [None, "sft"])
def test_the_trunk_is_computed_once(model: Model, beneath: str | None) -> None:
    """With an adapter that all of them have beneath, too."""
    if beneath is not None:
        model.add_adapter(beneath, "sft", rank=2, targets="all")
        randomise(model, beneath, seed=9)
        model.freeze(beneath)
    for number, name in enumerate(NAMES):
        model.add_adapter(name, "reward", rank=2 + number, layers="last:1", beneath=beneath)
        randomise(model, name, seed=number)
    batch = apart(SEQUENCES)
    assert passes(model, NAMES, "tree") == [NAMES] and passes(model, NAMES, "none") == [(name,) for name in NAMES]
    together = with_gradients(model, member_scores(model, batch, NAMES))
    alone = with_gradients(model, torch.stack([model.scores(batch, name) for name in NAMES]))
    for name, expected in alone.items():
        assert float((together[name] - expected).norm()) <= 5e-4 * float(expected.norm()), name
    widths: list[int] = []
    for layer in model.decoder.layers:  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
        layer.input_layernorm.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    member_scores(model, batch, NAMES)
    assert widths == [batch.tokens] * (len(widths) - 1) + [3 * batch.tokens]


def test_full_weights_and_experts_are_computed_apart(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble(model, "all")
    model.add_adapter("whole", "reward", tuning="full")
    randomise(model, "whole", seed=7)
    names = (*NAMES, "whole")
    batch = apart(SEQUENCES)
    monkeypatch.setattr(members, "states", None)  # not called
    expected = torch.stack([model.scores(batch, name) for name in names])
    assert torch.equal(member_scores(model, batch, names), expected)
    assert not in_one_pass(model, ["model.layers.0.mlp.experts.1.up_proj"])


def test_passes_in_other_threads_are_not_disturbed(model: Model) -> None:
    ensemble(model, "last:1", ("attention",) * 3)
    batch = apart(SEQUENCES)
    begin = threading.Barrier(4)

    def run(number: int) -> Tensor:
        begin.wait(60)
        with torch.no_grad():
            return member_scores(model, batch, NAMES) if number % 2 else model.scores(batch, "two")

    with torch.no_grad():
        alone, together = model.scores(batch, "two"), member_scores(model, batch, NAMES)
    for _ in range(10):
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(run, range(4)))
        for number, scores in enumerate(found):
            assert torch.equal(scores, together if number % 2 else alone)


def test_a_pass_that_meets_a_hook_half_registered(model: Model) -> None:
    """As another thread may see it: torch adds a hook before it notes what it takes."""
    batch = apart(SEQUENCES)
    layers = list(model.decoder.layers)  # pyright: ignore[reportArgumentType]
    with torch.no_grad(), ThreadPoolExecutor(1) as other:
        expected = model.last_states(batch, None)
        with calling(replace(current_call())), members.repeated_from(layers, 2, batch.tokens, Call()):
            for layer in layers:
                layer._forward_pre_hooks_with_kwargs.clear()
            found = other.submit(model.last_states, batch, None).result(60)
    assert torch.equal(found, expected)


def test_nothing_is_left_of_the_trial(model: Model) -> None:
    ensemble(model, "last:1")
    member_scores(model, apart(SEQUENCES), NAMES)
    assert set(model.adapters) == set(NAMES)
    assert current_call().members == () and not any(module._forward_pre_hooks for module in model.base.modules())


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["model.layers.10.mlp.up_proj", "model.layers.9.self_attn.q_proj"], ("model.layers", 9)),
        (["model.layers.1.mlp.up_proj", "model.embed_in"], None),
        (["a.layers.1.x", "b.layers.0.x"], None),
        ([], None),
    ],
)
def test_the_first_layer(paths: list[str], expected: tuple[str, int] | None) -> None:
    assert members.first_layer(paths) == expected
