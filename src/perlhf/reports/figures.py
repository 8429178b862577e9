"""The figures of pages, and which of them the page shows of a run; `plot` draws them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from markupsafe import Markup

from perlhf.reports.plot import SQUARER, TEXT, Plot, Point
from perlhf.runs.evaluations import finite
from perlhf.runs.read import RunFiles
from perlhf.runs.words import count, number


@dataclass(frozen=True)
class Series:
    """One line or cloud of a figure; `colour` names the page's variable `--series-COLOUR`."""

    label: str
    points: Sequence[Point]
    colour: Literal["1", "2", "3", "was"] = "1"


def curves(series: Sequence[Series], best_step: float | None = None) -> str:
    """Lines over steps. A line of 30 points or more is drawn thin under its running mean.

    Args:
        series: lines that hold at least one point.
        best_step: step of the kept checkpoint, drawn as a vertical line.
    """
    last = max(step for line in series for step, _ in line.points)
    plot = Plot(xlim=(0, 1.03 * max(last, best_step or 0) or 1), whole_steps=True)
    for line in series:
        colour, points = _css(line.colour), line.points
        width = smoothing(len(points))
        if width > 1:
            plot.line(points, colour, 0.7, 0.45)
            means = running_mean([value for _, value in points], width)
            points = [(step, mean) for (step, _), mean in zip(points, means, strict=True)]
        plot.line(points, colour, 1.7)
        if len(points) <= 24:
            plot.dots(points, colour, 1.8)
    if best_step is not None:
        plot.upright(best_step)
    return plot.svg()


def calibration(bins: Sequence[tuple[float, float, int]]) -> str:
    """Observed share of positive labels over predicted probability, with the diagonal.

    Args:
        bins: (mean predicted, observed share, number of ratings) of each bin; the number sets the dot's area.
    """
    largest = max(n for _, _, n in bins)
    points = [(predicted, observed) for predicted, observed, _ in bins]
    plot = Plot(SQUARER, "predicted", "observed", (-0.02, 1.02), (-0.02, 1.02))
    plot.line([(0, 0), (1, 1)], TEXT, 0.8, 0.6, "1.6 2.4")
    plot.line(points, _css("1"), 1.2, 0.7)
    plot.dots(points, _css("1"), [_radius(max(90 * n / largest, 6)) for _, _, n in bins])
    return plot.svg()


def clouds(series: Sequence[Series], xlabel: str, ylabel: str) -> str:
    """Points with a ringed mean for each series, and an arrow between the means if there are two."""
    plot, means = Plot(SQUARER, xlabel, ylabel), []
    for cloud in series:
        plot.dots(cloud.points, _css(cloud.colour), _radius(10), 0.45)
        xs, ys = zip(*cloud.points, strict=True)
        means.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    for cloud, mean in zip(series, means, strict=True):
        plot.dots([mean], _css(cloud.colour), _radius(60), ring=TEXT)
    if len(means) == 2:
        plot.arrow(*means)
    return plot.svg()


@dataclass(frozen=True)
class Dot:
    """A labelled value with its interval (None where there is none)."""

    label: str
    x: float
    y: float
    low: float | None
    high: float | None


def dots(points: Sequence[Dot], xlabel: str, ylabel: str) -> str:
    """Labelled dots with vertical intervals: what is up and to the left is good and cheap."""
    right = 1.25 * max(dot.x for dot in points) or 1
    plot = Plot(SQUARER, xlabel, ylabel, (0, right))
    for index, dot in enumerate(points):
        colour = _css(_colour_of(dot.label))
        # Labels of dots that stand at the same place go up in steps.
        step = sum(abs(dot.x - other.x) < 0.1 * right for other in points[:index])
        if dot.low is not None and dot.high is not None:
            plot.line([(dot.x, dot.low), (dot.x, dot.high)], colour, 1.1, 0.6)
        plot.dots([(dot.x, dot.y)], colour, _radius(18))
        plot.words((dot.x, dot.y), dot.label, 4, 3 + 7 * step)
    return plot.svg()


