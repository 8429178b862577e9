"""The order of updates is a function of the seed: nothing is lost, nothing depends on when a run was stopped."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perlhf.data.order import EPOCH_WORK, choose, cycle, keyed_seed, plan_updates, whole_groups
from perlhf.errors import ConfigError

GROUPS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=20)


def test_keyed_seed_is_the_start_of_a_hash() -> None:
    # sha256("a:1") = 2b2c40a6706d9e5f...; its first 8 bytes, halved
    assert keyed_seed("a", 1) == 0x2B2C40A6706D9E5F >> 1 == keyed_seed("a", "1")
    assert len({keyed_seed(0, "order", epoch) for epoch in range(50)}) == 50


class TestPlan:
    @given(groups=GROUPS, size=st.integers(1, 7), epochs=st.integers(1, 3), seed=st.integers(0, 9))
    def test_shuffled_sees_each_example_once_an_epoch(
        self, groups: list[str], size: int, epochs: int, seed: int
    ) -> None:
        updates = plan_updates(groups, size, epochs, seed)
        per_epoch = -(-len(groups) // size)
        assert len(updates) == epochs * per_epoch
        for epoch in range(epochs):
            own = updates[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert sorted(i for update in own for i in update) == list(range(len(groups)))
            assert all(len(update) == size for update in own[:-1]) and own[-1]
        assert list(plan_updates(groups, size, epochs, seed)) == list(updates)
        assert list(plan_updates(groups, size, epochs, seed, max_updates=2)) == updates[:2]

    @given(groups=GROUPS, size=st.integers(1, 7), seed=st.integers(0, 9))
    def test_grouped_keeps_groups_whole(self, groups: list[str], size: int, seed: int) -> None:
        updates = plan_updates(groups, size, 1, seed, "grouped")
        assert sorted(i for update in updates for i in update) == list(range(len(groups)))
        for name in set(groups):
            members = [i for i, group in enumerate(groups) if group == name]
            (home,) = [update for update in updates if set(members) & set(update)]
            at = home.index(members[0])
            assert home[at : at + len(members)] == members
        for update in updates[:-1]:
            last_group = [i for i in update if groups[i] == groups[update[-1]]]
            assert len(update) >= size > len(update) - len(last_group)

    def test_epochs_and_seeds_differ(self) -> None:
        first, second = plan_updates(["a"] * 30, 30, 2, 0)
        assert first != second != plan_updates(["a"] * 30, 30, 1, 1)[0]


def all_at_once(
    groups: list[str], size: int, epochs: int, seed: int, order: str, max_updates: int | None
) -> list[list[int]]:
    """The slow twin of `plan_updates`: lists of all epochs."""
    updates: list[list[int]] = []
    for epoch in range(epochs):
        rng = np.random.default_rng(keyed_seed(seed, "order", epoch))
        if order == "shuffled":
            permuted = rng.permutation(len(groups)).tolist()
            updates += [permuted[i : i + size] for i in range(0, len(permuted), size)]
            continue
        members: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            members.setdefault(group, []).append(number)
        names = list(members)
        updates.append([])
        for index in rng.permutation(len(names)).tolist():
            if len(updates[-1]) >= size:
                updates.append([])
            updates[-1].extend(members[names[index]])
    return updates[:max_updates]


class TestLazyPlan:
    @given(
        groups=st.lists(st.sampled_from("abcdefgh"), max_size=25),
        size=st.integers(1, 7),
        epochs=st.integers(1, 4),
        seed=st.integers(0, 9),
        order=st.sampled_from(["shuffled", "grouped"]),
        max_updates=st.none() | st.integers(1, 12),
    )
    def test_it_gives_what_the_lists_of_all_epochs_hold(
        self, groups: list[str], size: int, epochs: int, seed: int, order: Any, max_updates: int | None
    ) -> None:
        whole = all_at_once(groups, size, epochs, seed, order, max_updates)
        lazy = plan_updates(groups, size, epochs, seed, order, max_updates)
        assert len(lazy) == lazy.total == len(whole)
        assert list(lazy) == whole
        # A resumed run asks for later ones first; numbers that stand for the groups do as well as their names.
        ids = np.array([hash(group) for group in groups], dtype=np.int64)
        again = plan_updates(ids, size, epochs, seed, order, max_updates)
        assert [again[i] for i in reversed(range(len(whole)))] == whole[::-1]
        assert again[-3:] == whole[-3:]
        with pytest.raises(IndexError):
            lazy[len(whole)]

    @pytest.mark.parametrize("order", ["shuffled", "grouped"])
    @pytest.mark.parametrize("groups", [list("aabbbc") * 3, list("abc")])
    def test_a_billion_epochs_begin_at_once(self, order: Any, groups: list[str]) -> None:
        few = plan_updates(groups, 2, 10**9, 0, order, max_updates=3)
        assert few.total == 3 and list(few) == all_at_once(groups, 2, 3, 0, order, 3)
        if order == "shuffled" or len(set(groups)) == len(groups):
            assert plan_updates(groups, 2, 10**9, 0, order).total == 10**9 * -(-len(groups) // 2)

    def test_epochs_that_cannot_be_counted_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = list("aabbbc")
        for max_updates in (None, 10**12):
            with pytest.raises(ConfigError, match="1000000000 epochs of 6 records can't be counted") as caught:
                plan_updates(groups, 2, 10**9, 0, "grouped", max_updates)
            assert caught.value.where == "epochs" and "max_updates" in (caught.value.hint or "")
        # What the hint says helps, and the number that is allowed is.
        assert plan_updates(groups, 2, 10**9, 0, "grouped", 10**8).total == 10**8
        monkeypatch.setattr("perlhf.data.order.MOST_WORK", 50 * (len(groups) + EPOCH_WORK))
        assert plan_updates(groups, 2, 50, 0, "grouped").total == len(all_at_once(groups, 2, 50, 0, "grouped", None))
        with pytest.raises(ConfigError, match="51 epochs") as caught:
            plan_updates(groups, 2, 51, 0, "grouped")
        assert caught.value.allowed == "with order: grouped and these records, at most 50"


class TestCycle:
    @given(total=st.integers(1, 9), count=st.integers(1, 7), step=st.integers(1, 9), seed=st.integers(0, 5))
    def test_it_gives_what_one_permutation_for_each_number_gives(
        self, total: int, count: int, step: int, seed: int
    ) -> None:
        slow: list[int] = []
        for position in range((step - 1) * count, step * count):
            rng = np.random.default_rng(keyed_seed(seed, "prompts", position // total))
            slow.append(int(rng.permutation(total)[position % total]))
        assert cycle(total, count, step, seed) == slow

    @given(total=st.integers(1, 9), count=st.integers(1, 7), seed=st.integers(0, 5))
    def test_goes_round_all_numbers(self, total: int, count: int, seed: int) -> None:
        found = [number for step in range(1, 2 * total + 1) for number in cycle(total, count, step, seed)]
        for turn in range(len(found) // total):
            assert sorted(found[turn * total : (turn + 1) * total]) == list(range(total))

    def test_a_step_needs_no_earlier_one(self) -> None:
        assert cycle(5, 3, 4, 7) == cycle(5, 3, 4, 7)
        assert cycle(100, 50, 1, 7) != cycle(100, 50, 1, 8)
        assert not set(cycle(100, 50, 1, 7)) & set(cycle(100, 50, 2, 7))


def test_choose() -> None:
    items = [f"item {i}" for i in range(50)]
    chosen = choose(items, 10, 3)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen, key=items.index)
    assert choose(items, 10, 3) == chosen != choose(items, 10, 4)
    assert choose(items, 99, 3) == items
    assert choose([], 3, 0) == []


@pytest.mark.parametrize("order", ["shuffled", "grouped"])
def test_no_example_no_update(order: str) -> None:
    updates = plan_updates([], 4, 1, 0, order)  # pyright: ignore[reportArgumentType]
    assert [i for update in updates for i in update] == []


class TestWholeGroups:
    @given(groups=GROUPS, count=st.integers(1, 25), seed=st.integers(0, 9))
    def test_groups_stay_whole_and_just_enough_are_taken(self, groups: list[str], count: int, seed: int) -> None:
        numbers = whole_groups(groups, count, seed)
        taken = {groups[i] for i in numbers}
        assert numbers == [i for i, group in enumerate(groups) if group in taken]
        assert len(numbers) >= min(count, len(groups))
        # Without the group that was taken last there were too few.
        assert any(len(numbers) - groups.count(group) < count for group in taken)

    def test_file_order_changes_no_choice(self) -> None:
        groups = [f"g{i % 7}" for i in range(40)]
        chosen = {groups[i] for i in whole_groups(groups, 12, 3)}
        assert {groups[::-1][i] for i in whole_groups(groups[::-1], 12, 3)} == chosen
        assert whole_groups(groups, None, 3) == list(range(40)) == whole_groups(groups, 40, 3)
