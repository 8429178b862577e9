"""vLLM for these tests: `make test-vllm` installs it, into an environment whose Python $PERLHF_VLLM_PYTHON is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_server import serving


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`with vllm(base, dtype, *options) as server:` starts a server, which takes a minute or two."""
    python = os.environ.get("PERLHF_VLLM_PYTHON")
    if not python:
        pytest.skip("PERLHF_VLLM_PYTHON names no Python with vLLM; make test-vllm makes one")
    logs = tmp_path_factory.mktemp("vllm")

    def start(base: Path, dtype: str, *options: str) -> Any:
        return serving(python, logs / f"{len(list(logs.iterdir()))}.log", base, dtype, *options)

    return start
