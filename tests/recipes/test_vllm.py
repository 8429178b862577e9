"""`sampler: vllm` as whole commands, beside a server of our own at vLLM's addresses."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import Moment, command, finish, metrics, outcome, read_lines
from vllm_server import FakeVllm, vllm

from perlhf.rollout.vllm import connection
from perlhf.training import checkpoint

__all__ = ["vllm"]

LEARNING = "torch._tensor.backward"


def words(tiny_base: Path, feedback: Path, run: Path, server: FakeVllm, *options: str) -> list[str]:
    own = ["--sampler", "vllm", "--vllm.url", server.url, "--max-ratio", "2", "--value.warmup-updates", "0"]
    return command("policy", tiny_base, feedback / "prompts.jsonl", run, *own, *options)


@pytest.mark.parametrize("staleness", ["0", "1"])
def test_a_policy_is_trained_through_it(tiny_base, feedback, tmp_path, vllm, staleness, perlhf):
    vllm.max_loras, run = 3, tmp_path / "run"
    done = perlhf(*words(tiny_base, feedback, run, vllm, "--staleness", staleness, "--updates", "4"))
    assert done.code == 0, done.err
    lines = metrics(run)
    assert len(lines) == 4
    for line in lines:
        assert line["ratio_max"] <= 2
        assert (line["sampler_gap_max"] < 1e-4) is (staleness == "0" or line is lines[0])
    assert sum(line["seconds_probe"] > 0 < line["seconds_load"] for line in lines) >= 3, "at each version that was sent"
    for update in range(1, 5):
        rows = read_lines(run / "rollouts" / f"{update:08d}.jsonl")
        assert {row["sampler_step"] for row in rows} == {max(0, update - 1 - int(staleness))}
        assert all(len(row["sampler_logprobs"]) == row["tokens"] for row in rows)
    loads = [name for what, name in vllm.log if what == "load"]
    assert len(loads) == len(set(loads)) >= 4 and all(name.startswith("perlhf-") for name in loads)
    assert vllm.loaded == {} and not (run / "sampler").exists(), "nothing is left, there or here"


def test_kills_of_the_trainer_and_restarts_of_the_server_change_nothing(tiny_base, feedback, tmp_path, vllm):
    vllm.max_loras, options = 3, ("--staleness", "1", "--seed", "3")
    runs, log = [tmp_path / "whole", tmp_path / "run"], tmp_path / "log"
    assert finish(words(tiny_base, feedback, runs[0], vllm, *options), log, feedback) == 0, log.read_text()
    quick = {"perlhf.rollout.vllm.connection.PAUSE_SECONDS": 0.1}
    vllm.away_seconds, restarts = 0.3, 0
    for moment, code in ((Moment(LEARNING, 3), -signal.SIGKILL), (Moment(LEARNING, 2, signal.SIGINT), 130), (None, 0)):
        vllm.forgets_at = vllm.asked + 16
        given = words(tiny_base, feedback, runs[1], vllm, *options)
        assert finish(given, log, feedback, moment, None, None, quick) == code, log.read_text()
        restarts += "answers again" in log.read_text()
    assert restarts >= 2, "the server was away meanwhile"
    one, other = map(outcome, runs)
    assert one.keys() == other.keys() and [key for key in one if one[key] != other[key]] == []
    assert vllm.loaded == {}, "nor is anything left of those that were killed"


def test_what_a_server_lacks_is_told_before_anything_is_sampled(
    tiny_base, feedback, tmp_path, vllm, perlhf, monkeypatch
):
    def refused(*options: str) -> str:
        runs.append(tmp_path / str(len(runs)))
        done = perlhf(*words(tiny_base, feedback, runs[-1], vllm, *options))
        assert done.code == 2 and "try:" in done.err and not vllm.sampled and not vllm.loaded, done.err
        assert not (runs[-1] / "sampler").exists()
        return done.err

    runs: list[Path] = []

    def with_(**faults: Any) -> None:
        for name, value in faults.items():
            setattr(vllm, name, value)

    with_(version="0.12.1")
    assert "the server is vLLM 0.12.1" in refused()
    assert "the server is vLLM 0.12.1" in refused("--dry-run")
    with_(version="0.32.0", longest=64)
    assert "--max-model-len 96" in refused()
    with_(longest=512, shift=1)
    assert "tokenizer" in refused()
    with_(shift=0, max_rank=1)
    assert "--max-lora-rank 8" in refused()
    with_(max_rank=8, max_loras=1)
    assert "--max-loras 2" in refused()
    with_(max_loras=2, updating=False)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in refused()
    with_(updating=True, sees=False)
    assert "--vllm.directory" in refused()
    with_(sees=True, raw=True)
    assert "processed_logprobs" in refused("--temperature", "0.7")
    with_(raw=False)
    with monkeypatch.context() as patched:
        patched.setenv("PERLHF_VLLM_KEY", "wrong")
        assert "is the key in PERLHF_VLLM_KEY right?" in refused()
    assert "docs/vllm.md" in refused("--vllm.url", "http://127.0.0.1:9")
    assert "docs/vllm.md" in refused("--vllm.url", "http://127.0.0.1:9", "--dry-run")
    assert "PERLHF_VLLM_KEY" in refused("--vllm.url", "http://me:secret@127.0.0.1:9")
    vllm.spoil()
    assert "aren't those of base" in refused()


def test_a_stale_adapter_ends_the_run(tiny_base, feedback, tmp_path, vllm, perlhf):
    vllm.stale = True
    done = perlhf(*words(tiny_base, feedback, tmp_path / "run", vllm))
    assert done.code == 4 and "as it was written" in done.err, done.err
    saved = checkpoint.load(tmp_path / "run")
    assert saved is not None and saved.step == 1, "what was learned is kept"


def test_raw_logprobs_end_the_run_where_they_begin(tiny_base, feedback, tmp_path, vllm, perlhf):
    """A server that was started again without its option."""
    vllm.raw_at = 30
    options = "--temperature 0.7 --max-sampler-gap 0.05 --updates 6".split()
    done = perlhf(*words(tiny_base, feedback, tmp_path / "run", vllm, *options))
    assert done.code == 3 and "max_sampler_gap" in done.err and "processed_logprobs" in done.err, done.err


def test_a_server_that_stays_away_ends_the_run_and_the_command_goes_on(
    tiny_base, feedback, tmp_path, vllm, perlhf, monkeypatch
):
    given, clock = (tiny_base, feedback, tmp_path / "run", vllm), [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += 100 * seconds

    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    vllm.forgets_at, vllm.away_seconds = 30, 1e9
    done = perlhf(*words(*given))
    assert done.code == 2 and "waited for, 600 seconds at most" in done.err and "no answer" in done.err, done.err
    assert clock[0] == 700, "it was asked until 600 seconds were over"
    vllm._until, vllm.breaks_at = 0, vllm.asked + 20
    done = perlhf(*words(*given))
    assert done.code == 0 and "answered 500" in done.err and "answers again" in done.err, done.err


def test_another_base_after_a_restart_is_seen(tiny_base, feedback, tmp_path, vllm, perlhf):
    vllm.forgets_at, vllm.spoils = 30, True
    done = perlhf(*words(tiny_base, feedback, tmp_path / "run", vllm))
    assert done.code == 4 and "as it was written" in done.err, done.err


def test_the_reference_is_a_version_of_its_own(tiny_base, feedback, tmp_path, vllm, perlhf, sft_run):
    options = ["--sft", str(sft_run), "--bounded", "--stop", "a"]
    done = perlhf(*words(tiny_base, feedback, tmp_path / "run", vllm, *options))
    assert done.code == 0, done.err
    assert metrics(tmp_path / "run")[0]["kl"] == 0
    assert max(line["sampler_gap_max"] for line in metrics(tmp_path / "run")) < 1e-4
    asked = [name for what, name in vllm.log if what == "ask"]
    assert "tiny" not in vllm.sampled and len(set(asked) - {"tiny"}) >= 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--sampler vllm --tuning full", "sampler: vllm is sent adapters"),
        ("--vllm.timeout-seconds 5", "vllm is of sampler: vllm"),
        ("--sampler vllm --vllm.url ftp://there", "no http address"),
    ],
)
def test_what_is_refused(perlhf, tiny_base, feedback, tmp_path, options, said):
    given = [*command("policy", tiny_base, feedback / "prompts.jsonl", tmp_path / "run"), *options.split()]
    done = perlhf(*given)
    assert done.code == 2 and said in done.err and not (tmp_path / "run").exists()
