"""The server over real HTTP: what is answered, to whom, and what becomes of everything else."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_world import Runs, Server, make_runs, serving
from tiny_models import randomise

from perlhf.data.records import Rating
from perlhf.evaluation.reward import score_by_members
from perlhf.labelling.database.store import Store
from perlhf.labelling.project import LABELS
from perlhf.method.packing import completed, pack
from perlhf.rollout.local import Ends, sample, uniforms
from perlhf.serving.engine import Limits

CHAT, TEXT, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"), tiny_base)


@pytest.fixture(scope="module")
def server(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    project = tmp_path_factory.mktemp("serving") / "project"
    with serving(runs, ("kind", "curt", "judge", "other"), project=project) as server:
        yield server


def expected(runs: Runs, model: str, said: str, seed: int = 1, length: int = 8, heat: float = 0.7, count: int = 1):
    """What the sampler of training gives for the same prompt, draws and temperature."""
    adapter = None if model == "base" else model
    prompt = runs.encoder.prompt([{"role": "user", "content": said}])
    return sample(
        runs.model,
        [prompt],
        adapter=adapter,
        draws=uniforms(seed, 0, [0], count, length),
        ends=Ends.of(runs.encoder),
        temperature=heat,
        max_completion_tokens=length,
    )


def test_answers_are_those_of_the_sampler(server: Server) -> None:
    found = server.chat("kind", "Tea?", n=2, logprobs=True, top_logprobs=1)
    rollout = expected(server.runs, "kind", "Tea?", count=2)
    for choice, ids, ended in zip(found["choices"], rollout.completions, rollout.ended, strict=True):
        assert choice["message"]["content"] == server.runs.encoder.decode(ids)
        assert choice["finish_reason"] == ("stop" if ended else "length")
    assert found["model"] == "kind" and found["system_fingerprint"] == "kind@1"
    assert found["usage"] == {
        "prompt_tokens": len(rollout.prompts[0]),
        "completion_tokens": rollout.tokens,
        "total_tokens": len(rollout.prompts[0]) + rollout.tokens,
    }


def test_log_probabilities_are_those_that_training_computes(server: Server) -> None:
    """A pass over the whole sequence, by which policies are trained, on the served tokens."""
    runs = server.runs
    found = server.chat("curt", "Tea?", logprobs=True, top_logprobs=2, temperature=0.5)
    told = [token["logprob"] for token in found["choices"][0]["logprobs"]["content"]]
    rollout = expected(runs, "curt", "Tea?", heat=0.5)
    batch = pack([[completed(rollout.prompts[0], rollout.completions[0])]], "tree")
    with torch.no_grad():
        trained = runs.model.logprobs(batch, "curt", temperature=0.5).logprobs[0]
    assert told == pytest.approx(trained[: len(told)].tolist(), abs=1e-3)
    assert all(len(token["top_logprobs"]) == 2 for token in found["choices"][0]["logprobs"]["content"])


def test_many_at_once_have_what_each_has_alone(server: Server) -> None:
    asked = [(name, f"{said} {number}", number) for number in range(4) for name in ("kind", "curt", "base") for said in
             ("Tea?", "A longer question about coffee?")]  # fmt: skip
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda one: server.chat(one[0], one[1], seed=one[2]), asked))
    for (name, said, seed), answer in zip(asked, found, strict=True):
        if name == "base":
            again = server.chat(name, said, seed=seed)
            assert answer["choices"] == again["choices"]
            continue
        ids = expected(server.runs, name, said, seed).completions[0]
        assert answer["choices"][0]["message"]["content"] == server.runs.encoder.decode(ids)


def test_whole_weights_beside_adapters(runs: Runs) -> None:
    """They can't be mixed: each is answered in groups of its own."""
    runs.model.add_adapter("whole", "policy", tuning="full")
    randomise(runs.model, "whole", 9)
    runs.save("whole")
    with serving(runs, ("whole", "kind")) as server, ThreadPoolExecutor(8) as pool:
        asked = [(name, f"Tea {number}?", number) for number in range(6) for name in ("whole", "kind")]
        found = list(pool.map(lambda one: server.chat(one[0], one[1], seed=one[2]), asked))
    for (name, said, seed), answer in zip(asked, found, strict=True):
        ids = expected(runs, name, said, seed).completions[0]
        assert answer["choices"][0]["message"]["content"] == runs.encoder.decode(ids)


