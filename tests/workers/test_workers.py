"""Several workers that train one run: real processes over gloo, equal to one process, and ended together."""

import datetime
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy import (
    Moment,
    command,
    finish,
    finish_workers,
    joined,
    metrics,
    outcome,
    read_json,
    read_lines,
    said,
    start_workers,
)

import perlhf

STAGES = ("sft", "reward", "policy")
LEARNING = "torch._tensor.backward"
SOON = {"perlhf.parallel.watch.SILENT_SECONDS": 4.0, "perlhf.parallel.watch.GRACE_SECONDS": 3.0}
"""So that a test needn't wait for what takes half a minute."""
ONE_UPDATE = "--optim.beta1 0 --optim.max-grad-norm 1e9"
"""With these AdamW's first moment is the gradient itself."""


@pytest.fixture(scope="module")
def commands(tiny_base: Path, feedback: Path) -> Callable[..., list[str]]:
    """Command lines of short runs."""

    def build(stage: str, run: Path, *options: str) -> list[str]:
        data = {"sft": "demonstrations", "reward": "ratings", "policy": "prompts"}[stage]
        own = {"sft": "--epochs 9 --max-updates", "reward": "--epochs 9 --max-updates", "policy": "--updates"}[stage]
        words = [*own.split(), "6", "--checkpoint-every", "2", "--validate-every", "4", "--check-every", "1"]
        return command(stage, tiny_base, feedback / f"{data}.jsonl", run, *words, *options)

    return build


def updated(stage: str, run: Path) -> list[torch.Tensor]:
    """Gradients of the first update."""
    found = []
    for file in sorted((run / "checkpoints" / "00000001").glob("*.optimizer.safetensors")):
        tensors = load_file(file)
        found += [tensors[name] for name in sorted(tensors) if name.endswith("exp_avg")]
    assert found, f"{stage} has no optimiser's state"
    return found


