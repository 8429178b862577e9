"""Files as people have them: encodings, packing, odd JSON, tables, Arrow, and the splits of a set's authors."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perlhf.config.stages import DataConfig
from perlhf.data import files, splits, tools
from perlhf.data.containers import authors, decoded, packed
from perlhf.data.files import Choice, DataFile, find, rows, rows_or_errors
from perlhf.errors import DataError

ONE = {"prompt": "Tea, é?", "completion": 'Yes, "now"\nor never', "label": True}
TWO = {"prompt": "b", "completion": "c", "label": False}
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (ONE, TWO))
CHAT = [{"role": "user", "content": "it's"}, {"role": "assistant", "content": "so"}]


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, choice: Choice = files.FOR_TRAINING) -> list[dict[str, Any]]:
    return [row for file in find(str(path), choice=choice) for _, row in rows(file)]


def places(path: Path) -> list[str]:
    return [where.removeprefix(str(path)) for where, _ in rows(DataFile(str(path), path))]


def failure(path: Path, choice: Choice = files.FOR_TRAINING) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, choice)
    return caught.value


def zipped(*members: tuple[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.zst", pyarrow.compress(LINES.encode(), codec="zstd", asbytes=True)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("a.jsonl.gz", gzip.compress(LINES[:30].encode()) + gzip.compress(LINES.encode()[30 + 1 :])),
        ("a.zip", zipped(("deep/a.jsonl", LINES), ("__MACOSX/a", "x"))),
        ("A.JSONL", LINES.encode()),
        ("without_suffix", LINES.encode()),
        ("utf16.jsonl", b"\xff\xfe" + LINES.encode("utf-16-le")),
        ("utf16be.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
        ("unmarked.jsonl", LINES.encode("utf-16-le")),
        ("utf32.jsonl", b"\xff\xfe\0\0" + LINES.encode("utf-32-le")),
        ("crlf.jsonl", b"\xef\xbb\xbf" + LINES.replace("}\n", "}\r\n").encode()),
        ("joined.jsonl", LINES.replace("}\n", "}\n\ufeff").encode()),
        ("pretty.jsonl", json.dumps(ONE, indent=1) + "\n" + json.dumps(TWO, indent=1)),
        ("pretty.json", json.dumps([ONE, TWO], indent=1)),
        ("strings.jsonl", "\n".join(json.dumps(json.dumps(row)) for row in (ONE, TWO))),
        ("string.json", json.dumps(json.dumps([ONE, TWO]))),
        ("data.json", json.dumps({"version": "1", "data": [ONE, TWO]})),
        ("data1.json", json.dumps({"version": "1", "data": [ONE, TWO]}, indent=1)),
        ("any.json", json.dumps({"feedback": [ONE, TWO], "count": 2})),
        (
            "viewer.json",
            json.dumps({"features": [{"name": "x"}], "rows": [{"row_idx": 0, "row": ONE}, {"row_idx": 1, "row": TWO}]}),
        ),
        ("train.json", json.dumps({"train": [ONE, TWO], "test": [{"prompt": "t"}]})),
        ("columns.json", json.dumps({key: {"0": ONE[key], "1": TWO[key]} for key in ONE})),
        ("named.json", json.dumps({key: {"x": ONE[key], "y": TWO[key]} for key in ONE})),
        ("index.json", json.dumps({"0": ONE, "1": TWO})),
        ("ids.json", json.dumps({"q-1": ONE, "q-2": TWO})),
        (
            "split.json",
            json.dumps({"columns": list(ONE), "index": [0, 1], "data": [list(ONE.values()), list(TWO.values())]}),
        ),
        ("lists.json", json.dumps({key: [ONE[key], TWO[key]] for key in ONE})),
    ],
)
def test_the_same_rows_however_they_are_written(tmp_path: Path, name: str, content: str | bytes) -> None:
    if name == "a.jsonl.gz":  # two members, as `cat` of two files gives
        first, second = LINES.splitlines()
        content = gzip.compress(f"{first}\n".encode()) + gzip.compress(second.encode())
    assert read(put(tmp_path / name, content)) == [ONE, TWO]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"chosen": CHAT, "rejected": [*CHAT[:1], {"role": "assistant", "content": "no"}]},
        {"conversations": [{"from": "human", "value": "a"}], "tools": [{"type": "function"}]},
        {"instruction": "a", "completions": [{"response": "b"}]},
        {"id": "x", "turns": [{"speaker": "me", "text": "a"}]},
        {"document": "text", "questions": [{"id": 1}]},
        {"info": {"post": "a"}, "summaries": [{"text": "a"}], "choice": 0},
        {"prompt": {"role": "user", "content": "a"}, "completion": {"role": "assistant", "content": "b"}},
        {"prompt": {"text": "a"}, "chosen": {"text": "b"}, "rejected": {"text": "c"}},
        {"input": {"messages": CHAT}, "preferred_output": CHAT[1:], "non_preferred_output": CHAT[1:]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_a_file_of_one_record_is_no_wrapper(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(put(tmp_path / "a.json", json.dumps(row))) == [row]
    assert read(put(tmp_path / "b.json", json.dumps(row, indent=1))) == [row]


def test_nan_is_null_in_any_container(tmp_path: Path) -> None:
    assert read(put(tmp_path / "a.jsonl", '{"prompt": "a", "margin": NaN}')) == [{"prompt": "a", "margin": None}]
    table = pyarrow.table({"margin": [1.5, float("nan"), None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row["margin"] for row in read(tmp_path / "a.parquet")] == [1.5, None, None]


@pytest.mark.parametrize(
    ("name", "content", "what", "where", "hint"),
    [
        ("a.jsonl", "{'prompt': 'a'}\n{'prompt': 'b'}\n", "as Python prints it (repr)", ":1", "ast.literal_eval"),
        ("a.jsonl", '{"label": True}\n{"label": False}\n', "as Python prints it (repr)", ":1", "ast.literal_eval"),
        ("a.jsonl", "{'prompt': array(['a'])}\n", "in single quotes", ":1", "json.dumps"),
        ("a.json", "{\n 'prompt': 'a'\n}", "in single quotes", ":2", "json.dumps"),
        ("a.jsonl", '{"prompt": "a"},\n{"prompt": "b"},\n', "each line ends in a comma", ":1", "sed"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": "b"},\n]', "comma before the closing bracket", ":3", "delete"),
        ("a.json", '{"data": [\n{"prompt": "a",}]}', "comma before the closing bracket", ":2", "delete"),
        ("a.json", '{"prompt":\n"a"},\n{"prompt":\n"b"}', "a comma between objects", ":2", "put [ and ]"),
        ("a.jsonl", '{"prompt": "a\tb"}\n{"prompt": "c"}', "Invalid control character", ":1", "tab as \\t"),
        ("a.jsonl", "[1]\n[2]\n", "each line is a list", ":1", "messages"),
        ("a.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of objects: 'a', 'b'", ":1", "of its own"),
        ("a.jsonl", "<!DOCTYPE html>\n<html>", "looks like a web page", ":1", "download the file itself"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS", ":1", "git lfs pull"),
        ("a.txt", "prompt;completion\na;b", "the file begins with 'prompt;completion'", ":1", "ends in .csv"),
        ("a.json", '[{"prompt": ' + "1" * 5000 + "}]", "Exceeds the limit", "[0]", None),
        ("a.json", b"%PDF-1.7", "this is a PDF", "", "JSON lines"),
        ("a.xlsx", zipped(("[Content_Types].xml", "x"), ("y.xml", "y")), "an Excel workbook", "", "as CSV"),
        ("a.zip", zipped(("a.csv", "x"), ("b.csv", "y")), "holds 2 files: a.csv, b.csv", "", "zipfile -e"),
        (
            "a.jsonl.zst",
            pyarrow.compress(b"[1]" * 99, codec="zstd", asbytes=True)[:-5],
            "zstd file is damaged",
            "",
            "again",
        ),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())[:-9], "bzip2 file is truncated", "", "again"),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:-9], "xz file is truncated", "", "again"),
        ("a.jsonl", '{"prompt": "Café"}'.encode("cp1252"), "byte 0xe9 is not valid UTF-8", ":1", "iconv -f CP1252"),
        ("a.jsonl", '{"prompt": "你好吗"}'.encode("gb18030"), "is not valid UTF-8", ":1", "iconv -f GB18030"),
        ("a.jsonl", '{"prompt": "é"}\n'.encode() + b'{"prompt": "\xff"}', "byte 0xff", ":2", "mend that line alone"),
        ("a.jsonl", b'{"prompt": "\xc3', "the file ends inside a character", ":1", "again"),
        ("a.jsonl", b"\xff\xfe" + LINES.encode("utf-16-le")[:-1], "not valid UTF-16-LE", ":2", "cut or damaged"),
        ("a.csv", "prompt,completion\n", "found 2 comma-separated columns and no row", ":1", None),
        ("a.csv", "prompt,prompt\na,b\n", "column 'prompt' appears twice", ":1", None),
        ("a.csv", "prompt,completion\na,b\nc,d,e\n", "found 3 cells", ":3", "in quotes"),
        ("a.csv", 'prompt,completion\na,b\n"c,d\ne,f\n', "bad quoting", ":3", "to_csv"),
        ("a.csv", "prompt,,completion\na,x,b\n", "column 2 has no name", ":2", None),
        ("a.csv", "messages\n\"[{'role': 'a'}\n {'role': 'b'}]\"\n", "printed by NumPy", ":2", "orient='records'"),
    ],
)
def test_what_cannot_be_read_is_one_error_that_names_the_shape(
    tmp_path: Path, name: str, content: str | bytes, what: str, where: str, hint: str | None
) -> None:
    path = put(tmp_path / name, content)
    error = failure(path)
    assert what in error.what
    assert error.where == f"{path}{where}"
    assert hint is None or hint in str(error.hint)
    if name != "a.jsonl" or "control" not in what:
        assert len([row for row in tools.validate([str(path)]).problems if what in row.what]) == 1


@pytest.mark.parametrize(
    ("content", "mended"),
    [
        ("{'prompt': \"it's\", 'x': None}\n", [{"prompt": "it's", "x": None}]),
        ('{"prompt": "a"},\n{"prompt": "b"},\n', [{"prompt": "a"}, {"prompt": "b"}]),
        ('{"prompt": "Café"}\n'.encode("cp1252"), [{"prompt": "Café"}]),
    ],
)
def test_the_commands_that_errors_suggest_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, mended: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.jsonl", content)
    command = str(failure(Path("a.jsonl")).hint).split("`")[1]
    command = command.replace("python -c", f"{sys.executable} -c")
    subprocess.run(command, shell=True, check=True)
    (made,) = (path for path in tmp_path.iterdir() if path.name != "a.jsonl")
    assert read(made) == mended


def test_a_file_is_read_as_a_stream(tmp_path: Path) -> None:
    """Twenty megabytes of rows need no more than a few blocks, in each container."""
    row = {"prompt": "a" * 1000, "completion": "b" * 1000}
    text, count = json.dumps(row) + "\n", 10_000
    put(tmp_path / "a.jsonl", text * count)
    put(tmp_path / "a.jsonl.gz", gzip.compress((text * count).encode(), 1))
    put(tmp_path / "a.json", "[" + text + ("," + text) * (count - 1) + "]")
    put(tmp_path / "b.json", ("[" + text + ("," + text) * (count - 1) + "]").replace("\n", ""))
    put(tmp_path / "a.csv", "prompt,completion\n" + ("a" * 1000 + "," + "b" * 1000 + "\n") * count)
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "b.json", "a.csv"):
        tracemalloc.start()
        assert sum(1 for _ in rows(DataFile(name, tmp_path / name))) == count
        assert tracemalloc.get_traced_memory()[1] < 12 << 20, name
        tracemalloc.stop()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 80), indent=st.sampled_from([None, 1]), shape=st.sampled_from(["array", "lines", "csv"]))
def test_blocks_may_end_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, indent: int | None, shape: str
) -> None:
    written = [ONE | {"number": 12.5, "null": None}, TWO, {"text": 'é"\\\n\u2028😀', "list": [1, -2e3, True]}]
    if shape == "csv":
        content = 'prompt,completion\n"é,\n""a""",b\nc,d\n'
        written = [{"prompt": 'é,\n"a"', "completion": "b"}, {"prompt": "c", "completion": "d"}]
    elif shape == "array":
        content = json.dumps(written, indent=indent, ensure_ascii=False)
    else:
        content = "\n".join(json.dumps(row, indent=indent, ensure_ascii=False) for row in written)
    path = put(tmp_path / ("a.csv" if shape == "csv" else "a.json"), content)
    monkeypatch.setattr(packed, "BLOCK", size)
    assert read(path) == written


