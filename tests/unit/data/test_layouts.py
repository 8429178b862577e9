"""Layouts of people's own files: recognised by their columns, and read as their tools mean them."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import (
    ARENA_ROW,
    ASKED,
    GOOD,
    HELPSTEER_ROW,
    OPENAI_ROW,
    POOR,
    SHAREGPT_ROW,
    ULTRAFEEDBACK_ROW,
    graded_answer,
    said,
)

from perlhf.config.stages import LayoutConfig, RatingsConfig
from perlhf.data.read import Reading, read_all
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating
from perlhf.data.tools import validate
from perlhf.errors import DataError

STARS = LayoutConfig(ratings=RatingsConfig(up=4, down=2))


def reading(tmp_path: Path, *rows: dict[str, Any], format: str = "auto", rules: LayoutConfig | None = None) -> Reading:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_all("a.jsonl", format, root=tmp_path, rules=rules)


def one(tmp_path: Path, row: dict[str, Any], layout: str, rules: LayoutConfig | None = None) -> Any:
    found = reading(tmp_path, row, rules=rules)
    assert found.formats == {"a.jsonl": layout}
    (record,) = found.records
    return record


def refused(tmp_path: Path, row: dict[str, Any], what: str, format: str = "auto", rules: Any = None) -> DataError:
    with pytest.raises(DataError) as caught:
        reading(tmp_path, row, format=format, rules=rules)
    assert what in caught.value.what and caught.value.where == "a.jsonl:1"
    return caught.value


# ---- ShareGPT -------------------------------------------------------------------------------------------------------


def test_sharegpt_calls_and_tools(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "hours", "arguments": {"day": "today"}}}
    schema = {"name": "hours", "description": "When?", "parameters": {"type": "object"}}
    prompt = (
        said("system", "Be kind."),
        ASKED,
        said("assistant", "", tool_calls=[call]),
        said("tool", "9-21"),
    )
    assert one(tmp_path, SHAREGPT_ROW, "sharegpt") == Demonstration(
        prompt,
        "Until nine.",
        "is it open",
        source="a.jsonl:1",
        tools=({"type": "function", "function": schema},),
    )


def turns(*said_by: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": what} for who, what in said_by]


@pytest.mark.parametrize(
    "sides",
    [
        {"chosen": turns(("gpt", "Yes"))[0], "rejected": turns(("gpt", "No"))[0]},
        {"chosen": turns(("gpt", "Yes")), "rejected": turns(("gpt", "No"))},
        {"chosen": "Yes", "rejected": "No"},
        {"chosen": {"role": "assistant", "content": "Yes"}, "rejected": {"role": "assistant", "content": "No"}},
    ],
)
def test_sharegpt_comparisons(tmp_path: Path, sides: dict[str, Any]) -> None:
    row = {"conversations": turns(("system", "S"), ("human", "Hi?"))} | sides
    prompt = (said("system", "S"), said("user", "Hi?"))
    assert one(tmp_path, row, "sharegpt") == Comparison(prompt, "Yes", "No", "hi", source="a.jsonl:1")


def test_sharegpt_ratings_and_other_spellings(tmp_path: Path) -> None:
    asked = turns(("human", "Hi?"), ("gpt", "Yes"))
    assert one(tmp_path, {"conversations": asked, "kto_tag": "false"}, "sharegpt").label is False
    assert one(tmp_path, {"conversations": [said("user", "Hi?"), GOOD]}, "sharegpt").completion == "Until nine."
    pairs = {"conversation": [{"input": "Hi?", "output": "Yes"}, {"input": "Why?", "output": "So"}]}
    assert one(tmp_path, pairs, "sharegpt") == Demonstration(
        (said("user", "Hi?"), said("assistant", "Yes"), said("user", "Why?")), "So", "hi", source="a.jsonl:1"
    )
    as_text = {"conversations": json.dumps(asked)}
    assert one(tmp_path, as_text, "sharegpt").completion == "Yes"
    unanswered = reading(tmp_path, {"conversations": asked[:1]}, {"conversations": asked})
    assert len(unanswered.records) == 1
    assert unanswered.skipped == {"a conversation that doesn't end with an answer": 1}
    assert refused(tmp_path, {"conversations": turns(("humen", "Hi?"))}, "a turn from 'humen'").hint == (
        "did you mean 'human'?"
    )


# ---- Alpaca ---------------------------------------------------------------------------------------------------------


def test_alpaca(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert one(tmp_path, row, "alpaca") == Demonstration("Add.\n1 and 2", "3", "add 1 and 2", source="a.jsonl:1")
    assert one(tmp_path, row | {"input": ""}, "alpaca").prompt == "Add."
    assert one(tmp_path, {"instruction": "Add.", "context": "1", "response": "2"}, "alpaca").prompt == "Add.\n1"
    chat = one(tmp_path, row | {"system": "S", "history": [["a", "b"]]}, "alpaca")
    assert chat.prompt == (
        said("system", "S"),
        said("user", "a"),
        said("assistant", "b"),
        said("user", "Add.\n1 and 2"),
    )
    assert one(tmp_path, row | {"kto_tag": False}, "alpaca") == Rating(
        "Add.\n1 and 2", "3", False, "add 1 and 2", source="a.jsonl:1"
    )
    assert one(tmp_path, row | {"score": 5}, "alpaca", STARS).label is True
    refused(tmp_path, row | {"history": ["a"]}, "a part of 'history' is 'a'")


def test_alpaca_comparisons_and_prompts(tmp_path: Path) -> None:
    pair = Comparison("Add.", "3", "4", "add", source="a.jsonl:1")
    assert one(tmp_path, {"instruction": "Add.", "input": "", "chosen": "3", "rejected": "4"}, "alpaca") == pair
    assert one(tmp_path, {"instruction": "Add.", "input": "", "output": ["3", "4"]}, "alpaca") == pair
    assert isinstance(one(tmp_path, {"instruction": "Add.", "input": "1"}, "alpaca"), Prompt)


# ---- ms-swift and OpenAI --------------------------------------------------------------------------------------------


def test_swift(tmp_path: Path) -> None:
    pair = Comparison((ASKED,), "Until nine.", "Go away.", "is it open", source="a.jsonl:1")
    assert one(tmp_path, {"messages": [ASKED, GOOD], "rejected_response": "Go away."}, "swift") == pair
    assert one(tmp_path, {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, POOR]}, "swift") == pair
    rated = one(tmp_path, {"messages": [ASKED, POOR], "label": False}, "trl")
    assert rated == Rating((ASKED,), "Go away.", False, "is it open", source="a.jsonl:1")
    asked = {"query": "Why?", "response": "So", "history": [["a", "b"]]}
    shown = one(tmp_path, asked, "swift")
    assert isinstance(shown, Demonstration) and [turn["content"] for turn in shown.prompt] == ["a", "b", "Why?"]  # type: ignore[index]
    assert one(tmp_path, asked | {"rejected_response": "No"}, "swift").rejected == "No"
    refused(tmp_path, {"messages": [ASKED], "rejected_response": "x"}, "does not end with an assistant message")


def test_openai_preferences(tmp_path: Path) -> None:
    pair = Comparison((ASKED,), "Until nine.", "Go away.", "is it open", source="a.jsonl:1")
    assert one(tmp_path, OPENAI_ROW, "openai") == pair
    older = {"input": {"messages": [ASKED]}, "preferred_completion": [GOOD], "non_preferred_completion": [POOR]}
    assert one(tmp_path, older, "openai") == pair
    tool = {"type": "function", "function": {"name": "f"}}
    assert one(tmp_path, OPENAI_ROW | {"input": {"messages": [ASKED], "tools": [tool]}}, "openai").tools == (tool,)


def test_openai_fine_tuning(tmp_path: Path) -> None:
    """The last assistant message whose weight isn't 0 is learned; what follows it is left out."""
    weighed = [ASKED, GOOD | {"weight": 1}, said("user", "Why?"), POOR | {"weight": 0}]
    assert one(tmp_path, {"messages": weighed}, "trl") == Demonstration(
        (ASKED,), "Until nine.", "is it open", source="a.jsonl:1"
    )
    none = reading(tmp_path, {"messages": [ASKED, POOR | {"weight": 0}]})
    assert none.skipped == {"every assistant message has the weight 0": 1}
    called = said("assistant", None, function_call={"name": "f", "arguments": '{"x": 1}'})
    old = {"messages": [ASKED, called, said("function", "3", name="f"), GOOD], "functions": [{"name": "f"}]}
    shown = one(tmp_path, old, "trl")
    assert shown.prompt[1:] == (
        said("assistant", None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]),
        said("tool", "3", name="f"),
    )
    assert shown.tools == ({"type": "function", "function": {"name": "f"}},)


