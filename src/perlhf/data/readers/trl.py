"""Reader of the columns that TRL uses: prompt, chosen, rejected, completion, label, messages.

Every other layout of people's own files becomes rows of these columns first (layouts.py, exports.py), so that prompts,
answers, grades and labels are read in one place.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

from perlhf.config.stages import LayoutConfig
from perlhf.data.fields import (
    Row,
    Skipped,
    checked,
    is_blank,
    items,
    label_of,
    message,
    number,
    prompt_group,
    text,
    value,
    wrong_type,
)
from perlhf.data.readers.messages import (
    as_messages,
    completion,
    listed,
    messages,
    tools,
    transcript,
    transcript_prompt,
    without_nulls,
)
from perlhf.data.records import Comparison, Demonstration, Message, Prompt, Rating, Record, Text, content_of
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
_OTHER_NAMES = {
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
_QUESTIONS = ("question", "query", "instruction", "input", "problem")
"""Where comparisons without `prompt` have it."""
_FEEDBACK = ("feedback", "vote", "liked", "accepted", "upvoted")
"""Columns that are a label where they hold one, and may be anything else (a remark)."""
_GRADES = ("user_rating", "human_rating", "rating_score", "human_score", "quality", "helpfulness", "star", "n_stars")
"""Columns that are a grade where they hold a number."""
_LEARNED = ("weight", "loss", "train")
"""Keys of a message that say whether it is learned: OpenAI's, ms-swift's, axolotl's."""
_SAID = ("role", "content", "tool_calls", "reasoning_content")
_YES_OR_NO = (
    "is_good",
    "is_correct",
    "correct",
    "is_helpful",
    "helpful",
    "is_positive",
    "is_preferred",
    "is_desirable",
    "is_safe",
)
"""Columns that are a label where they hold true or false."""
_AGAINST = ("thumbs_down", "thumb_down", "disliked", "downvoted", "is_bad")
"""Columns that are a thumbs down where they hold true."""
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_USED_BY_PROMPTS = {*COLUMNS, "system", *_OTHER_NAMES["system"], "tools", "functions"}
_REPEATED_WORDS = 4
"""Least words of a prompt that both answers repeat on their first line for it to be cut off."""


class NoRule(DataError):
    """A file of grades without a rule that says what they become: the same for each of its rows."""


