"""Bases whose linear layers are kept in few bits, against plain layers with the weights as they are read back."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import answers, apart, open_encoder, random_ids, randomise, reference_logprobs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    FalconH1Config,
    GPT2Config,
    LlamaForCausalLM,
    MambaConfig,
)

from perlhf.errors import AdapterError, ModelError
from perlhf.kernels.modules import AdaptedLinear, GatedMlp, SelfAttention
from perlhf.kernels.quantised import QuantisedLinear
from perlhf.method.lora import adapted_linear
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.quantised import Quantize, own_layers, quantised_layers
from perlhf.model.merged import merged_network
from perlhf.model.model import Model

PROMPTS = random_ids([5, 9, 1], seed=1)
COMPLETIONS = random_ids([4, 1, 7], seed=2)
# peft asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
KINDS = pytest.mark.parametrize("quantize", ["nf4", "int8"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def opened(directory: Path, quantize: Quantize, dtype: str = "float32") -> Model:
    return Model.load(Base(directory), dtype, "cpu", quantize=quantize)


def layer(model: Model, path: str = "model.layers.1.self_attn.o_proj") -> Any:
    return model.base.get_submodule(path)


@torch.no_grad()
def read_back(directory: Path, model: Model) -> LlamaForCausalLM:
    """transformers' own network with plain layers that hold what the quantised ones read back."""
    plain = LlamaForCausalLM.from_pretrained(directory, dtype=model.dtype)
    for path, layer in quantised_layers(model.base):
        plain.get_parameter(f"{path}.weight").copy_(layer.dense())
    return plain


class TestLayer:
    @KINDS
    @DTYPES
    def test_it_is_the_plain_layer_with_the_weight_that_is_read_back(
        self, tiny_base: Path, quantize: Quantize, dtype: str
    ) -> None:
        """nf4 equally; int8 but for the rounding of its input to 127 steps of a row's largest number."""
        model = opened(tiny_base, quantize, dtype)
        own = layer(model)
        assert isinstance(own, QuantisedLinear)
        x = torch.randn(3, 7, own.in_features).to(model.dtype)
        with torch.no_grad():
            found, expected = own(x), F.linear(x, own.dense())
        if quantize == "nf4":
            assert torch.equal(found, expected)
        else:
            assert (found - expected).norm() / expected.norm() < 0.02

    @KINDS
    @DTYPES
    @pytest.mark.parametrize("drop", [False, True])
    def test_adapted_values_and_gradients_are_those_of_the_plain_layer(
        self, tiny_base: Path, quantize: Quantize, dtype: str, drop: bool
    ) -> None:
        own = layer(opened(tiny_base, quantize, dtype))
        x = torch.randn(3, 7, own.in_features).to(own.dtype)
        a, b = torch.randn(4, own.in_features).to(x) / 8, torch.randn(own.out_features, 4).to(x)
        keep = F.dropout(torch.ones_like(x), 0.5) if drop else None
        above = torch.randn(3, 7, own.out_features).to(x)
        results = []
        for weight in (own.quantised, own.dense()):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
            y = adapted_linear(leaves[0], weight, None, leaves[1], leaves[2], keep)
            y.backward(above)
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        (y, *grads), (expected, *wanted) = results
        assert (y - expected).norm() / expected.norm() < (0.02 if quantize == "int8" else 1e-12)
        # The gradients don't depend on the frozen product: they are equal bit for bit.
        assert all(torch.equal(one, other) for one, other in zip(grads, wanted, strict=True))

    @KINDS
    def test_without_adapters_its_input_gets_the_gradient_of_the_plain_layer(
        self, tiny_base: Path, quantize: Quantize
    ) -> None:
        own = layer(opened(tiny_base, quantize))
        x = torch.randn(3, own.in_features, requires_grad=True)
        above = torch.randn(3, own.out_features)
        y = own(x)
        assert y.grad_fn.saved_tensors == ()  # nothing of the input is kept
        y.backward(above)
        assert x.grad is not None and torch.equal(x.grad, above @ own.dense())
        with torch.no_grad():
            assert torch.equal(y.detach(), own(x))  # with a graph as without

    @KINDS
    @DTYPES
    def test_a_row_does_not_depend_on_those_beside_it(self, tiny_base: Path, quantize: Quantize, dtype: str) -> None:
        """Where outliers were kept apart, one row's would change the columns of all."""
        own = layer(opened(tiny_base, quantize, dtype))
        x = torch.randn(1, own.in_features).to(own.dtype)
        others = torch.randn(5, own.in_features).to(own.dtype) * 1000
        with torch.no_grad():
            alone, beside = own(x), own(torch.cat([x, others]))[:1]
        if quantize == "int8":
            assert torch.equal(alone, beside)
        else:  # as of plain layers, whose products of one row and of several add up in another order
            torch.testing.assert_close(alone, beside, rtol=0.02 if dtype == "bfloat16" else 1e-5, atol=1e-2)

    def test_int8_by_hand(self) -> None:
        """Rows [127, -254] and [1, 0.5]: scales 254 and 1, values -127 to 127, read back as value * scale / 127."""
        bnb: Any = importlib.import_module("bitsandbytes")
        linear: Any = bnb.nn.Linear8bitLt(2, 2, bias=False, has_fp16_weights=False, threshold=6.0)
        weight = torch.tensor([[127.0, -254.0], [1.0, 0.5]])
        linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        network: Any = nn.Module()
        network.linear = linear.to("cpu")
        network._keep_in_fp32_modules = network._keep_in_fp32_modules_strict = None
        assert own_layers(network, torch.float32) == 1
        # 0.5 / 1 * 127 = 63.5, rounded to the even 64; 127 / 254 * 127 = 63.5 to 64 as well
        expected = torch.tensor([[64 * 254 / 127, -254.0], [1.0, 64 / 127]])
        torch.testing.assert_close(network.linear.dense(), expected)

    def test_nf4_by_hand(self) -> None:
        """A block of 64 is its largest number times one of 16 codes: -1, 0 and 1 are among them."""
        bnb: Any = importlib.import_module("bitsandbytes")
        linear: Any = bnb.nn.Linear4bit(64, 1, bias=False, compress_statistics=False, quant_type="nf4")
        weight = torch.zeros(1, 64)
        weight[0, :3] = torch.tensor([3.0, -3.0, 0.1])  # 0.1 / 3 is nearest to the code 0
        linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
        network: Any = nn.Module()
        network.linear = linear.to("cpu")
        network._keep_in_fp32_modules = network._keep_in_fp32_modules_strict = None
        assert own_layers(network, torch.float32) == 1
        assert network.linear.dense()[0, :4].tolist() == [3.0, -3.0, 0.0, 0.0]


class TestNetwork:
    @KINDS
    @DTYPES
    def test_linear_layers_are_quantised_and_nothing_else(
        self, tiny_base: Path, quantize: Quantize, dtype: str
    ) -> None:
        model = opened(tiny_base, quantize, dtype)
        linear = {path: module for path, module in model.base.named_modules() if isinstance(module, nn.Linear)}
        assert {path for path, module in linear.items() if not isinstance(module, QuantisedLinear)} == {"lm_head"}
        kept = torch.uint8 if quantize == "nf4" else torch.int8
        assert all(module.weight.dtype == kept for path, module in linear.items() if path != "lm_head")
        embedding: Any = model.base.get_input_embeddings()
        assert linear["lm_head"].weight is embedding.weight  # tied as before
        assert {p.dtype for p in model.base.parameters() if p.is_floating_point()} == {getattr(torch, dtype)}
        assert any(isinstance(module, GatedMlp) for module in model.base.modules())
        assert any(isinstance(module, SelfAttention) for module in model.base.modules())

    @DTYPES
    def test_nf4_is_the_network_with_the_weights_that_are_read_back(self, tiny_base: Path, dtype: str) -> None:
        model = opened(tiny_base, "nf4", dtype)
        plain = read_back(tiny_base, model)
        with torch.no_grad():
            found = model.logprobs(answers(PROMPTS, COMPLETIONS), None).logprobs
        for row, prompt, completion in zip(found, PROMPTS, COMPLETIONS, strict=True):
            expected = reference_logprobs(plain, prompt, completion)
            tolerance = 2e-5 if dtype == "float32" else 0.1
            torch.testing.assert_close(row[: len(completion)], expected, rtol=0, atol=tolerance)

    @KINDS
    def test_adapter_gradients_are_those_of_the_plain_network(self, tiny_base: Path, quantize: Quantize) -> None:
        """Of int8 up to what rounding the inputs of all layers does."""
        quantised, found = opened(tiny_base, quantize), []
        plain = Model(read_back(tiny_base, quantised), {"name": "", "sha256": ""})
        for model in (quantised, plain):
            model.add_adapter("sft", "sft", rank=4, alpha=8.0, targets="all")
            randomise(model, "sft")
            model.logprobs(answers(PROMPTS, COMPLETIONS), "sft").logprobs.sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.adapters["sft"].trainable() if p.grad is not None]))
        assert len(found[0]) == len(found[1]) > 0
        tolerance = 1e-4 if quantize == "nf4" else 0.2
        assert (found[0] - found[1]).norm() / found[1].norm() < tolerance

    @KINDS
    @DTYPES
    def test_a_new_adapter_changes_no_bit_and_its_kl_is_zero(
        self, tiny_base: Path, quantize: Quantize, dtype: str
    ) -> None:
        model = opened(tiny_base, quantize, dtype)
        batch = answers(PROMPTS, COMPLETIONS)
        with torch.no_grad():
            bare = model.logprobs(batch, None).logprobs
        model.add_adapter("policy", "policy", rank=4, targets="all")
        learning = model.logprobs(batch, "policy").logprobs
        with torch.no_grad():
            assert torch.equal(model.logprobs(batch, "policy").logprobs, bare)
        assert torch.equal(learning.detach(), bare)
        assert learning.requires_grad
        randomise(model, "policy")
        with torch.no_grad():
            assert not torch.equal(model.logprobs(batch, "policy").logprobs, bare)
            assert torch.equal(model.logprobs(batch, None).logprobs, bare)  # and off it is the base

    @KINDS
    def test_the_tree_is_its_rows(self, tiny_base: Path, quantize: Quantize) -> None:
        model = opened(tiny_base, quantize)
        assert model.way.packing == "tree"
        sequences = [[5, 6, 7, 8], [5, 6, 9], [4, 6]]
        with torch.no_grad():
            found, expected = (model.last_states(apart(sequences, way), None) for way in ("tree", "none"))
        assert (found - expected).norm() / expected.norm() < (1e-5 if quantize == "nf4" else 2e-2)

    @KINDS
    def test_what_is_sampled_has_the_probability_that_training_sees(self, tiny_base: Path, quantize: Quantize) -> None:
        model = opened(tiny_base, quantize, "bfloat16")
        model.add_adapter("policy", "policy", rank=4)
        randomise(model, "policy", size=0.05)
        second = [[7, 20], [8, 21], [9, 22]]
        states, cache = model.prefill(PROMPTS, "policy")
        cache.fork(1)
        logits = [model.logits(states, "policy")]
        logits.append(model.logits(model.decode(torch.tensor([7, 8, 9]), cache, "policy"), "policy"))
        with torch.no_grad():
            trained = model.logprobs(answers(PROMPTS, second), "policy").logprobs
        for place, given in enumerate(logits):
            tokens = torch.tensor([row[place] for row in second])
            sampled = torch.log_softmax(given, -1)[torch.arange(3), tokens]
            torch.testing.assert_close(sampled, trained[:, place], rtol=0, atol=0.1)

    @KINDS
    def test_a_saved_reward_model_scores_the_same_bit_for_bit(
        self, tiny_base: Path, tmp_path: Path, quantize: Quantize
    ) -> None:
        encoder = open_encoder(tiny_base)
        model = opened(tiny_base, quantize)
        model.add_adapter("reward", "reward", rank=4)
        randomise(model, "reward")
        saved.save_adapter(model, "reward", tmp_path / "adapter", encoder)
        batch = apart(PROMPTS)
        again = opened(tiny_base, quantize)
        saved.load_adapter(again, tmp_path / "adapter", "reward", encoder)
        with torch.no_grad():
            assert torch.equal(again.scores(batch, "reward"), model.scores(batch, "reward"))
        with pytest.raises(AdapterError, match=f"with quantize: {quantize}, and here it is loaded with quantize: none"):
            saved.load_adapter(opened(tiny_base, "none"), tmp_path / "adapter", "reward", encoder)

    @KINDS
    def test_the_same_is_loaded_every_time(self, tiny_base: Path, quantize: Quantize) -> None:
        first, second = (opened(tiny_base, quantize, "bfloat16") for _ in range(2))
        for (path, one), (_, other) in zip(quantised_layers(first.base), quantised_layers(second.base), strict=True):
            assert torch.equal(one.dense(), other.dense()), path

    def test_peft_gives_the_same_on_the_base_that_bitsandbytes_quantises(self, tiny_base: Path, tmp_path: Path) -> None:
        from peft import PeftModel

        model, encoder = opened(tiny_base, "nf4"), open_encoder(tiny_base)
        model.add_adapter("sft", "sft", rank=4, alpha=10.0)
        randomise(model, "sft")
        saved.save_adapter(model, "sft", tmp_path / "adapter", encoder)
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, quantization_config=settings)
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        with torch.no_grad():
            found = model.logprobs(answers(PROMPTS, COMPLETIONS), "sft").logprobs
        for row, prompt, completion in zip(found, PROMPTS, COMPLETIONS, strict=True):
            expected = reference_logprobs(theirs, prompt, completion)
            # bitsandbytes' own product in bfloat16 on CPUs that have one
            torch.testing.assert_close(row[: len(completion)], expected, rtol=0, atol=0.15)

    def test_full_tuning_is_refused(self, tiny_base: Path) -> None:
        with pytest.raises(AdapterError, match="tuning: full learns all weights, and those of this base are quantised"):
            opened(tiny_base, "nf4").add_adapter("sft", "sft", tuning="full")


def test_an_adapted_layer_computes_with_several_adapters(tiny_base: Path) -> None:
    model = opened(tiny_base, "nf4")
    model.add_adapter("sft", "sft", rank=4, targets="all")
    randomise(model, "sft", 1)
    model.add_adapter("policy", "policy", rank=2, targets="all", beneath="sft")
    randomise(model, "policy", 2)
    own = layer(model)
    assert isinstance(own, AdaptedLinear) and own.quantised is not None
    plain = read_back(tiny_base, model)
    with torch.no_grad():
        for name in ("sft", "policy"):
            for path, pair in model.adapters[name].pairs.items():
                plain.get_parameter(f"{path}.weight").add_(pair.scale * pair.b @ pair.a)
        found: Tensor = model.logprobs(answers(PROMPTS, COMPLETIONS), "policy").logprobs
    for row, prompt, completion in zip(found, PROMPTS, COMPLETIONS, strict=True):
        expected = reference_logprobs(plain, prompt, completion)
        torch.testing.assert_close(row[: len(completion)], expected, rtol=0, atol=1e-4)


class TestFamilies:
    """Those whose layers are of another kind, are called otherwise, or aren't called."""

    @pytest.mark.parametrize(
        "config",
        [
            GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, eos_token_id=1, bos_token_id=1),
            DeepseekV3Config(
                **SMALL,
                num_key_value_heads=4,
                q_lora_rank=32,
                kv_lora_rank=32,
                qk_rope_head_dim=8,
                qk_nope_head_dim=16,
                v_head_dim=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=64,
                first_k_dense_replace=1,
            ),
            FalconH1Config(
                **SMALL, num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8
            ),
        ],
        ids=lambda config: config.model_type,
    )
    @KINDS
    def test_they_are_the_plain_network_with_an_adapter_merged(
        self, tmp_path: Path, config: Any, quantize: Quantize
    ) -> None:
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        model = opened(tmp_path, quantize)
        adapter = model.add_adapter("sft", "sft", rank=4, targets="all")
        randomise(model, "sft", size=0.1)
        plain = merged_network(model, adapter, Base(tmp_path), torch.float32)
        ids = [5, 6, 7, 8, 9, 10]
        with torch.no_grad():
            found = model.logits(model.last_states(apart([ids], model.packing("auto")), "sft"), "sft")[0]
            expected = plain(input_ids=torch.tensor([ids])).logits[0, -1]
        tolerance = 1e-4 if quantize == "nf4" else 0.1
        assert (found - expected).norm() / expected.norm() < tolerance

    @KINDS
    def test_one_that_reads_its_layers_weights_itself_is_refused(self, tmp_path: Path, quantize: Quantize) -> None:
        config = MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, state_size=8)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="MambaForCausalLM doesn't compute with quantised layers") as error:
            opened(tmp_path, quantize)
        assert "leave quantize out" in str(error.value)
