"""What bases cost beside one another: tokens per second of one core, and the peak of the output head.

    python benchmarks/bases.py smollm2-135m-instruct-q4_1 path/to/gemma-3-270m-q4_k_m.gguf

Six answers in a coffee bar with rank 8 on all layers: forward and backward of their scores (reward) and of their
log-probabilities (sft), and twelve tokens for each of eight completions. Seconds are the process's CPU time on one
thread, so that a busy machine changes them little; the second of two runs counts. One JSON line for each base.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from perlhf.method.logprobs import token_logprobs
from perlhf.method.packing import completed, pack
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer
from perlhf.model.model import Model
from perlhf.rollout.local import Ends, sample

PROMPT = (
    "user: Hi, I would like a latte please, with oat milk.\nassistant: Sure, a latte with oat milk. What size would "
    "you like, and is it for here or to go?\nuser: A small one to go, and a blueberry muffin, {} of them.\nassistant:"
)
ANSWER = " Alright, a small oat latte to go and {} blueberry muffins. Would you like anything else with that?"
COMPLETIONS, NEW_TOKENS, HEAD_TOKENS = 8, 12, 256


def measured(name: str) -> dict[str, Any]:
    """Tokens, rates and the head's peak of one base."""
    base = Base.find(name)
    tokenizer: Any = load_tokenizer(base)
    model = Model.load(base, dtype="bfloat16", device="cpu")
    model.add_adapter("reward", "reward", rank=8, targets="all")
    model.add_adapter("sft", "sft", rank=8, targets="all")
    prompts = [tokenizer(PROMPT.format(number)).input_ids for number in range(6)]
    answers = [tokenizer(ANSWER.format(number), add_special_tokens=False).input_ids for number in range(6)]
    batch = pack([[completed(*pair)] for pair in zip(prompts, answers, strict=True)], "none")
    tokens = sum(map(len, prompts + answers))
    draws = torch.rand(COMPLETIONS, NEW_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    settings: Any = {"adapter": "sft", "ends": Ends(()), "temperature": 1.0, "max_completion_tokens": NEW_TOKENS}
    reward = cpu_seconds(lambda: model.scores(batch, "reward").sum().backward())
    sft = cpu_seconds(lambda: model.logprobs(batch, "sft").logprobs.sum().backward())
    sampled = cpu_seconds(lambda: sample(model, prompts[:4], draws=draws, **settings))
    return {
        "base": name,
        "tokens": tokens,
        "reward_tokens_per_cpu_second": tokens / reward,
        "sft_tokens_per_cpu_second": tokens / sft,
        "sampled_tokens_per_cpu_second": COMPLETIONS * NEW_TOKENS / sampled,
        "head_peak_bytes": head_peak(model.base.get_output_embeddings()),
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of the second of two runs."""
    work()
    began = time.process_time()
    work()
    return time.process_time() - began


def head_peak(head: Any) -> int:
    """Bytes that log-probabilities of 256 tokens and their gradient take at their peak, beyond what is there."""
    vocab, hidden = head.weight.shape
    states = torch.randn(HEAD_TOKENS, hidden, dtype=head.weight.dtype).requires_grad_()
    targets = torch.arange(HEAD_TOKENS) % vocab
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
    before = _peak()
    token_logprobs(states, head.weight, targets, 1.0)[0].sum().backward()
    return _peak() - before


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for named in sys.argv[1:]:
        print(json.dumps(measured(named)), flush=True)
