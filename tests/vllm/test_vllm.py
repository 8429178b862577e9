"""vLLM itself beside our own sampler: the same log-probabilities and greedy tokens, of the adapter that was asked for.

The packaged base, in float32 and in bfloat16, with two versions of an adapter and an exported policy.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from real_server import LONGEST, NAME, RANK, SLOTS, Server
from tiny_models import answers, open_encoder, open_model, randomise
from toy import command, write_feedback

from perlhf.commands.cli import main
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import Given, read_run
from perlhf.model.model import Model
from perlhf.model.saved import save_adapter
from perlhf.rollout.local import Ends, sample

QUESTIONS = (
    *("Do you have oat milk?", "What is in a flat white?", "Can I pay by card?", "Where is Peru?"),
    *("Name three rivers.", "What is 12 + 30?", "Who was Ada Lovelace?", "Why is the sky blue?"),
)
SAMPLES, TOKENS = 2, 32
EXACT = 1e-3
"""Log-probabilities in float32 differ by the order in which numbers are added, over 30 layers."""
ROUNDED = 0.1
"""Mean difference in bfloat16, whose roundings fall differently."""

in_float32 = pytest.mark.parametrize("beside", ["float32"], indirect=True)
"""In bfloat16 which of two likely tokens is taken depends on what is computed beside them."""


class Beside(NamedTuple):
    """A server, and what it should do."""

    server: Server
    model: Model
    encoder: Encoder
    dtype: str
    versions: dict[str, Path]
    """Directories of the adapters `v1` and `v2`, which the model has by these names; `policy` is the exported one."""


@pytest.fixture(scope="module")
def policy(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy over an SFT run, by the command line; its export stands beside it."""
    directory = tmp_path_factory.mktemp("policy")
    feedback = write_feedback(directory / "feedback")
    common = ("--encoding.max-tokens", "192", "--adapter.targets", "attention")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(feedback))
        words = command("sft", smollm2, feedback / "demonstrations.jsonl", directory / "sft", *common)
        assert main([*words, "--optim.learning-rate", "1e-3"]) == 0
        words = command("policy", smollm2, feedback / "prompts.jsonl", directory / "run", *common)
        assert main([*words, "--sft", str(directory / "sft"), "--optim.learning-rate", "1e-3"]) == 0
    for form in ("peft", "merged"):
        assert main(["export", str(directory / "run"), str(directory / form), "--format", form, "--device", "cpu"]) == 0
    return directory


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def beside(
    request: pytest.FixtureRequest,
    vllm: Callable[..., Any],
    policy: Path,
    smollm2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Beside]:
    """The packaged base as its directory is, with the exported policy from the start and two versions loaded later."""
    dtype = request.param
    model, encoder = read_run(policy / "run", given=Given(dtype=dtype)).open("cpu")
    versions = {"policy": policy / "peft"}
    for seed, name in enumerate(("v1", "v2"), 1):
        model.add_adapter(name, "policy", rank=4, alpha=8.0)
        randomise(model, name, seed, size=0.04)
        versions[name] = tmp_path_factory.mktemp("versions") / name
        save_adapter(model, name, versions[name], encoder)
    options = ["--enable-lora", "--max-loras", str(SLOTS), "--max-lora-rank", str(RANK)]
    options += ["--logprobs-mode", "processed_logprobs", "--lora-modules", f"policy={policy / 'peft'}"]
    with vllm(smollm2, dtype, *options) as server:
        print(f"{dtype}: {server.seconds:.0f} s until it answers")
        for name in ("v1", "v2"):
            assert server.load(name, versions[name]) == (200, f"Success: LoRA adapter '{name}' added successfully.")
        yield Beside(server, model, encoder, dtype, versions)


def prompts_of(encoder: Encoder) -> list[list[int]]:
    return [list(encoder.prompt(question)) for question in QUESTIONS]


def greedy(beside: Beside, adapter: str | None) -> list[list[int]]:
    """Ours, without end tokens."""
    prompts, ends = prompts_of(beside.encoder), Ends.of(beside.encoder)
    draws = torch.zeros(len(prompts), TOKENS, dtype=torch.float64)
    asked: dict[str, Any] = {"adapter": adapter, "draws": draws, "ends": ends, "temperature": 0.0}
    found = sample(beside.model, prompts, max_completion_tokens=TOKENS, **asked).completions
    return [[token for token in ids if token not in ends.ids] for ids in found]


