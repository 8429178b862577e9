"""One HTML page from run directories: summary, curves, tables, samples, configuration and manifest.

The page asks for nothing outside itself, and its content policy forbids it to. All text of users and models is either
escaped by the template or embedded as JSON that the page's script shows with `textContent`; no other script can run.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from perlhf.report import figures, findings, samples
from perlhf.run_files import (
    Measured,
    RunFiles,
    count,
    duration,
    finite,
    interval,
    mapping,
    measured,
    memory,
    number,
    read_runs,
    summarise,
)
from perlhf.storage import storage_errors, write_atomic

_STAGE_TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "policy": "Policy", "unknown": "Run"}
_TABLE_ROWS = 40

# (title, unit, ((key of metrics.jsonl, what the line is), ...)); a chart appears where a key was logged.
_CURVES = (
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
    ("KL to the reference", "nats", (("kl", "rollouts"), ("validation_kl", "validation"))),
    ("Entropy", "nats", (("entropy", "rollouts"),)),
    (
        "Completion length",
        "tokens",
        (("completion_tokens", "rollouts"), ("validation_completion_tokens", "validation")),
    ),
    ("End-token rate", "", (("end_rate", "rollouts"), ("validation_end_rate", "validation"))),
)
_MORE_CURVES = (
    ("Sampler gap", "nats", (("sampler_gap_mean", "mean"), ("sampler_gap_max", "largest"))),
    ("Policy loss", "", (("policy_loss", "policy"),)),
    ("Value loss", "", (("value_loss", "value"),)),
    ("Gradient norm", "", (("grad_norm", "adapter"), ("value_grad_norm", "value adapter"))),
    ("Learning rate", "", (("learning_rate", "adapter"), ("value_learning_rate", "value adapter"))),
    ("Speed", "tokens/s", (("tokens_per_second", "all"),)),
    ("Time of an update", "s", (("seconds_sample", "sample"), ("seconds_score", "score"), ("seconds_learn", "learn"))),
)
_POLICY_ROWS = {
    "gold": "Gold score",
    "score": "Score",
    "kl": "KL to the reference, nats",
    "tokens": "Completion length, tokens",
    "end_rate": "End-token rate",
    "distinct_1": "Distinct words",
    "distinct_2": "Distinct bigrams",
}


@dataclass(frozen=True)
class Chart:
    """A figure with its words: `text` says in a sentence what the picture shows."""

    title: str
    svg: Markup
    legend: list[str]
    text: str
    last: str = ""


@dataclass(frozen=True)
class Table:
    """Cells are `Measured` or text."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[Measured | str]]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Everything the page shows of one run."""

    id: str
    title: str
    run: RunFiles
    facts: list[tuple[str, str]]
    missing: list[str]
    tables: list[Table]
    charts: list[Chart]
    more_charts: list[Chart]
    numbers: Table | None
    explorers: list[samples.Explorer]
    manifest: list[tuple[str, str]]


def write(runs: Sequence[Path], output: Path, title: str) -> Path:
    """Writes the page about `runs`, given in the order of the pipeline, and returns its path.

    Raises:
        ConfigError: a path that is no run directory.
        RunError: a file of a run can't be read.
        StorageError: the page can't be written.
    """
    page = render(read_runs(runs), title)
    with storage_errors(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, page.encode(errors="replace"))  # a model's text may hold half a surrogate pair
    return output


