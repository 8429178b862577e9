"""One GPU: reward updates by LoRA and full tuning, and sampling beside transformers' `generate`, at equal sizes.

Prints a table; needs a CUDA device and the packaged base (`perlhf pull`). Run it with nothing else on the device.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from perlhf.config.stages import DEFAULT_BASE
from perlhf.method.packing import Tokens, pack
from perlhf.model.bases.found import Base
from perlhf.model.model import Model
from perlhf.rollout.local import Ends, sample, uniforms

PAIRS, PREFIX, OWN = 8, 150, 60
PROMPTS, SAMPLES, LENGTH = 8, 8, 64


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work` after a warm-up."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def reward(base: str, rank: int, repeats: int) -> dict[str, float]:
    """Forward, backward and AdamW step on pairs that share their prompt; rank 0 is full tuning."""
    torch.cuda.empty_cache()
    model = Model.load(Base.find(base), "auto", "cuda")
    adapter = model.add_adapter("reward_0", "reward", tuning="lora" if rank else "full", rank=rank or 1)
    optimizer = torch.optim.AdamW(adapter.trainable(), lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for _ in range(PAIRS):
        prefix = torch.randint(0, 49000, (PREFIX,), generator=generator).tolist()
        sequences += [prefix + torch.randint(0, 49000, (OWN,), generator=generator).tolist() for _ in range(2)]
    batch = pack([[Tokens(ids)] for ids in sequences], "tree", model.device)

    def update() -> None:
        scores = model.scores(batch, "reward_0")
        (scores[::2] - scores[1::2]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    seconds = timed(update, repeats)
    tokens = PAIRS * (PREFIX + 2 * OWN)
    return {"tokens_per_second": tokens / seconds, "peak_memory_bytes": torch.cuda.max_memory_allocated()}


def sampling(base: str, repeats: int) -> dict[str, float]:
    """Tokens a second of our sampler under an adapter, and of `generate` without one, for as many rows and tokens."""
    model = Model.load(Base.find(base), "auto", "cuda")
    model.add_adapter("policy", "policy", rank=16)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 49000, (PROMPTS, PREFIX), generator=generator).tolist()
    tokens = PROMPTS * SAMPLES * LENGTH
    draws = uniforms(0, 1, list(range(PROMPTS)), SAMPLES, LENGTH)

    def ours() -> None:
        sample(
            model,
            prompts,
            adapter="policy",
            draws=draws,
            ends=Ends([-1]),
            temperature=1.0,
            max_completion_tokens=LENGTH,
        )

    found = {"sampler": tokens / timed(ours, repeats)}
    network: Any = AutoModelForCausalLM.from_pretrained(Base.find(base).directory, dtype=torch.bfloat16)
    network = network.cuda().eval()
    rows = torch.tensor([ids for ids in prompts for _ in range(SAMPLES)]).cuda()

    def theirs() -> None:
        with torch.no_grad():
            network.generate(inputs=rows, do_sample=True, top_k=0, min_new_tokens=LENGTH, max_new_tokens=LENGTH)

    return found | {"generate": tokens / timed(theirs, min(2, repeats))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEFAULT_BASE, help="the frozen network")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions of each")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "reward": {rank: reward(arguments.base, rank, arguments.repeats) for rank in (0, 16, 8, 4, 1)},
        "sampling_tokens_per_second": sampling(arguments.base, arguments.repeats),
    }
    print(json.dumps(found, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
