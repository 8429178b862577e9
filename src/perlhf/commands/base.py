"""What a base is, before anything is trained: `perlhf base`. Its weights aren't read."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from perlhf.config.commands import BaseConfig
from perlhf.config.stages import AdapterConfig, EncodingConfig, PolicyConfig, RewardConfig, SftConfig
from perlhf.errors import AdapterError
from perlhf.kernels.sight import FULL, Sight
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import end_ids, load_tokenizer, pick_dtype, vocabulary, without_weights
from perlhf.model.encoding.encode import Encoder
from perlhf.model.open import left_out
from perlhf.model.supported import Way, target_paths
from perlhf.training.plan import foretell_way, lora_parameters, memory_of, trainable_parameters, way_in_words

_WINDOWS, _CHUNKS = ("sliding_window", "sliding_window_size", "window_size"), ("attention_chunk_size",)
"""Configuration keys of how far back a layer sees."""


def describe(config: BaseConfig) -> dict[str, Any]:
    """What `perlhf base` tells, as `--json` has it; memory is in bytes, by stage and by what holds it.

    Raises:
        ModelError: the base isn't here, can't be read or can't be a base; no such device.
    """
    base = Base.find(config.base)
    network = without_weights(config.base)
    tokenizer = load_tokenizer(base)
    chosen, why = pick_dtype(config.dtype, config.device)
    settings: dict[str, Any] = {"base": config.base, "dtype": config.dtype, "device": config.device}
    foretold = foretell_way(SftConfig(**settings), network)
    way, text = foretold.way, network.config.get_text_config()
    adapters = {targets: _adapted(targets, network, foretold.uncalled) for targets in ("attention", "all")}
    targets = "all" if "error" in adapters["attention"] else "attention"
    rows = int(text.vocab_size)
    return {
        "base": config.base,
        "directory": str(base.directory),
        "family": network.config.model_type,
        "class": type(network).__name__,
        "parameters": network.num_parameters(),
        "layers": layers_by_kind(network, way),
        "way": {
            "packing": way.packing if way else None,
            "why": way.why if way else None,
            "source": foretold.source,
            "said": way_in_words(foretold),
        },
        "logits": {"scale": way.logits.scale, "cap": way.logits.cap} if way else None,
        "dtype": {"dtype": str(chosen).removeprefix("torch."), "said": why},
        "quantisation": _quantisation(network.config),
        "context": getattr(text, "max_position_embeddings", None),
        "vocabulary": {"rows": rows, "tokens": vocabulary(tokenizer), "tied": _is_tied(network)},
        "chat_template": _template(base.directory, tokenizer),
        "end_tokens": _ends(base, tokenizer),
        "adapters": adapters,
        "notes": [note for note in [left_out(network, AdapterConfig(targets="all"))] if note],
        "memory_bytes": _memory(settings | {"adapter": AdapterConfig(targets=targets)}, network, foretold.uncalled),
    }


def layers_by_kind(network: PreTrainedModel, way: Way | None) -> dict[str, int]:
    """How many layers mix tokens in which way, in the order of their first.

    In a tree that is what their masks are; otherwise what the configuration calls them, else their modules' class.
    """
    config = network.config.get_text_config()
    count = int(config.num_hidden_layers)
    if way is not None and way.packing == "tree":
        return dict(Counter(_sight_in_words(way.sights.get(layer, FULL)) for layer in range(count)))
    for key in ("layer_types", "layers_block_type"):
        kinds = getattr(config, key, None)
        if kinds and len(kinds) == count and all(isinstance(kind, str) for kind in kinds):
            return dict(Counter(_kind_in_words(kind, config) for kind in kinds))
    lists = (part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return dict(Counter(type(layer).__name__ for layer in next(lists, ())))


def _sight_in_words(sight: Sight) -> str:
    if sight.window is not None:
        return f"window of {sight.window:,}"
    return "full attention" if sight.chunk is None else f"chunks of {sight.chunk:,}"


def _kind_in_words(kind: str, config: PreTrainedConfig) -> str:
    """A layer type of transformers, with how far back it sees where the configuration says that."""
    for part, keys, words in (("sliding", _WINDOWS, "window of"), ("chunked", _CHUNKS, "chunks of")):
        sizes = [size for key in keys if isinstance(size := getattr(config, key, None), int)]
        if part in kind and sizes:
            return f"{words} {sizes[0]:,}"
    return kind.replace("_", " ")


def _adapted(targets: Any, network: PreTrainedModel, uncalled: Sequence[str]) -> dict[str, Any]:
    """Layers by last name and trainable parameters at the default rank; why none, where there are none."""
    shape = AdapterConfig(targets=targets)
    try:
        paths = target_paths(network, targets, uncalled=uncalled)
    except AdapterError as error:
        return {"error": f"nothing: {error.what}"}
    names = dict(Counter(path.rpartition(".")[2] for path in paths))
    return {"layers": names, "rank": shape.rank, "parameters": lora_parameters(shape, network, uncalled)}


def _quantisation(config: PreTrainedConfig) -> str:
    """How the weights come, by the configuration."""
    said: Any = getattr(config, "quantization_config", None)
    said = said if said is None or isinstance(said, dict) else said.to_dict()
    return "none" if not said else str(said.get("quant_method") or "of an unknown kind")


def _is_tied(network: PreTrainedModel) -> bool:
    head: Any = network.get_output_embeddings()
    embedding: Any = network.get_input_embeddings()
    tied = bool(network.config.get_text_config().tie_word_embeddings)
    return tied and head is not None and embedding is not None and head.weight.shape == embedding.weight.shape


def _template(directory: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Whose chat template conversations are rendered by, and where it is."""
    own: Any = tokenizer.chat_template
    if not own:
        return "none of its own: encoding.template names plain or a file"
    files = [file.name for file in sorted(directory.glob("chat_template*")) if file.is_file()]
    several = f", several: {', '.join(own)}" if isinstance(own, dict) else ""
    return f"its own ({files[0] if files else 'tokenizer_config.json'}{several})"


def _ends(base: Base, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Tokens that end an answer, by the chat template or, without one, by the base's configuration."""
    encoding = EncodingConfig(template="tokenizer" if tokenizer.chat_template else "plain")
    numbers = Encoder(tokenizer, encoding, end_ids(base)).end_ids
    return [{"id": number, "text": str(tokenizer.convert_ids_to_tokens(number))} for number in numbers]


def _memory(settings: dict[str, Any], network: PreTrainedModel, uncalled: Sequence[str]) -> dict[str, dict[str, int]]:
    """Estimated bytes of each stage as it is by default; a policy has a reference and one reward model beside it."""
    stages = {
        "sft": SftConfig(**settings),
        "reward": RewardConfig(**settings),
        "policy": PolicyConfig(**settings, sft=Path("sft"), reward=("reward",)),
    }
    found = {}
    for name, stage in stages.items():
        parts = memory_of(stage, network, trainable_parameters(stage, network, uncalled))
        found[name] = {**parts, "total": sum(parts.values())}
    return found
