"""One GPU: attention over packs, reward and policy updates, and the sampler, beside TRL, PEFT and `generate`.

Every row is kept in --output as soon as it is finished, and isn't run again: the same command goes on where it was
stopped. Rows run in processes of their own by network and side, most important ones first; one that fails or runs out
of memory is kept as that, with its message, and the others go on. What doesn't fit in --minutes is told as not run.

    card        a large product and a large copy: what rates below are shares of
    attention   forward and backward of packs of 2k, 8k and 32k distinct tokens, Qwen3-0.6B's shape: under a mask, by
                FlexAttention (`flex`), and in padded rows by PEFT (`peer`)
    reward      updates on 16 comparisons; policy: steps of 64 completions of 64 tokens, sampled, scored, learned from,
                leave-one-out, or with a value adapter (`value`). Shapes of Qwen3-0.6B, 1.7B and 4B, random weights.
                Peers: TRL, or PEFT with the same loss where TRL isn't importable; activations are recomputed only in
                the rows called so
    sampler     64 and 256 rows, Qwen3-1.7B's shape, adapter unmerged, beside `generate`

Needs a CUDA device, perlhf's dependencies, nothing from the network and nothing else on the device. Peers need PEFT,
and TRL where it is wanted: pip install --no-deps --target build/peers peft trl, then PYTHONPATH=build/peers. --tiny
runs every row in tiny shapes on a CPU, FlexAttention step by step, to test the script: its times mean nothing.

Run: python benchmarks/gpu.py --output benchmarks/gpu.json
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # where only perlhf's dependencies are installed

from perlhf.system import machine
from perlhf.system.files import read_json, write_json

Row = dict[str, Any]
MARK = "ROW "
"""Begins the lines of a process that are rows; libraries print others."""
ROW_SECONDS = 150
"""No row may take longer, the start of its process included."""
LEAST_SECONDS = 15
"""With less left no process is begun: so long takes its start alone."""
PEERS = ("peer", "recomputing")
"""Sides that need PEFT."""


def _named(kinds: str, *sides: str) -> tuple[str, ...]:
    return tuple(f"{kind}/{side}" for kind in kinds.split() for side in sides)


PROCESSES: tuple[tuple[str, ...], ...] = (
    (
        *("card", "reward/1.7b/mask", "reward/1.7b/flex", "policy/1.7b/mask", "policy/1.7b/flex", "policy/1.7b/value"),
        *_named("sampler/64 sampler/256", "ours"),
    ),
    (*_named("reward/1.7b policy/1.7b", "peer"), "sampler/64/generate"),
    (*_named("attention/8k attention/32k attention/2k", "mask", "flex"),),
    (*_named("attention/8k attention/32k attention/2k", "peer"),),
    ("reward/4b/mask", "reward/4b/flex", "policy/4b/mask", "policy/4b/flex", "policy/4b/value"),
    (*_named("reward/4b policy/4b", "peer"),),
    ("reward/0.6b/mask", "reward/0.6b/flex", "policy/0.6b/mask", "policy/0.6b/flex", "policy/0.6b/value"),
    (*_named("reward/0.6b policy/0.6b", "peer"),),
    (*_named("reward/1.7b reward/4b", "recomputing"), "sampler/256/generate"),
)
"""Names of rows, `kind/size/side`: those of one process share a network. Most important first."""
ORDER: tuple[str, ...] = (
    *("attention", "reward", "policy", "sampler", "2k", "8k", "32k", "0.6b", "1.7b", "4b", "64", "256"),
    *("mask", "flex", "value", "ours", "peer", "recomputing", "generate"),
)
"""Of the table."""
NAMES = tuple(name for names in PROCESSES for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "only", nargs="*", metavar="NAME", help="rows that begin so, such as reward or policy/4b; all if none"
    )
    parser.add_argument("--output", type=Path, help="JSON that keeps the rows; without it nothing is kept")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all rows; 0 prints what there is (default: 8)")
    parser.add_argument("--again", action="store_true", help="run rows that are there anew, those that failed too")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU: tests the script")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        compute(arguments.only, arguments.tiny)
        return
    if unknown := [only for only in arguments.only if not any(name.startswith(only) for name in NAMES)]:
        parser.error(f"no row begins with {unknown[0]}; there are {', '.join(NAMES)}")
    until = time.monotonic() + 60 * arguments.minutes
    kept = read_json(arguments.output) if arguments.output and arguments.output.exists() else {}
    device = _device(arguments.tiny) if arguments.minutes else kept.get("device", "")
    if not device and arguments.minutes:
        parser.error("torch finds no CUDA device; --tiny runs tiny shapes on a CPU, --minutes 0 prints what there is")
    if kept.get("device", device) != device:
        parser.error(f"{arguments.output} holds rows of {kept['device']}, and this is {device}: try another --output")
    kept = {"device": device, "rows": {}} | kept
    wanted = [name for name in NAMES if not arguments.only or name.startswith(tuple(arguments.only))]
    run(wanted, kept, arguments, until)
    print(table(kept["rows"], device))
    for why in sorted({*kept["not_run"].values()}):
        print(f"not run, {why}: {', '.join(name for name, reason in kept['not_run'].items() if reason == why)}")


def run(wanted: Sequence[str], kept: Row, arguments: argparse.Namespace, until: float) -> None:
    """Runs the wanted rows that aren't kept yet, as long as there is time, and keeps each as it is finished."""
    rows = kept["rows"]
    todo = [name for name in wanted if arguments.again or name not in rows]
    without_peft = find_spec("peft") is None
    lacking = [name for name in todo if without_peft and name.endswith(PEERS)]
    for names in (NAMES,) if arguments.tiny else PROCESSES:
        own = [name for name in names if name in todo and name not in lacking]
        command = [sys.executable, __file__, "--process", *(["--tiny"] if arguments.tiny else [])]
        for row in rows_of(own, command, until, _environment(arguments.tiny)):
            rows[row["name"]] = row
            todo.remove(row["name"])
            print(f"{row['name']}: {_said(row)}", file=sys.stderr, flush=True)
            _keep(kept, arguments.output)
    why = dict.fromkeys(todo, "no time was left") | dict.fromkeys(lacking, "PEFT isn't importable")
    kept["not_run"] = {name: why.get(name, "not asked for") for name in NAMES if name not in rows}
    _keep(kept, arguments.output)


