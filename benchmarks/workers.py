"""What two workers of one thread each get done beside one process of two threads, for the same updates.

Runs both in turn, `--pairs` times, each time the other one first; prints each pair's ratio of updates a second (workers
over the one process) and the median as one JSON line a stage. The first update isn't counted, nor is validation.
Run: python benchmarks/workers.py --stages reward policy
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

OWN = {
    "sft": ["sft", "--max-updates"],
    "reward": ["reward", "--examples-per-update", "16", "--max-updates"],
    "policy": ["policy", "--reward", "perlhf_bench_reward:length", "--baseline", "leave_one_out", "--updates"],
}
REWARD = """
def length(prompts, completions):
    return [len(text) / 100 for text in completions]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=OWN, default=["reward", "policy"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--options", nargs="*", default=[], help="of the stages, such as --options --base DIRECTORY")
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "perlhf_bench_reward.py").write_text(REWARD)
        for stage in arguments.stages:
            words = [*OWN[stage], str(arguments.updates), "--validate-every", "1000", *arguments.options, *more]
            words += ["--checkpoint-every", "1000", "--device", "cpu", "--run", str(place / "run")]
            found: dict[int, list[float]] = {1: [], 2: []}
            for pair in range(arguments.pairs):
                for workers in (1, 2) if pair % 2 == 0 else (2, 1):
                    found[workers].append(seconds(words, workers, place))
            ratios = [one / two for one, two in zip(found[1], found[2], strict=True)]
            row: dict[str, Any] = {"stage": stage, "median": round(statistics.median(ratios), 3)}
            row |= {"ratios": [round(ratio, 3) for ratio in ratios], "seconds_an_update": found}
            print(json.dumps(row), flush=True)


def seconds(words: list[str], workers: int, place: Path) -> float:
    """Of an update."""
    shutil.rmtree(place / "run", ignore_errors=True)
    launch = ["launch", "--workers", str(workers)] if workers > 1 else []
    paths = [str(place), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // workers), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "perlhf", *launch, *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    return (lines[-1]["time_seconds"] - lines[0]["time_seconds"]) / (len(lines) - 1)


if __name__ == "__main__":
    main()
