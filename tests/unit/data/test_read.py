import gzip
import hashlib
import json
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_rows import (
    ANDROID_FEATURES,
    ANDROID_SCREEN,
    DIALOG_ROW,
    HH_ROW,
    HHH_ROW,
    LLMBAR_ROW,
    OASST_ROW,
    REWARD_ROW,
    ROWS,
    SHP_ROW,
    SQUALITY_ROW,
    STORY,
    TLDR_ROW,
    TSV,
    UIBERT,
    UIBERT_FEATURES,
    example,
    forest,
    framed,
    graded,
    node,
    note,
    panda,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from perlhf.config.stages import LayoutConfig, RatingsConfig
from perlhf.data import read as data_read
from perlhf.data.containers.tfrecord import crc32c, read_examples
from perlhf.data.fields import group_key, prompt_group
from perlhf.data.files import DataFile
from perlhf.data.read import Reading, read_all
from perlhf.data.readers.formats import FORMATS, detect
from perlhf.data.readers.published.dialogs import COFFEE_GREETING
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating, Text
from perlhf.data.tools import validate
from perlhf.errors import DataError


def reading(tmp_path: Path, *rows: dict[str, Any], format: str = "auto") -> Reading:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_all("a.jsonl", format, root=tmp_path)


def refused(tmp_path: Path, row: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        reading(tmp_path, row)
    assert caught.value.where == "a.jsonl:1"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def tool(text: str) -> dict[str, str]:
    return {"role": "tool", "content": text}


def test_group_key_is_lower_case_words() -> None:
    assert group_key("  Hi,\tI'd like\nTWO lattés! ") == "hi id like two lattés"
    assert group_key("?!") == "?!"
    assert prompt_group((assistant("Welcome"), user("Tea."), user("No"))) == "tea"


@pytest.mark.parametrize("name", sorted(ROWS))
def test_formats_are_told_apart_by_their_first_row(name: str) -> None:
    assert detect(ROWS[name][0]) == name


def test_every_format_states_its_rule() -> None:
    assert len({one.name for one in FORMATS}) == len(FORMATS) == 31
    assert all("Group:" in (one.reader.__doc__ or "") or one.name in ("trl", "feedbackqa-ratings") for one in FORMATS)


def test_taskmaster_rewards(tmp_path: Path) -> None:
    down = REWARD_ROW | {"reward": 0.0, "generation": '{"role": "agent", "api": {"": {}}}'}
    lost = REWARD_ROW | {"context": "[]"}
    mute = REWARD_ROW | {"generation": '{"role": "agent", "text": ""}'}
    found = reading(tmp_path, REWARD_ROW, down, lost, mute)
    prompt = (
        assistant("Welcome!"),
        user("Two lattes, please!"),
        assistant('{"get_menu_items": {"query": "café"}}'),
        tool('{"get_menu_items": {"items": []}}'),
    )
    assert found.records == [
        Rating(prompt, "Hot or iced?", True, "two lattes please", source="a.jsonl:1"),
        Rating(prompt, '{"": {}}', False, "two lattes please", source="a.jsonl:2"),
    ]
    assert found.skipped == {"empty context": 1, "empty generation": 1}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"reward": 0.5}, "column 'reward' is 0.5"),
        ({"reward": True}, "column 'reward' is True"),
        ({"context": "[{"}, "context is not valid JSON"),
        ({"context": "{}"}, "which is no list of turns"),
        ({"context": '[{"role": "waiter", "text": "x"}]'}, "column 'role' is 'waiter'"),
        ({"context": '[{"role": "user"}]'}, "neither text nor api nor response"),
        ({"generation": '{"role": "user", "text": "x"}'}, "generation has the role 'user'"),
        ({"generation": '{"role": "agent", "api": "x"}'}, "which is no object"),
    ],
)
def test_bad_taskmaster_rows(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refused(tmp_path, REWARD_ROW | changes, match)


def test_taskmaster_dialogs_are_written_as_in_the_reward_files(tmp_path: Path) -> None:
    found = reading(tmp_path, DIALOG_ROW)
    turns = (
        assistant(COFFEE_GREETING),
        user("A mocha."),
        assistant('{"get_menu_items": {"query": "mocha"}}'),
        tool('{"get_menu_items": {"items": [{"menu_item_id": "mocha-1", "name": "Mocha"}]}}'),
        assistant('{"show_menu": {}}'),
        tool('{"show_menu": {"menu_items": ["Mocha"]}}'),
        assistant("Here you are."),
    )
    assert found.records == [
        Demonstration(turns[:at], turns[at]["content"], "a mocha", source="a.jsonl:1") for at in (2, 4, 6)
    ]
    assert not found.skipped


def test_a_call_that_is_no_json_ends_its_dialog(tmp_path: Path) -> None:
    broken = [note("api_call", "x", "api_call_0"), note("request", '{"query": ', "api_call_0")]
    turns = [
        {"speaker": "user", "text": "Hi", "annotations": []},
        {"speaker": "assistant", "text": "Hello", "annotations": []},
        {"speaker": "user", "text": "Tea", "annotations": broken},
        {"speaker": "assistant", "text": "Never seen", "annotations": []},
    ]
    found = reading(tmp_path, DIALOG_ROW | {"utterances": turns})
    assert [record.completion for record in found.records if isinstance(record, Demonstration)] == ["Hello"]
    assert found.skipped == {"rest of a dialog after a call that isn't JSON": 1}


def test_taskmaster_tsv_is_put_back_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(TSV.encode())
    found = read_all("a.tsv", root=tmp_path)
    first = (
        assistant("Hello."),
        user("What is on?"),
        assistant('{"find": {"location": "here"}}'),
        tool('{"find": {"name.movie": ["Dune", "Nope"]}}'),
    )
    second = (user('I want "Dune".'),)
    assert found.records == [
        Demonstration(first, "Dune and Nope.", "what is on", source="a.tsv:1"),
        Demonstration(second, "OK.", "i want dune", source="a.tsv:2"),
        Demonstration(
            (*second, assistant("OK.")), '{"book": {"name.movie": "\\"Dune\\""}}', "i want dune", source="a.tsv:2"
        ),
    ]
    assert found.skipped == {"empty turn, or nothing before it": 1}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("<U>Hi\t[U]Hi\td", "no agent act"),
        ("Hi<U>x\t[A]Hi\td", "text before the first marker"),
        ("<PAV>x\t[A]Hi\td", "outside a call"),
    ],
)
def test_bad_tsv_rows(tmp_path: Path, row: str, match: str) -> None:
    (tmp_path / "a.tsv").write_text(row)
    with pytest.raises(DataError, match=match):
        read_all("a.tsv", root=tmp_path)


