"""GGUF files as bases: what is read is the network that was written, and what can't be read is said."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import BYTE_LEVEL, CONTROL, FAMILIES, NORMAL, logits, random_network, write_network
from transformers import AutoModelForCausalLM

from perlhf.errors import ModelError, StorageError
from perlhf.model.bases.found import Base, pull
from perlhf.model.bases.gguf.header import read_header
from perlhf.model.bases.gguf.tokenizer import read_tokenizer
from perlhf.model.bases.loading import end_ids, load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bases(cache: Path) -> list[str]:
    """What is in the cache, locks aside."""
    return sorted(path.name for path in (cache / "bases").glob("*") if not path.name.endswith(".lock"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_comes_back_as_it_was_written(family: str, tmp_path: Path) -> None:
    network = random_network(family)
    base = Base.find(str(write_network(tmp_path / "a.gguf", family, network)))
    read = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    ids = [index % (len(BYTE_LEVEL) - 3) + 2 for index in range(7, 47, 3)]
    expected, found = logits(network, ids), logits(read, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


class TestTokenizer:
    """SentencePiece and byte-level BPE against slow twins that follow the tables of the file."""

    PIECES = "\u2581 a b c 1 2 . \u2581a ab \u2581ab bc abc \u2581abc \u2581\u2581 12 . . \u2581c".split()
    TEXTS = (
        *(
            "abc ab",
            " abc",
            "a  b",
            "a   b",
            "1212 a",
            "x\u4e16 \u00e9",
            "\U0001f600",
            "a\nb\n\n\nc",
            "",
            " ",
            "ab<turn>c",
        ),
        *("<s>a</s>", "abcabc", "a.b.", "<tag> b", "c<tag>", "tab\there"),
    )

    def sentencepiece(self) -> tuple[list[str], list[int], list[float]]:
        special = ["<unk>", "<s>", "</s>", "<turn>", "<tag>", "\n\n"]
        pieces = list(dict.fromkeys(self.PIECES))
        tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
        types = [2, CONTROL, CONTROL, CONTROL, gguf_files.USER, gguf_files.USER, *[gguf_files.BYTE] * 256]
        types += [NORMAL] * len(pieces)
        scores = [0.0] * (len(tokens) - len(pieces)) + [-float(index) for index in range(len(pieces))]
        return tokens, types, scores

    def write(self, path: Path, architecture: str, **flags: Any) -> Path:
        tokens, types, scores = self.sentencepiece()
        writer = gguf.GGUFWriter(path, architecture)
        gguf_files.write_tokenizer(writer, "llama", "default", tokens, types, scores, None, **flags)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
        return gguf_files.finish(writer, path)

    def twin(self, text: str, space_before: bool) -> list[int]:
        return gguf_files.sentencepiece(text, *self.sentencepiece(), space_before)

    @pytest.mark.parametrize("architecture", ["gemma3", "llama"])
    def test_sentencepiece_without_a_space_before(self, architecture: str, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.gguf", architecture, add_add_space_prefix=False, add_add_bos_token=True)
        tokenizer = read_tokenizer(read_header(path))
        for text in self.TEXTS:
            expected = self.twin(text, space_before=False)
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text
            assert tokenizer(text)["input_ids"] == [1, *expected]
            assert tokenizer.decode(expected) == text

    def test_sentencepiece_with_a_space_before(self, tmp_path: Path) -> None:
        tokenizer = read_tokenizer(read_header(self.write(tmp_path / "a.gguf", "llama", add_add_bos_token=False)))
        for text in ("abc ab", "a", "1212 a", "x\u4e16"):
            assert tokenizer(text)["input_ids"] == self.twin(text, space_before=True), text
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    @pytest.mark.parametrize(
        ("pre", "words"),
        [
            ("gpt-2", ["a", " b", "12", " 345", "!?", " x"]),
            ("smollm", ["a", " b", "1", "2", " ", "3", "4", "5", "!?", " x"]),
            ("llama-bpe", ["a", " b", "12", " ", "345", "!?", " x"]),
            ("qwen2", ["a", " b", "1", "2", " ", "3", "4", "5", "!?", " x"]),
            ("stablelm2", ["a", " b", "1", "2", " ", "3", "4", "5", "!?", " x"]),
            (None, ["a", " b", "12", " 345", "!?", " x"]),
        ],
    )
    def test_words_are_cut_as_the_file_says(
        self, pre: str | None, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        network = random_network("llama")
        base = Base.find(str(write_network(tmp_path / "a.gguf", "llama", network, pre=pre)))
        tokenizer: Any = load_tokenizer(base)
        cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a b12 345!? x")
        assert [word.replace("\u0120", " ") for word, _ in cut] == words
        assert ("cuts words" in capfd.readouterr().err) == (pre is None)

    def test_bytes_merges_and_control_tokens(self, tmp_path: Path) -> None:
        path = write_network(tmp_path / "a.gguf", "llama", random_network("llama"), add_add_bos_token=True)
        tokenizer: Any = load_tokenizer(Base.find(str(path)))
        ids = {token: number for number, token in enumerate(BYTE_LEVEL)}
        assert tokenizer("12 ab<|turn|>b", add_special_tokens=False).input_ids == [
            *(ids["12"], ids["\u0120"], ids["ab"], ids["<|turn|>"], ids["b"])  # "a b" comes before "\u0120 a"
        ]
        assert tokenizer("b").input_ids == [0, ids["b"]]
        for text in ("  two  spaces\n\n\tand tabs", "\u4e16\u754c \U0001f600", "</s>a"):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
        assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (1, 256)

    def test_llama_3_takes_words_that_are_tokens_whole_and_begins_texts(self, tmp_path: Path) -> None:
        path = write_network(tmp_path / "a.gguf", "llama", random_network("llama"), pre="llama-bpe")
        tokenizer: Any = load_tokenizer(Base.find(str(path)))
        assert tokenizer("12 ab").input_ids == [0, *(BYTE_LEVEL.index(token) for token in ("12", "\u0120ab"))]

    def test_no_token_comes_on_top(self, tmp_path: Path) -> None:
        """Transformers' classes have some of their own, for which a network has no row."""
        tokens = ["<\uff5cend\uff5c>", *BYTE_LEVEL[1:]]
        path = write_network(tmp_path / "a.gguf", "llama", random_network("llama"), tokens=tokens)
        tokenizer = load_tokenizer(Base.find(str(path)))
        assert len(tokenizer) == len(tokens)
        assert tokenizer("a<\uff5cend\uff5c>", add_special_tokens=False)["input_ids"] == [tokens.index("a"), 0]

    def test_all_end_tokens_and_chat_templates_are_kept(self, tmp_path: Path) -> None:
        flags = {"add_eot_token_id": len(BYTE_LEVEL) - 1}
        templates = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
        network = random_network("llama")
        path = write_network(tmp_path / "a.gguf", "llama", network, **flags, add_chat_template=templates)
        base = Base.find(str(path))
        assert end_ids(base) == (1, len(BYTE_LEVEL) - 1)
        assert load_tokenizer(base).chat_template == {"default": "one", "tool_use": "two"}


