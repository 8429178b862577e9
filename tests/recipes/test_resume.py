"""Runs that are killed, interrupted, refused or diverge: what is kept, and that the same command ends bit-equal."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import Moment, command, demonstrations, finish, metrics, outcome, read_json, start, write_rows

from perlhf.training import checkpoint

STAGES = ("sft", "reward", "policy")
UPDATES = {"sft": 9, "reward": 9, "policy": 6}
LINES = UPDATES | {"reward": 10}
"""Of metrics.jsonl: a probe's start is validated before the first update."""
LEARNING = "torch._tensor.backward"
SAVED = "posix.rename"
"""A checkpoint's directory gets its name by this, and an old one loses it."""
PUT_IN_PLACE = "posix.replace"
"""The same for single files: config.yaml, manifest.json, a rollout, result.json."""


@pytest.fixture(scope="module")
def commands(tiny_base: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Command lines of runs with all that is random: dropout, order, sampling; checkpoints at some updates only."""

    def build(stage: str, run: Path, *options: str) -> list[str]:
        paths = {
            "sft": ["demonstrations.jsonl"],
            "reward": ["ratings.jsonl", "comparisons.jsonl"],
            "policy": ["prompts.jsonl"],
        }[stage]
        own = {
            "sft": "--max-updates 9 --epochs 9 --validate-every 4 --adapter.dropout 0.1 --optim.schedule cosine",
            "reward": "--max-updates 9 --epochs 9 --validate-every 4 --adapter.dropout 0.1 --head-start probe",
            "policy": "--updates 6 --validate-every 4 --checkpoint-every 2 --clip 0.2 --steps-per-rollout 2",
        }[stage].split()
        words = command(stage, tiny_base, feedback / paths[0], run, *own, "--checkpoint-every", "2", *options)
        words[words.index("--data.paths") + 1 : words.index("--data.paths") + 2] = [str(feedback / p) for p in paths]
        return words

    return build


@pytest.fixture(scope="module")
def uninterrupted(commands, feedback, tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """What a run gives that nothing happens to; each stage is run once."""
    found: dict[str, dict[str, Any]] = {}

    def get(stage: str) -> dict[str, Any]:
        if stage not in found:
            run = tmp_path_factory.mktemp("uninterrupted") / stage
            assert finish(commands(stage, run), run.with_suffix(".log"), feedback) == 0
            assert len(metrics(run)) == LINES[stage]
            found[stage] = outcome(run)
        return found[stage]

    return get


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal files and numbers; names what differs without printing bytes."""
    assert found.keys() == expected.keys()
    assert found["metrics"] == expected["metrics"]
    assert [key for key in expected if found[key] != expected[key]] == []


# ---- killed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_any_point_ends_bit_equal(stage, commands, uninterrupted, feedback, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    words, expected = commands(stage, run), uninterrupted(stage)
    moments = (
        Moment(PUT_IN_PLACE, 2),  # config.yaml is there, manifest.json isn't
        Moment(LEARNING, 1),  # in the first update
        Moment(LEARNING, 12 if stage == "policy" else 4),  # in a later one, with a checkpoint before it
        Moment(SAVED, 2),  # a complete checkpoint that has no name yet
        Moment("shutil.rmtree", 2),  # while an old checkpoint is deleted, after what the last kill left
    )
    for moment in moments:
        assert finish(words, log, feedback, moment) == -signal.SIGKILL, log.read_text()
        assert not (run / "result.json").exists()
    newest = checkpoint.load(run)
    assert newest is not None, "later kills met a run that was under way"
    assert 0 < newest.step <= UPDATES[stage]
    assert finish(words, log, feedback) == 0, log.read_text()
    assert len(read_json(run / "manifest.json")["sessions"]) == len(moments), "the first one died before the manifest"
    assert_same(outcome(run), expected)
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_between_its_last_update_and_its_result(stage, commands, uninterrupted, feedback, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    words, expected = commands(stage, run), uninterrupted(stage)
    # Put in place: config.yaml, manifest.json, that again with the way of the base and once more with what the session
    # recomputes, a rollout each update, metrics.jsonl with the last validation, manifest.json and result.json. The way
    # itself is kept already.
    rollouts = UPDATES[stage] if stage == "policy" else 0
    assert finish(words, log, feedback, Moment(PUT_IN_PLACE, 4 + rollouts + 2)) == -signal.SIGKILL, log.read_text()
    assert len(metrics(run)) == LINES[stage]
    assert (run / "adapter").is_dir()
    assert not (run / "result.json").exists()
    assert finish(words, log, feedback) == 0, log.read_text()
    assert_same(outcome(run), expected)


def test_what_started_from_an_sft_adapter_resumes_bit_equal(commands, feedback, tmp_path):
    """Its optimiser's moments belong to the same layers in the next process, whatever order the file is read in.

    safetensors draws that order once in a process; one forked from ours has the same, so this one is started anew.
    """
    assert finish(commands("sft", tmp_path / "sft"), tmp_path / "log", feedback) == 0
    options = ("--sft", str(tmp_path / "sft"), "--adapter.targets", "all")
    for stage in ("reward", "policy"):
        whole, killed = (commands(stage, tmp_path / f"{stage}-{name}", *options) for name in ("whole", "killed"))
        assert finish(whole, tmp_path / "log", feedback) == 0, (tmp_path / "log").read_text()
        assert finish(killed, tmp_path / "log", feedback, Moment(LEARNING, 6)) == -signal.SIGKILL
        done = subprocess.run([sys.executable, "-m", "perlhf", *killed], cwd=feedback, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert_same(outcome(tmp_path / f"{stage}-killed"), outcome(tmp_path / f"{stage}-whole"))


def test_patience_goes_on_counting_after_a_kill(commands, feedback, tmp_path):
    """A judge who finds all equal leaves -beta KL, best at the start: three that are no better, and it is over."""
    options = "--validation-reward toy_reward:constant --validate-every 1 --patience 3 --updates 12 --kl-coef 0.5"
    whole, killed = (commands("policy", tmp_path / name, *options.split()) for name in ("whole", "killed"))
    assert finish(whole, tmp_path / "log", feedback) == 0
    assert "3 times in a row" in read_json(tmp_path / "whole" / "result.json")["stopped"]
    assert finish(killed, tmp_path / "log", feedback, Moment(LEARNING, 8)) == -signal.SIGKILL
    newest = checkpoint.load(tmp_path / "killed")
    assert newest is not None and newest.step in (1, 2), "killed where it had begun to count"
    assert finish(killed, tmp_path / "log", feedback) == 0
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_a_run_killed_from_outside_at_no_chosen_moment(commands, uninterrupted, feedback, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    for wanted in (1, 3, 5):
        process = start(commands("policy", run), log, feedback)
        while process.is_alive() and not (run / "metrics.jsonl").exists():
            time.sleep(0.001)
        while process.is_alive() and (run / "metrics.jsonl").read_bytes().count(b"\n") < wanted:
            time.sleep(0.001)
        process.kill()
        process.join()
    assert finish(commands("policy", run), log, feedback) == 0, log.read_text()
    assert_same(outcome(run), uninterrupted("policy"))


# ---- interrupted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_saves_and_the_same_command_continues(stage, commands, uninterrupted, feedback, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    words = commands(stage, run)
    # Policy and value learn two steps on each rollout, the first rollout the value alone: 2 calls, then 4 each.
    calls = 8 if stage == "policy" else 3
    assert finish(words, log, feedback, Moment(LEARNING, calls, signal.SIGINT)) == 130, log.read_text()
    assert f"stopped at update 3 of {UPDATES[stage]}" in log.read_text()
    assert "Traceback" not in log.read_text()
    saved = checkpoint.load(run)
    assert saved is not None
    assert saved.step == 3, "between two regular checkpoints"
    assert finish(words, log, feedback) == 0, log.read_text()
    assert_same(outcome(run), uninterrupted(stage))


# ---- refused ------------------------------------------------------------------------------------------------------


def test_a_run_in_use_is_refused(commands, perlhf, feedback, tmp_path):
    run = tmp_path / "run"
    first = start(commands("sft", run), tmp_path / "log", feedback, Moment(LEARNING, 1, signal.SIGSTOP))
    while first.is_alive() and not (run / "manifest.json").exists():
        time.sleep(0.001)
    before = (run / "manifest.json").read_bytes()
    done = perlhf(*commands("sft", run))
    first.kill()
    first.join()
    assert done.code == 2
    assert f"in use by process {first.pid}" in done.err
    assert (run / "manifest.json").read_bytes() == before
    assert not (run / "metrics.jsonl").exists()


def test_another_configuration_or_other_data_are_refused(stage, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", demonstrations())
    run, done = stage("sft", data=str(data))
    assert done.code == 0
    kept = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for options, message in {
        ("--seed", "5"): "seed is 5, but 0 in the run that is here",
        ("--adapter.rank", "2"): "adapter.rank is 2, but 4",
    }.items():
        _, done = stage("sft", *options, data=str(data))
        assert done.code == 2
        assert message in done.err
        assert "use another run directory" in done.err
    _, done = stage("reward", run="sft")
    assert done.code == 2
    assert "holds a run of stage 'sft', not 'reward'" in done.err
    write_rows(data, demonstrations(30))
    _, done = stage("sft", data=str(data))
    assert done.code == 2
    assert "another data, base, adapter or code" in done.err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == kept


# ---- diverged -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_kept(stage, tmp_path):
    rows = demonstrations()
    rows[25]["weight"] = 1e38  # of the third update
    options = ("--checkpoint-every", "1", "--epochs", "1", "--max-updates", "9")
    run, done = stage("sft", *options, data=str(write_rows(tmp_path / "d.jsonl", rows)))
    assert done.code == 3
    assert "Traceback" not in done.err
    found = re.search(r"loss is (inf|nan) at update (\d)\n  allowed: a finite number\n  try: lower optim", done.err)
    assert found, done.err
    stopped = int(found[2])
    assert stopped > 1, "a record of a later update"
    saved = checkpoint.load(run)
    assert saved is not None
    assert saved.step == stopped - 1 == len(metrics(run))
    assert all(tensor.isfinite().all() for tensor in saved.tensors["sft"].values())
    assert not (run / "adapter").exists()
    assert not (run / "result.json").exists()


@pytest.mark.parametrize("validate_every", ["1", "50"])
@pytest.mark.parametrize("name", STAGES)
def test_a_huge_learning_rate_ends_in_one_message(stage, name, validate_every):
    options = ("--optim.learning-rate", "1e30", "--checkpoint-every", "1", "--validate-every", validate_every)
    updates = ("--updates", "6") if name == "policy" else ("--max-updates", "6", "--epochs", "9")
    run, done = stage(name, *options, *updates)
    assert done.code == 3, done.err
    assert "Traceback" not in done.err
    assert "lower optim.learning_rate" in done.err
    assert not (run / "adapter").exists()
    assert not (run / "result.json").exists()


def test_a_reward_that_is_not_a_number_is_the_users_mistake(stage):
    run, done = stage("policy", "--reward", "toy_reward:not_a_number")
    assert done.code == 2
    assert "toy_reward:not_a_number: score 0 is nan" in done.err
    assert "allowed: a finite number" in done.err
    assert not (run / "result.json").exists()


# ---- damaged ------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["sft.safetensors", "sft.optimizer.safetensors", "state.json"])
def test_a_checkpoint_with_a_flipped_bit_is_named(stage, sft_run, tmp_path, file):
    run, done = stage("sft", "--checkpoint-every", "1")
    assert done.code == 0
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    damaged = run / "checkpoints" / "00000003" / file
    flip(damaged)
    _, done = stage("sft", "--checkpoint-every", "1")
    assert done.code == 2
    assert str(damaged) in done.err
    assert "damaged" in done.err
    assert "step 2 is still good" in done.err
    assert not (run / "adapter").exists()
    shutil.rmtree(damaged.parent)
    _, done = stage("sft", "--checkpoint-every", "1")
    assert done.code == 0, "the way that the message names"
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        sft_run / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_reward_adapter_with_a_flipped_bit_is_named(stage, reward_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(reward_run, copy)
    flip(copy / "adapter" / "adapter_model.safetensors")
    run, done = stage("policy", "--reward", str(copy))
    assert done.code == 2
    assert f"{copy}: its own adapter was changed" in done.err
    assert not (run / "result.json").exists()


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_leaves_nothing_half_written(name, commands, uninterrupted, feedback, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    words = commands(name, run)
    # Metrics and rollouts are below 20 kB; an adapter of 8,192 float32 weights isn't.
    assert finish(words, log, feedback, file_bytes=20_000) == 2, log.read_text()
    message = log.read_text()
    assert "Traceback" not in message
    first = 2 if name == "sft" else 0  # of the checkpoints: a probe's start is one, and a policy's
    assert re.search(rf"checkpoints/0000000{first}: can't write: .*\n  try: free some disk space", message), message
    assert list(run.glob("checkpoints/*")) == []
    assert not list(run.rglob(".tmp-*"))
    metrics_file = run / "metrics.jsonl"
    logged = (
        [json.loads(line)["step"] for line in metrics_file.read_text().splitlines()] if metrics_file.exists() else []
    )
    assert logged == {"sft": [1, 2], "reward": [0], "policy": []}[name]
    assert finish(words, log, feedback) == 0, log.read_text()
    assert_same(outcome(run), uninterrupted(name))
