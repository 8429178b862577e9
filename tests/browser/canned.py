"""A server that speaks as `perlhf serve` does, for answers that no tiny base writes: Markdown, markup, long ones.

python canned.py [--project PROJECT] [--port 0]
"""

import argparse
import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from perlhf.errors import PerlhfError, StorageError
from perlhf.serving.feedback import Answers, Feedback
from perlhf.serving.page import chat_routes

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> [a](javascript:alert(3)) ![b](http://c/d.png)"
ANSWERS = {
    "policy": "Of course! **A large latte** to go.\n\n| item | size |\n|---|---|\n| latte | large |\n\n"
    "```\nlatte --large\n```\n\nAnything else?",
    "sft": f"A large latte. {HOSTILE}",
}
SECONDS = 0.01
"""Between two words."""


def application(feedback: Feedback | None) -> Starlette:
    answers, numbers = Answers(), itertools.count(1)

    async def models(_: Request) -> Response:
        stages = {"policy": "policy", "sft": "sft", "taste": "reward"}
        rows = [{"id": name, "object": "model", "stage": stage} for name, stage in stages.items()]
        return JSONResponse({"object": "list", "data": rows})

    async def chat(request: Request) -> Response:
        body = await request.json()
        id, model, asked = f"chatcmpl-{next(numbers)}", body["model"], body["messages"]
        text = "One word. " * 400 if "slowly" in asked[-1]["content"] else ANSWERS[model]

        def event(delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            content = {"id": id, "object": "chat.completion.chunk", "model": model, "choices": [choice]}
            return f"data: {json.dumps(content)}\n\n"

        async def stream() -> AsyncIterator[str]:
            yield event({"role": "assistant", "content": ""})
            for word in text.split(" "):
                await asyncio.sleep(SECONDS)
                yield event({"content": word + " "})
            answers.remember(id, 0, asked, text + " ", model, 1)
            yield event({}, "stop") + "data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def score(request: Request) -> Response:
        text = (await request.json())["messages"][-1]["content"]
        half = len(text) // 2
        parts = [{"text": text[:half], "effect": 0.25}, {"text": text[half:], "effect": -0.5}]
        one = {"score": 0.5, "sentences": parts, "tokens": [["a", 0.75], ["b", 0.5]]}
        row = {"index": 0, "score": 0.5, "spread": 0.1, "members": {"taste": [0.4, 0.6]}, "explanation": one}
        return JSONResponse({"data": [row]})

    async def said(request: Request) -> Response:
        assert feedback is not None
        try:
            return JSONResponse(await run_in_threadpool(feedback.take, await request.json(), answers, "somebody"))
        except PerlhfError as error:
            status = 507 if isinstance(error, StorageError) else 400
            return JSONResponse({"error": {"message": error.what, "param": error.where}}, status)

    routes = [
        *chat_routes(feedback=feedback is not None),
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/score", score, methods=["POST"]),
        Route("/v1/feedback", said, methods=["POST"]),
    ]
    return Starlette(routes=routes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--project", type=Path)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", options.port))
    listening.listen()
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
    app = application(Feedback(options.project) if options.project else None)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run([listening])


if __name__ == "__main__":
    main()
