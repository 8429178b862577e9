"""Completions that a vLLM server computes, in the shape of `rollout.rows.Rows`: requests of the engine go there one by
one and come back token by token. Each version of an adapter is written into a directory of its own and loaded there
under a name of its own, so that a request ends on the version that it began with.
"""

import asyncio
import contextlib
import json
import os
import queue
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from perlhf.config.addresses import VLLM_KEY, shown
from perlhf.config.serving import ServeConfig
from perlhf.errors import ConfigError, ServiceError
from perlhf.method.packing import Ids
from perlhf.model.saved import save_adapter
from perlhf.rollout.rows import Row, Token, Under, Wish
from perlhf.rollout.vllm.connection import Connection, met, request
from perlhf.rollout.vllm.server import RANKS
from perlhf.serving.models import Models
from perlhf.system.console import note
from perlhf.system.files import remove_directory

SERVED = "base"
WAIT_SECONDS = 0.02
"""A step waits so long for a token, so that jobs and requests that have come aren't held up."""
START_SECONDS = 900.0
LIMITS = httpx2.Timeout(600.0, connect=10.0)


class Elsewhere:
    """Rows on a server.

    Args:
        url: its address; key: that it asks for.
        directory: for adapters; the server sees it by the same path.
        base: what it calls the base.
    """

    def __init__(self, url: str, key: str | None, models: Models, directory: Path, base: str):
        self._url, self._models, self._directory, self._base = url, models, directory, base
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = secrets.token_hex(4)
        self._names: dict[Hashable, str] = {}
        self._streams: dict[Row, Future[None]] = {}
        self._arrived: queue.SimpleQueue[tuple[Row, Token | ServiceError]] = queue.SimpleQueue()
        self._pending: dict[Row, deque[Token | ServiceError]] = {}
        self._loop = asyncio.new_event_loop()
        self._client = httpx2.AsyncClient(timeout=LIMITS, trust_env=False, limits=httpx2.Limits(max_connections=None))
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._streams)

    def join(
        self, prompt: Ids, draws: Sequence[np.random.Generator], longest: int, under: Under, wish: Wish
    ) -> list[Row] | None:
        """As `Rows.join`; there is always room: the server makes who has none wait.

        Raises:
            ServiceError: the server can't be reached, or refuses the adapter.
        """
        name = self._name(under)
        rows = [Row(under, wish, draw, prompt=prompt) for draw in draws]
        for row in rows:
            body = _request(name, row, longest)
            self._pending[row] = deque()
            self._streams[row] = asyncio.run_coroutine_threadsafe(self._stream(row, body), self._loop)
        return rows

    def leave(self, row: Row) -> None:
        """As `Rows.leave`; the server stops when nobody listens any more."""
        self._streams.pop(row).cancel()
        del self._pending[row]

    def forget(self, under: Under) -> None:
        """As `Rows.forget`: the server unloads the adapter."""
        if (name := self._names.pop(under.key, None)) is not None and under.held.adapters:
            with contextlib.suppress(ServiceError):
                self._ask("/v1/unload_lora_adapter", {"lora_name": name})
            remove_directory(self._directory / name)

    def step(self) -> list[Token]:
        """The next token of each row that has one; [] where none has come within a moment.

        Raises:
            ServiceError: the server has broken off.
        """
        waits = bool(self._streams) and not any(self._pending.values())
        with contextlib.suppress(queue.Empty):
            while True:
                row, came = self._arrived.get(waits, WAIT_SECONDS if waits else None)
                waits = waits and row not in self._streams
                if row in self._streams:
                    self._pending[row].append(came)
        found: list[Token] = []
        for row, tokens in self._pending.items():
            if tokens:
                token = tokens.popleft()
                if isinstance(token, ServiceError):
                    raise token
                row.ids.append(token.id)
                found.append(token)
        return found

    def clear(self) -> None:
        """Forgets all rows, and which adapters the server has: it may have been started again."""
        for row in list(self._streams):
            self.leave(row)
        self._names.clear()

    def close(self) -> None:
        """Leaves the server without our adapters."""
        for row in list(self._streams):
            self.leave(row)
        for name in self._names.values():
            if name != self._base:
                with contextlib.suppress(ServiceError):
                    self._ask("/v1/unload_lora_adapter", {"lora_name": name})
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # inside

    def _name(self, under: Under) -> str:
        """What the server calls an adapter, which is loaded where it wasn't."""
        if under.key not in self._names:
            name = self._base
            if under.held.adapters:
                name = f"{self._session}-{len(self._names)}-{time.monotonic_ns()}"
                encoder = next(iter(self._models.speakers.values())).encoder
                save_adapter(self._models.model, under.held.adapters[-1], self._directory / name, encoder)
                self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._directory / name)})
            self._names[under.key] = name
        return self._names[under.key]

    def _ask(self, path: str, body: Any) -> None:
        """Has the server do something.

        Raises:
            ServiceError: it doesn't, or refuses.
        """

        async def ask() -> httpx2.Response:
            return await self._client.post(self._url + path, json=body, headers=self._headers)

        try:
            response = asyncio.run_coroutine_threadsafe(ask(), self._loop).result()
        except httpx2.HTTPError as error:
            raise self._gone(error) from None
        if response.status_code != 200:
            raise ServiceError(_said(response.text), where=self._url + path, hint="its own log says more")

    async def _stream(self, row: Row, body: dict[str, Any]) -> None:
        """Puts a row's tokens into the queue as they come, or why there are no more."""
        count = 0
        try:
            address = f"{self._url}/v1/completions"
            async with self._client.stream("POST", address, json=body, headers=self._headers) as response:
                if response.status_code != 200:
                    said = _said((await response.aread()).decode("utf-8", "replace"))
                    raise ServiceError(f"the vLLM server refuses: {said}", where=address)
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        for token in _tokens(row, json.loads(line[6:])):
                            count += 1
                            self._arrived.put((row, token))
            if count < body["max_tokens"]:
                raise ServiceError("the vLLM server broke off", where=address)
        except ServiceError as error:
            self._arrived.put((row, error))
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            self._arrived.put((row, self._gone(error)))

    def _gone(self, error: Exception) -> ServiceError:
        what = f"the vLLM server can't be asked: {error or type(error).__name__}"
        return ServiceError(what, where=self._url, hint="is it running? its own log says more")


