"""Attention over a tree against softmax computed token by token: values and gradients, on trees of random shape."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perlhf.kernels import cpu, kv_cache, tree_attention
from perlhf.method.packing import Layout, lay_out

SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=5)
SCALING = 0.3


def slow(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """[heads, tokens, width], each token's softmax written out over the tokens before it in its sequence."""
    share = len(query) // len(key)
    rows: dict[int, Tensor] = {}
    for i in range(len(layout.spans)):
        path = layout.indices(i, 0, layout.tokens)
        for position, at in enumerate(path):
            seen = path[: position + 1]
            heads = []
            for head in range(len(query)):
                p = torch.softmax(SCALING * (key[head // share, seen] @ query[head, at]), 0)
                heads.append(p @ value[head // share, seen])
            rows[at] = torch.stack(heads)
    return torch.stack([rows[at] for at in range(layout.tokens)], 1)


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [4, tokens, 8], key and value [2, tokens, 8]: two heads share keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(heads, tokens, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    return query, key, value


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    """By our own kernels where they are compiled, by torch's, by matrix products backward, or under a mask."""
    with pytest.MonkeyPatch.context() as patch, nullcontext() if way == "native" else cpu.off():
        if way == "written out":
            patch.setattr(tree_attention, "_by_kernel", tree_attention._written_out)
        patch.setattr(kv_cache, "KERNELS", () if way == "masked" else ("cpu",))
        yield


@pytest.mark.parametrize("way", ["native", "kernel", "written out", "masked"])
@given(sequences=SEQUENCES)
def test_equals_the_slow_twin(way: str, sequences: list[list[int]]) -> None:
    layout = lay_out(sequences, "tree")
    assert layout.nodes is not None
    tensors = query, key, value = inputs(layout.tokens)
    expected = slow(query, key, value, layout)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    with pytest.MonkeyPatch.context() as patch, computed_by(way):
        patch.setattr(tree_attention, "WRITTEN_OUT_TOKENS", 2)
        tree_attention._table.cache_clear()
        found = tree_attention.tree_attention(query, key, value, layout.nodes, SCALING)
        grads = torch.autograd.grad((found * weight).sum(), tensors)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-4)


def test_by_hand() -> None:
    # One head of width 1, scaling 1. Token 1 sees keys 0 and ln 3 with query 1: weights 1/4 and 3/4 of values 4 and 8.
    layout = lay_out([[1, 2]], "tree")
    assert layout.nodes is not None
    query, key, value = (torch.tensor(x).view(1, 2, 1) for x in ([1.0, 1.0], [0.0, 1.0986123], [4.0, 8.0]))
    found = tree_attention.tree_attention(query, key, value, layout.nodes, 1.0)
    assert found.flatten().tolist() == pytest.approx([4.0, 7.0])


def test_a_path_in_one_piece_is_read_without_a_copy() -> None:
    key = torch.zeros(2, 300, 8)
    before = tree_attention._path(key, ((10, 5), (15, 7)))
    assert before.data_ptr() == key[:, 10].data_ptr() and before.shape[1] == 12
    assert tree_attention._path(key, ((10, 5), (30, 7))).shape[1] == 12


@pytest.mark.parametrize("lengths", [(700, 300), (40, 900), (1, 1)])
def test_long_nodes_and_bfloat16(lengths: tuple[int, int]) -> None:
    """Sizes at which the kernel works in several blocks; in bfloat16 as near as its rounding."""
    first, second = ([*range(n)] for n in lengths)
    layout = lay_out([[1000, *first], [1000, *first[: len(first) // 2], *(2000 + i for i in second)]], "tree")
    assert layout.nodes is not None
    tensors = inputs(layout.tokens)
    results: dict[str, list[Tensor]] = {}
    ways = ("written out", torch.float32), ("kernel", torch.float32), ("masked", torch.float32)
    for way, dtype in (*ways, ("kernel", torch.bfloat16), ("masked", torch.bfloat16)):
        query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors)
        with computed_by(way):
            found = tree_attention.tree_attention(query, key, value, layout.nodes, SCALING)
            results[f"{way} {dtype}"] = [found, *torch.autograd.grad(found.float().square().sum(), (query, key, value))]
    for exact, *same, first, second in zip(*(results[n] for n in results), strict=True):
        for one in same:
            torch.testing.assert_close(one, exact, atol=2e-5, rtol=1e-4)
        for coarse in (first, second):
            assert ((coarse.float() - exact).norm() / exact.norm().clamp_min(1e-6)).item() < 0.03 or exact.norm() < 1e-4


def test_later_tokens_and_other_branches_change_nothing() -> None:
    layout = lay_out([[1, 2, 3], [1, 2, 4, 5], [9]], "tree")
    assert layout.nodes is not None
    query, key, value = (tensor.detach() for tensor in inputs(layout.tokens))
    before = tree_attention.tree_attention(query, key, value, layout.nodes, SCALING)
    at = layout.indices(1, 2, 1)[0]  # of 4, which only 4 and 5 see
    key[:, at], value[:, at] = 7.0, -7.0
    after = tree_attention.tree_attention(query, key, value, layout.nodes, SCALING)
    changed = (before != after).any(-1).any(0).nonzero().flatten().tolist()
    assert changed == [at, layout.indices(1, 3, 1)[0]]
