"""Kills a policy that samples with a vLLM server, and that server, at random moments: nothing may be lost.

    python scripts/soak_vllm.py [--kills 15] [--restarts 5] [--seed 0] [--python PYTHON]

One run is killed (SIGKILL) so many times and started again by the same command; so many times its server is killed
meanwhile and comes back without any adapter. In the end every update and rollout must be there once, KL 0 at first, all
log-probabilities those of the server within a bound, and nothing left over in the run or on the server. The server is
one of our own on a tiny base, beside which the run must have the files and numbers of one that nothing happened to, to
the bit; with the Python of an environment that has vLLM (`make test-vllm` makes one in build/vllm) it is vLLM's on the
packaged base, in float32. One line is printed; the exit code is 1 when anything failed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests" / name) for name in ("unit", "recipes", "vllm")]
os.environ["OMP_NUM_THREADS"] = "1"
PROMPTS, COMPLETIONS = 4, 2
GAP = 1e-3
"""Nats a token in float32."""
QUICK = {"perlhf.rollout.vllm.connection.PAUSE_SECONDS": 0.1}
LIMIT_SECONDS = 900.0
"""For an update, or a restart."""


class Own:
    """A server of our own at vLLM's addresses."""

    away = 1.0

    def __init__(self, base: Path):
        from vllm_server import FakeVllm

        self._server = FakeVllm(base)
        self.url, self._server.away_seconds = self._server.url, self.away

    def kill(self) -> None:
        self._server.restart()

    def adapters(self) -> list[str]:
        return list(self._server.loaded)

    def close(self) -> None:
        self._server.close()


class Real:
    """vLLM's."""

    def __init__(self, python: str, base: Path, place: Path):
        self._python, self._base, self._place, self._starts = python, base, place, 0
        self._context, self._server = self._started(None)
        self.url = self._server.address

    def kill(self) -> None:
        """Kills it and all its processes, and starts another one at the same port."""
        self._server.kill()
        self._context.__exit__(None, None, None)
        self._context, self._server = self._started(int(self.url.rpartition(":")[2]))

    def adapters(self) -> list[str]:
        return [one["id"] for one in self._server.ask("/v1/models")[1]["data"] if one["parent"]]

    def close(self) -> None:
        self._context.__exit__(None, None, None)

    def _started(self, port: int | None) -> tuple[AbstractContextManager[Any], Any]:
        from real_server import RANK, SLOTS, serving

        self._starts += 1
        words = ["--enable-lora", "--max-loras", str(SLOTS), "--max-lora-rank", str(RANK)]
        words += ["--logprobs-mode", "processed_logprobs"]
        log = self._place / f"vllm-{self._starts}.log"
        context = serving(self._python, log, self._base, "float32", *words, port=port)
        return context, context.__enter__()


