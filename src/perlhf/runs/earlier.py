"""The runs that a stage builds on: the one it starts from, and those that pay or judge it.

Wherever a run is named, a directory that holds an adapter in PEFT's layout may be named instead.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from perlhf.config.stages import StageConfig
from perlhf.errors import RunError
from perlhf.runs.manifest import MANIFEST
from perlhf.system.hashes import hash_of

ADAPTER_CONFIG, ADAPTER_DETAILS = "adapter_config.json", "perlhf.json"
"""Files of an adapter directory: peft's, and what perlhf adds."""
ADAPTER_TENSORS, ADAPTER_WEIGHTS = "adapter_model.safetensors", "full_weights.safetensors"
"""Its tensors, as peft has them, and those of a run with `tuning: full`."""
ADAPTER_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_DETAILS, ADAPTER_TENSORS, ADAPTER_WEIGHTS})


def adapter_of(path: Path) -> Path | None:
    """The adapter's directory of a run that has one, or of `path` itself where it is an adapter; else None."""
    if (path / "adapter").is_dir():
        return path / "adapter"
    return path if is_adapter(path) else None


def named_adapters(path: Path) -> list[Path]:
    """Directories of adapters below one that holds nothing else: peft saves those so that have a name of their own."""
    if not path.is_dir() or (path / MANIFEST).exists() or is_adapter(path):
        return []
    return sorted(file.parent for file in path.glob(f"*/{ADAPTER_CONFIG}"))


def several_adapters(path: Path) -> RunError | None:
    """What to say of a directory that holds adapters in directories of their own, which have to be named; else None."""
    if not (named := named_adapters(path)):
        return None
    names = ", ".join(map(str, named))
    what = "holds no adapter itself, but " + (f"{len(named)} in directories" if named[1:] else "one in a directory")
    return RunError(
        f"{what} of their own" if named[1:] else f"{what} of its own",
        where=str(path),
        allowed=names,
        hint=f"name it: {named[0]}",
    )


def is_adapter(path: Path) -> bool:
    """Whether the directory holds an adapter by itself, ours or of another tool, and is no run."""
    if (path / MANIFEST).exists():
        return False
    return (path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_DETAILS).is_file()


def files_hash(directory: Path) -> str:
    """SHA-256 over the names and bytes of an adapter directory's files, those apart that are nothing to the adapter."""
    files = [directory / name for name in sorted(ADAPTER_FILES) if (directory / name).is_file()]
    lines = [f"{file.name}:{hash_of(file)}\n" for file in files]
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


def check_runs(key: str, runs: Sequence[Path]) -> None:
    """Raises RunError, which names `key`, for one of `runs` that isn't finished."""
    for run in runs:
        if adapter_of(run) is None:
            if (error := several_adapters(run)) is not None:
                raise error
            stage = "reward" if "reward" in key or key == "scorers" else "sft"
            allowed = f"a finished run, or a directory with {ADAPTER_CONFIG} as peft saves it"
            raise RunError(f"{run} is no finished run", where=key, allowed=allowed, hint=f"train it: perlhf {stage}")