def test_hh_is_split_at_the_last_assistant_turn(tmp_path: Path) -> None:
    other = HH_ROW | {"rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    empty = HH_ROW | {"chosen": HH_ROW["chosen"].removesuffix("Take care")}
    found = reading(tmp_path, HH_ROW, other, empty)
    prompt = (user("Hi"), assistant("Hello"), user("Bye"))
    assert found.records == [Comparison(prompt, "Take care", "No", "hi", source="a.jsonl:1")]
    assert found.skipped == {"the prompts of chosen and rejected differ": 1, "empty completion": 1}
    refused(tmp_path, HH_ROW | {"rejected": "\n\nHuman: Hi"}, "rejected has no assistant turn")


def test_hhh_is_unwrapped(tmp_path: Path) -> None:
    prompt = (user("Hi"), assistant("Yes?"), user("Is it late?"))
    expected = Comparison(prompt, "It is nine.", "Dunno.", "hi", source="a.jsonl:1")
    assert reading(tmp_path, HHH_ROW).records == [expected]
    refused(tmp_path, HHH_ROW | {"chosen_instruction": "plain"}, "lacks the judge prompt's headings")


def test_oasst_ranks_become_pairs_without_synthetic_replies(tmp_path: Path) -> None:
    found = reading(tmp_path, OASST_ROW)
    sky = user("Why is the sky blue?")
    deeper = (sky, assistant("best"), user("And red?"))
    group = "why is the sky blue"
    assert found.records == [
        Comparison((sky,), "best", "worst", group, margin=2.0, source="a.jsonl:1"),
        Comparison(deeper, "a", "b", group, margin=1.0, source="a.jsonl:1"),
    ]
    assert found.skipped == {"a synthetic reply": 2}


def oasst_messages(node: dict[str, Any], parent: str | None = None, number: str = "m") -> list[dict[str, Any]]:
    """The rows of a tree as the hub has them, replies first, where a rank is a float since others are null."""
    replies = node.get("replies") or []
    below = [row for at, reply in enumerate(replies) for row in oasst_messages(reply, number, f"{number}.{at}")]
    rank = node.get("rank")
    row = {name: part for name, part in node.items() if name != "replies"} | {"message_id": number, "parent_id": parent}
    return [*below, row | {"message_tree_id": "m", "rank": None if rank is None else float(rank), "lang": "en"}]


def test_oasst_messages_one_a_row_are_put_together(tmp_path: Path) -> None:
    tree = reading(tmp_path, OASST_ROW)
    rows = oasst_messages(OASST_ROW["prompt"])
    flat = reading(tmp_path, *rows)
    assert flat.formats == {"a.jsonl": "oasst-messages"}
    where = f"a.jsonl:{len(rows)}"  # of the first prompt
    assert flat.records == [replace(record, source=where) for record in tree.records if isinstance(record, Comparison)]
    assert flat.skipped == tree.skipped
    assert validate([str(tmp_path / "a.jsonl")]).records == {"comparison": 2}
    alone = reading(tmp_path, rows[0] | {"parent_id": "gone"})
    assert (alone.records, alone.skipped) == ([], {"a message whose parent isn't in the file": 1})


def test_pandalm_majority(tmp_path: Path) -> None:
    third, unit = 1 / 3, 1.0
    votes = [(1, 1, 1), (2, 1, 2), (1, 0, 1), (0, 0, 1), (0, 1, 2)]
    found = reading(tmp_path, *[panda(*vote) for vote in votes], panda(1, 1, 1, response2=""))
    assert [(r.chosen, r.weight, r.margin) for r in found.records if isinstance(r, Comparison)] == [
        ("first", unit, unit),
        ("second", 2 / 3, third),
        ("first", 2 / 3, 2 / 3),
    ]
    assert found.skipped == {"tie": 1, "no majority": 1, "empty completion": 1}


def test_pandalm_prompt_and_boolean_response(tmp_path: Path) -> None:
    found = reading(tmp_path, panda(2, 2, 2, response2=True, input="Here."))
    assert found.records == [
        Comparison("Say it.\n\nHere.", "True", "first", "say it here", weight=1.0, margin=1.0, source="a.jsonl:1")
    ]
    refused(tmp_path, panda(1, 1, 3), "column 'annotator3' is 3")


def test_llmbar(tmp_path: Path) -> None:
    assert reading(tmp_path, LLMBAR_ROW, LLMBAR_ROW | {"label": 1}).records == [
        Comparison("Add 1 and 2", "3", "4", "add 1 and 2", source="a.jsonl:1"),
        Comparison("Add 1 and 2", "4", "3", "add 1 and 2", source="a.jsonl:2"),
    ]
    refused(tmp_path, LLMBAR_ROW | {"label": 0}, "column 'label' is 0")


def test_shp(tmp_path: Path) -> None:
    found = reading(tmp_path, SHP_ROW, SHP_ROW | {"labels": 1}, SHP_ROW | {"human_ref_B": " "})
    prompt = "How do I peel a raspberry?"
    assert found.records == [
        Comparison(prompt, "With patience.", "You don't.", "qt3nxl", margin=4.0, source="a.jsonl:1"),
        Comparison(prompt, "You don't.", "With patience.", "qt3nxl", margin=4.0, source="a.jsonl:2"),
    ]
    assert found.formats == {"a.jsonl": "shp"} and found.skipped == {"empty completion": 1}
    refused(tmp_path, SHP_ROW | {"labels": 2}, "column 'labels' is 2")
    refused(tmp_path, SHP_ROW | {"score_ratio": "high"}, "score_ratio")


def test_tldr(tmp_path: Path) -> None:
    article = TLDR_ROW | {"info": {"id": "c", "article": "It rained."}, "choice": 0}
    found = reading(tmp_path, TLDR_ROW, article)
    post = "SUBREDDIT: r/advice\n\nTITLE: Keys\n\nPOST: I lost my keys.\n\nTL;DR:"
    assert found.records == [
        Comparison(post, "Lost.", "Keys gone.", "t3_2z", source="a.jsonl:1"),
        Comparison("It rained.\n\nTL;DR:", "Keys gone.", "Lost.", "c", source="a.jsonl:2"),
    ]
    assert found.formats == {"a.jsonl": "tldr"}
    refused(tmp_path, TLDR_ROW | {"summaries": TLDR_ROW["summaries"][:1]}, "holds 1")


def test_feedbackqa_grades_become_pairs(tmp_path: Path) -> None:
    rows = [
        graded("low", "Bad", "Could be Improved"),  # mean 0.5
        graded("high", "Excellent", "Acceptable"),  # mean 2.5
        graded("also low", "Could be Improved", "Bad"),
        graded("alone", "Bad", question="Where?"),
    ]
    found = reading(tmp_path, *rows)
    assert found.records == [
        Comparison("When?", "Title\nPart\nhigh", "Title\nPart\nlow", "when", margin=2.0, source="a.jsonl:2"),
        Comparison("When?", "Title\nPart\nhigh", "Title\nPart\nalso low", "when", margin=2.0, source="a.jsonl:2"),
    ]
    assert found.skipped == {"equal mean grades": 1}
    refused(tmp_path, graded("x", "Good"), "column 'rating' is 'Good'")
    refused(tmp_path, graded("x"), "column 'rating' is an empty list")


def test_feedbackqa_as_ratings(tmp_path: Path) -> None:
    rows = [
        graded("a", "Bad", "Excellent"),
        graded("b", "Acceptable", "Excellent", "Bad"),
        graded("c", "Bad", "Could be Improved"),
    ]
    found = reading(tmp_path, *rows, format="feedbackqa-ratings")
    assert [(r.label, r.weight) for r in found.records if isinstance(r, Rating)] == [(True, 2 / 3), (False, 1.0)]
    assert found.skipped == {"raters evenly divided": 1}


def test_squality_takes_the_story_from_the_other_file(tmp_path: Path) -> None:
    (tmp_path / "human-eval").mkdir()
    (tmp_path / "v1-3" / "txt").mkdir(parents=True)
    (tmp_path / "human-eval" / "all.jsonl").write_text(json.dumps(SQUALITY_ROW))
    with pytest.raises(DataError, match="the stories that these judgements are about are missing"):
        read_all("human-eval/all.jsonl", root=tmp_path)
    (tmp_path / "v1-3" / "txt" / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps(STORY).encode()))
    found = read_all("human-eval", root=tmp_path).records
    prompt, source = "Once.\n\nWhat happens?", "human-eval/all.jsonl:1"
    assert found == [  # ranks: bart 3 2 3, bart-dpr 2 3 2, human 1 1 1
        Comparison(prompt, "D", "B", "7", weight=2 / 3, margin=1 / 3, source=source),
        Comparison(prompt, "H", "B", "7", weight=1.0, margin=1.0, source=source),
        Comparison(prompt, "H", "D", "7", weight=1.0, margin=1.0, source=source),
    ]
    alone = read_all("human-eval", "squality-questions", root=tmp_path).records
    assert alone == [replace(record, prompt="What happens?") for record in found if isinstance(record, Comparison)]
    (summary,) = read_all("v1-3", root=tmp_path).records
    assert summary == Demonstration(prompt, "Nothing.", "7", source="v1-3/txt/test.jsonl.gz:1")


