"""The chat page: what a browser loads, and what it asks besides the server's own interface.

    GET  /                   the page, its texts escaped by the template
    GET  /chat/files/NAME    its style and script
    POST /chat/render        {"texts": [...]}: Markdown as HTML that can hold no markup of its own
    POST /chat/why           {"explanations": [...], "models": 1}: what moved a score, as HTML

Everything else is the interface that other clients have: `/v1/models`, `/v1/chat/completions`, `/v1/feedback` and
`/v1/score`. The page runs no script but its own and loads nothing from elsewhere (`HEADERS`).
"""

import json
from importlib import resources
from math import isfinite
from typing import Any

import jinja2
from markupsafe import Markup, escape
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from perlhf.labelling.pages import shown
from perlhf.labelling.pages.explained import Explained
from perlhf.labelling.pages.server import HEADERS

__all__ = ["HEADERS", "BadRequest", "chat_routes", "render", "why"]

BODY_BYTES, TEXTS, TEXT_LETTERS, MOST_TOKENS = 2 * 2**20, 200, 200_000, 20_000
_OWN, _LABELLING = (resources.files(f"perlhf.{name}") / "pages" for name in ("serving", "labelling"))
_FILES = {
    "label.css": (_LABELLING, "text/css"),
    "chat.css": (_OWN, "text/css"),
    "chat.js": (_OWN, "text/javascript"),
}


class BadRequest(ValueError):
    """A body that no page of ours sends, in a sentence."""


def chat_routes(*, feedback: bool, title: str = "Chat") -> list[Route]:
    """The page's routes, whose answers have `HEADERS`; the server's guard looks at requests before.

    Args:
        feedback: `/v1/feedback` stores what people say; otherwise the page asks for none.
        title: heading of the page.
    """

    async def page(_: Request) -> Response:
        html = _templates.get_template("chat.html.j2").render(feedback=feedback, title=title)
        return HTMLResponse(html, headers=HEADERS)

    return [
        Route("/", page),
        Route("/chat/files/{name}", _file),
        Route("/chat/render", _answered(render), methods=["POST"]),
        Route("/chat/why", _answered(why), methods=["POST"]),
    ]


def render(body: Any) -> dict[str, Any]:
    """`html` of each of the `texts`.

    Raises:
        BadRequest: it is no list of texts.
    """
    texts = body.get("texts") if isinstance(body, dict) else None
    if not isinstance(texts, list) or len(texts) > TEXTS or not all(isinstance(text, str) for text in texts):
        raise BadRequest(f"texts is no list of at most {TEXTS} texts")
    return {"html": [_html(_utf8(text)) for text in texts]}


def why(body: Any) -> dict[str, Any]:
    """`html` of `explanations`, as `/v1/score` gives them: of each answer `score`, `sentences` and `tokens`.

    Raises:
        BadRequest: they are none.
    """
    rows, models = (body.get("explanations"), body.get("models", 1)) if isinstance(body, dict) else (None, 1)
    if not isinstance(rows, list) or not 1 <= len(rows) <= 16 or not all(map(_is_explanation, rows)):
        raise BadRequest("explanations is no list of explanations of scores")
    if type(models) is not int or not 1 <= models <= 1000:
        raise BadRequest("models is no number of models")
    explained: Explained = [None if row is None else _row(row) for row in rows]
    names = ["The answer"] if len(rows) == 1 else [f"Answer {at}" for at in range(1, len(rows) + 1)]
    template = _templates.get_template("why.html.j2")
    return {"html": template.render(explained=shown.scored(explained, names), models=models)}


# inside


def _load(name: str) -> str:
    return ((_OWN if name == "chat.html.j2" else _LABELLING) / name).read_text("utf-8")


_templates = jinja2.Environment(
    loader=jinja2.FunctionLoader(_load), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)


async def _file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _FILES:
        return PlainTextResponse("No such file.", 404, HEADERS)
    place, kind = _FILES[name]
    return Response((place / name).read_text("utf-8"), media_type=kind, headers=HEADERS)


def _answered(make: Any) -> Any:
    """A handler that gives what `make` makes of the body."""

    async def handler(request: Request) -> Response:
        found = bytearray()
        try:
            async for part in request.stream():
                found += part
                if len(found) > BODY_BYTES:
                    return JSONResponse({"problem": f"At most {BODY_BYTES // 2**20} MiB are taken."}, 413, HEADERS)
            return JSONResponse(await run_in_threadpool(make, json.loads(found)), headers=HEADERS)
        except ClientDisconnect:
            return Response(status_code=499)
        except BadRequest as error:
            return JSONResponse({"problem": str(error)}, 400, HEADERS)
        except (ValueError, RecursionError):
            return JSONResponse({"problem": "The body is no JSON."}, 400, HEADERS)

    return handler


def _html(text: str) -> Markup:
    """Text that is too long for Markdown is shown as it is."""
    if len(text) > TEXT_LETTERS:
        return Markup('<pre tabindex="0">{}</pre>').format(escape(text))
    return shown.markdown(text)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _is_explanation(row: Any) -> bool:
    if row is None:
        return True
    parts, tokens = (row.get("sentences"), row.get("tokens")) if isinstance(row, dict) else (None, None)
    return (
        isinstance(row, dict)
        and _is_number(row.get("score"))
        and isinstance(parts, list)
        and isinstance(tokens, list)
        and len(parts) <= MOST_TOKENS  # none of an empty answer
        and 1 <= len(tokens) <= MOST_TOKENS
        and all(
            isinstance(part, dict)
            and isinstance(part.get("text"), str)
            and (part.get("effect") is None or _is_number(part["effect"]))
            for part in parts
        )
        and all(isinstance(pair, list) and len(pair) == 2 and _is_number(pair[1]) for pair in tokens)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and isfinite(value)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    parts = [{"text": _utf8(part["text"]), "effect": part.get("effect")} for part in row["sentences"]]
    return {"score": float(row["score"]), "sentences": parts, "tokens": [("", score) for _, score in row["tokens"]]}