def _keep(kept: Row, output: Path | None) -> None:
    if output:
        write_json(output, kept)


def rows_of(
    names: Sequence[str], command: Sequence[str], until: float, environment: dict[str, str], limit: float = ROW_SECONDS
) -> Iterator[Row]:
    """Rows of `command NAME...` as they are finished. Where the process ends before a row is, that row has failed, and
    another process goes on with the next one; at `until` it is ended, and the row that it was at isn't told.

    Args:
        until: as time.monotonic() tells it.
        limit: seconds of one row.
    """
    left = list(names)
    while left and until - time.monotonic() > LEAST_SECONDS:
        began = time.monotonic()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            for row in _of_process([*command, *left], environment, said, until, limit):
                left.remove(row["name"])
                yield row | {"row_seconds": round(time.monotonic() - began, 1)}
                began = time.monotonic()
                if not left:
                    return
            said.seek(0)
            errors = said.read()[-4000:]
        if time.monotonic() >= until:
            return
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), "it ended without a word")
        status = "out of memory" if "OutOfMemoryError" in errors or "out of memory" in last else "failed"
        if time.monotonic() - began >= limit:
            last = f"it took longer than {limit:g} seconds"
        yield {"name": left.pop(0), "status": status, "message": last[:400], "errors": errors}


