import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perlhf.config.stages import DataConfig, RewardConfig
from perlhf.data.read import read
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating, Record
from perlhf.data.splits import (
    check_labels,
    content_hash,
    hashes_beside,
    load,
    read_splits,
    record_hash,
    split_of,
    write_sides,
)
from perlhf.data.store import hold
from perlhf.errors import DataError, RunError
from perlhf.runs.run import open_run


def put(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversations(count: int) -> list[dict[str, Any]]:
    """Three ratings of each conversation, cut after its first, second and third answer."""
    rows = []
    for number in range(count):
        turns = [{"role": "user", "content": f"Order {number}!"}]
        for turn in range(3):
            rows.append({"prompt": list(turns), "completion": f"{turn}", "label": turn != 1})
            turns += [{"role": "assistant", "content": f"{turn}"}, {"role": "user", "content": "More."}]
    return rows


def test_split_of_is_the_stated_hash() -> None:
    config = DataConfig(test=0.3, validation=0.2, split_seed=5)
    for group in ("", "two lattes", "tea", "é", "x" * 1000):
        digits = hashlib.sha256(b"5:" + group.encode()).hexdigest()[:16]
        share = int(digits, 16) / 16**16
        assert split_of(group, config) == ("test" if share < 0.3 else "validation" if share < 0.5 else "train")


def test_split_of_known_groups() -> None:
    """`printf 0:tea | sha256sum` begins 72c0, or 0.448; 0:coffee a07f, 0.627; 1:tea b8c3, 0.722; 1:coffee 40ff, 0.2."""
    config = DataConfig(test=0.45, validation=0.15)
    assert [split_of(group, config) for group in ("tea", "coffee")] == ["test", "train"]
    other = config.model_copy(update={"split_seed": 1, "validation": 0.3})
    assert [split_of(group, other) for group in ("tea", "coffee")] == ["validation", "test"]


def test_no_conversation_is_on_two_sides_and_nothing_is_lost(tmp_path: Path) -> None:
    config = DataConfig(paths=(put(tmp_path / "a.jsonl", conversations(60)),), test=0.3, validation=0.3)
    sides = {name: load(config, ("rating",), name) for name in ("train", "validation", "test")}
    groups = {name: {record.group for record in found} for name, found in sides.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["validation"] & groups["test"]
    assert sum(map(len, groups.values())) == 60
    assert sum(map(len, sides.values())) == 180 == len(load(config, ("rating",), "all"))


def keys(config: DataConfig, name: Any) -> list[str]:
    """The ratings of a split, by group and completion."""
    return [f"{r.group}/{r.completion}" for r in load(config, ("rating",), name) if isinstance(r, Rating)]


def test_splits_and_limits_do_not_depend_on_order_or_files(tmp_path: Path) -> None:
    rows = conversations(40)
    shuffled = random.Random(1).sample(rows, len(rows))
    one = DataConfig(paths=(put(tmp_path / "a.jsonl", rows),), limit=7)
    two = DataConfig(
        paths=(put(tmp_path / "b.jsonl", shuffled[:50]), put(tmp_path / "c.jsonl", shuffled[50:])), limit=7
    )

    for name in ("train", "test", "all"):
        assert sorted(keys(one, name)) == sorted(keys(two, name))
        assert len(keys(one, name)) == 7
    whole = keys(one.model_copy(update={"limit": None}), "train")
    kept = keys(one, "train")
    assert kept == [key for key in whole if key in kept] != whole[:7]


def test_label_noise_turns_training_labels_alone(tmp_path: Path) -> None:
    rows = conversations(80)
    rows += [{"prompt": f"Which {number}?", "chosen": "good", "rejected": "bad"} for number in range(120)]
    clean = DataConfig(paths=(put(tmp_path / "a.jsonl", rows),))
    noisy = clean.model_copy(update={"label_noise": 0.25})
    more, again = (noisy.model_copy(update=change) for change in ({"label_noise": 0.5}, {"split_seed": 1}))
    shuffled = clean.model_copy(
        update={"label_noise": 0.25, "paths": (put(tmp_path / "b.jsonl", random.Random(2).sample(rows, len(rows))),)}
    )
    for kind, other in (("rating", "comparison"), ("comparison", "rating")):
        before, after = load(clean, (kind,), "train"), load(noisy, (kind,), "train")
        changed = turned(before, after)
        assert 0.15 < len(changed) / len(before) < 0.35
        assert changed < turned(before, load(more, (kind,), "train"))
        assert {repr(replace(r, source="")) for r in load(shuffled, (kind,), "train")} == {
            repr(replace(r, source="")) for r in after
        }
        both = load(noisy, (kind, other), "train")
        assert [record for record in both if type(record) is type(before[0])] == after
        for split in ("validation", "test", "all"):
            assert load(clean, (kind,), split) == load(noisy, (kind,), split)
    reseeded = turned(
        load(again.model_copy(update={"label_noise": 0.0}), ("rating",), "train"), load(again, ("rating",), "train")
    )
    assert reseeded != turned(load(clean, ("rating",), "train"), load(noisy, ("rating",), "train"))


def turned(before: Sequence[Record], after: Sequence[Record]) -> set[str]:
    """Sources of the records whose label is the other one; all else must be equal."""
    found: set[str] = set()
    for old, new in zip(before, after, strict=True):
        if old != new:
            found.add(old.source)
            match old:
                case Comparison():
                    assert new == replace(old, chosen=old.rejected, rejected=old.chosen)
                case Rating():
                    assert new == replace(old, label=not old.label)
                case _:
                    raise AssertionError(old)
    return found


def test_fewer_training_records_and_the_same_others(tmp_path: Path) -> None:
    config = DataConfig(paths=(put(tmp_path / "a.jsonl", conversations(60)),))
    fewer = [config.model_copy(update={"limit_train": count}) for count in (5, 20)]

    few, some, every = (keys(one, "train") for one in (*fewer, config))
    assert len(few) == 5 and len(some) == 20 and set(few) < set(some) < set(every)
    for split in ("validation", "test"):
        assert keys(fewer[0], split) == keys(config, split)
    assert "limit_train" not in config.model_dump() and fewer[0].model_dump()["limit_train"] == 5


def test_limit_keeps_the_same_records_under_label_noise(tmp_path: Path) -> None:
    config = DataConfig(paths=(put(tmp_path / "a.jsonl", conversations(60)),), limit=20)
    noisy = config.model_copy(update={"label_noise": 0.5})
    assert turned(load(config, ("rating",), "train"), load(noisy, ("rating",), "train"))


def test_label_noise_without_labels_is_refused(tmp_path: Path) -> None:
    config = DataConfig(paths=(put(tmp_path / "a.jsonl", conversations(60)),), label_noise=0.5)
    for kind in ("demonstration", "prompt"):
        with pytest.raises(DataError, match="label_noise"):
            load(config, (kind,), "train")


def test_no_label_noise_is_recorded_as_nothing(tmp_path: Path) -> None:
    """A run whose record has no such key is the run with 0."""
    config, noisy = RewardConfig(run=tmp_path / "run"), RewardConfig(data=DataConfig(label_noise=0.1))
    assert "label_noise" not in config.model_dump(mode="json")["data"]
    assert RewardConfig.model_validate(config.model_dump(mode="json")) == config
    assert noisy.model_dump(mode="json")["data"]["label_noise"] == 0.1
    with open_run(config.run, "reward", config, {}) as run:
        run.log(0, {"loss": 1.0})
    with open_run(config.run, "reward", config, {}):
        pass
    with pytest.raises(RunError, match=r"data\.label_noise is 0\.1, but 'not set'"):
        with open_run(config.run, "reward", noisy.model_copy(update={"run": config.run}), {}):
            pass


def test_another_seed_gives_another_split(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", conversations(60))
    tests = [
        {r.group for r in load(DataConfig(paths=(path,), split_seed=seed), ("rating",), "test")} for seed in (0, 1)
    ]
    assert tests[0] != tests[1]


def test_conversion_rules(tmp_path: Path) -> None:
    path = put(
        tmp_path / "a.jsonl",
        [
            {"prompt": "A", "completion": "up", "label": True, "weight": 0.5},
            {"prompt": "A", "completion": "down", "label": False},
            {"prompt": "B", "chosen": "c", "rejected": "r"},
            {"prompt": "C", "completion": "d"},
            {"prompt": "D"},
        ],
    )
    config = DataConfig(paths=(path,))
    assert load(config, ("demonstration",), "all") == [
        Demonstration("A", "up", "a", weight=0.5, source=f"{path}:1"),
        Demonstration("B", "c", "b", source=f"{path}:3"),
        Demonstration("C", "d", "c", source=f"{path}:4"),
    ]
    assert load(config, ("prompt",), "all") == [
        Prompt("A", "a", source=f"{path}:1"),
        Prompt("B", "b", source=f"{path}:3"),
        Prompt("C", "c", source=f"{path}:4"),
        Prompt("D", "d", source=f"{path}:5"),
    ]
    both = load(config, ("comparison", "rating"), "all")
    assert [type(record) for record in both] == [Rating, Rating, Comparison]


def test_embedded_records_of_each_kind() -> None:
    config = DataConfig()
    for kind, record_type in (("rating", Rating), ("comparison", Comparison), ("demonstration", Demonstration)):
        found = load(config, (kind,), "all")
        assert found and all(isinstance(record, record_type) for record in found)
    assert all(isinstance(record, Rating) for record in read("builtin:coffee-bar/rating"))
    only_ratings = config.model_copy(update={"paths": ("builtin:coffee-bar/rating",)})
    assert {type(record) for record in load(only_ratings, ("comparison", "rating"), "all")} == {Rating}


def test_records_of_no_use_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "completion": "c"}]
    rows += [{"prompt": "c", "completion": "d", "label": label} for label in (True, False)]
    config = DataConfig(paths=(put(tmp_path / "a.jsonl", rows),))
    assert read_splits(config, ("comparison",)).skipped == {
        "a demonstration is no comparison": 1,
        "a rating is no comparison": 1,
        "a rating with thumbs down is no comparison": 1,
    }
    assert read_splits(config, ("demonstration",)).skipped == {"a rating with thumbs down is no demonstration": 1}
    assert read_splits(config, ("prompt",)).skipped == {}


def test_empty_sides_and_kinds_are_errors(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", [{"prompt": "only", "completion": "c"}])
    config = DataConfig(paths=(path,), validation=0.1, test=0.1)
    side = split_of("only", config)
    empty = "validation" if side == "test" else "test"
    with pytest.raises(DataError, match=f"the {empty} split is empty: none of 1 groups") as caught:
        load(config, ("demonstration",), empty)
    assert caught.value.where == path and "split_seed" in (caught.value.hint or "")
    with pytest.raises(DataError, match="no record can serve as comparison or rating"):
        load(config, ("rating", "comparison"), "all")
    with pytest.raises(DataError, match="no kind of record is called 'ratings'"):
        load(config, ("ratings",), "all")


def test_labels_that_are_all_equal() -> None:
    up, down = Rating("p", "c", True, "p"), Rating("p", "d", False, "p")
    config = DataConfig(paths=("some.jsonl",))
    check_labels(hold([up, down, up]), config)
    check_labels(hold([Demonstration("p", "c", "p")]), config)
    with pytest.raises(DataError, match="all 2 ratings have the label true"):
        check_labels(hold([up, up]), config)
    with pytest.raises(DataError, match="all 1 ratings have the label false"):
        check_labels(hold([down]), config)


def test_content_hash_follows_content(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", [{"prompt": "a"}])
    file_hash = hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    config = DataConfig(paths=(path, str(tmp_path), "builtin:coffee-bar"))
    before = content_hash(config)
    assert before[path] == file_hash and list(before) == list(config.paths)
    assert content_hash(config) == before
    put(tmp_path / "b.jsonl", [{"prompt": "b"}])
    after = content_hash(config)
    assert after[path] == file_hash and after[str(tmp_path)] != before[str(tmp_path)]
    assert len(after["builtin:coffee-bar"]) == 64


def test_tools_go_along_when_records_serve_as_another_kind(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [tool]},
        {"prompt": "d", "completion": "e", "label": True, "tools": [tool]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(paths=(str(tmp_path / "a.jsonl"),))
    for kind in ("demonstration", "prompt"):
        assert [record.tools for record in load(config, (kind,), "all")] == [(tool,), (tool,)]


def test_a_limit_goes_by_what_was_asked_not_by_other_columns() -> None:
    """Which prompts a limit keeps was settled before their other columns were kept."""
    assert record_hash(Prompt("a", "g", columns={"answer": 3})) == record_hash(Prompt("a", "g"))


def lines(*sides: str) -> list[tuple[str, list[bytes]]]:
    return [(side, [f"{side} now\n".encode()]) for side in sides]


def test_an_earlier_split_is_replaced_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An old validation side beside a new training side would hold groups that are learned from."""
    output = tmp_path / "out"
    write_sides(output, lines("train", "validation", "test"), ())
    assert capsys.readouterr().err == ""
    write_sides(output, lines("train", "test"), ())
    assert sorted(file.name for file in output.iterdir()) == ["test.jsonl", "train.jsonl"]
    assert "train.jsonl, validation.jsonl, test.jsonl" in capsys.readouterr().err


def test_an_earlier_split_among_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_sides(tmp_path, lines("train", "test"), ())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(DataError, match=r"train\.jsonl, test\.jsonl of an earlier split, and notes\.txt"):
        write_sides(tmp_path, lines("train"), ())
    assert (tmp_path / "test.jsonl").read_text() == "test now\n"


def test_what_is_split_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("the only copy")
    for path in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(DataError, match="is read from it"):
            write_sides(tmp_path, lines("train", "test"), [str(path)])
    assert (tmp_path / "train.jsonl").read_text() == "the only copy"
    with pytest.raises(DataError, match="the output is a file"):
        write_sides(tmp_path / "train.jsonl", lines("train"), ())


def test_a_directory_is_hashed_by_the_names_that_a_configuration_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the hash is the same from every working directory."""
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    (tmp_path / "below").mkdir()
    for paths in (("data",), ("data/",), ("./data",), ("data/*.jsonl",), ("data/a.jsonl", "data")):
        monkeypatch.chdir(tmp_path)
        there = content_hash(DataConfig(paths=paths))
        assert list(there) == list(paths)
        monkeypatch.chdir(tmp_path / "below")
        assert content_hash(DataConfig(paths=tuple(f"../{path}" for path in paths)), paths) == there


def test_the_stories_of_squality_have_a_hash(tmp_path: Path) -> None:
    judged = tmp_path / "human" / "judged.jsonl"
    judged.parent.mkdir()
    judged.write_text(json.dumps({"passage-id": "1", "questions": []}) + "\n")
    config = DataConfig(paths=(str(judged),))
    assert hashes_beside(config) == {}
    stories = tmp_path / "v1-3" / "txt" / "test.jsonl"
    stories.parent.mkdir(parents=True)
    stories.write_text("{}\n")
    before = hashes_beside(config)
    assert before == {"txt/test.jsonl": hashlib.sha256(b"{}\n").hexdigest()}
    stories.write_text('{"x": 1}\n')
    assert hashes_beside(config) != before and content_hash(config) == content_hash(config)
    other = tmp_path / "human" / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert hashes_beside(DataConfig(paths=(str(other),))) == {}  # whose reader takes nothing of it
