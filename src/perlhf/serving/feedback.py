"""What people say about served answers, as labels of a labelling project: `POST /v1/feedback`.

    {"id": "chatcmpl-1", "index": 0, "thumb": "up", "edit": "A better answer.", "reason": "Because."}
    {"first": {"id": "chatcmpl-1"}, "second": {"id": "chatcmpl-2"}, "verdict": "first"}

In place of `id` an answer may be given in full, as `messages` (or `prompt`) and `answer`. Each becomes a question that
the labelling page never asks (`drawn: served`, none wanted), whose source is `serve:MODEL@VERSION`, with one label. It
is acknowledged when it is on the disk. What somebody says again of the same answer takes the place of what they said
before; `key`, where it is given, stores the same once.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from perlhf.config.stages import LayoutConfig
from perlhf.data.fields import Skipped, Told, prompt_group
from perlhf.data.readers.messages import messages as read_messages
from perlhf.data.readers.trl import trl
from perlhf.data.records import Message, Text
from perlhf.errors import ConfigError, DataError, nearest
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Label, Labeller, Said
from perlhf.labelling.project import LABELS, made
from perlhf.labelling.questions import SERVED, Question, masked, question, served_key, uniform
from perlhf.labelling.records import edit_rows, labelled_rows
from perlhf.labelling.redact import redacted
from perlhf.labelling.settled import settled

TEXT_LETTERS, NAME_LETTERS, DEEPEST = 100_000, 200, 20
"""At most, of an answer, an edit or a reason; of a name, a key, an id or a model; levels of a body."""
_TURNED = {"first": "second", "second": "first"}
_NAMED, _FULL = ("id", "index"), ("messages", "prompt", "answer", "model")
_SAID = ("edit", "reason", "user", "key")
_ONE, _TWO = (*_NAMED, *_FULL, "thumb", *_SAID), ("first", "second", "verdict", *_SAID)


@dataclass(frozen=True)
class Answer:
    """A served answer."""

    prompt: Text
    text: str
    model: str | None
    """None where the client didn't say."""
    version: int | None = None

    @property
    def source(self) -> str:
        """Who wrote it: `MODEL@VERSION`, as far as it is known."""
        return (self.model or "unknown") + (f"@{self.version}" if self.version is not None else "")


class Answers:
    """What was served lately, so that feedback can name it; the oldest is forgotten first. Threads may share it.

    Args:
        most: answers.
        most_bytes: of their prompts and texts.
    """

    def __init__(self, most: int = 10_000, most_bytes: int = 64 * 2**20):
        self._most, self._most_bytes, self._bytes = most, most_bytes, 0
        self._kept: OrderedDict[tuple[str, int], tuple[Answer, int]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, id: str, index: int, prompt: Text, text: str, model: str, version: int) -> None:
        """Keeps one answer of a response; one that is larger than all that may be kept isn't."""
        size = len(text) + len(prompt if isinstance(prompt, str) else json.dumps([dict(turn) for turn in prompt]))
        with self._lock:
            self._bytes -= self._kept.pop((id, index), (None, 0))[1]
            self._kept[id, index] = Answer(prompt, text, model, version), size
            self._bytes += size
            while len(self._kept) > self._most or self._bytes > self._most_bytes:
                self._bytes -= self._kept.popitem(last=False)[1][1]

    def find(self, id: str, index: int) -> Answer | None:
        """The answer, unless it is forgotten or never was."""
        with self._lock:
            return self._kept.get((id, index), (None, 0))[0]


