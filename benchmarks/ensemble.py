"""What members of an ensemble cost, scored and trained in one pass and in separate ones.

Reward adapters of rank 16 on attention, on the packaged base, in all layers or in the last four. Members score and
learn the same random sequences; each measurement is a process of its own, and both ways take turns. Prints one JSON
line for each number of members: tokens a second (each sequence counted once) and the peak beyond the loaded base.
Run: python benchmarks/ensemble.py [--members 1 4 8] [--layers all last:4] [--lengths 64 1024]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from perlhf.config.stages import DEFAULT_BASE
from perlhf.method.packing import Tokens, pack
from perlhf.model.bases.found import Base
from perlhf.system.machine import peak_memory_bytes, reset_peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--layers", nargs="+", default=["all", "last:4"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1024], help="tokens of the sequence")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(**json.loads(arguments.one))))
        return
    for layers in arguments.layers:
        for length in arguments.lengths:
            for members in arguments.members:
                asked = {"members": members, "layers": layers, "length": length, "turns": arguments.turns}
                found = {}
                for way in ("separate", "together"):
                    command = [sys.executable, __file__, "--one", json.dumps(asked | {"way": way})]
                    found[way] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                print(json.dumps(asked | found), flush=True)


def measure(members: int, layers: str, length: int, turns: int, way: str) -> dict[str, Any]:
    """Medians over the turns, after one that warms up."""
    import torch

    from perlhf.model.model import Model
    from perlhf.rollout.ensemble import member_scores

    model = Model.load(Base.find(DEFAULT_BASE), device="cpu")
    names = [f"reward_{number}" for number in range(members)]
    for number, name in enumerate(names):
        model.add_adapter(name, "reward", rank=16, layers=layers, seed=number)
    ids = torch.randint(5, 40000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = pack([[Tokens(ids)]], "tree")

    def score() -> Any:
        if way == "together":
            return member_scores(model, batch, names)
        return torch.stack([model.scores(batch, name) for name in names])

    def learn() -> None:
        if way == "together":
            member_scores(model, batch, names).sum().backward()
            return
        for name in names:  # as separate runs do: one graph at a time
            model.scores(batch, name).sum().backward()

    def timed(work: Any) -> tuple[float, int]:
        work()
        reset_peak_memory()
        before, seconds = peak_memory_bytes(), []
        for _ in range(turns):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return round(length / statistics.median(seconds), 1), peak_memory_bytes() - before

    with torch.no_grad():
        scored, score_bytes = timed(score)
    learned, learn_bytes = timed(learn)
    return {
        "score_tokens_per_second": scored,
        "learn_tokens_per_second": learned,
        "score_peak_bytes": score_bytes,
        "learn_peak_bytes": learn_bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    main()
