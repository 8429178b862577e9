"""Writes tests/golden anew: the first updates of each stage on the tiny base.

    python scripts/update_golden.py "why the numbers moved"

The reason and the versions are recorded in the files. The recipe tests compare with them.
"""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    """Runs the tests that own the files, with the option that makes them write; returns an exit code."""
    if len(arguments) != 1 or not arguments[0].strip():
        print('usage: update_golden.py "why the numbers moved"', file=sys.stderr)
        return 2
    tests = str(REPOSITORY / "tests" / "recipes" / "test_stages.py")
    selected = ["-q", "-k", "test_first_updates_are_as_recorded", f"--update-golden={arguments[0]}"]
    return subprocess.run([sys.executable, "-m", "pytest", tests, *selected], cwd=REPOSITORY).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
