"""The order in which records are learned from: a function of the seed alone, so that a resumed run goes on alike."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

Item = TypeVar("Item")


def keyed_seed(*parts: object) -> int:
    """A 63-bit seed from any key: the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def plan_updates(
    groups: Sequence[str],
    examples_per_update: int,
    epochs: int,
    seed: int,
    order: Literal["shuffled", "grouped"] = "shuffled",
    max_updates: int | None = None,
) -> list[list[int]]:
    """Example numbers of each update.

    `shuffled` permutes examples in every epoch. `grouped` permutes whole groups and closes an update as soon as it has
    `examples_per_update` examples, so that updates hold whole groups and vary in size.
    """
    updates: list[list[int]] = []
    for epoch in range(epochs):
        rng = np.random.default_rng(keyed_seed(seed, "order", epoch))
        if order == "shuffled":
            permuted = rng.permutation(len(groups)).tolist()
            updates += [permuted[i : i + examples_per_update] for i in range(0, len(permuted), examples_per_update)]
            continue
        members: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            members.setdefault(group, []).append(number)
        names = list(members)
        updates.append([])
        for index in rng.permutation(len(names)).tolist():
            if len(updates[-1]) >= examples_per_update:
                updates.append([])
            updates[-1].extend(members[names[index]])
    return updates[:max_updates]


def cycle(total: int, count: int, step: int, seed: int) -> list[int]:
    """The `count` numbers below `total` that update `step` (from 1) uses.

    Permutations of all the numbers follow one another without end; each update takes the next `count`.
    """
    out: list[int] = []
    for position in range((step - 1) * count, step * count):
        permutation = np.random.default_rng(keyed_seed(seed, "prompts", position // total)).permutation(total)
        out.append(int(permutation[position % total]))
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