def test_a_stream_is_the_whole_in_pieces(server: Server) -> None:
    body: dict[str, Any] = {"model": "kind", "messages": [{"role": "user", "content": "Tea?"}], "seed": 5, "n": 2}
    body |= {"max_tokens": 20, "logprobs": True, "top_logprobs": 1}
    events = server.stream(**body, stream_options={"include_usage": True})
    whole = server.ask(CHAT, body)[1]
    assert events[-1] == "[DONE]" and events[-2]["usage"] == whole["usage"] and events[-2]["choices"] == []
    for choice in whole["choices"]:
        own = [e["choices"][0] for e in events[:-2] if e["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] and own[-1]["delta"] == {}
        tokens = [token for one in own for token in (one.get("logprobs") or {"content": []})["content"]]
        assert tokens == choice["logprobs"]["content"]
    assert len({event["id"] for event in events[:-1]}) == 1


def test_texts_and_tokens_without_a_template(server: Server) -> None:
    body: dict[str, Any] = {"model": "kind", "prompt": ["Tea", "Coffee"], "max_tokens": 6, "seed": 2, "temperature": 1}
    found = server.ask(TEXT, body | {"logprobs": 2, "n": 2})[1]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    for choice in found["choices"]:
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(told["token_logprobs"]) <= 6
        assert "".join(told["tokens"]).startswith(choice["text"]) or "token:" in "".join(told["tokens"])
        assert told["text_offset"][:2] == [0, len(told["tokens"][0])] and len(told["top_logprobs"][0]) == 2
    ids = server.runs.encoder.tokenizer("Tea")["input_ids"]
    again = server.ask(TEXT, body | {"prompt": ids})[1]["choices"][0]
    assert again["text"] == found["choices"][0]["text"]
    events = server.stream(TEXT, **body)
    pieces = "".join(e["choices"][0]["text"] for e in events[:-1] if e["choices"][0]["index"] == 0)
    assert pieces == found["choices"][0]["text"]


def test_stop_strings_seeds_and_greedy(server: Server) -> None:
    first, again, other = (server.chat(seed=seed, max_tokens=24)["choices"] for seed in (3, 3, 4))
    assert first == again and first != other
    assert server.chat(temperature=0)["choices"] == server.chat(temperature=0, seed=9)["choices"]
    text = first[0]["message"]["content"]
    stop = text[len(text) // 2]
    assert stop.strip()
    cut = server.chat(seed=3, max_tokens=24, stop=[stop, "never said"])["choices"][0]
    assert cut["message"]["content"] == text[: text.index(stop)].strip() and cut["finish_reason"] == "stop"
    events = server.stream(
        model="kind", messages=[{"role": "user", "content": "Tea?"}], seed=3, max_tokens=24, stop=stop
    )
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == cut["message"]["content"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty"),
    (CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"max_tokns": 4}, "max_tokns"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    (CHAT, {"max_tokens": 10**6}, "messages"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"temperature": "warm"}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"n": 9}, "n"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"stop": ["a", ""]}, "stop"),
    (CHAT, {"stop": [str(number) for number in range(17)]}, "stop"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"include": True}}, "include"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"best_of": 2, "stream": True}, "stream"),
    (CHAT, {"best_of": 2, "n": 3}, "best_of"),
    (CHAT, {"reward": "judge"}, "reward"),
    (CHAT, {"seed": 0.5}, "seed"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": [5, -1]}, "prompt"),
    (TEXT, {"prompt": [5, 999_999]}, "prompt"),
    (TEXT, {"prompt": {"a": 1}}, "prompt"),
    (TEXT, {"prompt": "x", "echo": True}, "echo"),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
    (SCORE, {"model": "judge"}, "messages"),
    (SCORE, {"model": "judge", "prompt": "Tea?"}, "answers"),
    (SCORE, {"model": "judge", "prompt": "Tea?", "answers": []}, "answers"),
    (SCORE, {"model": "judge", "prompt": "Tea?", "answers": ["a", 5]}, "answers"),
    (SCORE, {"model": "judge", "prompt": "Tea?", "answers": ["a"], "explain": 1}, "explain"),
    (SCORE, {"model": "judge", "prompt": "Tea?", "answers": ["word " * 300]}, "messages"),
    ("/v1/rerank", {"model": "judge", "query": "", "documents": ["a"]}, "query"),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "../.."}, "lora_path"),
    ("/v1/load_lora_adapter", {"lora_name": "a b", "lora_path": "kind"}, "lora_name"),
]


