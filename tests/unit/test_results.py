"""scripts/results.py: what is kept of rollouts, its archive, and tables from files written by hand."""

import functools
import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from perlhf.data.coffee_bar.gold import gold
from perlhf.errors import PerlhfError

SCRIPTS = Path(__file__).parents[2] / "scripts"
ORDER = "Good afternoon. A bagel with butter to stay, please."
GOOD, BAD = "One bagel with butter to stay, coming right up. Anything else?", "No."


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(SCRIPTS)
    found = runpy.run_path(str(SCRIPTS / "results.py"), run_name="results")
    kept = found["Kept"](tmp_path / "kept", tmp_path / "cells")
    assert "KEPT" in found, "or the tests would write into docs/results"
    found["keep"].__globals__["KEPT"] = kept
    write(kept.results / "commands.yaml", "")
    return found | {name: functools.partial(found[name], kept) for name in ("tables", "pack", "unpack")}


def config(paths: list[str]) -> str:
    adapter = {"rank": 4, "targets": "all", "alpha": 8.0}
    return yaml.safe_dump({"data": {"paths": paths}, "tuning": "lora", "adapter": adapter, "seed": 3} | RATE)


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
    assert [path.name for path in (tmp_path / "cells" / "far").iterdir()] == ["a"]
    curve = json.loads((tmp_path / "cells" / "far" / "a" / "curve.json").read_text())
    assert [row["step"] for row in curve] == list(range(1, 17)) and curve[0]["score"] == 1.5
    assert curve[0]["gold"] == gold(ORDER, BAD) < gold(ORDER, GOOD) == curve[-1]["gold"]
    write(tmp_path / "kept" / "index.md", "<!-- curves of far -->\n<!-- end -->\n")
    script["tables"]()
    page = (tmp_path / "kept" / "index.md").read_text()
    assert "| a | 16 | 1.50 to 1.50 |" in page and "| 2.50 to 14.5 |" in page  # means of updates 1 to 4 and 13 to 16
    assert f"| {gold(ORDER, GOOD):.3f} at KL 10.5 |" in page
    assert page.count("| cut off | – |") == 1
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1, "a head for every cell"
    assert all((tmp_path / "kept" / f"far-{key}.svg").read_text().startswith("<svg") for key in ("gold", "score"))
    write(tmp_path / "cells" / "far" / "a" / "result.json", {"best_step": 8})
    script["tables"]()
    page = (tmp_path / "kept" / "index.md").read_text()
    assert f"| 8: {gold(ORDER, BAD):.3f} | – |" in page


def test_the_same_runs_give_the_same_archive(tmp_path: Path, script: dict[str, Any]) -> None:
    kept, made = script["keep"].__globals__["KEPT"], []
    write(kept.results / "commands.yaml", "# who\nsome: [sft a.yaml]\n")
    for at in ("now", "later"):
        for name in ("b", "a")[:: 1 if at == "now" else -1]:
            for file in ("result.json", "manifest.json"):
                write(tmp_path / at / name / file, {"run": name})
                (tmp_path / at / name / file).chmod(0o600 if at == "now" else 0o644)
                os.utime(tmp_path / at / name / file, (len(made), len(made)))
        script["keep"](tmp_path / at, "some")
        made.append([(kept.results / name).read_bytes() for name in ("cells.tar.gz", "commands.yaml")])
        shutil.rmtree(kept.cells)
    assert made[0] == made[1]
    sha256 = hashlib.sha256(made[0][0]).hexdigest()
    assert made[0][1].decode() == f"cells.tar.gz: sha256:{sha256}\n# who\nsome: [sft a.yaml]\n"
    assert script["commands"](kept.results) == {"some": ["sft a.yaml"]}
    script["unpack"]()
    found = {str(file.relative_to(kept.cells)): file.read_text() for file in kept.cells.glob("*/*/*")}
    assert found == {
        f"some/{run}/{file}.json": f'{{"run": "{run}"}}' for run in "ab" for file in ("result", "manifest")
    }
    write(kept.cells / "some" / "a" / "result.json", {"run": "changed"})
    script["unpack"]()
    assert "changed" in (kept.cells / "some" / "a" / "result.json").read_text(), "unpacked already"
    write(tmp_path / "now" / "b" / "evaluation.json", "{")
    with pytest.raises(PerlhfError):  # in the middle: run a is copied, nothing packed
        script["keep"](tmp_path / "now", "other")
    assert (kept.cells / "other" / "a").exists()
    script["unpack"]()
    assert found == {str(file.relative_to(kept.cells)): file.read_text() for file in kept.cells.glob("*/*/*")}


