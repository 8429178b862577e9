"""llama.cpp itself runs what `export --gguf` writes: 32 greedy tokens in float32 are ours for 19 of 20 prompts.

The packaged base with a policy trained by the command line, merged and as base and adapter; and tiny random networks of
all shapes. llama.cpp adds numbers in another order, so that one prompt may meet two tokens that are as likely.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import BYTE_LEVEL, FAMILIES, random_network
from gguf_written import (
    GEMMA,
    MARKED,
    NAMES,
    SPACE_FIRST,
    TEXTS,
    WRITTEN,
    byte_level,
    metaspace,
    pieces,
    random_adapter,
    write,
)
from toy import command, write_feedback
from transformers import AutoTokenizer, PreTrainedModel

from perlhf.commands.cli import main
from perlhf.commands.exports.export import export
from perlhf.config.commands import ExportConfig
from perlhf.model.bases.gguf.tokenizer import cuts
from perlhf.model.finished import read_run
from perlhf.model.to_gguf.files import write_adapter, write_network
from perlhf.model.to_gguf.vocabulary import vocabulary_of
from perlhf.rollout.local import Ends, stream

TOKENS, PROMPTS, EQUAL = 32, 20, 19
QUESTIONS = (
    *("Do you have oat milk?", "A small tea, please.", "What is in a flat white?", "Is the cocoa sweet?"),
    *("Can I pay by card?", "Where is Peru?", "Name three rivers.", "Write a haiku about rain.", "What is 12 + 30?"),
    *(
        "Who was Ada Lovelace?",
        "How do I boil an egg?",
        "Translate 'good morning' into French.",
        "Why is the sky blue?",
    ),
    *("Give me a short poem.", "What's a prime number?", "Tell me a joke.", "How far is the moon?", "List two fruits."),
    *("What does a compiler do?", "Say hello in Spanish."),
)


def equal(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], ends: Sequence[int] = ()) -> int:
    """Prompts with the same tokens up to the first end token, which ours leave out."""
    same = 0
    for own, other in zip(ours, theirs, strict=True):
        at = next((at for at, token in enumerate(other) if token in ends), len(other))
        same += list(own) == list(other[:at])
    return same


def report(what: str, same: int, *files: Path) -> None:
    sizes = ", ".join(f"{file.name} {file.stat().st_size:,} bytes" for file in files)
    print(f"{what}: {same} of {PROMPTS} prompts have our {TOKENS} greedy tokens; {sizes}")


@torch.no_grad()
def greedy(network: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """By transformers alone, the whole text anew for each token."""
    ids = list(prompt)
    for _ in range(TOKENS):
        logits: Any = network(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(autouse=True)
def small_leftovers(tmp_path: Path) -> Iterator[None]:
    """Files of half a gigabyte don't stay where pytest keeps those of the last sessions."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def policy(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy over an SFT run of another rank, whose files have both; a few updates each, at high rates."""
    directory = tmp_path_factory.mktemp("policy")
    feedback = write_feedback(directory / "feedback")
    common = ("--encoding.max-tokens", "192", "--adapter.targets", "attention")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(feedback))
        sft, run = directory / "sft", directory / "policy"
        words = command("sft", smollm2, feedback / "demonstrations.jsonl", sft, *common)
        assert main([*words, "--optim.learning-rate", "1e-3"]) == 0
        words = command("policy", smollm2, feedback / "prompts.jsonl", run, *common)
        assert main([*words, "--sft", str(sft), "--adapter.rank", "2", "--optim.learning-rate", "1e-3"]) == 0
    return run


@pytest.fixture(scope="module")
def ours(policy: Path) -> tuple[list[list[int]], list[list[int]], list[list[int]], tuple[int, ...]]:
    """Prompts, the policy's answers, the base's, and what ends them."""
    model, encoder = read_run(policy).open("cpu")
    prompts = [encoder.prompt(question) for question in QUESTIONS]
    ends, draws = Ends.of(encoder), torch.zeros(TOKENS)
    answers, without = (
        [list(stream(model, ids, name, draws, ends, 0.0)) for ids in prompts] for name in ("policy", None)
    )
    return prompts, answers, without, encoder.end_ids