def test_uibert_lists_the_candidates(tmp_path: Path) -> None:
    (tmp_path / "a.tfrecord").write_bytes(UIBERT)
    prompt = (
        'Elements on the screen:\n0: (0 0 50 50)\n1: BUTTON "save" saveButton (50 50 100 100)\n'
        "Instruction: press save\nWhich element? Answer with its number."
    )
    assert read_all("a.tfrecord", root=tmp_path).records == [Demonstration(prompt, "1", "300", source="a.tfrecord[0]")]
    (tmp_path / "a.tfrecord").write_bytes(UIBERT + framed(example(UIBERT_FEATURES | {"image/ref_exp/label": [2]})))
    with pytest.raises(DataError, match="the right element is 2") as caught:
        read_all("a.tfrecord", root=tmp_path)
    assert caught.value.where == "a.tfrecord[1]"


def test_uibert_pairs_compare_the_right_element_with_wrong_ones(tmp_path: Path) -> None:
    (tmp_path / "a.tfrecord").write_bytes(UIBERT)
    (shown,) = read_all("a.tfrecord", root=tmp_path).records
    assert isinstance(shown, Demonstration), "auto takes demonstrations"
    prompt = str(shown.prompt).replace("its number", "its line")
    right, wrong = '1: BUTTON "save" saveButton (50 50 100 100)', "0: (0 0 50 50)"
    pair = Comparison(prompt, right, wrong, "300", source="a.tfrecord[0]")
    assert read_all("a.tfrecord", "uibert-pairs", root=tmp_path).records == [pair]

    edges = [number / 8 for number in range(8)]
    many = UIBERT_FEATURES | {f"image/object/bbox/{side}min": [*edges, 0.125] for side in "xy"}
    many |= {f"image/object/bbox/{side}max": [*(edge + 0.125 for edge in edges), 0.25] for side in "xy"}
    other = many | {"image/id": [b"301"]}
    (tmp_path / "a.tfrecord").write_bytes(framed(example(many)) + framed(example(other)))
    (tmp_path / "b.tfrecord").write_bytes(framed(example(other)) + framed(example(many)))
    drawn = [pairs_by_screen(tmp_path, name) for name in ("a.tfrecord", "b.tfrecord")]
    assert drawn[0] == drawn[1] and drawn[0]["300"] != drawn[0]["301"]
    for chosen, rejected in drawn[0].values():
        assert chosen == {"1"} and len(rejected) == 3
        assert rejected <= {"0", "2", "3", "4", "5", "6", "7"}, "8 lies where 1 does"


