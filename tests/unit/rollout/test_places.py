"""Places of a pool: who has which, what is shared, and that none is ever lost or had twice."""

from unittest.mock import ANY

from hypothesis import given, settings
from hypothesis import strategies as st

from perlhf.rollout.places import MOST_KEPT, Part, Places, filled


def taken(places: Places, length: int) -> list[Part]:
    parts = places.take(length)
    assert parts is not None
    return parts


def test_parts_by_hand() -> None:
    places = Places(10)
    (first,), (second,) = taken(places, 4), taken(places, 5)
    assert (first.start, second.start, places.free) == (0, 4, 1)
    assert places.take(2) is None, "one is left"
    assert places.shorten([second], 2) == [(second, 2)]
    assert places.free == 4
    places.give_back(first)
    (third,) = taken(places, 4)
    assert third.start == 0, "where it fits best: six to ten are free, too"
    places.give_back(third)
    # Free are 0 to 3 and 6 to 9: seven places are all of one run and three of the other.
    assert [(part.start, part.length) for part in taken(places, 7)] == [(0, 4), (6, 3)]
    assert places.free == 1
    assert filled([Part(0, 4), Part(6, 3)], 5) == [(ANY, 4), (ANY, 1)] and filled([Part(0, 4)], 0) == []


def test_what_is_kept_is_a_beginning_for_others() -> None:
    places = Places(12)
    (prompt,), (answer,) = taken(places, 4), taken(places, 3)
    places.keep("a@1", [1, 2, 3, 4, 5, 6], [(prompt, 4), (answer, 2)])
    places.give_back(prompt)
    places.give_back(answer)
    assert places.free == 5, "kept"
    assert places.begun("b@1", [1, 2, 3, 4]) == [], "another adapter's keys are others"
    assert places.begun("a@1", [9, 1, 2]) == []
    # Two of the prompt's; then all of the prompt and one of the answer, since the last token is always computed.
    assert places.begun("a@1", [1, 2, 9, 9]) == [(prompt, 2)]
    assert places.begun("a@1", [1, 2, 3, 4, 5, 6]) == [(prompt, 4), (answer, 1)]
    assert (prompt.owners, answer.owners) == (3, 2)
    # Wanted places: what is kept goes, and its parts with it as soon as nobody else owns them.
    assert places.take(6) is None and places.free == 5
    for part in (prompt, prompt, answer):
        places.give_back(part)
    assert places.free == 12


def test_a_beginning_of_what_is_kept_is_not_kept_beside_it() -> None:
    places = Places(12)
    (prompt,), (answer,), (other,) = taken(places, 4), taken(places, 3), taken(places, 4)
    places.keep("a@1", [1, 2, 3, 4], [(prompt, 4)])
    places.keep("b@1", [1, 2, 3, 4], [(other, 4)])
    places.keep("a@1", [1, 2, 3, 4, 5], [(prompt, 4), (answer, 1)])
    assert (prompt.owners, answer.owners, other.owners) == (2, 2, 2)


def test_forgotten_with_the_adapter_that_computed_it() -> None:
    places = Places(8)
    for key in ("old", "new"):
        (part,) = taken(places, 3)
        places.keep(key, [1, 2, 3], [(part, 3)])
        places.give_back(part)
    places.forget("old")
    assert places.free == 5 and places.begun("old", [1, 2, 3]) == [] and places.begun("new", [1, 2, 3]) != []


def test_only_so_many_are_kept() -> None:
    places = Places(MOST_KEPT + 10)
    for number in range(MOST_KEPT + 5):
        (part,) = taken(places, 1)
        places.keep("a", [number], [(part, 1)])
        places.give_back(part)
    assert places.free == 10


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("take give keep begun short".split()), st.integers(1, 6)), max_size=40))
def test_no_place_is_had_twice(steps: list[tuple[str, int]]) -> None:
    places = Places(16)
    mine: list[Part] = []
    for what, number in steps:
        if what == "take":
            mine += places.take(number) or []
        elif what == "give" and mine:
            places.give_back(mine.pop(number % len(mine)))
        elif what == "keep" and mine:
            part = mine[number % len(mine)]
            places.keep("a", list(range(part.length)), [(part, part.length)])
        elif what == "begun":
            mine += [part for part, _ in places.begun("a", list(range(number)))]
        elif what == "short" and mine and mine[-1].owners == 1 and mine[-1].length > 1:
            places.shorten(mine[-1:], mine[-1].length - 1)
        own = set(mine) | {part for kept in places._kept.values() for part, _ in kept.parts}
        taken = [at for part in own for at in range(part.start, part.start + part.length)]
        free = [at for start, length in places._free for at in range(start, start + length)]
        assert sorted(taken + free) == list(range(16))