def test_it_is_converted_once_and_known_by_its_bytes(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_network(tmp_path / "a.gguf", "llama", random_network("llama"))
    base = Base.find(str(path))
    assert "ready in" in capfd.readouterr().err
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert base.directory == cache / "bases" / f"gguf-{digest[:16]}"
    assert (base.fingerprint["name"], base.fingerprint["gguf"]) == (str(path), digest)
    moved = path.rename(tmp_path / "elsewhere")  # by its first bytes, whatever it is called
    assert pull(str(moved), progress=False) == base.directory
    assert capfd.readouterr().err == ""
    assert Base.find(str(moved)).fingerprint | {"name": ""} == base.fingerprint | {"name": ""}
    settings = base.directory / "config.json"
    settings.write_text(settings.read_text().replace("5000.0", "6000.0"))
    with pytest.raises(ModelError, match="was changed"):
        _ = Base(base.directory, path).fingerprint
    Base.find(str(moved))
    assert "is made anew" in capfd.readouterr().err


class TestRefused:
    @pytest.fixture
    def whole(self, tmp_path: Path) -> Path:
        return write_network(tmp_path / "a.gguf", "llama", random_network("llama"))

    def refused(self, path: Path, cache: Path) -> ModelError:
        with pytest.raises(ModelError) as caught:
            Base.find(str(path))
        assert bases(cache) == []
        return caught.value

    @pytest.mark.parametrize("kept", [3, 10, 30, 400, 5_000, -1])
    def test_cut_off(self, kept: int, whole: Path, cache: Path) -> None:
        whole.write_bytes(whole.read_bytes()[:kept])
        assert ("no GGUF file" if kept == 3 else "is cut off") in self.refused(whole, cache).what

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else"])
    def test_no_gguf(self, content: bytes, whole: Path, cache: Path) -> None:
        whole.write_bytes(content)
        assert self.refused(whole, cache).what == "it is no GGUF file"

    @pytest.mark.parametrize(("version", "said"), [(1, "version 1"), (3 << 24, "big-endian")])
    def test_versions(self, version: int, said: str, whole: Path, cache: Path) -> None:
        content = bytearray(whole.read_bytes())
        content[4:8] = version.to_bytes(4, "little")
        whole.write_bytes(content)
        assert said in self.refused(whole, cache).what

    def test_damaged_headers_are_one_error(self, whole: Path, cache: Path) -> None:
        content = whole.read_bytes()
        random = np.random.default_rng(0)
        for _ in range(60):
            damaged = bytearray(content)
            damaged[int(random.integers(4, 1500))] = int(random.integers(256))
            whole.write_bytes(damaged)
            try:
                read_header(whole)
            except ModelError as error:
                assert str(whole) in str(error)

    def test_architecture(self, tmp_path: Path, cache: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "clip")
        writer.add_tensor("v.weight", np.zeros((32, 32), np.float32))
        error = self.refused(gguf_files.finish(writer, tmp_path / "a.gguf"), cache)
        assert "clip" in error.what and "gemma3" in str(error.allowed) and "t5" not in str(error.allowed)

    def test_encoder_and_decoder(self, tmp_path: Path, cache: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "t5")
        writer.add_block_count(2)
        writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
        assert "t5" in self.refused(gguf_files.finish(writer, tmp_path / "a.gguf"), cache).what

    def test_one_of_several_parts(self, tmp_path: Path, cache: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "a-00001-of-00004.gguf", "llama")
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 4)
        writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
        error = self.refused(gguf_files.finish(writer, tmp_path / "a-00001-of-00004.gguf"), cache)
        assert "part 1 of a GGUF file in 4" in error.what and "--merge" in str(error.hint)

    def test_no_tokenizer(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gguf_files, "write_tokenizer", lambda writer: None)
        path = write_network(tmp_path / "a.gguf", "llama", random_network("llama"))
        assert self.refused(path, cache).what == "the GGUF file has no tokenizer"

    def test_unknown_cuts(self, tmp_path: Path, cache: Path) -> None:
        path = write_network(tmp_path / "a.gguf", "llama", random_network("llama"), pre="martian")
        error = self.refused(path, cache)
        assert "'martian'" in error.what and "llama-bpe" in str(error.allowed)

    def test_quantisation(self, whole: Path, cache: Path) -> None:
        """The type of the first tensor becomes a number that nobody has given out."""
        content = bytearray(whole.read_bytes())
        at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
        assert content[at : at + 4] == bytes(4)
        content[at : at + 4] = (200).to_bytes(4, "little")
        whole.write_bytes(content)
        assert "token_embd.weight is quantised as number 200" in self.refused(whole, cache).what

    def test_tensors_without_a_place(self, tmp_path: Path, cache: Path) -> None:
        """A llama with norms of queries would be another network without them."""
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        network = random_network("llama")
        gguf_files.write_tokenizer(writer)
        gguf_files.write_settings(writer, "llama", network.config)
        for name, tensor in gguf_files.stored_tensors("llama", network).items():
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32))
        error = self.refused(gguf_files.finish(writer, tmp_path / "a.gguf"), cache)
        assert "no place for 1 tensors: blk.0.attn_q_norm.weight" in error.what

    def test_missing_tensors(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tensors = gguf_files.stored_tensors
        monkeypatch.setattr(
            gguf_files,
            "stored_tensors",
            lambda *given: {name: value for name, value in tensors(*given).items() if "ffn_up" not in name},
        )
        path = write_network(tmp_path / "a.gguf", "llama", random_network("llama"))
        assert "lacks 2 tensors of LlamaForCausalLM" in self.refused(path, cache).what

    def test_stretched_in_another_way(self, whole: Path, tmp_path: Path, cache: Path) -> None:
        network = random_network("llama 3.1")
        network.config.rope_parameters["rope_theta"] = 400000.0
        path = write_network(tmp_path / "b.gguf", "llama 3.1", network)
        content = path.read_bytes()
        true = gguf_files.llama3_factors(network.config.rope_parameters, 16).tobytes()
        assert content.count(true) == 1
        path.write_bytes(content.replace(true, np.array([1, 1, 1, 1, 3, 8, 8, 8], np.float32).tobytes()))
        assert "which isn't Llama 3's" in self.refused(path, cache).what

    def test_no_room(self, whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))
        with pytest.raises(StorageError, match=r"0\.1 GB of bfloat16 weights, and 0\.0 GB are free"):
            Base.find(str(whole))
        assert bases(cache) == []


def test_settings_that_are_not_read_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_network(tmp_path / "a.gguf", "llama", random_network("llama"), settings={"llama.logit_scale": 2.0})
    Base.find(str(path))
    assert "note: settings of the file that aren't read: logit_scale" in capfd.readouterr().err
