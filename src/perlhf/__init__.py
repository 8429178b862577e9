"""Align language models with human feedback by training small adapters on one frozen base.

    import perlhf

    config = perlhf.load_recipe("recipes/coffee/reward.yaml", perlhf.RewardConfig)
    result = perlhf.reward(config)

`sft`, `reward`, `policy`, `score`, `pull`, `read`, `load` and `load_recipe` are functions, `...Config` the
configuration models, `Comparison`, `Rating`, `Demonstration` and `Prompt` the records, `...Error` the errors; `demo`,
`evaluate`, `compare`, `table`, `report`, `chat`, `average` and `export` are modules with a function each. Everything is
imported on first use, so that `import perlhf` is instant and needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perlhf.base import pull
    from perlhf.config import PolicyConfig, RewardConfig, SftConfig
    from perlhf.config_commands import EvaluateConfig, ScoreConfig
    from perlhf.data import Comparison, Demonstration, Prompt, Rating, load, read
    from perlhf.errors import PerlhfError
    from perlhf.evaluate import score
    from perlhf.recipe import load_recipe
    from perlhf.train_policy import train_policy as policy
    from perlhf.train_reward import train_reward as reward
    from perlhf.train_sft import train_sft as sft

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Demonstration",
    "EvaluateConfig",
    "PerlhfError",
    "PolicyConfig",
    "Prompt",
    "Rating",
    "RewardConfig",
    "ScoreConfig",
    "SftConfig",
    "load",
    "load_recipe",
    "policy",
    "pull",
    "read",
    "reward",
    "score",
    "sft",
]

_HOMES = {
    "Comparison": "data",
    "Demonstration": "data",
    "Prompt": "data",
    "Rating": "data",
    "load": "data",
    "read": "data",
    "load_recipe": "recipe",
    "CompareConfig": "config_compare",
    "pull": "base",
    "policy": "train_policy:train_policy",
    "reward": "train_reward:train_reward",
    "score": "evaluate",
    "sft": "train_sft:train_sft",
}
_MODULES = ("average", "chat", "compare", "config", "data", "demo", "errors", "evaluate", "export", "report", "table")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"perlhf.{name}")
    home = _HOMES.get(name)
    if home is None and name.endswith("Error"):
        home = "errors"
    elif home is None and name.endswith("Config"):
        trains = hasattr(importlib.import_module("perlhf.config"), name)
        home = "config" if trains else "config_commands"
    if home is None:
        raise AttributeError(f"module 'perlhf' has no attribute {name!r}")
    module, _, function = home.partition(":")
    return getattr(importlib.import_module(f"perlhf.{module}"), function or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
