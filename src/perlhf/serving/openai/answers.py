"""What is answered, in OpenAI's shapes: whole, or in pieces as it grows."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from perlhf.errors import PerlhfError
from perlhf.rollout.local import Ends
from perlhf.serving.engine import Busy, Refused, Sampled
from perlhf.serving.models import Speaker

CALL = "<tool_call>"
"""Before a call in the text of networks that learned to call tools so, such as Qwen's, Hermes' and SmolLM's."""
_CALLS = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|$)", re.S)


@dataclass
class Growing:
    """One completion as its tokens come.

    Args:
        ends: what ends it, and tells texts of tokens.
        trimmed: without white space around it, as a chat shows it.
        calls: what looks like a call of a tool isn't text.
    """

    ends: Ends
    trimmed: bool
    calls: bool = False
    tokens: list[Sampled] = field(default_factory=list[Sampled])
    shown: str = ""

    @property
    def finish(self) -> Literal["stop", "length"] | None:
        """Why it is at its end; None while it isn't."""
        return self.tokens[-1].finish if self.tokens else None

    @property
    def ids(self) -> list[int]:
        """All of its tokens."""
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        """All of it."""
        text = self.ends.untrimmed(self.ids)
        return text.strip() if self.trimmed else text

    def piece(self) -> str:
        """What can be shown now and wasn't yet."""
        text = self.text
        if self.finish is None:
            # Half a character waits for its other half, and what may begin a stop string or a call for the rest of it.
            text = self.ends.settled(text.rstrip("\ufffd"))
        if self.calls:
            text = _before_calls(text) if self.finish is None else parted(text)[0]
        if self.trimmed:
            text = text.rstrip()
        added = text[len(self.shown) :] if text.startswith(self.shown) else ""
        self.shown += added
        return added

    def called(self) -> tuple[str, list[dict[str, Any]]]:
        """Its text without calls, and the calls that it holds."""
        if not self.calls:
            return self.text, []
        text, calls = parted(self.text)
        return text.strip() if self.trimmed else text, calls


def parted(text: str) -> tuple[str, list[dict[str, Any]]]:
    """A text without the calls of tools in it, and these as OpenAI has them; what is no call in JSON stays text."""
    found: list[dict[str, Any]] = []

    def call(match: re.Match[str]) -> str:
        try:
            content = json.loads(match[1])
        except (ValueError, RecursionError):
            return match[0]
        name, given = content.get("name"), content.get("arguments", content.get("parameters", {}))
        if not isinstance(name, str):
            return match[0]
        said = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        function = {"name": name, "arguments": said}
        found.append({"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function})
        return ""

    return _CALLS.sub(call, text), found


def chat_choice(growing: Growing, index: int, logprobs: bool) -> dict[str, Any]:
    """One of a chat's answers, whole."""
    text, calls = growing.called()
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    finish = "tool_calls" if calls else growing.finish
    told = {"content": [_told(growing.ends, token) for token in growing.tokens], "refusal": None} if logprobs else None
    return {"index": index, "message": message, "logprobs": told, "finish_reason": finish}


def text_choice(growing: Growing, index: int, logprobs: bool) -> dict[str, Any]:
    """One completion of a text, whole."""
    told = text_logprobs(growing.ends, growing.tokens, 0) if logprobs else None
    return {"index": index, "text": growing.text, "logprobs": told, "finish_reason": growing.finish}


def chat_pieces(growing: Growing, index: int, new: Sequence[Sampled], logprobs: bool, first: bool) -> list[Any]:
    """The choices of a stream's next chunks, for tokens that have just come."""
    chunks: list[dict[str, Any]] = []
    if first:
        chunks.append({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
    piece = growing.piece()
    if piece or logprobs:
        chunk: dict[str, Any] = {"index": index, "delta": {"content": piece}, "finish_reason": None}
        if logprobs:
            chunk["logprobs"] = {"content": [_told(growing.ends, token) for token in new], "refusal": None}
        chunks.append(chunk)
    if growing.finish is not None:
        _, calls = growing.called()
        if calls:
            delta = {"tool_calls": [call | {"index": number} for number, call in enumerate(calls)]}
            chunks.append({"index": index, "delta": delta, "finish_reason": None})
        chunks.append({"index": index, "delta": {}, "finish_reason": "tool_calls" if calls else growing.finish})
    return chunks


def text_pieces(growing: Growing, index: int, new: Sequence[Sampled], logprobs: bool) -> list[Any]:
    """As `chat_pieces`, of a text."""
    piece = growing.piece()
    if not (piece or logprobs or growing.finish):
        return []
    told = text_logprobs(growing.ends, new, len(growing.shown) - len(piece)) if logprobs else None
    return [{"index": index, "text": piece, "logprobs": told, "finish_reason": growing.finish}]


def text_logprobs(ends: Ends, tokens: Sequence[Sampled], offset: int) -> dict[str, Any]:
    """Log-probabilities as `/v1/completions` has them."""
    texts = [_text(ends, token.id) for token in tokens]
    offsets: list[int] = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    likeliest = [{_text(ends, number): logprob for number, logprob in token.likeliest} for token in tokens]
    logprobs = [token.logprob for token in tokens]
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": likeliest, "text_offset": offsets}


def about(kind: str, speaker: Speaker, number: str, created: int) -> dict[str, Any]:
    """What stands in every answer and every chunk."""
    fingerprint = f"{speaker.name}@{speaker.version}"
    return {"id": number, "object": kind, "created": created, "model": speaker.name, "system_fingerprint": fingerprint}


def usage(prompted: int, sampled: int) -> dict[str, int]:
    """Tokens that a request took."""
    return {"prompt_tokens": prompted, "completion_tokens": sampled, "total_tokens": prompted + sampled}


def problem(error: PerlhfError) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer that says why there is none."""
    busy = isinstance(error, Busy)
    status = (429 if "waiting" in error.what else 503) if busy else 400
    parts = [
        error.what,
        f"allowed: {error.allowed}" if error.allowed else "",
        f"try: {error.hint}" if error.hint else "",
    ]
    kind = "rate_limit_error" if busy else "invalid_request_error"
    if isinstance(error, Refused) and error.where == "context":
        return 400, said("; ".join(filter(None, parts)), kind, "messages", "context_length_exceeded")
    if error.where == "model" and not isinstance(error, Refused):
        status = 404
    return status, said("; ".join(filter(None, parts)), kind, error.where, "model_not_found" if status == 404 else None)


def said(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def now() -> int:
    """Seconds, as answers have them."""
    return int(time.time())


def _before_calls(text: str) -> str:
    """The part of a growing text before the first call, or before what may begin one."""
    if (at := text.find(CALL)) >= 0:
        return text[:at]
    begun = next((size for size in range(len(CALL) - 1, 0, -1) if text.endswith(CALL[:size])), 0)
    return text[: len(text) - begun]


def _text(ends: Ends, number: int) -> str:
    """Of one token; of one that is no whole character by itself its number, so that no two look alike."""
    assert ends.encoder is not None
    decode = ends.encoder.tokenizer.decode
    text = str(decode([number], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return f"token:{number}" if "\ufffd" in text else text


def _told(ends: Ends, token: Sampled) -> dict[str, Any]:
    """A token with its log-probability, and those of the likeliest."""
    likeliest = [_with_bytes(ends, number, logprob) for number, logprob in token.likeliest]
    return _with_bytes(ends, token.id, token.logprob) | {"top_logprobs": likeliest}


def _with_bytes(ends: Ends, number: int, logprob: float) -> dict[str, Any]:
    text = _text(ends, number)
    found = None if text == f"token:{number}" else list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": found}
