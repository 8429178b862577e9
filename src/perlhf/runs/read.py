"""Reads finished or half-finished run directories; imports no torch.

`report` and `compare` see runs only through this module. Every file but one may be missing: a run that was stopped has
no result.json, one that was never evaluated no evaluation.json.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlhf.errors import ConfigError, RunError, nearest
from perlhf.runs.evaluations import EVALUATION, Evaluation, Measured, finite, mapping, measured, read_evaluation
from perlhf.runs.manifest import CONFIG, MANIFEST, RESULT
from perlhf.system.files import from_json, from_yaml, read_json

STAGES = ("sft", "reward", "policy")
METRICS = "metrics.jsonl"
_KEY_OF_STAGE = {"kl_coef": "policy", "class_weight": "reward", "epochs": "sft"}  # in this order: reward has epochs too
NOT_EVALUATED = Evaluation()


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; a missing file is an empty value."""

    path: Path
    name: str
    """Directory name, with its parent's where two runs share one."""
    stage: str
    """`sft`, `reward`, `policy` or `unknown`."""
    config_text: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    rollouts: list[Path]
    """Files rollouts/STEP.jsonl by step."""
    result: dict[str, Any]
    evaluation: Evaluation
    """`NOT_EVALUATED` where there is no evaluation.json."""

    def fact(self, name: str) -> Any:
        """`name` from result.json, else from manifest.json or its `facts`, else None."""
        for source in (self.result, self.manifest, mapping(self.manifest.get("facts"))):
            if source.get(name) is not None:
                return source[name]
        return None

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of each line of metrics.jsonl that has a finite `key`."""
        pairs = ((finite(row.get("step")), finite(row.get(key))) for row in self.metrics)
        return [(step, value) for step, value in pairs if step is not None and value is not None]


@dataclass(frozen=True)
class Summary:
    """One run in one line: what it is, how good, what it cost."""

    name: str
    stage: str
    tuning: str | None
    rank: int | None
    targets: str | None
    quality_name: str | None
    """Metric and split, such as `AUC, test`."""
    quality: Measured | None
    seconds: float | None
    tokens_per_second: float | None
    peak_memory_bytes: float | None
    """Of the GPU where one was used, else resident memory."""
    trainable_parameters: int | None


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Reads run directories in the given order.

    Raises:
        ConfigError: no path given, one given twice, or one that is no run directory.
        RunError: a file in one of them can't be read.
    """
    if not paths:
        raise ConfigError("no run directory given", where="runs", allowed="one or more run directories")
    resolved = [path.resolve() for path in paths]
    times = Counter(resolved)
    for path, full in zip(paths, resolved, strict=True):
        if times[full] > 1:
            raise ConfigError(f"run directory {path} is given twice", where="runs", allowed="each run once")
        _check_is_run(path)
    names = Counter(path.name for path in resolved)
    return [
        _read_run(path, full.name if names[full.name] == 1 else f"{full.parent.name}/{full.name}")
        for path, full in zip(paths, resolved, strict=True)
    ]


