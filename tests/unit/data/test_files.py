import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from perlhf.data.files import DataFile, find, rows
from perlhf.data.read import read
from perlhf.data.records import Demonstration, Rating
from perlhf.errors import DataError

ROW = {"prompt": "Tea?", "completion": "Yes", "label": True}


def put(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def failure(path: str, format: str = "auto") -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, format)
    return caught.value


def test_same_records_from_every_container(tmp_path: Path) -> None:
    one = '{"prompt": "Tea?", "completion": "Yes", "label": true}'
    two = '{"prompt": "é", "completion": "No", "label": false}'
    lines, array = f"{one}\n\n{two}\n", f"[{one},\n {two} ]\n"
    table = pyarrow.table({"prompt": ["Tea?", "é"], "completion": ["Yes", "No"], "label": [True, False]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    made = {
        "a.jsonl": lines.encode(),
        "b.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "a.json": array.encode(),
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.json.gz": gzip.compress(array.encode()),
    }
    for name, content in made.items():
        put(tmp_path / name, content)
    for name in (*made, "a.parquet"):
        found = [(r.prompt, r.completion, r.label) for r in read(str(tmp_path / name)) if isinstance(r, Rating)]
        assert found == [("Tea?", "Yes", True), ("é", "No", False)], name


def test_places_count_lines_and_indices(tmp_path: Path) -> None:
    lines = put(tmp_path / "a.jsonl", '\n{"prompt": "a"}\n\n{"prompt": "b"}')
    assert [record.source for record in read(lines)] == [f"{lines}:2", f"{lines}:4"]
    array = put(tmp_path / "a.json", '[{"prompt": "a"}, {"prompt": "b"}]')
    assert [record.source for record in read(array)] == [f"{array}[0]", f"{array}[1]"]


def test_a_directory_is_read_in_order_of_names_and_other_files_are_left(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    put(tmp_path / "b.jsonl", '{"prompt": "second"}')
    put(tmp_path / "a.json", '[{"prompt": "first"}]')
    put(tmp_path / "deep" / "c.jsonl", '{"prompt": "third"}')
    for name in ("README.md", "MANIFEST.json", ".hidden.jsonl"):
        put(tmp_path / name, "not data")
    assert [record.prompt for record in read(str(tmp_path))] == ["first", "second", "third"]


def test_relative_paths_are_looked_up_under_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.jsonl", '{"prompt": "a"}')
    assert read("a.jsonl", root=tmp_path)[0].prompt == "a"
    monkeypatch.setenv("PERLHF_DATA", str(tmp_path))
    assert read("a.jsonl")[0].source == "a.jsonl:1"


def test_datasets_directories_are_read_without_datasets(tmp_path: Path) -> None:
    script = (
        "import datasets, sys; one = datasets.Dataset.from_list([{'prompt': 'a', 'completion': 'x'}]);"
        "two = datasets.Dataset.from_list([{'prompt': 'b', 'completion': 'y'}]);"
        "datasets.DatasetDict(train=one, test=two).save_to_disk(sys.argv[1] + '/both');"
        "one.save_to_disk(sys.argv[1] + '/one');"
        "del sys.modules['datasets']; sys.modules['datasets'] = None;"
        "from perlhf.data.read import read; from perlhf.config.stages import LayoutConfig;"
        "found = [r for n in ('one', 'both') for r in read(sys.argv[1] + '/' + n, rules=LayoutConfig(split='all'))];"
        "print([(r.prompt, r.completion, r.source.split('/')[-1]) for r in found])"
    )
    done = in_process(script, str(tmp_path))
    assert done.stdout.strip().splitlines()[-1] == str(
        [("a", "x", "one[0]"), ("a", "x", "train[0]"), ("b", "y", "test[0]")]
    ), done.stderr


def test_a_hub_name_without_connection_is_one_clear_error() -> None:
    script = (
        "from perlhf.data.read import read\nfrom perlhf.errors import DataError\n"
        "try: read('nobody/no-such-set')\nexcept DataError as error: print(error)"
    )
    done = in_process(script)
    assert done.stdout.startswith("nobody/no-such-set: no local file or directory has this name, and the hub gave none")
    assert "give its path" in done.stdout


def in_process(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs apart from pytest, since `datasets` reads HF_HUB_OFFLINE once, when it is imported."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)


@pytest.mark.parametrize(
    ("name", "content", "what", "where"),
    [
        ("a.jsonl", b"", "the file is empty", ""),
        ("a.jsonl", b"\n \n", "the file is empty", ""),
        ("a.json", b"[]", "the file is empty", ""),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "bad JSON", ":2"),
        ("a.jsonl", b'{"prompt": "a"} {"prompt": "b"}', "extra text after column 15", ":1"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]', "found a list", ":2"),
        ("a.json", b'[{"prompt": "a"},\n\n{"prompt" "b"}]', "bad JSON", ":3"),
        ("a.json", b'[{"prompt": "a"}\n {"prompt": "b"}]', "',' or ']' is expected", ":2"),
        ("a.json", b'[{"prompt": "a"},]', "bad JSON", ":1"),
        ("a.json", b'[{"prompt": "a"}', "',' or ']' is expected", ":1"),
        ("a.json", b'[{"prompt": "a"}]\n]', "extra text", ":2"),
        ("a.json", b'[{"prompt": "a"}, 3]', "found a int", "[1]"),
        ("a.json", b'[{"prompt": "a"}, {"prompt": "b", "prompt": "c"}]', "key 'prompt' appears twice", "[1]"),
        ("a.jsonl", b'{"prompt": "a"}\n{"label": true, "label": false}', "key 'label' appears twice", ":2"),
        ("a.jsonl", b'{"prompt": "a", "weight": -Infinity}', "key 'weight': -Infinity is not valid JSON", ":1"),
        ("a.json", b'[{"prompt": "a", "weight": Infinity}]', "key 'weight': Infinity is not valid JSON", "[0]"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}', "byte 0xff is not valid UTF-8", ":2"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "half of a surrogate pair", ":1"),
        ("a.jsonl", b'{"x": ' + b"[" * 200_000, "nested too deeply", ":1"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 99)[:-12], "the gzip file is truncated", ""),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00nonsense, certainly", "the gzip file is damaged", ""),
        ("a.parquet", b"PAR1nonsensePAR1", "the Parquet file can't be read", ""),
        ("a.tsv", b"one\ttwo\n", "found 2 tab-separated columns", ":1"),
        ("a.tfrecord", b"\x05", "truncated or damaged", "[0]"),
        ("a.txt", b"Hello", "bad JSON", ":1"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path: Path, name: str, content: bytes, what: str, where: str) -> None:
    path = put(tmp_path / name, content)
    error = failure(path)
    assert what in error.what
    assert error.where == path + where


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "f", "arguments": {"half \ud800": 1}}],
        json.dumps([{"name": "half \ud800", "arguments": {}}]),
        json.dumps([{"name": "f", "arguments": {"a": {"half \ud800": 1}}}]),
    ],
)
def test_half_a_surrogate_pair_is_found_in_calls(tmp_path: Path, calls: object) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": calls}
    asked = [{"role": "user", "content": "Tea?"}, turn, {"role": "tool", "content": "Yes"}]
    error = failure(put(tmp_path / "a.jsonl", json.dumps({"prompt": asked})))
    assert "half of a surrogate pair" in error.what and str(error.where).endswith(":1")


