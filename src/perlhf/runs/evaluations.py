"""What evaluation.json holds; of the package only this module writes and reads the file."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from perlhf.system.files import damaged, read_json, storage_errors, write_json

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Measured:
    """A value and its 95 % interval; `low` and `high` are None where none was computed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class WinRate(Measured):
    """Share of prompts whose answer is better than the reference's, ties counting half."""

    by: str | None = None
    """Who judged: sources of scores, or a judge."""
    unparsable: int | None = None
    """Answers of a judge that named no side."""


Measures = Mapping[str, Measured | None]
"""By name of the metric; None where it can't be computed, as the AUC of one class."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a run of any stage did on held-out groups. None: the stage has no such number, or the file is older.

    One class for all stages, since reports and comparisons go through runs of unlike stages.
    """

    kind: str | None = None
    """Stage of the run."""
    split: str = "test"
    n: int = 0
    """Records, or prompts of a policy."""
    groups: int = 0
    ratings: int | None = None
    comparisons: int | None = None
    groups_seen_in_training: int = 0
    counts: Mapping[str, int] | None = None
    """Prompts that were cut and records that were dropped, to fit the encoding."""
    metrics: Measures | None = None
    """Of an SFT run after training, and of a reward run."""
    baselines: Mapping[str, Mapping[str, Measured | str | None]] | None = None
    """Metrics of what a reward model must beat; `unavailable` says why one could not be fitted."""
    minus_bag_of_words: Measures | None = None
    calibration: list[dict[str, Any]] | None = None
    before: Measures | None = None
    """Of an SFT run's base, or of a policy's reference."""
    after: Measures | None = None
    change: Measures | None = None
    """After minus before, on the same prompts."""
    win_rate: WinRate | None = None
    win_rate_by_score: WinRate | None = None
    """Where a judge gave `win_rate`."""
    best_of: dict[str, dict[str, Any]] | None = None
    """By n: measures of the reference's best of n answers, and `kl_at_most`."""
    temperature: float | None = None
    sampler: str | None = None
    """What sampled a policy's answers: `local` or `vllm`."""
    max_completion_tokens: int | None = None
    reward: list[str] | None = None
    """What scored a policy's answers."""
    adapter: str | None = None
    """What answered instead of the run's own policy."""
    bootstrap: int | None = None
    seed: int | None = None
    records: dict[str, dict[str, list[Any]]] | None = None
    """Group and scores of every record of a reward run, column by column: what `compare` resamples."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    changed: list[str] | None = None
    """What wasn't as the run recorded it any more, where that was accepted."""
    data: list[str] | None = None
    """Where the records are from, if that isn't the run's own data."""

    def before_after(self, metric: str) -> tuple[Measured, Measured] | None:
        """A metric before and after training, where both are there."""
        before, after = ((side or {}).get(metric) for side in (self.before, self.after))
        return None if before is None or after is None else (before, after)


_KINDS: dict[type | tuple[type, ...], set[str]] = {
    str: {"kind", "split", "sampler", "adapter"},
    int: {
        "n",
        "groups",
        "ratings",
        "comparisons",
        "groups_seen_in_training",
        "max_completion_tokens",
        "bootstrap",
        "seed",
    },
    (int, float): {"temperature"},
    list: {"calibration", "reward", "samples", "changed", "data"},
    dict: {"counts", "best_of", "records"},
}


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file.

    Raises:
        RunError: the file is missing or damaged.
    """
    return evaluation_of(read_json(path), path)


def evaluation_of(raw: Mapping[str, Any], path: Path) -> Evaluation:
    """The evaluation that a file holds, from its JSON.

    Raises:
        RunError: it is damaged.
    """
    given = {key.name: raw[key.name] for key in fields(Evaluation) if raw.get(key.name) is not None}
    for kind, names in _KINDS.items():
        for name in names & given.keys():
            if not isinstance(given[name], kind) or isinstance(given[name], bool):
                raise damaged(path, f"{name} is {given[name]!r:.80}")
    for name in {"metrics", "minus_bag_of_words", "before", "after", "change"} & given.keys():
        given[name] = _measures(given[name])
    if "baselines" in given:
        given["baselines"] = {
            name: _measures(baseline) | {key: why for key, why in mapping(baseline).items() if key == "unavailable"}
            for name, baseline in mapping(given["baselines"]).items()
        }
    for name in {"win_rate", "win_rate_by_score"} & given.keys():
        rate = measured(given[name])
        by, unparsable = (mapping(given[name]).get(key) for key in ("by", "unparsable"))
        given[name] = rate and WinRate(rate.value, rate.low, rate.high, by, unparsable)
    return Evaluation(**given)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Writes the file, and its directory where that is missing.

    Raises:
        StorageError: it can't be written; what was there before stays.
    """
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, as_json(evaluation))


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """What the file holds: keys that the stage has no number for are left out, but those of an interval never."""
    return asdict(evaluation, dict_factory=_present)


def measured(raw: object) -> Measured | None:
    """A number, or a mapping with `value` and perhaps `low` and `high`; None for anything that is not finite."""
    if isinstance(raw, dict):
        value = finite(raw.get("value"))
        return None if value is None else Measured(value, finite(raw.get("low")), finite(raw.get("high")))
    value = finite(raw)
    return None if value is None else Measured(value)


def finite(raw: object) -> float | None:
    """`raw` as a float if it is a finite number (a bool is none)."""
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        return None
    return float(raw)


def mapping(raw: object) -> dict[str, Any]:
    """`raw` if it is a mapping, else an empty one: a part that is missing or null has nothing to show."""
    return raw if isinstance(raw, dict) else {}


def _measures(raw: object) -> dict[str, Measured | None]:
    return {name: measured(value) for name, value in mapping(raw).items()}


def _present(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if value is not None or key in ("low", "high")}
