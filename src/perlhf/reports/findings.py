"""What a reader should take away from the runs, and what not: sentences and key figures of the summary."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perlhf.runs.evaluations import Measured, mapping
from perlhf.runs.read import NOT_EVALUATED, RunFiles, summarise
from perlhf.runs.words import number, with_interval

BASELINES = {"bag_of_words": "bag of words", "position": "position", "length": "length", "majority": "majority label"}
METRIC_NAMES = {
    "auc": "AUC",
    "pairwise_accuracy": "pairwise accuracy",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
}
FEW = 200  # prompts or ratings below which the summary warns
_STAGE_NAMES = {"sft": "SFT", "reward": "reward", "policy": "policy", "unknown": "unnamed"}


@dataclass(frozen=True)
class Remark:
    """A sentence of the summary; `tone` says how to mark it."""

    tone: Literal["good", "caution", "note"]
    text: str


@dataclass(frozen=True)
class Bar:
    """A value on its tile's common axis, in percent; without an interval `start` and `end` equal `at`."""

    label: str
    metric: Measured
    at: float
    start: float
    end: float


@dataclass(frozen=True)
class Tile:
    """A key figure: the last bar is the result, the ones before are what to hold it against."""

    label: str
    bars: list[Bar]
    note: str
    scale: float
    """Largest value: fixes the decimals of all."""


def direction(before: Measured, after: Measured) -> Literal["rose", "fell", "unclear"]:
    """`rose` or `fell` where the two intervals don't overlap, else `unclear` (also where an interval is missing)."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return "unclear"
    if after.low > before.high:
        return "rose"
    return "fell" if after.high < before.low else "unclear"


def headline(runs: Sequence[RunFiles]) -> Remark:
    """The result of the last stage, in one sentence."""
    for stage, sentence in (("policy", _policy_headline), ("reward", _reward_headline), ("sft", _sft_headline)):
        of_stage = [run for run in runs if run.stage == stage]
        if of_stage:
            return sentence(of_stage[-1])
    return Remark("note", "These runs name no stage, so there is no result to sum up.")


def remarks(runs: Sequence[RunFiles]) -> list[Remark]:
    """What qualifies the headline: baselines, side effects, small numbers, missing parts, seeds."""
    said: list[Remark] = []
    of_stage = Counter(run.stage for run in runs)
    for run in runs:
        where = f" ({run.name})" if of_stage[run.stage] > 1 else ""
        by_stage = {"reward": _reward_remarks, "policy": _policy_remarks, "sft": _sft_remarks}.get(run.stage)
        sentences = [] if by_stage is None else list(by_stage(run))
        sentences += _completeness(run)
        said += [Remark(remark.tone, remark.text[:-1] + where + remark.text[-1]) for remark in sentences]
    said += [*_data_remarks(runs), _seed_remark(runs)]
    return sorted(said, key=lambda remark: ("caution", "good", "note").index(remark.tone))


def tiles(runs: Sequence[RunFiles]) -> list[Tile]:
    """Key figures: reward quality and its strongest baseline; gold, score and KL; SFT's loss if that is all."""
    shown = []
    for run in runs:
        if run.stage == "policy":
            shown += _policy_tiles(run)
            continue
        name, quality = summarise(run).quality_name, summarise(run).quality
        if quality is not None and run.stage == "reward":
            best = strongest_baseline(run)
            beside = [] if best is None else [(best[0], Measured(best[1]))]
            shown.append(_tile(f"Reward model: {name}", [*beside, ("model", quality)], size(run)))
    if not shown:
        lines = [summarise(run) for run in runs if run.stage == "sft"]
        shown = [_tile(f"SFT: {line.quality_name}", [("model", line.quality)], "") for line in lines if line.quality]
    return shown


def strongest_baseline(run: RunFiles) -> tuple[str, float] | None:
    """Name and value of the baseline that does best on the metric that the reward run is judged by."""
    judged = judged_by(run)
    return strongest({key: metrics.get(judged) for key, metrics in (run.evaluation.baselines or {}).items()})


def strongest(baselines: Mapping[str, Measured | str | None]) -> tuple[str, float] | None:
    """Name and value of the best of some baselines, by their keys in evaluation.json; None where none has a value."""
    reached = ((name, baselines.get(key)) for key, name in BASELINES.items())
    values = [(name, metric.value) for name, metric in reached if isinstance(metric, Measured)]
    return max(values, key=lambda pair: pair[1], default=None)


def judged_by(run: RunFiles) -> str:
    """The metric of evaluation.json that a reward run is judged by: AUC, or pairwise accuracy where there is none."""
    return "auc" if (run.evaluation.metrics or {}).get("auc") else "pairwise_accuracy"