def test_rows_go_on_after_a_bad_one(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"prompt": \n[1]\n{"a": 1, "a": 2}\n{"prompt": "b"}\n')
    found = list(rows_or_errors(DataFile("a", path)))
    assert [where for where, _ in found] == ["a:1", "a:2", "a:3", "a:4", "a:5"]
    assert [isinstance(row, DataError) for _, row in found] == [False, True, True, True, False]
    path = put(tmp_path / "a.json", '[{"prompt": "a"}, {"a": 1, "a": 2}, {"b": Infinity}, {"prompt": "b"}]')
    assert [isinstance(row, DataError) for _, row in rows_or_errors(DataFile("a", path))] == [False, True, True, False]


def test_places_are_lines_of_objects_and_rows(tmp_path: Path) -> None:
    pretty = put(tmp_path / "a.jsonl", '\n{\n "a": 1\n}\n{\n "a": 2\n}\n')
    assert places(pretty) == [":2", ":5"]
    table = put(tmp_path / "a.csv", 'a,b\n"x\ny",1\n\nz,2\n')
    assert places(table) == [":2", ":5"]
    assert places(put(tmp_path / "b.json", '{"data": [{"a": 1}, {"a": 2}]}')) == ["[0]", "[1]"]
    assert places(put(tmp_path / "c.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}')) == ["/train[0]"]


def test_a_file_that_unpacks_to_far_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.jsonl.gz", gzip.compress((LINES + "\n" * 2_000_000).encode()))
    assert read(path) == [ONE, TWO]
    monkeypatch.setattr(packed, "MOST_UNPACKED", 1 << 20)
    error = failure(path)
    assert "unpacks to more than" in error.what and "200 times" in str(error.allowed)
    unpacked = put(tmp_path / "a.jsonl", gzip.decompress(path.read_bytes()))
    assert read(unpacked) == [ONE, TWO]  # what the hint says


def test_a_line_that_memory_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "LONGEST", 3 << 20)
    for name, content in (
        ("a.jsonl", "0" * (5 << 20)),
        ("a.json", '[{"a": "' + "0" * (9 << 20)),
        ("a.csv", "a" * (5 << 20)),
    ):
        assert "is longer than" in failure(put(tmp_path / name, content)).what, name


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.csv",
            '\ufeffprompt;completion\r\n"a;b\nc ""q""";d\r\n;\r\ne;\r\n',
            [{"prompt": 'a;b\nc "q"', "completion": "d"}, {"prompt": "e", "completion": None}],
        ),
        ("a.csv", "sep=;\r\nprompt;completion\r\na,b;c\r\n", [{"prompt": "a,b", "completion": "c"}]),
        ("a.csv", ",prompt,completion\n0,a,b\n", [{"prompt": "a", "completion": "b"}]),
        ("a.csv", "prompt\thelp, or not\na\tb\n", [{"prompt": "a", "help, or not": "b"}]),
        (
            "a.csv",
            "prompt,completion\ra,b\rc,d\r",
            [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}],
        ),
        ("a.csv", "completion,margin,weight\n1.5,0.5,x\n", [{"completion": "1.5", "margin": 0.5, "weight": "x"}]),
        ("a.csv", f"prompt\n{'x' * 200_000}\n", [{"prompt": "x" * 200_000}]),
        (
            "a.csv",
            'prompt,completion\n[INST] hi [/INST],"[1, 2]"\n',
            [{"prompt": "[INST] hi [/INST]", "completion": "[1, 2]"}],
        ),
        ("a.tsv", 'question\tbest\na "b\t"c\nd"\n', [{"question": 'a "b', "best": "c\nd"}]),
        ("a.tsv", "<U>Hi\t[A]Yes\tdlg-1\n", [{"source": "<U>Hi", "target": "[A]Yes", "dialog_id": "dlg-1"}]),
        (
            "a.CSV",
            'messages,tools\n"{}","{}"\n'.format(
                json.dumps(CHAT).replace('"', '""'), json.dumps([{"type": "function"}]).replace('"', '""')
            ),
            [{"messages": CHAT, "tools": [{"type": "function"}]}],
        ),
        ("a.csv", 'chosen\n"{}"\n'.format(str(CHAT).replace('"', '""')), [{"chosen": CHAT}]),
    ],
)
def test_tables(tmp_path: Path, name: str, content: str, expected: list[dict[str, Any]]) -> None:
    assert read(put(tmp_path / name, content)) == expected
    assert read(put(tmp_path / f"x{name}.gz", gzip.compress(content.encode("utf-8")))) == expected
    utf16 = content.removeprefix("\ufeff").encode("utf-16")
    assert read(put(tmp_path / f"u{name}", utf16)) == expected


