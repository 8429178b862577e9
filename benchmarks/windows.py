"""What a window costs, and what it saves: a network of SmolLM2's size with and without one.

Two networks of the same shape with random weights in bfloat16, Llama (full attention) and Mistral (a window), learn the
same rows as a reward adapter: below the window and far beyond it. They take turns, so that what else the machine does
falls on both; a ratio is the median of the turns' ratios. Prints one JSON line for each length.
Run: python benchmarks/windows.py [--window 512] [--lengths 256 512 2048] [--turns 7]
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from perlhf.method.packing import Tokens, pack
from perlhf.model.model import Model

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TOKENS = 2048
"""In one batch, at least."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 2048, 4096])
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    models = {
        "full": _opened(LlamaForCausalLM(LlamaConfig(**SHAPE))),
        "window": _opened(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=arguments.window, head_dim=64))),
    }
    for length in arguments.lengths:
        rows = max(1, TOKENS // length)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(5, SHAPE["vocab_size"], (rows, length), generator=draw).tolist()
        turns: list[dict[str, float]] = []
        for turn in range(arguments.turns + 1):
            names = list(models) if turn % 2 else list(models)[::-1]
            seconds = {name: _seconds(models[name], ids) for name in names}
            if turn:  # the first makes kernels and fills caches
                turns.append(seconds)
        rates = {name: rows * length / statistics.median(turn[name] for turn in turns) for name in models}
        ratio = statistics.median(turn["full"] / turn["window"] for turn in turns)
        said = {f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()}
        print(json.dumps({"length": length, "rows": rows, **said, "window_over_full": round(ratio, 3)}), flush=True)


def _opened(network: Any) -> Model:
    model = Model(network.to(torch.bfloat16), {"name": "random", "sha256": ""})
    assert model.way.packing == "tree"
    adapter = model.add_adapter("reward", "reward", rank=16)
    assert adapter.score_head is not None
    torch.nn.init.normal_(adapter.score_head, std=0.02)
    return model


def _seconds(model: Model, ids: list[list[int]]) -> float:
    batch = pack([[Tokens(row)] for row in ids], "tree", model.device)
    began = time.perf_counter()
    model.scores(batch, "reward").square().sum().backward()
    for parameter in model.adapters["reward"].trainable():
        parameter.grad = None
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
