"""Where scores come from: reward adapters see ids, functions and services see texts, and several become one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import BAD, GOOD, command, ratings, read_json, read_lines, write_rows

import perlhf as package
from perlhf.commands.cli import main
from perlhf.config.stages import EncodingConfig
from perlhf.data.records import Prompt, Text
from perlhf.errors import ConfigError
from perlhf.method.packing import batches, completed
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.rollout.scorers import Scorers, load_scorers, score_batches


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


def scores_of(rewards: Scorers, *given) -> np.ndarray:
    return rewards.combined(rewards.members(*given))


def records(prompts: Sequence[Text]) -> list[Prompt]:
    return [Prompt(prompt, "group") for prompt in prompts]


def test_a_reward_run_scores_polite_above_rude(model, encoder, reward_run):
    rewards = load_scorers(model, [str(reward_run)], "mean", encoder)
    assert rewards.adapters == ("reward_0",)
    assert not any(t.requires_grad for t in model.adapters["reward_0"].tensors().values())
    prompts = [f"a tea please {number}" for number in (70, 71, 72)] * 2
    texts = [*GOOD, *BAD]
    scores = scores_of(rewards, model, encoder, *ids_of(encoder, prompts, texts), records(prompts), 2048)
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
    whole = scores_of(rewards, model, encoder, prompts, completions, records(["one tea"] * 2), 2048)
    cut = scores_of(rewards, model, encoder, prompts, [ids[:-1] for ids in completions], records(["one tea"] * 2), 2048)
    np.testing.assert_array_equal(cut, whole)
    # At its last token, where nothing was learned, the score would be another.
    at_last = score_ids(model, prompts, [ids[:-1] for ids in completions], "reward_0", 2048)
    assert np.abs(at_last - whole).max() > 1e-2
    # A prompt and completion that fill the context exactly: the prompt makes room for the end token.
    full = Encoder(encoder.tokenizer, encoder.config.model_copy(update={"max_tokens": len(prompts[0]) + 3}))
    (found,) = scores_of(rewards, model, full, prompts[:1], [completions[0][:3]], records(["one tea"]), 2048)
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
    completions = [[*letters, encoder.end_id], encoded]
    scores = scores_of(rewards, model, encoder, [prompt] * 2, completions, records([messages, "one tea"]), 2048)
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
    scores = scores_of(rewards, model, encoder, *ids_of(encoder, prompts, [*GOOD, *BAD]), records(prompts), 2048)
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
    offset = np.subtract(scores["once"], scores["twice"])  # the mean that both members are centred by
    np.testing.assert_allclose(offset, offset[0], atol=1e-9)


def forget_adapter(run: Path) -> None:
    """As runs of earlier versions are: nothing tells that their adapter was changed."""
    manifest = read_json(run / "manifest.json")
    del manifest["adapter_sha256"]
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_a_reward_adapter_that_overflows_is_named_wherever_it_scores(
    perlhf, stage, model, encoder, reward_run, tmp_path
):
    broken, adapter = tmp_path / "broken", saved.load_adapter(model, reward_run / "adapter", "broken", encoder)
    shutil.copytree(reward_run, broken)
    assert adapter.score_head is not None
    adapter.score_head.data.fill_(3e38)
    saved.save_adapter(model, "broken", broken / "adapter", encoder)
    forget_adapter(broken)
    data = write_rows(tmp_path / "rows.jsonl", ratings())
    run, done = stage("policy", "--updates", "1", "--reward", str(reward_run))
    assert done.code == 0
    for asked in (
        ("score", str(broken), str(data), "--output", str(tmp_path / "scores.jsonl")),
        ("evaluate", str(broken)),
        ("evaluate", str(run), "--prompts", "3", "--reward", str(broken)),
        ("evaluate", str(run), "--prompts", "3", "--best-of", "2", "--reward", str(broken)),
    ):
        done = perlhf(*asked)
        assert done.code == 2 and f"{broken / 'adapter'}: adapter" in done.err, done.err
        assert "gives scores that are not finite" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "scores.jsonl").exists() and not (broken / "evaluation.json").exists()
    _, done = stage("policy", "--updates", "1", "--reward", str(broken), run="paid")
    assert done.code == 2 and f"{broken / 'adapter'}: adapter 'reward_0' gives scores" in done.err


def test_a_policy_adapter_that_overflows_is_named_where_it_answers(perlhf, stage, model, encoder, reward_run):
    run, done = stage("policy", "--updates", "1", "--reward", str(reward_run))
    adapter = saved.load_adapter(model, run / "adapter", "answers", encoder)
    next(iter(adapter.pairs.values())).b.data.fill_(3e38)
    saved.save_adapter(model, "answers", run / "adapter", encoder)
    forget_adapter(run)
    done = perlhf("evaluate", str(run), "--prompts", "3")
    assert done.code == 2 and f"{run / 'adapter'}: adapter 'policy' gives states that are not finite" in done.err


BOTH = ("written_rewards:length", "written_rewards:of_ten")


class TestWholeRuns:
    """Functions and services of users, through the commands."""

    MODULE = """
