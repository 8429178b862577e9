import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from perlhf.config.stages import LayoutConfig
from perlhf.data.read import read, read_all
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


def test_a_prompt_keeps_the_other_columns_of_its_row(tmp_path: Path) -> None:
    row = {"prompt": "Hi!", "answer": "7", "cases": [{"in": 1}], "level": 0, "none": None, "group": "g", "source": "s"}
    (found,) = records(tmp_path, row)
    assert found == Prompt(
        "Hi!", "g", source="s", columns={"answer": "7", "cases": [{"in": 1}], "level": 0, "none": None}
    )


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


def one(tmp_path: Path, row: dict[str, Any]) -> Any:
    (record,) = records(tmp_path, row)
    return record


@pytest.mark.parametrize(
    ("written", "label"),
    [
        (True, True),
        (1, True),
        (1.0, True),
        ("True", True),
        ("yes", True),
        (" Up", True),
        ("good", True),
        ("1", True),
        (False, False),
        (0, False),
        (-1, False),
        ("false", False),
        ("NO", False),
        ("down", False),
        ("bad", False),
        ("-1", False),
    ],
)
def test_labels_as_files_write_them(tmp_path: Path, written: Any, label: bool) -> None:
    for name in ("label", "kto_tag"):
        assert one(tmp_path, {"prompt": "a", "completion": "b", name: written}).label is label
    assert one(tmp_path, {"messages": [HI, YES], "label": written}).label is label


def test_a_verdict_beside_an_answer_is_never_ignored(tmp_path: Path) -> None:
    """Imitating answers that somebody disliked would be the opposite of what the file says."""
    answer = {"prompt": "a", "completion": "b"}
    for more in ({"feedback": "thumbs_down"}, {"rating": "bad"}, {"rating": False}, {"liked": False}, {"vote": -1}):
        assert one(tmp_path, answer | more).label is False
    assert isinstance(one(tmp_path, answer | {"feedback": "Nice, but long."}), Demonstration)
    for name in ("rating", "stars", "score", "reward"):
        with pytest.raises(DataError, match="nothing says what becomes of them") as caught:
            records(tmp_path, *(answer | {name: grade} for grade in (3, 1, "5", [4, 4])))
        assert "data.ratings: {up: 4, down: 2} in a recipe" in str(caught.value) and caught.value.where == "a.jsonl:1"
    with pytest.raises(DataError, match="rating is 'Superb', which is no grade"):
        records(tmp_path, answer | {"rating": "Superb"})


