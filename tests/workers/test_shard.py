"""A base in parts: workers that hold a part each make of it, bit for bit, what those do that hold it whole."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import talk
from safetensors.torch import load_file
from tiny_models import answers, random_ids
from toy import Moment, command, finish, finish_workers, metrics, outcome, read_json, said
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from perlhf.errors import ModelError
from perlhf.model.bases.found import Base
from perlhf.model.model import Model
from perlhf.parallel.shard import shards_of, whole_around
from perlhf.parallel.workers import Workers

STAGES = ("sft", "reward", "policy")
SOON = {"perlhf.parallel.watch.SILENT_SECONDS": 4.0, "perlhf.parallel.watch.GRACE_SECONDS": 3.0}
"""So that a test needn't wait for what takes half a minute."""
UNEQUAL = ["--tokens-per-microbatch", "64"]
"""So small that workers have different numbers of micro-batches."""


@pytest.fixture(scope="module")
def commands(tiny_base: Path, feedback: Path) -> Callable[..., list[str]]:
    """Command lines of short runs."""

    def build(stage: str, run: Path, *options: str) -> list[str]:
        data = {"sft": "demonstrations", "reward": "ratings", "policy": "prompts"}[stage]
        own = {"sft": "--epochs 9 --max-updates", "reward": "--epochs 9 --max-updates", "policy": "--updates"}[stage]
        words = [*own.split(), "4", "--checkpoint-every", "2", "--validate-every", "2", "--check-every", "1", *UNEQUAL]
        return command(stage, tiny_base, feedback / f"{data}.jsonl", run, *words, *options)

    return build


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Options of each stage: a policy's reference, policy, value and reward are all on one base."""
    place = tmp_path_factory.mktemp("whole")
    reward = ["--sft", str(place / "sft"), "--adapter.dropout", "0.2"]
    policy = ["--sft", str(place / "sft"), "--reward", str(place / "reward"), "--validation-prompts", "1"]
    ends = ["--stop", "e", "--max-completion-tokens", "12"]  # completions end at different times
    return {"place": [str(place)], "sft": [], "reward": reward, "policy": policy + ends}


@pytest.fixture(scope="module")
def whole(commands, given, feedback) -> Path:
    """A run of each stage by two workers that each hold all of the base."""
    place = Path(given["place"][0])
    for stage in STAGES:
        words = commands(stage, place / stage, *given[stage])
        assert finish_workers(2, words, place / "log", feedback) == [0, 0], said(place / "log")
    return place


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_that_of_a_whole_base(stage, commands, given, whole, feedback, tmp_path):
    words, logs = commands(stage, tmp_path / "run", "--shard", "full", *given[stage]), tmp_path / "log"
    assert finish_workers(2, words, logs, feedback) == [0, 0], said(logs)
    assert (logs / "1.log").read_text() == ""
    assert outcome(tmp_path / "run") == outcome(whole / stage)
    assert read_json(tmp_path / "run/manifest.json")["sessions"][0]["shard"] == "full"
    if stage == "policy":
        assert {line["end_rate"] for line in metrics(tmp_path / "run")} - {0.0, 1.0}, "some ended before others"


