"""Prompts, and the answers to them, whatever they repeat of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from perlhf.config.stages import LayoutConfig
from perlhf.data.read import read_all
from perlhf.data.records import Comparison
from perlhf.errors import DataError


def turns(*contents: str) -> list[dict[str, Any]]:
    """A conversation: the user begins."""
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def one(tmp_path: Path, row: dict[str, Any], layout: str, rules: LayoutConfig | None = None) -> Any:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    found = read_all("a.jsonl", root=tmp_path, rules=rules)
    assert found.formats == {"a.jsonl": layout}
    (record,) = found.records
    return record


def refused(tmp_path: Path, row: dict[str, Any], what: str) -> DataError:
    with pytest.raises(DataError) as caught:
        one(tmp_path, row, "")
    assert what in caught.value.what and caught.value.where == "a.jsonl:1"
    return caught.value


TWICE = turns("Hi!", "Hello.", "Tea?")
SIDES = {"chosen": [*TWICE, *turns("", "Yes")[1:]], "rejected": [*TWICE, *turns("", "No")[1:]]}
"""Whole conversations of two questions."""


@pytest.mark.parametrize("last", ["Perhaps", "Yes", None])
def test_whole_conversations_take_the_place_of_the_turns_beside_them(tmp_path: Path, last: str | None) -> None:
    exchanges = [{"input": "Hi!", "output": "Hello."}, {"input": "Tea?", "output": last}]
    found = one(tmp_path, {"conversation": exchanges} | SIDES, "sharegpt")
    assert found == Comparison(tuple(TWICE), "Yes", "No", "hi", source="a.jsonl:1")
    single = {"conversation": exchanges[1:], "chosen": SIDES["chosen"][2:], "rejected": SIDES["rejected"][2:]}
    assert one(tmp_path, single, "sharegpt").prompt == tuple(TWICE[2:])


@pytest.mark.parametrize(
    "prompt", [[*TWICE, *turns("", "Perhaps")[1:]], TWICE, TWICE[:1], "Hi!", "Tea?", TWICE[2:], " Tea? "]
)
def test_prompts_that_whole_conversations_repeat(tmp_path: Path, prompt: Any) -> None:
    found = one(tmp_path, {"prompt": prompt} | SIDES, "trl")
    asked = found.prompt if isinstance(found.prompt, tuple) else ({"content": found.prompt},)
    assert [turn["content"] for turn in asked] == ["Hi!", "Hello.", "Tea?"]
    assert (found.chosen, found.rejected) == ("Yes", "No")
    rated = one(tmp_path, {"prompt": prompt, "completion": SIDES["chosen"], "label": True}, "trl")
    assert (rated.prompt, rated.completion) in (
        (tuple(TWICE), "Yes"),
        (tuple(TWICE[:1]), tuple(SIDES["chosen"][1:])),
    ) or (rated.prompt == "Hi!")


def test_the_system_message_of_a_prompt_stays_before_whole_conversations(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    found = one(tmp_path, {"prompt": [system, *TWICE[2:]]} | SIDES, "trl")
    assert found.prompt == (system, *TWICE)
    assert one(tmp_path, {"prompt": [system]} | SIDES, "trl").prompt == (system, *TWICE)
    other = {name: [system | {"content": "Be short."}, *side] for name, side in SIDES.items()}
    refused(tmp_path, {"prompt": [system, *TWICE]} | other, "there is a system message in the prompt and another")


def test_conversations_that_say_something_else_than_the_prompt(tmp_path: Path) -> None:
    other = {"prompt": [TWICE[0], TWICE[1] | {"content": "Good day."}, TWICE[2]]} | SIDES
    refused(tmp_path, other, "begin with something else than the prompt")
    error = refused(tmp_path, {"prompt": "Be kind."} | SIDES, "begin with something else than the prompt")
    assert "`data.columns: {unused: prompt}`" in str(error.hint)
    for name in ("unused", "system"):
        mapped = one(tmp_path, {"prompt": "Be kind."} | SIDES, "trl", LayoutConfig(columns={name: "prompt"}))
        assert mapped.chosen == "Yes" and mapped.prompt[-3:] == tuple(TWICE)


def test_chosen_and_rejected_take_the_place_of_a_last_answer(tmp_path: Path) -> None:
    begun = {"conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Perhaps"}]}
    for sides in (
        {"chosen": "Yes", "rejected": "No"},
        {"chosen": {"from": "gpt", "value": "Yes"}, "rejected": {"from": "gpt", "value": "No"}},
    ):
        assert one(tmp_path, begun | sides, "sharegpt").prompt == tuple(TWICE[2:])
    goes_on = {"chosen": turns("Sure?", "Yes"), "rejected": turns("Sure?", "No")}
    assert len(one(tmp_path, begun | goes_on, "sharegpt").prompt) == 3
