"""What the finished cells of a comparison show: quality with intervals, memory, speed, curves, and a verdict a side."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from perlhf.config.comparison import CompareConfig, StageName
from perlhf.errors import RunError
from perlhf.method import metrics
from perlhf.method.metrics import Floats, SeedNoise, Statistic
from perlhf.reports import findings
from perlhf.runs.evaluations import EVALUATION, Measured, finite, mapping, read_evaluation
from perlhf.runs.manifest import first_difference
from perlhf.runs.read import RunFiles, Summary, read_runs, summarise
from perlhf.runs.words import number

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
    "undecided: one seed": "can't be told from {other} with one seed a side",
}


@dataclass(frozen=True)
class Tested:
    """One cell's test records: the group of each, and the metric of any of them."""

    metric: str
    groups: list[str]
    value: Statistic
    start: Statistic | None = None
    """A policy's: the same of its reference's answers."""

    def on_all(self) -> float:
        """The metric of all records."""
        return self.value(np.arange(len(self.groups)))


@dataclass(frozen=True)
class Compared:
    """What the sides of a comparison have in common."""

    tested: Mapping[str, Sequence[Tested]]
    reference: str
    noise: SeedNoise | None
    config: CompareConfig
    diverged: Mapping[str, int]

    def measure(self, values: Sequence[Statistic], others: Sequence[Statistic] = ()) -> Measured:
        """The mean of one metric a seed, less that of `others`, on all records, with its interval."""
        return self.spread(values, others)[0]

    def spread(self, values: Sequence[Statistic], others: Sequence[Statistic] = ()) -> tuple[Measured, Floats]:
        """As `measure`, and the points that the interval is of."""
        first, config = self.tested[self.reference][0], self.config
        return mean_with_spread(values, others, first.groups, self.noise, config.bootstrap, config.seeds[0])


def evaluation_of(path: str) -> str:
    """File in a run's directory with what it reached on a set of `also_test`."""
    return f"evaluation-{Path(path).name}.json"