def _of_process(
    command: Sequence[str], environment: dict[str, str], said: IO[str], until: float, limit: float
) -> Iterator[Row]:
    """Rows that a process prints, until it ends, the time is up, or one took too long; then it is ended."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read(output: IO[str]) -> None:
        with output:
            for line in output:
                lines.put(line)

    # A session of its own, so that what it started ends with it (torch.compile has workers).
    started = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
    )
    assert started.stdout is not None
    reader = threading.Thread(target=read, args=[started.stdout], daemon=True)
    reader.start()
    try:
        yield from _read(started, lines, until, limit)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        reader.join(timeout=5)


def _read(
    started: "subprocess.Popen[str]", lines: "queue.SimpleQueue[str]", until: float, limit: float
) -> Iterator[Row]:
    """The rows among its lines, until it ends. What it started may outlive it and keep its output open."""
    over, ended = time.monotonic() + limit, False
    while (left := min(until, over) - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=min(1.0, left))
        except queue.Empty:
            if ended:
                return
            ended = started.poll() is not None
            continue
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))
            over = time.monotonic() + limit


def _environment(tiny: bool) -> dict[str, str]:
    """Nothing is downloaded; on a CPU none of our own kernels, so that mask and FlexAttention are what is computed."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | offline | ({"PERLHF_KERNELS": "off", "CUDA_VISIBLE_DEVICES": ""} if tiny else {})


def _device(tiny: bool) -> str:
    """Of torch, asked in another process: this one takes no memory there. Empty without one."""
    if tiny:
        return "CPU, tiny shapes"
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


# ---- in the process that computes ------------------------------------------------------------------------------------


def compute(names: Sequence[str], tiny: bool) -> None:
    """Prints each row. One that fails is told, and the next one follows, unless the device is left as nobody knows."""
    import torch

    import gpu_ours

    sizes = gpu_ours.TINY if tiny else gpu_ours.Sizes()
    known = machine.environment()
    stamp = {"device": _device(True) if tiny else torch.cuda.get_device_name(), "commit": known["commit"]}
    stamp |= {"uncommitted_changes": known["uncommitted_changes"], "torch": torch.__version__}
    loaded: dict[str, Any] = {}
    for name in names:
        try:
            found = {"status": "done"} | _row(name, sizes, loaded)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
                raise
            found = {"status": "failed", "message": f"{type(error).__name__}: {error}"[:400]}
        for model in loaded.values():
            gpu_ours.drop_adapters(model)
        gpu_ours.free()
        print(MARK + json.dumps({"name": name} | found | stamp), flush=True)


def _row(name: str, sizes: Any, loaded: dict[str, Any]) -> Row:
    """Computes one row. `loaded` keeps the network of the row before, for the next one of the same shape."""
    import gpu_ours

    if name == "card":
        return gpu_ours.card(sizes)
    kind, size, side = name.split("/")
    shape = {"attention": "0.6b", "sampler": "1.7b"}.get(kind, size)
    if side in (*PEERS, "generate"):
        loaded.clear()
        gpu_ours.free()
        return _peer(kind, size, side, sizes)
    if shape not in loaded:
        loaded.clear()
        gpu_ours.free()
        loaded[shape] = gpu_ours.load(shape, sizes)
    if kind == "sampler":
        return gpu_ours.sampler(loaded[shape], _rows_of_sampler(size, sizes), sizes)
    if kind == "attention":
        return gpu_ours.attention(loaded[shape], size, side, sizes)
    work: dict[str, Callable[..., Row]] = {"reward": gpu_ours.reward, "policy": gpu_ours.policy}
    return work[kind](loaded[shape], side, sizes)


def _peer(kind: str, size: str, side: str, sizes: Any) -> Row:
    import gpu_peers

    if kind == "sampler":
        return gpu_peers.generate(_rows_of_sampler(size, sizes), sizes)
    if kind == "attention":
        return gpu_peers.attention(size, sizes)
    if kind == "reward":
        return gpu_peers.reward(size, sizes, recomputing=side == "recomputing")
    return gpu_peers.policy(size, sizes)


def _rows_of_sampler(size: str, sizes: Any) -> int:
    """Of 64 or 256 with eight completions a prompt; fewer where a prompt has fewer."""
    return int(size) // 8 * sizes.completions


# ---- what is told ----------------------------------------------------------------------------------------------------

GOALS = {"times": "3", "memory": "33 %", "matmul": "0.5", "graphs": "0"}
"""Beside peers at 1.7B and 4B; of the card's matmul rate in reward training; compiled anew after the first update."""