def trl(rows: Iterable[Row | Skipped], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """Files with TRL's column names; each row by itself decides what it is.

    Rule: `chosen` and `rejected` make a comparison; `completion` (or `response`) with `label` a rating; `completion`
    alone, or `messages`, a demonstration (of the last turn); `prompt` alone a prompt, with all other columns for reward
    functions. Text may be a string (a single user message), a list of chat messages, or JSON of one. Whole
    conversations in `chosen` and `rejected` are split where they part: what is common is the prompt, the turns that
    follow are the answers; one that repeats the prompt loses it. Texts without `prompt` are split after the lines
    (else, as TRL does, the words) that both begin with. A prompt that is a transcript (`Human: ... Assistant:`) becomes
    turns. `system` becomes the system message; `tools` and other keys of messages go to the chat template. A `rating`
    (`stars`, `score`, `reward`) beside a completion needs `data.ratings` or `data.grades`. `margin`, or the difference
    of `score_chosen` and `score_rejected`. Optional: `weight`, `annotator`, `group` (default: the first user turn). A
    null counts as absent; other columns are ignored, unless one looks like the misspelt name of one that is missing.
    """
    rules = rules or LayoutConfig()
    graded: dict[str, list[tuple[float, Rating]]] = {}
    rows = iter(rows)
    for item in rows:
        if isinstance(item, Skipped):
            yield item
            continue
        where, row = item
        outcome = read_row(row, where)
        if not isinstance(outcome, tuple):
            yield outcome
            continue
        grade, rating = outcome
        if rules.grades == "comparisons":
            graded.setdefault(repr((rating.prompt, rating.tools)), []).append((grade, rating))
        elif rules.grades == "ignore":
            yield _ungraded(rating)
        elif rules.ratings is None:
            raise _no_rule([grade, *_grades(rows)], where)
        else:
            yield _rated(grade, rating, rules)
    for answers in graded.values():
        yield from _compared(answers)


def read_row(row: Mapping[str, Any], where: str) -> Record | Skipped | tuple[float, Rating]:
    """What one row of these columns is; a grade comes with a rating whose label isn't known yet.

    Raises:
        DataError: a column is missing, misspelt or holds something else.
    """
    whole, row = row, _renamed(row)
    _refuse_unreadable(row, where)
    if "chosen" in row or "rejected" in row:
        return checked(_comparison(row, where), where)
    if "completion" in row or ("label" in row and "messages" not in row):
        return _completion(row, where)
    if "messages" in row and ("prompt" not in row or _is_answered(row, where)):
        return _last_turn(row, where)
    _refuse_misspelt(row, ("chosen", "rejected", "completion", "label", "messages"), where)
    if "prompt" not in row and isinstance(row.get("text"), str) and (turns := transcript(row["text"])):
        return _last_turn(row | {"messages": list(turns)}, where)
    prompt = _prompt(row, where)
    columns = {name: content for name, content in whole.items() if name not in _USED_BY_PROMPTS}
    group, source = _group(row, prompt, where), _source(row, where)
    return checked(Prompt(_with_system(prompt, row, where), group, source, _tools(row, where), columns), where)


_FOLDED = {*COLUMNS, *ALSO, *(other for others in _OTHER_NAMES.values() for other in others), *_QUESTIONS} | {
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
        allowed = set() if taken.isdisjoint(_ANSWERED) else {"label", "rating", *_OTHER_NAMES["rating"], *_GRADES}
    ours = {name: "_".join(name.lower().split()) for name in names}
    found = {name: our for name, our in ours.items() if our != name and our in allowed and our not in taken}
    return found if len({*found.values()}) == len(found) else {}


def slip_of(name: str) -> str | None:
    """The column of this reader that `name` is one slip away from; None for a column's own name and any other word."""
    known = (*COLUMNS, *ALSO)
    return None if name in known else next((ours for ours in known if _one_slip(name, ours)), None)


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without nulls (and what pandas writes for them), under this reader's names."""
    names = tuple(
        name
        for name, content in row.items()
        if content is not None and not (type(content) is float and content != content)
    )
    ours = _our_names(names)
    return {ours.get(name, name): row[name] for name in names}


@lru_cache(maxsize=1024)
def _our_names(names: tuple[str, ...]) -> dict[str, str]:
    """Names in a row that stand for one of ours which is absent, to ours. It depends on the set of names alone."""
    ours: dict[str, str] = {}
    taken = set(names)
    for name, others in _OTHER_NAMES.items():
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
        question = next((name for name in _QUESTIONS if name in taken), None)
        if question is not None:
            ours[question] = "prompt"
    scores = next((pair for pair in _SCORES if set(pair) <= taken), None)
    if scores is not None:
        ours |= dict(zip(scores, _SCORES[0], strict=True))
    return ours


def _comparison(row: dict[str, Any], where: str) -> Comparison:
    chosen, rejected = (_listed_answer(row, side, where) for side in ("chosen", "rejected"))
    _refuse_misspelt(row, ("prompt", "weight", "margin"), where)
    if "prompt" not in row and "messages" in row and not (isinstance(chosen, list) and isinstance(rejected, list)):
        row = row | {"prompt": row["messages"]}
    if "prompt" in row:
        asked = _without_answer(_prompt(row, where), (chosen, rejected))
        prompt, chosen, rejected = _after_prompt(row["prompt"], asked, chosen, rejected, where)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _parted(
            messages(chosen, "chosen", where), messages(rejected, "rejected", where), where
        )
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _parted_texts(chosen, rejected, row, where)
    else:
        value(row, "prompt", where, COLUMNS)
        raise AssertionError("a column that is missing is an error")
    return Comparison(
        _with_system(prompt, row, where),
        chosen,
        rejected,
        _group(row, prompt, where),
        weight=_number(row, "weight", 1.0, where, least=0.0),
        margin=_margin(row, where),
        annotator=_annotator(row, where),
        source=_source(row, where),
        tools=_tools(row, where),
    )


def _completion(row: dict[str, Any], where: str) -> Record | Skipped | tuple[float, Rating]:
    if "prompt" not in row and "messages" in row:
        row = row | {"prompt": row["messages"]}
    answer = _listed_answer(row, "completion", where)
    prompt = _without_answer(_prompt(row, where), (answer,))
    _refuse_misspelt(row, ("label", "weight"), where)
    return _judged(row, prompt, _answer(answer, row["prompt"], prompt, where), where)


def _last_turn(row: dict[str, Any], where: str) -> Record | Skipped | tuple[float, Rating]:
    turns = messages(row["messages"], "messages", where)
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(
            "messages does not end with an assistant message",
            where=where,
            allowed="a conversation whose last message is the answer",
            hint="to read it as a prompt: `data.columns: {prompt: messages}`",
        )
    if any(flag in turn for turn in turns for flag in _LEARNED):
        learned = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and _is_learned(turn)]
        if not learned:
            return Skipped("every assistant message has the weight 0", where)
        turns = turns[: learned[-1] + 1]
        turns = tuple({key: part for key, part in turn.items() if key not in _LEARNED} for turn in turns)
    return _judged(row, turns[:-1], completion(turns[-1:]), where)


def _is_learned(turn: Message) -> bool:
    return all(turn.get(flag, 1) for flag in _LEARNED)


def _judged(row: dict[str, Any], prompt: Text, answer: Text, where: str) -> Record | Skipped | tuple[float, Rating]:
    """A demonstration, or a rating where the row says what somebody thought of the answer."""
    group, weight = _group(row, prompt, where), _number(row, "weight", 1.0, where, least=0.0)
    prompt, source, schemas = _with_system(prompt, row, where), _source(row, where), _tools(row, where)
    rated = Rating(prompt, answer, True, group, weight, _annotator(row, where), source, schemas)
    against = next((row[name] for name in _AGAINST if label_of(row.get(name)) is not None), None)
    if against is not None and label_of(against):
        return checked(_labelled(rated, False), where)
    if against is not None and label_of(row.get("label")) is False:
        return Skipped("an answer without a thumb", where)
    if _given(row, "label"):
        label = label_of(row["label"])
        if label is None:
            raise DataError(
                f"label is {row['label']!r:.60}, which is no boolean",
                where=where,
                allowed='true or false, 1 or 0 (or -1), or "yes", "no", "up", "down", "good", "bad"',
                hint="grades on a scale: `data.columns: {rating: label}` with `data.ratings: {up: ..., down: ...}`",
            )
        return checked(_labelled(rated, label), where)
    feedback = next((row[name] for name in _FEEDBACK if label_of(row.get(name)) is not None), None)
    if feedback is None:
        feedback = next((row[name] for name in _YES_OR_NO if _is_boolean(row.get(name))), None)
    if feedback is not None:
        return checked(_labelled(rated, label_of(feedback) is True), where)
    graded = next((name for name in ("rating", *_GRADES) if _given(row, name) and _may_be_grade(name, row[name])), None)
    if graded is not None:
        verdict = row[graded]
        if isinstance(verdict, bool) or (isinstance(verdict, str) and not _is_number(verdict)):
            label = label_of(verdict)
            if label is not None:
                return checked(_labelled(rated, label), where)
        grade = _grade(verdict, where)
        checked(rated, where)
        return grade, rated
    return checked(Demonstration(prompt, answer, group, weight, source, schemas), where)


def _after_prompt(asked: Any, prompt: Text, chosen: Any, rejected: Any, where: str) -> tuple[Text, Text, Text]:
    """The prompt and both answers to it, whatever they repeat of it; `asked` is how the file has the prompt."""
    chosen, rejected = (_without_transcript(side, asked, prompt) for side in (chosen, rejected))
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, *_without_repeat(prompt, chosen, rejected)
    sides = {"chosen": chosen, "rejected": rejected}
    whole = {name: messages(side, name, where) for name, side in sides.items() if not isinstance(side, str)}
    left = {name: _without_prompt(side, prompt) for name, side in whole.items()}
    if len(left) == 2 and isinstance(prompt, str) and all(side[:1] and not _answers(side) for side in left.values()):
        firsts = {content_of(next((m for m in side if m["role"] == "user"), {})).strip() for side in whole.values()}
        if firsts == {prompt.strip()}:  # the conversation begins with a system message before this prompt
            return _parted(whole["chosen"], whole["rejected"], where)
        raise DataError(
            "the conversations in chosen and rejected begin with something else than the prompt",
            where=where,
            allowed="answers to the prompt, or conversations that begin with it",
            hint="`data.columns: {system: prompt}` where the column holds a system message",
        )
    if len(left) == 2:
        shared = _shared(left["chosen"], left["rejected"])
        if shared:
            prompt = (*as_messages(prompt), *left["chosen"][:shared])
            left = {name: side[shared:] for name, side in left.items()}
    answers = [_checked_answer(left[name], name, where) if name in left else str(side) for name, side in sides.items()]
    return prompt, answers[0], answers[1]


def _listed_answer(row: dict[str, Any], name: str, where: str) -> Any:
    """An answer; JSON of messages is read as them unless the prompt is plain text, which may have asked for JSON."""
    answer, asked = value(row, name, where, COLUMNS), row.get("prompt")
    return answer if isinstance(asked, str) and isinstance(listed(asked), str) else listed(answer)


def _answer(content: Any, asked: Any, prompt: Text, where: str) -> Text:
    """A completion given as text, as assistant messages, or as the whole conversation."""
    content = _without_transcript(content, asked, prompt)
    if isinstance(content, str):
        return content
    return _checked_answer(_without_prompt(messages(content, "completion", where), prompt), "completion", where)


def _without_prompt(turns: tuple[Message, ...], prompt: Text) -> tuple[Message, ...]:
    before = as_messages(prompt)
    repeats = len(turns) > len(before) and all(map(_same, turns, before))
    return turns[len(before) :] if repeats else turns


def _same(one: Message, other: Message) -> bool:
    """Whether two messages say the same, whatever is noted beside them (ids, times)."""
    if one == other:
        return True
    said = ({key: turn[key] for key in _SAID if turn.get(key)} for turn in (one, other))
    first, second = ({**turn, "content": content_of(turn).strip()} for turn in said)
    return first == second


def _shared(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many messages two conversations begin with alike; the last of each is its answer."""
    shared = 0
    while shared < min(len(one), len(other)) - 1 and _same(one[shared], other[shared]):
        shared += 1
    return shared


def _parted(one: tuple[Message, ...], other: tuple[Message, ...], where: str) -> tuple[Text, Text, Text]:
    """Conversations split where they part: the prompt, and the turns of each that answer it."""
    shared = _shared(one, other)
    if not shared:
        raise DataError(
            "chosen and rejected share no beginning",
            where=where,
            allowed="a `prompt` column, or conversations that begin alike",
        )
    return (
        one[:shared],
        _checked_answer(one[shared:], "chosen", where),
        _checked_answer(other[shared:], "rejected", where),
    )


def _answers(turns: Sequence[Message]) -> bool:
    return bool(turns) and turns[0]["role"] == turns[-1]["role"] == "assistant"


def _checked_answer(turns: tuple[Message, ...], column: str, where: str) -> Text:
    """Turns that begin and end with the assistant, as a completion."""
    if not _answers(turns):
        roles = ", ".join(part["role"] for part in turns) or "nothing"
        raise DataError(
            f"{column} holds {roles} after the prompt",
            where=where,
            allowed="text, an assistant message, or turns that begin and end with the assistant's",
        )
    return completion(turns)


def _parted_texts(chosen: str, rejected: str, row: dict[str, Any], where: str) -> tuple[Text, Text, Text]:
    """Two texts without a prompt: transcripts, or texts that begin with the same lines (else words)."""
    dialogs = transcript(chosen), transcript(rejected)
    if dialogs[0] and dialogs[1]:
        return _parted(dialogs[0], dialogs[1], where)
    common = next(
        (at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)),
    )
    if chosen == rejected:
        common = 0
    line = chosen.rfind("\n", 0, common)
    word = chosen.rfind(" ", 0, common)
    end = line if chosen[: max(line, 0)].strip() else word if len(chosen[: max(word, 0)].split()) > 1 else -1
    if end < 0:
        value(row, "prompt", where, (*COLUMNS, *ALSO))
    return chosen[:end].strip(), chosen[end:].strip(), rejected[end:].strip()


def _without_repeat(prompt: str, chosen: str, rejected: str) -> tuple[str, str]:
    """Both answers without the prompt, where both unmistakably repeat it: on lines of its own, or as a long one."""
    asked = prompt.strip()
    rest = [side.lstrip()[len(asked) :] for side in (chosen, rejected) if side.lstrip().startswith(asked)]
    if len(rest) < 2 or not asked or not all(part.strip() for part in rest):
        return chosen, rejected
    apart = all(part[0] == "\n" for part in rest)
    if apart or (len(asked.split()) >= _REPEATED_WORDS and all(part[0].isspace() for part in rest)):
        return rest[0].strip(), rest[1].strip()
    return chosen, rejected


def _without_answer(prompt: Text, answers: Sequence[Any]) -> Text:
    """A conversation without its last turn where that is one of the answers to it."""
    if isinstance(prompt, str) or len(prompt) < 2 or prompt[-1]["role"] != "assistant":
        return prompt
    last = content_of(prompt[-1])
    alone = [answer[0] if isinstance(answer, list) and len(answer) == 1 else answer for answer in answers]
    texts = [answer.get("content", answer.get("value")) if isinstance(answer, Mapping) else answer for answer in alone]
    return prompt[:-1] if last.strip() and last in texts else prompt


def _without_transcript(answer: Any, asked: Any, prompt: Text) -> Any:
    """The answer to a prompt that was a transcript, without what it repeats of that and its speaker's mark."""
    if not isinstance(answer, str) or not isinstance(asked, str):
        return answer
    whole = transcript(answer)
    if isinstance(prompt, str):
        repeats = whole is not None and whole[:1] == (message("user", prompt.strip()),) and _answers(whole[1:])
        return [dict(turn) for turn in whole[1:]] if whole is not None and repeats else answer
    if whole and len(whole) > len(prompt) and whole[: len(prompt)] == tuple(prompt):
        return [dict(turn) for turn in whole[len(prompt) :]]
    return answer.removeprefix(asked).strip().removeprefix("Assistant:").strip()


def _prompt(row: dict[str, Any], where: str) -> Text:
    """The prompt: text, or messages where the file has a list, JSON of one or a transcript."""
    if "prompt" not in row and (near := next((name for name in _QUESTIONS if name in row), None)):
        answers = {"completion", "chosen"} & set(row)
        raise DataError(
            "column 'prompt' is missing",
            where=where,
            allowed=f"found columns {', '.join(map(repr, row))}",
            hint=f"`data.columns: {{prompt: {near}}}` reads {near!r} as the prompt"
            + (
                ""
                if answers
                else f", `{{prompt: {near}, completion: ...}}` another column as the answer too, and "
                f"`{{prompt: {near}, chosen: ..., rejected: ...}}` two as the better and the other one"
            ),
        )
    prompt = listed(value(row, "prompt", where, COLUMNS))
    if isinstance(prompt, str):
        turns = transcript_prompt(prompt)
        if turns is None and row.get("history") and _is_history(row["history"]):
            return messages(after_history(row, prompt, where), "history", where)
        return prompt if turns is None else turns
    return messages(prompt, "prompt", where)


def after_history(row: Mapping[str, Any], question: str, where: str) -> Any:
    """The question, as a message after the earlier exchanges where there are some."""
    earlier: list[Any] = []
    for pair in items(row, "history", where) if row.get("history") else []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            wrong_type(pair, "a part of 'history'", "a list of a question and its answer", where)
        earlier += [message("user", pair[0]), message("assistant", pair[1])]
    return [*earlier, message("user", question)] if earlier else question


def _is_history(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in content)


def _is_answered(row: dict[str, Any], where: str) -> bool:
    """True when `messages` goes on from `prompt`, its text being the first that a user says, to an answer."""
    if not isinstance(row["prompt"], str) or not isinstance(listed(row["messages"]), list):
        return False
    turns = messages(row["messages"], "messages", where)
    asked = next((content_of(turn) for turn in turns if turn["role"] == "user"), None)
    return asked is not None and asked.strip() == row["prompt"].strip() and turns[-1]["role"] == "assistant"


def _with_system(prompt: Text, row: dict[str, Any], where: str) -> Text:
    """The prompt with the row's `system` as its first message."""
    if not _given(row, "system") or is_blank(prompt):
        return prompt
    instruction, turns = text(row, "system", where), as_messages(prompt)
    if turns and turns[0]["role"] in ("system", "developer"):
        if content_of(turns[0]) != instruction:
            raise DataError(
                "there is a system message in the conversation and another in the column 'system'",
                where=where,
                allowed="one of them, or the same text in both",
            )
        return prompt
    return (message("system", instruction), *turns)


def _tools(row: dict[str, Any], where: str) -> tuple[Mapping[str, Any], ...] | None:
    return tools(row["tools"], where) if "tools" in row else None


def _margin(row: dict[str, Any], where: str) -> float:
    """`margin`, else the difference of the sides' scores."""
    if not _given(row, "margin") and _given(row, "score_chosen") and _given(row, "score_rejected"):
        return _number(row, "score_chosen", 0.0, where) - _number(row, "score_rejected", 0.0, where)
    return _number(row, "margin", 0.0, where)


def _given(row: dict[str, Any], name: str) -> bool:
    """Whether a row has an optional column; in CSV files an empty cell means that it hasn't."""
    return name in row and not (isinstance(row[name], str) and not row[name].strip())


def _number(row: dict[str, Any], name: str, default: float, where: str, least: float = -math.inf) -> float:
    """An optional number, which CSV files have as text."""
    if name not in row:
        return default
    written = row[name]
    if isinstance(written, str):
        if not written.strip():
            return default
        row = {name: float(written) if _is_number(written) else written}
    return number(row, name, default, where, least)


def _is_number(written: Any) -> bool:
    if not isinstance(written, str):
        return False
    try:
        return math.isfinite(float(written))
    except ValueError:
        return False


def _may_be_grade(name: str, content: Any) -> bool:
    is_number = isinstance(content, int | float) and not isinstance(content, bool)
    return name == "rating" or is_number or _is_number(content)


def _is_boolean(content: Any) -> bool:
    return isinstance(content, bool) or (isinstance(content, str) and content.strip().lower() in ("true", "false"))


def _annotator(row: dict[str, Any], where: str) -> str | None:
    if not _given(row, "annotator"):
        return None
    who = row["annotator"]
    return str(who) if isinstance(who, int) and not isinstance(who, bool) else text(row, "annotator", where)


def _group(row: dict[str, Any], prompt: Text, where: str) -> str:
    if "group" not in row:
        return prompt_group(prompt)
    return text(row, "group", where).strip() or prompt_group(prompt)


def _source(row: dict[str, Any], where: str) -> str:
    return row["source"] if isinstance(row.get("source"), str) and row["source"].isprintable() else where


def _refuse_unreadable(row: dict[str, Any], where: str) -> None:
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


def _refuse_misspelt(row: dict[str, Any], names: tuple[str, ...], where: str) -> None:
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


# ---- Grades ---------------------------------------------------------------------------------------------------------


def _grade(verdict: Any, where: str) -> float:
    """A grade as a number: given as one, as text of one, or as a list of several raters', whose mean counts."""
    if isinstance(verdict, list) and verdict:
        return math.fsum(_grade(part, where) for part in verdict) / len(verdict)
    if isinstance(verdict, Mapping):
        inside = without_nulls(verdict, where)
        verdict = inside.get("rating", inside.get("value", verdict))
    if isinstance(verdict, str) and _is_number(verdict):
        verdict = float(verdict)
    if isinstance(verdict, bool) or not isinstance(verdict, int | float):
        raise DataError(
            f"rating is {verdict!r:.60}, which is no grade",
            where=where,
            allowed="a number, or true and false",
            hint="`data.grades: ignore` reads the answers without their grades",
        )
    return number({"rating": verdict}, "rating", 0.0, where)


def _grades(rows: Iterator[Row | Skipped]) -> Iterator[float]:
    """The grades of the other rows, for a message: from the first that can't be read on, they don't matter."""
    while True:
        try:
            item = next(rows)
            outcome = item if isinstance(item, Skipped) else read_row(item[1], item[0])
        except (StopIteration, DataError):
            return
        if isinstance(outcome, tuple):
            yield outcome[0]


def _no_rule(grades: list[float], where: str) -> NoRule:
    low, high = min(grades), max(grades)
    up, down = low + 0.75 * (high - low), low + 0.25 * (high - low)
    if all(grade == int(grade) for grade in grades):
        up, down = math.ceil(up), math.floor(down)
    known = down < up
    rule = f"data.ratings: {{up: {up:g}, down: {down:g}}}" if known else "data.ratings: {up: ..., down: ...}"
    typed = f"--data.ratings.up {up:g} --data.ratings.down {down:g}" if known else "--data.ratings.up, .down"
    return NoRule(
        f"the answers have grades ({low:g} to {high:g}), and nothing says what becomes of them",
        where=where,
        allowed="`data.ratings` (which are a thumbs up and which a thumbs down), or `data.grades: comparisons` "
        "(of answers to one prompt) or `ignore`",
        hint=f"{rule} in a recipe, {typed} on the command line",
    )


def _rated(grade: float, rating: Rating, rules: LayoutConfig) -> Rating | Skipped:
    assert rules.ratings is not None
    if grade >= rules.ratings.up:
        return rating
    if rules.ratings.down is None or grade <= rules.ratings.down:
        return _labelled(rating, False)
    return Skipped("a grade between ratings.down and ratings.up", rating.source)


def _labelled(rating: Rating, label: bool) -> Rating:
    return Rating(
        rating.prompt,
        rating.completion,
        label,
        rating.group,
        rating.weight,
        rating.annotator,
        rating.source,
        rating.tools,
    )


def _ungraded(rating: Rating) -> Demonstration:
    return Demonstration(rating.prompt, rating.completion, rating.group, rating.weight, rating.source, rating.tools)


def _compared(answers: list[tuple[float, Rating]]) -> Iterator[Record | Skipped]:
    """Every pair of answers to one prompt with different grades; the margin is the difference."""
    if len(answers) < 2:
        yield Skipped("a graded answer whose prompt has no other", answers[0][1].source)
    for first, second in combinations(answers, 2):
        (high, better), (low, worse) = (first, second) if first[0] >= second[0] else (second, first)
        if math.isclose(high, low):
            yield Skipped("equal grades", better.source)
        else:
            yield Comparison(
                better.prompt,
                better.completion,
                worse.completion,
                better.group,
                weight=better.weight,
                margin=high - low,
                source=better.source,
                tools=better.tools,
            )
