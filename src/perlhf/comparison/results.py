"""What the finished cells of a comparison show: quality with intervals, memory, speed, curves, and a verdict a side."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perlhf.config.comparison import CompareConfig, Stage
from perlhf.errors import RunError
from perlhf.method import metrics
from perlhf.method.metrics import SeedNoise, Statistic
from perlhf.reports import findings
from perlhf.runs.manifest import first_difference
from perlhf.runs.read import EVALUATION, RunFiles, Summary, finite, mapping, measured, number, read_runs
from perlhf.runs.read import summarise as summary_of
from perlhf.system.files import read_json

CURVES = {
    "AUC": "validation_auc",
    "pairwise accuracy": "validation_pairwise_accuracy",
    "score": "validation_reward",
    "gold score": "validation_reward",
}
"""Metrics, and what metrics.jsonl says of each while a run learns: a policy's scorer isn't asked then."""
WORDS = {
    "equivalent": "{verb} equivalent to {other}",
    "better": "{verb} better than {other}",
    "worse": "{verb} worse than {other}",
    "undecided": "can't be told from {other}",
}


@dataclass(frozen=True)
class Tested:
    """One cell's test records: the group of each, and the metric of any of them."""

    metric: str
    groups: list[str]
    value: Statistic
    start: Statistic | None = None
    """A policy's: the same of its reference's answers."""


@dataclass(frozen=True)
class Compared:
    """What the sides of a comparison have in common."""

    tested: Mapping[str, Sequence[Tested]]
    reference: str
    noise: SeedNoise | None
    config: CompareConfig
    diverged: Mapping[str, int]


def evaluation_of(path: str) -> str:
    """File in a run's directory with what it reached on a set of `also_test`."""
    return f"evaluation-{Path(path).name}.json"


