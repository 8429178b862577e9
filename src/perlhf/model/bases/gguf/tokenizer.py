"""The tokenizer that a GGUF file describes.

Byte-level BPE is built from the file's tables here: transformers gives each such vocabulary GPT-2's `<|endoftext|>` on
top, drops control tokens with letters beyond ASCII (DeepSeek's), and cuts words as GPT-2 does for many of the names
that `tokenizer.ggml.pre` has. SentencePiece is transformers' reading, with what it leaves out put right: whether a
space is put before a text, and tokens that the file doesn't have. Neither takes over chat templates with names, and end
tokens besides the first.
"""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

from perlhf.errors import ModelError
from perlhf.model.bases.gguf.header import Header

KINDS = {"gpt2": "byte-level BPE", "llama": "SentencePiece", "gemma4": "SentencePiece with merges"}
"""Values of `tokenizer.ggml.model` of decoder-only networks that transformers reads."""
_GPT2 = (
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code "
    "roberta-bpe gigachat a.x-4.0 mellum modern-bert".split()
)
"""Cut as GPT-2 does."""
_DIGITS = "starcoder refact command-r smollm codeshell exaone minerva-7b".split()
"""Each digit alone, then as GPT-2 does."""
_ENDS = ("eos", "eot", "eom")
"""End of a text, of a turn, of a message."""
_LIKE = {"stablelm2": "qwen2", "chatglm-bpe": "llama-bpe", "glm4": "llama-bpe"}
"""Cut as another name is, which transformers knows."""
_UNSAID = ("", "default")
_LLAMA3 = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano".split()
"""A text begins with the begin token unless the file says otherwise, as llama.cpp has it."""
WHOLE_FIRST = (*_LLAMA3, "tekken")
"""A word that is a token is that token, whether merges lead to it or not."""
_NORMAL, _CONTROL, _USER = 1, 3, 4
"""Values of `tokenizer.ggml.token_type`; user-defined tokens are found whole in texts, and show in them."""


def read_tokenizer(header: Header) -> PreTrainedTokenizerFast:
    """The file's tokenizer: cuts words, pads, begins and ends texts as the file says.

    Raises:
        ModelError: there is none, or it cuts words in an unknown way.
    """
    settings, where = header.settings, str(header.file)
    model = settings.get("tokenizer.ggml.model")
    if not model or not settings.get("tokenizer.ggml.tokens"):
        hint = "take a file that holds one, or the network's directory with safetensors"
        raise ModelError("the GGUF file has no tokenizer", where=where, allowed="tokenizer.ggml.tokens", hint=hint)
    if model not in KINDS:
        allowed = ", ".join(f"{name} ({kind})" for name, kind in KINDS.items())
        raise ModelError(f"the GGUF file's tokenizer is of the kind {model}", where=where, allowed=allowed)
    read: tuple[str, Any, Any] = get_gguf_tokenizer(where)
    architecture, tables, named = read
    pre = str(settings.get("tokenizer.ggml.pre", ""))
    if model == "gpt2":
        backend = _byte_level(tables, pre, {settings.get(f"tokenizer.ggml.{kind}_token_id") for kind in _ENDS})
        backend.pre_tokenizer = cuts(pre, where)
    else:
        backend = _without_foreign(convert_gguf_tokenizer(architecture, tables)[0], len(tables["tokens"]))
        if model == "llama" and not settings.get("tokenizer.ggml.add_space_prefix", True):
            _no_space_before(backend)
    begins = bool(named.get("add_bos_token", pre in _LLAMA3)) and named["bos_token"] is not None
    ends = bool(named.get("add_eos_token")) and named["eos_token"] is not None
    backend.post_processor = _around(
        [(named["bos_token"], settings["tokenizer.ggml.bos_token_id"])] if begins else [],
        [(named["eos_token"], settings["tokenizer.ggml.eos_token_id"])] if ends else [],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named["bos_token"],
        eos_token=named["eos_token"],
        pad_token=named["pad_token"] or named["eos_token"],
        unk_token=named["unk_token"],
        chat_template=_chat_templates(settings, named.get("chat_template")),
        clean_up_tokenization_spaces=False,
    )


def names_its_cuts(header: Header) -> bool:
    """Whether a byte-level tokenizer says where words are cut; files of before spring 2024 don't."""
    pre = header.settings.get("tokenizer.ggml.pre", "")
    return header.settings.get("tokenizer.ggml.model") != "gpt2" or pre not in _UNSAID


def end_tokens(header: Header) -> list[int]:
    """Ids that end an answer: the end of a text, of a turn and of a message, as far as the file names them."""
    ids = [header.settings.get(f"tokenizer.ggml.{kind}_token_id") for kind in _ENDS]
    return list(dict.fromkeys(number for number in ids if isinstance(number, int)))


def _byte_level(tables: dict[str, Any], pre: str, ends: set[Any]) -> Any:
    """A byte-level BPE of a file's tables, without its cuts. Ids of `ends` are control tokens of whatever type."""
    tokens: list[str] = tables["tokens"]
    types = tables.get("token_type") or [_NORMAL] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in tables.get("merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in WHOLE_FIRST))
    backend.decoder = decoders.ByteLevel()
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _CONTROL or number in ends:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    return backend


def _without_foreign(backend: Any, tokens: int) -> Any:
    """A tokenizer without the tokens that transformers' class has and the file hasn't."""
    if backend.get_vocab_size(with_added_tokens=True) == tokens:
        return backend
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < tokens]
    return Tokenizer.from_str(json.dumps(state))


def cuts(pre: str, where: str) -> Any:
    """What cuts a text into words before a byte-level BPE joins their bytes."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if pre in _GPT2 or pre in _UNSAID:
        return words
    pattern = GGUF_PRE_TOKENIZER_SPLITS.get(_LIKE.get(pre, pre))
    if pattern is None:
        known = sorted({*_GPT2, *_DIGITS, *_LIKE, *GGUF_PRE_TOKENIZER_SPLITS})
        raise ModelError(
            f"the GGUF file's tokenizer cuts words as {pre!r} does, which is not known here",
            where=where,
            allowed=f"tokenizer.ggml.pre: {', '.join(known)}",
            hint="take the network's directory with safetensors and tokenizer.json",
        )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _no_space_before(backend: Any) -> None:
    """Makes a SentencePiece tokenizer read a text as it is, without the space that Llama's puts before it."""
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])


def _around(begin: list[tuple[str, int]], end: list[tuple[str, int]]) -> Any:
    """Puts tokens around a text where special tokens are asked for."""
    before, after = [token for token, _ in begin], [token for token, _ in end]
    one = [*before, "$A:0", *after]
    two = [*one, *before, "$B:1", *after]
    return processors.TemplateProcessing(single=one, pair=two, special_tokens=[*begin, *end])


def _chat_templates(settings: dict[str, Any], default: str | None) -> Any:
    """A file's chat template, or all of them by name; None without any."""
    names = settings.get("tokenizer.chat_templates") or []
    named = {name: settings.get(f"tokenizer.chat_template.{name}") for name in names if name != "default"}
    found = {name: text for name, text in named.items() if isinstance(text, str)}
    return ({"default": default} if default else {}) | found if found else default
