"""No text has more tokens than its bytes say, whatever the tokenizer; where they don't say, it is tokenised."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import open_encoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perlhf.config.stages import EncodingConfig
from perlhf.data.records import Comparison, Demonstration, Record, completions_of
from perlhf.data.store import hold
from perlhf.model.encoding.encode import Encoder
from perlhf.model.encoding.lengths import UNKNOWN, most_tokens, to_tokenise

ALPHABET = ["<end>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def tokenizer(normalizer: Any, pre_tokenizer: Any, more: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*ALPHABET, *BYTES, *more]))}
    built = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    built.normalizer, built.pre_tokenizer = normalizer, pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<end>", model_max_length=10**6)


SENTENCEPIECE = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
KNOWN = {
    "bytes": tokenizer(None, BYTE_LEVEL, []),
    "bytes, NFC": tokenizer(normalizers.NFC(), BYTE_LEVEL, []),
    "bytes, NFD": tokenizer(normalizers.NFD(), BYTE_LEVEL, []),
    "SentencePiece": tokenizer(SENTENCEPIECE, None, ["▁"]),
    "SentencePiece, Metaspace": tokenizer(None, pre_tokenizers.Metaspace(), ["▁"]),
}
UNTOLD = {
    "no token for a space": tokenizer(SENTENCEPIECE, None, []),
    "no token for Metaspace's": tokenizer(None, pre_tokenizers.Metaspace(), []),
    "NFKC": tokenizer(normalizers.NFKC(), BYTE_LEVEL, []),
    "lower case": tokenizer(normalizers.Lowercase(), BYTE_LEVEL, []),
    "another replacement": tokenizer(normalizers.Replace("a", "aaaa"), BYTE_LEVEL, []),
    "a space before each piece": tokenizer(None, pre_tokenizers.ByteLevel(add_prefix_space=True), []),
}
TEXT = st.text(min_size=1, max_size=40) | st.text("é\u0344\U0001d160\u1e9b ", min_size=1, max_size=40)


def longest(encoder: Encoder, record: Record) -> int:
    return max(len(example.tokens.ids) for example in encoder.examples(record.prompt, completions_of(record)))


@pytest.mark.parametrize("name", KNOWN)
@given(texts=st.tuples(TEXT, TEXT, TEXT))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_record_has_more_tokens(name: str, texts: tuple[str, str, str]) -> None:
    encoder = Encoder(KNOWN[name], EncodingConfig(template="plain", max_tokens=10**6))
    prompt, chosen, rejected = (text.encode(errors="replace").decode() for text in texts)
    chat = ({"role": "system", "content": chosen}, {"role": "user", "content": prompt})
    records = [Comparison(prompt, chosen, rejected, "g"), Demonstration(chat, chosen, "g")]
    for most, record in zip(most_tokens(encoder, hold(records)).tolist(), records, strict=True):
        assert longest(encoder, record) <= most < UNKNOWN


@pytest.mark.parametrize("name", UNTOLD)
def test_normalisers_that_make_texts_longer_are_not_trusted(name: str) -> None:
    encoder = Encoder(UNTOLD[name], EncodingConfig(template="plain", max_tokens=10**6))
    records = hold([Demonstration("a", "b", "g")])
    assert most_tokens(encoder, records).tolist() == [UNKNOWN] and to_tokenise(encoder, records).tolist() == [0]


def test_few_are_tokenised(tiny_base: Path) -> None:
    encoder = open_encoder(tiny_base, EncodingConfig(max_tokens=256))
    chat = ({"role": "user", "content": "hi"},)
    records: list[Record] = [
        Demonstration("first of its shape", "a", "g"),
        Demonstration("short", "a", "g"),
        Demonstration("long", "a" * 250, "g"),
        Demonstration(chat, "first of its shape", "g"),
        Demonstration(chat, "short", "g"),
        Demonstration("short", "with a tool", "g", tools=[{"name": "add"}]),
        Demonstration("short", "with another tool", "g", tools=[{"name": "add"}]),
    ]
    assert to_tokenise(encoder, hold(records)).tolist() == [0, 2, 3, 5, 6]
    assert np.array_equal(most_tokens(encoder, hold(records)) == UNKNOWN, [False] * 5 + [True] * 2)
