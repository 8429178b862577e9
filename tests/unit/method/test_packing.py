"""Prefix trees, micro-batches, padding: properties over random sequences, and small cases worked by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perlhf.method.packing import (
    Ids,
    Layout,
    Packing,
    Tokens,
    batches,
    common_prefix,
    completed,
    join_rows,
    lay_out,
    length_mask,
    microbatches,
    pack,
    pad,
    rows_of,
)

PACKINGS: tuple[Packing, ...] = ("none", "tree")
# A small alphabet, so that prefixes are often shared.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8)
EXAMPLES = st.lists(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=3), max_size=8)


def ids_of(layout: Layout, sequence: int, length: int) -> list[int]:
    flat = layout.ids.flatten()
    return [int(flat[layout.indices(sequence, position, 1)[0]]) for position in range(length)]


def distinct_prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[: n + 1]) for ids in sequences for n in range(len(ids))}


def path_of(layout: Layout, at: int) -> list[int]:
    """Packed positions that the token at `at` may look at, by the nodes."""
    assert layout.nodes is not None
    node = next(node for node in layout.nodes if node.start <= at < node.start + node.length)
    before = [i for start, length in node.prefix for i in range(start, start + length)]
    return [*before, *range(node.start, at + 1)]


class TestLayout:
    @pytest.mark.parametrize("packing", PACKINGS)
    @given(sequences=SEQUENCES)
    def test_every_token_of_every_sequence_is_somewhere(self, packing: Packing, sequences: list[list[int]]) -> None:
        layout = lay_out(sequences, packing)
        positions = layout.positions.flatten()
        for i, ids in enumerate(sequences):
            assert ids_of(layout, i, len(ids)) == ids
            found = layout.indices(i, 0, len(ids))
            assert found == [layout.indices(i, position, 1)[0] for position in range(len(ids))]
            assert layout.ends()[i] == found[-1]
            # a token's position is its depth, also after a branch
            assert positions[found].tolist() == list(range(len(ids)))

    @given(sequences=SEQUENCES)
    def test_a_tree_computes_each_prefix_once(self, sequences: list[list[int]]) -> None:
        layout = lay_out(sequences, "tree")
        assert layout.tokens == len(distinct_prefixes(sequences))
        assert layout.ids.shape == (1, layout.tokens)

    @given(sequences=SEQUENCES)
    def test_a_token_sees_its_own_prefix_and_nothing_else(self, sequences: list[list[int]]) -> None:
        layout = lay_out(sequences, "tree")
        for i, ids in enumerate(sequences):
            places = layout.indices(i, 0, len(ids))
            for position, at in enumerate(places):
                assert path_of(layout, at) == places[: position + 1]

    @given(sequences=SEQUENCES)
    def test_nodes_cover_every_token_once(self, sequences: list[list[int]]) -> None:
        layout = lay_out(sequences, "tree")
        assert layout.nodes is not None
        covered = [i for node in layout.nodes for i in range(node.start, node.start + node.length)]
        assert covered == list(range(layout.tokens))

    def test_by_hand(self) -> None:
        sequences = [[1, 2, 3], [1, 2], [1, 2, 4, 5], [7], [1, 2, 3]]
        layout = lay_out(sequences, "tree")
        # descending: 7 | 1 2 4 5 | (1 2) 3 | and the rest lie within those
        assert layout.ids.tolist() == [[7, 1, 2, 4, 5, 3]]
        assert layout.positions.tolist() == [[0, 0, 1, 2, 3, 2]]
        assert layout.spans == (((1, 2), (5, 1)), ((1, 2),), ((1, 4),), ((0, 1),), ((1, 2), (5, 1)))
        assert layout.indices(2, 1, 2) == [2, 3] and layout.indices(0, 2, 1)[0] == 5

    def test_none_pads_each_sequence_to_the_longest(self) -> None:
        layout = lay_out([[1, 2, 3], [1]], "none")
        assert layout.ids.tolist() == [[1, 2, 3], [1, 0, 0]]
        assert layout.nodes is None and layout.tokens == 4
        assert layout.indices(1, 0, 1)[0] == 3


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_common_prefix(first: list[int], second: list[int]) -> None:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    assert common_prefix(first, second) == common_prefix(tuple(second), tuple(first)) == count


def cost(batch: list[int], examples: list[list[list[int]]], packing: Packing) -> int:
    """Tokens that a forward pass computes for these examples."""
    rows = [ids for i in batch for ids in examples[i]]
    return len(distinct_prefixes(rows)) if packing == "tree" else len(rows) * max(map(len, rows))


class TestMicrobatches:
    @pytest.mark.parametrize("packing", PACKINGS)
    @given(examples=EXAMPLES, max_tokens=st.integers(1, 40))
    def test_each_example_once_within_the_budget(
        self, packing: Packing, examples: list[list[list[int]]], max_tokens: int
    ) -> None:
        batches = microbatches(examples, max_tokens, packing)
        assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
        for batch in batches:
            assert batch and (len(batch) == 1 or cost(batch, examples, packing) <= max_tokens)
        assert microbatches(examples, max_tokens, packing) == batches

    @pytest.mark.parametrize("packing", PACKINGS)
    def test_nothing_and_everything(self, packing: Packing) -> None:
        assert microbatches([], 10, packing) == []
        examples: list[list[Ids]] = [[[i, 1]] for i in range(5)]
        assert [sorted(batch) for batch in microbatches(examples, 1000, packing)] == [[0, 1, 2, 3, 4]]
        assert len(microbatches(examples, 1, packing)) == 5

    def test_padding_counts_where_there_is_padding(self) -> None:
        # rows of 5 and 1 tokens: padded 2 * 5 = 10, in a tree 6
        examples = [[[1, 2, 3, 4, 5]], [[9]]]
        assert microbatches(examples, 9, "none") == [[0], [1]]
        assert microbatches(examples, 10, "none") == [[0, 1]]
        assert len(microbatches(examples, 6, "tree")) == 1
        assert len(microbatches(examples, 5, "tree")) == 2

    def test_a_shared_prompt_counts_once(self) -> None:
        # prompt 1 2 3, two answers each of one token: 5 tokens, not 8
        examples = [[[1, 2, 3, 4], [1, 2, 3, 5]]]
        assert len(microbatches([*examples, [[1, 2, 3, 6]]], 6, "tree")) == 1
        assert len(microbatches([*examples, [[1, 2, 3, 6]]], 5, "tree")) == 2

    def test_accepts_tuples_and_lists_alike(self) -> None:
        listed: list[list[Ids]] = [[[1, 2, 3]], [[1, 2]], [[5]]]
        mixed: list[list[Ids]] = [[(1, 2, 3)], [[1, 2]], [(5,)]]
        assert microbatches(listed, 4, "tree") == microbatches(mixed, 4, "tree")


def test_pad_and_mask() -> None:
    assert pad([[5, 6], [7], []], 9).tolist() == [[5, 6], [7, 9], [9, 9]]
    assert pad([(5,)], 0).dtype == torch.long
    assert pad([], 0).shape == (0, 0)
    assert length_mask([2, 1, 0]).tolist() == [[True, True], [True, False], [False, False]]
    assert length_mask([]).shape == (0, 0)
    assert length_mask([0]).shape == (1, 0)


class TestBatch:
    """Two examples: a conversation with two completions in it, and a comparison of two sequences."""

    EXAMPLES = (
        [Tokens((1, 2, 3, 4, 5, 6), ((2, 1), (4, 2)))],
        [completed((1, 2), (3, 9)), completed((1, 2), (8,))],
    )

    @pytest.mark.parametrize("packing", ["tree", "none"])
    def test_completion_tokens_are_predicted_from_the_one_before(self, packing: Packing) -> None:
        batch = pack(self.EXAMPLES, packing)
        flat = batch.ids.flatten()
        assert flat[batch.predicting].tolist() == [2, 4, 5, 2, 3, 2]
        assert batch.targets.tolist() == [3, 5, 6, 3, 9, 8]
        assert batch.completion_mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
        assert flat[batch.ends].tolist() == [6, 9, 8]
        assert [flat[batch.places(row)].tolist() for row in range(3)] == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [1, 2, 8]]
        assert (batch.examples, batch.first, batch.sequences) == ((0, 1), (0, 1), (0, 1, 2))
        assert batch.tokens == (8 if packing == "tree" else 13)

    def test_examples_stay_whole_and_know_their_places(self) -> None:
        first, second = batches(self.EXAMPLES, 6, "tree")
        assert (first.examples, first.sequences, first.first) == ((1,), (1, 2), (0,))
        assert (second.examples, second.sequences, second.first) == ((0,), (0,), (0,))

    def test_rows_of_an_update_and_back(self) -> None:
        laid_out = batches(self.EXAMPLES, 6, "tree")
        parts = [torch.tensor([[4.0, 5], [6, 0]]), torch.tensor([[1.0, 2, 3]])]
        whole = join_rows(laid_out, parts)
        assert whole.tolist() == [[1, 2, 3], [4, 5, 0], [6, 0, 0]]
        assert all(torch.equal(rows_of(whole, batch), part) for batch, part in zip(laid_out, parts, strict=True))

    def test_a_completion_needs_a_prompt(self) -> None:
        with pytest.raises(AssertionError, match="predicted from"):
            completed((), (1,))
