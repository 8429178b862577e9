"""How long the labelling page takes to answer: 50 labellers who send 10 answers a second in all.

Starts `perlhf label` on questions of the embedded set, lets labellers answer at their own pace (a Poisson stream each,
the generator included in the load), and prints one JSON line: answers, the rate, and percentiles of the time
from sending an answer to having the next question. Answers are acknowledged after fsync. `--beside` trains a reward
model on one thread meanwhile. With `--explain RUN` labellers ask after every fifth answer what moved that run's score,
which is no part of the times.
Run: python benchmarks/labelling.py [--seconds 60] [--beside] [--explain RUN]
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labellers", type=int, default=50)
    parser.add_argument("--rate", type=float, default=10.0, help="answers a second of all labellers")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--beside", action="store_true", help="a reward model trains meanwhile, on one thread")
    parser.add_argument("--explain", help="a reward run that explains its scores")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        paths = ["--settings.questions.paths", "builtin:coffee-bar/comparison", "builtin:coffee-bar/rating"]
        words = [sys.executable, "-m", "perlhf", "label", str(Path(directory) / "project"), "--port", "0"]
        words += ["--settings.kind", "rating", *paths]
        words += ["--settings.explain", arguments.explain] if arguments.explain else []
        beside = _beside(Path(directory) / "run") if arguments.beside else contextlib.nullcontext()
        with beside, _started(words) as page:
            assert page.stdout is not None
            address = next(found.group() for line in page.stdout if (found := re.match(r"http://\S+", line)))
            times = asyncio.run(_everybody(address, arguments))
    percentiles = {f"p{q}_ms": round(float(np.percentile(times, q)) * 1000, 1) for q in (50, 90, 99, 100)}
    print(json.dumps({"answers": len(times), "rate": round(len(times) / arguments.seconds, 2), **percentiles}))


@contextlib.contextmanager
def _beside(run: Path) -> Iterator[None]:
    """Trains a reward model, which is at its updates when this begins."""
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "coffee-bar" / "reward.yaml"
    words = [sys.executable, "-m", "perlhf", "reward", str(recipe), "--sft", "None", "--epochs", "99"]
    with _started([*words, "--threads", "1", "--run", str(run)]) as training:
        while not (run / "metrics.jsonl").exists():
            assert training.poll() is None
            time.sleep(0.1)
        before = _updates(run)
        yield
        print(json.dumps({"updates_beside": _updates(run) - before}))
        assert training.poll() is None, "it ended before the measurement did"


def _updates(run: Path) -> int:
    return sum('"loss"' in line for line in (run / "metrics.jsonl").read_text().splitlines())


@contextlib.contextmanager
def _started(words: list[str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def _everybody(address: str, arguments: argparse.Namespace) -> list[float]:
    end = time.monotonic() + arguments.seconds
    pause = arguments.labellers / arguments.rate
    every = 5 if arguments.explain else 0
    people = [_labeller(address, number, pause, end, every) for number in range(arguments.labellers)]
    return [one for times in await asyncio.gather(*people) for one in times]


async def _labeller(address: str, number: int, pause: float, end: float, explain_every: int) -> list[float]:
    draw, times = random.Random(number), []
    host = urlsplit(address).netloc
    reader, writer = await asyncio.open_connection(*host.rsplit(":", 1))
    shared = f"Host: {host}\r\nOrigin: http://{host}\r\n"

    async def ask(method: str, path: str, body: str = "", cookie: str = "") -> tuple[dict[str, str], str]:
        head = f"{method} {path} HTTP/1.1\r\n{shared}Cookie: {cookie}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        assert lines[0].split()[1] in ("200", "202", "303"), lines[0]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        return headers, (await reader.readexactly(int(headers["content-length"]))).decode()

    headers, _ = await ask("POST", "/name", f"name=labeller+{number}")
    cookie = headers["set-cookie"].partition(";")[0]
    _, page = await ask("GET", "/", cookie=cookie)
    while (found := re.search(r'data-task=\\?"([\w.]+)', page)) is not None:
        await asyncio.sleep(draw.expovariate(1 / pause))
        if time.monotonic() > end:
            break
        content: dict[str, Any] = {"task": found.group(1), "verdict": draw.choice(["up", "down"]), "seconds": 1.0}
        began = time.perf_counter()
        _, page = await ask("POST", "/answer", json.dumps(content | {"key": f"key of {number}: {len(times)}"}), cookie)
        times.append(time.perf_counter() - began)
        if explain_every and len(times) % explain_every == 0:
            await ask("POST", "/why", "{}", cookie)
    writer.close()
    return times


if __name__ == "__main__":
    main()
