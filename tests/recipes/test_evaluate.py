"""`evaluate` and `score` on runs of the real stages with the tiny base."""

import json
import math
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SHORT, TinyRuns, tiny_runs
from transformers import AutoModelForCausalLM

from perlhf.config.commands import EvaluateConfig, ScoreConfig
from perlhf.config.stages import DataConfig, PolicyConfig
from perlhf.data.coffee_bar.gold import gold
from perlhf.data.records import Demonstration
from perlhf.data.splits import load, split_of
from perlhf.errors import AdapterError, ConfigError, RunError
from perlhf.evaluation.evaluate import evaluate, score
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import read_run
from perlhf.runs.evaluations import as_json
from perlhf.runs.read import read_runs
from perlhf.training.policy import train_policy

GOLD = "perlhf.data.coffee_bar.gold:gold_reward"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRuns:
    """One run of each stage."""
    return tiny_runs(tmp_path_factory.getbasetemp() / "tiny_runs", tiny_base)


def checked(run: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Evaluates; what the file holds, which is strict JSON of the same."""
    output = tmp_path / "deep" / "evaluation.json"
    evaluation = evaluate(EvaluateConfig(run=run, output=output, **{"bootstrap": 50, **changes}))
    written = json.loads(output.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert written == as_json(evaluation)
    return written


def test_a_reloaded_reward_model_scores_bit_for_bit_as_in_memory(runs: TinyRuns, tmp_path: Path):
    output = tmp_path / "scores.jsonl"
    rows = score(ScoreConfig(run=runs.reward, data=runs.data, output=output))
    reloaded = [[row["score_chosen"], row["score_rejected"]] if "chosen" in row else [row["score"]] for row in rows]
    assert reloaded == runs.scores_in_memory
    assert len({value for scores in reloaded for value in scores}) > 50
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == rows
    assert [(row["prompt"], row["group"]) for row in rows] == [
        ([dict(turn) for turn in record.prompt if not isinstance(turn, str)], record.group)
        for record in load(runs.data, ("comparison", "rating"), "all")
    ]


def test_evaluating_the_validation_groups_repeats_the_numbers_of_training(runs: TinyRuns, tmp_path: Path):
    found = checked(runs.reward, tmp_path, split="validation")["metrics"]
    trained = runs.reward_result["validation"]
    assert {name: found[name]["value"] for name in ("auc", "accuracy", "balanced_accuracy", "pairwise_accuracy")} == {
        name: trained[name] for name in ("auc", "accuracy", "balanced_accuracy", "pairwise_accuracy")
    }
    assert found["rating_loss"]["value"] + found["comparison_loss"]["value"] == trained["loss"]


def test_reward_metrics_and_baselines_against_sums_by_hand(runs: TinyRuns, tmp_path: Path):
    rows = score(ScoreConfig(run=runs.reward, data=runs.data, output=tmp_path / "scores.jsonl"))
    test = [row for row in rows if split_of(row["group"], runs.data) == "test"]
    ratings = [(row["score"], row["label"]) for row in test if "label" in row]
    pairs = [row for row in test if "chosen" in row]
    ups, downs = ([s for s, label in ratings if label is side] for side in (True, False))
    wins = [(up > down) + 0.5 * (up == down) for up in ups for down in downs]

    found = checked(runs.reward, tmp_path)
    metrics, baselines = found["metrics"], found["baselines"]
    assert (found["kind"], found["split"], found["n"]) == ("reward", "test", len(test))
    assert (found["ratings"], found["comparisons"]) == (len(ratings), len(pairs))
    assert found["groups"] == len({row["group"] for row in test})
    assert found["groups_seen_in_training"] == 0
    assert metrics["auc"]["value"] == pytest.approx(sum(wins) / len(wins))
    assert metrics["accuracy"]["value"] == pytest.approx(sum((s > 0) == label for s, label in ratings) / len(ratings))
    recall = sum(s > 0 for s in ups) / len(ups) + sum(s <= 0 for s in downs) / len(downs)
    assert metrics["balanced_accuracy"]["value"] == pytest.approx(recall / 2)
    assert metrics["pairwise_accuracy"]["value"] == pytest.approx(
        sum(row["score_chosen"] > row["score_rejected"] for row in pairs) / len(pairs)
    )
    assert all(
        metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"] for name in metrics if "exp" not in name
    )
    # Bins of the calibration, weighted by size, give the calibration error; all ratings are in one of them.
    bins = found["calibration"]
    assert sum(row["n"] for row in bins) == len(ratings)
    error = sum(row["n"] * abs(row["mean_predicted"] - row["observed"]) for row in bins) / len(ratings)
    assert metrics["expected_calibration_error"]["value"] == pytest.approx(error)

    assert baselines["bag_of_words"]["auc"] == {"value": 1, "low": 1, "high": 1}
    assert baselines["bag_of_words"]["pairwise_accuracy"]["value"] == 1
    assert found["minus_bag_of_words"]["auc"]["value"] == pytest.approx(metrics["auc"]["value"] - 1)
    assert found["minus_bag_of_words"]["auc"]["low"] == pytest.approx(metrics["auc"]["low"] - 1)
    # Training has more ups than downs, and every prompt has one turn.
    assert baselines["majority"]["accuracy"]["value"] == pytest.approx(len(ups) / len(ratings))
    assert baselines["majority"]["balanced_accuracy"]["value"] == baselines["position"]["auc"]["value"] == 0.5
    # The longer answer wins more often in the training groups.
    longer = [len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]) for row in pairs]
    picked = sum((gap > 0) + 0.5 * (gap == 0) for gap in longer) / len(pairs)
    assert baselines["length"]["pairwise_accuracy"]["value"] == pytest.approx(picked)
    assert "pairwise_accuracy" not in baselines["majority"]

    shown = {
        (row["prompt"][0]["content"], row["completion"]): row for row in found["samples"] if row["kind"] == "rating"
    }
    assert len(shown) == len(ratings)
    for row in test:
        if "label" in row:
            sample = shown[row["prompt"][0]["content"], row["completion"][0]["content"]]
            assert sample["label"] is row["label"]
            assert sample["score"] == pytest.approx(row["score"], abs=1e-5)  # another batch layout
    assert len(found["samples"]) == len(ratings) + 2 * len(pairs)


def test_what_is_undefined_is_null(runs: TinyRuns, tmp_path: Path):
    only = runs.data.model_copy(update={"paths": (runs.comparisons,)})
    found = checked(runs.reward, tmp_path, data=only)
    assert found["metrics"]["auc"] is found["metrics"]["accuracy"] is None
    assert found["calibration"] == []
    assert 0 <= found["metrics"]["pairwise_accuracy"]["value"] <= 1


def test_groups_of_the_training_split_are_noticed(runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = runs.data.model_copy(update={"split_seed": 5})
    found = checked(runs.reward, tmp_path, data=other)
    groups = {f"g{number}" for number in range(30)}
    seen = sum(split_of(g, runs.data) == "train" and split_of(g, other) == "test" for g in groups)
    assert found["groups_seen_in_training"] == seen > 0
    assert f"trained on {seen} of these" in capsys.readouterr().err


def test_a_policy_that_has_learned_nothing_gives_the_same_answers(runs: TinyRuns, tmp_path: Path):
    trained = read_run(runs.policy).config
    assert isinstance(trained, PolicyConfig)
    still = tmp_path / "still"
    changes = SHORT | {"value": {"warmup_updates": 1}, "updates": 1}
    train_policy(PolicyConfig.model_validate(trained.model_dump() | changes | {"run": still}))
    found = checked(still, tmp_path)
    assert [row["after"] for row in found["samples"]] == [row["before"] for row in found["samples"]]
    assert found["after"] == found["before"]
    assert found["after"]["kl"] == {"value": 0, "low": 0, "high": 0}
    assert found["win_rate"]["value"] == 0.5
    assert found["change"]["score"]["value"] == 0


def test_policy_numbers_are_those_of_its_samples(runs: TinyRuns, tmp_path: Path):
    found = checked(runs.policy, tmp_path)
    rows = found["samples"]
    prompts = {row["prompt"][0]["content"] for row in rows}
    held_out = load(runs.data, ("prompt",), "test")
    assert found["n"] == len(rows) == len(prompts) == len(held_out)
    assert found["groups_seen_in_training"] == 0
    for side in ("before", "after"):
        mean = sum(row[f"score_{side}"] for row in rows) / len(rows)
        assert found[side]["score"]["value"] == pytest.approx(mean)
        assert found[side]["gold"] is None
        words = [word for row in rows for word in row[side].split()]
        assert found[side]["distinct_1"]["value"] == pytest.approx(len(set(words)) / len(words))
    wins = [
        (row["score_after"] > row["score_before"]) + 0.5 * (row["score_after"] == row["score_before"]) for row in rows
    ]
    assert found["win_rate"]["value"] == pytest.approx(sum(wins) / len(wins))
    assert found["win_rate"]["by"] == str(runs.reward)
    assert found["before"]["kl"]["value"] == 0 != found["after"]["kl"]["value"]
    assert found["after"]["kl_temperature_1"] == found["after"]["kl"]
    assert found["after"]["kl"]["value"] == pytest.approx(sum(row["kl"] for row in rows) / len(rows))
    assert checked(runs.policy, tmp_path) == found


@pytest.mark.parametrize(("temperature", "kl_known"), [(0.0, False), (0.7, True)])
def test_policy_at_other_temperatures(runs: TinyRuns, tmp_path: Path, temperature: float, kl_known: bool):
    found = checked(runs.policy, tmp_path, temperature=temperature, prompts=3)
    assert found["n"] == 3
    assert (found["after"]["kl"] is not None) is kl_known
    at_one = checked(runs.policy, tmp_path, prompts=3)
    assert found["after"]["kl_temperature_1"]["value"] == pytest.approx(at_one["after"]["kl"]["value"], abs=1e-6)


def test_a_policy_is_sampled_at_the_temperature_that_it_was_trained_at(runs: TinyRuns, tmp_path: Path):
    trained = read_run(runs.policy).config
    changes = SHORT | {"value": {"warmup_updates": 1}, "updates": 2, "temperature": 0.5, "run": tmp_path / "cold"}
    train_policy(PolicyConfig.model_validate(trained.model_dump() | changes))
    found = checked(tmp_path / "cold", tmp_path, prompts=3)
    assert found["temperature"] == 0.5
    assert found == checked(tmp_path / "cold", tmp_path, prompts=3, temperature=0.5)
    assert found["samples"] != checked(tmp_path / "cold", tmp_path, prompts=3, temperature=1.0)["samples"]
    assert checked(runs.policy, tmp_path, prompts=3)["temperature"] == 1.0
    assert checked(runs.sft, tmp_path)["temperature"] == 1.0


def test_best_of_n_answers_of_the_reference(runs: TinyRuns, tmp_path: Path):
    found = checked(runs.policy, tmp_path, prompts=5, best_of=(1, 4))
    first, best = found["best_of"]["1"], found["best_of"]["4"]
    assert first["score"]["value"] == pytest.approx(found["before"]["score"]["value"], abs=1e-5)  # the same answers
    assert first["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert first["kl_at_most"] == 0 and best["kl_at_most"] == pytest.approx(math.log(4) - 0.75)
    assert best["score"] == best["chosen_by"] and best["score"]["value"] > first["score"]["value"]
    assert best["win_rate"]["value"] >= 0.5 and "gold" not in best
    data = DataConfig(paths=("builtin:coffee-bar",))
    other = checked(runs.policy, tmp_path, data=data, reward=(GOLD,), prompts=5, best_of=(4,))["best_of"]["4"]
    assert other["gold"] == other["score"] != other["chosen_by"]  # chosen by the run's own reward, scored by another


def test_an_adapter_of_another_tool_answers_instead_of_the_policy(runs: TinyRuns, tmp_path: Path):
    found = checked(runs.policy, tmp_path, adapter=runs.policy / "adapter", prompts=5)
    assert found == {**checked(runs.policy, tmp_path, prompts=5), "adapter": str(runs.policy / "adapter")}
    foreign = tmp_path / "peft"
    shutil.copytree(runs.sft / "adapter", foreign)
    (foreign / "perlhf.json").unlink()
    found = checked(runs.policy, tmp_path, adapter=foreign, prompts=5)
    assert found["after"]["kl"]["value"] == 0  # the reference itself, read as PEFT wrote it
    assert [row["after"] for row in found["samples"]] == [row["before"] for row in found["samples"]]
    with pytest.raises(AdapterError, match="a reward adapter writes no answers"):
        checked(runs.policy, tmp_path, adapter=runs.reward / "adapter")


@pytest.mark.parametrize(
    "asked", [{"adapter": Path("x")}, {"reward": (GOLD,)}, {"best_of": (2,)}, {"judge": "http://x"}]
)
def test_what_only_policies_are_asked(runs: TinyRuns, tmp_path: Path, asked: dict[str, Any]):
    for run, stage in ((runs.reward, "reward"), (runs.sft, "sft")):
        with pytest.raises(ConfigError, match=f"holds a run of stage {stage}"):
            checked(run, tmp_path, **asked)


def test_another_adapters_evaluation_does_not_become_the_runs(runs: TinyRuns):
    with pytest.raises(ConfigError, match="isn't the run's own"):
        evaluate(EvaluateConfig(run=runs.policy, adapter=runs.sft / "adapter"))
    assert not (runs.policy / "evaluation.json").exists()


def test_gold_and_a_function_as_reward(runs: TinyRuns, tmp_path: Path):
    data = DataConfig(paths=("builtin:coffee-bar",))
    found = checked(runs.policy, tmp_path, data=data, reward=(GOLD,), prompts=5)
    for row in found["samples"]:
        assert row["gold_after"] == row["score_after"] == gold(row["prompt"], row["after"])
    assert found["after"]["gold"]["value"] == found["after"]["score"]["value"]
    assert found["reward"] == [GOLD]


def test_a_judge_who_always_says_1_finds_only_ties(runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"choices": [{"message": {"content": "1"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/v1"
        found = checked(runs.policy, tmp_path, judge=address, judge_model="oak", prompts=3)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert found["win_rate"]["value"] == 0.5
    assert found["win_rate"]["by"] == "judge oak, both orders"
    assert found["win_rate"]["unparsable"] == 0
    assert found["win_rate_by_score"]["by"] == str(runs.reward)


def test_sft_loss_against_plain_transformers(runs: TinyRuns, tiny_base: Path, tmp_path: Path):
    run = read_run(runs.sft)
    found = checked(runs.sft, tmp_path, split="validation", prompts=2)
    trained = json.loads((runs.sft / "result.json").read_text())["validation_loss"]
    assert found["metrics"]["loss"]["value"] == pytest.approx(trained, rel=1e-6)
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(trained), rel=1e-6)
    assert len(found["samples"]) == 2

    encoder = Encoder(load_tokenizer(Base(tiny_base)), run.config.encoding)
    network = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    nats = tokens = 0.0
    for record in load(run.config.data, ("demonstration",), "validation"):
        assert isinstance(record, Demonstration)
        example = encoder.example(record.prompt, record.completion)
        with torch.no_grad():
            logprobs = network(torch.tensor([example.tokens.ids])).logits[0].log_softmax(-1)
        start = len(example.prompt)
        for position, token in enumerate(example.completion, start=start - 1):
            nats -= logprobs[position, token].item()
            tokens += 1
    assert found["before"]["loss"]["value"] == pytest.approx(nats / tokens, rel=1e-5)


def test_the_report_reads_what_evaluate_writes(runs: TinyRuns):
    for run in (runs.reward, runs.policy):
        evaluate(EvaluateConfig(run=run, bootstrap=20, prompts=2))
    reward, policy = read_runs([runs.reward, runs.policy])
    assert reward.evaluation.kind == "reward" and policy.evaluation.kind == "policy"
    assert reward.evaluation.metrics and reward.evaluation.metrics["auc"] is not None
    assert policy.evaluation.before_after("kl") is not None


def test_a_run_that_is_not_finished_or_not_there_is_refused(runs: TinyRuns, tmp_path: Path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs.reward, unfinished)
    (unfinished / "result.json").unlink()
    (unfinished / "evaluation.json").unlink(missing_ok=True)
    with pytest.raises(RunError, match="isn't finished") as caught:
        evaluate(EvaluateConfig(run=unfinished))
    assert "perlhf reward" in str(caught.value)
    assert not (unfinished / "evaluation.json").exists()
    with pytest.raises(RunError, match="no such directory"):
        evaluate(EvaluateConfig(run=tmp_path / "nowhere"))
    with pytest.raises(RunError, match="not a run directory"):
        evaluate(EvaluateConfig(run=tmp_path))
    with pytest.raises(RunError, match="stage policy") as caught:
        score(ScoreConfig(run=runs.policy, data=runs.data))
    assert "stage reward" in str(caught.value)


def test_scores_are_printed_without_output(runs: TinyRuns, capsys: pytest.CaptureFixture[str]):
    data = DataConfig(paths=(runs.ratings,), limit=3)
    rows = score(ScoreConfig(run=runs.reward, data=data))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert len(rows) == 3
