"""Memory of the output head at a large vocabulary: log-probabilities with their gradient, beside all logits at once.

Random states and weights of Gemma 3 270M's head (262,144 tokens, 640 wide). What is counted is resident memory beyond
states and weights, at its peak. Linux only. Run: python benchmarks/head.py
"""

import argparse
import json
import time

VOCAB, HIDDEN = 262_144, 640


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    for tokens in arguments.tokens:
        print(json.dumps(measure(tokens, arguments.dtype)), flush=True)


def measure(tokens: int, dtype: str) -> dict[str, float | int | str]:
    """One pass forward and backward."""
    import torch

    from perlhf.method.logprobs import token_logprobs
    from perlhf.system.machine import peak_memory_bytes, reset_peak_memory

    kind = getattr(torch, dtype)
    weight = torch.randn(VOCAB, HIDDEN, dtype=kind) * 0.02
    states = torch.randn(tokens, HIDDEN, dtype=kind).requires_grad_(True)
    targets = torch.randint(VOCAB, (tokens,))
    reset_peak_memory()
    before, began = peak_memory_bytes(), time.perf_counter()
    logprobs, _ = token_logprobs(states, weight, targets, 0.7)
    logprobs.sum().backward()
    seconds, taken = time.perf_counter() - began, peak_memory_bytes() - before
    return {
        "tokens": tokens,
        "vocab": VOCAB,
        "dtype": dtype,
        "peak_mib": round(taken / 2**20),
        "all_logits_float32_mib": tokens * VOCAB * 4 // 2**20,
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    main()
