import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import graded

from perlhf.config.stages import DataConfig
from perlhf.data import tools
from perlhf.data.read import read
from perlhf.data.records import Prompt
from perlhf.data.tools import convert, formats, inspect, split, validate
from perlhf.errors import DataError, StorageError

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi é"}]


def put(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def content(records: list[Any]) -> list[Any]:
    """Records without their source, which says where each was read."""
    return [[type(r).__name__, *[getattr(r, name) for name in r.__slots__ if name != "source"]] for r in records]


def test_validate_collects_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{"prompt": "a", "completion": "x", "label": true}',
        '{"prompt": "a", "completion": ',
        '{"prompt": "a", "completion": "x", "label": "maybe"}',
        '{"prompt": "a", "completion": "x", "label": false}',
        '{"prompt": "", "completion": "x"}',
        '{"prompt": "a", "completion": "x", "label": false}',
    ]
    path.write_text("\n".join(lines))
    found = validate(["a.jsonl"], root=tmp_path)
    assert not found.ok and found.files == 1 and found.records == {"rating": 3}
    assert [problem.where for problem in found.problems] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:5"]
    assert any(warning.startswith("1 records repeat") for warning in found.warnings)
    assert any(warning.startswith("1 judgements are contradicted") for warning in found.warnings)
    assert any("only 1 groups" in warning for warning in found.warnings)