def test_arrow_files_of_all_kinds(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([ONE, TWO])
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    pyarrow.feather.write_feather(table, tmp_path / "a.feather", compression="zstd")
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    put(tmp_path / "packed.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == [ONE, TWO], path.name
        assert places(path) == ["[0]", "[1]"]
    put(tmp_path / "cut.arrow", (tmp_path / "file.arrow").read_bytes()[:-40])
    assert "the Arrow file can't be read" in failure(tmp_path / "cut.arrow").what


def test_arrow_values_become_what_json_would_hold(tmp_path: Path) -> None:
    turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("name", pyarrow.string())])
    columns = {
        "messages": pyarrow.array([[{"role": "user", "content": None, "name": None}]], pyarrow.large_list(turn)),
        "chosen": pyarrow.array([{"role": ["user", "assistant"], "content": ["a", "b"]}]),
        "label": pyarrow.array(["up"]).dictionary_encode(),
        "tools": pyarrow.array(['[{"type": "function"}]']).cast(pyarrow.json_(pyarrow.string())),
        "calls": pyarrow.array([[{"x": 1, "y": None}]]),
        "info": pyarrow.array([{"post": "p", "title": None}]),
        "bytes": pyarrow.array(["é".encode()]),
        "raw": pyarrow.array([b"\xff"]),
        "view": pyarrow.array([["a", "b"]], pyarrow.list_view(pyarrow.string())),
        "when": pyarrow.array([0], pyarrow.timestamp("s")),
        "map": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    }
    table = pyarrow.table(columns)
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "a.arrow") == [
        {
            "messages": [{"role": "user", "content": None}],
            "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "label": "up",
            "tools": [{"type": "function"}],
            "calls": [{"x": 1}],
            "info": {"post": "p", "title": None},
            "bytes": "é",
            "raw": b"\xff",
            "view": ["a", "b"],
            "when": "1970-01-01T00:00:00",
            "map": {"k": 1},
        }
    ]