def theirs(beside: Beside, name: str, prompts: Sequence[list[int]] | None = None) -> list[list[int]]:
    """vLLM's greedy tokens, without end tokens."""
    ends = list(beside.encoder.end_ids)
    given = list(prompts or prompts_of(beside.encoder))
    choices = beside.server.complete(name, given, temperature=0.0, max_tokens=TOKENS, stop_token_ids=ends)
    return [[token for token in choice["token_ids"] if token not in ends] for choice in choices]


def equal(ours: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> int:
    return sum(list(one) == list(other) for one, other in zip(ours, others, strict=True))


@torch.no_grad()
def gaps(
    beside: Beside, adapter: str | None, choices: Sequence[dict[str, Any]], temperature: float
) -> tuple[float, float]:
    """Mean and largest difference of vLLM's log-probabilities from the trainer's, of the same tokens."""
    ids = [choice["token_ids"] for choice in choices]
    batch = answers([choice["prompt_token_ids"] for choice in choices], ids)
    table = beside.model.logprobs(batch, adapter, temperature=temperature).logprobs
    found = [
        abs(one - other)
        for row, choice in zip(table.tolist(), choices, strict=True)
        for one, other in zip(row, choice["logprobs"]["token_logprobs"], strict=False)
    ]
    return sum(found) / sum(map(len, ids)), max(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_sampled_tokens_are_the_trainers(beside: Beside, temperature: float) -> None:
    """At the temperature they were drawn at; another adapter's, or raw ones, are far away."""
    asked = {"n": SAMPLES, "seed": 1, "temperature": temperature, "max_tokens": TOKENS}
    asked |= {"stop_token_ids": list(beside.encoder.end_ids)}
    choices = beside.server.complete("v1", prompts_of(beside.encoder), **asked)
    assert [choice["index"] for choice in choices] == list(range(len(QUESTIONS) * SAMPLES))
    mean, largest = gaps(beside, "v1", choices, temperature)
    stale, _ = gaps(beside, "v2", choices, temperature)
    without, _ = gaps(beside, None, choices, temperature)
    tokens = sum(len(choice["token_ids"]) for choice in choices)
    what = f"{beside.dtype}, temperature {temperature}: {tokens} tokens, gap {mean:.2g} (largest {largest:.2g})"
    print(f"{what}; from another version {stale:.2g}, from the base {without:.2g}")
    assert mean < EXACT / 10 and largest < EXACT if beside.dtype == "float32" else mean < ROUNDED
    assert min(stale, without) > 2 * mean
    if temperature != 1:
        raw, _ = gaps(beside, "v1", choices, 1.0)
        print(f"from log-probabilities at temperature 1: {raw:.2g}")
        assert raw > 2 * mean


def test_greedy_tokens_are_ours(beside: Beside) -> None:
    """With each adapter and without; the adapter changes most answers."""
    names: dict[str, str | None] = {NAME: None, "v1": "v1", "v2": "v2", "policy": "policy"}
    answered = {name: theirs(beside, name) for name in names}
    for name, adapter in names.items():
        same = equal(greedy(beside, adapter), answered[name])
        print(f"{beside.dtype}, {name}: {same} of {len(QUESTIONS)} prompts have our {TOKENS} greedy tokens")
        assert same >= (len(QUESTIONS) - 1 if beside.dtype == "float32" else 1)
        assert name == NAME or equal(answered[name], answered[NAME]) <= len(QUESTIONS) // 2


@in_float32
def test_a_conversation_becomes_the_tokens_of_training(beside: Beside) -> None:
    """An exported policy beside the base's own template, through the chat interface."""
    prompts = prompts_of(beside.encoder)
    for question, ids in list(zip(QUESTIONS, prompts, strict=True))[:3]:
        body = {"model": "policy", "messages": [{"role": "user", "content": question}], "temperature": 0.0}
        status, answer = beside.server.ask("/v1/chat/completions", body | {"max_tokens": 4, "return_token_ids": True})
        assert status == 200, answer
        assert answer["prompt_token_ids"] == ids


@in_float32
def test_versions_are_names_with_paths(beside: Beside) -> None:
    """A name is one version; unloaded, it is gone, and another path may have it. No cache outlives a version."""
    server, versions = beside.server, beside.versions
    status, listed = server.ask("/v1/models")
    found = {entry["id"]: entry for entry in listed["data"]}
    assert status == 200 and found[NAME]["max_model_len"] == LONGEST and found[NAME]["parent"] is None
    for name in ("policy", "v1", "v2"):
        assert found[name]["root"] == str(versions[name]) and found[name]["parent"] == NAME
    status, answer = server.load("v1", versions["v2"])
    assert status == 400 and "already been loaded" in answer["error"]["message"]
    first, second = theirs(beside, "v1"), theirs(beside, "v2")
    assert server.unload("v1")[0] == 200
    assert server.unload("v1")[0] == 404
    assert server.ask("/v1/completions", {"model": "v1", "prompt": [1], "max_tokens": 1})[0] == 404
    assert server.load("v1", versions["v2"])[0] == 200  # the name again, which a cache by names alone would mix up
    assert theirs(beside, "v1") == second
    assert server.unload("v1")[0] == 200
    assert server.load("v1", versions["v1"])[0] == 200
    assert theirs(beside, "v1") == first


@in_float32
def test_what_a_sampler_relies_on(beside: Beside) -> None:
    """Keys, ends, seeds and the edge of the context."""
    server, ids = beside.server, prompts_of(beside.encoder)[0]
    assert server.ask("/version", key=None)[0] == 200
    assert server.ask("/v1/models", key=None)[0] == server.ask("/v1/models", key="another")[0] == 401
    end = beside.encoder.end_id
    (ended,) = server.complete(NAME, [ids], temperature=0.0, max_tokens=200, stop_token_ids=[end], ignore_eos=True)
    assert ended["token_ids"][-1] == end and ended["finish_reason"] == "stop" and ended["stop_reason"] == end
    assert len(ended["logprobs"]["token_logprobs"]) == len(ended["token_ids"])
    (cut,) = server.complete(NAME, [ids], temperature=0.0, max_tokens=2)
    assert cut["finish_reason"] == "length" and cut["token_ids"] == ended["token_ids"][:2]
    # n samples of a request have one seed after another, and equal prompts of one request equal samples.
    both = [choice["token_ids"] for choice in server.complete("v1", [ids], n=2, seed=5, max_tokens=6)]
    (second,) = server.complete("v1", [ids], seed=6, max_tokens=6)
    assert both[1] == second["token_ids"] and both[0] != both[1]
    again = [choice["token_ids"] for choice in server.complete("v1", [ids, ids], n=2, seed=5, max_tokens=6)]
    assert again == both * 2
    # Beyond the context nobody is told anything but "length".
    (short,) = server.complete(NAME, [[end] * (LONGEST - 3)], max_tokens=20, ignore_eos=True)
    assert short["finish_reason"] == "length" and len(short["token_ids"]) == 3
    assert server.ask("/v1/completions", {"model": NAME, "prompt": [end] * LONGEST, "max_tokens": 1})[0] == 400


@in_float32
def test_adapters_that_it_cannot_serve(beside: Beside, tiny_base: Path, tmp_path: Path) -> None:
    """It says so of a rank, a path and a head; of another base's adapter it says nothing, and serves something."""
    server, encoder = beside.server, beside.encoder
    status, answer = server.load("nowhere", tmp_path / "nowhere")
    assert status == 404 and "No adapter found" in answer["error"]["message"]
    beside.model.add_adapter("wide", "policy", rank=2 * RANK)
    save_adapter(beside.model, "wide", tmp_path / "wide", encoder)
    status, answer = server.load("wide", tmp_path / "wide")
    assert status == 500 and f"rank {2 * RANK} is greater than max_lora_rank {RANK}" in answer["error"]["message"]
    beside.model.add_adapter("helpful", "reward", rank=4)
    save_adapter(beside.model, "helpful", tmp_path / "helpful", encoder)
    status, answer = server.load("helpful", tmp_path / "helpful")
    assert status == 500 and "Cannot load full module 'score'" in answer["error"]["message"]
    tiny = open_model(tiny_base)
    tiny.add_adapter("other", "policy", rank=4, targets="all")
    randomise(tiny, "other")
    save_adapter(tiny, "other", tmp_path / "other", open_encoder(tiny_base))
    assert server.load("other", tmp_path / "other")[0] == 200, (
        "it has learned to compare shapes: the docs say otherwise"
    )
    assert server.unload("other")[0] == 200


def test_a_merged_policy_is_served_alone(vllm: Callable[..., Any], policy: Path) -> None:
    """Another server, of the exported directory."""
    model, encoder = read_run(policy / "run").open("cpu")
    with vllm(policy / "merged", "float32") as server:
        merged = Beside(server, model, encoder, "float32", {})
        same = equal(greedy(merged, "policy"), theirs(merged, NAME))
        print(f"merged: {same} of {len(QUESTIONS)} prompts have our {TOKENS} greedy tokens")
        assert same >= len(QUESTIONS) - 1
