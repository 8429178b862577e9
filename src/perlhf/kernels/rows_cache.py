"""Sampling by a network's own forward and its own cache: for networks that mix tokens in ways the tree doesn't know.

Prompts of one length are computed together, without padding, so that no recurrence ever sees any. A prompt's state is
computed once and repeated for its completions. Where the network's cache can't be repeated or its rows chosen,
every row is computed anew at each step: slow, and right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from perlhf.method.packing import Ids

Forward = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(ids [row, time], the state of what comes before them or None) to (hidden states [row, time, hidden], state)."""


@dataclass
class _Group:
    """Rows whose prompts have one length."""

    rows: Tensor
    """Their numbers; before `fork` those of the prompts."""
    ids: Tensor
    """[row, time] all tokens so far."""
    state: Any
    """The network's cache; None computes all tokens anew."""

    def choose(self, order: Tensor, numbers: Tensor) -> None:
        """Takes these of its rows, a row as often as it is named, and gives them new numbers."""
        self.rows, self.ids = numbers, self.ids[order]
        if self.state is not None:
            self.state.reorder_cache(order)


class RowsCache:
    """What `KeyValueCache` is for the tree: after `fork` it takes one token a row at a time."""

    fixed = False

    def __init__(self, groups: list[_Group]):
        self._groups = groups

    @classmethod
    def of(
        cls, prompts: Sequence[Ids], forward: Forward, device: torch.device, *, reused: bool
    ) -> "tuple[Tensor, RowsCache]":
        """States of each prompt's last token [prompt, hidden], and the cache of them.

        Args:
            reused: whether the network's own cache is kept.

        Raises:
            ValueError: it is of no kind whose rows can be chosen.
        """
        groups, last = [], []
        for length in sorted({len(ids) for ids in prompts}):
            rows = torch.tensor([row for row, ids in enumerate(prompts) if len(ids) == length], device=device)
            ids = torch.tensor([list(prompts[row]) for row in rows.tolist()], device=device)
            states, state = forward(ids, None)
            if reused and not isinstance(state, Cache):
                raise ValueError(f"the network's cache is a {type(state).__name__}")
            groups.append(_Group(rows, ids, state if reused else None))
            last.append(states[:, -1])
        return _in_order(groups, last), cls(groups)

    def fork(self, samples: int, most: int | None = None) -> None:
        """`samples` rows for each prompt, ordered by prompt."""
        for group in self._groups:
            order = torch.arange(len(group.rows), device=group.rows.device).repeat_interleave(samples)
            sample = torch.arange(samples, device=group.rows.device).repeat(len(group.rows))
            group.choose(order, group.rows[order] * samples + sample)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (ascending numbers)."""
        for group in self._groups:
            order = torch.isin(group.rows, rows).nonzero().squeeze(-1)
            group.choose(order, torch.searchsorted(rows, group.rows[order]))
        self._groups = [group for group in self._groups if len(group.rows)]

    def step(self, ids: Tensor, forward: Forward) -> Tensor:
        """States [row, hidden] of one more token [row]."""
        last = []
        for group in self._groups:
            new = ids[group.rows][:, None]
            group.ids = torch.cat([group.ids, new], 1)
            given = group.ids if group.state is None else new
            states, state = forward(given, group.state)
            group.state = None if group.state is None else state
            last.append(states[:, -1])
        return _in_order(self._groups, last)


def _in_order(groups: Sequence[_Group], states: Sequence[Tensor]) -> Tensor:
    """[row, hidden] of all groups, by the rows' numbers."""
    whole = torch.cat(list(states))
    return whole[torch.cat([group.rows for group in groups]).argsort()]