def largest(values: Iterable[Measured]) -> float:
    """The largest absolute value, by which numbers that are read together are all rounded."""
    return max((abs(metric.value) for metric in values), default=0.0)


def size(run: RunFiles) -> str:
    """How much was evaluated, such as `240 unseen prompts in 60 groups`."""
    n, groups = run.evaluation.n, run.evaluation.groups
    return f"{n:,} {things(run)}" + (f" in {groups:,} groups" if groups else "") if n else ""


def things(run: RunFiles) -> str:
    """What was evaluated: only the test split is unseen, since the validation split chose the checkpoint.

    With another split seed than the run's, groups of its training can be in the test split; then they aren't unseen.
    """
    name, split = "prompts" if run.stage == "policy" else "examples", run.evaluation.split
    seen = run.evaluation.groups_seen_in_training
    if split == "test":
        return f"{name}, {seen:,} groups of them seen in training," if seen else f"unseen {name}"
    return f"{name} of the {split} split"


def _policy_headline(run: RunFiles) -> Remark:
    for key, name in (("gold", "gold score"), ("score", "score")):
        pair = run.evaluation.before_after(key)
        if pair is None:
            continue
        before, after = pair
        scale = largest(pair)
        values = f"from {number(before.value, scale)} to {number(after.value, scale)}"
        judge = "" if key == "gold" else f" by {_judge(run)}"
        on = f" on {run.evaluation.n:,} {things(run)}{judge}"
        match direction(before, after):
            case "rose":
                return Remark("good", f"The {name} rose {values}{on}.")
            case "fell":
                return Remark("caution", f"The {name} fell {values}{on}.")
            case "unclear":
                known = before.low is not None and after.low is not None
                reason = "the intervals overlap" if known else "there is no interval"
                return Remark("caution", f"The {name} did not clearly rise: {values}{on}, and {reason}.")
    return Remark("note", "The policy has not been evaluated on unseen prompts.")


def _judge(run: RunFiles) -> str:
    """Whose scores a policy's evaluation holds."""
    sources = run.evaluation.reward
    if not sources or sources == run.config.get("reward"):
        return "the reward model's own judgement"
    return ", ".join(str(source).rstrip("/").rpartition("/")[2] for source in sources)


def _reward_headline(run: RunFiles) -> Remark:
    line = summarise(run)
    if line.quality is None or line.quality_name is None:
        return Remark("note", "The reward model has not been evaluated.")
    name, where = line.quality_name.split(", ")
    return Remark("note", f"The reward model reaches {name} {with_interval(line.quality)} on the {where} split.")


def _sft_headline(run: RunFiles) -> Remark:
    line = summarise(run)
    if line.quality is None or line.quality_name is None:
        return Remark("note", "Supervised fine-tuning has no validation loss.")
    where = line.quality_name.split(", ")[1]
    return Remark("note", f"Supervised fine-tuning reached a {where} loss of {with_interval(line.quality)}.")


def _reward_remarks(run: RunFiles) -> Iterable[Remark]:
    best = strongest_baseline(run)
    metric = judged_by(run)
    value = (run.evaluation.metrics or {}).get(metric)
    if best is None or value is None:
        return
    baseline = f"the strongest baseline ({best[0]}, {METRIC_NAMES[metric]} {number(best[1])})"
    if value.value <= best[1]:
        yield Remark("caution", f"The reward model, at {number(value.value)}, is not better than {baseline}.")
    elif value.low is None or value.low <= best[1]:
        yield Remark("caution", f"The reward model is above {baseline}, but its interval does not exclude it.")
    else:
        yield Remark("good", f"The reward model is above {baseline}, and its interval excludes it.")


def _policy_remarks(run: RunFiles) -> Iterable[Remark]:
    pair_of = run.evaluation.before_after
    score, gold = pair_of("score"), pair_of("gold")
    if score and gold and direction(*score) == "rose" and direction(*gold) != "rose":
        text = "The score rose and the gold score did not: the policy learned what the reward model likes, no more."
        yield Remark("caution", text)
    ends = pair_of("end_rate")
    if ends and ends[1].value < ends[0].value - 0.1:
        text = f"Fewer completions end by themselves: {number(ends[0].value)} before, {number(ends[1].value)} after."
        yield Remark("caution", text)
    distinct = pair_of("distinct_2")
    if distinct and distinct[1].value < 0.8 * distinct[0].value:
        values = f"share of distinct bigrams {number(distinct[0].value)} before, {number(distinct[1].value)} after"
        yield Remark("caution", f"Completions became less varied: {values}.")
    spread = [value for _, value in run.series("score_std")]
    if len(spread) > 1 and max(spread) < 1e-9:  # but for rounding
        yield Remark("caution", "The scores of no update differed: a reward that never varies teaches nothing.")
    kl = pair_of("kl")
    if kl and kl[1].value < 0:
        yield Remark("note", f"The KL is {number(kl[1].value)}: an estimate that chance brought below 0, so about 0.")
    tokens = pair_of("tokens")
    if tokens and tokens[0].value > 0 and not 0.7 < tokens[1].value / tokens[0].value < 1.4:
        values = f"{number(tokens[0].value)} tokens before, {number(tokens[1].value)} after"
        yield Remark("note", f"The length of completions changed much: {values}.")


