"""A GGUF file as a base: converted once into bfloat16 safetensors in the cache, under the file's SHA-256.

Transformers reads settings, weights and tokenizer of the families that it knows. What it leaves out changes what a
network computes and raises no error there: how positions are scaled, widths of heads, tensors that it has no place for.
That is put right here, told, or refused.
"""

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from perlhf.errors import ModelError, PerlhfError
from perlhf.model.bases.gguf.header import MAGIC, Header, read_header
from perlhf.model.bases.gguf.tokenizer import end_tokens, names_its_cuts, read_tokenizer
from perlhf.model.bases.packaged import Report, made_once, quiet, seal, write_plain
from perlhf.model.supported import check_supported
from perlhf.system.files import storage_error
from perlhf.system.hashes import hash_of
from perlhf.system.machine import cache_dir

_NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
"""Architectures that transformers lists under another name than files have."""
_PARTIAL = ("phi3", "stablelm", "nemotron")
"""Families whose networks can turn a part of each head alone."""
_SAME_NAME = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "context_length": "max_position_embeddings",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
"""Settings that a configuration takes as they are, where it has such a key."""
_READ = (
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"),
    *("rope.scaling.finetuned", "rope.scale_linear", "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count"),
    *("attention.key_length", "attention.value_length", "attention.sliding_window_pattern", "attention.causal"),
    *("feed_forward_length", "vocab_size", "tensor_data_layout", "use_parallel_residual", "attention.max_alibi_bias"),
)
"""Settings that are read here, or that say nothing new."""
_POSITIONS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_BYTES = 2
"""Of a bfloat16."""


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a base's name is: a file that begins as one, or that is called so; None for any other name."""
    try:
        file = Path(name).expanduser()
        if not file.is_file():
            return None
        if file.suffix.lower() == ".gguf":
            return file
        with file.open("rb") as opened:
            return file if opened.read(len(MAGIC)) == MAGIC else None
    except (OSError, ValueError, RuntimeError):  # too long, a null in it, the home of nobody, not to be read
        return None


def sha256_of(file: Path) -> str:
    """SHA-256 of a GGUF file, taken once.

    Raises:
        ModelError: it can't be read.
    """
    try:
        return hash_of(file)
    except OSError as error:
        raise ModelError(f"the GGUF file can't be read: {error.strerror}", where=str(file)) from error


def converted(file: Path, progress: bool = True) -> Path:
    """The directory of a GGUF file's network in the cache, made if it isn't there yet.

    Raises:
        ModelError: it is no whole GGUF file of a decoder-only network that transformers reads, with a tokenizer.
        StorageError: the cache can't be written or has no room; nothing half-written is left.
    """
    digest = sha256_of(file)
    final = cache_dir() / "bases" / f"gguf-{digest[:16]}"
    return made_once(final, file.name, lambda *made: _convert(file.absolute(), digest, *made), progress, hash_of)


def read_settings(header: Header) -> PreTrainedConfig:
    """The configuration of a GGUF file's network, with what transformers leaves out.

    Raises:
        ModelError: transformers doesn't read the architecture, or a setting has no counterpart there.
    """
    known = {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS}
    architecture = header.architecture
    if _NAMES.get(architecture, architecture) not in known:
        raise ModelError(
            f"transformers reads no GGUF file of the architecture {architecture}",
            where=str(header.file),
            allowed=", ".join(sorted(known - {"t5", "umt5", "t5encoder"})),
            hint="take the network's directory with safetensors, or its name on the hub",
        )
    config: Any = AutoConfig.from_pretrained(
        header.file.parent, gguf_file=header.file.name, local_files_only=True, trust_remote_code=False
    )
    if architecture in GGUF_CONFIG_ARCHS:  # made of all that the file says
        return config
    for key, name in _SAME_NAME.items():
        if (value := header.setting(key)) is not None and hasattr(config, name):
            setattr(config, name, value or None)
    _set_heads(header, config)
    _set_layers(header, config)
    if isinstance(getattr(config, "rope_parameters", None), dict):
        _set_positions(header, config)
    return config


