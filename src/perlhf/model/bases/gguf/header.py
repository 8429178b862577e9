"""What a GGUF file says before its weights: settings, and where which tensor lies. Nothing is computed here.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Files come from
anywhere: each length is checked against the file's size before it is followed.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from perlhf.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values that have a fixed size, as `struct` names them."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_AGAIN = "download it again, and compare its size or SHA-256 with what its page says"


@dataclass(frozen=True)
class Header:
    """Settings and tensors of a GGUF file.

    Args:
        file: where it is.
        settings: by key; of an array of strings its length alone, but for those of `tokenizer.chat_templates`.
        tensors: shape (slowest dimension first) by name.
        small: values of the tensors that hold numbers for positions (`rope_...`), which transformers leaves out.
    """

    file: Path
    settings: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    small: dict[str, list[float]]

    @property
    def architecture(self) -> str:
        return str(self.settings["general.architecture"])

    @property
    def weights(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(shape) for shape in self.tensors.values())

    def setting(self, key: str) -> Any:
        """A setting of the architecture (`rope.scaling.type`); None where it has none of that name."""
        return self.settings.get(f"{self.architecture}.{key}")


def read_header(file: Path) -> Header:
    """Settings and tensors of a whole GGUF file that this machine can unpack.

    Raises:
        ModelError: it is no GGUF file, one of several parts, cut off, damaged, or quantised in an unknown way.
        OSError: it can't be read.
    """
    where = str(file)
    with file.open("rb") as opened:
        if opened.read(4) != MAGIC:
            raise ModelError("it is no GGUF file", where=where, allowed="a file that begins with GGUF", hint=_AGAIN)
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                settings, tensors, start = _Reader(content).header()
            except (struct.error, EOFError) as error:
                what = f"the GGUF file is cut off within its header ({len(content):,} bytes)"
                raise ModelError(what, where=where, hint=_AGAIN) from error
            except (ValueError, TypeError, OverflowError) as error:
                raise ModelError(f"the GGUF file's header is damaged: {error}", where=where, hint=_AGAIN) from error
            _check_whole(settings, where)
            needed = start + max(
                (offset + _bytes_of(shape, kind) for shape, kind, offset in tensors.values()), default=0
            )
            if len(content) < needed:
                what = f"the GGUF file is cut off: {len(content):,} bytes of {needed:,}"
                raise ModelError(what, where=where, allowed="the whole file", hint=_AGAIN)
            checked = {kind: name for name, (_, kind, _) in reversed(tensors.items())}
            for kind, name in checked.items():
                _check_kind(name, kind, where)
            small = {
                name: np.frombuffer(content, "<f4", prod(shape), start + offset).tolist()
                for name, (shape, kind, offset) in tensors.items()
                if name.startswith("rope_") and kind == gguf.GGMLQuantizationType.F32
            }
    return Header(file, settings, {name: shape for name, (shape, _, _) in tensors.items()}, small)


def _check_whole(settings: dict[str, Any], where: str) -> None:
    if not isinstance(settings.get("general.architecture"), str):
        raise ModelError(
            "the GGUF file names no architecture", where=where, allowed="general.architecture in its header"
        )
    parts = settings.get("split.count", 1)
    if parts > 1:
        raise ModelError(
            f"it is part {settings.get('split.no', 0) + 1} of a GGUF file in {parts}",
            where=where,
            allowed="one file that holds all of it",
            hint="llama.cpp joins them: llama-gguf-split --merge NAME-00001-of-... whole.gguf",
        )


def _check_kind(name: str, kind: int, where: str) -> None:
    """Refuses a type of tensor that the gguf package can't unpack."""
    try:
        known = gguf.GGMLQuantizationType(kind)
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[known][1]), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError) as error:
        label = next((one.name for one in gguf.GGMLQuantizationType if one.value == kind), f"number {kind}")
        what = f"tensor {name} is quantised as {label}, which can't be unpacked here"
        allowed = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ1 to IQ4, TQ, MXFP4"
        raise ModelError(what, where=where, allowed=allowed, hint="take the file of another quantisation") from error


class _Reader:
    """Reads one value after the other."""

    def __init__(self, content: mmap.mmap):
        self.content, self.at = content, 4

    def header(self) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
        """Settings, tensors (shape, type's number, where it begins), and where tensors begin."""
        version = self.number("I")
        if version not in _VERSIONS:
            big = struct.unpack(">I", struct.pack("<I", version))[0] in _VERSIONS
            raise ValueError("it is of a big-endian machine" if big else f"version {version}; 2 and 3 are known")
        tensor_count, setting_count = self.number("Q"), self.number("Q")
        settings: dict[str, Any] = {}
        for _ in range(setting_count):
            key = self.string()
            settings[key] = self.value(self.number("I"), keep=key == "tokenizer.chat_templates")
        tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = self.string()
            shape = tuple(reversed([self.number("Q") for _ in range(self.number("I"))]))
            tensors[name] = shape, self.number("I"), self.number("Q")
        alignment = int(settings.get("general.alignment", _ALIGNMENT))
        if alignment < 1:
            raise ValueError(f"general.alignment is {alignment}")
        return settings, tensors, -(-self.at // alignment) * alignment

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(kind)
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.need(length)
        self.at += length
        return self.content[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int, keep: bool = False) -> Any:
        """A value; of an array of strings its length, unless they are to be kept."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            size = struct.calcsize(_NUMBERS[inner])
            self.need(count * size)
            values = struct.unpack_from(f"<{count}{_NUMBERS[inner]}", self.content, self.at)
            self.at += count * size
            return list(values)
        if inner != _STRING:
            raise ValueError(f"an array of type {inner}")
        if keep:
            return [self.string() for _ in range(count)]
        for _ in range(count):
            length = self.number("Q")
            self.need(length)
            self.at += length
        return count

    def need(self, size: int) -> None:
        if size > len(self.content) - self.at:
            raise EOFError


def _bytes_of(shape: tuple[int, ...], kind: int) -> int:
    """Bytes that a tensor takes; 0 for a type that nobody knows, which is told later."""
    sizes = {known.value: size for known, size in gguf.GGML_QUANT_SIZES.items()}
    numbers, size = sizes.get(kind, (1, 0))
    return prod(shape) // numbers * size
