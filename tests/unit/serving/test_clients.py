"""The official client of OpenAI's interface, and what other programs send, against a real server."""

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from serving_world import Runs, Server, make_parrot, make_runs, serving

from perlhf.serving.engine import Limits

TEA: list[Any] = [{"role": "user", "content": "Tea?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLING = (
    "I will",
    " look.",
    "\n\n<tool",
    '_call>\n{"name": "weather", ',
    '"arguments": {"city": "Rome"}}',
    "\n</tool_",
)
CALLING += ("call>\n<", 'tool_call>{"name": "weather", "arguments"', ': {"city": "Oslo"}}</', "tool_call>\n")
"""What the parrot says, in the pieces that are its tokens."""


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"), tiny_base)


@pytest.fixture(scope="module")
def server(runs: Runs) -> Iterator[Server]:
    with serving(runs) as server:
        yield server


@pytest.fixture(scope="module")
def parrot(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(make_parrot(tmp_path_factory.mktemp("parrot"), tiny_base, CALLING), ()) as server:
        yield server


def client_of(server: Server, key: str = "none", retries: int = 0) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=retries)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with client_of(server) as client:
        yield client


def test_the_example_of_the_page_on_serving(runs: Runs, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text("utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    runs.save("kind", "policy")
    with serving(runs, ("policy",), project=tmp_path / "feedback") as server:
        exec(compile(code.replace(":8000", f":{server.port}"), "docs/serving.md", "exec"), {})
        assert server.service.feedback is not None
        assert [label.said.verdict for label in server.service.feedback.store.labels()] == ["up"]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "kind", "curt", "judge"]
    assert client.models.retrieve("kind").owned_by == "perlhf"


def test_a_chat_whole_and_streamed(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "kind", "messages": TEA, "seed": 3, "max_completion_tokens": 12, "n": 2}
    whole = client.chat.completions.create(**asked)
    assert whole.model == "kind" and [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None and whole.usage.total_tokens > whole.usage.completion_tokens > 2
    texts, ends = ["", ""], ["", ""]
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ""
        assert chunk.usage is None and chunk.id == chunks[0].id
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert last.choices == [] and last.usage == whole.usage


def test_log_probabilities(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "kind", "messages": TEA, "seed": 3, "max_tokens": 6, "temperature": 1}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert found is not None and found.content is not None and len(found.content) <= 6
    for token in found.content:
        ranked = [other.logprob for other in token.top_logprobs]
        assert ranked == sorted(ranked, reverse=True) and ranked[0] >= token.logprob and len(ranked) == 3
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    text = client.completions.create(model="kind", prompt="Tea", seed=3, max_tokens=6, logprobs=2).choices[0]
    assert text.logprobs is not None and text.logprobs.token_logprobs is not None
    assert text.logprobs.tokens is not None and len(text.logprobs.tokens) == len(text.logprobs.token_logprobs)


def test_completions_of_several_texts(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "curt", "prompt": ["Tea", "Coffee"], "seed": 1, "max_tokens": 8}
    whole = client.completions.create(**asked)
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_keys_of_our_own(server: Server, client: OpenAI) -> None:
    best = client.chat.completions.create(
        model="kind", messages=TEA, seed=3, max_tokens=8, extra_body={"best_of": 3, "reward": "judge"}
    )
    assert len(best.choices) == 1
    said: Any = client.post("/score", body={"model": "judge", "messages": TEA, "answer": "Yes."}, cast_to=object)
    assert said["data"][0]["score"] == pytest.approx(
        server.ask("/v1/score", {"model": "judge", "messages": TEA, "answer": "Yes."})[1]["data"][0]["score"], abs=1e-5
    )


def test_calls_of_tools(parrot: Server) -> None:
    with client_of(parrot) as client:
        asked: dict[str, Any] = {"model": "base", "messages": TEA, "temperature": 0, "max_tokens": 40}
        plain = client.chat.completions.create(**asked).choices[0]
        assert plain.message.content == "".join(CALLING).strip() and plain.finish_reason == "stop"
        assert plain.message.tool_calls is None, "who names no tools is told the text as it is"
        asked |= {"tools": [WEATHER], "tool_choice": "auto"}
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.message.content == "I will look." and whole.finish_reason == "tool_calls"
        wanted = [("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})]
        calls: Any = whole.message.tool_calls
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == wanted
        assert len({call.id for call in calls}) == 2
        text, streamed, finish = "", list[Any](), None
        for chunk in client.chat.completions.create(**asked, stream=True):
            (choice,) = chunk.choices
            text += choice.delta.content or ""
            streamed += choice.delta.tool_calls or []
            finish = choice.finish_reason or finish
        assert text == "I will look." and finish == "tool_calls"
        assert [(call.index, call.function.name) for call in streamed] == [(0, "weather"), (1, "weather")]
        assert [json.loads(call.function.arguments) for call in streamed] == [given for _, given in wanted]
        with client.chat.completions.stream(**asked) as stream:  # as the client puts a stream together
            assert stream.get_final_completion().choices[0].message.tool_calls is not None
        # What the tool says goes back to the model, as the client holds the call.
        back = [*TEA, whole.message.model_dump(), {"role": "tool", "tool_call_id": calls[0].id, "content": "Sunny."}]
        again = client.chat.completions.create(**{**asked, "messages": back, "tool_choice": "none"})
        assert again.choices[0].finish_reason == "stop" and again.usage is not None
        tokens = len("".join([calls[0].function.arguments, calls[1].function.arguments, "Sunny."]))
        assert again.usage.prompt_tokens > tokens, "and the model reads it: letters are tokens here"


def test_tools_without_a_place_for_them(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="kind", messages=TEA, tools=[WEATHER])


def test_errors_are_the_classes_that_the_client_has(runs: Runs, client: OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="kind", messages=TEA, frequency_penalty=0.5)
    assert refused.value.param == "frequency_penalty" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="kind", messages=TEA, max_tokens=10_000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="kinder", messages=TEA)
    assert missing.value.code == "model_not_found" and "kind" in missing.value.message
    with serving(runs, ("kind",), token="a-token-of-twenty-letters") as server:
        with client_of(server, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with client_of(server, "a-token-of-twenty-letters") as known:
            assert known.models.list().data
    slow: dict[str, Any] = {"model": "kind", "messages": TEA, "max_tokens": 200, "seed": 1}
    with serving(runs, ("kind",), Limits(rows=1, waiting=1, tokens=2000, seconds=60)) as server:
        with client_of(server) as hasty, ThreadPoolExecutor(6) as pool:
            waiting = [pool.submit(hasty.chat.completions.create, **slow) for _ in range(6)]
            errors = [one.exception() for one in waiting]
        assert any(isinstance(error, openai.RateLimitError) for error in errors) and None in errors
        assert all(error is None or isinstance(error, openai.RateLimitError) for error in errors)
        with client_of(server, retries=20) as patient, ThreadPoolExecutor(3) as pool:  # comes again, as it is told to
            short: dict[str, Any] = {**slow, "max_tokens": 20}
            assert len(list(pool.map(lambda _: patient.chat.completions.create(**short).id, range(3)))) == 3
    with serving(runs, ("kind",), Limits(rows=1, waiting=1, tokens=2000, seconds=0.02)) as server:
        with client_of(server) as late:
            with pytest.raises(openai.InternalServerError):
                late.chat.completions.create(**slow)
            with pytest.raises(openai.APIError, match="longer than"):
                list(late.chat.completions.create(**slow, stream=True))


def test_eight_streams_at_once(server: Server, client: OpenAI) -> None:
    asked: dict[str, Any] = {"messages": TEA, "max_tokens": 16}

    async def one(asynchronous: AsyncOpenAI, number: int) -> str:
        text, model = "", ("kind", "curt")[number % 2]
        async for chunk in await asynchronous.chat.completions.create(**asked, model=model, seed=number, stream=True):
            text += chunk.choices[0].delta.content or ""
        return text

    async def all_of_them() -> list[str]:
        address = f"http://127.0.0.1:{server.port}/v1"
        async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as asynchronous:
            return await asyncio.gather(*(one(asynchronous, number) for number in range(8)))

    for number, text in enumerate(asyncio.run(all_of_them())):
        alone = client.chat.completions.create(**asked, model=("kind", "curt")[number % 2], seed=number)
        assert text == alone.choices[0].message.content


OPEN_WEBUI: dict[str, dict[str, Any]] = {
    "chat": {
        "stream": True,
        "messages": [{"role": "system", "content": "Be kind."}, *TEA],
        "stream_options": {"include_usage": True},
    },
    "parameters of a chat": {
        "stream": True,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Tea?"}]}],
        "temperature": 0.8,
        "top_p": 0.9,
        "min_p": 0.0,
        "max_tokens": 8,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "seed": 42,
        "stop": ["###"],
        "reasoning_effort": None,
        "stream_options": {"include_usage": True},
    },
    "title": {
        "stream": False,
        "messages": [
            {"role": "user", "content": "### Task:\nGenerate a title.\n<chat_history>USER: Tea?</chat_history>"}
        ],
        "max_completion_tokens": 30,
    },
    "follow-ups": {"stream": False, "messages": [{"role": "user", "content": "### Task:\nSuggest questions."}]},
    "an older chat": {
        "stream": True,
        "messages": TEA,
        "chat_id": "c1",
        "session_id": "s1",
        "id": "m1",
        "user": {"name": "Ann", "id": "u1", "email": "ann@example.com", "role": "user"},
        "metadata": {"task": "chat"},
    },
}
"""What its backend forwards to an address of OpenAI's kind, once it has taken its own keys (`features`, `variables`,
`tool_ids`, `background_tasks`, ...) out of what its page sends."""


@pytest.mark.parametrize("shape", list(OPEN_WEBUI))
def test_what_open_webui_sends(server: Server, shape: str) -> None:
    body = {"model": "kind", "max_tokens": 8} | OPEN_WEBUI[shape]
    if "max_completion_tokens" in body:
        del body["max_tokens"]
    if body["stream"]:
        events = server.stream(**{key: value for key, value in body.items() if key != "stream"})
        assert events[-1] == "[DONE]" and events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert ("usage" in events[-2]) == ("stream_options" in body)
    else:
        status, answer = server.ask("/v1/chat/completions", body)
        assert status == 200 and answer["choices"][0]["message"]["role"] == "assistant"


def test_open_webui_calls_tools(parrot: Server) -> None:
    """It sends what was called and what came of it back in one conversation, calls beside an empty text."""
    call = {"index": 0, "id": "call_1", "type": "function"}
    call |= {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        *TEA,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    events = parrot.stream(model="base", messages=turns, tools=[WEATHER], temperature=0, max_tokens=40)
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_what_langchain_sends(server: Server, parrot: Server) -> None:
    """`ChatOpenAI` and `OpenAI` name keys that they have no value for, and a called tool beside no content at all."""
    nothing = {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": None, "seed": None, "n": 1, "top_p": 1}
    body: dict[str, Any] = {"model": "kind", "max_tokens": 6, "temperature": 0.7} | nothing
    assert server.ask("/v1/completions", body | {"prompt": ["Tea"]})[1]["object"] == "text_completion"
    assert server.stream("/v1/completions", **body, prompt="Tea")[-1] == "[DONE]"
    call = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        *TEA,
        {"content": None, "role": "assistant", "tool_calls": [call]},
        {"content": "Sunny.", "role": "tool", "tool_call_id": "c1"},
    ]
    answer = parrot.chat("base", messages=turns, tools=[WEATHER], temperature=0, max_tokens=40, stream=False)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