def test_missing_paths_say_what_is_near(tmp_path: Path) -> None:
    put(tmp_path / "ratings.jsonl", json.dumps(ROW))
    error = failure(str(tmp_path / "rating.jsonl"))
    assert error.hint == str(tmp_path / "ratings.jsonl")
    (tmp_path / "hollow").mkdir()
    assert "holds no data file" in failure(str(tmp_path / "hollow")).what
    assert "nothing has this name" in failure("").what


def test_unknown_names_of_formats_and_embedded_sets(tmp_path: Path) -> None:
    error = failure(put(tmp_path / "a.jsonl", json.dumps(ROW)), "pandlm")
    assert error.where == "format" and error.hint == "did you mean 'pandalm'?"
    assert "builtin:coffee-bar" in str(failure("builtin:coffee-bra"))


def test_rows_of_a_wrong_path_type_need_no_file() -> None:
    with pytest.raises(DataError, match="can't be read"):
        list(rows(DataFile("gone.jsonl", Path("/nonexistent/gone.jsonl"))))
    assert find("owner/name") == [DataFile("owner/name", None)]


def test_plain_files_of_demonstrations(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"prompt": "Tea?", "completion": "Yes"}')
    assert read(path) == [Demonstration("Tea?", "Yes", "tea", source=f"{path}:1")]
