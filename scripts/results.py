"""Keeps what `perlhf compare` found below docs/results, and writes tables and plots from it without training.

keep RUNS NAME     numbers of the finished cells in RUNS (no texts, no adapters) go to docs/results/NAME
restore NAME RUNS  the reverse: `perlhf compare --output RUNS` then goes on after the kept cells
tables             tables and plots from docs/results/*/compare.json, between the markers of docs/results/index.md
reproduce          says how long the kept cells took, then runs every comparison anew below runs/
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perlhf.report import comparison, figures
from perlhf.run_files import count, duration, mapping, number
from perlhf.storage import write_atomic

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "results"
WHOLE = ("config.yaml", "manifest.json", "metrics.jsonl", "result.json")
"""Files of a cell that are kept as they are."""
SAMPLE = ("group", "score_before", "score_after", "gold_before", "gold_after")
"""What is kept of an evaluated sample: numbers, no texts."""
MARKED = re.compile(r"(<!-- results of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def keep(runs: Path, name: str) -> None:
    """Copies the numbers of every finished cell, and of the whole comparison."""
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("compare.yaml", "compare.json"):
        if (runs / file).exists():
            shutil.copyfile(runs / file, target / file)
    shutil.copytree(runs / "failed", target / "failed", dirs_exist_ok=True)
    for cell in _finished(runs):
        to = target / cell.name
        to.mkdir(exist_ok=True)
        for file in WHOLE:
            shutil.copyfile(cell / file, to / file)
        if (cell / "evaluation.json").exists():
            evaluation = json.loads((cell / "evaluation.json").read_text(encoding="utf-8"))
            evaluation["samples"] = [
                {key: row[key] for key in SAMPLE if key in row} for row in evaluation.get("samples") or []
            ]
            if evaluation["kind"] == "reward":
                del evaluation["samples"]
            write_atomic(to / "evaluation.json", json.dumps(evaluation) + "\n")


def restore(name: str, runs: Path) -> None:
    """Puts the kept cells where `perlhf compare` looks for finished ones; what is there already stays."""
    runs.mkdir(parents=True, exist_ok=True)
    for source in sorted((RESULTS / name).rglob("*")):
        target = runs / source.relative_to(RESULTS / name)
        if source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def tables() -> None:
    """Rewrites what stands between the markers of the page, and the plots beside it."""
    page = RESULTS / "index.md"
    text = page.read_text(encoding="utf-8")
    write_atomic(page, MARKED.sub(lambda found: f"{found[1]}{_results(found[2])}{found[3]}", text))


def reproduce() -> None:
    """Runs every kept comparison from its recipe, in a new directory each."""
    names = sorted(path.parent.name for path in RESULTS.glob("*/compare.yaml"))
    total = 0.0
    for name in names:
        cells = list(_finished(RESULTS / name))
        seconds = sum(_manifest(cell)["wall_seconds"] for cell in cells)
        total += seconds
        print(f"{name}: {len(cells)} cells took {duration(seconds)} on {_machine(_manifest(cells[0]))}")
    print(f"all: {duration(total)} without evaluations; Ctrl-C saves, and the same command goes on", flush=True)
    for name in names:
        command = ["compare", f"recipes/{name}/compare.yaml", "--output", f"runs/reproduced-{name}"]
        subprocess.run([sys.executable, "-m", "perlhf", *command], cwd=REPOSITORY, check=True)


def _finished(runs: Path) -> Iterator[Path]:
    return (path.parent for path in sorted(runs.glob("*/result.json")))


def _manifest(cell: Path) -> dict[str, Any]:
    return json.loads((cell / "manifest.json").read_text(encoding="utf-8"))


def _machine(manifest: Mapping[str, Any]) -> str:
    hardware = manifest["hardware"]
    return f"{hardware['cpu']} ({hardware['cores']} cores)"


def _results(name: str) -> str:
    """One comparison: what it was, a table of its sides, the verdict, a plot."""
    found = json.loads((RESULTS / name / "compare.json").read_text(encoding="utf-8"))
    parts = []
    for stage, part in found.items():
        manifests = [_manifest(cell) for cell in _finished(RESULTS / name) if cell.name.startswith(stage)]
        versions = mapping(part["versions"])
        lines = [
            f"`perlhf compare recipes/{name}/compare.yaml`: {len(manifests)} {stage} runs of "
            f"{duration(sum(one['wall_seconds'] for one in manifests))} in all, {count(part['records'])} test "
            f"records of {count(part['groups'])} groups, margin {number(part['margin'])}. {_machine(manifests[0])}, "
            f"{part['threads']} threads, torch {versions.get('torch')}, transformers {versions.get('transformers')}, "
            f"commits {', '.join(sorted({str(one['commit'])[:7] for one in manifests}))}.",
            "",
            f"| side | {part['metric']} | minus {part['reference']} | verdict | peak memory | speed | time "
            "| trainable | learning rate | seeds |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(_row(side, one) for side, one in part["sides"].items()),
            "",
            part["verdict"],
            "",
        ]
        points = [
            figures.Dot(side, one["peak_memory_bytes"] / 2**30, *(one["quality"][k] for k in ("value", "low", "high")))
            for side, one in part["sides"].items()
        ]
        image = f"{name}-{stage}.svg"
        write_atomic(RESULTS / image, figures.alone(figures.dots(image, points, "peak memory, GiB", part["metric"])))
        words = "; ".join(f"{one.label} {number(one.y)} at {number(one.x)} GiB" for one in points)
        parts += [*lines, f"![{part['metric']} against peak memory: {words}]({image})", ""]
    return "\n".join(parts)


def _row(side: str, found: Mapping[str, Any]) -> str:
    seeds = ", ".join(f"{one['seed']}: {number(one['value'])}" for one in found["seeds"])
    return "| " + " | ".join([side, *comparison.cells(found), format(found["learning_rate"], "g"), seeds]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("keep", "restore", "tables", "reproduce"))
    parser.add_argument("names", nargs="*", help="as above")
    arguments = parser.parse_args()
    wanted = {"keep": 2, "restore": 2}.get(arguments.what, 0)
    if len(arguments.names) != wanted:
        parser.error(f"{arguments.what} takes {wanted} names")
    if arguments.what == "keep":
        keep(Path(arguments.names[0]), arguments.names[1])
    elif arguments.what == "restore":
        restore(arguments.names[0], Path(arguments.names[1]))
    else:
        {"tables": tables, "reproduce": reproduce}[arguments.what]()


if __name__ == "__main__":
    main()