def test_columns_that_are_not_ours_are_ignored(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    known = one(tmp_path, pair)
    for name in ("annotator_id", "prompt_id", "annotations", "group_id", "weights", "labels", "marginal", "sources"):
        assert one(tmp_path, {name: 7} | pair) == known
    assert one(tmp_path, {"prompt": "a", "completion": "b", "labeler": 3}).completion == "b"


@pytest.mark.parametrize("system", ["system", "system_prompt"])
def test_a_system_column_is_the_system_message(tmp_path: Path, system: str) -> None:
    message = {"role": "system", "content": "Be brief."}
    for prompt in ("Hi!", [HI], [message, HI]):
        found = one(tmp_path, {"prompt": prompt, "completion": "Yes", system: "Be brief."})
        assert found == Demonstration((message, HI), "Yes", "hi", source="a.jsonl:1")
    assert one(tmp_path, {"prompt": "Hi!", system: " "}).prompt == "Hi!"
    with pytest.raises(DataError, match="another in the column 'system'"):
        one(tmp_path, {"prompt": [message | {"content": "Be long."}, HI], "completion": "Yes", system: "Be brief."})


def test_conversations_that_part_before_the_last_turn(tmp_path: Path) -> None:
    more = {"role": "user", "content": "Why?"}
    found = one(tmp_path, {"chosen": [HI, YES, more, YES], "rejected": [HI, NO, more, NO]})
    assert (found.prompt, found.chosen, found.rejected) == ((HI,), (YES, more, YES), (NO, more, NO))
    shorter = one(tmp_path, {"chosen": [HI, YES, more, YES], "rejected": [HI, YES]})
    assert (shorter.prompt, shorter.chosen, shorter.rejected) == ((HI,), (YES, more, YES), "Yes")
    beside = one(tmp_path, {"prompt": "Hi!", "chosen": [HI, YES, more, YES], "rejected": [HI, YES, more, NO]})
    assert (beside.prompt, beside.chosen, beside.rejected) == ((HI, YES, more), "Yes", "No")
    for chosen in ([HI, YES, more], [HI, more, YES]):
        with pytest.raises(DataError, match="after the prompt"):
            one(tmp_path, {"chosen": chosen, "rejected": [HI, NO]})


def test_equal_sides_and_sides_that_repeat_the_prompt(tmp_path: Path) -> None:
    long = "What is a tyre lever?"
    rows = [
        {"prompt": long, "chosen": f"{long} A tool.", "rejected": f"{long} No idea."},
        {"prompt": "Hi", "chosen": "Hi\nA tool.", "rejected": "Hi\nNo idea."},
    ]
    assert [(r.chosen, r.rejected) for r in records(tmp_path, *rows)] == [("A tool.", "No idea.")] * 2
    kept = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}
    assert (one(tmp_path, kept).chosen, one(tmp_path, kept).rejected) == ("Hi there", "Hi you")
    once = {"prompt": long, "chosen": f"{long} A tool.", "rejected": "No idea."}
    assert one(tmp_path, once).chosen == f"{long} A tool."
    assert records(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "b"}) == []


