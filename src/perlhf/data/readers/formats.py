"""The layouts that can be read, and which of them a file or row has: by the names of its columns."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

from perlhf.config.stages import LayoutConfig
from perlhf.data.fields import Row, Skipped
from perlhf.data.readers import exports, judged, layouts
from perlhf.data.readers.messages import transcript
from perlhf.data.readers.published import android, dialogs, pairs
from perlhf.data.readers.trl import trl
from perlhf.data.records import Record
from perlhf.errors import DataError, nearest

Reader = Callable[[Iterable[Row]], Iterator[Record | Skipped]]


@dataclass(frozen=True, slots=True)
class Format:
    """One layout: its name, what it gives, the sets of columns that tell it apart, and its reader."""

    name: str
    gives: str
    columns: tuple[frozenset[str], ...]
    """A file has this layout when its first row has all columns of one of these."""
    reader: Callable[..., Iterator[Record | Skipped]]
    published: bool = True
    """A set with a rule of its own; the others are layouts of people's own files, read by `LayoutConfig`."""


def _published(name: str, gives: str, columns: str, reader: Callable[..., Iterator[Record | Skipped]]) -> Format:
    return Format(name, gives, _alternatives(columns), reader)


def _layout(name: str, gives: str, columns: str, reader: Callable[..., Iterator[Record | Skipped]]) -> Format:
    return Format(name, gives, _alternatives(columns), reader, published=False)


def _alternatives(columns: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in columns.split("|") if names.strip())


_OPENAI = "input preferred_output non_preferred_output | input preferred_completion non_preferred_completion"
_SWIFT = "messages rejected_response | messages rejected_messages | query response"
_HELPSTEER = "prompt response helpfulness | response1 response2 overall_preference"
_HELPSTEER += " | response_1 response_2 preference_strength"
_ULTRAFEEDBACK = "instruction completions | prompt answers | prompt completions models"
_ULTRAFEEDBACK += " | question answers | prompt responses scores | prompt completions scores | prompt responses ranks"
_ULTRAFEEDBACK += " | prompt completions ranks | prompt responses ratings | prompt completions ratings"
_ULTRAFEEDBACK += " | prompt responses ranking | prompt completions ranking"
_ULTRAFEEDBACK += " | instruction generations ratings | prompt generations ratings | prompt responses rewards"
_ALPACA = "instruction output | instruction response | instruction chosen rejected | instruction input | input output"
_ARENA = "conversation_a conversation_b winner | response_a response_b winner | response_a response_b winner_model_a"
_ARENA += " | answer_a answer_b winner | response_0 response_1 better_response_id | answer_0 answer_1 score_0 score_1"
_ARENA += " | response_1 response_2 preference | response1 response2 preference | answer1 answer2 winner"
_ARENA += " | response_1 response_2 winner | response1 response2 winner | completion_a completion_b winner"
_ARENA += " | output_a output_b winner | response_a response_b preference | output_1 output_2 preference"
FORMATS = (
    _layout("trl", "any kind, by its columns", "", trl),
    _published("taskmaster-rewards", "ratings", "context generation reward", dialogs.taskmaster_rewards),
    _published("taskmaster-dialogs", "demonstrations", "conversation_id utterances", dialogs.taskmaster_dialogs),
    _published("taskmaster-tsv", "demonstrations", "source target dialog_id", dialogs.taskmaster_tsv),
    _published("hh", "comparisons", "", dialogs.hh),
    _published("hhh", "comparisons", "chosen_instruction rejected_instruction", dialogs.hhh),
    _published("oasst", "comparisons", "message_tree_id prompt", dialogs.oasst),
    _published("oasst-messages", "comparisons", "message_id parent_id text role", dialogs.oasst_messages),
    _published("pandalm", "comparisons", "response1 response2 annotator1", pairs.pandalm),
    _published("llmbar", "comparisons (also the layout of MT-bench)", "input output_1 output_2 label", pairs.llmbar),
    _published("shp", "comparisons", "post_id history human_ref_A human_ref_B labels", pairs.shp),
    _published("tldr", "comparisons", "info summaries choice", pairs.tldr),
    _published("feedbackqa", "comparisons", "question passage rating", pairs.feedbackqa),
    _published("feedbackqa-ratings", "ratings", "", pairs.feedbackqa_ratings),
    _published("squality", "comparisons", "passage-id questions", pairs.squality),
    _published("squality-questions", "comparisons", "", pairs.squality_questions),
    _published("squality-summaries", "demonstrations", "metadata document questions", pairs.squality_summaries),
    _published("uibert", "demonstrations", "image/ref_exp/text image/ref_exp/label", pairs.uibert),
    _published("uibert-pairs", "comparisons", "", pairs.uibert_pairs),
    _published("android-control", "demonstrations", "accessibility_trees step_instructions", android.android_control),
    _published("android-control-pairs", "comparisons", "", android.android_control_pairs),
    _layout("open-webui", "ratings", "data snapshot meta | data snapshot type", exports.open_webui),
    _layout("label-studio", "any kind", "data annotations | annotation_id lead_time", exports.label_studio),
    _layout("argilla", "any kind", "fields responses", exports.argilla),
    _layout("openai", "comparisons and demonstrations", _OPENAI, layouts.openai),
    _layout("swift", "any kind", _SWIFT, layouts.swift),
    _layout("sharegpt", "any kind", "conversations | conversation", layouts.sharegpt),
    _layout("arena", "comparisons", _ARENA, judged.arena),
    _layout("helpsteer", "comparisons, or what grades become", _HELPSTEER, judged.helpsteer),
    _layout("ultrafeedback", "comparisons", _ULTRAFEEDBACK, judged.ultrafeedback),
    _layout("alpaca", "any kind", _ALPACA, layouts.alpaca),
)
PUBLISHED = frozenset(format.name for format in FORMATS if format.published)
"""Readers that leave it to their caller to check what they found (`fields.checked`)."""
NEED_STORIES = ("squality", "squality-questions")
WHOLE_FILE = ("feedbackqa", "oasst-messages")
"""Formats whose records come of several rows; in all others a row says by itself what it is."""
_TRL = ("prompt chosen rejected", "prompt completion", "chosen_response rejected_response")
"""Sets of columns that are read as `trl` whatever stands beside them."""
_COMMON = frozenset(("prompt", "messages"))
"""Columns of so many layouts that they show none."""
_EXPORT = frozenset(("annotation_id", "lead_time"))