def render(runs: Sequence[RunFiles], title: str) -> str:
    """The page as text; equal run files give an equal page."""
    lists = sum(samples.number_of_explorers(run) for run in runs)
    limit = samples.LIMIT // max(lists, 1)
    sections = [_section(f"run-{index}", run, limit) for index, run in enumerate(runs, start=1)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("perlhf.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "interval": interval,
        "duration": duration,
        "memory": memory,
        "count": count,
    }
    environment.tests["measured"] = lambda cell: isinstance(cell, Measured)
    templates = resources.files("perlhf.report") / "templates"
    script = (templates / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        title=title,
        subtitle=_subtitle(runs),
        headline=findings.headline(runs),
        remarks=findings.remarks(runs),
        tiles=findings.tiles(runs),
        summaries=[(summarise(section.run), section) for section in sections],
        sections=sections,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((templates / "report.css").read_text(encoding="utf-8")),
        data=_script_json(
            {
                f"{section.id}-{one.kind}": {"kind": one.kind, "rows": one.rows}
                for section in sections
                for one in section.explorers
            }
        ),
    )


def _script_json(value: object) -> Markup:
    """JSON that can't end the script element it stands in, nor start another one."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _subtitle(runs: Sequence[RunFiles]) -> list[str]:
    bases = list(dict.fromkeys(str(run.config["base"]) for run in runs if run.config.get("base")))
    versions = [mapping(run.manifest.get("versions")).get("perlhf") for run in runs]
    parts = [f"{len(runs)} run{'s' if len(runs) > 1 else ''}", *(f"base {base}" for base in bases)]
    return parts + [f"perlhf {version}" for version in dict.fromkeys(versions) if version]


def _section(section_id: str, run: RunFiles, limit: int) -> Section:
    title = _STAGE_TITLES[run.stage]
    missing = [
        f"No {name}: {what}"
        for name, there, what in (
            ("config.yaml", run.config_text, "the configuration can't be shown."),
            ("manifest.json", run.manifest, "versions and hardware can't be shown."),
            ("metrics.jsonl", run.metrics, "there are no curves."),
            ("result.json", run.result, "the run is not finished."),
            (
                "evaluation.json",
                run.evaluation or run.stage not in ("reward", "policy"),
                "not evaluated on unseen groups.",
            ),
        )
        if not there
    ]
    kept = finite(run.result.get("best_step"))
    charts = [
        chart
        for index, (name, unit, keys) in enumerate(_CURVES)
        if (chart := _curve(f"{section_id}-a{index}", run, name, unit, keys, kept))
    ]
    more = [
        chart
        for index, (name, unit, keys) in enumerate(_MORE_CURVES)
        if (chart := _curve(f"{section_id}-b{index}", run, name, unit, keys, None))
    ]
    return Section(
        id=section_id,
        title=title,
        run=run,
        facts=_facts(run),
        missing=missing,
        tables=_tables(run),
        charts=[*charts, *_evaluation_charts(section_id, run)],
        more_charts=more,
        numbers=_numbers(run),
        explorers=samples.explorers(run, limit),
        manifest=_flatten(run.manifest),
    )


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    line, config = summarise(run), run.config
    data, adapter = mapping(config.get("data")), mapping(config.get("adapter"))
    shape = f"LoRA, rank {adapter.get('rank')}, alpha {adapter.get('alpha')}, {line.targets}" if line.rank else None
    seconds, peak = line.seconds, line.peak_memory_bytes
    best, updates = finite(run.result.get("best_step")), finite(run.result.get("updates"))
    facts = {
        "Data": ", ".join(str(path) for path in data.get("paths") or []),
        "Tuning": shape or ("all weights" if line.tuning == "full" else line.tuning),
        "Trainable parameters": line.trainable_parameters and count(line.trainable_parameters),
        "Updates": updates and count(updates) + (f", kept {count(best)}" if best is not None else ""),
        "Tokens": finite(run.result.get("tokens")) and count(finite(run.result.get("tokens"))),
        "Time": seconds and duration(seconds),
        "Speed": line.tokens_per_second and f"{count(line.tokens_per_second)} tokens/s",
        "Peak memory": peak and memory(peak),
        "Class balance": _plain(run.result.get("class_balance")),
        "Seed": _plain(config.get("seed")),
    }
    return [(name, text) for name, text in facts.items() if text]


def _tables(run: RunFiles) -> list[Table]:
    if run.stage == "reward":
        table = _reward_table(run)
    elif run.stage == "policy":
        table = _policy_table(run)
    else:
        table = None
    return [] if table is None else [table]


def _reward_table(run: RunFiles) -> Table | None:
    evaluated = mapping(run.evaluation.get("metrics"))
    shown = evaluated or mapping(run.result.get("validation"))
    keys = [key for key in findings.METRICS if measured(shown.get(key))]
    if not keys:
        return None
    rows = [("Reward model", [measured(shown.get(key)) or "–" for key in keys])]
    if evaluated:
        for name, label in findings.BASELINES.items():
            baseline = mapping(mapping(run.evaluation.get("baselines")).get(name))
            cells = [measured(baseline.get(key)) or "–" for key in keys]
            if any(isinstance(cell, Measured) for cell in cells):
                rows.append((f"Baseline: {label}", cells))
        caption = f"On unseen groups: {findings.size(run)}"
    else:
        caption = "On the validation groups that also chose the checkpoint"
    return Table(caption, [findings.METRICS[key] for key in keys], rows)


def _policy_table(run: RunFiles) -> Table | None:
    rows: list[tuple[str, list[Measured | str]]] = []
    for key, label in _POLICY_ROWS.items():
        pair = findings.before_after(run, key)
        if pair is not None:
            change = pair[1].value - pair[0].value
            sign = "+" if change > 0 else ""
            rows.append((label, [pair[0], pair[1], sign + number(change, pair[1].value)]))
    caption = f"On unseen prompts: {findings.size(run)}"
    if not rows:
        before, after = (measured(run.result.get(key)) for key in ("score_before", "score_after"))
        if before is None or after is None:
            return None
        rows = [("Score", [before, after, number(after.value - before.value)])]
        caption = "On the validation prompts that also chose the checkpoint"
    wins = measured(run.evaluation.get("win_rate"))
    note = ""
    if wins is not None:
        by = _plain(mapping(run.evaluation["win_rate"]).get("by"))
        spread = f" ({interval(wins)})" if interval(wins) else ""
        note = f"Win rate against the answers before: {number(wins.value)}{spread}" + (
            f", judged by {by}." if by else "."
        )
    return Table(caption, ["Before", "After", "Change"], rows, note)


def _curve(
    name: str, run: RunFiles, title: str, unit: str, keys: Sequence[tuple[str, str]], kept: float | None
) -> Chart | None:
    lines = [figures.Series(label, points) for key, label in keys if (points := run.series(key))]
    if not lines:
        return None
    unit = f" {unit}" if unit else ""
    parts = [
        f"{one.label} from {number(one.points[0][1])} at step {count(one.points[0][0])}"
        f" to {number(one.points[-1][1])}{unit} at step {count(one.points[-1][0])}"
        for one in lines
    ]
    last = number(lines[-1].points[-1][1]) + unit
    legend = [one.label for one in lines] if len(lines) > 1 else []
    return Chart(title, Markup(figures.curves(name, lines, kept)), legend, f"{title}: {'; '.join(parts)}.", last)


def _evaluation_charts(section_id: str, run: RunFiles) -> list[Chart]:
    charts = []
    bins = [
        (predicted, observed, int(n))
        for row in run.evaluation.get("calibration") or []
        if isinstance(row, dict)
        and (predicted := finite(row.get("mean_predicted"))) is not None
        and (observed := finite(row.get("observed"))) is not None
        and (n := finite(row.get("n")))
    ]
    if bins:
        svg = Markup(figures.calibration(f"{section_id}-calibration", bins))
        words = "; ".join(f"predicted {number(x)}, observed {number(y)}, {count(n)} ratings" for x, y, n in bins)
        charts.append(Chart("Calibration", svg, [], f"Calibration on unseen groups: {words}."))
    clouds = [figures.Series(side, points) for side in ("before", "after") if (points := _score_and_gold(run, side))]
    if len(clouds) == 2:
        svg = Markup(figures.cloud(f"{section_id}-gold", clouds, "score", "gold score"))
        words = f"{len(clouds[1].points)} completions each; rings are means"
        charts.append(
            Chart("Score against gold score", svg, ["before", "after"], f"Score against gold score, {words}.")
        )
    return charts


def _score_and_gold(run: RunFiles, side: str) -> list[figures.Point]:
    points = []
    for row in run.evaluation.get("samples") or []:
        if isinstance(row, dict):
            score, gold = finite(row.get(f"score_{side}")), finite(row.get(f"gold_{side}"))
            if score is not None and gold is not None:
                points.append((score, gold))
    return points


def _numbers(run: RunFiles) -> Table | None:
    """The curves' values at up to 40 steps."""
    keys = [key for _, _, keys in _CURVES for key, _ in keys if run.series(key)]
    by_step: dict[float, dict[str, float]] = {}
    for key in keys:
        for step, value in run.series(key):
            by_step.setdefault(step, {})[key] = value
    if not by_step:
        return None
    steps = samples.spread(sorted(by_step), _TABLE_ROWS)
    rows: list[tuple[str, list[Measured | str]]] = [
        (count(step), [number(by_step[step].get(key)) for key in keys]) for step in steps
    ]
    caption = f"{len(steps)} of {len(by_step)} logged steps"
    return Table(caption, [key.replace("_", " ") for key in keys], rows)


def _flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            rows += _flatten(item, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _plain(item) or "–"))
    return rows


def _plain(value: Any) -> str | None:
    """A JSON value as a reader would write it; None for None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) or "–" for item in value)
    if isinstance(value, float):
        return number(value)
    return str(value)
