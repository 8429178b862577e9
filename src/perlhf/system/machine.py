"""What a run ran on: versions, commit, hardware, threads, memory. Imports no torch; looks at it where it is loaded."""

import contextlib
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from perlhf import __version__
from perlhf.system import before_torch

COMPILED_PRODUCTS = 512
"""Kernels of bfloat16 products that a CPU run keeps."""
_PACKAGE = Path(__file__).parents[1]
_RUN_NOTHING = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
_OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
IF_LOADED = ("bitsandbytes",)
"""Packages that a run depends on where it uses them, and then has loaded them."""


def environment() -> dict[str, Any]:
    """Versions, commit (None outside a git checkout), hardware and CPU threads (None before torch is loaded)."""
    versions = {"perlhf": __version__, "python": platform.python_version()}
    packages = (*PACKAGES, *(package for package in IF_LOADED if package in sys.modules))
    versions |= {package: release for package in packages if (release := version(package))}
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    native: Any = sys.modules.get("perlhf.kernels.cpu")
    return {
        "versions": versions,
        **_commit(),
        "hardware": _hardware(),
        "threads": threads,
        "allocator": before_torch.in_use(),
        "kernels": native.state() if native else None,
    }


def version(package: str) -> str | None:
    """Of an installed package; torch's with its build (`+cpu`, `+cu130`), which decides kernels and so bits.

    The metadata of PyPI's torch leaves the build out.
    """
    try:
        return (_torch_version() if package == "torch" else None) or metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir() -> Path:
    """Where perlhf keeps bases, fingerprints and compiled kernels: $PERLHF_CACHE, else ~/.cache/perlhf."""
    return Path(os.environ.get("PERLHF_CACHE") or "~/.cache/perlhf").expanduser().absolute()


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    try:
        # ru_maxrss starts from the parent's peak; VmHWM is this process's own.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        peak = None
    if peak:
        return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Starts the peak anew, so that each stage of a process tells its own; nothing happens where the system can't."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def cuda_peak_bytes() -> int:
    """The most GPU memory that torch held at a time in this process; 0 where it used no GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_initialized() else 0


def gpu_name() -> str | None:
    """The GPU that torch uses in this process; None while it uses none."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_initialized() else None


def free_memory_bytes(device: str) -> int | None:
    """What is free on the GPU if one is meant and there, else of the machine's memory; None for a GPU not seen.

    In a container it is what that has left. Apple's GPU shares the machine's memory.
    """
    if device not in ("cpu", "mps"):
        command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        number = int(device.partition(":")[2] or 0)
        try:
            lines = subprocess.run(command, capture_output=True, encoding="ascii", check=True).stdout.split()
            return int(lines[number]) * 2**20
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            if device != "auto":
                return None
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _groups())])


def memory_bytes() -> int:
    """All memory that this process may ever have: the machine's, or what its container is allowed."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _groups())])


def _groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of each control group of Linux that this process is in and that has a limit.

    Pages of files that can be dropped aren't counted as used.
    """
    try:
        line = next(line for line in own.read_text("utf-8", errors="replace").splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):
        return []
    inside = root / line.removeprefix("0::/")
    found = []
    for group in (inside, *inside.parents):
        if not group.is_relative_to(root):
            break
        with contextlib.suppress(OSError, ValueError, IndexError):
            limit = int((group / "memory.max").read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
            found.append((limit, max(used, 0)))
    return found


def bound_compiled_products(environment: MutableMapping[str, str] = os.environ) -> None:
    """Before the first product in bfloat16 on a CPU: at most `COMPILED_PRODUCTS` of its kernels are kept.

    oneDNN compiles one for each shape, about half a megabyte each, and by default keeps 1,024 of them. A micro-batch
    needs fewer than 250; where they don't fit, each product is compiled anew and a run takes seven times as long.
    """
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(COMPILED_PRODUCTS))


def cpu_computes_in_bf16(cpuinfo: str | None = None) -> tuple[bool, str]:
    """Whether bfloat16 products are the faster ones on this CPU, and a few words that say why.

    Intel's AVX-512 alone has bfloat16 products, but torch's run at about half the float32 rate there (84 against 160
    GFLOP/s a core, docs/experiments.md); with AMX, on AMD and on ARM they win.

    Args:
        cpuinfo: text of /proc/cpuinfo; None reads it.
    """
    if cpuinfo is None:
        file = Path("/proc/cpuinfo")
        cpuinfo = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    flags = set(re.findall(r"\b(avx512_bf16|amx_bf16|bf16|svebf16)\b", cpuinfo))
    if not flags:
        return False, "this CPU has no bfloat16 instructions"
    if flags == {"avx512_bf16"} and "GenuineIntel" in cpuinfo:
        return False, "this CPU has bfloat16 instructions but no AMX, so float32 is the faster one"
    return True, "this CPU computes in it"


def _torch_version() -> str | None:
    """`torch.__version__`, read from its source where torch isn't loaded; None where that doesn't tell."""
    if torch := sys.modules.get("torch"):
        return str(torch.__version__)
    file = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
    assignment = re.search(r"^__version__ = ['\"](.+)['\"]", file.read_text("utf-8"), re.M) if file.is_file() else None
    return assignment[1] if assignment else None


def _commit() -> dict[str, Any]:
    """The commit of this package's source, if git tracks it there (an installed copy inside another checkout isn't)."""
    if {"site-packages", "dist-packages"} & set(_PACKAGE.parts) or _git(
        "ls-files", "--error-unmatch", "__init__.py"
    ) is None:
        return {"commit": None, "uncommitted_changes": None}
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": _git("diff", "--quiet", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".") is None,
    }


def _git(*arguments: str) -> str | None:
    """Output of git in this package's directory; None when git is missing or says no.

    The repository may be somebody else's: of the programs that its configuration names none is run, and another one
    that the environment names, as in git's hooks, isn't asked.
    """
    command = ["git", "--no-optional-locks", *_RUN_NOTHING, "-C", str(_PACKAGE), *arguments]
    known = {name: value for name, value in os.environ.items() if name not in _OTHER_REPOSITORY}
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False, env=known)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _hardware() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu_name(),
    }


def _cpu_name() -> str:
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        model = None
    return model[1].strip() if model else platform.processor() or platform.machine()