def test_json_of_datasets(tmp_path: Path) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "tools": datasets.List(datasets.Json())})
    made = datasets.Dataset.from_list([{"prompt": "a", "tools": [{"x": 1}, {"y": [2]}]}], features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "a.parquet")
    expected = [{"prompt": "a", "tools": [{"x": 1}, {"y": [2]}]}]
    assert read(tmp_path / "saved") == expected
    assert read(tmp_path / "a.parquet") == expected


def test_a_damaged_directory_of_datasets(tmp_path: Path) -> None:
    datasets.Dataset.from_list([ONE]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    assert "directory can't be read: data-00000-of-00001.arrow" in failure(tmp_path / "saved").what
    put(tmp_path / "saved" / "state.json", "{")
    assert "state.json is not valid JSON" in failure(tmp_path / "saved").what


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("train", "train"),
        ("train_sft", "train"),
        ("test_prefs", "test"),
        ("validation", "validation"),
        ("dev", "validation"),
        ("training-en", "train"),
        ("feedback_test", "test"),
        ("val", "validation"),
        ("eval", "validation"),
        ("testset-v1", "test"),
        ("contest", None),
        ("default", None),
        ("latest", None),
    ],
)
def test_names_of_splits(name: str, side: str | None) -> None:
    assert authors.side_of(name) == side


