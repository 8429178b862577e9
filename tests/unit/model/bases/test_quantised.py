"""Checkpoints that come quantised, and what can't be: tiny ones made here, with numbers worked by hand."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import apart
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from perlhf.errors import ModelError
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_base, quantisation_note, without_weights
from perlhf.model.bases.quantised import (
    bitsandbytes_settings,
    check_quantised,
    from_products,
    own_layers,
    quantised_layers,
    weight_bytes,
)
from perlhf.model.model import Model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [4, 6]]


def scores(directory: Path, dtype: str = "float32", **options: Any) -> Tensor:
    model = Model.load(Base(directory), dtype, "cpu", **options)
    with torch.no_grad():
        return model.last_states(apart(PROMPTS), None)


def quantised_by_bitsandbytes(tiny_base: Path, directory: Path, **settings: Any) -> Path:
    network = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings)
    )
    network.save_pretrained(directory)
    for name in TOKENIZER:
        shutil.copy(tiny_base / name, directory)
    return directory


def damaged(directory: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A checkpoint whose weights of these names are replaced; None takes one away."""
    found = load_file(directory / "model.safetensors") | tensors
    save_file({name: t.contiguous() for name, t in found.items()}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text("utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), "utf-8")
    return directory


class TestBitsandbytes:
    @pytest.mark.parametrize("nested", [False, True])
    def test_four_bits_are_taken_as_they_are(self, tiny_base: Path, tmp_path: Path, nested: bool) -> None:
        directory = quantised_by_bitsandbytes(
            tiny_base,
            tmp_path / "base",
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=nested,
        )
        found, expected = scores(directory, "bfloat16"), scores(tiny_base, "bfloat16", quantize="nf4")
        distance = (found - expected).norm() / expected.norm()
        assert distance < 0.1 if nested else torch.equal(found, expected)
        # Its parts that aren't quantised are in the dtype that is asked for, though it has them in bfloat16.
        network = load_base(Base(directory), torch.float32, "cpu")
        assert {p.dtype for p in network.parameters() if p.is_floating_point()} == {torch.float32}
        assert {layer.dense().dtype for _, layer in quantised_layers(network)} == {torch.float32}

    def test_eight_bits_are_taken_without_outliers_and_that_is_said(self, tiny_base: Path, tmp_path: Path) -> None:
        directory = quantised_by_bitsandbytes(tiny_base, tmp_path / "base", load_in_8bit=True, llm_int8_threshold=6.0)
        assert torch.equal(scores(directory, "bfloat16"), scores(tiny_base, "bfloat16", quantize="int8"))
        network = load_base(Base(directory), torch.bfloat16, "cpu")
        note = quantisation_note(Base(directory), network, "none")
        assert note is not None and "llm_int8_threshold of the checkpoint is taken as 0" in note

    def test_quantising_twice_is_refused(self, tiny_base: Path, tmp_path: Path) -> None:
        directory = quantised_by_bitsandbytes(tiny_base, tmp_path / "base", load_in_8bit=True)
        with pytest.raises(ModelError, match=r"quantize is nf4, but the checkpoint comes quantised \(bitsandbytes\)"):
            without_weights(str(directory), "nf4")

    @pytest.mark.parametrize("quantize", ["int8", "nf4"])
    def test_missing_it_is_told_with_the_extra(
        self, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
        with pytest.raises(ModelError, match="needs bitsandbytes, which isn't installed") as error:
            without_weights(str(tiny_base), quantize)
        assert "pip install 'perlhf[quantized]'" in str(error.value)

    def test_other_devices_are_refused(self) -> None:
        with pytest.raises(ModelError, match="quantize: nf4 doesn't compute on device mps"):
            check_quantised(LlamaConfig(), "nf4", "mps")

    def test_its_settings_are_what_it_was_loaded_with(self, tiny_base: Path) -> None:
        for quantize in ("int8", "nf4"):
            network = load_base(Base(tiny_base), torch.bfloat16, "cpu", quantize)
            used: Any = network.config.quantization_config
            named = BitsAndBytesConfig(**bitsandbytes_settings(quantize, "bfloat16"))
            assert named.to_dict() == used.to_dict()


class TestReadBack:
    def test_fp8_by_hand(self, tiny_base: Path, tmp_path: Path) -> None:
        """Blocks of 32 by 32 of a 64 by 64 weight: 1.5 times the scales 2, 0.5, 1 and 4."""
        directory = Path(shutil.copytree(tiny_base, tmp_path / "base"))
        path = "model.layers.0.self_attn.q_proj"
        scales = torch.tensor([[2.0, 0.5], [1.0, 4.0]])
        settings = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 32],
            "modules_to_not_convert": ["lm_head"],
        }
        weight = torch.full((64, 64), 1.5).to(torch.float8_e4m3fn)
        damaged(directory, settings, {f"{path}.weight": weight, f"{path}.weight_scale_inv": scales})
        network = load_base(Base(directory), torch.float32, "cpu")
        found = network.get_parameter(f"{path}.weight")
        expected = (1.5 * scales).repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        note = quantisation_note(Base(directory), network, "none")
        assert note == "weights in fp8 were read back into float32 while loading: they take the memory of that"
        # As a plain base, it is trained in full or by an adapter.
        plain = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        plain.get_parameter(f"{path}.weight").data.copy_(expected)
        plain.save_pretrained(tmp_path / "plain")
        assert torch.equal(scores(directory), scores(tmp_path / "plain"))

    def test_mxfp4_by_hand(self, tmp_path: Path) -> None:
        """Two numbers to a byte, the lower half first: 0x2A is -1 and 1; a scale of 128 doubles, of 126 halves."""
        config = GptOssConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            pad_token_id=0,
            eos_token_id=1,
        )
        GptOssForCausalLM(config).save_pretrained(tmp_path)
        tensors: dict[str, Tensor] = load_file(tmp_path / "model.safetensors")
        for layer in range(2):
            experts = f"model.layers.{layer}.mlp.experts"
            for name, outputs in (("gate_up_proj", 64), ("down_proj", 32)):
                del tensors[f"{experts}.{name}"]
                tensors[f"{experts}.{name}_blocks"] = torch.full((2, outputs, 1, 16), 0x2A, dtype=torch.uint8)
                scales = torch.full((2, outputs, 1), 128, dtype=torch.uint8)
                scales[1] = 126
                tensors[f"{experts}.{name}_scales"] = scales
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        damaged(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, {})
        network = load_base(Base(tmp_path), torch.float32, "cpu")
        found = network.get_parameter("model.layers.1.mlp.experts.down_proj")
        assert found.dtype == torch.float32 and found.shape == (2, 32, 32)
        # [expert, in, out]: -1 and 1 by turns along the inputs, doubled in the first expert, halved in the second
        assert found[0, :4, 0].tolist() == [-2.0, 2.0, -2.0, 2.0]
        assert found[1, :4, 5].tolist() == [-0.5, 0.5, -0.5, 0.5]
        assert Model(network, {"name": "", "sha256": ""}).way is not None


