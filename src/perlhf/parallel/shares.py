"""Which worker takes which records of an update: balanced by the tokens that each computes, and nothing else.

Draws never depend on it: they are functions of the seed, the update and the record.
"""

from collections.abc import Sequence

import torch

from perlhf.method.packing import Batch, Ids, Packing, Tokens, batches, common_prefix, empty
from perlhf.parallel.workers import Workers


def balanced(costs: Sequence[float], count: int) -> list[list[int]]:
    """Numbers of items for each of `count` workers, ascending: from the dearest on, each goes to who has the least."""
    loads, own = [0.0] * count, [list[int]() for _ in range(count)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(count), key=lambda worker: (loads[worker], worker))
        loads[least] += costs[item]
        own[least].append(item)
    return [sorted(items) for items in own]


def shares(examples: Sequence[Sequence[Ids]], count: int, packing: Packing) -> list[list[int]]:
    """Numbers of the examples (each a list of sequences computed together) for each of `count` workers, ascending.

    In a tree, examples that begin alike share tokens where one worker has them: those of a worker are neighbours in
    the order of their tokens, cut so that the most that one computes is the least that can be.
    """
    if packing == "none":
        return balanced([len(example) * max(map(len, example)) for example in examples], count)
    order = sorted(range(len(examples)), key=lambda i: tuple(examples[i][0]), reverse=True)
    whole, new = list[int](), list[int]()
    for at, i in enumerate(order):
        first, *others = examples[i]
        own = sum(len(ids) - common_prefix(first, ids) for ids in others)
        shared = common_prefix(examples[order[at - 1]][0], first) if at else 0
        whole.append(len(first) + own)
        new.append(len(first) + own - shared)
    low, high = max(whole, default=0), sum(whole)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(whole, new, middle)) <= count else (middle + 1, high)
    pieces = _cut(whole, new, low)
    while len(pieces) < min(count, len(order)):  # nobody is left without any
        longest = max(range(len(pieces)), key=lambda k: (len(pieces[k]), -k))
        piece = pieces[longest]
        pieces[longest : longest + 1] = [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
    pieces += [[]] * (count - len(pieces))
    return [sorted(order[at] for at in piece) for piece in pieces]


def _cut(whole: Sequence[int], new: Sequence[int], most: int) -> list[list[int]]:
    """Places in order, in as few pieces as have at most `most` tokens each; a piece begins with a whole example.

    Args:
        most: not less than the largest of `whole`.
    """
    pieces, total = list[list[int]](), 0
    for at, cost in enumerate(new):
        if not pieces or total + cost > most:
            pieces.append([])
            total, cost = 0, whole[at]
        pieces[-1].append(at)
        total += cost
    return pieces


def own_batches(
    examples: Sequence[Sequence[Tokens]],
    max_tokens: int,
    packing: Packing,
    device: torch.device | str,
    workers: Workers,
) -> list[Batch]:
    """Micro-batches of this worker's share of an update's examples; numbers in them are those of the whole update.

    Workers that must make the same passes (`Workers.in_step`) get equally many: who has fewer gets empty ones besides.
    """
    chosen = None
    if workers.count > 1:
        chosen = shares([[tokens.ids for tokens in example] for example in examples], workers.count, packing)
        chosen = chosen[workers.number]
    return _in_step(batches(examples, max_tokens, packing, device, chosen), packing, device, workers)


def own_of(laid_out: Sequence[Batch], workers: Workers) -> list[Batch]:
    """This worker's of micro-batches that are laid out as one process does: what is measured has the same bits.

    Empty ones are added as by `own_batches`.
    """
    if workers.count == 1 or not laid_out:
        return list(laid_out)
    own = [laid_out[i] for i in balanced([batch.tokens for batch in laid_out], workers.count)[workers.number]]
    packing = "none" if laid_out[0].nodes is None else "tree"
    return _in_step(own, packing, laid_out[0].ids.device, workers)


def _in_step(own: list[Batch], packing: Packing, device: torch.device | str, workers: Workers) -> list[Batch]:
    """As many micro-batches as the worker with most has, where all must make the same passes."""
    if not workers.in_step:
        return own
    most = max(int(count) for count in workers.gather(torch.tensor([len(own)])))
    return own + [empty(packing, device) for _ in range(most - len(own))]
