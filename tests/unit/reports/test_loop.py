"""The page of a loop: what is shown, and texts that are none but text."""

from typing import Any

from perlhf.reports import loop

HOSTILE = "<script>alert(1)</script>"


def found(rounds: int, rules: bool = False) -> dict[str, Any]:
    """As loop.json holds it."""
    each: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        value = {"value": 0.5 + number / 10, "low": 0.4, "high": 0.9}
        sides = {"before": {"value": 10.0, "low": None, "high": None}, "after": value}
        one = {"round": number, "labels": 20 * number, "drawn": {"random": 5, "disagreement": 15}}
        one |= {"accuracy": value, "predicted": value, "preferred": value, "judged_duels": 12, "disagreement": 0.1}
        one |= {"kl": value, "tokens": sides, "gold": sides, "seconds": {"policy": 61.0, "labels": 5000.0}}
        one |= {"stopped": HOSTILE if number == 2 else None}
        each.append(one | ({"accuracy_by_rules": value} if rules else {}))
    return {
        "labeller": HOSTILE,
        "order": "disagreement",
        "random_share": 0.25,
        "members": 4,
        "held_out_questions": 30,
        "duels": 16,
        "rounds": each,
        "curve": {"sentence": "Another 100 labels would bring something."},
        "pleasing_alone_since": None,
        "verdict": f"In no round {HOSTILE}",
    }


def test_rounds_are_rows_and_texts_are_text() -> None:
    page = loop.render(found(3), HOSTILE).decode()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("<svg") == 2 and "Another 100 labels would bring something." in page
    assert "Round 2: &lt;script&gt;" in page and "40 (asked: 5 random, 15 disagreement)" in page
    assert loop.render(found(3), "x") == loop.render(found(3), "x")


def test_rules_have_columns_of_their_own() -> None:
    for rules in (False, True):
        numbers = found(2, rules)
        heads = loop.columns(numbers)
        assert len(heads) == 8 + 2 * rules
        assert all(len(cells) == len(heads) for _, cells in loop.rows(numbers))
    cells = dict(zip(loop.columns(found(1, True)), loop.rows(found(1, True))[0][1], strict=True))
    assert cells["gold score, the start's first"].startswith("10") and cells["the machine's time"] == "1 min 01 s"


def test_no_round_and_unknown_numbers() -> None:
    numbers = found(1)
    for key in ("accuracy", "predicted", "preferred", "disagreement", "kl"):
        numbers["rounds"][0][key] = None
    assert "–" in loop.render(numbers, "x").decode()
    assert loop.render(found(0), "x")
