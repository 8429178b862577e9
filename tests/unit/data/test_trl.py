import json
from pathlib import Path
from typing import Any

import pytest

from perlhf.data.read import read
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating
from perlhf.errors import DataError

HI = {"role": "user", "content": "Hi!"}
YES = {"role": "assistant", "content": "Yes"}
NO = {"role": "assistant", "content": "No"}


def records(tmp_path: Path, *rows: dict[str, Any]) -> list[Any]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read("a.jsonl", root=tmp_path)


def test_each_kind_by_its_columns(tmp_path: Path) -> None:
    found = records(
        tmp_path,
        {"prompt": "Hi!", "chosen": "Yes", "rejected": "No", "weight": 2, "margin": -0.5, "annotator": "ann"},
        {"prompt": "Hi!", "completion": "Yes", "label": False, "group": "g", "id": 7},
        {"prompt": "Hi!", "completion": "Yes", "label": None},
        {"prompt": "Hi!", "source": "mine"},
    )
    assert found == [
        Comparison("Hi!", "Yes", "No", "hi", weight=2.0, margin=-0.5, annotator="ann", source="a.jsonl:1"),
        Rating("Hi!", "Yes", False, "g", source="a.jsonl:2"),
        Demonstration("Hi!", "Yes", "hi", source="a.jsonl:3"),
        Prompt("Hi!", "hi", source="mine"),
    ]


def test_chat_completions_become_text(tmp_path: Path) -> None:
    found = records(
        tmp_path,
        {"prompt": [HI], "chosen": [YES], "rejected": [NO]},
        {"prompt": [HI], "completion": "Yes", "label": True},
        {"prompt": "Hi!", "chosen": [HI, YES], "rejected": [HI, NO]},
    )
    assert found == [
        Comparison((HI,), "Yes", "No", "hi", source="a.jsonl:1"),
        Rating((HI,), "Yes", True, "hi", source="a.jsonl:2"),
        Comparison("Hi!", "Yes", "No", "hi", source="a.jsonl:3"),
    ]


def test_whole_conversations_are_split_after_their_common_beginning(tmp_path: Path) -> None:
    found = records(
        tmp_path,
        {"chosen": [HI, YES, HI, YES], "rejected": [HI, YES, HI, NO]},
        {"messages": [HI, YES, HI, NO]},
    )
    assert found == [
        Comparison((HI, YES, HI), "Yes", "No", "hi", source="a.jsonl:1"),
        Demonstration((HI, YES, HI), "No", "hi", source="a.jsonl:2"),
    ]


@pytest.mark.parametrize(
    ("row", "what", "hint"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejectd": "c"},
            "column 'rejected' is missing",
            "rename 'rejectd' to 'rejected'",
        ),
        ({"promt": "a", "completion": "b"}, "column 'prompt' is missing", "rename 'promt' to 'prompt'"),
        ({"question": "a"}, "column 'prompt' is missing", ""),
        ({"prompt": "a", "completon": "b"}, "column 'completon' is unknown", "rename 'completon' to 'completion'"),
        ({"prompt": "a", "completion": "b", "lable": True}, "column 'lable' is unknown", "rename 'lable' to 'label'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "wieght": 1}, "column 'wieght' is unknown", "to 'weight'"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "label is 'maybe', which is no boolean", "data.columns"),
        ({"prompt": "a", "completion": "b", "label": 2}, "label is 2, which is no boolean", "data.ratings"),
        ({"prompt": "a", "label": True}, "column 'completion' is missing", ""),
        ({"prompt": " \n", "completion": "b"}, "prompt is empty", ""),
        ({"prompt": [], "completion": "b"}, "prompt is empty", ""),
        ({"prompt": "a", "completion": ""}, "completion is empty", ""),
        ({"prompt": "a", "chosen": "b", "rejected": "\t"}, "rejected is empty", ""),
        ({"prompt": 5, "completion": "b"}, "column 'prompt' is 5", ""),
        ({"prompt": "a", "completion": {"text": "b"}}, "which is no text or a list of messages", ""),
        ({"prompt": [{"role": "human", "content": "a"}]}, "role 'human'", ""),
        ({"prompt": [{"role": "asistant", "content": "a"}]}, "role 'asistant'", "did you mean 'assistant'?"),
        ({"prompt": [{"role": "user", "content": None}]}, "column 'content' is None", ""),
        ({"prompt": [{"role": "user"}]}, "column 'content' is missing", ""),
        ({"prompt": "a", "completion": [YES, HI]}, "completion holds assistant, user after the prompt", ""),
        ({"chosen": [YES], "rejected": [NO]}, "share no beginning", ""),
        ({"chosen": "a", "rejected": "b"}, "column 'prompt' is missing", ""),
        ({"messages": [HI]}, "does not end with an assistant message", ""),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1}, "column 'weight' is -1", ""),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}, "Infinity is not valid JSON", ""),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "which is no number", ""),
        ({"prompt": "a", "group": 3}, "column 'group' is 3", ""),
    ],
)
def test_bad_rows_are_one_clear_error(tmp_path: Path, row: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        records(tmp_path, {"prompt": "fine"}, row)
    assert what in caught.value.what
    assert hint in (caught.value.hint or "")
    assert caught.value.where == "a.jsonl:2"