def split_set(tmp_path: Path, **sizes: int) -> Path:
    """A `datasets` directory whose splits begin alike, as those of UltraFeedback do."""
    made: Any = {
        name: datasets.Dataset.from_list([{"prompt": f"{name[:2]}{i}"} for i in range(n)]) for name, n in sizes.items()
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "dict")
    return tmp_path / "dict"


def test_authors_splits_of_datasets_are_kept_apart_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = split_set(tmp_path, train_prefs=3, train_sft=4, test_prefs=2)
    assert [row["prompt"] for row in read(path)] == ["tr0", "tr1", "tr2", "tr3"]
    told = capfd.readouterr().err
    assert "splits train_prefs, train_sft are read, not test_prefs (data.split names others)" in told
    assert "3 rows of train_sft are those of an earlier split" in told
    read(path)
    assert capfd.readouterr().err == ""  # told once
    assert len(read(path, Choice(split="test"))) == 2
    assert len(read(path, Choice(split="train_prefs+test_prefs"))) == 5
    assert len(read(path, Choice(split="all"))) == 6
    error = failure(path, Choice(split="tset_prefs"))
    assert error.where == f"{path}: data.split" and error.hint == "did you mean 'test_prefs'?"
    assert "data.limit" in str(failure(path, Choice(split="train_sft[:10]")).hint)
    assert "no split is for training: test" in failure(split_set(tmp_path / "x", test=1)).what


