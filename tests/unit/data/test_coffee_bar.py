"""The embedded coffee-bar feedback: gold by hand, hacks, and the distribution that the demo relies on."""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import pytest
from sklearn.metrics import roc_auc_score

from perlhf.data.coffee_bar.feedback import (
    ANNOTATORS,
    RULES,
    gold,
    gold_reward,
    gold_rules,
    honest_answer,
    records,
    taskmaster_json,
)
from perlhf.data.coffee_bar.gold import ITEMS, ordered_in
from perlhf.data.read import read
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating
from perlhf.errors import DataError

SHA256 = {
    "rating": "42476a76cf7e36445680330019124be88912fc1dab531e78c3a2df12738754cc",
    "comparison": "7d1f845c7527e57567699473a45a04b497dd5e05ae6c31bc20f133f1beba4e0c",
    "demonstration": "fc9ff8c7256b2bf3230cb67074f87d48f95d128124a3938f1950ab133812b6c4",
    "prompt": "879ff2c99940a20e121c7003f0e5bb507d9c85d3c22175fd7898bd959d981ea0",
}


def user(*turns: str) -> tuple[dict[str, str], ...]:
    """Customer turns with a neutral answer between them."""
    messages = [[{"role": "user", "content": turn}, {"role": "assistant", "content": "Noted."}] for turn in turns]
    return tuple(message for pair in messages for message in pair)[:-1]


LATTE = user("Hi, could I get a large oat milk latte and two croissants to go, please?")
GOOD = "Of course! That is a large oat milk latte and two croissants to go. Anything else?"


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [record for record in records("prompt") if isinstance(record, Prompt)]


@pytest.fixture(scope="module")
def ratings() -> list[Rating]:
    return [record for record in records("rating") if isinstance(record, Rating)]


@pytest.fixture(scope="module")
def demonstrations() -> list[Demonstration]:
    return [record for record in records("demonstration") if isinstance(record, Demonstration)]


# LATTE has 6 countable details: two items, large, oat, the quantity two, and to go.
@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, {}),
        ("Sure. A latte, large, with oat milk, and two croissants, takeaway. Is that right?", {}),
        ("Thanks! 2 croissants and a large oat latte to go, coming right up!", {}),
        # one of two items named: union 2, intersection 1; details latte + large + oat + to go = 4 of 6
        ("Of course! A large oat milk latte to go. Anything else?", {"items": 1 / 2, "details": 4 / 6}),
        # small for large: right 5 of 6 + the wrong one; small was never ordered
        (GOOD.replace("large", "small"), {"details": 5 / 7, "only_ordered": 0}),
        # milk unsaid
        (GOOD.replace("oat milk ", ""), {"details": 5 / 6}),
        # wrong quantity: two is missing and three is invented
        (GOOD.replace("two", "three"), {"details": 5 / 7, "only_ordered": 0}),
        (GOOD.replace("to go", "for here"), {"details": 5 / 6}),
        # a third item: two of three named ones were ordered
        (GOOD.replace(" to go", ", and a muffin, to go"), {"items": 2 / 3, "only_ordered": 0}),
        (GOOD.replace(" to go", ", and a cheesecake, to go"), {"items": 2 / 3, "only_ordered": 0}),
        (GOOD.removeprefix("Of course! "), {"courteous": 0}),
        (GOOD.replace("Anything else?", "Whatever."), {"courteous": 0, "civil": 0, "closing": 0}),
        (GOOD.removesuffix(" Anything else?"), {"closing": 0}),
        (GOOD + " Anything else?", {"concise": 0}),
        # the 16 words of GOOD and 34 more are 50, halfway from 40 to 60
        (GOOD.replace("!", "! " + " ".join(f"word{index}" for index in range(34)) + "."), {"concise": 0.5}),
    ],
)
def test_each_rule_by_hand(completion: str, expected: dict[str, float]) -> None:
    assert gold_rules(LATTE, completion) == pytest.approx(dict.fromkeys(RULES, 1.0) | expected)


def test_gold_is_the_mean_of_the_rules() -> None:
    assert gold(LATTE, GOOD) == 1
    half = "Of course! A large oat milk latte to go. Anything else?"
    assert gold(LATTE, half) == pytest.approx((1 / 2 + 4 / 6 + 5) / 7)
    assert gold_reward([LATTE, LATTE], [GOOD, ""]) == [1, 0]
    assert gold(LATTE[0]["content"], GOOD) == 1, "plain text is one user turn"


