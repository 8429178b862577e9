"""The programs of examples/ run, on the tiny base, and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from data_rows import UIBERT
from toy import read_json, read_lines

from perlhf.config.recipe import load_recipe
from perlhf.config.stages import PolicyConfig
from perlhf.data.read import read
from perlhf.errors import DataError
from perlhf.rollout.functions import Asked, load_function

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def as_when_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script's own directory is importable; files go to a temporary one; a local service needs no proxy."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    torch.set_num_threads(1)  # two threads on a network this small wait for each other


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "reward_from_jsonl",
        "custom_reward",
        "http_reward_server",
        "ui_reward",
    }


def test_reward_from_jsonl(tiny_base, tmp_path, capsys):
    good, bad = example("reward_from_jsonl").main(
        ["--base", str(tiny_base), "--directory", str(tmp_path / "out"), "--updates", "30"]
    )
    assert good > bad, "of an order that no rating names"
    shown = capsys.readouterr().out
    assert "validation AUC" in shown
    assert [row["score"] for row in read_lines(tmp_path / "out" / "scores.jsonl")] == [good, bad]
    assert len(read_lines(tmp_path / "out" / "ratings.jsonl")) == 48


def test_custom_reward(tiny_base, tmp_path, capsys):
    module = example("custom_reward")
    assert module.asks_back(["x", "x"], ["Really?", "word " * 22]) == [1.0, pytest.approx(-0.1)]
    result = module.main(["--base", str(tiny_base), "--run", str(tmp_path / "run"), "--updates", "2"])
    assert result["updates"] == 2
    rows = read_lines(tmp_path / "run" / "rollouts" / "00000002.jsonl")
    assert rows
    for row in rows:
        words = len(row["completion"].split())
        assert row["score"] == pytest.approx(("?" in row["completion"]) - 0.05 * max(0, words - 20))
    assert "before" in capsys.readouterr().out


def test_http_reward_server(tiny_base, tmp_path, capsys):
    result = example("http_reward_server").main(
        ["--base", str(tiny_base), "--port", "0", "--run", str(tmp_path / "run"), "--updates", "2"]
    )
    assert result is not None
    assert result["updates"] == 2
    rows = read_lines(tmp_path / "run" / "rollouts" / "00000001.jsonl")
    assert rows
    for row in rows:
        assert row["score"] == float(1 <= len(row["completion"].split()) <= 12)
    assert read_json(tmp_path / "run" / "manifest.json")["stage"] == "policy"
    assert "rewards at http://127.0.0.1:" in capsys.readouterr().out


def test_ui_reward(monkeypatch, tmp_path):
    folder = tmp_path / "data" / "uibert"
    folder.mkdir(parents=True)
    (folder / "dev.tfrecord").write_bytes(UIBERT)
    monkeypatch.setenv("PERLHF_DATA", str(tmp_path / "data"))
    (shown,) = read("uibert", "uibert")
    messages = [{"role": "system", "content": "You find elements."}, {"role": "user", "content": str(shown.prompt)}]
    score = load_function("ui_reward:score")
    prompts, completions = [shown.prompt, messages, shown.prompt, shown.prompt], ["1", " 1\n", "0", "1."]
    assert score(Asked(prompts, completions)) == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(DataError, match="no UIBert screen has the prompt 'Hello'"):
        score(Asked(["Hello"], ["1"]))


def test_ui_reward_is_found_from_the_root_of_the_repository(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    (name,) = load_recipe("recipes/uibert/policy.yaml", PolicyConfig).reward
    assert load_function(name)(Asked([], [])) == []
