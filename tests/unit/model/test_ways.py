"""The way of a configuration is kept, for whom it is true, and only as it was written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from perlhf.kernels.attention.sight import Sight
from perlhf.method.logprobs import Logits
from perlhf.model import model, ways
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import without_weights
from perlhf.model.model import Model
from perlhf.model.supported import Way
from perlhf.model.ways import recall, remember

CPU = torch.device("cpu")
WAY = Way("tree", "", {0: Sight(window=7), 3: Sight(chunk=5)}, Logits(0.5, 30.0), "cache_params", ("a.b",), False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "cache_dir", lambda: tmp_path)


def config(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**{"hidden_size": 32, **changes})


def kept(directory: Path) -> Path:
    (file,) = (directory / "ways").iterdir()
    return file


def test_what_is_remembered_is_recalled_for_what_decides_the_way() -> None:
    remember(config(), torch.float32, CPU, WAY)
    assert recall(config(), torch.float32, CPU) == WAY
    # Who saved it, and in which dtype its files are, decides nothing.
    assert recall(config(dtype="bfloat16", architectures=["Mine"]), torch.float32, CPU) == WAY
    assert recall(config(hidden_size=64), torch.float32, CPU) is None
    assert recall(config(), torch.bfloat16, CPU) is None
    assert recall(config(), torch.float32, torch.device("cuda:1")) is None
    quantised = config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert recall(quantised, torch.float32, CPU) is None


@pytest.mark.parametrize("what", ["version", "_code"])
def test_other_versions_and_other_code_of_ours_know_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(config(), torch.float32, CPU, WAY)
    monkeypatch.setattr(ways, what, lambda *_: "another")
    assert recall(config(), torch.float32, CPU) is None


def test_a_damaged_or_foreign_entry_is_as_if_absent(tmp_path: Path) -> None:
    remember(config(), torch.float32, CPU, WAY)
    whole = kept(tmp_path).read_bytes()
    (at,) = {whole.index(b'"window":7') + 9}
    for content in (b"", b"\xff\xfe", whole[:-3], whole[:at] + b"8" + whole[at + 1 :], b"{}", whole[:20] + whole[64:]):
        kept(tmp_path).write_bytes(content)
        assert recall(config(), torch.float32, CPU) is None, content
    kept(tmp_path).write_bytes(whole)
    assert recall(config(), torch.float32, CPU) == WAY
    # That of another configuration under this one's name.
    remember(config(hidden_size=64), torch.float32, CPU, Way())
    mine, other = sorted((tmp_path / "ways").iterdir(), key=lambda file: b"window" not in file.read_bytes())
    shutil.copy(other, mine)
    assert recall(config(), torch.float32, CPU) is None
    shutil.rmtree(tmp_path / "ways")
    (tmp_path / "ways").write_text("a file where the directory should be")
    assert recall(config(), torch.float32, CPU) is None
    remember(config(), torch.float32, CPU, WAY)


def test_a_way_that_was_measured_is_not_kept() -> None:
    remember(config(), torch.float32, CPU, Way("none", "its states are off by 9.1%", measured=True))
    assert recall(config(), torch.float32, CPU) is None


def test_loading_weights_keeps_the_way_for_whoever_asks_without_them(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Way | None] = []
    choose = model.choose_way
    monkeypatch.setattr(model, "choose_way", lambda own, known: (asked.append(known), choose(own, known)))
    first = Model.load(Base(tiny_base), "float32", "cpu")
    for network in (without_weights(str(tiny_base)), LlamaForCausalLM.from_pretrained(tiny_base)):
        assert recall(network.config, torch.float32, CPU) == first.way == Way()
    assert recall(AutoConfig.from_pretrained(tiny_base), torch.float32, CPU) == Way()
    assert Model.load(Base(tiny_base), "float32", "cpu").way == first.way
    assert asked == [None, Way()]
