"""A real server over a tiny base with a few adapters, for the tests of serving."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from chat_templates import TEMPLATES
from tiny_models import open_encoder, open_model, randomise
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from perlhf.config.stages import EncodingConfig
from perlhf.labelling.addresses import bound
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.saved import save_adapter
from perlhf.serving.engine import Engine, Limits
from perlhf.serving.feedback import Feedback
from perlhf.serving.models import Models
from perlhf.serving.server import Access, Service, application


@dataclass
class Runs:
    """Directories of adapters, and the model that they were saved from."""

    place: Path
    base: Path
    model: Model
    encoder: Encoder

    def save(self, name: str, place: str | None = None) -> Path:
        """Writes an adapter of the model into its directory, or another one."""
        directory = self.place / (place or name)
        save_adapter(self.model, name, directory, self.encoder)
        return directory


def make_runs(place: Path, base: Path) -> Runs:
    """Two policies of other shapes, and two reward models."""
    model, encoder = open_model(base), open_encoder(base, EncodingConfig(system="Be short.", max_tokens=256))
    runs = Runs(place, base, model, encoder)
    for seed, (name, rank, targets) in enumerate((("kind", 3, "all"), ("curt", 2, "attention"))):
        model.add_adapter(name, "policy", rank=rank, targets=targets)
        randomise(model, name, seed + 1)
        runs.save(name)
    for seed, name in enumerate(("judge", "other")):
        model.add_adapter(name, "reward", rank=2, targets="all")
        randomise(model, name, seed + 10)
        runs.save(name)
    return runs


def make_parrot(place: Path, base: Path, says: Sequence[str]) -> Runs:
    """A base that says the same whatever it is asked, when it takes the likeliest; each piece of it is one token.

    Its layers change nothing, and its head gives each token the one that follows it; the line break at the end of a
    prompt is followed by the first. Its chat template has a place for tools.
    """
    network: Any = AutoModelForCausalLM.from_pretrained(base)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in says])
    tokenizer.chat_template = TEMPLATES["tools"]
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        embedding = torch.nn.functional.normalize(torch.randn(len(tokenizer), network.config.hidden_size), dim=1)
        network.get_input_embeddings().weight.copy_(embedding)
        head = torch.zeros_like(embedding)
        said = tokenizer.convert_tokens_to_ids(list(says))
        for token, after in zip(
            [tokenizer("\n")["input_ids"][-1], *said], [*said, tokenizer.eos_token_id], strict=True
        ):
            head[after] = 10 * embedding[token]
        network.lm_head.weight = torch.nn.Parameter(head)
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    network.config.tie_word_embeddings = False
    network.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    return Runs(place, place / "base", open_model(place / "base"), open_encoder(place / "base"))


@dataclass
class Server:
    """A running server."""

    port: int
    service: Service
    runs: Runs

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, raw: bytes | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and JSON of a request; text where the answer is no JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = raw if raw is not None else None if body is None else json.dumps(body).encode()
        own = {"Host": f"127.0.0.1:{self.port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if sent is None else "POST"), path, sent, own)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        self.headers = answer.headers
        return answer.status, json.loads(text) if text[:1] in "{[" and text else text

    def chat(self, model: str = "kind", said: str = "Tea?", **more: Any) -> Any:
        """The answer to one message; the whole object."""
        body = {"model": model, "messages": [{"role": "user", "content": said}], "max_tokens": 8, "seed": 1} | more
        status, found = self.ask("/v1/chat/completions", body)
        assert status == 200, found
        return found

    def stream(self, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
        """The events of a stream."""
        status, text = self.ask(path, {"stream": True, **body})
        assert status == 200, text
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def until(self, holds: Any, seconds: float = 30.0) -> None:
        """Waits for something to hold."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it never held"
            time.sleep(0.01)


@contextmanager
def serving(
    runs: Runs,
    names: Sequence[str] = ("kind", "curt", "judge"),
    limits: Limits | None = None,
    token: str | None = None,
    project: Path | None = None,
    origins: Sequence[str] = (),
    elsewhere: Any = None,
) -> Iterator[Server]:
    """A server of these runs, on a port of its own."""
    paths = {name: runs.place / name for name in names}
    limits = limits or Limits(rows=8, waiting=64, tokens=4000, seconds=60)
    engine = Engine(lambda: Models(paths, str(runs.base), device="cpu", dtype="float32"), limits, elsewhere)
    listening = bound("127.0.0.1", 0)
    port = listening.getsockname()[1]
    access = Access(frozenset({f"127.0.0.1:{port}", f"localhost:{port}"}), token, frozenset(origins))
    feedback = Feedback(project) if project is not None else None
    service = Service(engine.models, engine, access, feedback, adapters=runs.place, longest=32)
    settings = uvicorn.Config(application(service), log_level="error", access_log=False, lifespan="off")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Server(port, service, runs)
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
        service.desk.encoding.shutdown()
        if feedback is not None:
            feedback.close()