def test_authors_splits_of_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in (
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test.jsonl",
        "dev/a.jsonl",
    ):
        put(tmp_path / "set" / name, json.dumps({"prompt": name}))
    for path in (tmp_path / "set", Path(f"{tmp_path}/set/**/*.jsonl")):
        assert [row["prompt"][-10:] for row in read(path)] == ["0002.jsonl"] * 2
        assert "the authors' split train is read, not test, dev" in capfd.readouterr().err
        assert [row["prompt"] for row in read(path, Choice(split="validation"))] == ["dev/a.jsonl"]
        assert len(read(path, Choice(split="all"))) == 4
    assert len(read(tmp_path / "set/data/test.jsonl")) == 1  # named by the user
    assert len(read(tmp_path / "set/data/test.jsonl", Choice(split="test"))) == 1
    assert "there is no split 'train'" in failure(tmp_path / "set/data/test.jsonl", Choice(split="train")).what
    assert "no split is called 'x'" in failure(tmp_path / "set", Choice(split="x")).what
    for content in (LINES, LINES * 2, f"[{LINES.splitlines()[0]}]", json.dumps(ONE, indent=1) * 2):
        assert "there is no split 'test'" in failure(put(tmp_path / "mine.jsonl", content), Choice(split="test")).what


def test_all_files_are_read_where_none_or_each_is_held_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("held/dev.jsonl", "held/test.jsonl", "open/train.jsonl", "open/ratings.jsonl"):
        put(tmp_path / name, json.dumps({"prompt": name}))
    assert len(read(tmp_path / "open")) == 2
    assert capfd.readouterr().err == ""
    assert len(read(tmp_path / "held")) == 2
    assert "all its files are named as held out (dev, test), and are read" in capfd.readouterr().err


def test_where_none_says_training_the_held_out_are_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("prefs.jsonl", "prefs_test.jsonl", "dev/a.jsonl"):
        put(tmp_path / "set" / name, json.dumps({"prompt": name}))
    assert [row["prompt"] for row in read(tmp_path / "set")] == ["prefs.jsonl"]
    assert "prefs.jsonl is read, not dev, prefs_test (data.split names others)" in capfd.readouterr().err
    assert (
        len(read(tmp_path / "set", Choice(split="test"))) == 1 and len(read(tmp_path / "set", Choice(split="all"))) == 3
    )
    assert len(read(split_set(tmp_path / "saved", default=3, test=2))) == 3


