"""Several workers that sample through a server: each its share, one writes and loads what all of them ask for."""

import signal

import pytest
from toy import Moment, command, finish, finish_workers, metrics, read_json, read_lines, said
from vllm_server import vllm

__all__ = ["vllm"]

SOON = {"perlhf.parallel.watch.SILENT_SECONDS": 4.0, "perlhf.parallel.watch.GRACE_SECONDS": 3.0}


@pytest.mark.parametrize("staleness", ["0", "1"])
def test_two_workers_sample_what_one_does(tiny_base, feedback, tmp_path, vllm, staleness):
    vllm.max_loras = 3
    own = ["--sampler", "vllm", "--vllm.url", vllm.url, "--staleness", staleness, "--value.warmup-updates", "0"]

    def words(name: str) -> list[str]:
        return command("policy", tiny_base, feedback / "prompts.jsonl", tmp_path / name, *own)

    assert finish(words("one"), tmp_path / "log", feedback) == 0
    vllm.forgets_at, vllm.away_seconds = vllm.asked + 18, 0.3
    logs, killed = tmp_path / "logs", Moment("torch._tensor.backward", 6)
    codes = finish_workers(2, words("two"), logs, feedback, killed, of=1, changed=SOON)
    assert codes == [3, -signal.SIGKILL], said(logs)
    assert finish_workers(2, words("two"), logs, feedback) == [0, 0], said(logs)
    assert vllm.loaded == {}
    for line, usual in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert line["score_mean"] == pytest.approx(usual["score_mean"], abs=1e-4)
        assert line["ratio_mean"] == pytest.approx(usual["ratio_mean"], abs=1e-2)
    for update in (1, 3):
        one, two = (read_lines(tmp_path / name / f"rollouts/{update:08d}.jsonl") for name in ("one", "two"))
        assert [row["completion"] for row in one] == [row["completion"] for row in two]


def test_a_base_in_parts_is_trained_ahead_through_it(tiny_base, feedback, tmp_path, vllm):
    vllm.max_loras = 3
    own = ["--sampler", "vllm", "--vllm.url", vllm.url, "--staleness", "1", "--shard", "full"]
    words = command("policy", tiny_base, feedback / "prompts.jsonl", tmp_path / "run", *own)
    assert finish_workers(2, words, tmp_path / "logs", feedback) == [0, 0], said(tmp_path / "logs")
    assert max(line["sampler_gap_mean"] for line in metrics(tmp_path / "run")) < 0.2


def test_workers_evaluate_as_one_does(tiny_base, feedback, tmp_path, vllm):
    """Each its share of the prompts; where the base is in parts all score what one of them was answered."""
    own, log = ["--data.test", "0.4", "--keep", "last"], tmp_path / "log"
    words = command("policy", tiny_base, feedback / "prompts.jsonl", tmp_path / "run", *own)
    assert finish(words, log, feedback) == 0, log.read_text()

    def evaluate(name: str, *options: str) -> list[str]:
        through = ["--sampler", "vllm", "--vllm.url", vllm.url, "--temperature", "0.7"]
        output = ["--bootstrap", "20", "--output", str(tmp_path / f"{name}.json")]
        return ["evaluate", str(tmp_path / "run"), *output, *through, *options]

    few = {"perlhf.evaluation.shared.ROWS": 4}
    assert finish(evaluate("one"), log, feedback, None, None, None, few) == 0, log.read_text()
    asked, logs = vllm.asked, tmp_path / "logs"
    for name, options in (("shared", []), ("parts", ["--shard", "full"])):
        before = vllm.asked
        assert finish_workers(2, evaluate(name, *options), logs, feedback, changed=few) == [0, 0], said(logs)
        assert vllm.asked - before == asked, "each answer is asked for once"
    one, shared, parts = (read_json(tmp_path / f"{name}.json") for name in ("one", "shared", "parts"))
    assert one == shared and one["samples"] == parts["samples"]
    assert vllm.loaded == {}