import math, os

def right(prompts, completions, answer, **kwargs):
    for prompt, given in zip(prompts, answer):
        assert prompt.split()[1] == given.split()[1], (prompt, given)
    return [len(text) / 10 for text in completions]

def wants_more(completions, solution):
    return [0.0 for _ in completions]

def sometimes(completions, trainer_state, **kwargs):
    return [None if number % 3 == 0 else float(len(text)) for number, text in enumerate(completions)]

def breaks(completions, trainer_state):
    if trainer_state.global_step == 1 and not os.path.exists("mended"):
        raise ValueError("at update 2")
    return [float(len(text)) for text in completions]

def gaps(completions, trainer_state):
    return [None if trainer_state.global_step in (1, 2) else float(len(text)) for text in completions]

def dies_out(completions, trainer_state):
    return [float(len(text)) if trainer_state.global_step < 1 else None for text in completions]

def nothing(completions):
    return [None for _ in completions]

def of_ten(completions):
    return [10.0] * len(completions)

def length(completions):
    return [float(len(text)) for text in completions]

def wide(prompts, completions):
    return [math.inf] * len(completions)
"""

    @pytest.fixture(autouse=True)
    def written(self, tmp_path, monkeypatch):
        """A module of rewards in the current directory, and prompts with an answer each."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
        sys.modules.pop("written_rewards", None)
        (tmp_path / "written_rewards.py").write_text(self.MODULE)
        write_rows(tmp_path / "answers.jsonl", [{"prompt": f"say {n}", "answer": f"it's {n}"} for n in range(32)])

    @pytest.fixture
    def policy(self, perlhf, tiny_base, tmp_path):
        def run(name: str, *options: str):
            return perlhf(*command("policy", tiny_base, tmp_path / "answers.jsonl", tmp_path / name, *options))

        return run

    def test_columns_reach_training_validation_and_evaluation(self, policy, perlhf, tmp_path):
        sources = ("--reward", "written_rewards:right", "--validation-reward", "written_rewards:right")
        done = policy("run", *sources)
        assert done.code == 0, done.err
        done = perlhf("evaluate", str(tmp_path / "run"), "--prompts", "3", "--best-of", "2")
        assert done.code == 0, done.err

    def test_a_run_is_evaluated_from_elsewhere_with_its_functions(self, policy, perlhf, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert policy("run", "--reward", "written_rewards:right").code == 0
        del sys.modules["written_rewards"]
        monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry != str(tmp_path)])
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        done = perlhf("evaluate", "../run", "--prompts", "3", "--best-of", "2")
        assert done.code == 0, done.err

    def test_a_column_that_the_data_has_not_is_missed_before_training(self, policy, tmp_path):
        done = policy("run", "--reward", "written_rewards:wants_more")
        assert done.code == 2 and "Traceback" not in done.err
        said = "reward: written_rewards:wants_more asks for 'solution', which no prompt of the data has"
        assert said in done.err and "columns answer" in done.err
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("key", ["--reward", "--validation-reward"])
    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("written_rewards:wants_more", "asks for 'solution', which no prompt of the data has"),
            ("written_rewards:lenght", "did you mean written_rewards:length?"),
            ("no_such_rewards:length", "no module named 'no_such_rewards'"),
            ("http://localhost:9/${NOT_SET_HERE}", "the environment variable NOT_SET_HERE isn't set"),
        ],
    )
    def test_a_dry_run_finds_what_is_wrong_with_a_reward(self, policy, tmp_path, key, source, said):
        first = () if key == "--reward" else ("--reward", "written_rewards:right")
        done = policy("run", *first, key, source, "--dry-run")
        assert done.code == 2 and said in done.err and "Traceback" not in done.err
        assert policy("run", "--reward", "written_rewards:right", "--dry-run").code == 0
        assert not (tmp_path / "run").exists()

    def test_scorers_of_a_comparison_are_looked_for_before_a_cell_is_trained(self, perlhf, tiny_base, tmp_path):
        policy = {"base": str(tiny_base), "data": {"paths": [str(tmp_path / "answers.jsonl")]}}
        policy["reward"] = ["written_rewards:length"]
        recipe = tmp_path / "compare.yaml"
        for scorer, code in {"lenght": 2, "wants_more": 2, "length": 0}.items():
            grid = {"output": "grid", "scorers": [f"written_rewards:{scorer}"], "policy": policy}
            recipe.write_text(json.dumps(grid))
            done = perlhf("compare", str(recipe), "--dry-run")
            assert done.code == code and ("scorers: " in done.err) == bool(code), done

    @pytest.mark.parametrize("tuning", ["lora", "full"])
    def test_a_function_that_breaks_is_mended_and_the_run_goes_on(self, policy, tmp_path, tuning):
        options = ("--reward", "written_rewards:breaks", "--updates", "4", "--baseline", "leave_one_out")
        options += ("--tuning", tuning, "--checkpoint-every", "4")
        done = policy("run", *options)
        assert done.code == 2 and "Traceback" not in done.err
        error = done.err[done.err.index("error: ") :].splitlines()
        assert error[0] == "error: written_rewards:breaks: ValueError: at update 2"
        assert error[1:3] == ["  written_rewards.py:17, in breaks", '    raise ValueError("at update 2")']
        assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1
        (tmp_path / "mended").touch()
        kept = (tmp_path / "run" / "metrics.jsonl").read_text()
        assert policy("run", *options).code == 0
        assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(kept), "update 1 isn't done again"
        assert policy("whole", *options).code == 0
        last = [read_lines(tmp_path / run / "rollouts" / "00000004.jsonl") for run in ("run", "whole")]
        assert last[0] == last[1]

    def test_none_leaves_completions_out_of_an_update(self, policy, perlhf, tmp_path):
        done = policy("run", "--reward", "written_rewards:sometimes")
        assert done.code == 0, done.err
        rows = read_lines(tmp_path / "run" / "rollouts" / "00000001.jsonl")
        assert [row["score"] is None for row in rows] == [number % 3 == 0 for number in range(8)]
        first = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
        scores = [row["score"] for row in rows if row["score"] is not None]
        assert first["unscored"] == 3 and first["score_mean"] == pytest.approx(np.mean(scores))
        done = perlhf("evaluate", str(tmp_path / "run"), "--prompts", "3", "--best-of", "2")
        assert done.code == 0, done.err
        assert perlhf("report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")).code == 0

    @pytest.mark.parametrize("baseline", ["leave_one_out", "value"])
    def test_an_update_without_any_score_is_skipped(self, policy, perlhf, tmp_path, baseline):
        options = ("--reward", "written_rewards:gaps", "--baseline", baseline, "--updates", "5")
        done = policy("run", *options, "--validate-every", "2")
        assert done.code == 0, done.err
        for step in (2, 3):
            said = f"note: update {step} is skipped: none of 8 completions got a score from written_rewards:gaps"
            assert said in done.err
        lines = read_lines(tmp_path / "run" / "metrics.jsonl")
        assert ["score_mean" in line for line in lines] == [True, False, False, True, True]
        assert ["policy_loss" in line for line in lines] == [True, False, False, True, True]
        # Nothing of update 2 is scored, nor are the held-out prompts after it; those after 4 are.
        assert ["validation_reward" in line for line in lines] == [False, False, False, True, True]
        result = read_json(tmp_path / "run" / "result.json")
        assert result["skipped"] == 2 and result["updates"] == 5 and result["stopped"] is None
        rows = read_lines(tmp_path / "run" / "rollouts" / "00000002.jsonl")
        assert len(rows) == 8 and {row["score"] for row in rows} == {row["reward"] for row in rows} == {None}
        assert perlhf("report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")).code == 0

    def test_five_updates_in_a_row_without_any_score_end_the_run(self, policy, tmp_path):
        options = ("--reward", "written_rewards:dies_out", "--updates", "9", "--validate-every", "9")
        for _ in range(2):  # and going on comes to the same end
            done = policy("run", *options)
            assert done.code == 2 and "Traceback" not in done.err
            said = "error: reward: none of 8 completions of update 6, the 5th such in a row, got a score"
            assert f"{said}: written_rewards:dies_out returned None for them" in done.err
            assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 5
        assert done.err.count("is skipped") == 0

    @pytest.mark.parametrize("key", ["--reward", "--validation-reward"])
    def test_what_scores_nothing_at_all_is_an_error_before_anything_is_learned(self, policy, tmp_path, key):
        first = () if key == "--reward" else ("--reward", "written_rewards:length")
        done = policy("run", *first, key, "written_rewards:nothing")
        assert done.code == 2 and "written_rewards:nothing returned None" in done.err
        assert done.err.startswith(
            f"error: {key.removeprefix('--').replace('-', '_')}: none of 4 completions of the ref"
        )
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    def test_members_levels_are_those_of_training(self, policy, perlhf, tmp_path):
        """The smaller of length and of_ten, which is always 10: both are 0 at the mean of the reference."""
        run = tmp_path / "run"
        assert policy("run", "--reward", *BOTH, "--combine", "min", "--updates", "1").code == 0
        (mean, deviation), constant = read_json(run / "result.json")["centre"]["members"]
        assert deviation > 0 and constant == [10, 0]

        def check(mean):
            assert perlhf("evaluate", str(run), "--prompts", "3", "--best-of", "2").code == 0
            for row in read_json(run / "evaluation.json")["samples"]:
                assert row["score_after"] == pytest.approx(min(len(row["after"]) - mean, 0))
            return read_json(run / "evaluation.json")["samples"]

        for row in read_lines(run / "rollouts" / "00000001.jsonl"):
            assert row["score"] == pytest.approx(min(len(row["completion"]) - mean, 0))
        samples = check(mean)
        result = read_json(run / "result.json")
        del result["centre"]["members"]  # as of a run before they were recorded
        (run / "result.json").write_text(json.dumps(result))
        check(np.mean([len(row["before"]) for row in samples]))

    def test_weights(self, policy, perlhf, tmp_path):
        sources = ("--reward", "written_rewards:length", "written_rewards:of_ten")
        done = policy("run", *sources, "--reward-weights", "1.0", "-0.5", "--updates", "1")
        assert done.code == 0, done.err
        for row in read_lines(tmp_path / "run" / "rollouts" / "00000001.jsonl"):
            assert row["score"] == len(row["completion"]) - 5
        assert perlhf("evaluate", str(tmp_path / "run"), "--prompts", "3").code == 0
        for row in read_json(tmp_path / "run" / "evaluation.json")["samples"]:
            assert row["score_after"] == len(row["after"]) - 5

    def test_weights_go_with_their_sources_whatever_the_order(self, policy, reward_run, tmp_path):
        sources = ("--reward", "written_rewards:of_ten", str(reward_run), "--reward-weights", "1.0", "0.0")
        assert policy("run", *sources, "--updates", "1").code == 0
        assert {row["score"] for row in read_lines(tmp_path / "run" / "rollouts" / "00000001.jsonl")} == {10.0}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--reward-weights", "1.0", "2.0"), "reward_weights has 2 numbers, reward has 1"),
            (("--reward-weights", "0.0"), "reward_weights are all 0"),
            (("--reward-weights", "1.0", "--combine", "min"), "reward_weights and combine: min exclude each other"),
        ],
    )
    def test_weights_that_make_no_sense(self, policy, options, message):
        done = policy("run", "--reward", "written_rewards:length", *options)
        assert done.code == 2 and message in done.err

    def test_a_reward_that_never_varies_is_told_once(self, policy):
        done = policy("run", "--reward", "written_rewards:of_ten", "--updates", "4")
        assert done.err.count("note: all scores of 3 updates are 10") == 1
        assert "never varies" not in policy("other", "--reward", "written_rewards:length", "--updates", "4").err

    def test_a_run_holds_no_secret(self, policy, perlhf, serve, tmp_path, monkeypatch):
        secret, key, seen = "aB3/cD5+eF7gH9", "sk-key-of-the-service", []

        def answer(asked):
            seen.append((asked.path, asked.headers.get("Authorization")))
            return {"scores": [len(text) for text in asked.body["completions"]]}

        address = serve(answer)
        done = policy("run", "--reward", f"{address}/score?token={secret}")
        assert done.code == 2 and secret not in done.out + done.err and not (tmp_path / "run").exists()
        monkeypatch.setenv("MY_TOKEN", secret)
        monkeypatch.setenv("PERLHF_REWARD_KEY", key)
        written = f"{address}/score?token=${{MY_TOKEN}}&model=rm-1"
        done = [policy("run", "--reward", written), perlhf("evaluate", str(tmp_path / "run"), "--prompts", "3")]
        done.append(perlhf("report", str(tmp_path / "run"), "--output", str(tmp_path / "run" / "report.html")))
        assert [each.code for each in done] == [0, 0, 0], done
        assert set(seen) == {("/score?token=aB3/cD5%2BeF7gH9&model=rm-1", f"Bearer {key}")}
        files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
        for text in [*files, *(part.encode() for each in done for part in (each.out, each.err))]:
            for hidden in (secret, "aB3/cD5%2BeF7gH9", key):
                assert hidden.encode() not in text
        assert written in (tmp_path / "run" / "config.yaml").read_text()

    def test_a_slow_service_ends_the_run_which_goes_on_with_more_time(self, policy, serve, tmp_path):
        slow = threading.Event()
        slow.set()

        def answer(asked):
            if len(asked.body["completions"]) == 8 and slow.is_set():
                time.sleep(1)
            return {"scores": [len(text) for text in asked.body["completions"]]}

        options = ("--reward", serve(answer), "--reward-timeout-seconds")
        done = policy("run", *options, "0.5")
        assert done.code == 2 and "no whole answer within 0.5 seconds" in done.err
        slow.clear()
        assert policy("run", *options, "5").code == 0, "the limit may differ when a run continues"

    def test_a_stop_while_a_service_is_waited_for(self, tiny_base, tmp_path):
        """In a process of its own, which SIGTERM asks to stop: it ends, and has saved what it had learned."""
        asked = tmp_path / "asked"
        (tmp_path / "written_rewards.py").write_text(
            "import asyncio, pathlib\n"
            "async def hangs(completions, trainer_state):\n"
            "    if trainer_state.global_step == 1:\n"
            f"        pathlib.Path({str(asked)!r}).touch()\n"
            "        await asyncio.sleep(60)\n"
            "    return [float(len(text)) for text in completions]\n"
        )
        options = ("--reward", "written_rewards:hangs")
        words = command("policy", tiny_base, tmp_path / "answers.jsonl", tmp_path / "run", *options)
        code = (
            "import sys; from perlhf.system import waiting; waiting.GRACE_SECONDS = 0.2; "
            "from perlhf.commands.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        running = [sys.executable, "-c", code, *words]
        ours = {"PYTHONPATH": str(Path(package.__file__).parents[1])}
        process = subprocess.Popen(running, cwd=tmp_path, env=os.environ | ours, stderr=subprocess.PIPE, text=True)
        try:
            for _ in range(600):
                if asked.exists() or process.poll() is not None:
                    break
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            _, shown = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130, shown
        assert "stopped while a reward or a sampler was waited for" in shown and "Traceback" not in shown
        assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1