def test_validate_good_files(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "chosen": "a", "rejected": "a" if n == 0 else "b"} for n in range(12)]
    found = validate([put(tmp_path / "a.jsonl", rows), "builtin:coffee-bar/rating"])
    assert found.ok and found.files == 2 and found.records == {"comparison": 11, "rating": 1200}
    assert found.skipped == {"the same text on both sides": 1}
    assert any(warning.startswith("1 comparisons are ties or have the same text") for warning in found.warnings)
    one_sided = validate([put(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b", "label": True}])])
    assert any("all ratings have the label true" in warning for warning in one_sided.warnings)


def test_validate_whole_file_readers_and_damaged_files(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", [graded("a", "Bad"), graded("b", "Fine"), graded("c", "Excellent")])
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8b\x00")
    found = validate([str(tmp_path)])
    assert found.records == {"comparison": 1}
    assert [str(problem.where).split("/")[-1] for problem in found.problems] == ["a.jsonl:2", "b.jsonl.gz"]
    with pytest.raises(DataError, match="nothing has this name"):
        validate(["nowhere.jsonl"])


def test_parquet_in_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that is empty in the first part has its type from a later one."""
    monkeypatch.setattr(tools, "ROWS_AT_ONCE", 2)
    rows: list[dict[str, Any]] = [{"prompt": f"{n}", "completion": "c"} for n in range(4)]
    rows += [{"prompt": "p", "completion": "c", "label": True, "annotator": "ann"}]
    path = put(tmp_path / "a.jsonl", rows)
    assert convert(path, tmp_path / "b.parquet") == 5
    assert content(read(str(tmp_path / "b.parquet"))) == content(read(path))


def test_inspect_counts(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "aa", "completion": "x", "label": True},
        {"prompt": "aa", "completion": "x", "label": False},
        {"prompt": "Aa!", "completion": "xxxx", "label": True},
        {"prompt": "b", "chosen": "12", "rejected": "123"},
        {"prompt": "b", "chosen": "123", "rejected": "12"},
        {"prompt": "b", "chosen": "123", "rejected": "12"},
    ]
    path = put(tmp_path / "a.jsonl", rows)
    found = inspect([path], config=DataConfig(test=0.0, validation=0.0))
    assert found == {
        "formats": {path: "trl"},
        "records": {"rating": 3, "comparison": 3},
        "skipped": {},
        "groups": 2,
        "splits": {
            "train": {"records": 6, "groups": 2},
            "validation": {"records": 0, "groups": 0},
            "test": {"records": 0, "groups": 0},
        },
        "labels": {"up": 2, "down": 1},
        "lengths": {  # prompts 1 1 1 2 2 3; completions 1 1 2 2 2 3 3 3 4
            "prompt": {"median": 1, "p90": 2, "max": 3},
            "completion": {"median": 2, "p90": 3, "max": 4},
        },
        "duplicates": 1,
        "contradictions": 2,
        "example": {
            "kind": "rating",
            "prompt": "aa",
            "completion": "x",
            "label": True,
            "weight": 1.0,
            "group": "aa",
            "source": f"{path}:1",
        },
    }


def test_the_example_is_short_and_shows_the_end(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", [{"prompt": [*CHAT, {"role": "user", "content": "x" * 389 + "!"}]}])
    shown = inspect([path])["example"]["prompt"]
    assert shown == "...i é\nuser: " + "x" * 389 + "!"


def test_split_writes_whole_groups(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": turn, "label": True} for n in range(50) for turn in "ab"]
    config = DataConfig(paths=(put(tmp_path / "a.jsonl", rows),), test=0.25, validation=0.25)
    sizes = split(config, tmp_path / "out")
    sides = {name: read(str(tmp_path / "out" / f"{name}.jsonl")) for name in ("train", "validation", "test")}
    assert sizes == {
        name: {"records": len(found), "groups": len({record.group for record in found})}
        for name, found in sides.items()
    }
    assert all(size["records"] == 2 * size["groups"] > 0 for size in sizes.values())
    whole = sorted(map(str, content([record for found in sides.values() for record in found])))
    assert whole == sorted(map(str, content(read(config.paths[0]))))
    assert sorted(split(config.model_copy(update={"validation": 0.0}), tmp_path / "two")) == ["test", "train"]


def test_split_with_an_empty_side_writes_nothing(tmp_path: Path) -> None:
    config = DataConfig(paths=(put(tmp_path / "a.jsonl", [{"prompt": "one"}]),))
    with pytest.raises(DataError, match="side is empty: none of 1 groups"):
        split(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_convert_and_read_back(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": CHAT, "chosen": "a", "rejected": "b", "weight": 0.5, "margin": 1.5, "annotator": "ann"},
        {"prompt": CHAT, "completion": "a\nb", "label": False, "group": "mine"},
        {"prompt": CHAT, "completion": "a"},
        {"prompt": CHAT, "answer": ["7", None], "level": 2},
    ]
    path, output = put(tmp_path / "a.jsonl", rows), tmp_path / "out" / f"b{suffix}"
    assert convert(path, output) == 4
    assert content(read(str(output))) == content(read(path))
    assert [record.source for record in read(str(output))] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


def test_convert_writes_the_column_names_of_trl(tmp_path: Path) -> None:
    path = put(
        tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "label": True}, {"prompt": CHAT, "completion": "c"}]
    )
    convert(path, tmp_path / "b.jsonl")
    one, two = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert one == {"prompt": "p", "completion": "c", "label": True, "weight": 1.0, "group": "p", "source": f"{path}:1"}
    assert two["prompt"] == CHAT and two["completion"] == [{"role": "assistant", "content": "c"}]
    convert(path, tmp_path / "b.parquet")
    assert [record.prompt for record in read(str(tmp_path / "b.parquet"))] == [
        ({"role": "user", "content": "p"},),
        tuple(CHAT),
    ]


def test_convert_refuses_another_suffix_before_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"can't write '.csv'") as caught:
        convert("nowhere.jsonl", tmp_path / "a.csv")
    assert caught.value.allowed == ".jsonl or .parquet"


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", [{"prompt": f"{n}"} for n in range(30)])
    (tmp_path / "taken.jsonl").mkdir()
    for output in (tmp_path / "a.jsonl" / "below.jsonl", tmp_path / "taken.jsonl"):
        with pytest.raises(StorageError, match="can't write"):
            convert(path, output)
    with pytest.raises(StorageError, match="can't write"):
        split(DataConfig(paths=(path,), test=0.3, validation=0.3), tmp_path / "a.jsonl" / "below")
    assert sorted(part.name for part in tmp_path.iterdir()) == ["a.jsonl", "taken.jsonl"]


def test_formats_have_names_and_rules() -> None:
    listed = {one["name"]: one for one in formats()}
    assert listed["pandalm"]["gives"] == "comparisons" and "majority of three annotators" in listed["pandalm"]["rule"]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize("name", ["b.jsonl", "b.parquet"])
def test_calls_tools_and_turns_survive(tmp_path: Path, name: str) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    turns = [called, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Three."}]
    other = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": "one"}}]}
    rows = [
        {"prompt": CHAT, "chosen": turns, "rejected": [other], "tools": [{"name": "f", "parameters": {"x": 1}}]},
        {"prompt": CHAT, "chosen": "a", "rejected": "b"},
    ]
    path = put(tmp_path / "a.jsonl", rows)
    convert(path, tmp_path / name)
    assert content(read(str(tmp_path / name))) == content(read(path))


def test_the_example_shows_calls(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    path = put(tmp_path / "a.jsonl", [{"prompt": CHAT, "completion": [called], "tools": [{"name": "f"}]}])
    shown = inspect([path])["example"]
    assert shown["completion"] == 'assistant:  {"tool_calls": ' + json.dumps([CALL]) + "}"
    assert "'name': 'f'" in shown["tools"]


def test_columns_of_prompts_survive(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", [{"prompt": "a", "answer": 3}])
    convert(path, tmp_path / "b.jsonl")
    (found,) = read(str(tmp_path / "b.jsonl"))
    assert isinstance(found, Prompt) and found.columns == {"answer": 3}
    put(tmp_path / "c.jsonl", [{"prompt": "a", "answer": 3}, {"prompt": "b", "answer": "three"}])
    with pytest.raises(DataError, match="can't be written as Parquet") as caught:
        convert(str(tmp_path / "c.jsonl"), tmp_path / "c.parquet")
    assert caught.value.hint == "write .jsonl"


def test_records_that_hold_html_are_told_and_stay_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As StackExchange's answers; what only speaks of HTML isn't counted."""
    answer, about = "<p>Use a list:</p>\n\n<pre><code>x = []\n</code></pre>\n", "Write `<p>text</p>`."
    rows = [
        {"prompt": "How?", "chosen": answer, "rejected": "No."},
        {"prompt": "<p>How</p> do I close it?", "chosen": about, "rejected": "No."},
        {"prompt": [{"role": "user", "content": " <h2 class='a'>How?</h2>"}], "chosen": about, "rejected": "Never."},
        {"prompt": "Why?", "chosen": "<pre> is a tag", "rejected": "<b>No.</b>"},
    ]
    path = put(tmp_path / "a.jsonl", rows)
    told = "2 records hold texts that are HTML (such as <p>...</p>); they are learned as they stand"
    assert told in validate([path]).warnings
    assert inspect([path])["records"] == {"comparison": 4}
    assert capsys.readouterr().err == f"note: {told}\n"
    assert [getattr(record, "chosen", None) for record in read(path)] == [answer, about, about, "<pre> is a tag"]
    inspect([put(tmp_path / "b.jsonl", rows[1:2])])
    assert not capsys.readouterr().err
