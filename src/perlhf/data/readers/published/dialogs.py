"""Readers of published dialogs: Taskmaster (ratings and demonstrations), Anthropic HH, HHH, OASST trees.

Agent turns become `assistant` messages, API results `tool` messages. An API call or result is the JSON text of its
object.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from perlhf.data.fields import (
    Row,
    Skipped,
    choice,
    group_key,
    is_blank,
    items,
    json_text,
    label_of,
    mapping,
    message,
    numeric,
    parse_json,
    prompt_group,
    text,
    value,
    wrong_type,
)
from perlhf.data.records import Comparison, Demonstration, Message, Rating, Record
from perlhf.errors import DataError

COFFEE_GREETING = (
    "Welcome to the Coffee Bar where you can order coffee, tea, espresso, and other drinks ahead of time. "
    "What can I get for you?"
)
"""How every conversation of the coffee reward files opens; the dialogs of the same set start after it."""

_TASKMASTER_ROLES = {"user": "user", "agent": "assistant", "api": "tool"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HHH_PARTS = re.compile(
    r"###The instruction to evaluate:\n(?P<instruction>.*?)\n\n"
    r"###Response to evaluate:\n(?P<response>.*?)\n\n###Score Rubric",
    re.DOTALL,
)
_TSV_MARK = re.compile(r"[<\[](U|A|PN|PAN|PAV|PR|PRAN|PRAV|S)[>\]]")


def taskmaster_rewards(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """Taskmaster reward files: one rating per row.

    Rule: label is `reward` = 1. The turns of `context` are the prompt and `generation` is the completion. Rows with
    an empty context (what was answered isn't known) or an empty generation are skipped. Group: first user turn.
    """
    for where, row in rows:
        context = parse_json(text(row, "context", where), "context", where)
        if not isinstance(context, list):
            wrong_type(context, "context", "a list of turns", where)
        prompt = tuple(_taskmaster_turn(turn, where) for turn in context)
        generation = _taskmaster_turn(parse_json(text(row, "generation", where), "generation", where), where)
        label = choice(row, "reward", (0, 1), where) == 1
        if generation["role"] != "assistant":
            raise DataError(f"generation has the role {generation['role']!r}", where=where, allowed="an agent turn")
        if is_blank(prompt):
            yield Skipped("empty context", where)
        elif is_blank(generation["content"]):
            yield Skipped("empty generation", where)
        else:
            yield Rating(prompt, generation["content"], label, prompt_group(prompt), source=where)


def taskmaster_dialogs(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """Taskmaster TM-4 dialogs: one demonstration per agent turn, API calls included.

    Rule: the API annotations of a user turn become agent and API turns as the reward files write them (result key
    `menu_items` is called `items` there, except by `show_menu`; a call without request has no arguments), and the
    fixed greeting of the reward files opens every prompt, so that the same conversation reads the same in both. A
    request or result with doubled quotes (`""id""`) is mended; one that still isn't JSON ends its dialog there
    (counted as skipped). Group: first user turn.
    """
    for where, row in rows:
        turns: list[Message] = [message("assistant", COFFEE_GREETING)]
        for utterance in items(row, "utterances", where):
            utterance = mapping(utterance, "an utterance", where)
            speaker = choice(utterance, "speaker", ("user", "assistant"), where)
            turns.append(message(speaker, text(utterance, "text", where)))
            calls, broken = _api_turns(
                items(utterance, "annotations", where) if "annotations" in utterance else [], where
            )
            turns.extend(calls)
            if broken:
                yield Skipped("rest of a dialog after a call that isn't JSON", where)
                break
        yield from _every_agent_turn(turns, where)


def taskmaster_tsv(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """Taskmaster TM-3 training rows (`LATEST<C>EARLIER`, target, dialog id): one demonstration per agent act.

    Rule: the dialog is put back in order (what follows `<C>`, then what precedes it) and written as the ticketing
    reward files write it: `{"find_movies": {"name.theater": "..."}}`; a field with several values is a list. A target
    of a sentence and a call gives two demonstrations, the sentence being part of the second one's prompt. Group:
    first user turn.
    """
    for where, row in rows:
        latest, _, earlier = text(row, "source", where).partition("<C>")
        prompt = _marked_turns(earlier, where) + _marked_turns(latest, where)
        target = _marked_turns(text(row, "target", where), where)
        if not target or any(turn["role"] != "assistant" for turn in target):
            raise DataError("the target is no agent act", where=where, allowed="[A]... or [PN]...[PAN]...[PAV]...")
        for number, turn in enumerate(target):
            before = (*prompt, *target[:number])
            if is_blank(turn["content"]) or is_blank(before):
                yield Skipped("empty turn, or nothing before it", where)
            else:
                yield Demonstration(before, turn["content"], prompt_group(before), source=where)


def hh(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """Anthropic HH: `chosen` and `rejected` are whole dialogs; one comparison per row.

    Rule: the completion is what follows the last `Assistant:`, the prompt all before it. Pairs whose prompts differ,
    or with an empty completion, are skipped. Copies without the line breaks that begin a dialog are read
    alike. Group: first human turn.
    """
    for where, row in rows:
        prompt, chosen = _hh_dialog(text(row, "chosen", where), "chosen", where)
        other_prompt, rejected = _hh_dialog(text(row, "rejected", where), "rejected", where)
        if prompt != other_prompt:
            yield Skipped("the prompts of chosen and rejected differ", where)
        elif not chosen or not rejected:
            yield Skipped("empty completion", where)
        else:
            yield Comparison(prompt, chosen, rejected, prompt_group(prompt), source=where)


def hhh(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """HHH alignment: comparisons, unwrapped from the judge prompt that they are published in.

    Rule: earlier turns inside the instruction become messages. Pairs whose instructions differ are skipped. Group:
    first human turn.
    """
    for where, row in rows:
        instruction, chosen = _hhh_parts(row, "chosen_instruction", where)
        other_instruction, rejected = _hhh_parts(row, "rejected_instruction", where)
        prompt = _hh_turns("\n\nHuman: " + instruction, "instruction", where)
        if instruction != other_instruction:
            yield Skipped("the instructions of chosen and rejected differ", where)
        elif not chosen or not rejected:
            yield Skipped("empty completion", where)
        else:
            yield Comparison(prompt, chosen, rejected, prompt_group(prompt), source=where)


def oasst(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """OpenAssistant trees: comparisons between sibling replies, all pairs, by `rank` (0 is best).

    Rule: siblings are used when every one of them has a rank; pairs with a synthetic (model-made) or deleted reply are
    skipped. `margin` is the difference of ranks. Group: first prompt of the tree.
    """
    for where, row in rows:
        root = mapping(value(row, "prompt", where), "column 'prompt'", where)
        group = group_key(text(root, "text", where))
        waiting: list[tuple[dict[str, Any], tuple[Message, ...]]] = [(root, ())]
        while waiting:
            node, before = waiting.pop()
            role = "assistant" if choice(node, "role", ("prompter", "assistant"), where) == "assistant" else "user"
            prompt = (*before, message(role, text(node, "text", where)))
            replies = [
                mapping(reply, "a reply", where)
                for reply in (items(node, "replies", where) if "replies" in node else [])
            ]
            waiting.extend((reply, prompt) for reply in reversed(replies))
            if role == "user":
                yield from _ranked_pairs(prompt, replies, group, where)


def oasst_messages(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """OpenAssistant's messages as the hub has them, one a row: put together to trees, which are read as `oasst`.

    Rule: a message is a reply to the one that its `parent_id` names; one whose parent isn't in the file is skipped with
    all replies to it. The rest is as of `oasst`. Group: first prompt of the tree.
    """
    found: dict[str, Row] = {}
    for where, row in rows:
        number = text(row, "message_id", where)
        if number in found:
            raise DataError(f"message_id {number!r:.60} occurs twice", where=where, allowed="one row of each message")
        if row.get("parent_id") is not None:
            text(row, "parent_id", where)
        found[number] = where, row | {"replies": []}
    trees: list[Row] = []
    for where, row in found.values():
        if row.get("parent_id") is None:
            trees.append((where, {"prompt": row}))
        elif row["parent_id"] in found:
            found[row["parent_id"]][1]["replies"].append(row)
        else:
            yield Skipped("a message whose parent isn't in the file", where)
    yield from oasst(trees)


def _taskmaster_turn(turn: Any, where: str) -> Message:
    turn = mapping(turn, "a turn", where)
    role = choice(turn, "role", tuple(_TASKMASTER_ROLES), where)
    content = next((key for key in ("text", "api", "response") if key in turn), None)
    if content is None:
        raise DataError(
            "a turn has neither text nor api nor response", where=where, allowed="one of text, api, response"
        )
    written = text(turn, "text", where) if content == "text" else json_text(mapping(turn[content], content, where))
    return message(_TASKMASTER_ROLES[role], written)


def _every_agent_turn(turns: list[Message], where: str) -> Iterator[Record | Skipped]:
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in turns):
        yield Skipped("no user turn", where)
        return
    group = prompt_group(turns)
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant" or number == 0:
            continue
        if is_blank(turn["content"]):
            yield Skipped("empty turn", where)
        else:
            yield Demonstration(tuple(turns[:number]), turn["content"], group, source=where)


def _api_turns(annotations: list[Any], where: str) -> tuple[list[Message], bool]:
    """The calls and results of one utterance as messages, and whether one of them couldn't be decoded."""
    turns: list[Message] = []
    names: dict[str, str] = {}
    bodies: dict[str, Any] = {}
    for annotation in annotations:
        annotation = mapping(annotation, "an annotation", where)
        kind = choice(annotation, "name", ("api_call", "request", "api_response", "response"), where)
        content, context = text(annotation, "value", where), text(annotation, "context", where)
        if kind in ("api_call", "api_response"):
            names[context] = content
        else:
            bodies[context] = _mended_json(content)
    for context, name in names.items():
        body = bodies.get(context, {})
        if body is None:
            return turns, True
        if context.startswith("api_response"):
            turns.append(message("tool", json_text({name: _renamed(name, body)})))
        else:
            turns.append(message("assistant", json_text({name: body})))
    return turns, False


def _renamed(name: str, body: Any) -> Any:
    if name == "show_menu" or not isinstance(body, dict):
        return body
    return {("items" if key == "menu_items" else key): part for key, part in body.items()}


def _mended_json(encoded: str) -> Any:
    """The decoded value; None when it isn't JSON even with doubled quotes made single."""
    for attempt in (encoded, encoded.replace('""', '"')):
        try:
            return json.loads(attempt, strict=False)
        except (ValueError, RecursionError):
            continue
    return None


def _marked_turns(marked: str, where: str) -> list[Message]:
    """Messages of `<U>..<A>..<PN>..<PAN>..<PAV>..<PR>..<PRAN>..<PRAV>..` (or the same in square brackets)."""
    parts = _TSV_MARK.split(marked)
    if parts[0].strip():
        raise DataError(
            f"text before the first marker: {parts[0][:30]!r}",
            where=where,
            allowed="<U>, <A>, <PN>, <PR>, <S> or the same in [ ]",
        )
    turns: list[tuple[str, str, dict[str, list[str]]]] = []
    field = ""
    for mark, content in zip(parts[1::2], parts[2::2], strict=True):
        content = content.replace("\\n", "\n").strip()
        if mark in ("U", "A", "PN", "PR"):
            turns.append((mark, content, {}))
        elif mark in ("PAN", "PRAN", "PAV", "PRAV"):
            if not turns or turns[-1][0] not in ("PN", "PR"):
                raise DataError(f"<{mark}> outside a call", where=where, allowed="after <PN> or <PR>")
            field = content if mark.endswith("AN") else field
            turns[-1][2].setdefault(field, []).extend([content] if mark.endswith("AV") else [])
    roles = {"U": "user", "A": "assistant", "PN": "assistant", "PR": "tool"}
    return [
        message(roles[mark], content if mark in ("U", "A") else _call_text(content, fields))
        for mark, content, fields in turns
    ]


def _call_text(name: str, fields: dict[str, list[str]]) -> str:
    return json_text({name: {field: values[0] if len(values) == 1 else values for field, values in fields.items()}})


def _hh_dialog(dialog: str, column: str, where: str) -> tuple[tuple[Message, ...], str]:
    dialog = dialog.replace("\r\n", "\n")
    if dialog.startswith("Human:"):  # a copy whose leading line breaks were stripped
        dialog = "\n\n" + dialog
    if "\n\nAssistant:" not in dialog:  # or one whose blank lines were
        dialog = re.sub(r"\n(?=Human:|Assistant:)", "\n\n", dialog)
    prompt, mark, completion = dialog.rpartition("\n\nAssistant:")
    if not mark:
        raise DataError(
            f"{column} has no assistant turn", where=where, allowed="a dialog of '\\n\\nHuman: ...\\n\\nAssistant: ...'"
        )
    return _hh_turns(prompt, column, where), completion.strip()


def _hh_turns(dialog: str, column: str, where: str) -> tuple[Message, ...]:
    before, *parts = _HH_TURN.split(dialog)
    if before.strip() or not parts:
        raise DataError(
            f"{column} does not begin with a human turn",
            where=where,
            allowed="a dialog of '\\n\\nHuman: ...\\n\\nAssistant: ...'",
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(message(roles[role], content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True))


def _hhh_parts(row: dict[str, Any], column: str, where: str) -> tuple[str, str]:
    parts = _HHH_PARTS.search(text(row, column, where))
    if parts is None:
        raise DataError(
            f"{column} lacks the judge prompt's headings",
            where=where,
            allowed="'###The instruction to evaluate:' and so on",
        )
    return parts["instruction"].strip(), parts["response"].strip()


def _ranked_pairs(
    prompt: tuple[Message, ...], replies: list[dict[str, Any]], group: str, where: str
) -> Iterator[Record | Skipped]:
    if len(replies) < 2:
        return
    if any(reply.get("rank") is None for reply in replies):
        if sum(reply.get("rank") is not None for reply in replies) > 1:
            yield Skipped("siblings of which some have no rank", where)
        return
    ranked = sorted(((_rank(reply, where), reply) for reply in replies), key=lambda pair: pair[0])
    for (best, chosen), (worst, rejected) in combinations(ranked, 2):
        texts = text(chosen, "text", where).strip(), text(rejected, "text", where).strip()
        if _is_true(chosen, "synthetic") or _is_true(rejected, "synthetic"):
            yield Skipped("a synthetic reply", where)
        elif _is_true(chosen, "deleted") or _is_true(rejected, "deleted") or best == worst or not all(texts):
            yield Skipped("a deleted or empty reply, or equal ranks", where)
        else:
            yield Comparison(prompt, *texts, group, margin=float(worst - best), source=where)


def _is_true(reply: dict[str, Any], flag: str) -> bool:
    content = reply.get(flag)
    return label_of(content) is True if isinstance(content, str) else bool(content)


def _rank(reply: dict[str, Any], where: str) -> int:
    rank = numeric(reply["rank"])
    if isinstance(rank, float) and rank.is_integer():  # as a column with nulls has it
        rank = int(rank)
    if isinstance(rank, bool) or not isinstance(rank, int) or abs(rank) > 10**6:
        wrong_type(rank, "rank", "a small whole number", where)
    return rank