def test_texts_without_a_prompt_are_split_where_they_part(tmp_path: Path) -> None:
    lines = one(tmp_path, {"chosen": "A bell?\nI think so.", "rejected": "A bell?\nI doubt it."})
    assert (lines.prompt, lines.chosen, lines.rejected) == ("A bell?", "I think so.", "I doubt it.")
    words = one(tmp_path, {"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert (words.prompt, words.chosen, words.rejected) == ("The sky is", "blue.", "green.")
    with pytest.raises(DataError, match="column 'prompt' is missing"):
        one(tmp_path, {"chosen": "I think so.", "rejected": "I doubt it."})


@pytest.mark.parametrize("mark", ["\n\nHuman: Hi!\n\nAssistant:", "Human: Hi!\n\nAssistant:", "User: Hi!\nAssistant: "])
def test_a_transcript_as_prompt(tmp_path: Path, mark: str) -> None:
    pair = Comparison((HI,), "Yes", "No", "hi", source="a.jsonl:1")
    assert one(tmp_path, {"prompt": mark, "chosen": " Yes", "rejected": " No"}) == pair
    assert one(tmp_path, {"prompt": mark, "chosen": f"{mark} Yes", "rejected": f"{mark} No"}) == pair
    assert one(tmp_path, {"prompt": mark}) == Prompt((HI,), "hi", source="a.jsonl:1")
    about = "Human: Hi!\n\nAssistant: Yes\n\nSum this dialog up."
    assert one(tmp_path, {"prompt": about}).prompt == about


def test_prompts_keep_their_other_columns(tmp_path: Path) -> None:
    row = {"prompt": "Hi!", "answer": 7, "tests": ["x"], "score": None, "group": "g", "system": "S"}
    found = one(tmp_path, row)
    assert found.columns == {"answer": 7, "tests": ["x"], "score": None} and found.group == "g"


def test_prompts_beside_whole_conversations(tmp_path: Path) -> None:
    row = {"prompt": "Hi!", "prompt_id": "x", "messages": [HI, YES, HI, NO]}
    assert one(tmp_path, row) == Demonstration((HI, YES, HI), "No", "hi", source="a.jsonl:1")
    assert isinstance(one(tmp_path, row | {"prompt": "Something else"}), Prompt)
    apart = {"messages": [HI], "chosen": "Yes", "rejected": "No"}
    assert one(tmp_path, apart) == Comparison((HI,), "Yes", "No", "hi", source="a.jsonl:1")


def test_cells_of_csv_files(tmp_path: Path) -> None:
    row = {"prompt": "Hi!", "completion": "Yes", "label": "True", "weight": "0.5", "annotator": "", "group": ""}
    assert one(tmp_path, row) == Rating("Hi!", "Yes", True, "hi", weight=0.5, source="a.jsonl:1")
    assert isinstance(one(tmp_path, row | {"label": ""}), Demonstration)
    chats = {name: json.dumps(part) for name, part in (("prompt", [HI]), ("chosen", [YES]))} | {"rejected": str([NO])}
    assert one(tmp_path, chats) == Comparison((HI,), "Yes", "No", "hi", source="a.jsonl:1")
    asked = {"prompt": "Write a chat as JSON.", "completion": json.dumps([HI, YES])}
    assert one(tmp_path, asked).completion == json.dumps([HI, YES]), "an answer to plain text stays text"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "completion": "b", "images": ["x.png"]}, "column 'images' holds images"),
        ({"prompt": "a", "completion": "b", "chat_template_kwargs": {"x": 1}}, "'chat_template_kwargs' is not read"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "TRL's steps"),
        ({"question": "a", "answer": "b"}, "column 'prompt' is missing"),
    ],
)
def test_what_is_refused_by_name(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        one(tmp_path, row)
    empty = {name: cell for name, cell in row.items() if name in ("prompt", "completion")} | {"images": []}
    if "completion" in empty:
        assert one(tmp_path, empty).completion == "b"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, YES], "chosen": "Yes", "rejected": "No"},
        {"prompt": [HI, YES], "chosen": [YES], "rejected": [NO]},
        {"messages": [HI, NO], "chosen": "Yes", "rejected": "No"},
        {"messages": [HI, YES], "chosen": {"role": "assistant", "content": "Yes"}, "rejected": NO},
        {"prompt": "User: Hi!\n\nAssistant:", "chosen": " Yes", "rejected": " No"},
    ],
)
def test_an_answer_that_ends_the_prompt_is_not_asked_again(tmp_path: Path, row: dict[str, Any]) -> None:
    assert records(tmp_path, row) == [Comparison((HI,), "Yes", "No", "hi", source="a.jsonl:1")]


def test_a_completion_that_ends_the_prompt_is_not_asked_again(tmp_path: Path) -> None:
    (found,) = records(tmp_path, {"messages": [HI, YES], "completion": "Yes", "label": 0})
    assert found == Rating((HI,), "Yes", False, "hi", source="a.jsonl:1")
    (found,) = records(tmp_path, {"prompt": [HI, {"role": "assistant", "content": "Y"}], "completion": "es"})
    assert len(found.prompt) == 2  # an answer that is begun


@pytest.mark.parametrize("mark", ["Human: {}\n\nAssistant: {}", "USER: {}\n\nASSISTANT: {}", "User: {}\nAssistant: {}"])
def test_transcripts_in_answers_to_a_plain_prompt(tmp_path: Path, mark: str) -> None:
    row = {"chosen": mark.format("Hi!", "Yes"), "rejected": mark.format("Hi!", "No")}
    asked, alone = records(tmp_path, {"prompt": "Hi!"} | row, {"prompt": None, "weight": 1} | row)
    assert asked == Comparison("Hi!", "Yes", "No", "hi", source="a.jsonl:1")
    assert alone == Comparison((HI,), "Yes", "No", "hi", source="a.jsonl:2")
    (other,) = records(tmp_path, {"prompt": "Bye!"} | row)
    assert other.chosen == row["chosen"]


