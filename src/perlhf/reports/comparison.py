"""The page of `perlhf compare`: verdict, table, quality against time and memory, learning curves, rates tried.

As the page of `perlhf report` it asks for nothing outside itself, and it has no script.
"""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from perlhf.reports import figures, findings, templating
from perlhf.runs.read import Measured, count, duration, interval, mapping, measured, memory, number

_STAGES = {"reward": "Reward model", "policy": "Policy"}


def render(found: Mapping[str, Mapping[str, Any]], title: str) -> bytes:
    """The page about what compare.json holds; equal numbers give equal bytes."""
    page = (
        templating.environment()
        .get_template("compare.html.j2")
        .render(
            title=title,
            style=templating.style(),
            stages=[_stage(name, part) for name, part in found.items()],
        )
    )
    return page.encode(errors="replace")


def _stage(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
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
                f"{found['learning_rate']:g}",
                ", ".join(f"{one['seed']}: {number(one['value'])}" for one in found["seeds"]),
            )
            for side, found in sides.items()
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
        return (
            "95 % intervals of quality and differences over groups and seeds: seeds differ by "
            f"{number(noise['deviation'])} (standard deviation, "
            f"{noise['degrees']} degrees of freedom), which is taken to be so for every side."
        )
    return "95 % intervals over groups alone: no side has a second seed, and how far seeds differ isn't in them."


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
        known = [with_interval(measured(start["quality"])), "–", "start", "–", *(_words(start, key) for key in score)]
        table.append((start["name"], [*known, *["–"] * (len(columns(part)) - len(known))]))
    for side, found in part["sides"].items():
        one_seed = ["one seed"] if found["difference"] and part["seed_noise"] is None else []
        answers = [_words(found, key) for key in ("change", *score, "win_rate", "kl")] if start else []
        others = [there["sides"][side] for there in (part.get("elsewhere") or {}).values()]
        cells = [
            _words(found, "quality"),
            _words(found, "difference"),
            ", ".join([found["verdict"], *_warnings(found), *one_seed]),
            *answers,
            *(words for there in others for words in _there(there)),
            f"{memory(found['peak_memory_bytes'])}, {_percent(found['memory_share'])}",
            f"{count(found['tokens_per_second'])} tokens/s, {number(found['speed_factor'])}×",
            duration(found["seconds"]),
            _percent(found["trainable_share"]),
        ]
        table.append((side, cells))
    return table + _baselines(part)


def _baselines(part: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The rows of what needs no network, which are the last ones: quality alone, here and elsewhere."""
    here = mapping(part.get("baselines"))
    there = [mapping(found.get("baselines")) for found in (part.get("elsewhere") or {}).values()]
    table = []
    for key in here:
        others = [cell for found in there for cell in (with_interval(measured(found.get(key))), "–")]
        cells = [with_interval(measured(here[key])), "–", "baseline", *others]
        table.append((findings.BASELINES[key], [*cells, *["–"] * (len(columns(part)) - len(cells))]))
    return table


def _there(found: Mapping[str, Any]) -> tuple[str, str]:
    difference = "–" if found["difference"] is None else f"{_words(found, 'difference')}, {found['verdict']}"
    return _words(found, "quality"), difference


def _words(found: Mapping[str, Any], key: str) -> str:
    return with_interval(measured(found[key]))


def with_interval(one: Measured | None) -> str:
    """The value and its interval with the decimals of the largest of the three: a difference may be next to nothing."""
    if one is None:
        return "–"
    scale = max(abs(end) for end in (one.value, one.low, one.high) if end is not None)
    inside = interval(one, scale)
    return number(one.value, scale) + (f" ({inside})" if inside else "")


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """What a verdict hides: seeds that were lost, and such whose best checkpoint is the one before any training."""
    seeds = len(found["seeds"])
    lost = [f"{found['diverged']} of {seeds + found['diverged']} seeds diverged"] if found["diverged"] else []
    start = [f"{found['kept_start']} of {seeds} seeds kept the start untrained"] if found["kept_start"] else []
    return lost + start


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
            figures.Dot(side, found[key] / scale, *(found["quality"][part] for part in ("value", "low", "high")))
            for side, found in sides.items()
            if found[key] is not None
        ]
        if points:
            words = "; ".join(f"{one.label} {number(one.y)} at {number(one.x)}" for one in points)
            svg = Markup(figures.dots(f"{name}-{key}", points, xlabel, metric))
            charts.append((f"{metric} against {xlabel}", svg, words))
    lines = {
        side: [[(time / 60, value) for time, value in curve] for curve in found["curves"] if curve]
        for side, found in sides.items()
    }
    if any(lines.values()):
        svg = Markup(figures.paths(f"{name}-curves", lines, "minutes of training", f"{validated}, validation"))
        words = "; ".join(f"{side} ends at {number(curves[0][-1][1])}" for side, curves in lines.items() if curves)
        charts.append((f"{validated} on validation groups while training{by}", svg, words))
    return charts