class Feedback:
    """The labelling project that takes what is said; it is made where there is none. Threads may share it.

    Raises:
        ConfigError, RunError, StorageError: as the project says.
    """

    def __init__(self, project_directory: Path):
        self.project = made(project_directory)
        self.store = Store(project_directory / LABELS)
        self.store.settle(settled(self.project))
        self._groups: dict[str, str] = {}
        self._seen, self._lock = 0, threading.Lock()

    def close(self) -> None:
        """Lets go of the database."""
        self.store.close()

    def take(self, body: Mapping[str, Any], answers: Answers, person: str) -> dict[str, Any]:
        """Stores one piece of feedback; returns, after it is on the disk, what the response says.

        Args:
            body: decoded JSON of the request.
            answers: what was served.
            person: who says it, unless the body names a `user`.

        Raises:
            ConfigError: a key is wrong, or names an answer that isn't known; `where` is the key.
            RunError: the key has stored something else. StorageError: it can't be stored now.
        """
        _check(body)
        pair = bool({"first", "second", "verdict"} & set(body))
        _known(body, _TWO if pair else _ONE)
        name = _name(body, "user") or person
        key = _text(body, "key", NAME_LETTERS)
        edit, reason = (_text(body, said, TEXT_LETTERS) or "" for said in ("edit", "reason"))
        if self.project.redact:
            edit, reason = redacted(edit), redacted(reason)
        asked, verdict = self._two(body, answers) if pair else self._one(body, answers, edit)
        said = Said(verdict, reason, edit=edit if edit.strip() else "")
        self._check_readable(asked, said)
        own = None if key is None else f"serve:{_hash([name, key])}"
        new = self.store.tell(name, asked, said, own)
        return {"object": "feedback", "stored": True, "new": new, "verdict": verdict, "source": asked.source}

    # inside

    def _one(self, body: Mapping[str, Any], answers: Answers, edit: str) -> tuple[Question, str]:
        answer = _answer(body, answers, "")
        thumb = _choice(body, "thumb", ("up", "down"))
        if thumb is None and not edit.strip():
            _refuse(
                "there is neither a thumb nor an edit", "thumb", '"thumb": "up" or "down", or "edit": a better answer'
            )
        return self._question(answer.prompt, (answer.text,), answer.source), thumb or "edited"

    def _two(self, body: Mapping[str, Any], answers: Answers) -> tuple[Question, str]:
        sides: list[Answer] = []
        for name in ("first", "second"):
            side = body.get(name)
            if not isinstance(side, Mapping):
                _refuse(f"{name} is no object that names an answer", name, '{"id": ..., "index": 0}')
            _known(side, (*_NAMED, *_FULL), f"{name}.")
            sides.append(_answer(side, answers, f"{name}."))
        verdict = _choice(body, "verdict", ("first", "second", "equal", "both_bad"))
        if verdict is None:
            _refuse("verdict is missing", "verdict", "first, second, equal or both_bad")
        first, second = sides
        if first.prompt != second.prompt:
            _refuse("first and second answer different prompts", "second", "two answers to the same messages")
        # By their texts alone, as the questions of a file: the same pair is the same question.
        texts = [str(masked(side.text)) if self.project.redact else side.text for side in sides]
        if texts[0] == texts[1]:
            allowed = "two answers that differ; a thumb for one of them says whether it is good"
            _refuse("first and second are the same text", "second", allowed)
        if uniform("side", texts[0]) >= uniform("side", texts[1]):
            first, second, verdict = second, first, _TURNED.get(verdict, verdict)
        asked = self._question(first.prompt, (first.text, second.text), f"{first.source},{second.source}")
        return asked, verdict

    def _question(self, prompt: Text, answers: tuple[str, ...], who: str) -> Question:
        found = question(self.project, prompt, answers, "", f"serve:{who}", SERVED)
        assert found is not None
        key = served_key(found.source, found.key)
        return replace(found, key=key, group=self._group(found.prompt), wanted=0)

    def _group(self, prompt: Text) -> str:
        """That of the project's other questions about this prompt, else as readers make one."""
        own = prompt_group(prompt)
        with self._lock:
            for number, other in self.store.questions(self._seen).items():
                self._seen = number
                if not other.served:
                    self._groups.setdefault(prompt_group(other.prompt), other.group)
            return self._groups.get(own, own)

    def _check_readable(self, asked: Question, said: Said) -> None:
        """What is taken can be read by `perlhf data` and every stage."""
        label = Label("", asked, Labeller(0, "", ""), said, False, 0.0, 0.0)
        rows = [row for row, _ in labelled_rows([label], self.project, "all")] + list(edit_rows([label]))
        for row in rows:
            try:
                for record in trl(iter([("feedback", row)]), LayoutConfig()):
                    if isinstance(record, Skipped) and not isinstance(record, Told):
                        _refuse(f"nothing can be learned from these messages: {record.reason}", "messages", None)
            except DataError as error:
                _refuse(f"nothing can be learned from these messages: {error.what}", "messages", error.allowed)