def conclude(
    stage: StageName,
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
    tested = {side: [tested_by(run) for run in of_side] for side, of_side in files.items()}
    _check_alike(files, tested, config)
    reference = next(iter(files))
    first = tested[reference][0]
    noise = _seed_noise(tested)
    compared = Compared(tested, reference, noise, config, diverged or {})
    against = _against(compared)
    sides = {side: _side_of(files[side], files[reference], side, compared) | against[side] for side in files}
    baselines = _reached_by_baselines(files[reference][0], first.metric)
    said = sentence(first.metric, reference, sides, config.margin)
    return {
        "stage": stage,
        "metric": first.metric,
        "margin": config.margin,
        "records": len(first.groups),
        "groups": len(set(first.groups)),
        "reference": reference,
        "seed_noise": None if noise is None else asdict(noise),
        "sides": sides,
        "baselines": {name: asdict(metric) for name, metric in baselines.items()},
        "verdict": said + _beside_baselines(sides, baselines),
        "start": None if first.start is None else _start_of(files[reference][0], first.start, compared),
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
    for side, runs in files.items():
        evaluated[side] = [replace(run, evaluation=read_evaluation(run.path / name)) for run in runs]
        tested[side] = [tested_by(run) for run in evaluated[side]]
        if any(each.groups != tested[compared.reference][0].groups for each in tested[side]):
            raise RunError(f"{name} is of other records than the first cell's", where=str(runs[0].path))
        for run in evaluated[side]:
            if run.evaluation.split != "all":
                what = f"evaluated with split {run.evaluation.split!r}"
                raise RunError(what, where=str(run.path / name), allowed="all")
            seen = max(seen, run.evaluation.groups_seen_in_training)
    first, noise = tested[compared.reference][0], _seed_noise(tested)
    there = replace(compared, tested=tested, noise=noise)
    baselines = _reached_by_baselines(evaluated[compared.reference][0], first.metric)
    against = _against(there)
    return {
        "metric": first.metric,
        "records": len(first.groups),
        "groups": len(set(first.groups)),
        "groups_seen_in_training": seen,
        "seed_noise": None if noise is None else asdict(noise),
        "sides": {side: {"quality": _quality_of(side, there), **against[side]} for side in files},
        "baselines": {name: asdict(metric) for name, metric in baselines.items()},
    }


def _check_alike(
    files: Mapping[str, Sequence[RunFiles]], tested: Mapping[str, Sequence[Tested]], config: CompareConfig
) -> None:
    """Raises RunError for a cell that learned from other data or was tested otherwise than the first one."""
    cells = [cell for side, runs in files.items() for cell in zip(runs, tested[side], strict=True)]
    first, first_tested = cells[0]
    rewards, temperature = ((), 1.0) if config.policy is None else (config.policy.reward, config.policy.temperature)
    asked = {"split": "test", "adapter": None, "temperature": temperature, "reward": list(config.scorers or rewards)}
    for run, own in cells:
        if own.groups != first_tested.groups or own.metric != first_tested.metric:
            raise RunError("tested on other records than the first cell", where=str(run.path))
        facts, first_facts = (mapping(each.manifest.get("facts")) for each in (run, first))
        if difference := first_difference(dict(first_facts), dict(facts)):
            key, then, now = difference
            hint = "delete the cells of one of the two, and run the same command again"
            raise RunError(f"{key} is {now!r}, but {then!r} in {first.path.name}", where=str(run.path), hint=hint)
        for key, wanted in asked.items():
            if (given := getattr(run.evaluation, key)) not in (None, wanted):
                hint, where = "delete it, and run the same command again", str(run.path / EVALUATION)
                raise RunError(f"evaluated with {key} {given!r}", where=where, allowed=str(wanted), hint=hint)


def _unlike(files: Mapping[str, Sequence[RunFiles]]) -> list[str]:
    """Machines of the cells, in words, where they differ: then memory and speed are those of unlike cells."""
    machines: dict[str, None] = {}
    for run in (run for side in files.values() for run in side):
        hardware, torch = mapping(run.manifest.get("hardware")), mapping(run.manifest.get("versions")).get("torch")
        machine = hardware.get("gpu") or f"{hardware.get('cpu')}, {run.manifest.get('threads')} threads"
        size = run.config.get("tokens_per_microbatch")
        machines.setdefault(f"{machine}, torch {torch}, tokens_per_microbatch {size or 'by default'}")
    return list(machines) if len(machines) > 1 else []


def sentence(metric: str, reference: str, sides: Mapping[str, Mapping[str, Any]], margin: float) -> str:
    """The verdicts in words, those that agree together."""
    said: dict[str, list[str]] = {}
    for side, reached in sides.items():
        if side != reference:
            said.setdefault(reached["verdict"], []).append(side)
    if not said:
        return f"Only {reference} has finished: nothing to compare it with yet."
    parts = [
        f"{', '.join(names)} {WORDS[what].format(other=reference, verb='is' if len(names) == 1 else 'are')}"
        + (f" (within {number(margin)})" if what == "equivalent" else "")
        for what, names in said.items()
    ]
    return f"By {metric} on test groups, {'; '.join(parts)}."


def _reached_by_baselines(run: RunFiles, metric: str) -> dict[str, Measured]:
    """What needs no network and reaches on the same records, by its name in evaluation.json; nothing of a policy."""
    key = metric.lower().replace(" ", "_")
    reached = {name: baseline.get(key) for name, baseline in (run.evaluation.baselines or {}).items()}
    return {name: value for name, value in reached.items() if isinstance(value, Measured) and name != "majority"}


def _beside_baselines(sides: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, Measured]) -> str:
    """A sentence about who is above the strongest baseline, if there is any."""
    best = findings.strongest(baselines)
    if best is None:
        return ""
    name, value = best
    above = [side for side, reached in sides.items() if reached["quality"]["value"] > value]
    not_all = f"Only {', '.join(above)} {'is' if len(above) == 1 else 'are'}" if above else "No side is"
    who = "Every side is" if len(above) == len(sides) else not_all
    return f" {who} above the value of the strongest baseline ({name}, {number(value)})."


def tested_by(run: RunFiles) -> Tested:
    """What an evaluated run was tested on, and how well it did on any part of that."""
    records = run.evaluation.records or {}
    rated, compared = records.get("ratings") or {}, records.get("comparisons") or {}
    if rated.get("group"):
        scores, labels = np.array(rated["score"]), np.array(rated["label"], dtype=bool)
        return Tested("AUC", rated["group"], lambda i: metrics.auc(scores[i], labels[i]))
    if compared.get("group"):
        pairs = np.array(compared["scores"])
        return Tested(
            "pairwise accuracy", compared["group"], lambda i: metrics.pairwise_accuracy(pairs[i, 0], pairs[i, 1])
        )
    rows = run.evaluation.samples
    key, metric = (
        ("gold_after", "gold score") if rows and rows[0].get("gold_after") is not None else ("score_after", "score")
    )
    after, before = (
        np.array([row[key.replace("after", when)] for row in rows], dtype=float) for when in ("after", "before")
    )
    groups = [row["group"] for row in rows]
    return Tested(metric, groups, lambda i: float(after[i].mean()), lambda i: float(before[i].mean()))


def _side_of(runs: Sequence[RunFiles], reference: Sequence[RunFiles], side: str, compared: Compared) -> dict[str, Any]:
    """Quality and costs of one side; costs also as a share or factor of the reference's."""
    tested = compared.tested[side]
    lines, others = ([summarise(run) for run in files] for files in (runs, reference))
    memory, speed = _mean(lines, "peak_memory_bytes"), _mean(lines, "tokens_per_second")
    return {
        "quality": _quality_of(side, compared),
        "seeds": [
            {"seed": run.config.get("seed"), "value": own.on_all()} for run, own in zip(runs, tested, strict=True)
        ],
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
        "curves": [_learned(run, tested[0].metric) for run in runs],
        **({} if tested[0].start is None else _against_start(runs, tested, compared)),
    }


def _seed_noise(tested: Mapping[str, Sequence[Tested]]) -> SeedNoise | None:
    return metrics.seed_noise([own.on_all() for own in of_side] for of_side in tested.values())


def _quality_of(side: str, compared: Compared) -> dict[str, float]:
    return asdict(compared.measure([own.value for own in compared.tested[side]]))


def _start_of(run: RunFiles, start: Statistic, compared: Compared) -> dict[str, Any]:
    """What every policy starts from and is held against: its name, and how good its answers are."""
    policy, score = compared.config.policy, (run.evaluation.before or {}).get("score")
    return {
        "name": "base" if policy is None or policy.sft is None else "SFT",
        "quality": asdict(replace(compared, noise=None).measure([start])),
        "score": score and asdict(score),
    }


def _against_start(runs: Sequence[RunFiles], tested: Sequence[Tested], compared: Compared) -> dict[str, Any]:
    """What is said of a side's policies beyond their quality, each against the start's answers to the same prompts."""
    starts = [own.start for own in tested if own.start is not None]
    # The start has no seed: what other seeds would change is that of one side, and so `starts` isn't passed as a side.
    gains: list[Statistic] = [
        lambda i, after=own.value, before=before: after(i) - before(i)
        for own, before in zip(tested, starts, strict=True)
    ]
    after = [run.evaluation.after or {} for run in runs]
    many = compared.noise is not None
    return {
        "change": asdict(compared.measure(gains)),
        "score": _over_seeds([side.get("score") for side in after], many),
        "win_rate": _over_seeds([run.evaluation.win_rate for run in runs], many),
        "kl": _over_seeds([side.get("kl_temperature_1") for side in after], many),
    }


def _over_seeds(reached: Sequence[Measured | None], many: bool) -> dict[str, float | None] | None:
    """The mean of the seeds; with its interval over groups only where no side has several seeds (`many`)."""
    known = [metric for metric in reached if metric is not None]
    if len(known) < len(reached):
        return None
    if len(known) == 1 and not many:
        return {"value": known[0].value, "low": known[0].low, "high": known[0].high}
    return asdict(Measured(statistics.fmean(metric.value for metric in known)))


def mean_with_spread(
    values: Sequence[Statistic],
    others: Sequence[Statistic],
    groups: Sequence[str],
    noise: SeedNoise | None,
    resamples: int,
    seed: int,
) -> tuple[Measured, Floats]:
    """Mean metric of some runs on all records, minus that of `others` (none: of `values` alone), and what it may be.

    Args:
        values, others: of each run, the metric of any records; all were tested on the same ones.
        groups: group of each record.
    """
    everything = np.arange(len(groups))
    means = [statistics.fmean(value(everything) for value in side) for side in (values, others) if side]
    points = metrics.seeds_spread(values, others, groups, noise, resamples, seed)
    return Measured(means[0] - sum(means[1:]), *metrics.interval(points)), points


def _against(compared: Compared) -> dict[str, dict[str, Any]]:
    """Each side's difference in quality from the reference, and its verdict: none where seeds of either diverged."""
    reference, lost = compared.reference, compared.diverged
    others = [tested.value for tested in compared.tested[reference]]
    against: dict[str, dict[str, Any]] = {reference: {"difference": None, "verdict": "reference"}}
    points: dict[str, Floats] = {}
    for side, tested in compared.tested.items():
        if side != reference:
            difference, found = compared.spread([own.value for own in tested], others)
            against[side] = {"difference": asdict(difference), "verdict": "undecided"}
            if not lost.get(side, 0) and not lost.get(reference, 0):
                points[side] = found
    for side, said in metrics.verdicts(points, compared.config.margin, compared.noise).items():
        against[side]["verdict"] = said
    return against


def _learned(run: RunFiles, metric: str) -> list[tuple[float, float]]:
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