@pytest.mark.parametrize(("path", "body", "key"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honoured_is_refused_by_name(server: Server, path: str, body: dict[str, Any], key: str) -> None:
    whole = (
        ({} if "lora" in path else {"model": "kind"})
        | ({"messages": [{"role": "user", "content": "Tea?"}]} if path == CHAT else {})
        | body
    )
    status, answer = server.ask(path, whole)
    assert status == 400, answer
    assert answer["error"]["param"] == key and answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]


def test_keys_that_change_nothing_are_taken(server: Server) -> None:
    neutral: dict[str, Any] = {"user": "ann", "metadata": {"a": "b"}, "frequency_penalty": 0, "presence_penalty": 0.0}
    neutral |= {"logit_bias": {}, "store": False, "response_format": {"type": "text"}, "tool_choice": "none"}
    neutral |= {"parallel_tool_calls": True, "stop": None, "tools": None, "service_tier": "auto", "top_p": 1}
    assert server.chat(**neutral)["choices"] == server.chat()["choices"]
    assert server.chat(max_tokens=None, max_completion_tokens=8)["choices"] == server.chat()["choices"]


def test_models_by_name(server: Server) -> None:
    listed = server.ask("/v1/models")[1]["data"]
    assert [(one["id"], one["stage"], one["version"]) for one in listed] == [
        ("base", "base", 1),
        ("kind", "sft", 1),
        ("curt", "sft", 1),
        ("judge", "reward", 1),
        ("other", "reward", 1),
    ]
    assert server.ask("/v1/models/kind")[1]["id"] == "kind"
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        (SCORE, {"prompt": "x", "answers": ["y"]}),
    ):
        for model in ("kinder", "judge" if path == CHAT else "kind"):
            status, answer = server.ask(path, body | {"model": model})
            assert status == 404 and answer["error"]["code"] == "model_not_found"
            assert model in answer["error"]["message"]


def test_scores_are_those_of_the_command(server: Server) -> None:
    runs, answers = server.runs, ["A tea, of course.", "No. Go away! We are closed.", "Tea"]
    body = {"model": ["judge", "other"], "messages": [{"role": "user", "content": "Tea?"}], "answers": answers}
    with ThreadPoolExecutor(4) as pool:  # whatever else is being computed
        busy = [pool.submit(server.chat, "kind", "A story?", max_tokens=100) for _ in range(3)]
        rows = server.ask(SCORE, body | {"explain": True})[1]["data"]
        assert all(one.result() for one in busy)
    records = [Rating([{"role": "user", "content": "Tea?"}], answer, True, "g") for answer in answers]
    names = ("judge", "other")
    tables, _ = score_by_members(runs.model, runs.encoder, records, names, 4096, "tree")
    for number, row in enumerate(rows):
        first, second = (found[0] for table in tables if (found := table[number]))
        assert row["members"] == {"judge": [pytest.approx(first, abs=1e-4)], "other": [pytest.approx(second, abs=1e-4)]}
        assert row["score"] == pytest.approx((first + second) / 2, abs=1e-4)
        assert row["spread"] == pytest.approx(abs(first - second) / 2, abs=1e-4)
        assert "".join(part["text"] for part in row["explanation"]["sentences"]) == answers[number]
    last = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": answers[0]}]
    again = server.ask(SCORE, {"model": "judge", "messages": last})[1]["data"][0]
    assert again["score"] == pytest.approx(rows[0]["scores"]["judge"], abs=1e-5)
    ranked = server.ask("/v1/rerank", {"model": "judge", "query": "Tea?", "documents": answers, "top_n": 2})[1]
    assert len(ranked["results"]) == 2 and ranked["results"][0]["relevance_score"] == pytest.approx(
        max(row["scores"]["judge"] for row in rows), abs=1e-4
    )


