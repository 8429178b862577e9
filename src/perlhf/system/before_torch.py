"""What must be set before torch is loaded: another memory allocator, and how long idle threads spin.

Under glibc's allocator a training run's memory grows holes between its blocks, and pages are given back and asked for
all the time. Measured on a CPU (docs/performance.md), a reward update under another one is an eighth faster and takes a
third less memory; it is preloaded, and the command restarted.

A network of this size is thousands of short parallel regions a second. Between two of them a thread spins, by default
for milliseconds, since waking costs some 10 microseconds. Alone on a machine that is the fastest; beside other jobs
threads spin for one that isn't running, and take its core from it. A short spin is hardly slower on a quiet machine
(docs/performance.md, "Beside other jobs").
"""

import os
import sys
import sysconfig
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from perlhf.errors import ConfigError

VARIABLE = "PERLHF_ALLOCATOR"
"""`system` keeps the process as it is, the path of a library is preloaded instead of one that is found."""
STARTED = "PERLHF_ALLOCATOR_STARTED"
"""What was preloaded; set for the restarted process alone."""
LIBRARIES = ("libtcmalloc_minimal.so*", "libtcmalloc.so*", "libjemalloc.so*")
"""In order of preference; Debian's packages are libtcmalloc-minimal4 and libjemalloc2."""
JEMALLOC_OPTIONS = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
"""Freed memory is kept: by default jemalloc gives it back and is no faster than glibc."""
SHORT_SPIN = {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}
"""GNU's library, which torch brings along on Linux, counts turns of a loop (a few tens of microseconds); LLVM's and
Intel's count milliseconds, 200 by default."""
SPIN_VARIABLES = ("OMP_WAIT_POLICY", *SHORT_SPIN)
"""Whoever sets one of them has decided."""


def find(environment: Mapping[str, str]) -> Path | None:
    """The library to preload, or None: not wanted, not there, not Linux, or something is preloaded already.

    Raises:
        ConfigError: PERLHF_ALLOCATOR names no file.
    """
    wanted = environment.get(VARIABLE, "")
    if wanted == "system" or environment.get("LD_PRELOAD") or not sys.platform.startswith("linux"):
        return None
    if wanted:
        if not Path(wanted).is_file():
            raise ConfigError(f"no file {wanted}", where=f"${VARIABLE}", allowed="system, or the path of a library")
        return Path(wanted)
    names = [sysconfig.get_config_var("MULTIARCH"), "."]
    folders = [Path(sys.prefix) / "lib", *(Path("/usr/lib") / name for name in names if name), Path("/usr/lib64")]
    for pattern in LIBRARIES:
        for folder in folders:
            # The loader would split a path at spaces and colons.
            if (libraries := sorted(folder.glob(pattern))) and not set(str(libraries[0])) & set(" :"):
                return libraries[0]
    return None


def variables(library: Path) -> dict[str, str]:
    """What a process's environment needs to run under `library`."""
    options = {"MALLOC_CONF": JEMALLOC_OPTIONS} if "jemalloc" in library.name else {}
    return {"LD_PRELOAD": str(library)} | options


def restart(arguments: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Starts the interpreter anew with `arguments` under the library that `find` gives; returns where there is none.

    The restarted process forgets the variables, so that programs it starts have none.

    Raises:
        ConfigError: as `find`.
    """
    if started := environment.pop(STARTED, None):
        for name in variables(Path(started)):
            environment.pop(name, None)
        return
    library = find(environment)
    if library is None or "torch" in sys.modules:
        return
    environment[STARTED] = str(library)
    for name, value in variables(library).items():
        environment[name] = value
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def in_use() -> str:
    """Name of the allocator of this process, as its memory map tells."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "system"
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"lib{name}" in mapped), "system")


def expected(environment: Mapping[str, str] = os.environ) -> str:
    """The allocator that a computing command started here would run under."""
    library = find(environment)
    used = in_use()
    return used if used != "system" or library is None else library.name


def spin_shortly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets `SHORT_SPIN`, unless the user set one of `SPIN_VARIABLES`, or torch is loaded and its library read them."""
    if "torch" not in sys.modules and not any(name in environment for name in SPIN_VARIABLES):
        environment.update(SHORT_SPIN)


def waiting(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Those of `SPIN_VARIABLES` that are set, as a run's manifest tells them."""
    return {name: environment[name] for name in SPIN_VARIABLES if name in environment}