def one_update(stage: str) -> list[str]:
    own = {"policy": "--updates 1 --value.warmup-updates 0"}.get(stage, "--max-updates 1")
    return [*ONE_UPDATE.split(), *own.split(), "--checkpoint-every", "1"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_of_1_2_and_4_workers_is_the_same(stage, commands, feedback, tmp_path):
    runs = {count: tmp_path / str(count) for count in (1, 2, 4)}
    assert finish(commands(stage, runs[1], *one_update(stage)), tmp_path / "log", feedback) == 0
    for count in (2, 4):
        words = commands(stage, runs[count], *one_update(stage))
        assert finish_workers(count, words, tmp_path / f"log{count}", feedback) == [0] * count
    expected = updated(stage, runs[1])
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    for count in (2, 4):
        for one, other in zip(updated(stage, runs[count]), expected, strict=True):
            assert (one - other).norm() <= 1e-5 * max(1.0, other.norm().item())
        (line,), (usual,) = metrics(runs[count]), metrics(runs[1])
        assert line.keys() == usual.keys()
        for key in ("loss", "entropy", "score_mean", "reward_mean", "policy_loss", "value_loss", "validation_loss"):
            assert line.get(key, 0.0) == pytest.approx(usual.get(key, 0.0), abs=1e-4)
    if stage == "policy":
        rows = [[row["completion"] for row in read_lines(runs[n] / "rollouts/00000001.jsonl")] for n in (1, 2, 4)]
        assert rows[0] == rows[1] == rows[2], "they drew the same numbers"


def test_members_learn_with_two_workers_as_with_one(commands, feedback, tmp_path):
    given = ("--members", "2", "--adapter.layers", "last:1", "--validate-every", "1", "--check-every", "1")
    for count in (1, 2):
        words = commands("reward", tmp_path / str(count), *one_update("reward"), *given)
        assert finish_workers(count, words, tmp_path / f"log{count}", feedback) == [0] * count, said(tmp_path / "log2")
    for number in ("0", "1"):
        file = Path("adapter") / number / "adapter_model.safetensors"
        expected = load_file(tmp_path / "1" / file)
        for name, tensor in load_file(tmp_path / "2" / file).items():
            assert (tensor - expected[name]).norm() <= 1e-3 * max(1.0, float(expected[name].norm())), name
    (line,), (usual,) = metrics(tmp_path / "2"), metrics(tmp_path / "1")
    assert line["validation_member_loss"] == pytest.approx(usual["validation_member_loss"], abs=1e-4)


def test_dropout_is_a_function_of_the_tokens(commands, feedback, tmp_path):
    runs = {count: tmp_path / str(count) for count in (2, 4)}
    for count, run in runs.items():
        words = commands("reward", run, *one_update("reward"), "--adapter.dropout", "0.3", "--max-updates", "2")
        assert finish_workers(count, words, tmp_path / f"log{count}", feedback) == [0] * count
    (_, two), (_, four) = metrics(runs[2]), metrics(runs[4])
    assert two["loss"] == pytest.approx(four["loss"], abs=1e-5)
    assert two["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_are_repeatable_and_their_checkpoints_those_of_one(stage, commands, feedback, tmp_path):
    runs = [tmp_path / "one", tmp_path / "again"]
    for run in runs:
        assert finish_workers(2, commands(stage, run), tmp_path / "log", feedback) == [0, 0], said(tmp_path / "log")
    assert outcome(runs[0]) == outcome(runs[1])
    alone = tmp_path / "alone"
    assert finish(commands(stage, alone), tmp_path / "log1", feedback) == 0
    files = [sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()) for run in (*runs, alone)]
    assert files[0] == files[1] == files[2]
    for file in (name for name in files[0] if name.endswith(".safetensors")):
        assert load_file(alone / file).keys() == load_file(runs[0] / file).keys()
    assert read_json(runs[0] / "manifest.json")["sessions"][0]["workers"] == 2
    log = said(tmp_path / "log")
    assert (tmp_path / "log" / "1.log").read_text() == "", "the first one speaks alone"
    assert log.count("validation_examples" if stage != "policy" else "validation_prompts") == 1


def test_workers_sample_ahead(commands, feedback, tmp_path):
    """Each samples its share in a thread; they meet where the completions are wanted, so nothing hangs on when."""
    runs = [tmp_path / "one", tmp_path / "again"]
    for run in runs:
        words = commands("policy", run, "--staleness", "1")
        assert finish_workers(2, words, tmp_path / "log", feedback) == [0, 0], said(tmp_path / "log")
    assert outcome(runs[0]) == outcome(runs[1])
    alone = tmp_path / "alone"
    assert finish(commands("policy", alone, "--staleness", "1"), tmp_path / "log1", feedback) == 0
    # AdamW's first step goes by the sign of gradients, so that rounding of tiny ones moves what is sampled afterwards.
    for update, (line, usual) in enumerate(zip(metrics(runs[0]), metrics(alone), strict=True), 1):
        found = [read_lines(run / f"rollouts/{update:08d}.jsonl") for run in (runs[0], alone)]
        assert {row["sampler_step"] for rows in found for row in rows} == {max(0, update - 2)}
        if update <= 3:  # sampled before the policy has learned: the first update learns the value alone
            assert [row["completion"] for row in found[0]] == [row["completion"] for row in found[1]]
            assert line["ratio_mean"] == pytest.approx(usual["ratio_mean"], abs=1e-2)
            assert line["score_mean"] == pytest.approx(usual["score_mean"], abs=1e-4)


def test_a_run_goes_on_with_another_number_of_workers(commands, feedback, tmp_path):
    run = tmp_path / "run"
    words = commands("policy", run)
    codes = finish_workers(2, words, tmp_path / "log2", feedback, Moment(LEARNING, 7), of=0, changed=SOON)
    assert codes[0] == -signal.SIGKILL
    assert not (run / "result.json").exists()
    codes = finish_workers(4, words, tmp_path / "log4", feedback, Moment(LEARNING, 4), of=3, changed=SOON)
    assert codes == [3, 3, 3, -signal.SIGKILL]
    assert finish(words, tmp_path / "log1", feedback) == 0
    sessions = read_json(run / "manifest.json")["sessions"]
    assert [session.get("workers") for session in sessions] == [2, 4, 1]
    assert "the number of workers is 1 but was 4 before" in (tmp_path / "log1").read_text()
    whole = tmp_path / "whole"
    assert finish(commands("policy", whole), tmp_path / "log", feedback) == 0
    for line, usual in zip(metrics(run), metrics(whole), strict=True):
        assert line["score_mean"] == pytest.approx(usual["score_mean"], abs=1e-4)
        assert line["entropy"] == pytest.approx(usual["entropy"], abs=1e-3)


def test_evaluate_and_score_are_those_of_one_process(commands, tiny_base, feedback, tmp_path):
    """Micro-batches and prompts are laid out as one process does, and then shared: the same bits."""
    for stage in STAGES:
        assert finish(commands(stage, tmp_path / stage), tmp_path / "log", feedback) == 0
    smaller = {"perlhf.evaluation.shared.ROWS": 4}
    given = ["--split", "all", "--bootstrap", "20", "--device", "cpu", "--tokens-per-microbatch", "128", "--output"]
    policy = ["--best-of", "2", "4", "--temperature", "0.7"]
    for stage in STAGES:
        words = ["evaluate", str(tmp_path / stage), *given]
        files = [tmp_path / f"{stage}-{count}.json" for count in (1, 2)]
        more = policy if stage == "policy" else []
        log = tmp_path / "log1"
        assert finish([*words, str(files[0]), *more], log, feedback, None, None, None, smaller) == 0, log.read_text()
        logs = tmp_path / "log2"
        assert finish_workers(2, [*words, str(files[1]), *more], logs, feedback, changed=smaller) == [0, 0], said(logs)
        assert read_json(files[0]) == read_json(files[1])
    words = ["score", str(tmp_path / "reward"), str(feedback / "comparisons.jsonl"), "--device", "cpu", "--output"]
    words[-1:-1] = ["--tokens-per-microbatch", "128"]
    assert finish([*words, str(tmp_path / "1.jsonl")], tmp_path / "log", feedback) == 0
    assert finish_workers(2, [*words, str(tmp_path / "2.jsonl")], tmp_path / "log2", feedback) == [0, 0]
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_launch_starts_again_after_a_worker_was_killed(commands, feedback, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    words = commands("sft", run, "--max-updates", "60", "--epochs", "99", "--checkpoint-every", "5")
    launcher = ["-P", "-m", "perlhf", "launch", "--workers", "2", "--restarts", "1"]
    with log.open("w") as output:
        ours = os.environ | {"PYTHONPATH": str(Path(perlhf.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        started = subprocess.Popen(
            [sys.executable, *launcher, *words], cwd=feedback, stdout=output, stderr=output, env=ours
        )
        while not (run / "checkpoints").exists() or not list((run / "checkpoints").glob("*/state.json")):
            assert started.poll() is None, log.read_text()
            time.sleep(0.01)
        psutil.Process(started.pid).children()[1].kill()
        assert started.wait(300) == 0, log.read_text()
    manifest = read_json(run / "manifest.json")
    assert [session["workers"] for session in manifest["sessions"]] == [2, 2]
    assert len(metrics(run)) == 60
    assert log.read_text().count("Traceback") == 0


# ---- one that fails ends all ----------------------------------------------------------------------------------------


def whole(run: Path) -> None:
    """Nothing half-written is left, and what is there can be read."""
    assert not list(run.rglob(".tmp-*"))
    assert all((place / "state.json").is_file() for place in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_ends_all(how, lost, commands, feedback, tmp_path):
    run, logs = tmp_path / "run", tmp_path / "log"
    words = commands("sft", run)
    processes = start_workers(2, words, logs, feedback, Moment(LEARNING, 4, how), of=lost, changed=SOON)
    other = processes[1 - lost]
    other.join(60)
    codes = joined(processes, 0 if how == signal.SIGSTOP else 10)
    assert codes[1 - lost] == 3, said(logs)
    assert len(re.findall("^error: ", said(logs), re.M)) == 1, said(logs)
    assert f"worker {lost} of 2 " in said(logs)
    assert "run the same command to continue" in said(logs)
    processes[lost].join()
    assert finish_workers(2, words, logs, feedback) == [0, 0]
    whole(run)
    assert len(metrics(run)) == 6


def test_a_worker_that_stalls_is_waited_for(commands, feedback, tmp_path):
    """Stopped for half of what a lost one is given: nobody minds."""
    words, logs = commands("sft", tmp_path / "run"), tmp_path / "log"
    longer = SOON | {"perlhf.parallel.watch.SILENT_SECONDS": 16.0}
    processes = start_workers(2, words, logs, feedback, Moment(LEARNING, 3, signal.SIGSTOP), of=1, changed=longer)
    assert processes[1].pid is not None
    stalled = psutil.Process(processes[1].pid)
    while stalled.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    time.sleep(8)
    stalled.resume()
    assert joined(processes) == [0, 0], said(logs)
    assert "error" not in said(logs)


def test_a_full_disk_of_the_first_worker_ends_all_and_loses_nothing(commands, feedback, tmp_path):
    words, run, logs = commands("sft", tmp_path / "run"), tmp_path / "run", tmp_path / "log"
    codes = finish_workers(2, words, logs, feedback, also={0: {"file_bytes": 20_000}})
    refused(logs, codes, "checkpoints/00000002")
    assert finish_workers(2, words, logs, feedback) == [0, 0]
    whole(run)
    assert len(metrics(run)) == 6


def test_a_mistake_of_one_worker_is_told_once(commands, feedback, tmp_path):
    """Worker 1 can't import what scores, after all others could."""
    run, logs = tmp_path / "run", tmp_path / "log"
    broken = {"perlhf.rollout.local.VOCAB_BLOCK": "no number"}
    codes = finish_workers(2, commands("policy", run), logs, feedback, also={1: {"changed": broken}})
    assert codes == [70, 70]
    assert len(re.findall("^error: ", said(logs), re.M)) == 1
    assert re.search(r"error: worker 1 of 2: a mistake of perlhf's own, TypeError", said(logs))
    assert (logs / "1.log").read_text() == ""
    for kept in re.findall(r"/\S*perlhf-error-\S*\.txt", said(logs)):
        os.unlink(kept)


def test_what_all_workers_find_wrong_is_told_once(commands, feedback, tmp_path):
    words = commands("sft", tmp_path / "run", "--data.paths", str(tmp_path / "missing.jsonl"))
    assert finish_workers(2, words, tmp_path / "log", feedback) == [2, 2]
    assert len(re.findall("^error: ", said(tmp_path / "log"), re.M)) == 1
    assert "missing.jsonl" in said(tmp_path / "log")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("to", ["all", "one"])
def test_ctrl_c_saves_once_and_the_same_command_goes_on(to, commands, feedback, tmp_path):
    run, logs, undisturbed = tmp_path / "run", tmp_path / "log", tmp_path / "undisturbed"
    words = commands("sft", run, "--max-updates", "40", "--checkpoint-every", "1000")
    processes = start_workers(2, words, logs, feedback)
    while not (run / "metrics.jsonl").exists() and processes[0].is_alive():
        time.sleep(0.001)
    for process in processes if to == "all" else processes[1:]:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    assert joined(processes) == [130, 130], said(logs)
    assert said(logs).count("stopped at update") == 1
    assert len(list((run / "checkpoints").iterdir())) == 1
    whole(run)
    assert finish_workers(2, words, logs, feedback) == [0, 0]
    words = commands("sft", undisturbed, "--max-updates", "40", "--checkpoint-every", "1000")
    assert finish_workers(2, words, logs, feedback) == [0, 0]
    found, expected = outcome(run), outcome(undisturbed)
    assert found["metrics"] == expected["metrics"]
    assert found["adapter/adapter_model.safetensors"] == expected["adapter/adapter_model.safetensors"]


# ---- bad input ------------------------------------------------------------------------------------------------------


def refused(logs: Path, codes: list[int | None], *words: str) -> None:
    text = said(logs)
    assert set(codes) == {2}, text
    assert len(re.findall("^error: ", text, re.M)) == 1, text
    for word in words:
        assert word in text


def test_workers_that_were_asked_for_different_things_are_refused(commands, feedback, tmp_path):
    run, logs = tmp_path / "run", tmp_path / "log"
    other = commands("sft", run, "--optim.learning-rate", "0.5")
    codes = finish_workers(2, commands("sft", run), logs, feedback, also={1: {"arguments": other}})
    refused(logs, codes, "worker 1 of 2", "optim.learning_rate is 0.5, but 0.01 on worker 0")
    assert not run.exists()


class Tomorrow(datetime.date):
    """The calendar of a machine whose clock is fast by a day."""

    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date.fromordinal(datetime.date.toordinal(cls(2030, 1, 2)))


def an_hour_ahead() -> float:
    """A clock, of either kind, that shows something else than the others'."""
    return time.perf_counter() + 1e9


def test_clocks_may_differ(commands, feedback, tmp_path):
    """The day that a template writes is the first worker's; nobody compares times."""
    template = tmp_path / "dated.jinja"
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    template.write_text("{{ strftime_now('%d %B %Y') }}\n" + text)
    words = commands("sft", tmp_path / "run", "--encoding.template", str(template))
    changed = {"datetime.date": Tomorrow, "time.time": an_hour_ahead, "time.monotonic": an_hour_ahead}
    codes = finish_workers(2, words, tmp_path / "log", feedback, changed=SOON, also={1: {"changed": SOON | changed}})
    assert codes == [0, 0], said(tmp_path / "log")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["encoding"]["day"] == datetime.date.today().isoformat()


def test_two_agents_of_torchrun_stand_for_two_nodes(commands, feedback, tmp_path):
    """Each starts two workers, which hold a base between them; the run is that of four workers that hold it whole."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = commands("policy", tmp_path / "run", "--shard", "node")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    agent += ["--master-addr", "127.0.0.1", "--master-port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    agents: list[subprocess.Popen[bytes]] = []
    for number in range(2):
        with (tmp_path / f"{number}.log").open("w") as log:
            own = [*agent, "--node-rank", str(number), "-m", "--", "perlhf", *words]
            agents.append(subprocess.Popen(own, cwd=feedback, env=environment, stdout=log, stderr=log))
    try:
        assert [started.wait(120) for started in agents] == [0, 0], said(tmp_path)
    finally:
        for started in agents:
            started.terminate()
    sessions = read_json(tmp_path / "run/manifest.json")["sessions"]
    assert [session["workers"] for session in sessions] == [4]
    assert finish_workers(4, commands("policy", tmp_path / "other"), tmp_path / "log", feedback) == [0] * 4
    assert outcome(tmp_path / "run") == outcome(tmp_path / "other")


def test_workers_that_see_other_data_are_refused(commands, feedback, tmp_path):
    logs, elsewhere = tmp_path / "log", tmp_path / "data"
    for place, count in ((tmp_path / "a", 32), (tmp_path / "b", 31)):
        place.mkdir()
        lines = (feedback / "demonstrations.jsonl").read_text().splitlines(keepends=True)
        (place / "data.jsonl").write_text("".join(lines[:count]))
    words = commands("sft", Path("run"), "--data.paths", "data.jsonl", "--run", str(elsewhere))
    also: dict[int, Any] = {1: {"environment": {"PERLHF_DATA": str(tmp_path / "b")}}}
    also[0] = {"environment": {"PERLHF_DATA": str(tmp_path / "a")}}
    codes = finish_workers(2, words, logs, tmp_path, also=also)
    refused(logs, codes, "facts.data")


def test_more_workers_than_an_update_has_are_refused(commands, feedback, tmp_path):
    codes = finish_workers(
        3, commands("policy", tmp_path / "run", "--prompts-per-update", "2"), tmp_path / "log", feedback
    )
    refused(tmp_path / "log", codes, "prompts_per_update", "3 workers share an update of 2")
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_refused(commands, feedback, tmp_path):
    soon = {"perlhf.parallel.watch.JOIN_SECONDS": 3.0}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = {"environment": {"MASTER_PORT": str(taken.getsockname()[1])}}
        words = commands("sft", tmp_path / "run")
        codes = finish_workers(2, words, tmp_path / "log", feedback, changed=soon, also={0: port})
    assert codes == [2, 2]
    assert "in use" in (tmp_path / "log" / "0.log").read_text()


def test_a_missing_address_is_refused(commands, feedback, tmp_path):
    none = {number: {"environment": {"MASTER_ADDR": ""}} for number in (0, 1)}
    codes = finish_workers(2, commands("sft", tmp_path / "run"), tmp_path / "log", feedback, also=none)
    refused(tmp_path / "log", codes, "MASTER_ADDR", "perlhf launch")


def test_what_several_workers_cannot_share_is_refused(feedback, tmp_path):
    codes = finish_workers(2, ["report", str(tmp_path)], tmp_path / "log", feedback)
    refused(tmp_path / "log", codes, "report is no work for several workers")
