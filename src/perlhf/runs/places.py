"""Where the files are that a run's configuration names by relative paths.

A manifest has the directory that the run was started in, as seen from the run directory (`../..`): so the run is found
from any working directory, and together with its surroundings on any machine. Runs without it, and files that aren't
there any more, are looked up from the working directory, as they were before.
"""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from perlhf.config.stages import DEFAULT_BASE, PLAIN_TEMPLATES, StageConfig
from perlhf.system.files import read_json

STARTED_IN = "started_in"
"""Key of the manifest."""
Config = TypeVar("Config", bound=StageConfig)


def started_in(run: Path) -> str:
    """The working directory as seen from the run directory."""
    return os.path.relpath(Path.cwd(), run.resolve())


def origin_of(manifest: dict[str, Any], run: Path) -> Path | None:
    """The directory that a run was started in; None where its manifest doesn't say."""
    return run.resolve() / str(manifest[STARTED_IN]) if STARTED_IN in manifest else None


def resolved(config: Config, manifest: dict[str, Any], run: Path) -> Config:
    """The configuration with every relative path as it is reached from the working directory."""
    if (origin := origin_of(manifest, run)) is None:
        return config
    changes: dict[str, Any] = {
        "base": config.base if config.base == DEFAULT_BASE else found(config.base, origin),
        "data": config.data.model_copy(update={"paths": tuple(found(path, origin) for path in config.data.paths)}),
    }
    if config.encoding.template not in ("tokenizer", *PLAIN_TEMPLATES):
        template = found(config.encoding.template, origin)
        changes["encoding"] = config.encoding.model_copy(update={"template": template})
    for key in ("sft", "start"):
        if named := getattr(config, key, None):
            changes[key] = Path(found(str(named), origin))
    for key in ("reward", "validation_reward"):
        if sources := getattr(config, key, ()):
            changes[key] = tuple(found(source, origin) for source in sources)
    return config.model_copy(update=changes)


def recorded_paths(paths: Sequence[str], manifest_file: Path) -> list[str]:
    """Paths of a run's data as they are reached from the working directory."""
    manifest = read_json(manifest_file) if manifest_file.is_file() else {}
    if (origin := origin_of(manifest, manifest_file.parent)) is None:
        return list(paths)
    return [found(path, origin) for path in paths]


def found(name: str, origin: Path) -> str:
    """A name that may be a relative path (or pattern) below `origin`; other names stay as they are."""
    there = origin / name
    if not name or os.path.isabs(name) or name.startswith("~") or "://" in name:
        return name
    if not there.exists() and not (glob.has_magic(name) and glob.glob(str(there))):
        return name
    if Path.cwd().resolve() == origin.resolve():
        return name
    return os.path.relpath(there.resolve() if there.exists() else there)