@pytest.mark.parametrize(
    ("turns", "items", "service"),
    [
        (["Two mochas, small, with soy milk and caramel syrup."], {"mocha": {"two", "small", "soy", "caramel"}}, set()),
        (["Just a chai latte to stay."], {"chai latte": set()}, {"stay"}),
        (
            ["A scone with butter and jam and an iced green tea."],
            {"scone": {"butter", "jam"}, "green tea": {"iced"}},
            set(),
        ),
        (["A small latte, please.", "Actually, make the latte large, please."], {"latte": {"large"}}, set()),
        (["A latte and three bagels.", "Please leave out the bagels."], {"latte": set()}, set()),
        (["A latte.", "And a decaf espresso, for here."], {"latte": set(), "espresso": {"decaf"}}, {"stay"}),
        (["Morning! What a day."], {}, set()),
    ],
)
def test_orders_are_read_from_the_user_turns(turns: list[str], items: dict[str, set[str]], service: set[str]) -> None:
    order = ordered_in(user(*turns))
    assert (order.items, order.service) == (items, service)


def test_an_answer_to_a_changed_order_is_held_to_the_change() -> None:
    changed = user("Can I get a small latte and a bagel?", "Actually, make the latte large, please.")
    assert gold(changed, "Sure! A large latte and a bagel. Is that right?") == 1
    assert gold(changed, "Sure! A small latte and a bagel. Is that right?") < 0.8
    removed = user("Can I get a small latte and a bagel?", "Actually, skip the bagel.")
    assert gold(removed, "Sure! A small latte without the bagel. Is that right?") == 1
    assert gold(removed, "Sure! A small latte and a bagel. Is that right?") < 0.8


def test_details_belong_to_their_item() -> None:
    prompt = user("A large latte and a small mocha.")
    assert gold(prompt, "Sure! A large latte and a small mocha. Anything else?") == 1
    assert gold_rules(prompt, "Sure! A small latte and a large mocha. Anything else?")["details"] == 2 / 6
    assert gold(prompt, "Sure! A large latte and a small mocha. Hot or iced?") == 1, "a question states nothing"


@pytest.mark.parametrize(
    ("hack", "most"),
    [
        ("", 0),
        ("\n \t", 0),
        ("\x00\ufffd 🤖🤖 ,,,, ???", 0),
        ("9" * 10_000, 0),
        ("Thank you! Have a lovely day! Anything else?", 0),
        (LATTE[0]["content"], 2 / 7),
        ("Thanks! " + LATTE[0]["content"] + " Anything else?", 2 / 7),
        ("Thanks! We have " + ", ".join(ITEMS) + ". Anything else?", 0.15),
        ("Thanks! A small, medium or large oat, almond, soy or coconut latte and one, two or three croissants?", 0.75),
        (GOOD * 5, 0.86),
        ("latte croissant " * 20, 0.6),
        ("latte " * 50, 0.5),
    ],
)
def test_hacks_score_below_honest_answers(hack: str, most: float) -> None:
    assert gold(LATTE, hack) <= most + 1e-9
    assert gold(LATTE, honest_answer(LATTE)) == 1


@pytest.mark.parametrize(
    "phrase",
    [
        "Can I get a name for the order?",
        "I'd love to help!",
        "I'll have that right out.",
        "Could I have your name, please?",
    ],
)
def test_staff_phrases_are_no_echo(phrase: str) -> None:
    assert gold_rules(LATTE, f"{GOOD} {phrase}")["civil"] == 1


def test_parroting_every_prompt_scores_low(prompts: list[Prompt]) -> None:
    parroted = [gold(prompt.prompt, ordering(prompt)) for prompt in prompts]
    assert max(parroted) <= 2 / 7 + 1e-9
    flattered = [gold(prompt.prompt, f"Thanks! {ordering(prompt)} Anything else?") for prompt in prompts]
    assert mean(flattered) < 0.6


def ordering(prompt: Prompt) -> str:
    assert not isinstance(prompt.prompt, str)
    return prompt.prompt[-1]["content"]


def test_honest_answers_reach_the_ceiling(prompts: list[Prompt]) -> None:
    answers = [honest_answer(prompt.prompt, seed) for seed, prompt in enumerate(prompts)]
    scores = gold_reward([prompt.prompt for prompt in prompts], answers)
    assert min(scores) == 1
    assert max(len(answer.split()) for answer in answers) <= 40
    assert len(set(answers)) > 1300


def test_honest_answer_needs_an_order() -> None:
    with pytest.raises(DataError, match="orders nothing"):
        honest_answer("What is the capital of France?")


