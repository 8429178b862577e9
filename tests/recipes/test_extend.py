"""Runs that go on: more updates than there were to be, and a second stage after the first."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from toy import command, demonstrations, lasting, metrics, outcome, read_json, write_rows

from perlhf.data.records import Rating
from perlhf.data.splits import load
from perlhf.evaluation.reward import score_records
from perlhf.model.finished import read_run
from perlhf.training import checkpoint

TOTAL = {"sft": "--max-updates", "reward": "--max-updates", "policy": "--updates"}
COMMON = {
    "sft": ("--epochs", "9", "--adapter.dropout", "0.1"),
    "reward": ("--epochs", "9", "--adapter.dropout", "0.1"),
    "policy": (),
}


def gist(run: Path) -> dict[str, Any]:
    """The outcome without checkpoints: those of the shorter run's end may still be there."""
    return {key: value for key, value in outcome(run).items() if not key.startswith("checkpoints")}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert found["metrics"] == expected["metrics"]
    assert [key for key in expected if found[key] != expected[key]] == []


@pytest.mark.parametrize(
    ("name", "validate_every"), [("sft", "2"), ("sft", "3"), ("reward", "2"), ("policy", "2"), ("policy", "50")]
)
def test_a_finished_run_goes_on_to_what_an_uninterrupted_one_gives(stage, name: str, validate_every: str):
    """Its last update, the third, was validated although `validate_every` asked for it in one case alone."""
    options = (*COMMON[name], "--validate-every", validate_every, "--checkpoint-every", "2")
    whole, done = stage(name, TOTAL[name], "7", *options, run="whole")
    assert done.code == 0, done.err
    run, done = stage(name, TOTAL[name], "3", *options, run="grown")
    assert done.code == 0, done.err
    shorter = read_json(run / "result.json")
    assert any(key.startswith("validation_") for key in metrics(run)[-1])
    for updates in ("5", "7"):  # twice
        _, done = stage(name, TOTAL[name], updates, *options, run="grown")
        assert done.code == 0, done.err
        assert read_json(run / "result.json")["updates"] == int(updates)
    same(gist(run), gist(whole))
    assert shorter["updates"] == 3 and len(read_json(run / "manifest.json")["sessions"]) == 3


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_epochs_may_grow(stage, name: str):
    options = ("--max-updates", "null", "--validate-every", "5")
    whole, done = stage(name, "--epochs", "2", *options, run="whole")
    assert done.code == 0, done.err
    for epochs in ("1", "2"):
        run, done = stage(name, "--epochs", epochs, *options, run="grown")
        assert done.code == 0, done.err
    same(gist(run), gist(whole))


def test_the_best_of_the_shorter_run_is_not_lost(stage):
    """The end of the shorter run is its best, and isn't validated in the longer one: whose best is an earlier step."""
    options = ("--validate-every", "2", "--checkpoint-every", "1", "--optim.learning-rate", "3e-2", "--epochs", "9")
    for updates in (3, 5):
        whole, done = stage("sft", "--max-updates", str(updates + 2), *options, run=f"whole-{updates}")
        assert done.code == 0, done.err
        for total in (updates, updates + 2):
            run, done = stage("sft", "--max-updates", str(total), *options, run=f"grown-{updates}")
            assert done.code == 0, done.err
        same(gist(run), gist(whole))


def test_the_evaluation_of_the_shorter_run_is_put_aside(stage, perlhf):
    run, _ = stage("sft")
    assert perlhf("evaluate", str(run), "--prompts", "2").code == 0
    written = (run / "evaluation.json").read_bytes()
    _, done = stage("sft", "--max-updates", "4")
    assert done.code == 0, done.err
    assert not (run / "evaluation.json").exists()
    assert (run / "evaluation-of-3-updates.json").read_bytes() == written


def test_a_schedule_that_depends_on_the_total_is_refused(stage):
    run, _ = stage("sft", "--optim.schedule", "cosine")
    kept = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    _, done = stage("sft", "--optim.schedule", "cosine", "--max-updates", "5")
    assert done.code == 2
    assert "max_updates is 5, but 3 in the run that is here" in done.err
    assert "(schedule: cosine) falls to 0 at the last update" in done.err
    assert f"start: {run}" in done.err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == kept
    _, done = stage("sft", "--max-updates", "2", "--start", str(run), run="second")  # the way that is named
    assert done.code == 0, done.err


