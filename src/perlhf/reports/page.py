"""One HTML page from run directories: summary, curves, tables, samples, configuration and manifest.

The page asks for nothing outside itself, and its content policy forbids it to. All text of users and models is either
escaped by the template or embedded as JSON that the page's script shows with `textContent`; no other script can run.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from perlhf.reports import figures, findings, samples
from perlhf.reports.figures import Chart
from perlhf.runs.evaluations import Measured, finite, mapping, measured
from perlhf.runs.read import NOT_EVALUATED, RunFiles, Summary, read_runs, summarise
from perlhf.runs.words import count, duration, interval, memory, number, with_interval
from perlhf.system.files import storage_errors, strict_json, write_atomic

TEMPLATES = resources.files("perlhf.reports") / "templates"
_STAGE_TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "policy": "Policy", "unknown": "Run"}
_TABLE_ROWS = 40

_POLICY_ROWS = {
    "gold": "Gold score",
    "score": "Score",
    "kl": "KL to the reference, nats",
    "tokens": "Completion length, tokens",
    "end_rate": "End-token rate",
    "distinct_1": "Distinct words",
    "distinct_2": "Distinct bigrams",
}
_SFT_ROWS = {"loss": "Loss, nats a token", "perplexity": "Perplexity"}
_CHANGE = ["Before", "After", "Change"]


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
    summary: Summary
    facts: list[tuple[str, str]]
    missing: list[str]
    tables: list[Table]
    evaluation_charts: list[Chart]
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
    parts = zip(runs, samples.explorers(runs), strict=True)
    sections = [_section(f"run-{index}", run, lists) for index, (run, lists) in enumerate(parts, start=1)]
    templates = environment()
    templates.filters |= {word.__name__: word for word in (number, interval, duration, memory, count)}
    templates.filters["scale"] = lambda cells: findings.largest(cell for cell in cells if isinstance(cell, Measured))
    templates.tests["measured"] = lambda cell: isinstance(cell, Measured)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return templates.get_template("report.html.j2").render(
        title=title,
        subtitle=_subtitle(runs),
        headline=findings.headline(runs),
        remarks=findings.remarks(runs),
        tiles=findings.tiles(runs),
        sections=sections,
        titles=Counter(section.title for section in sections),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=style(),
        data=_script_json(
            {
                f"{section.id}-{explorer.kind}": {"kind": explorer.kind, "rows": explorer.rows}
                for section in sections
                for explorer in section.explorers
            }
        ),
    )


def environment() -> jinja2.Environment:
    """Templates of this package, which escape all text; an unknown name is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("perlhf.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def style() -> Markup:
    """The style sheet, to stand in a page."""
    return Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))


def _script_json(value: object) -> Markup:
    """JSON that can't end the script element it stands in, nor start another one."""
    text = strict_json(value)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _subtitle(runs: Sequence[RunFiles]) -> list[str]:
    bases = list(dict.fromkeys(str(run.config["base"]) for run in runs if run.config.get("base")))
    versions = [mapping(run.manifest.get("versions")).get("perlhf") for run in runs]
    parts = [f"{len(runs)} run{'s' if len(runs) > 1 else ''}", *(f"base {base}" for base in bases)]
    return parts + [f"perlhf {version}" for version in dict.fromkeys(versions) if version]


def _section(section_id: str, run: RunFiles, explorers: list[samples.Explorer]) -> Section:
    return Section(
        id=section_id,
        title=_STAGE_TITLES[run.stage],
        run=run,
        summary=summarise(run),
        facts=_facts(run),
        missing=_missing(run),
        tables=_tables(run),
        evaluation_charts=figures.of_evaluation(run),
        charts=figures.of_training(run),
        more_charts=figures.of_optimisation(run),
        numbers=_numbers(run),
        explorers=explorers,
        manifest=_flatten(run.manifest),
    )


