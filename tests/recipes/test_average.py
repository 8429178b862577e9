"""`perlhf average`: one reward run whose weights are the mean of several, and which runs have no mean."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import apart
from torch import Tensor
from toy import BAD, GOOD, read_json

from perlhf.commands.cli import main
from perlhf.model import saved
from perlhf.model.adapter import Adapter
from perlhf.model.finished import FinishedRun, read_run

TEXTS = [(f"a tea please {number}", text) for number, text in enumerate((*GOOD, *BAD))]


def adapter_of(run: Path) -> Adapter:
    return read_run(run).open("cpu")[0].adapters["reward"]


def scores(run: FinishedRun) -> Tensor:
    """Scores of a few answers under a reward run, float32."""
    model, encoder = run.open("cpu")
    return model.scores(apart([encoder.example(prompt, text).tokens.ids for prompt, text in TEXTS]), "reward")


@pytest.fixture
def averaged(perlhf, tmp_path: Path):
    """`averaged(run, ...)`: the directory of their average."""

    def make(*runs: Path) -> Path:
        done = perlhf("average", *map(str, runs), "--output", str(tmp_path / "mean"))
        assert done.code == 0, done.err
        return tmp_path / "mean"

    return make


def test_a_run_averaged_with_itself_scores_as_before(averaged, reward_run):
    before = scores(read_run(reward_run))
    found = scores(read_run(averaged(reward_run, reward_run)))
    assert before.std() > 0.1
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-6)


def test_each_update_is_the_mean_of_the_updates(averaged, reward_run, other_reward_run):
    first, second = adapter_of(reward_run), adapter_of(other_reward_run)
    assert (first.rank, second.rank) == (4, 2)
    mean = adapter_of(averaged(reward_run, other_reward_run))
    assert (mean.rank, mean.alpha) == (6, 6.0)
    assert mean.pairs.keys() == first.pairs.keys() == second.pairs.keys()
    for path, pair in mean.pairs.items():
        assert pair.scale == 1
        one, two = first.pairs[path], second.pairs[path]
        by_hand = (8 / 4 * one.b @ one.a + 8 / 2 * two.b @ two.a) / 2
        assert by_hand.abs().max() > 1e-3
        torch.testing.assert_close(pair.b @ pair.a, by_hand, rtol=1e-5, atol=1e-6)
    assert mean.score_head is not None and first.score_head is not None and second.score_head is not None
    assert mean.bias is not None and first.bias is not None and second.bias is not None
    assert not torch.equal(first.score_head, second.score_head)
    torch.testing.assert_close(mean.score_head, (first.score_head + second.score_head) / 2)
    torch.testing.assert_close(mean.bias, (first.bias + second.bias) / 2)


def test_saved_and_loaded_again_it_scores_bit_equal(averaged, reward_run, other_reward_run, tmp_path):
    run = averaged(reward_run, other_reward_run)
    model, encoder = read_run(run).open("cpu")
    saved.save_adapter(model, "reward", tmp_path / "again", encoder)
    saved.load_adapter(model, tmp_path / "again", "again", encoder)
    sequences = [encoder.example(prompt, text).tokens.ids for prompt, text in TEXTS]
    assert torch.equal(model.scores(apart(sequences), "reward"), model.scores(apart(sequences), "again"))
    written, again = (saved.read_adapter(directory).adapter for directory in (run / "adapter", tmp_path / "again"))
    assert written.pairs and written.tensors().keys() == again.tensors().keys()
    for name, tensor in written.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])


def test_it_is_used_like_a_reward_run(averaged, perlhf, stage, reward_run, other_reward_run, tmp_path):
    run = averaged(reward_run, other_reward_run)
    config = read_run(run).config
    assert [Path(path).name for path in config.data.paths] == ["ratings.jsonl", "comparisons.jsonl"]
    assert (config.run, config.adapter.rank) == (run, 6)
    assert list(read_json(run / "result.json")["averaged"]) == [str(reward_run), str(other_reward_run)]
    done = perlhf("evaluate", str(run), "--device", "cpu")
    assert done.code == 0, done.err
    found = read_json(run / "evaluation.json")
    assert found["metrics"]["auc"]["value"] > 0.9
    assert found["comparisons"] > 0
    assert found["groups_seen_in_training"] == 0
    paid, done = stage("policy", "--updates", "1", "--reward", str(run))
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (paid / "rollouts" / "00000001.jsonl").read_text().splitlines()]
    assert len({row["score"] for row in rows}) > 1
    for arguments in (["table", str(run)], ["report", str(run), "--output", str(tmp_path / "page.html")]):
        assert perlhf(*arguments).code == 0


def test_what_lies_beneath_is_averaged_too(averaged, stage, sft_run):
    """Of another rank than the SFT adapter, a reward adapter lies over it; its files hold both."""
    runs = [stage("reward", "--sft", str(sft_run), "--adapter.rank", "2", "--seed", seed, run=seed)[0] for seed in "12"]
    assert [saved.read_adapter(run / "adapter").adapter.rank for run in runs] == [6, 6]
    first, second = (adapter_of(run) for run in runs)
    mean = adapter_of(averaged(*runs))
    for path, pair in mean.pairs.items():
        one, two = first.pairs[path], second.pairs[path]
        torch.testing.assert_close(pair.b @ pair.a, (one.b @ one.a + two.b @ two.a) / 2, rtol=1e-5, atol=1e-6)


def test_full_tuning_is_averaged_tensor_by_tensor(averaged, stage):
    runs = [stage("reward", "--tuning", "full", "--seed", seed, run=seed)[0] for seed in "12"]
    first, second = (adapter_of(run).tensors() for run in runs)
    mean = adapter_of(averaged(*runs)).tensors()
    assert mean.keys() == first.keys()
    assert not torch.equal(first["score.weight"], second["score.weight"])
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


@pytest.fixture(scope="module")
def elsewhere(tiny_base: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with one weight changed."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("elsewhere")
    network = LlamaForCausalLM.from_pretrained(tiny_base)
    network.model.norm.weight.data[0] += 1
    network.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter.targets", "attention"], "layers.model.layers.0.mlp.down_proj is 'not set', but 'adapted' in"),
        (["--encoding.system", "Be brief."], "encoding.system is 'Be brief.', but None in"),
        (["--data.split-seed", "3"], "data.split_seed is 3, but 0 in"),
        (["--tuning", "full", "--optim.learning-rate", "1e-3"], "tuning is 'full', but 'lora' in"),
        (["--base"], "trained on base"),
    ],
    ids=["layers", "encoding", "split", "tuning", "base"],
)
def test_runs_without_a_common_mean_are_refused(options, message, stage, perlhf, reward_run, elsewhere, tmp_path):
    base = elsewhere if options == ["--base"] else None
    other, _ = stage("reward", *(options if base is None else []), "--max-updates", "1", base=base, run="other")
    done = perlhf("average", str(reward_run), str(other), "--output", str(tmp_path / "mean"))
    assert done.code == 2
    for part in (f"error: {other}: ", message, str(reward_run), "allowed: reward runs of one base", "try: train them"):
        assert part in done.err
    assert done.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_other_mistakes_are_one_message(perlhf, reward_run, sft_run, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    for runs, output, parts in (
        ([reward_run], "mean", ["runs", "has one adapter, which has no average", "allowed: several runs"]),
        ([reward_run, sft_run], "mean", [str(sft_run), "holds a run of stage sft", "allowed: a run of stage reward"]),
        ([reward_run, tmp_path / "no"], "mean", ["there is no such directory"]),
        ([reward_run, reward_run], "full", ["full holds something", "allowed: a new or empty directory"]),
    ):
        done = perlhf("average", *map(str, runs), "--output", str(tmp_path / output))
        assert done.code == 2
        assert done.out == ""
        for part in parts:
            assert part in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.tex"]


def test_what_fails_half_way_leaves_nothing(reward_run, tmp_path, monkeypatch, capsys):
    """The disk fills up after the adapter was written."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("perlhf.commands.average.start_or_continue", full)
    assert main(["average", str(reward_run), str(reward_run), "--output", str(tmp_path / "mean")]) == 2
    assert "can't write: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
