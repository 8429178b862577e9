"""Which runs a stage builds on."""

from pathlib import Path

import pytest

from perlhf.config.stages import PolicyConfig, RewardConfig, SftConfig
from perlhf.errors import RunError
from perlhf.runs.earlier import check_runs, earlier_runs


def test_functions_and_addresses_are_no_runs(tmp_path: Path):
    odd = tmp_path / "run:2"
    odd.mkdir()
    config = PolicyConfig(sft=Path("s"), reward=("a", "module:function", str(odd)), validation_reward=("http://x", "b"))
    rewards = {"reward": [Path("a"), odd], "validation_reward": [Path("b")]}
    assert earlier_runs(config) == {"sft": [Path("s")], "start": [], **rewards}
    assert earlier_runs(SftConfig(start=Path("first")))["start"] == [Path("first")]
    assert earlier_runs(RewardConfig(sft=Path("s")))["sft"] == [Path("s")]
    assert not any(earlier_runs(SftConfig()).values())


def test_a_run_that_is_not_finished_is_named_with_its_key(tmp_path: Path):
    (tmp_path / "done" / "adapter").mkdir(parents=True)
    check_runs("reward", [tmp_path / "done"])
    with pytest.raises(RunError, match="no finished run") as caught:
        check_runs("validation_reward", [tmp_path / "done", tmp_path / "other"])
    assert "other" in str(caught.value) and (caught.value.where, caught.value.hint) == (
        "validation_reward",
        "train it: perlhf reward",
    )
