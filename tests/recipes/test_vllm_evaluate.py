"""`perlhf evaluate` and `perlhf loop` that sample through a server of our own at vLLM's addresses."""

from pathlib import Path
from typing import Any

import pytest
from toy import command, read_json
from vllm_server import FakeVllm, vllm

from perlhf.commands.cli import main
from perlhf.rollout.vllm import connection

__all__ = ["vllm"]


@pytest.fixture(scope="module")
def policy(
    tiny_base: Path, feedback: Path, sft_run: Path, reward_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A policy over an SFT adapter, paid by a reward adapter."""
    run = tmp_path_factory.mktemp("runs") / "policy"
    own = ["--sft", str(sft_run), "--reward", str(reward_run), "--optim.learning-rate", "0.3", "--keep", "last"]
    own += ["--data.test", "0.4"]
    assert main(command("policy", tiny_base, feedback / "prompts.jsonl", run, *own)) == 0
    return run


def words(run: Path, output: Path, server: FakeVllm | None = None, *options: str) -> list[str]:
    """The command, by this process or by a server."""
    through = [] if server is None else ["--sampler", "vllm", "--vllm.url", server.url]
    return ["evaluate", str(run), "--bootstrap", "20", "--output", str(output), *through, *options]


def greedy(file: Path) -> dict[str, Any]:
    """What an evaluation at temperature 0 finds, whatever sampled: all but the KL of answers at temperature 1."""
    found = read_json(file)
    for side in ("before", "after"):
        del found[side]["kl_temperature_1"]
    return {key: value for key, value in found.items() if key != "sampler"}


def test_greedy_answers_and_scores_are_the_local_engines(policy, tmp_path, vllm, perlhf, monkeypatch):
    options = ("--temperature", "0", "--best-of", "1", "2")
    local, served, restarted = (tmp_path / name for name in ("local.json", "served.json", "restarted.json"))
    assert perlhf(*words(policy, local, None, *options)).code == 0
    done = perlhf(*words(policy, served, vllm, *options))
    assert done.code == 0, done.err
    assert (read_json(local)["sampler"], read_json(served)["sampler"]) == ("local", "vllm")
    assert greedy(served) == greedy(local)
    assert greedy(local)["change"]["score"]["value"] != 0, "the two sides answer otherwise"
    loads = [name for what, name in vllm.log if what == "load"]
    assert len(loads) == 2 and set(vllm.sampled) == set(loads), "the SFT adapter and the policy"
    assert vllm.loaded == {} and not (policy / "sampler").exists(), "nothing is left, there or here"

    monkeypatch.setattr(connection, "PAUSE_SECONDS", 0.1)
    vllm.forgets_at, vllm.away_seconds = vllm.asked + 20, 0.3
    done = perlhf(*words(policy, restarted, vllm, *options))
    assert done.code == 0 and "answers again" in done.err, done.err
    assert read_json(restarted) == read_json(served)


def test_what_is_drawn_depends_on_the_seed_alone(policy, tmp_path, vllm, perlhf):
    files = [tmp_path / f"{name}.json" for name in ("one", "same", "other")]
    for file, seed in zip(files, ("1", "1", "2"), strict=True):
        assert perlhf(*words(policy, file, vllm, "--seed", seed, "--temperature", "0.7")).code == 0
    one, same, other = map(read_json, files)
    assert one == same and one["samples"] != other["samples"]
    assert one["before"]["kl"]["value"] == 0 < one["after"]["kl"]["value"]


def test_a_server_that_is_not_one_to_sample_with_ends_it_before_anything_is_written(policy, tmp_path, vllm, perlhf):
    def refused(code: int = 2, *options: str) -> str:
        done = perlhf(*words(policy, tmp_path / "evaluation.json", vllm, *options))
        assert done.code == code and done.err.count("error: ") == 1 and "Traceback" not in done.err, done.err
        assert list(tmp_path.iterdir()) == [] and vllm.loaded == {} and not (policy / "sampler").exists()
        assert not vllm.sampled
        return " ".join(done.err.split())

    assert "docs/vllm.md" in refused(2, "--vllm.url", "http://127.0.0.1:9")
    vllm.max_loras = 1
    assert "the server holds 1 adapters at a time" in (said := refused()) and "--max-loras 2" in said
    vllm.max_loras, vllm.max_rank = 2, 1
    assert "--max-lora-rank 8" in refused()
    vllm.restart()
    vllm.max_rank, vllm.stale = 8, True
    assert "as it was written" in refused(4)
    vllm.stale = False
    vllm.spoil()
    assert "aren't those of base" in refused()


def test_what_has_no_adapter_to_send_is_refused(tiny_base, feedback, reward_run, policy, tmp_path, vllm, perlhf):
    full, file = tmp_path / "full", tmp_path / "evaluation.json"
    own = ["--tuning", "full", "--updates", "1", "--data.test", "0.4"]
    assert perlhf(*command("policy", tiny_base, feedback / "prompts.jsonl", full, *own)).code == 0
    done = perlhf(*words(full, file, vllm))
    assert done.code == 2 and "tuning: full" in done.err and not vllm.log, done.err
    done = perlhf(*words(reward_run, file, vllm))
    assert done.code == 2 and "holds a run of stage reward" in done.err
    done = perlhf(*words(policy, file, None, "--vllm.timeout-seconds", "5"))
    assert done.code == 2 and "vllm is of sampler: vllm" in done.err and not file.exists()


def test_a_policy_that_a_server_sampled_for_is_evaluated_by_this_process(tiny_base, feedback, tmp_path, vllm, perlhf):
    run, own = tmp_path / "run", ["--sampler", "vllm", "--vllm.url", vllm.url, "--data.test", "0.4"]
    assert perlhf(*command("policy", tiny_base, feedback / "prompts.jsonl", run, *own)).code == 0
    asked = vllm.asked
    done = perlhf(*words(run, tmp_path / "evaluation.json"))
    assert done.code == 0 and vllm.asked == asked, done.err
    assert read_json(tmp_path / "evaluation.json")["sampler"] == "local"
