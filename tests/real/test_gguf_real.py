"""A real GGUF file as a base, which `$PERLHF_GGUF` names (Gemma 3 270M, say: docs/recipes.md).

Beyond its window, where it has one: the long text here has more tokens than Gemma 3's windows of 512.
"""

import copy
import os
import re
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from perlhf.method.packing import completed, pack
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer
from perlhf.model.model import Model
from perlhf.rollout.local import Ends, sample

FILE = os.environ.get("PERLHF_GGUF", "")
PAGES = Path(__file__).parents[2] / "docs"
ANSWERS = (" Yes, with oat milk.", "\n\nThe adapter is merged.")


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.find(FILE)


@pytest.fixture(scope="module")
def tokenizer(base: Base) -> Any:
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """540 tokens of a page, 9 of them, and a question."""
    long = tokenizer((PAGES / "method.md").read_text("utf-8")[:6000]).input_ids[:540]
    assert len(long) == 540
    return [long, long[:9], tokenizer("user: Do you have a latte?\nassistant:").input_ids]


@pytest.fixture(scope="module")
def plain(base: Base) -> Any:
    """The network by transformers alone, in float32."""
    network = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32, attn_implementation="eager")
    return network.eval().requires_grad_(False)


def plain_logprobs(network: Any, prompt: list[int], answer: list[int]) -> Tensor:
    kept = len(answer) + 1
    logits = network(torch.tensor([prompt + answer]), use_cache=False, logits_to_keep=kept).logits[0, -kept:-1]
    return torch.log_softmax(logits.float(), -1)[torch.arange(len(answer)), torch.tensor(answer)]


@torch.no_grad()  # rows of 550 tokens would keep gigabytes
def test_it_computes_what_transformers_does_with_the_adapter_merged(
    base: Base, tokenizer: Any, prompts: list[list[int]], plain: Any
) -> None:
    model = Model.load(base, dtype="float32", device="cpu")
    answers = [tokenizer(text, add_special_tokens=False).input_ids for text in ANSWERS]
    examples = [[completed(prompt, answer) for answer in answers] for prompt in prompts]
    expected = torch.cat([plain_logprobs(plain, prompt, answer) for prompt in prompts for answer in answers])
    ways = ("tree", "none") if model.way.packing == "tree" else ("none",)
    before = {}
    for packing in ways:
        batch = pack(examples, packing)
        before[packing] = model.logprobs(batch, None).logprobs
        torch.testing.assert_close(before[packing][batch.completion_mask], expected, rtol=0, atol=1e-3)
    model.add_adapter("policy", "policy", rank=4, targets="all")
    merged = copy.deepcopy(plain)
    for packing in ways:
        batch = pack(examples, packing)
        assert torch.equal(model.logprobs(batch, "policy").logprobs, before[packing])  # KL 0 at step 0, in every bit
    draw = torch.Generator().manual_seed(5)
    for path, pair in model.adapters["policy"].pairs.items():
        pair.b.copy_(torch.randn(pair.b.shape, generator=draw) * 0.01)
        merged.get_parameter(path + ".weight").add_(pair.scale * pair.b @ pair.a)
    adapted = torch.cat([plain_logprobs(merged, prompt, answer) for prompt in prompts for answer in answers])
    assert float((adapted - expected).abs().max()) > 0.05
    for packing in ways:
        batch = pack(examples, packing)
        found = model.logprobs(batch, "policy").logprobs[batch.completion_mask]
        torch.testing.assert_close(found, adapted, rtol=0, atol=2e-3)
        assert torch.equal(model.logprobs(batch, None).logprobs, before[packing])  # off again: every bit of the base


def test_greedy_answers_are_those_of_generate(base: Base, prompts: list[list[int]], plain: Any) -> None:
    model = Model.load(base, dtype="float32", device="cpu")
    settings: Any = {"adapter": None, "ends": Ends(()), "temperature": 0.0, "max_completion_tokens": 12}
    found = sample(model, prompts, draws=torch.zeros(len(prompts), 12, dtype=torch.float64), **settings).completions
    for prompt, answer in zip(prompts, found, strict=True):
        given = torch.tensor([prompt])
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        whole = plain.generate(given, attention_mask=torch.ones_like(given), **settings)
        assert answer == whole[0, len(prompt) :].tolist()


def test_nothing_later_is_seen_and_reading_again_gives_every_bit(
    base: Base, tokenizer: Any, prompts: list[list[int]]
) -> None:
    answer = tokenizer(ANSWERS[0], add_special_tokens=False).input_ids
    changed = [*answer[:2], *reversed(answer[2:])]
    batches = [pack([[completed(prompts[0], text)]], "tree") for text in (answer, changed)]
    found = []
    for _ in range(2):
        model = Model.load(base, dtype="bfloat16", device="cpu")
        if model.base.config.tie_word_embeddings:
            head: Any = model.base.get_output_embeddings()
            assert head.weight is model.base.get_input_embeddings().weight
        found.append([model.logprobs(batch, None).logprobs.detach() for batch in batches])
    assert torch.equal(found[0][0], found[1][0])
    first = batches[0].completion_mask.nonzero()[:2, 1]
    assert torch.equal(found[0][0][0, first], found[0][1][0, first])


def test_its_sentencepiece_follows_the_tables(tokenizer: Any) -> None:
    """Lines of prose and code, some random ones. Blanks written as U+2581 and rows of over 31 spaces are left out:
    transformers' own tokenizer of Gemma joins those in another order."""
    fields = gguf.GGUFReader(FILE).fields
    if fields["tokenizer.ggml.model"].contents() != "llama":
        pytest.skip("no SentencePiece")
    tokens, types, scores = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "scores"))
    before = (
        fields["tokenizer.ggml.add_space_prefix"].contents() if "tokenizer.ggml.add_space_prefix" in fields else True
    )
    texts = (PAGES / "method.md").read_text("utf-8").splitlines()[:150] + Path(__file__).read_text("utf-8").splitlines()
    draw = torch.Generator().manual_seed(0)
    letters = "ab \n\t\u00e9\u4f601<>0x\U0001f600-"
    texts += ["".join(letters[i] for i in torch.randint(len(letters), (15,), generator=draw)) for _ in range(200)]
    texts += [
        "<start_of_turn>user\nhi<end_of_turn>\n",
        "<table><tr>x</tr>",
        "    def f(x):\n        return x",
        "\n" * 40,
    ]
    for text in texts:
        if text and "\u2581" not in text and not re.search(" {32}", text):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == gguf_files.sentencepiece(text, tokens, types, scores, before), text
            assert tokenizer.decode(ids) == text
