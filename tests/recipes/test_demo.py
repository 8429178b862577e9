"""The demo on the tiny base: everything runs, is reused, and the verdict follows the intervals."""

from pathlib import Path

import pytest
from toy import read_json, read_lines

from perlhf.commands import demo
from perlhf.config.commands import DemoConfig
from perlhf.config.stages import DataConfig
from perlhf.data.records import Rating
from perlhf.data.splits import load
from perlhf.runs.evaluations import Evaluation, Measured
from perlhf.runs.read import STAGES


def test_the_quick_demo_runs_all_and_then_reuses_it(perlhf, tiny_base: Path, tmp_path: Path) -> None:
    root = tmp_path / "demo"
    options = ("demo", "--quick", "--base", str(tiny_base), "--directory", str(root), "--device", "cpu")
    done = perlhf(*options)
    assert done.code == 0, done.err
    summary = read_json(root / "summary.json")
    assert {"reward_auc", "gold", "score", "kl", "peak_memory_bytes"} <= summary.keys()
    assert summary["seconds"].keys() == {"sft", "reward", "policy", "reward evaluation", "policy evaluation"}
    assert summary["test_prompts"] == 8 and summary["reward_test_ratings"] > 100
    for words in (
        "mean gold score",
        "KL to the SFT policy",
        "peak memory",
        "these numbers prove nothing",
        "report.html",
    ):
        assert words in done.out.replace("\n", " "), done.out
    assert done.out.count("customer") == 5 and done.out.count("before (gold") == 5
    assert (root / "report.html").stat().st_size > 50_000
    updates = {stage: read_lines(root / stage / "metrics.jsonl") for stage in STAGES}
    assert [len(lines) for lines in updates.values()] == [2, 2, 2]

    again = perlhf(*options)
    assert again.code == 0
    assert read_json(root / "summary.json")["gold"] == summary["gold"]
    assert {stage: read_lines(root / stage / "metrics.jsonl") for stage in STAGES} == updates
    assert "answers" not in again.err, "the evaluation is reused too"

    # An evaluation by hand with other settings is not taken for the demo's.
    assert perlhf("evaluate", str(root / "policy"), "--temperature", "0", "--prompts", "3").code == 0
    assert perlhf(*options).code == 0
    assert read_json(root / "summary.json")["gold"] == summary["gold"]


@pytest.mark.parametrize(("low", "rose"), [(0.52, True), (0.49, False), (None, False)])
def test_gold_rose_only_where_the_intervals_are_apart(low: float | None, rose: bool) -> None:
    side = {"score": Measured(0, -1, 1), "kl": Measured(1, 0, 2)}
    policy = Evaluation(
        n=200,
        before=side | {"gold": Measured(0.45, 0.4, 0.5)},
        after=side | {"gold": Measured(0.6, low, 0.7)},
    )
    reward = Evaluation(n=9, metrics={"auc": None}, baselines={"bag_of_words": {"auc": None}})
    results = {stage: {"seconds": 1, "peak_memory_bytes": 5, "trainable_parameters": 2} for stage in STAGES}
    assert demo.sum_up(results, reward, policy)["gold_rose"] is rose


def test_the_control_learns_from_the_same_labels_in_another_order(tmp_path: Path) -> None:
    config = DemoConfig(directory=tmp_path, shuffled_labels=True)
    _, reward, _ = demo.stages(config)
    found = load(reward.data.model_copy(update={"limit": None}), ("rating",), "all")
    true = load(DataConfig(paths=("builtin:coffee-bar/rating",)), ("rating",), "all")
    pairs = [(a, b) for a, b in zip(found, true, strict=True) if isinstance(a, Rating) and isinstance(b, Rating)]
    assert len(pairs) == len(true) == 1200
    assert all((a.prompt, a.completion, a.group) == (b.prompt, b.completion, b.group) for a, b in pairs)
    assert sum(a.label for a, _ in pairs) == sum(b.label for _, b in pairs)
    same = sum(a.label == b.label for a, b in pairs) / len(pairs)
    assert 0.45 < same < 0.55