def pairs_by_screen(root: Path, name: str) -> dict[str, tuple[set[str], set[str]]]:
    found = [r for r in read_all(name, "uibert-pairs", root=root).records if isinstance(r, Comparison)]
    return {
        group: (
            {number_of(r.chosen) for r in found if r.group == group},
            {number_of(r.rejected) for r in found if r.group == group},
        )
        for group in ("300", "301")
    }


def number_of(line: Text) -> str:
    return str(line).partition(":")[0]


def test_uibert_pairs_need_a_wrong_element(tmp_path: Path) -> None:
    sides = {f"image/object/bbox/{side}": [0.5, 0.5] for side in ("xmin", "xmax", "ymin", "ymax")}
    rows = (UIBERT_FEATURES | sides, UIBERT_FEATURES | {"image/ref_exp/text": [b" "]})
    (tmp_path / "a.tfrecord").write_bytes(b"".join(framed(example(row)) for row in rows))
    found = read_all("a.tfrecord", "uibert-pairs", root=tmp_path)
    assert not found.records and found.skipped == {"no wrong element": 1, "empty instruction": 1}


CLICK = '{"action_type":"click","x":20,"y":20}'
BACK = '{"action_type":"navigate_back"}'
ANDROID_PROMPT = (
    'Elements on the screen:\n0: Button "Save now" Keeps it (-5 10 50 30)\n1: View (60 10 101 30)\n'
    '2: "Hi" (0 70 40 90)\n'
    "Goal: Save the note.\nStep: Press save\nWhich action? Answer with its JSON."
)
BARE_PROMPT = f"Goal: Save the note.\nEarlier actions:\n{CLICK}\nStep: Go back\nWhich action? Answer with its JSON."