def test_a_link_to_a_file_of_the_directory_is_not_read_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "set" / "b" / "real.jsonl", json.dumps(ONE))
    (tmp_path / "set" / "a.jsonl").symlink_to(tmp_path / "set" / "b" / "real.jsonl")
    (found,) = find(str(tmp_path / "set"))
    assert found.name.endswith("set/b/real.jsonl")
    assert "a.jsonl is a link to another of its files" in capfd.readouterr().err
    pattern = f"{tmp_path}/set/**/*.jsonl"
    assert [file.name for file in find(pattern)] == [f"{tmp_path}/set/b/real.jsonl"]
    assert f"{pattern}: a.jsonl is a link" in capfd.readouterr().err


def test_empty_parts_of_a_directory_are_left_out_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "set" / "part-0.jsonl", LINES)
    put(tmp_path / "set" / "part-1.jsonl", "")
    assert len(read(tmp_path / "set")) == 2
    assert "1 empty files are left out: part-1.jsonl" in capfd.readouterr().err
    assert "the file is empty" in failure(put(tmp_path / "none" / "a.jsonl", "").parent).what


def test_data_under_further_suffixes(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl.txt", LINES)
    put(tmp_path / "b.jsonl.zip", zipped(("b.jsonl", LINES)))
    put(tmp_path / "c.csv.txt", "prompt,completion\nb,c\n")
    put(tmp_path / "d.csv", LINES)  # JSON lines, whatever the name says
    put(tmp_path / "notes.txt", "no data")
    assert len(read(tmp_path)) == 7


def test_tables_that_were_put_together(tmp_path: Path) -> None:
    twice = "prompt,completion\na,b\n\ufeffprompt,completion\nc,d\n"
    assert [row["prompt"] for row in read(put(tmp_path / "a.csv", twice))] == ["a", "c"]
    spaced = 'prompt, chosen, rejected\n"p, q", "a, b", c\n'
    assert read(put(tmp_path / "b.csv", spaced)) == [{"prompt": "p, q", "chosen": "a, b", "rejected": "c"}]
    listed = 'prompt,responses,scores\np,"[""a"", ""b""]","[1, 2]"\nq,[sic],\n'
    assert read(put(tmp_path / "c.csv", listed)) == [
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "q", "responses": "[sic]", "scores": None},
    ]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_numbers_of_classes_become_their_names(tmp_path: Path, kind: str) -> None:
    """In this file 0 is a thumbs up."""
    verdict = datasets.ClassLabel(names=["good", "bad"])
    features = datasets.Features({"prompt": datasets.Value("string"), "label": verdict})
    whole = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)
    path = tmp_path / f"a.{kind}"
    whole.to_parquet(path) if kind == "parquet" else whole.save_to_disk(path)
    assert [row["label"] for row in read(path)] == ["good", "bad", None]


def test_rows_of_overlapping_training_files_are_read_once(tmp_path: Path) -> None:
    put(tmp_path / "train_prefs.jsonl", '{"prompt": "a"}\n{"prompt": "a"}')
    put(tmp_path / "train_sft.jsonl", '{"prompt": "a"}\n{"prompt": "b"}')
    put(tmp_path / "train_same.jsonl", '{"prompt": "a"}')
    put(tmp_path / "test.jsonl", '{"prompt": "c"}')
    assert [row["prompt"] for row in read(tmp_path)] == ["a", "a", "b"]
    assert tools.validate([str(tmp_path)]).records == {"prompt": 3}


def test_evaluation_reads_the_authors_test_split(tmp_path: Path) -> None:
    path = split_set(tmp_path, train=3, test=2)
    config = DataConfig(paths=(str(path),), split="test")
    assert [record.source for record in splits.load(config, ("prompt",), "all")] == [
        f"{path}/test[0]",
        f"{path}/test[1]",
    ]
    assert len(splits.load(DataConfig(paths=(str(path),)), ("prompt",), "all")) == 3
    with pytest.raises(DataError, match="the embedded set has no configurations, splits or revisions"):
        splits.load(DataConfig(split="test"), ("prompt",), "all")


