"""Readers of the layouts that people's own files have: each makes rows of TRL's columns, which `trl` then reads.

ShareGPT, Alpaca, ms-swift, OpenAI. Judged answers are in judged.py.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from perlhf.config.stages import LayoutConfig
from perlhf.data.fields import Row, Skipped, decoded, message, text, value
from perlhf.data.readers.answers import INSTRUCTION, after_history, instruction_of
from perlhf.data.readers.judged import VERDICTS, pair_of, pair_row
from perlhf.data.readers.messages import listed, messages
from perlhf.data.readers.trl import Made, made_rows, trl, without
from perlhf.data.records import Record
from perlhf.errors import DataError


def sharegpt(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """ShareGPT's turns, as LLaMA-Factory and axolotl read them: `conversations` of `from` and `value`.

    Rule: human and user are the user, gpt the assistant, observation and tool a tool; a `function_call` is an
    assistant's tool call, its value JSON of a name and arguments. The last turn of gpt is the completion; a
    conversation that doesn't end with one is skipped (`data.turns: all` makes a demonstration of each). `chosen` and
    `rejected` (a turn, text, or the whole conversation) make a comparison with the turns as prompt, without an answer
    that they end with; `kto_tag` or `label` a rating. `system` and `tools` may stand beside the turns, which may be
    messages with `role` and `content`, pairs of `input` and `output`, or texts of the user and the assistant in
    turn. Group: first user turn.
    """
    yield from trl(made_rows(rows, _sharegpt_row), rules)


def alpaca(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """Alpaca's columns: `instruction`, `input` and `output` (or Dolly's `context` and `response`).

    Rule: the prompt is the instruction, a line break and the input, after the pairs of `history` and the `system`
    message. `output` is the completion: a demonstration, or a rating where `kto_tag`, `label` or a grade stands beside
    it. `chosen` and `rejected`, or an `output` of two texts of which the first is better, make a comparison; without an
    answer the row is a prompt. Group: first user turn.
    """
    yield from trl(made_rows(rows, _alpaca_row), rules)


def swift(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """ms-swift's columns: `messages` with `rejected_response`, `rejected_messages` or `label`; `query` and `response`.

    Rule: the last message is the chosen answer, and the rejected one takes its place; `rejected_messages` is the whole
    other conversation. `messages` with `label` is a rating of the last message. `query` comes after the pairs of
    `history` and the `system` message, and `response` is the completion. Group: first user turn.
    """
    yield from trl(made_rows(rows, _swift_row), rules)


def openai(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """OpenAI's files: preferences (`input`, `preferred_output`, `non_preferred_output`) and fine-tuning (`messages`).

    Rule: the prompt is `input.messages`, with `input.tools`. Of `messages`, the last one of the assistant whose
    `weight` isn't 0 is the completion (with `data.turns: all` each is one, as OpenAI trains them); `functions` and
    `function_call` are read as `tools` and `tool_calls`. Group: first user turn.
    """
    yield from trl(made_rows(rows, _openai_row), rules)


def by_columns(row: dict[str, Any], where: str) -> Made:
    """A row of any of these layouts as one of TRL's columns."""
    if pair_of(row) is not None and any(name in row for name in VERDICTS):
        return pair_row(row, where)
    if "conversations" in row:
        return _sharegpt_row(row, where)
    if "instruction" in row and "prompt" not in row:
        return _alpaca_row(row, where)
    return row


def _sharegpt_row(row: dict[str, Any], where: str) -> Made:
    column = next((name for name in ("conversations", "conversation") if name in row), "conversations")
    turns = decoded(value(row, column, where))
    if isinstance(turns, list) and all(isinstance(turn, dict) and {"input", "output"} <= turn.keys() for turn in turns):
        turns = [message(*part) for turn in turns for part in _exchange(turn, where, turn is turns[-1])]
    if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):  # as in LIMA
        turns = [message(("user", "assistant")[at % 2], str(turn)) for at, turn in enumerate(turns)]
    rest = without(row, column)
    if "chosen" in row and "rejected" in row:
        return rest if "prompt" in row else rest | {"prompt": _unanswered(turns, row, column, where)}
    rest = without(rest, "prompt", "messages")
    if "completion" in row:
        return rest | {"prompt": turns}
    built = messages(turns, column, where)
    if not built or built[-1]["role"] != "assistant":
        return Skipped("a conversation that doesn't end with an answer", where)
    return rest | {"messages": [dict(turn) for turn in built]}


