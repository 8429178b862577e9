"""Whatever a file holds, reading it gives records or one DataError."""

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_rows import ANDROID_FEATURES, ANDROID_SCREEN, ROWS, STORY, TSV, UIBERT, UIBERT_FEATURES, example, framed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perlhf.config.stages import LayoutConfig, RatingsConfig
from perlhf.data.read import read_all
from perlhf.data.readers.formats import FORMATS
from perlhf.data.tools import validate
from perlhf.errors import DataError

FORMAT_NAMES = ["auto", *(one.name for one in FORMATS)]
SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".tsv", ".tfrecord", ".parquet")
EDGES = st.sampled_from([None, True, [], {}, "", " ", -1, 2**70, 1e308, [[]], [{}], "\ud800"])
JSON = EDGES | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=8,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def never_crashes(directory: Path, suffix: str, content: bytes, format: str, rules: LayoutConfig | None = None) -> None:
    (directory / f"a{suffix}").write_bytes(content)
    problems = validate([f"a{suffix}"], format, root=directory, rules=rules).problems
    try:
        read_all(f"a{suffix}", format, root=directory, rules=rules)
    except DataError as error:
        assert error.where and error.what
        assert problems
    else:
        assert not problems


def parquet() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "completion": "b", "label": True}]), stream)
    return stream.getvalue()


VALID = {
    ".jsonl": "\n".join(json.dumps(row) for rows in ROWS.values() for row in rows).encode(),
    ".json": json.dumps(ROWS["trl"], indent=1).encode(),
    ".jsonl.gz": gzip.compress(json.dumps(ROWS["hh"][0]).encode()),
    ".tsv": TSV.encode(),
    ".tfrecord": UIBERT,
    ".parquet": parquet(),
}


@FUZZ
@given(suffix=st.sampled_from(SUFFIXES), content=st.binary(max_size=200), format=st.sampled_from(FORMAT_NAMES))
def test_arbitrary_bytes(tmp_path: Path, suffix: str, content: bytes, format: str) -> None:
    never_crashes(tmp_path, suffix, content, format)


@FUZZ
@given(suffix=st.sampled_from(sorted(VALID)), seed=st.integers(0, 10**6), format=st.sampled_from(FORMAT_NAMES))
def test_flipped_and_cut_bytes(tmp_path: Path, suffix: str, seed: int, format: str) -> None:
    rng, content = random.Random(seed), bytearray(VALID[suffix])
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    never_crashes(tmp_path, suffix, bytes(content), format)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, part in inside for deeper in paths_of(part, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], new)
    return copied


@pytest.mark.parametrize("name", sorted(ROWS))
@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_valid_rows_with_one_wrong_value(tmp_path: Path, name: str, data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(ROWS[name]))
    path = data.draw(st.sampled_from(paths_of(row)))
    new = data.draw(JSON)
    if name == "taskmaster-rewards" and path and data.draw(st.booleans()):
        new = json.dumps(new)
    (tmp_path / "test.jsonl").write_text(json.dumps(STORY))
    content = "\n".join(json.dumps(one) for one in (changed(row, path, new), *ROWS[name]))
    never_crashes(tmp_path, ".jsonl", content.encode(), name)


RULES = st.sampled_from(
    [
        LayoutConfig(),
        LayoutConfig(ratings=RatingsConfig(up=4, down=2)),
        LayoutConfig(grades="comparisons", ties="error"),
        LayoutConfig(grades="ignore"),
        LayoutConfig(columns={"prompt": "messages.0.content"}),
    ]
)
CELLS = JSON | st.sampled_from(
    ["tie", "left", "good", "4.5", '[{"role": "user"}]', "\n\nHuman: a", "### Human: b", [{"value": "a", "rank": 1}]]
)
LAYOUTS = [one.name for one in FORMATS if not one.published]


@settings(FUZZ, max_examples=600)
@given(data=st.data(), rules=RULES)
def test_rows_of_mixed_layouts(tmp_path: Path, data: st.DataObject, rules: LayoutConfig) -> None:
    """Columns of two layouts in one row, and a wrong value in it."""
    rows = [row for name in LAYOUTS for row in ROWS[name]]
    row = data.draw(st.sampled_from(rows)) | data.draw(st.sampled_from(rows))
    row = changed(row, data.draw(st.sampled_from(paths_of(row))), data.draw(CELLS))
    never_crashes(tmp_path, ".jsonl", json.dumps(row).encode(), data.draw(st.sampled_from(["auto", *LAYOUTS])), rules)


@FUZZ
@given(
    name=st.sampled_from(sorted(UIBERT_FEATURES)),
    values=st.lists(st.integers(0, 2**63), min_size=1, max_size=3)
    | st.lists(st.floats(width=32), min_size=1, max_size=3)
    | st.lists(st.binary(max_size=5), min_size=1, max_size=3),
)
def test_wrong_features(tmp_path: Path, name: str, values: list[Any]) -> None:
    never_crashes(tmp_path, ".tfrecord", framed(example(UIBERT_FEATURES | {name: values})), "uibert")


@FUZZ
@given(seed=st.integers(0, 10**6), nonsense=st.binary(max_size=20))
def test_damaged_trees(tmp_path: Path, seed: int, nonsense: bytes) -> None:
    rng, tree = random.Random(seed), bytearray(ANDROID_SCREEN)
    for _ in range(rng.randint(1, 4)):
        tree[rng.randrange(len(tree))] = rng.randrange(256)
    for encoded in (bytes(tree), bytes(tree[: rng.randrange(len(tree))]), nonsense):
        content = framed(example(ANDROID_FEATURES | {"accessibility_trees": [encoded, encoded]}))
        never_crashes(tmp_path, ".tfrecord", content, rng.choice(("android-control", "android-control-pairs")))


@FUZZ
@given(content=st.binary(max_size=60))
def test_well_framed_nonsense(tmp_path: Path, content: bytes) -> None:
    never_crashes(tmp_path, ".tfrecord", framed(content), "uibert")


@FUZZ
@given(cells=st.lists(st.text(alphabet='<>[]PANURVSC"\t\\nx ', max_size=30), min_size=3, max_size=3))
def test_tsv_cells(tmp_path: Path, cells: list[str]) -> None:
    never_crashes(tmp_path, ".tsv", "\t".join(cells).encode(), "taskmaster-tsv")
