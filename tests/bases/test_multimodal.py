"""Multimodal checkpoints as bases: the language model alone is read, and computes what the whole does on text."""

import json
from pathlib import Path
from typing import Any

import multimodal
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from perlhf.errors import ModelError
from perlhf.model.bases import loading, weights
from perlhf.model.bases.found import Base

FAMILIES = """
    aria aya_vision cohere2_vision deepseek_vl deepseek_vl_hybrid exaone4_5 fuyu gemma3 gemma4 gemma4_unified glm4v
    glm4v_moe glm_ocr got_ocr2 hunyuan_vl hyperclovax_vision_v2 idefics2 idefics3 internvl lfm2_vl lighton_ocr
    llama4 llava llava_next llava_next_video llava_onevision minicpm_ocr minicpmv4_6 minicpmv4_7 mistral3
    nemotron_h_omni pp_chart2table qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl
    qwen3_vl_moe smolvlm video_llama_3 video_llava vipllava
""".split()
UNSCALED = ("aya_vision", "cohere2_vision")
"""Whose whole network leaves out the scale of logits that its text part's configuration names."""
IDS = torch.tensor([[5, 9, 7, 200, 33, 1, 8, 9, 10, 44]])


def saved(family: str, directory: Path) -> Any:
    """A checkpoint as transformers saves it, and the network that it is of."""
    whole: Any = multimodal.network(family)
    whole.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_is_what_the_whole_is_on_text(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved(family, tmp_path)
    taken: list[str] = []
    plain = weights.room_for
    monkeypatch.setattr(loading, "room_for", lambda kept, *rest: taken.extend(kept) or plain(kept, *rest))
    text: Any = loading.load_base(Base(tmp_path), torch.float32, "cpu")
    assert not {name for name in taken if "vision" in name or "visual" in name or "project" in name.split(".")[0]}
    with torch.no_grad():
        expected, found = (net(input_ids=IDS, use_cache=False).logits for net in (whole, text))
    scale = text.config.logit_scale if family in UNSCALED else 1.0
    torch.testing.assert_close(found, expected * scale, rtol=0, atol=1e-6)
    assert expected.abs().max() > 1
    with torch.device("meta"):
        planned: Any = AutoModelForCausalLM.from_config(loading._config(Base(tmp_path)))
    assert planned.num_parameters() == text.num_parameters() <= whole.num_parameters() - (family != "gemma4_unified")


def test_experts_that_lie_turned_in_published_files(tmp_path: Path) -> None:
    """Qwen3-VL's are [expert, input, output] in its authors' files, [expert, output, input] in the network."""
    whole = saved("qwen3_vl_moe", tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    text: Any = loading.load_base(Base(tmp_path), torch.float32, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(text(IDS).logits, whole(input_ids=IDS).logits, rtol=0, atol=1e-6)


def test_what_is_saved_of_it_is_a_text_model(tmp_path: Path) -> None:
    whole = saved("gemma3", tmp_path / "whole")
    text: Any = loading.load_base(Base(tmp_path / "whole"), torch.float32, "cpu")
    text.save_pretrained(tmp_path / "text")
    said = json.loads((tmp_path / "text" / "config.json").read_text())
    assert said["architectures"] == ["Gemma3ForCausalLM"] and said["model_type"] == "gemma3_text"
    alone: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    with torch.no_grad():
        torch.testing.assert_close(alone(IDS).logits, whole(input_ids=IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("paligemma", "it reads prompts in both directions"),
        ("blip", "no causal language model for its text part alone"),
        ("mllama", "no causal language model for its text part alone"),
        ("granite4_vision", "no causal language model for its text part alone"),
        ("florence2", "it is an encoder-decoder"),
    ],
)
def test_a_text_part_that_cannot_stand_alone_is_refused_in_a_sentence(family: str, why: str, tmp_path: Path) -> None:
    config: Any = CONFIG_MAPPING[family]()
    config.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=why) as caught:
        loading.load_base(Base(tmp_path), torch.float32, "cpu")
    assert caught.value.hint
