import json
from pathlib import Path
from typing import Any

import pytest

from perlhf.config.labelling import ProjectConfig, QuestionsConfig
from perlhf.errors import DataError
from perlhf.labelling.questions import Question, questions


def asked(rows: list[dict[str, Any]], directory: Path, **settings: Any) -> list[Question]:
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    rules = settings.pop("questions", {})
    return questions(ProjectConfig(questions=QuestionsConfig(paths=(str(file),), **rules), **settings))


def test_a_pair_is_one_question_whatever_the_columns_are_called(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p1", "completion_a": "x", "completion_b": "y"},
        {"prompt": "p2", "response_1": "x", "response_2": "y"},
        {"prompt": "p3", "completions": ["x", "y", "z"]},
        {"prompt": "p4", "completions": ["same", "same"]},
    ]
    found = asked(rows, tmp_path)
    assert sorted((q.prompt, *q.answers) for q in found) == [
        ("p1", "x", "y"),
        ("p2", "x", "y"),
        ("p3", "x", "y"),
        ("p3", "x", "z"),
        ("p3", "y", "z"),
    ]
    assert all(question.known is None and 0 <= question.place < 1 for question in found)


def test_which_side_was_chosen_does_not_show(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    found = asked(rows, tmp_path)
    first = sum(str(question.answers[0]).startswith("good") for question in found)
    assert 70 < first < 130


def test_ratings_and_both_sides_of_comparisons_can_be_thumbed(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad"}]
    assert {q.answers for q in asked(rows, tmp_path, kind="rating")} == {("good",), ("bad",)}
    rated = [{"prompt": "p", "completion": "good", "label": True}]
    assert [q.answers for q in asked(rated, tmp_path, kind="scale", criteria=("helpful",))] == [("good",)]


def test_order_limit_and_overlap_depend_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completions": ["x", "y"]} for i in range(300)]
    once = asked(rows, tmp_path, questions={"limit": 100, "overlap": 0.2})
    again = asked(rows[::-1], tmp_path, questions={"limit": 100, "overlap": 0.2})
    other = asked(rows, tmp_path, questions={"limit": 100, "overlap": 0.2, "seed": 1})
    assert [q.key for q in once] == [q.key for q in again] != [q.key for q in other]
    assert len(once) == 100
    assert 8 <= sum(question.wanted == 2 for question in once) <= 34


def test_hidden_tests_know_their_verdict_and_are_asked_once(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    file = tmp_path / "tests.jsonl"
    file.write_text(json.dumps(row) + "\n")
    found = asked([row, {"prompt": "q", "completions": ["x", "y"]}], tmp_path, questions={"tests": (str(file),)})
    (test,) = (question for question in found if question.known is not None)
    assert test.answers[0 if test.known == "first" else 1] == "good"
    assert len(found) == 2


def test_what_identifies_people_is_masked_before_it_is_stored(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "I am a@b.org"}], "completions": ["x", "call +49 30 1234567"]}]
    (question,) = asked(rows, tmp_path, redact=True)
    assert question.prompt == [{"role": "user", "content": "I am [mail address]"}]
    assert question.answers == ("x", "call [phone number]")
    assert question.group == "i am mail address", "no aborg: it is often the first turn's words without their signs"
    rows = [{"prompt": "call (0301) 234567", "completions": ["x", "y"], "group": "of a@b.org"}]
    assert [question.group for question in asked(rows, tmp_path, redact=True)] == ["of [mail address]"]


def test_numbers_and_names_of_keys_in_tool_calls_are_masked(tmp_path: Path) -> None:
    arguments = {"number": 4111111111111111, "a@b.org": 3, "c@d.org": [True, 7, 0.5, None], "card": 4111111111111111.0}
    called = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    rows = [{"prompt": "p", "completions": [called, "y"]}]
    (question,) = asked(rows, tmp_path, redact=True)
    (answer,) = (answer for answer in question.answers if isinstance(answer, list))
    assert answer[0]["role"] == "assistant"
    assert answer[0]["tool_calls"][0]["function"]["arguments"] == {
        "number": "[card number]",
        "[mail address]": 3,
        "[mail address] 2": [True, 7, 0.5, None],
        "card": "[card number].0",
    }


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("half \ud800", "half of a surrogate pair"),
        (["x", "y"], "which is no object"),
        ([{"content": "x"}], "'role' is missing"),
        ([{"role": "assistant", "content": 5}], "which is no text"),
        ([{"role": "assistant", "content": "half \ud800"}], "half of a surrogate pair"),
        ([{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}], "holds assistant, user"),
        ([{"role": "assistant", "content": [{"type": "image_url"}]}], "perlhf reads no images"),
    ],
)
def test_an_answer_that_cant_be_shown_or_learned_from_is_refused(answer: Any, said: str, tmp_path: Path) -> None:
    for row in ({"completions": ["a", answer]}, {"completion_a": answer, "completion_b": "a"}):
        with pytest.raises(DataError, match=said) as error:
            asked([{"prompt": "p"} | row], tmp_path)
        assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: ")


def test_messages_whose_content_comes_in_parts_are_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    (question,) = asked([{"prompt": "p", "completions": [[{"role": "assistant", "content": parts}], "z"]}], tmp_path)
    assert question.answers == ([{"role": "assistant", "content": "xy"}], "z")


def test_nothing_to_ask_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two answers of one prompt"):
        asked([{"prompt": "p"}], tmp_path)