def summarise(run: RunFiles) -> Summary:
    """The line of a run in a table of runs."""
    adapter = mapping(run.config.get("adapter"))
    tuning = run.config.get("tuning")
    targets = adapter.get("targets")
    name, quality = _quality(run)
    parameters = finite(run.fact("trainable_parameters"))
    return Summary(
        name=run.name,
        stage=run.stage,
        tuning=tuning,
        rank=adapter.get("rank") if tuning == "lora" else None,
        targets=None if tuning != "lora" else ", ".join(targets) if isinstance(targets, list) else targets,
        quality_name=name,
        quality=quality,
        seconds=_seconds(run),
        tokens_per_second=_tokens_per_second(run),
        peak_memory_bytes=finite(run.fact("cuda_peak_memory_bytes")) or finite(run.fact("peak_memory_bytes")) or None,
        trainable_parameters=None if parameters is None else int(parameters),
    )


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file. A last line without its newline is a write that was cut off, and is dropped."""
    rows = []
    lines = _text(path).split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        if line.strip():
            rows.append(_object(line, f"{path}:{number}"))
    return rows


def _check_is_run(path: Path) -> None:
    if any((path / name).is_file() for name in (CONFIG, MANIFEST, METRICS, RESULT, EVALUATION)):
        return
    siblings = [child.name for child in path.parent.iterdir() if child.is_dir()] if path.parent.is_dir() else []
    close = nearest(path.name, [name for name in siblings if name != path.name])
    raise ConfigError(
        f"{path} is no run directory" if path.exists() else f"{path} does not exist",
        where="runs",
        allowed="a directory that perlhf sft, reward or policy wrote (with config.yaml and manifest.json)",
        hint=f"{path.parent / close}" if close else None,
    )


def _read_run(path: Path, name: str) -> RunFiles:
    config_text = _text(path / CONFIG) if (path / CONFIG).is_file() else ""
    try:
        config = mapping(from_yaml(config_text))
    except ValueError as error:
        raise RunError(str(error), where=str(path / CONFIG)) from error
    manifest, result = (read_json(path / file) if (path / file).is_file() else {} for file in (MANIFEST, RESULT))
    evaluation = read_evaluation(path / EVALUATION) if (path / EVALUATION).is_file() else NOT_EVALUATED
    return RunFiles(
        path=path,
        name=name,
        stage=_stage(config, manifest, result, evaluation),
        config_text=config_text,
        config=config,
        manifest=manifest,
        metrics=read_json_lines(path / METRICS) if (path / METRICS).is_file() else [],
        rollouts=sorted((path / "rollouts").glob("[0-9]*.jsonl"), key=lambda file: (len(file.name), file.name)),
        result=result,
        evaluation=evaluation,
    )


def _stage(config: dict[str, Any], manifest: dict[str, Any], result: dict[str, Any], evaluation: Evaluation) -> str:
    for named in (manifest.get("stage"), result.get("stage"), evaluation.kind):
        if named in STAGES:
            return named
    return next((stage for key, stage in _KEY_OF_STAGE.items() if key in config), "unknown")


def _quality(run: RunFiles) -> tuple[str | None, Measured | None]:
    """The number that a run is judged by: on unseen groups if it was evaluated, else as training left it."""
    split, evaluated, after = run.evaluation.split, run.evaluation.metrics or {}, run.evaluation.after or {}
    on_validation = mapping(run.result.get("validation"))
    choices = {
        "sft": [("loss", split, evaluated.get("loss")), ("loss", "validation", run.result.get("validation_loss"))],
        "reward": [
            ("AUC", split, evaluated.get("auc")),
            ("pairwise accuracy", split, evaluated.get("pairwise_accuracy")),
            ("AUC", "validation", on_validation.get("auc")),
            ("pairwise accuracy", "validation", on_validation.get("pairwise_accuracy")),
        ],
        "policy": [
            ("gold score", split, after.get("gold")),
            ("score", split, after.get("score")),
            ("score", "validation", run.result.get("score_after")),
        ],
    }
    for metric, where, raw in choices.get(run.stage, []):
        value = raw if isinstance(raw, Measured) else measured(raw)
        if value is not None:
            return f"{metric}, {where}", value
    return None, None


def _seconds(run: RunFiles) -> float | None:
    for name in ("seconds", "wall_seconds"):
        seconds = finite(run.fact(name))
        if seconds:  # 0 of an averaged run, which was never trained
            return seconds
    return None


def _tokens_per_second(run: RunFiles) -> float | None:
    """The median over updates: unlike tokens over wall time it leaves out loading and validation."""
    logged = run.series("tokens_per_second")
    if logged:
        return statistics.median(value for _, value in logged)
    tokens, seconds = finite(run.result.get("tokens")), finite(run.result.get("seconds"))
    return tokens / seconds if tokens and seconds else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"invalid UTF-8 at byte {error.start}", where=str(path)) from error
    except OSError as error:
        raise RunError(f"can't read: {error.strerror or error}", where=str(path)) from error


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = from_json(text)
    except ValueError as error:
        raise RunError(
            f"not valid JSON: {error}", where=where, hint="restore the file or run the stage again"
        ) from error
    if not isinstance(value, dict):
        raise RunError(f"holds {type(value).__name__}", where=where, allowed="a JSON object")
    return value
