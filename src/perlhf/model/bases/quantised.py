"""Quantised bases: `quantize` while loading, and checkpoints that come quantised.

`int8` and `nf4` are bitsandbytes': its layers compute the output (`kernels.quantised`). nf4 is without double
quantisation, which would save a twelfth of the memory and read weights back at a third of the speed. int8 is without
outliers (`llm_int8_threshold=0`): they would be those of a batch, and a result would depend on the rows beside it.
FP8 and MXFP4 are read back while they are loaded: their kernels are for some GPUs, and fetched from the hub as code.
"""

import contextlib
import ctypes
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from perlhf.errors import ModelError
from perlhf.kernels import cpu
from perlhf.kernels.quantised import QuantisedLinear
from perlhf.model.bases.found import Base

Quantize = Literal["none", "int8", "nf4"]
BITSANDBYTES = "bitsandbytes"
_NF4_BLOCK = 64
"""Weights that share a float32 scale."""
_PACKAGES = {
    BITSANDBYTES: ((BITSANDBYTES,), "pip install 'perlhf[quantized]'"),
    "compressed-tensors": (("compressed_tensors",), "pip install compressed-tensors"),
    "gptq": (("gptqmodel", "optimum"), "pip install gptqmodel optimum"),
    "awq": (("gptqmodel",), "pip install gptqmodel"),
}
"""Of a method: the packages that compute or read it, and how they are installed."""
_READ_BACK = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
_KEPT = (BITSANDBYTES, "gptq", "awq")
_BESIDE = ("gguf",)
"""Read by others."""
_CHUNK = 2**20
"""Numbers that are read back from int8 at a time."""


def method_of(config: PreTrainedConfig) -> str | None:
    """How the checkpoint with this configuration is quantised (`bitsandbytes`, `fp8`, ...); None for whole weights."""
    settings = _settings(config)
    if not settings:
        return None
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return BITSANDBYTES
    return str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))


def check_quantised(config: PreTrainedConfig, quantize: str = "none", device: str = "auto") -> None:
    """Refuses what can't be quantised, or comes quantised in a way that nothing here computes.

    Raises:
        ModelError: names the method, and what to install where that is what is missing.
    """
    method = method_of(config)
    if quantize != "none":
        if method is not None:
            what = f"quantize is {quantize}, but the checkpoint comes quantised ({method})"
            raise ModelError(what, where="quantize", allowed="none", hint="leave quantize out")
        if device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise ModelError(
                f"quantize: {quantize} doesn't compute on device {device}",
                where="quantize",
                allowed="auto, cpu, cuda, cuda:N; or quantize: none",
            )
        _need(BITSANDBYTES, f"quantize: {quantize}")
    if method is None or method in _BESIDE:
        return
    if method not in (*_KEPT, *_READ_BACK):
        raise ModelError(
            f"{config.model_type} can't be a base: its weights are quantised by {method}, which isn't computed here",
            where="base",
            allowed=f"weights that are whole, or quantised by {', '.join((*_KEPT, *_READ_BACK))}",
            hint="take the checkpoint that it was made from; quantize: nf4 makes that small while it is loaded",
        )
    if method in _PACKAGES:
        _need(method, f"a checkpoint quantised by {method}")


def identity(base: Base, quantize: str) -> dict[str, Any]:
    """The base's fingerprint, and how it is quantised while loading: what an adapter is trained on."""
    if quantize == "none":
        return base.fingerprint
    _import_bitsandbytes()  # so that a manifest tells its version
    return base.fingerprint | {"quantize": quantize}