def _missing(run: RunFiles) -> list[str]:
    evaluated = run.evaluation != NOT_EVALUATED or run.stage not in ("reward", "policy")
    parts = (
        (run.config_text, "No config.yaml: the configuration can't be shown."),
        (run.manifest, "No manifest.json: versions and hardware can't be shown."),
        (run.metrics, "No metrics.jsonl: there are no curves."),
        (run.result, "No result.json: the run is not finished."),
        (evaluated, "No evaluation.json: the run was not evaluated on unseen groups."),
    )
    return [text for there, text in parts if not there]


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    line, config = summarise(run), run.config
    data, adapter = mapping(config.get("data")), mapping(config.get("adapter"))
    shape = f"LoRA, rank {line.rank}, alpha {_plain(adapter.get('alpha'))}, {line.targets}" if line.rank else None
    seconds, peak = line.seconds, line.peak_memory_bytes
    best, updates = finite(run.result.get("best_step")), finite(run.result.get("updates"))
    balance = mapping(run.result.get("class_balance"))
    facts = {
        "Data": ", ".join(str(path) for path in data.get("paths") or []),
        "Tuning": shape or ("all weights" if line.tuning == "full" else line.tuning),
        "Members": (members := finite(run.result.get("members"))) and count(members),
        "Trainable parameters": line.trainable_parameters and count(line.trainable_parameters),
        "Updates": updates and count(updates) + (f" (kept: {count(best)})" if best is not None else ""),
        "Tokens": finite(run.result.get("tokens")) and count(finite(run.result.get("tokens"))),
        "Time": seconds and duration(seconds),
        "Speed": line.tokens_per_second and f"{count(line.tokens_per_second)} tokens/s",
        "Validation": (validated := _validation_seconds(run)) and duration(validated),
        "Peak memory": peak and memory(peak),
        "Class balance": ", ".join(f"{count(n)} {name}" for name, n in balance.items() if n),
        "Seed": _plain(config.get("seed")),
    }
    return [(name, text) for name, text in facts.items() if text]


def _validation_seconds(run: RunFiles) -> float:
    """Of all validations; 0 in runs of earlier versions, which didn't log them."""
    return sum(seconds for _, seconds in run.series("validation_seconds"))


def _tables(run: RunFiles) -> list[Table]:
    if run.stage == "reward":
        table = _reward_table(run)
    elif run.stage == "policy":
        table = _policy_table(run)
    else:
        table = _before_after_table(run, _SFT_ROWS)
    return [] if table is None else [table]


def _before_after_table(run: RunFiles, labels: Mapping[str, str]) -> Table | None:
    """Metrics before and after training, by their labels; None where the run was evaluated by none of them."""
    rows = [_change(label, *pair) for key, label in labels.items() if (pair := run.evaluation.before_after(key))]
    return Table(f"On {findings.size(run)}", _CHANGE, rows) if rows else None


def _change(label: str, before: Measured, after: Measured) -> tuple[str, list[Measured | str]]:
    change = after.value - before.value
    return label, [before, after, ("+" if change > 0 else "") + number(change, findings.largest((before, after)))]


def _reward_table(run: RunFiles) -> Table | None:
    evaluated = run.evaluation.metrics or {}
    shown = evaluated or {key: measured(value) for key, value in mapping(run.result.get("validation")).items()}
    keys = [key for key in findings.METRIC_NAMES if shown.get(key)]
    if not keys:
        return None
    rows = [("Reward model", [shown.get(key) or "–" for key in keys])]
    caption = f"On {findings.size(run)}" if evaluated else "On the validation groups that also chose the checkpoint"
    for name, label in findings.BASELINES.items():
        baseline = (run.evaluation.baselines or {}).get(name, {})
        cells = [baseline.get(key) or "–" for key in keys]
        if evaluated and any(isinstance(cell, Measured) for cell in cells):
            rows.append((f"Baseline: {label}", cells))
    return Table(caption, [findings.METRIC_NAMES[key] for key in keys], rows)


def _policy_table(run: RunFiles) -> Table | None:
    table = _before_after_table(run, _POLICY_ROWS)
    if table is None:
        before, after = (measured(run.result.get(key)) for key in ("score_before", "score_after"))
        if before is None or after is None:
            return None
        caption = "On the validation prompts that also chose the checkpoint"
        table = Table(caption, _CHANGE, [_change("Score", before, after)])
    wins = run.evaluation.win_rate
    if wins is None:
        return table
    by = f", judged by {wins.by}." if wins.by else "."
    return replace(table, note=f"Win rate against the answers before: {with_interval(wins)}{by}")


def _numbers(run: RunFiles) -> Table | None:
    """The curves' values at up to 40 steps, half of them steps with a validation."""
    keys = [key for key in figures.TRAINING_KEYS if run.series(key)]
    by_step: dict[float, dict[str, float]] = {}
    for key in keys:
        for step, value in run.series(key):
            by_step.setdefault(step, {})[key] = value
    if not by_step:
        return None
    validated = [step for step, values in by_step.items() if any(key.startswith("validation_") for key in values)]
    half = _TABLE_ROWS // 2
    steps = sorted({*samples.spread(sorted(by_step), half), *samples.spread(sorted(validated), half)})
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
        return f"{value:.6g}"
    return str(value)
