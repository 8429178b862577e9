"""Memory and time that `perlhf plan` tells, beside what runs take: planned, measured, and their ratio.

Writes random weights of a known shape with the packaged base's tokenizer, trains SFT, reward and policy on the embedded
feedback for a few updates with one worker and with several, each one in a fresh process, and reads the peak of resident
memory of every worker (VmHWM, mapped weights included). The 7B shape doesn't fit twice: one policy step, with weights
made in place. Linux only. Run: python benchmarks/plan.py --shapes 0.1b 1.7b --workers 1 2
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

import loading
from loading import SHAPES, write
from perlhf.config.stages import DEFAULT_BASE
from perlhf.system import before_torch

BENCH = Path(__file__).with_name("bench.json")
STAGES = ("sft", "reward", "policy")
PROMPT_TOKENS, COMPLETION_TOKENS = 45, 20
"""Of the embedded feedback, about."""
COMMON = "--device cpu --dtype bfloat16 --checkpoint-every 1000 --validate-every 1000 --data.limit 64".split()


def options_of(stage: str, examples: int, tokens: int, recompute: str) -> list[str]:
    """A short run: few updates, of few tokens."""
    if stage == "policy":
        half = max(2, examples // 2)
        own = f"--updates 2 --value.warmup-updates 0 --prompts-per-update {half} --completions-per-prompt {half}"
        own += f" --max-completion-tokens {tokens // 16} --centre-prompts {half} --validation-prompts {half}"
    else:
        own = f"--max-updates 3 --validation-examples 2 --examples-per-update {examples}"
    again = [] if recompute == "never" else ["--recompute", recompute]
    return [*COMMON, *own.split(), "--encoding.max-tokens", str(tokens), "--tokens-per-microbatch", str(tokens), *again]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=["0.1b", "1.7b"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--tokens", type=int, default=512, help="of the longest sequence, and of a micro-batch")
    parser.add_argument(
        "--examples", type=int, default=8, help="of an update; half as many prompts, and completions each"
    )
    parser.add_argument(
        "--directory", type=Path, help="where weights are kept for the next time, and runs written for this one"
    )
    parser.add_argument("--recompute", choices=("never", "always"), default="never", help="of layers")
    parser.add_argument("--kept", action="store_true", help="the peaks of benchmarks/bench.json, another machine")
    parser.add_argument("--step", choices=("1_7b", "7b"), help="one policy step alone, weights made in memory")
    arguments = parser.parse_args()
    size = arguments.examples, arguments.tokens, arguments.recompute
    if arguments.kept:
        for row in kept():
            print(json.dumps(row))
        return
    if arguments.step:
        print(json.dumps(step_in_place(arguments.step)))
        return
    for shape in arguments.shapes:
        if shape == "7b":
            subprocess.run([sys.executable, __file__, "--step", "7b"], env=under_allocator(), check=True)
            continue
        with tempfile.TemporaryDirectory(dir=arguments.directory) as made:
            place, base = Path(made), (arguments.directory or Path(made)) / f"base-{shape}"
            if not base.exists():
                write_base(base, shape)
            for workers in arguments.workers:
                for stage in arguments.stages:
                    print(
                        json.dumps(compare(stage, shape, workers, base, place, size)),
                        flush=True,
                    )


def write_base(directory: Path, shape: str) -> None:
    """Random weights in bfloat16, with the packaged base's tokenizer."""
    from perlhf.model.bases.found import Base

    write(directory, SHAPES[shape], "bfloat16")
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json"):
        for file in Base.find(DEFAULT_BASE).directory.glob(pattern):
            shutil.copy(file, directory)


