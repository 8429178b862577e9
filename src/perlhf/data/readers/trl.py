"""Reader of the columns that TRL uses: prompt, chosen, rejected, completion, label, messages.

Every other layout of people's own files becomes rows of these columns first (layouts.py, exports.py), so that prompts,
answers, grades and labels are read in one place.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from perlhf.config.stages import LayoutConfig
from perlhf.data.fields import (
    TIE,
    MissingColumn,
    Row,
    Skipped,
    Told,
    checked,
    is_blank,
    label_of,
    message,
    prompt_group,
    text,
    value,
)
from perlhf.data.readers.answers import (
    after_prompt,
    answer_to,
    is_answered,
    listed_answer,
    parted,
    parted_texts,
    prompt_of,
    without_answer,
)
from perlhf.data.readers.columns import (
    AGAINST,
    COLUMNS,
    FEEDBACK,
    GRADES,
    OTHER_NAMES,
    YES_OR_NO,
    given,
    is_number,
    optional_number,
    our_columns,
    refuse_misspelt,
    refuse_unreadable,
    safety_of,
    with_mapping,
)
from perlhf.data.readers.grades import (
    VERDICTS,
    by_rule,
    compared,
    grade_of,
    labelled,
    margin_of,
    may_be_grade,
    no_rule,
    no_rule_for_safety,
    refuse_verdict_inside,
    ungraded,
)
from perlhf.data.readers.messages import (
    as_messages,
    completion,
    messages,
    tools,
    transcript,
)
from perlhf.data.records import Comparison, Demonstration, Message, Prompt, Rating, Record, Text, content_of
from perlhf.errors import DataError

_LEARNED = ("weight", "loss", "train")
"""Keys of a message that say whether it is learned: OpenAI's, ms-swift's, axolotl's."""
_EARLIER = "conversations have earlier answers, of which only the last is trained (`data.turns: all` trains each)"
_UNFILLED = "answers have an empty label or rating and are read as demonstrations"
_UNUSED = "rows have {name!r} beside 'prompt', which isn't asked (`data.columns: {{{names}}}` asks both)"
_UNGRADED = "rows have several {name!r} and nothing that grades or ranks each: they are read as prompts alone"
_SEVERAL = ("responses", "completions", "generations")
_TOLD = frozenset(("input", "context", *_SEVERAL))
_MISSING = ("column 'prompt' is missing", "column 'completion' is missing")
_BESIDE = frozenset(("system", "tools", "group", "source", "weight", "margin", "annotator"))
_BESIDE |= {"score_chosen", "score_rejected", "rating", "scores", "status", "winner", "preference", "verdict", "label"}
"""What a comparison may have beside its texts."""
_USED_BY_PROMPTS = {*COLUMNS, "system", *OTHER_NAMES["system"], "tools", "functions"}

Outcome = Record | Skipped | tuple[float, Rating] | list[Record | Skipped]
Made = dict[str, Any] | Skipped
"""A row of these columns, or why there is none."""


