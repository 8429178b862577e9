"""Layers that are computed once more in the backward pass: the same bits, from their inputs alone."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import answers, open_model, random_ids, randomise
from torch import Tensor

from perlhf.method.packing import Packing
from perlhf.model.bases.found import Base
from perlhf.model.model import Model

LENGTHS = (40, 12, 70, 3)


def learned(model: Model, batch: Any, **given: Any) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities and the gradients of the adapter."""
    logprobs = model.logprobs(batch, "policy", **given).logprobs
    parameters = list(model.adapters["policy"].trainable())
    return logprobs.detach(), list(torch.autograd.grad(logprobs.square().sum(), parameters))


def with_adapter(base: Path, dtype: str, dropout: float = 0.0) -> Model:
    model = Model.load(Base(base), dtype, "cpu")
    model.add_adapter("policy", "policy", targets="all", dropout=dropout)
    randomise(model, "policy")
    return model


@pytest.mark.parametrize("packing", ["tree", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [None, "drawn", "keyed"])
def test_values_and_gradients_are_the_same_bits(tiny_base: Path, packing: Packing, dtype: str, dropout: str | None):
    model = with_adapter(tiny_base, dtype, 0.3 if dropout else 0.0)
    batch = answers(random_ids(LENGTHS), random_ids((5, 9, 1, 7), seed=1), packing)
    given = {"dropout": dropout is not None, "dropout_key": 7 if dropout == "keyed" else None}
    found = []
    for again in (False, True):
        if again:
            assert model.recompute_layers()
        torch.manual_seed(3)
        found.append(learned(model, batch, **given))
    (kept, by_kept), (recomputed, by_recomputed) = found
    assert torch.equal(kept, recomputed)
    assert all(torch.equal(one, other) for one, other in zip(by_kept, by_recomputed, strict=True))
    assert any(one.any() for one in by_kept)


def test_what_is_kept_and_computed(tiny_base: Path) -> None:
    """A layer is computed anew by the call of the first time, also where another thread goes backward."""
    model = with_adapter(tiny_base, "float32")
    batch = answers(random_ids(LENGTHS), random_ids((5, 9, 1, 7), seed=1))
    calls, kept = [], []
    model.decoder.get_submodule("layers.0.mlp").register_forward_pre_hook(lambda *_: calls.append(1))

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = model.logprobs(batch, "policy").logprobs
    before, expected = sum(kept), torch.autograd.grad(logprobs.sum(), list(model.adapters["policy"].trainable()))
    assert len(calls) == 1
    model.recompute_layers()
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = model.logprobs(batch, "policy").logprobs
    # The last norm and the head, as before: what layers keep is out of the graph's sight.
    assert sum(kept) < before / 4
    assert len(calls) == 2
    found: list[Tensor] = []

    def go_back() -> None:
        found.extend(torch.autograd.grad(logprobs.sum(), list(model.adapters["policy"].trainable())))

    thread = threading.Thread(target=go_back)
    thread.start()
    thread.join()
    assert len(calls) == 3, "once more in the backward pass"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_nothing_is_computed_twice_without_gradients(tiny_base: Path) -> None:
    model, calls = open_model(tiny_base), list[int]()
    model.recompute_layers()
    model.decoder.get_submodule("layers.1.mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    model.prefill([[1, 2, 3]], None)
    assert len(calls) == 1
