"""One HTML page from run directories: summary, curves, tables, samples, configuration and manifest.

The page asks for nothing outside itself, and its content policy forbids it to. All text of users and models is either
escaped by the template or embedded as JSON that the page's script shows with `textContent`; no other script can run.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from perlhf.reports import charts, findings, samples, templating
from perlhf.reports.charts import Chart
from perlhf.runs.read import (
    Measured,
    RunFiles,
    Summary,
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
from perlhf.system.files import storage_errors, strict_json, write_atomic

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
    environment = templating.environment()
    environment.filters |= {
        "number": number,
        "interval": interval,
        "duration": duration,
        "memory": memory,
        "count": count,
    }
    environment.filters["scale"] = lambda cells: findings.largest(cell for cell in cells if isinstance(cell, Measured))
    environment.tests["measured"] = lambda cell: isinstance(cell, Measured)
    script = (templating.TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        title=title,
        subtitle=_subtitle(runs),
        headline=findings.headline(runs),
        remarks=findings.remarks(runs),
        tiles=findings.tiles(runs),
        sections=sections,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=templating.style(),
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
        evaluation_charts=charts.of_evaluation(section_id, run),
        charts=charts.of_training(section_id, run),
        more_charts=charts.of_optimisation(section_id, run),
        numbers=_numbers(run),
        explorers=explorers,
        manifest=_flatten(run.manifest),
    )


def _missing(run: RunFiles) -> list[str]:
    evaluated = run.evaluation or run.stage not in ("reward", "policy")
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
        "Trainable parameters": line.trainable_parameters and count(line.trainable_parameters),
        "Updates": updates and count(updates) + (f" (kept: {count(best)})" if best is not None else ""),
        "Tokens": finite(run.result.get("tokens")) and count(finite(run.result.get("tokens"))),
        "Time": seconds and duration(seconds),
        "Speed": line.tokens_per_second and f"{count(line.tokens_per_second)} tokens/s",
        "Peak memory": peak and memory(peak),
        "Class balance": ", ".join(f"{count(n)} {name}" for name, n in balance.items() if n),
        "Seed": _plain(config.get("seed")),
    }
    return [(name, text) for name, text in facts.items() if text]


def _tables(run: RunFiles) -> list[Table]:
    if run.stage == "reward":
        table = _reward_table(run)
    elif run.stage == "policy":
        table = _policy_table(run)
    else:
        table = _sft_table(run)
    return [] if table is None else [table]


def _sft_table(run: RunFiles) -> Table | None:
    rows: list[tuple[str, list[Measured | str]]] = []
    for key, label in _SFT_ROWS.items():
        pair = findings.before_after(run, key)
        if pair is not None:
            rows.append((label, [*pair, number(pair[1].value - pair[0].value, findings.largest(pair))]))
    return Table(f"On {findings.size(run)}", ["Before", "After", "Change"], rows) if rows else None


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
        caption = f"On {findings.size(run)}"
    else:
        caption = "On the validation groups that also chose the checkpoint"
    return Table(caption, [findings.METRICS[key] for key in keys], rows)


def _policy_table(run: RunFiles) -> Table | None:
    rows: list[tuple[str, list[Measured | str]]] = []
    for key, label in _POLICY_ROWS.items():
        pair = findings.before_after(run, key)
        if pair is not None:
            change = pair[1].value - pair[0].value
            rows.append((label, [*pair, ("+" if change > 0 else "") + number(change, findings.largest(pair))]))
    caption = f"On {findings.size(run)}"
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


def _numbers(run: RunFiles) -> Table | None:
    """The curves' values at up to 40 steps, half of them steps with a validation."""
    keys = [key for key in charts.TRAINING_KEYS if run.series(key)]
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
