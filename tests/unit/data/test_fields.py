"""What layouts expect a list, an object or a number in is read as such from text, too: cells of CSV files are text."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import ARENA_ROW, ASKED, GOOD, HELPSTEER_ROW, POOR, ULTRAFEEDBACK_ROW

from perlhf.config.stages import LayoutConfig
from perlhf.data.fields import decoded, numeric
from perlhf.data.read import read_all
from perlhf.data.records import Record
from perlhf.errors import DataError

ANSWERS = [{"answer": "Until nine.", "model": "m", "rank": 1.0}, {"answer": "Go away.", "model": "n", "rank": 2.0}]
WEBGPT = {
    "question": {"dataset": "eli5", "id": "x", "full_text": "Is it open?"},
    "quotes_0": {"title": ["a"]},
    "answer_0": "Until nine.",
    "score_0": 1.0,
    "answer_1": "Go away.",
    "score_1": -1.0,
}
SHP = {"post_id": "p", "history": "Is it open?", "human_ref_A": "No", "human_ref_B": "Yes", "labels": 0}
SHP |= {"score_ratio": 2.5}
MESSAGES = [
    {"message_id": "1", "parent_id": None, "text": "Is it open?", "role": "prompter", "rank": None},
    {"message_id": "2", "parent_id": "1", "text": "Until nine.", "role": "assistant", "rank": 0, "deleted": False},
    {"message_id": "3", "parent_id": "1", "text": "Go away.", "role": "assistant", "rank": 1, "deleted": False},
    {"message_id": "4", "parent_id": "1", "text": "Gone.", "role": "assistant", "rank": 2, "deleted": True},
]
RATINGS = LayoutConfig.model_validate({"ratings": {"up": 4, "down": 2}})
ROWS: dict[str, tuple[list[dict[str, Any]], LayoutConfig]] = {
    "webgpt": ([WEBGPT], LayoutConfig()),
    "shp": ([SHP], LayoutConfig()),
    "nectar": ([{"prompt": "Is it open?", "answers": ANSWERS}], LayoutConfig()),
    "ultrafeedback": ([ULTRAFEEDBACK_ROW], LayoutConfig()),
    "ranked": ([{"prompt": "Is it open?", "responses": ["No", "Yes", "Go"], "ranks": [2, 1, 3]}], LayoutConfig()),
    "scored": ([{"prompt": "Is it open?", "completions": ["No", "Yes"], "ratings": [2, 5.5]}], RATINGS),
    "two ratings": (
        [{"input": "Is it open?", "chosen": "b", "rejected": "a", "generations": ["a", "b"], "rating": [2.5, 4.0]}],
        LayoutConfig(),
    ),
    "oasst": (MESSAGES, LayoutConfig()),
    "capybara": (
        [{"conversation": [{"input": "Is it open?", "output": "Until nine."}, {"input": "Sure?", "output": "Yes"}]}],
        LayoutConfig(),
    ),
    "llmbar": (
        [{"input": "Is it open?", "output_1": "Go away.", "output_2": "Until nine.", "label": 2}],
        LayoutConfig(),
    ),
    "tldr": (
        [
            {
                "info": {"id": "i", "post": "A post", "title": "A title", "subreddit": "tea"},
                "summaries": [{"text": "Good"}, {"text": "Poor"}],
                "choice": 0,
            }
        ],
        LayoutConfig(),
    ),
    "argilla": (
        [
            {
                "prompt": "Is it open?",
                "response": "Until nine.",
                "good.responses": ["yes"],
                "good.responses.users": ["u"],
                "good.responses.status": ["submitted"],
            }
        ],
        LayoutConfig(),
    ),
    "helpsteer": ([HELPSTEER_ROW], RATINGS),
    "arena": ([ARENA_ROW], LayoutConfig()),
    "first turn": (
        [
            {
                "conversation_a": [ASKED, GOOD, ASKED, GOOD],
                "conversation_b": [ASKED, POOR, ASKED, GOOD],
                "winner": 1,
                "turn": 1,
            }
        ],
        LayoutConfig(),
    ),
}


def records(path: Path, rules: LayoutConfig) -> list[Record]:
    """Its records, without the places of their rows."""
    return [record.__class__(**{**fields(record), "source": ""}) for record in read_all(str(path), rules=rules).records]


def fields(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


@pytest.mark.parametrize("written", ["json", "python"])
@pytest.mark.parametrize("layout", ROWS)
def test_cells_are_read_as_json_lines_are(tmp_path: Path, layout: str, written: str) -> None:
    rows, rules = ROWS[layout]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = records(tmp_path / "a.jsonl", rules)
    assert expected

    def cell(content: Any) -> Any:
        return (json.dumps if written == "json" else str)(content) if isinstance(content, list | dict) else content

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows({name: cell(content) for name, content in row.items()} for row in rows)
    (tmp_path / "a.csv").write_text(table.getvalue())
    assert records(tmp_path / "a.csv", rules) == expected
    texts = [{name: None if part is None else str(cell(part)) for name, part in row.items()} for row in rows]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    assert records(tmp_path / "b.jsonl", rules) == expected


def test_what_text_holds() -> None:
    assert decoded(' [1, "a"]') == decoded("[1, 'a']") == [1, "a"]
    assert decoded('{"a": null}') == decoded("{'a': None}") == {"a": None}
    for text in ("[1] says so", "{name}", "[", "1", "", "[a, b]", "[" * 9000):
        assert decoded(text) is text
    assert [numeric(text) for text in ("2.0", " 7", "-1.5", "x", "nan", "inf", "1e400", True)] == (
        [2, 7, -1.5, "x", "nan", "inf", "1e400", True]
    )


def test_winners_as_pandas_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response_1,response_2,winner\nHi!,Yes,No,1.0\nHi!,Yes,No,2.0\n")
    found: list[Any] = read_all(str(tmp_path / "a.csv")).records
    assert [record.chosen for record in found] == ["Yes", "No"]


def test_text_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(SHP | {"score_ratio": "high"}))
    with pytest.raises(DataError, match="'score_ratio' is 'high', which is no number"):
        read_all(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Hi!", "answers": "[Yes, No]"}))
    with pytest.raises(DataError, match="which is no list"):
        read_all(str(tmp_path / "a.jsonl"))
