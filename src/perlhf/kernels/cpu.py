"""A CPU's own kernels: attention over a prefix tree, norms and gated products, each in one pass over memory.

Their sources are in `cpp/`. They are compiled by the system's C++ compiler when they are first wanted, once for each
processor, and kept in the cache; where there is none, callers compute the same with torch's operations, which are their
twin in the tests.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perlhf.kernels.call import calling, current_call
from perlhf.system.files import sha256, sync, working_directory
from perlhf.system.machine import cache_dir

FEW_ROWS = 64
"""Rows up to which a linear layer's own kernel is faster than oneDNN's."""
BLOCK = 32
BLOCK_4 = 64
"""Weights of 4 bits that share a scale."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
VARIABLE = "PERLHF_KERNELS"
"""`off` in the environment computes with torch's operations alone."""
COMPILERS = ("g++", "c++", "clang++")
FLAGS = "-std=c++17 -O3 -march=native -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=fast".split()
X86_FLAGS = ["-mprefer-vector-width=512"]
SOURCES = Path(__file__).parent / "cpp"


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can compute these: on a CPU, of one dtype that they know."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in DTYPES
        and all(t.dtype == first.dtype for t in tensors)
        and library() is not None
    )


def state() -> str:
    """What stands in a run's manifest: `compiled`, or why not; `not used` before they were wanted, as on a GPU."""
    return _load()[1] if _load.cache_info().currsize else "not used"


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where `state` says why, and inside `off`."""
    return _load()[0] if current_call().own_kernels else None


def off() -> AbstractContextManager[None]:
    """Computes with torch's operations alone, in this thread."""
    return calling(replace(current_call(), own_kernels=False))


def sampling() -> AbstractContextManager[None]:
    """Lets `few_rows` say yes, in this thread."""
    return calling(replace(current_call(), sampling=True))


def call(name: str, first: Tensor, *arguments: Any) -> None:
    """Runs a kernel on all threads: tensors and arrays go by address, ints as int64, floats as float32."""
    values = [first.data_ptr()]
    values += [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    kernel = _kernels.get((name, first.dtype))
    if kernel is None:
        # Also where `off` holds by now: a backward does as its forward did.
        kernel = getattr(_load()[0], f"{name}_{DTYPES[first.dtype]}")
        kinds = {int: ctypes.c_int64, float: ctypes.c_float}
        kernel.argtypes = [*(kinds.get(type(value), ctypes.c_void_p) for value in (first, *arguments)), ctypes.c_int]
        kernel.restype = None
        _kernels[name, first.dtype] = kernel  # last: other threads take it from here
    kernel(*values, torch.get_num_threads())


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is there for these and the faster way; in a call that samples alone."""
    current = current_call()
    return (
        current.sampling
        and x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and current.own_kernels
        and _has_linear()
        and x.numel() <= FEW_ROWS * x.shape[-1]
        and weight.shape[0] % BLOCK == weight.shape[1] % BLOCK == 0
        and weight.is_contiguous()
    )


def linear(x: Tensor, weight: Tensor, pair: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
    """x W^T, and with a pair (a [rank, in], b [out, rank], rank a multiple of BLOCK) + (x a^T) b^T, without gradients.

    Args:
        x: [..., in], bfloat16, as `few_rows` wants it.
        mask: [row, rank] float32; x a^T is multiplied by it.
    """
    assert _has_linear(), "ask `few_rows` first"
    x = x.contiguous()
    a, b = pair or (weight, weight)
    out = x.new_empty(*x.shape[:-1], len(weight))
    sizes = (x.numel() // x.shape[-1], *reversed(weight.shape), len(a) if pair else 0)
    call("linear", x, weight, a, b, mask, out, *sizes)
    return out


@dataclass(frozen=True)
class FourBits:
    """A weight of numbers of a table times a scale for each `BLOCK_4` of a row."""

    packed: Tensor
    """uint8, two numbers' places in the table to a byte, the first in its higher half."""
    scales: Tensor
    """float32, of all rows one after the other."""
    table: Tensor
    """16 numbers, float32."""
    inputs: int
    outputs: int


def few_rows_4bit(x: Tensor, weight: FourBits) -> bool:
    """Whether `linear_4bit` is there for these; in a call that samples alone."""
    return (
        current_call().sampling and usable(x) and x.numel() <= FEW_ROWS * x.shape[-1] and weight.inputs % BLOCK_4 == 0
    )


def linear_4bit(x: Tensor, weight: FourBits) -> Tensor:
    """x W^T without gradients: [..., in] to [..., out], as `few_rows_4bit` wants it."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.outputs)
    shape = (x.numel() // weight.inputs, weight.inputs, weight.outputs)
    call("four_bits", x, weight.packed, weight.scales, weight.table, out, *shape)
    return out


def padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The pair with zeros to a rank that `linear` takes."""
    more = -len(a) % BLOCK
    return F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))


