"""Workers as actors of Ray, on a cluster of this machine: `make test-ray`."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from toy import command, finish_workers, metrics, outcome, read_json, write_feedback

import perlhf

pytest.importorskip("ray", reason="the extra ray isn't installed")


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_feedback(tmp_path_factory.mktemp("feedback"))


def start(words: list[str], log: Path, directory: Path, *options: str) -> "subprocess.Popen[bytes]":
    given = [sys.executable, "-P", "-m", "perlhf", "launch", "--ray", "--workers", "2", *options, *words]
    paths = [str(Path(perlhf.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ours = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(given, cwd=directory, stdout=output, stderr=output, env=ours)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_policy_is_that_of_workers_started_otherwise(
    shard: str, tiny_base: Path, feedback: Path, tmp_path: Path
) -> None:
    words: list[Any] = [command("policy", tiny_base, feedback / "prompts.jsonl", tmp_path / name) for name in "ab"]
    assert start([*words[0], "--shard", shard], tmp_path / "log", feedback).wait(180) == 0, (
        tmp_path / "log"
    ).read_text()
    assert finish_workers(2, words[1], tmp_path / "logs", feedback) == [0, 0]
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_an_actor_that_is_killed_is_survived(tiny_base: Path, feedback: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    options = ("--updates", "40", "--validate-every", "20")
    words = command("policy", tiny_base, feedback / "prompts.jsonl", run, *options)
    started = start(words, log, feedback, "--restarts", "1")
    while not list((run / "checkpoints").glob("00000003/state.json")):
        assert started.poll() is None, log.read_text()
        time.sleep(0.01)
    actors = [p for p in psutil.Process(started.pid).children(recursive=True) if p.name().startswith("ray::Worker")]
    assert len(actors) == 2
    actors[1].kill()
    assert started.wait(180) == 0, log.read_text()
    assert [session["workers"] for session in read_json(run / "manifest.json")["sessions"]] == [2, 2]
    assert len(metrics(run)) == 40


def test_a_missing_cluster_is_refused(tiny_base: Path, feedback: Path, tmp_path: Path) -> None:
    words = command("policy", tiny_base, feedback / "prompts.jsonl", tmp_path / "run")
    assert start(words, tmp_path / "log", feedback, "--address", "127.0.0.1:1").wait(180) == 2
    assert (tmp_path / "log").read_text().count("error: ") == 1
    assert "no cluster of Ray's" in (tmp_path / "log").read_text()
