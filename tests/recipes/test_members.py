"""`perlhf reward --members K`: one run of K reward adapters, and what it stands for wherever reward runs are named."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from toy import Moment, command, finish, lasting, metrics, outcome, read_json, read_lines

from perlhf.commands.cli import main
from perlhf.config.stages import RewardConfig
from perlhf.data import order
from perlhf.method.packing import Tokens
from perlhf.rollout import ensemble
from perlhf.training import reward as stage_module
from perlhf.training.plan import plan

ENSEMBLE = ("--members", "3", "--adapter.layers", "last:1")


@pytest.fixture(scope="module")
def run(tiny_base: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three members."""
    place = tmp_path_factory.mktemp("members") / "run"
    words = command("reward", tiny_base, feedback / "ratings.jsonl", place, *ENSEMBLE, "--max-updates", "6")
    assert main([*words, "--epochs", "3"]) == 0
    return place


def adapters(run: Path) -> list[Path]:
    return [run / "adapter" / str(number) for number in range(3)]


def scores(perlhf: Any, run: Path, rows: Path, output: Path) -> list[dict[str, Any]]:
    assert (
        perlhf("score", str(run), str(rows), "--dtype", "float32", "--device", "cpu", "--output", str(output)).code == 0
    )
    return read_lines(output)


def test_one_pass_trains_as_separate_ones_do(stage, monkeypatch):
    together: list[int] = []
    real = ensemble.members.states
    monkeypatch.setattr(ensemble.members, "states", lambda *given: (together.append(1), real(*given))[1])
    one, done = stage("reward", *ENSEMBLE, "--max-updates", "2", run="one")
    assert done.code == 0 and together, done.err
    monkeypatch.setattr(stage_module, "passes", lambda model, names, packing: [(name,) for name in names])
    together.clear()
    other, done = stage("reward", *ENSEMBLE, "--max-updates", "2", run="other")
    assert done.code == 0 and not together
    for here, there in zip(metrics(one), metrics(other), strict=True):
        numbers = {key: value for key, value in lasting(there).items() if key != "tokens"}
        assert {key: here[key] for key in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)
    for here, there in zip(adapters(one), adapters(other), strict=True):
        expected = load_file(there / "adapter_model.safetensors")
        for name, tensor in load_file(here / "adapter_model.safetensors").items():
            assert (tensor - expected[name]).norm() <= 2e-3 * max(1.0, float(expected[name].norm())), name


def test_members_start_apart_and_weigh_groups_otherwise(run):
    item = stage_module.Item((Tokens((1, 2)),), True, 2.0, 0.0, "g")
    alone, several = RewardConfig(), RewardConfig(members=3)
    assert stage_module.member_weight(alone, 0, item) == 2.0
    drawn = [stage_module.member_weight(several, number, item) for number in range(3)]
    assert drawn == [2.0 * order.exponential(0, "member", number, "g") for number in range(3)] and len({*drawn}) == 3
    many = np.array([order.exponential(0, at) for at in range(4000)])
    assert many.mean() == pytest.approx(1, abs=0.05) and (many < np.log(2)).mean() == pytest.approx(0.5, abs=0.03)
    down = [load_file(at / "adapter_model.safetensors") for at in adapters(run)]
    name = next(name for name in down[0] if name.endswith("lora_A.weight"))
    assert not (down[0][name] - down[1][name]).abs().max() < 1e-3


def test_what_a_run_says_of_its_members(run):
    result = read_json(run / "result.json")
    assert result["members"] == 3 and read_json(run / "manifest.json")["adapter_sha256"]
    line = metrics(run)[-1]
    assert {"validation_auc", "validation_member_auc", "validation_loss", "validation_member_loss"} <= line.keys()
    assert line["validation_loss"] < line["validation_member_loss"], "log loss is convex"


def test_scores_are_the_members_mean(run, perlhf, feedback, tmp_path):
    whole = scores(perlhf, run, feedback / "comparisons.jsonl", tmp_path / "whole.jsonl")
    each = [scores(perlhf, at, feedback / "comparisons.jsonl", tmp_path / f"{at.name}.jsonl") for at in adapters(run)]
    for row, *alone in zip(whole, *each, strict=True):
        for name in ("score_chosen", "score_rejected"):
            assert row[f"{name}_members"] == pytest.approx([one[name] for one in alone], abs=1e-4)
            assert row[name] == pytest.approx(float(np.mean(row[f"{name}_members"])))
            assert len({*row[f"{name}_members"]}) == 3
    assert perlhf("evaluate", str(run), "--device", "cpu", "--bootstrap", "10").code == 0
    evaluation = read_json(run / "evaluation.json")
    rated = evaluation["records"]["ratings"]
    assert evaluation["metrics"]["auc"]["value"] is not None and len(rated["score"]) == evaluation["n"]
    explained = ["score", str(run), str(feedback / "ratings.jsonl"), "--explain", "--data.limit", "2"]
    assert perlhf(*explained, "--device", "cpu", "--output", str(tmp_path / "why.jsonl")).code == 0
    for row in read_lines(tmp_path / "why.jsonl"):
        assert row["explanation"]["tokens"][-1][1] == pytest.approx(row["score"], abs=1e-4)


