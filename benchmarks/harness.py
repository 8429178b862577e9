"""Side-by-side measurements: every repetition runs in a process of its own, and the sides alternate.

A side is a function that sets itself up, works once to warm up, and returns how much it did in how many seconds. Its
process reports that and its peak memory; medians over the repetitions are compared. All sides run under the allocator
that perlhf's command would take (`perlhf.allocator`); further sides, shown beside the first two, run once.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perlhf.system import before_torch
from perlhf.system.machine import version

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True)
class Work:
    """What one side did after it had warmed up."""

    amount: float
    """In the benchmark's unit, without "/s"."""
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """One row of the table. The first side is ours, the second the peer; more are shown beside them."""

    name: str
    unit: str
    sides: dict[str, Callable[[], Work]]
    once: bool = False
    """For peak memory alone, which repeats itself: no repetitions."""


def main(benchmarks: Sequence[Benchmark], description: str | None) -> None:
    """Command line of a benchmark program: measures all of `benchmarks`, prints one JSON line each, then a table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=", ".join(b.name for b in benchmarks) + "; all if none"
    )
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of which medians are taken (default: 3)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--output", type=Path, help="JSON file that gets the list of results")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = {benchmark.name: benchmark for benchmark in benchmarks}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(known)}")
    chosen = [known[name] for name in arguments.names] or list(benchmarks)
    if arguments.side:
        print(json.dumps(_work(chosen[0], arguments.side, arguments.threads)))
        return
    results = []
    for benchmark in chosen:
        results.append(measure(benchmark, arguments.repeats, arguments.threads))
        print(json.dumps(results[-1]), flush=True)
    print(table(results))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def measure(benchmark: Benchmark, repeats: int, threads: int | None) -> dict[str, Any]:
    """Medians of each side, and how ours compares with the second: speed-up and share of its memory."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in benchmark.sides}
    repeats = 1 if benchmark.once else repeats
    for number in range(repeats):
        for place, side in enumerate(benchmark.sides):
            if number and place > 1:
                continue
            began = time.perf_counter()
            found[side].append(_in_process(benchmark.name, side, threads))
            rate = found[side][-1]["rate"]
            took = time.perf_counter() - began
            print(
                f"{benchmark.name} {number + 1}/{repeats}: {side} {rate:.3g} {benchmark.unit} ({took:.0f} s)",
                file=sys.stderr,
            )
    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in ("rate", "seconds", "peak_memory_bytes")}
        | {"rates": [run["rate"] for run in runs], **runs[-1]["details"]}
        for side, runs in found.items()
    }
    ours, *others = medians.values()
    peer = others[0] if others else None
    return {
        "name": benchmark.name,
        "ours": ours["rate"],
        "peer": peer and peer["rate"],
        "unit": benchmark.unit,
        "speedup": peer and ours["rate"] / peer["rate"],
        "memory_ratio": peer and ours["peak_memory_bytes"] / peer["peak_memory_bytes"],
        "sides": medians,
        "machine": machine(threads),
        "versions": found[next(iter(found))][0]["versions"],
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row a side."""
    lines = ["| benchmark | side | rate | peak memory | times the peer | share of its memory |", "|---" * 6 + "|"]
    for result in results:
        for number, (side, values) in enumerate(result["sides"].items()):
            own = number == 0 and result["peer"] is not None
            compared = f"{result['speedup']:.2f} | {result['memory_ratio']:.0%}" if own else " | "
            lines.append(
                f"| {result['name']} | {side} | {values['rate']:.3g} {result['unit']} | "
                f"{values['peak_memory_bytes'] / 1e9:.2f} GB | {compared} |"
            )
    return "\n".join(lines)


def machine(threads: int | None) -> dict[str, Any]:
    """Processor, cores, memory and threads."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "threads": threads or os.cpu_count(),
        "allocator": before_torch.expected(),
    }


def versions() -> dict[str, str | None]:
    """Of the packages that are compared; None where one isn't installed."""
    return {package: version(package) for package in PACKAGES}


def data_root() -> Path:
    """The real feedback files: $PERLHF_DATA, else `../shared/data` beside the repository."""
    root = Path(os.environ.get("PERLHF_DATA") or REPOSITORY.parent / "shared" / "data")
    if not root.is_dir():
        sys.exit(f"error: no feedback files at {root}\n  try: set PERLHF_DATA to where `perlhf data pull` put them")
    return root


def _work(benchmark: Benchmark, side: str, threads: int | None) -> dict[str, Any]:
    import torch

    from perlhf.system.machine import peak_memory_bytes

    if threads:
        torch.set_num_threads(threads)
    os.environ["PERLHF_DATA"] = str(data_root())
    work = benchmark.sides[side]()
    return asdict(work) | {
        "rate": work.amount / work.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
    }


def _in_process(name: str, side: str, threads: int | None) -> dict[str, Any]:
    words = [sys.executable, sys.argv[0], name, "--side", side, *(["--threads", str(threads)] if threads else [])]
    preloaded = before_torch.find(os.environ)
    environment = os.environ | (before_torch.variables(preloaded) if preloaded else {})
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(
            f"error: {name}, side {side}, ended with {done.returncode}:\n{done.stderr[-4000:]}{done.stdout[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])
