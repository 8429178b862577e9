"""A multimodal checkpoint as the base of whole commands: trained on, exported as a text model that others load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma3Config
from transformers import Gemma3ForConditionalGeneration as Whole

from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 with eyes, random, and the tiny base's tokenizer."""
    directory = tmp_path_factory.mktemp("multimodal") / "base"
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    text = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 272, "sliding_window": 8, **ids}
    tower = SIZES | {"image_size": 32, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=tower, image_token_index=271, **ids)  # type: ignore[arg-type]
    torch.manual_seed(0)
    whole: Any = Whole(config)
    whole.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (tiny_base / file).is_file():
            shutil.copy(tiny_base / file, directory)
    return directory


def test_it_is_trained_and_exported_as_a_text_model(stage: Any, perlhf: Any, base: Path, tmp_path: Path) -> None:
    run, done = stage("sft", "--max-updates", "2", base=base)
    assert done.code == 0, done.err
    merged = tmp_path / "merged"
    done = perlhf("export", str(run), str(merged), "--format", "merged", "--device", "cpu")
    assert done.code == 0, done.err
    assert json.loads((merged / "config.json").read_text())["model_type"] == "gemma3_text"
    alone: Any = AutoModelForCausalLM.from_pretrained(merged)
    assert type(alone).__name__ == "Gemma3ForCausalLM" and alone.num_parameters() < 100_000
    done = perlhf("export", str(run), str(tmp_path / "peft"), "--device", "cpu")
    assert done.code == 0 and "--format merged writes a text model" in done.err + done.out
    tokenizer = load_tokenizer(Base(merged))
    assert len(tokenizer) == 272


def test_a_reward_model_on_it_is_a_text_classifier(stage: Any, perlhf: Any, base: Path, tmp_path: Path) -> None:
    run, done = stage("reward", "--max-updates", "2", base=base)
    assert done.code == 0, done.err
    done = perlhf("export", str(run), str(tmp_path / "out"), "--format", "merged", "--device", "cpu")
    assert done.code == 0, done.err
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(network).__name__ == "Gemma3TextForSequenceClassification"
