"""The order in which records are learned from: a function of the seed alone, so that a resumed run goes on alike."""

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from perlhf.errors import ConfigError

Item = TypeVar("Item")
MOST_WORK = 150_000_000
"""Examples that are gone through to count updates, where their number hangs on the order: some 20 seconds."""
EPOCH_WORK = 250
"""What an epoch costs beside, in examples."""


def keyed_seed(*parts: object) -> int:
    """A 63-bit seed from any key: the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def exponential(*parts: object) -> float:
    """A draw from Exp(1), whose mean is 1, by any key: the same on every machine."""
    return -math.log((keyed_seed(*parts) + 0.5) / 2**63)


class Updates(Sequence[list[int]]):
    """Example numbers of each update of a run; made by `plan_updates`.

    An epoch is laid out when one of its updates is asked for, and only the newest stays in memory, so that a run of any
    number of epochs begins at once.
    """

    def __init__(
        self, members: "_Members", per_update: int, epochs: int, seed: int, grouped: bool, max_updates: int | None
    ):
        self._members, self._per_update, self._seed, self._grouped = members, per_update, seed, grouped
        self._starts = [0]
        """Update with which each epoch begins, as far as they were counted."""
        self._newest: tuple[int, _Epoch] | None = None
        self.total = self._total(epochs, max_updates)
        """Number of updates."""

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> "list[int] | list[list[int]]":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.total))]
        number = index + self.total if index < 0 else index
        if not 0 <= number < self.total:
            raise IndexError(index)
        epoch, at = self._place(number)
        numbers, bounds = self._epoch(epoch)
        return numbers[bounds[at] : bounds[at + 1]].tolist()

    def _place(self, number: int) -> tuple[int, int]:
        """The epoch of an update, and its number there."""
        if (same := self._same_in_all()) is not None:
            return divmod(number, same)
        while self._starts[-1] <= number:
            self._count_one_more()
        epoch = bisect_right(self._starts, number) - 1
        return epoch, number - self._starts[epoch]

    def _total(self, epochs: int, max_updates: int | None) -> int:
        if (same := self._same_in_all()) is not None:
            total = epochs * same
            return total if max_updates is None else min(total, max_updates)
        count = len(self._members.group)
        longest = self._per_update - 1 + int(self._members.sizes.max())
        if max_updates is not None and epochs * -(-count // longest) >= max_updates:
            return max_updates
        if epochs * (count + EPOCH_WORK) > MOST_WORK:
            raise ConfigError(
                f"{epochs} epochs of {count} records can't be counted: each has another number of updates",
                where="epochs",
                allowed=f"with order: grouped and these records, at most {MOST_WORK // (count + EPOCH_WORK)}",
                hint="set max_updates, or lower epochs",
            )
        while len(self._starts) <= epochs and (max_updates is None or self._starts[-1] < max_updates):
            self._count_one_more()
        return self._starts[-1] if max_updates is None else min(self._starts[-1], max_updates)

    def _same_in_all(self) -> int | None:
        """Updates of an epoch where all epochs have as many; None where that hangs on their order."""
        count, sizes = len(self._members.group), self._members.sizes
        if not self._grouped:
            return -(-count // self._per_update)
        if not count:
            return 1  # an empty one
        if sizes.min() < sizes.max():
            return None
        whole = -(-self._per_update // int(sizes[0]))
        return -(-len(sizes) // whole)

    def _count_one_more(self) -> None:
        self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)[1]) - 1)

    def _epoch(self, epoch: int) -> "_Epoch":
        if self._newest is None or self._newest[0] != epoch:
            rng = np.random.default_rng(keyed_seed(self._seed, "order", epoch))
            self._newest = epoch, self._grouped_epoch(rng) if self._grouped else self._shuffled_epoch(rng)
        return self._newest[1]

    def _shuffled_epoch(self, rng: np.random.Generator) -> "_Epoch":
        numbers = rng.permutation(len(self._members.group))
        return numbers, [*range(0, len(numbers), self._per_update), len(numbers)]

    def _grouped_epoch(self, rng: np.random.Generator) -> "_Epoch":
        groups = rng.permutation(len(self._members.sizes))
        reached = np.cumsum(self._members.sizes[groups]).tolist()
        bounds, at = [0], bisect_left(reached, self._per_update)
        while at < len(reached) - 1:
            bounds.append(reached[at])
            at = bisect_left(reached, reached[at] + self._per_update)
        return self._members.of(groups), [*bounds, len(self._members.group)]


_Epoch = tuple[NDArray[np.intp], list[int]]
"""The examples of an epoch in order, and where its updates begin; the last number is where they end."""


class _Members:
    """Which examples are of which group; groups are numbered by where they come first."""

    def __init__(self, groups: Sequence[Hashable] | NDArray[Any]):
        if not isinstance(groups, np.ndarray):
            first = {group: number for number, group in enumerate(dict.fromkeys(groups))}
            groups = np.fromiter((first[group] for group in groups), dtype=np.intp, count=len(groups))
        _, began, place = np.unique(groups, return_index=True, return_inverse=True)
        rank = np.empty(len(began), dtype=np.intp)
        rank[np.argsort(began)] = np.arange(len(began))
        self.group = rank[place]
        """Group of each example."""
        self.sizes = np.bincount(self.group, minlength=len(began))
        self._sorted = np.argsort(self.group, kind="stable")
        self._starts = np.cumsum(self.sizes) - self.sizes

    def of(self, groups: NDArray[np.intp]) -> NDArray[np.intp]:
        """Examples of these groups, one group after the other, in order."""
        sizes = self.sizes[groups]
        before = np.cumsum(sizes) - sizes
        return self._sorted[np.arange(sizes.sum()) + np.repeat(self._starts[groups] - before, sizes)]


def plan_updates(
    groups: Sequence[Hashable] | NDArray[Any],
    examples_per_update: int,
    epochs: int,
    seed: int,
    order: Literal["shuffled", "grouped"] = "shuffled",
    max_updates: int | None = None,
) -> Updates:
    """Example numbers of each update.

    `shuffled` permutes examples in every epoch. `grouped` permutes whole groups and closes an update as soon as it has
    `examples_per_update` examples, so that updates hold whole groups and vary in size.

    Args:
        groups: of the examples: names, or anything that tells groups apart.

    Raises:
        ConfigError: `grouped` and so many epochs that their updates, whose number hangs on the order, can't be counted.
    """
    return Updates(_Members(groups), examples_per_update, epochs, seed, order == "grouped", max_updates)


def cycle(total: int, count: int, step: int, seed: int) -> list[int]:
    """The `count` numbers below `total` that update `step` (from 1) uses.

    Permutations of all the numbers follow one another without end; each update takes the next `count`.
    """
    out: list[int] = []
    position, end = (step - 1) * count, step * count
    while position < end:
        turn, at = divmod(position, total)
        permutation = np.random.default_rng(keyed_seed(seed, "prompts", turn)).permutation(total)
        taken = permutation[at : at + end - position].tolist()
        out += taken
        position += len(taken)
    return out


def choose(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """At most `count` items, the same for the same seed."""
    order = np.random.default_rng(keyed_seed(seed, "choose")).permutation(len(items))
    return [items[i] for i in sorted(order[:count].tolist())]


def whole_groups(groups: Sequence[str], count: int | None, seed: int) -> list[int]:
    """Numbers of examples, in order: those of whole groups, taken in a seeded order until there are `count`.

    None takes all. A group stays whole, since its members share most of their tokens.
    """
    if count is None or count >= len(groups):
        return list(range(len(groups)))
    sizes = Counter(groups)
    taken: set[str] = set()
    total = 0
    for name in sorted(sizes, key=lambda name: (keyed_seed(seed, "whole_groups", name), name)):
        if total >= count:
            break
        taken.add(name)
        total += sizes[name]
    return [number for number, group in enumerate(groups) if group in taken]
