"""Tables and plots of docs/results, from the numbers that scripts/results.py keeps there.

A marker of the page, `<!-- KIND of NAME -->`, says what stands below it; `tables` has the kinds. What is between the
markers is written here, all else by hand.
"""

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from perlhf.data.coffee_bar.gold import RULES
from perlhf.reports import comparison, figures, findings
from perlhf.runs.evaluations import mapping, measured
from perlhf.runs.words import count, duration, memory, number
from perlhf.system.files import read_json, write_atomic
from results_kept import Kept, commands, finished, machine, manifest_of

MARKED = re.compile(r"(<!-- (\w+) of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SEED = re.compile(r"-?seed\d+$")
"""What the names of runs that differ in nothing but their seed end in."""
STRENGTH = re.compile(r"-(kl|beta)[0-9.]+")
"""What says how strongly a policy is anchored, in the name of its run."""
WORDS = {"gold": "gold score", "score": "score"}
"""What judges a policy, as the page says it."""
SHOWN = {"reward": "r8-attention", "policy": "r16-attention"}
"""The rank that the overview shows: the one with as many seeds as full tuning."""
BLOCK = 4
"""Updates whose rollouts are averaged for a point of a curve."""


def tables(kept: Kept) -> None:
    """Rewrites what stands between the markers of the page of results, and the plots beside it."""
    page = kept.results / "index.md"
    text = page.read_text(encoding="utf-8")
    write = {"overview": _overview, "tried": _tried, "results": _results, "rules": _rules, "runs": _runs}
    write |= {"curves": _curves, "labels": _labels, "frontier": _frontier, "times": _times, "grid": _grid}
    write_atomic(page, MARKED.sub(lambda found: f"{found[1]}{write[found[2]](kept, found[3])}{found[4]}", text))


def _comparisons(kept: Kept, stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of a stage; with fewer labels they have a table of their own."""
    for name in commands(kept.results):
        file = kept.results / name / "compare.json"
        found = read_json(file) if file.exists() and "-labels-" not in name else {}
        if stage in found:
            yield name, found[stage]


def _overview(kept: Kept, stages: str) -> str:
    """The comparisons of `STAGE+STAGE`, a line each: full tuning beside the rank of `SHOWN`, what both must beat."""
    heads = ["set", "judged by", "to beat", "full", "LoRA", "LoRA minus full", "verdict", "memory", "speed"]
    lines = [heads, ["---"] * len(heads)]
    for stage in stages.split("+"):
        for name, part in _comparisons(kept, stage):
            if SHOWN[stage] not in part["sides"]:
                continue
            full, side, start = part["sides"][part["reference"]], part["sides"][SHOWN[stage]], part["start"]
            shown = dict(zip(comparison.columns(part), dict(comparison.rows(part))[SHOWN[stage]], strict=True))
            lines.append(
                [
                    name,
                    part["metric"],
                    f"{start['name']} {number(start['quality']['value'])}" if start else _best(part["baselines"]),
                    number(full["quality"]["value"]),
                    f"{SHOWN[stage].partition('-')[0]} {number(side['quality']['value'])}",
                    comparison.words(side["difference"]),
                    shown["verdict"],
                    f"{number(100 * side['memory_share'])} %",
                    f"{number(side['speed_factor'])}×",
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _tried(kept: Kept, stage: str) -> str:
    """What each learning rate reached on validation groups with the first seed: full tuning, and all ranks' mean."""
    lines = ["| set | validated by | full | LoRA, mean of ranks |", "|---|---|---|---|"]
    for name, part in _comparisons(kept, stage):
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
        lines.append(f"| {' | '.join([name, _validated_by(kept, name, stage) or part['metric'], *cells])} |")
    return "\n".join([*lines, ""])


def _validated_by(kept: Kept, name: str, stage: str) -> str | None:
    """What chose the learning rate, where that isn't the metric of the test groups."""
    if stage == "policy":
        return "held-out reward"
    asked = yaml.safe_load((kept.results / name / "compare.yaml").read_text(encoding="utf-8"))[stage]
    return "minus loss" if asked.get("select") == "loss" else None


def _best(baselines: Mapping[str, object]) -> str:
    best = findings.strongest({name: measured(raw) for name, raw in baselines.items()})
    return f"{best[0]} {number(best[1])}" if best else "–"


def _results(kept: Kept, name: str) -> str:
    """One comparison: what it was, a table of its sides, the verdict, a plot."""
    found = read_json(kept.results / name / "compare.json")
    parts = []
    for stage, part in found.items():
        manifests = [manifest_of(cell) for cell in finished(kept.cells / name) if cell.name.startswith(stage)]
        versions = mapping(part["versions"])
        lines = [
            f"`perlhf {commands(kept.results)[name][-1]}`: {len(manifests)} {stage} runs of "
            f"{duration(sum(one['wall_seconds'] for one in manifests))} in all, {count(part['records'])} test "
            f"records of {count(part['groups'])} groups, margin {number(part['margin'])}. {comparison.over(part)} "
            f"{', '.join(dict.fromkeys(map(machine, manifests)))}, {part['jobs']} at a time, torch "
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
        _draw(kept, image, figures.dots(points, "peak memory, GiB", part["metric"]))
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


def _evaluated(kept: Kept, name: str) -> dict[str, list[dict[str, Any]]]:
    """Evaluations of each setting, one a seed: runs whose names differ in -seedN alone are one setting."""
    settings: dict[str, list[dict[str, Any]]] = {}
    files = sorted((kept.cells / name).glob("*/evaluation.json"))
    for file in sorted(files, key=lambda file: SEED.sub("", file.parent.name)):
        evaluation = read_json(file)
        for made in (file.with_name("result.json"), file.with_name("dpo.json")):
            if made.exists():
                evaluation["trained"] = read_json(made).get("seconds")
        settings.setdefault(SEED.sub("", file.parent.name), []).append(evaluation)
    of_all = [one["before"]["score"] for seeds in settings.values() for one in seeds]
    assert of_all and all(one == of_all[0] for one in of_all), f"{name}: evaluations of unlike references, or none"
    return settings


def _best_of(seeds: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((one["best_of"] for one in seeds if one.get("best_of")), {})


def _mean(seeds: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(one["after"][key]["value"] for one in seeds)


def _judged_by(settings: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    return "gold" if any(one["after"].get("gold") for seeds in settings.values() for one in seeds) else "score"


def _over_seeds(found: Sequence[Any]) -> str:
    """One measurement with its interval; of several seeds the mean and the lowest and highest."""
    if len(found) == 1:
        return comparison.words(found[0])
    values = [one["value"] for one in found]
    return f"{number(statistics.fmean(values))} ({number(min(values))} to {number(max(values))})"


def _runs(kept: Kept, name: str) -> str:
    """Evaluated policies: what they changed against the reference, by what scored them; best-of-n where asked."""
    settings = _evaluated(kept, name)
    golden = _judged_by(settings) == "gold"
    timed = all(one.get("trained") for seeds in settings.values() for one in seeds)
    columns = ["change in score", "score", *(["gold score"] if golden else []), "win rate", "KL, nats"]
    columns += [*(["training"] if timed else []), "seeds", "prompts"]
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]

    def row(label: str, sides: Sequence[Mapping[str, Any]], kl: str, trained: str, n: int, **others: str) -> None:
        cells = [others.get("change", "–"), _over_seeds([side["score"] for side in sides])]
        cells += [_over_seeds([side["gold"] for side in sides])] if golden else []
        cells += [others.get("win_rate", "–"), kl, *([trained] if timed else []), others.get("seeds", "–"), str(n)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    for setting, seeds in settings.items():
        if setting == next(iter(settings)):
            row("reference", [seeds[0]["before"]], "0", "–", seeds[0]["n"])
        row(
            setting,
            [one["after"] for one in seeds],
            _over_seeds([one["after"]["kl_temperature_1"] for one in seeds]),
            duration(statistics.fmean(one["trained"] for one in seeds)) if timed else "–",
            seeds[0]["n"],
            change=_over_seeds([one["change"]["score"] for one in seeds]),
            win_rate=_over_seeds([one["win_rate"] for one in seeds]),
            seeds=str(len(seeds)),
        )
    for setting, seeds in settings.items():
        for number_of, best in _best_of(seeds).items():
            label = f"best of {number_of} by what {setting} learned from"
            kl = f"at most {number(best['kl_at_most'])}"
            row(label, [best], kl, "–", seeds[0]["n"], win_rate=comparison.words(best["win_rate"]))
    if any(len(seeds) > 1 for seeds in settings.values()):
        lines += [
            "",
            "In brackets the lowest and highest seed; where there is one alone, a 95 % interval over prompts.",
        ]
    return "\n".join([*lines, ""])


def _frontier(kept: Kept, name: str) -> str:
    """Gold score (or score) over KL: a line for each way, through its settings; best-of-n at the most its KL can be."""
    lines: dict[str, list[tuple[float, float]]] = {}
    settings = _evaluated(kept, name)
    key = _judged_by(settings)
    for setting, seeds in settings.items():
        point = (_mean(seeds, "kl_temperature_1"), _mean(seeds, key))
        lines.setdefault(STRENGTH.sub("", setting), []).append(point)
        for best in _best_of(seeds).values():
            lines.setdefault("best of n", []).append((best["kl_at_most"], best[key]["value"]))
    start = next(iter(settings.values()))[0]["before"][key]["value"]
    drawn = {label: [[(0.0, start), *sorted(points)]] for label, points in lines.items()}
    image, words = f"{name}-frontier.svg", WORDS[key]
    _draw(kept, image, figures.paths(drawn, "KL, nats a completion", words))
    return f"![{words} over KL, as in the table]({image})\n"


def _times(kept: Kept, name: str) -> str:
    """Gold score (or score) against the seconds that training took: from each setting to the same one with a clip."""
    lines: dict[str, list[tuple[float, float]]] = {}
    settings = _evaluated(kept, name)
    key = _judged_by(settings)
    for setting, seeds in settings.items():
        seconds = statistics.fmean(one["trained"] for one in seeds)
        lines.setdefault(setting.removesuffix("-clip"), []).append((seconds, _mean(seeds, key)))
    image, words = f"{name}-times.svg", WORDS[key]
    drawn = figures.paths({label: [points] for label, points in lines.items()}, "seconds of training", words)
    _draw(kept, image, drawn)
    return f"![{words} against training time, from without to with a clip, as in the table]({image})\n"


def _grid(kept: Kept, name: str) -> str:
    """Validation of a grid's runs by targets and alpha (rows) and learning rate (columns): mean of seeds, and each."""
    reached: dict[tuple[str, float], dict[float, list[float]]] = {}
    for run in finished(kept.cells / name):
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        row = (config["adapter"]["targets"], config["adapter"]["alpha"])
        rates = reached.setdefault(row, {})
        rates.setdefault(config["optim"]["learning_rate"], []).append(_validation(run))
    rates = sorted({rate for of_row in reached.values() for rate in of_row})
    heads = ["targets", "alpha", *(format(rate, "g") for rate in rates)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (targets, alpha), of_row in sorted(reached.items(), key=lambda row: (row[0][0] != "attention", row[0][1])):
        found = [of_row.get(rate, []) for rate in rates]
        cells = [f"{number(statistics.fmean(one))} ({', '.join(map(number, one))})" if one else "–" for one in found]
        lines.append(f"| {targets} | {alpha:g} | {' | '.join(cells)} |")
    several = [seeds for of_row in reached.values() for seeds in of_row.values() if len(seeds) > 1]
    if several:
        spread = statistics.fmean(map(statistics.variance, several)) ** 0.5
        lines += [
            "",
            f"Seeds of one cell differ by {number(spread)} (standard deviation, over all cells with several).",
        ]
    return "\n".join([*lines, ""])


def _validation(run: Path) -> float:
    """What a run of a grid reached on validation groups: its own figure, or the gold score of a policy's evaluation."""
    file = run / "evaluation.json"
    evaluation: Any = read_json(file) if file.exists() else None
    if evaluation and evaluation["kind"] == "policy":
        assert evaluation["split"] == "validation", f"{run}: evaluated on {evaluation['split']} groups"
        return evaluation["after"]["gold"]["value"]
    reached = read_json(run / "result.json")["validation"]
    return reached.get("auc", reached.get("pairwise_accuracy"))


def _rules(kept: Kept, name: str) -> str:
    """How far the policies of a comparison on the embedded set keep each rule, on the mean of their seeds."""
    (part,) = read_json(kept.results / name / "compare.json").values()
    lines = [f"| side | {' | '.join(RULES)} |", "|---" * (len(RULES) + 1) + "|"]
    for side in part["sides"]:
        files = sorted((kept.cells / name).glob(f"policy-{side}-*/evaluation.json"))
        rules = [read_json(file)["gold_rules"] for file in files]
        whens = [(part["start"]["name"], "before")] if side == part["reference"] else []
        for label, when in [*whens, (side, "after")]:
            cells = [number(statistics.fmean(one[when][rule] for one in rules)) for rule in RULES]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _labels(kept: Kept, name: str) -> str:
    """Quality against the number of labels: the comparisons NAME-labels-N, and NAME itself, which has all."""
    rows, lines = [], {}
    for folder in [*kept.results.glob(f"{name}-labels-*"), kept.results / name]:
        (part,) = read_json(folder / "compare.json").values()
        cell = next(finished(kept.cells / folder.name))
        result = read_json(cell / "result.json")
        learned, values = result["train_examples"], yaml.safe_load((cell / "config.yaml").read_text(encoding="utf-8"))
        if values["max_updates"]:  # part of an epoch sees fewer; an update of whole groups may hold more than its size
            learned = min(learned, result["updates"] * values["examples_per_update"])
        rows.append((learned, part))
    rows.sort(key=lambda row: row[0])
    sides = list(rows[0][1]["sides"])
    reference, metric = rows[0][1]["reference"], rows[0][1]["metric"]
    others = [side for side in sides if side != reference]
    heads = [*(f"{side}, {metric}" for side in sides), *(f"{side} minus {reference}" for side in others)]
    table = ["| labels | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for learned, part in rows:
        reached = part["sides"]
        cells = [comparison.words(reached[side]["quality"]) for side in sides]
        cells += [f"{comparison.words(reached[side]['difference'])}, {reached[side]['verdict']}" for side in others]
        table.append(f"| {count(learned)} | " + " | ".join(cells) + " |")
        for side in sides:
            lines.setdefault(side, [[]])[0].append((learned, part["sides"][side]["quality"]["value"]))
    image = f"{name}-labels.svg"
    _draw(kept, image, figures.paths(lines, "labels", metric))
    return "\n".join([*table, "", f"![{metric} against the number of labels, as in the table]({image})", ""])


def _draw(kept: Kept, image: str, svg: str) -> None:
    write_atomic(kept.results / image, figures.alone(svg))


def _curves(kept: Kept, name: str) -> str:
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
    for file in sorted((kept.cells / name).glob("*/curve.json")):
        rows = json.loads(file.read_text(encoding="utf-8"))
        means = [_means(rows[at : at + BLOCK]) for at in range(0, len(rows) - len(rows) % BLOCK, BLOCK)]
        if not means:
            continue
        first, last = means[0], means[-1]
        ends = [(number(first[key]), number(last[key])) for key in ("score", "gold", "kl")]
        cells = [start if len(means) == 1 else f"{start} to {end}" for start, end in ends]
        best = max(means, key=lambda one: one["gold"])
        cells.insert(2, f"{number(best['gold'])} at KL {number(best['kl'])}")
        manifest, chosen = manifest_of(file.parent), "cut off"
        bytes_of = manifest.get("cuda_peak_memory_bytes") or manifest.get("peak_memory_bytes")
        if (file.parent / "result.json").exists():
            step = read_json(file.parent / "result.json")["best_step"]
            chosen = f"{step}: {number(_means(rows[max(step - BLOCK, 0) : step])['gold'])}" if step else "the start"
        cells += [chosen, memory(bytes_of) if bytes_of else "–"]
        lines.append(f"| {file.parent.name} | {len(rows)} | " + " | ".join(cells) + " |")
        for key, shown in paths.items():
            shown[file.parent.name] = [[(one["kl"], one[key]) for one in means]]
    images = []
    for key, words in WORDS.items():
        image = f"{name}-{key}.svg"
        _draw(kept, image, figures.paths(paths[key], "KL, nats a completion", words))
        images.append(f"![{words} over KL; the table has first and last points]({image})")
    return "\n".join([*lines, "", *images, ""])


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
