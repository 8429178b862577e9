"""Fixtures that all tests share: the real feedback files, the small real base, and a tiny random one."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Shape annotations of the pure modules are checked at run time, in tests only; must precede their first import.
jaxtyping.install_import_hook(
    [f"perlhf.method.{name}" for name in ("losses", "advantages", "packing", "lora")], "beartype.beartype"
)

# The same examples every time, and no verdict from how busy the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parents[1]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MERGES = ("Ġ t", "h e", "Ġ a", "i n", "Ġt he", "e r", "o n", "Ġ c", "e n", "Ġ s", "o f", "f e", "of fe", "Ġc offe")
"""Byte-pair merges of the tiny tokenizer, in order of rank; enough for tokens of one to five letters."""


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and number of threads, and leaves them so."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def feedback_root() -> Path:
    """The real feedback files: $PERLHF_DATA, else `../shared/data` beside the repository."""
    root = Path(os.environ.get("PERLHF_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (root / "MANIFEST.json").is_file():
        pytest.skip(f"no feedback files at {root}; set PERLHF_DATA to their directory")
    return root


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The packaged SmolLM2-135M-Instruct, converted once into the cache."""
    from perlhf.model import base

    return base.pull("smollm2-135m-instruct-q4_1", progress=False)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama (hidden 64, 4 heads, 2 key/value heads) with a byte-level tokenizer and ChatML."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny_base")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    end = 1
    assert tokenizer.eos_token_id == end
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = end
    model.save_pretrained(directory)
    return directory


def _byte_tokenizer():
    """Byte-level BPE: two control tokens, the 256 bytes, then one token for each merge."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    names = ["<|im_start|>", "<|im_end|>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:2]])
    return tokenizer