def test_a_system_turn_of_a_transcript(tmp_path: Path) -> None:
    row = {side: f"System: Be kind.\n\nHuman: Hi!\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    (found,) = records(tmp_path, row)
    assert found.prompt == ({"role": "system", "content": "Be kind."}, HI) and found.rejected == "rejected"


@pytest.mark.parametrize("name", ["system_message", "system_prompt", "sys_prompt"])
def test_names_of_the_system_column(tmp_path: Path, name: str) -> None:
    (found,) = records(tmp_path, {name: "Be kind.", "prompt": "Hi!", "completion": "Yes"})
    assert found.prompt == ({"role": "system", "content": "Be kind."}, HI)


@pytest.mark.parametrize("name", ["quality", "helpfulness", "human_rating", "Rating", "Star Rating", "n_stars"])
def test_more_names_of_grades_are_not_imitated(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="the answers have grades") as caught:
        records(tmp_path, {"prompt": "Hi!", "completion": "No", name: 1})
    assert (
        caught.value.hint
        == "data.ratings: {up: ..., down: ...} in a recipe, --data.ratings.up, .down on the command line "
        "(without `data.` after `perlhf data`)"
    )  # one grade shows no scale
    (remark,) = records(tmp_path, {"prompt": "Hi!", "completion": "Yes", "quality": "checked by Ann"})
    assert isinstance(remark, Demonstration)


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("is_correct", False, False),
        ("helpful", "True", True),
        ("thumbs_down", True, False),
        ("thumbs_down", 1, False),
        ("label", "thumbs-up", True),
        ("label", "not_helpful", False),
        ("label", "chosen", True),
        ("Label", "Bad", False),
        ("label", "-1", False),
    ],
)
def test_more_words_of_labels(tmp_path: Path, name: str, content: Any, label: bool) -> None:
    (found,) = records(tmp_path, {"prompt": "Hi!", "completion": "Yes", name: content})
    assert found == Rating("Hi!", "Yes", label, "hi", source="a.jsonl:1")


def test_names_with_capitals_and_spaces(tmp_path: Path) -> None:
    found = records(tmp_path, {"Prompt": "Hi!", "Chosen": "Yes", "REJECTED": "No", "Id": 1})
    assert found == [Comparison("Hi!", "Yes", "No", "hi", source="a.jsonl:1")]
    (found,) = records(tmp_path, {"Prompt": "Hi!", "Response A": "Yes", "Response B": "No", "Winner": "B"})
    assert found.chosen == "No"
    (found,) = records(tmp_path, {"prompt": "Hi!", "Star": 3})
    assert found == Prompt("Hi!", "hi", source="a.jsonl:1", columns={"Star": 3})


def test_no_thumb_at_all_is_no_thumbs_down(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a", "thumbs_up": 0, "thumbs_down": 0}))
    assert read_all("a.jsonl", root=tmp_path).skipped == {"an answer without a thumb": 1}


def test_shared_turns_may_differ_in_notes_and_blanks(tmp_path: Path) -> None:
    sides = {"chosen": [HI | {"id": 1}, YES], "rejected": [HI | {"id": 2}, NO]}
    assert [record.chosen for record in records(tmp_path, sides)] == ["Yes"]
    (found,) = records(tmp_path, {"prompt": [HI], "chosen": [HI | {"content": "Hi! "}, YES], "rejected": "No"})
    assert found == Comparison((HI,), "Yes", "No", "hi", source="a.jsonl:1")


def test_conversations_that_begin_with_another_prompt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="begin with something else than the prompt") as caught:
        records(tmp_path, {"prompt": "Be kind.", "chosen": [HI, YES], "rejected": [HI, NO]})
    assert "{system: prompt}" in str(caught.value.hint)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"loss": False}, {"train": False}])
def test_messages_that_are_not_to_be_learned(tmp_path: Path, flag: dict[str, Any]) -> None:
    (found,) = records(tmp_path, {"messages": [HI, YES, HI, NO | flag]})
    assert found == Demonstration((HI,), "Yes", "hi", source="a.jsonl:1")


