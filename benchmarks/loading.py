"""What loading a base takes: peak memory over its weights, seconds, and how often its files are read from the disk.

Writes random weights of a known shape as sharded safetensors, loads them in a fresh process as perlhf's commands do,
uses every weight once, and deletes the files. Memory is counted from just before loading:

    private    anonymous memory (RssAnon), which the system can't take back: what makes a machine run full
    resident   that and pages of the files that are mapped (VmHWM). Weights that are stored in the dtype in which they
               are used are mapped, not copied: they lie in the page cache, once for all processes that use them

`read` is what came from the disk (/proc/self/io), in sizes of the files, after they were dropped from the page cache:
fingerprint and loading share one reading. Linux only. Run: python benchmarks/loading.py --shape 1.7b
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

SHAPES: dict[str, dict[str, Any]] = {
    "0.1b": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False},
}
"""SmolLM2's two, and Mistral's."""
SHARD_BYTES = 2 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.7b")
    parser.add_argument("--stored", choices=("bfloat16", "float32"), nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="in which they are used")
    parser.add_argument("--directory", type=Path, help="where the weights are written (default: a temporary one)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(measure(arguments.load, arguments.dtype)))
        return
    for stored in arguments.stored:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as made:
            size = write(Path(made) / "base", SHAPES[arguments.shape], stored)
            os.sync()
            command = [sys.executable, __file__, "--load", made, "--dtype", arguments.dtype]
            environment = os.environ | {"PERLHF_CACHE": str(Path(made) / "cache")}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = {"shape": arguments.shape, "stored": stored, "dtype": arguments.dtype, "file_bytes": size}
            print(json.dumps(found | json.loads(done.stdout)), flush=True)


def write(directory: Path, shape: dict[str, Any], stored: str) -> int:
    """A Llama of random weights in shards, one shard in memory at a time; the size of its files."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    directory.mkdir(parents=True)
    config = LlamaConfig(**shape, max_position_embeddings=8192)
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(network).__name__]
    config.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    dtype = getattr(torch, stored)
    shards: list[list[tuple[str, Any]]] = [[]]
    total = 0
    for name, parameter in network.named_parameters():
        total += (size := parameter.numel() * dtype.itemsize)
        if sum(p.numel() for _, p in shards[-1]) * dtype.itemsize + size > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append((name, parameter))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.empty(p.shape, dtype=dtype).normal_(0, 0.02) for name, p in shard}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


class Watch:
    """The largest anonymous memory of this process, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.before, self.peak, self._over = _anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.003):
            self.peak = max(self.peak, _anonymous())

    def taken(self) -> int:
        """More than there was at the start, in bytes."""
        self._over.set()
        self._thread.join()
        return max(self.peak, _anonymous()) - self.before


def measure(made: Path, dtype: str) -> dict[str, Any]:
    """Fingerprint and load, in this process."""
    import torch

    from perlhf.model.bases.found import Base
    from perlhf.model.bases.loading import load_base
    from perlhf.system.machine import peak_memory_bytes, reset_peak_memory

    directory = made / "base"
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size = sum(file.stat().st_size for file in files)
    base = Base(directory)
    disk, seconds = _disk(), {}
    began = time.perf_counter()
    assert base.fingerprint["sha256"]
    seconds["hash"] = time.perf_counter() - began
    reset_peak_memory()
    before, watch, began = peak_memory_bytes(), Watch(), time.perf_counter()
    network = load_base(base, getattr(torch, dtype), "cpu")
    seconds["load"] = time.perf_counter() - began
    for parameter in network.parameters():
        parameter.sum()
    seconds["load and use"] = time.perf_counter() - began
    private, resident = watch.taken(), peak_memory_bytes() - before
    weights = sum(parameter.numel() * parameter.itemsize for parameter in network.parameters())
    read, began = _disk() - disk, time.perf_counter()
    assert Base(directory).fingerprint["sha256"]
    seconds["hash again"] = time.perf_counter() - began
    return {
        "weights_bytes": weights,
        "private": round(private / weights, 3),
        "resident": round(resident / weights, 3),
        "read": round(read / size, 2),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "machine_memory_bytes": psutil.virtual_memory().total,
    }


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
