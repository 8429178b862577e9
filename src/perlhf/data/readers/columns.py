"""Names of columns: those that the TRL reader knows, what else files call them, and slips of the pen.

What depends on names alone is decided once for each set of them.
"""

import math
from functools import lru_cache
from typing import Any

from perlhf.data.fields import label_of, number
from perlhf.errors import DataError

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "messages",
    "weight",
    "margin",
    "annotator",
    "group",
    "source",
)
ALSO = ("system", "tools", "rating", "score_chosen", "score_rejected")
"""Columns of other layouts that this reader understands beside TRL's, under their first names."""
OTHER_NAMES = {
    "completion": ("response",),
    "label": ("kto_tag", "thumbs_up", "thumbs", "thumb"),
    "rating": ("stars", "star_rating", "score", "grade", "reward", "overall_rating", "overall_score", "ratings"),
    "system": ("system_prompt", "system_message", "system_instruction", "sys_prompt"),
    "tools": ("functions",),
    "chosen": ("chosen_response",),
    "rejected": ("rejected_response",),
}
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
QUESTIONS = ("question", "query", "instruction", "input", "problem")
"""Where comparisons without `prompt` have it."""
_QUESTIONS = (*QUESTIONS, "inputs", "trajectory", "user", "user_input", "post", "text_input", "message", "context", "q")
_ANSWERS = ("response", "output", "answer", "edited_response", "targets", "target", "outputs", "solution")
_ANSWERS += (
    "reply",
    "generation",
    "generated_text",
    "model_output",
    "text_output",
    "summary",
    "assistant",
    "label",
    "a",
)
"""What files call a question and its answer; they are not read as that, but an error says how they would be."""
FEEDBACK = ("feedback", "vote", "liked", "accepted", "upvoted")
"""Columns that are a label where they hold one, and may be anything else (a remark)."""
GRADES = ("user_rating", "human_rating", "rating_score", "human_score", "quality", "helpfulness", "star", "n_stars")
"""Columns that are a grade where they hold a number."""
YES_OR_NO = (
    "is_good",
    "is_correct",
    "correct",
    "is_helpful",
    "helpful",
    "is_positive",
    "is_preferred",
    "is_desirable",
)
"""Columns that are a label where they hold true or false."""
AGAINST = ("thumbs_down", "thumb_down", "disliked", "downvoted", "is_bad")
"""Columns that are a thumbs down where they hold true."""
SAFE = ("is_safe", "safe", "safety", "safety_label", "is_response_safe", "response_safety")
"""Columns beside an answer that say whether it is safe, which is no verdict on how good it is."""
HARMFUL = ("is_harmful", "harmful", "is_unsafe", "unsafe", "is_toxic", "toxic", "is_response_harmful")
"""Columns that say the opposite, where they hold true or false."""
_ABOUT_PROMPTS = ("prompt", "question", "query", "instruction", "input", "user")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_FOLDED = {*COLUMNS, *ALSO, *(other for others in OTHER_NAMES.values() for other in others), *QUESTIONS} | {
    *(name for pair in _SCORES for name in pair),
    *("conversations", "conversation", "output", "history", "response", "winner", "model_a", "model_b"),
    *(f"{answer}_{side}" for answer in ("response", "answer", "completion", "output") for side in "ab12"),
}
_FIRST = ("prompt", "chosen", "messages", "conversations", "instruction", "question", "response_a")
_ANSWERED = ("completion", "response", "output", "messages", "conversations")


@lru_cache(maxsize=1024)
def folded(names: tuple[str, ...]) -> dict[str, str]:
    """Names that spreadsheets write with capitals or spaces, to ours.

    Where the file has a first column of ours as it is, only a verdict beside an answer may be written so.
    """
    taken, allowed = set(names), _FOLDED
    if not taken.isdisjoint(_FIRST):
        allowed = set() if taken.isdisjoint(_ANSWERED) else {"label", "rating", *OTHER_NAMES["rating"], *GRADES}
    ours = {name: "_".join(name.lower().split()) for name in names}
    found = {name: our for name, our in ours.items() if our != name and our in allowed and our not in taken}
    return found if len({*found.values()}) == len(found) else {}


