"""The order of updates is a function of the seed: nothing is lost, nothing depends on when a run was stopped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perlhf.data.order import choose, cycle, keyed_seed, plan_updates, whole_groups

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
        assert plan_updates(groups, size, epochs, seed) == updates
        assert plan_updates(groups, size, epochs, seed, max_updates=2) == updates[:2]

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


class TestCycle:
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
