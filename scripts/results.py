"""Keeps what `perlhf compare` found below docs/results, and writes tables and plots from it without training.

keep RUNS NAME     the comparison in RUNS goes to docs/results/NAME; numbers of its finished runs (no texts, no
                   adapters), and what the rollouts of policies on the embedded set scored, the gold score included, go
                   into docs/results/cells.tar.gz, whose SHA-256 is written to docs/results/commands.yaml
restore NAME RUNS  the reverse: `perlhf compare --output RUNS` then goes on after the kept cells
conclude           quality, differences and verdicts of docs/results/NAME/compare.json again, from the kept cells, as
                   today's rules for intervals and verdicts have them
tables             tables and plots from docs/results, between the markers of docs/results/index.md
reproduce          says how long the kept cells took, then runs the commands of docs/results/commands.yaml, in which
                   every result's are written; what is finished below runs/ isn't made again
"""

import argparse
import itertools
import json
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from perlhf.comparison.results import conclude
from perlhf.config.comparison import CompareConfig
from perlhf.config.recipe import load_recipe
from perlhf.data.coffee_bar.gold import RULES, gold, gold_rules
from perlhf.errors import PerlhfError
from perlhf.runs.words import duration
from perlhf.system.files import read_json, write_atomic, write_json
from results_kept import MARKER, Kept, commands, finished, machine, manifest_of, pack, unpack
from results_tables import tables

REPOSITORY = Path(__file__).resolve().parents[1]
KEPT = Kept(REPOSITORY / "docs" / "results", REPOSITORY / "build" / "results")
WHOLE = ("config.yaml", "manifest.json", "metrics.jsonl", "result.json")
"""Files of a cell that are kept as they are."""
SAMPLE = ("group", "score_before", "score_after", "gold_before", "gold_after")
"""What is kept of an evaluated sample: numbers, no texts."""


def keep(runs: Path, name: str) -> None:
    """Copies the whole comparison, and packs the numbers of every finished cell."""
    for file in ("compare.yaml", "compare.json"):
        if (runs / file).exists():
            (KEPT.results / name).mkdir(exist_ok=True)
            shutil.copyfile(runs / file, KEPT.results / name / file)
    (KEPT.cells / MARKER).unlink(missing_ok=True)  # until they are packed, the archive's cells are what counts
    target = KEPT.cells / name
    target.mkdir(parents=True, exist_ok=True)
    if (runs / "failed").exists():
        shutil.copytree(runs / "failed", target / "failed", dirs_exist_ok=True)
    elsewhere = (path.parent for path in sorted(runs.glob("*/dpo.json")))  # evaluated, but no run of ours
    for cell in [*finished(runs), *elsewhere]:
        _keep_cell(cell, target / cell.name, samples=(runs / "compare.yaml").exists())
    for run in sorted(path.parent for path in runs.glob("*/rollouts")):
        paths = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["paths"]
        if all(path.startswith("builtin:coffee-bar") for path in paths):
            (target / run.name).mkdir(exist_ok=True)
            for file in ("config.yaml", "manifest.json"):
                shutil.copyfile(run / file, target / run.name / file)
            write_atomic(target / run.name / "curve.json", json.dumps(_rollout_means(run)) + "\n")
    pack(KEPT)


def _keep_cell(cell: Path, to: Path, samples: bool) -> None:
    to.mkdir(exist_ok=True)
    for file in (*WHOLE, "dpo.json"):
        if (cell / file).exists():
            shutil.copyfile(cell / file, to / file)
    for file in sorted(cell.glob("evaluation*.json")):
        evaluation = read_json(file)
        if rules := _rules_of(evaluation):
            evaluation["gold_rules"] = rules
        rows = evaluation.get("samples") or []
        evaluation["samples"] = [{key: row[key] for key in SAMPLE if key in row} for row in rows]
        if evaluation["kind"] == "reward" or not samples:  # a comparison goes on from those of policies
            del evaluation["samples"]
        write_atomic(to / file.name, json.dumps(evaluation) + "\n")