def test_fewer_updates_are_refused(stage):
    run, _ = stage("sft")
    _, done = stage("sft", "--max-updates", "2")
    assert done.code == 2
    assert "max_updates is 2, but 3 in the run that is here" in done.err
    assert "updates, max_updates, epochs may grow" in done.err
    assert read_json(run / "result.json")["updates"] == 3


def test_a_policy_that_stopped_early_stays_as_it_is(stage):
    """An uninterrupted run would have stopped there, too."""
    options = ("--patience", "1", "--validate-every", "1", "--optim.learning-rate", "1e-9")
    run, done = stage("policy", "--updates", "4", *options)
    assert done.code == 0 and "1 times in a row, at update 1" in read_json(run / "result.json")["stopped"]
    before = gist(run)
    _, done = stage("policy", "--updates", "6", *options)
    assert done.code == 0, done.err
    same(gist(run), before)


def test_a_run_that_an_earlier_version_finished_is_refused(stage):
    run, _ = stage("sft", "--validate-every", "2", "--epochs", "9")
    newest = checkpoint.load(run)
    assert newest is not None and newest.step == 3
    state = newest.state | {"best": newest.state["best"] | {"step": 3}}  # the end's validation was in the checkpoint
    checkpoint.save(run, 3, newest.tensors, state)
    _, done = stage("sft", "--validate-every", "2", "--epochs", "9", "--max-updates", "5")
    assert done.code == 2
    assert "was finished at update 3 by an earlier version" in done.err and "start: " in done.err


# ---- a second stage ---------------------------------------------------------------------------------------------


def first_validation(run: Path, key: str) -> float:
    return metrics(run)[0][key]


@pytest.mark.parametrize("shape", [(), ("--adapter.rank", "2")])
def test_a_second_sft_stage_starts_where_the_first_ended(stage, sft_run, shape):
    """With a learning rate of next to nothing, the first update leaves the validation loss of the end of the first."""
    options = ("--start", str(sft_run), "--max-updates", "1", "--optim.learning-rate", "1e-12", "--validate-every", "1")
    run, done = stage("sft", *options, *shape, run="second")
    assert done.code == 0, done.err
    assert first_validation(run, "validation_loss") == pytest.approx(
        read_json(sft_run / "result.json")["validation_loss"], abs=1e-6
    )
    assert str(sft_run) in read_json(run / "manifest.json")["facts"]["adapters"]


@pytest.mark.parametrize("shape", [(), ("--adapter.rank", "2")])
def test_a_second_reward_stage_starts_where_the_first_ended(stage, reward_run, shape):
    """Head and bias included: the same scores."""
    options = ("--start", str(reward_run), "--max-updates", "1", "--optim.learning-rate", "1e-12")
    run, done = stage("reward", *options, *shape, run="second")
    assert done.code == 0, done.err
    scores = []
    for path in (reward_run, run):
        read = read_run(path)
        records = [record for record in load(read.config.data, ("rating",), "all") if isinstance(record, Rating)]
        scored, _ = score_records(*read.open("cpu"), records[:9], "reward", 1024, "tree")
        scores.append([line[0] for line in scored if line is not None])
    assert scores[1] == pytest.approx(scores[0], abs=1e-5) and max(scores[0]) - min(scores[0]) > 0.1


def test_a_second_policy_stage_keeps_its_anchor(stage, sft_run):
    """It starts from the first policy, and its KL is that of the first: to what both are anchored to."""
    # Paid for letters alone, it is soon above its start by more than a standard error of few prompts.
    paid = ("--sft", str(sft_run), "--missing-end-penalty", "0", "--kl-coef", "0", "--baseline", "leave_one_out")
    quick = (
        "--updates",
        "8",
        "--prompts-per-update",
        "8",
        "--completions-per-prompt",
        "4",
        "--advantage-norm",
        "whiten",
    )
    first, done = stage("policy", *paid, *quick, "--optim.learning-rate", "3e-2", run="first")
    assert done.code == 0, done.err
    options = ("--start", str(first), "--updates", "1", "--optim.learning-rate", "1e-12")
    run, done = stage("policy", *paid, *options, run="second")
    assert done.code == 0, done.err
    one, other = read_json(first / "result.json"), read_json(run / "result.json")
    assert one["best_step"] > 0, "the first one learned something"
    assert other["before"] == pytest.approx(one["before"], abs=1e-5)
    assert other["best_step"] == 0 and other["after"] == pytest.approx(one["after"], abs=1e-5)


