"""Reading run directories."""

from pathlib import Path

import pytest
from pipeline_runs import about, write_run

from perlhf.config.stages import RewardConfig, SftConfig
from perlhf.errors import ConfigError, RunError
from perlhf.runs.evaluations import Measured
from perlhf.runs.read import NOT_EVALUATED, read_runs, summarise


def test_a_run_with_only_a_manifest_is_read(tmp_path: Path):
    (run,) = read_runs([write_run(tmp_path / "a", "reward")])
    assert (run.name, run.stage) == ("a", "reward")
    assert (run.config, run.metrics, run.rollouts, run.result, run.evaluation) == ({}, [], [], {}, NOT_EVALUATED)
    assert summarise(run).quality is None


def test_the_stage_is_known_without_a_manifest(tmp_path: Path):
    run = write_run(tmp_path / "a", "sft", config=RewardConfig())
    (run / "manifest.json").unlink()
    assert read_runs([run])[0].stage == "reward"


def test_what_is_no_run_directory_is_refused_with_the_nearest_one(tmp_path: Path):
    write_run(tmp_path / "reward_a", "reward")
    with pytest.raises(ConfigError, match=r"does not exist[\s\S]*try: .*reward_a"):
        read_runs([tmp_path / "reward_b"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is no run directory"):
        read_runs([tmp_path / "empty"])


def test_no_run_and_one_run_twice_are_refused(tmp_path: Path):
    run = write_run(tmp_path / "a", "sft")
    with pytest.raises(ConfigError, match="no run directory given"):
        read_runs([])
    with pytest.raises(ConfigError, match="is given twice"):
        read_runs([run, tmp_path / "x" / ".." / "a"])


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path):
    runs = [write_run(tmp_path / seed / "policy", "policy") for seed in ("s0", "s1")]
    assert [run.name for run in read_runs([*runs, write_run(tmp_path / "b", "sft")])] == ["s0/policy", "s1/policy", "b"]


def test_a_line_cut_off_at_the_end_is_dropped_and_a_damaged_one_named(tmp_path: Path):
    run = write_run(tmp_path / "a", "sft")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert read_runs([run])[0].metrics == [{"step": 1, "loss": 2}]
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not valid JSON"):
        read_runs([run])
    (run / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1: holds list"):
        read_runs([run])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", b"{", r"result\.json: missing or damaged"),
        ("evaluation.json", b"[]", "a list instead of an object"),
        ("config.yaml", b"a: [", "not valid YAML"),
        ("config.yaml", b"a: !!bool maybe", "not valid YAML: a tag doesn't fit"),
        ("config.yaml", b"[" * 100_000, "nested too deeply|not valid YAML"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n{}\n", "metrics.jsonl:1: not valid JSON: nested too deeply"),
        ("metrics.jsonl", b"\xff\n", "invalid UTF-8 at byte 0"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    run = write_run(tmp_path / "a", "sft")
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_runs([run])


def test_series_leave_out_what_is_missing_or_not_finite(tmp_path: Path):
    metrics = [{"step": 1, "loss": 2}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": 0.5}]
    (run,) = read_runs([write_run(tmp_path / "a", "sft", metrics=metrics)])
    assert run.series("loss") == [(1, 2), (4, 0.5)]
    assert run.series("kl") == []


def test_a_reward_run_is_judged_on_unseen_groups_if_it_was_evaluated(tmp_path: Path):
    result = {"validation": {"auc": 0.9, "pairwise_accuracy": 0.8}}
    evaluation = {"split": "test", "metrics": {"auc": None, "pairwise_accuracy": about(0.7, 0.05)}}
    only_trained = write_run(tmp_path / "a", "reward", result=result)
    evaluated = write_run(tmp_path / "b", "reward", result=result, evaluation=evaluation)
    first, second = (summarise(run) for run in read_runs([only_trained, evaluated]))
    assert (first.quality_name, first.quality) == ("AUC, validation", Measured(0.9))
    assert (second.quality_name, second.quality) == ("pairwise accuracy, test", Measured(0.7, 0.65, 0.75))


def test_a_policy_is_judged_by_gold_then_by_score(tmp_path: Path):
    after = {"score": 1.5, "gold": about(0.6, 0.1)}
    runs = [
        write_run(tmp_path / "a", "policy", evaluation={"split": "test", "after": after}),
        write_run(tmp_path / "b", "policy", evaluation={"split": "test", "after": after | {"gold": None}}),
        write_run(tmp_path / "c", "policy", result={"score_after": 0.25}),
    ]
    names = [(line.quality_name, line.quality.value) for run in read_runs(runs) if (line := summarise(run)).quality]
    assert names == [("gold score, test", 0.6), ("score, test", 1.5), ("score, validation", 0.25)]


def test_costs_come_from_the_result_and_speed_is_the_median_update(tmp_path: Path):
    metrics = [{"step": step, "tokens_per_second": speed} for step, speed in enumerate((10, 1000, 30), start=1)]
    result = {"tokens": 600, "seconds": 4, "peak_memory_bytes": 2**30, "trainable_parameters": 12}
    (run,) = read_runs([write_run(tmp_path / "a", "sft", config=SftConfig(), metrics=metrics, result=result)])
    line = summarise(run)
    assert (line.seconds, line.tokens_per_second, line.peak_memory_bytes, line.trainable_parameters) == (
        4,
        30,
        2**30,
        12,
    )
    assert (line.tuning, line.rank, line.targets) == ("lora", 16, "attention")
    (run,) = read_runs([write_run(tmp_path / "b", "sft", config=SftConfig(tuning="full"), result=result)])
    assert (summarise(run).tokens_per_second, summarise(run).rank, summarise(run).targets) == (150, None, None)


def test_an_unfinished_run_takes_its_costs_from_the_manifest(tmp_path: Path):
    (run,) = read_runs([write_run(tmp_path / "a", "sft", manifest={"wall_seconds": 12.5, "peak_memory_bytes": 5})])
    assert (summarise(run).seconds, summarise(run).peak_memory_bytes) == (12.5, 5)
    (run,) = read_runs(
        [write_run(tmp_path / "average", "reward", manifest={"wall_seconds": 0, "peak_memory_bytes": 0})]
    )
    assert (summarise(run).seconds, summarise(run).peak_memory_bytes) == (None, None), "an average was never trained"
