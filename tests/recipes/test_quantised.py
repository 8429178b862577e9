"""Whole commands on the tiny base with quantised layers: trained, continued, measured, exported, refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import apart
from toy import metrics, read_json
from transformers import AutoModelForCausalLM

from perlhf.data.records import Rating
from perlhf.data.splits import load
from perlhf.model.bases.found import Base
from perlhf.model.finished import read_run
from perlhf.model.model import Model

# peft asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
KINDS = pytest.mark.parametrize("quantize", ["nf4", "int8"])


def blocks(directory: Path) -> list[str]:
    text = (directory / "README.md").read_text("utf-8")
    return [
        block.replace("DIRECTORY", str(directory)) for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


@KINDS
def test_a_policy_learns_on_a_quantised_base_and_starts_at_a_kl_of_exactly_zero(stage: Any, perlhf: Any, quantize: str):
    reward, done = stage("reward", "--quantize", quantize)
    assert done.code == 0, done.err
    policy, done = stage("policy", "--quantize", quantize, "--reward", str(reward))
    assert done.code == 0, done.err
    lines = metrics(policy)
    assert lines[0]["kl"] == 0 and lines[-1]["kl"] != 0
    assert read_json(policy / "manifest.json")["facts"]["base"]["quantize"] == quantize
    assert read_json(reward / "adapter" / "perlhf.json")["base"]["quantize"] == quantize
    assert perlhf("evaluate", str(policy), "--device", "cpu").code == 0
    # What one was trained on, the other must have.
    _, done = stage("policy", "--reward", str(reward), run="other")
    assert done.code == 2
    assert f"trained on the base with quantize: {quantize}, and here it is loaded with quantize: none" in done.err
    assert f"--quantize {quantize}" in done.err


def test_a_run_goes_on_with_its_quantisation_alone(stage: Any):
    whole, done = stage("sft", "--quantize", "nf4", "--max-updates", "4", run="whole")
    assert done.code == 0, done.err
    run, done = stage("sft", "--quantize", "nf4", "--max-updates", "2")
    assert done.code == 0, done.err
    _, done = stage("sft", "--max-updates", "4")
    assert done.code == 2 and "quantize is 'not set', but 'nf4' in the run that is here" in done.err
    _, done = stage("sft", "--quantize", "nf4", "--max-updates", "4")
    assert done.code == 0, done.err
    one, other = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (whole, run))
    assert all(torch.equal(one[name], other[name]) for name in one) and len(one) == len(other) > 0


@KINDS
def test_a_merged_export_is_plain_and_says_what_it_lost(stage: Any, perlhf: Any, tmp_path: Path, quantize: str):
    run, _ = stage("sft", "--quantize", quantize)
    out = tmp_path / "out"
    assert perlhf("export", str(run), str(out), "--format", "merged", "--device", "cpu").code == 0
    assert "quantization_config" not in read_json(out / "config.json")
    details = read_json(out / "perlhf_export.json")
    assert details["quantize"] == quantize
    # nf4's products are those of the weights that are read back; int8 rounds their inputs as well.
    assert details["largest_relative_error"] < (1e-4 if quantize == "nf4" else 0.1)
    assert details["mean_relative_error"] < (1e-4 if quantize == "nf4" else 0.1)
    network, model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), read_run(run).open("cpu")[0]
    assert type(network.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    layer: Any = model.base.get_submodule("model.layers.1.mlp.down_proj")
    pair = layer.pairs["sft"]
    expected = layer.dense() + pair.scale * (pair.b @ pair.a)
    torch.testing.assert_close(network.get_parameter("model.layers.1.mlp.down_proj.weight"), expected)
    found, embedding = (n.get_parameter("model.embed_tokens.weight") for n in (network, model.base))
    assert torch.equal(found, embedding)


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_the_snippet_of_an_exported_reward_model_gives_its_scores(stage: Any, perlhf: Any, tmp_path: Path, format: str):
    run, _ = stage("reward", "--quantize", "nf4")
    out = tmp_path / "out"
    done = perlhf("export", str(run), str(out), "--format", format, "--device", "cpu")
    assert done.code == 0, done.err
    (block,) = blocks(out)
    if format == "peft":
        assert (
            "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype='float32')"
            in block
        )
        block = block.replace("num_labels=1,", "num_labels=1, dtype=torch.float32,")
    names: dict[str, Any] = {}
    exec(compile(block, "snippet", "exec"), names)
    opened = read_run(run)
    model, encoder = opened.open("cpu")
    records = [r for r in load(opened.config.data, ("rating",), "validation") if isinstance(r, Rating)]
    talks = [[{"role": "user", "content": r.prompt}, {"role": "assistant", "content": r.completion}] for r in records]
    ids = [encoder.example(r.prompt, r.completion).tokens.ids for r in records]
    with torch.no_grad():
        wanted = model.scores(apart(ids, "none"), "reward")
    # bitsandbytes' own product in bfloat16, on CPUs that have one
    tolerance = 1e-3 if format == "merged" else 0.1 * wanted.std().item()
    torch.testing.assert_close(names["scores"](talks), wanted, atol=tolerance, rtol=0)


def test_full_tuning_is_refused_before_anything_is_loaded(stage: Any):
    _, done = stage("sft", "--quantize", "nf4", "--tuning", "full")
    assert done.code == 2 and "Traceback" not in done.err
    assert "tuning: full learns all weights, which quantize: nf4 keeps in few bits" in done.err


def test_a_device_that_it_does_not_compute_on_is_refused(stage: Any):
    _, done = stage("sft", "--quantize", "int8", "--device", "mps")
    assert done.code == 2 and "Traceback" not in done.err


def test_a_dry_run_knows_the_memory_of_quantised_weights(stage: Any):
    _, whole = stage("sft", "--dry-run")
    _, small = stage("sft", "--dry-run", "--quantize", "nf4")
    assert whole.code == small.code == 0
    # 82,816 parameters in float32, of which 65,536 take half a byte and a 64th of a float32 scale
    assert "(float32)" in whole.out and "linear layers in nf4" in small.out
    assert "a layer read back" in small.out and "a layer read back" not in whole.out


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_the_packaged_base_goes_as_a_tree(smollm2: Path, quantize: Any) -> None:
    """Rounded activations move states by more than bfloat16 does, which is no fault of the tree."""
    assert Model.load(Base(smollm2), "bfloat16", "cpu", quantize=quantize).way.packing == "tree"