def test_a_start_of_another_kind_is_refused(stage, sft_run, reward_run):
    for name, start, message in (
        ("sft", reward_run, "holds a reward adapter"),
        ("reward", sft_run, "holds a sft adapter"),
        ("policy", reward_run, "holds a reward adapter"),
    ):
        run, done = stage(name, "--start", str(start), run=f"refused-{name}")
        assert done.code == 2 and message in done.err and "start" in done.err
        assert not run.exists()
    _, done = stage("reward", "--start", str(reward_run), "--sft", str(sft_run))
    assert done.code == 2 and "give one of them" in done.err
    _, done = stage("reward", "--start", str(reward_run), "--head-start", "probe")
    assert done.code == 2 and "head_start: probe" in done.err
    _, done = stage("sft", "--start", "nowhere", "--dry-run")
    assert done.code == 2 and "start: nowhere is no finished run" in done.err


# ---- from another directory -------------------------------------------------------------------------------------


def test_a_run_is_found_from_any_directory(perlhf, tiny_base, feedback, tmp_path, monkeypatch):
    """Base, data and earlier runs were named by relative paths; the project is used from elsewhere, then moved."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copytree(tiny_base, project / "base")
    write_rows(project / "d.jsonl", demonstrations())
    for name in ("ratings", "prompts"):
        shutil.copy(feedback / f"{name}.jsonl", project)
    monkeypatch.chdir(project)
    words = {
        "sft": command("sft", Path("base"), "d.jsonl", Path("runs/sft")),
        "reward": command("reward", Path("base"), "ratings.jsonl", Path("runs/reward"), "--sft", "runs/sft"),
        "policy": command(
            "policy", Path("base"), "prompts.jsonl", Path("runs/p"), "--sft", "runs/sft", "--reward", "runs/reward"
        ),
    }
    for line in words.values():
        done = perlhf(*line)
        assert done.code == 0, done.err
    options = ("--prompts", "2", "--device", "cpu")

    def evaluated(run: str, output: str) -> dict[str, Any]:
        done = perlhf("evaluate", run, *options, "--output", str(tmp_path / output))
        assert done.code == 0, done.err
        found = read_json(tmp_path / output)
        return lasting({key: value for key, value in found.items() if key not in ("reward", "win_rate")})

    expected = evaluated("runs/p", "here.json")
    monkeypatch.chdir(tmp_path)
    assert evaluated("project/runs/p", "above.json") == expected
    done = perlhf("evaluate", "project/runs/p", *options, "--data.test", "0.1", "--output", str(tmp_path / "x.json"))
    assert done.code == 0, done.err
    assert perlhf("chat", "project/runs/p", "--message", "hi", "--max-completion-tokens", "2").code == 0
    project.rename(tmp_path / "moved")
    assert evaluated("moved/runs/p", "moved.json") == expected
    shutil.move(tmp_path / "moved" / "base", tmp_path / "other-base")
    done = perlhf("evaluate", "moved/runs/p", *options)
    assert done.code == 2
    assert "moved/runs/p" in done.err and "--base BASE" in done.err and "base" in done.err.splitlines()[0]
    done = perlhf("chat", "moved/runs/p", "--message", "hi", "--base", "other-base", "--max-completion-tokens", "2")
    assert done.code == 0, done.err


def test_manifests_say_where_their_run_was_started(sft_run):
    manifest = json.loads((sft_run / "manifest.json").read_text())
    assert not Path(manifest["started_in"]).is_absolute()
    assert (sft_run / manifest["started_in"]).resolve() == Path.cwd()
