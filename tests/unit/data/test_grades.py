"""Margins from scores and grades: equal ones teach no preference, whatever says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from perlhf.config.stages import LayoutConfig
from perlhf.data.read import Reading, read_all
from perlhf.errors import DataError

PAIR = {"prompt": "Hi!", "chosen": "Yes", "rejected": "No"}
GRADED = {"prompt": "Hi!", "responses": ["Yes", "No"]}


def reading(tmp_path: Path, row: dict[str, Any], **rules: Any) -> Reading:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    return read_all("a.jsonl", root=tmp_path, rules=LayoutConfig(**rules))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PAIR | {"score_chosen": 6.0, "score_rejected": 6}, "tie"),
        (PAIR | {"chosen-rating": 4, "rejected-rating": "4.0"}, "tie"),
        (PAIR | {"chosen_score": 0, "rejected_score": 0}, "tie"),
        (PAIR | {"rating": [8.0, 8.0]}, "tie"),
        (PAIR | {"scores": "[8.0, 8]"}, "tie"),
        (PAIR | {"rating": [8.0, 8.5], "status": "tie"}, "tie"),
        (PAIR | {"winner": "Tie"}, "tie"),
        (PAIR | {"label": "tie"}, "tie"),
        (GRADED | {"scores": [3, 3]}, "equal grades"),
        (GRADED | {"ranks": [1, 1]}, "equal grades"),
    ],
)
def test_equal_grades_are_ties(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    found = reading(tmp_path, row)
    assert (found.records, found.skipped) == ([], {reason: 1})
    with pytest.raises(DataError, match="the comparison is a tie") as caught:
        reading(tmp_path, row, ties="error")
    assert caught.value.where == "a.jsonl:1"


@pytest.mark.parametrize(
    ("more", "margin"),
    [
        ({"rating": [8.0, 5.0]}, 3.0),
        ({"rating": [5.0, 8.0]}, 3.0),
        ({"rating": [8.0, 5.0], "generations": ["Yes", "No"]}, 3.0),
        ({"rating": [8.0, 5.0], "generations": ["No", "Yes"]}, -3.0),
        ({"rating": [5.0, 8.0], "generations": ["No", "Yes"], "status": "swapped"}, 3.0),
        ({"rating": [5.0, 8.0], "margin": 0}, 0.0),
        ({"rating": 8.0}, 0.0),
        ({"rating": [8.0, 8.0, 8.0]}, 0.0),
        ({"status": "done"}, 0.0),
        ({"score_chosen": 1, "score_rejected": 6}, -5.0),
    ],
)
def test_margins(tmp_path: Path, more: dict[str, Any], margin: float) -> None:
    records: list[Any] = reading(tmp_path, PAIR | more).records
    assert [record.margin for record in records] == [margin]


@pytest.mark.parametrize("ranking", [[0, 2, 1], [1, 3, 2], ["1", "3", "2"], [1, 2, 2]])
def test_a_ranking_is_read_where_it_can_mean_one_thing(tmp_path: Path, ranking: list[Any]) -> None:
    row = {"prompt": "Hi!", "responses": ["best", "worst", "middle"], "ranking": ranking}
    found: list[Any] = reading(tmp_path, row).records
    expected = [("best", "worst"), ("best", "middle")]
    expected += [("middle", "worst")] if ranking != [1, 2, 2] else []
    assert [(record.chosen, record.rejected) for record in found] == expected


def test_a_ranking_that_can_mean_two_things_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "Hi!", "responses": ["middle", "worst", "best"], "ranking": [1, 2, 0]}
    with pytest.raises(DataError, match="the rank of each answer, or the answers from best to worst") as caught:
        reading(tmp_path, row)
    assert "`data.columns: {ranks: ranking}`" in str(caught.value.hint)
    pairs: list[Any] = reading(tmp_path, row, columns={"ranks": "ranking"}).records
    assert [(record.chosen, record.rejected) for record in pairs] == [
        ("middle", "worst"),
        ("best", "middle"),
        ("best", "worst"),
    ]