def slip_of(name: str) -> str | None:
    """The column of this reader that `name` is one slip away from; None for a column's own name and any other word."""
    known = (*COLUMNS, *ALSO)
    return None if name in known else next((ours for ours in known if _one_slip(name, ours)), None)


def our_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The row without nulls (and what pandas writes for them), under this reader's names."""
    names = tuple(
        [
            name
            for name, content in row.items()
            if content is not None and not (type(content) is float and content != content)
        ]
    )
    ours = _our_names(names)
    if not ours and len(names) == len(row):
        return row
    return {ours.get(name, name): row[name] for name in names}


@lru_cache(maxsize=1024)
def _our_names(names: tuple[str, ...]) -> dict[str, str]:
    """Names in a row that stand for one of ours which is absent, to ours. It depends on the set of names alone."""
    ours: dict[str, str] = {}
    taken = set(names)
    for name, others in OTHER_NAMES.items():
        if name in taken or (name == "completion" and "prompt" not in taken):
            continue
        if name in ("chosen", "rejected") and not {"chosen_response", "rejected_response"} <= taken:
            continue
        other = next((other for other in others if other in taken), None)
        if other is not None:
            ours[other] = name
    if "chosen" not in taken and "response" in taken and {"rejected", "rejected_response"} & taken:
        ours |= {"response": "chosen", "rejected_response": "rejected"}
    if {"chosen", "rejected"} <= taken | set(ours.values()) and not {"prompt", "messages"} & taken:
        question = next((name for name in QUESTIONS if name in taken), None)
        if question is not None:
            ours[question] = "prompt"
    scores = next((pair for pair in _SCORES if set(pair) <= taken), None)
    if scores is not None:
        ours |= dict(zip(scores, _SCORES[0], strict=True))
    return ours


def refuse_unreadable(row: dict[str, Any], where: str) -> None:
    """Columns that would change what the network sees and that perlhf has no place for."""
    if not _watched(tuple(row)):
        return
    for name in _MEDIA:
        if row.get(name):
            raise DataError(
                f"column {name!r} holds images, videos or audio",
                where=where,
                allowed="text alone: perlhf trains networks that read text",
                hint="leave out the records that need them, or remove the column",
            )
    if row.get("chat_template_kwargs"):
        raise DataError(
            "column 'chat_template_kwargs' is not read: all records of a run are rendered alike",
            where=where,
            hint="give what all records share as `encoding.template_kwargs`, and remove the column",
        )
    if isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list):
        raise DataError(
            "columns 'completions' and 'labels' hold TRL's steps with a label each, which perlhf doesn't learn from",
            where=where,
            allowed="one completion with one label",
        )


@lru_cache(maxsize=1024)
def _watched(names: tuple[str, ...]) -> bool:
    """Whether one of these columns may have to be refused."""
    return not {*_MEDIA, "chat_template_kwargs", "completions"}.isdisjoint(names)


def safety_of(row: dict[str, Any]) -> tuple[str, str | None] | None:
    """A column that says whether an answer is safe, and what of `data.columns` makes it a verdict; None without one."""
    for name in _safety_columns(tuple(row)):
        content = row[name]
        label, harm = label_of(content), name.lower() in HARMFUL
        word = isinstance(content, str) and ("harm" in content.lower() or "safe" in content.lower())
        if label is not None:  # a word says what it means, whatever its column is called
            return name, f"is_bad: {name}" if harm and not word else f"label: {name}"
        if is_number(content) or isinstance(content, int | float):
            return name, None if harm else f"rating: {name}"
    return None


@lru_cache(maxsize=1024)
def _safety_columns(names: tuple[str, ...]) -> tuple[str, ...]:
    def judges(name: str) -> bool:
        word = name.lower()
        labelled = word.endswith(("harm_label", "safety_label", "toxicity_label", "harmfulness_label"))
        return (word in SAFE or word in HARMFUL or labelled) and not word.startswith(_ABOUT_PROMPTS)

    return tuple([name for name in names if judges(name)])


