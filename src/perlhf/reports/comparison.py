"""The page of `perlhf compare`: verdict, table, quality against time and memory, learning curves, rates tried.

As the page of `perlhf report` it asks for nothing outside itself, and it has no script.
"""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from perlhf.reports import figures, findings
from perlhf.reports.page import environment, style
from perlhf.runs.evaluations import mapping, measured
from perlhf.runs.words import count, duration, memory, number, with_interval

_STAGES = {"reward": "Reward model", "policy": "Policy"}


def render(comparison: Mapping[str, Mapping[str, Any]], title: str) -> bytes:
    """The page about what compare.json holds; equal numbers give equal bytes."""
    stages = [_section(name, part) for name, part in comparison.items()]
    page = environment().get_template("compare.html.j2").render(title=title, style=style(), stages=stages)
    return page.encode(errors="replace")


def _section(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    sides = part["sides"]
    return {
        "title": _STAGES[name],
        "verdict": part["verdict"],
        "setting": _setting(part),
        "columns": columns(part),
        "rows": rows(part),
        "seeds": [
            (
                side,
                f"{reached['learning_rate']:g}",
                ", ".join(f"{run['seed']}: {number(run['value'])}" for run in reached["seeds"]),
            )
            for side, reached in sides.items()
        ],
        "charts": _charts(name, part),
        "tried": [
            (row["side"], f"{row['learning_rate']:g}", row["seed"], number(row["validation"]), row["failed"] or "")
            for row in part["tried"]
        ],
    }


def _setting(part: Mapping[str, Any]) -> str:
    hardware = mapping(part["hardware"])
    torch = mapping(part["versions"]).get("torch", "unknown")
    machine = hardware.get("gpu") or f"{hardware.get('cpu', 'unknown CPU')}, {part['threads']} threads"
    jobs = part.get("jobs", 1)
    together = f" {jobs} cells ran at a time, and shared the speed." if jobs > 1 else ""
    unlike = f" Memory and speed are of unlike cells: {'; '.join(part['unlike'])}." if part["unlike"] else ""
    return (
        f"{part['metric']} on {count(part['records'])} test records of {count(part['groups'])} groups; margin "
        f"{number(part['margin'])}, fixed beforehand. {over(part)} {machine}, torch {torch}.{together}{unlike}"
    )


def over(part: Mapping[str, Any]) -> str:
    """What the intervals of quality and differences are over, and who scored policies, in a sentence or two."""
    if not part.get("start"):
        return _over(part)
    by = ", ".join(part["scorers"]) or "what the policies learned from, which flatters them"
    return f"{_over(part)} Scores and wins are by {by}."


def _over(part: Mapping[str, Any]) -> str:
    if noise := part["seed_noise"]:
        others = len(part["sides"]) - 1
        several = f" Verdicts hold for all {others} differences together (Holm), intervals for each alone."
        return (
            "95 % intervals of quality and differences over groups and seeds: seeds differ by "
            f"{number(noise['deviation'])} (standard deviation, "
            f"{noise['degrees']} degrees of freedom), which is taken to be so for every side."
            f"{several if others > 1 else ''}"
        )
    return (
        "95 % intervals over groups alone: no side has a second seed, and how far seeds differ isn't in them, so that "
        "there is no verdict."
    )


def columns(part: Mapping[str, Any]) -> list[str]:
    """Heads of the table of all sides, less the first, which names the side."""
    heads = [part["metric"], f"minus {part['reference']}", "verdict"]
    if start := part.get("start"):
        score = ["score"] if part["metric"] != "score" else []
        heads += [f"minus {start['name']}", *score, f"wins against {start['name']} by score", "KL, nats"]
    for name, there in (part.get("elsewhere") or {}).items():
        seen = there["groups_seen_in_training"]
        warning = f", {count(seen)} of {count(there['groups'])} groups seen in training" if seen else ""
        heads += [
            f"{name}: {there['metric']} of {count(there['records'])}{warning}",
            f"there minus {part['reference']}",
        ]
    return [*heads, "peak memory", "speed", "time", "trainable"]


def rows(part: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(side, cells) of the table of all sides; what policies start from is its first row."""
    start = part.get("start")
    score = ["score"] if start and part["metric"] != "score" else []
    table = []
    if start:
        known = [words(start["quality"]), "–", "start", "–", *(words(start[key]) for key in score)]
        table.append((start["name"], [*known, *["–"] * (len(columns(part)) - len(known))]))
    for side, reached in part["sides"].items():
        answers = [words(reached[key]) for key in ("change", *score, "win_rate", "kl")] if start else []
        others = [there["sides"][side] for there in (part.get("elsewhere") or {}).values()]
        cells = [
            words(reached["quality"]),
            words(reached["difference"]),
            ", ".join([reached["verdict"], *_warnings(reached)]),
            *answers,
            *(cell for there in others for cell in _there(there)),
            f"{memory(reached['peak_memory_bytes'])}, {_percent(reached['memory_share'])}",
            f"{count(reached['tokens_per_second'])} tokens/s, {number(reached['speed_factor'])}×",
            duration(reached["seconds"]),
            _percent(reached["trainable_share"]),
        ]
        table.append((side, cells))
    return table + _baseline_rows(part)


def _baseline_rows(part: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The rows of what needs no network, which are the last ones: quality alone, here and elsewhere."""
    here = mapping(part.get("baselines"))
    elsewhere = [mapping(there.get("baselines")) for there in (part.get("elsewhere") or {}).values()]
    table = []
    for key in here:
        others = [cell for there in elsewhere for cell in (words(there.get(key)), "–")]
        cells = [words(here[key]), "–", "baseline", *others]
        table.append((findings.BASELINES[key], [*cells, *["–"] * (len(columns(part)) - len(cells))]))
    return table


def _there(reached: Mapping[str, Any]) -> tuple[str, str]:
    difference = "–" if reached["difference"] is None else f"{words(reached['difference'])}, {reached['verdict']}"
    return words(reached["quality"]), difference


def words(raw: object) -> str:
    """The value and its interval with the decimals of the largest of the three: a difference may be next to nothing."""
    metric = measured(raw)
    if metric is None:
        return "–"
    return with_interval(metric, max(abs(end) for end in (metric.value, metric.low, metric.high) if end is not None))


def _warnings(reached: Mapping[str, Any]) -> list[str]:
    """What a verdict hides: seeds that were lost, and such whose best checkpoint is the one before any training."""
    seeds, diverged, untrained = len(reached["seeds"]), reached["diverged"], reached["kept_start"]
    lost = [f"{diverged} of {seeds + diverged} seeds diverged"] if diverged else []
    return lost + ([f"{untrained} of {seeds} seeds kept the start untrained"] if untrained else [])


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{number(100 * share)} %"


def _charts(name: str, part: Mapping[str, Any]) -> list[tuple[str, Markup, str]]:
    """(title, figure, the same in words)."""
    metric, sides, charts = part["metric"], part["sides"], []
    # A policy's scorer isn't asked while it learns.
    validated, by = (metric, "") if name == "reward" else ("reward", ", by what training validates with")
    for key, xlabel, scale in (
        ("seconds", "minutes of training", 60),
        ("peak_memory_bytes", "peak memory, GiB", 2**30),
    ):
        points = [
            figures.Dot(side, reached[key] / scale, *(reached["quality"][end] for end in ("value", "low", "high")))
            for side, reached in sides.items()
            if reached[key] is not None
        ]
        if points:
            text = "; ".join(f"{dot.label} {number(dot.y)} at {number(dot.x)}" for dot in points)
            svg = Markup(figures.dots(points, xlabel, metric))
            charts.append((f"{metric} against {xlabel}", svg, text))
    lines = {
        side: [[(time / 60, value) for time, value in curve] for curve in reached["curves"] if curve]
        for side, reached in sides.items()
    }
    if any(lines.values()):
        svg = Markup(figures.paths(lines, "minutes of training", f"{validated}, validation"))
        text = "; ".join(f"{side} ends at {number(curves[0][-1][1])}" for side, curves in lines.items() if curves)
        charts.append((f"{validated} on validation groups while training{by}", svg, text))
    return charts
