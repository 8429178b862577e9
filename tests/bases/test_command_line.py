"""Six unlike families through the whole commands: windows with capped scores, chunks with experts, a hybrid, a
recurrence, sinks, and keys and values of unlike width.
"""

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import networks
import pytest
from toy import Moment, command, comparisons, finish, outcome, read_json, read_lines, write_feedback

from perlhf.commands.cli import main
from perlhf.commands.exports.export import DETAILS
from perlhf.training import checkpoint

FAMILIES = ("gemma2", "llama4_text", "qwen3_next", "mamba", "gpt_oss", "deepseek_v3")
LEARNING = "torch._tensor.backward"


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_feedback(tmp_path_factory.mktemp("feedback"))


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's random network, with the tokenizer of the tiny base."""

    @cache
    def save(family: str) -> Path:
        directory = tmp_path_factory.mktemp("bases") / family
        networks.network(family).save_pretrained(directory)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_base / file, directory)
        return directory

    return save


@pytest.fixture(scope="module")
def words(base: Callable[[str], Path], feedback: Path) -> Callable[..., list[str]]:
    """A stage's command line: three updates with dropout, a checkpoint after each; a policy learns from the reward run
    beside it and starts from the SFT run there.
    """

    def build(family: str, stage: str, run: Path, runs: Path) -> list[str]:
        data = {"sft": "demonstrations", "reward": "comparisons", "policy": "prompts"}[stage]
        options = ["--checkpoint-every", "1", "--validate-every", "3"]
        if stage == "policy":
            options += ["--reward", str(runs / "reward"), "--sft", str(runs / "sft"), "--validation-prompts", "2"]
        else:
            options += ["--epochs", "2", "--adapter.dropout", "0.1"]
        return command(stage, base(family), feedback / f"{data}.jsonl", run, *options)

    return build


@pytest.fixture(scope="module")
def runs(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory with a family's runs of each stage."""

    @cache
    def train(family: str) -> Path:
        directory = tmp_path_factory.mktemp("runs")
        for stage in ("sft", "reward", "policy"):
            assert main(words(family, stage, directory / stage, directory)) == 0
        return directory

    return train


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_evaluated_scored_and_exported(family, runs, feedback, tmp_path):
    directory = runs(family)
    for stage, part, metric in (
        ("sft", "metrics", "loss"),
        ("reward", "metrics", "pairwise_accuracy"),
        ("policy", "after", "score"),
    ):
        few = ("--bootstrap", "20", *(() if stage == "reward" else ("--prompts", "2")))
        assert main(["evaluate", str(directory / stage), *few]) == 0
        assert math.isfinite(read_json(directory / stage / "evaluation.json")[part][metric]["value"])

    scores = tmp_path / "scores.jsonl"
    given = str(feedback / "comparisons.jsonl")
    assert main(["score", str(directory / "reward"), given, "--output", str(scores)]) == 0
    found = [row[key] for row in read_lines(scores) for key in ("score_chosen", "score_rejected")]
    assert len(found) == 2 * len(comparisons())
    assert len(set(found)) > len(comparisons()), "different answers, different scores"

    assert main(["export", str(directory / "reward"), str(tmp_path / "peft")]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert main(["export", str(directory / "policy"), str(tmp_path / "merged"), "--format", "merged"]) == 0
    details = read_json(tmp_path / "merged" / DETAILS)
    assert details["share_lost"] < 1e-3 < details["largest_logit_change_by_adapter"]


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_runs_of_a_family_end_bit_equal(family, runs, words, feedback, tmp_path):
    directory = runs(family)
    # A reward model learns once in each update; the value alone in a policy's first, then policy and value.
    for stage, learnt in (("reward", 3), ("policy", 4)):
        run, log = tmp_path / stage, tmp_path / "log"
        line = words(family, stage, run, directory)
        assert finish(line, log, feedback, Moment(LEARNING, learnt)) == -signal.SIGKILL, log.read_text()
        newest = checkpoint.load(run)
        assert newest is not None and newest.step == 2, "killed in the last of three updates"
        assert not (run / "result.json").exists()
        if (family, stage) == (FAMILIES[0], "policy"):
            done = subprocess.run([sys.executable, "-m", "perlhf", *line], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            assert main(line) == 0
        expected, found = outcome(directory / stage), outcome(run)
        assert found["metrics"] == expected["metrics"]
        assert found.keys() == expected.keys()
        assert [key for key in expected if found[key] != expected[key]] == []
