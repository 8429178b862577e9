"""A CPU's own kernels: attention over a prefix tree, norms and gated products, each in one pass over memory.

They are compiled by the system's C++ compiler when they are first wanted, once for each processor, and kept in the
cache; where there is none, callers compute the same with torch's operations, which are their twin in the tests.
"""

import ctypes
import functools
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perlhf.kernels import cpu_build
from perlhf.kernels.call import calling, current_call
from perlhf.system.machine import cache_dir

FEW_ROWS = 64
"""Rows up to which a linear layer's own kernel is faster than oneDNN's."""
BLOCK = 32
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


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
    """What stands in a run's manifest: `compiled`, or why not; before they were wanted, what is to be expected."""
    return _load()[1] if _load.cache_info().currsize else cpu_build.compiler()[1]


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


def linear(x: Tensor, weight: Tensor, pair: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x W^T, and with a pair (a [rank, in], b [out, rank], rank a multiple of BLOCK) + (x a^T) b^T, without gradients.

    x: [..., in], bfloat16, as `few_rows` wants it.
    """
    assert _has_linear(), "ask `few_rows` first"
    x = x.contiguous()
    a, b = pair or (weight, weight)
    out = x.new_empty(*x.shape[:-1], len(weight))
    call("linear", x, weight, a, b, out, x.numel() // x.shape[-1], *reversed(weight.shape), len(a) if pair else 0)
    return out


def padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The pair with zeros to a rank that `linear` takes."""
    more = -len(a) % BLOCK
    return F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))


def int64s(numbers: Sequence[int]) -> Any:
    """An array that C reads."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


_kernels: dict[tuple[str, torch.dtype], Any] = {}


@functools.cache
def _has_linear() -> bool:
    found = _load()[0]
    return found is not None and bool(found.has_linear())


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    compiler, why = cpu_build.compiler()
    if compiler is None:
        return None, why
    for threads, state in (("-fopenmp", "compiled"), ("-fopenmp-simd", "compiled for one thread")):
        try:
            return ctypes.CDLL(str(cpu_build.compile_kernels(compiler, threads))), state
        except (OSError, subprocess.CalledProcessError):
            continue
    return None, f"off ({Path(compiler).name} could not compile them, or {cache_dir()} can't be written)"