_DASHES = (None, "3.3 1.4", "0.9 1.5", "5.8 1.4 0.9 1.4", "5.4 1.4")


def paths(lines: Mapping[str, Sequence[Sequence[Point]]], xlabel: str, ylabel: str) -> str:
    """One line for each seed of each label, which stands at its end; labels of one colour differ in dashes."""
    drawn: list[str] = []
    plot = Plot(SQUARER, xlabel, ylabel, xmargin=0.15)
    for label, seeds in lines.items():
        colour = _colour_of(label)
        dashes = _DASHES[drawn.count(colour) % len(_DASHES)]
        drawn.append(colour)
        for index, points in enumerate(seeds):
            plot.line(points, _css(colour), 0.9, 0.4 if index else 0.9, dashes)
        if seeds:
            plot.words(seeds[0][-1], label, 3, 0)
    return plot.svg()


def _colour_of(label: str) -> Literal["1", "2", "3"]:
    """Full tuning, adapters on attention, adapters on all layers."""
    return "2" if label == "full" else "3" if label.endswith("-all") else "1"


def _css(colour: str) -> str:
    return f"var(--series-{colour})"


def _radius(area: float) -> float:
    return math.sqrt(area / math.pi)


def smoothing(points: int) -> int:
    """Width of the running mean for a line of so many points: odd, 1 (none) below 30."""
    return 1 if points < 30 else 2 * (points // 30) + 3


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over `width` values (odd); near the ends over those of them that there are."""
    half, sums = width // 2, [0.0, *accumulate(values)]
    ends = [(max(index - half, 0), min(index + half + 1, len(values))) for index in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def alone(svg: str) -> str:
    """A figure as a file of its own, which follows the reader's light or dark setting."""
    light = "--rule:#dedad2;--series-1:#0e7c8c;--series-2:#c0580b;--series-3:#6d4fa3;--series-was:#8d8a84;color:#1c1d1f"
    dark = "--rule:#34383d;--series-1:#5cc0cf;--series-2:#f0a25a;--series-3:#b79be8;--series-was:#83868b;color:#e8e6e1"
    style = f"<style>svg{{{light};font-family:sans-serif}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return re.sub(r"<svg([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg"\1>{style}', svg, count=1) + "\n"


# What the page shows of a run

# (title, unit, ((key of metrics.jsonl, what the line is), ...)); a chart appears where a key was logged.
_TRAINING = (
    ("Loss", "", (("loss", "training"), ("validation_loss", "validation"))),
    ("AUC", "", (("auc", "training"), ("validation_auc", "validation"))),
    ("Accuracy", "", (("accuracy", "training"), ("validation_accuracy", "validation"))),
    ("Pairwise accuracy", "", (("pairwise_accuracy", "training"), ("validation_pairwise_accuracy", "validation"))),
    ("Score", "", (("score_mean", "rollouts"), ("validation_score", "validation"))),
    ("Gold score", "", (("gold_mean", "rollouts"), ("validation_gold", "validation"))),
    ("Reward", "", (("reward_mean", "rollouts"), ("validation_reward", "validation"))),
    ("KL", "nats", (("kl", "rollouts"), ("validation_kl", "validation"))),
    ("Entropy", "nats", (("entropy", "rollouts"),)),
    ("Length", "tokens", (("completion_tokens", "rollouts"), ("validation_completion_tokens", "validation"))),
    ("End-token rate", "", (("end_rate", "rollouts"), ("validation_end_rate", "validation"))),
)
_OPTIMISATION = (
    ("Sampler gap", "nats", (("sampler_gap_mean", "mean"), ("sampler_gap_max", "largest"))),
    ("Policy loss", "", (("policy_loss", "policy"),)),
    ("Value loss", "", (("value_loss", "value"),)),
    ("Gradient norm", "", (("grad_norm", "adapter"), ("value_grad_norm", "value adapter"))),
    ("Learning rate", "", (("learning_rate", "adapter"), ("value_learning_rate", "value adapter"))),
    ("Speed", "tokens/s", (("tokens_per_second", "all"),)),
    ("Time of an update", "s", (("seconds_sample", "sample"), ("seconds_score", "score"), ("seconds_learn", "learn"))),
)

TRAINING_KEYS = tuple(key for _, _, keys in _TRAINING for key, _ in keys)
"""Keys of metrics.jsonl that `of_training` draws."""


@dataclass(frozen=True)
class Chart:
    """A figure with its words: `text` says in a sentence what the picture shows."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]]
    """(label, colour) of each line, where they must be told apart."""
    text: str
    last: str = ""


def of_training(run: RunFiles) -> list[Chart]:
    """What was learned: losses, scores, KL and so on over updates, with the kept checkpoint."""
    best_step = finite(run.result.get("best_step"))
    drawn = [_curve(run, *spec, best_step) for spec in _specs(run)]
    return [chart for chart in drawn if chart is not None]


def of_optimisation(run: RunFiles) -> list[Chart]:
    """How it went: gradients, sampler gap, speed."""
    drawn = [_curve(run, *spec, None) for spec in _OPTIMISATION]
    return [chart for chart in drawn if chart is not None]


def of_evaluation(run: RunFiles) -> list[Chart]:
    """Calibration of a reward model; score and gold score of a policy's samples, where both are there."""
    charts = []
    bins = [
        (predicted, observed, int(n))
        for row in run.evaluation.calibration or []
        if (predicted := finite(row.get("mean_predicted"))) is not None
        and (observed := finite(row.get("observed"))) is not None
        and (n := finite(row.get("n")))
    ]
    if bins:
        svg = Markup(calibration(bins))
        words = "; ".join(f"predicted {number(x)}, observed {number(y)}, {count(n)} ratings" for x, y, n in bins)
        charts.append(Chart("Calibration", svg, [], f"Calibration: {words}."))
    before, after = _score_and_gold(run, "before"), _score_and_gold(run, "after")
    if before and after:
        sides = [Series("before", before, "was"), Series("after", after)]
        svg = Markup(clouds(sides, "score", "gold score"))
        words = f"{len(before)} completions before and {len(after)} after training; an arrow joins their means"
        legend = [(side.label, side.colour) for side in sides]
        charts.append(Chart("Score and gold score", svg, legend, f"Score and gold score of {words}."))
    return charts


def _specs(run: RunFiles) -> list[tuple[str, str, Sequence[tuple[str, str]]]]:
    """`_TRAINING`; what another reward model said of held-out prompts has charts of its own."""
    specs: list[tuple[str, str, Sequence[tuple[str, str]]]] = []
    for title, unit, keys in _TRAINING:
        if title in ("Score", "Reward") and run.config.get("validation_reward"):
            specs += [(title, unit, keys[:1]), (f"{title} by validation_reward", unit, keys[1:])]
        else:
            specs.append((title, unit, keys))
    return specs


def _curve(
    run: RunFiles, title: str, unit: str, keys: Sequence[tuple[str, str]], best_step: float | None
) -> Chart | None:
    lines = [
        Series(label, points, colour)
        for colour, (key, label) in zip(("1", "2", "3"), keys, strict=False)
        if (points := run.series(key))
    ]
    if not lines:
        return None
    parts = [
        f"{line.label} from {number(line.points[0][1])} at step {count(line.points[0][0])}"
        f" to {number(line.points[-1][1])} at step {count(line.points[-1][0])}"
        for line in lines
    ]
    heading = f"{title}, {unit}" if unit else title
    legend = [(line.label, line.colour) for line in lines] if len(lines) > 1 or lines[0].colour != "1" else []
    last = number(lines[-1].points[-1][1])
    return Chart(heading, Markup(curves(lines, best_step)), legend, f"{heading}: {'; '.join(parts)}.", last)


def _score_and_gold(run: RunFiles, side: str) -> list[Point]:
    points = []
    for row in run.evaluation.samples:
        score, gold = finite(row.get(f"score_{side}")), finite(row.get(f"gold_{side}"))
        if score is not None and gold is not None:
            points.append((score, gold))
    return points