def test_the_best_of_several(server: Server) -> None:
    every = server.chat("kind", "Tea?", n=5)["choices"]
    texts = [choice["message"]["content"] for choice in every]
    body = {"model": "judge", "messages": [{"role": "user", "content": "Tea?"}], "answers": texts}
    scores = [row["score"] for row in server.ask(SCORE, body)[1]["data"]]
    best = sorted(range(5), key=lambda at: -scores[at])[:2]
    found = server.chat("kind", "Tea?", n=2, best_of=5, reward="judge")
    assert [choice["message"]["content"] for choice in found["choices"]] == [texts[at] for at in best]
    assert [choice["index"] for choice in found["choices"]] == [0, 1]


def test_what_people_say_is_a_label(server: Server) -> None:
    answer = server.chat("kind", "Is this a label?")
    status, said = server.ask("/v1/feedback", {"id": answer["id"], "thumb": "up", "user": "Ann", "reason": "kind"})
    assert status == 200 and said["stored"] and said["source"] == "serve:kind@1"
    assert server.ask("/v1/feedback", {"id": "nobody's", "thumb": "up"})[0] == 400
    feedback = server.service.feedback
    assert feedback is not None
    store = Store(feedback.store.path.parent / LABELS)
    label = store.labels()[-1]
    assert (label.labeller.name, label.said.verdict, label.question.prompt) == (
        "Ann",
        "up",
        [{"role": "user", "content": "Is this a label?"}],
    )
    assert label.question.answers == (answer["choices"][0]["message"]["content"],)
    store.close()


def test_a_client_that_leaves_is_computed_for_no_more(server: Server) -> None:
    before = server.engine.counts.cancelled
    body = {"model": "kind", "messages": [{"role": "user", "content": "A story"}], "max_tokens": 200, "ignored": None}
    for stream in (True, False):
        for _ in range(4):
            sent = json.dumps(body | {"stream": stream, "n": 2, "stop": "never said"}).encode()
            with socket.create_connection(("127.0.0.1", server.port)) as there:
                head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(sent)}\r\n\r\n"
                there.sendall(head.encode() + sent)
                if stream:
                    there.recv(200)
    server.until(lambda: server.engine.running == 0 and server.engine.waiting == 0)
    assert server.engine.counts.cancelled > before
    assert server.chat()["choices"], "and the server goes on"


def test_too_many_are_told_to_come_again(runs: Runs) -> None:
    with serving(runs, ("kind",), Limits(rows=1, waiting=2, tokens=2000, seconds=60)) as server:
        body = {"model": "kind", "messages": [{"role": "user", "content": "A story"}], "max_tokens": 150, "seed": 1}
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda _: (server.ask(CHAT, body), server.headers.get("Retry-After")), range(12)))
        statuses = [status for (status, _), _ in found]
        assert set(statuses) == {200, 429}
        (_, refused), _ = next(one for one in found if one[0][0] == 429)
        assert refused["error"]["type"] == "rate_limit_error"
        assert len({json.dumps(answer["choices"]) for (status, answer), _ in found if status == 200}) == 1
        assert server.engine.counts.refused == statuses.count(429)


def test_a_request_that_takes_too_long_is_ended(runs: Runs) -> None:
    with serving(runs, ("kind",), Limits(rows=1, waiting=8, tokens=2000, seconds=0.05)) as server:
        body = {"model": "kind", "messages": [{"role": "user", "content": "A story"}], "max_tokens": 200, "n": 1}
        assert server.ask(CHAT, body)[0] == 504
        events = server.stream(**body)
        assert events[-1]["error"]["code"] == "504", "a stream says so, too"


