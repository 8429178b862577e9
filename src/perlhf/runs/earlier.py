"""The runs that a stage builds on: the one it starts from, and those that pay or judge it.

Wherever a run is named, a directory that holds an adapter in PEFT's layout may be named instead.
"""

from collections.abc import Sequence
from pathlib import Path

from perlhf.config.stages import StageConfig
from perlhf.errors import RunError
from perlhf.runs.manifest import MANIFEST

ADAPTER_CONFIG, ADAPTER_DETAILS = "adapter_config.json", "perlhf.json"
"""Files of an adapter directory: peft's, and what perlhf adds."""


def adapter_of(path: Path) -> Path | None:
    """The adapter's directory of a run that has one, or of `path` itself where it is an adapter; else None."""
    if (path / "adapter").is_dir():
        return path / "adapter"
    return path if is_adapter(path) else None


def is_adapter(path: Path) -> bool:
    """Whether the directory holds an adapter by itself, ours or of another tool, and is no run."""
    if (path / MANIFEST).exists():
        return False
    return (path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_DETAILS).is_file()


def earlier_runs(config: StageConfig) -> dict[str, list[Path]]:
    """Run directories that a configuration names, by the key that names them."""
    runs: dict[str, list[Path]] = {}
    for key in ("sft", "start"):
        run: Path | None = getattr(config, key, None)
        runs[key] = [run] if run else []
    for key in ("reward", "validation_reward"):
        runs[key] = reward_runs(getattr(config, key, ()))
    return runs


def reward_runs(sources: Sequence[str]) -> list[Path]:
    """Those of a policy's rewards, or of what judges it, that are run directories: neither functions nor addresses."""
    return [Path(source) for source in sources if ":" not in source or Path(source).is_dir()]


def check_runs(key: str, runs: Sequence[Path]) -> None:
    """Raises RunError, which names `key`, for one of `runs` that isn't finished."""
    for run in runs:
        if adapter_of(run) is None:
            stage = "reward" if "reward" in key or key == "scorers" else "sft"
            allowed = f"a finished run, or a directory with {ADAPTER_CONFIG} as peft saves it"
            raise RunError(f"{run} is no finished run", where=key, allowed=allowed, hint=f"train it: perlhf {stage}")