class TestRefused:
    @pytest.mark.parametrize(
        ("method", "install"),
        [("gptq", "pip install gptqmodel optimum"), ("awq", "pip install gptqmodel")],
    )
    def test_what_needs_a_package_says_which(self, method: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        config = LlamaConfig.from_dict({"quantization_config": {"quant_method": method, "bits": 4}})
        with pytest.raises(ModelError, match=f"a checkpoint quantised by {method} needs gptqmodel") as error:
            check_quantised(config)
        assert install in str(error.value)

    def test_compressed_tensors_need_their_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        config = LlamaConfig.from_dict({"quantization_config": {"quant_method": "compressed-tensors"}})
        with pytest.raises(ModelError, match="needs compressed_tensors") as error:
            check_quantised(config)
        assert "pip install compressed-tensors" in str(error.value)

    def test_what_nothing_here_computes_is_named(self) -> None:
        config = LlamaConfig.from_dict({"quantization_config": {"quant_method": "aqlm"}})
        with pytest.raises(ModelError, match="quantised by aqlm, which isn't computed here") as error:
            check_quantised(config)
        assert "bitsandbytes, gptq, awq, fp8" in str(error.value) and "quantize: nf4" in str(error.value)


def test_a_layer_that_tells_its_weight_by_products_alone() -> None:
    weight, bias = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([7.0, 8.0])
    found = from_products(lambda x: x @ weight.T + bias, 3, torch.float32, torch.device("cpu"))
    assert torch.equal(found, weight)


def test_layers_of_other_packages_are_read_by_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    class QuantLinear(nn.Module):
        """As gptqmodel's: no weight, but numbers of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 3, 2
            self.register_buffer("qweight", torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            qweight: Any = self.qweight
            return x @ qweight.to(x.dtype).T / 2

    QuantLinear.__module__ = "gptqmodel.nn_modules.qlinear.torch"
    network: Any = nn.Module()
    network.linear = QuantLinear()
    network._keep_in_fp32_modules = network._keep_in_fp32_modules_strict = None
    assert own_layers(network, torch.float32) == 1
    x = torch.tensor([[1.0, 0.0, 2.0]], requires_grad=True)
    y = network.linear(x)
    y.backward(torch.tensor([[2.0, 4.0]]))
    assert y.tolist() == [[3.5, 8.0]]  # (1 + 6) / 2 and (4 + 12) / 2
    assert x.grad is not None and x.grad.tolist() == [[9.0, 12.0, 15.0]]  # 2 (.5 1 1.5) + 4 (2 2.5 3)


@pytest.mark.parametrize(("quantize", "share"), [("int8", 1.0), ("nf4", 0.5)])
def test_memory_of_the_weights(tiny_base: Path, quantize: str, share: float) -> None:
    """Each layer: q, o 64 x 64, k, v 32 x 64, three of 64 x 128; 272 embeddings of 64 and five norms stay."""
    network = without_weights(str(tiny_base), quantize)
    linear, whole = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128), 272 * 64 + 5 * 64
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    scales = 4 * rows if quantize == "int8" else 4 * linear // 64
    assert weight_bytes(network, quantize, 2) == whole * 2 + linear * share + scales
    assert weight_bytes(network, "none", 2) == (whole + linear) * 2
    loaded = load_base(Base(tiny_base), torch.bfloat16, "cpu", quantize)
    held = sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert held + scales == weight_bytes(network, quantize, 2)
