"""What tests of written GGUF files share: shapes that are written, tokenizers, an adapter of random weights."""

from pathlib import Path
from typing import Any

import torch
from gguf_files import BYTE_LEVEL, MERGES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from perlhf.method.lora import LowRank
from perlhf.model.adapter import Adapter
from perlhf.model.to_gguf.files import write_network
from perlhf.model.to_gguf.vocabulary import vocabulary_of

WRITTEN = [
    *("llama", "llama, untied", "llama, biases", "llama 3.1", "llama, linear", "llama, yarn"),
    *("qwen2", "qwen2, yarn", "qwen3", "gemma3", "gemma3, stretched", "gemma3, other windows"),
]
TEXTS = (
    "A flat white, please: 2 of 1234!",
    "  two spaces\n\nand\tthree   ",
    "it's \u00e9t\u00e9 \u4e16\u754c \U0001f600",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
NAMES = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")


MARKED = normalizers.Replace(" ", "\u2581")
SPACE_FIRST = normalizers.Sequence([normalizers.Prepend("\u2581"), MARKED])
GEMMA = pre_tokenizers.Split(" ", "merged_with_previous")


def metaspace(scheme: str) -> Any:
    return pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=False)


def network_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the networks of `gguf_files`."""
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    vocabulary = {token: number for number, token in enumerate(BYTE_LEVEL)}
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>", "<|turn|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write(file: Path, network: PreTrainedModel, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    embedding: Any = network.get_input_embeddings()
    write_network(
        file, network, vocabulary_of(network_tokenizer(), embedding.weight.shape[0], [1]), dtype, "tiny", **more
    )
    return file


def random_adapter(network: PreTrainedModel) -> Adapter:
    """Pairs on all linear layers, some of another rank and scale than the adapter's, as a pattern gives them."""
    draw = torch.Generator().manual_seed(3)
    adapter = Adapter("policy", "policy", rank=4, alpha=8.0)
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            rank, scale = (2, 0.5) if "gate" in path else (4, 2.0)
            a = torch.nn.Parameter(torch.randn(rank, module.in_features, generator=draw))
            b = torch.nn.Parameter(torch.randn(module.out_features, rank, generator=draw))
            adapter.pairs[path] = LowRank(a, b, scale)
    return adapter


def byte_level(cut: Any = None, normalizer: Any = None, **more: Any) -> PreTrainedTokenizerFast:
    tokens = ["<s>", "</s>", "<tool>", *BYTES, "12", "ab"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("a", "b")], **more))
    backend.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    backend.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def pieces(prefix: Any, split: Any = None) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as transformers has it: spaces become a mark, what is no token becomes bytes."""
    joined = ["\u2581a", "ab", "\u2581ab", "bc", "\u2581\u2581", "\u2581\u2581a", "abc"]
    tokens = ["<unk>", "<s>", "</s>", "<tag>", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", "a", "b", "c", ".", *joined]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [(one[:at], one[at:]) for one in joined for at in range(1, len(one))]
    merges = [pair for pair in merges if set(pair) <= set(vocabulary)]
    backend: Any = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer, backend.pre_tokenizer = prefix, split
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    backend.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in ("<tag>", "\n\n", "\u2581\u2581")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
