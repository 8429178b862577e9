"""scripts/results.py: what is kept of rollouts, and tables of runs, rates and curves, from files written by hand."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from perlhf.data.coffee_bar import gold

ORDER = "Good afternoon. A bagel with butter to stay, please."
GOOD, BAD = "One bagel with butter to stay, coming right up. Anything else?", "No."


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def script(tmp_path: Path) -> dict[str, Any]:
    found = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "results.py"), run_name="results")
    found["keep"].__globals__["RESULTS"] = tmp_path / "kept"
    return found


def config(paths: list[str]) -> str:
    return yaml.safe_dump({"data": {"paths": paths}, "tuning": "lora", "adapter": {"rank": 4}, "seed": 3} | RATE)


RATE = {"optim": {"learning_rate": 1e-3}}


def test_rollouts_on_the_embedded_set_become_a_curve(tmp_path: Path, script: dict[str, Any]) -> None:
    for name, paths in (("a", ["builtin:coffee-bar"]), ("b", ["mine.jsonl"])):
        write(tmp_path / "runs" / name / "config.yaml", config(paths))
        write(tmp_path / "runs" / name / "manifest.json", {})
        for step in range(1, 17):
            said = [{"step": step, "prompt": ORDER, "score": score, "kl": step} for score in (1.0, 2.0)]
            rows = [row | {"completion": GOOD if step > 8 else BAD} for row in said]
            write(tmp_path / "runs" / name / "rollouts" / f"{step:08d}.jsonl", "\n".join(map(json.dumps, rows)))
    script["keep"](tmp_path / "runs", "far")
    assert [path.name for path in (tmp_path / "kept" / "far").iterdir()] == ["a"]
    curve = json.loads((tmp_path / "kept" / "far" / "a" / "curve.json").read_text())
    assert [row["step"] for row in curve] == list(range(1, 17)) and curve[0]["score"] == 1.5
    assert curve[0]["gold"] == gold(ORDER, BAD) < gold(ORDER, GOOD) == curve[-1]["gold"]
    write(tmp_path / "kept" / "index.md", "<!-- curves of far -->\n<!-- end -->\n")
    script["tables"]()
    page = (tmp_path / "kept" / "index.md").read_text()
    assert "| a | 16 | 1.50 to 1.50 |" in page and "| 4.50 to 12.5 |" in page  # means of updates 1 to 8 and 9 to 16
    assert (tmp_path / "kept" / "far.svg").read_text().startswith("<svg")


def test_rates_and_runs(tmp_path: Path, script: dict[str, Any]) -> None:
    measured = {"value": 0.5, "low": 0.25, "high": 0.75}
    run = tmp_path / "kept" / "some" / "r"
    write(run / "config.yaml", config(["x"]))
    write(run / "result.json", {"validation": {"pairwise_accuracy": 0.625, "loss": 1}})
    found = {"change": {"score": measured}, "win_rate": measured, "after": {"kl_temperature_1": measured}, "n": 7}
    write(run / "evaluation.json", found)
    write(tmp_path / "kept" / "index.md", "<!-- rates of some -->\n<!-- end -->\n<!-- runs of some -->\n<!-- end -->\n")
    script["tables"]()
    page = (tmp_path / "kept" / "index.md").read_text()
    assert "| r4 | 0.001 | 3 | 0.625 |" in page
    assert "| r | " + 3 * "0.500 (0.250 to 0.750) | " + "7 |" in page