def with_mapping(error: DataError, row: dict[str, Any], where: str) -> DataError:
    """The error for a missing `prompt` or `completion`, with the file's own names and what of `data.columns` helps."""
    held = {name: content for name, content in row.items() if content is not None}
    mapping, hint = mapping_of(held), error.hint
    if mapping:
        hint = f"{named_columns(mapping)} reads them so"
        if mapping.startswith("prompt") and "," not in mapping and held.keys().isdisjoint(("chosen", "completion")):
            hint += (
                f", `{{{mapping}, completion: ...}}` another column as the answer too, and `{{{mapping}, chosen: ..., "
                "rejected: ...}` two as the better and the other one"
            )
    return DataError(error.what, where=where, allowed=f"found columns {', '.join(map(repr, held))}", hint=hint)


def named_columns(mapping: str) -> str:
    """A setting of `data.columns`, as a recipe has it and as it is typed."""
    return (
        f"`data.columns: {{{mapping}}}` (typed: --data.columns '{{{mapping}}}', after `perlhf data` --columns "
        f"'{{{mapping}}}')"
    )


def mapping_of(row: dict[str, Any]) -> str | None:
    """What of `data.columns` makes a record of a row whose columns have other names; None where that isn't clear."""
    listed = [name for name, content in row.items() if isinstance(content, list) and len(content) > 1]
    turns = [name for name in listed if all(isinstance(part, str | dict) for part in row[name])]
    question = "prompt" if "prompt" in row else next((name for name in _QUESTIONS if name in row), None)
    answers = [
        name for name in ("completion", *_ANSWERS) if name in row and name != question and _is_answer(name, row[name])
    ]
    if {"chosen", "rejected"} <= row.keys():
        question = question or next(iter(turns), None)
        return f"prompt: {question}" if question not in (None, "prompt") else None
    if question is None:
        return f"conversations: {turns[0]}" if len(turns) == 1 and not answers else None
    answer = next(iter(answers), "completion") if "completion" not in row else "completion"
    names = [f"{ours}: {name}" for ours, name in (("prompt", question), ("completion", answer)) if ours != name]
    return ", ".join(names) or None


def _is_answer(name: str, content: Any) -> bool:
    if name == "label" and label_of(content) is not None:
        return False
    return bool(content) and isinstance(content, list | str)


def refuse_misspelt(row: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    """A column that is one slip away from an absent name would otherwise be ignored without a word."""
    found = _misspelt(tuple(row), names)
    if found:
        column, name = found
        raise DataError(
            f"column {column!r} is unknown",
            where=where,
            allowed=", ".join(COLUMNS),
            hint=f"rename {column!r} to {name!r}",
        )


@lru_cache(maxsize=1024)
def _misspelt(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, str] | None:
    """A column and the absent name that it is one slip away from. It depends on the set of columns alone."""
    return next(
        (
            (column, name)
            for name in names
            if name not in columns
            for column in columns
            if column not in COLUMNS and _one_slip(column.lower(), name)
        ),
        None,
    )


def _one_slip(word: str, name: str) -> bool:
    """True when one letter was left out, added, changed, or swapped with the next; a plural is another word."""
    if word == name or word == name + "s" or abs(len(word) - len(name)) > 1:
        return word == name
    at = next((at for at, (one, other) in enumerate(zip(word, name, strict=False)) if one != other), None)
    if at is None:
        return True
    swapped = word[at : at + 2] == name[at : at + 2][::-1] and word[at + 2 :] == name[at + 2 :]
    return swapped or word[at + 1 :] in (name[at:], name[at + 1 :]) or word[at:] == name[at + 1 :]


def given(row: dict[str, Any], name: str) -> bool:
    """Whether a row has an optional column; in CSV files an empty cell means that it hasn't."""
    return name in row and not (isinstance(row[name], str) and not row[name].strip())


def optional_number(row: dict[str, Any], name: str, default: float, where: str, least: float = -math.inf) -> float:
    """An optional number, which CSV files have as text."""
    if name not in row:
        return default
    written = row[name]
    if isinstance(written, str):
        if not written.strip():
            return default
        row = {name: float(written) if is_number(written) else written}
    return number(row, name, default, where, least)


def is_number(written: Any) -> bool:
    if not isinstance(written, str):
        return False
    try:
        return math.isfinite(float(written))
    except ValueError:
        return False