def talks() -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_a_policy_on_the_packaged_base(llama: Any, policy: Path, ours: Any, tmp_path: Path, format: Any) -> None:
    prompts, answers, without, ends = ours
    assert len(QUESTIONS) == PROMPTS and equal(answers, without) < PROMPTS // 2, "the adapter must do something"
    words = ["export", str(policy), str(tmp_path / "out"), "--gguf", "--format", format, "--dtype", "float32"]
    assert main([*words, "--device", "cpu"]) == 0
    if format == "merged":
        model, lora = tmp_path / "out" / "model.gguf", None
    else:
        model, lora = tmp_path / "out" / "base.gguf", tmp_path / "out" / "adapter.gguf"
    found = llama(model=model, lora=lora, talks=talks())
    assert found["talks"] == prompts, "the file's template and tokenizer give the tokens of training"
    same = equal(answers, found["greedy"], ends)
    report(f"SmolLM2-135M, {format}", same, *(file for file in (model, lora) if file))
    assert same >= EQUAL
    if lora is not None:  # without its adapter it is the base
        assert equal(without, llama(model=model, talks=talks())["greedy"], ends) >= EQUAL


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_run(llama: Any, policy: Path, ours: Any, tmp_path: Path, dtype: Any) -> None:
    """Rounded weights have other tokens sooner or later, but the same first one nearly always."""
    details = export(
        ExportConfig(run=policy, output=tmp_path / "out", gguf=True, format="merged", dtype=dtype, device="cpu")
    )
    assert details["dtype"] == dtype
    found = llama(model=tmp_path / "out" / "model.gguf", talks=talks())["greedy"]
    first = sum(bool(own) and own[0] == other[0] for own, other in zip(ours[1], found, strict=True))
    report(f"SmolLM2-135M, merged, {dtype}", equal(ours[1], found, ours[3]), tmp_path / "out" / "model.gguf")
    assert first >= 17


@pytest.mark.parametrize("family", WRITTEN)
def test_a_tiny_network_of_each_shape(llama: Any, family: str, tmp_path: Path) -> None:
    """Prompts of up to 40 tokens, beyond windows and what positions were stretched from."""
    network = random_network(family)
    draw = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(2, len(BYTE_LEVEL) - 1, (5 + 35 * number // PROMPTS,), generator=draw).tolist()
        for number in range(PROMPTS)
    ]
    file = write(tmp_path / "a.gguf", network)
    answers = [greedy(network, prompt) for prompt in prompts]
    assert len({token for answer in answers for token in answer}) > PROMPTS, "an answer must be more than one token"
    same = equal(answers, llama(model=file, prompts=prompts)["greedy"])
    report(family, same, file)
    assert same >= EQUAL


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_an_adapter_of_each_shape(llama: Any, family: str, tmp_path: Path) -> None:
    network = random_network(family)
    adapter = random_adapter(network)
    file = write(tmp_path / "base.gguf", network)
    write_adapter(tmp_path / "adapter.gguf", network.config, adapter, "tiny")
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, len(BYTE_LEVEL) - 1, (12,), generator=draw).tolist() for _ in range(PROMPTS)]
    before = [greedy(network, prompt) for prompt in prompts]
    with torch.no_grad():
        for path, pair in adapter.pairs.items():
            network.get_parameter(f"{path}.weight").add_(pair.scale * pair.b @ pair.a)
    after = [greedy(network, prompt) for prompt in prompts]
    found = llama(model=file, lora=tmp_path / "adapter.gguf", prompts=prompts)["greedy"]
    assert equal(before, after) < PROMPTS // 2
    same = equal(after, found)
    report(f"{family} and its adapter", same, file, tmp_path / "adapter.gguf")
    assert same >= EQUAL


def small(file: Path, tokenizer: Any) -> Path:
    """A tiny network with this tokenizer."""
    FAMILIES["other vocabulary"] = ("llama", "llama", FAMILIES["llama"][2] | {"vocab_size": len(tokenizer)})
    network = random_network("other vocabulary")
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    write_network(file, network, vocabulary, torch.float32, "tiny")
    return file


@pytest.mark.parametrize("name", NAMES)
def test_byte_level_tokens(llama: Any, name: str, tmp_path: Path) -> None:
    own = byte_level(cuts(name, ""), ignore_merges=name in ("llama-bpe", "tekken"))
    texts = [*TEXTS, "ab<tool>12</s>"]
    found = llama(model=small(tmp_path / "a.gguf", own), texts=texts)
    assert found["texts"] == [own(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_tokens_of_the_packaged_tokenizer(llama: Any, smollm2: Path, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(smollm2)
    texts = [*TEXTS, *QUESTIONS, *(page.read_text("utf-8") for page in sorted(Path("docs").glob("*.md")))]
    found = llama(model=small(tmp_path / "a.gguf", own), texts=texts)
    assert found["texts"] == [own(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize(
    ("prefix", "split"), [(SPACE_FIRST, None), (None, metaspace("always")), (None, metaspace("never")), (MARKED, GEMMA)]
)
def test_sentencepiece_tokens(llama: Any, prefix: Any, split: Any, tmp_path: Path) -> None:
    own = pieces(prefix, split)
    texts = ["abc ab", "a  b", "aababc.\n\nbc", "x\u4e16", "ab<tag>c", "a</s>b", "<s>ab.</s>"]
    found = llama(model=small(tmp_path / "a.gguf", own), texts=texts)
    assert found["texts"] == [own(text, add_special_tokens=False)["input_ids"] for text in texts]