def trl(rows: Iterable[Row | Skipped], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """Files with TRL's column names; each row by itself decides what it is.

    Rule: `chosen` and `rejected` make a comparison; `completion` (or `response`) with `label` a rating; `completion`
    alone, or `messages`, a demonstration (of the last turn, or with `data.turns: all` one of each answer that has no
    `weight` 0); `prompt` alone a prompt, with all other columns for reward
    functions. Text may be a string (a single user message), a list of chat messages, or JSON of one. Whole
    conversations in `chosen` and `rejected` are split where they part: what is common is the prompt, the turns that
    follow are the answers; one that repeats the prompt loses it, and a prompt that is their last question alone becomes
    what they begin with. Texts without `prompt` are split after the lines
    (else, as TRL does, the words) that both begin with. A prompt that is a transcript (`Human: ... Assistant:`) becomes
    turns. `system` becomes the system message; `tools` and other keys of messages go to the chat template. A `rating`
    (`stars`, `score`, `reward`) beside a completion needs `data.ratings` or `data.grades`, a judgement of its safety
    (`is_safe`, `response_harm_label`) a name in `data.columns`. `margin`, or the difference
    of `score_chosen` and `score_rejected`, or of the two numbers of a `rating`: equal ones are a tie (`data.ties`), as
    is what a `status` or `winner` calls one. Optional: `weight`, `annotator`, `group` (default: the first user turn). A
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
        outcome = read_row(row, where, rules)
        if not _TOLD.isdisjoint(row) or None in row.values() or "" in row.values():
            yield from _told(row, outcome, where)
        if isinstance(outcome, list):
            yield from outcome
            continue
        if not isinstance(outcome, tuple):
            yield outcome
            continue
        grade, rating = outcome
        if rules.grades == "comparisons":
            graded.setdefault(repr((rating.prompt, rating.tools)), []).append((grade, rating))
        elif rules.grades == "ignore":
            yield ungraded(rating)
        elif rules.ratings is None:
            raise no_rule([grade, *_grades(rows)], where)
        else:
            yield by_rule(grade, rating, rules)
    for answers in graded.values():
        yield from compared(answers)


def _told(row: dict[str, Any], outcome: Outcome, where: str) -> Iterator[Told]:
    """What users of a row may have meant otherwise."""
    if isinstance(outcome, Skipped):
        return
    if isinstance(outcome, Prompt):
        name = next((name for name in _SEVERAL if isinstance(row.get(name), list) and len(row[name]) > 1), None)
        if name is not None:
            yield Told(_UNGRADED.format(name=name), where)
        return
    if "prompt" in row:
        for name in ("input", "context"):
            if isinstance(row.get(name), str) and row[name].strip():
                names = "instruction: prompt" + (", output: completion" if "completion" in row else "")
                yield Told(_UNUSED.format(name=name, names=names), where)
    if isinstance(outcome, Demonstration) and _unfilled(row):
        yield Told(_UNFILLED, where)


def _unfilled(row: Mapping[str, Any]) -> list[str]:
    """Columns of a verdict that a row has and leaves empty."""
    return [name for name in VERDICTS if row.get(name, "given") in (None, "")]


def read_row(row: dict[str, Any], where: str, rules: LayoutConfig) -> Outcome:
    """What one row of these columns is; a grade comes with a rating whose label isn't known yet.

    Raises:
        DataError: a column is missing, misspelt or holds something else.
    """
    ours = our_columns(row)
    refuse_unreadable(ours, where)
    try:
        return _record(ours, row, where, rules)
    except MissingColumn as error:
        if error.what not in _MISSING:
            raise
        raise with_mapping(error, row, where) from error


def _record(row: dict[str, Any], whole: dict[str, Any], where: str, rules: LayoutConfig) -> Outcome:
    """What a row is; `whole` has the file's own names of columns."""
    if "chosen" in row or "rejected" in row:
        return _comparison(row, where)
    if "completion" in row or ("label" in row and "messages" not in row):
        return _completion(row, where, rules)
    if "messages" in row and ("prompt" not in row or is_answered(row, where)):
        return _conversation(row, where, rules)
    refuse_misspelt(row, ("chosen", "rejected", "completion", "label", "messages"), where)
    if "prompt" not in row and isinstance(row.get("text"), str) and (turns := transcript(row["text"])):
        return _conversation(row | {"messages": list(turns)}, where, rules)
    prompt = prompt_of(row, where)
    columns = {name: content for name, content in whole.items() if name not in _USED_BY_PROMPTS}
    group, source = _group(row, prompt, where), _source(row, where)
    return checked(Prompt(_with_system(prompt, row, where), group, source, _tools(row, where), columns), where)


def _comparison(row: dict[str, Any], where: str) -> Outcome:
    chosen, rejected = listed_answer(row, "chosen", where), listed_answer(row, "rejected", where)
    refuse_misspelt(row, ("prompt", "weight", "margin"), where)
    if "prompt" not in row and "messages" in row and not (isinstance(chosen, list) and isinstance(rejected, list)):
        row = row | {"prompt": row["messages"]}
    if "prompt" in row:
        asked = without_answer(prompt_of(row, where), (chosen, rejected))
        prompt, chosen, rejected = after_prompt(row["prompt"], asked, chosen, rejected, where)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = parted(
            messages(chosen, "chosen", where), messages(rejected, "rejected", where), where
        )
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = parted_texts(chosen, rejected, row, where)
    else:
        value(row, "prompt", where, COLUMNS)
        raise AssertionError("a column that is missing is an error")
    if _BESIDE.isdisjoint(row):
        return checked(Comparison(prompt, chosen, rejected, prompt_group(prompt), source=where), where)
    margin = margin_of(row, where)
    if margin is None:
        return Skipped(TIE, where)
    comparison = Comparison(
        _with_system(prompt, row, where),
        chosen,
        rejected,
        _group(row, prompt, where),
        weight=optional_number(row, "weight", 1.0, where, least=0.0),
        margin=margin,
        annotator=_annotator(row, where),
        source=_source(row, where),
        tools=_tools(row, where),
    )
    return checked(comparison, where)


def _completion(row: dict[str, Any], where: str, rules: LayoutConfig) -> Outcome:
    if "prompt" not in row and "messages" in row:
        row = row | {"prompt": row["messages"]}
    answer = listed_answer(row, "completion", where)
    prompt = without_answer(prompt_of(row, where), (answer,))
    refuse_misspelt(row, ("label", "weight"), where)
    return _judged(row, *answer_to(answer, row["prompt"], prompt, where), where, rules)


def _conversation(row: dict[str, Any], where: str, rules: LayoutConfig) -> Outcome:
    """The last answer of a conversation, or by `data.turns` each that is learned after the user's first turn."""
    turns = messages(row["messages"], "messages", where)
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(
            "messages does not end with an assistant message",
            where=where,
            allowed="a conversation whose last message is the answer",
            hint="to read it as a prompt: `data.columns: {prompt: messages}`",
        )
    *earlier, last = [
        at for at, turn in enumerate(turns) if turn["role"] == "assistant" and _is_learned(turn, where)
    ] or [-1]
    if last < 0:
        return Skipped("every assistant message has the weight 0", where)
    if any(flag in turn for turn in turns for flag in _LEARNED):
        turns = tuple({key: part for key, part in turn.items() if key not in _LEARNED} for turn in turns)
    outcome = _judged(row, turns[:last], completion(turns[last : last + 1]), where, rules)
    asked = next((at for at, turn in enumerate(turns) if turn["role"] == "user"), last)
    earlier = [at for at in earlier if at > asked and not is_blank(turns[at : at + 1])]
    if not earlier or not isinstance(outcome, Demonstration):
        return outcome
    if rules.turns == "last":
        return [outcome, Told(_EARLIER, where)]
    answered = (_judged(row, turns[:at], completion(turns[at : at + 1]), where, rules) for at in earlier)
    return [*(one for one in answered if isinstance(one, Demonstration)), outcome]


def _is_learned(turn: Message, where: str) -> bool:
    """Whether no key of a message says that it isn't learned.

    Raises:
        DataError: one holds something between yes and no, which a single message can't be.
    """
    verdicts = {flag: label_of(turn[flag]) for flag in _LEARNED if flag in turn}
    for flag, learned in verdicts.items():
        if learned is None:
            raise DataError(
                f"a message has the {flag} {turn[flag]!r:.40}",
                where=where,
                allowed="0 or 1, true or false: a message is learned or it isn't",
                hint="a column 'weight' beside the messages weighs a whole record",
            )
    return all(verdicts.values())


def _judged(row: dict[str, Any], prompt: Text, answer: Text, where: str, rules: LayoutConfig) -> Outcome:
    """A demonstration, or a rating where the row says what somebody thought of the answer."""
    group, weight = _group(row, prompt, where), optional_number(row, "weight", 1.0, where, least=0.0)
    prompt, source, schemas = _with_system(prompt, row, where), _source(row, where), _tools(row, where)
    rated = Rating(prompt, answer, True, group, weight, _annotator(row, where), source, schemas)
    against = next((row[name] for name in AGAINST if label_of(row.get(name)) is not None), None)
    if against is not None and label_of(against):
        return checked(labelled(rated, False), where)
    if against is not None and label_of(row.get("label")) is False:
        return Skipped("an answer without a thumb", where)
    if given(row, "label"):
        label = label_of(row["label"])
        if label is None:
            raise DataError(
                f"label is {row['label']!r:.60}, which is no boolean",
                where=where,
                allowed='true or false, 1 or 0 (or -1), or "yes", "no", "up", "down", "good", "bad"',
                hint="grades on a scale: `data.columns: {rating: label}` with `data.ratings: {up: ..., down: ...}`",
            )
        return checked(labelled(rated, label), where)
    feedback = next((row[name] for name in FEEDBACK if label_of(row.get(name)) is not None), None)
    if feedback is None:
        feedback = next((row[name] for name in YES_OR_NO if _is_boolean(row.get(name))), None)
    if feedback is not None:
        return checked(labelled(rated, label_of(feedback) is True), where)
    graded = next((name for name in ("rating", *GRADES) if given(row, name) and may_be_grade(name, row[name])), None)
    if graded is not None:
        verdict = row[graded]
        if isinstance(verdict, bool) or (isinstance(verdict, str) and not is_number(verdict)):
            label = label_of(verdict)
            if label is not None:
                return checked(labelled(rated, label), where)
        grade = grade_of(verdict, where)
        checked(rated, where)
        return grade, rated
    if rules.grades != "ignore" and (safety := safety_of(row)) is not None:
        raise no_rule_for_safety(safety[0], row[safety[0]], safety[1], where)
    if not isinstance(answer, str):
        refuse_verdict_inside(answer[-1], where)
    return checked(Demonstration(prompt, answer, group, weight, source, schemas), where)


def _with_system(prompt: Text, row: dict[str, Any], where: str) -> Text:
    """The prompt with the row's `system` as its first message."""
    if not given(row, "system") or is_blank(prompt):
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


def _is_boolean(content: Any) -> bool:
    return isinstance(content, bool) or (isinstance(content, str) and content.strip().lower() in ("true", "false"))


def _annotator(row: dict[str, Any], where: str) -> str | None:
    if not given(row, "annotator"):
        return None
    who = row["annotator"]
    return str(who) if isinstance(who, int) and not isinstance(who, bool) else text(row, "annotator", where)


def _group(row: dict[str, Any], prompt: Text, where: str) -> str:
    if "group" not in row:
        return prompt_group(prompt)
    return text(row, "group", where).strip() or prompt_group(prompt)


def _source(row: dict[str, Any], where: str) -> str:
    return row["source"] if isinstance(row.get("source"), str) and row["source"].isprintable() else where


def _grades(rows: Iterator[Row | Skipped]) -> Iterator[float]:
    """The grades of the other rows, for a message: from the first that can't be read on, they don't matter."""
    while True:
        try:
            item = next(rows)
            outcome = item if isinstance(item, Skipped) else read_row(item[1], item[0], LayoutConfig())
        except (StopIteration, DataError):
            return
        if isinstance(outcome, tuple):
            yield outcome[0]


def made_rows(rows: Iterable[Row], make: Callable[[dict[str, Any], str], Made | list[Made]]) -> Iterator[Row | Skipped]:
    """Rows of TRL's columns; `make` gives one or several of a row, or says why it is left out."""
    for where, row in rows:
        unfilled = dict.fromkeys(_unfilled(row)) if None in row.values() else None
        row = {name: content for name, content in row.items() if content is not None}
        made = make(row, where)
        for one in made if isinstance(made, list) else [made]:
            yield one if isinstance(one, Skipped) else (where, unfilled | one if unfilled else one)


def without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The row without these columns."""
    return {name: content for name, content in row.items() if name not in names}