def compare(
    stage: str, shape: str, workers: int, base: Path, place: Path, size: tuple[int, int, str]
) -> dict[str, Any]:
    """One line of the table: bytes of a worker, and seconds of an update."""
    run = place / f"{stage}-{workers}"
    words = [stage, *options_of(stage, *size), "--base", str(base), "--run", str(run)]
    if stage == "policy":
        words += ["--sft", str(place / f"sft-{workers}"), "--reward", str(place / f"reward-{workers}")]
    launch = ["launch", "--workers", str(workers)] if workers > 1 else []
    environment = under_allocator() | {"OMP_NUM_THREADS": str(max(1, 2 // workers))}
    with subprocess.Popen([sys.executable, "-m", "perlhf", *launch, *words], env=environment) as started:
        peaks = peaks_of(started)[:workers]
    assert started.returncode == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = (lines[-1]["time_seconds"] - lines[0]["time_seconds"]) / (len(lines) - 1)
    told = planned(words, workers, size[1], environment)
    row = {"shape": shape, "stage": stage, "workers": workers, "options": " ".join(options_of(stage, *size))}
    times = {
        "planned_seconds": round(3600 / told["updates_per_hour"], 2),
        "measured_seconds": round(seconds, 2),
    }
    return row | beside(told["memory_bytes"], peaks) | times


def planned(words: list[str], workers: int, tokens: int, environment: dict[str, str]) -> dict[str, Any]:
    """What `perlhf plan` says of a stage's command."""
    stage, *options = words
    completion = tokens // 16 if stage == "policy" else COMPLETION_TOKENS
    own = ["--devices", str(workers), "--shard", "none", "--stage", stage, "--json"]
    own += ["--prompt-tokens", str(PROMPT_TOKENS), "--completion-tokens", str(completion)]
    command = [sys.executable, "-m", "perlhf", "plan", *own, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)[stage]


def beside(parts: dict[str, int], peaks: list[int]) -> dict[str, Any]:
    """Planned and measured bytes, and how often the former is the latter."""
    ratio = round(parts["total"] / max(peaks), 3)
    return {"planned_bytes": parts["total"], "measured_bytes": peaks, "ratio": ratio, "parts": parts}


def step_in_place(shape: str) -> dict[str, Any]:
    """One policy step with reference, policy, value and reward adapters, weights made in place."""
    from harness import data_root
    from perlhf.data.records import Prompt
    from perlhf.model.foretold.memory import memory_of
    from perlhf.parallel.traffic import Lengths
    from perlhf.system.machine import peak_memory_bytes
    from perlhf.training.plan import trainable_parameters
    from policy import _random_base, _stage, _steps

    os.environ["PERLHF_DATA"] = str(data_root())
    stage = _stage("lora", "value", _random_base(shape))
    changes = {"prompts_per_update": 1, "max_completion_tokens": 16, "tokens_per_microbatch": 128}
    changes |= {"validation_prompts": 1, "centre_prompts": 1, "sft": Path("sft"), "reward": ("reward",), "updates": 1}
    stage.config = stage.config.model_copy(update=changes)
    room = 128 - 4 * 16
    text = next(text for text in ("tea " * count for count in range(room, 0, -1)) if _size(stage, text) <= room)
    stage.prompts = [Prompt(text, "tea")]
    (step,) = _steps(stage, 1)
    base, lengths = stage.model.base, Lengths(_size(stage, text), 16)
    parts = memory_of(stage.config, base, trainable_parameters(stage.config, base), lengths=lengths, updates=1).parts()
    row = {
        "shape": shape.replace("_", "."),
        "stage": "policy",
        "workers": 1,
        "options": "--step",
        "parameters": base.num_parameters(),
    }
    return row | beside(parts, [peak_memory_bytes()]) | {"measured_seconds": round(step["seconds"], 1)}


def _size(stage: Any, text: str) -> int:
    return len(stage.encoder.prompt(text))


def kept() -> Iterator[dict[str, Any]]:
    """Policy steps that `benchmarks/policy.py` measured on a machine with AMX, beside what is planned."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from perlhf.config.stages import AdapterConfig, PolicyConfig
    from perlhf.model.foretold.memory import memory_of
    from perlhf.parallel.traffic import Lengths
    from perlhf.training.plan import trainable_parameters
    from policy import COMPLETIONS, PROMPT_TOKENS, PROMPTS, RANK, SHAPES, TOKENS

    measured = {row["name"]: row["sides"].get("perlhf") for row in json.loads(BENCH.read_text("utf-8"))}
    for name, shape in (("", "0.1b"), ("_1_7b", "1_7b"), ("_7b", "7b")):
        small = shape == "0.1b"
        said: dict[str, Any] = loading.SHAPES["0.1b"] if small else SHAPES[shape] | {"vocab_size": 49152}
        said = said | {"tie_word_embeddings": shape != "7b"}
        with torch.device("meta"):
            network = LlamaForCausalLM(LlamaConfig(**said))
        config = PolicyConfig(
            device="cpu",
            dtype="bfloat16",
            sft=Path("sft"),
            reward=("reward",),
            adapter=AdapterConfig(rank=RANK),
            prompts_per_update=PROMPTS if small else 1,
            completions_per_prompt=COMPLETIONS,
            max_completion_tokens=TOKENS if small else 32,
            validation_prompts=1,
            centre_prompts=1,
        )
        lengths, own = Lengths(PROMPT_TOKENS, config.max_completion_tokens), trainable_parameters(config, network)
        parts = memory_of(config, network, own, lengths=lengths, updates=1).parts()
        row = {"shape": shape.replace("_", "."), "stage": "policy", "workers": 1, "options": "benchmarks/bench.json"}
        yield row | beside(parts, [measured[f"policy_peak_memory{name}"]["peak_memory_bytes"]])


def under_allocator() -> dict[str, str]:
    """This process's environment with the allocator that commands take."""
    preloaded = before_torch.find(os.environ)
    return os.environ | (before_torch.variables(preloaded) if preloaded else {})


def peaks_of(started: "subprocess.Popen[bytes]") -> list[int]:
    """The peak of each process of a command that computes, largest first, looked at until it ends."""
    found: dict[int, int] = {}
    while started.poll() is None:
        for process in [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                continue
            peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
            found[process.pid] = max(found.get(process.pid, 0), peak)
        time.sleep(0.05)
    return sorted(found.values(), reverse=True)


if __name__ == "__main__":
    main()