def loading_arguments(config: PreTrainedConfig, quantize: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told about quantisation; a configuration of weights to be read back says so afterwards.

    The weights lie on their device when it returns, and aren't to be moved where `is_kept`.
    """
    method = method_of(config)
    if BITSANDBYTES in (method, BITSANDBYTES if quantize != "none" else None):
        _import_bitsandbytes()
    if quantize == "nf4":
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **settings)}
    if quantize == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    if method in _READ_BACK:
        config.quantization_config = _settings(config) | {"dequantize": True}  # pyright: ignore[reportAttributeAccessIssue]
    return {}


def load_quantised(
    base: Base, config: PreTrainedConfig, quantize: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The frozen network of a base that is quantised while it is loaded, or comes so; each tensor as it is read.

    Raises:
        ModelError: missing weights, or a kind of layer that isn't known.
    """
    kept = is_kept(config, quantize)
    arguments = loading_arguments(config, quantize, dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        base.directory,
        config=config,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **arguments,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        what = f"the weights lack {len(missing)} tensors of {type(model).__name__}: {', '.join(missing[:3])}"
        raise ModelError(what, where=str(base.directory))
    if kept:
        own_layers(model, dtype)
    else:
        whole_into(model, dtype)
    _give_memory_back()
    return model.eval().requires_grad_(False)


def is_kept(config: PreTrainedConfig, quantize: str) -> bool:
    """Whether layers of the loaded network are quantised."""
    return quantize != "none" or method_of(config) in _KEPT


def own_layers(network: PreTrainedModel, dtype: torch.dtype) -> int:
    """Puts `QuantisedLinear` in the place of quantised layers, and the rest into `dtype`; tells how many.

    Raises:
        ModelError: a kind of layer that isn't known.
    """
    found = 0
    for path, module in list(network.named_modules()):
        package = type(module).__module__.partition(".")[0]
        if package not in (BITSANDBYTES, "gptqmodel") or not hasattr(module, "in_features"):
            continue
        known: Any = module
        read = _reader(path, known, dtype)
        layer = QuantisedLinear(module, read, known.in_features, known.out_features, dtype, _four_bits(known))
        parent, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(parent), leaf, layer.requires_grad_(False).train(module.training))
        found += 1
    whole_into(network, dtype)
    return found


def whole_into(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """The parameters that aren't quantised in `dtype`: transformers leaves them as a quantised checkpoint has them."""
    kept = (*(network._keep_in_fp32_modules or ()), *(network._keep_in_fp32_modules_strict or ()))
    quantised = {
        id(p) for module in network.modules() if isinstance(module, QuantisedLinear) for p in module.parameters()
    }
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and id(parameter) not in quantised and not any(key in name for key in kept):
            parameter.data = parameter.data.to(dtype)


def quantised_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Quantised layers by path, adapted or not; each has `dense()`."""
    for path, module in network.named_modules():
        if getattr(module, "quantised", None) is not None:
            yield path, module


def is_quantised(network: nn.Module) -> bool:
    """Whether it has quantised layers."""
    return next(quantised_layers(network), None) is not None


def note_of(config: PreTrainedConfig, network: nn.Module, quantize: str, dtype: torch.dtype) -> str | None:
    """What the user should know about the weights as they were loaded; None for nothing."""
    method, name = method_of(config), str(dtype).removeprefix("torch.")
    if method in _READ_BACK:
        return f"weights in {method} were read back into {name} while loading: they take the memory of that"
    if method == BITSANDBYTES and _settings(config).get("load_in_8bit") and _settings(config).get("llm_int8_threshold"):
        return "llm_int8_threshold of the checkpoint is taken as 0: outliers would make results depend on the batch"
    if quantize != "none":
        whole = sum(p.numel() for p in network.parameters() if p.is_floating_point())
        dense = sum(layer.in_features * layer.out_features for _, layer in quantised_layers(network))
        if dense < whole:
            share = dense / (whole + dense)
            return f"quantize: {quantize} reaches {share:.0%} of the weights: only linear layers, no fused experts"
    return None


def layer_bytes(network: PreTrainedModel, quantize: str, whole: int) -> int:
    """Memory of the largest layer while it is read back, `whole` bytes a weight; 0 where nothing is quantised."""
    if not is_kept(network.config, quantize):
        return 0
    head = network.get_output_embeddings()
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) and m is not head]
    return max((layer.in_features * layer.out_features for layer in layers), default=0) * whole


def weight_bytes(network: PreTrainedModel, quantize: str, whole: int) -> int:
    """Memory of the network's weights, `whole` bytes each where they aren't quantised.

    Args:
        network: on the meta device, with plain layers.
        quantize: `none`, or what bitsandbytes would make of all linear layers but the output head; a configuration that
            says how the checkpoint is quantised goes before it.
    """
    total = network.num_parameters()
    settings = _settings(network.config)
    if method_of(network.config) == BITSANDBYTES:
        quantize = "nf4" if settings.get("load_in_4bit") else "int8"
    elif method_of(network.config) in ("gptq", "awq"):
        quantize = "nf4"
    if quantize == "none":
        return total * whole
    head = network.get_output_embeddings()
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) and m is not head]
    dense = sum(layer.in_features * layer.out_features for layer in layers)
    scales = 4 * (sum(layer.out_features for layer in layers) if quantize == "int8" else dense // _NF4_BLOCK)
    return (total - dense) * whole + (dense if quantize == "int8" else dense // 2) + scales


def bitsandbytes_settings(quantize: str, dtype: str) -> dict[str, Any]:
    """The same settings as the arguments of transformers' `BitsAndBytesConfig`, for other tools; {} for `none`."""
    if quantize == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if quantize == "nf4":
        return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {}


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    settings = getattr(config, "quantization_config", None)
    return settings if isinstance(settings, dict) else settings.to_dict() if settings is not None else {}


def _give_memory_back() -> None:
    """glibc keeps what quantising took beside the weights, 0.5 GB for a network of 135M; other allocators don't."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _need(method: str, what: str) -> None:
    packages, install = _PACKAGES[method]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelError(f"{what} needs {missing[0]}, which isn't installed", where="base", hint=install)


def _import_bitsandbytes() -> None:
    """Once before its layers are made.

    It warns of each cast to float16, and where a package `kernels` is installed it would fetch code from the hub for a
    product that isn't used here.
    """
    logging.getLogger(BITSANDBYTES).setLevel(logging.ERROR)
    if BITSANDBYTES in sys.modules:
        return
    had = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]  importing it fails
    try:
        importlib.import_module(BITSANDBYTES)
    finally:
        del sys.modules["kernels"]
        if had is not None:
            sys.modules["kernels"] = had


def _reader(path: str, layer: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Makes the layer compute in `dtype`, the same with a graph and without, and gives what reads its weight back."""
    match type(layer).__name__:
        case "Linear4bit":
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            # Another layout and another product, without a graph only: an untrained policy's KL wouldn't be 0.
            layer.support_avx512bf16_for_cpu = False
            layer.weight.quant_state.dtype = dtype
            return lambda: _from_4bit(layer)
        case "Linear8bitLt" if layer.weight.dtype == torch.int8:
            if layer.weight.CB is not None:
                layer.init_8bit_state()
            layer.state.threshold = 0.0
            return lambda: _from_int8(layer.state.CB, layer.state.SCB, dtype)
        case _ if type(layer).__module__.startswith("gptqmodel"):
            return lambda: from_products(layer, layer.in_features, dtype, next(layer.buffers()).device)
        case name:
            raise ModelError(f"{path} is a {name}, which isn't computed here", where="base")


def _four_bits(layer: Any) -> cpu.FourBits | None:
    """The weight of 4 bits as our own kernel reads it; None for others, and for scales that are quantised as well."""
    state = getattr(layer.weight, "quant_state", None) if type(layer).__name__ == "Linear4bit" else None
    if state is None or state.nested or state.blocksize != cpu.BLOCK_4 or layer.weight.dtype != torch.uint8:
        return None
    scales, table = (tensor.float().contiguous() for tensor in (state.absmax, state.code))
    return cpu.FourBits(layer.weight.data, scales, table, layer.in_features, layer.out_features)


def _from_4bit(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state).reshape(layer.out_features, layer.in_features)


def _from_int8(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values [outputs, inputs] of -127 to 127 times a scale for each row over 127; float32 numbers exist in parts."""
    dense = torch.empty(values.shape, dtype=dtype, device=values.device)
    by_row = scales.reshape(-1, 1) * (1.0 / 127.0)
    rows = max(1, _CHUNK // values.shape[1])
    for to, part, scale in zip(dense.split(rows), values.split(rows), by_row.split(rows), strict=True):
        to.copy_(part.float().mul_(scale))
    return dense


def from_products(layer: Callable[[Tensor], Tensor], inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """W [outputs, inputs] of a linear layer that tells it by its products alone: what it makes of unit vectors."""
    with torch.no_grad():
        bias = layer(torch.zeros(1, inputs, dtype=dtype, device=device))
        return (layer(torch.eye(inputs, dtype=dtype, device=device)) - bias).t().contiguous()
