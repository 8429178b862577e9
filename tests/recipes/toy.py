"""What the tests of whole commands share: small feedback files, each stage's options on the tiny base, and ways to
run a command.
"""

import importlib
import json
import os
import random
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from perlhf.commands.cli import main

DRINKS = ("tea", "cocoa", "water", "juice", "cider", "milk")
GOOD, BAD = ("sure, here", "here you go", "with pleasure"), ("nope", "go away", "not now")

REWARD_MODULE = '''
"""Rewards for the toy policy runs: prompts and completions in, one score each out."""

import hashlib


def letters(prompts, completions):
    """Share of characters that are lower-case ASCII letters."""
    return [sum("a" <= c <= "z" for c in text) / max(1, len(text)) for text in completions]


def constant(prompts, completions):
    return [0.5 for _ in completions]


def shuffled(prompts, completions):
    """Scores of `letters`, each given to another completion of the batch."""
    order = sorted(range(len(completions)), key=lambda i: hashlib.sha256(completions[i].encode()).hexdigest())
    scores = letters(prompts, completions)
    return [scores[i] for i in order]


def not_a_number(prompts, completions):
    return [float("nan") for _ in completions]
'''


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ratings(count: int = 64) -> list[dict[str, Any]]:
    """Polite answers are up, rude ones down; two of each group."""
    draw = random.Random(1)
    rows = []
    for number in range(count // 2):
        prompt = {"prompt": f"a {draw.choice(DRINKS)} please {number}", "group": f"r{number}"}
        rows.append(prompt | {"completion": draw.choice(GOOD), "label": True})
        rows.append(prompt | {"completion": draw.choice(BAD), "label": False})
    return rows


def comparisons(count: int = 32) -> list[dict[str, Any]]:
    """A polite answer is chosen over a rude one."""
    draw = random.Random(2)
    return [
        {
            "prompt": f"one {draw.choice(DRINKS)} {number}",
            "chosen": draw.choice(GOOD),
            "rejected": draw.choice(BAD),
            "margin": 0.5 * (number % 2),
            "group": f"c{number}",
        }
        for number in range(count)
    ]


def demonstrations(count: int = 32) -> list[dict[str, Any]]:
    """Polite answers only."""
    draw = random.Random(3)
    return [
        {"prompt": f"{draw.choice(DRINKS)} {number}?", "completion": draw.choice(GOOD), "group": f"d{number}"}
        for number in range(count)
    ]


def prompts(count: int = 32) -> list[dict[str, Any]]:
    """Orders without an answer."""
    draw = random.Random(4)
    return [{"prompt": f"{draw.choice(DRINKS)} {number}!", "group": f"p{number}"} for number in range(count)]


def write_feedback(directory: Path) -> Path:
    """One file of each kind, and the module `toy_reward`."""
    directory.mkdir(parents=True, exist_ok=True)
    for rows in (ratings, comparisons, demonstrations, prompts):
        write_rows(directory / f"{rows.__name__}.jsonl", rows())
    (directory / "toy_reward.py").write_text(REWARD_MODULE)
    return directory


def command(stage: str, base: Path, data: Path | str, run: Path, *options: str) -> list[str]:
    """A stage's command line on the tiny base: few tokens, high learning rates; `options` come last and win."""
    common = ["--base", str(base), "--dtype", "float32", "--device", "cpu", "--threads", "1", "--run", str(run)]
    common += ["--data.paths", str(data), "--data.validation", "0.25", "--data.test", "0.1"]
    common += ["--encoding.max-tokens", "96", "--adapter.rank", "4", "--adapter.alpha", "8", "--adapter.targets", "all"]
    own = {
        "sft": "--optim.learning-rate 1e-2 --examples-per-update 8 --max-updates 3 --validate-every 2",
        "reward": "--optim.learning-rate 1e-2 --examples-per-update 8 --max-updates 3 --validate-every 2",
        "policy": "--optim.learning-rate 3e-3 --value.learning-rate 3e-3 --value.warmup-updates 1 --updates 3 "
        "--prompts-per-update 4 --completions-per-prompt 2 --max-completion-tokens 6 --centre-prompts 4 "
        "--validation-prompts 4 --validate-every 2 --reward toy_reward:letters",
    }[stage].split()
    return [stage, *override([*common, *own], options)]


def override(options: Sequence[str], later: Sequence[str]) -> list[str]:
    """Options with the values of `later` in place of their own; the last of several counts."""
    name = ""
    chosen: dict[str, list[str]] = {}
    for word in (*options, *later):
        if word.startswith("--"):
            name = word
            chosen[name] = []
        else:
            chosen[name].append(word)
    return [word for name, values in chosen.items() for word in (name, *values)]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def metrics(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / "metrics.jsonl")


_TIMES = re.compile(r"(time|validation)_seconds|tokens_per_second|seconds(_.*)?|.*memory_bytes")


def lasting(values: Mapping[str, Any]) -> dict[str, Any]:
    """What doesn't depend on how fast the machine was or how much memory it used."""
    return {key: value for key, value in values.items() if not _TIMES.fullmatch(key)}


def outcome(run: Path) -> dict[str, Any]:
    """Everything of a finished run that must be the same whenever its command is run: bytes of files, and numbers."""
    found: dict[str, Any] = {"result": lasting(read_json(run / "result.json"))}
    found["metrics"] = [lasting(line) for line in metrics(run)]
    for folder in ("adapter", "value", "rollouts", "checkpoints"):
        for file in sorted((run / folder).rglob("*")):
            if file.is_file():
                found[str(file.relative_to(run))] = file.read_bytes()
    return found


# ---- a command in a process of its own ----------------------------------------------------------------------------


ASKS = ("PERLHF_JUDGE_KEY", "PERLHF_REWARD_KEY", "PERLHF_VLLM_KEY", "no_proxy")
"""Variables by which services are asked."""


class Moment(NamedTuple):
    """The `count`-th call of a function, by its qualified name: where a process sends itself `signal`."""

    function: str
    count: int
    signal: int = signal.SIGKILL


def start(
    arguments: Sequence[str],
    log: Path,
    directory: Path,
    moment: Moment | None = None,
    file_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    changed: Mapping[str, Any] | None = None,
) -> BaseProcess:
    """Starts a command in its own process; what it prints goes to `log`.

    The process is forked from one that has the packages imported already, which saves seconds a start.

    Args:
        directory: its working directory.
        moment: when it gets a signal, exactly, however slow the machine is; the command knows nothing of it.
        file_bytes: no file may grow beyond this, which is how a full disk looks.
        environment: variables that it has besides.
        changed: what modules have under these names instead, such as limits of seconds.
    """
    # That process has the environment of whoever was the first to start one.
    asks = {name: os.environ[name] for name in ASKS if name in os.environ}
    context = get_context("forkserver")
    stages = [f"perlhf.training.{stage}" for stage in ("sft", "reward", "policy")]
    context.set_forkserver_preload([*stages, "perlhf.parallel.together"])
    given = (
        list(arguments),
        str(log),
        str(directory),
        moment,
        file_bytes,
        asks | dict(environment or {}),
        changed or {},
    )
    process = context.Process(target=_run, args=given)
    process.start()
    return process


def finish(*arguments: Any, **options: Any) -> int | None:
    """`start`, and the exit code; -9 for a process that was killed."""
    process = start(*arguments, **options)
    process.join(120)
    assert process.exitcode is not None, "the command hangs"
    return process.exitcode


def start_workers(
    count: int,
    arguments: Sequence[str],
    logs: Path,
    directory: Path,
    moment: Moment | None = None,
    of: int = 0,
    changed: Mapping[str, Any] | None = None,
    also: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[BaseProcess]:
    """Starts a command as each of `count` workers, as torchrun would; what worker 2 prints goes to LOGS/2.log.

    Args:
        moment: when worker `of` gets a signal.
        also: what `start` gets for single workers besides.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for number in range(count):
        own: dict[str, Any] = {"arguments": arguments, "changed": changed, **((also or {}).get(number, {}))}
        environment = common | {"RANK": str(number), "LOCAL_RANK": str(number)} | own.pop("environment", {})
        at = moment if number == of else None
        log = logs / f"{number}.log"
        limit = own.pop("file_bytes", None)
        started.append(start(own.pop("arguments"), log, directory, at, limit, environment, **own))
    return started


def finish_workers(*arguments: Any, seconds: float = 120, **options: Any) -> list[int | None]:
    """`start_workers`, and their exit codes."""
    return joined(start_workers(*arguments, **options), seconds)


def joined(processes: Sequence[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Exit codes, once all have ended."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that hangs is not left behind
    return codes


def said(logs: Path) -> str:
    """What all workers printed."""
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in sorted(logs.glob("*.log")))


def _run(
    arguments: list[str],
    log: str,
    directory: str,
    moment: Moment | None,
    file_bytes: int | None,
    environment: Mapping[str, str],
    changed: Mapping[str, Any],
) -> None:
    os.environ.update(environment)
    for name, value in changed.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(directory)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    if moment is not None:
        _send_at(moment)
    sys.exit(main(arguments))


def _send_at(moment: Moment) -> None:
    left = moment.count

    def watch(frame: FrameType, event: str, called: Any) -> None:
        nonlocal left
        if event == "call":
            name = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"
        elif event == "c_call":
            name = f"{called.__module__}.{called.__name__}"
        else:
            return
        if name == moment.function:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), moment.signal)

    sys.setprofile(watch)