def _rules_of(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """On the embedded set, how far the answers keep each rule of the gold score, the start's and the policy's."""
    rows = evaluation.get("samples") or []
    if not rows or rows[0].get("gold_after") is None:
        return {}
    if "prompt" not in rows[0]:  # kept before, and restored
        return evaluation.get("gold_rules", {})
    kept = {when: [gold_rules(row["prompt"], row[when]) for row in rows] for when in ("before", "after")}
    return {
        when: {rule: statistics.fmean(one[rule] for one in found) for rule in RULES} for when, found in kept.items()
    }


def _rollout_means(run: Path) -> list[dict[str, float]]:
    """Mean score, gold score and KL of each update's completions."""
    means = []
    for file in sorted((run / "rollouts").glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        golden = [gold(row["prompt"], row["completion"]) for row in rows]
        means.append(
            {
                "step": rows[0]["step"],
                "score": statistics.fmean(row["score"] for row in rows),
                "gold": statistics.fmean(golden),
                "kl": statistics.fmean(row["kl"] for row in rows),
            }
        )
    return means


def restore(name: str, runs: Path) -> None:
    """Puts the kept cells where `perlhf compare` looks for finished ones; what is there already stays."""
    runs.mkdir(parents=True, exist_ok=True)
    for kept in (KEPT.results / name, KEPT.cells / name):
        for source in sorted(kept.rglob("*")):
            target = runs / source.relative_to(kept)
            if source.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


def again() -> None:
    """Concludes every kept comparison anew; what was tried and what it cost stays as it was."""
    for name in commands(KEPT.results):
        file = KEPT.results / name / "compare.json"
        if file.exists():
            config = load_recipe(file.with_name("compare.yaml"), CompareConfig)
            found = {stage: _concluded(stage, part, config, name) for stage, part in read_json(file).items()}
            write_json(file, found)


def _concluded(stage: Any, part: Mapping[str, Any], config: CompareConfig, name: str) -> dict[str, Any]:
    """A stage's part of compare.json: the sides' seeds at the rates that were chosen."""
    runs: dict[str, list[Path]] = {}
    for side, reached in part["sides"].items():
        start = f"{stage}-{side}-lr{reached['learning_rate']:g}-seed"
        runs[side] = [KEPT.cells / name / f"{start}{one['seed']}" for one in reached["seeds"]]
    diverged = {side: reached["diverged"] for side, reached in part["sides"].items()}
    also = tuple(path for path in config.also_test if Path(path).name in part["elsewhere"])
    config = config.model_copy(update={"also_test": also})
    return {**part, **conclude(stage, runs, config, diverged)}


def reproduce() -> None:
    """Runs the commands of every result, in the order of the file."""
    total = 0.0
    for name in commands(KEPT.results):
        manifests = [manifest_of(cell) for cell in finished(KEPT.cells / name)]
        outside = [read_json(file) for file in (KEPT.cells / name).glob("*/dpo.json")]
        seconds = sum(one["wall_seconds"] for one in manifests) + sum(one["seconds"] for one in outside)
        total += seconds
        machines = " and ".join(dict.fromkeys(map(machine, manifests)))
        runs = len(manifests) + len(outside)
        print(f"{name}: {runs} runs that were kept took {duration(seconds)} on {machines or 'no machine'}")
    print(
        f"all: at least {duration(total)} one after another; runs before them, those that weren't kept and evaluations "
        "come on top. Ctrl-C saves, and the same command goes on",
        flush=True,
    )
    for command in dict.fromkeys(itertools.chain.from_iterable(commands(KEPT.results).values())):
        words = shlex.split(command)
        if not _made(words):
            program = [] if words[0].endswith(".py") else ["-m", "perlhf"]
            print(f"{'python' if not program else 'perlhf'} {command}", flush=True)
            if code := _run([sys.executable, *program, *words]):
                sys.exit(code)


def _made(words: list[str]) -> bool:
    """Whether a command need not run again. Runs and comparisons are left to perlhf, which goes on with them."""
    if words[0] in ("compare", "sft", "reward", "policy"):
        return False
    output = Path(words[words.index("--output") + 1]) if "--output" in words else Path(words[1], "evaluation.json")
    written_last = {"data": "test.jsonl", "average": "result.json"}.get(words[0], "dpo.json")
    return any((REPOSITORY / file).is_file() for file in (output, output / written_last))


def _run(command: list[str]) -> int:
    """The exit code of a command, which sees to Ctrl-C itself: it saves, and this waits for it."""
    process = subprocess.Popen(command, cwd=REPOSITORY)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # only now: the command would inherit it
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("keep", "restore", "conclude", "tables", "reproduce"))
    parser.add_argument("names", nargs="*", help="as above")
    arguments = parser.parse_args()
    wanted = {"keep": 2, "restore": 2}.get(arguments.what, 0)
    if len(arguments.names) != wanted:
        parser.error(f"{arguments.what} takes {wanted} names")
    try:
        unpack(KEPT)
        match arguments.what:
            case "keep":
                keep(Path(arguments.names[0]), arguments.names[1])
            case "restore":
                restore(arguments.names[0], Path(arguments.names[1]))
            case "conclude":
                again()
            case "tables":
                tables(KEPT)
            case "reproduce":
                reproduce()
    except PerlhfError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main()