def test_evaluate_and_score_are_those_of_a_whole_base(whole, feedback, tmp_path):
    smaller = {"perlhf.evaluation.shared.ROWS": 4}
    for stage in STAGES:
        words = ["evaluate", str(whole / stage), "--split", "all", "--bootstrap", "20", "--device", "cpu"]
        words += ["--tokens-per-microbatch", "128", *(["--best-of", "2"] if stage == "policy" else [])]
        files = [tmp_path / f"{stage}-{count}.json" for count in (1, 2)]
        log = tmp_path / "log1"
        assert finish([*words, "--output", str(files[0])], log, feedback, None, None, None, smaller) == 0
        words += ["--shard", "full", "--output", str(files[1])]
        assert finish_workers(2, words, tmp_path / "log", feedback, changed=smaller) == [0, 0], said(tmp_path / "log")
        assert read_json(files[0]) == read_json(files[1])
    words = ["score", str(whole / "reward"), str(feedback / "comparisons.jsonl"), "--device", "cpu", "--output"]
    assert finish([*words, str(tmp_path / "1.jsonl")], tmp_path / "log1", feedback) == 0
    words = [*words, str(tmp_path / "2.jsonl"), "--shard", "full"]
    assert finish_workers(2, words, tmp_path / "log", feedback) == [0, 0], said(tmp_path / "log")
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_one_pass_of_whole_prompts_is_that_of_a_whole_base(commands, feedback, tmp_path):
    own = ["--baseline", "leave_one_out", "--advantage-norm", "none", "--tokens-per-microbatch", "200"]
    for how in ("none", "full"):
        words = commands("policy", tmp_path / how, "--shard", how, *own)
        assert finish_workers(2, words, tmp_path / "log", feedback) == [0, 0], said(tmp_path / "log")
    assert outcome(tmp_path / "full") == outcome(tmp_path / "none")


