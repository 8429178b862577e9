"""Networks that can't be a base are refused by name, or found out on a few tokens."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    JambaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    RwkvConfig,
    SmolLM3Config,
    T5Config,
    ViTConfig,
)

from perlhf.errors import ModelError
from perlhf.model.model import Model
from perlhf.model.supported import check_supported, decoder_and_head

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        Qwen2Config(),  # has sliding_window = 4096 in files, switched off by use_sliding_window
        Qwen3Config(),
        SmolLM3Config(),
        GPT2Config(),
        GPTNeoXConfig(),
        OPTConfig(),
        MistralConfig(sliding_window=None),
        MistralConfig(sliding_window=8192, max_position_embeddings=8192),  # never reached
        GraniteConfig(logits_scaling=1.0),
    ],
    ids=lambda config: config.model_type,
)
def test_plain_causal_models_are_allowed(config: PreTrainedConfig) -> None:
    check_supported(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (LlavaConfig(), "joins several networks"),
        (BertConfig(), "attends to later tokens"),
        (ViTConfig(), "no causal language model"),
        (MistralConfig(sliding_window=4096, max_position_embeddings=32768), "sliding window of 4096 tokens"),
        (Qwen2Config(use_sliding_window=True, sliding_window=128, max_window_layers=2), "sliding window of 128 tokens"),
        (Phi3Config(sliding_window=2047), "sliding window of 2047 tokens"),
        (Gemma2Config(), "sliding window of 4096 tokens"),
        (GPTNeoConfig(), "local attention layers"),
        (MambaConfig(), "linear_attention layers|recurrent state"),
        (FalconMambaConfig(), "linear_attention layers|recurrent state"),
        (RwkvConfig(), "recurrent state"),
        (JambaConfig(), "linear_attention layers|recurrent state"),
        (CohereConfig(logit_scale=0.0625), r"logit_scale = 0\.0625"),
        (GraniteConfig(logits_scaling=8.0), r"logits_scaling = 8\.0"),
        (Gemma2Config(layer_types=["full_attention"] * 26), "final_logit_softcapping|attn_logit_softcapping"),
        (FalconConfig(alibi=True), "ALiBi"),
        (LlamaConfig.from_dict({"quantization_config": {"quant_method": "gguf"}}), "quantized"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_others_are_refused_by_name(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        check_supported(config)
    assert config.model_type in str(error.value) and "full causal attention" in str(error.value)


def test_configs_read_from_json_behave_alike() -> None:
    config = AutoConfig.for_model("qwen2", sliding_window=4096, use_sliding_window=False)
    check_supported(config)


def opened(network: PreTrainedModel) -> Model:
    """The network as it is trained and sampled from, which verifies its forward pass."""
    return Model(network.eval(), {"name": "random", "sha256": ""})


def test_forward_of_plain_models_is_as_assumed() -> None:
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    for model in (
        LlamaForCausalLM(LlamaConfig(**SMALL)),
        Qwen2ForCausalLM(Qwen2Config(**SMALL)),
        GPT2LMHeadModel(gpt2),
    ):
        opened(copy.deepcopy(model))
        opened(model.bfloat16())


def test_changed_logits_are_found_out() -> None:
    scaled = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5, use_qk_norm=False))
    with pytest.raises(ModelError, match="scaled, capped or otherwise changed"):
        opened(scaled)


def test_attention_to_later_tokens_is_found_out() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    for layer in model.model.layers:
        attention: Any = layer.get_submodule("self_attn")
        attention.is_causal = False
    with pytest.raises(ModelError, match="attention is not causal"):
        opened(model)


def test_ignored_positions_are_found_out() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3))
    with pytest.raises(ModelError, match="position ids or a four-dimensional"):
        opened(bloom)


def test_a_short_window_is_found_out() -> None:
    config = MistralConfig(**SMALL, sliding_window=2)
    opened(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)))
    with pytest.raises(ModelError, match="four-dimensional attention mask"):
        opened(MistralForCausalLM(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lost", "why"),
    [("position_ids", "shared prefixes"), ("tree", "accepted|shared prefixes"), ("sampled", "accepted")],
)
def test_what_is_not_handed_on_is_found_out(lost: str, why: str, dtype: torch.dtype) -> None:
    """A network that drops the positions, the tree or the cache on the way to our attention."""
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    hand_on = model.model.forward
    model.model.forward = lambda *inputs, **named: hand_on(*inputs, **{k: v for k, v in named.items() if k != lost})
    with pytest.raises(ModelError, match=rf"four-dimensional attention mask are not .*({why})"):
        opened(model.to(dtype))


def test_head_of_decoder_gives_the_logits() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    decoder, head = decoder_and_head(model)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(head(decoder(ids).last_hidden_state), model(ids).logits)
    assert head is model.lm_head and decoder is model.model
