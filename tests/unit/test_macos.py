"""The package imports and reads files where what only Linux has is missing. Nobody has run it on a Mac."""

import os
import subprocess
import sys

LIKE_MACOS = """
import builtins, importlib, io, os, pathlib, pkgutil, platform, sys
import accelerate, datasets, filelock, gguf, huggingface_hub, psutil, pyarrow.parquet, rich, safetensors, scipy.stats
import sklearn.linear_model, tokenizers, torch, transformers, tyro, yaml  # for themselves they know where they are
from transformers import AutoModelForCausalLM, AutoTokenizer

memory, swap = psutil.virtual_memory(), psutil.swap_memory()  # this one's psutil asks /proc
psutil.virtual_memory, psutil.swap_memory = (lambda: memory), (lambda: swap)
for name in ("sched_getaffinity", "sched_setaffinity", "O_TMPFILE", "posix_fadvise", "posix_fallocate", "memfd_create",
             "pipe2", "copy_file_range", "sendfile", "O_DIRECT", "O_PATH", "eventfd", "splice", "getrandom", "preadv",
             "pwritev", "fdatasync", "setresuid", "mknod", "getxattr", "unshare", "pidfd_open"):
    if hasattr(os, name):
        delattr(os, name)
sys.platform = "darwin"
platform.system, platform.machine = (lambda: "Darwin"), (lambda: "arm64")


def hidden(path):
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    return isinstance(name, str) and name.startswith(("/proc", "/sys"))


def without_linux(function):
    def call(path, *rest, **named):
        if hidden(path):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(path, *rest, **named)
    return call


for module, names in ((builtins, ["open"]), (io, ["open"]), (os, ["open", "stat", "lstat", "scandir", "listdir"])):
    for name in names:
        setattr(module, name, without_linux(getattr(module, name)))
assert not pathlib.Path("/proc/self/status").exists()

import perlhf
modules = [found.name for found in pkgutil.walk_packages(perlhf.__path__, "perlhf.") if "__main__" not in found.name]
for name in modules:
    importlib.import_module(name)

from perlhf.config.stages import DataConfig
from perlhf.data.splits import load
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_base, load_tokenizer
from perlhf.system import machine
from perlhf.system.files import write_atomic

target = pathlib.Path(sys.argv[2])
write_atomic(target / "made.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\\n' * 4)
assert len(load(DataConfig(paths=(str(target / "made.jsonl"),), validation=0, test=0), ("comparison",), "train")) >= 1
assert machine.environment()["hardware"]["cores"] >= 1 and machine.available_cores() >= 1
assert machine.peak_memory_bytes() > 0 and machine.memory_bytes() > 2**30
machine.reset_peak_memory()
assert machine.free_memory_bytes("cpu") > 0 and not machine.cpu_computes_in_bf16()[0]
base = Base.find(sys.argv[1])
assert base.fingerprint["sha256"] and len(load_tokenizer(base)) > 0
assert load_base(base, torch.float32, "cpu")(torch.tensor([[4, 5]])).logits.shape[1] == 2
print(len(modules))
"""


def test_everything_imports_and_reads_files_without_what_only_linux_has(tiny_base: object, tmp_path: object) -> None:
    environment = os.environ | {"PERLHF_CACHE": f"{tmp_path}/cache"}
    command = [sys.executable, "-c", LIKE_MACOS, str(tiny_base), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 80
