"""The page of `perlhf loop`: verdict, rounds, accuracy against labels, reward models' preference beside labels'.

As the page of `perlhf report` it asks for nothing outside itself, and it has no script.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from perlhf.reports import figures
from perlhf.reports.page import environment, style
from perlhf.runs.evaluations import mapping, measured
from perlhf.runs.words import count, duration, number, with_interval

COLUMNS: tuple[str, ...] = (
    "labels",
    "held-out accuracy",
    "preferred to the start by its reward models",
    "preferred to the start by labels",
    "disagreement",
    "KL, nats",
    "tokens",
    "the machine's time",
)


def render(loop: Mapping[str, Any], title: str) -> bytes:
    """The page about what loop.json holds; equal numbers give equal bytes."""
    page = (
        environment()
        .get_template("loop.html.j2")
        .render(
            title=title,
            style=style(),
            verdict=loop["verdict"],
            curve=loop["curve"]["sentence"],
            setting=setting(loop),
            rounds=[one["round"] for one in loop["rounds"]],
            rows=quantities(loop),
            notes=[note for one in loop["rounds"] for note in _notes(one)],
            charts=_charts(loop),
        )
    )
    return page.encode(errors="replace")


def setting(loop: Mapping[str, Any]) -> str:
    """How it was measured, in a sentence or two."""
    share = f"{loop['random_share']:.0%} of each round's at random"
    by = "all at random" if loop["order"] == "random" else f"by {loop['order']}, {share}"
    return (
        f"Labels: {loop['labeller']}. Questions {by}; the first round's all at random. {loop['members']} reward "
        f"adapters. Accuracy on {count(loop['held_out_questions'])} held-out questions that nothing learned from; "
        f"policies on {count(loop['duels'])} held-out prompts, each beside the start's answer. 95 % intervals over "
        "groups. Disagreement: mean deviation of the members' preferences on held-out pairs. Tokens: mean length, the "
        "start's first."
    )


def columns(loop: Mapping[str, Any]) -> list[str]:
    """Heads of the table of rounds, less the first, which numbers them."""
    heads = list(COLUMNS)
    if any("accuracy_by_rules" in one for one in loop["rounds"]):
        heads[2:2] = ["accuracy by the rules, without noise"]
        heads.insert(5, "gold score, the start's first")
    return heads


def quantities(loop: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(quantity, its cell of each round): `rows` and `columns` the other way round, since rounds are fewer."""
    table = rows(loop)
    return [(head, [cells[at] for _, cells in table]) for at, head in enumerate(columns(loop))]


def rows(loop: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(round, cells) of the table of rounds."""
    table = []
    for one in loop["rounds"]:
        cells = [
            _labels(one),
            words(one["accuracy"]),
            words(one["predicted"]),
            f"{words(one['preferred'])} of {count(one['judged_duels'])}",
            number(one["disagreement"]) if one["disagreement"] is not None else "–",
            words(one["kl"]),
            _both(one["tokens"]),
            duration(_computed(one["seconds"])),
        ]
        if "accuracy_by_rules" in one:
            cells[2:2] = [words(one["accuracy_by_rules"])]
            cells.insert(5, _both(one["gold"]))
        table.append((str(one["round"]), cells))
    return table


def words(raw: object) -> str:
    """A value with its interval."""
    found = measured(raw)
    return "–" if found is None else with_interval(found)


def _computed(seconds: Mapping[str, float]) -> float | None:
    """Seconds of a round, those left out in which somebody was waited for."""
    return sum(took for step, took in seconds.items() if step != "labels") if seconds else None


def _labels(one: Mapping[str, Any]) -> str:
    drawn = ", ".join(f"{times} {name}" for name, times in one["drawn"].items())
    served = f"; {count(one['served'])} from serving" if one.get("served") else ""
    return f"{count(one['labels'])} (asked: {drawn}{served})"


def _notes(one: Mapping[str, Any]) -> Iterator[str]:
    if one["stopped"]:
        yield f"Round {one['round']}: {one['stopped']}."
    if one.get("too_long"):
        yield (
            f"Round {one['round']}: {count(one['too_long'])} labels are about answers longer than encoding.max_tokens, "
            "and aren't learned from."
        )
    if one.get("accuracy_in_use"):
        agrees = words(one["accuracy_in_use"])
        yield f"Round {one['round']}: reward models agree with {agrees} of the choices made in use on held-out prompts."


def _both(raw: object) -> str:
    sides = mapping(raw)
    before, after = measured(sides.get("before")), measured(sides.get("after"))
    return "–" if before is None or after is None else f"{number(before.value)} to {with_interval(after)}"


def _charts(loop: Mapping[str, Any]) -> list[tuple[str, Markup, str]]:
    """(title, figure, the same in words)."""
    charts = []
    dots = [
        figures.Dot(f"round {one['round']}", one["labels"], found.value, found.low, found.high)
        for one in loop["rounds"]
        if (found := measured(one["accuracy"])) is not None
    ]
    if dots:
        svg = Markup(figures.dots(dots, "labels learned from", "held-out accuracy"))
        said = "; ".join(f"{number(dot.y)} with {count(dot.x)} labels" for dot in dots)
        charts.append(("Held-out accuracy against labels", svg, said))
    names = {"predicted": "reward models", "preferred": "labels"}
    lines = {name: [points] for key, name in names.items() if len(points := _points(loop, key)) > 1}
    if lines:
        svg = Markup(figures.paths(lines, "round", "preferred to the start"))
        said = "; ".join(f"{name} end at {number(points[0][-1][1])}" for name, points in lines.items())
        charts.append(("The policy against its start", svg, said))
    return charts


def _points(loop: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    start = [(0.0, 0.5)]
    return start + [(one["round"], found.value) for one in loop["rounds"] if (found := measured(one[key])) is not None]