def hub_repository(tmp_path: Path) -> Path:
    head = "---\nconfigs:\n- config_name: helpful\n  data_dir: good\n- config_name: harmless\n  data_files:\n"
    head += "  - split: train\n    path: safe/train-*\n  - split: test\n    path: safe/test-*\n---\n"
    put(tmp_path / "repo" / "README.md", head)
    for name in ("good/train", "good/test", "safe/train", "safe/test"):
        table = pyarrow.table({"prompt": [f"{name}{index}" for index in range(2)]})
        (tmp_path / "repo" / name).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "repo" / f"{name}-00000-of-00001.parquet")
    return tmp_path / "repo"


def test_a_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = datasets.load_dataset
    folder, asked = hub_repository(tmp_path), []

    def load(name: str, *configs: str, **options: str) -> Any:
        asked.append(options)
        return original(str(folder), *configs, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    path = Path("me/repo")
    error = failure(path)
    assert (error.what, error.allowed) == ("the set has several configurations", "helpful, harmless")
    assert error.hint == "data.config 'helpful' reads that one (`--config helpful` for `perlhf data`)"
    assert "no configuration 'help'" in failure(path, Choice(config="help")).what
    assert [row["prompt"] for row in read(path, Choice(config="helpful"))] == ["good/train0", "good/train1"]
    found = list(rows(find("me/repo", choice=Choice("harmless", "test", "v1"))[0]))
    assert found == [(f"me/repo/test[{i}]", {"prompt": f"safe/test{i}"}) for i in range(2)]
    assert asked[-1] == {"revision": "v1"}


def test_a_copy_of_such_a_set(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = hub_repository(tmp_path)
    assert len(read(folder)) == 4
    assert "all configurations are read: helpful, harmless" in capfd.readouterr().err
    assert [row["prompt"] for row in read(folder, Choice(config="helpful"))] == ["good/train0", "good/train1"]
    assert [row["prompt"] for row in read(folder, Choice("harmless", "test"))] == ["safe/test0", "safe/test1"]
    (folder / "README.md").unlink()
    assert len(read(folder, Choice(config="safe"))) == 2  # a folder's name
    assert failure(folder, Choice(config="sage")).hint == "did you mean 'safe'?"
    assert failure(folder, Choice(revision="v1")).where == f"{folder}: data.revision"
    assert failure(folder / "good/train-00000-of-00001.parquet", Choice(config="a")).where.endswith(": data.config")  # type: ignore[union-attr]


def test_choices_are_recorded_only_where_they_are_made() -> None:
    assert not {"config", "split", "revision"} & DataConfig().model_dump().keys()
    assert DataConfig(split="test").model_dump()["split"] == "test"


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "README.md", "odd[1].jsonl", "parts/part-0"):
        put(tmp_path / name, json.dumps({"prompt": name}))
    monkeypatch.chdir(tmp_path)
    assert [row["prompt"] for row in read(Path("?.jsonl"))] == ["a.jsonl", "b.jsonl"]
    assert [row["prompt"] for row in read(Path("**/c*"))] == ["deep/c.jsonl"]
    assert [row["prompt"] for row in read(Path("odd[1].jsonl"))] == ["odd[1].jsonl"]  # a file of that very name
    assert [row["prompt"] for row in read(Path("parts/part-*"))] == ["parts/part-0"]
    assert [file.name for file in find("d*")] == ["deep/c.jsonl"]
    error = failure(Path("*.csv"))
    assert error.what == "no file matches this pattern" and error.where == "*.csv"
    monkeypatch.chdir("/")
    assert [file.name for file in find("?.jsonl", tmp_path)] == ["a.jsonl", "b.jsonl"]


def test_paths_that_hold_nothing_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "a link to" in failure(tmp_path / "link.jsonl").what
    put(tmp_path / "docs" / "a.docx", "x")
    assert failure(tmp_path / "docs").what == "the directory holds no data file (found a.docx)"


def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    script = "import sys; sys.path.insert(0, 'src'); from perlhf.data.read import read; print(len(read(sys.argv[1])))"
    command = f'cat {put(tmp_path / "a.jsonl", LINES)} | {sys.executable} -c "{script}" /dev/stdin'
    assert subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout == "2\n"
