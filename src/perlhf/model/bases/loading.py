"""A base gets into memory: its network, frozen, and its tokenizer; on which device and in which dtype."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _get_model_class

from perlhf.errors import ModelError, PerlhfError
from perlhf.model.bases.found import Base, configuration_of, first_line, weight_files
from perlhf.model.bases.packaged import (
    SMOLLM2,
    SMOLLM2_CONFIG,
    is_complete,
    quiet,
)
from perlhf.model.bases.quantised import check_quantised, load_quantised, method_of, note_of
from perlhf.model.bases.sharded import held_dtype, spread
from perlhf.model.bases.text_model import is_multimodal, names_of_text, text_config
from perlhf.model.bases.weights import Stored, fitted, names_in, open_weights, room_for, stored_dtype
from perlhf.model.supported import check_supported
from perlhf.parallel.shard import Shards
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


def holds_more_than_text(base: Base) -> bool:
    """Whether a base is a multimodal checkpoint, of which the language model alone is used.

    Raises:
        ModelError: its configuration can't be read.
    """
    with quiet(), _model_errors(base, "model"):
        return is_multimodal(_whole_config(base))


def load_base(
    base: Base, dtype: torch.dtype, device: str | torch.device, quantize: str = "none", shards: Shards | None = None
) -> PreTrainedModel:
    """The frozen network: evaluation mode, no gradients. `Model` verifies its forward pass.

    Of a multimodal checkpoint it is the language model alone.

    Args:
        quantize: `int8` or `nf4` keeps its linear layers in few bits (`quantised`).
        shards: the workers over which its layers are spread while it is loaded (`sharded`); quantised ones aren't.

    Raises:
        ModelError: unsupported architecture, no or unreadable safetensors, missing weights, or no memory for them.
    """
    with quiet(), _model_errors(base, "model"):
        config = _config(base)
        check_supported(config)
        check_quantised(config, quantize, torch.device(device).type)
        if quantize != "none" or method_of(config) is not None:
            bound_compiled_products()
            return load_quantised(base, config, quantize, dtype, torch.device(device))
    if shards is None:
        return load_network(base, AutoModelForCausalLM, dtype, device).requires_grad_(False)
    # As it is stored it is mapped, and takes no memory until a layer's part is copied.
    stored = held_dtype(config, dtype, stored_dtype(weight_files(base.directory)))
    network = load_network(base, AutoModelForCausalLM, stored, "cpu", workers=shards.count)
    return spread(network.requires_grad_(False), dtype, torch.device(device), shards)


def load_network(
    base: Base, auto: Any, dtype: torch.dtype, device: str | torch.device, workers: int = 1, **settings: Any
) -> PreTrainedModel:
    """The network that one of transformers' automatic classes makes of a base's configuration, in evaluation mode.

    Args:
        base: what is read.
        auto: `AutoModelForCausalLM`, or another of its kind.
        dtype: of its weights.
        device: gets each tensor as it is read.
        workers: how many will hold its weights between them, so that memory must be there for a part alone.
        settings: of the configuration, such as `num_labels`, which make it a network with tensors of its own.

    Raises:
        ModelError: as `load_base`.
    """
    bound_compiled_products()
    where, target = str(base.directory), torch.device(device)
    with quiet(), _model_errors(base, "model"):
        config = _config(base)
        check_supported(config)
        weights = open_weights(weight_files(base.directory), dtype, target)
        kept = _of_text(config, weights) if is_multimodal(_whole_config(base)) else weights
        kind: Any = _get_model_class(config, auto._model_mapping)
        for key, value in settings.items():
            setattr(config, key, value)
        with room_for(kept, dtype, target, where, workers):
            loaded: Any = kind.from_pretrained(
                None,
                config=config,
                state_dict={own: stored.tensor for own, stored in kept.items()},
                dtype=dtype,
                device_map=None if target.type == "cpu" else {"": target},
                output_loading_info=True,
            )
        model, info = loaded
        if model.can_generate() and (base.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(base.directory, local_files_only=True)
    if (missing := sorted(info["missing_keys"])) and not settings:
        what = f"the weights lack {len(missing)} tensors of {type(model).__name__}: {', '.join(missing[:3])}"
        raise ModelError(what, where=where)
    model.config.name_or_path = where
    return model.to(target).eval()


def _of_text(config: PreTrainedConfig, weights: Mapping[str, Stored]) -> dict[str, Stored]:
    """The language model's tensors of a multimodal checkpoint, by their names in the network."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    names = names_of_text(weights.keys(), network)
    return {own: fitted(weights[name], shapes.get(own, ())) for name, own in names.items()}


def configuration(base: Base) -> PreTrainedConfig:
    """The configuration of a base's language model, without its weights.

    Raises:
        ModelError: it can't be read.
    """
    with quiet(), _model_errors(base, "model"):
        return _config(base)


def comes_quantised(base: Base) -> bool:
    """Whether the checkpoint is quantised."""
    return method_of(_config(base)) is not None


