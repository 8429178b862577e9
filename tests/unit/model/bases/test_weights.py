"""Tensors of files, read one by one; memory that isn't there is said before it is needed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from perlhf.errors import ModelError
from perlhf.model.bases import weights
from perlhf.model.bases.weights import open_weights, room_for

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files with a tensor of each kind."""
    one, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"wide": torch.ones(10, 30), "ids": torch.arange(7)}, one)
    save_file({"narrow": torch.ones(20, 10, dtype=torch.bfloat16)}, other)
    return [one, other]


def test_what_is_stored_as_it_is_used_is_mapped(files: list[Path]) -> None:
    found = open_weights(files, torch.bfloat16, CPU)
    assert {name: (stored.bytes, stored.mapped) for name, stored in found.items()} == {
        "wide": (600, False),
        "ids": (7, True),
        "narrow": (400, True),
    }
    assert torch.equal(found["wide"].tensor[...], torch.ones(10, 30))
    on_gpu = open_weights(files, torch.bfloat16, torch.device("cuda:0"))
    assert not any(stored.mapped for stored in on_gpu.values())
    assert set(weights.names_in(files)) == set(found)


@pytest.mark.parametrize(
    ("dtype", "free", "total", "said"),
    [
        # float32: 300 * 4 mapped + 200 * 4 copied + 7
        (torch.float32, 800, 2007, None),
        (torch.float32, 799, 2007, "take 0 MiB of memory in float32, of which 0 MiB are free"),
        (torch.float32, 800, 2006, "take 0 MiB of memory in float32"),
        (torch.bfloat16, 600, 1007, None),
        (torch.bfloat16, 599, 1007, "in bfloat16"),
    ],
)
def test_what_is_copied_needs_free_memory_and_all_of_it_a_machine(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, free: int, total: int, said: str | None
) -> None:
    monkeypatch.setattr(weights, "free_memory_bytes", lambda device: free)
    monkeypatch.setattr(weights, "memory_bytes", lambda: total)
    monkeypatch.setattr(weights.psutil, "swap_memory", lambda: SimpleNamespace(free=0))
    stored, entered = open_weights(files, dtype, CPU), []
    if said is None:
        with room_for(stored, dtype, CPU, "there"):
            entered.append(True)
        assert entered
        return
    with pytest.raises(ModelError, match=said) as caught, room_for(stored, dtype, CPU, "there"):
        entered.append(True)
    assert not entered and caught.value.where == "there"
    hint = str(caught.value.hint)
    assert "--quantize nf4" in hint and ("--dtype bfloat16" in hint) == (dtype == torch.float32)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_runs_full_all_the_same_is_said_in_the_same_words(files: list[Path], error: Exception) -> None:
    stored: Any = open_weights(files, torch.float32, CPU)
    with pytest.raises(ModelError, match=r"weights take .* of memory in float32, of which .* are free"):
        with room_for(stored, torch.float32, CPU, "there"):
            raise error
    with pytest.raises(RuntimeError, match="another"), room_for(stored, torch.float32, CPU, "there"):
        raise RuntimeError("another")