def android(tmp_path: Path, format: str = "auto", **changes: list[Any]) -> Reading:
    """A shard as it is published: gzip, no suffix, its directory with a file of splits."""
    content = framed(example(ANDROID_FEATURES | changes))
    (tmp_path / "a-00000-of-00020").write_bytes(gzip.compress(content))
    (tmp_path / "splits.json").write_text('{"train": [7]}')
    return read_all(str(tmp_path), format)


def test_android_control_steps(tmp_path: Path) -> None:
    found = android(tmp_path)
    source = f"{tmp_path}/a-00000-of-00020[0]"
    assert found.records == [
        Demonstration(ANDROID_PROMPT, CLICK, "save the note", source=source),
        Demonstration(BARE_PROMPT, BACK, "save the note", source=source),
    ]
    assert list(found.formats.values()) == ["android-control"] and not found.skipped
    assert read_all("a-00000-of-00020", root=tmp_path).records[1].prompt == BARE_PROMPT


def test_android_control_skips_what_is_no_action(tmp_path: Path) -> None:
    bad = [b"{", b"[]", b"{}", b'{"action_type":"click","x":1}', b'{"action_type":"wait","for":[1]}']
    encoded = [*bad, b'{"text":"\xc3\xa9","action_type":"input_text"}']
    found = android(tmp_path, actions=encoded, step_instructions=[b" "] * 6, accessibility_trees=[b""] * 7)
    (step,) = found.records
    assert isinstance(step, Demonstration) and step.completion == '{"action_type":"input_text","text":"é"}'
    assert step.prompt == "Goal: Save the note.\nWhich action? Answer with its JSON."
    assert found.skipped == {"malformed action": 5}
    assert android(tmp_path, goal=[b" "]).skipped == {"empty goal": 2}
    with pytest.raises(DataError, match="found 2 actions and 1 step instructions"):
        android(tmp_path, step_instructions=[b"Once"])


