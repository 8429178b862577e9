"""Networks that can't be a base are refused by name, or found out on a few tokens."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    BloomForCausalLM,
    CohereCompassTextConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeHybridConfig,
    HunYuanMoEV1Config,
    JetMoeConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    ViTConfig,
)
from transformers.models.cohere_compass.modeling_cohere_compass import CohereCompassForCausalLM

from perlhf.errors import AdapterError, ModelError
from perlhf.kernels.attention.sight import Sight
from perlhf.kernels.call import current_call
from perlhf.kernels.modules import fused_experts
from perlhf.method.logprobs import Logits
from perlhf.method.packing import Tokens, completed, pack
from perlhf.model.model import Model
from perlhf.model.supported import Way, check_supported, decoder_and_head, target_paths, told

SMALL: dict[str, Any] = {
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
    why = "it has no attention that transformers lets others compute"
    assert (model.way.packing, model.way.why) == ("none", why)
    assert told(model.way, "auto") == {"packing": "none", "why": why}
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
    assert Model(bloom.eval(), {}, known=Way()).way.why == "it has no attention that transformers lets others compute"
    assert Model(llama(), {}, known=Way(uncalled=("model.layers.0.mlp.down",))).way == Way()
    rwkv = RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32))
    assert not Model(rwkv.eval(), {}, known=Way("none", "said")).way.reuses_cache
    acausal = llama()
    for layer in acausal.model.layers:
        attention: Any = layer.get_submodule("self_attn")
        attention.is_causal = False
    with pytest.raises(ModelError, match="attention is not causal"):
        Model(acausal, {}, known=Way())


def shapes(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


EXPERTS: dict[str, Any] = {**SMALL, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
QKVO = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
QWEN2_MOE = Qwen2MoeConfig(**EXPERTS, num_experts=4, shared_expert_intermediate_size=16, mlp_only_layers=[0])


def test_of_experts_attention_and_what_all_tokens_share_are_adapted() -> None:
    network = shapes(QWEN2_MOE)
    first, second = ([f"model.layers.{layer}.{path}" for path in QKVO] for layer in (0, 1))
    shared = [f"model.layers.1.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    dense = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert target_paths(network, "attention") == [*first, *second, *shared]
    # The experts are fused here; `shared_expert_gate` and `gate` choose.
    assert target_paths(network, "all") == [*first, *dense, *second, *shared]
    fused = ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    assert fused_experts(network.named_modules()) == fused
    # A name that dense layers have, too, takes those alone.
    assert target_paths(network, ("down_proj",)) == [dense[2], shared[2]]
    assert fused_experts(network.named_modules(), ("down_proj", "q_proj")) == fused[1:]


def test_experts_that_are_linear_layers_are_among_all_and_alone_where_they_are_named() -> None:
    llama = shapes(LlamaConfig(**SMALL, tie_word_embeddings=True))
    layer: Any = llama.get_submodule("model.layers.1")
    layer.mlp = nn.ModuleDict(
        {"gate": nn.Linear(32, 2), "experts": nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(32, 8)})] * 2)}
    )
    expert = ["model.layers.1.mlp.experts.0.w1"]  # both are one module here, which has one name
    assert target_paths(llama, "all")[-1:] == expert and target_paths(llama, ("w1",)) == expert
    assert not [path for path in target_paths(llama, "all") if path.endswith("mlp.gate")]
    assert len(target_paths(llama, "attention")) == 8


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("gate_up_proj", "names experts that are fused into one tensor"),
        ("experts", "names experts that are fused into one tensor"),
        ("mlp.gate", "names a router"),
        ("shared_expert_gate", "names a router"),
    ],
)
def test_naming_what_is_never_adapted_says_why(target: str, what: str) -> None:
    with pytest.raises(AdapterError, match=what) as error:
        target_paths(shapes(QWEN2_MOE), ("q_proj", target))
    assert f"'{target}'" in str(error.value) and "--adapter.targets all" in str(error.value)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(error.value)


def test_routers_by_any_name_are_left_alone_and_a_dense_network_has_none() -> None:
    jetmoe = shapes(JetMoeConfig(**EXPERTS, num_local_experts=4, kv_channels=8))
    assert not [path for path in target_paths(jetmoe, "all") if "router" in path]
    assert not [path for path in target_paths(jetmoe, "attention") if "router" in path]
    hunyuan = shapes(HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=2, head_dim=8))
    assert not [path for path in target_paths(hunyuan, "all") if path.endswith("wg")]
    assert [path for path in target_paths(hunyuan, "attention") if "shared_mlp" in path]
    granite = {
        **SMALL,
        "layer_types": ["attention"] * 2,
        "shared_intermediate_size": 16,
        "position_embedding_type": "rope",
    }
    dense = shapes(GraniteMoeHybridConfig(**granite, num_local_experts=0, mamba_n_heads=4, mamba_d_head=16))
    assert target_paths(dense, "attention") == [f"model.layers.{layer}.{path}" for layer in (0, 1) for path in QKVO]


def test_a_network_without_attention_names_what_to_try_and_all_takes_neither_head_nor_embedding() -> None:
    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    mamba = shapes(MambaConfig(**small, tie_word_embeddings=False))
    with pytest.raises(AdapterError, match="'attention' match no linear layer") as error:
        target_paths(mamba, "attention")
    assert error.value.hint == "--adapter.targets all"
    assert {path.rpartition(".")[2] for path in target_paths(mamba, "all")} == {
        "in_proj",
        "x_proj",
        "dt_proj",
        "out_proj",
    }
    for tied in (False, True):
        opt = shapes(OPTConfig(**{**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16, "tie_word_embeddings": tied}))
        ends = {path.rpartition(".")[2] for path in target_paths(opt, "all")}
        assert ends == {"project_out", "project_in", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_are_not_handed_on_are_found_out(dtype: torch.dtype) -> None:
    """A network that drops the positions on the way to our attention is no tree."""
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    hand_on, lost = model.model.forward, "position_ids"
    model.model.forward = lambda *inputs, **named: hand_on(*inputs, **{k: v for k, v in named.items() if k != lost})
    assert opened(model.to(dtype)).way.packing == "none"


def test_the_score_head_reads_what_the_output_head_reads() -> None:
    """OPT-350M widens its states inside only: they are of another width where it hands them out."""
    small: dict[str, Any] = {**SMALL, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 16}
    model = opened(OPTForCausalLM(OPTConfig(**small)))
    model.add_adapter("reward", "reward", rank=2)
    batch = pack([[Tokens([5, 6, 7])]], model.packing("auto"))
    assert model.hidden_size == 16 and model.scores(batch, "reward").shape == (1,)


def test_attention_that_turns_half_of_each_head_or_nothing_is_replaced_by_one_that_does_so_too() -> None:
    """GLM-4.5 turns half of each head; Cohere's newest turns none in its layers without a window."""
    half_turn = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    experts: dict[str, Any] = {"moe_intermediate_size": 16, "n_routed_experts": 2, "num_experts_per_tok": 1}
    half = Glm4MoeConfig(**SMALL | experts | {"head_dim": 8, "rope_parameters": half_turn})
    turns: Any = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None}
    kinds = ["sliding_attention", "full_attention"]
    none = CohereCompassTextConfig(**SMALL, layer_types=kinds, sliding_window=3, rope_parameters=turns)
    for network in (Glm4MoeForCausalLM(half), CohereCompassForCausalLM(none)):
        ids = torch.arange(5, 15)[None]
        expected = network.eval()(ids).logits
        model = opened(network)
        assert model.way.packing == "tree"
        batch = pack([[completed([5], list(range(6, 15)))]], "tree")
        found = model.logprobs(batch, None).logprobs[0]
        wanted = torch.log_softmax(expected[0, :-1], -1)[torch.arange(9), ids[0, 1:]]
        assert torch.allclose(found, wanted, atol=1e-4)


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
        if getattr(current_call(), where) is not None:
            raise full
        return hand_on(*inputs, **named)

    model.model.forward = forward
    with pytest.raises(RuntimeError) as error:
        opened(model)
    assert error.value is full


