"""Seconds and peak memory of the commands that read a large file, until the first update.

    python benchmarks/large_files.py --records 1000000 --base BASE

The file is made first: comparisons of some 400 bytes as JSON lines. Each command runs in a process of its own, so that
its peak memory is its own and its seconds hold everything, imports too.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [f"{start}{end}" for start in "ka lo mi ter sa vun pel or".split() for end in "n ra st ing do lus mat".split()]


def make(path: Path, records: int) -> None:
    """Comparisons with a prompt of their own each."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    with path.open("w") as file:
        for number in range(records):
            row = {"prompt": f"{number} {text(28)}?", "chosen": f"{text(18)}.", "rejected": f"{text(18)}."}
            file.write(json.dumps(row) + "\n")


def measure(name: str, arguments: list[str]) -> dict[str, float | str]:
    """Runs one `perlhf` command and says what it took.

    Raises:
        SystemExit: the command failed.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "perlhf", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name}: {errors.decode()}")
    seconds = time.monotonic() - began
    return {
        "name": name,
        "seconds": seconds,
        "processor": used.ru_utime + used.ru_stime,
        "memory": used.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--base", required=True, help="a base of few layers, so that reading is what takes time")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        file, output = Path(directory) / "comparisons.jsonl", Path(directory) / "out"
        make(file, settings.records)
        print(f"{settings.records:,} records, {file.stat().st_size / 1e6:,.0f} MB")
        reward = ["reward", "--base", settings.base, "--data.paths", str(file), "--run", str(output / "run")]
        commands = {
            "data validate": ["data", "validate", str(file)],
            "data split": ["data", "split", str(file), "--output", str(output / "split")],
            "reward --dry-run": [*reward, "--dry-run"],
            "reward, first update": [*reward, "--max-updates", "1", "--validation-examples", "64"],
        }
        print("| command | seconds | of a processor | peak memory |\n|---|---|---|---|")
        for name, arguments in commands.items():
            took = measure(name, arguments)
            print(
                f"| `{name}` | {took['seconds']:.1f} | {took['processor']:.1f} | {took['memory']:,.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
