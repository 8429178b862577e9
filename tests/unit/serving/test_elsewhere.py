"""Completions of a vLLM server, for which a small one stands that answers as vLLM 0.32 does, by our own engine."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from serving_world import Runs, Server, make_runs, serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from perlhf.config.addresses import VLLM_KEY
from perlhf.config.serving import ServeConfig
from perlhf.errors import ConfigError, ServiceError
from perlhf.labelling.addresses import bound
from perlhf.model.saved import load_adapter
from perlhf.rollout.rows import Row, Rows, Under, Wish
from perlhf.serving.elsewhere import vllm
from perlhf.serving.models import Models

CHAT = {"messages": [{"role": "user", "content": "Tea?"}], "max_tokens": 8, "seed": 1}


class StandIn:
    """What vLLM's address would answer."""

    def __init__(self, runs: Runs, base: str):
        models = Models({}, base, device="cpu", dtype="float32")
        self.model, self.encoder = models.model, models.speakers["base"].encoder
        self.version, self.shift = "0.32.0", 0
        self.unders = {"tiny": Under("tiny", self.model.hold(None))}
        self.loaded: list[str] = []
        self.breaks_after: int | None = None
        self.open = 0
        routes = [
            Route("/version", lambda request: JSONResponse({"version": self.version})),
            Route("/v1/models", self.models),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        listening = bound("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        settings = uvicorn.Config(Starlette(routes=routes), log_level="error", access_log=False, lifespan="off")
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([listening])), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    async def models(self, request: Request) -> Response:
        """The base, by a name of its own, and what was loaded."""
        base = {"id": "tiny", "parent": None, "max_model_len": 64}
        return JSONResponse({"data": [base, *({"id": name, "parent": "tiny"} for name in self.loaded)]})

    async def tokenize(self, request: Request) -> Response:
        """Tokens of a text, moved by `shift` where another tokenizer is planted."""
        ids = self.encoder.tokenizer.encode((await request.json())["prompt"], add_special_tokens=False)
        return JSONResponse({"tokens": [one + self.shift for one in ids]})

    async def load(self, request: Request) -> Response:
        """An adapter of a directory."""
        if request.headers.get("authorization") != "Bearer a key":
            return JSONResponse({"error": "Unauthorized"}, 401)
        body = await request.json()
        name = body["lora_name"]
        load_adapter(self.model, Path(body["lora_path"]), name)
        self.unders[name] = Under(name, self.model.hold(name))
        self.loaded.append(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Forgets it."""
        name = (await request.json())["lora_name"]
        self.unders.pop(name)
        self.loaded.remove(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def completions(self, request: Request) -> Response:
        """One completion, token by token."""
        body = await request.json()
        assert body["stream"] and body["return_token_ids"] and body["ignore_eos"] and body["top_k"] == 0
        if (under := self.unders.get(body["model"])) is None:
            message = f"The model `{body['model']}` does not exist."
            return JSONResponse({"error": {"message": message, "type": "NotFoundError", "code": 404}}, 404)

        async def events() -> AsyncIterator[str]:
            rows = Rows(self.model, 1000)
            wish = Wish(body["temperature"], body["top_p"], body["logprobs"])
            own = rows.join(body["prompt"], [np.random.default_rng(body["seed"])], body["max_tokens"], under, wish)
            assert own
            self.open += 1
            try:
                for number in range(body["max_tokens"]):
                    if self.breaks_after == number:
                        return
                    (token,) = rows.step()
                    top = {f"token_id:{at}": value for at, value in token.likeliest} | {
                        f"token_id:{token.id}": token.logprob
                    }
                    told = {"token_logprobs": [token.logprob], "top_logprobs": [top]}
                    choice = {"index": 0, "text": "?", "logprobs": told, "token_ids": [token.id]}
                    yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                    await asyncio.sleep(0.005)
                yield "data: [DONE]\n\n"
            finally:
                self.open -= 1

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("elsewhere"), tiny_base)


@pytest.fixture
def stand_in(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv(VLLM_KEY, "a key")
    server = StandIn(runs, str(runs.base))
    yield server
    server.server.should_exit = True
    server.thread.join()


@pytest.fixture
def server(runs: Runs, stand_in: StandIn) -> Iterator[Server]:
    config = ServeConfig(engine="vllm", vllm_url=stand_in.url)
    with serving(runs, elsewhere=partial(vllm, config)) as server:
        yield server


def test_answers_are_those_of_our_own_engine(runs: Runs, server: Server, stand_in: StandIn) -> None:
    asked = [
        CHAT | {"model": name, "temperature": 0, "logprobs": True, "top_logprobs": 3}
        for name in ("kind", "curt", "base", "kind")
    ]
    found = [server.ask("/v1/chat/completions", body) for body in asked]
    with serving(runs) as ours:
        expected = [ours.ask("/v1/chat/completions", body) for body in asked]
    for (status, one), (_, other) in zip(found, expected, strict=True):
        assert status == 200 and one["choices"][0]["message"] == other["choices"][0]["message"]
        pairs = zip(*(each["choices"][0]["logprobs"]["content"] for each in (one, other)), strict=True)
        for token, expected_token in pairs:
            assert token["token"] == expected_token["token"]
            assert token["logprob"] == pytest.approx(expected_token["logprob"], abs=1e-4)
            assert [each["token"] for each in token["top_logprobs"]] == [
                each["token"] for each in expected_token["top_logprobs"]
            ]
    assert len(stand_in.loaded) == 2, "each adapter once"


def test_several_answers_streams_and_seeds(server: Server) -> None:
    body = CHAT | {"model": "kind", "n": 3}
    (_, first), (_, second) = (server.ask("/v1/chat/completions", body) for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]] and len(set(texts)) > 1
    events = server.stream("/v1/chat/completions", **{**body, "n": 1})
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == texts[0]
    _, stopped = server.ask("/v1/chat/completions", body | {"n": 1, "stop": [texts[0][2:4]]})
    assert stopped["choices"][0]["message"]["content"] == texts[0][:2].strip()


def test_who_leaves_is_computed_for_no_longer(server: Server, stand_in: StandIn) -> None:
    body = CHAT | {"model": "kind", "max_tokens": 200, "n": 2}
    with pytest.raises(TimeoutError):
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=0.3)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Host": f"127.0.0.1:{server.port}"})
        connection.getresponse()
    connection.close()
    server.until(lambda: not server.engine.running and not stand_in.open)


def test_a_server_that_breaks_off_or_forgets(server: Server, stand_in: StandIn) -> None:
    stand_in.breaks_after = 3
    status, said = server.ask("/v1/chat/completions", CHAT | {"model": "kind"})
    assert status == 502 and "broke off" in said["error"]["message"]
    stand_in.breaks_after = None
    server.chat("kind")  # it is loaded again, under another name
    for name in list(stand_in.loaded):
        stand_in.unders.pop(name)
    status, said = server.ask("/v1/chat/completions", CHAT | {"model": "kind"})
    assert status == 502 and "does not exist" in said["error"]["message"]
    server.chat("kind")


def test_a_new_version_and_scores(runs: Runs, server: Server, stand_in: StandIn) -> None:
    server.chat("kind")
    (old,) = stand_in.loaded
    server.engine.run(lambda: server.engine.models.load("kind", runs.place / "kind")).result()
    server.chat("kind")
    server.until(lambda: old not in stand_in.loaded)
    assert len(stand_in.loaded) == 1
    status, found = server.ask("/v1/score", {"model": "judge", "prompt": "Tea?", "answers": ["Yes.", "No."]})
    assert status == 200 and len(found["data"]) == 2


def test_what_is_refused(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ({"engine": "vllm"}, {"vllm_url": "http://127.0.0.1:1"}):
        with pytest.raises(ValueError, match="vllm"):
            ServeConfig.model_validate(given)
    for url, said in (("http://127.0.0.1:1/${NAME}", "filled in"), ("http://me:secret@127.0.0.1:1", VLLM_KEY)):
        with pytest.raises((ConfigError, ValueError), match=said):
            ServeConfig.model_validate({"engine": "vllm", "vllm_url": url})
    with bound("127.0.0.1", 0) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    models = Models({}, str(runs.base), device="cpu", dtype="float32")
    with (
        pytest.raises(ServiceError, match="--vllm-url") as raised,
        vllm(ServeConfig(engine="vllm", vllm_url=url), models),
    ):
        pass
    assert raised.value.where == url
    config = ServeConfig(engine="vllm", vllm_python=Path("/nowhere/python"))
    with pytest.raises(ConfigError, match="can't be run"), vllm(config, models):
        pass


def test_another_version_or_tokenizer_is_refused(
    stand_in: StandIn, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    models = Models({}, str(runs.base), device="cpu", dtype="float32")
    config = ServeConfig(engine="vllm", vllm_url=stand_in.url)
    for name, planted, said in (("version", "0.12.1", "vLLM 0.12.1"), ("shift", 1, "tokenizer")):
        usual = getattr(stand_in, name)
        setattr(stand_in, name, planted)
        with pytest.raises(ConfigError, match=said) as raised, vllm(config, models):
            pass
        assert raised.value.where == "vllm_url"
        setattr(stand_in, name, usual)
    with vllm(config, models):
        assert "takes 64 tokens" in capsys.readouterr().err


def test_a_row_has_one_token_a_step(stand_in: StandIn, runs: Runs) -> None:
    models = Models({}, str(runs.base), device="cpu", dtype="float32")
    under = Under("base", models.model.hold(None))
    with vllm(ServeConfig(engine="vllm", vllm_url=stand_in.url), models) as elsewhere:
        rows = elsewhere.join([5, 6, 7], [np.random.default_rng(0)], 5, under, Wish())
        assert rows
        time.sleep(0.3)
        lengths = list[int]()
        end = time.monotonic() + 30
        while len(lengths) < 5 and time.monotonic() < end:
            found: list[Row] = [token.row for token in elsewhere.step()]
            assert found in ([], rows)
            lengths += [len(row.ids) for row in found]
        assert lengths == [1, 2, 3, 4, 5]
