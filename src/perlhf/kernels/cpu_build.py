"""Compiles the CPU kernels of `cpp/` with the system's C++ compiler, once for each processor, into the cache.

Imports no torch, so that a plan can tell what a run would use.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from perlhf.system.machine import cache_dir

VARIABLE = "PERLHF_KERNELS"
"""`off` in the environment computes with torch's operations alone."""
COMPILERS = ("g++", "c++", "clang++")
FLAGS = "-std=c++17 -O3 -march=native -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=fast".split()
X86_FLAGS = ["-mprefer-vector-width=512"]
SOURCES = Path(__file__).parent / "cpp"


def compiler() -> tuple[str | None, str]:
    """The compiler, and "compiled"; None and why not: not wanted, not there, not for this system."""
    if os.environ.get(VARIABLE) == "off":
        return None, f"off (${VARIABLE})"
    if sys.platform == "win32":
        return None, "off (not for Windows)"
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    return (found, "compiled") if found else (None, "off (no C++ compiler; g++ would make a CPU twice as fast)")


def compile_kernels(compiler: str, threads: str) -> Path:
    """The library of the kernels, compiled where it isn't in the cache.

    Args:
        threads: `-fopenmp` runs them on torch's own threads, where its library has what this compiler asks for;
            `-fopenmp-simd` on one.

    Raises:
        OSError: the cache can't be written.
        subprocess.CalledProcessError: the compiler failed.
    """
    flags = [*FLAGS, *(X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else []), threads]
    sources = sorted(SOURCES.iterdir())
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    key.update("\0".join((compiler, _version(compiler), _processor(), *flags)).encode())
    where = cache_dir() / "kernels" / f"{key.hexdigest()[:32]}.so"
    if not where.is_file():
        _compile([compiler, *flags], [source for source in sources if source.suffix == ".cpp"], where)
    return where


def _compile(command: Sequence[str], sources: Sequence[Path], where: Path) -> None:
    """Writes the library; processes that compile at one time don't disturb each other."""
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where.parent) as directory:
        objects = [str(Path(directory, source.stem + ".o")) for source in sources]
        running = [
            subprocess.Popen([*command, "-c", str(source), "-o", to], stderr=subprocess.DEVNULL)
            for source, to in zip(sources, objects, strict=True)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise subprocess.CalledProcessError(1, command[0])
        # Linked without the compiler's own thread library: torch has loaded one, and two would fight for the cores.
        built = str(Path(directory, "built.so"))
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        subprocess.run([command[0], "-shared", *undefined, *objects, "-o", built], check=True, capture_output=True)
        os.replace(built, where)


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _processor() -> str:
    """What `-march=native` depends on: machines may share a home directory."""
    info = Path("/proc/cpuinfo")
    text = info.read_text("utf-8", errors="replace") if info.is_file() else ""
    lines = [re.search(rf"^{field}\s*:.*$", text, re.MULTILINE) for field in ("model name", "flags", "Features")]
    return " ".join([platform.machine(), platform.processor(), *(line[0] for line in lines if line)])