# ---- Which answers of a conversation are learned ---------------------------------------------------------------------

ALL = LayoutConfig(turns="all")
WHY, TALK = said("user", "Why?"), "conversations have earlier answers"
TALKED = ("Is it open?", "Until nine.", "Why?", "Go away.")


def warned(tmp_path: Path, *rows: dict[str, Any], rules: LayoutConfig | None = None) -> tuple[str, ...]:
    """What is told of rows that can all be read, groups too few to split left out."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = validate([str(tmp_path / "a.jsonl")], rules=rules)
    assert found.ok and not found.skipped
    return tuple(line for line in found.warnings if "groups" not in line and "repeat" not in line)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, GOOD, WHY, POOR]},
        {
            "conversations": turns(
                ("human", "Is it open?"), ("gpt", "Until nine."), ("human", "Why?"), ("gpt", "Go away.")
            )
        },
        {"instruction": "Why?", "output": "Go away.", "history": [["Is it open?", "Until nine."]]},
        {"query": "Why?", "response": "Go away.", "history": [["Is it open?", "Until nine."]]},
    ],
)
def test_each_answer_of_a_conversation_is_learned_where_that_is_asked_for(tmp_path: Path, row: dict[str, Any]) -> None:
    last = Demonstration((ASKED, GOOD, WHY), "Go away.", "is it open", source="a.jsonl:1")
    assert reading(tmp_path, row).records == [last]
    (line,) = warned(tmp_path, row, {"messages": [ASKED, GOOD]})
    assert line.startswith(f"1 {TALK}") and "`data.turns: all`" in line
    first = Demonstration((ASKED,), "Until nine.", "is it open", source="a.jsonl:1")
    assert reading(tmp_path, row, rules=ALL).records == [first, last]
    assert warned(tmp_path, row, rules=ALL) == ()


def test_a_message_of_weight_0_and_a_greeting_are_never_learned(tmp_path: Path) -> None:
    hello = said("assistant", "Hello!")
    weighed = [hello, ASKED, POOR | {"weight": 0}, WHY, GOOD | {"weight": 1}, WHY, said("assistant", " "), WHY, GOOD]
    found = reading(tmp_path, {"messages": weighed}, rules=ALL).records
    assert [len(record.prompt) for record in found] == [4, 8]
    assert found[0].prompt == (hello, ASKED, POOR, WHY)
    assert warned(tmp_path, {"messages": [hello, ASKED, POOR | {"weight": 0}, WHY, GOOD]}) == ()
    ignored = reading(
        tmp_path, {"messages": [ASKED, GOOD | {"train": "false"}, WHY, GOOD | {"weight": "1"}]}, rules=ALL
    )
    assert len(ignored.records) == 1
    half = refused(tmp_path, {"messages": [ASKED, GOOD | {"weight": 0.5}]}, "a message has the weight 0.5")
    assert "column 'weight'" in (half.hint or "")


def test_a_verdict_is_on_the_last_answer(tmp_path: Path) -> None:
    row = {"messages": [ASKED, GOOD, WHY, POOR], "label": False}
    assert TALK not in str(warned(tmp_path, row))
    for rules in (None, ALL):
        assert one(tmp_path, row, "trl", rules) == Rating(
            (ASKED, GOOD, WHY), "Go away.", False, "is it open", source="a.jsonl:1"
        )


def test_a_verdict_inside_a_message_is_not_imitated(tmp_path: Path) -> None:
    for key, content, ours in (("rating", 1, "rating"), ("label", "bad", "label"), ("stars", "2", "rating")):
        row = {"messages": [ASKED, POOR | {key: content}]}
        error = refused(tmp_path, row, f"a message holds {key!r}")
        assert f"{{{ours}: messages.-1.{key}}}" in (error.hint or "")
        rules = STARS.model_copy(update={"columns": {ours: f"messages.-1.{key}"}})
        assert one(tmp_path, row, "trl", rules).label is False
    refused(tmp_path, {"conversations": [*turns(("human", "a")), {"from": "gpt", "value": "b", "score": 3}]}, "'score'")


def test_an_empty_verdict_is_told(tmp_path: Path) -> None:
    talk = {"conversations": turns(("human", "a"), ("gpt", "b"))}
    for row in ({"prompt": "a", "completion": "b"}, talk, {"instruction": "a", "output": "b"}):
        for name, content in (("label", None), ("rating", None), ("kto_tag", "")):
            lines = warned(tmp_path, row | {"label": True}, row | {name: content})
            assert "1 answers have an empty label or rating and are read as demonstrations" in lines, (row, name)
    assert (
        warned(tmp_path, {"prompt": "a", "label": None}, {"prompt": "a", "chosen": "b", "rejected": "c", "label": None})
        == ()
    )


@pytest.mark.parametrize("name", ["input", "context"])
@pytest.mark.parametrize("answer", [{"completion": "c"}, {"chosen": "c", "rejected": "d"}, {"response": "c"}])
def test_what_stands_beside_the_prompt_is_told_and_can_be_asked(
    tmp_path: Path, name: str, answer: dict[str, Any]
) -> None:
    row = {"prompt": "Translate.", name: "Hallo"} | answer
    (line,) = warned(tmp_path, row, row | {name: ""})
    assert line.startswith(f"1 rows have {name!r} beside 'prompt'")
    columns = line.split("{")[1].split("}")[0]
    rules = LayoutConfig(columns=dict(part.split(": ") for part in columns.split(", ")))
    assert one(tmp_path, row, "alpaca", rules).prompt == "Translate.\nHallo"


def test_an_instructions_input_is_asked_whatever_judges_the_answers(tmp_path: Path) -> None:
    asked = {"instruction": "Translate.", "input": "Hallo"}
    pair = asked | {"output_1": "hi", "output_2": "no", "preference": 1}
    graded = asked | {"completions": [graded_answer("hi", "5"), graded_answer("no", "1")]}
    for row, layout, margin in ((pair, "arena", 0.0), (graded, "ultrafeedback", 4.0)):
        assert one(tmp_path, row, layout) == Comparison(
            "Translate.\nHallo", "hi", "no", "translate hallo", margin=margin, source="a.jsonl:1"
        )
    row = {"prompt": "Translate.", "context": "Hallo", "response_a": "hi", "response_b": "no", "winner": "a"}
    assert warned(tmp_path, row)[0].startswith("1 rows have 'context' beside 'prompt'")
    assert one(tmp_path, row, "arena", LayoutConfig(columns={"instruction": "prompt"})).prompt == "Translate.\nHallo"


# ---- Grades and preferences -----------------------------------------------------------------------------------------


def test_ultrafeedback_compares_answers_with_different_grades(tmp_path: Path) -> None:
    answers = [
        graded_answer("a", "1", "N/A"),
        graded_answer("b", "5", "4"),
        graded_answer("c", "4.5"),
        {"response": "d"},
    ]
    found = reading(tmp_path, ULTRAFEEDBACK_ROW | {"completions": answers})
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in found.records if isinstance(pair, Comparison)] == [
        ("b", "a", 3.5),  # means 1, 4.5, 4.5
        ("c", "a", 3.5),
    ]
    assert found.skipped == {"equal grades": 1, "an answer without a grade": 1}
    rated = reading(tmp_path, ULTRAFEEDBACK_ROW, rules=STARS).records
    assert [(record.completion, record.label) for record in rated if isinstance(record, Rating)] == [
        ("Go away.", False),
        ("Until nine.", True),
    ]


def test_several_answers_with_scores_or_ranks(tmp_path: Path) -> None:
    ranked = {"prompt": "Hi?", "answers": [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}]}
    assert one(tmp_path, ranked, "ultrafeedback") == Comparison("Hi?", "a", "b", "hi", margin=1.0, source="a.jsonl:1")
    listed = {"prompt": "Hi?", "responses": ["a", "b"], "scores": [0.5, 0.25]}
    assert one(tmp_path, listed, "ultrafeedback").margin == 0.25
    refused(tmp_path, listed | {"scores": [1]}, "2 answers and 1 scores")


@pytest.mark.parametrize(
    ("names", "margin"),
    [
        (("score_chosen", "score_rejected"), 6.0),
        (("chosen-rating", "rejected-rating"), 6.0),
        (("rating_chosen", "rating_rejected"), 6.0),
        (("chosen_score", "rejected_score"), 6.0),
    ],
)
def test_a_margin_from_scores(tmp_path: Path, names: tuple[str, str], margin: float) -> None:
    row = {"prompt": "Is it open?", "chosen": [ASKED, GOOD], "rejected": [ASKED, POOR], names[0]: 8.0, names[1]: 2.0}
    pair = one(tmp_path, row, "trl")
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == ("Is it open?", "Until nine.", "Go away.", margin)
    assert one(tmp_path, row | {"margin": 1}, "trl").margin == 1.0
    assert one(tmp_path, row | {names[0]: 1}, "trl").margin == -1.0, "told by validate, not turned round"


def test_binarized_sets(tmp_path: Path) -> None:
    avg = {"source": "s", "instruction": "Hi?", "chosen_response": "a", "rejected_response": "b"}
    scores = {"chosen_avg_rating": 4.5, "rejected_avg_rating": 2}
    assert one(tmp_path, avg | scores, "trl") == Comparison("Hi?", "a", "b", "hi", margin=2.5, source="s")
    system = [said("system", "S"), ASKED]
    row = {"prompt": "Is it open?", "chosen": [*system, GOOD], "rejected": [*system, POOR]}
    assert one(tmp_path, row, "trl").prompt == tuple(system)
    orca = {"system": "S", "question": "Is it open?", "chosen": "a", "rejected": "b"}
    assert one(tmp_path, orca, "trl").prompt == tuple(system)


def test_helpsteer_grades_need_a_rule(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi?", "response": str(n), "helpfulness": n, "correctness": 4 - n} for n in range(5)]
    with pytest.raises(DataError, match=r"grades \(0 to 4\)") as caught:
        reading(tmp_path, *rows)
    assert "data.ratings: {up: 3, down: 1} in a recipe" in str(caught.value)
    rules = LayoutConfig(ratings=RatingsConfig(up=3, down=1))
    found = reading(tmp_path, *rows, rules=rules)
    assert [(r.completion, r.label) for r in found.records if isinstance(r, Rating)] == [
        ("0", False),
        ("1", False),
        ("3", True),
        ("4", True),
    ]
    assert found.skipped == {"a grade between ratings.down and ratings.up": 1}
    other = LayoutConfig(ratings=RatingsConfig(up=3), columns={"rating": "correctness"})
    found = reading(tmp_path, *rows, rules=other)
    assert [r.label for r in found.records if isinstance(r, Rating)] == [True, True, False, False, False]
    pairs = reading(tmp_path, *rows[:3], rules=LayoutConfig(grades="comparisons")).records
    assert [(p.chosen, p.rejected, p.margin) for p in pairs if isinstance(p, Comparison)] == [
        ("1", "0", 1.0),
        ("2", "0", 2.0),
        ("2", "1", 1.0),
    ]


def test_helpsteer_preferences(tmp_path: Path) -> None:
    assert one(tmp_path, HELPSTEER_ROW, "helpsteer") == Comparison(
        (ASKED,), "Until nine.", "Go away.", "is it open", margin=2.0, source="a.jsonl:1"
    )
    second = {"prompt": "Hi?", "response_1": "a", "response_2": "b", "preference_strength": 1}
    assert one(tmp_path, second, "helpsteer").chosen == "b"
    assert reading(tmp_path, second | {"preference_strength": 0}).skipped == {"tie": 1}
    marked = {"prompt": "Hi?<extra_id_1>Assistant\nYes<extra_id_1>User\nWhy?", "response": "So", "helpfulness": 4}
    rated = one(tmp_path, marked, "helpsteer", STARS)
    assert rated.prompt == (said("user", "Hi?"), said("assistant", "Yes"), said("user", "Why?"))


# ---- Arenas ---------------------------------------------------------------------------------------------------------


def test_arena(tmp_path: Path) -> None:
    first_turn = Comparison((ASKED,), "Until nine.", "Go away.", "is it open", annotator="ann", source="a.jsonl:1")
    assert one(tmp_path, ARENA_ROW, "arena") == first_turn
    whole = one(tmp_path, ARENA_ROW | {"turn": 2}, "arena")
    assert whole.prompt == (ASKED,) and whole.chosen == (GOOD, said("user", "Why?"), GOOD)
    ties = [ARENA_ROW | {"winner": winner} for winner in ("tie", "tie (bothbad)", "both_bad")]
    assert reading(tmp_path, *ties).skipped == {"tie": 3}
    refused(tmp_path, ties[0], "the comparison is a tie", rules=LayoutConfig(ties="error"))
    refused(tmp_path, ARENA_ROW | {"winner": "gpt"}, "column 'winner' is 'gpt'")


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        ({"response_a": "a", "response_b": "b", "winner": "model_a"}, "a"),
        ({"response_a": "a", "response_b": "b", "winner": "B"}, "b"),
        ({"response_a": "a", "response_b": "b", "winner": "m2", "model_a": "m1", "model_b": "m2"}, "b"),
        ({"response_a": "a", "response_b": "b", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}, "b"),
        ({"response1": "a", "response2": "b", "preference": 2}, "b"),
        ({"response_1": "a", "response_2": "b", "winner": "response_1"}, "a"),
        ({"response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}, "b"),
        ({"answer_0": "a", "answer_1": "b", "score_0": 0.5, "score_1": -0.5}, "a"),
        ({"answer1": "a", "answer2": "b", "winner": "right"}, "b"),
    ],
)
def test_other_pairs(tmp_path: Path, row: dict[str, Any], chosen: str) -> None:
    found = one(tmp_path, {"prompt": "Hi?"} | row, "arena")
    assert {found.chosen, found.rejected} == {"a", "b"} and found.chosen == chosen and found.prompt == "Hi?"


def test_arena_turns_as_json(tmp_path: Path) -> None:
    row = {"prompt": '["p", "q"]', "response_a": '["a1", "a2"]', "response_b": '["b1", "b2"]'}
    found = one(tmp_path, row | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, "arena")
    assert found.prompt == (said("user", "p"),)
    assert found.chosen == (said("assistant", "a1"), said("user", "q"), said("assistant", "a2"))
    blank = row | {"response_b": '["b1", null]', "winner": "model_a"}
    assert reading(tmp_path, blank).skipped == {"empty completion": 1}


def test_a_pair_without_a_verdict(tmp_path: Path) -> None:
    row = {"prompt": "Hi?", "response_a": "a", "response_b": "b"}
    error = refused(tmp_path, row, "nothing says which is better", format="arena")
    assert "data.columns: {winner: ...}" in str(error.hint)


# ---- Files of several layouts, and what would be misread in silence ------------------------------------------------


def test_each_row_is_read_by_its_own_layout(tmp_path: Path) -> None:
    ask = said("user", "q")
    found = reading(
        tmp_path,
        {"messages": [ask, said("assistant", "a")]},
        {"messages": [ask, said("assistant", "a")], "rejected_response": "b"},
        {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "b"},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": None},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    )
    assert not found.skipped
    kinds = [type(record) for record in found.records]
    assert kinds == [Demonstration, Comparison, Comparison, Demonstration, Prompt, Comparison, Prompt, Demonstration]
    assert isinstance(found.records[2], Comparison) and found.records[2].chosen == "b"
    found = validate([str(tmp_path / "a.jsonl")])
    assert found.ok and found.records == {"demonstration": 3, "comparison": 3, "prompt": 2}


def test_parquet_fills_columns_of_other_rows_with_nulls(tmp_path: Path) -> None:
    ask = said("user", "q")
    swift = {"messages": [ask, said("assistant", "a")], "rejected_response": "b", "prompt": None, "completion": None}
    ours = {"messages": None, "rejected_response": None, "prompt": "q", "completion": "a"}
    for rows in ((swift, ours), (ours, swift)):
        found = reading(tmp_path, *rows).records
        assert {type(record) for record in found} == {Comparison, Demonstration}


@pytest.mark.parametrize(
    ("winner", "chosen"),
    [
        ("[[A]]", "a"),
        ("[[B]]", "b"),
        ("A>>B", "a"),
        ("B>A", "b"),
        ("A<B", "b"),
        ("B is better", "b"),
        ("Assistant A", "a"),
        ("Response B wins", "b"),
        ("[[C]]", "tie"),
        ("A=B", "tie"),
        ("Tie (both bad)", "tie"),
        (None, "two answers without a verdict"),
        (" ", "two answers without a verdict"),
    ],
)
def test_verdicts_of_judges(tmp_path: Path, winner: Any, chosen: str) -> None:
    found = reading(tmp_path, {"prompt": "q", "response_a": "a", "response_b": "b", "winner": winner})
    assert [record.chosen for record in found.records if isinstance(record, Comparison)] == [chosen] * (
        len(chosen) == 1
    )
    assert found.skipped == ({} if len(chosen) == 1 else {chosen: 1})


@pytest.mark.parametrize("winner", [-1, "-1", "_2", "A>A", "N/A", True])
def test_what_is_no_side_is_refused(tmp_path: Path, winner: Any) -> None:
    """-1 and 1 are the sides in some files, and must not both be the first answer."""
    refused(tmp_path, {"prompt": "q", "response_a": "a", "response_b": "b", "winner": winner}, "column 'winner' is")


def test_a_zero_among_sides_has_a_hint(tmp_path: Path) -> None:
    row = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": 0}
    error = refused(tmp_path, row, "column 'winner' is 0")
    assert "data.columns: {response_0: response_a, response_1: response_b}" in str(error.hint)
    rules = LayoutConfig(columns={"response_0": "response_a", "response_1": "response_b"})
    assert one(tmp_path, row, "arena", rules).chosen == "a"
    assert one(tmp_path, row | {"winner": 1}, "arena", rules).chosen == "b"


@pytest.mark.parametrize("said_so", [{"choice": 2}, {"score_a": 1, "score_b": 5}, {"label": "B"}, {"better": "second"}])
def test_any_verdict_beside_two_answers_makes_a_comparison(tmp_path: Path, said_so: dict[str, Any]) -> None:
    found = one(tmp_path, {"prompt": "q", "response_a": "a", "response_b": "b"} | said_so, "arena")
    assert (found.chosen, found.rejected) == ("b", "a")


def test_a_preference_whose_input_is_json_in_a_table(tmp_path: Path) -> None:
    asked = json.dumps({"messages": [said("user", "q")]})
    answers = [json.dumps([said("assistant", text)]) for text in ("a", "b")]
    row = {"input": asked, "preferred_output": answers[0], "non_preferred_output": answers[1]}
    assert one(tmp_path, row, "openai") == Comparison((said("user", "q"),), "a", "b", "q", source="a.jsonl:1")


@pytest.mark.parametrize("grades", ["comparisons", "ignore"])
def test_two_rules_for_grades_are_refused(grades: Any) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        LayoutConfig(ratings=RatingsConfig(up=4), grades=grades)


@pytest.mark.parametrize(
    ("first", "second", "chosen"), [(False, True, "b"), ("True", "False", "a"), ("1", "0", "a"), (0.0, 1.0, "b")]
)
def test_winners_of_one_column_each(tmp_path: Path, first: Any, second: Any, chosen: str) -> None:
    row = {"prompt": "q", "response_a": "a", "response_b": "b", "winner_model_a": first, "winner_model_b": second}
    assert one(tmp_path, row, "arena").chosen == chosen
    refused(tmp_path, row | {"winner_model_a": True, "winner_model_b": True}, "winner_model_a and winner_model_b are")


@pytest.mark.parametrize("written", ["5 stars", "5-star", "5/5", "5 out of 5", "5 / 5 stars", "5.0"])
def test_grades_written_with_their_scale(tmp_path: Path, written: str) -> None:
    row = {"prompt": "a", "completion": "b", "rating": written}
    assert one(tmp_path, row, "trl", STARS).label is True
    refused(tmp_path, row | {"rating": "five of many"}, "rating is 'five of many'", rules=STARS)


def test_answers_of_stack_exchange(tmp_path: Path) -> None:
    answers = [{"text": "Until nine.", "pm_score": 3, "selected": True}, {"text": "Go away.", "pm_score": 0}]
    found = one(tmp_path, {"qid": 1, "question": "Is it open?", "answers": answers}, "ultrafeedback")
    assert found == Comparison("Is it open?", "Until nine.", "Go away.", "is it open", margin=3.0, source="a.jsonl:1")