def test_versions(runs: Runs) -> None:
    """A request ends on the version that it began with; the next one has what is on disk then."""
    directory = runs.save("kind", "changing")
    with serving(runs, ("changing",)) as server:
        first = server.chat("changing", max_tokens=8)
        assert first["system_fingerprint"] == "changing@1"
        long: list[Any] = []
        asked: dict[str, Any] = {"max_tokens": 120, "temperature": 1, "seed": 8}
        alone = server.chat("changing", **asked)
        thread = threading.Thread(target=lambda: long.append(server.chat("changing", **asked)))
        thread.start()
        server.until(lambda: server.engine.running)
        copy = runs.model.copy_adapter("kind", "later", "policy")
        randomise(runs.model, "later", 77)
        runs.save("later", "changing")
        assert server.service.models.changed() == {"changing": directory}
        (loaded,) = server.engine.run(server.service.models.refresh).result()
        assert loaded.version == 2 and server.service.models.changed() == {}
        thread.join()
        assert long[0]["choices"] == alone["choices"] and long[0]["system_fingerprint"] == "changing@1"
        second = server.chat("changing", max_tokens=8)
        assert second["system_fingerprint"] == "changing@2" and second["choices"] != first["choices"]
        ids = expected(runs, "later", "Tea?").completions[0]
        assert second["choices"][0]["message"]["content"] == runs.encoder.decode(ids)
        server.until(lambda: not any(name.startswith("changing@1") for name in server.service.models.model.adapters))
        # A version that can't be used leaves the old one in its place.
        (directory / "adapter_model.safetensors").write_bytes(b"cut off")
        assert server.engine.run(server.service.models.refresh).result() == []
        assert server.chat("changing")["choices"] == second["choices"]
    del runs.model.adapters[copy.name]


