"""`perlhf base`: what is told of a base whose weights nobody reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig, MistralConfig, PreTrainedConfig, Qwen3NextConfig

from perlhf.commands.base import describe
from perlhf.commands.cli import main
from perlhf.config.commands import BaseConfig
from perlhf.model import foretold, ways
from perlhf.model.bases.found import Base
from perlhf.model.model import Model
from perlhf.system import before_torch

SMALL: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(before_torch, "expected", lambda: "libtcmalloc.so")


def written(directory: Path, tiny_base: Path, config: PreTrainedConfig) -> str:
    """A base of this configuration with the tiny tokenizer, whose weights can't be read."""
    shutil.copytree(tiny_base, directory)
    config.save_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"never read")
    return str(directory)


def test_facts_of_a_plain_base_by_hand(tiny_base: Path) -> None:
    facts = describe(BaseConfig(base=str(tiny_base), dtype="float32", device="cpu"))
    # Embedding 272 x 64 (the head's too); q, o: 64 x 64, k, v: 32 x 64, three of 128 x 64, two norms; the last norm.
    parameters = 272 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64) + 64
    assert facts["parameters"] == parameters
    assert (facts["family"], facts["class"], facts["layers"]) == ("llama", "LlamaForCausalLM", {"full attention": 2})
    assert facts["way"]["packing"] == "tree" and facts["way"]["source"].startswith("as found on a small copy")
    assert facts["dtype"]["dtype"] == "float32" and facts["quantisation"] == "none" and facts["context"] == 512
    assert facts["vocabulary"] == {"rows": 272, "tokens": 272, "tied": True}
    assert facts["chat_template"] == "its own (chat_template.jinja)"
    assert facts["end_tokens"] == [{"id": 1, "text": "<|im_end|>"}]
    attention = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32))
    assert facts["adapters"]["attention"] == {
        "layers": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 2),
        "rank": 16,
        "parameters": attention,
    }
    assert facts["adapters"]["all"]["parameters"] == attention + 2 * 16 * 3 * (64 + 128)
    memory = facts["memory_bytes"]
    assert [parts["base"] for parts in memory.values()] == 3 * [4 * parameters]
    assert memory["sft"]["adapters and optimiser"] == 16 * attention
    assert memory["reward"]["adapters and optimiser"] == 16 * (attention + 64)
    # Policy and value learn; the reference and a reward model are held.
    assert memory["policy"]["adapters and optimiser"] == 16 * (2 * attention + 64 + 1)
    assert memory["policy"]["frozen adapters"] == 2 * 4 * attention
    assert all(parts["total"] == sum(parts.values()) - parts["total"] for parts in memory.values())


def test_the_way_is_that_which_loading_found(tiny_base: Path) -> None:
    Model.load(Base(tiny_base), "float32", "cpu")
    assert describe(BaseConfig(base=str(tiny_base), dtype="float32", device="cpu"))["way"] == {
        "packing": "tree",
        "why": "",
        "source": "as found when it was last loaded",
        "said": "tree of shared prefixes (as found when it was last loaded)",
    }
    other = describe(BaseConfig(base=str(tiny_base), dtype="bfloat16", device="cpu"))
    assert other["way"]["source"] == "as found on a small copy with random weights"


def test_layers_by_what_they_see_and_by_what_they_are_called(tiny_base: Path, tmp_path: Path) -> None:
    windowed = written(tmp_path / "windowed", tiny_base, MistralConfig(**SMALL, sliding_window=7))
    assert describe(BaseConfig(base=windowed))["layers"] == {"window of 7": 4}
    hybrid = Qwen3NextConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16)
    facts = describe(BaseConfig(base=written(tmp_path / "hybrid", tiny_base, hybrid)))
    assert facts["layers"] == {"linear attention": 3, "full attention": 1}
    assert (facts["way"]["packing"], facts["way"]["why"]) == ("none", "it has linear_attention layers")
    assert facts["notes"] == [
        "experts that are fused into one tensor are not adapted: gate_up_proj, down_proj (8 tensors)"
    ]


def test_without_attention_all_is_adapted_and_layers_that_are_not_called_are_left_out(
    tiny_base: Path, tmp_path: Path
) -> None:
    small = {key: value for key, value in SMALL.items() if "heads" not in key and key != "intermediate_size"}
    base = written(tmp_path / "mamba", tiny_base, MambaConfig(**small, state_size=8, tie_word_embeddings=False))
    facts = describe(BaseConfig(base=base))
    assert facts["adapters"]["attention"]["error"].startswith("nothing: adapter targets 'attention' match no linear")
    # dt_proj's weight is read without a call.
    assert facts["adapters"]["all"]["layers"] == dict.fromkeys(("in_proj", "x_proj", "out_proj"), 4)
    assert not facts["vocabulary"]["tied"] and facts["context"] is None
    assert facts["memory_bytes"]["sft"]["adapters and optimiser"] == 16 * facts["adapters"]["all"]["parameters"]


def test_what_no_small_copy_can_be_made_of_is_found_out_later(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: PreTrainedConfig) -> None:
        raise ValueError("sizes must go together\nand so on")

    monkeypatch.setattr(foretold, "_random", refuse)
    facts = describe(BaseConfig(base=str(tiny_base)))
    assert facts["way"]["packing"] is None and facts["logits"] is None
    later = "found out when it is loaded, since a small copy of it doesn't compute (ValueError: sizes must go together)"
    assert facts["way"]["said"] == later
    assert facts["layers"] == {"LlamaDecoderLayer": 2}


def test_the_command_prints_a_narrow_table_or_json(
    tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["base", str(tiny_base)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "\x1b" not in printed
    assert "q_proj, k_proj, v_proj, o_proj (2 each): 14,336" in printed and "tree of shared prefixes" in printed
    assert main(["base", str(tiny_base), "--json", "--dtype", "float32"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layers"] == {"full attention": 2} and facts["dtype"]["dtype"] == "float32"


def test_what_can_be_no_base_is_one_error(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = Path(shutil.copytree(tiny_base, tmp_path / "bert"))
    (bert / "config.json").write_text('{"model_type": "bert", "vocab_size": 272}')
    for name, said in (
        (str(tmp_path / "nowhere"), "no such directory"),
        ("nobody/nothing", "is not in the local hub cache"),
        (str(bert), "bert can't be a base: it attends to later tokens"),
    ):
        assert main(["base", name]) == 2
        told = capsys.readouterr()
        assert said in told.err and "Traceback" not in told.err and not told.out
    assert main(["base", str(tiny_base), "--device", "cuda:7"]) == 2
    assert "device cuda:7 isn't available here" in capsys.readouterr().err
