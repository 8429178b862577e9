"""Fixtures that all tests share: the real feedback files, the small real base, and a tiny random one."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as commands of several workers set it, before torch is loaded

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_base import make_tiny_base

# Shape annotations of the pure modules are checked at run time, in tests only; must precede their first import.
jaxtyping.install_import_hook(
    [f"perlhf.method.{name}" for name in ("losses", "advantages", "packing", "lora")], "beartype.beartype"
)

# The same examples every time, and no verdict from how busy the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and number of threads, and leaves them so."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def feedback_root() -> Path:
    """The real feedback files: $PERLHF_DATA, else `../shared/data` beside the repository."""
    root = Path(os.environ.get("PERLHF_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (root / "MANIFEST.json").is_file():
        pytest.skip(f"no feedback files at {root}; set PERLHF_DATA to their directory")
    return root


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The packaged SmolLM2-135M-Instruct, converted once into the cache."""
    from perlhf.model.bases import found

    return found.pull("smollm2-135m-instruct-q4_1", progress=False)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama (hidden 64, 4 heads, 2 key/value heads) with a byte-level tokenizer and ChatML."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny_base"))
