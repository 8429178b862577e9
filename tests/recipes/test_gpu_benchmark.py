"""benchmarks/gpu.py: every row in tiny shapes on a CPU, what becomes of rows that fail, and the table."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "gpu.py"

FAILS = """
import json, sys, time
for name in sys.argv[1:]:
    print("a library's own line")
    if name == "breaks":
        sys.exit("RuntimeError: a reason\\n")
    if name == "full":
        sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB")
    if name == "hangs":
        time.sleep(600)
    print("ROW " + json.dumps({"name": name, "status": "done"}), flush=True)
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)


def test_every_row_in_tiny_shapes(script: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = run("--tiny", "--minutes", "9", "--output", str(output))
    assert done.returncode == 0, done.stderr
    kept = json.loads(output.read_text("utf-8"))
    rows = kept["rows"]
    assert list(rows) == list(script.NAMES) and kept["not_run"] == {}
    assert {name: row for name, row in rows.items() if row["status"] != "done"} == {}
    assert all(f"| {name} | " in done.stdout for name in script.NAMES[1:])
    # A layer's weights: q and o 32 x 32, k and v 16 x 32, an MLP of three 64 x 32; two layers; four operations each.
    assert {row["matmul_flops"] / row["tokens"] for name, row in rows.items() if "matmul_flops" in row} == {
        4 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    }
    # Packs of two, eight and 32 times 32 tokens: a prompt of 16 and four completions of four; alone 4 x 20 for each.
    packs = [rows[f"attention/{size}k/{side}"] for size in (2, 8, 32) for side in ("mask", "flex", "peer")]
    assert [row["tokens"] for row in packs] == [64] * 3 + [256] * 3 + [1024] * 3
    assert [row["tokens_alone"] for row in packs] == [160] * 3 + [640] * 3 + [2560] * 3
    # All weights, 28,224 numbers of four bytes, and 256 bytes of keys and values for each token: of eight prompts of 6
    # to 16 tokens, and four new tokens (half way) of 16 rows.
    prompts = (rows["sampler/64/ours"]["bytes_of_a_step"] - 4 * 28224) / 256 - 16 * 4
    assert prompts == int(prompts) and 8 * 6 <= prompts <= 8 * 16
    for name, row in rows.items():
        if name.startswith("policy"):
            parts = sum(row[f"seconds_{part}"] for part in ("sample", "score", "learn"))
            assert 0.3 < parts / row["seconds"] < 1.7, "medians of three parts and of the whole"
        if name.endswith("flex"):
            assert row["graphs_by_update"][0] > 0 and not any(row["graphs_by_update"][1:]), name
    again = run("--tiny", "--output", str(output))
    assert again.stdout == done.stdout and again.stderr == "", "what is there isn't run again"


def test_rows_that_fail_are_kept_and_the_others_go_on(script: ModuleType) -> None:
    names, command = ("first", "breaks", "full", "hangs", "last"), [sys.executable, "-c", FAILS]
    found = list(script.rows_of(names, command, time.monotonic() + 60, dict(os.environ), limit=3))
    told = {row["name"]: (row["status"], row.get("message")) for row in found}
    assert told == {
        "first": ("done", None),
        "breaks": ("failed", "RuntimeError: a reason"),
        "full": ("out of memory", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"),
        "hangs": ("failed", "it took longer than 3 seconds"),
        "last": ("done", None),
    }


def test_a_row_that_the_time_ends_is_not_run(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LEAST_SECONDS", 1)
    command = [sys.executable, "-c", FAILS]
    found = list(script.rows_of(("first", "hangs", "last"), command, time.monotonic() + 4, dict(os.environ)))
    assert [row["name"] for row in found] == ["first"]


def test_no_time_runs_nothing_and_prints_what_there_is(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    card = {"name": "card", "status": "done", "matmul_flops_per_second": 7.5e14, "bytes_per_second": 3e12}
    output.write_text(json.dumps({"device": "Some GPU", "rows": {"card": card}}), "utf-8")
    done = run("--minutes", "0", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Some GPU: matmul 750 TFLOP/s, copies 3e+03 GB/s\n")
    assert "| reward/4b/peer | not measured |" in done.stdout and done.stdout.splitlines()[-1].startswith("not run, ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("attention/1m",), "no row begins with attention/1m"),
        (("--output", "{}"), "holds rows of Another GPU"),
        ((), "torch finds no CUDA device; --tiny"),
    ],
)
def test_what_it_refuses(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    output = tmp_path / "gpu.json"
    output.write_text(json.dumps({"device": "Another GPU", "rows": {}}), "utf-8")
    tiny = ["--tiny"] if words else []
    done = run(*tiny, *(word.format(output) for word in words), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and message in done.stderr


def test_the_table_by_hand(script: ModuleType) -> None:
    card = {"status": "done", "matmul_flops_per_second": 4e14, "bytes_per_second": 2e12}
    whole: dict[str, Any] = {"status": "done", "seconds": 0.5, "tokens": 5000, "peak_memory_bytes": 12e9}
    policy = whole | {"seconds_sample": 0.3, "seconds_score": 0.05, "seconds_learn": 0.15}
    ours = {"matmul_flops": 1e14, "graphs_by_update": [2, 0, 1, 0]}
    rows = {
        "card": card,
        "reward/1.7b/flex": whole | ours,
        "reward/1.7b/peer": whole | {"seconds": 1.75, "peak_memory_bytes": 48e9, "peer": "PEFT"},
        "policy/4b/mask": policy,
        "sampler/64/ours": whole | {"seconds_of_a_step": 0.004, "bytes_of_a_step": 2e9},
        "reward/4b/peer": {"status": "out of memory", "message": "no | room"},
    }
    lines = {line.split(" | ")[0]: line for line in script.table(rows, "GPU").splitlines()}
    # 3.5 times as fast with a quarter of the memory; 1e14 / 0.5 s of 4e14; one graph after the first update.
    assert lines["| reward/1.7b/flex"] == (
        "| reward/1.7b/flex | 0.5 |  | 10,000 | 12.00 GB | 3.50 | 25 % | 0.50 of matmul | 2, then 1 | "
        "3 times, 33 %, 0.5 of matmul, then 0 |"
    )
    assert lines["| policy/4b/mask"] == (
        "| policy/4b/mask | 0.5 | 0.3, 0.05, 0.15 | 10,000 | 12.00 GB | not measured | not measured |  |  | "
        "3 times, 33 % |"
    )
    assert "| 0.25 of bandwidth |" in lines["| sampler/64/ours"]
    assert lines["| reward/4b/peer"].startswith("| reward/4b/peer | out of memory: no / room |")
    assert lines["| reward/0.6b/mask"].startswith("| reward/0.6b/mask | not measured |")