def _sft_remarks(run: RunFiles) -> Iterable[Remark]:
    losses = run.series("validation_loss")
    if len(losses) < 2:
        return
    best_step, best = min(losses, key=lambda pair: pair[1])
    if losses[-1][1] > 1.02 * best:
        values = f"lowest at step {best_step:,.0f} ({number(best)}) and {number(losses[-1][1])} at the end"
        yield Remark("note", f"SFT's validation loss was {values}: longer training would not have helped.")


def _completeness(run: RunFiles) -> Iterable[Remark]:
    stage = _STAGE_NAMES[run.stage]
    if not run.result:
        yield Remark("caution", f"The {stage} run is not finished: it has no result.json.")
    if run.result.get("stopped"):
        yield Remark("caution", f"The {stage} run stopped early: {run.result['stopped']}.")
    if run.result.get("best_step") == 0:
        yield Remark(
            "caution", f"No update of the {stage} run did better on held-out groups than its start, which was kept."
        )
    if run.stage in ("reward", "policy") and run.evaluation == NOT_EVALUATED:
        yield Remark("caution", f"The {stage} run was not evaluated on unseen groups: perlhf evaluate does that.")
    if run.evaluation.split != "test":
        yield Remark("caution", f"The {stage} evaluation is of the {run.evaluation.split} split, which training saw.")
    if 0 < run.evaluation.n < FEW:
        yield Remark("caution", f"The {stage} evaluation rests on {size(run)}: too few for small differences.")


def _data_remarks(runs: Sequence[RunFiles]) -> Iterable[Remark]:
    paths = {path for run in runs for path in _paths(run.config)}
    if any(path.startswith("builtin:") for path in paths):
        yield Remark(
            "note", "The built-in feedback is simulated: its labels and gold scores come from rules, not from people."
        )


def _paths(config: dict[str, Any]) -> list[str]:
    paths = mapping(config.get("data")).get("paths")
    return [str(path) for path in paths] if isinstance(paths, list) else []


def _seed_remark(runs: Sequence[RunFiles]) -> Remark:
    by_stage: dict[str, set[str]] = {}
    for run in runs:
        by_stage.setdefault(_STAGE_NAMES[run.stage], set()).add(str(run.config.get("seed", "?")))
    several = [f"{stage} seeds {', '.join(sorted(seeds))}" for stage, seeds in by_stage.items() if len(seeds) > 1]
    if several:
        return Remark("note", f"Several seeds: {'; '.join(several)}. Intervals are those of each run by itself.")
    seeds = sorted(set().union(*by_stage.values()))
    text = f"A single run of each stage (seed {', '.join(seeds)})"
    return Remark("note", f"{text}: intervals tell what other test groups would change, not other seeds.")


def _policy_tiles(run: RunFiles) -> list[Tile]:
    shown = []
    for key, name in (("gold", "gold score"), ("score", "score"), ("kl", "KL to the reference")):
        pair = run.evaluation.before_after(key)
        if pair is not None:
            sides = [("before", pair[0]), ("after", pair[1])]
            shown.append(_tile(f"Policy: {name}", sides[1:] if key == "kl" else sides, "" if shown else size(run)))
    return shown


def _tile(label: str, values: Sequence[tuple[str, Measured]], note: str) -> Tile:
    ends = [end for _, metric in values for end in (metric.value, metric.low, metric.high) if end is not None]
    low, span = min(ends), max(ends) - min(ends)

    def percent(value: float) -> float:
        return 50.0 if span == 0 else round(4 + 92 * (value - low) / span, 1)

    bars = []
    for name, metric in values:
        start, end = (metric.value if edge is None else edge for edge in (metric.low, metric.high))
        bars.append(Bar(name, metric, percent(metric.value), percent(start), percent(end)))
    return Tile(label, bars, note, largest(metric for _, metric in values))