def test_prompts_are_many_and_varied(prompts: list[Prompt]) -> None:
    assert len(prompts) == len({prompt.group for prompt in prompts}) == 1400
    assert {len(prompt.prompt) for prompt in prompts} == {1, 3}
    assert 0.15 < mean(len(prompt.prompt) == 3 for prompt in prompts) < 0.25
    first = [prompt.prompt[0] for prompt in prompts]
    assert all(not isinstance(turn, str) and turn["role"] == "user" for turn in first)
    assert len({prompt.group.split(" a ")[0][:12] for prompt in prompts}) >= 40
    orders = [ordered_in(prompt.prompt) for prompt in prompts]
    assert {item for order in orders for item in order.items} == set(ITEMS)
    assert {len(order.items) for order in orders} == {1, 2, 3, 4}
    share = [int(hashlib.sha256(f"0:{prompt.group}".encode()).hexdigest(), 16) / 2**256 for prompt in prompts]
    assert sum(value < 0.2 for value in share) >= 220


def test_group_is_the_first_user_turn_without_case_and_punctuation(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        first = prompt.prompt[0]
        assert not isinstance(first, str)
        assert prompt.group == " ".join(re.sub(r"[^a-z ]", "", first["content"].lower()).split())


def test_demonstrations_are_of_mixed_quality(demonstrations: list[Demonstration]) -> None:
    scores = [gold(record.prompt, str(record.completion)) for record in demonstrations]
    assert len(scores) == 900
    assert 0.55 < mean(scores) < 0.75
    assert 0.35 < mean(score > 0.95 for score in scores) < 0.45
    assert mean(score < 0.7 for score in scores) > 0.3
    assert max(len(str(record.completion).split()) for record in demonstrations) <= 80
    by_rule = defaultdict(list)
    for record in demonstrations:
        for rule, value in gold_rules(record.prompt, str(record.completion)).items():
            by_rule[rule].append(value)
    assert set(by_rule) == set(RULES)
    assert all(0.5 < mean(values) < 0.9 for values in by_rule.values()), "each rule leaves something to learn"


def test_ratings_are_noisy_but_follow_gold(ratings: list[Rating]) -> None:
    labels = [record.label for record in ratings]
    scores = [gold(record.prompt, str(record.completion)) for record in ratings]
    assert len(ratings) == 1200
    assert len({record.group for record in ratings}) == 600
    assert 0.35 < mean(labels) < 0.65
    assert 0.75 < roc_auc_score(labels, scores) < 0.92
    ups = {name: mean(record.label for record in ratings if record.annotator == name) for name in ANNOTATORS}
    assert ups["ann"] > ups["cas"] > ups["eli"], "annotators differ in strictness"


def test_comparisons_prefer_the_better_answer_most_of_the_time() -> None:
    pairs = [record for record in records("comparison") if isinstance(record, Comparison)]
    gaps = [gold(pair.prompt, str(pair.chosen)) - gold(pair.prompt, str(pair.rejected)) for pair in pairs]
    assert len(pairs) == 800
    assert all(gap != 0 for gap in gaps)
    assert 0.8 < mean(gap > 0 for gap in gaps) < 0.95


@pytest.mark.parametrize("kind", ["rating", "comparison", "demonstration", "prompt"])
def test_records_never_change(kind) -> None:
    def as_json(seed: int) -> str:
        rows = [asdict(record) for record in records(kind, seed=seed)]
        assert not any(row.pop("tools") or row.pop("columns", None) for row in rows), "the set has neither"
        return json.dumps(rows, sort_keys=True)

    assert hashlib.sha256(as_json(0).encode()).hexdigest() == SHA256[kind]
    assert as_json(1) != as_json(0)


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean rating"):
        records("ratings")  # pyright: ignore[reportArgumentType]  # the mistake under test


def test_taskmaster_layout_holds_the_same_ratings(ratings: list[Rating]) -> None:
    rows = taskmaster_json()
    assert len({row["conversation_id"] for row in rows}) == len(rows) == len(ratings)
    for row, rating in zip(rows, ratings, strict=True):
        assert list(row) == ["conversation_id", "context", "generation", "reward"]
        context = [(turn["role"].replace("agent", "assistant"), turn["text"]) for turn in json.loads(row["context"])]
        assert context == [(turn["role"], turn["content"]) for turn in rating.prompt if not isinstance(turn, str)]
        assert json.loads(row["generation"]) == {"role": "agent", "text": rating.completion}
        assert row["reward"] == (1.0 if rating.label else 0.0)


def test_the_taskmaster_reader_gives_the_same_ratings_back(ratings: list[Rating], tmp_path: Path) -> None:
    path = tmp_path / "reward_00.json"
    path.write_text(json.dumps(taskmaster_json()), encoding="utf-8")
    read_back = [record for record in read(str(path)) if isinstance(record, Rating)]
    expected = [replace(rating, annotator=None, source="") for rating in ratings]
    assert [replace(record, source="") for record in read_back] == expected
