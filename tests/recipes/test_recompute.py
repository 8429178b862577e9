"""Layers recomputed in the backward pass: chosen by what is free, forced, and without effect on a run's results."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_runs import SHORT, TinyRuns, tiny_runs

from perlhf.config.recipe import load_recipe
from perlhf.config.stages import PolicyConfig, RewardConfig, SftConfig
from perlhf.errors import ModelError
from perlhf.model.foretold import memory
from perlhf.runs.manifest import read_manifest
from perlhf.training.policy import train_policy
from perlhf.training.reward import train_reward
from perlhf.training.sft import train_sft


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRuns:
    return tiny_runs(tmp_path_factory.getbasetemp() / "tiny_runs", tiny_base)


def told(run: Path) -> dict[str, Any]:
    """What the run's last session records of its memory."""
    return read_manifest(run)["sessions"][-1]["memory"]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [
        {key: value for key, value in line.items() if "second" not in key and key != "memory_bytes"} for line in lines
    ]


@pytest.mark.parametrize("stage", ["sft", "reward", "policy"])
def test_a_run_that_recomputes_is_the_same_run(
    runs: TinyRuns, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto` does it where a step doesn't fit into what is free, and not where it does."""
    free = {"enough": 10**12, "little": 10**6}
    known: dict[str, Any] = {
        "sft": (train_sft, SftConfig, {"max_updates": 2}),
        "reward": (train_reward, RewardConfig, {"max_updates": 2, "sft": runs.sft}),
        "policy": (train_policy, PolicyConfig, SHORT | {"updates": 2, "sft": runs.sft, "reward": (str(runs.reward),)}),
    }
    train, kind, own = known[stage]
    earlier = load_recipe(runs.sft / "config.yaml", SftConfig)
    shared = {
        key: getattr(earlier, key) for key in ("base", "dtype", "threads", "data", "encoding", "adapter", "optim")
    }
    for name, size in free.items():
        monkeypatch.setattr(memory, "free_memory_bytes", lambda device, size=size: size)
        train(kind(run=tmp_path / name, **shared, **own))
    said = capsys.readouterr().err
    assert said.count("computed once more in the backward pass") == 1
    assert [told(tmp_path / name)["recompute"] for name in free] == [False, True]
    assert [told(tmp_path / name)["free_bytes"] for name in free] == list(free.values())
    assert metrics(tmp_path / "enough") == metrics(tmp_path / "little")
    files = [sorted((tmp_path / name / "adapter").glob("*.safetensors")) for name in free]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_a_run_goes_on_the_other_way(runs: TinyRuns, tmp_path: Path) -> None:
    """The choice may change when a run continues, and is each session's own."""
    earlier = load_recipe(runs.sft / "config.yaml", SftConfig)
    config = earlier.model_copy(update={"run": tmp_path / "run", "max_updates": 1, "recompute": "always"})
    train_sft(config)
    assert told(config.run)["recompute"]
    train_sft(config.model_copy(update={"recompute": "never", "max_updates": 2}))
    assert not told(config.run)["recompute"]
    assert metrics(config.run)[0] == metrics(runs.sft)[0]


def test_what_cannot_be_recomputed(runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ({"tuning": "full"}, {"shard": "full"}):
        with pytest.raises(ValidationError, match="recompute: always goes with"):
            SftConfig(recompute="always", **other)  # pyright: ignore[reportArgumentType]
    earlier = load_recipe(runs.sft / "config.yaml", SftConfig)
    monkeypatch.setattr(memory, "layers_of", lambda network: None)
    with pytest.raises(ModelError, match="no list of layers"):
        train_sft(earlier.model_copy(update={"run": tmp_path / "run", "recompute": "always"}))