def table(rows: dict[str, Row], device: str) -> str:
    """Markdown: the rows that there are, beside their peers, and `not measured` for those that aren't there."""
    card = rows.get("card", {"status": "not measured"})
    if card["status"] == "done":
        flops, copied = card["matmul_flops_per_second"] / 1e12, card["bytes_per_second"] / 1e9
        said = f"matmul {flops:.3g} TFLOP/s, copies {copied:.3g} GB/s"
    else:
        said = f"matmul and copies {_said(card)}"
    columns = ["row", "seconds", "sample, score, learn", "tokens/s", "peak memory", "times the peer"]
    columns += ["share of its memory", "share of the card", "graphs compiled", "goals"]
    lines = [f"{device or 'No device'}: {said}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in sorted(NAMES[1:], key=lambda name: [ORDER.index(word) for word in name.split("/")]):
        row = rows.get(name, {"status": "not measured"})
        if row["status"] != "done":
            lines.append(f"| {name} | {_said(row)} |{' |' * 7} {_goals(name)} |")
            continue
        kind = "/".join(name.split("/")[:2])
        peer = rows.get(f"{kind}/{'generate' if kind.startswith('sampler') else 'peer'}", {})
        cells = [name, _number(row["seconds"]), _split(row), _number(row["tokens"] / row["seconds"])]
        cells += [f"{row['peak_memory_bytes'] / 1e9:.2f} GB", *_beside(name, row, peer), _share(row, card)]
        lines.append("| " + " | ".join([*cells, _compiled(name, row), _goals(name)]) + " |")
    return "\n".join(lines)


def _said(row: Row) -> str:
    if row["status"] == "done":
        return f"{row['seconds']:.3g} s ({row['row_seconds']:g} s in all)"
    return row["status"] + (f": {row['message']}".replace("|", "/").replace("\n", " ") if "message" in row else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _split(row: Row) -> str:
    parts = [row.get(f"seconds_{part}") for part in ("sample", "score", "learn")]
    return "" if None in parts else ", ".join(f"{part:.3g}" for part in parts if part is not None)


def _beside(name: str, row: Row, peer: Row) -> list[str]:
    """How often as fast as the peer on the same work, and the share of its memory; a peer's own row says who it is."""
    if name.endswith((*PEERS, "generate")):
        return [row["peer"], ""]
    if name.endswith("value"):
        return ["no such peer", ""]
    if peer.get("status") != "done":
        return ["not measured", "not measured"]
    return [
        f"{peer['seconds'] / row['seconds']:.2f}",
        f"{100 * row['peak_memory_bytes'] / peer['peak_memory_bytes']:.0f} %",
    ]


def _share(row: Row, card: Row) -> str:
    """Of the card's matmul rate in training, of its memory bandwidth in a step of the sampler."""
    if "matmul_flops" in row and card.get("status") == "done":
        return f"{row['matmul_flops'] / row['seconds'] / card['matmul_flops_per_second']:.2f} of matmul"
    if "bytes_of_a_step" in row and card.get("status") == "done":
        step = max(row["seconds_of_a_step"], 1e-9)
        return f"{row['bytes_of_a_step'] / step / card['bytes_per_second']:.2f} of bandwidth"
    return ""


def _compiled(name: str, row: Row) -> str:
    """Graphs that the first update compiled, and all later ones."""
    graphs = row.get("graphs_by_update") if name.endswith("flex") else None
    return "" if graphs is None else f"{graphs[0]}, then {sum(graphs[1:])}"


def _goals(name: str) -> str:
    goals: list[str] = []
    ours, large = name.endswith(("mask", "flex")), "/1.7b/" in name or "/4b/" in name
    if ours and large:
        goals += [f"{GOALS['times']} times", GOALS["memory"]]
    if ours and name.startswith("reward"):
        goals.append(f"{GOALS['matmul']} of matmul")
    if name.endswith("flex"):
        goals.append(f"then {GOALS['graphs']}")
    return ", ".join(goals)


if __name__ == "__main__":
    main()
