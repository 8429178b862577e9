"""Which tokens are computed together: rows shared by prefixes, and micro-batches under a token budget.

A sequence that is a prefix of another needs no row of its own: under causal attention its states are the longer row's
first ones. Only this module knows; callers pass and receive whole sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Ids = Sequence[int]
Packing = Literal["none", "prefix"]


@dataclass(frozen=True)
class Rows:
    """Rows to compute, and where each sequence ends in them."""

    rows: list[Ids]
    row_of: list[int]
    """Row that holds sequence i."""
    tokens: int
    """Tokens in all rows, padding not counted."""


def share_prefixes(sequences: Sequence[Ids], packing: Packing) -> Rows:
    """Rows such that sequence i equals `rows[row_of[i]][: len(sequences[i])]`.

    `none` keeps one row a sequence. `prefix` sorts lexicographically: a sequence is a prefix of a later one exactly if it
    is one of its successor, so that one backward pass finds every shared row.
    """
    if packing == "none":
        return Rows(list(sequences), list(range(len(sequences))), sum(map(len, sequences)))
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    rows: list[Ids] = []
    row_of = [0] * len(sequences)
    for i in reversed(order):
        ids = sequences[i]
        if not rows or list(rows[-1][: len(ids)]) != list(ids):
            rows.append(ids)
        row_of[i] = len(rows) - 1
    return Rows(rows, row_of, sum(map(len, rows)))


def microbatches(examples: Sequence[Sequence[Ids]], max_tokens: int, packing: Packing) -> list[list[int]]:
    """Splits examples (each a list of sequences that must be computed together) into groups of example numbers.

    Padded tokens (rows times the longest row) stay within `max_tokens` unless one unit alone exceeds it. Examples that share a row stay
    together. The result depends on nothing but the arguments, so that a resumed run splits alike.
    """
    flat = [ids for example in examples for ids in example]
    shared = share_prefixes(flat, packing)
    owner = [number for number, example in enumerate(examples) for _ in example]
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_in_row: dict[int, int] = {}
    for sequence, number in enumerate(owner):
        other = first_in_row.setdefault(shared.row_of[sequence], number)
        parent[root(number)] = root(other)
    units: dict[int, list[int]] = {}
    for number in range(len(examples)):
        units.setdefault(root(number), []).append(number)
    unit_rows: dict[int, set[int]] = {unit: set() for unit in units}
    for sequence, number in enumerate(owner):
        unit_rows[root(number)].add(shared.row_of[sequence])
    longest = {unit: max(len(shared.rows[row]) for row in rows) for unit, rows in unit_rows.items()}

    batches: list[list[int]] = []
    rows_now, width = 0, 0
    for unit in sorted(units, key=lambda u: (-longest[u], u)):
        if not batches or (rows_now + len(unit_rows[unit])) * width > max_tokens:
            batches.append([])
            rows_now, width = 0, longest[unit]
        batches[-1].extend(units[unit])
        rows_now += len(unit_rows[unit])
    return batches


def pad(sequences: Sequence[Ids], value: int, device: torch.device | str = "cpu") -> Int[Tensor, "batch time"]:
    """Right-padded ids. Causal attention never looks right, so real positions need no mask."""
    width = max((len(ids) for ids in sequences), default=0)
    out = torch.full((len(sequences), width), value, dtype=torch.long)
    for row, ids in enumerate(sequences):
        out[row, : len(ids)] = torch.tensor(list(ids), dtype=torch.long)
    return out.to(device)


def length_mask(lengths: Sequence[int], device: torch.device | str = "cpu") -> Bool[Tensor, "batch time"]:
    """True at positions before each length: masks come from lengths, never from ids."""
    width = max(lengths, default=0)
    return (torch.arange(width)[None, :] < torch.tensor(list(lengths), dtype=torch.long)[:, None]).to(device)