def will_be_quantised(base: Base, quantize: str) -> bool:
    """Whether its layers are loaded as quantised ones, or read from such."""
    return quantize != "none" or comes_quantised(base)


def quantisation_note(base: Base, network: PreTrainedModel, quantize: str) -> str | None:
    """What the user should know about how the weights of a loaded base are kept; None for nothing."""
    return note_of(_config(base), network, quantize, network.dtype)


def without_weights(name: str, quantize: str = "none", device: str = "auto") -> PreTrainedModel:
    """The network of a base on torch's meta device: modules and shapes. The packaged base need not be pulled for it.

    Raises:
        ModelError: the base isn't here, its configuration or tokenizer can't be read, or it isn't supported.
    """
    packaged = name == SMOLLM2.name and not is_complete(SMOLLM2.directory)
    base = Base(SMOLLM2.directory) if packaged else Base.find(name)
    with quiet(), _model_errors(base, "model"), torch.device("meta"):
        config = LlamaConfig(**SMOLLM2_CONFIG) if packaged else _config(base)
        check_supported(config)
        check_quantised(config, quantize, device)
        network = AutoModelForCausalLM.from_config(config)
    if not packaged:
        load_tokenizer(base)  # what it can't be trained with is said before anything is
    return network


def by_configuration(name: str, quantize: str = "none", device: str = "auto") -> PreTrainedModel:
    """The network of a base on torch's meta device, by its configuration alone: neither weights nor tokenizer need be
    there, and a hub repository's config.json is fetched.

    Raises:
        ModelError: no such base, its configuration can't be reached or read, or it isn't supported.
    """
    if name == SMOLLM2.name:
        base, config = Base(SMOLLM2.directory), LlamaConfig(**SMOLLM2_CONFIG)
    else:
        base = configuration_of(name)
        with quiet(), _model_errors(base, "model"):
            there = all(file.is_file() for file in weight_files(base.directory))
            config = _config(base) if there else _config_alone(base)
    with quiet(), _model_errors(base, "model"), torch.device("meta"):
        check_supported(config)
        check_quantised(config, quantize, device)
        return AutoModelForCausalLM.from_config(config)


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device, else the CPU; `mps`, Apple's GPU, is taken where it is named and there.

    Raises:
        ModelError: the named device isn't there.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    mps = torch.backends.mps.is_available()
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] + (["mps"] if mps else [])
    allowed = ", ".join(["auto", "cpu", *gpus])
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device}", where="device", allowed=allowed) from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}.get(named.type, 0)
    if (named.index or 0) >= there:
        raise ModelError(f"device {device} isn't available here", where="device", allowed=allowed)
    return named


def pick_dtype(dtype: str, device: str | torch.device) -> tuple[torch.dtype, str]:
    """The base's dtype and one sentence that says why.

    Args:
        dtype: `auto`, `bfloat16` or `float32`; `auto` is bfloat16 where the hardware is faster in it.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
    """
    kind = pick_device(device).type
    if kind == "mps":
        fast, why = False, "bfloat16 was never tried on Apple's GPUs"
    elif kind == "cuda":
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
    """Of the language model, which is all that is used of a multimodal checkpoint."""
    whole = _whole_config(base)
    return text_config(whole, names_in(weight_files(base.directory))) if is_multimodal(whole) else whole


def _config_alone(base: Base) -> PreTrainedConfig:
    """The same without weights that would tell whether the output head of a multimodal checkpoint is tied."""
    whole = _whole_config(base)
    if not is_multimodal(whole):
        return whole
    tied = getattr(whole, "tie_word_embeddings", True)
    return text_config(whole, () if tied else ("lm_head.weight",))


def _whole_config(base: Base) -> PreTrainedConfig:
    """As config.json says it.

    Raises:
        ModelError: this transformers has no class for its model_type.
    """
    file = base.directory / "config.json"
    said = json.loads(file.read_text("utf-8"))
    kind = said.get("model_type") if isinstance(said, dict) else None
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        release = f"transformers {transformers.__version__}, which is installed,"
        newer = "pip install --upgrade transformers, if a newer one has it"
        if said.get("auto_map"):
            what = f"{kind} can't be a base: its code is in its own directory (auto_map), where none is ever run, and "
            hint = f"a checkpoint of it in transformers' own layout (often named ...-hf); {newer}"
            raise ModelError(f"{what}{release} has none for it", where=str(file), hint=hint)
        saved = said.get("transformers_version")
        by = f" (it was saved by {saved})" if isinstance(saved, str) else ""
        raise ModelError(f"{release} doesn't know model_type {kind}{by}", where=str(file), hint=newer)
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
        where = str(base.directory)
        if "trust_remote_code" in str(error):
            message = f"the {what}'s code is in its own directory, where none is ever run"
            hint = "a checkpoint of it in transformers' own layout (often named ...-hf)"
            raise ModelError(message, where=where, hint=hint) from error
        message = f"the {what} can't be loaded: {first_line(error)}"
        hint = "a directory with config.json, tokenizer and safetensors that this version of transformers can load"
        raise ModelError(message, where=where, allowed=hint) from error