def test_android_control_pairs(tmp_path: Path) -> None:
    source = f"{tmp_path}/a-00000-of-00020[0]"
    beside = '{"action_type":"click","x":80,"y":20}'  # centre of 60 10 101 30; "Hi" can't be clicked
    assert android(tmp_path, "android-control-pairs").records == [
        Comparison(ANDROID_PROMPT, CLICK, beside, "save the note", source=source),
        Comparison(BARE_PROMPT, BACK, CLICK, "save the note", source=source),
    ]
    edge = b'{"action_type":"long_press","x":50,"y":10}'  # right and bottom edges are outside: both are missed
    pressed = android(tmp_path, "android-control-pairs", actions=[edge, edge]).records
    (pair,) = pressed
    assert isinstance(pair, Comparison)
    centres = [f'{{"action_type":"long_press","x":{x},"y":20}}' for x in (22, 80)]
    assert pair.rejected in centres and pair.rejected == min(
        centres, key=lambda wrong: drawn("Save the note.", 0, wrong)
    )


def drawn(goal: str, step: int, wrong: str) -> str:
    return hashlib.sha256(f"{goal}:{step}:{wrong}".encode()).hexdigest()


def test_android_control_pairs_need_a_wrong_action(tmp_path: Path) -> None:
    alone = forest([node((0, 0, 100, 200), clickable=True)])
    found = android(tmp_path, "android-control-pairs", accessibility_trees=[alone, alone])
    (pair,) = found.records
    assert isinstance(pair, Comparison) and pair.chosen == BACK
    assert found.skipped == {"no wrong action": 1}
    twice = [BACK.encode(), b'{ "action_type": "navigate_back" }']
    assert android(tmp_path, "android-control-pairs", actions=twice).skipped == {"no wrong action": 2}


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (ANDROID_SCREEN[:-1], "a field runs past the end"),
        (b"\x08\x01", "missing or of the wrong kind"),
        (forest([b"\x0b"]), "unknown wire type 3"),
        (forest([b"\x38\x01"]), "a text is a number"),
        (forest([b"\x12\x02\x0a\x00"]), "a side of a box is no whole number"),
        (forest([b"\x3a\x01\xff"]), "can't decode byte 0xff"),
        (b"\x0a", "index out of range"),
    ],
)
def test_damaged_accessibility_trees(tmp_path: Path, tree: bytes, match: str) -> None:
    with pytest.raises(DataError, match=f"tree is damaged: .*{match}") as caught:
        android(tmp_path, accessibility_trees=[tree, b""])
    assert caught.value.where and caught.value.where.endswith("a-00000-of-00020[0]")