def test_earlier_exchanges_beside_a_prompt(tmp_path: Path) -> None:
    row = {"prompt": "Hi!", "history": [["Who?", "Me"]], "system": "Be kind."}
    asked = ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}, HI)
    system = {"role": "system", "content": "Be kind."}
    answered, compared, other = records(
        tmp_path,
        row | {"response": "Yes"},
        row | {"chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi!", "history": "a note", "completion": "Yes"},
    )
    assert answered.prompt == compared.prompt == (system, *asked)
    assert other.prompt == "Hi!"


@pytest.mark.parametrize("name", ["rejected", "rejected_response"])
def test_a_response_and_a_rejected_one_make_a_comparison(tmp_path: Path, name: str) -> None:
    found = records(tmp_path, {"prompt": "Hi!", "response": "Yes", name: "No"})
    assert found == [Comparison("Hi!", "Yes", "No", "hi", source="a.jsonl:1")]


@pytest.mark.parametrize(
    ("name", "content", "mapping", "label"),
    [
        ("response_harm_label", "harmful", {"label": "response_harm_label"}, False),
        ("response_harm_label", "unharmful", {"label": "response_harm_label"}, True),
        ("is_safe", False, {"label": "is_safe"}, False),
        ("is_safe", 1, {"label": "is_safe"}, True),
        ("is_harmful", True, {"is_bad": "is_harmful"}, False),
        ("is_harmful", "harmful", {"label": "is_harmful"}, False),
        ("is_toxic", False, {"is_bad": "is_toxic"}, None),
    ],
)
def test_a_judgement_of_safety_is_no_verdict_unless_it_is_named(
    tmp_path: Path, name: str, content: Any, mapping: dict[str, str], label: bool | None
) -> None:
    row = {"prompt": "Hi!", "response": "Yes", "prompt_harm_label": "harmful", "is_safety": 1, name: content}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))

    def found(**rules: Any) -> Any:
        return read_all("a.jsonl", root=tmp_path, rules=LayoutConfig(**rules)).records

    with pytest.raises(DataError, match=f"an answer has '{name}'") as caught:
        found()
    (ours, theirs), *_ = mapping.items()
    assert f"`data.columns: {{{ours}: {theirs}}}`" in str(caught.value.hint)
    answer = Demonstration("Hi!", "Yes", "hi", source="a.jsonl:1")
    verdict = answer if label is None else Rating("Hi!", "Yes", label, "hi", source="a.jsonl:1")
    assert found(columns=mapping) == [verdict]
    assert found(grades="ignore") == [answer]


def test_a_verdict_beside_a_judgement_of_safety_counts(tmp_path: Path) -> None:
    labelled, compared, other, asked = records(
        tmp_path,
        {"prompt": "Hi!", "completion": "Yes", "is_safe": False, "label": True},
        {"prompt": "Hi!", "chosen": "Yes", "rejected": "No", "is_safe": False},
        {"prompt": "Hi!", "completion": "Yes", "safety": "fire", "prompt_harm_label": "harmful", "is_safe": None},
        {"prompt": "Hi!", "is_safe": False},
    )
    assert labelled.label and compared.chosen == "Yes" and isinstance(other, Demonstration)
    assert asked.columns == {"is_safe": False}


