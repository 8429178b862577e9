"""What sampling ahead (`staleness: 1`) gains on this machine's cores, and what it would on devices of its own.

Runs policies of a few updates, `--pairs` times in turn: sampling and learning one after the other on two threads; ahead
with a thread for each; ahead with two for each, which share two cores. Prints one JSON line: seconds of an update and
of its parts, gains over the first by pair with their median, and (s + l) / max(s, l) of sampling for s seconds and
scoring and learning for l on two threads, which is the most that an update gains where both have such a device of their
own. The first two updates aren't counted, nor is validation.
Run: python benchmarks/staleness.py --pairs 3
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REWARD = """
def length(prompts, completions):
    return [len(text) / 100 for text in completions]
"""
IN_TURN = "in turn, 2 threads"
SIDES = {
    IN_TURN: ["--threads", "2"],
    "ahead, 1 thread each": ["--threads", "1", "--staleness", "1"],
    "ahead, 2 threads each": ["--threads", "2", "--staleness", "1"],
}
UNCOUNTED = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--updates", type=int, default=8)
    arguments, more = parser.parse_known_args()
    words = ["policy", "--reward", "perlhf_bench_reward:length", "--baseline", "leave_one_out", "--device", "cpu"]
    words += ["--updates", str(arguments.updates), "--validate-every", "1000", "--checkpoint-every", "1000", *more]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "perlhf_bench_reward.py").write_text(REWARD)
        for pair in range(arguments.pairs):
            for side in list(SIDES) if pair % 2 == 0 else list(SIDES)[::-1]:
                found[side].append(measured([*words, *SIDES[side]], place))
                print(side, found[side][-1], file=sys.stderr, flush=True)
    print(json.dumps(row(found)))


def row(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the pairs, and what they say."""
    out: dict[str, Any] = {}
    for side, runs in found.items():
        gains = [one["update"] / other["update"] for one, other in zip(found[IN_TURN], runs, strict=True)]
        seconds = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
        told = {"gain": round(statistics.median(gains), 3), "gains": [round(gain, 3) for gain in gains]}
        out[side] = {"seconds": seconds} | ({} if side == IN_TURN else told)
    parts = out[IN_TURN]["seconds"]
    sampling, learning = parts["sample"], parts["score"] + parts["learn"]
    out["gain with a device for each"] = round((sampling + learning) / max(sampling, learning), 2)
    return out


def measured(words: list[str], place: Path) -> dict[str, float]:
    """Seconds of an update, and of its parts."""
    shutil.rmtree(place / "run", ignore_errors=True)
    paths = [str(place), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "perlhf", *words, "--run", str(place / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *counted = lines[UNCOUNTED - 1 :]
    parts = {
        key: statistics.mean(line[f"seconds_{key}"] for line in counted)
        for key in ("sample", "score", "learn", "ahead")
        if f"seconds_{key}" in counted[0]
    }
    return {"update": (counted[-1]["time_seconds"] - first["time_seconds"]) / len(counted), **parts}


if __name__ == "__main__":
    main()
