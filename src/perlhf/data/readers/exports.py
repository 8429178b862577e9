"""Readers of what labelling tools and chat pages export: Argilla, Label Studio, open-webui.

In the first two a project names its fields and questions as it likes, so a row is read by what the answers are: a side
is a winner, a number a grade, "yes" or "good" a label, a text the completion that somebody wrote.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from perlhf.config.stages import LayoutConfig
from perlhf.data.fields import Row, Skipped, decoded, items, label_of, mapping, message, text, value
from perlhf.data.readers.columns import COLUMNS
from perlhf.data.readers.judged import pair_of, side_of
from perlhf.data.readers.layouts import by_columns
from perlhf.data.readers.messages import listed
from perlhf.data.readers.trl import Made, trl
from perlhf.data.records import Record
from perlhf.errors import DataError

_QUESTION = ("prompt", "instruction", "question", "query", "input", "conversations", "messages", "chat")
_ANSWER = ("completion", "response", "output", "answer", "generation", "reply", "text")
_OURS = (*COLUMNS, "rating", "winner")
"""Columns beside the tool's own that `data.columns` may have named."""
_NOTES = (
    ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"),
    ("status", "_server_id", "metadata", "vectors", "inserted_at", "external_id"),
)


def argilla(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """Argilla's records (`fields`, `responses`, `suggestions`) and its `datasets` exports (`NAME.responses`).

    Rule: each submitted response makes a record of its annotator; records that nobody answered are skipped, whatever
    was suggested. The fields are the prompt and the answers, the question says what a person thought of them: a side of
    two answers (or the best of a ranking) makes a comparison, "yes" or "good" a rating, a number a grade
    (`data.ratings` or `data.grades`), and a text where there is no answer a demonstration. Group: first user turn.
    """
    yield from trl(_made(rows, _argilla_rows), rules)


def label_studio(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """Label Studio's exports: JSON (`data` with `annotations`), JSON-MIN and CSV.

    Rule: each annotation makes a record of its annotator; cancelled ones and tasks without any are skipped. A pairwise
    choice makes a comparison of the two texts that it names, a choice such as "yes" or "good" a rating, stars and
    numbers a grade (`data.ratings` or `data.grades`), and a text area a demonstration where the task has no answer.
    Group: first user turn.
    """
    yield from trl(_made(rows, _label_studio_rows), rules)


def open_webui(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """The feedback that open-webui exports: thumbs with a snapshot of the chat.

    Rule: one rating per thumb. The completion is the message that `meta.message_id` names, the prompt all messages
    before it on its branch. Feedback without a thumb, or without the snapshot, is skipped. Group: first user turn.
    """
    yield from trl((_feedback_row(row, where) for where, row in rows), rules)


def _made(rows: Iterable[Row], make: Callable[[dict[str, Any], str], list[Made]]) -> Iterator[Row | Skipped]:
    for where, row in rows:
        for said in make(row, where):
            made = said if isinstance(said, Skipped) else by_columns(said, where)
            yield made if isinstance(made, Skipped) else (where, made)


def _argilla_rows(row: dict[str, Any], where: str) -> list[Made]:
    fields = {name: content for name, content in row.items() if name in _OURS and content is not None}
    if isinstance(decoded(row.get("fields")), dict):
        fields = mapping(row["fields"], "column 'fields'", where) | fields
        answered = _nested_responses(decoded(row.get("responses")), where)
    else:
        fields = {name: content for name, content in row.items() if _is_field(name, row)} | fields
        answered = _flat_responses(row, where)
    fields = {name: listed(content) for name, content in fields.items() if content is not None}
    if not answered:
        return [Skipped("a record without a submitted response", where)]
    return [_judged(fields, said, who, where) for who, said in answered.items()]


def _is_field(name: str, row: Mapping[str, Any]) -> bool:
    """True for a column that is no answer to a question and no note of the tool."""
    question = name.split(".")[0].removesuffix("-suggestion-metadata").removesuffix("-suggestion")
    asked = "." in name or f"{question}-suggestion" in row or f"{question}.responses" in row
    return not asked and not any(name in notes for notes in _NOTES)


def _nested_responses(responses: Any, where: str) -> dict[str, dict[str, Any]]:
    """What each annotator said to each question, of records as `to_json` and version 1 write them."""
    said: dict[str, dict[str, Any]] = {}
    if isinstance(responses, dict):  # {question: [{value, user_id, status}]}
        for question, answers in responses.items():
            for number, answer in enumerate(answers if isinstance(answers, list) else []):
                answer = mapping(answer, "a response", where)
                if answer.get("status") in (None, "submitted"):
                    said.setdefault(str(answer.get("user_id") or number), {})[question] = answer.get("value")
    for number, answer in enumerate(responses if isinstance(responses, list) else []):
        answer = mapping(answer, "a response", where)
        if answer.get("status") not in (None, "submitted"):
            continue
        who = said.setdefault(str(answer.get("user_id") or number), {})
        if isinstance(answer.get("values"), dict):  # version 1: {values: {question: {value}}}
            for question, one in answer["values"].items():
                who[question] = one.get("value") if isinstance(one, dict) else one
        elif isinstance(answer.get("question_name"), str):
            who[answer["question_name"]] = answer.get("value")
    return said


def _flat_responses(row: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """What each annotator said, of `NAME.responses` with users and states, or of version 1's lists of objects."""
    said: dict[str, dict[str, Any]] = {}
    for name, content in row.items():
        if name.endswith(".responses") or f"{name}-suggestion" in row:
            content = decoded(content)
        if name.endswith(".responses") and isinstance(content, list):
            users, states = decoded(row.get(f"{name}.users")), decoded(row.get(f"{name}.status"))
            for number, answer in enumerate(content):
                if _at(states, number) in (None, "submitted"):
                    who = str(_at(users, number) or number)
                    said.setdefault(who, {})[name.removesuffix(".responses")] = answer
        elif f"{name}-suggestion" in row and isinstance(content, list):
            for number, answer in enumerate(content):
                answer = mapping(answer, "a response", where)
                if answer.get("status") in (None, "submitted"):
                    said.setdefault(str(answer.get("user_id") or number), {})[name] = answer.get("value")
    return said


def _at(parts: Any, number: int) -> Any:
    return parts[number] if isinstance(parts, list) and number < len(parts) else None


def _label_studio_rows(row: dict[str, Any], where: str) -> list[Made]:
    if "annotations" not in row:
        fields = {name: _unwrapped(content) for name, content in row.items() if content is not None}
        known = {*_OURS, *_QUESTION, *_ANSWER, *(pair_of(fields) or ())}
        said = {name: part for name, part in fields.items() if name not in known and name not in _NOTES[0]}
        fields = {name: part for name, part in fields.items() if name not in said and name not in _NOTES[0]}
        return [_judged(fields, said, _who(row.get("annotator")), where)]
    fields = {
        name: part
        for name, part in mapping(value(row, "data", where), "column 'data'", where).items()
        if part is not None
    }
    fields |= {name: part for name, part in row.items() if name in _OURS and part is not None}
    made: list[Made] = []
    for annotation in items(row, "annotations", where):
        annotation = mapping(annotation, "an annotation", where)
        results = annotation.get("result")
        if annotation.get("was_cancelled") or not isinstance(results, list) or not results:
            continue
        said: dict[str, Any] = {}
        sides: dict[str, Any] = {}
        for result in results:
            result = mapping(result, "a result", where)
            name, given = str(result.get("from_name")), mapping(result.get("value"), "a result's value", where)
            said[name] = _unwrapped(given)
            if result.get("type") == "pairwise":
                sides = _named_sides(str(result.get("to_name")), fields)
        sides = sides or _two_texts(fields, said)
        kinds = {str(result.get("from_name")): result.get("type") for result in results}
        if not sides and pair_of(fields) is None and not any(name in fields for name in _ANSWER):
            _refuse_judgements_of_nothing(said, kinds, fields, where)
        made.append(_judged(fields | sides, said, _who(annotation.get("completed_by")), where))
    return made or [Skipped("a task without an annotation", where)]


def _unwrapped(content: Any) -> Any:
    """What a person chose, without the object and list that Label Studio puts around it."""
    if isinstance(content, str) and content[:1] in ("{", "["):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            return content
    if isinstance(content, dict):
        name = next((name for name in ("selected", "rating", "choices", "number", "text") if name in content), None)
        if name == "text":
            written = content["text"]
            return written[0] if isinstance(written, list) and len(written) == 1 else written
        return _unwrapped(content[name]) if name else content
    if isinstance(content, list) and len(content) == 1 and not (isinstance(content[0], dict) and "role" in content[0]):
        return _unwrapped(content[0])
    return content


def _named_sides(names: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The two texts that a pairwise choice names, as a pair's columns."""
    sides = [name.strip() for name in names.split(",")]
    if len(sides) == 2 and all(name in fields for name in sides):
        return {"response_a": fields[sides[0]], "response_b": fields[sides[1]]}
    return {}


def _two_texts(fields: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The only two texts beside the prompt, in the order of their names, where a side was chosen; {} otherwise."""
    others = sorted(
        name for name, part in fields.items() if isinstance(part, str) and name not in (*_OURS, *_QUESTION, *_ANSWER)
    )
    if len(others) != 2 or pair_of(fields) is not None or any(name in fields for name in _ANSWER):
        return {}
    sides = {"response_a": fields[others[0]], "response_b": fields[others[1]]}
    chosen = (side_of(_best_of_ranking(part), sides, ("response_a", "response_b")) for part in said.values())
    return sides if any(side != "" for side in chosen) else {}


def _refuse_judgements_of_nothing(
    said: Mapping[str, Any], kinds: Mapping[str, Any], fields: Mapping[str, Any], where: str
) -> None:
    """Raises DataError where a choice or a grade says nothing of any text: it would be learned as an answer."""
    judged = [name for name in said if kinds.get(name) != "textarea"]
    if judged:
        raise DataError(
            f"nothing says which texts {judged[0]!r} judges ({said[judged[0]]!r:.40})",
            where=where,
            allowed=f"found data {', '.join(map(repr, fields)) or 'none'}",
            hint="call two answers response_a and response_b, or one answer response, in the tasks' data",
        )


def _who(annotator: Any) -> str | None:
    if isinstance(annotator, dict):
        annotator = annotator.get("email") or annotator.get("id")
    return str(annotator) if isinstance(annotator, int | str) and not isinstance(annotator, bool) else None


def _judged(fields: dict[str, Any], said: dict[str, Any], who: str | None, where: str) -> Made:
    """Fields and one person's answers as a row of columns that the other readers know."""
    said = {name: content for name, content in said.items() if content is not None and content != ""}
    row = dict(fields)
    if who is not None and "annotator" not in row:
        row["annotator"] = who
    answer = next((name for name in _ANSWER if isinstance(row.get(name), str | list)), None)
    question = next((name for name in _QUESTION if name in row and name != answer), None)
    if pair_of(row) is None and answer not in (None, "completion") and "completion" not in row:
        row["completion"] = row.pop(answer)
    if question in ("question", "query", "input", "chat", "messages") and "prompt" not in row:
        row["prompt"] = row.pop(question)
    if {"chosen", "rejected"} <= row.keys() or any(row.get(name) is not None for name in ("label", "rating", "winner")):
        return row
    return row | _meaning(row, said, where)


def _meaning(row: Mapping[str, Any], said: dict[str, Any], where: str) -> dict[str, Any]:
    """The one answer that says what the record is: a winner, a label, a grade or a written text."""
    pair = pair_of(row)
    meanings: dict[str, dict[str, Any]] = {}
    for name, content in said.items():
        if pair is not None:
            best = _best_of_ranking(content)
            if side_of(best, row, pair) != "":
                meanings[name] = {"winner": best}
        elif "completion" not in row:
            if isinstance(content, str):
                meanings[name] = {"completion": content}
        elif isinstance(content, str) and content.strip().isdecimal():
            meanings[name] = {"rating": int(content)}  # of a scale: its 1 is no thumbs up
        elif isinstance(content, str) and label_of(content) is not None:
            meanings[name] = {"label": content}
        elif isinstance(content, bool):
            meanings[name] = {"label": content}
        elif isinstance(content, int | float):
            meanings[name] = {"rating": content}
    if len(meanings) == 1:
        return next(iter(meanings.values()))
    found = ", ".join(f"{name}: {content!r:.40}" for name, content in said.items()) or "none"
    what = "more than one answer says" if meanings else "no answer says"
    allowed = (
        "a side of two answers, a grade, or a word such as good or bad" if pair or "completion" in row else "a text"
    )
    raise DataError(
        f"{what} what the record is ({found})",
        where=where,
        allowed=allowed,
        hint="`data.columns` names the one that counts, such as `{rating: ...}`, `{label: ...}` or `{winner: ...}`",
    )


def _best_of_ranking(content: Any) -> Any:
    """The name of the best of a ranking, "tie" where two are best; anything else as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) and "rank" in part for part in content):
        return content
    ranked = [part for part in content if isinstance(part["rank"], int | float)]
    best = min((part["rank"] for part in ranked), default=None)
    first = [part.get("value") for part in ranked if part["rank"] == best]
    return first[0] if len(first) == 1 else "tie"


def _feedback_row(row: dict[str, Any], where: str) -> Row | Skipped:
    given = mapping(value(row, "data", where), "column 'data'", where)
    label = label_of(given.get("rating"))
    if label is None or given.get("rating") == 0:
        return Skipped("feedback without a thumb", where)
    chat = _snapshot(row.get("snapshot"))
    if chat is None:
        return Skipped("feedback without a snapshot of the chat", where)
    by_id, order = _chat_messages(chat)
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    assert isinstance(meta, dict)
    history = chat.get("history")
    rated = meta.get("message_id")
    if rated is None and isinstance(history, dict):
        rated = history.get("currentId")
    if not isinstance(rated, str | int) or rated not in by_id:
        return Skipped("feedback on a message that the snapshot doesn't have", where)
    branch = _branch(rated, by_id, order, where)
    turns = [_turn(part, where) for part in branch]
    system = _system_of(chat)
    if system and turns[0]["role"] != "system":
        turns.insert(0, dict(message("system", system)))
    return where, {
        "prompt": turns[:-1],
        "completion": turns[-1:],
        "label": label,
        "annotator": row["user_id"] if isinstance(row.get("user_id"), str) else None,
    }


def _snapshot(snapshot: Any) -> dict[str, Any] | None:
    """The object with the chat's history or messages; versions differ in how deep it lies."""
    for _ in range(4):
        if not isinstance(snapshot, dict):
            return None
        if isinstance(snapshot.get("history"), dict) or isinstance(snapshot.get("messages"), list | dict):
            return snapshot
        snapshot = snapshot.get("chat")
    return None


def _chat_messages(chat: dict[str, Any]) -> tuple[dict[Any, dict[str, Any]], list[Any]]:
    """Messages by id, and the ids in the order of the file."""
    history = chat.get("history")
    found = history.get("messages") if isinstance(history, dict) and history.get("messages") else chat.get("messages")
    if isinstance(found, dict):
        pairs = [(name, part) for name, part in found.items() if isinstance(part, dict)]
    else:
        listed_messages = found if isinstance(found, list) else []
        pairs = [
            (part["id"], part)
            for part in listed_messages
            if isinstance(part, dict) and isinstance(part.get("id"), str | int)
        ]
    return dict(pairs), [name for name, _ in pairs]


def _branch(rated: Any, by_id: dict[Any, dict[str, Any]], order: list[Any], where: str) -> list[dict[str, Any]]:
    """The rated message and those before it: its parents, or what precedes it where messages name none."""
    if "parentId" not in by_id[rated]:
        return [by_id[name] for name in order[: order.index(rated) + 1]]
    branch: list[dict[str, Any]] = []
    current: Any = rated
    while isinstance(current, str | int) and current in by_id:
        if len(branch) > len(by_id):
            raise DataError("the messages of the chat are each other's parents", where=where)
        branch.append(by_id[current])
        current = by_id[current].get("parentId")
    return branch[::-1]


def _turn(part: dict[str, Any], where: str) -> dict[str, Any]:
    """A message without what the page notes beside it."""
    kept = {
        name: part[name] for name in ("role", "content", "tool_calls", "tool_call_id") if part.get(name) is not None
    }
    text(kept, "role", where)
    return kept


def _system_of(chat: dict[str, Any]) -> str | None:
    params = chat.get("params")
    system = params.get("system") if isinstance(params, dict) else chat.get("system")
    return system if isinstance(system, str) and system.strip() else None
