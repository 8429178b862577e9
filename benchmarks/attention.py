"""Times attention over a prefix tree, forward and backward, for nodes and paths of several lengths.

Each row is one node of SmolLM2-135M's shape (9 heads, 3 for keys, width 64) in the given dtype: our own kernel beside
torch's attention under a mask, which is what runs where none is compiled. Medians of the repeats; the ways alternate.
Prints one JSON line, then a table.
Run: python benchmarks/attention.py --threads 1
"""

import argparse
import json
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from perlhf.kernels import cpu
from perlhf.kernels.attention.tree_attention import Tree, tree_attention
from perlhf.method.packing import Node

HEADS, KV_HEADS, WIDTH = 9, 3, 64
SHAPES = [(2048, 0), (1024, 0), (300, 0), (100, 0), (30, 0), (100, 400), (30, 400), (30, 1000), (300, 300), (300, 1000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--repeats", type=int, default=5, help="times of which the median is taken")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of queries, keys, values")
    arguments = parser.parse_args()
    if cpu.library() is None:
        parser.error(f"the kernels are {cpu.state()}")
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    rows = [measure(length, past, dtype, arguments.repeats) for length, past in SHAPES]
    rates = {name: matmul_rate(getattr(torch, name)) for name in ("bfloat16", "float32")}
    print(json.dumps({"threads": arguments.threads, "dtype": arguments.dtype, "gflops": rates, "milliseconds": rows}))
    print(f"matmul (2048 x 576 x 1536): {rates['bfloat16']:.0f} GFLOP/s bfloat16, {rates['float32']:.0f} float32")
    names = [name for name in rows[0] if name not in ("length", "past")]
    print("| new tokens | path before |", " | ".join(names), "|")
    print("|---" * (2 + len(names)) + "|")
    for row in rows:
        print(f"| {row['length']} | {row['past']} |", " | ".join(f"{row[name]:.2f}" for name in names), "|")


def measure(length: int, past: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median milliseconds of each way's forward and backward."""
    total = length + past
    tensors = [torch.randn(heads, total, WIDTH).to(dtype).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    upper = torch.full((length, length), -torch.inf).triu(1)
    mask = torch.cat([torch.zeros(length, past), upper], 1).to(dtype)
    grad = torch.randn(HEADS, length, WIDTH).to(dtype)

    tree = Tree([Node(past, length, ((0, past),) if past else ())])

    def native() -> Tensor:
        return tree_attention(tensors[0], tensors[1], tensors[2], tree, WIDTH**-0.5)[:, past:]

    def masked() -> Tensor:
        query, key, value = (tensor[None] for tensor in tensors)
        return F.scaled_dot_product_attention(query[:, :, past:], key, value, mask, enable_gqa=True)[0]

    ways = {"kernel": native, "masked": masked}
    found: dict[str, list[float]] = {f"{name} {part}": [] for name in ways for part in ("forward", "backward")}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            out = way()
            middle = time.perf_counter()
            out.backward(grad)
            found[f"{name} forward"].append(1e3 * (middle - began))
            found[f"{name} backward"].append(1e3 * (time.perf_counter() - middle))
    return {"length": length, "past": past, **{name: statistics.median(times) for name, times in found.items()}}


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of one linear layer of the base, best of several."""
    x, weight = torch.randn(2048, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        F.linear(x, weight)
        seconds.append(time.perf_counter() - began)
    return 2 * 2048 * 576 * 1536 / min(seconds) / 1e9


if __name__ == "__main__":
    main()
