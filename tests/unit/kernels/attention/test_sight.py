"""How far back layers see: read from mask functions as transformers makes them."""

import pytest
import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from perlhf.kernels.attention.sight import FULL, Sight


@pytest.mark.parametrize("size", [1, 2, 3, 7, 128, 4096, 1 << 17])
def test_windows_and_chunks_are_read_from_their_masks(size: int) -> None:
    assert Sight.of(sliding_window_causal_mask_function(size)) == Sight(window=size)
    chunked = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int))
    assert Sight.of(chunked) == (Sight(window=1) if size == 1 else Sight(chunk=size))


def test_other_masks() -> None:
    assert Sight.of(causal_mask_function) == FULL
    assert Sight.of(bidirectional_mask_function) is None

    def every_second(row, head, query, key):
        return (key <= query) & ((query - key) % 2 == 0)

    assert Sight.of(every_second) is None


def test_first_token_that_is_seen_by_hand() -> None:
    depths = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    assert FULL.first(depths).tolist() == [0] * 7
    assert Sight(window=3).first(depths).tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert Sight(chunk=3).first(depths).tolist() == [0, 0, 0, 3, 3, 3, 6]
    assert [Sight(window=3).first(depth) for depth in (0, 5)] == [0, 3] and Sight(chunk=3).first(5) == 3