def _unanswered(turns: Any, row: dict[str, Any], column: str, where: str) -> Any:
    """The turns that `chosen` and `rejected` answer: without a last answer, whose place those take."""
    built = [dict(turn) for turn in messages(turns, column, where)]
    sides = [listed(row[name]) for name in ("chosen", "rejected")]
    begins = [side if isinstance(side, str) else messages(side, "chosen", where)[:1] for side in sides]
    answers = all(isinstance(begin, str) or (begin and begin[0]["role"] == "assistant") for begin in begins)
    return built[:-1] if answers and len(built) > 1 and built[-1]["role"] == "assistant" else built


def _exchange(turn: dict[str, Any], where: str, last: bool) -> list[tuple[str, str]]:
    """A question and its answer, which the last one may lack."""
    system = [("system", text(turn, "system", where))] if turn.get("system") else []
    asked = [*system, ("user", text(turn, "input", where))]
    return asked if last and turn["output"] is None else [*asked, ("assistant", text(turn, "output", where))]


def _alpaca_row(row: dict[str, Any], where: str) -> Made:
    rest = without(row, *INSTRUCTION, "output", "response", "history", "prompt", "text")
    made = rest | {"prompt": after_history(row, instruction_of(row, where), where)}
    answer = row.get("output", row.get("response"))
    if "chosen" in row or "rejected" in row or answer is None:
        return made
    if isinstance(answer, list) and len(answer) == 2 and all(isinstance(part, str) for part in answer):
        return made | {"chosen": answer[0], "rejected": answer[1]}
    return _answered(without(made, "completion"), answer)


def _answered(made: dict[str, Any], answer: Any) -> dict[str, Any]:
    """A row with its answer; after a history it is one conversation, whose earlier answers `data.turns` may train."""
    if isinstance(made["prompt"], list) and isinstance(answer, str):
        return without(made, "prompt") | {"messages": [*made["prompt"], message("assistant", answer)]}
    return made | {"completion": answer}


def _swift_row(row: dict[str, Any], where: str) -> Made:
    rest = without(row, "rejected_response", "rejected_messages", "query", "history")
    if "messages" not in row:
        made = rest | {"prompt": after_history(row, text(row, "query", where), where)}
        if "rejected_response" not in row:
            judged = "rejected" in row or "completion" in row or "response" not in row
            return made if judged else _answered(without(made, "response"), row["response"])
        return without(made, "response") | {
            "chosen": value(row, "response", where),
            "rejected": row["rejected_response"],
        }
    if "rejected_response" not in row and "rejected_messages" not in row:
        return rest
    turns = [dict(turn) for turn in messages(row["messages"], "messages", where)]
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(
            "messages does not end with an assistant message",
            where=where,
            allowed="a conversation whose last message is the chosen answer",
        )
    rest = without(rest, "messages")
    if "rejected_messages" in row:
        return rest | {"chosen": turns, "rejected": row["rejected_messages"]}
    return rest | {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": row["rejected_response"]}


def _openai_row(row: dict[str, Any], where: str) -> Made:
    if "input" not in row:
        return row
    rest = without(row, "input")
    for ours, theirs in (("chosen", "preferred"), ("rejected", "non_preferred")):
        name = next((name for name in (f"{theirs}_output", f"{theirs}_completion") if name in row), f"{theirs}_output")
        rest[ours] = value(row, name, where)
        rest.pop(name)
    given = listed(row["input"])
    if not isinstance(given, dict):
        return rest | {"prompt": given}
    asked = {name: content for name, content in given.items() if content is not None}
    kept = {name: asked[name] for name in ("tools", "functions") if name in asked}
    return rest | kept | {"prompt": value(asked, "messages", where)}
