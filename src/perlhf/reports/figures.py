"""Figures as inline SVG, and which of them the page shows of a run.

Colours are CSS variables of the page (and text is `currentColor`), so one figure serves the light and the dark page.
matplotlib knows no CSS, so it draws with stand-in colours that are swapped afterwards. Equal numbers give equal bytes.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from perlhf.runs.evaluations import finite
from perlhf.runs.read import RunFiles
from perlhf.runs.words import count, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

_TEXT, _GRID = "#010101", "#020202"
_COLOURS = {"1": "#030303", "2": "#040404", "3": "#050505", "was": "#060606"}
_CSS = {_TEXT: "currentColor", _GRID: "var(--rule)"} | {
    drawn: f"var(--series-{name})" for name, drawn in _COLOURS.items()
}
_SIZE, _SQUARER = (3.6, 2.05), (3.6, 2.7)  # inches; the page scales a figure to its column


@dataclass(frozen=True)
class Series:
    """One line or cloud of a figure; `colour` names the page's variable `--series-COLOUR`."""

    label: str
    points: Sequence[Point]
    colour: Literal["1", "2", "3", "was"] = "1"


def curves(name: str, series: Sequence[Series], best_step: float | None = None) -> str:
    """Lines over steps. A line of 30 points or more is drawn thin under its running mean.

    Args:
        name: unique on the page; prefixes all ids.
        series: lines that hold at least one point.
        best_step: step of the kept checkpoint, drawn as a vertical line.
    """
    with _drawing(name) as drawing:
        axes = drawing.axes
        for line in series:
            colour = _COLOURS[line.colour]
            steps, values = [step for step, _ in line.points], [value for _, value in line.points]
            width = smoothing(len(values))
            if width > 1:
                axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.45)
                values = running_mean(values, width)
            few = len(values) <= 24
            axes.plot(steps, values, color=colour, linewidth=1.7, marker="o" if few else None, markersize=2.8)
        if best_step is not None:
            axes.axvline(best_step, color=_TEXT, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.6)
        axes.set_xlim(0, 1.03 * max(step for line in series for step, _ in line.points) or 1)
        axes.locator_params(axis="x", integer=True, nbins=5)
        axes.locator_params(axis="y", nbins=5)
    return drawing.svg


def calibration(name: str, bins: Sequence[tuple[float, float, int]]) -> str:
    """Observed share of positive labels over predicted probability, with the diagonal.

    Args:
        name: unique on the page; prefixes all ids.
        bins: (mean predicted, observed share, number of ratings) of each bin; the number sets the dot's area.
    """
    predicted, observed = [x for x, _, _ in bins], [y for _, y, _ in bins]
    largest = max(n for _, _, n in bins)
    with _drawing(name, _SQUARER) as drawing:
        axes = drawing.axes
        axes.plot([0, 1], [0, 1], color=_TEXT, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.6)
        axes.plot(predicted, observed, color=_COLOURS["1"], linewidth=1.2, alpha=0.7)
        areas = [max(90 * n / largest, 6) for _, _, n in bins]
        axes.scatter(predicted, observed, s=areas, color=_COLOURS["1"], zorder=3, clip_on=False)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted", ylabel="observed")
    return drawing.svg


def clouds(name: str, series: Sequence[Series], xlabel: str, ylabel: str) -> str:
    """Points with a ringed mean for each series, and an arrow between the means if there are two."""
    with _drawing(name, _SQUARER) as drawing:
        axes, means = drawing.axes, []
        for cloud in series:
            xs, ys = [x for x, _ in cloud.points], [y for _, y in cloud.points]
            axes.scatter(xs, ys, s=10, color=_COLOURS[cloud.colour], alpha=0.45, linewidths=0)
            means.append((sum(xs) / len(xs), sum(ys) / len(ys)))
        if len(means) == 2:
            arrow = {"arrowstyle": "-|>", "color": _TEXT, "linewidth": 1.1, "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", xy=means[1], xytext=means[0], arrowprops=arrow, zorder=4)
        for cloud, (x, y) in zip(series, means, strict=True):
            axes.scatter([x], [y], s=60, color=_COLOURS[cloud.colour], edgecolors=_TEXT, linewidths=1.1, zorder=5)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.locator_params(nbins=5)
    return drawing.svg


@dataclass(frozen=True)
class Dot:
    """A labelled value with its interval (None where there is none)."""

    label: str
    x: float
    y: float
    low: float | None
    high: float | None


def dots(name: str, points: Sequence[Dot], xlabel: str, ylabel: str) -> str:
    """Labelled dots with vertical intervals: what is up and to the left is good and cheap."""
    with _drawing(name, _SQUARER) as drawing:
        axes = drawing.axes
        right = 1.25 * max(dot.x for dot in points)
        for index, dot in enumerate(points):
            colour = _COLOURS[_colour_of(dot.label)]
            # Labels of dots that stand at the same place go up in steps.
            step = sum(abs(dot.x - other.x) < 0.1 * right for other in points[:index])
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.x, dot.x], [dot.low, dot.high], color=colour, linewidth=1.1, alpha=0.6)
            axes.scatter([dot.x], [dot.y], s=18, color=colour, zorder=3)
            place = (dot.x, dot.y), (4, 3 + 7 * step)
            axes.annotate(dot.label, *place, textcoords="offset points", fontsize=6, color=_TEXT)
        axes.set_xlim(0, right)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.locator_params(nbins=5)
    return drawing.svg


