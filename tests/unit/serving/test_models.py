"""What is served by which name, and what can't be."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving_world import Runs, make_runs
from tiny_base import make_tiny_base
from tiny_models import randomise
from transformers import LlamaForCausalLM

from perlhf.config.serving import ServeConfig
from perlhf.errors import AdapterError, ConfigError, PerlhfError, RunError, StorageError
from perlhf.runs.earlier import ADAPTER_TENSORS
from perlhf.serving.models import BASE, Judge, Models, Speaker, latest, named
from perlhf.serving.serve import TOKEN, prepared


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"), tiny_base)


def opened(runs: Runs, **paths: Path) -> Models:
    return Models(paths, str(runs.base), device="cpu", dtype="float32")


def test_names(tmp_path: Path) -> None:
    for name in ("policy", "reward", "a=b"):
        (tmp_path / name).mkdir()
    one, two = str(tmp_path / "policy"), str(tmp_path / "reward")
    assert named([one, f"better={two}"]) == {"policy": Path(one), "better": Path(two)}
    assert named([f"x={tmp_path / 'a=b'}"]) == {"x": tmp_path / "a=b"}
    refused = {
        (one, one): "two runs are called 'policy'",
        (f"a b={one}",): "a run can't be called 'a b'",
        (f"base={one}",): "a run can't be called 'base'",
        (str(tmp_path / "nothing"),): "no such directory",
        (str(tmp_path / "a=b"),): "a run can't be called 'a=b'",
    }
    for words, what in refused.items():
        with pytest.raises(PerlhfError, match=what.replace("(", r"\(")):
            named(words)


def test_the_policy_of_a_loops_last_finished_round(tmp_path: Path) -> None:
    for number, finished in ((1, True), (2, True), (3, False)):
        policy = tmp_path / f"round-{number:04d}" / "policy"
        policy.mkdir(parents=True)
        if finished:
            (policy / "result.json").write_text("{}")
    assert latest(tmp_path) == tmp_path / "round-0002" / "policy"
    assert latest(tmp_path / "round-0001") == tmp_path / "round-0001"


def test_what_a_name_stands_for(runs: Runs) -> None:
    models = opened(runs, kind=runs.place / "kind", judge=runs.place / "judge")
    assert list(models.speakers) == [BASE, "kind"] and list(models.judges) == ["judge"]
    first = models.begin("kind", Speaker)
    assert isinstance(first, Speaker) and first.mixes and first.stage == "sft"
    for name, kind, what in (
        ("kin", Speaker, "no model 'kin'"),
        ("judge", Speaker, "'judge' is a reward model, which scores answers"),
        ("kind", Judge, "'kind' is a sft model, which answers"),
    ):
        with pytest.raises(ConfigError, match=what):
            models.begin(name, kind)
    # A version stays as long as somebody has it.
    models.load("kind", runs.place / "curt")
    second = models.begin("kind", Speaker)
    assert second.version == 2 and models.drop_unused() == []
    assert {*first.adapters, *second.adapters} <= models.model.adapters.keys()
    models.end(first)
    assert models.drop_unused() == [first] and first.adapters[0] not in models.model.adapters
    models.unload("kind")
    models.end(second)
    assert models.drop_unused() == [second] and models.speakers.keys() == {BASE}
    with pytest.raises(ConfigError, match="no run 'kind' is loaded"):
        models.unload("kind")


def test_nothing_is_left_of_a_version_that_nobody_has(runs: Runs) -> None:
    models = opened(runs, kind=runs.place / "kind")
    first = weakref.ref(models.begin("kind", Speaker))
    models.load("kind", runs.place / "curt")
    found = first()
    assert found is not None
    models.end(found)
    models.drop_unused()
    del found
    gc.collect()
    assert first() is None, "its tokenizer and weights would add up with every version"


def test_whole_weights_are_served_apart(runs: Runs, tmp_path: Path) -> None:
    if "whole" not in runs.model.adapters:
        runs.model.add_adapter("whole", "policy", tuning="full")
        randomise(runs.model, "whole", 6)
    directory = runs.save("whole")
    models = opened(runs, whole=directory, kind=runs.place / "kind")
    assert not models.speakers["whole"].mixes and models.speakers["kind"].mixes


def test_what_cannot_be_served(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such directory"):
        opened(runs, gone=tmp_path / "gone")
    with pytest.raises(RunError, match="not a run directory"):
        opened(runs, empty=tmp_path)
    other = make_tiny_base(tmp_path)
    network = LlamaForCausalLM.from_pretrained(other)
    network.lm_head.weight.data.mul_(2)  # pyright: ignore[reportAttributeAccessIssue]
    network.save_pretrained(other)
    with pytest.raises(AdapterError, match="base"):
        Models({"kind": runs.place / "kind"}, str(other), device="cpu", dtype="float32")
    runs.model.copy_adapter("kind", "broken", "policy")
    next(iter(runs.model.adapters["broken"].pairs.values())).b.data.fill_(torch.inf)
    models = opened(runs, kind=runs.place / "kind")
    with pytest.raises(AdapterError, match="aren't finite"):
        models.load("kind", runs.save("broken"))
    assert models.speakers["kind"].version == 1 and len(models.model.adapters) == 1, "what was served stays"
    cut = runs.save("kind", "cut")
    (cut / ADAPTER_TENSORS).write_bytes(b"cut off")
    with pytest.raises(AdapterError):
        models.load("cut", cut)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(TOKEN, raising=False)
    yield


@pytest.mark.usefixtures("free")
def test_commands_that_cannot_be_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short"
    short.write_text("abc")
    empty = tmp_path / "empty"
    empty.write_text("\n")
    refused: list[tuple[ServeConfig, type[PerlhfError], str]] = [
        (ServeConfig(runs=(str(tmp_path / "no"),)), RunError, "no such directory"),
        (ServeConfig(token_file=short), ConfigError, "the token has 3 letters"),
        (ServeConfig(token_file=empty), ConfigError, "holds no token"),
        (ServeConfig(token_file=tmp_path / "none"), StorageError, "can't be read"),
        (ServeConfig(adapters=tmp_path / "none"), ConfigError, "is no directory"),
        (ServeConfig(host="203.0.113.7", token_file=None), StorageError, "can't listen"),
    ]
    for config, kind, what in refused:
        with pytest.raises(kind, match=what):
            prepared(config)
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(ConfigError, match=r"\$PERLHF_TOKEN: the token has 5 letters"):
        prepared(ServeConfig())