def test_crc32c_of_the_published_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4 and the CRC catalogue
    assert crc32c(bytes(32)) == 0x8A9136AA


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x0a\x05\x0a", "a field runs past the end"),
        (b"\x0b", "unknown wire type 3"),
        (b"\x08" + b"\xff" * 10, "longer than 10 bytes"),
        (b"\x08\x01", "missing or of the wrong kind"),
        (b"\x0a", "index out of range"),
    ],
)
def test_messages_that_are_no_example(content: bytes, match: str) -> None:
    with pytest.raises(DataError, match=match):
        list(read_examples(framed(content), "a"))


def test_a_flipped_byte_of_a_tfrecord_is_seen() -> None:
    for position in (0, 9, 40, len(UIBERT) - 1):
        damaged = bytearray(UIBERT)
        damaged[position] ^= 1
        with pytest.raises(DataError, match="truncated or damaged"):
            list(read_examples(bytes(damaged), "a"))


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def named(**columns: str) -> LayoutConfig:
    return LayoutConfig(columns=columns)


def test_columns_are_named_in_the_recipe(tmp_path: Path) -> None:
    row = {"question": "Hi?", "best": {"text": "a"}, "others": ["b"], "prompt": "an id", "fine": "yes"}
    write(tmp_path / "a.jsonl", row)
    rules = named(prompt="question", chosen="best.text", rejected="others.0")
    pair = Comparison("Hi?", "a", "b", "hi", source="a.jsonl:1")
    assert read_all("a.jsonl", root=tmp_path, rules=rules).records == [pair]
    rules = named(prompt="question", completion="best.text", label="fine")
    assert read_all("a.jsonl", root=tmp_path, rules=rules).records == [
        Rating("Hi?", "a", True, "hi", source="a.jsonl:1")
    ]
    assert validate(["a.jsonl"], root=tmp_path, rules=rules).ok


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *({"question": "Hi?", "answer": str(n)} for n in range(3)))
    with pytest.raises(DataError, match="there is no 'questoin', which data") as caught:
        read_all("a.jsonl", root=tmp_path, rules=named(prompt="questoin", completion="answer"))
    assert caught.value.hint == "`data.columns: {prompt: question}`"
    with pytest.raises(DataError, match="no column is called 'promt'") as caught:
        read_all("a.jsonl", root=tmp_path, rules=named(promt="question"))
    assert caught.value.hint == "did you mean 'prompt'?"
    (problem,) = validate(["a.jsonl"], root=tmp_path, rules=named(prompt="questoin")).problems
    assert problem.where == "a.jsonl"


def test_a_named_column_may_be_missing_in_some_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"question": "Hi?", "answer": "a"}, {"question": "Hi?", "answer": "b", "ok": False})
    found = read_all("a.jsonl", root=tmp_path, rules=named(prompt="question", completion="answer", label="ok")).records
    assert [type(record) for record in found] == [Demonstration, Rating]


def test_ties_are_left_out_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *({"prompt": "p", "chosen": "a", "rejected": other} for other in "ab"))
    found = read_all("a.jsonl", root=tmp_path)
    assert found.skipped == {"the same text on both sides": 1} and len(found.records) == 1
    with pytest.raises(DataError, match="chosen and rejected are the same") as caught:
        read_all("a.jsonl", root=tmp_path, rules=LayoutConfig(ties="error"))
    assert caught.value.where == "a.jsonl:1"
    checked = validate(["a.jsonl"], root=tmp_path, rules=LayoutConfig(ties="error"))
    assert [problem.where for problem in checked.problems] == ["a.jsonl:1"]


def test_grades_without_a_rule_are_one_problem(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *({"prompt": "p", "completion": str(n), "stars": n} for n in range(1, 6)))
    (problem,) = validate(["a.jsonl"], root=tmp_path).problems
    assert (
        "data.ratings: {up: 4, down: 2} in a recipe, --data.ratings.up" in str(problem) and "(1 to 5)" in problem.what
    )
    rules = LayoutConfig(ratings=RatingsConfig(up=4, down=2))
    checked = validate(["a.jsonl"], root=tmp_path, rules=rules)
    assert checked.ok and checked.records == {"rating": 4}
    ignored = validate(["a.jsonl"], root=tmp_path, rules=LayoutConfig(grades="ignore"))
    assert ignored.records == {"demonstration": 5}


