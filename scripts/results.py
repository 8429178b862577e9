"""Keeps what `perlhf compare` found below docs/results, and writes tables and plots from it without training.

keep RUNS NAME     numbers of the finished runs in RUNS (no texts, no adapters) go to docs/results/NAME, and what the
                   rollouts of policies on the embedded set scored, the gold score included
restore NAME RUNS  the reverse: `perlhf compare --output RUNS` then goes on after the kept cells
tables             tables and plots from docs/results, between the markers of docs/results/index.md
reproduce          says how long the kept cells took, then runs the commands of docs/results/commands.yaml, in which
                   every result's are written; a run that is finished below runs/ isn't run again
"""

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from perlhf import run_files
from perlhf.data.coffee_bar import gold
from perlhf.data.coffee_bar_gold import RULES, gold_rules
from perlhf.report import comparison, figures, findings
from perlhf.run_files import count, duration, mapping, number
from perlhf.storage import write_atomic

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "results"
WHOLE = ("config.yaml", "manifest.json", "metrics.jsonl", "result.json")
"""Files of a cell that are kept as they are."""
SAMPLE = ("group", "score_before", "score_after", "gold_before", "gold_after")
"""What is kept of an evaluated sample: numbers, no texts."""
MARKED = re.compile(
    r"(<!-- (overview|tried|results|rules|runs|curves|rates|labels) of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL
)
SHOWN = {"reward": "r8-attention", "policy": "r16-attention"}
"""The rank that the overview shows: the one with as many seeds as full tuning."""
BLOCK = 4
"""Updates whose rollouts are averaged for a point of a curve."""


def keep(runs: Path, name: str) -> None:
    """Copies the numbers of every finished cell, and of the whole comparison."""
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("compare.yaml", "compare.json"):
        if (runs / file).exists():
            shutil.copyfile(runs / file, target / file)
    if (runs / "failed").exists():
        shutil.copytree(runs / "failed", target / "failed", dirs_exist_ok=True)
    elsewhere = (path.parent for path in sorted(runs.glob("*/dpo.json")))  # evaluated, but no run of ours
    for cell in [*_finished(runs), *elsewhere]:
        _keep_cell(cell, target / cell.name)
    for run in sorted(path.parent for path in runs.glob("*/rollouts")):
        paths = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["paths"]
        if all(path.startswith("builtin:coffee-bar") for path in paths):
            (target / run.name).mkdir(exist_ok=True)
            for file in ("config.yaml", "manifest.json"):
                shutil.copyfile(run / file, target / run.name / file)
            write_atomic(target / run.name / "curve.json", json.dumps(_rollout_means(run)) + "\n")


