"""Every command on a base that is a GGUF file: a llama of two layers with bytes for tokens, which begins its texts."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_files import random_network, write_network
from transformers import AutoTokenizer

from perlhf.model.bases.found import Base

PLAIN = ("--encoding.template", "plain-bos", "--encoding.max_tokens", "250")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = random_network("llama")
    return write_network(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", network, add_add_bos_token=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "cache"))


def test_all_commands_take_it(base: Path, stage: Any, perlhf: Any, feedback: Path, tmp_path: Path) -> None:
    pulled = perlhf("pull", str(base))
    assert (pulled.code, "ready in" in pulled.err) == (0, True)
    directory = Path(pulled.out.strip())
    sft, done = stage("sft", "--dry-run", *PLAIN, base=base)
    assert (done.code, sft.exists()) == (0, False), done.err
    sft, done = stage("sft", "--max-updates", "2", *PLAIN, base=base)
    assert done.code == 0, done.err
    base_facts = json.loads((sft / "manifest.json").read_text())["facts"]["base"]
    assert base_facts == Base.find(str(base)).fingerprint
    assert base_facts["name"] == str(base) and len(base_facts["gguf"]) == 64
    reward, done = stage("reward", "--max-updates", "2", *PLAIN, base=base)
    assert done.code == 0, done.err
    paid = ("--sft", str(sft), "--reward", str(reward), "--updates", "1", "--max-completion-tokens", "8")
    policy, done = stage("policy", *paid, *PLAIN, base=base)
    assert done.code == 0, done.err
    for run in (sft, reward, policy):
        assert (done := perlhf("evaluate", str(run))).code == 0, done.err
    scored = perlhf("score", str(reward), str(feedback / "ratings.jsonl"), "--output", str(tmp_path / "scores.jsonl"))
    assert scored.code == 0, scored.err
    for name, options in (("peft", ()), ("merged", ("--format", "merged"))):
        exported = perlhf("export", str(policy), str(tmp_path / name), *options)
        assert exported.code == 0, exported.err
    adapter = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(directory)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    talk = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<s>user: hi\nassistant:"


def test_plain_without_the_begin_token_is_told(base: Path, stage: Any) -> None:
    _, done = stage("sft", "--max-updates", "1", "--encoding.template", "plain", base=base)
    assert done.code == 0, done.err
    assert "begin with '<s>', and `plain` leaves it out" in " ".join(done.err.split())


def test_a_base_without_a_template_names_the_plain_one_that_suits_it(base: Path, stage: Any) -> None:
    _, done = stage("sft", "--encoding.template", "tokenizer", base=base)
    assert done.code == 2
    assert "no chat template" in done.err and "encoding.template: plain-bos" in done.err


def test_a_file_that_is_none_is_one_error(stage: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    _, done = stage("sft", base=path)
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert "broken.gguf: the GGUF file is cut off" in done.err
