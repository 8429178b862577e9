"""Chooses the samples that a page embeds, in one plain form; the page's script searches and sorts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from perlhf.run_files import RunFiles, count, finite, read_json_lines

LIMIT = 500  # samples on one page, over all runs: about 1 MB of chat
_LONGEST = 6000  # characters of one text
_ROLLOUT_STEPS = 10

Item = TypeVar("Item")
Option = tuple[str, str]

_PAIR_SORTS = [
    ("order", "as evaluated"),
    ("gain", "largest gain"),
    ("loss", "largest loss"),
    ("high", "best after"),
    ("low", "worst after"),
]
_ROLLOUT_SORTS = [
    ("order", "as sampled"),
    ("high", "highest score"),
    ("low", "lowest score"),
    ("kl", "highest KL"),
    ("long", "longest"),
]
_RATING_SORTS = [
    ("order", "as evaluated"),
    ("high", "highest score"),
    ("low", "lowest score"),
    ("wrong", "most surprising"),
]


@dataclass(frozen=True)
class Explorer:
    """One searchable list of samples."""

    kind: str
    """`pairs`, `rollouts` or `ratings`: what a row holds and how the page shows it."""
    title: str
    note: str
    rows: list[dict[str, Any]]
    filters: list[Option]
    sorts: list[Option]
    scales: list[Option]
    """For pairs: the scores that a completion can be better or worse by."""


def explorers(run: RunFiles, limit: int) -> list[Explorer]:
    """The lists of a run, at most `limit` samples in each."""
    samples = run.evaluation.get("samples")
    samples = [row for row in samples if isinstance(row, dict)] if isinstance(samples, list) else []
    found = []
    if samples and run.stage == "policy":
        found.append(_pairs(samples, limit))
    if samples and run.stage == "reward":
        found.append(_ratings(samples, limit))
    if run.rollouts:
        found.append(_rollouts(run, limit))
    return found


def number_of_explorers(run: RunFiles) -> int:
    """How many lists `explorers` would give, so that the page's limit can be shared out."""
    return bool(run.evaluation.get("samples") and run.stage in ("policy", "reward")) + bool(run.rollouts)


def spread(items: Sequence[Item], number: int) -> list[Item]:
    """At most `number` items, evenly spaced, the first and (from two on) the last among them."""
    if len(items) <= number:
        return list(items)
    if number == 1:
        return [items[0]]
    return [items[round(index * (len(items) - 1) / (number - 1))] for index in range(number)]


def turns(text: object) -> list[list[str]]:
    """A prompt as [role, content] pairs; plain text has the role ''."""
    if isinstance(text, list):
        return [
            [str(turn.get("role", "")), _clip(str(turn.get("content", "")))] for turn in text if isinstance(turn, dict)
        ]
    return [["", _clip(str(text))]]


def _pairs(samples: list[dict[str, Any]], limit: int) -> Explorer:
    rows = []
    for place, sample in spread(list(enumerate(samples, start=1)), limit):
        scores = {
            key: _rounded(sample.get(key)) for key in ("score_before", "score_after", "gold_before", "gold_after")
        }
        texts = {"before": _flat(sample.get("before")), "after": _flat(sample.get("after"))}
        rows.append({"place": place, "prompt": turns(sample.get("prompt", "")), **texts, **scores})
    scales = [
        (key, name)
        for key, name in (("gold", "gold score"), ("score", "score"))
        if any(row[f"{key}_before"] is not None and row[f"{key}_after"] is not None for row in rows)
    ]
    filters = [("all", "all"), ("better", "improved"), ("worse", "got worse"), ("same", "unchanged")]
    return Explorer(
        "pairs", "Before and after", _shown(rows, len(samples), "prompts"), rows, filters, _PAIR_SORTS, scales
    )


def _ratings(samples: list[dict[str, Any]], limit: int) -> Explorer:
    rows = []
    for place, sample in spread(list(enumerate(samples, start=1)), limit):
        text = {"prompt": turns(sample.get("prompt", "")), "completion": _flat(sample.get("completion"))}
        rows.append({"place": place, **text, "label": sample.get("label"), "score": _rounded(sample.get("score"))})
    filters = [("all", "all"), ("up", "labelled good"), ("down", "labelled bad")]
    note = _shown(rows, len(samples), "examples")
    return Explorer("ratings", "Scored examples", note, rows, filters, _RATING_SORTS, [])


def _rollouts(run: RunFiles, limit: int) -> Explorer:
    files = spread(run.rollouts, min(_ROLLOUT_STEPS, limit))
    rows = []
    for file in files:
        for row in read_json_lines(file)[: limit // len(files)]:
            text = {"prompt": turns(row.get("prompt", "")), "completion": _flat(row.get("completion"))}
            places = {key: row.get(key) for key in ("step", "prompt_index", "sample_index", "tokens", "ended")}
            rows.append({**places, **text, **{key: _rounded(row.get(key)) for key in ("score", "reward", "kl")}})
    steps = sorted({int(row["step"]) for row in rows if finite(row["step"]) is not None})
    filters = [("all", "all steps"), *((str(step), f"step {step:,}") for step in steps)]
    note = f"{count(len(rows))} completions, from the rollouts of {len(files)} of {count(len(run.rollouts))} steps."
    return Explorer("rollouts", "Rollouts", note, rows, filters, _ROLLOUT_SORTS, [])


def _shown(rows: list[dict[str, Any]], total: int, things: str) -> str:
    return (
        f"{count(total)} {things}."
        if len(rows) == total
        else f"{count(len(rows))} of {count(total)} {things}, evenly spaced."
    )


def _flat(text: object) -> str:
    """A completion as one text."""
    return "\n".join(content for _, content in turns("" if text is None else text))


def _clip(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]}\n… {count(len(text) - 2 * half)} characters left out …\n{text[-half:]}"


def _rounded(raw: object) -> float | None:
    value = finite(raw)
    return None if value is None else round(value, 4)