@pytest.mark.parametrize(("name", "hint"), [("safety", "{rating: safety}"), ("toxic", "`data.grades: ignore`")])
def test_a_grade_of_safety(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(DataError, match=f"an answer has '{name}'") as caught:
        records(tmp_path, {"prompt": "Hi!", "completion": "Yes", name: 0.5})
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("rejected", [" No", "Human: Hi! Assistant: No"])
def test_a_transcript_on_one_line(tmp_path: Path, rejected: str) -> None:
    (found,) = records(tmp_path, {"prompt": "Human: Hi! Assistant:", "chosen": " Yes", "rejected": rejected})
    assert found == Comparison((HI,), "Yes", "No", "hi", source="a.jsonl:1")
    longer = {"prompt": "User: Hi! Assistant: Yes User: The Human: a play? Assistant: ", "completion": "No"}
    (found,) = records(tmp_path, longer)
    assert found.prompt == (HI, YES, {"role": "user", "content": "The Human: a play?"})


def test_dialogs_on_one_line(tmp_path: Path) -> None:
    both = "Human: Hi! Assistant: Yes Human: Hi! Assistant: I say "
    (found,) = records(tmp_path, {"chosen": f"{both}yes", "rejected": f"{both}no"})
    assert found == Comparison((HI, YES, HI), "I say yes", "I say no", "hi", source="a.jsonl:1")


def test_answers_that_nothing_grades_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = records(tmp_path, {"prompt": "Hi!", "responses": ["Yes", "No"]})
    assert isinstance(found, Prompt)
    assert "1 rows have several 'responses' and nothing that grades or ranks each" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["Human: Hi! Human: Ho! Assistant:", "Human: Hi!Assistant:", "Ask an Assistant:"])
def test_no_transcript_on_one_line(tmp_path: Path, prompt: str) -> None:
    (found,) = records(tmp_path, {"prompt": prompt, "completion": "Yes"})
    assert found.prompt == prompt


CHAT = [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Yes"}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Hi! TL;DR:", "label": "Yes."}, Demonstration),
        ({"inputs": "Hi!", "targets": "Yes", "language": "en"}, Demonstration),
        ({"trajectory": "Hi!", "chosen": "Yes", "rejected": "No"}, Comparison),
        ({"trajectory": CHAT[:1], "chosen": "Yes", "rejected": "No"}, Comparison),
        ({"id": "1", "system_prompt": "Be kind.", "question": "Hi!", "response": "Yes"}, Demonstration),
        ({"context": [HI], "original_response": "No", "edited_response": "Yes", "feedback": ["f"]}, Demonstration),
        ({"id": "0", "data": ["Hi!", "Yes"]}, Demonstration),
        ({"id": "0", "dialog": [HI, YES]}, Demonstration),
        ({"id": "0", "dialog": CHAT}, Demonstration),
        ({"question": "Hi!", "answer": "Yes", "label": True}, Rating),
        ({"question": "Hi!", "completion": "Yes", "label": True}, Rating),
        ({"prompt": "Hi!", "answer": "Yes", "label": 1}, Rating),
        ({"Question": "Hi!", "Response": "Yes", "Id": 1}, Demonstration),
        ({"question": "Hi!", "level": 2}, Prompt),
    ],
)
def test_other_names_are_read_as_the_error_says(tmp_path: Path, row: dict[str, Any], kind: type) -> None:
    with pytest.raises(DataError, match=r"column '(prompt|completion)' is missing") as caught:
        records(tmp_path, row)
    named = {name.lower() for name in re.findall(r"'(\w+)'", str(caught.value.allowed))}
    assert named == {name.lower() for name in row}
    typed = re.search(r"--data.columns '(\{.*?\})'", str(caught.value.hint))
    assert typed, caught.value.hint
    rules = LayoutConfig(columns=yaml.safe_load(typed[1]))
    (found,) = read_all("a.jsonl", root=tmp_path, rules=rules).records
    assert isinstance(found, kind)
    answer: Any = getattr(found, "completion", getattr(found, "chosen", "Yes"))
    assert str(answer).removesuffix(".") == "Yes" and "Hi!" in str(found.prompt)


def test_texts_in_turn_are_a_conversation(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": ["Hi!", "No", "Hi!", "Yes"], "source": "forum"}))
    (found,) = read_all("a.jsonl", root=tmp_path).records
    assert found == Demonstration((HI, NO, HI), "Yes", "hi", source="forum")
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": ["Hi!"]}))
    assert read_all("a.jsonl", root=tmp_path).skipped == {"a conversation that doesn't end with an answer": 1}
