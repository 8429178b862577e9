"""The readers on the real feedback files: counts as the files' own README gives them, skipped rows included."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from perlhf.config.stages import DataConfig
from perlhf.data.pull import pull, sources
from perlhf.data.read import read_all
from perlhf.data.records import Comparison, Demonstration, Rating, Record
from perlhf.data.splits import load
from perlhf.data.tools import validate
from perlhf.errors import DataError

COMPLETENESS = {  # path: records, kind, groups, skipped
    "taskmaster-coffee/reward": (2609, Rating, 683, {"empty context": 6}),
    "taskmaster-ticketing/reward": (3018, Rating, 211, {"empty generation": 3}),
    "taskmaster-ticketing/splits": (1215, Demonstration, 1010, {"empty turn, or nothing before it": 2}),
    "hh-rlhf": (1819, Comparison, 1713, {"empty completion": 4, "the prompts of chosen and rejected differ": 5}),
    "hhh-alignment": (175, Comparison, 71, {}),
    "oasst": (547, Comparison, 72, {"a synthetic reply": 16, "siblings of which some have no rank": 1}),
    "pandalm": (634, Comparison, 118, {"tie": 75, "empty completion": 42}),
    "llmbar": (75 + 106 + 73 + 40 + 33, Comparison, 326, {}),
    "mt-bench": (150, Comparison, 57, {}),
    "feedbackqa": (2070, Comparison, 792, {"equal mean grades": 3 * 823 - 2070}),
    "squality/human-eval": (225, Comparison, 15, {}),
    "squality/v1-3": (40 * 5 * 4, Demonstration, 40, {}),
    "uibert": (413 + 481, Demonstration, 894, {}),
}


@pytest.mark.parametrize("path", sorted(COMPLETENESS))
def test_counts(feedback_root: Path, path: str) -> None:
    records, kind, groups, skipped = COMPLETENESS[path]
    found = read_all(path, root=feedback_root)
    assert Counter(map(type, found.records)) == {kind: records}
    assert found.skipped == skipped
    assert len({record.group for record in found.records}) == groups


@pytest.mark.parametrize(
    ("name", "rows", "up"), [("taskmaster-coffee", 2615, 2245), ("taskmaster-ticketing", 3021, 489)]
)
def test_taskmaster_labels(feedback_root: Path, name: str, rows: int, up: int) -> None:
    """Counts of the README; of the skipped rows, six of coffee are up and three of ticketing are down."""
    found = read_all(f"{name}/reward", root=feedback_root)
    labels = Counter(record.label for record in found.records if isinstance(record, Rating))
    skipped_up = found.skipped.get("empty context", 0)
    assert labels[True] + skipped_up == up
    assert labels[True] + labels[False] + sum(found.skipped.values()) == rows


def test_contradicted_and_repeated_ratings(feedback_root: Path) -> None:
    """README: 193 repeated coffee rows and 39 ticketing ones; no coffee row has both labels."""
    for name, repeated in (("taskmaster-coffee", 193), ("taskmaster-ticketing", 39)):
        records = [r for r in read_all(f"{name}/reward", root=feedback_root).records if isinstance(r, Rating)]
        pairs = Counter((str(record.prompt), record.completion) for record in records)
        mute = 2 if name == "taskmaster-ticketing" else 0
        assert abs(len(records) - len(pairs) - repeated) <= mute
        verdicts = Counter(pair for pair, _ in {((str(r.prompt), r.completion), r.label) for r in records})
        assert (max(verdicts.values()) == 1) == (name == "taskmaster-coffee")


def test_oasst_count_under_the_rule_of_the_readme(feedback_root: Path) -> None:
    """563 are all pairs of 157 fully ranked sibling lists; the reader leaves out 16 with a synthetic reply."""
    pairs = lists = 0
    with gzip.open(feedback_root / "oasst/en_100_tree.jsonl.gz", "rt", encoding="utf-8") as lines:
        waiting = [json.loads(line)["prompt"] for line in lines]
    while waiting:
        node = waiting.pop()
        replies = node["replies"]
        waiting.extend(replies)
        if len(replies) > 1 and all("rank" in reply and reply["rank"] is not None for reply in replies):
            pairs, lists = pairs + len(replies) * (len(replies) - 1) // 2, lists + 1
    found = read_all("oasst", root=feedback_root)
    assert (pairs, lists) == (563, 157)
    assert len(found.records) + found.skipped["a synthetic reply"] == 563


def test_pandalm_winners(feedback_root: Path) -> None:
    """README: majority 301 first, 375 second, 75 ties; six boolean responses are the text True."""
    rows = json.loads(gzip.decompress((feedback_root / "pandalm/testset-v1.json.gz").read_bytes()))
    found = read_all("pandalm", root=feedback_root).records
    first = 0
    for record in found:
        assert isinstance(record, Comparison)
        row = rows[int(record.source.rsplit("[", 1)[1][:-1])]
        first += str(row["response1"]).strip() == record.chosen
    lost = {1: 0, 2: 0}
    for row in rows:
        votes = [row[f"annotator{n}"] for n in (1, 2, 3)]
        winner = next((side for side in (1, 2) if votes.count(side) > 1), None)
        if winner and not (str(row["response1"]).strip() and str(row["response2"]).strip()):
            lost[winner] += 1
    assert first + lost[1] == 301 and len(found) - first + lost[2] == 375
    booleans = [r for r in found if isinstance(r, Comparison) and "True" in (r.chosen, r.rejected)]
    assert len(booleans) == 6


def test_feedbackqa_ratings(feedback_root: Path) -> None:
    found = read_all("feedbackqa", "feedbackqa-ratings", root=feedback_root)
    labels = Counter(record.label for record in found.records if isinstance(record, Rating))
    assert labels == {True: 1055, False: 1154} and sum(labels.values()) + found.skipped["raters evenly divided"] == 2469


def test_squality_human_summary_always_wins(feedback_root: Path) -> None:
    found = [r for r in read_all("squality/human-eval", root=feedback_root).records if isinstance(r, Comparison)]
    rows = gzip.decompress((feedback_root / "squality/human-eval/all-responses.jsonl.gz").read_bytes()).splitlines()
    human = {
        question["human"]["response"].strip() for row in rows for question in json.loads(row)["questions"].values()
    }
    assert sum(record.chosen in human for record in found) == 150
    assert not any(record.rejected in human for record in found)


def test_squality_questions_are_the_same_pairs_without_stories(feedback_root: Path) -> None:
    whole, alone = (
        [r for r in read_all("squality/human-eval", name, root=feedback_root).records if isinstance(r, Comparison)]
        for name in ("squality", "squality-questions")
    )
    assert [(r.chosen, r.rejected, r.group) for r in alone] == [(r.chosen, r.rejected, r.group) for r in whole]
    assert all(str(long.prompt).endswith(f"\n\n{short.prompt}") for long, short in zip(whole, alone, strict=True))
    assert max(len(str(record.prompt)) for record in alone) < 300


def test_uibert_pairs(feedback_root: Path) -> None:
    """Three wrong elements of each screen, fewer on 11 small ones."""
    right = {
        (str(r.prompt).replace("its number.", "its line."), r.completion, r.group)
        for r in demonstrations(feedback_root)
    }
    found = read_all("uibert", "uibert-pairs", root=feedback_root)
    pairs = [record for record in found.records if isinstance(record, Comparison)]
    assert not found.skipped and {(r.prompt, str(r.chosen).partition(":")[0], r.group) for r in pairs} == right
    assert all(f"\n{side}\n" in str(r.prompt) for r in pairs for side in (r.chosen, r.rejected))
    assert Counter(Counter(r.group for r in pairs).values()) == {3: 883, 2: 7, 1: 4}
    assert len({(r.group, r.rejected) for r in pairs}) == len(pairs) and all(r.chosen != r.rejected for r in pairs)


def demonstrations(feedback_root: Path) -> list[Demonstration]:
    return [r for r in read_all("uibert", root=feedback_root).records if isinstance(r, Demonstration)]


@pytest.mark.parametrize(("path", "kind"), [("taskmaster-coffee/reward", Rating), ("hh-rlhf", Comparison)])
def test_label_noise_turns_about_its_share(
    feedback_root: Path, path: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERLHF_DATA", str(feedback_root))
    config = DataConfig(paths=(path,))
    clean = load(config, ("comparison", "rating"), "train")
    for share in (0.1, 0.3):
        noisy = load(config.model_copy(update={"label_noise": share}), ("comparison", "rating"), "train")
        assert all(isinstance(record, kind) for record in noisy)
        turned = sum(one != other for one, other in zip(clean, noisy, strict=True)) / len(clean)
        assert turned == pytest.approx(share, abs=0.03)


def test_coffee_dialogs_read_like_the_reward_files(feedback_root: Path) -> None:
    """One demonstration for each call and each assistant turn; prompts and calls look as the rated ones do."""
    found = read_all("taskmaster-coffee/data", root=feedback_root)
    calls = turns = 0
    for path in sorted((feedback_root / "taskmaster-coffee/data").iterdir()):
        for dialog in json.loads(gzip.decompress(path.read_bytes())):
            turns += sum(turn["speaker"] == "assistant" for turn in dialog["utterances"])
            notes = [note for turn in dialog["utterances"] for note in turn["annotations"]]
            calls += sum(note["name"] == "api_call" for note in notes)
    assert calls == 12359 and len(found.records) == calls + turns and not found.skipped
    rated = read_all("taskmaster-coffee/reward", root=feedback_root).records
    prompts = {str(record.prompt) for record in rated}
    assert any(str(record.prompt) in prompts for record in found.records), (
        "greeting and first turn as in the rated ones"
    )
    said = {record.completion for record in rated if isinstance(record, Rating)}
    same = [record for record in found.records if isinstance(record, Demonstration) and record.completion in said]
    assert len(same) > 1000, "the same calls are written alike"
    assert call_shapes(found.records) & call_shapes(rated) >= {("get_menu_items", "items"), ("finish_order", "success")}


def call_shapes(records: list[Record]) -> set[tuple[str, str]]:
    """(call, result field) of every tool message of the prompts."""
    shapes: set[tuple[str, str]] = set()
    for record in records:
        for message in record.prompt:
            assert not isinstance(message, str)
            if message["role"] == "tool":
                ((name, result),) = json.loads(message["content"]).items()
                shapes |= {(name, field) for field in result} if isinstance(result, dict) else set()
    return shapes


def test_ticketing_rows_keep_every_turn(feedback_root: Path) -> None:
    """Each marker of the source is one message, in the order of the dialog (the latest turn last)."""
    path = feedback_root / "taskmaster-ticketing/splits/train/train-bc.tsv.gz"
    rows = gzip.decompress(path.read_bytes()).decode().splitlines()
    by_source: dict[str, Any] = {}
    for record in read_all("taskmaster-ticketing/splits", root=feedback_root).records:
        by_source.setdefault(record.source, record)
    for number, row in enumerate(rows, start=1):
        source = row.split("\t")[0]
        record = by_source.get(f"taskmaster-ticketing/splits/train/train-bc.tsv.gz:{number}")
        if record is None:
            assert source == "<S>"
            continue
        assert len(record.prompt) == sum(source.count(mark) for mark in ("<U>", "<A>", "<PN>", "<PR>"))
        expected = "user" if source.lstrip('"').startswith("<U>") else "tool"
        assert record.prompt[-1]["role"] == expected


SPLIT_PATHS = ("taskmaster-coffee/reward", "taskmaster-ticketing/reward", "hh-rlhf", "feedbackqa", "oasst")


@pytest.mark.parametrize("path", SPLIT_PATHS)
def test_no_conversation_is_on_two_sides(feedback_root: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No group, no first user turn and no exact prompt of the test side is in training, even across files and sets."""
    monkeypatch.setenv("PERLHF_DATA", str(feedback_root))
    config = DataConfig(paths=(path,))
    kinds = ("comparison", "rating")
    train, validation, test = (load(config, kinds, side) for side in ("train", "validation", "test"))
    assert len(train) + len(validation) + len(test) == len(read_all(path, root=feedback_root).records)
    for one, other in ((train, test), (train, validation), (validation, test)):
        assert not {record.group for record in one} & {record.group for record in other}
        assert not {first_words(record) for record in one} & {first_words(record) for record in other}
        assert not {str(record.prompt) for record in one} & {str(record.prompt) for record in other}


