"""Kills a random one of two workers at random moments, and sees that nothing is lost and nobody is left behind.

    python scripts/soak_workers.py [--kills 30] [--seed 0]

Each command (SFT, reward, policy on a tiny base) is started as two workers; one gets SIGKILL, and the other must end by
itself within a minute, with one message. After up to three kills the same command runs to its end: then its files and
numbers must be those of one that nothing happened to, and no temporary file may be left. The exit code is 1 when
anything failed.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests" / "unit"), str(REPOSITORY / "tests" / "recipes")]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
STAGES = {"sft": "demonstrations", "reward": "ratings", "policy": "prompts"}
UPDATES = 12
CHAIN = 3
"""Kills of one command, at most, before it may end."""


def main() -> int:
    """Exit code: 0 when nothing was lost."""
    from tiny_base import make_tiny_base
    from toy import command, finish_workers, outcome, write_feedback

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, killed, failures = random.Random(options.seed), 0, list[str]()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        base, feedback = make_tiny_base(place / "base"), write_feedback(place / "feedback")
        words, expected = {}, {}
        for stage, data in STAGES.items():
            more = ["--updates"] if stage == "policy" else ["--epochs", "9", "--max-updates"]
            words[stage] = command(stage, base, feedback / f"{data}.jsonl", place / stage, *more, str(UPDATES))
            assert finish_workers(2, words[stage], place / "logs", feedback) == [0, 0]
            expected[stage] = outcome(place / stage)
        while killed < options.kills and not failures:
            stage = list(STAGES)[killed % len(STAGES)]
            shutil.rmtree(place / stage)
            for _ in range(draw.randint(1, CHAIN)):
                problem, happened = kill(words[stage], draw, place, feedback)
                killed += happened
                failures += [f"kill {killed} ({stage}): {problem}"] if problem else []
            if finish_workers(2, words[stage], place / "logs", feedback) != [0, 0]:
                failures.append(f"after kill {killed} the same command of {stage} doesn't go on")
            elif outcome(place / stage) != expected[stage] or list((place / stage).rglob(".tmp-*")):
                failures.append(f"after kill {killed} the run of {stage} isn't that of one which wasn't killed")
            print(f"{killed} kills, {len(failures)} failures", flush=True)
    print(json.dumps({"kills": killed, "failures": failures}))
    return 1 if failures else 0


def kill(words: list[str], draw: random.Random, place: Path, feedback: Path) -> tuple[str | None, bool]:
    """What was wrong, if anything, and whether a worker was killed before it had ended."""
    from toy import joined, said, start_workers

    shutil.rmtree(place / "logs", ignore_errors=True)
    soon = {"perlhf.parallel.watch.JOIN_SECONDS": 20.0}  # else one that was killed at the start is waited for longer
    processes = start_workers(2, words, place / "logs", feedback, changed=soon)
    which, lines = draw.randrange(2), draw.randrange(UPDATES)
    metrics = Path(words[words.index("--run") + 1]) / "metrics.jsonl"
    while (
        processes[which].is_alive() and lines and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines)
    ):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.3 if lines else 3))  # before the first update more happens
    happened = processes[which].is_alive()
    processes[which].kill()
    began = time.monotonic()
    codes = joined(processes, 60)
    other, text = codes[1 - which], said(place / "logs")
    if other is None:
        return f"worker {1 - which} was left behind: {text}", happened
    if other == 0 or not happened:
        return None, False
    if other not in (2, 3) or len(re.findall("^error: ", text, re.M)) != 1:
        return f"worker {1 - which} ended with {other} after {time.monotonic() - began:.0f} s: {text}", happened
    return None, happened


if __name__ == "__main__":
    sys.exit(main())
