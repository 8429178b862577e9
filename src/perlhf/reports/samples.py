"""Chooses the samples that a page embeds, in one plain form; the page's script searches and sorts them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from perlhf.runs.evaluations import finite
from perlhf.runs.read import RunFiles, read_json_lines
from perlhf.runs.words import count

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


def explorers(runs: Sequence[RunFiles], limit: int = LIMIT) -> list[list[Explorer]]:
    """The lists of each run, together with at most `limit` samples (but one for each list)."""
    sources = [(index, total, make) for index, run in enumerate(runs) for total, make in _sources(run)]
    of_runs: list[list[Explorer]] = [[] for _ in runs]
    for (index, _, make), share in zip(sources, shares([total for _, total, _ in sources], limit), strict=True):
        of_runs[index].append(make(max(share, 1)))
    return of_runs


def shares(totals: Sequence[int], limit: int) -> list[int]:
    """Divides `limit` among lists of these lengths: evenly, where what a short list doesn't need goes to the others."""
    given, left = [0] * len(totals), limit
    for done, index in enumerate(sorted(range(len(totals)), key=lambda index: totals[index])):
        given[index] = min(totals[index], left // (len(totals) - done))
        left -= given[index]
    return given


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` items, evenly spaced, the first and (from two on) the last among them."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[0]]
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def turns(text: object) -> list[list[str]]:
    """A prompt as [role, content] pairs; plain text has the role ''."""
    if isinstance(text, list):
        return [
            [str(turn.get("role", "")), _clip(str(turn.get("content", "")))] for turn in text if isinstance(turn, dict)
        ]
    return [["", _clip(str(text))]]


def _sources(run: RunFiles) -> list[tuple[int, Callable[[int], Explorer]]]:
    """(number of samples, what makes the list of at most so many) for each kind of sample that a run has."""
    samples = run.evaluation.samples
    sources: list[tuple[int, Callable[[int], Explorer]]] = []
    if samples and run.stage in ("sft", "policy"):
        sources.append((len(samples), partial(_pairs, samples)))
    if samples and run.stage == "reward":
        sources.append((len(samples), partial(_ratings, samples)))
    if run.rollouts:
        # One file stands for all: they have the same number of completions.
        sources.append((len(run.rollouts) * len(read_json_lines(run.rollouts[0])), partial(_rollouts, run)))
    return sources


def _pairs(samples: list[dict[str, Any]], limit: int) -> Explorer:
    rows = []
    for place, sample in spread(list(enumerate(samples, start=1)), limit):
        scores = {
            key: _rounded(sample.get(key)) for key in ("score_before", "score_after", "gold_before", "gold_after")
        }
        texts = {"before": _flat(sample.get("before")), "after": _flat(sample.get("after"))}
        if sample.get("demonstration") is not None:
            texts["demonstration"] = _flat(sample["demonstration"])
        rows.append({"place": place, "prompt": turns(sample.get("prompt", "")), **texts, **scores})
    scales = [
        (key, name)
        for key, name in (("gold", "gold score"), ("score", "score"))
        if any(row[f"{key}_before"] is not None and row[f"{key}_after"] is not None for row in rows)
    ]
    filters, sorts = [("all", "all")], _PAIR_SORTS[:1]
    if scales:
        filters += [("better", "improved"), ("worse", "got worse"), ("same", "unchanged")]
        sorts = _PAIR_SORTS
    note = _shown(rows, len(samples), "prompts")
    return Explorer("pairs", "Before and after", note, rows, filters, sorts, scales)


def _ratings(samples: list[dict[str, Any]], limit: int) -> Explorer:
    rows = []
    for place, sample in spread(list(enumerate(samples, start=1)), limit):
        text = {"prompt": turns(sample.get("prompt", "")), "completion": _flat(sample.get("completion"))}
        rows.append({"place": place, **text, "label": sample.get("label"), "score": _rounded(sample.get("score"))})
    filters = [("all", "all"), ("up", "thumbs up"), ("down", "thumbs down")]
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
