"""Which of several workers this process is: the environment variables that torchrun sets, and Ray and Slurm as well."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from perlhf.errors import ConfigError

HINT = "start it with torchrun, or with perlhf launch --workers N STAGE recipe.yaml"


@dataclass(frozen=True)
class Place:
    """A worker's place among all of them."""

    number: int
    """From 0; the first one writes and speaks."""
    count: int
    """Workers in all, at least 2."""
    local: int
    """Its number on its machine."""
    local_count: int
    """Workers on its machine."""
    address: str
    port: int
    """Where the workers meet."""
    attempt: str
    """Tells one start of the same workers from the next."""
    hosted: bool
    """Whether whoever launched them listens there; else the first worker does."""


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several workers."""
    return environment.get("WORLD_SIZE", "1").strip() not in ("", "0", "1")


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process, be it the only one."""
    return bool(environment.get("WORLD_SIZE", "").strip() and environment.get("MASTER_ADDR", "").strip())


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Which of several workers this process is; None where it is alone.

    Raises:
        ConfigError: a variable is missing, or is no number in its range.
    """
    if not several(environment):
        return None
    count = _number("WORLD_SIZE", environment, 2, 1_000_000)
    number = _number("RANK", environment, 0, count - 1)
    local_count = _number("LOCAL_WORLD_SIZE", environment, 1, count, 1)
    local = _number("LOCAL_RANK", environment, 0, count - 1, 0)
    port = _number("MASTER_PORT", environment, 1, 65535)
    address = environment.get("MASTER_ADDR", "").strip()
    if not address:
        raise ConfigError(f"WORLD_SIZE is {count}, but MASTER_ADDR isn't set", where="$MASTER_ADDR", hint=HINT)
    run, restarts = environment.get("TORCHELASTIC_RUN_ID", ""), environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(number, count, local, local_count, address, port, f"{run}/{restarts}", hosted)


def _number(name: str, environment: Mapping[str, str], low: int, high: int, default: int | None = None) -> int:
    text = environment.get(name, "").strip()
    if not text and default is not None:
        return default
    if not text:
        count = environment["WORLD_SIZE"]
        raise ConfigError(f"WORLD_SIZE is {count}, but {name} isn't set", where=f"${name}", hint=HINT)
    if not text.isdecimal() or not low <= int(text) <= high:
        raise ConfigError(f"{text!r:.50}", where=f"${name}", allowed=f"a number from {low} to {high}", hint=HINT)
    return int(text)
