"""What labelling tools and chat pages export."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import ARGILLA_ROW, ASKED, FEEDBACK_ROW, TASK_ROW, said

from perlhf.config.stages import LayoutConfig, RatingsConfig
from perlhf.data.read import Reading, read_all
from perlhf.data.records import Comparison, Demonstration, Rating
from perlhf.errors import DataError


def reading(tmp_path: Path, *rows: dict[str, Any], rules: LayoutConfig | None = None) -> Reading:
    (tmp_path / "a.json").write_text(json.dumps(list(rows)))
    return read_all("a.json", root=tmp_path, rules=rules)


def test_open_webui_rates_the_message_on_its_branch(tmp_path: Path) -> None:
    found = reading(tmp_path, FEEDBACK_ROW)
    prompt = (said("system", "Be kind."), ASKED)
    assert found.formats == {"a.json": "open-webui"}
    assert found.records == [Rating(prompt, "Go away.", False, "is it open", annotator="u1", source="a.json[0]")]


def feedback(**data: Any) -> dict[str, Any]:
    return FEEDBACK_ROW | {"data": FEEDBACK_ROW["data"] | data}


def test_open_webui_feedback_that_is_left_out(tmp_path: Path) -> None:
    elsewhere = feedback(rating=1) | {"meta": {"message_id": "gone"}}
    found = reading(
        tmp_path, feedback(rating=1), feedback(rating=None), feedback(rating=1) | {"snapshot": None}, elsewhere
    )
    assert [record.label for record in found.records if isinstance(record, Rating)] == [True]
    assert found.skipped == {
        "feedback without a thumb": 1,
        "feedback without a snapshot of the chat": 1,
        "feedback on a message that the snapshot doesn't have": 1,
    }


def test_open_webui_messages_as_a_list(tmp_path: Path) -> None:
    """Other versions keep the history right below the snapshot, without parents."""
    messages = [ASKED | {"id": "m1"}, said("assistant", "Go away.", id="m2"), said("user", "Why?", id="m3")]
    row = FEEDBACK_ROW | {"snapshot": {"chat": {"id": "c"}, "history": {"messages": messages}}}
    (record,) = reading(tmp_path, row).records
    assert record == Rating((ASKED,), "Go away.", False, "is it open", annotator="u1", source="a.json[0]")
    loop = [ASKED | {"id": "m1", "parentId": "m2"}, said("assistant", "No", id="m2", parentId="m1")]
    with pytest.raises(DataError, match="each other's parents"):
        reading(tmp_path, FEEDBACK_ROW | {"snapshot": {"history": {"messages": loop}}})


def test_label_studio_pairs(tmp_path: Path) -> None:
    found = reading(tmp_path, TASK_ROW)
    assert found.formats == {"a.json": "label-studio"}
    assert found.records == [
        Comparison(
            "Is it open?", "Go away.", "Until nine.", "is it open", annotator="ann@example.org", source="a.json[0]"
        )
    ]
    assert reading(tmp_path, TASK_ROW, TASK_ROW | {"annotations": []}).skipped == {"a task without an annotation": 1}


def task(kind: str, value: dict[str, Any], **data: str) -> dict[str, Any]:
    result = {"from_name": "verdict", "to_name": "response", "type": kind, "value": value}
    return {"id": 1, "data": {"prompt": "Hi?"} | data, "annotations": [{"completed_by": 3, "result": [result]}]}


def test_label_studio_choices_stars_and_texts(tmp_path: Path) -> None:
    (rated,) = reading(tmp_path, task("choices", {"choices": ["Good"]}, response="Yes")).records
    assert rated == Rating("Hi?", "Yes", True, "hi", annotator="3", source="a.json[0]")
    stars = LayoutConfig(ratings=RatingsConfig(up=4))
    (graded,) = reading(tmp_path, task("rating", {"rating": 3}, response="Yes"), rules=stars).records
    assert isinstance(graded, Rating) and graded.label is False
    (written,) = reading(tmp_path, task("textarea", {"text": ["Hello."]})).records
    assert written == Demonstration("Hi?", "Hello.", "hi", source="a.json[0]")
    with pytest.raises(DataError, match=r"no answer says what the record is \(verdict: 'Purple'\)"):
        reading(tmp_path, task("choices", {"choices": ["Purple"]}, response="Yes"))


MIN = {"id": 1, "annotator": 2, "annotation_id": 3, "created_at": "c", "updated_at": "u", "lead_time": 1.5}


def test_label_studio_min_and_csv(tmp_path: Path) -> None:
    pair = MIN | {"prompt": "Hi?", "answer1": "a", "answer2": "b", "better": {"selected": "left"}}
    assert reading(tmp_path, pair).records == [Comparison("Hi?", "a", "b", "hi", annotator="2", source="a.json[0]")]
    as_text = pair | {"better": "right", "annotator": "2"}
    assert reading(tmp_path, as_text).records == [Comparison("Hi?", "b", "a", "hi", annotator="2", source="a.json[0]")]
    stars = [MIN | {"prompt": "Hi?", "response": str(n), "stars_given": [{"rating": n}]} for n in (1, 3, 5)]
    with pytest.raises(DataError, match=r"grades \(1 to 5\)") as caught:
        reading(tmp_path, *stars)
    assert "data.ratings: {up: 4, down: 2} in a recipe" in str(caught.value)


def test_argilla_records(tmp_path: Path) -> None:
    """One record for each person's answer; what a model suggested is no answer."""
    found = reading(tmp_path, ARGILLA_ROW, ARGILLA_ROW | {"responses": {}})
    assert found.formats == {"a.json": "argilla"}
    first = Rating("Is it open?", "Until nine.", True, "is it open", annotator="u1", source="a.json[0]")
    second = Rating("Is it open?", "Until nine.", False, "is it open", annotator="u2", source="a.json[0]")
    assert found.records == [first, second]
    assert found.skipped == {"a record without a submitted response": 1}


