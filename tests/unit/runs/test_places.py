"""Relative paths of a run's configuration are found from any working directory."""

from pathlib import Path

import pytest

from perlhf.config.stages import DataConfig, EncodingConfig, PolicyConfig
from perlhf.runs import places

CONFIG = PolicyConfig(
    run=Path("runs/p"),
    base="models/base",
    sft=Path("runs/sft"),
    reward=("runs/reward", "module:function", "http://x/y", "gone"),
    data=DataConfig(paths=("data/*.jsonl", "builtin:coffee-bar", "hub/name")),
    encoding=EncodingConfig(template="chat.jinja"),
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the configuration names, in which the run was started."""
    for name in ("models/base", "runs/sft", "runs/reward", "runs/p", "data", "tokenizer"):
        (tmp_path / "project" / name).mkdir(parents=True)
    for name in ("data/a.jsonl", "chat.jinja"):
        (tmp_path / "project" / name).touch()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def manifest() -> dict[str, str]:
    return {places.STARTED_IN: places.started_in(Path("runs/p"))}


def test_where_the_run_was_started_nothing_changes(project: Path):
    assert manifest() == {"started_in": "../.."}
    assert places.resolved(CONFIG, manifest(), project / "runs" / "p") == CONFIG


@pytest.mark.parametrize("moved", [False, True])
def test_from_elsewhere_each_path_that_is_there_is_found(project: Path, monkeypatch: pytest.MonkeyPatch, moved: bool):
    written = manifest()
    if moved:
        project = project.rename(project.with_name("copy"))
    (project.parent / "elsewhere").mkdir()
    monkeypatch.chdir(project.parent / "elsewhere")
    found = places.resolved(CONFIG, written, project / "runs" / "p")
    beside = f"../{project.name}"
    assert (found.base, found.sft) == (f"{beside}/models/base", Path(beside, "runs/sft"))
    assert found.reward == (f"{beside}/runs/reward", "module:function", "http://x/y", "gone")
    assert found.data.paths == (f"{beside}/data/*.jsonl", "builtin:coffee-bar", "hub/name")
    assert found.encoding.template == f"{beside}/chat.jinja"


def test_words_are_no_paths(project: Path, monkeypatch: pytest.MonkeyPatch):
    written, config = manifest(), CONFIG.model_copy(update={"encoding": EncodingConfig()})
    monkeypatch.chdir(project.parent)
    assert places.resolved(config, written, project / "runs" / "p").encoding.template == "tokenizer"


def test_runs_that_dont_say_are_looked_up_from_here(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project.parent)
    assert places.resolved(CONFIG, {}, project / "runs" / "p") == CONFIG