def _answer(said: Mapping[str, Any], answers: Answers, where: str) -> Answer:
    """The answer that `id` and `index` name, or that is given in full."""
    full = [name for name in _FULL if name in said]
    if full and "id" in said:
        _refuse(f"{where}{full[0]} and {where}id both say which answer is meant", where + full[0], "one of the two")
    if not full:
        id, index = _text(said, "id", NAME_LETTERS, where), said.get("index", 0)
        if id is None:
            allowed = "id (and index) of a response, or messages and answer in full"
            _refuse(f"{where}id is missing: no answer is named", f"{where}id", allowed)
        if type(index) is not int or not 0 <= index < 10_000:
            _refuse(f"{where}index is no number of a choice", f"{where}index", "0, 1, ...")
        found = answers.find(id, index)
        if found is None:
            allowed = "an answer served lately since the server began; of others, messages and answer in full"
            _refuse(f"{where}id {id!r:.60} with index {index} is no answer that is known here", f"{where}id", allowed)
        return found if isinstance(found.prompt, str) else replace(found, prompt=_messages(list(found.prompt), where))
    if "index" in said:
        _refuse(f"{where}index belongs to an id", f"{where}index", "id and index, or messages and answer")
    if ("messages" in said) == ("prompt" in said):
        _refuse(f"{where}messages (or prompt) must come with an answer", f"{where}messages", "one of the two")
    prompt = _text(said, "prompt", 10 * TEXT_LETTERS, where) or ""
    text = said.get("answer")
    if not isinstance(text, str) or len(text) > TEXT_LETTERS:
        _refuse(f"{where}answer is no text", f"{where}answer", f"at most {TEXT_LETTERS} letters")
    model = _name(said, "model", where)
    if "messages" not in said:
        return Answer(prompt, text, model)
    return Answer(_messages(said["messages"], where), text, model)


def _messages(content: Any, where: str) -> list[Message]:
    """A conversation as records have it."""
    if not isinstance(content, list) or not content:
        _refuse(f"{where}messages is no list of messages", f"{where}messages", '[{"role": "user", "content": ...}]')
    try:
        return list(read_messages(content, "messages", "messages"))
    except DataError as error:
        _refuse(f"{where}messages can't be read: {error.what}", f"{where}messages", error.allowed)


def _check(body: object) -> None:
    """Refuses what can't be stored: what is no object, too deep, or no Unicode text."""
    if not isinstance(body, Mapping):
        _refuse("the body is no JSON object", "body", '{"id": ..., "thumb": "up"}')
    waiting: list[tuple[Any, int]] = [(body, 0)]
    while waiting:
        part, depth = waiting.pop()
        if depth > DEEPEST:
            _refuse("the body is nested too deeply", "body", f"{DEEPEST} levels")
        if isinstance(part, Mapping):
            waiting += [(one, depth + 1) for pair in part.items() for one in pair]
        elif isinstance(part, list):
            waiting += [(one, depth + 1) for one in part]
        elif isinstance(part, float) and not isfinite(part):
            _refuse("the body holds a number that isn't finite", "body", "JSON's numbers")
        elif isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError:
                _refuse("the body holds half of a surrogate pair", "body", "text that can be written as UTF-8")


def _known(said: Mapping[str, Any], names: tuple[str, ...], where: str = "") -> None:
    for name in said:
        if name not in names:
            near = nearest(str(name), names)
            hint = f"did you mean {near!r}?" if near else None
            _refuse(f"{where}{name!s:.60} is no key of feedback", f"{where}{name!s:.60}", ", ".join(names), hint)


def _text(said: Mapping[str, Any], key: str, letters: int, where: str = "") -> str | None:
    text = said.get(key)
    if text is not None and (not isinstance(text, str) or len(text) > letters):
        _refuse(f"{where}{key} is no text of at most {letters} letters", f"{where}{key}", "text")
    return text


def _name(said: Mapping[str, Any], key: str, where: str = "") -> str | None:
    name = " ".join((_text(said, key, NAME_LETTERS, where) or "").split())
    if not name.isprintable():
        _refuse(f"{where}{key} holds signs that can't be shown", f"{where}{key}", "letters, digits and signs")
    return name or None


def _choice(said: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str | None:
    chosen = said.get(key)
    if chosen is not None and (not isinstance(chosen, str) or chosen not in allowed):
        _refuse(f"{key} is {chosen!r:.60}", key, ", ".join(allowed))
    return chosen


def _refuse(what: str, where: str, allowed: str | None, hint: str | None = None) -> NoReturn:
    raise ConfigError(what, where=where, allowed=allowed, hint=hint)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
