"""Readers of AndroidControl: what people did on a phone, step by step, with the accessibility trees of its screens.

Sources: names and order of the features and kinds of action are those of the set's README (google-research,
`android_control`, arXiv 2406.03679); numbers of the protobuf fields are those of android_env's `proto/a11y` files.
Not checked on the published files: that every tree follows these numbers, that bounds are in the pixels of the actions'
`x` and `y`, and how many actions can't be read.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from perlhf.data.containers.tfrecord import message_fields
from perlhf.data.fields import Row, Skipped, first_value, group_key, items, parse_json, utf8
from perlhf.data.records import Comparison, Demonstration, Record
from perlhf.errors import DataError

_WINDOWS, _TREE, _NODES = 1, 11, 1
_BOUNDS, _CLASS, _DESCRIPTION, _TEXT, _CLICKABLE, _VISIBLE = 2, 3, 4, 7, 14, 23
_POINTING = ("click", "long_press")


def android_control(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """AndroidControl: one demonstration per step of an episode; the completion is the action as JSON with sorted keys.

    Rule: the prompt lists the visible nodes of the screen's accessibility trees that have a text or a description or
    can be clicked (class, text, description; left, top, right, bottom in pixels), then the goal, the earlier actions
    and the step's instruction. A screen without a tree has no list. An action that is no flat JSON object with an
    `action_type` (and `x` and `y` for a click or long press) is skipped, and isn't among the earlier actions of later
    steps. Screenshots aren't used. Group: the goal, which all steps share; episodes with the same goal stay together.
    """
    for where, row in rows:
        for step in _steps(row, where):
            if isinstance(step, Skipped):
                yield step
            else:
                yield Demonstration(step.prompt, _canonical(step.action), group_key(step.goal), source=where)


def android_control_pairs(rows: Iterable[Row]) -> Iterator[Record | Skipped]:
    """AndroidControl as comparisons: the right action of a step against one wrong action.

    Rule: prompt and completions as for `android-control`. The wrong action of a click or long press is the same at
    the centre of another clickable node of the screen that doesn't contain the right point; of other actions, that of
    another step of the episode that differs. It is drawn by a hash of goal, step and action; a step without one is
    skipped. That a drawn action is wrong is a guess: some goals can be reached in two ways. Group: the goal.
    """
    for where, row in rows:
        for step in _steps(row, where):
            if isinstance(step, Skipped):
                yield step
            elif wrong := step.wrong():
                rejected = min(wrong, key=step.draw)
                yield Comparison(step.prompt, _canonical(step.action), rejected, group_key(step.goal), source=where)
            else:
                yield Skipped("no wrong action", where)


@dataclass(frozen=True, slots=True)
class _Element:
    """A listed node of a screen; `box` is left, top, right, bottom."""

    words: str
    box: tuple[int, int, int, int]
    clickable: bool

    def holds(self, x: float, y: float) -> bool:
        left, top, right, bottom = self.box
        return left <= x < right and top <= y < bottom

    @property
    def centre(self) -> dict[str, int]:
        left, top, right, bottom = self.box
        return {"x": (left + right) // 2, "y": (top + bottom) // 2}


@dataclass(frozen=True, slots=True)
class _Step:
    """One action of an episode, the screen it was done on, and all of the episode's readable actions as text."""

    goal: str
    instruction: str
    index: int
    elements: list[_Element]
    action: dict[str, Any]
    earlier: list[str]
    episode: list[str]

    @property
    def prompt(self) -> str:
        listed = [
            f"{index}: {element.words} ({' '.join(map(str, element.box))})"
            for index, element in enumerate(self.elements)
        ]
        return "\n".join(
            [
                *(["Elements on the screen:", *listed] if listed else []),
                f"Goal: {self.goal}",
                *(["Earlier actions:", *self.earlier] if self.earlier else []),
                *([f"Step: {self.instruction}"] if self.instruction else []),
                "Which action? Answer with its JSON.",
            ]
        )

    def wrong(self) -> list[str]:
        """Actions that could be compared with the right one."""
        if self.action["action_type"] not in _POINTING:
            return [other for other in self.episode if other != _canonical(self.action)]
        x, y = self.action["x"], self.action["y"]
        missed = [element for element in self.elements if element.clickable and not element.holds(x, y)]
        return [_canonical(self.action | element.centre) for element in missed]

    def draw(self, action: str) -> bytes:
        """Sort key of a wrong action: the one with the lowest key is drawn."""
        return hashlib.sha256(f"{self.goal}:{self.index}:{action}".encode(errors="surrogatepass")).digest()


