"""`perlhf serve`: opens the runs, takes the address, and answers until it is stopped."""

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from perlhf.config.serving import ServeConfig
from perlhf.errors import ConfigError, StorageError
from perlhf.labelling.addresses import bound, is_known_elsewhere, names, web_settings
from perlhf.serving.elsewhere import vllm
from perlhf.serving.engine import Busy, Engine, Limits
from perlhf.serving.feedback import Feedback
from perlhf.serving.models import Models, named
from perlhf.serving.server import Access, Service, application
from perlhf.system.console import note

TOKEN = "PERLHF_TOKEN"
SHORTEST = 16
"""Letters of a token."""


def serve(config: ServeConfig) -> None:
    """Serves until it is stopped.

    Raises:
        ConfigError, RunError, AdapterError, ModelError: what should be served can't be.
        StorageError: the address isn't free, or a file can't be read.
    """
    prepared(config)()


def prepared(config: ServeConfig) -> Callable[[], None]:
    """Opens the runs and takes the address; what is returned answers there until it is stopped.

    Raises:
        as `serve`.
    """
    runs = named(config.runs)
    token = _token(config)
    if config.adapters is not None and not config.adapters.is_dir():
        raise ConfigError(f"{config.adapters} is no directory", where="adapters", allowed="a directory of runs")
    listening = bound(config.host, config.port)
    try:
        feedback = Feedback(config.project) if config.project is not None else None
        limits = Limits(config.max_rows, config.max_waiting, config.max_tokens, config.timeout_seconds)
        elsewhere = partial(vllm, config) if config.engine == "vllm" else None
        engine = Engine(lambda: _opened(config, runs), limits, elsewhere)
    except BaseException:
        listening.close()
        raise
    hosts = names(config.host, listening.getsockname()[1], config.allow_hosts)
    access = Access(hosts, token, frozenset(config.allow_origins), config.allow_hosts)
    longest, logged = config.max_completion_tokens, config.log_requests
    service = Service(engine.models, engine, access, feedback, config.adapters, longest, logged)
    _say(config, listening, engine.models)
    settings = web_settings(application(service))
    stopped = threading.Event()

    def answer() -> None:
        watching = threading.Thread(target=_refresh, args=(engine, config.refresh_seconds, stopped), daemon=True)
        watching.start()
        try:
            with contextlib.suppress(KeyboardInterrupt):
                _Server(settings, engine).run([listening])
        finally:
            stopped.set()
            engine.close()
            watching.join()
            service.desk.encoding.shutdown()
            if feedback is not None:
                feedback.close()

    return answer


def _opened(config: ServeConfig, runs: Mapping[str, Path]) -> Models:
    if config.threads:
        torch.set_num_threads(config.threads)
    return Models(runs, config.base, config.device, config.dtype, accept_changes=config.accept_changes)


class _Server(uvicorn.Server):
    """Tells everybody who waits for an answer when it is stopped."""

    def __init__(self, settings: uvicorn.Config, engine: Engine):
        super().__init__(settings)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ctrl-C, or SIGTERM."""
        super().handle_exit(sig, frame)
        threading.Thread(target=self._engine.close, daemon=True).start()


def _refresh(engine: Engine, seconds: float, stopped: threading.Event) -> None:
    """Loads new versions of the runs as they come."""
    while seconds and not stopped.wait(seconds):
        if engine.models.changed():
            with contextlib.suppress(Busy):  # or ending; asked again later
                for one in engine.run(engine.models.refresh).result():
                    note(f"{one.name}: version {one.version} is served")


def _say(config: ServeConfig, listening: socket.socket, models: Models) -> None:
    """What is served, and where."""
    for name, one in models.current.items():
        print(f"{name}: {one.stage}" + (f", {len(one.adapters)} members" if len(one.adapters) > 1 else ""))
    host = f"[{config.host}]" if ":" in config.host else config.host
    port = listening.getsockname()[1]
    print(f"http://{host}:{port}/ (chat) and http://{host}:{port}/v1 (OpenAI's interface)", flush=True)


def _token(config: ServeConfig) -> str | None:
    """What clients have to send; None where none is given and only this machine can ask.

    Raises:
        ConfigError: it is too short. StorageError: its file can't be read.
    """
    where, token = f"${TOKEN}", os.environ.get(TOKEN, "").strip()
    if config.token_file is not None:
        where, token = str(config.token_file), _read(config.token_file)
    if token and (len(token) < SHORTEST or not token.isascii() or not token.isprintable()):
        what = f"the token has {len(token)} letters" if len(token) < SHORTEST else "the token isn't plain ASCII"
        raise ConfigError(what, where=where, allowed=f"at least {SHORTEST} letters of ASCII")
    if not token and config.token_file is not None:
        raise ConfigError("the file holds no token", where=where, allowed=f"at least {SHORTEST} letters of ASCII")
    if not token and is_known_elsewhere(config.host, config.allow_hosts):
        token = secrets.token_urlsafe(24)
        print(f"token: {token}")
    return token or None


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"can't be read: {error}", where=str(file)) from error
