"""Evaluations as files: what is written is read again, and what a file lacks is absent."""

import json
from pathlib import Path

from perlhf.runs.evaluations import Evaluation, Measured, WinRate, measured, read_evaluation, write_evaluation


def test_values_that_are_no_numbers_are_no_measurements():
    assert [measured(raw) for raw in (None, "0.5", True, float("nan"), {"value": None}, {})] == [None] * 6
    assert measured({"value": 1, "low": float("nan"), "high": 2}) == Measured(1, None, 2)


def test_what_is_written_is_read_again(tmp_path: Path):
    evaluation = Evaluation(
        kind="policy",
        n=3,
        baselines={"position": {"auc": None, "unavailable": "no turns"}, "length": {"auc": Measured(0.5, 0.4, 0.75)}},
        calibration=[],
        before={"score": Measured(1.0, 0.0, 2.0), "gold": None},
        after={"score": Measured(1.5), "gold": Measured(0.25)},
        win_rate=WinRate(0.75, 0.5, 1.0, by="judge oak, both orders", unparsable=0),
        samples=[{"prompt": "Tea?", "kl": None}],
    )
    path = tmp_path / "new" / "evaluation.json"
    write_evaluation(path, evaluation)
    assert read_evaluation(path) == evaluation
    assert evaluation.before_after("score") == (Measured(1.0, 0.0, 2.0), Measured(1.5))
    assert evaluation.before_after("gold") is None and evaluation.before_after("kl") is None


def test_the_file_has_null_for_an_unknown_number_and_no_key_for_another_stages(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    metrics = {"auc": None, "accuracy": Measured(0.5, float("nan"), float("nan"))}
    write_evaluation(path, Evaluation(kind="reward", metrics=metrics, comparisons=0, calibration=[]))
    assert json.loads(path.read_text()) == {
        "kind": "reward",
        "split": "test",
        "n": 0,
        "groups": 0,
        "comparisons": 0,
        "groups_seen_in_training": 0,
        "metrics": {"auc": None, "accuracy": {"value": 0.5, "low": None, "high": None}},
        "calibration": [],
        "samples": [],
    }


def test_keys_that_a_file_lacks_are_absent(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    path.write_text('{"win_rate": {"by": "x"}, "after": {"score": 0.5, "kl": {"value": null}}, "from_later": 1}')
    assert read_evaluation(path) == Evaluation(after={"score": Measured(0.5), "kl": None})
