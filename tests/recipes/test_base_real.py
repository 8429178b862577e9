"""The small real base as it is pulled: its tokens, its limits, and that it still speaks English."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perlhf.model.bases import found, loading
from perlhf.model.bases.found import Base
from perlhf.system.files import sha256

PARAMETERS = 134_515_008  # of SmolLM2-135M, embeddings tied
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return loading.load_tokenizer(Base(smollm2))


@pytest.fixture(scope="module")
def model(smollm2: Path) -> PreTrainedModel:
    return loading.load_base(Base(smollm2), torch.bfloat16, "cpu")


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    # 17 control tokens, then the byte letters from "!" on: "0" is 17 + 15
    assert ids_of(tokenizer, "0123456789") == list(range(32, 42))
    assert ids_of(tokenizer, "2024") == [34, 32, 34, 36]
    assert ids_of(tokenizer, "$13.50") == [20, 33, 35, 30, 37, 32]


def test_chat_template_adds_its_system_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    user = "<|im_start|>user\nhi<|im_end|>\n"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == system + user + "<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(own, tokenize=False) == "<|im_start|>system\nBrief.<|im_end|>\n" + user
    # as published for SmolLM2-Instruct
    published = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712]
    published += [8182, 2, 198]
    assert ids_of(tokenizer, system) == published


def test_control_tokens_and_limits(tokenizer: PreTrainedTokenizerBase, smollm2: Path) -> None:
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == 49152
    config = json.loads((smollm2 / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["eos_token_id"], config["pad_token_id"], config["max_position_embeddings"]) == (2, 2, 8192)


@pytest.mark.parametrize("text", ["Two flat whites, £7.50 — to go!", "naïve café ☕ 1234567", "  tabs\t and\nlines  "])
def test_text_survives(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_weights_are_plain_bfloat16(model: PreTrainedModel, smollm2: Path) -> None:
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (smollm2 / "model.safetensors").stat().st_size == pytest.approx(2 * PARAMETERS, rel=1e-3)


def test_fingerprint_is_the_same_everywhere(smollm2: Path) -> None:
    found = Base(smollm2).fingerprint
    assert (found["name"], found["sha256"]) == ("smollm2-135m-instruct-q4_1", WEIGHTS_SHA256)
    assert sha256(smollm2 / "model.safetensors") == WEIGHTS_SHA256


def test_it_knows_some_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Would fail if rows of the attention weights were in llama.cpp's order or the tokenizer were off."""
    for prompt, answer in (
        ("The capital of France is", " Paris"),
        ("Monday, Tuesday, Wednesday, Thursday,", " Friday"),
        ("1 2 3 4 5 6 7 8", " "),
    ):
        with torch.no_grad():
            logits = model(torch.tensor([ids_of(tokenizer, prompt)])).logits[0, -1]
        assert tokenizer.decode([int(logits.argmax())]) == answer


def test_pull_again_is_instant(smollm2: Path) -> None:
    before = (smollm2 / "perlhf_base.json").stat().st_mtime_ns
    assert found.pull("smollm2-135m-instruct-q4_1") == smollm2
    assert (smollm2 / "perlhf_base.json").stat().st_mtime_ns == before
