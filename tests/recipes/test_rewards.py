"""Where scores come from: reward adapters see ids, functions and services see texts, and several become one."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import BAD, GOOD, command, ratings, read_lines, write_rows

from perlhf.commands.cli import main
from perlhf.config.stages import EncodingConfig
from perlhf.data.records import Prompt, Text
from perlhf.errors import ConfigError
from perlhf.method.packing import batches, completed
from perlhf.model import saved
from perlhf.model.base import Base, load_tokenizer
from perlhf.model.encode import Encoder
from perlhf.model.model import Model
from perlhf.rollout.scorers import load_scorers, score_batches


def score_ids(
    model: Model, prompts: list[list[int]], completions: list[list[int]], adapter: str, max_tokens: int
) -> list[float]:
    """Scores of prompt + completion ids under one reward adapter."""
    examples = [[completed(p, c)] for p, c in zip(prompts, completions, strict=True)]
    return [score for (score,) in score_batches(model, batches(examples, max_tokens, "tree"), adapter)]


@pytest.fixture
def model(tiny_base: Path) -> Model:
    return Model.load(Base(tiny_base), "float32", "cpu")


@pytest.fixture
def encoder(tiny_base: Path) -> Encoder:
    return Encoder(load_tokenizer(Base(tiny_base)), EncodingConfig(max_tokens=96))


def ids_of(encoder: Encoder, prompts: list[str], completions: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    examples = [encoder.example(p, c) for p, c in zip(prompts, completions, strict=True)]
    return [list(e.prompt) for e in examples], [list(e.completion) for e in examples]


def records(prompts: Sequence[Text]) -> list[Prompt]:
    return [Prompt(prompt, "group") for prompt in prompts]


def test_a_reward_run_scores_polite_above_rude(model, encoder, reward_run):
    rewards = load_scorers(model, [str(reward_run)], "mean", encoder)
    assert rewards.adapters == ("reward_0",)
    assert not any(t.requires_grad for t in model.adapters["reward_0"].tensors().values())
    prompts = [f"a tea please {number}" for number in (70, 71, 72)] * 2
    texts = [*GOOD, *BAD]
    scores = rewards.scores(model, encoder, *ids_of(encoder, prompts, texts), records(prompts), 2048)
    assert scores.shape == (6,)
    assert scores[:3].min() > scores[3:].max()


def test_scores_do_not_depend_on_how_sequences_are_batched(model, encoder, reward_run):
    saved.load_adapter(model, reward_run / "adapter", "reward_0", encoder)
    prompts, completions = ids_of(encoder, ["one tea", "one tea", "milk"] * 2, [*GOOD, *BAD])
    alone = [score_ids(model, [p], [c], "reward_0", 2048)[0] for p, c in zip(prompts, completions, strict=True)]
    assert len(set(alone)) == 6
    for tokens in (1, 60, 2048):
        assert score_ids(model, prompts, completions, "reward_0", tokens) == pytest.approx(alone, abs=1e-5)


def test_the_score_is_the_head_on_the_last_state_plus_the_label_prior(model, encoder, reward_run):
    adapter = saved.load_adapter(model, reward_run / "adapter", "reward_0", encoder)
    (prompt,), (completion,) = ids_of(encoder, ["one tea"], [GOOD[0]])
    (score,) = score_ids(model, [prompt], [completion], "reward_0", 2048)
    states, _ = model.prefill([[*prompt, *completion]], "reward_0")  # of the last token, by the sampler's way
    assert adapter.score_head is not None
    assert adapter.bias is not None
    assert score == pytest.approx((states[0] @ adapter.score_head[0] + adapter.bias).item(), abs=1e-5)


def test_a_cut_completion_is_scored_as_if_it_ended(model, encoder, reward_run):
    rewards = load_scorers(model, [str(reward_run)], "mean", encoder)
    prompts, completions = ids_of(encoder, ["one tea", "one tea"], [GOOD[0], BAD[0]])
    whole = rewards.scores(model, encoder, prompts, completions, records(["one tea"] * 2), 2048)
    cut = rewards.scores(model, encoder, prompts, [ids[:-1] for ids in completions], records(["one tea"] * 2), 2048)
    np.testing.assert_array_equal(cut, whole)
    # At its last token, where nothing was learned, the score would be another.
    at_last = score_ids(model, prompts, [ids[:-1] for ids in completions], "reward_0", 2048)
    assert np.abs(at_last - whole).max() > 1e-2
    # A prompt and completion that fill the context exactly: the prompt makes room for the end token.
    full = Encoder(encoder.tokenizer, encoder.config.model_copy(update={"max_tokens": len(prompts[0]) + 3}))
    (found,) = rewards.scores(model, full, prompts[:1], [completions[0][:3]], records(["one tea"]), 2048)
    (expected,) = score_ids(model, [prompts[0][1:]], [[*completions[0][:3], encoder.end_id]], "reward_0", 2048)
    assert found == expected


def test_adapters_see_the_sampled_ids_and_functions_their_text(model, encoder, reward_run, tmp_path, monkeypatch):
    (tmp_path / "seen_reward.py").write_text(
        "SEEN = []\n\n\ndef keep(prompts, completions):\n    SEEN.append((prompts, completions))\n"
        "    return [2.0] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = load_scorers(model, [str(reward_run), "seen_reward:keep"], "min", encoder)
    # A sampler may write "the" as three tokens although the tokenizer would write one or two.
    letters = [encoder.tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
    encoded = list(encoder.example("x", "the").completion)
    assert [*letters, encoder.end_id] != encoded
    prompt = encoder.prompt("one tea")
    messages = [{"role": "user", "content": "one tea"}]
    scores = rewards.scores(
        model, encoder, [prompt, prompt], [[*letters, encoder.end_id], encoded], records([messages, "one tea"]), 2048
    )
    import seen_reward  # pyright: ignore[reportMissingImports] -- written above

    assert seen_reward.SEEN == [([messages, "one tea"], ["the", "the"])]
    by_adapter = score_ids(model, [prompt, prompt], [[*letters, encoder.end_id], encoded], "reward_0", 2048)
    assert by_adapter[0] != pytest.approx(by_adapter[1], abs=1e-4)
    np.testing.assert_allclose(scores, np.minimum(by_adapter, 2.0), atol=1e-6)


def test_a_directory_goes_before_a_function_and_nonsense_is_refused(model, encoder, reward_run, sft_run):
    with pytest.raises(ConfigError, match="is no finished reward run"):
        load_scorers(model, [str(reward_run.parent)], "mean", encoder)
    with pytest.raises(ConfigError, match="holds a sft adapter"):
        load_scorers(model, [str(sft_run)], "mean", encoder)


def test_a_fully_tuned_reward_run_is_a_reward(stage, model, encoder):
    learn = ("--tuning", "full", "--optim.learning-rate", "3e-3", "--epochs", "9", "--max-updates", "16")
    full, done = stage("reward", *learn, run="full")
    assert done.code == 0
    rewards = load_scorers(model, [str(full)], "mean", encoder)
    prompts = ["a tea please 70"] * 6
    scores = rewards.scores(model, encoder, *ids_of(encoder, prompts, [*GOOD, *BAD]), records(prompts), 2048)
    assert scores[:3].min() > scores[3:].max()
    run, done = stage("policy", "--updates", "1", "--reward", str(full))
    assert done.code == 0
    assert np.std([row["score"] for row in read_lines(run / "rollouts" / "00000001.jsonl")]) > 0


def test_the_score_command_agrees_with_the_labels(perlhf, reward_run, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ratings())
    output = tmp_path / "scores.jsonl"
    done = perlhf("score", str(reward_run), str(data), "--output", str(output))
    assert done.code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 64
    up = [row["score"] for row in rows if row["completion"] in GOOD]
    down = [row["score"] for row in rows if row["completion"] in BAD]
    assert len(up) == len(down) == 32
    assert np.mean(np.array(up)[:, None] > np.array(down)) > 0.9


def test_the_same_reward_run_twice_is_its_own_mean(tiny_base, feedback, reward_run, tmp_path):
    scores = {}
    for name, sources in {"once": [reward_run], "twice": [reward_run, reward_run]}.items():
        options = ("--updates", "1", "--reward", *map(str, sources), "--combine", "mean_minus_std")
        assert main(command("policy", tiny_base, feedback / "prompts.jsonl", tmp_path / name, *options)) == 0
        scores[name] = [row["score"] for row in read_lines(tmp_path / name / "rollouts" / "00000001.jsonl")]
    assert torch.tensor(scores["twice"]).std() > 0
    np.testing.assert_allclose(scores["twice"], scores["once"], atol=1e-9)