@pytest.mark.parametrize("damage", ["changed", "missing", "unnamed"])
def test_another_archive_is_refused(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    kept = script["keep"].__globals__["KEPT"]
    write(kept.cells / "some" / "a" / "result.json", {})
    script["pack"]()
    archive = kept.results / "cells.tar.gz"
    named = hashlib.sha256(archive.read_bytes()).hexdigest()
    match damage:
        case "changed":
            archive.write_bytes(archive.read_bytes()[:-1])
        case "missing":
            archive.unlink()
        case "unnamed":
            write(kept.results / "commands.yaml", "some: [sft a.yaml]")
    monkeypatch.setattr(sys, "argv", ["results.py", "tables"])
    with pytest.raises(SystemExit) as stopped:
        script["main"]()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 3
    assert f"error: {archive}: not the archive of runs that commands.yaml names by its SHA-256: " in said
    assert f"allowed: {'what commands.yaml names in a line' if damage == 'unnamed' else named}" in said
    assert "try: `git checkout HEAD -- " in said


def test_tables_and_plots_are_those_of_the_tracked_archive(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is the one that commands.yaml names, or it would be refused."""
    kept = script["keep"].__globals__["KEPT"]
    shutil.copytree(SCRIPTS.parent / "docs" / "results", kept.results, dirs_exist_ok=True)
    before = {file: file.read_bytes() for file in kept.results.rglob("*") if file.is_file()}
    for file in kept.results.glob("*.svg"):
        file.unlink()
    monkeypatch.setattr(sys, "argv", ["results.py", "tables"])
    script["main"]()
    assert {path.name for path in kept.cells.iterdir() if path.is_dir()} == script["commands"](kept.results).keys()
    after = {file: file.read_bytes() for file in kept.results.rglob("*") if file.is_file()}
    assert before.keys() == after.keys()
    assert not [file.name for file in before if before[file] != after[file]], "run `make results`"


def test_a_tracked_comparison_is_what_todays_rules_conclude(script: dict[str, Any]) -> None:
    """One of two sides and one seed each; `python scripts/results.py conclude` does all of them."""
    kept, name = script["keep"].__globals__["KEPT"], "hh-labels-62"
    shutil.copytree(SCRIPTS.parent / "docs" / "results", kept.results, dirs_exist_ok=True)
    script["unpack"]()
    before = json.loads((kept.results / name / "compare.json").read_text())
    script["again"].__globals__["commands"] = lambda results: {name: []}
    script["again"]()
    after = json.loads((kept.results / name / "compare.json").read_text())
    assert after == before and after["reward"]["sides"]["r8-attention"]["verdict"] == "undecided: one seed"


def test_rules_of_the_gold_score_are_kept(tmp_path: Path, script: dict[str, Any]) -> None:
    row = {"group": "a", "prompt": ORDER, "before": BAD, "after": GOOD, "gold_before": 0, "gold_after": 1}
    for seed in (0, 1):
        cell = tmp_path / "runs" / f"policy-r1-attention-lr1-seed{seed}"
        write(cell / "result.json", {})
        after = GOOD if seed else BAD  # one of two seeds keeps the rules
        write(cell / "evaluation.json", {"kind": "policy", "samples": [row | {"after": after}]})
    part = {"sides": {"r1-attention": {}}, "reference": "r1-attention", "start": {"name": "SFT"}}
    write(tmp_path / "runs" / "compare.json", {"policy": part})
    script["keep"](tmp_path / "runs", "some")
    assert not any(GOOD in file.read_text() for file in (tmp_path / "cells").rglob("*.json"))
    before = {file: file.read_bytes() for file in (tmp_path / "cells").rglob("*.json")}
    script["restore"]("some", tmp_path / "again")
    script["keep"](tmp_path / "again", "some")
    assert before == {file: file.read_bytes() for file in before}, "texts aren't needed twice"
    write(tmp_path / "kept" / "index.md", "<!-- rules of some -->\n<!-- end -->\n")
    script["tables"]()
    page = (tmp_path / "kept" / "index.md").read_text()
    assert (
        "| side | items | details |" in page
        and "| SFT | 0.000 | 0.000 |" in page
        and "| r1-attention | 0.500 |" in page
    )


def evaluation(value: float, **others: Any) -> dict[str, Any]:
    measured, start = ({"value": middle, "low": middle - 0.25, "high": middle + 0.25} for middle in (value, 0.5))
    return {
        **{"change": {"score": measured}, "win_rate": measured, "n": 7, "before": {"score": start, "gold": start}},
        **{"after": {"score": measured, "gold": measured, "kl_temperature_1": measured}},
        **others,
    }


def test_runs_alone_and_over_seeds(tmp_path: Path, script: dict[str, Any]) -> None:
    kept, cells = tmp_path / "kept", tmp_path / "cells"
    measured = {"value": 0.5, "low": 0.25, "high": 0.75}
    best = {"score": measured, "gold": measured, "win_rate": measured, "kl_at_most": 0.25}
    write(cells / "some" / "r" / "evaluation.json", evaluation(0.5, best_of={"4": best}))
    for seed, value, seconds in ((0, 0.5, 60), (1, 1.0, 70)):
        for setting in ("dpo-beta0.1-lr2", "dpo-beta0.3-lr2", "dpo-beta0.3-lr2-clip"):
            write(cells / "more" / f"{setting}-seed{seed}" / "evaluation.json", evaluation(value))
            write(cells / "more" / f"{setting}-seed{seed}" / "dpo.json", {"seconds": seconds})
    markers = [f"{kind} of {name}" for kind, name in MARKERS]
    write(kept / "index.md", "".join(f"<!-- {marker} -->\n<!-- end -->\n" for marker in markers))
    script["tables"]()
    page = (kept / "index.md").read_text()
    shown = "0.500 (0.250 to 0.750)"
    assert f"| reference | – | {shown} | {shown} | – | 0 | – | 7 |" in page
    assert "| r | " + 5 * f"{shown} | " + "1 | 7 |" in page
    assert f"| best of 4 by what r learned from | – | {shown} | {shown} | {shown} | at most 0.250 | – | 7 |" in page
    assert "| dpo-beta0.1-lr2 | " + 5 * "0.750 (0.500 to 1.00) | " + "1 min 05 s | 2 | 7 |" in page
    assert page.count("the lowest and highest seed") == 1
    assert page.count("| dpo-") == 3, "seeds of a setting share a line"
    frontier, times = ((kept / f"more-{kind}.svg").read_text() for kind in ("frontier", "times"))
    write(
        cells / "more" / "other-seed0" / "evaluation.json", evaluation(0.5, before={"score": measured | {"low": 0.0}})
    )
    with pytest.raises(AssertionError, match="unlike references"):
        script["tables"]()
    assert "dpo-lr2" in frontier and "dpo-beta" not in frontier, "a line goes through all strengths of the anchor"
    assert times.count("dpo-beta0.3-lr2") == 1 and "-clip<" not in times, "a line goes from without to with"
    assert "best of n" in (kept / "some-frontier.svg").read_text()


MARKERS = (("runs", "some"), ("frontier", "some"), ("runs", "more"), ("frontier", "more"), ("times", "more"))


def test_a_grid_has_seeds_in_a_cell(tmp_path: Path, script: dict[str, Any]) -> None:
    for seed, accuracy, golden in ((0, 0.5, 0.25), (1, 0.75, 0.25)):
        for name in ("paid", "judged"):
            run = tmp_path / "cells" / name / f"all-alpha8-seed{seed}"
            write(run / "config.yaml", config(["x"]))
            write(run / "result.json", {"validation": {"pairwise_accuracy": accuracy, "loss": 1}})
        write(run / "evaluation.json", evaluation(golden, kind="policy", split="validation"))
    other = tmp_path / "cells" / "paid" / "other"
    adapter = {"rank": 4, "targets": "attention", "alpha": 8.0}
    write(other / "config.yaml", yaml.safe_dump({"adapter": adapter, "optim": {"learning_rate": 3e-3}}))
    write(other / "result.json", {"validation": {"auc": 0.875}})
    write(other / "evaluation.json", {"kind": "reward"})
    write(
        tmp_path / "kept" / "index.md", "<!-- grid of paid -->\n<!-- end -->\n<!-- grid of judged -->\n<!-- end -->\n"
    )
    script["tables"]()
    page = (tmp_path / "kept" / "index.md").read_text()
    assert "| targets | alpha | 0.001 | 0.003 |" in page and "| all | 8 | 0.625 (0.500, 0.750) | – |" in page
    assert "| attention | 8 | – | 0.875 (0.875) |" in page
    assert "Seeds of one cell differ by 0.177 " in page  # the root of 1/32
    assert "| all | 8 | 0.250 (0.250, 0.250) |" in page
    write(run / "evaluation.json", evaluation(golden, kind="policy", split="test"))
    with pytest.raises(AssertionError, match="test groups"):
        script["tables"]()


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("data split x --output made", "made/test.jsonl"),
        ("average a b --output made", "made/result.json"),
        ("benchmarks/dpo.py --sft a --output made", "made/dpo.json"),
        ("evaluate made --reward a", "made/evaluation.json"),
        ("evaluate a --output made/evaluation.json", "made/evaluation.json"),
        ("compare a.yaml --output made", None),
        ("policy a.yaml --run made", None),
    ],
)
def test_what_is_made_is_not_made_again(
    tmp_path: Path, script: dict[str, Any], capsys: pytest.CaptureFixture[str], command: str, file: str | None
) -> None:
    ran: list[list[str]] = []
    values = script["reproduce"].__globals__
    values |= {"REPOSITORY": tmp_path, "_run": lambda command: ran.append(command) or 0}
    write(tmp_path / "kept" / "commands.yaml", yaml.safe_dump({"some": [command]}))
    write(tmp_path / "cells" / "some" / "dpo" / "dpo.json", {"seconds": 61})
    (tmp_path / "made").mkdir()  # as a kill leaves it
    script["reproduce"]()
    assert "some: 1 runs that were kept took 1 min 01 s" in capsys.readouterr().out
    assert len(ran) == 1 and ran[0][-len(command.split()) :] == command.split()
    assert ("perlhf" in ran[0]) == ("dpo.py" not in command)
    write(tmp_path / (file or "made/result.json"), {})
    script["reproduce"]()
    assert len(ran) == (1 if file else 2), "a run that is finished says so itself"


def test_a_command_that_fails_ends_it(tmp_path: Path, script: dict[str, Any]) -> None:
    script["reproduce"].__globals__["_run"] = lambda command: 130
    write(tmp_path / "kept" / "commands.yaml", "some: [sft a.yaml, sft b.yaml]")
    with pytest.raises(SystemExit) as stopped:
        script["reproduce"]()
    assert stopped.value.code == 130


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: a process that a script put into the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_command_sees_to_an_interrupt_itself(tmp_path: Path, script: dict[str, Any]) -> None:
    values = script["reproduce"].__globals__
    values["REPOSITORY"] = tmp_path
    # What Ctrl-C does to both: this process goes on waiting for the exit code.
    interrupting = "import os, signal, time; time.sleep(0.2); os.kill(os.getppid(), signal.SIGINT); raise SystemExit(7)"
    assert values["_run"]([sys.executable, "-c", interrupting]) == 7
    asked = "import signal; raise SystemExit(signal.getsignal(signal.SIGINT) != signal.default_int_handler)"
    assert values["_run"]([sys.executable, "-c", asked]) == 0, "the command doesn't inherit that"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_commands_of_a_grid(tmp_path: Path, script: dict[str, Any]) -> None:
    write(
        tmp_path / "kept" / "commands.yaml",
        """
shared:
- &start [sft a.yaml]
some:
- *start
- each: {rate: [1e-3, 3e-4], seed: [0, 1]}
  run: ["policy --lr {rate} --seed {seed}", "evaluate runs/{seed}"]
other: [compare b.yaml]
""",
    )
    found = script["commands"](tmp_path / "kept")
    assert found.keys() == {"some", "other"} and found["other"] == ["compare b.yaml"]
    assert found["some"][:3] == ["sft a.yaml", "policy --lr 1e-3 --seed 0", "evaluate runs/0"]
    assert found["some"][-2:] == ["policy --lr 3e-4 --seed 1", "evaluate runs/1"] and len(found["some"]) == 9


def test_quality_against_the_number_of_labels(tmp_path: Path, script: dict[str, Any]) -> None:
    for name, learned, value in (("all", 1869, 0.75), ("all-labels-92", 92, 0.5), ("all-labels-187", 187, 0.625)):
        quality = {"value": value, "low": value - 0.1, "high": value + 0.1}
        sides = {side: {"quality": quality, "difference": quality, "verdict": "better"} for side in ("full", "r8")}
        part = {"sides": sides, "reference": "full", "metric": "AUC"}
        write(tmp_path / "kept" / name / "compare.json", {"reward": part})
        cell = tmp_path / "cells" / name / "cell"
        there, most = (1869, 11) if learned == 187 else (learned, None)  # a tenth of an epoch; all of it
        write(cell / "result.json", {"train_examples": there, "updates": 11})
        write(cell / "config.yaml", yaml.safe_dump({"examples_per_update": 17, "max_updates": most}))
    write(tmp_path / "kept" / "index.md", "<!-- labels of all -->\n<!-- end -->\n")
    script["tables"]()
    rows = [line for line in (tmp_path / "kept" / "index.md").read_text().splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["labels", "---", "92", "187", "1,869"]
    assert rows[2].endswith("| 0.500 (0.400 to 0.600) | 0.500 (0.400 to 0.600) | 0.500 (0.400 to 0.600), better |")
    assert (tmp_path / "kept" / "all-labels.svg").read_text().startswith("<svg")


def test_what_each_rate_reached_is_the_first_seeds(tmp_path: Path, script: dict[str, Any]) -> None:
    tried = [
        {"side": side, "learning_rate": rate, "seed": seed, "validation": value}
        for side, rate, seed, value in (
            ("full", 1e-4, 0, 0.5),
            ("full", 1e-3, 0, None),  # diverged
            ("r8-attention", 1e-3, 0, 0.75),
            ("r4-attention", 1e-3, 0, 0.25),
            ("r4-attention", 2e-4, 0, 0.625),
            ("r8-attention", 1e-3, 1, 0.0),
        )
    ]
    write(tmp_path / "kept" / "commands.yaml", "some: [compare some.yaml]")
    part = {"tried": tried, "reference": "full", "metric": "AUC"}
    write(tmp_path / "kept" / "some" / "compare.json", {"reward": part})
    write(tmp_path / "kept" / "some" / "compare.yaml", "reward: {}")
    write(tmp_path / "kept" / "index.md", "<!-- tried of reward -->\n<!-- end -->\n")
    script["tables"]()
    page = (tmp_path / "kept" / "index.md").read_text()
    assert "| some | AUC | 0.0001: 0.500 | 0.0002: 0.625, 0.001: 0.500 |" in page
    write(tmp_path / "kept" / "some" / "compare.yaml", "reward: {select: loss}")
    script["tables"]()
    assert "| some | minus loss | 0.0001: 0.500 |" in (tmp_path / "kept" / "index.md").read_text()
