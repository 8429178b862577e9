"""Kills the labelling page's server at random moments while people answer, and sees that no label is lost or doubled.

    python scripts/soak_labelling.py [--kills 100] [--labellers 8] [--seed 0]

Labellers answer as fast as `perlhf label` lets them, and send an answer again until it is acknowledged. The server gets
SIGKILL within half a second of answers and is started again at the same port. At the end the database is read
without our code: each acknowledged answer must be there once, none twice, none that nobody sent. One line is printed;
the exit code is 1 when anything failed.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "unit"))
SECONDS = 0.5
"""Of answers before a kill, at most."""
ANSWERS = 100
"""That many questions for each kill, more than are answered before it."""


class Server:
    """`perlhf label` in a process of its own, always at the same port."""

    def __init__(self, words: list[str]):
        self._words, self.port = words, 0
        self._process = self._started(0)
        assert self._process.stdout is not None
        address = next(found for line in self._process.stdout if (found := re.match(r"http://\S+:(\d+)/", line)))
        self.port = int(address.group(1))

    def kill(self) -> None:
        """Kills it and starts another."""
        self.stop()
        self._process = self._started(self.port)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _started(self, port: int) -> "subprocess.Popen[str]":
        words = [*self._words, "--port", str(port)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def main() -> int:
    """Exit code: 0 when nothing was lost or doubled."""
    from labelling_load import Load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 100), ("labellers", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        rows = [
            {"prompt": f"prompt {number}", "completions": ["one", "two"]} for number in range(ANSWERS * options.kills)
        ]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["--settings.questions.paths", str(place / "rows.jsonl")]
        server = Server([sys.executable, "-m", "perlhf", "label", str(place / "project"), *given])
        load = Load(server.port, random.Random(options.seed))
        try:
            asyncio.run(load.kill_often(options.labellers, options.kills, server.kill, SECONDS))
        finally:
            server.stop()
        wrong = load.wrong(place / "project" / "labels.sqlite")
    print(
        f"{options.kills} kills, {len(load.acknowledged):,} answers acknowledged, {load.repeated} sent again, "
        f"{time.monotonic() - began:.0f} s: {'; '.join(wrong) or 'none lost, none doubled'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
