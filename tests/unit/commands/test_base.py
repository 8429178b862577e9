"""`perlhf base` and `perlhf plan`: what is told of a base whose weights nobody reads."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from perlhf.commands.base import describe, forecast
from perlhf.commands.cli import main
from perlhf.config.commands import BaseConfig, PlanConfig
from perlhf.config.stages import AdapterConfig, EncodingConfig, PolicyConfig, RewardConfig, SftConfig
from perlhf.errors import ModelError
from perlhf.model import ways
from perlhf.model.bases import found
from perlhf.model.bases.found import Base
from perlhf.model.foretold import way
from perlhf.model.foretold.memory import LIBRARIES_BYTES, memory_of
from perlhf.model.foretold.sizes import Devices, Shape, gathers_of
from perlhf.model.model import Model
from perlhf.parallel.traffic import Lengths
from perlhf.rollout.vllm.memory import CONTEXT_BYTES
from perlhf.system import before_torch
from perlhf.training.plan import Part, Weights, seconds_of

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
    assert memory["sft"]["adapter sft"] == 16 * attention
    assert memory["reward"]["adapter reward"] == 16 * (attention + 64)
    # Policy and value learn; the reference and a reward model are held.
    assert (memory["policy"]["adapter policy"], memory["policy"]["adapter value"]) == (
        16 * attention,
        16 * (attention + 65),
    )
    assert memory["policy"]["reference"] == memory["policy"]["reward adapters"] == 4 * attention
    for parts in memory.values():  # the larger of learning and sampling counts
        passing = [parts.pop(name) for name in ("activations", "sampling") if name in parts]
        assert parts.pop("total") == sum(parts.values()) + max(passing)


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
    assert facts["memory_bytes"]["sft"]["adapter sft"] == 16 * facts["adapters"]["all"]["parameters"]


def test_what_no_small_copy_can_be_made_of_is_found_out_later(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: PreTrainedConfig) -> None:
        raise ValueError("sizes must go together\nand so on")

    monkeypatch.setattr(way, "_random", refuse)
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


# ---- perlhf plan ----------------------------------------------------------------------------------------------------

RATES: dict[str, Any] = {"flops": "100T", "read": "1TB", "link": "10GB"}


def configured(directory: Path, config: PreTrainedConfig) -> str:
    """A directory with a configuration and nothing else."""
    config.save_pretrained(directory)
    return str(directory)


def meta(config: PreTrainedConfig) -> Any:
    """A network without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_plan_by_hand_of_a_configuration_alone(tmp_path: Path) -> None:
    base = configured(tmp_path / "base", LlamaConfig(**SMALL, tie_word_embeddings=False))
    config = RewardConfig(base=base, examples_per_update=2, encoding=EncodingConfig(max_tokens=64))
    asked = PlanConfig(devices=2, device_memory="1GB", prompt_tokens=32, completion_tokens=16, **RATES)
    facts = forecast(asked, config)
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64
    weights = 2 * 272 * 64 + 4 * layer + 64
    trained = 4 * 16 * (2 * 128 + 2 * 96) + 64
    assert (facts["device"], facts["dtype"], facts["shard"], facts["fits"]) == ("cuda", "bfloat16", "none", True)
    assert facts["memory_bytes"] == {
        "libraries": LIBRARIES_BYTES,
        "base": 2 * weights,
        "adapter reward": 16 * trained,
        # The share of a worker, 2 x (32 + 2 x 16) tokens of two: 3 x 64, four times 4 heads of 16 (keys and values are
        # repeated under a mask), 2 x 128. A mask.
        "activations": 64 * 4 * (192 + 256 + 256) * 2 + 4 * 64**2,
        "sums of gradients": 20 * trained,
        "total": LIBRARIES_BYTES + 2 * weights + 16 * trained + max(64 * 4 * 704 * 2 + 4 * 64**2, 20 * trained),
    }
    # Piece and sum of 16,000 odd numbers are sent in pieces; the other worker's half each time.
    received = 2 * -(-(33 + trained) // 2) * 4 + 4 * 8 + 4 if 33 + trained > 16_384 else (33 + trained) * 4 + 4 * 8 + 4
    assert facts["exchanged_bytes"]["total"] == received
    # Two operations a weight of the layers, and 4 x 4 heads of 16 for each of 24 tokens seen in 4 layers; twice.
    forward = 2 * (4 * layer + 64) + 4 * 4 * 4 * 16 * 24
    assert facts["seconds"]["learning"]["seconds"] == pytest.approx(64 * forward * 2 / 100e12)
    assert facts["seconds"]["exchange"]["seconds"] == pytest.approx(received / 10e9)
    assert facts["updates_per_hour"] == pytest.approx(3600 / (64 * forward * 2 / 100e12 + received / 10e9))
    # Recomputed, each layer keeps its input of 64 and one of them the rest; and computes forward once more.
    again = forecast(asked, config.model_copy(update={"recompute": "always"}))
    assert again["memory_bytes"]["activations"] == 64 * (4 * 64 + 704) * 2 + 4 * 64**2
    assert again["seconds"]["learning"]["seconds"] == pytest.approx(64 * forward * 3 / 100e12)
    assert (facts["recompute"], again["recompute"]) == (False, True)


def test_memory_of_a_server_that_samples_by_hand(tmp_path: Path) -> None:
    base = configured(tmp_path / "base", LlamaConfig(**SMALL, tie_word_embeddings=False))
    given: dict[str, Any] = {"prompts_per_update": 4, "completions_per_prompt": 2, "adapter": AdapterConfig(rank=12)}
    config = PolicyConfig(base=base, reward=("a:b",), sampler="vllm", staleness=1, **given)
    asked = PlanConfig(device_memory="20GB", prompt_tokens=32, completion_tokens=16)
    facts = forecast(asked, config)
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    # Ranks 1, 8, 16: three slots of 16, for all linear layers and the head.
    slots = 3 * 16 * (4 * (2 * 128 + 2 * 96 + 3 * 192) + 64 + 272) * 2
    found = facts["server_memory_bytes"]
    assert found == {
        "processes": CONTEXT_BYTES,
        "base": 2 * (2 * 272 * 64 + 4 * (layer + 2 * 64) + 64),
        "adapters": slots,
        # Keys and values of 2 heads of 16 in 4 layers: prompts once, eight completions.
        "cache": (4 * 32 + 8 * 16) * 4 * 2 * 2 * 16 * 2,
        "step": 2048 * (3 * 64 + 2 * 6 * 16 + 3 * 128) * 2 + 8 * 272 * 4 * 3,
        "total": sum(size for what, size in found.items() if what != "total"),
    }
    share = math.ceil(100 * found["total"] / 20e9) / 100
    assert facts["server_said"].endswith(f"--gpu-memory-utilization {share:.2f} there")
    assert "don't fit" in forecast(asked.model_copy(update={"device_memory": "1GB"}), config)["server_said"]
    assert forecast(asked, config.model_copy(update={"device": "cpu"}))["server_said"].endswith(
        "VLLM_CPU_KVCACHE_SPACE=1 in its environment there"
    )
    assert not forecast(asked, config.model_copy(update={"sampler": "local"}))["server_memory_bytes"]


def test_what_does_not_fit_is_spread_where_that_helps(tmp_path: Path) -> None:
    wide: dict[str, Any] = SMALL | {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "vocab_size": 1024,
    }
    base = configured(tmp_path / "base", LlamaConfig(**wide))
    config = SftConfig(base=base, encoding=EncodingConfig(max_tokens=32), examples_per_update=64)
    whole = forecast(PlanConfig(devices=16, device_memory="10GB", **RATES), config)
    assert whole["shard"] == "none" and whole["fits"]
    total, by = whole["memory_bytes"]["total"], whole["memory_by_shard_bytes"]
    assert total == by["none"] > by["node"] > by["full"]
    node = forecast(PlanConfig(devices=16, device_memory=str(by["node"]), **RATES), config)
    assert (node["shard"], node["shards"], node["fits"]) == ("node", 8, True)
    assert "within the 15% that the estimate may be off" in node["said"]
    assert "base" in node["exchanged_bytes"] and "base" not in whole["exchanged_bytes"]
    none = forecast(PlanConfig(devices=16, device_memory=str(by["full"] // 2), **RATES), config)
    assert (none["shard"], none["fits"]) == ("full", False) and none["said"].startswith("does not fit")
    asked = forecast(PlanConfig(devices=16, device_memory="10GB", shard="full", **RATES), config)
    assert (asked["shard"], asked["shards"]) == ("full", 16)
    with pytest.raises(ModelError, match="a base whose own weights are trained is whole on each device"):
        forecast(PlanConfig(devices=2, shard="full"), config.model_copy(update={"tuning": "full"}))


def test_a_base_in_parts_by_hand() -> None:
    network = meta(LlamaConfig(**SMALL, tie_word_embeddings=False))
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64
    gathers = gathers_of(network, 2, 4)
    assert gathers is not None and gathers_of(network, 2, 1) is None
    # Three of four parts of each tensor: all first dimensions can be divided by four.
    assert gathers.forward == 3 * 2 * (4 * layer + 64) // 4
    memory = memory_of(SftConfig(device="cuda"), network, {"sft": 1000}, Devices(4, 4))
    # Embedding and head are whole on each of them.
    assert memory.held["base"] == 2 * (4 * layer + 64) // 4 + 2 * 2 * 272 * 64
    # Attention and norms, with a copy of them, and one linear layer of the MLP, gathered before.
    assert memory.held["gathered layers"] == 2 * (2 * (layer - 3 * 128 * 64) + 128 * 64)


def test_the_sampler_is_counted_where_it_takes_more_than_learning() -> None:
    network = meta(LlamaConfig(**SMALL))
    few: dict[str, Any] = {
        "prompts_per_update": 8,
        "completions_per_prompt": 4,
        "max_completion_tokens": 100,
        "centre_prompts": 2,
    }
    config = PolicyConfig(device="cuda", reward=("a:b",), validation_prompts=2, tokens_per_microbatch=8, **few)
    memory = memory_of(config, network, {"policy": 1, "value": 1}, Devices(2), Lengths(300, 100))
    # A worker's four prompts of 300 tokens and their 16 rows of 100: keys and values of 4 layers, two heads of 16; and
    # the prompts in one layer, which is more than 16 rows of logits.
    prefill = 4 * 300 * (3 * 64 + 2 * 6 * 16 + 3 * 128) * 2
    assert memory.passing["sampling"] == (4 * 300 + 16 * 100) * 4 * 2 * 32 * 2 + prefill
    assert memory.total == sum(memory.held.values()) + memory.passing["sampling"]
    # Two prompts with their four rows each have a place; beside them all four prompts wait.
    turns = config.model_copy(update={"max_rows": 9})
    memory = memory_of(turns, network, {"policy": 1, "value": 1}, Devices(2), Lengths(300, 100))
    assert memory.passing["sampling"] == (4 * 300 + 2 * 300 + 8 * 100) * 4 * 2 * 32 * 2 + prefill


def test_one_update_ahead_both_are_in_memory_and_take_the_longer_time() -> None:
    network = meta(LlamaConfig(**SMALL))
    config = PolicyConfig(device="cpu", dtype="float32", reward=("a:b",), staleness=1)
    trainable = {"policy": 100, "value": 101}
    memory = memory_of(config, network, trainable)
    assert memory.held["adapter that samples"] == 400
    assert memory.total == sum(memory.held.values()) + memory.passing["activations"] + memory.passing["sampling"]
    assert "both at once" not in memory_of(config.model_copy(update={"device": "cuda"}), network, trainable).passing
    parts = {"sampling": Part(3.0, "reading weights"), "learning": Part(2.0, "computing")}
    assert (seconds_of(config, parts), seconds_of(config.model_copy(update={"staleness": 0}), parts)) == (3.0, 5.0)
    parts["sampling"] = Part(3.0, "computing")
    assert seconds_of(config, parts) == 5.0


def test_a_token_goes_through_some_experts() -> None:
    sizes: Any = SMALL | {"num_local_experts": 8, "num_experts_per_tok": 2}
    network = meta(MixtralConfig(**sizes))
    shape, weights = Shape.of(network.config), Weights.of(network)
    assert (shape.experts, shape.experts_of_token, shape.feed_forward) == (8, 2, 2 * 128)
    assert weights.expert == 4 * 8 * 3 * 64 * 128
    assert weights.plain == 4 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 64 + 8 * 64) + 64


def test_the_command_tells_all_stages_or_that_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = configured(tmp_path / "base", LlamaConfig(**SMALL))
    own = ["--base", base, "--devices", "2", "--device-memory=1GB", "--flops", "1T", "--read", "1GB", "--json"]
    assert main(["plan", *own]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["sft", "reward", "policy"]
    assert facts["policy"]["memory_bytes"]["reference"] == facts["policy"]["memory_bytes"]["reward adapters"] > 0
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("reward: [runs/reward]\nadapter: {rank: 8}\n")
    assert main(["plan", str(recipe), *own, "--adapter.rank", "2"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert list(again) == ["policy"]
    assert again["policy"]["trainable"]["policy"] == 2 * 4 * (2 * 128 + 2 * 96)
    assert main(["plan", str(recipe), *own[:-1]]) == 0
    assert "fits: the base whole on each device" in " ".join(capsys.readouterr().out.replace("│", "").split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device-memory", "80XB"], ["--device-memory", "unknown unit, XB", "GiB"]),
        (["--device-memory", "much"], ["'much' is no number above 0 with a unit", "80GB"]),
        (["--link", "0GB"], ["--link", "no number above 0"]),
        (["--devices", "0"], ["--devices", "0", "above 0"]),
        (["--base", "nowhere/at/all"], ["no such directory: nowhere/at/all"]),
        (["--base", "EMPTY"], ["has no config.json"]),
        (["mine.yaml"], ["mine.yaml", "a recipe for sft or reward", "--stage sft"]),
        (["missing.yaml"], ["missing.yaml"]),
        (["word"], ["'word' is not a recipe"]),
    ],
)
def test_bad_input_is_one_error(
    words: list[str],
    said: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("epochs: 2\n")
    (tmp_path / "EMPTY").mkdir()
    try:
        code = main(["plan", *words])
    except SystemExit as stopped:
        code = stopped.code
    told = capsys.readouterr()
    assert code == 2 and not told.out and "Traceback" not in told.err
    for part in said:
        assert part in " ".join(told.err.split()), told.err


def test_a_hub_that_cannot_be_reached_is_one_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(**wanted: Any) -> str:
        raise LocalEntryNotFoundError(f"no {wanted['filename']}")

    monkeypatch.setattr(found.huggingface_hub, "hf_hub_download", unreachable)
    assert main(["plan", "--base", "nobody/nothing"]) == 2
    assert "base nobody/nothing could not be fetched" in capsys.readouterr().err


def test_the_hubs_configuration_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(tmp_path / "kept", LlamaConfig(**SMALL))
    asked: list[dict[str, Any]] = []

    def fetched(**wanted: Any) -> str:
        asked.append(wanted)
        return str(tmp_path / "kept" / "config.json")

    monkeypatch.setattr(found.huggingface_hub, "hf_hub_download", fetched)
    facts = forecast(PlanConfig(device_memory="1GB"), SftConfig(base="somebody/something@abc"))
    assert asked == [{"repo_id": "somebody/something", "filename": "config.json", "revision": "abc"}]
    assert facts["parameters"] == meta(LlamaConfig(**SMALL)).num_parameters()
    assert facts["updates_per_hour"] is None or facts["updates_per_hour"] > 0