def test_node_shares_a_base_between_the_workers_of_each_node(commands, feedback, tmp_path):
    """Four workers stand for two nodes of two."""
    nodes = {n: {"environment": {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(n % 2)}} for n in range(4)}
    for how in ("none", "node"):
        words = commands("policy", tmp_path / how, "--shard", how)
        assert finish_workers(4, words, tmp_path / "log", feedback, also=nodes) == [0] * 4, said(tmp_path / "log")
    assert outcome(tmp_path / "node") == outcome(tmp_path / "none")
    across = {n: {"environment": {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(n // 2)}} for n in range(4)}
    words = commands("policy", tmp_path / "across", "--shard", "node")
    codes = finish_workers(4, words, tmp_path / "log", feedback, also=across)
    assert codes == [2] * 4 and said(tmp_path / "log").count("error: ") == 1
    assert "equally many workers on each node" in said(tmp_path / "log") and "shard: full" in said(tmp_path / "log")


def test_one_worker_that_was_launched_has_the_one_part(commands, feedback, tmp_path):
    words = commands("reward", tmp_path / "full", "--shard", "full")
    assert finish_workers(1, words, tmp_path / "log", feedback) == [0], said(tmp_path / "log")
    assert finish(commands("reward", tmp_path / "none"), tmp_path / "log1", feedback) == 0
    assert outcome(tmp_path / "full") == outcome(tmp_path / "none")
    assert finish(commands("reward", tmp_path / "alone", "--shard", "full"), tmp_path / "log1", feedback) == 2
    text = (tmp_path / "log1").read_text()
    assert "there is one process" in text and "perlhf launch --workers" in text
    assert not (tmp_path / "alone").exists()


def test_a_run_goes_on_with_its_base_in_parts_or_whole(commands, feedback, tmp_path):
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    killed = Moment("torch._tensor.backward", 5)
    for how, moment in (("full", killed), ("none", killed), ("full", None)):
        words = commands("sft", run, "--max-updates", "6", "--shard", how)
        codes = finish_workers(2, words, tmp_path / "log", feedback, moment, of=1, changed=SOON)
        assert (codes == [0, 0]) == (moment is None), said(tmp_path / "log")
        if moment is not None:
            assert codes == [3, -signal.SIGKILL]
            assert said(tmp_path / "log").count("error: ") == 1 and "worker 1 of 2" in said(tmp_path / "log")
    assert finish_workers(2, commands("sft", undisturbed, "--max-updates", "6"), tmp_path / "log", feedback) == [0, 0]
    assert outcome(run) == outcome(undisturbed)
    sessions = read_json(run / "manifest.json")["sessions"]
    assert [session.get("shard", "none") for session in sessions] == ["full", "none", "full"]


def test_a_mistake_of_one_worker_ends_all_while_others_wait_for_its_part(commands, feedback, tmp_path):
    broken = {1: {"changed": {"perlhf.rollout.local.VOCAB_BLOCK": "no number"} | SOON}}
    words = commands("policy", tmp_path / "run", "--shard", "full")
    codes = finish_workers(2, words, tmp_path / "log", feedback, changed=SOON, also=broken)
    assert codes == [70, 70], said(tmp_path / "log")
    assert said(tmp_path / "log").count("error: ") == 1
    assert "worker 1 of 2: a mistake of perlhf's own, TypeError" in said(tmp_path / "log")
    for kept in Path("/tmp").glob("perlhf-error-*.txt"):
        if "VOCAB_BLOCK" in kept.read_text() and str(tmp_path) in kept.read_text():
            kept.unlink()


# ---- parts of weights -----------------------------------------------------------------------------------------------

ODD: dict[str, Any] = {
    "vocab_size": 275,
    "hidden_size": 40,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
"""Three workers can't divide them."""


def odd_base(directory: Path, *, tied: bool) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(**ODD, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_worker_has_a_part_and_nobody_writes_it(tied, dtype, tmp_path):
    """Stored in float32; in bfloat16 layers are converted one by one."""
    directory = odd_base(tmp_path / "base", tied=tied)
    batch = answers(random_ids([5, 3, 6], seed=1), random_ids([4, 2, 1], seed=2))

    def learn(model: Model) -> tuple[torch.Tensor, ...]:
        policy = model.add_adapter("policy", "policy", targets="all", rank=2)
        found = []
        for _ in range(2):
            logprobs = model.logprobs(batch, "policy").logprobs
            logprobs.sum().backward()
            for tensor in policy.trainable():
                assert tensor.grad is not None
                tensor.data.add_(tensor.grad, alpha=0.01)
            found.append(logprobs.detach())
        return *found, *(tensor.data for tensor in policy.trainable())

    def work(workers: Workers) -> Any:
        shards = shards_of("full", workers, torch.device("cpu"))
        model = Model.load(Base(directory), dtype, "cpu", shards=shards)
        learned, parts, weights = learn(model), dict[str, int](), dict[str, torch.Tensor]()
        for name, parameter in model.base.named_parameters():
            kept: Any = parameter
            parts[name] = kept.to_local().numel() if hasattr(kept, "to_local") else -kept.numel()
            with whole_around(model.base, name.rpartition(".")[0]):
                weights[name] = model.base.get_parameter(name).clone()
        return learned, parts, weights

    stored, expected = load_file(directory / "model.safetensors"), learn(Model.load(Base(directory), dtype, "cpu"))
    for learned, parts, weights in talk(3, work, tmp_path):
        assert all(torch.equal(one, other) for one, other in zip(learned, expected, strict=True))
        assert {name for name, count in parts.items() if count < 0} <= {"model.embed_tokens.weight", "lm_head.weight"}
        layers = [name for name, count in parts.items() if count >= 0]
        assert sum(parts[name] for name in layers) < 0.36 * sum(stored[name].numel() for name in layers)
        assert weights.keys() == stored.keys()
        assert all(torch.equal(weights[name], stored[name].to(weights[name])) for name in stored)


def test_a_base_in_rows_is_refused(tmp_path):
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    }
    config = GPTNeoConfig(vocab_size=272, **sizes, max_position_embeddings=64, window_size=8)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "base")

    def work(workers: Workers) -> str:
        with pytest.raises(ModelError) as caught:
            Model.load(
                Base(tmp_path / "base"), "float32", "cpu", shards=shards_of("full", workers, torch.device("cpu"))
            )
        return str(caught.value)

    for text in talk(2, work, tmp_path):
        assert "GPTNeoForCausalLM can't be spread over workers: it is computed in rows" in text
        assert "shard: none" in text


def test_a_quantised_base_is_held_whole_and_said_so(commands, feedback, tmp_path):
    pytest.importorskip("bitsandbytes")
    for how in ("none", "full"):
        words = commands("reward", tmp_path / how, "--shard", how, "--quantize", "nf4")
        assert finish_workers(2, words, tmp_path / "log", feedback) == [0, 0], said(tmp_path / "log")
        assert ("each worker holds all of them" in said(tmp_path / "log")) == (how == "full")
    assert outcome(tmp_path / "full") == outcome(tmp_path / "none")
