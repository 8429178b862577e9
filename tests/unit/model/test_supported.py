"""Networks that can't be a base are refused by name, or found out on a few tokens."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    ViTConfig,
)

from perlhf.errors import ModelError
from perlhf.kernels.sight import Sight
from perlhf.method.logprobs import Logits
from perlhf.model.model import Model
from perlhf.model.supported import Way, check_supported, decoder_and_head

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
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (LlavaConfig(), "joins several networks"),
        (BertConfig(), "attends to later tokens"),
        (ViTConfig(), "no causal language model"),
        (LlamaConfig.from_dict({"quantization_config": {"quant_method": "gguf"}}), "quantized"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_others_are_refused_by_name(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        check_supported(config)
    assert config.model_type in str(error.value) and "decoder-only" in str(error.value)


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


def test_scaled_and_capped_logits_are_known() -> None:
    cohere = opened(CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5, use_qk_norm=False)))
    assert cohere.way.logits == Logits(0.5)
    gemma = opened(Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0)))
    assert gemma.way.logits == Logits(1.0, 30.0) and gemma.way.packing == "tree"


class Squared(LlamaForCausalLM):
    def forward(self, *inputs: Any, **named: Any) -> Any:
        output: Any = super().forward(*inputs, **named)
        output.logits = output.logits.square()
        return output


def test_logits_that_are_changed_otherwise_are_found_out() -> None:
    with pytest.raises(ModelError, match="otherwise changed"):
        opened(Squared(LlamaConfig(**SMALL)))


def test_attention_to_later_tokens_is_found_out() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    for layer in model.model.layers:
        attention: Any = layer.get_submodule("self_attn")
        attention.is_causal = False
    with pytest.raises(ModelError, match="attention is not causal"):
        opened(model)


def test_what_no_tree_can_be_made_of_is_computed_in_rows() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3))
    model = opened(bloom)
    assert (model.way.packing, model.way.why) == ("none", "its layers' masks are of no known form")
    assert model.packing("auto") == model.packing("none") == "none"
    with pytest.raises(ModelError, match="can't be computed as a tree") as error:
        model.packing("tree")
    assert error.value.allowed == "auto, none"


def test_a_network_whose_cache_cannot_be_repeated_computes_all_tokens_anew() -> None:
    rwkv = RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32))
    model = opened(rwkv)
    assert model.way.packing == "none" and not model.way.reuses_cache


def test_windows_are_read_layer_by_layer() -> None:
    model = opened(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=2)))
    assert model.way.packing == "tree" and model.way.sights == dict.fromkeys((0, 1), Sight(window=2))
    assert not opened(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None))).way.sights
    qwen = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    assert opened(Qwen2ForCausalLM(qwen)).way.sights == {1: Sight(window=3)}


def test_layers_whose_weights_are_read_without_a_call_are_not_adapted() -> None:
    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = opened(MambaForCausalLM(MambaConfig(**small)))
    assert model.way.uncalled and all(path.endswith("dt_proj") for path in model.way.uncalled)
    assert {path.rpartition(".")[2] for path in model.targets("all")} == {"in_proj", "x_proj", "out_proj"}


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


def test_a_known_way_is_taken_where_it_holds_and_the_logits_are_those_of_the_weights() -> None:
    said = Way("none", "somebody said so", logits=Logits(3.0))
    assert Model(llama(), {}, known=said).way == Way("none", "somebody said so")
    cohere = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5, use_qk_norm=False)).eval()
    assert Model(cohere, {}, known=Way()).way == Way(logits=Logits(0.5))


def test_a_known_way_that_does_not_hold_is_as_if_nothing_were_known() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3))
    assert Model(bloom.eval(), {}, known=Way()).way.why == "its layers' masks are of no known form"
    assert Model(llama(), {}, known=Way(uncalled=("model.layers.0.mlp.down",))).way == Way()
    rwkv = RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32))
    assert not Model(rwkv.eval(), {}, known=Way("none", "said")).way.reuses_cache
    acausal = llama()
    for layer in acausal.model.layers:
        attention: Any = layer.get_submodule("self_attn")
        attention.is_causal = False
    with pytest.raises(ModelError, match="attention is not causal"):
        Model(acausal, {}, known=Way())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lost", ["position_ids", "tree", "sampled"])
def test_what_is_not_handed_on_is_found_out(lost: str, dtype: torch.dtype) -> None:
    """A network that drops the positions, the tree or the cache on the way to our attention is no tree."""
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    hand_on = model.model.forward
    model.model.forward = lambda *inputs, **named: hand_on(*inputs, **{k: v for k, v in named.items() if k != lost})
    assert opened(model.to(dtype)).way.packing == "none"


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("Tried to allocate 20.00 MiB"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["GPU", "broken GPU", "CPU"],
)
@pytest.mark.parametrize("where", ["tree", "sampled"])
def test_full_memory_chooses_no_other_way(full: RuntimeError, where: str) -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    hand_on = model.model.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        if where in named:
            raise full
        return hand_on(*inputs, **named)

    model.model.forward = forward
    with pytest.raises(RuntimeError) as error:
        opened(model)
    assert error.value is full


def test_weights_that_are_no_numbers_are_told() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.model.layers[1].get_submodule("mlp.up_proj").weight.data[3, 5] = float("nan")
    with pytest.raises(ModelError, match=r"its states aren't numbers in float32: were its weights damaged\?"):
        opened(model)


def test_head_of_decoder_gives_the_logits() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    decoder, head = decoder_and_head(model)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(head(decoder(ids).last_hidden_state), model(ids).logits)
    assert head is model.lm_head and decoder is model.model
