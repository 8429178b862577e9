"""Places of a pool of keys and values: which are free, whose the others are, and what finished sequences left behind.

A sequence lies in parts, each a run of places that several sequences may own: completions of one prompt share it, and a
prompt that begins as one that is still kept shares that beginning. What is kept of finished sequences goes, the one
that was of no use for longest first, when its places are wanted.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perlhf.method.packing import Ids, Span

MOST_KEPT = 512
"""Finished sequences that are kept at one time."""


@dataclass(eq=False)
class Part:
    """A run of places and how many own it."""

    start: int
    length: int
    owners: int = 1


@dataclass(frozen=True)
class _Kept:
    key: Hashable
    ids: NDArray[np.int64]
    parts: tuple[tuple[Part, int], ...]


class Places:
    """All places of a pool.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int):
        self.count = count
        self._free: list[Span] = [(0, count)]
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._next = 0

    @property
    def free(self) -> int:
        """Places that nobody owns."""
        return sum(length for _, length in self._free)

    def take(self, length: int) -> list[Part] | None:
        """Parts of so many places (at least one) in all, as few as there may be, for which kept sequences may have to
        go; None: there is no room.
        """
        while self.free < length:
            if not self._kept:
                return None
            self._lose(next(iter(self._kept)))
        parts: list[Part] = []
        while length:
            fitting = [span for span in self._free if span[1] >= length]
            start, room = min(fitting, key=lambda s: s[1]) if fitting else max(self._free, key=lambda s: s[1])
            part = Part(start, min(room, length))
            at = self._free.index((start, room))
            self._free[at : at + 1] = [(start + part.length, room - part.length)] if room > part.length else []
            parts.append(part)
            length -= part.length
        return parts

    def give_back(self, part: Part) -> None:
        """One owner less; without any its places are free again."""
        part.owners -= 1
        assert part.owners >= 0, "somebody gave it back twice"
        if part.owners == 0 and part.length:
            self._release(part.start, part.length)

    def shorten(self, parts: Sequence[Part], length: int) -> list[tuple[Part, int]]:
        """Frees what lies behind the first `length` places of parts that have one owner; gives those that are left, as
        `keep` wants them.
        """
        left = filled(parts, length)
        for part in parts[len(left) :]:
            self.give_back(part)
        if left:
            part, used = left[-1]
            assert part.owners == 1
            if used < part.length:
                self._release(part.start + used, part.length - used)
                part.length = used
        return left

    def keep(self, key: Hashable, ids: Ids, parts: Sequence[tuple[Part, int]]) -> None:
        """Keeps a sequence for others that begin like it, as a further owner of its parts; what is a beginning of it
        is of no further use.

        Args:
            key: of what computed it: equal keys give equal keys and values for equal tokens.
            ids: its tokens.
            parts: where they lie, and how many of each part's places they take.
        """
        new = _Kept(key, np.array(ids, dtype=np.int64), tuple((part, used) for part, used in parts if used))
        for part, _ in new.parts:
            part.owners += 1
        for number, kept in list(self._kept.items()):
            if kept.key == key and in_common(new.ids, kept.ids) == len(kept.ids):
                self._lose(number)
        self._kept[self._next] = new
        self._next += 1
        if len(self._kept) > MOST_KEPT:
            self._lose(next(iter(self._kept)))

    def begun(self, key: Hashable, ids: Ids) -> list[tuple[Part, int]]:
        """Parts that hold the longest beginning of these tokens, all but the last at the most, with how many of each;
        the caller owns them, too. [] where nothing that is kept begins like them.
        """
        wanted = np.array(ids[:-1], dtype=np.int64)
        best, longest = None, 0
        for number, kept in self._kept.items():
            if kept.key == key and (common := in_common(wanted, kept.ids)) > longest:
                best, longest = number, common
        if best is None:
            return []
        self._kept.move_to_end(best)
        return beginning(self._kept[best].parts, longest)

    def forget(self, key: Hashable) -> None:
        """Nothing that was computed by `key` is kept any more."""
        for number in [number for number, kept in self._kept.items() if kept.key == key]:
            self._lose(number)

    def _lose(self, number: int) -> None:
        for part, _ in self._kept.pop(number).parts:
            self.give_back(part)

    def _release(self, start: int, length: int) -> None:
        spans = sorted([*self._free, (start, length)])
        joined = [spans[0]]
        for at, room in spans[1:]:
            if sum(joined[-1]) == at:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((at, room))
        self._free = joined


def in_common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many tokens two sequences begin with in common."""
    size = min(len(first), len(second))
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if len(differ) else size


def beginning(parts: Sequence[tuple[Part, int]], length: int) -> list[tuple[Part, int]]:
    """Those that hold the first `length` tokens of a sequence, with how many of each; the caller owns them, too."""
    found: list[tuple[Part, int]] = []
    for part, used in parts:
        if length:
            part.owners += 1
            found.append((part, min(used, length)))
            length -= found[-1][1]
    return found


def filled(parts: Sequence[Part], length: int) -> list[tuple[Part, int]]:
    """The parts that the first `length` of their places lie in, and how many of each."""
    found: list[tuple[Part, int]] = []
    for part in parts:
        if length > 0:
            found.append((part, min(part.length, length)))
            length -= part.length
    return found
