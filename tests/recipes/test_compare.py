"""`perlhf compare` from one recipe: every cell in a process of its own, both stages, and again without training."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import SHORT, SYSTEM, TinyRuns, tiny_runs

from perlhf.commands.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRuns:
    """One run of each stage."""
    return tiny_runs(tmp_path_factory.getbasetemp() / "tiny_runs", tiny_base)


def recipe(tmp_path: Path, base: Path, runs: TinyRuns, **changed: Any) -> Path:
    """LoRA of rank 2 and full tuning, one seed, one rate each; a policy paid by the tiny reward run."""
    shared: dict[str, Any] = {
        "base": str(base),
        "dtype": "float32",
        "threads": 1,
        "data": json.loads(runs.data.model_dump_json()),
        "encoding": {"system": SYSTEM, "max_tokens": 256},
    }
    values = {
        "output": str(tmp_path / "out"),
        "reward": shared | {"max_updates": 2, "validate_every": 1},
        "policy": shared | SHORT | {"updates": 2, "reward": [str(runs.reward)]},
        "ranks": [2],
        "targets": ["attention"],
        "seeds": [3],
        "lora_learning_rates": [1.0e-2],
        "full_learning_rates": [1.0e-4],
        "bootstrap": 20,
        "prompts": 4,
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values | changed))))  # without aliases
    return path


def test_both_stages_and_again(
    tmp_path: Path,
    tiny_base: Path,
    runs: TinyRuns,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(3)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = recipe(tmp_path, tiny_base, runs, jobs=2, also_test=[str(other)])
    assert main(["compare", str(path)]) == 0
    out = tmp_path / "out"
    said = capfd.readouterr()
    assert all(f"/4: reward-{side}-lr" in said.err for side in ("full", "r2-attention"))
    assert str(out / "compare.html") in said.out
    found = json.loads((out / "compare.json").read_text())
    assert list(found) == ["reward", "policy"]
    for stage, metric in (("reward", "AUC"), ("policy", "score")):
        sides = found[stage]["sides"]
        assert list(sides) == ["full", "r2-attention"] and found[stage]["metric"] == metric
        assert sides["r2-attention"]["trainable_share"] < 0.1
        for side, one in sides.items():
            rate = {"full": 1e-4, "r2-attention": 1e-2}[side]
            run = out / f"{stage}-{side}-lr{rate:g}-seed3"
            evaluated = json.loads((run / "evaluation.json").read_text())
            value = evaluated["metrics"]["auc"] if stage == "reward" else evaluated["after"]["score"]
            assert one["quality"]["value"] == pytest.approx(value["value"], abs=1e-4) and one["learning_rate"] == rate
        assert len(found[stage]["tried"]) == 2 and found[stage]["verdict"].startswith(f"By {metric} on test groups")
    there = found["reward"]["elsewhere"]["other.jsonl"]
    assert there["records"] == 3 and list(there["sides"]) == list(sides) and found["policy"]["elsewhere"] == {}
    page = (out / "compare.html").read_text()
    assert page.count("<svg") >= 5 and str(tmp_path) not in page
    sessions = {file: file.read_bytes() for file in out.glob("*/manifest.json")}
    assert len({json.loads(text)["sessions"][0]["pid"] for text in sessions.values()}) == 4, "one process a cell"
    assert main(["compare", str(path)]) == 0
    assert "cell" not in capfd.readouterr().err and len(sessions) == 4
    assert sessions == {file: file.read_bytes() for file in sessions}
    assert json.loads((out / "compare.json").read_text()) == found
    results_are_kept(monkeypatch, out, tmp_path / "kept", path, found)


def results_are_kept(monkeypatch: pytest.MonkeyPatch, out: Path, kept: Path, path: Path, found: Any) -> None:
    """scripts/results.py: numbers without texts or adapters, tables from them, a comparison that goes on from them."""
    scripts = Path(__file__).parents[2] / "scripts"
    monkeypatch.syspath_prepend(scripts)
    script = runpy.run_path(str(scripts / "results.py"), run_name="results")
    where = script["Kept"](kept, kept.with_name("cells"))
    monkeypatch.setitem(script["keep"].__globals__, "KEPT", where)
    shown = {"reward": "r2-attention", "policy": "r2-attention"}
    monkeypatch.setitem(script["tables"].__globals__, "SHOWN", shown)
    kept.mkdir()
    (kept / "commands.yaml").write_text("tiny: [compare tiny.yaml]")
    script["keep"](out, "tiny")
    shutil.rmtree(where.cells)
    script["unpack"](where)
    files = [file for folder in (kept / "tiny", where.cells) for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix == ".safetensors"]
    rows = [row for file in out.glob("*/evaluation.json") for row in json.loads(file.read_text())["samples"]]
    texts = {
        json.dumps(value) for row in rows for key, value in row.items() if isinstance(value, str) and key != "group"
    }
    assert texts and not any(text in file.read_text() for file in files for text in texts)
    marked = "".join(
        f"<!-- {what} -->\nSTALE\n<!-- end -->\n"
        for what in ("overview of reward", "overview of policy", "results of tiny")
    )
    (kept / "index.md").write_text(f"before\n{marked}after\n")
    script["tables"](where)
    page = (kept / "index.md").read_text()
    assert page.startswith("before") and page.endswith("after\n") and "STALE" not in page
    assert page.count("\n| r2-attention |") == 2 and found["reward"]["verdict"] in page
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith(("| set |", "| tiny |"))]
    assert [len(row) for row in rows] == [9] * 4 and [row[1] for row in rows[1::2]] == ["AUC", "score"]
    assert (kept / "tiny-policy.svg").read_text().startswith("<svg xmlns=")
    script["tables"](where)
    assert page == (kept / "index.md").read_text()
    restored = path.parent / "restored"
    script["restore"]("tiny", restored)
    assert main(["compare", str(path), "--output", str(restored)]) == 0
    again = json.loads((restored / "compare.json").read_text())
    assert [again[stage]["sides"] for stage in again] == [found[stage]["sides"] for stage in found]


def test_a_mistake_in_a_cell_is_shown_and_ends_it(
    tmp_path: Path, tiny_base: Path, runs: TinyRuns, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, tiny_base / "missing", runs, policy=None)
    assert main(["compare", str(path)]) == 2
    said = capfd.readouterr().err
    assert "reward-full-lr0.0001-seed3: the cell stopped with exit code 2" in said and "Traceback" not in said
    assert not list((tmp_path / "out").glob("*/result.json"))