def test_argilla_datasets_exports(tmp_path: Path) -> None:
    row = {
        "id": "1",
        "status": "completed",
        "prompt": "Hi?",
        "response1": "a",
        "response2": "b",
        "which.responses": ["response2", "response1"],
        "which.responses.users": ["u1", "u2"],
        "which.responses.status": ["submitted", "draft"],
        "which.suggestion": "response1",
        "which.suggestion.score": None,
    }
    pair = Comparison("Hi?", "b", "a", "hi", annotator="u1", source="a.json[0]")
    assert reading(tmp_path, row).records == [pair]
    ranking = [{"value": "response1", "rank": 2}, {"value": "response2", "rank": 1}]
    assert reading(tmp_path, row | {"which.responses": [ranking, None]}).records == [pair]
    older = {
        "prompt": "Hi?",
        "response": "a",
        "good": [{"user_id": "u", "value": "no", "status": "submitted"}, {"user_id": "w", "status": "discarded"}],
        "good-suggestion": None,
        "good-suggestion-metadata": {"agent": None},
        "external_id": None,
    }
    assert reading(tmp_path, older).records == [Rating("Hi?", "a", False, "hi", annotator="u", source="a.json[0]")]


def test_two_questions_that_could_count_are_named(tmp_path: Path) -> None:
    row = ARGILLA_ROW | {"responses": {name: [{"value": n, "user_id": "u"}] for n, name in enumerate(("nice", "true"))}}
    with pytest.raises(DataError, match=r"more than one answer says .*nice: 0, true: 1") as caught:
        reading(tmp_path, row)
    assert "`{rating: ...}`" in str(caught.value.hint)
    rules = LayoutConfig(ratings=RatingsConfig(up=1), columns={"rating": "responses.true.0.value"})
    (record,) = reading(tmp_path, row, rules=rules).records
    assert isinstance(record, Rating) and record.label is True


@pytest.mark.parametrize("given", ["1", "5"])
def test_choices_that_are_numbers_are_grades(tmp_path: Path, given: str) -> None:
    """A choice of 1 among five is no thumbs up."""
    row = {"prompt": "q", "response": "a", "quality.responses": [given], "quality.responses.users": ["u"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="the answers have grades"):
        read_all("a.jsonl", root=tmp_path)
    rules = LayoutConfig(ratings=RatingsConfig(up=4, down=2))
    (found,) = read_all("a.jsonl", root=tmp_path, rules=rules).records
    assert isinstance(found, Rating) and found.label == (given == "5")


@pytest.mark.parametrize(
    ("texts", "result", "first"),
    [
        (("text1", "text2"), {"type": "pairwise", "to_name": "answer1,answer2", "value": {"selected": "left"}}, True),
        (("model_a", "model_b"), {"type": "choices", "to_name": "prompt", "value": {"choices": ["B"]}}, False),
        (("right", "left"), {"type": "choices", "to_name": "prompt", "value": {"choices": ["left"]}}, False),
    ],
)
def test_label_studio_judges_the_two_texts_of_a_task(
    tmp_path: Path, texts: tuple[str, str], result: dict[str, Any], first: bool
) -> None:
    """Tags may be called otherwise than the data; a judgement is never an answer."""
    data = {"prompt": "Is it open?", texts[0]: "one", texts[1]: "two"}
    (record,) = reading(tmp_path, {"data": data, "annotations": [{"result": [result | {"from_name": "best"}]}]}).records
    assert isinstance(record, Comparison)
    assert (record.chosen, record.rejected) == (("one", "two") if first else ("two", "one"))


def test_label_studio_judgements_of_nothing_are_refused(tmp_path: Path) -> None:
    result = {"type": "choices", "from_name": "topic", "to_name": "prompt", "value": {"choices": ["money"]}}
    with pytest.raises(DataError, match=r"nothing says which texts 'topic' judges \('money'\)"):
        reading(tmp_path, {"data": {"prompt": "Is it open?"}, "annotations": [{"result": [result]}]})
