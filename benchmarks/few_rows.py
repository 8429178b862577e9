"""Linear layers of few rows, as sampling has them: milliseconds for the 210 of a SmolLM2-135M in bfloat16, random
weights, with a low-rank part of rank 16 or without, by our kernel and by torch's operations. Best of `--turns`.
Run: python benchmarks/few_rows.py [--threads 2] [--rows 1 2 4 8 16 32 64] [--turns 5]
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import harness
from perlhf.kernels import cpu

SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
LAYERS, RANK = 30, 16

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Product = Callable[[torch.Tensor, Layer], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = [_layer(*shape) for _ in range(LAYERS) for shape in SHAPES]
    padded = {id(layer): cpu.padded(*layer[1:]) for layer in layers}
    ways: dict[str, Product] = {
        "kernel": lambda x, layer: cpu.linear(x, layer[0]),
        "torch": lambda x, layer: F.linear(x, layer[0]),
        "kernel, low rank": lambda x, layer: cpu.linear(x, layer[0], padded[id(layer)]),
        "torch, low rank": lambda x, layer: F.linear(x, layer[0]).addmm_(x @ layer[1].t(), layer[2].t()),
    }
    print(json.dumps(harness.machine(arguments.threads)))
    print("| rows |", " | ".join(ways), "|")
    print("|---" * (len(ways) + 1) + "|")
    with torch.no_grad(), cpu.sampling():
        for rows in arguments.rows:
            states = {inputs: torch.randn(rows, inputs).bfloat16() for _, inputs in SHAPES}
            assert cpu.few_rows(states[576], layers[0][0]), "no kernel for these here"
            best = dict.fromkeys(ways, float("inf"))
            for _ in range(arguments.turns):
                for name, product in ways.items():
                    began = time.perf_counter()
                    for layer in layers:
                        product(states[layer[0].shape[1]], layer)
                    best[name] = min(best[name], time.perf_counter() - began)
            print(f"| {rows} |", " | ".join(f"{1000 * seconds:.1f}" for seconds in best.values()), "|", flush=True)


def _layer(outputs: int, inputs: int) -> Layer:
    return _random(outputs, inputs), _random(RANK, inputs), _random(outputs, RANK)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


if __name__ == "__main__":
    main()
