"""A base gets into memory: its network, frozen, and its tokenizer; on which device and in which dtype."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perlhf.errors import ModelError, PerlhfError
from perlhf.model.bases.found import Base, first_line
from perlhf.model.bases.packaged import (
    SMOLLM2,
    SMOLLM2_CONFIG,
    is_complete,
    quiet,
)
from perlhf.model.supported import check_supported
from perlhf.system.machine import bound_compiled_products, cpu_computes_in_bf16


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token; `model_max_length` is what the network takes, where that is known.

    Raises:
        ModelError: it can't be read, has no end token, or has tokens that the network has no embedding for.
    """
    with quiet(), _model_errors(base, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base.directory, local_files_only=True, trust_remote_code=False)
        config = _config(base)
        limit = getattr(config, "max_position_embeddings", None)
    _check_vocabulary(base, tokenizer, config)
    if tokenizer.eos_token_id is None:
        hint = "set eos_token in tokenizer_config.json"
        raise ModelError("the tokenizer has no end token", where=str(base.directory), hint=hint)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if limit:
        tokenizer.model_max_length = limit
    own_limit = tokenizer.init_kwargs.get("model_max_length")
    read = {key: getattr(tokenizer, key) for key in ("model_max_length", "eos_token_id", "pad_token_id")}
    for key, value in (*read.items(), ("model_max_length", 0 if own_limit is None else own_limit)):
        if type(value) not in (int, float) or value < 0:
            what = f"{key} of the tokenizer is {value!r:.100}"
            raise ModelError(what, where=str(base.directory / "tokenizer_config.json"), allowed="a number from 0")
    return tokenizer


def end_ids(base: Base) -> tuple[int, ...]:
    """Ids that the network ends an answer with, by its generation configuration (else its configuration).

    Raises:
        ModelError: the configuration can't be read.
    """
    file = base.directory / "generation_config.json"
    with _model_errors(base, "generation configuration"):
        said = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if not isinstance(said, dict):
            raise ModelError("it is no JSON object", where=str(file), allowed='{"eos_token_id": ..., ...}')
        named = said.get("eos_token_id")
        if named is None:
            named = getattr(_config(base).get_text_config(), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    for number in listed:
        if number is not None and (type(number) is not int or not 0 <= number < 2**31):
            what, allowed = f"eos_token_id has {number!r:.100}", "token ids: whole numbers from 0"
            raise ModelError(what, where=str(base.directory), allowed=allowed)
    return tuple(number for number in listed if number is not None)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the embedding that have a token: one more than the highest id. Networks often have some more, padded."""
    return max(tokenizer.get_vocab().values()) + 1


def _check_vocabulary(base: Base, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is None or vocabulary(tokenizer) <= rows:
        return
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    named = ", ".join(f"{token!r} ({number})" for number, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
    raise ModelError(
        f"the network has no embedding for {len(beyond)} of the tokenizer's tokens: {named}",
        where=str(base.directory),
        allowed=f"ids below {rows}, the rows of its embedding (vocab_size in config.json)",
        hint="model.resize_token_embeddings(len(tokenizer)) in transformers, and save both in a new directory; or "
        "remove these tokens from tokenizer.json",
    )


def load_base(base: Base, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """The frozen network: evaluation mode, no gradients. `Model` verifies its forward pass.

    Raises:
        ModelError: unsupported architecture, no or unreadable safetensors, or missing weights.
    """
    bound_compiled_products()
    with quiet(), _model_errors(base, "model"):
        config = _config(base)
        check_supported(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        what = f"the weights lack {len(missing)} tensors of {type(model).__name__}: {', '.join(missing[:3])}"
        raise ModelError(what, where=str(base.directory))
    return model.to(device).eval().requires_grad_(False)


def without_weights(name: str) -> PreTrainedModel:
    """The network of a base on torch's meta device: modules and shapes. The packaged base need not be pulled for it.

    Raises:
        ModelError: the base isn't here, its configuration or tokenizer can't be read, or it isn't supported.
    """
    packaged = name == SMOLLM2.name and not is_complete(SMOLLM2.directory)
    base = Base(SMOLLM2.directory) if packaged else Base.find(name)
    with quiet(), _model_errors(base, "model"), torch.device("meta"):
        config = LlamaConfig(**SMOLLM2_CONFIG) if packaged else _config(base)
        check_supported(config)
        network = AutoModelForCausalLM.from_config(config)
    if not packaged:
        load_tokenizer(base)  # what it can't be trained with is said before anything is
    return network


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device, else the CPU.

    Raises:
        ModelError: the named device isn't there.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    allowed = "auto, cpu" + "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device}", where="device", allowed=allowed) from error
    if named.type not in ("cpu", "cuda") or (named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"device {device} isn't available here", where="device", allowed=allowed)
    return named


def pick_dtype(dtype: str, device: str | torch.device) -> tuple[torch.dtype, str]:
    """The base's dtype and one sentence that says why.

    Args:
        dtype: `auto`, `bfloat16` or `float32`; `auto` is bfloat16 where the hardware is faster in it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    if pick_device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "this GPU computes in it" if fast else "this GPU has no bfloat16 instructions"
    else:
        fast, why = cpu_computes_in_bf16()
    match dtype:
        case "bfloat16" if not fast:
            return torch.bfloat16, f"bfloat16 as asked; {why}: it will be slow"
        case "bfloat16" | "float32":
            return getattr(torch, dtype), f"{dtype} as asked"
        case "auto" if fast:
            return torch.bfloat16, f"bfloat16: {why}"
        case "auto":
            return torch.float32, f"float32: {why} (twice the memory of bfloat16)"
        case _:
            raise ModelError(f"unknown dtype {dtype}", where="dtype", allowed="auto, bfloat16, float32")


def _config(base: Base) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(base.directory, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _model_errors(base: Base, what: str) -> Iterator[None]:
    """What the libraries raise for a directory they can't read becomes one `ModelError`."""
    try:
        yield
    except (PerlhfError, MemoryError):  # full memory is told as that
        raise
    except BaseException as error:
        # Over files of any kind these libraries raise anything, a bare Exception and a panic of Rust's among it.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message, where = f"the {what} can't be loaded: {first_line(error)}", str(base.directory)
        hint = "a directory with config.json, tokenizer and safetensors that this version of transformers can load"
        raise ModelError(message, where=where, allowed=hint) from error