def _convert(file: Path, digest: str, work: Path, built: Path, report: Report) -> None:
    """Makes the directory `built` of a GGUF file."""
    with _errors(file):
        header = read_header(file)
        needed, free = header.weights * _BYTES + (64 << 20), shutil.disk_usage(work).free
        if free < needed:
            room = f"{file.name} becomes {needed / 1e9:.1f} GB of bfloat16 weights, and {free / 1e9:.1f} GB are free"
            raise storage_error(cache_dir(), errno.ENOSPC, room)
        report("reading settings and tokenizer")
        with quiet():
            config = read_settings(header)
            check_supported(config)
            tokenizer = read_tokenizer(header)
            config.pad_token_id = tokenizer.pad_token_id
            for note in _left_out(header, config):
                report(f"note: {note}")
        write_plain(file, config, tokenizer, built, report)
    ends = built / "generation_config.json"
    said = json.loads(ends.read_text("utf-8")) if ends.is_file() else {}
    ends.write_text(json.dumps(said | {"eos_token_id": end_tokens(header)}, indent=2) + "\n", "utf-8")
    seal(built, file.name, {"gguf": file.name, "gguf_sha256": digest})


def _set_heads(header: Header, config: Any) -> None:
    """Widths of heads, the scale of attention scores, and biases."""
    width = header.setting("attention.key_length")
    if width and hasattr(config, "head_dim") and header.architecture != "gemma4":
        config.head_dim = width
    if header.architecture in ("gemma2", "gemma3"):
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        largest = layers == {"gemma2": 46, "gemma3": 62}[header.architecture]  # the 27B, as llama.cpp tells them apart
        config.query_pre_attn_scalar = config.hidden_size // heads if largest else config.head_dim
    if header.architecture == "gpt2":
        config.n_inner = header.setting("feed_forward_length")
    if "blk.0.attn_q.bias" in header.tensors and hasattr(config, "attention_bias"):
        config.attention_bias = True


def _set_layers(header: Header, config: Any) -> None:
    """Which layers see a window alone, where the file says so: `True` for each, or one of how many sees all."""
    pattern, layers = header.setting("attention.sliding_window_pattern"), config.num_hidden_layers
    if isinstance(pattern, int) and pattern > 0:
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if isinstance(pattern, list) and len(pattern) == layers and getattr(config, "layer_types", None) is not None:
        config.layer_types = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _set_positions(header: Header, config: Any) -> None:
    """How positions become angles: base, part of each head, and what stretches them."""
    nested = "full_attention" in config.rope_parameters
    rope: dict[str, Any] = config.rope_parameters["full_attention"] if nested else config.rope_parameters
    if base := header.setting("rope.freq_base"):
        rope["rope_theta"] = base
    if nested and (base := header.setting("rope.freq_base_swa")):
        config.rope_parameters["sliding_attention"]["rope_theta"] = base
    turned, width = header.setting("rope.dimension_count"), getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    if turned and turned != width and header.architecture in _PARTIAL:
        rope["partial_rotary_factor"] = turned / width
    elif turned and turned != width and header.architecture in ("llama", "mistral", "qwen2", "qwen3", "starcoder2"):
        what = f"it turns {turned} of the {width} numbers of each head by their position"
        raise ModelError(what, where=str(header.file), allowed=f"all, or a network of {', '.join(_PARTIAL)}")
    rope.update(_stretched(header, rope, turned or width))