def first_words(record: Record) -> str:
    prompt = record.prompt
    return prompt if isinstance(prompt, str) else next(m["content"] for m in prompt if m["role"] == "user")


def test_demonstrations_of_coffee_never_open_as_a_test_rating_does(
    feedback_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERLHF_DATA", str(feedback_root))
    dialogs, ratings = (DataConfig(paths=(f"taskmaster-coffee/{folder}",)) for folder in ("data", "reward"))
    shown = {record.group for record in load(dialogs, ("demonstration",), "train")}
    rated = {record.group for record in load(ratings, ("rating",), "test")}
    everything_shown = {record.group for record in load(dialogs, ("demonstration",), "all")}
    assert rated & everything_shown, "some rated groups do occur among the dialogs"
    assert not rated & shown


def test_all_files_are_valid(feedback_root: Path) -> None:
    found = validate(["hh-rlhf", "oasst", "pandalm", "llmbar", "feedbackqa", "squality"], root=feedback_root)
    assert found.ok and found.files == 16


def test_every_set_can_be_pulled_from_the_local_copy(feedback_root: Path, tmp_path: Path) -> None:
    for name in sources():
        pull(name, tmp_path, source=feedback_root)
    for path in ("hh-rlhf", "squality/human-eval", "uibert"):
        assert len(read_all(path, root=tmp_path).records) == COMPLETENESS[path][0]
    manifest = json.loads((feedback_root / "MANIFEST.json").read_text())
    assert sum(len(one["files"]) for one in sources().values()) == len(manifest)
    for entry in manifest:
        name, local = entry["file"].split("/", 1)
        known = sources()[name]
        assert (known["repository"], known["commit"]) == (entry["source"], entry["commit"])
        assert entry["path"] in known["files"].values(), local


def test_a_flipped_byte_of_a_local_copy_is_seen(feedback_root: Path, tmp_path: Path) -> None:
    content = bytearray((feedback_root / "oasst/en_100_tree.jsonl.gz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "copy/oasst").mkdir(parents=True)
    (tmp_path / "copy/oasst/en_100_tree.jsonl.gz").write_bytes(content)
    (tmp_path / "copy/MANIFEST.json").write_bytes((feedback_root / "MANIFEST.json").read_bytes())
    with pytest.raises(DataError, match="the SHA-256 is"):
        pull("oasst", tmp_path / "out", source=tmp_path / "copy")
    assert not (tmp_path / "out/oasst").exists()
