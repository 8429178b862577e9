"""A prompt and the answers to it, whatever they repeat of it: whole conversations, transcripts, the prompt itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from perlhf.data.fields import items, message, text, value, wrong_type
from perlhf.data.readers.columns import ALSO, COLUMNS
from perlhf.data.readers.messages import (
    as_messages,
    completion,
    line_transcript,
    listed,
    messages,
    transcript,
    transcript_prompt,
)
from perlhf.data.records import Message, Text, content_of
from perlhf.errors import DataError

INSTRUCTION = ("instruction", "input", "context")
_SAID = ("role", "content", "tool_calls", "reasoning_content")
_SYSTEM = ("system", "developer")
_REPEATED_WORDS = 4
"""Least words of a prompt that both answers repeat on their first line for it to be cut off."""


def after_prompt(asked: Any, prompt: Text, chosen: Any, rejected: Any, where: str) -> tuple[Text, Text, Text]:
    """The prompt and both answers to it, whatever they repeat of it; `asked` is how the file has the prompt."""
    chosen, rejected = _without_transcript(chosen, asked, prompt), _without_transcript(rejected, asked, prompt)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, *_without_repeat(prompt, chosen, rejected)
    sides = {"chosen": chosen, "rejected": rejected}
    whole = {name: messages(side, name, where) for name, side in sides.items() if not isinstance(side, str)}
    left = {name: _without_prompt(side, prompt) for name, side in whole.items()}
    if len(left) == 2 and all(side[:1] and not _answers(side) for side in left.values()):
        found = _whole_conversations(prompt, whole["chosen"], whole["rejected"], where)
        if found is not None:
            return found
    if len(left) == 2:
        shared = _shared(left["chosen"], left["rejected"])
        if shared:
            prompt = (*as_messages(prompt), *left["chosen"][:shared])
            left = {name: side[shared:] for name, side in left.items()}
    answers = [_checked_answer(left[name], name, where) if name in left else str(side) for name, side in sides.items()]
    return prompt, answers[0], answers[1]


def listed_answer(row: dict[str, Any], name: str, where: str) -> Any:
    """An answer; JSON of messages is read as them unless the prompt is plain text, which may have asked for JSON."""
    answer, asked = value(row, name, where, COLUMNS), row.get("prompt")
    return answer if isinstance(asked, str) and isinstance(listed(asked), str) else listed(answer)


def answer_to(content: Any, asked: Any, prompt: Text, where: str) -> tuple[Text, Text]:
    """The prompt, and a completion given as text, as assistant messages, or as the whole conversation."""
    content = _without_transcript(content, asked, prompt)
    if isinstance(content, str):
        return prompt, content
    turns = messages(content, "completion", where)
    left = _without_prompt(turns, prompt)
    if left and not _answers(left):
        end = _asked_until(turns, prompt, len(turns) - 1)
        if end is not None:
            return _with_system_of(prompt, turns[:end], where), _checked_answer(turns[end:], "completion", where)
    return prompt, _checked_answer(left, "completion", where)


def _whole_conversations(
    prompt: Text, chosen: tuple[Message, ...], rejected: tuple[Message, ...], where: str
) -> tuple[Text, Text, Text] | None:
    """Conversations that repeat the prompt, split where they part; None where they go on from it.

    What they repeat are its first turns, or, of a prompt that is the newest question alone, the last turns before they
    part. An answer that the prompt ends with is neither of the two.

    Raises:
        DataError: they begin with something else than the prompt.
    """
    shared = _shared(chosen, rejected)
    if all(_asked_until(side, prompt, shared) is not None for side in (chosen, rejected)):
        common, *answers = parted(chosen, rejected, where)
        return _with_system_of(prompt, as_messages(common), where), answers[0], answers[1]
    first, begun = (
        next((content_of(turn).strip() for turn in turns if turn["role"] == "user"), None)
        for turns in (as_messages(prompt), chosen)
    )
    if not isinstance(prompt, str) and (first is None or first != begun):
        return None
    raise DataError(
        "the conversations in chosen and rejected begin with something else than the prompt",
        where=where,
        allowed="answers to the prompt, or conversations that begin with it or have it as their last question",
        hint="where the conversations say all, take out the column of the prompt"
        + (
            " (`data.columns: {unused: prompt}`); where it holds a system message: `data.columns: {system: prompt}`"
            if isinstance(prompt, str)
            else ""
        ),
    )


def _asked_until(turns: Sequence[Message], prompt: Text, last: int) -> int | None:
    """Where in a conversation that repeats the prompt its turns end; None where it doesn't.

    Args:
        last: where they end if they aren't the first ones.
    """
    begin = sum(turn["role"] in _SYSTEM for turn in turns[:1])
    given = as_messages(prompt)
    asked = given[sum(turn["role"] in _SYSTEM for turn in given[:1]) :]
    asked = asked[:-1] if asked and asked[-1]["role"] == "assistant" else asked
    for at in (begin, last - len(asked)) if asked else ():
        end = at + len(asked)
        if begin <= at and end < len(turns) and all(map(_same, turns[at:end], asked)):
            return end
    return None


def _with_system_of(prompt: Text, turns: tuple[Message, ...], where: str) -> Text:
    """Turns that take the place of a prompt, with its system message where they have none."""
    first = as_messages(prompt)[0]
    if first["role"] not in _SYSTEM or _same(first, turns[0]):
        return turns
    if turns[0]["role"] in _SYSTEM:
        raise DataError(
            "there is a system message in the prompt and another in the conversation that answers it",
            where=where,
            allowed="one of them, or the same text in both",
        )
    return (first, *turns)


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


def parted(one: tuple[Message, ...], other: tuple[Message, ...], where: str) -> tuple[Text, Text, Text]:
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


def parted_texts(chosen: str, rejected: str, row: dict[str, Any], where: str) -> tuple[Text, Text, Text]:
    """Two texts without a prompt: transcripts, or texts that begin with the same lines (else words)."""
    dialogs = transcript(chosen), transcript(rejected)
    if not (dialogs[0] and dialogs[1]):
        dialogs = line_transcript(chosen), line_transcript(rejected)
    if dialogs[0] and dialogs[1]:
        return parted(dialogs[0], dialogs[1], where)
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
    if not asked or not chosen.lstrip().startswith(asked) or not rejected.lstrip().startswith(asked):
        return chosen, rejected
    rest = [side.lstrip()[len(asked) :] for side in (chosen, rejected)]
    if not all(part.strip() for part in rest):
        return chosen, rejected
    apart = all(part[0] == "\n" for part in rest)
    if apart or (len(asked.split()) >= _REPEATED_WORDS and all(part[0].isspace() for part in rest)):
        return rest[0].strip(), rest[1].strip()
    return chosen, rejected


def without_answer(prompt: Text, answers: Sequence[Any]) -> Text:
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
        if whole is None:
            return answer
        repeats = whole[:1] == (message("user", prompt.strip()),) and _answers(whole[1:])
        return [dict(turn) for turn in whole[1:]] if repeats else answer
    if whole and len(whole) > len(prompt) and whole[: len(prompt)] == tuple(prompt):
        return [dict(turn) for turn in whole[len(prompt) :]]
    return answer.removeprefix(asked).strip().removeprefix("Assistant:").strip()


def prompt_of(row: dict[str, Any], where: str) -> Text:
    """The prompt: text, or messages where the file has a list, JSON of one or a transcript."""
    prompt = listed(value(row, "prompt", where, COLUMNS))
    if isinstance(prompt, str):
        turns = transcript_prompt(prompt)
        if turns is None and row.get("history") and _is_history(row["history"]):
            return messages(after_history(row, prompt, where), "history", where)
        return prompt if turns is None else turns
    return messages(prompt, "prompt", where)


def instruction_of(row: Mapping[str, Any], where: str) -> str:
    """An instruction and what it is about, as Alpaca's columns have them: `instruction`, then `input` or `context`."""
    asked = [row[name] for name in INSTRUCTION if isinstance(row.get(name), str) and row[name].strip()]
    return "\n".join(asked) or text(row, "instruction", where)


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


def is_answered(row: dict[str, Any], where: str) -> bool:
    """True when `messages` goes on from `prompt`, its text being the first that a user says, to an answer."""
    if not isinstance(row["prompt"], str) or not isinstance(listed(row["messages"]), list):
        return False
    turns = messages(row["messages"], "messages", where)
    asked = next((content_of(turn) for turn in turns if turn["role"] == "user"), None)
    return asked is not None and asked.strip() == row["prompt"].strip() and turns[-1]["role"] == "assistant"