_DASHES = ("-", "--", ":", "-.", (0, (6, 1.5)))


def paths(name: str, lines: Mapping[str, Sequence[Sequence[Point]]], xlabel: str, ylabel: str) -> str:
    """One line for each seed of each label, which stands at its end; labels of one colour differ in dashes."""
    drawn: list[str] = []
    with _drawing(name, _SQUARER) as drawing:
        axes = drawing.axes
        for label, seeds in lines.items():
            colour = _colour_of(label)
            look = {"color": _COLOURS[colour], "linestyle": _DASHES[drawn.count(colour) % len(_DASHES)]}
            drawn.append(colour)
            for index, points in enumerate(seeds):
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.plot(xs, ys, linewidth=0.9, alpha=0.4 if index else 0.9, **look)
            if seeds:
                axes.annotate(label, seeds[0][-1], (3, 0), textcoords="offset points", fontsize=6, color=_TEXT)
        axes.margins(x=0.15)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.locator_params(nbins=5)
    return drawing.svg


def _colour_of(label: str) -> Literal["1", "2", "3"]:
    """Full tuning, adapters on attention, adapters on all layers."""
    return "2" if label == "full" else "3" if label.endswith("-all") else "1"


def smoothing(points: int) -> int:
    """Width of the running mean for a line of so many points: odd, 1 (none) below 30."""
    return 1 if points < 30 else 2 * (points // 30) + 3


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over `width` values (odd); near the ends over those of them that there are."""
    half = width // 2
    means = []
    for index in range(len(values)):
        window = values[max(index - half, 0) : index + half + 1]
        means.append(sum(window) / len(window))
    return means


@dataclass
class _Drawing:
    axes: "Axes"
    svg: str = ""


@contextmanager
def _drawing(name: str, size: tuple[float, float] = _SIZE) -> Iterator[_Drawing]:
    """Bare axes in the page's style; `svg` is there once the block is left."""
    # Imported here: matplotlib costs half a second, and help and validation must not pay for it.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the page
        matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none", "axes.formatter.useoffset": False})
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(colors=_TEXT, length=0, labelsize=8)
        axes.xaxis.label.set(color=_TEXT, fontsize=8)
        axes.yaxis.label.set(color=_TEXT, fontsize=8)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        drawing = _Drawing(axes)
        yield drawing
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing.svg = _inline(name, buffer.getvalue())


def alone(svg: str) -> str:
    """A figure as a file of its own, which follows the reader's light or dark setting."""
    light = "--rule:#dedad2;--series-1:#0e7c8c;--series-2:#c0580b;--series-3:#6d4fa3;--series-was:#8d8a84;color:#1c1d1f"
    dark = "--rule:#34383d;--series-1:#5cc0cf;--series-2:#f0a25a;--series-3:#b79be8;--series-was:#83868b;color:#e8e6e1"
    style = f"<style>svg{{{light};font-family:sans-serif}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return re.sub(r"<svg([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg"\1>{style}', svg, count=1) + "\n"


def _inline(name: str, text: str) -> str:
    """The `<svg>` element alone: no prolog, metadata, namespaces, fonts or styles that would leak into the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| font-family: [^;"]*;', "", text)
    text = re.sub(r'<svg[^>]* (viewBox="[^"]*")[^>]*>', r'<svg aria-hidden="true" focusable="false" \1>', text, count=1)
    used = set(re.findall(r'(?:url\(|xlink:href=")#([^)"]*)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for drawn, shown in _CSS.items():
        text = text.replace(drawn, shown)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


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


def of_training(section_id: str, run: RunFiles) -> list[Chart]:
    """What was learned: losses, scores, KL and so on over updates, with the kept checkpoint."""
    best_step = finite(run.result.get("best_step"))
    drawn = [_curve(f"{section_id}-a{index}", run, *spec, best_step) for index, spec in enumerate(_specs(run))]
    return [chart for chart in drawn if chart is not None]


def of_optimisation(section_id: str, run: RunFiles) -> list[Chart]:
    """How it went: gradients, sampler gap, speed."""
    drawn = [_curve(f"{section_id}-b{index}", run, *spec, None) for index, spec in enumerate(_OPTIMISATION)]
    return [chart for chart in drawn if chart is not None]


def of_evaluation(section_id: str, run: RunFiles) -> list[Chart]:
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
        svg = Markup(calibration(f"{section_id}-calibration", bins))
        words = "; ".join(f"predicted {number(x)}, observed {number(y)}, {count(n)} ratings" for x, y, n in bins)
        charts.append(Chart("Calibration", svg, [], f"Calibration: {words}."))
    before, after = _score_and_gold(run, "before"), _score_and_gold(run, "after")
    if before and after:
        sides = [Series("before", before, "was"), Series("after", after)]
        svg = Markup(clouds(f"{section_id}-gold", sides, "score", "gold score"))
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
    name: str, run: RunFiles, title: str, unit: str, keys: Sequence[tuple[str, str]], best_step: float | None
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
    return Chart(heading, Markup(curves(name, lines, best_step)), legend, f"{heading}: {'; '.join(parts)}.", last)


def _score_and_gold(run: RunFiles, side: str) -> list[Point]:
    points = []
    for row in run.evaluation.samples:
        score, gold = finite(row.get(f"score_{side}")), finite(row.get(f"gold_{side}"))
        if score is not None and gold is not None:
            points.append((score, gold))
    return points