def _steps(row: dict[str, Any], where: str) -> Iterator[_Step | Skipped]:
    goal = utf8(first_value(row, "goal", where), where).strip()
    encoded, instructions = (
        [utf8(feature, where) for feature in items(row, key, where)] for key in ("actions", "step_instructions")
    )
    trees = items({"accessibility_trees": []} | row, "accessibility_trees", where)
    if len(encoded) != len(instructions):
        raise DataError(
            f"found {len(encoded)} actions and {len(instructions)} step instructions",
            where=where,
            allowed="one instruction per action",
        )
    actions = [_action(written, where) for written in encoded]
    texts = ["" if action is None else _canonical(action) for action in actions]
    for index, action in enumerate(actions):
        if action is None or not goal:
            yield Skipped("malformed action" if goal else "empty goal", where)
        else:
            elements = _elements(trees[index], where) if index < len(trees) else []
            earlier, episode = [list(filter(None, part)) for part in (texts[:index], texts)]
            yield _Step(goal, instructions[index].strip(), index, elements, action, earlier, episode)


def _action(encoded: str, where: str) -> dict[str, Any] | None:
    try:
        action = parse_json(encoded, "an action", where)
    except DataError:
        return None
    if not isinstance(action, dict) or any(isinstance(part, dict | list) for part in action.values()):
        return None
    kind = action.get("action_type")
    located = all(type(action.get(axis)) in (int, float) for axis in "xy")
    return action if isinstance(kind, str) and (located or kind not in _POINTING) else None


def _canonical(action: dict[str, Any]) -> str:
    return json.dumps(action, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _elements(forest: Any, where: str) -> list[_Element]:
    try:
        nodes = [
            dict(message_fields(node))
            for window in _inside(forest, _WINDOWS)
            for tree in _inside(window, _TREE)
            for node in _inside(tree, _NODES)
        ]
        return [element for node in nodes if (element := _element(node))]
    except (IndexError, ValueError) as error:
        raise DataError(
            f"an accessibility tree is damaged: {error}",
            where=where,
            allowed="a serialized AndroidAccessibilityForest",
        ) from error


def _inside(message: Any, number: int) -> list[Any]:
    return [field for key, field in message_fields(message) if key == number]


def _element(node: dict[int, Any]) -> _Element | None:
    """The node as listed; None where it isn't visible, has no area, or says and does nothing."""
    edges = dict(message_fields(node.get(_BOUNDS, b"")))
    left, top, right, bottom = (_int32(edges.get(side, 0)) for side in (1, 2, 3, 4))
    kind, shown, about = (_string(node.get(number, b"")) for number in (_CLASS, _TEXT, _DESCRIPTION))
    clickable = bool(node.get(_CLICKABLE))
    if not node.get(_VISIBLE) or left >= right or top >= bottom or not (shown or about or clickable):
        return None
    words = (kind.split(".")[-1], f'"{shown}"' if shown else "", about if about != shown else "")
    return _Element(" ".join(filter(None, words)), (left, top, right, bottom), clickable)


def _string(field: Any) -> str:
    """Text of a node on one line."""
    if not isinstance(field, bytes):
        raise ValueError("a text is a number")
    return " ".join(field.decode().split())


def _int32(field: Any) -> int:
    if not isinstance(field, int):
        raise ValueError("a side of a box is no whole number")
    return (field + 2**31) % 2**32 - 2**31
