"""Kills and disturbs real commands and sees that nothing is lost and nothing is left over.

    python scripts/soak.py [--kills 150] [--counted 350] [--disturbed 60] [--cases 200] [--minutes 60] [--seed 0]

Four parts, each on a tiny base, and each can be 0. `--kills`: whole commands are started and killed (SIGKILL) at random
moments. `--counted`: a fork of this process, which has everything imported, is killed at the n-th write or update.
`--disturbed`: a fork gets SIGINT, SIGTERM or SIGHUP, is stopped for a moment, has no room for a file, or a clock that
jumps. After up to three of these the same command runs to its end: then its files and numbers must be those of a
command that nothing happened to, and no temporary file may be left. `--cases`: damaged files of each kind (fuzz.py).

What is done is kept in DIRECTORY/state.json, so that the same command goes on after it was stopped; delete the
directory to start again. One table is printed at the end; the exit code is 1 when anything failed.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests" / "unit"), str(REPOSITORY / "tests" / "recipes")]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: a fork has no threads but one
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
CHAIN = 3
"""Kills of one command, at most, before it may end."""


class Job(NamedTuple):
    """A command line with `OUT` for where it writes; `found` gives what must be equal."""

    words: Sequence[str]
    found: Callable[[Path], Any]


class Part(NamedTuple):
    """One kind of disturbance: `disturb(job, words, draw)` does it once and says what became of the command."""

    name: str
    wanted: int
    disturb: Callable[[str, list[str], random.Random], str]


def main() -> int:
    """Exit code: 0 when nothing was lost or left over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 150), ("counted", 350), ("disturbed", 60), ("cases", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--minutes", type=float, default=60, help="nothing new is begun after these")
    parser.add_argument("--directory", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    soak = Soak(options.directory.resolve(), options.minutes)
    for name, wanted in (("kills", options.kills), ("counted", options.counted), ("disturbed", options.disturbed)):
        soak.run(Part(name, wanted, getattr(soak, name)), options.seed)
    if options.cases:
        soak.fuzz(options.cases, options.seed)
    return soak.report()


class Soak:
    """The commands, what they give undisturbed, and what was done so far."""

    def __init__(self, directory: Path, minutes: float):
        self.directory, self.until = directory, time.monotonic() + 60 * minutes
        self.state: dict[str, Any] = {"parts": {}, "failures": []}
        if (directory / "state.json").is_file():
            self.state = json.loads((directory / "state.json").read_text())
        self.jobs = _jobs(directory)
        shutil.rmtree(directory / "reference", ignore_errors=True)
        self.expected: dict[str, str] = {}
        self.events: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for name, job in self.jobs.items():
            place = directory / "reference" / name
            _, self.events[name] = _forked(_at(job, place), directory, count=True)
            self.expected[name] = _digest(job, place)

    def run(self, part: Part, seed: int) -> None:
        """Disturbs the commands in turn, until there were as many as wanted or the time is over."""
        done = self.state["parts"].setdefault(part.name, {})
        number = sum(counts["chains"] for counts in done.values())
        while sum(counts["disturbed"] for counts in done.values()) < part.wanted and time.monotonic() < self.until:
            names = list(self.jobs)
            name, draw = names[number % len(names)], random.Random(f"{seed} {part.name} {number}")
            counts = done.setdefault(name, dict.fromkeys(("chains", "disturbed", "swept", "equal", "failed"), 0))
            problem = self._chain(part, name, draw, counts)
            counts["chains"] += 1
            counts["failed" if problem else "equal"] += 1
            if problem:
                self.state["failures"].append(f"{part.name} {number} ({name}, seed {seed}): {problem}")
                print(self.state["failures"][-1], file=sys.stderr, flush=True)
            number += 1
            self._save()

    def _chain(self, part: Part, name: str, draw: random.Random, counts: dict[str, int]) -> str | None:
        """Up to CHAIN disturbances of one command, then its end; what was wrong, if anything."""
        place = self.directory / "work" / name
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir(parents=True)
        words = _at(self.jobs[name], place)
        for _ in range(draw.randint(1, CHAIN)):
            if name == "average" and place.exists():
                break
            said = part.disturb(name, words, draw)
            counts["disturbed"] += said != "ended"
            counts["swept"] += bool(_left(place.parent))
            if said not in ("disturbed", "ended"):
                return said
        # A directory that is whole isn't averaged into again.
        whole = name == "average" and place.exists()
        status, _ = (0, 0) if whole else _forked(words, self.directory)
        if status:
            return f"the last command ended with {status}: {_log(self.directory)}"
        if _digest(self.jobs[name], place) != self.expected[name]:
            return "its files or numbers differ from those of a command that nothing happened to"
        if not whole and (left := _left(place.parent)):
            return f"left over: {', '.join(map(str, left))}"
        return None

    def kills(self, name: str, words: list[str], draw: random.Random) -> str:
        """The real command, killed at a moment within the time that it takes here."""
        if name not in self.seconds:
            whole = self.directory / "timed" / name
            shutil.rmtree(whole.parent, ignore_errors=True)
            whole.parent.mkdir()
            began = time.monotonic()
            self._started(_at(self.jobs[name], whole)).wait()
            self.seconds[name] = time.monotonic() - began
        process = self._started(words)
        try:
            # The first half is imports, which write nothing.
            process.wait(self.seconds[name] * draw.uniform(0.3, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
        return _became(process.wait(), -signal.SIGKILL)

    def _started(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "perlhf", *words]
        with (self.directory / "log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory / "inputs")

    def counted(self, name: str, words: list[str], draw: random.Random) -> str:
        """A fork that is killed at one of the writes and updates that the whole command has."""
        status, _ = _forked(words, self.directory, at=draw.randint(1, self.events[name]))
        return _became(status, -signal.SIGKILL)

    def disturbed(self, name: str, words: list[str], draw: random.Random) -> str:
        """A fork to which something else happens."""
        what = draw.choice(("SIGINT", "SIGTERM", "SIGHUP", "SIGSTOP", "full", "clock"))
        at = draw.randint(1, self.events[name])
        if what == "full":
            status, _ = _forked(words, self.directory, file_bytes=draw.choice((0, 100, 5_000, 20_000)))
            return _became(status, 2)
        if what == "clock":
            status, _ = _forked(words, self.directory, clock=draw.choice((-1e6, 1e6)))
            return "disturbed" if status == 0 else _became(status, 0)
        number = signal.Signals[what]
        status, _ = _forked(words, self.directory, at=at, number=number)
        if number == signal.SIGSTOP:
            return "disturbed" if status == 0 else _became(status, 0)
        # Commands that train save and end with 130; others end at once, as the system has it.
        return _became(status, 130, -number)

    def fuzz(self, cases: int, seed: int) -> None:
        """Damaged files of each kind, by fuzz.py; done once."""
        if "fuzz" in self.state or time.monotonic() > self.until:
            return
        command = [sys.executable, str(REPOSITORY / "scripts" / "fuzz.py"), "--cases", str(cases), "--seed", str(seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        self.state["fuzz"] = [line for line in done.stdout.splitlines() if " cases in " in line]
        if done.returncode:
            self.state["failures"].append(f"fuzz.py ended with {done.returncode}; run it to see the cases")
        self._save()

    def report(self) -> int:
        """Prints the table and what failed."""
        total = Counter[str]()
        print(
            f"{'part':<10} {'command':<10} {'runs':>5} {'disturbed':>10} {'left, swept':>12} {'equal':>6} {'failed':>7}"
        )
        for part, done in self.state["parts"].items():
            for name, counts in done.items():
                total.update({f"{part} {key}": value for key, value in counts.items()})
                print(f"{part:<10} {name:<10} {_row(counts)}")
        for part in self.state["parts"]:
            print(f"{part:<10} {'all':<10} {_row({key: total[f'{part} {key}'] for key in _COLUMNS})}")
        print("\n".join(self.state.get("fuzz", [])))
        for failure in self.state["failures"]:
            print(f"failed: {failure}")
        return 1 if self.state["failures"] else 0

    def _save(self) -> None:
        place = self.directory / "state.json"
        place.with_suffix(".new").write_text(json.dumps(self.state, indent=1))
        os.replace(place.with_suffix(".new"), place)


_COLUMNS = ("chains", "disturbed", "swept", "equal", "failed")


def _row(counts: dict[str, int]) -> str:
    widths = (5, 10, 12, 6, 7)
    return " ".join(f"{counts[key]:>{width}}" for key, width in zip(_COLUMNS, widths, strict=True))


def _jobs(directory: Path) -> dict[str, Job]:
    """The commands that are disturbed; the runs that some of them read are made once."""
    import torch
    from tiny_base import make_tiny_base
    from toy import command, outcome, write_feedback

    torch.set_num_threads(1)
    inputs, base = directory / "inputs", directory / "inputs" / "base"
    if not (inputs / "whole").exists():
        shutil.rmtree(inputs, ignore_errors=True)
        write_feedback(inputs)
        make_tiny_base(base)
    checkpoints = ("--checkpoint-every", "2", "--data.paths")
    own = {
        "sft": ("--max-updates", "6", "--epochs", "6", *checkpoints, str(inputs / "demonstrations.jsonl")),
        "reward": ("--max-updates", "6", "--epochs", "6", *checkpoints, str(inputs / "ratings.jsonl")),
        "policy": ("--updates", "4", *checkpoints, str(inputs / "prompts.jsonl")),
    }
    jobs = {stage: Job(command(stage, base, "unused", Path("OUT"), *more), outcome) for stage, more in own.items()}
    for stage in ("sft", "reward"):
        if not (inputs / "whole" / stage / "result.json").exists():
            status, _ = _forked(_at(jobs[stage], inputs / "whole" / stage), directory)
            assert status == 0, _log(directory)
    reward = str(inputs / "whole" / "reward")
    jobs["average"] = Job(["average", reward, reward, "--output", "OUT"], _adapter)
    jobs["export"] = Job(["export", str(inputs / "whole" / "sft"), "OUT"], _bytes)
    jobs["split"] = Job(["data", "split", str(inputs / "ratings.jsonl"), "--output", "OUT"], _bytes)
    jobs["score"] = Job(["score", reward, str(inputs / "ratings.jsonl"), "--output", "OUT/scores.jsonl"], _bytes)
    return jobs


def _adapter(place: Path) -> dict[str, bytes]:
    return {name: content for name, content in _bytes(place).items() if name.startswith("adapter/")}


def _bytes(place: Path) -> dict[str, bytes]:
    return {str(file.relative_to(place)): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}


def _at(job: Job, place: Path) -> list[str]:
    return [word.replace("OUT", str(place)) if word.startswith("OUT") else word for word in job.words]


def _digest(job: Job, place: Path) -> str:
    return hashlib.sha256(repr(job.found(place)).encode()).hexdigest()


def _left(directory: Path) -> list[Path]:
    return sorted(directory.rglob(".tmp-*"))


def _became(status: int, *expected: int) -> str:
    if status in expected:
        return "disturbed"
    return "ended" if status == 0 else f"ended with {status}, not {' or '.join(map(str, expected))}"


def _log(directory: Path) -> str:
    return (directory / "log").read_text(errors="replace")[-500:]


def _forked(
    words: Sequence[str],
    directory: Path,
    at: int | None = None,
    number: int = signal.SIGKILL,
    file_bytes: int | None = None,
    clock: float = 0,
    count: bool = False,
) -> tuple[int, int]:
    """The exit code of a command in a fork (less than 0: the signal that ended it), and how many events it had."""
    import torch
    from forks import forked
    from kills import WRITES, Count

    from perlhf.commands.cli import main as perlhf
    from perlhf.training import policy, reward, sft  # noqa: F401 -- so that the fork needn't

    read, write = os.pipe()

    def work() -> None:
        descriptor = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(directory / "inputs")
        sys.path.insert(0, ".")
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if clock:
            now, began = time.time, time.time()
            time.time = lambda: now() + (clock if now() > began + 0.3 else 0)
        counts = Count(at, number)
        if count or at is not None:
            counts.watch(*WRITES, (torch.Tensor, "backward"))
        try:
            code = perlhf(list(words))
        except SystemExit as ended:
            code = int(ended.code or 0)
        events = counts.events
        os.writev(write, [str(events).encode()])
        os._exit(code)

    child = forked(work)
    os.close(write)
    while True:
        _, status = os.waitpid(child, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        time.sleep(0.05)
        os.kill(child, signal.SIGCONT)
    events = os.read(read, 100)
    os.close(read)
    return os.waitstatus_to_exitcode(status), int(events or 0)


if __name__ == "__main__":
    sys.exit(main())
