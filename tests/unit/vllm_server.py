"""A small server at vLLM's addresses, on real HTTP: the local engine on the tiny base, with faults to be planted."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import open_encoder, open_model

from perlhf.model import saved
from perlhf.rollout import local
from perlhf.rollout.ensemble import forget
from perlhf.rollout.local import Ends

KEY = "a-key"


class Refusal(Exception):
    """An answer other than 200, as vLLM words it."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class FakeVllm:
    """vLLM's addresses on 127.0.0.1. What is planted is set before or between requests.

    Args:
        base: directory of the base that it computes with.
    """

    def __init__(self, base: Path):
        self.version, self.max_rank, self.max_loras, self.longest = "0.32.0+cpu", 8, 2, 512
        self.stale = False
        """Answers for a new adapter with the one that was loaded first."""
        self.raw = False
        """Reports log-probabilities before the temperature."""
        self.raw_at = 0
        """From this completion request on it does."""
        self.early = False
        """Sees stop strings where there are none."""
        self.breaks_at = 0
        """This completion request and the next two end as 500."""
        self.forgets_at = 0
        """At this completion request it is started again: all adapters are gone, and it is away for a while."""
        self.away_seconds = 0.0
        self.spoils = False
        """With another base, then."""
        self.shift = 0
        """Added to each token of a text, as another tokenizer's."""
        self.sees = True
        """Whether it has the directories that it is to load."""
        self.updating = True
        """VLLM_ALLOW_RUNTIME_LORA_UPDATING."""
        self.loaded: dict[str, str] = {}
        """Directory of each adapter that it has."""
        self.log: list[tuple[str, str]] = []
        """What was loaded, unloaded and asked for, by name."""
        self.asked = 0
        self._first = ""
        self._model, self._encoder = open_model(base), open_encoder(base)
        self._lock, self._until = threading.Lock(), 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def sampled(self) -> list[str]:
        """Adapters that more was asked of than the probe's two answers."""
        asked = [name for what, name in self.log if what == "ask" and name != "tiny"]
        return [name for name in dict.fromkeys(asked) if asked.count(name) > 2]

    @torch.no_grad()
    def spoil(self, size: float = 0.02) -> None:
        """Makes its base another one."""
        draw = torch.Generator().manual_seed(0)
        for weight in self._model.base.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw) * size)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def restart(self) -> None:
        """It forgets its adapters, and breaks connections for a while."""
        for name in list(self.loaded):
            forget(self._model, name)
        self.loaded.clear()
        if self.spoils:
            self.spoil()
        self._first, self._until = "", time.monotonic() + self.away_seconds

    def answer(self, path: str, body: Any, key: str | None) -> Any:
        """What a request is answered; None breaks the connection."""
        with self._lock, torch.no_grad():
            torch.set_num_threads(1)
            if time.monotonic() < self._until:
                return None
            if path.startswith("/v1") and key != f"Bearer {KEY}":
                raise Refusal(401, "Unauthorized")
            match path:
                case "/version":
                    return {"version": self.version}
                case "/metrics":
                    labels = f'max_lora="{self.max_loras}",running_lora_adapters="",waiting_lora_adapters=""'
                    return f"# HELP vllm:lora_requests_info\nvllm:lora_requests_info{{{labels}}} 1.0\n"
                case "/v1/models":
                    base = {"id": "tiny", "parent": None, "max_model_len": self.longest}
                    return {
                        "data": [base, *({"id": name, "parent": "tiny", "max_model_len": None} for name in self.loaded)]
                    }
                case "/tokenize":
                    ids = self._encoder.tokenizer.encode(body["prompt"], add_special_tokens=False)
                    return {"tokens": [one + self.shift for one in ids]}
                case "/v1/load_lora_adapter" | "/v1/unload_lora_adapter" if self.updating:
                    return (self._load if "/load" in path else self._unload)(body)
                case "/v1/completions":
                    return self._complete(body)
            raise Refusal(404, "Not Found")

    def _load(self, body: dict[str, str]) -> str:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.loaded:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not path.is_dir() or not self.sees:
            raise Refusal(404, f"Loading lora {name} failed: No adapter found for {path}")
        adapter = saved.read_adapter(path, name).adapter
        if (rank := max(len(pair.a) for pair in adapter.pairs.values())) > self.max_rank:
            worker = f"Worker failed with error 'LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.'"
            raise Refusal(500, f"Call to add_lora method failed: {worker}, please check the stack trace above")
        self._model.adopt(adapter)
        self.loaded[name] = str(path)
        self.log.append(("load", name))
        self._first = self._first or name
        return f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body: dict[str, str]) -> str:
        name = body["lora_name"]
        if name not in self.loaded:
            raise Refusal(404, f"The lora adapter '{name}' cannot be found.")
        self.log.append(("unload", name))
        del self.loaded[name]
        if not self.stale:
            forget(self._model, name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _complete(self, body: dict[str, Any]) -> dict[str, Any] | None:
        self.asked += 1
        self.raw |= self.asked == self.raw_at
        if self.asked == self.forgets_at:
            self.restart()
            return None
        if self.breaks_at and 0 <= self.asked - self.breaks_at < 3:
            raise Refusal(500, "Internal Server Error")
        if body["temperature"] == 0 and body["n"] > 1:
            raise Refusal(400, f"n must be 1 when using greedy sampling, got {body['n']}.")
        name = body["model"]
        if name != "tiny" and name not in self.loaded:
            raise Refusal(404, f"The model `{name}` does not exist.")
        self.log.append(("ask", name))
        adapter = None if name == "tiny" else self._first if self.stale else name
        count, longest, temperature = body["n"], body["max_tokens"], body["temperature"]
        draws = np.array([np.random.default_rng(body["seed"] + i).random(longest) for i in range(count)])
        stop = tuple(body.get("stop", ()))
        found = local.sample(
            self._model,
            [body["prompt"]],
            adapter=adapter,
            draws=torch.from_numpy(draws),
            ends=Ends(body.get("stop_token_ids", ()), self._encoder, stop),
            temperature=temperature,
            max_completion_tokens=1 if self.early and stop else longest,
        )
        logprobs = found.sampler_logprobs
        if self.raw:
            logprobs = [self._raw(body["prompt"], ids, adapter) for ids in found.completions]
        choices = [
            {
                "index": index,
                "token_ids": ids,
                "finish_reason": "stop" if ended else "length",
                "logprobs": {"token_logprobs": values},
            }
            for index, (ids, values, ended) in enumerate(zip(found.completions, logprobs, found.ended, strict=True))
        ]
        return {"choices": choices[::-1]}

    def _raw(self, prompt: list[int], ids: list[int], adapter: str | None) -> list[float]:
        held = self._model.hold(adapter)
        states, _ = self._model.prefill([[*prompt, *ids[:at]] for at in range(len(ids))], held)
        return self._model.logits(states, held).log_softmax(-1)[range(len(ids)), ids].tolist()


@pytest.fixture
def vllm(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    """A server on the tiny base, whose key is in the environment."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PERLHF_VLLM_KEY", KEY)
    server = FakeVllm(tiny_base)
    yield server
    server.close()


def _handler(server: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            except (OSError, ValueError):  # the client was killed
                self.close_connection = True
            else:
                self._reply(body)

        def do_GET(self) -> None:
            self._reply(None)

        def _reply(self, body: Any) -> None:
            status = 200
            try:
                said = server.answer(self.path, body, self.headers.get("Authorization"))
            except Refusal as refusal:
                status, said = refusal.status, {"error": {"message": refusal.message, "code": refusal.status}}
            if said is None:
                self.close_connection = True
                return
            content = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client was killed
                self.close_connection = True

        def log_message(self, format: str, *_: Any) -> None:
            pass

    return Handler