def test_weights_that_are_no_numbers_are_told() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = float("nan")
    with pytest.raises(ModelError, match=r"its states aren't numbers in float32: were its weights damaged\?"):
        opened(model)


def test_head_of_decoder_gives_the_logits() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    decoder, head = decoder_and_head(model)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(head(decoder(ids).last_hidden_state), model(ids).logits)
    assert head is model.lm_head and decoder is model.model


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_sequences_that_would_change_those_beside_them_are_refused(kind: str) -> None:
    """Both turn all positions of a pass otherwise as soon as one row is longer than in pretraining."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 8, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    longest = 8 if kind == "longrope" else 12
    config = LlamaConfig(**SMALL, max_position_embeddings=12, rope_parameters=rope)
    model = opened(LlamaForCausalLM(config))
    short, long = [Tokens([5] * 3)], [Tokens([6] * (longest + 1))]
    alone = model.last_states(pack([short], "none"), None)
    fits = [Tokens([6] * longest)]
    assert torch.allclose(model.last_states(pack([short, fits], "none"), None)[0], alone[0], atol=1e-5)
    for packing in ("tree", "none"):
        with pytest.raises(ModelError, match=f"beyond {longest} this base turns the positions") as error:
            model.last_states(pack([short, long], packing), None)
        assert error.value.hint == "lower encoding.max_tokens, and max_completion_tokens of a policy"


def test_scores_that_are_scaled_by_place_are_no_matter_for_a_tree() -> None:
    """Llama 4 counts a token's place in the row, which shows after 8192 tokens: a probe of a few can't see it."""
    small: dict[str, Any] = {
        **SMALL,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    assert opened(Llama4ForCausalLM(Llama4TextConfig(**small))).way.packing == "none"
    plain = Llama4TextConfig(**small, attn_temperature_tuning=False)
    assert opened(Llama4ForCausalLM(plain)).way.packing == "tree"