def main() -> int:
    """Exit code: 0 when nothing was lost."""
    from real_server import KEY
    from toy import command, finish, write_feedback

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 15), ("restarts", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--python", help="of an environment with vLLM")
    options = parser.parse_args()
    updates = 4 * options.kills + 2 * options.restarts
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        place = Path(directory)
        feedback = write_feedback(place / "feedback")
        base, server = served(options.python, place)
        stack.callback(server.close)
        os.environ |= {"PERLHF_VLLM_KEY": KEY if options.python else "a-key", "no_proxy": "127.0.0.1"}
        own = f"--sampler vllm --vllm.url {server.url} --max-ratio 2 --validate-every 8 --optim.learning-rate 1e-3"
        own += f" --prompts-per-update {PROMPTS} --completions-per-prompt {COMPLETIONS} --encoding.max-tokens 192"
        own += f" --temperature 0.7 --vllm.timeout-seconds {LIMIT_SECONDS:g} --updates {updates}"
        words = command("policy", base, feedback / "prompts.jsonl", place / "run", *own.split())
        soak = Soak(words, place / "run", feedback, server, Random(options.seed))
        while not soak.failures and (soak.kills < options.kills or soak.restarts < options.restarts):
            soak.once(restart=soak.restarts * options.kills <= soak.kills * options.restarts)
            print(f"{soak.kills} kills, {soak.restarts} restarts, {soak.updates} updates", flush=True)
        if not soak.failures and finish_slowly(soak.start()):
            soak.failures.append(f"the same command doesn't go on: {soak.log.read_text()[-2000:]}")
        soak.failures = soak.failures or lost(place / "run", updates, server.adapters())
        if not options.python and not soak.failures:
            whole = [*words[: words.index("--run") + 1], str(place / "whole"), *words[words.index("--run") + 2 :]]
            assert finish(whole, soak.log, feedback, None, None, None, QUICK) == 0, soak.log.read_text()
            soak.failures = unlike(place / "whole", place / "run")
        print(json.dumps({"kills": soak.kills, "restarts": soak.restarts, "failures": soak.failures}))
    return 1 if soak.failures else 0


def served(python: str | None, place: Path) -> tuple[Path, Own | Real]:
    """A base and a server on it."""
    if python is None:
        from tiny_base import make_tiny_base

        base = make_tiny_base(place / "base")
        return base, Own(base)
    from perlhf.model.bases.found import Base

    base = Base.find("smollm2-135m-instruct-q4_1").directory
    return base, Real(python, base, place)


class Soak:
    """One run and what happened to it."""

    def __init__(self, words: list[str], run: Path, feedback: Path, server: Own | Real, draw: Random):
        self._words, self._run, self._feedback, self._server, self._draw = words, run, feedback, server, draw
        self.log = run.parent / "log"
        self.kills, self.restarts, self.failures = 0, 0, list[str]()

    @property
    def updates(self) -> int:
        """That the run has made."""
        metrics = self._run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def start(self) -> BaseProcess:
        from toy import start

        return start(self._words, self.log, self._feedback, None, None, None, QUICK)

    def once(self, restart: bool) -> None:
        """Starts the run, kills the server in the middle if asked for, then the run."""
        process = self.start()
        wanted = self.updates + self._draw.randint(1 if restart else 0, 2)  # at the start a server must be there
        self._wait(process, lambda: self.updates >= wanted)
        self._pause(wanted)
        if restart and process.is_alive():
            self._server.kill()
            self.restarts += 1
            before = self.updates
            self._wait(process, lambda: self.updates > before)
        self._pause(wanted)
        if process.is_alive():
            process.kill()
            self.kills += 1
        process.join()
        if process.exitcode != -9:
            self.failures.append(f"the run ended with {process.exitcode}: {self.log.read_text()[-2000:]}")

    def _pause(self, begun: int) -> None:
        """Some part of an update; before the first one more happens."""
        time.sleep(self._draw.uniform(0, 0.5 if begun else 3))

    def _wait(self, process: BaseProcess, done: Any) -> None:
        until = time.monotonic() + LIMIT_SECONDS
        while process.is_alive() and not done():
            if time.monotonic() > until:
                self.failures.append(f"nothing happens: {self.log.read_text()[-2000:]}")
                return
            time.sleep(0.001)


def finish_slowly(process: BaseProcess) -> int | None:
    process.join()
    return process.exitcode


def lost(run: Path, updates: int, adapters: list[str]) -> list[str]:
    """What is missing, twice there or left over."""
    from toy import metrics, read_lines

    lines, found = metrics(run), list[str]()
    rollouts = [read_lines(file) for file in sorted((run / "rollouts").glob("*.jsonl"))]
    if [line["step"] for line in lines] != list(range(1, updates + 1)):
        found.append(f"updates {[line['step'] for line in lines]}")
    if [len(rows) for rows in rollouts] != [PROMPTS * COMPLETIONS] * updates:
        found.append(f"completions of rollouts: {[len(rows) for rows in rollouts]}")
    if lines[0]["kl"] != 0:
        found.append(f"KL {lines[0]['kl']} at first")
    if (far := max(line["sampler_gap_mean"] for line in lines)) > GAP:
        found.append(f"log-probabilities are {far} nats a token apart")
    if left := [*adapters, *map(str, run.rglob(".tmp-*")), *map(str, run.glob("sampler"))]:
        found.append(f"left over: {left}")
    return found


def unlike(whole: Path, run: Path) -> list[str]:
    """What differs from a run that nothing happened to."""
    from toy import outcome

    one, other = outcome(whole), outcome(run)
    return [f"{key} differs" for key in one.keys() | other.keys() if one.get(key) != other.get(key)]


if __name__ == "__main__":
    sys.exit(main())
