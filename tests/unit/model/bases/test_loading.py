"""A base in memory: its dtype, its device, and what loading it takes. Names and files are `test_found.py`'s."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perlhf.errors import ModelError
from perlhf.model.bases import loading, weights
from perlhf.model.bases.found import Base


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def test_apples_gpu_is_taken_where_it_is_named_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="mps isn't available here"):
        loading.pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert loading.pick_device("mps") == torch.device("mps")
    assert loading.pick_device("auto").type != "mps"  # nobody has run it there
    with pytest.raises(ModelError) as caught:
        loading.pick_device("cuda:97")
    assert str(caught.value.allowed).endswith(", mps")
    with pytest.raises(ModelError):
        loading.pick_device("mps:1")
    dtype, why = loading.pick_dtype("auto", "mps")
    assert dtype == torch.float32 and "never tried on Apple's GPUs" in why


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16])
def test_weights_are_what_was_stored_in_the_dtype_asked_for(copy: Path, stored: torch.dtype, used: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    network: Any = loading.load_base(Base(copy), used, "cpu")
    assert {parameter.dtype for parameter in network.parameters()} == {used}
    for name, tensor in tensors.items():
        assert torch.equal(network.get_parameter(name), tensor.to(used)), name
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert network.config.name_or_path == str(copy)


def test_generation_settings_come_with_the_network(copy: Path) -> None:
    said = {"eos_token_id": [1, 0], "temperature": 0.3, "do_sample": True}
    (copy / "generation_config.json").write_text(json.dumps(said), "utf-8")
    network: Any = loading.load_base(Base(copy), torch.float32, "cpu")
    assert network.generation_config.eos_token_id == [1, 0] and network.generation_config.temperature == 0.3


def test_a_base_for_which_there_is_no_memory_is_refused_before_it_is_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "free_memory_bytes", lambda device: 0)
    monkeypatch.setattr(weights, "memory_bytes", lambda: 1000)
    with pytest.raises(ModelError, match=r"the base's weights take .* of memory in float32") as caught:
        loading.load_base(Base(copy), torch.float32, "cpu")
    assert caught.value.where == str(copy) and "--quantize" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("settings", "what", "hint"),
    [
        ({"model_type": "bert"}, "it attends to later tokens", "perlhf pull"),
        ({"model_type": "t5"}, "it is an encoder-decoder", "perlhf pull"),
        ({"model_type": "vit"}, "no causal language model", "perlhf pull"),
        ({"model_type": "newer"}, "doesn't know model_type newer", "pip install --upgrade transformers"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}}, "none is ever run", "transformers' own layout"),
    ],
)
def test_what_cannot_be_a_base_says_why_and_what_to_try(
    copy: Path, settings: dict[str, Any], what: str, hint: str
) -> None:
    (copy / "config.json").write_text(json.dumps(settings), "utf-8")
    for load in (
        lambda: loading.load_base(Base(copy), torch.float32, "cpu"),
        lambda: loading.without_weights(str(copy)),
    ):
        with pytest.raises(ModelError, match=what) as caught:
            load()
        assert hint in str(caught.value.hint)


def test_code_of_a_tokenizer_is_not_run(copy: Path, tmp_path: Path) -> None:
    file = copy / "tokenizer_config.json"
    said = json.loads(file.read_text("utf-8")) | {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": ["m.T", None]},
    }
    file.write_text(json.dumps(said), "utf-8")
    (copy / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (copy / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "m.C"}}))
    try:
        loading.load_tokenizer(Base(copy))  # where transformers has a class of its own for the files, that is used
    except ModelError as error:
        assert "none is ever run" in error.what or "can't be loaded" in error.what
    assert not (tmp_path / "ran").exists()