def _keep_cell(cell: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    for file in (*WHOLE, "dpo.json"):
        if (cell / file).exists():
            shutil.copyfile(cell / file, to / file)
    for file in sorted(cell.glob("evaluation*.json")):
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        if rules := _rules_of(evaluation):
            evaluation["gold_rules"] = rules
        rows = evaluation.get("samples") or []
        evaluation["samples"] = [{key: row[key] for key in SAMPLE if key in row} for row in rows]
        if evaluation["kind"] == "reward":
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
    for source in sorted((RESULTS / name).rglob("*")):
        target = runs / source.relative_to(RESULTS / name)
        if source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def tables() -> None:
    """Rewrites what stands between the markers of the page, and the plots beside it."""
    page = RESULTS / "index.md"
    text = page.read_text(encoding="utf-8")
    write = {"overview": _overview, "tried": _tried, "results": _results, "rules": _rules, "runs": _runs}
    write |= {"curves": _curves, "rates": _rates, "labels": _labels}
    write_atomic(page, MARKED.sub(lambda found: f"{found[1]}{write[found[2]](found[3])}{found[4]}", text))


def reproduce() -> None:
    """Runs the commands of every result, in the order of the file."""
    total = 0.0
    for name in _commands():
        manifests = [_manifest(cell) for cell in _finished(RESULTS / name)]
        seconds = sum(one["wall_seconds"] for one in manifests)
        total += seconds
        machines = " and ".join(dict.fromkeys(map(_machine, manifests)))
        print(f"{name}: {len(manifests)} runs that were kept took {duration(seconds)} on {machines or 'no machine'}")
    print(
        f"all: at least {duration(total)} one after another; runs before them, those that weren't kept and evaluations "
        "come on top. Ctrl-C saves, and the same command goes on",
        flush=True,
    )
    for command in dict.fromkeys(command for commands in _commands().values() for command in commands):
        words = shlex.split(command)
        output = words[words.index("--output") + 1] if "--output" in words and words[0] != "compare" else None
        if output is None or not (REPOSITORY / output).exists():
            print(f"perlhf {command}", flush=True)
            subprocess.run([sys.executable, "-m", "perlhf", *words], cwd=REPOSITORY, check=True)


def _commands() -> dict[str, list[str]]:
    """What makes each result, without the word `perlhf`; what two results share is done once."""
    return yaml.safe_load((RESULTS / "commands.yaml").read_text(encoding="utf-8"))


def _finished(runs: Path) -> Iterator[Path]:
    return (path.parent for path in sorted(runs.glob("*/result.json")))


def _manifest(cell: Path) -> dict[str, Any]:
    return json.loads((cell / "manifest.json").read_text(encoding="utf-8"))


def _machine(manifest: Mapping[str, Any]) -> str:
    hardware = manifest["hardware"]
    if hardware.get("gpu") or manifest.get("cuda_peak_memory_bytes"):
        return hardware.get("gpu") or "a GPU"
    return f"{hardware['cpu']} ({manifest['threads']} threads)"


def _comparisons(stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of a stage; with fewer labels they have a table of their own."""
    for name in _commands():
        file = RESULTS / name / "compare.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() and "-labels-" not in name else {}
        if stage in found:
            yield name, found[stage]


def _overview(stage: str) -> str:
    """The comparisons of a stage, a line each: the reference beside the rank of `SHOWN`."""
    beside = {"reward": "best baseline", "policy": "start"}[stage]
    heads = ["set", beside, "full", SHOWN[stage], "difference", "verdict", "seeds", "memory", "speed"]
    lines = [heads, ["---"] * len(heads)]
    for name, part in _comparisons(stage):
        if SHOWN[stage] not in part["sides"]:
            continue
        full, side = part["sides"][part["reference"]], part["sides"][SHOWN[stage]]
        shown = dict(zip(comparison.columns(part), dict(comparison.rows(part))[SHOWN[stage]], strict=True))
        lines.append(
            [
                f"{name}: {part['metric']}, {count(part['records'])} records",
                _with_interval(part["start"]["quality"]) if part["start"] else _best(part["baselines"]),
                *(_with_interval(one) for one in (full["quality"], side["quality"], side["difference"])),
                shown["verdict"],
                f"{len(full['seeds'])} and {len(side['seeds'])}",
                f"{number(100 * side['memory_share'])} %",
                f"{number(side['speed_factor'])}×",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _tried(stage: str) -> str:
    """What each learning rate reached on validation groups with the first seed: full tuning, and all ranks' mean."""
    lines = ["| set | validated by | full | LoRA, mean of ranks |", "|---|---|---|---|"]
    for name, part in _comparisons(stage):
        first = min(one["seed"] for one in part["tried"])
        reached: dict[bool, dict[float, list[float]]] = {True: {}, False: {}}
        for one in part["tried"]:
            if one["seed"] == first and one["validation"] is not None:
                of_side = reached[one["side"] == part["reference"]].setdefault(one["learning_rate"], [])
                of_side.append(one["validation"])
        cells = [
            ", ".join(f"{rate:g}: {number(statistics.fmean(found))}" for rate, found in sorted(side.items()))
            for side in reached.values()
        ]
        lines.append(f"| {' | '.join([name, _validated_by(name, stage) or part['metric'], *cells])} |")
    return "\n".join([*lines, ""])


def _validated_by(name: str, stage: str) -> str | None:
    """What chose the learning rate, where that isn't the metric of the test groups."""
    if stage == "policy":
        return "held-out reward"
    asked = yaml.safe_load((RESULTS / name / "compare.yaml").read_text(encoding="utf-8"))[stage]
    return "minus loss" if asked.get("select") == "loss" else None


def _best(baselines: Mapping[str, object]) -> str:
    best = findings.strongest(baselines)
    return f"{best[0]} {number(best[1])}" if best else "–"


def _results(name: str) -> str:
    """One comparison: what it was, a table of its sides, the verdict, a plot."""
    found = json.loads((RESULTS / name / "compare.json").read_text(encoding="utf-8"))
    parts = []
    for stage, part in found.items():
        manifests = [_manifest(cell) for cell in _finished(RESULTS / name) if cell.name.startswith(stage)]
        versions = mapping(part["versions"])
        lines = [
            f"`perlhf {_commands()[name][-1]}`: {len(manifests)} {stage} runs of "
            f"{duration(sum(one['wall_seconds'] for one in manifests))} in all, {count(part['records'])} test "
            f"records of {count(part['groups'])} groups, margin {number(part['margin'])}. {comparison.over(part)} "
            f"{', '.join(dict.fromkeys(map(_machine, manifests)))}, {part['jobs']} at a time, torch "
            f"{versions.get('torch')}, transformers {versions.get('transformers')}, commits "
            f"{', '.join(sorted({str(one['commit'])[:7] for one in manifests}))}.",
            "",
            *_table(part),
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


def _table(part: Mapping[str, Any]) -> list[str]:
    heads = ["side", *comparison.columns(part), "learning rate", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for side, cells in comparison.rows(part):
        found = part["sides"].get(side, {"seeds": [], "learning_rate": None})
        seeds = ", ".join(f"{one['seed']}: {number(one['value'])}" for one in found["seeds"])
        rates = {one["learning_rate"] for one in part["tried"] if one["side"] == side}
        rate = "–" if found["learning_rate"] is None else format(found["learning_rate"], "g")
        if len(rates) > 1 and found["learning_rate"] == max(rates):
            rate += f", highest of {len(rates)}"
        lines.append(f"| {' | '.join([side, *cells, rate, seeds or '–'])} |")
    return lines


def _runs(name: str) -> str:
    """Evaluated policies: what they changed against the reference, by what scored them; best-of-n where asked."""
    found = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((RESULTS / name).glob("*/evaluation.json"))
    }
    golden = any(one["after"].get("gold") for one in found.values())
    columns = ["change in score", "score", *(["gold score"] if golden else []), "win rate", "KL, nats", "prompts"]
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]

    def row(label: str, change: Any, side: Mapping[str, Any], win_rate: Any, kl: str, prompts: int) -> str:
        gold = [_with_interval(side["gold"])] if golden else []
        cells = [_with_interval(change), _with_interval(side["score"]), *gold, _with_interval(win_rate), kl]
        return f"| {label} | " + " | ".join(cells) + f" | {prompts} |"

    for run, one in found.items():
        before, after, n = one["before"], one["after"], one["n"]
        if run == next(iter(found)):
            lines.append(row("reference", None, before, None, "0", n))
        kl = _with_interval(after["kl_temperature_1"])
        lines.append(row(run, one["change"]["score"], after, one["win_rate"], kl, n))
        for number_of, best in one.get("best_of", {}).items():
            most = f"at most {number(best['kl_at_most'])}"
            lines.append(row(f"best of {number_of} by what {run} learned from", None, best, best["win_rate"], most, n))
    return "\n".join([*lines, ""])


def _rules(name: str) -> str:
    """How far the policies of a comparison on the embedded set keep each rule, on the mean of their seeds."""
    (part,) = json.loads((RESULTS / name / "compare.json").read_text(encoding="utf-8")).values()
    lines = [f"| side | {' | '.join(RULES)} |", "|---" * (len(RULES) + 1) + "|"]
    for side in part["sides"]:
        files = sorted((RESULTS / name).glob(f"policy-{side}-*/evaluation.json"))
        kept = [json.loads(file.read_text(encoding="utf-8"))["gold_rules"] for file in files]
        whens = [(part["start"]["name"], "before")] if side == part["reference"] else []
        for label, when in [*whens, (side, "after")]:
            cells = [number(statistics.fmean(one[when][rule] for one in kept)) for rule in RULES]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _labels(name: str) -> str:
    """Quality against the number of labels: the comparisons NAME-labels-N, and NAME itself, which has all."""
    rows, lines = [], {}
    for folder in [*RESULTS.glob(f"{name}-labels-*"), RESULTS / name]:
        (part,) = json.loads((folder / "compare.json").read_text(encoding="utf-8")).values()
        cell = next(_finished(folder))
        result, config = ((cell / file).read_text(encoding="utf-8") for file in ("result.json", "config.yaml"))
        learned, values = json.loads(result)["train_examples"], yaml.safe_load(config)
        if values["max_updates"]:  # part of an epoch sees fewer; an update of whole groups may hold more than its size
            learned = min(learned, json.loads(result)["updates"] * values["examples_per_update"])
        rows.append((learned, part))
    rows.sort(key=lambda row: row[0])
    sides = list(rows[0][1]["sides"])
    reference, metric = rows[0][1]["reference"], rows[0][1]["metric"]
    others = [side for side in sides if side != reference]
    heads = [*(f"{side}, {metric}" for side in sides), *(f"{side} minus {reference}" for side in others)]
    table = ["| labels | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for learned, part in rows:
        cells = [_with_interval(part["sides"][side]["quality"]) for side in sides]
        cells += [
            f"{_with_interval(part['sides'][side]['difference'])}, {part['sides'][side]['verdict']}" for side in others
        ]
        table.append(f"| {count(learned)} | " + " | ".join(cells) + " |")
        for side in sides:
            lines.setdefault(side, [[]])[0].append((learned, part["sides"][side]["quality"]["value"]))
    image = f"{name}-labels.svg"
    write_atomic(RESULTS / image, figures.alone(figures.paths(image, lines, "labels", metric)))
    return "\n".join([*table, "", f"![{metric} against the number of labels, as in the table]({image})", ""])


def _with_interval(found: Any) -> str:
    return comparison.with_interval(run_files.measured(found))


def _curves(name: str) -> str:
    """Policy runs on the embedded set: what their first and last completions score, the same over KL, what was kept."""
    heads = [
        "run",
        "updates",
        "score",
        "gold score",
        "its highest",
        "KL, nats",
        "kept: update, gold score of those up to it",
        "peak memory",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    paths: dict[str, dict[str, list[list[tuple[float, float]]]]] = {"score": {}, "gold": {}}
    for file in sorted((RESULTS / name).glob("*/curve.json")):
        rows = json.loads(file.read_text(encoding="utf-8"))
        means = [_means(rows[at : at + BLOCK]) for at in range(0, len(rows) - len(rows) % BLOCK, BLOCK)]
        if not means:
            continue
        first, last = means[0], means[-1]
        ends = [(number(first[key]), number(last[key])) for key in ("score", "gold", "kl")]
        cells = [start if len(means) == 1 else f"{start} to {end}" for start, end in ends]
        best = max(means, key=lambda one: one["gold"])
        cells.insert(2, f"{number(best['gold'])} at KL {number(best['kl'])}")
        manifest, kept = _manifest(file.parent), "cut off"
        bytes_of = manifest.get("cuda_peak_memory_bytes") or manifest.get("peak_memory_bytes")
        if (file.parent / "result.json").exists():
            step = json.loads((file.parent / "result.json").read_text(encoding="utf-8"))["best_step"]
            kept = f"{step}: {number(_means(rows[max(step - BLOCK, 0) : step])['gold'])}" if step else "the start"
        cells += [kept, run_files.memory(bytes_of) if bytes_of else "–"]
        lines.append(f"| {file.parent.name} | {len(rows)} | " + " | ".join(cells) + " |")
        for key, shown in paths.items():
            shown[file.parent.name] = [[(one["kl"], one[key]) for one in means]]
    images = []
    for key, words in (("gold", "gold score"), ("score", "score")):
        image = f"{name}-{key}.svg"
        write_atomic(RESULTS / image, figures.alone(figures.paths(image, paths[key], "KL, nats a completion", words)))
        images.append(f"![{words} over KL; the table has first and last points]({image})")
    return "\n".join([*lines, "", *images, ""])


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def _rates(name: str) -> str:
    """What single runs reached on validation groups: of a grid, or of a comparison that isn't finished."""
    lines = ["| side | alpha | learning rate | seed | validation |", "|---|---|---|---|---|"]
    for run in _finished(RESULTS / name):
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        adapter = None if config["tuning"] == "full" else config["adapter"]
        side = (f"r{adapter['rank']}-{adapter['targets']}", f"{adapter['alpha']:g}") if adapter else ("full", "–")
        reached = json.loads((run / "result.json").read_text(encoding="utf-8"))["validation"]
        value = number(reached.get("auc", reached.get("pairwise_accuracy")))
        cells = [*side, f"{config['optim']['learning_rate']:g}", str(config["seed"]), value]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


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
