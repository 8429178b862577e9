"""The most memory that each of several workers takes for a base in parts, beside a base that each holds whole.

Writes random weights of a known shape, then starts the workers, which load the base, add an adapter and do what stages
do: a pass with its gradient, and a few sampled tokens. One JSON line a phase, with what the largest worker took above
what it had before loading, in units of the base's weights:

    resident   most of its memory that lay in the machine (VmHWM), pages of mapped files among it
    held       what is left once the phase is over: the base, or its part, and the adapter

The weights may be stored in another dtype than they are used in (`--stored`). Linux only.
Run: python benchmarks/sharded.py --shape 1.7b --shard none full
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from loading import SHAPES, write

PHASES = ("load", "learn", "sample")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.7b")
    parser.add_argument("--stored", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="in which they are used")
    parser.add_argument("--shard", choices=("none", "full"), nargs="+", default=["none", "full"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="of each pass")
    parser.add_argument("--directory", type=Path, help="where the weights are written (default: a temporary one)")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.base:
        measure(Path(arguments.base), arguments.dtype, arguments.shard[0], arguments.tokens)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as made:
        write(Path(made) / "base", SHAPES[arguments.shape], arguments.stored)
        for shard in arguments.shard:
            found = run(arguments, made, shard)
            about = {"shape": arguments.shape, "stored": arguments.stored, "dtype": arguments.dtype, "shard": shard}
            for phase in PHASES:
                lines = [line[phase] for line in found]
                most = {name: max(line[name] for line in lines) for name in lines[0]}
                print(json.dumps(about | {"workers": len(found), "phase": phase} | most), flush=True)


def run(arguments: argparse.Namespace, made: str, shard: str) -> list[dict[str, Any]]:
    """What each worker says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--base", str(Path(made) / "base"), "--shard", shard]
    command += ["--dtype", arguments.dtype, "--tokens", str(arguments.tokens)]
    count = arguments.workers
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PERLHF_CACHE": str(Path(made) / "cache")}
    started = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=None if number else subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    text = started[0].communicate()[0]
    assert not any(process.wait() for process in started), "a worker failed"
    return json.loads(text.splitlines()[-1])


def measure(directory: Path, dtype: str, how: Any, tokens: int) -> None:
    """As one of the workers; the first prints what all say."""
    import torch

    from perlhf.method.packing import Tokens, batches
    from perlhf.model.bases.found import Base
    from perlhf.model.model import Model
    from perlhf.parallel.shard import shards_of
    from perlhf.parallel.together import together
    from perlhf.rollout.local import Ends, sample
    from perlhf.system.machine import peak_memory_bytes, reset_peak_memory

    with together() as workers:
        workers.sum(torch.zeros(1))
        shards = shards_of(how, workers, torch.device("cpu"))
        if shards is not None:
            shards.spread(torch.nn.Linear(2, 2))  # what FSDP imports isn't the base's
        base, before, said = Base(directory), resident(), dict[str, Any]()
        assert base.fingerprint["sha256"]

        def phase(name: str, work: Callable[[], Any]) -> Any:
            workers.wait()
            reset_peak_memory()
            done = work()
            said[name] = {"resident": peak_memory_bytes() - before, "held": resident() - before}
            return done

        model = phase("load", lambda: Model.load(base, dtype, "cpu", shards=shards))
        size = sum(parameter.numel() for parameter in model.base.parameters()) * model.dtype.itemsize
        model.add_adapter("policy", "policy", rank=16)
        generator = torch.Generator().manual_seed(workers.number)
        ids = torch.randint(2, 1000, (tokens,), generator=generator).tolist()
        (batch,) = batches([[Tokens(ids, ((tokens // 2, tokens - tokens // 2),))]], tokens, "tree", "cpu")
        phase("learn", lambda: model.logprobs(batch, "policy").logprobs.sum().backward())
        options: dict[str, Any] = {"draws": torch.rand(2, 3, generator=generator, dtype=torch.float64)}
        options |= {"ends": Ends([1]), "temperature": 1.0, "max_completion_tokens": 3}
        phase("sample", lambda: sample(model, [ids[:64]], adapter="policy", **options))
        own = [[round(number / size, 3) for number in line.values()] for line in said.values()]
        found = workers.gather(torch.tensor(own, dtype=torch.float64).reshape(-1))
        if workers.first:
            names = ("resident", "held")
            parts = [dict(zip(PHASES, part.view(-1, 2).tolist(), strict=True)) for part in found]
            print(json.dumps([{p: dict(zip(names, n, strict=True)) for p, n in part.items()} for part in parts]))


def resident() -> int:
    """This process's memory that lies in the machine now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


if __name__ == "__main__":
    main()