def test_loading_and_unloading_while_it_runs(runs: Runs) -> None:
    with serving(runs, ("curt",)) as server:
        before = server.chat("curt")["choices"]
        status, loaded = server.ask("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "kind"})
        assert status == 200 and loaded["id"] == "mine"
        ids = expected(runs, "kind", "Tea?").completions[0]
        assert server.chat("mine")["choices"][0]["message"]["content"] == runs.encoder.decode(ids)
        assert server.ask("/v1/unload_lora_adapter", {"lora_name": "mine"})[0] == 200
        assert server.ask("/v1/unload_lora_adapter", {"lora_name": "mine"})[0] == 404
        assert server.ask("/v1/unload_lora_adapter", {"lora_name": "base"})[0] == 404
        assert [one["id"] for one in server.ask("/v1/models")[1]["data"]] == ["base", "curt"]
        server.until(lambda: len(server.service.models.model.adapters) == 1)
        assert server.chat("curt")["choices"] == before


def test_who_may_ask(runs: Runs) -> None:
    token = "a-token-of-twenty-letters"
    with serving(runs, ("kind",), token=token, origins=("https://chat.example",)) as server:
        for path in ("/v1/models", "/metrics", "/v1/models/kind"):
            assert server.ask(path)[0] == 401 and server.headers["WWW-Authenticate"] == "Bearer"
        assert server.ask("/health")[0] == 200
        assert server.ask("/v1/models", Authorization="Bearer wrong")[0] == 401
        key: Any = {"Authorization": f"Bearer {token}"}
        assert server.ask("/v1/models", **key)[0] == 200
        assert server.ask("/v1/models", Host="evil.example", **key)[0] == 421
        body = {"model": "kind", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        assert server.ask(CHAT, body, Origin="https://evil.example", **key)[0] == 403
        assert "Access-Control-Allow-Origin" not in server.headers
        assert server.ask(CHAT, body, Origin="https://chat.example", **key)[0] == 200
        assert server.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert server.ask(CHAT, method="OPTIONS", Origin="https://chat.example")[0] == 204
        assert server.ask(CHAT, method="OPTIONS", Origin="https://evil.example")[0] == 403
        # A browser shows the token once and keeps a cookie, with which this server's own page alone may ask.
        own = f"http://127.0.0.1:{server.port}"
        assert server.ask("/", method="GET")[0] == 303 and server.headers["Location"] == "/enter"
        assert server.ask("/enter", raw=b"token=wrong-one", Origin=own)[0] == 403
        assert server.ask("/enter", raw=f"token={token}".encode(), Origin=own)[0] == 303
        given = server.headers["Set-Cookie"]
        assert "HttpOnly" in given and "samesite=lax" in given.lower() and token not in given
        cookie = given.partition(";")[0]
        assert server.ask(CHAT, body, Cookie=cookie, Origin=own)[0] == 200
        assert server.ask(CHAT, body, Cookie=cookie)[0] == 403
        assert server.ask("/v1/models", Cookie="perlhf-serve=made-up")[0] == 401


def test_bodies_that_are_too_large_or_none(server: Server) -> None:
    assert server.ask(CHAT, raw=b"x" * (5 * 2**20))[0] == 413
    for raw in (b"", b"{", b"[1]", b"null", b'"text"', b'{"model": "\\ud800"}', b"\xff\xfe", b"[" * 100_000):
        status, answer = server.ask(CHAT, raw=raw)
        assert status == 400 and answer["error"]["param"] == "body"
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask(CHAT, method="GET")[0] == 405


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = (
    "model messages prompt max_tokens n stop stream stream_options temperature top_p logprobs top_logprobs seed tools "
)
KEYS += "best_of reward answers answer explain query documents id index thumb first second verdict edit lora_name"


@settings(max_examples=150)
@given(
    path=st.sampled_from([CHAT, TEXT, SCORE, "/v1/rerank", "/v1/feedback", "/v1/load_lora_adapter", "/chat/render"]),
    body=st.dictionaries(st.sampled_from(KEYS.split()), ANY, max_size=6),
    known=st.booleans(),
)
def test_no_body_is_a_mistake_of_ours(server: Server, path: str, body: dict[str, Any], known: bool) -> None:
    if known:
        model = "judge" if path in (SCORE, "/v1/rerank") else "curt"
        body = {"messages": [{"role": "user", "content": "Tea?"}], "prompt": "Tea?", "max_tokens": 2} | body
        body |= {"model": model}
    status, answer = server.ask(path, body)
    assert status < 500, (body, answer)


def test_two_hundred_clients_that_vanish(server: Server) -> None:
    """They leave in the middle of a request, of a stream, or before either; nobody else notices."""

    def vanish(number: int) -> None:
        sent = json.dumps(
            {"model": ("kind", "curt")[number % 2], "messages": [{"role": "user", "content": f"Story {number}"}]}
            | {"max_tokens": 60, "stream": number % 3 == 0}
        ).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as there:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(sent)}\r\n\r\n"
            there.sendall((head.encode() + sent)[: 40 if number % 5 == 0 else None])
            if number % 7 == 0 and number % 5:
                there.recv(50)

    with ThreadPoolExecutor(16) as pool:
        staying = [pool.submit(server.chat, "curt", "Still here?") for _ in range(5)]
        list(pool.map(vanish, range(200)))
        texts = {one.result()["choices"][0]["message"]["content"] for one in staying}
    assert len(texts) == 1
    server.until(lambda: server.engine.running == 0 and server.engine.waiting == 0, 60)
    assert server.chat("curt", "Still here?")["choices"][0]["message"]["content"] in texts


def test_numbers_for_prometheus(server: Server) -> None:
    text = server.ask("/metrics")[1]
    assert "perlhf_sampled_tokens_total" in text and 'perlhf_requests_total{path="other",status="404"}' in text
    assert "Tea?" not in text


def test_a_reader_that_is_slow_holds_up_nobody(server: Server) -> None:
    body = {
        "model": "kind",
        "messages": [{"role": "user", "content": "Tea?"}],
        "max_tokens": 60,
        "stream": True,
        "seed": 3,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", CHAT, json.dumps(body), {"Host": f"127.0.0.1:{server.port}"})
    answer = connection.getresponse()
    first = answer.read(10)
    for _ in range(3):
        assert server.chat()["choices"]
    whole = (first + answer.read()).decode()
    connection.close()
    assert whole.endswith("data: [DONE]\n\n") and len(whole.split("\n\n")) > 3
