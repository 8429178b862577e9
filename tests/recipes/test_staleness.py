"""`staleness: 1` as whole commands: what is written down, killed and interrupted anywhere, grown, and refused."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import Moment, command, finish, metrics, outcome, read_json, read_lines

from perlhf.training import checkpoint

LEARNING = "torch._tensor.backward"
SAVED = "posix.rename"
UPDATES = 6
BREAKS = """
import pathlib

def breaks(prompts, completions, trainer_state):
    if trainer_state.global_step == 3 and pathlib.Path("broken").exists():
        raise ValueError("out of order")
    return [len(text) / 9 for text in completions]
"""


@pytest.fixture(scope="module")
def commands(tiny_base: Path, feedback: Path) -> Callable[..., list[str]]:
    """Command lines of a run that samples ahead, with checkpoints at some updates only."""

    def build(run: Path, *options: str) -> list[str]:
        own = f"--staleness 1 --updates {UPDATES} --validate-every 4 --checkpoint-every 2".split()
        return command("policy", tiny_base, feedback / "prompts.jsonl", run, *own, *options)

    return build


@pytest.fixture(scope="module")
def whole(commands, feedback, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert finish(commands(run), run.with_suffix(".log"), feedback) == 0, run.with_suffix(".log").read_text()
    return run


def gist(run: Path) -> dict[str, Any]:
    """The outcome without checkpoints: older ones of a run that was interrupted may still be there."""
    return {name: value for name, value in outcome(run).items() if not name.startswith("checkpoints")}


def assert_same(found: Path, expected: Path, what: Callable[[Path], dict[str, Any]] = outcome) -> None:
    one, other = what(found), what(expected)
    assert one.keys() == other.keys()
    assert one["metrics"] == other["metrics"]
    assert [key for key in other if one[key] != other[key]] == []


def test_what_sampled_is_written_down(whole):
    lines = metrics(whole)
    assert lines[0]["kl"] == lines[1]["kl"] == 0 != lines[2]["kl"], "the first update learns the value alone"
    assert lines[0]["ratio_mean"] == pytest.approx(1, abs=1e-4), "the first is sampled by the policy that learns"
    assert abs(lines[3]["ratio_max"] - 1) > 1e-3 > lines[0]["sampler_gap_max"] and lines[3]["sampler_gap_mean"] > 1e-3
    for update in range(1, UPDATES + 1):
        rows = read_lines(whole / "rollouts" / f"{update:08d}.jsonl")
        assert {row["sampler_step"] for row in rows} == {max(0, update - 2)}
        assert all(len(row["sampler_logprobs"]) == row["tokens"] and max(row["sampler_logprobs"]) < 0 for row in rows)


def test_by_default_nothing_is_added(stage):
    run, done = stage("policy")
    assert done.code == 0, done.err
    assert not {"ratio_mean", "ratio_max", "seconds_ahead"} & metrics(run)[-1].keys()
    assert not {"sampler_step", "sampler_logprobs"} & read_lines(run / "rollouts" / "00000001.jsonl")[0].keys()
    newest = checkpoint.load(run)
    assert newest is not None and "sampler" not in newest.tensors


def test_killed_at_any_point_it_ends_bit_equal(commands, whole, feedback, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    for moment in (Moment(LEARNING, 1), Moment(LEARNING, 7), Moment(SAVED, 1), Moment(LEARNING, 3)):
        assert finish(commands(run), log, feedback, moment) == -signal.SIGKILL, log.read_text()
    newest = checkpoint.load(run)
    assert newest is not None and 0 < newest.step < UPDATES
    assert finish(commands(run), log, feedback) == 0, log.read_text()
    assert_same(run, whole)


def test_ctrl_c_saves_what_samples(commands, whole, feedback, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    # The first update learns the value alone: one call, then two each.
    assert finish(commands(run), log, feedback, Moment(LEARNING, 4, signal.SIGINT)) == 130, log.read_text()
    saved = checkpoint.load(run)
    assert saved is not None and saved.step == 3 and "sampler" in saved.tensors
    assert finish(commands(run), log, feedback) == 0, log.read_text()
    assert_same(run, whole)


def test_a_reward_that_fails_leaves_what_sampled_its_update(commands, tmp_path, feedback):
    """The checkpoint is of the update before, though the next one's completions were begun already."""
    (tmp_path / "breaking.py").write_text(BREAKS)
    options = ("--reward", "breaking:breaks", "--checkpoint-every", "50")
    for name, broken in (("whole", False), ("run", True), ("run", False)):
        (tmp_path / "broken").unlink(missing_ok=True)
        if broken:
            (tmp_path / "broken").touch()
        code = finish(commands(tmp_path / name, *options), tmp_path / "log", tmp_path)
        assert (code == 0) is not broken, (tmp_path / "log").read_text()
        if broken:
            saved = checkpoint.load(tmp_path / "run")
            assert saved is not None and saved.step == 3
    assert_same(tmp_path / "run", tmp_path / "whole", gist)


def test_a_finished_run_goes_on_as_one_that_was_to_be_longer(commands, whole, feedback, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    for updates in ("3", "4", str(UPDATES)):
        assert finish(commands(run, "--updates", updates), log, feedback) == 0, log.read_text()
    assert read_json(run / "result.json")["updates"] == UPDATES
    assert_same(run, whole, gist)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--staleness 1 --tuning full", "tuning: full has none"),
        ("--staleness 1 --shard full", "gathers layers in one order"),
        ("--staleness 2", "staleness"),
        ("--max-ratio 2", "max_ratio is of staleness: 1"),
        ("--max-sampler-gap 0.1", "max_sampler_gap is of staleness: 1"),
        ("--staleness 1 --max-ratio 0.5", "max_ratio"),
    ],
)
def test_what_is_refused(perlhf, tiny_base, feedback, tmp_path, options, said):
    words = [*command("policy", tiny_base, feedback / "prompts.jsonl", tmp_path / "run"), *options.split()]
    done = perlhf(*words)
    assert done.code == 2 and said in done.err and not (tmp_path / "run").exists()


def test_too_wide_a_gap_ends_the_run_with_a_sentence(stage):
    run, done = stage("policy", "--staleness", "1", "--max-sampler-gap", "1e-9")
    assert done.code == 3 and "max_sampler_gap" in done.err and "update 1" in done.err
    saved = checkpoint.load(run)
    assert saved is not None and saved.step == 0