def test_scores_against_the_label_are_told(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}
    write(tmp_path / "a.jsonl", row)
    checked = validate(["a.jsonl"], root=tmp_path)
    assert checked.ok and any("1 comparisons have a negative margin" in warning for warning in checked.warnings)


@pytest.mark.parametrize("blank", ["\n\n", "\n", "\r\n\r\n"])
def test_hh_without_the_line_breaks_that_begin_it(tmp_path: Path, blank: str) -> None:
    chosen, rejected = (f"Human: Hi{blank}Assistant: {answer}" for answer in ("Yes", "No"))
    found = reading(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert found.formats == {"a.jsonl": "hh"}
    assert found.records == [Comparison(({"role": "user", "content": "Hi"},), "Yes", "No", "hi", source="a.jsonl:1")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "a", "rejected": "b", "instruction": "i", "output": "o", "input": "n"},
        {"prompt": "p", "completion": "c", "response": "r", "conversations": []},
        {"messages": [], "tools": []},
        {"prompt": "p", "chosen": "a", "rejected": "b", "response_a": "x", "response_b": "y", "winner": "a"},
    ],
)
def test_trls_columns_go_before_other_layouts(row: dict[str, Any]) -> None:
    assert detect(row) == "trl"


@given(st.text(alphabet=st.characters(max_codepoint=0x2FF), max_size=40))
@settings(max_examples=300)
def test_groups_of_ascii_texts_are_what_groups_of_all_texts_are(text: str) -> None:
    """ASCII takes a fast way; the words after a letter beyond it take the other."""
    slow = " ".join(re.sub(r"[^\w\s]", "", text.lower()).split()) or text.strip()
    assert group_key(text) == slow
    ascii_part = "".join(mark for mark in text if mark.isascii())
    assert group_key(ascii_part + " \u00e9") == f"{group_key(ascii_part + ' x').removesuffix('x')}\u00e9"


def test_a_row_counts_with_all_its_records_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is refused half-way, and rows after it, whatever the reader had already given."""

    def reader(rows: Any) -> Any:
        for where, row in rows:
            for text in row["texts"]:
                if text == "bad":
                    raise DataError("bad", where=where)
                yield Prompt(text, "g", source=where)

    rows: list[tuple[str, Any]] = [
        ("f:1", {"texts": ["a", "b"]}),
        ("f:2", DataError("no JSON", where="f:2")),
        ("f:3", {"texts": ["c", "bad", "d"]}),
        ("f:4", {"texts": ["bad"]}),
        ("f:5", {"texts": ["e", " ", "f"]}),
        ("f:6", {"texts": []}),
        ("f:7", {"texts": ["g"]}),
    ]

    def damaged() -> Any:
        yield from rows
        raise DataError("the gzip file is truncated", where="f")

    monkeypatch.setattr(data_read.files, "rows_or_errors", lambda _file: damaged())
    monkeypatch.setattr(data_read, "reader_of", lambda *_: reader)
    outcomes = list(data_read.records_or_problems(DataFile("f", None), "hh"))
    found = [one.where if isinstance(one, DataError) else getattr(one, "prompt", None) for one in outcomes]
    assert found == ["a", "b", "f:2", "f:3", "f:4", "f:5", "g", "f"]


def test_rows_are_never_in_memory_all_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peaks = []
    for count in (1000, 4000):
        rows = (
            (f"f:{number}", {"prompt": f"{number}" + "x" * 2000, "completion": "y", "label": True})
            for number in range(count)
        )
        monkeypatch.setattr(data_read.files, "rows_or_errors", lambda _file, rows=rows: rows)
        tracemalloc.start()
        for outcome in data_read.records_or_problems(DataFile("f", None), "trl"):
            assert isinstance(outcome, Rating)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