def int64s(numbers: Sequence[int]) -> Any:
    """An array that C reads."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def compiler() -> tuple[str | None, str]:
    """The compiler, and "compiled"; None and why not: not wanted, not there, not for this system."""
    if os.environ.get(VARIABLE) == "off":
        return None, f"off (${VARIABLE})"
    if sys.platform == "win32":
        return None, "off (not for Windows)"
    path = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    return (path, "compiled") if path else (None, "off (no C++ compiler; g++ would make a CPU 1.7 times as fast)")


_kernels: dict[tuple[str, torch.dtype], Any] = {}


@functools.cache
def _has_linear() -> bool:
    library = _load()[0]
    return library is not None and bool(library.has_linear())


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    path, why = compiler()
    if path is None:
        return None, why
    for threads, state in (("-fopenmp", "compiled"), ("-fopenmp-simd", "compiled for one thread")):
        try:
            return ctypes.CDLL(str(_compiled(path, threads))), state
        except (OSError, subprocess.CalledProcessError):
            continue
    return None, f"off ({Path(path).name} could not compile them, or {cache_dir()} can't be written)"


def _compiled(compiler: str, threads: str) -> Path:
    """The library of the kernels, compiled where the cache has none that is whole and our own.

    Its name ends with its SHA-256: one that was cut off or changed isn't loaded, which would end the process or run
    what somebody else wrote, but made anew.

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
    directory = _own_directory(cache_dir())
    for library in sorted(directory.glob(f"{key.hexdigest()[:32]}-*.so")):
        if _is_own(library.lstat(), stat.S_ISREG) and library.stem.endswith(f"-{sha256(library)}"):
            return library
        library.unlink()
    return _compile(
        [compiler, *flags], [source for source in sources if source.suffix == ".cpp"], directory, key.hexdigest()[:32]
    )


def _own_directory(cache: Path) -> Path:
    """Where the libraries are: a directory that only this user, or root, can write to, since what is there is run.

    Raises:
        OSError: there is none, and none can be made.
    """
    names = ("kernels", f"kernels-{os.geteuid()}")
    for directory in (cache / name for name in names):
        cache.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        status = directory.lstat()
        if status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode) and status.st_mode & 0o022:
            directory.chmod(0o700)  # made where others of the user's group may write, too
        if _is_own(directory.lstat(), stat.S_ISDIR):
            return directory
    raise PermissionError(errno.EPERM, "it belongs to somebody else", str(cache / names[0]))


def _is_own(status: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Whether it is no link, and neither made nor to be changed by anybody but this user or root."""
    return is_kind(status.st_mode) and status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def _compile(command: Sequence[str], sources: Sequence[Path], directory: Path, key: str) -> Path:
    """Writes the library and returns it; processes that compile at one time don't disturb each other."""
    with working_directory(directory) as work:
        objects = [str(work / f"{source.stem}.o") for source in sources]
        running = [
            subprocess.Popen([*command, "-c", str(source), "-o", to], stderr=subprocess.DEVNULL)
            for source, to in zip(sources, objects, strict=True)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise subprocess.CalledProcessError(1, command[0])
        # Linked without the compiler's own thread library: torch has loaded one, and two would fight for the cores.
        built = work / "built.so"
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        subprocess.run([command[0], "-shared", *undefined, *objects, "-o", str(built)], check=True, capture_output=True)
        built.chmod(0o755)
        sync(built)
        library = directory / f"{key}-{sha256(built)}.so"
        os.replace(built, library)
        sync(directory)
    return library


def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False).stdout


def _processor() -> str:
    """What `-march=native` depends on: machines may share a home directory."""
    info = Path("/proc/cpuinfo")
    text = info.read_text("utf-8", errors="replace") if info.is_file() else ""
    lines = [re.search(rf"^{field}\s*:.*$", text, re.MULTILINE) for field in ("model name", "flags", "Features")]
    return " ".join([platform.machine(), platform.processor(), *(line[0] for line in lines if line)])
