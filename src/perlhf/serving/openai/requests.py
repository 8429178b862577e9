"""What requests may say, in OpenAI's words: each key is honoured, changes nothing, or is refused by name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perlhf.data.readers.messages import messages, tools
from perlhf.data.records import Message, Text, Tools
from perlhf.errors import DataError, nearest
from perlhf.serving.engine import Refused

MOST_STOPS = 16
MOST_LIKELIEST = 20
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "top_k": (-1, 0),
    "echo": (False,),
    "suffix": ("",),
    "store": (False, True),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "use_beam_search": (False,),
    "logprobs": (False,),
}
"""Keys that are taken where their value changes nothing, and that value."""
IGNORED = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "chat_id",
    "session_id",
    "id",
)
"""Keys that say something about the request and nothing about the answer."""


@dataclass(frozen=True)
class Wanted:
    """A request for completions, checked."""

    model: str
    prompts: tuple[Text | list[int], ...]
    """One conversation of a chat; texts or tokens of completions."""
    chat: bool
    count: int
    candidates: int
    """Sampled of each prompt: `best_of`, of which the best `count` are told."""
    reward: str | None
    """The reward run that says which are best."""
    longest: int | None
    temperature: float | None
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    """Whether a stream ends with what it took."""
    logprobs: int | None
    """Likeliest tokens to tell beside each token; None tells no log-probabilities."""
    tools: Tools | None


def decoded(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refused: it holds none.
    """
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error!r:.200}", where="body", allowed="a JSON object") from error
    if not isinstance(content, dict):
        raise Refused(f"the body is {_kind(content)}", where="body", allowed="a JSON object")
    return {key: value for key, value in content.items() if value is not None}


def chat(body: Mapping[str, Any]) -> Wanted:
    """A request of `/v1/chat/completions`.

    Raises:
        Refused: naming the key.
    """
    given = Keys(body)
    said = conversation(given.required("messages"))
    longest = given.whole("max_completion_tokens", 1)
    older = given.whole("max_tokens", 1)
    if longest is not None and older is not None and longest != older:
        raise Refused(
            f"max_tokens {older} and max_completion_tokens {longest}", where="max_tokens", allowed="one of them"
        )
    told, likeliest = given.flag("logprobs"), given.whole("top_logprobs", 0, MOST_LIKELIEST)
    if likeliest and not told:
        raise Refused(f"top_logprobs {likeliest} without logprobs", where="top_logprobs", allowed="with logprobs: true")
    choice = given.take("tool_choice")
    callable_ = given.take("tools")
    if choice is not None and choice not in ("auto", "none"):
        raise Refused(f"tool_choice {json.dumps(choice)[:80]}", where="tool_choice", allowed='"auto" or "none"')
    usable = None if choice == "none" or not callable_ else _read(lambda: tools(callable_, "tools"), "tools")
    return _common(given, (said,), True, longest or older, likeliest or 0 if told else None, usable)


def completion(body: Mapping[str, Any]) -> Wanted:
    """A request of `/v1/completions`: texts or tokens, without a chat template.

    Raises:
        Refused: naming the key.
    """
    given = Keys(body)
    prompts = _prompts(given.required("prompt"))
    likeliest = None
    if not isinstance(body.get("logprobs"), bool):
        likeliest = given.whole("logprobs", 0, MOST_LIKELIEST)
    return _common(given, prompts, False, given.whole("max_tokens", 1), likeliest, None)


def conversation(value: Any, key: str = "messages") -> tuple[Message, ...]:
    """Messages as the records of a file have them.

    Raises:
        Refused: naming the message.
    """
    if not isinstance(value, list) or not value:
        raise Refused(f"{key} is {_kind(value)}", where=key, allowed="a list of at least one message")
    return _read(lambda: messages(value, key, key), key)


