"""Networks and adapters as GGUF files: what our reader makes of a file is the network that went in."""

import errno
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import BYTE_LEVEL, FAMILIES, HEADS, logits, random_network, rope
from gguf_written import WRITTEN, network_tokenizer, random_adapter, write
from transformers import AutoModelForCausalLM

from perlhf.errors import ModelError
from perlhf.method.lora import LowRank
from perlhf.model.adapter import Adapter
from perlhf.model.bases.found import Base
from perlhf.model.bases.gguf.header import read_header
from perlhf.model.bases.gguf.tokenizer import read_tokenizer
from perlhf.model.bases.loading import end_ids
from perlhf.model.merged import rounded_to
from perlhf.model.to_gguf.files import interleaved, write_adapter
from perlhf.model.to_gguf.settings import check_shape


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "cache"))


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {str(one.name): torch.tensor(one.data.copy()) for one in gguf.GGUFReader(file).tensors}


def settings(file: Path) -> dict[str, Any]:
    return {name: one.contents() for name, one in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("family", WRITTEN)
def test_a_network_is_read_as_it_was_written(family: str, tmp_path: Path):
    network = random_network(family)
    file = write(tmp_path / "a.gguf", network)
    base = Base.find(str(file))
    read = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    ids = [index % (len(BYTE_LEVEL) - 3) + 2 for index in range(7, 47, 3)]
    expected, found = logits(network, ids), logits(read, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    text = "12 ab</s>abab 21"
    assert read_tokenizer(read_header(file))(text)["input_ids"] == network_tokenizer()(text)["input_ids"]
    assert end_ids(base) == (1,)


def test_the_packaged_base_is_read_as_it_was_written(smollm2: Path, tmp_path: Path):
    """Four of its layers and the first rows of its embedding, in bfloat16: to the last bit."""
    whole = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    whole.resize_token_embeddings(len(BYTE_LEVEL), mean_resizing=False)
    del whole.model.layers[4:]
    whole.config.num_hidden_layers = 4
    file = write(tmp_path / "a.gguf", whole, torch.bfloat16)
    read = AutoModelForCausalLM.from_pretrained(Base.find(str(file)).directory, dtype=torch.bfloat16)
    assert all(torch.equal(weight, read.state_dict()[name]) for name, weight in whole.state_dict().items())
    ids = list(range(2, 60))
    assert torch.equal(logits(read, ids), logits(whole.eval(), ids))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("dtype", "kind", "name"), [(torch.float32, 0, "F32"), (torch.float16, 1, "F16"), (torch.bfloat16, 32, "BF16")]
)
def test_the_file_says_its_dtype_and_has_it(family: str, dtype: torch.dtype, kind: int, name: str, tmp_path: Path):
    network = random_network(family)
    file = write(tmp_path / "a.gguf", network, dtype)
    assert settings(file)["general.file_type"] == kind
    for one in gguf.GGUFReader(file).tensors:
        assert one.tensor_type.name == ("F32" if len(one.shape) == 1 else name), one.name
    read = AutoModelForCausalLM.from_pretrained(Base.find(str(file)).directory, dtype=torch.float32)
    rounded_to(network, dtype)
    ids = list(range(2, 30))
    torch.testing.assert_close(logits(read, ids), logits(network, ids), rtol=0, atol=1e-3)


def test_heads_pair_neighbours():
    """Two heads of four rows: halves (0, 1 | 2, 3) become 0, 2, 1, 3."""
    rows = torch.arange(8.0)[:, None] * torch.ones(1, 3)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_an_adapter_on_its_base_is_the_merged_network(family: str, tmp_path: Path):
    """As llama.cpp computes it: W + alpha / rank B A of each layer, whose rank is its own."""
    network = random_network(family)
    adapter = random_adapter(network)
    base = tensors(write(tmp_path / "base.gguf", network))
    write_adapter(tmp_path / "adapter.gguf", network.config, adapter, "tiny policy")
    with torch.no_grad():
        for path, pair in adapter.pairs.items():
            network.get_parameter(f"{path}.weight").add_(pair.scale * pair.b @ pair.a)
    merged = tensors(write(tmp_path / "merged.gguf", network))
    pairs, said = tensors(tmp_path / "adapter.gguf"), settings(tmp_path / "adapter.gguf")
    assert (said["general.type"], said["adapter.type"], said["adapter.lora.alpha"]) == ("adapter", "lora", 8.0)
    assert said["general.architecture"] == FAMILIES[family][0]
    assert len(pairs) == 2 * len(adapter.pairs) == 2 * 7 * 2
    for name, weight in merged.items():
        expected = base[name]
        if f"{name}.lora_a" in pairs:
            a, b = pairs[f"{name}.lora_a"], pairs[f"{name}.lora_b"]
            expected = expected + 8.0 / a.shape[0] * b @ a
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)


def test_an_alpha_of_zero_stays_no_update(tmp_path: Path):
    """llama.cpp takes an alpha of 0 for none, and would add B A as it is."""
    network = random_network("llama")
    adapter = Adapter("sft", "sft", rank=1, alpha=0.0)
    path = "model.layers.0.self_attn.q_proj"
    a, b = (torch.nn.Parameter(torch.ones(shape)) for shape in ((1, 32), (HEADS * 16, 1)))
    adapter.pairs[path] = LowRank(a, b, 0.0)
    write_adapter(tmp_path / "adapter.gguf", network.config, adapter, "tiny")
    assert settings(tmp_path / "adapter.gguf")["adapter.lora.alpha"] == 1.0
    assert not tensors(tmp_path / "adapter.gguf")["blk.0.attn_q.weight.lora_b"].any()


def test_rows_without_a_token_get_an_unused_one(tmp_path: Path):
    network = random_network("llama")
    network.resize_token_embeddings(len(BYTE_LEVEL) + 5, mean_resizing=False)
    said = settings(write(tmp_path / "a.gguf", network))
    assert said["llama.vocab_size"] == len(said["tokenizer.ggml.tokens"]) == len(BYTE_LEVEL) + 5
    assert said["tokenizer.ggml.token_type"][-5:] == [gguf.TokenType.UNUSED.value] * 5
    assert len(set(said["tokenizer.ggml.tokens"])) == len(BYTE_LEVEL) + 5


def test_a_policy_is_sampled_as_it_was_trained(tmp_path: Path):
    network = random_network("qwen3")
    said = settings(write(tmp_path / "a.gguf", network, sampling={"temperature": 0.75}))
    names = [f"general.sampling.{name}" for name in ("temp", "top_k", "top_p", "min_p")]
    assert [said[name] for name in names] == [0.75, 0, 1.0, 0.0]
    plain = settings(write(tmp_path / "b.gguf", network))
    assert not [name for name in plain if name.startswith("general.sampling")]


def test_what_float16_cannot_hold_is_refused(tmp_path: Path):
    network = random_network("llama")
    with torch.no_grad():
        network.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"blk.1.ffn_up.weight has values that float16 can't hold(.|\n)*--dtype bf"):
        write(tmp_path / "a.gguf", network, torch.float16)


def test_a_full_disk_has_its_number(tmp_path: Path):
    (tmp_path / "a.gguf").symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        write(tmp_path / "a.gguf", random_network("llama"))
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("family", WRITTEN)
def test_shapes_that_are_written_are_let_through(family: str):
    check_shape(random_network(family).config)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mistral", {}, "no GGUF file is written of a mistral network"),
        ("gpt2", {}, "no GGUF file is written of a gpt2 network"),
        ("qwen3moe", {}, "no GGUF file is written of a qwen3_moe network"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ("llama", rope(5000.0, rope_type="dynamic", factor=2.0), "its positions are stretched by dynamic"),
        ("qwen3", rope(5000.0, partial_rotary_factor=0.5), "only a part of each head is turned"),
        ("llama, yarn", {"rope_parameters": {"beta_fast": 16}}, "YaRN has other settings"),
        ("llama, yarn", {"rope_parameters": {"attention_factor": 1.5}}, "YaRN has other settings"),
        ("qwen3", {"attention_bias": True}, "its attention has biases"),
        ("qwen2", {"head_dim": 16}, "its heads are 16 wide"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "some of its layers see a window alone"),
        ("gemma3", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8, not 16"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "its logits are capped"),
        ("gemma3", {"use_bidirectional_attention": True}, "it reads in both directions"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(family: str, settings: dict[str, Any], message: str):
    config = random_network(family).config
    for key, value in settings.items():
        setattr(config, key, getattr(config, key) | value if isinstance(value, dict) else value)
    with pytest.raises(ModelError, match=message) as raised:
        check_shape(config)
    assert "Llama, Qwen 2, Qwen 3 and Gemma 3" in str(raised.value) and "leave out --gguf" in str(raised.value)