def _stretched(header: Header, rope: dict[str, Any], width: int) -> dict[str, Any]:
    """What transformers calls `rope_scaling`, of a file's settings and of its tensors for positions."""
    kind, factor = header.setting("rope.scaling.type"), header.setting("rope.scaling.factor")
    original = header.setting("rope.scaling.original_context_length")
    if "rope_freqs.weight" in header.small:
        return _as_llama3(header, header.small["rope_freqs.weight"], rope["rope_theta"], width)
    if "rope_factors_long.weight" in header.small:
        long, short = (header.small[f"rope_factors_{which}.weight"] for which in ("long", "short"))
        context = header.setting("context_length")
        found: dict[str, Any] = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        found |= {"original_max_position_embeddings": original, "factor": context / original}
        attention = header.setting("rope.scaling.attn_factor")
        return found | ({"attention_factor": attention} if attention else {})
    factor = factor or header.setting("rope.scale_linear")
    if kind == "none" or not factor or factor == 1.0:
        return {}
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    what = f"its positions are stretched by {kind}"
    raise ModelError(what, where=str(header.file), allowed="none, linear, yarn, Llama 3's and Phi-3's factors")


def _as_llama3(header: Header, factors: list[float], base: float, width: int) -> dict[str, Any]:
    """Settings of Llama 3's stretching, found again in the factors that it gives for each angle.

    Files hold the factors alone. Up to the largest one all published networks have the same settings, which is checked.
    """
    largest = round(max(factors), 3)
    if largest == 1.0:
        return {}
    low, high, original = 1.0, 4.0, 8192
    for index, factor in enumerate(factors):
        wavelength = 2 * math.pi * base ** (2 * index / width)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        if abs(1 / ((1 - smooth) / largest + smooth) - factor) > 1e-3 * factor:
            what = f"factor {index} for its positions is {factor:.4f}, which isn't Llama 3's"
            raise ModelError(what, where=str(header.file), allowed="Llama 3's factors in rope_freqs.weight")
    found = {"rope_type": "llama3", "factor": largest, "low_freq_factor": low, "high_freq_factor": high}
    return found | {"original_max_position_embeddings": original}


def _left_out(header: Header, config: PreTrainedConfig) -> Iterator[str]:
    """What a file says that nothing here takes, in sentences.

    Raises:
        ModelError: tensors without a place in transformers' network, which would compute something else without them.
    """
    architecture = header.architecture
    if not names_its_cuts(header):
        yield "the file doesn't say where its tokenizer cuts words (tokenizer.ggml.pre): taken to be as GPT-2's"
    if architecture in GGUF_CONFIG_ARCHS:
        return
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    taken = get_gguf_hf_weights_map(network, processor)
    tied = ("output.weight",) if architecture in ("gpt2", "bloom", "falcon") else ()
    lost = [
        name
        for name in header.tensors
        if not {name, name.removesuffix(".weight")} & {*taken, *tied, *_POSITIONS} and not name.startswith("mtp.")
    ]
    if lost:
        what = f"transformers' {type(network).__name__} has no place for {len(lost)} tensors: {', '.join(lost[:3])}"
        hint = "take the network's directory with safetensors, or its name on the hub"
        raise ModelError(what, where=str(header.file), allowed="tensors of that network alone", hint=hint)
    mapped = GGUF_TO_TRANSFORMERS_MAPPING["config"].get(_NAMES.get(architecture, architecture), {})
    known = {*mapped, *_SAME_NAME, *_READ}
    keys = (key.removeprefix(f"{architecture}.") for key in header.settings if key.startswith(f"{architecture}."))
    if unread := [key for key in keys if key not in known]:
        yield f"settings of the file that aren't read: {', '.join(unread)}"


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[None]:
    """What the libraries raise for a file that they can't convert becomes one `ModelError`."""
    try:
        yield
    except (PerlhfError, MemoryError, OSError):
        raise
    except BaseException as error:
        # Over files of any kind these libraries raise anything, a bare Exception and a panic of Rust's among it.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        allowed = "a GGUF file that this version of transformers can load"
        raise ModelError(f"the GGUF file can't be converted: {first}", where=str(file), allowed=allowed) from error