@contextlib.contextmanager
def vllm(config: ServeConfig, models: Models) -> Iterator[Elsewhere]:
    """A vLLM server for these models: that at `config.vllm_url`, or one that is started and ended.

    Raises:
        ConfigError: it can't be started; it is another version of vLLM than was tried, or has another tokenizer.
        ServiceError: it isn't there, isn't vLLM, or ends while it starts.
    """
    speakers = list(models.speakers.values())
    with tempfile.TemporaryDirectory(prefix="perlhf-vllm-") as place, contextlib.ExitStack() as stack:
        if config.vllm_url is not None:
            url, key = config.vllm_url.rstrip("/").removesuffix("/v1"), os.environ.get(VLLM_KEY, "").strip() or None
            connection = Connection(config.vllm_url, config.timeout_seconds, "timeout_seconds")
            base, longest = met(connection, speakers[0].encoder, "vllm_url")
            if longest is not None and longest < (context := max(one.encoder.max_tokens for one in speakers)):
                note(f"the server takes {longest} tokens, prompt and answer together, of the {context} there could be")
        else:
            key, base = secrets.token_urlsafe(24), SERVED
            url = stack.enter_context(_started(config, models, key))
        elsewhere = Elsewhere(url, key, models, Path(place), base)
        stack.callback(elsewhere.close)
        note(f"completions come from vLLM at {shown(url)}")
        yield elsewhere


@contextlib.contextmanager
def _started(config: ServeConfig, models: Models, key: str) -> Iterator[str]:
    """Address of a server that was started with the base and room for the adapters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"VLLM_API_KEY": key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    assert config.vllm_python is not None
    try:
        process = subprocess.Popen(_words(config.vllm_python, models, port), env=env, stdout=subprocess.DEVNULL)
    except OSError as error:
        hint = "the Python of an environment with vLLM"
        raise ConfigError(f"can't be run: {error}", where="vllm_python", hint=hint) from None
    try:
        until = time.monotonic() + START_SECONDS
        note("vLLM starts, which takes a minute or two")
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > until:
                raise ServiceError("vLLM ended while it started", where="vllm_python", hint="its messages are above")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _words(python: Path, models: Models, port: int) -> list[str]:
    """The command line of a server."""
    ranks = [len(pair.a) for adapter in models.model.adapters.values() for pair in adapter.pairs.values()]
    rank = next((bound for bound in RANKS if bound >= max([16, *ranks])), RANKS[-1])
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--model", str(models.base.directory), "--served-model-name", SERVED]
    words += ["--dtype", str(models.model.dtype).removeprefix("torch."), "--generation-config", "vllm"]
    words += ["--enable-lora", "--max-loras", str(len(models.speakers) + 2), "--max-lora-rank", str(rank)]
    return [*words, "--logprobs-mode", "processed_logprobs"]


def _healthy(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def _request(name: str, row: Row, longest: int) -> dict[str, Any]:
    """Nothing bends the distribution but what was asked; ends are ours to see."""
    wish, seed = row.wish, int(row.draws.integers(2**31))
    asked = {"top_p": wish.top_p, "logprobs": wish.likeliest, "stream": True, "return_tokens_as_token_ids": True}
    return request(name, row.prompt, 1, seed, wish.temperature, longest) | asked


def _tokens(row: Row, event: dict[str, Any]) -> Iterator[Token]:
    """Of one event of a stream."""
    if "error" in event:
        raise ServiceError(f"the vLLM server broke off: {_said(json.dumps(event))}")
    for choice in event.get("choices", ()):
        told = choice.get("logprobs") or {}
        logprobs, top = told.get("token_logprobs") or [], told.get("top_logprobs") or []
        for at, number in enumerate(choice.get("token_ids") or ()):
            best = sorted((top[at] or {}).items(), key=lambda one: -one[1]) if at < len(top) else []
            likeliest = [(int(word.removeprefix("token_id:")), float(value)) for word, value in best]
            yield Token(row, int(number), float(logprobs[at]), likeliest[: row.wish.likeliest])


def _said(text: str) -> str:
    """An error's message, or the beginning of what was answered."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(text)["error"]["message"])[:300]
    return text[:300]
