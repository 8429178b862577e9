"""Align language models with human feedback by training small adapters on one frozen base.

    import perlhf

    config = perlhf.load_recipe("recipes/coffee/reward.yaml", perlhf.RewardConfig)
    result = perlhf.reward(config)

The functions, the configuration models (`...Config`), the records and the errors (`...Error`) are those of the table
below. Everything is imported on first use, so that `import perlhf` is instant and needs no torch. Imported before
torch, it has torch's threads sleep sooner when they have nothing to do (`perlhf.system.before_torch`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from perlhf.system.before_torch import spin_shortly

if TYPE_CHECKING:
    from perlhf.commands.average import average
    from perlhf.commands.chat import chat
    from perlhf.commands.demo import demo
    from perlhf.commands.exports.export import export
    from perlhf.commands.show import tabulate as table
    from perlhf.comparison.grid import compare
    from perlhf.config.commands import (
        AverageConfig,
        ChatConfig,
        DemoConfig,
        EvaluateConfig,
        ExportConfig,
        ScoreConfig,
    )
    from perlhf.config.comparison import CompareConfig
    from perlhf.config.recipe import load_recipe
    from perlhf.config.stages import (
        AdapterConfig,
        DataConfig,
        EncodingConfig,
        OptimConfig,
        PolicyConfig,
        RewardConfig,
        SftConfig,
        ValueConfig,
    )
    from perlhf.data.read import read
    from perlhf.data.records import Comparison, Demonstration, Prompt, Rating
    from perlhf.data.splits import load
    from perlhf.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        DataError,
        DivergenceError,
        Interrupted,
        ModelError,
        PerlhfError,
        RewardFunctionError,
        RunError,
        ServiceError,
        StaleSamplerError,
        StorageError,
    )
    from perlhf.evaluation.evaluate import evaluate, score
    from perlhf.model.bases.found import pull
    from perlhf.reports.page import write as report
    from perlhf.training.policy import train_policy as policy
    from perlhf.training.reward import train_reward as reward
    from perlhf.training.sft import train_sft as sft

__version__ = "0.1.0"
spin_shortly()

_MODULES = {
    "commands.average": "average",
    "commands.chat": "chat",
    "commands.demo": "demo",
    "commands.exports.export": "export",
    "commands.show": "table:tabulate",
    "comparison.grid": "compare",
    "config.commands": "AverageConfig ChatConfig DemoConfig EvaluateConfig ExportConfig ScoreConfig",
    "config.comparison": "CompareConfig",
    "config.recipe": "load_recipe",
    "config.stages": "AdapterConfig DataConfig EncodingConfig OptimConfig PolicyConfig RewardConfig SftConfig "
    "ValueConfig",
    "data.read": "read",
    "data.records": "Comparison Demonstration Prompt Rating",
    "data.splits": "load",
    "errors": "AdapterError CheckpointError ConfigError DataError DivergenceError Interrupted ModelError PerlhfError "
    "RewardFunctionError RunError ServiceError StaleSamplerError StorageError",
    "evaluation.evaluate": "evaluate score",
    "model.bases.found": "pull",
    "reports.page": "report:write",
    "training.policy": "policy:train_policy",
    "training.reward": "reward:train_reward",
    "training.sft": "sft:train_sft",
}
"""Public names by the module that has them; `name:function` where it is called otherwise there."""
_PUBLIC = {name.partition(":")[0]: (home, name) for home, names in _MODULES.items() for name in names.split()}

# fmt: off
__all__ = [
    "AdapterConfig", "AdapterError", "AverageConfig", "ChatConfig", "CheckpointError", "CompareConfig", "Comparison",
    "ConfigError", "DataConfig", "DataError", "DemoConfig", "Demonstration", "DivergenceError", "EncodingConfig",
    "EvaluateConfig", "ExportConfig", "Interrupted", "ModelError", "OptimConfig", "PerlhfError", "PolicyConfig",
    "Prompt", "Rating", "RewardConfig", "RewardFunctionError", "RunError", "ScoreConfig", "ServiceError", "SftConfig",
    "StaleSamplerError", "StorageError", "ValueConfig", "average", "chat", "compare", "demo", "evaluate", "export",
    "load", "load_recipe", "policy", "pull", "read", "report", "reward", "score", "sft", "table",
]
# fmt: on


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'perlhf' has no attribute {name!r}")
    home, named = _PUBLIC[name]
    return getattr(importlib.import_module(f"perlhf.{home}"), named.rpartition(":")[2])


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
