"""What is asked of a vLLM server over HTTP, and waiting for one that is gone."""

import math
import os
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar, cast

from perlhf.config.addresses import VLLM_KEY, filled, shown
from perlhf.errors import ConfigError, ServiceError
from perlhf.method.packing import Ids
from perlhf.model.encoding.encode import Encoder
from perlhf.rollout.vllm.probe import Answer
from perlhf.system.console import note
from perlhf.system.http import Service, all_answers
from perlhf.system.waiting import STOP_ASKED, finish_unless, stopped

Result = TypeVar("Result")

TESTED = ((0, 32), (0, 33))
"""The version of vLLM that this was tried with, and the last one whose source was read for it."""
TEXT = "Grüße, 12 cups of «coffee»?\n\tnaïve 日本 🙂"
"""Its tokens tell whether the tokenizers are the same."""
PAUSE_SECONDS = 1.0
"""Between attempts to reach a server that is gone."""
AT_ONCE = 256
"""Requests under way at a time: the server computes those together that it has room for."""


class Connection:
    """A server at an address, with the key of the environment.

    Args:
        url: with or without `/v1`.
        timeout_seconds: limit of one request, and of waiting for a server that is gone.
        timeout_key: its configuration key, for errors.
    """

    def __init__(self, url: str, timeout_seconds: float, timeout_key: str = "vllm.timeout_seconds"):
        self._url, self._hidden = filled(url.rstrip("/").removesuffix("/v1"), VLLM_KEY)
        self.shown, self.timeout_seconds = shown(url), timeout_seconds
        self._timeout_key = timeout_key
        self.patient = False
        """Whether a server that is gone is waited for: not before it was seen to be one to sample with."""

    def patiently(
        self,
        work: Callable[[], Result],
        again: Callable[[], None] = lambda: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Result:
        """What `work` gives; where the server is gone or has forgotten something it is waited for, and `again` called.

        Raises:
            ServiceError: it is gone for longer than `timeout_seconds`, or refuses. Interrupted: a stop was asked.
        """
        until, lost = 0.0, False
        while True:
            try:
                if lost:
                    again()
                found = work()
            except ServiceError as error:
                may_pass = self.patient and (error.passing or error.status == 404)
                if not may_pass or (lost and time.monotonic() > until):
                    raise
                if not lost:
                    until, lost = time.monotonic() + self.timeout_seconds, True
                    note(f"{self.shown}: {error.what}; it is waited for, {self.timeout_seconds:g} seconds at most")
            else:
                if lost:
                    note(f"{self.shown} answers again")
                return found
            if STOP_ASKED.get()():
                raise stopped()
            if cancelled():
                raise CancelledError
            time.sleep(PAUSE_SECONDS)

    def once(
        self,
        path: str,
        bodies: Sequence[object] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        as_text: bool = False,
    ) -> Any:
        """One request for each body; without any, what is read there."""
        given = (self._url + path, self.shown + path, os.environ.get(VLLM_KEY), VLLM_KEY, self._hidden)
        work: Coroutine[Any, Any, list[object]] = all_answers(
            Service(*given, self._timeout_key),
            [None] if bodies is None else bodies,
            timeout_seconds=self.timeout_seconds,
            attempts=1,
            at_once=AT_ONCE,
            as_text=as_text,
        )
        answers = finish_unless(cancelled, work)
        return answers[0] if bodies is None else answers

    def choices(self, answer: object, count: int) -> list[Answer]:
        """Tokens and log-probabilities of an answer's completions.

        Raises:
            ServiceError: it has others than were asked for.
        """
        choices = mapping(answer).get("choices")
        found = list[Answer]()
        for choice in sorted(
            map(mapping, choices if isinstance(choices, list) else ()), key=lambda c: c.get("index", 0)
        ):
            ids, logprobs = choice.get("token_ids"), mapping(choice.get("logprobs")).get("token_logprobs")
            if not isinstance(ids, list) or not isinstance(logprobs, list) or len(ids) != len(logprobs) or not ids:
                continue
            if all(type(one) is int for one in ids) and all(type(one) in (int, float) for one in logprobs):
                found.append((ids, [float(one) for one in logprobs]))
        if len(found) != count or not all(math.isfinite(one) for _, logprobs in found for one in logprobs):
            what = f"{len(found)} of {count} completions have tokens with a log-probability each"
            raise ServiceError(what, where=self.shown, hint="is it vLLM, without speculative decoding?")
        return found


def introduction(connection: Connection, encoder: Encoder) -> str:
    """What the server calls its base, if it is one to sample with in training.

    Raises:
        ServiceError: nobody answers there, or what answers isn't vLLM.
        ConfigError: another version of it, another tokenizer than the encoder's, no room for its sequences.
    """
    name, longest = met(connection, encoder, "vllm.url")
    if longest is not None and longest < (max_tokens := encoder.max_tokens):
        what = f"the server takes sequences of {longest} tokens, and prompt and completion have up to {max_tokens}"
        hint = f"start it with --max-model-len {max_tokens}, or train with a lower encoding.max_tokens"
        raise ConfigError(what, where="encoding.max_tokens", allowed=f"at most {longest}", hint=hint)
    return name


def met(connection: Connection, encoder: Encoder, key: str) -> tuple[str, int | None]:
    """What the server calls its base and the longest sequence that it takes, if it is one that we know how to ask.

    Args:
        key: configuration key of its address, for errors.

    Raises:
        ServiceError: nobody answers there, or what answers isn't vLLM.
        ConfigError: another version of it, or another tokenizer than the encoder's.
    """
    try:
        told = mapping(connection.once("/version"))
    except ServiceError as error:
        option = f"--{key.replace('_', '-')} http://HOST:8000"
        hint = f"start it (docs/vllm.md has the command), or give its address: {option}"
        raise ServiceError(error.what, where=connection.shown, hint=error.hint if error.status else hint) from None
    version = str(told.get("version", "unknown"))
    numbers = re.match(r"v?(\d+)\.(\d+)", version)
    if numbers is None or not TESTED[0] <= (int(numbers[1]), int(numbers[2])) <= TESTED[1]:
        first, last = (".".join(map(str, one)) for one in TESTED)
        what, hint = f"the server is vLLM {version:.40}", f"pip install 'vllm>={first},<={last}.99' where it runs"
        raise ConfigError(what, where=key, allowed=f"vLLM {first} to {last}", hint=hint)
    listed = mapping(connection.once("/v1/models")).get("data")
    bases = [one for one in listed if not one.get("parent")] if isinstance(listed, list) else []
    if not bases:
        raise ServiceError("the server names no base", where=connection.shown, hint="is it a vLLM server?")
    name, longest = str(bases[0].get("id")), bases[0].get("max_model_len")
    body = {"model": name, "prompt": TEXT, "add_special_tokens": False}
    theirs = mapping(connection.once("/tokenize", [body])[0]).get("tokens")
    if theirs != encoder.tokenizer.encode(TEXT, add_special_tokens=False):
        raise ConfigError(
            "the server's tokenizer gives other tokens than this base's",
            where=key,
            allowed="the tokenizer of this base",
            hint="start it with the directory that perlhf pull names",
        )
    return name, longest if isinstance(longest, int) else None


def request(name: str, prompt: Ids, samples: int, seed: int, temperature: float, max_tokens: int) -> dict[str, Any]:
    """A request that nothing bends: what isn't said may come from the base's generation_config.json."""
    plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    plain |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    body = {"model": name, "prompt": list(prompt), "n": samples, "seed": seed, "max_tokens": max_tokens}
    told = {"logprobs": 0, "return_token_ids": True, "skip_special_tokens": False, "ignore_eos": True}
    return body | {"temperature": temperature} | plain | told


def mapping(answer: object) -> Mapping[str, Any]:
    """A JSON object as it is, and nothing for anything else."""
    return cast("Mapping[str, Any]", answer) if isinstance(answer, Mapping) else {}
