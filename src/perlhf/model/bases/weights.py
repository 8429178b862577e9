"""Tensors of a base's files, each read when it is needed, straight into the dtype and to the device of its use.

A tensor that is stored as it is used on a CPU is mapped: it costs no memory of the process's own, lies in the system's
page cache, and is there once for all processes. One that is converted, or copied to a GPU, is read by itself and
given back at once, so that the peak is the weights and a few tensors.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

from perlhf.errors import ModelError
from perlhf.runs import words
from perlhf.system.machine import free_memory_bytes, memory_bytes

_M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_FULL = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch says of full memory."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    tensor: Any
    """A slice of safetensors, which reads when it is indexed."""
    bytes: int
    """In the dtype of its use."""
    mapped: bool
    """Whether its pages are used as they lie in the file."""


def open_weights(files: list[Path], dtype: torch.dtype, device: torch.device) -> dict[str, Stored]:
    """All tensors by name; reads the files' headers alone.

    Raises:
        OSError, SafetensorError: a file can't be read.
    """
    found: dict[str, Stored] = {}
    for file in files:
        mapped, read = (safe_open(file, framework="pt", backend=backend) for backend in ("mmap", "pread"))
        for name in mapped.keys():
            piece = mapped.get_slice(name)
            code = piece.get_dtype()
            as_it_is = device.type == "cpu" and (code == _CODES.get(dtype) or code not in _FLOATS)
            width = dtype.itemsize if code in _FLOATS else 1
            size = prod(piece.get_shape()) * width
            found[name] = Stored(piece if as_it_is else read.get_slice(name), size, as_it_is)
    return found


class _Turned:
    """A tensor of a file with its last two dimensions exchanged, read when it is indexed."""

    def __init__(self, tensor: Any):
        self._tensor = tensor

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self._tensor[...].transpose(-2, -1).contiguous()[key]

    def get_shape(self) -> list[int]:
        *before, rows, columns = self._tensor.get_shape()
        return [*before, columns, rows]

    def get_dtype(self) -> str:
        return self._tensor.get_dtype()


def fitted(stored: Stored, shape: Sequence[int]) -> Stored:
    """The tensor as a network of this shape wants it: experts lie in some files with inputs before outputs."""
    turned = _Turned(stored.tensor)
    if len(shape) == 3 and list(shape) != stored.tensor.get_shape() and list(shape) == turned.get_shape():
        return Stored(turned, stored.bytes, False)
    return stored


def names_in(files: list[Path]) -> list[str]:
    """Names of all tensors."""
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    return names


def stored_dtype(files: list[Path]) -> torch.dtype | None:
    """The one dtype that all numbers of the files are stored in; None where they are in several, or in another."""
    codes: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            codes |= {opened.get_slice(name).get_dtype() for name in opened.keys()}
    found = [dtype for dtype, code in _CODES.items() if code in codes]
    return found[0] if len(found) == 1 and len(codes & {*_FLOATS}) == 1 else None


def forget_pages(tensor: torch.Tensor) -> None:
    """Gives back what a mapped tensor takes of this process's memory; whoever reads it again reads its file.

    The numbers of one that isn't mapped are lost.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def give_back_at_once() -> None:
    """Has glibc give memory from 1 MiB on back to the system as soon as it is free; other allocators do as they do.

    It would keep gathered layers, whose room a gap among other tensors soon makes useless: of a base of 270 MB more
    than twice that (docs/devices.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@contextlib.contextmanager
def room_for(
    weights: Mapping[str, Stored], dtype: torch.dtype, device: torch.device, where: str, workers: int = 1
) -> Iterator[None]:
    """Refuses weights for which there is no memory before one is read, and tells where it runs full all the same.

    What is mapped needs room in the page cache, which other things may leave; what is copied needs it now.

    Args:
        workers: how many hold the weights between them, each a part that is copied.

    Raises:
        ModelError: with what is needed, what is free, and what takes less.
    """
    needed = sum(stored.bytes for stored in weights.values()) // workers
    copied = needed
    if workers == 1:
        copied = sum(stored.bytes for stored in weights.values() if not stored.mapped)
    free = _free(device)
    if free is not None and (copied > free or (device.type == "cpu" and needed > memory_bytes())):
        raise _full(needed, min(free, memory_bytes()) if device.type == "cpu" else free, dtype, device, where)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(said in str(error) for said in _FULL):
            raise _full(needed, _free(device), dtype, device, where) from error
        raise


def _free(device: torch.device) -> int | None:
    """Bytes that can be had now; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = free_memory_bytes("cpu")
    return None if free is None else free + psutil.swap_memory().free


def _full(needed: int, free: int | None, dtype: torch.dtype, device: torch.device, where: str) -> ModelError:
    place = "the GPU's memory" if device.type == "cuda" else "memory"
    said = "" if free is None else f", of which {words.memory(free)} are free"
    name = str(dtype).removeprefix("torch.")
    half = f"--dtype bfloat16 takes {words.memory(needed // 2)}; " if dtype == torch.float32 else ""
    width = dtype.itemsize
    less = f"--quantize nf4 about {words.memory(round(needed / width * 0.6))}, int8 {words.memory(needed // width)}"
    what = f"the base's weights take {words.memory(needed)} of {place} in {name}{said}"
    return ModelError(what, where=where, hint=f"{half}{less}; or a smaller base")
