"""The runs that a stage builds on: the one it starts from, and those that pay or judge it."""

from collections.abc import Sequence
from pathlib import Path

from perlhf.config.stages import StageConfig
from perlhf.errors import RunError


def earlier_runs(config: StageConfig) -> dict[str, list[Path]]:
    """Run directories that a configuration names, by the key that names them."""
    sft: Path | None = getattr(config, "sft", None)
    runs = {"sft": [sft] if sft else []}
    for key in ("reward", "validation_reward"):
        runs[key] = reward_runs(getattr(config, key, ()))
    return runs


def reward_runs(sources: Sequence[str]) -> list[Path]:
    """Those of a policy's rewards, or of what judges it, that are run directories: neither functions nor addresses."""
    return [Path(source) for source in sources if ":" not in source or Path(source).is_dir()]


def check_runs(key: str, runs: Sequence[Path]) -> None:
    """Raises RunError, which names `key`, for one of `runs` that isn't finished."""
    for run in runs:
        if not (run / "adapter").is_dir():
            stage = "sft" if key == "sft" else "reward"
            raise RunError(f"{run} is no finished run", where=key, hint=f"train it: perlhf {stage}")
