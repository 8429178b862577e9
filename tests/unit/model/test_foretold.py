"""What a small copy of a configuration tells of the way is what its weights would."""

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
)

from perlhf.kernels.attention.sight import Sight
from perlhf.method.logprobs import Logits
from perlhf.model import ways
from perlhf.model.foretold import way
from perlhf.model.foretold.way import COPIED, foretell

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "cache_dir", lambda: tmp_path)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


@pytest.mark.parametrize(
    ("config", "packing", "why"),
    [
        (LlamaConfig(num_hidden_layers=3, num_key_value_heads=8), "tree", ""),
        (Phi3Config(num_hidden_layers=2, rope_parameters=LONGROPE), "tree", ""),
        (DeepseekV3Config(num_hidden_layers=4), "tree", ""),
        (BloomConfig(n_layer=2), "none", "it has no attention that transformers lets others compute"),
        (JambaConfig(num_hidden_layers=5), "none", "it has linear_attention layers"),
        (MambaConfig(num_hidden_layers=2), "none", "it has linear_attention layers"),
        (Mamba2Config(num_hidden_layers=2), "none", "it has linear_attention layers"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_real_widths_are_made_small(config: PreTrainedConfig, packing: str, why: str) -> None:
    before = config.to_dict()
    found = foretell(config, torch.bfloat16, CPU)
    assert found.way is not None, found.source
    assert (found.way.packing, found.way.why, found.source) == (packing, why, COPIED)
    assert config.to_dict() == before


def test_windows_caps_and_scales_are_those_of_the_configuration() -> None:
    gemma2 = foretell(Gemma2Config(num_hidden_layers=4), torch.float32, CPU).way
    assert gemma2 and gemma2.sights == dict.fromkeys((0, 2), Sight(window=4096)) and gemma2.logits == Logits(1, 30.0)
    gemma3 = foretell(Gemma3TextConfig(num_hidden_layers=7, sliding_window=512), torch.float32, CPU).way
    assert gemma3 and gemma3.sights == dict.fromkeys((0, 1, 2, 3, 4, 6), Sight(window=512))
    sinks = foretell(GptOssConfig(num_hidden_layers=2), torch.float32, CPU).way
    assert sinks and sinks.packing == "tree" and sinks.sights == {0: Sight(window=128)}


def test_layers_that_are_not_called_have_the_paths_of_the_base() -> None:
    found = foretell(MambaConfig(num_hidden_layers=2), torch.float32, CPU)
    assert found.uncalled == tuple(f"backbone.layers.{layer}.mixer.dt_proj" for layer in (0, 1))


def test_a_copy_that_would_be_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    # Embedding and head 256 x 32; of each layer four projections 32 x 32, an MLP of three 64 x 32, two norms; a norm.
    size = 2 * 256 * 32 + 2 * (4 * 32 * 32 + 3 * 64 * 32 + 2 * 32) + 32
    monkeypatch.setattr(way, "_MOST", size - 1)
    found = foretell(LlamaConfig(num_hidden_layers=2), torch.float32, CPU)
    assert found.way is None and found.uncalled == ()
    assert found.source.endswith(f"doesn't compute (ValueError: it would have {size:,} parameters)")
    monkeypatch.setattr(way, "_MOST", size)
    assert foretell(LlamaConfig(num_hidden_layers=2), torch.float32, CPU).way is not None
