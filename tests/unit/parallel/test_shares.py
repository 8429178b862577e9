"""Shares of an update: everybody gets some, nothing is lost, and tokens are balanced."""

import random

import pytest
import torch

from perlhf.method.packing import Tokens, batches, lay_out
from perlhf.parallel.shares import balanced, own_batches, own_of, shares
from perlhf.parallel.workers import ALONE, Workers


def test_the_dearest_go_first_to_who_has_the_least():
    # 9 -> worker 0; 7 -> 1; 6 -> 1 (7 < 9, so 13); 5 -> 0 (14); 1 -> 1 (14)
    assert balanced([5, 9, 1, 7, 6], 2) == [[0, 1], [2, 3, 4]]
    assert balanced([1.0], 3) == [[0], [], []]
    assert balanced([], 2) == [[], []]


def test_neighbours_in_a_tree_stay_together():
    """Two conversations: cutting between them costs nothing, inside one its beginning twice."""
    examples = [[[1, 1, 1, 1, n]] for n in range(4)] + [[[2, 2, 2, 2, n]] for n in range(4)]
    assert shares(examples, 2, "tree") == [[4, 5, 6, 7], [0, 1, 2, 3]]


@pytest.mark.parametrize("packing", ["tree", "none"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_example_has_one_worker_and_all_have_about_as_many_tokens(packing, count):
    draw = random.Random(7)
    roots = [[draw.randrange(9) for _ in range(20)] for _ in range(3)]
    examples = [
        [draw.choice(roots) + [draw.randrange(50) for _ in range(draw.randrange(1, 30))] for _ in range(2)]
        for _ in range(24)
    ]
    found = shares(examples, count, packing)
    assert sorted(i for own in found for i in own) == list(range(24))
    assert len(found) == count and all(own == sorted(own) and own for own in found)
    tokens = [lay_out([ids for i in own for ids in examples[i]], packing).tokens for own in found]
    assert max(tokens) <= sum(tokens) / count + 100, "no more than an example from equal"


def test_nobody_is_left_without_any_and_more_workers_than_examples_are_taken():
    assert [len(own) for own in shares([[[1]], [[1]], [[1]]], 3, "tree")] == [1, 1, 1]
    assert sorted(len(own) for own in shares([[[1, 2]], [[1, 3]]], 4, "tree")) == [0, 0, 1, 1]


def test_a_share_keeps_the_numbers_of_the_whole_update():
    examples = [[Tokens([n, n + 1, n + 2], ((1, 2),)), Tokens([n, 9], ((1, 1),))] for n in range(4)]
    (batch,) = batches(examples, 1000, "tree", chosen=[1, 3])
    assert sorted(batch.examples) == [1, 3]
    assert sorted(batch.sequences) == [2, 3, 6, 7]
    one, two = (own_batches(examples, 1000, "tree", "cpu", Workers(number, 2)) for number in (0, 1))
    assert sorted(i for part in (*one, *two) for i in part.examples) == [0, 1, 2, 3]
    (whole,) = own_batches(examples, 1000, "tree", "cpu", ALONE)
    assert whole.tokens == batches(examples, 1000, "tree")[0].tokens
    assert torch.equal(whole.ids, batches(examples, 1000, "tree")[0].ids)


def test_what_is_measured_is_laid_out_as_by_one_process():
    laid_out = batches([[Tokens([n, n + 1])] for n in range(9)], 4, "none")
    own = [own_of(laid_out, Workers(number, 2)) for number in (0, 1)]
    assert sorted(id(batch) for part in own for batch in part) == sorted(map(id, laid_out))
    assert own_of(laid_out, ALONE) == laid_out


class InStep(Workers):
    """The first of two workers, of which the other one has four micro-batches."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.in_step = True

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        return [values, torch.full_like(values, 4)]


def test_workers_in_step_get_empty_micro_batches_besides():
    laid_out = batches([[Tokens([n, n + 1], ((1, 1),))] for n in range(6)], 2, "tree")
    own = own_of(laid_out, InStep())
    assert [len(batch.sequences) for batch in own] == [1, 1, 1, 0]
    assert own[-1].tokens == 0 and own[-1].ids.tolist() == [[0]] and own[-1].completion_mask.shape == (0, 0)
    assert InStep().apart is ALONE and Workers(0, 2).apart.count == 2
