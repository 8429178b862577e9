"""Plans: parameter counts worked by hand and compared with a real network, updates, memory, missing bases."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig, MixtralConfig

from perlhf.config.stages import (
    DEFAULT_BASE,
    AdapterConfig,
    DataConfig,
    EncodingConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
)
from perlhf.errors import AdapterError, ConfigError, DataError, ModelError, RunError
from perlhf.kernels import cpu
from perlhf.model.bases.loading import without_weights
from perlhf.model.encoding.encode import TooLong
from perlhf.model.foretold.memory import COMPILED_BYTES, FEW_BYTES, FREE_SHARE, memory_of
from perlhf.model.foretold.sizes import dtype_in_force
from perlhf.system import before_torch
from perlhf.training import plan as plans
from perlhf.training.loop import read_sides
from perlhf.training.plan import (
    count_records,
    count_updates,
    lora_parameters,
    plan,
    trainable_parameters,
)

DATA = DataConfig(limit=20)


def test_counts_of_the_packaged_base_need_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path))
    network = without_weights(DEFAULT_BASE)
    # Embedding 49152 x 576, then per layer q, o: 576 x 576, k, v: 192 x 576, three of 1536 x 576, two norms; last norm.
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576 + 2 * 576
    assert network.num_parameters() == 49152 * 576 + 30 * layer + 576
    assert lora_parameters(AdapterConfig(rank=1), network) == 30 * (2 * (576 + 576) + 2 * (576 + 192))
    everything = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    assert lora_parameters(AdapterConfig(rank=3, targets="all"), network) == 3 * 30 * everything
    assert lora_parameters(AdapterConfig(rank=2, targets=("up_proj", "layers.0.mlp.up_proj")), network) == 2 * 30 * 2112
    assert lora_parameters(AdapterConfig(rank=3, targets="all", layers="last:7"), network) == 3 * 7 * everything


def test_counts_agree_with_the_network(tiny_base: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    network = without_weights(str(tiny_base))
    assert network.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    full = trainable_parameters(SftConfig(tuning="full"), network)
    assert full == {"sft": network.num_parameters()}


def test_heads_are_counted(tiny_base: Path):
    network = without_weights(str(tiny_base))
    body = 2 * (2 * (64 + 64) + 2 * (64 + 32))  # 2 layers; q, o: 64 -> 64; k, v: 64 -> 32; rank 1
    rank1 = AdapterConfig(rank=1)
    assert trainable_parameters(RewardConfig(adapter=rank1), network) == {"reward": body + 64}
    policy = PolicyConfig(adapter=rank1, reward=("runs/r",))
    assert trainable_parameters(policy, network) == {"policy": body, "value": body + 64 + 1}
    without_value = policy.model_copy(update={"baseline": "leave_one_out"})
    assert trainable_parameters(without_value, network) == {"policy": body}


KINDS = {SftConfig: ("demonstration",), RewardConfig: ("rating",), PolicyConfig: ("prompt",)}


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        (SftConfig(examples_per_update=16), 7),
        (SftConfig(examples_per_update=16, epochs=3), 21),
        (SftConfig(examples_per_update=100), 1),
        (RewardConfig(examples_per_update=16, epochs=3, max_updates=5), 5),
        (PolicyConfig(updates=9, steps_per_rollout=2, clip=0.2, reward=("a:b",)), 18),
    ],
)
def test_updates_for_100_records(settings, updates):
    limited = settings.model_copy(update={"data": DataConfig(limit=100)})
    assert count_updates(limited, read_sides(limited, KINDS[type(settings)])) == updates


def test_limit_caps_each_split_and_an_empty_split_is_an_error(tmp_path: Path):
    whole = count_records(read_sides(SftConfig(), ("demonstration",)))
    assert sum(whole.values()) == 900, "the embedded set has 900 demonstrations"
    few = count_records(read_sides(SftConfig(data=DATA), ("demonstration",)))
    assert few == {"train": 20, "validation": 20, "test": 20}
    fewer = count_records(read_sides(SftConfig(data=DATA.model_copy(update={"limit_train": 5})), ("demonstration",)))
    assert fewer == {"train": 5, "validation": 20, "test": 20}
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError):
        count_records(read_sides(SftConfig(data=DataConfig(paths=(str(path),))), ("demonstration",)))
    # Nor without validation groups, which every stage needs; test groups it does not.
    with pytest.raises(DataError, match="validation split is empty"):
        count_records(
            read_sides(SftConfig(data=DataConfig(paths=(str(path),), validation=0, test=0)), ("demonstration",))
        )
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "b"}) + "\n" for i in range(20)))
    untested = SftConfig(data=DataConfig(paths=(str(path),), validation=0.5, test=0))
    assert count_records(read_sides(untested, ("demonstration",)))["test"] == 0


def test_the_way_is_told_and_a_tree_that_cannot_be_is_refused(tiny_base: Path, tmp_path: Path):
    plain = SftConfig(base=str(tiny_base), dtype="float32", device="cpu", data=DATA)
    assert plan(plain).way.startswith("tree of shared prefixes (as found ")
    assert plan(plain.model_copy(update={"packing": "none"})).way == "rows, as packing: none asks"
    mamba = Path(shutil.copytree(tiny_base, tmp_path / "mamba"))
    MambaConfig(vocab_size=272, hidden_size=32, num_hidden_layers=2, eos_token_id=1).save_pretrained(mamba)
    rows = plain.model_copy(update={"base": str(mamba), "adapter": AdapterConfig(rank=1, targets="all")})
    found = plan(rows)
    why = "rows, slower than a tree: it has linear_attention layers"
    assert found.way == f"{why} (as found on a small copy with random weights)"
    # In and out 32 -> 128, 64 -> 32, x_proj 64 -> 2 + 2 x 16; dt_proj's weight is read without a call.
    assert found.trainable == {"sft": 2 * ((32 + 128) + (64 + 32) + (64 + 34))}
    with pytest.raises(ModelError, match="can't be computed as a tree: it has linear_attention layers"):
        plan(rows.model_copy(update={"packing": "tree"}))


def test_experts_that_are_not_adapted_are_noted(tiny_base: Path, tmp_path: Path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "experts"))
    sizes: dict[str, Any] = {
        "vocab_size": 272,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "eos_token_id": 1,
    }
    MixtralConfig(**sizes, intermediate_size=32, num_local_experts=4).save_pretrained(base)
    settings = SftConfig(base=str(base), data=DATA, adapter=AdapterConfig(targets="all"))
    fused = "experts that are fused into one tensor are not adapted: gate_up_proj, down_proj (4 tensors)"
    assert plan(settings).notes == (fused,)
    assert plan(settings.model_copy(update={"adapter": AdapterConfig()})).notes == ()
    named = settings.model_copy(update={"adapter": AdapterConfig(targets=("gate_up_proj",))})
    with pytest.raises(AdapterError, match="'gate_up_proj' names experts that are fused"):
        plan(named)


def test_memory_parts(tiny_base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(before_torch, "expected", lambda: "libtcmalloc.so")
    monkeypatch.setattr(cpu, "compiler", lambda: ("g++", "compiled"))
    settings = RewardConfig(base=str(tiny_base), dtype="float32", data=DATA, tokens_per_microbatch=100)
    planned = plan(settings)
    parameters = planned.base_parameters
    assert planned.memory.held["base"] == 4 * parameters
    assert planned.memory.held["adapter reward"] == 16 * planned.trainable["reward"]
    # Per token: 2 layers of 3 x 64 + 2 x (4 + 2) heads of 16 + 2 x 128 float32 numbers.
    layer = 192 + 192 + 256
    assert planned.memory.passing["activations"] == 100 * 2 * layer * 4
    top = settings.model_copy(update={"adapter": AdapterConfig(layers="last:1")})
    assert plan(top).memory.passing["activations"] == 100 * layer * 4
    everywhere = settings.model_copy(update={"adapter": AdapterConfig(targets="all")})
    assert plan(everywhere).memory.passing["activations"] == 100 * 2 * (layer + 64 + 128) * 4
    # 256 x 272 logits, twice.
    sft = SftConfig(base=str(tiny_base), dtype="float32", data=DATA, tokens_per_microbatch=100)
    assert plan(sft).memory.passing["activations"] == 100 * 2 * layer * 4 + 2 * 256 * 272 * 4
    monkeypatch.setattr(before_torch, "expected", lambda: "system")
    assert plan(settings).memory.passing["activations"] == 100 * 2 * layer * 4
    with monkeypatch.context() as without:
        without.setattr(cpu, "compiler", lambda: (None, "off"))
        # Without kernels keys and values are repeated for the heads that share them.
        masked = layer + 2 * (4 - 2) * 16
        assert plan(settings).memory.passing["activations"] == 2 * 100 * 2 * masked * 4
    full = plan(settings.model_copy(update={"tuning": "full"}))
    assert full.memory.held["adapter reward"] == 16 * (parameters + 64)
    assert full.memory.held["copies of the weights"] == 4 * parameters
    in_half = plan(settings.model_copy(update={"tuning": "full", "dtype": "bfloat16"}))
    assert in_half.memory.held["copies of the weights"] == 6 * parameters
    assert planned.total_bytes == sum(planned.memory.held.values()) + planned.memory.passing["activations"]
    # bfloat16 halves what is computed in it, and on a CPU its compiled products come on top.
    half = settings.model_copy(update={"dtype": "bfloat16"})
    assert plan(half).memory.held["base"] == 2 * parameters
    monkeypatch.setattr(before_torch, "expected", lambda: "libtcmalloc.so")
    assert FEW_BYTES < plan(half).memory.held["compiled products"] < COMPILED_BYTES
    whole = memory_of(half, without_weights(str(tiny_base)), planned.trainable)
    assert whole.held["compiled products"] == COMPILED_BYTES
    assert whole.passing == {"activations": 100 * 2 * layer * 2}
    monkeypatch.setattr(cpu, "compiler", lambda: (None, "off"))
    assert plan(half).memory.passing["activations"] == 2 * 100 * 2 * masked * 2  # holes, as under glibc
    assert "compiled products" not in planned.memory.held
    assert "compiled products" not in plan(half.model_copy(update={"device": "cuda:1"})).memory.held


def test_layers_that_are_recomputed_by_hand(tiny_base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "compiler", lambda: ("g++", "compiled"))
    settings = RewardConfig(base=str(tiny_base), dtype="float32", data=DATA, tokens_per_microbatch=100, device="cpu")
    kept, (layer, inputs) = plan(settings), (192 + 192 + 256, 2 * 64)
    always = plan(settings.model_copy(update={"recompute": "always"}))
    assert always.memory.passing["activations"] == 100 * (layer + inputs) * 4
    # Just enough is free: libraries, base, the adapter's weights, and a step with gradients and moments.
    step = 100 * 2 * layer * 4 + 12 * kept.trainable["reward"]
    held = kept.memory.held["libraries"] + kept.memory.held["base"] + 4 * kept.trainable["reward"]
    enough = held + math.ceil(step / FREE_SHARE)
    for free, memory in ((enough, kept.memory), (enough - 1, always.memory)):
        monkeypatch.setattr(plans, "free_memory_bytes", lambda device, free=free: free)
        found = plan(settings)
        assert found.memory == memory
        assert any("computed once more" in note for note in found.notes) == (free < enough)


def test_frozen_adapters_of_a_policy_are_counted(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "scores_of_a_plan.py").write_text("def f(completions):\n    return [0.0] * len(completions)\n")
    sft, first, second = (tmp_path / name for name in "sab")
    settings = PolicyConfig(
        base=str(tiny_base), data=DATA, sft=sft, reward=(str(first), str(second), "scores_of_a_plan:f")
    )
    for missing in (sft, first, second):
        with pytest.raises(RunError, match="no finished run"):
            plan(settings)
        (missing / "adapter").mkdir(parents=True)
    planned = plan(settings)
    assert planned.memory.held["reference"] == 4 * planned.trainable["policy"]
    assert planned.memory.held["reward adapters"] == 2 * 4 * planned.trainable["policy"]


def test_dtype_of_a_device_that_is_not_here():
    assert dtype_in_force("float32", "cuda") == "float32"
    assert dtype_in_force("auto", "cuda:1") == "bfloat16"
    assert dtype_in_force("auto", "cpu") in ("bfloat16", "float32")


def test_targets_that_match_nothing_name_the_nearest(tiny_base: Path):
    with pytest.raises(AdapterError, match="'q_porj' matches no linear layer") as caught:
        lora_parameters(AdapterConfig(targets=("q_porj",)), without_weights(str(tiny_base)))
    assert caught.value.hint == "q_proj"


def test_a_missing_base_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="perlhf pull nobody/nothing"):
        plan(SftConfig(base="nobody/nothing"))
    with pytest.raises(ModelError, match="perlhf pull` fetches"):
        plan(SftConfig(base="no such base!"))


def test_a_damaged_base_is_named(tiny_base: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    settings = SftConfig(base=str(copy), data=DATA)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model\.safetensors"):
        plan(settings)
    (copy / "model.safetensors").write_bytes(b"never read")
    assert plan(settings).base_parameters > 0
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="can't be loaded"):
        plan(settings)
    (copy / "config.json").write_text('{"model_type": "bert", "vocab_size": 272}')
    with pytest.raises(ModelError, match="bert can't be a base: it attends to later tokens"):
        plan(settings)


def test_checkpoints_of_a_full_policy_are_rarer():
    reward = ("a.module:function",)
    assert PolicyConfig(reward=reward).save_every == 1
    assert PolicyConfig(reward=reward, tuning="full").save_every == 20  # about 3 GB each on the small base
    assert PolicyConfig(reward=reward, tuning="full", checkpoint_every=5).save_every == 5


def test_a_dry_run_renders_records_as_training_does(tiny_base: Path, tmp_path: Path):
    template = tmp_path / "t.jinja"
    texts = [("tea?", "sure"), ("milk?", "a" * 200)]
    lines = [json.dumps({"prompt": p, "completion": c, "group": f"g{i}"}) for i in range(30) for p, c in texts]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    data = DataConfig(paths=(str(tmp_path / "talk.jsonl"),), validation=0.3, test=0.2)
    settings = SftConfig(base=str(tiny_base), data=data, encoding=EncodingConfig(template=str(template)))
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert plan(settings).records["train"] > 0
    short = settings.encoding.model_copy(update={"max_tokens": 100})
    with pytest.raises(TooLong, match="does not fit"):
        plan(settings.model_copy(update={"encoding": short}))
    assert plan(settings.model_copy(update={"encoding": short.model_copy(update={"drop_long": True})}))
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ 1/0 }}")
    for changed in (settings, RewardConfig(base=str(tiny_base), data=DATA, encoding=settings.encoding)):
        with pytest.raises(DataError, match="division by zero"):
            plan(changed)


def test_a_dry_run_of_a_policy_renders_prompts(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "scores_of_a_dry_run.py").write_text("def f(completions):\n    return [0.0] * len(completions)\n")
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}{% if add_generation_prompt %}{{ 1/0 }}{% endif %}")
    settings = PolicyConfig(base=str(tiny_base), data=DATA, reward=("scores_of_a_dry_run:f",))
    assert plan(settings).updates == settings.updates
    with pytest.raises(DataError, match="division by zero"):
        plan(settings.model_copy(update={"encoding": EncodingConfig(template=str(tmp_path / "t.jinja"))}))
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        plan(settings.model_copy(update={"max_completion_tokens": settings.encoding.max_tokens}))