def test_a_policy_is_paid_as_if_each_member_were_named(run, stage):
    options = ("--combine", "mean_minus_std", "--max-disagreement", "1000", "--baseline", "group_mean")
    whole, done = stage("policy", *options, "--reward", str(run), run="whole")
    assert done.code == 0, done.err
    apart, done = stage("policy", *options, "--reward", *map(str, adapters(run)), run="apart")
    assert done.code == 0, done.err
    assert [lasting(line) for line in metrics(whole)] == [lasting(line) for line in metrics(apart)]
    assert all(line["disagreement"] > 0 for line in metrics(whole))
    done = main(["report", str(run), str(whole), "--output", str(whole.parent / "report.html")])
    assert done == 0 and ">Members<" in (whole.parent / "report.html").read_text()


def test_a_weight_is_that_of_the_members_mean(run, other_reward_run, tiny_base):
    from perlhf.config.stages import EncodingConfig
    from perlhf.model.bases.found import Base
    from perlhf.model.bases.loading import load_tokenizer
    from perlhf.model.encoding.encode import Encoder
    from perlhf.model.model import Model
    from perlhf.rollout.scorers import load_scorers

    model = Model.load(Base(tiny_base), "float32", "cpu")
    encoder = Encoder(load_tokenizer(Base(tiny_base)), EncodingConfig(max_tokens=96))
    sources = [str(run), str(other_reward_run)]
    scorers = load_scorers(model, sources, "mean", encoder, weights=(6.0, -1.0))
    assert scorers.weights == (2.0, 2.0, 2.0, -1.0)
    assert scorers.names == (*map(str, adapters(run)), str(other_reward_run))
    assert scorers.combined(np.array([[1.0], [2.0], [3.0], [5.0]])).tolist() == [6 * 2 - 5]


def test_where_one_adapter_is_wanted_one_is_named(run, perlhf, stage, tmp_path):
    export = ["export", str(run), str(tmp_path / "out")]
    for words in (export, [*export, "--format", "merged"], ["reward", "--sft", str(run)]):
        done = perlhf(*words) if words[0] == "export" else stage("reward", *words[1:])[1]
        assert done.code == 2 and "holds a run of 3 members, and one adapter is wanted" in done.err, done.err
        assert str(run / "adapter" / "0") in done.err.replace("\n", "") and "perlhf average" in done.err
    first = run / "adapter" / "0"
    assert perlhf("export", str(first), str(tmp_path / "one")).code == 0
    done = perlhf("average", str(run), "--output", str(tmp_path / "mean"))
    assert done.code == 0, done.err
    assert (tmp_path / "mean" / "adapter" / "adapter_model.safetensors").is_file()
    assert perlhf("export", str(tmp_path / "mean"), str(tmp_path / "exported")).code == 0


def test_members_are_trained_on_from_as_many(run, stage, reward_run):
    warm = ("--start", str(run), "--max-updates", "1", "--optim.learning-rate", "1e-9", "--validate-every", "9")
    again, done = stage("reward", *ENSEMBLE, *warm)
    assert done.code == 0, done.err
    for here, there in zip(adapters(again), adapters(run), strict=True):
        expected = load_file(there / "adapter_model.safetensors")
        for name, tensor in load_file(here / "adapter_model.safetensors").items():
            assert (tensor - expected[name]).abs().max() < 1e-6
    for options, said in (
        ((*ENSEMBLE, "--members", "2", "--start", str(run)), "has 3 members, and members is 2"),
        (("--start", str(run)), "has 3 members, and members is 1"),
        ((*ENSEMBLE, "--start", str(reward_run)), "has 1 member, and members is 3"),
        ((*ENSEMBLE, "--adapter.dropout", "0.1"), "adapter.dropout must be 0 with members: 3"),
    ):
        _, done = stage("reward", *options, run="refused")
        assert done.code == 2 and said in done.err.replace("\n", " "), done.err


def test_a_member_that_was_changed_is_told(run, perlhf, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter" / "2")
    done = perlhf("score", str(copy), "builtin:coffee-bar", "--device", "cpu")
    assert done.code == 2 and "its own adapter was changed" in done.err


def test_full_tuning_and_a_probe_have_members(stage, monkeypatch):
    full, done = stage("reward", "--members", "2", "--tuning", "full", "--max-updates", "1", run="full")
    assert done.code == 0 and (full / "adapter" / "1" / "full_weights.safetensors").is_file(), done.err
    probed, done = stage("reward", *ENSEMBLE, "--head-start", "probe", "--max-updates", "1", run="probed")
    assert done.code == 0, done.err
    heads = [load_file(at / "adapter_model.safetensors") for at in adapters(probed)]
    name = next(name for name in heads[0] if "score" in name)
    assert not (heads[0][name] - heads[1][name]).abs().max() < 1e-4, "each head is fitted to its own weights"


def test_a_killed_run_of_members_ends_bit_equal(tiny_base, feedback, tmp_path):
    words = [*ENSEMBLE, "--checkpoint-every", "1", "--validate-every", "1"]
    runs = [command("reward", tiny_base, feedback / "ratings.jsonl", tmp_path / n, *words) for n in ("whole", "killed")]
    log = tmp_path / "log"
    assert finish(runs[0], log, feedback) == 0, log.read_text()
    for moment in (Moment("torch._tensor.backward", 3), Moment("posix.rename", 4)):
        assert finish(runs[1], log, feedback, moment) == -signal.SIGKILL, log.read_text()
    assert finish(runs[1], log, feedback) == 0, log.read_text()
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert [key for key in expected if found.get(key) != expected[key]] == [] and found.keys() == expected.keys()


def test_a_plan_counts_members(tiny_base, feedback):
    given: dict[str, Any] = {"base": str(tiny_base), "data": {"paths": [str(feedback / "ratings.jsonl")]}}
    one, three = (plan(RewardConfig(**given, members=count)).trainable["reward"] for count in (1, 3))
    assert three == 3 * one
