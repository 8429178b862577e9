"""Writes networks and adapters of transformers as GGUF files, one tensor at a time.

What is turned on the way: the heads of a Llama, whose rotary embedding pairs neighbours in llama.cpp and halves in
transformers, in weights and adapters alike; and norms of a Gemma, whose weights count from zero in transformers and
from one there. Tensors of one dimension are float32 whatever the others are: llama.cpp computes with no other ones.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from perlhf.errors import ModelError
from perlhf.model.adapter import Adapter
from perlhf.model.to_gguf.settings import SHAPES, add_settings, rope_factors
from perlhf.model.to_gguf.vocabulary import Vocabulary

_KINDS = {
    torch.float32: (np.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (np.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (np.uint16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
"""As numpy holds it, as tensors and as files name it."""
Stored = tuple[Tensor, torch.dtype, Callable[[Tensor], Tensor]]
"""A tensor, the dtype that it is written in, and how it is laid out there."""


def write_network(
    file: Path,
    network: PreTrainedModel,
    vocabulary: Vocabulary,
    dtype: torch.dtype,
    name: str,
    sampling: Mapping[str, float] | None = None,
) -> None:
    """Writes a whole network with its tokenizer.

    Args:
        file: to write.
        network: of a shape that `settings.check_shape` lets through.
        vocabulary: has a token for each row of its embedding.
        dtype: of tensors with two dimensions: float32, float16 or bfloat16.
        name: what people call it.
        sampling: what llama.cpp samples with unless it is told: `temperature`, and no other filter then.

    Raises:
        ModelError: a weight that the dtype can't hold, or that llama.cpp has no place for.
        OSError: it can't be written.
    """
    config: Any = network.config
    with _writer(file, config) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(_KINDS[dtype][2].value)
        if sampling:
            writer.add_float32("general.sampling.temp", sampling["temperature"])
            writer.add_int32("general.sampling.top_k", 0)
            writer.add_float32("general.sampling.top_p", 1.0)
            writer.add_float32("general.sampling.min_p", 0.0)
        tensors, name_of = dict[str, Stored](), _names(config)
        for own, weight in network.named_parameters():
            tensors[name_of(own)] = (weight, torch.float32 if weight.ndim == 1 else dtype, _layout(config, own))
        if (factors := rope_factors(config)) is not None:
            tensors["rope_freqs.weight"] = (factors, torch.float32, _as_it_is)
        add_settings(writer, config, len(vocabulary.tokens))
        vocabulary.add(writer)
        _write(writer, tensors)


def write_adapter(file: Path, config: PreTrainedConfig, adapter: Adapter, name: str) -> None:
    """Writes an adapter for a file of its base, in float32.

    A file has one alpha, and each pair its rank. Where the scale of a pair isn't alpha / rank, its B makes up for that.

    Args:
        file: to write.
        config: of the base.
        adapter: low-rank pairs with nothing beneath them.
        name: what people call it.

    Raises:
        ModelError: a layer that llama.cpp has no place for; OSError: it can't be written.
    """
    alpha = adapter.alpha or 1.0  # llama.cpp takes none for 0
    tensors, name_of = dict[str, Stored](), _names(config)
    for path, pair in adapter.pairs.items():
        stored, layout = name_of(f"{path}.weight"), _layout(config, f"{path}.weight")
        rank = pair.a.shape[0]
        more = pair.scale * rank / alpha
        b = pair.b.detach() if abs(more - 1) < 1e-9 else pair.b.detach() * more
        tensors[f"{stored}.lora_a"] = (pair.a, torch.float32, _as_it_is)
        tensors[f"{stored}.lora_b"] = (b, torch.float32, layout)
    with _writer(file, config) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32.value)
        _write(writer, tensors)


def _names(config: Any) -> Callable[[str], str]:
    """What llama.cpp calls a tensor of the network; a ModelError says where it has none such."""
    architecture = SHAPES[config.model_type]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def name_of(own: str) -> str:
        found = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if found is None:
            what = f"llama.cpp has no place for '{own}' in a {architecture} network"
            raise ModelError(what, where="gguf", hint="leave out --gguf")
        return found

    return name_of


def _layout(config: Any, own: str) -> Callable[[Tensor], Tensor]:
    """How llama.cpp has the values of a tensor, or the rows of an adapter's B for it."""
    module = own.rsplit(".", 2)[-2]
    if config.model_type == "llama" and module in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        return lambda tensor: interleaved(tensor, heads)
    if config.model_type == "gemma3_text" and own.endswith("norm.weight"):
        return lambda tensor: tensor.float() + 1
    return _as_it_is


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order that pairs neighbours: 0, half, 1, half + 1, ..

    Args:
        tensor: [heads * width, ...].
        heads: of how many heads its rows are.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def _writer(file: Path, config: Any) -> Iterator[gguf.GGUFWriter]:
    """A writer that is closed in the end. An error of numpy's, which keeps back why it can't write, gets a reason."""
    writer = gguf.GGUFWriter(file, SHAPES[config.model_type])
    try:
        yield writer
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        writer.close()


@torch.no_grad()
def _write(writer: gguf.GGUFWriter, tensors: Mapping[str, Stored]) -> None:
    """Header, settings and tensors, of which one is in memory at a time."""
    for name, (tensor, dtype, _) in tensors.items():
        held, kind, _ = _KINDS[dtype]
        size = tensor.numel() * np.dtype(held).itemsize
        writer.add_tensor_info(name, tensor.shape, np.dtype(held), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (tensor, dtype, layout) in tensors.items():
        laid = layout(tensor.detach()).to(device="cpu", dtype=dtype).contiguous()
        if not torch.isfinite(laid).all():
            said = str(dtype).removeprefix("torch.")
            hint = "--dtype bfloat16 or float32" if dtype == torch.float16 else "train the run again"
            raise ModelError(f"{name} has values that {said} can't hold", where="dtype", hint=hint)
        writer.write_tensor_data(laid.view(torch.uint16).numpy() if dtype == torch.bfloat16 else laid.numpy())
