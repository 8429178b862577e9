"""Tokenizers as tables of GGUF files: read back, they give the same tokens, and what can't be written is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import BYTE, CONTROL, NORMAL, sentencepiece
from gguf_written import BYTES, GEMMA, MARKED, NAMES, SPACE_FIRST, TEXTS, byte_level, metaspace, pieces
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from perlhf.errors import ModelError
from perlhf.model.bases.gguf.header import read_header
from perlhf.model.bases.gguf.tokenizer import cuts, read_tokenizer
from perlhf.model.to_gguf.vocabulary import Vocabulary, ends_left_out, vocabulary_of


def read_back(vocabulary: Vocabulary, file: Path) -> Any:
    """What our reader makes of the tables."""
    writer = gguf.GGUFWriter(file, "llama")
    vocabulary.add(writer)
    writer.add_tensor("token_embd.weight", np.zeros((len(vocabulary.tokens), 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_tokenizer(read_header(file))


class TestByteLevel:
    def test_the_packaged_tokenizer(self, smollm2: Path, tmp_path: Path):
        own = AutoTokenizer.from_pretrained(smollm2)
        vocabulary = vocabulary_of(own, 49152, [2])
        assert (vocabulary.model, vocabulary.pre) == ("gpt2", "smollm")
        assert vocabulary.ids == {"bos": 1, "eos": 2, "eot": 2, "unknown": 0, "padding": 2}
        assert not vocabulary.flags["add_bos_token"] and not vocabulary.flags["add_eos_token"]
        read = read_back(vocabulary, tmp_path / "a.gguf")
        for text in TEXTS:
            assert read(text)["input_ids"] == own(text)["input_ids"]
        assert read.chat_template == own.chat_template
        assert (read.bos_token, read.eos_token, read.pad_token) == (own.bos_token, own.eos_token, own.pad_token)

    @pytest.mark.parametrize("name", NAMES)
    def test_cuts_have_their_name(self, name: str, tmp_path: Path):
        own = byte_level(cuts(name, ""), ignore_merges=name in ("llama-bpe", "tekken"))
        vocabulary = vocabulary_of(own, own.vocab_size, [1])
        assert vocabulary.pre == name
        read = read_back(vocabulary, tmp_path / "a.gguf")
        for text in (*TEXTS, "ab<tool>12</s>"):
            assert read(text)["input_ids"] == own(text)["input_ids"]

    def test_qwens_own_class(self, tmp_path: Path):
        """Its NFC is left out by llama.cpp; what is in that form already has the same tokens."""
        merges: Any = [("a", "b")]
        own = Qwen2Tokenizer(vocab={token: at for at, token in enumerate([*BYTES, "12", "ab"])}, merges=merges)
        vocabulary = vocabulary_of(own, len(own), [len(own) - 1])
        assert vocabulary.pre == "qwen2"
        read = read_back(vocabulary, tmp_path / "a.gguf")
        for text in TEXTS:
            assert read(text)["input_ids"] == own(text)["input_ids"]

    def test_kinds_of_tokens(self):
        vocabulary = vocabulary_of(byte_level(), 265, [1])
        assert vocabulary.types == [CONTROL, CONTROL, 4, *[NORMAL] * 258, *[5] * 4]
        assert vocabulary.tokens[2] == "<tool>" and vocabulary.tokens[-1] == "[PAD264]"
        assert vocabulary.merges == ["1 2", "a b"]

    def test_what_begins_and_ends_texts(self, tmp_path: Path):
        own = byte_level()
        own.add_bos_token = True
        state = json.loads(own.backend_tokenizer.to_str())
        state["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }
        begins = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
        )
        vocabulary = vocabulary_of(begins, begins.vocab_size, [1])
        assert (vocabulary.flags["add_bos_token"], vocabulary.flags["add_eos_token"]) == (True, False)
        assert read_back(vocabulary, tmp_path / "a.gguf")("ab")["input_ids"] == [0, 260]

    def test_up_to_three_ends(self):
        own = byte_level()
        ids = vocabulary_of(own, own.vocab_size, [2, 1, 0]).ids
        assert (ids["eos"], ids["eot"], ids["eom"]) == (1, 2, 0)
        assert ends_left_out(own, [2, 1, 0]) == []
        assert ends_left_out(own, [2, 1, 0, 5]) == [own.convert_ids_to_tokens(5)]

    @pytest.mark.parametrize(
        ("tokenizer", "message"),
        [
            (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "cuts words in a way"),
            (lambda: byte_level(cuts("qwen2", ""), ignore_merges=True), "cuts words in a way"),
            (
                lambda: byte_level(pre_tokenizers.Split(Regex("[0-9]+|[^0-9]+"), behavior="isolated")),
                "cuts words in a way that has no name in llama.cpp",
            ),
            (
                lambda: byte_level(normalizer=normalizers.Lowercase()),
                r"changes texts before it cuts them \(Lowercase\)",
            ),
            (
                lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))),
                "the tokenizer is WordLevel",
            ),
            (
                lambda: PreTrainedTokenizerFast(
                    tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[], byte_fallback=True))
                ),
                "no token for 256 bytes",
            ),
            (lambda: pieces(normalizers.NFKC()), r"a step that SentencePiece has not \(NFKC\)"),
        ],
    )
    def test_others_are_refused(self, tokenizer: Any, message: str):
        with pytest.raises(ModelError, match=message) as raised:
            vocabulary_of(tokenizer(), 400, [1])
        assert "allowed: byte-level BPE that cuts words as gpt-2" in str(raised.value)


class TestSentencePiece:
    @pytest.mark.parametrize(
        ("prefix", "split", "space"),
        [
            (SPACE_FIRST, None, True),
            (None, metaspace("first"), True),
            (None, metaspace("never"), False),
            (MARKED, GEMMA, False),
        ],
    )
    def test_scores_join_as_merges_do(self, prefix: Any, split: Any, space: bool, tmp_path: Path):
        own = pieces(prefix, split)
        vocabulary = vocabulary_of(own, own.vocab_size, [2])
        assert (vocabulary.model, vocabulary.flags["add_space_prefix"]) == ("llama", space)
        assert vocabulary.types[:5] == [2, CONTROL, CONTROL, 4, 4] and vocabulary.types[5:261] == [BYTE] * 256
        assert len(vocabulary.tokens) == len(vocabulary.types) == len(vocabulary.scores) == 273
        read = read_back(vocabulary, tmp_path / "a.gguf")
        tagged = ("aababc.\n\nbc", "ab<tag>c", "a</s>b") if prefix is not SPACE_FIRST else ()
        for text in ("abc ab", "a  b", "aababc.", "x\u4e16", *tagged):
            wanted = own(text, add_special_tokens=False)["input_ids"]
            twin = sentencepiece(text, vocabulary.tokens, vocabulary.types, vocabulary.scores, space)
            assert twin == wanted, text
            assert read(text, add_special_tokens=False)["input_ids"] == wanted, text

    def test_a_text_that_begins_with_a_space(self):
        """llama.cpp puts another one before it, as the older tokenizers of transformers do; newer ones don't."""
        before, first = pieces(SPACE_FIRST), pieces(None, metaspace("first"))
        table = vocabulary_of(before, before.vocab_size, [2])
        wanted = sentencepiece(" a", table.tokens, table.types, table.scores, True)
        assert before(" a", add_special_tokens=False)["input_ids"] == wanted
        assert first(" a", add_special_tokens=False)["input_ids"] != wanted

    @pytest.mark.parametrize(("template", "space"), [("<s>{{ messages[0].content }}", False), ("user:", True)])
    def test_none_is_put_into_talks_that_begin_with_a_control_token(self, template: str, space: bool):
        own = pieces(None, metaspace("first"))
        own.chat_template = template
        assert vocabulary_of(own, own.vocab_size, [2]).flags["add_space_prefix"] is space

    @pytest.mark.parametrize(("kind", "space"), [(LlamaTokenizer, True), (GemmaTokenizer, False)])
    def test_classes_of_transformers(self, kind: Any, space: bool):
        state = json.loads(pieces(MARKED).backend_tokenizer.to_str())["model"]
        vocabulary = state["vocab"] | {"<pad>": 1000, "<eos>": 1001, "<bos>": 1002, "<mask>": 1003}
        own = kind(vocab=vocabulary, merges=[tuple(merge) for merge in state["merges"]])
        table = vocabulary_of(own, 1004, [own.eos_token_id])
        assert (table.model, table.flags["add_space_prefix"]) == ("llama", space)
        wanted = own("abc ab", add_special_tokens=False)["input_ids"]
        assert sentencepiece("abc ab", table.tokens, table.types, table.scores, space) == wanted

    def test_a_token_of_spaces_is_made_by_merges(self):
        """It is added as well, but looked for in texts whose spaces aren't marked yet."""
        own = pieces(MARKED, GEMMA)
        vocabulary = vocabulary_of(own, own.vocab_size, [2])
        at = vocabulary.tokens.index("\u2581\u2581")
        assert vocabulary.types[at] == NORMAL
        assert own("a  b", add_special_tokens=False)["input_ids"][1] == at
