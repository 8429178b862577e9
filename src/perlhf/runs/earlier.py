"""The runs that a stage builds on: the one it starts from, and those that pay or judge it.

Wherever a run is named, a directory that holds an adapter in PEFT's layout may be named instead. A reward run of
several members has one in `adapter/0`, `adapter/1`, ..; where reward models are named, it stands for all of them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from perlhf.config.stages import PolicyConfig, StageConfig
from perlhf.errors import ConfigError, RunError
from perlhf.runs.manifest import MANIFEST
from perlhf.system.hashes import hash_of

ADAPTER_CONFIG, ADAPTER_DETAILS = "adapter_config.json", "perlhf.json"
"""Files of an adapter directory: peft's, and what perlhf adds."""
ADAPTER_TENSORS, ADAPTER_WEIGHTS = "adapter_model.safetensors", "full_weights.safetensors"
"""Its tensors, as peft has them, and those of a run with `tuning: full`."""
ADAPTER_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_DETAILS, ADAPTER_TENSORS, ADAPTER_WEIGHTS})


def adapter_of(path: Path) -> Path | None:
    """The directory of a run's adapter (or of its members), or `path` itself where that is an adapter; else None."""
    if (path / "adapter").is_dir():
        return path / "adapter"
    return path if is_adapter(path) else None


def adapters_of(path: Path) -> list[Path]:
    """Directories of the adapters that a run, or an adapter's directory, stands for: one, or all members; else none."""
    directory = adapter_of(path)
    return [] if directory is None else named_adapters(directory) or [directory]


def named_adapters(path: Path) -> list[Path]:
    """Directories of adapters below one that holds nothing else: a run's members, or what peft saves under names."""
    if not path.is_dir() or (path / MANIFEST).exists() or is_adapter(path):
        return []
    found = [directory for directory in path.iterdir() if is_adapter(directory)]
    return sorted(found, key=lambda directory: (len(directory.name) if directory.name.isdigit() else 0, directory.name))


def several_adapters(path: Path) -> RunError | None:
    """What to say of a directory that holds adapters in directories of their own, of which one has to be named, be it a
    run of several members; else None."""
    if not (named := named_adapters(adapter_of(path) or path)):
        return None
    names, hint = ", ".join(map(str, named)), f"name it: {named[0]}"
    what = "holds no adapter itself, but " + (f"{len(named)} in directories" if named[1:] else "one in a directory")
    what += " of their own" if named[1:] else " of its own"
    if adapter_of(path) is not None:
        what = f"holds a run of {len(named)} members, and one adapter is wanted"
        hint = f"name one of them, such as {named[0]}, or make one of all: perlhf average {path} --output DIRECTORY"
    return RunError(what, where=str(path), allowed=names, hint=hint)


def is_adapter(path: Path) -> bool:
    """Whether the directory holds an adapter by itself, ours or of another tool, and is no run."""
    if (path / MANIFEST).exists():
        return False
    return (path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_DETAILS).is_file()


def files_hash(directory: Path) -> str:
    """SHA-256 over the names and bytes of an adapter directory's files (or its members'), those apart that are nothing
    to the adapter."""
    places = [directory, *named_adapters(directory)]
    files = [place / name for place in places for name in sorted(ADAPTER_FILES) if (place / name).is_file()]
    lines = [f"{file.relative_to(directory)}:{hash_of(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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


def reward_adapters(sources: Sequence[str]) -> int:
    """How many adapters these stand for; one that isn't there yet counts once."""
    return sum(len(adapters_of(run)) or 1 for run in reward_runs(sources))


def check_disagreement(config: PolicyConfig) -> None:
    """Raises ConfigError where `max_disagreement` goes by a single reward model, which has nobody to disagree with."""
    if config.max_disagreement is None:
        return
    if sum(len(adapters_of(Path(source))) or 1 for source in config.reward) < 2:
        allowed = "two or more of reward, or a run of several members"
        raise ConfigError("max_disagreement with a single reward", where="max_disagreement", allowed=allowed)


def check_runs(key: str, runs: Sequence[Path]) -> None:
    """Raises RunError, which names `key`, for one of `runs` that isn't finished, or has several members for `sft`."""
    for run in runs:
        if (adapter_of(run) is None or key == "sft") and (error := several_adapters(run)) is not None:
            raise error
        if adapter_of(run) is None:
            stage = "reward" if "reward" in key or key == "scorers" else "sft"
            allowed = f"a finished run, or a directory with {ADAPTER_CONFIG} as peft saves it"
            raise RunError(f"{run} is no finished run", where=key, allowed=allowed, hint=f"train it: perlhf {stage}")
