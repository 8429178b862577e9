"""Records that lie in a file are what they were in memory, and what is told of them without reading them is true."""

import datetime
import errno
import io
import multiprocessing
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perlhf.config.stages import DataConfig
from perlhf.data import store
from perlhf.data.read import read
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating, Record
from perlhf.data.splits import SPLITS, prompt_text, record_hash, sides_of, split_of
from perlhf.data.store import (
    ODD,
    Records,
    Tally,
    contradictions,
    count_groups,
    duplicates,
    hold,
    other_label,
    warnings,
)
from perlhf.errors import StorageError

CHAT = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi é"})
CALL = ({"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},)
UNUSUAL = Prompt("When?", "when", columns={"day": datetime.date(2026, 7, 1), "of": {"a": [1.5, None]}})
KINDS: list[Record] = [
    Comparison("p", "good", "bad", "g", weight=0.5, margin=-2.0, annotator="ann", source="f:1"),
    Comparison(CHAT, "é" * 30, [*CALL, {"role": "tool", "content": "3"}, *CALL], "g2", tools=[{"name": "add"}]),
    Rating(list(CHAT), "c", False, "ü", annotator="bob"),
    Demonstration("p\n", "a\0b", "g"),
    Prompt("p", "g", columns={"answer": 4}),
    UNUSUAL,
]


def facts_of(records: Sequence[Record]) -> store.Facts:
    tally = Tally()
    for record in records:
        tally.add(record)
    return tally.facts()


@pytest.fixture(params=["in memory", "in a file"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Records:
    monkeypatch.setattr(store, "MEMORY_BYTES", 2**20 if request.param == "in memory" else 100)
    return hold(KINDS)


def test_records_come_back_as_they_were(held: Records) -> None:
    assert list(held) == KINDS == held
    assert [type(record.prompt) for record in held] == [type(record.prompt) for record in KINDS]
    assert held[-1] == UNUSUAL and held[1:4] == KINDS[1:4] and held[::-2] == KINDS[::-2]
    assert held.take(np.array([4, 0])) == [KINDS[4], KINDS[0]]
    assert held.take(np.array([False, True, False, False, False, False])) == [KINDS[1]]
    assert held != KINDS[:-1] and held != [*KINDS[:-1], KINDS[0]]
    with pytest.raises(IndexError):
        held[len(KINDS)]


def test_turned_labels(held: Records) -> None:
    turned = held.with_turned(np.array([True, False, True, True, False, False]))
    expected = [other_label(KINDS[0]), KINDS[1], other_label(KINDS[2]), *KINDS[3:]]
    assert turned == expected and turned[2:] == expected[2:] and turned.take(np.array([2])) == [expected[2]]
    assert held.labels.tolist() == [-1, -1, 0, -1, -1, -1] and turned.labels.tolist() == [-1, -1, 1, -1, -1, -1]


def test_a_million_records_leave_python_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a million here, but no more memory for more of them: the spool keeps the newest bytes alone."""
    monkeypatch.setattr(store, "MEMORY_BYTES", 5000)
    held = hold(Prompt(f"{number} " + "x" * 100, "g") for number in range(2000))
    assert len(held._spool._memory) < 5000 < held._spool._written  # pyright: ignore[reportPrivateUsage]
    assert [str(held[number].prompt).split()[0] for number in (0, 999, 1999)] == ["0", "999", "1999"]


def test_the_file_has_no_name_and_is_read_in_other_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "MEMORY_BYTES", 100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = hold(Prompt(f"{number}", "g") for number in range(300))
    assert held._spool._file is not None and not list(tmp_path.iterdir())  # pyright: ignore[reportPrivateUsage]

    def read_all(connection: Any) -> None:
        connection.send([record.prompt for record in held])

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=read_all, args=(theirs,))
    process.start()
    here = [record.prompt for record in held]
    assert ours.recv() == here == [f"{number}" for number in range(300)]
    process.join()


def test_a_full_disk_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "MEMORY_BYTES", 100)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(StorageError, match="No space left on device") as caught:
        hold(Prompt("x" * 60, "g") for _ in range(9))
    assert caught.value.where == tempfile.gettempdir() and "TMPDIR" in (caught.value.hint or "")


TEXTS = st.sampled_from(["a", "b", "é", (), CHAT, list(CHAT), ({"role": "user", "content": "a"},)])
WEIGHTS = st.sampled_from([1.0, 0.5, -1.0, -2.0])
RECORDS = st.lists(
    st.builds(Comparison, TEXTS, TEXTS, TEXTS, st.sampled_from("gh"), weight=WEIGHTS, margin=WEIGHTS)
    | st.builds(Rating, TEXTS, TEXTS, st.booleans(), st.just("g"), annotator=st.sampled_from([None, "ann"]))
    | st.builds(Demonstration, TEXTS, TEXTS, st.just("g"), tools=st.sampled_from([None, [{"name": "add"}]]))
    | st.builds(Prompt, TEXTS, st.just("g")),
    max_size=12,
)


@given(RECORDS)
def test_duplicates_and_contradictions_as_counted_record_by_record(records: list[Record]) -> None:
    """The slow twin: counts over canonical JSON of each record."""
    verdicts: dict[tuple[str, ...], set[bool]] = defaultdict(set)
    for record in records:
        if isinstance(record, Rating):
            verdicts["rating", prompt_text(record.prompt), prompt_text(record.completion)].add(record.label)
        elif isinstance(record, Comparison) and prompt_text(record.chosen) != prompt_text(record.rejected):
            sides = sorted((prompt_text(record.chosen), prompt_text(record.rejected)))
            key = ("comparison", prompt_text(record.prompt), *sides)
            verdicts[key].add(sides[0] == prompt_text(record.chosen))
    facts = facts_of(records)
    assert duplicates(facts) == sum(count - 1 for count in Counter(map(record_hash, records)).values())
    assert contradictions(facts) == sum(len(found) == 2 for found in verdicts.values())


def test_columns_tell_prompts_apart() -> None:
    one = Prompt("p", "g", columns={"answer": 4})
    assert duplicates(facts_of([one, replace(one, columns={"answer": 5}), replace(one, source="x")])) == 1


@given(st.lists(st.text(), min_size=1, max_size=9), st.integers(0, 3))
def test_sides_as_split_of_has_them(groups: list[str], seed: int) -> None:
    groups = [group.encode(errors="replace").decode() for group in groups]
    config = DataConfig(test=0.3, validation=0.3, split_seed=seed)
    held = hold((Prompt("p", group) for group in groups), seed)
    assert [SPLITS[side] for side in sides_of(held.facts, config)] == [split_of(group, config) for group in groups]
    assert count_groups(held.facts) == len(set(groups))


def test_bytes_and_shapes() -> None:
    chat = replace(KINDS[2], completion="é")
    facts = facts_of([*KINDS[:4], chat, replace(chat, prompt=(*CHAT, *CHAT)), Demonstration("q", "r", "s")])
    assert facts.prompt_bytes.tolist() == [1, 13, 13, 2, 13, 26, 1]
    assert facts.completion_bytes.tolist() == [4, 60, 1, 3, 2, 2, 1]
    assert facts.ascii.tolist() == [True, False, False, True, False, False, True]
    shape = facts.shape.tolist()
    assert shape[0] == shape[3] == shape[6] == 0 and shape[1] == ODD and shape[2] == shape[4] != shape[5] != 0


def test_what_is_odd_is_said() -> None:
    records: list[Record] = [
        Rating("a", "x", True, "a"),
        Rating("a", "x", True, "a"),
        Comparison("b", "s", "s", "b"),
        Comparison("b", "s", "t", "b"),
        Comparison("b", "t", "s", "b"),
    ]
    assert list(warnings(facts_of(records))) == [
        "1 records repeat another one exactly",
        "1 judgements are contradicted by another record (both labels, or both orders)",
        "1 comparisons have the same text on both sides",
        "all ratings have the label true: a reward model can't learn from them alone",
        "there are only 2 groups: a split by group may leave a side empty",
    ]
    assert list(warnings(facts_of([]))) == []


def test_the_embedded_set_is_held_as_it_is() -> None:
    records = read("builtin:coffee-bar")
    assert hold(records) == records