def summarise(
    stage: Stage,
    runs: Mapping[str, Sequence[Path]],
    config: CompareConfig,
    diverged: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The part of compare.json about one stage.

    Args:
        runs: run directories of each side's seeds, evaluated on test groups; the first side is the reference.
        diverged: how many more seeds of a side there would be, had their training not diverged.

    Raises:
        RunError: cells that learned from other data or reward models, or were tested otherwise, than the first.
    """
    files = {side: read_runs(paths) for side, paths in runs.items()}
    tested = {side: [tested_by(run) for run in found] for side, found in files.items()}
    _check_alike(files, tested, config)
    reference = next(iter(files))
    first = tested[reference][0]
    everything = np.arange(len(first.groups))
    noise = metrics.seed_noise([one.value(everything) for one in found] for found in tested.values())
    compared = Compared(tested, reference, noise, config, diverged or {})
    sides = {side: _side(files[side], files[reference], side, compared) | _against(side, compared) for side in files}
    baselines = _baselines(files[reference][0], first.metric)
    said = sentence(first.metric, reference, sides, config.margin, one_seed=noise is None)
    return {
        "stage": stage,
        "metric": first.metric,
        "margin": config.margin,
        "records": len(first.groups),
        "groups": len(set(first.groups)),
        "reference": reference,
        "seed_noise": None if noise is None else asdict(noise),
        "sides": sides,
        "baselines": baselines,
        "verdict": said + _beside_baselines(sides, baselines),
        "start": None if first.start is None else _start(files[reference][0], first, config),
        "scorers": list(config.scorers) if stage == "policy" else [],
        "elsewhere": {
            Path(path).name: _elsewhere(files, path, compared)
            for path in (config.also_test if stage == "reward" else ())
        },
        "jobs": config.jobs,
        "unlike": _unlike(files),
        **_made_with(files[reference][0]),
    }


def _elsewhere(files: Mapping[str, Sequence[RunFiles]], path: str, compared: Compared) -> dict[str, Any]:
    """What the sides reach on another set than their own test groups."""
    name, evaluated, tested, seen = evaluation_of(path), {}, {}, 0
    for side, found in files.items():
        evaluated[side] = [replace(run, evaluation=read_json(run.path / name)) for run in found]
        tested[side] = [tested_by(run) for run in evaluated[side]]
        if any(one.groups != tested[compared.reference][0].groups for one in tested[side]):
            raise RunError(f"{name} is of other records than the first cell's", where=str(found[0].path))
        for run in evaluated[side]:
            if (split := run.evaluation.get("split")) != "all":
                raise RunError(f"evaluated with split {split!r}", where=str(run.path / name), allowed="all")
            seen = max(seen, run.evaluation.get("groups_seen_in_training") or 0)
    first = tested[compared.reference][0]
    everything = np.arange(len(first.groups))
    noise = metrics.seed_noise([one.value(everything) for one in found] for found in tested.values())
    there = replace(compared, tested=tested, noise=noise)
    return {
        "metric": first.metric,
        "records": len(first.groups),
        "groups": len(set(first.groups)),
        "groups_seen_in_training": seen,
        "seed_noise": None if noise is None else asdict(noise),
        "sides": {side: {"quality": _quality(side, there), **_against(side, there)} for side in files},
        "baselines": _baselines(evaluated[compared.reference][0], first.metric),
    }


def _check_alike(
    files: Mapping[str, Sequence[RunFiles]], tested: Mapping[str, Sequence[Tested]], config: CompareConfig
) -> None:
    """Raises RunError for a cell that learned from other data or was tested otherwise than the first one."""
    cells = [(run, one) for side, found in files.items() for run, one in zip(found, tested[side], strict=True)]
    first, one_first = cells[0]
    rewards = () if config.policy is None else config.policy.reward
    asked = {"split": "test", "adapter": None, "temperature": 1.0, "reward": list(config.scorers or rewards)}
    for run, one in cells:
        if one.groups != one_first.groups or one.metric != one_first.metric:
            raise RunError("tested on other records than the first cell", where=str(run.path))
        facts, first_facts = (mapping(each.manifest.get("facts")) for each in (run, first))
        if difference := first_difference(dict(first_facts), dict(facts)):
            key, then, now = difference
            hint = "delete the cells of one of the two, and run the same command again"
            raise RunError(f"{key} is {now!r}, but {then!r} in {first.path.name}", where=str(run.path), hint=hint)
        for key, wanted in asked.items():
            if key in run.evaluation and run.evaluation[key] != wanted:
                found, where = run.evaluation[key], str(run.path / EVALUATION)
                hint = "delete it, and run the same command again"
                raise RunError(f"evaluated with {key} {found!r}", where=where, allowed=str(wanted), hint=hint)


def _unlike(files: Mapping[str, Sequence[RunFiles]]) -> list[str]:
    """Machines of the cells, in words, where they differ: then memory and speed are those of unlike cells."""
    found: dict[str, None] = {}
    for run in (run for side in files.values() for run in side):
        hardware, torch = mapping(run.manifest.get("hardware")), mapping(run.manifest.get("versions")).get("torch")
        machine = hardware.get("gpu") or f"{hardware.get('cpu')}, {run.manifest.get('threads')} threads"
        size = run.config.get("tokens_per_microbatch")
        found.setdefault(f"{machine}, torch {torch}, tokens_per_microbatch {size or 'by default'}")
    return list(found) if len(found) > 1 else []


def sentence(
    metric: str, reference: str, sides: Mapping[str, Mapping[str, Any]], margin: float, one_seed: bool = False
) -> str:
    """The verdicts in words, those that agree together; `one_seed`: how far seeds differ is in none of them."""
    said: dict[str, list[str]] = {}
    for side, found in sides.items():
        if side != reference:
            said.setdefault(found["verdict"], []).append(side)
    if not said:
        return f"Only {reference} has finished: nothing to compare it with yet."
    parts = [
        f"{', '.join(names)} {WORDS[what].format(other=reference, verb='is' if len(names) == 1 else 'are')}"
        + (f" (within {number(margin)})" if what == "equivalent" else "")
        for what, names in said.items()
    ]
    seeds = " with one seed a side (others may turn it round)" if one_seed else ""
    return f"By {metric} on test groups{seeds}, {'; '.join(parts)}."


def _baselines(run: RunFiles, metric: str) -> dict[str, dict[str, float | None]]:
    """What needs no network and reaches on the same records, by its name in evaluation.json; nothing of a policy."""
    key = metric.lower().replace(" ", "_")
    found = {name: measured(mapping(one).get(key)) for name, one in mapping(run.evaluation.get("baselines")).items()}
    return {name: asdict(one) for name, one in found.items() if one is not None and name != "majority"}


def _beside_baselines(sides: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, object]) -> str:
    """A sentence about who is above the strongest baseline, if there is any."""
    best = findings.strongest(baselines)
    if best is None:
        return ""
    name, value = best
    above = [side for side, found in sides.items() if found["quality"]["value"] > value]
    some = f"Only {', '.join(above)} {'is' if len(above) == 1 else 'are'}" if above else "No side is"
    who = "Every side is" if len(above) == len(sides) else some
    return f" {who} above the value of the strongest baseline ({name}, {number(value)})."


def tested_by(run: RunFiles) -> Tested:
    """What an evaluated run was tested on, and how well it did on any part of that."""
    records = mapping(run.evaluation.get("records"))
    rated, compared = mapping(records.get("ratings")), mapping(records.get("comparisons"))
    if rated.get("group"):
        scores, labels = np.array(rated["score"]), np.array(rated["label"], dtype=bool)
        return Tested("AUC", rated["group"], lambda i: metrics.auc(scores[i], labels[i]))
    if compared.get("group"):
        pairs = np.array(compared["scores"])
        return Tested(
            "pairwise accuracy", compared["group"], lambda i: metrics.pairwise_accuracy(pairs[i, 0], pairs[i, 1])
        )
    rows = run.evaluation.get("samples") or []
    key, metric = (
        ("gold_after", "gold score") if rows and rows[0].get("gold_after") is not None else ("score_after", "score")
    )
    after, before = (
        np.array([row[key.replace("after", when)] for row in rows], dtype=float) for when in ("after", "before")
    )
    groups = [row["group"] for row in rows]
    return Tested(metric, groups, lambda i: float(after[i].mean()), lambda i: float(before[i].mean()))


def _side(runs: Sequence[RunFiles], reference: Sequence[RunFiles], side: str, compared: Compared) -> dict[str, Any]:
    """Quality and costs of one side; costs also as a share or factor of the reference's."""
    tested = compared.tested[side]
    everything = np.arange(len(tested[0].groups))
    values = [one.value(everything) for one in tested]
    lines = [summary_of(run) for run in runs]
    others = [summary_of(run) for run in reference]
    memory, speed = _mean(lines, "peak_memory_bytes"), _mean(lines, "tokens_per_second")
    return {
        "quality": _quality(side, compared),
        "seeds": [{"seed": run.config.get("seed"), "value": value} for run, value in zip(runs, values, strict=True)],
        "diverged": compared.diverged.get(side, 0),
        "kept_start": sum(run.result.get("best_step") == 0 for run in runs),
        "learning_rate": mapping(runs[0].config.get("optim")).get("learning_rate"),
        "trainable_parameters": lines[0].trainable_parameters,
        "seconds": _mean(lines, "seconds"),
        "tokens_per_second": speed,
        "peak_memory_bytes": memory,
        "memory_share": _ratio(memory, _mean(others, "peak_memory_bytes")),
        "speed_factor": _ratio(speed, _mean(others, "tokens_per_second")),
        "trainable_share": _ratio(lines[0].trainable_parameters, others[0].trainable_parameters),
        "curves": [_curve(run, tested[0].metric) for run in runs],
        **({} if tested[0].start is None else _answers(runs, tested, compared)),
    }


def _quality(side: str, compared: Compared) -> dict[str, float]:
    tested, config = compared.tested[side], compared.config
    values = [one.value for one in tested]
    low, high = metrics.seeds_interval(values, [], tested[0].groups, compared.noise, config.bootstrap, config.seeds[0])
    return {"value": _average(values, np.arange(len(tested[0].groups))), "low": low, "high": high}


def _start(run: RunFiles, tested: Tested, config: CompareConfig) -> dict[str, Any]:
    """What every policy starts from and is held against: its name, and how good its answers are."""
    assert tested.start is not None
    low, high = metrics.seeds_interval([tested.start], [], tested.groups, None, config.bootstrap, config.seeds[0])
    return {
        "name": "base" if config.policy is None or config.policy.sft is None else "SFT",
        "quality": {"value": tested.start(np.arange(len(tested.groups))), "low": low, "high": high},
        "score": mapping(run.evaluation.get("before")).get("score"),
    }


def _answers(runs: Sequence[RunFiles], tested: Sequence[Tested], compared: Compared) -> dict[str, Any]:
    """What is said of a side's policies beyond their quality, each against the start's answers to the same prompts."""
    starts = [one.start for one in tested if one.start is not None]
    # The start has no seed: what other seeds would change is that of one side, and so `starts` isn't passed as a side.
    gains: list[Statistic] = [
        lambda i, after=one.value, before=before: after(i) - before(i)
        for one, before in zip(tested, starts, strict=True)
    ]
    everything, config = np.arange(len(tested[0].groups)), compared.config
    low, high = metrics.seeds_interval(gains, [], tested[0].groups, compared.noise, config.bootstrap, config.seeds[0])
    after = [mapping(run.evaluation.get("after")) for run in runs]
    many = compared.noise is not None
    return {
        "change": {"value": _average(gains, everything), "low": low, "high": high},
        "score": _over_seeds([one.get("score") for one in after], many),
        "win_rate": _over_seeds([run.evaluation.get("win_rate") for run in runs], many),
        "kl": _over_seeds([one.get("kl_temperature_1") for one in after], many),
    }


def _over_seeds(found: Sequence[object], many: bool) -> dict[str, float | None] | None:
    """The mean of the seeds; with its interval over groups only where no side has several seeds (`many`)."""
    known = [one for raw in found if (one := measured(raw)) is not None]
    if len(known) < len(found):
        return None
    if len(known) == 1 and not many:
        return asdict(known[0])
    return {"value": statistics.fmean(one.value for one in known), "low": None, "high": None}


def difference(
    first: Sequence[Tested], second: Sequence[Tested], noise: SeedNoise | None, resamples: int, seed: int
) -> dict[str, float]:
    """Mean metric of the runs of `first` minus that of `second`, tested on the same records: `value`, `low`, `high`."""
    groups, everything = first[0].groups, np.arange(len(first[0].groups))
    one, other = ([run.value for run in side] for side in (first, second))
    low, high = metrics.seeds_interval(one, other, groups, noise, resamples, seed)
    return {"value": _average(one, everything) - _average(other, everything), "low": low, "high": high}


def _against(side: str, compared: Compared) -> dict[str, Any]:
    """The difference in quality from the reference, and what it says: nothing where seeds of either diverged."""
    config, reference = compared.config, compared.reference
    if side == reference:
        return {"difference": None, "verdict": "reference"}
    tested = compared.tested
    found = difference(tested[side], tested[reference], compared.noise, config.bootstrap, config.seeds[0])
    lost = compared.diverged.get(side, 0) + compared.diverged.get(reference, 0)
    said = "undecided" if lost else metrics.verdict(found["low"], found["high"], config.margin)
    return {"difference": found, "verdict": said}


def _average(side: Sequence[Statistic], indices: NDArray[np.intp]) -> float:
    return statistics.fmean(value(indices) for value in side)


def _curve(run: RunFiles, metric: str) -> list[tuple[float, float]]:
    """(seconds, what is validated) while the run learned."""
    key = CURVES[metric]
    pairs = ((finite(row.get("time_seconds")), finite(row.get(key))) for row in run.metrics)
    return [(time, value) for time, value in pairs if time is not None and value is not None]


def _mean(lines: Sequence[Summary], name: str) -> float | None:
    values = [value for line in lines if (value := getattr(line, name)) is not None]
    return statistics.fmean(values) if values else None


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _made_with(run: RunFiles) -> dict[str, Any]:
    return {
        name: run.manifest.get(name) for name in ("versions", "hardware", "commit", "threads", "allocator", "kernels")
    }