def detect(row: Mapping[str, Any]) -> str:
    """Name of the format that a file's first row shows; `trl` when no other layout fits.

    Published sets come first, then TRL's columns, then the layouts of people's own files.
    """
    if _holds_dialogs(row):
        return "hh"
    return _detected(*_names_of(row)) or "trl"


def by_row(name: str, rules: LayoutConfig) -> Reader:
    """The reader of a file of somebody's own whose first row has the layout `name`: its rows may be of several.

    A row that shows none is read as the rows before it where it has a column of theirs, else as `trl`. Where grades
    become comparisons, which need all answers to a prompt, the first row speaks for all.
    """
    if rules.grades == "comparisons":
        return partial(format_of(name).reader, rules=rules)

    seen = None

    def layout(item: Row) -> str:
        nonlocal name, seen
        if seen == (seen := _names_of(item[1])):
            return name
        names, given = seen
        found = _detected(names, given)
        if found is None:
            found = name if _of_layout(name, given) else "trl"
        name = found if found not in PUBLISHED else name
        return name

    def reader(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
        for found, group in groupby(rows, layout):
            yield from format_of(found).reader(group, rules=rules)

    return reader


def _names_of(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a row's columns, and of those that hold something."""
    names = tuple(row)
    return names, names if None not in row.values() else tuple([name for name in names if row[name] is not None])


@lru_cache(maxsize=4096)
def _detected(names: tuple[str, ...], given: tuple[str, ...]) -> str | None:
    """The format that these columns show. A null may be the missing verdict of a row, or fill a column of others."""
    every, held = frozenset(names), frozenset(given)
    for format in FORMATS:
        if format.published and any(columns <= every for columns in format.columns):
            return format.name
    if any(name.endswith((".responses", "-suggestion")) for name in names):
        return "argilla"
    if any(held.issuperset(columns.split()) for columns in _TRL) and not _EXPORT <= every:
        return "trl"
    own = [format for format in FORMATS if not format.published]
    for format in own:
        if any(columns <= held for columns in format.columns):
            return format.name
    for format in own:
        if any(columns <= every and columns & held - _COMMON for columns in format.columns):
            return format.name
    return "arena" if judged.is_judged_pair(every) else None


@lru_cache(maxsize=4096)
def _of_layout(name: str, given: tuple[str, ...]) -> bool:
    """Whether a row has a column of this layout that others don't have."""
    return any(columns & set(given) - _COMMON for columns in format_of(name).columns)


def format_of(name: str) -> Format:
    return next(format for format in FORMATS if format.name == name)


def _holds_dialogs(row: Mapping[str, Any]) -> bool:
    """True for HH's layout: `chosen` and `rejected` are whole dialogs, and there is no prompt."""
    sides = [row.get(side) for side in ("chosen", "rejected")]
    if row.get("prompt") is not None or not all(isinstance(side, str) for side in sides):
        return False
    return all(str(side).startswith("\n\nHuman:") or _is_dialog(str(side)) for side in sides)


def _is_dialog(text: str) -> bool:
    turns = transcript(text) if text.lstrip().startswith("Human:") else None
    return turns is not None and turns[-1]["role"] == "assistant"


def check_format(name: str) -> None:
    """Raises DataError, with the nearest name, when there is no such format."""
    names = ["auto", *(format.name for format in FORMATS)]
    if name not in names:
        near = nearest(name.lower(), names)
        raise DataError(
            f"unknown format {name!r}",
            where="format",
            allowed=", ".join(names),
            hint=f"did you mean {near!r}?" if near else None,
        )
