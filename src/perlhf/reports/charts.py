"""Which figures the page shows of a run, each with its words."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from perlhf.reports import figures
from perlhf.runs.read import RunFiles, count, finite, number

_COLOURS = ("1", "2", "3")

# (title, unit, ((key of metrics.jsonl, what the line is), ...)); a chart appears where a key was logged.
_TRAINING = (
    ("Loss", "", (("loss", "training"), ("validation_loss", "validation"))),
    ("AUC", "", (("auc", "training"), ("validation_auc", "validation"))),
    ("Accuracy", "", (("accuracy", "training"), ("validation_accuracy", "validation"))),
    (
        "Pairwise accuracy",
        "",
        (("pairwise_accuracy", "training"), ("validation_pairwise_accuracy", "validation")),
    ),
    ("Score", "", (("score_mean", "rollouts"), ("validation_score", "validation"))),
    ("Gold score", "", (("gold_mean", "rollouts"), ("validation_gold", "validation"))),
    ("Reward", "", (("reward_mean", "rollouts"), ("validation_reward", "validation"))),
    ("KL", "nats", (("kl", "rollouts"), ("validation_kl", "validation"))),
    ("Entropy", "nats", (("entropy", "rollouts"),)),
    (
        "Length",
        "tokens",
        (("completion_tokens", "rollouts"), ("validation_completion_tokens", "validation")),
    ),
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
    kept = finite(run.result.get("best_step"))
    found = [_curve(f"{section_id}-a{index}", run, *spec, kept) for index, spec in enumerate(_specs(run))]
    return [chart for chart in found if chart is not None]


def of_optimisation(section_id: str, run: RunFiles) -> list[Chart]:
    """How it went: gradients, sampler gap, speed."""
    found = [_curve(f"{section_id}-b{index}", run, *spec, None) for index, spec in enumerate(_OPTIMISATION)]
    return [chart for chart in found if chart is not None]


def of_evaluation(section_id: str, run: RunFiles) -> list[Chart]:
    """Calibration of a reward model; score and gold score of a policy's samples, where both are there."""
    found = []
    bins = [
        (predicted, observed, int(n))
        for row in run.evaluation.get("calibration") or []
        if (predicted := finite(row.get("mean_predicted"))) is not None
        and (observed := finite(row.get("observed"))) is not None
        and (n := finite(row.get("n")))
    ]
    if bins:
        svg = Markup(figures.calibration(f"{section_id}-calibration", bins))
        words = "; ".join(f"predicted {number(x)}, observed {number(y)}, {count(n)} ratings" for x, y, n in bins)
        found.append(Chart("Calibration", svg, [], f"Calibration: {words}."))
    before, after = _score_and_gold(run, "before"), _score_and_gold(run, "after")
    if before and after:
        clouds = [figures.Series("before", before, "was"), figures.Series("after", after)]
        svg = Markup(figures.cloud(f"{section_id}-gold", clouds, "score", "gold score"))
        words = f"{len(before)} completions before and {len(after)} after training; an arrow joins their means"
        legend = [(one.label, one.colour) for one in clouds]
        found.append(Chart("Score and gold score", svg, legend, f"Score and gold score of {words}."))
    return found


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
    name: str, run: RunFiles, title: str, unit: str, keys: Sequence[tuple[str, str]], kept: float | None
) -> Chart | None:
    lines = [
        figures.Series(label, points, colour)
        for colour, (key, label) in zip(_COLOURS, keys, strict=False)
        if (points := run.series(key))
    ]
    if not lines:
        return None
    parts = [
        f"{one.label} from {number(one.points[0][1])} at step {count(one.points[0][0])}"
        f" to {number(one.points[-1][1])} at step {count(one.points[-1][0])}"
        for one in lines
    ]
    heading = f"{title}, {unit}" if unit else title
    legend = [(one.label, one.colour) for one in lines] if len(lines) > 1 or lines[0].colour != "1" else []
    last = number(lines[-1].points[-1][1])
    return Chart(heading, Markup(figures.curves(name, lines, kept)), legend, f"{heading}: {'; '.join(parts)}.", last)


def _score_and_gold(run: RunFiles, side: str) -> list[figures.Point]:
    points = []
    for row in run.evaluation.get("samples") or []:
        score, gold = finite(row.get(f"score_{side}")), finite(row.get(f"gold_{side}"))
        if score is not None and gold is not None:
            points.append((score, gold))
    return points
