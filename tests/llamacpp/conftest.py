"""llama.cpp for these tests: `make test-gguf` compiles it, into an environment whose Python $PERLHF_LLAMA_PYTHON is."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("llama.py")


@pytest.fixture(scope="session")
def llama() -> Callable[..., dict[str, Any]]:
    """`llama(model=file, prompts=[ids], ...)`: what llama.py answers. A crash of llama.cpp's is the test's failure."""
    python = os.environ.get("PERLHF_LLAMA_PYTHON")
    if not python:
        pytest.skip("PERLHF_LLAMA_PYTHON names no Python with llama-cpp-python; make test-gguf makes one")

    def ask(**asked: Any) -> dict[str, Any]:
        words = json.dumps({"tokens": 32} | asked, default=str)
        done = subprocess.run([python, str(PROGRAM)], input=words, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask
