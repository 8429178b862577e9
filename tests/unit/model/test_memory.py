"""The memory that is foretold: what a graph keeps, counted on small networks, and the recipes for one card."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from perlhf.commands.base import forecast
from perlhf.commands.cli import main
from perlhf.config.commands import PlanConfig
from perlhf.config.recipe import load_recipe
from perlhf.config.stages import AdapterConfig, PolicyConfig, RewardConfig, SftConfig
from perlhf.kernels import cpu
from perlhf.method.packing import Tokens, pack
from perlhf.model import ways
from perlhf.model.foretold.memory import memory_of
from perlhf.model.model import Model

RECIPES = Path(__file__).resolve().parents[3] / "recipes" / "qwen3-4b"
TOKENS = 256
SIZES: dict[str, Any] = {"vocab_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
NETWORKS = [
    LlamaConfig(**SIZES, hidden_size=256, intermediate_size=704),
    Qwen2Config(**SIZES, hidden_size=256, intermediate_size=1350),
    Qwen3Config(**SIZES, hidden_size=160, intermediate_size=608, head_dim=32),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "cache_dir", lambda: tmp_path / "cache")


def kept_bytes(model: Model) -> int:
    """Of the distinct tensors that the graph of a pass keeps, beside weights."""
    weights = [*model.base.parameters(), *model.adapters["reward"].tensors().values()]
    own, found = {weight.untyped_storage().data_ptr() for weight in weights}, dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(256, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.scores(pack([[Tokens(ids)]], "tree", model.device), "reward")
    assert states.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.model_type)
def test_what_a_graph_keeps_is_what_is_foretold(config: PreTrainedConfig, masked: bool, targets: Any) -> None:
    """Within a tenth, by our own kernels and under a mask, as on a GPU: what lacks are rows of the rank's width."""
    if not masked and cpu.compiler()[0] is None:
        pytest.skip("no compiler for our own kernels")
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with cpu.off() if masked else nullcontext():
        model = Model(network, {"name": "random", "sha256": ""})
        model.add_adapter("reward", "reward", rank=4, targets=targets)
        kept = kept_bytes(model)
    stage = RewardConfig(
        device="cuda" if masked else "cpu",
        dtype="float32",
        adapter=AdapterConfig(rank=4, targets=targets),
        tokens_per_microbatch=TOKENS,
    )
    told = memory_of(stage, network, {"reward": 1}).passing["activations"]
    assert 0.9 < told / kept < 1.02


def test_norms_of_queries_and_keys_by_hand() -> None:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(NETWORKS[2])
    stage = RewardConfig(device="cuda", dtype="float32", tokens_per_microbatch=TOKENS, packing="none")
    # In rows, without a mask. 3 x 160; q, k, v and what is mixed of 8 heads of 32; gate, up; norms of 8 and 2 heads.
    numbers = 3 * 160 + 4 * 8 * 32 + 2 * 608 + (8 + 2) * 32
    assert memory_of(stage, network, {"reward": 1}).passing["activations"] == TOKENS * 3 * numbers * 4


@pytest.mark.parametrize("card", [24, 80])
@pytest.mark.parametrize("stage", ["sft", "reward", "policy"])
def test_a_recipe_for_one_card_fits_it(card: int, stage: Any) -> None:
    """By config.json alone, 15 % to spare; the small card computes layers once more."""
    kind = {"sft": SftConfig, "reward": RewardConfig, "policy": PolicyConfig}[stage]
    config = load_recipe(RECIPES / f"{stage}-{card}gb.yaml", kind)
    assert config.base == "Qwen/Qwen3-4B"
    config = config.model_copy(update={"base": str(RECIPES)})
    told = forecast(PlanConfig(device_memory=f"{card}GB", flops="1T", read="1TB"), config)
    assert told["parameters"] == 4_022_468_096
    assert told["device"] == "cuda" and told["dtype"] == "bfloat16"
    assert told["fits"] and told["memory_bytes"]["total"] * 1.15 < card * 10**9
    assert told["recompute"] == (card == 24)
    if card == 24:
        never = config.model_copy(update={"recompute": "never"})
        alone = forecast(PlanConfig(device_memory="24GB", flops="1T", read="1TB"), never)
        assert not alone["recompute"] and alone["memory_bytes"]["total"] > told["memory_bytes"]["total"]


def test_the_command_tells_a_card_from_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "policy-24gb.yaml")
    assert main(["plan", recipe, "--base", str(RECIPES), "--device-memory", "24GB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["policy"]
    assert told["said"].startswith("fits: ") and told["said"].endswith("once more in the backward pass")