class Keys:
    """The keys of a request, each taken once; what nobody takes is refused."""

    def __init__(self, body: Mapping[str, Any]):
        self._left = dict(body)
        self._known: list[str] = []

    def take(self, key: str, default: Any = None) -> Any:
        """The value, whatever it is."""
        self._known.append(key)
        return self._left.pop(key, default)

    def required(self, key: str) -> Any:
        """The value of a key that must be there."""
        if key not in self._left:
            raise Refused(f"{key} is missing", where=key, allowed="a value")
        return self.take(key)

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text."""
        value = self.take(key, default)
        if value is not None and not isinstance(value, str):
            raise Refused(f"{key} is {_kind(value)}", where=key, allowed="text")
        return value

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.take(key, False)
        if not isinstance(value, bool):
            raise Refused(f"{key} is {_kind(value)}", where=key, allowed="true or false")
        return value

    def whole(self, key: str, least: int, most: int | None = None) -> int | None:
        """A whole number in these bounds."""
        value = self.take(key)
        bounds = f"a whole number from {least}" + (f" to {most}" if most is not None else "")
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or value < least or (most is not None and value > most):
            raise Refused(f"{key} {json.dumps(value)[:40]}", where=key, allowed=bounds)
        return value

    def number(self, key: str, least: float, most: float) -> float | None:
        """A number in these bounds."""
        value = self.take(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not least <= value <= most:
            raise Refused(f"{key} {json.dumps(value)[:40]}", where=key, allowed=f"a number from {least:g} to {most:g}")
        return float(value)

    def finish(self) -> None:
        """Refuses what nobody took, unless it changes nothing."""
        for key, value in self._left.items():
            if key in IGNORED:
                continue
            if key in NEUTRAL:
                if not any(type(value) in (type(same), int, float) and value == same for same in NEUTRAL[key]):
                    allowed = " or ".join(json.dumps(same) for same in NEUTRAL[key])
                    raise Refused(f"{key} {json.dumps(value)[:60]} can't be honoured", where=key, allowed=allowed)
                continue
            known = [*self._known, *NEUTRAL, *IGNORED]
            hint = nearest(key, known)
            raise Refused(f"unknown key {key!r}", where=key, allowed=", ".join(sorted(set(self._known))), hint=hint)


def _common(
    given: Keys,
    prompts: tuple[Text | list[int], ...],
    is_chat: bool,
    longest: int | None,
    logprobs: int | None,
    usable: Tools | None,
) -> Wanted:
    model = given.text("model")
    if not model:
        raise Refused("model is missing", where="model", allowed="a name of /v1/models")
    count = given.whole("n", 1, 128) or 1
    candidates, reward = given.whole("best_of", 1, 128), given.text("reward")
    if candidates is not None and candidates < count:
        raise Refused(f"best_of {candidates} with n {count}", where="best_of", allowed=f"at least {count}")
    stream = given.flag("stream")
    if candidates is not None and candidates > count and stream:
        raise Refused(
            "best_of with stream", where="stream", allowed="false: the best is known when all are at their end"
        )
    if reward is not None and (candidates or count) == count:
        raise Refused("reward without best_of", where="reward", allowed="with best_of above n")
    wanted = Wanted(
        model,
        prompts,
        is_chat,
        count,
        candidates or count,
        reward,
        longest,
        given.number("temperature", 0, 10),
        given.number("top_p", 1e-6, 1) or 1.0,
        given.whole("seed", -(2**63), 2**63 - 1),
        _stops(given.take("stop")),
        stream,
        _usage(given.take("stream_options"), stream),
        logprobs,
        usable,
    )
    given.finish()
    return wanted


def _prompts(value: Any) -> tuple[Text | list[int], ...]:
    def one(value: Any) -> str | list[int] | None:
        if isinstance(value, str) and value:
            return value
        tokens = isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value)
        return value if tokens else None

    several = value if isinstance(value, list) and value and one(value) is None else [value]
    found = [one(each) for each in several]
    if len(found) > 128 or any(each is None for each in found):
        allowed = "a text, a list of token numbers, or a list of at most 128 of these; none of them empty"
        raise Refused(f"prompt is {_kind(value)}", where="prompt", allowed=allowed)
    return tuple(each for each in found if each is not None)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None or value == []:
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(stop, str) and 0 < len(stop) <= 200 for stop in found):
        raise Refused(f"stop is {_kind(value)}", where="stop", allowed="a text, or a list of texts, none empty")
    if len(found) > MOST_STOPS:
        raise Refused(f"{len(found)} of stop", where="stop", allowed=f"at most {MOST_STOPS}")
    return tuple(found)


def _usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict) or not stream:
        raise Refused("stream_options", where="stream_options", allowed="an object, with stream: true")
    options = Keys({key: option for key, option in value.items() if option is not None})
    usage = options.flag("include_usage")
    options.take("include_obfuscation")
    options.take("continuous_usage_stats")
    options.finish()
    return usage


def _read(reader: Any, key: str) -> Any:
    try:
        return reader()
    except DataError as error:
        raise Refused(error.what, where=key, allowed=error.allowed, hint=error.hint) from error


def _kind(value: Any) -> str:
    match value:
        case bool():
            return json.dumps(value)
        case dict():
            return "an object"
        case []:
            return "an empty list"
        case list():
            return "a list"
        case "":
            return "empty"
        case str():
            return "a text"
        case _:
            return json.dumps(value)[:40]
