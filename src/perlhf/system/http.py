"""One JSON request over HTTP with a time limit, bounded retries and no redirects, for the judge and HTTP rewards."""

import email.message
import http.client
import json
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from perlhf.errors import ConfigError, ServiceError

MAX_WAIT_SECONDS = 60.0
"""Longest pause between attempts, whatever `Retry-After` asks for."""


def post_json(
    address: str,
    body: object,
    *,
    key: str | None = None,
    timeout_seconds: float = 60.0,
    attempts: int = 4,
    backoff_seconds: float = 1.0,
) -> object:
    """Posts `body` as JSON and returns the answer's JSON.

    Answers 429 and 5xx, refused or broken connections and time-outs are tried again, up to `attempts` in all, after
    pauses of `backoff_seconds` times 1, 2, 4, ... (or what `Retry-After` asks). Redirects aren't followed: they would
    carry the key elsewhere.

    Args:
        address: http or https, without user name.
        body: what `json.dumps` takes, without nan.
        key: sent as a bearer token; never part of a message.
        timeout_seconds: limit of each wait for the server.

    Raises:
        ConfigError: an address or key that can't be sent.
        ServiceError: the last attempt failed, another status than 2xx, or an answer that is no JSON.
    """
    check_address(address)
    request = urllib.request.Request(address, json.dumps(body, allow_nan=False).encode(), _headers(key), method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    shown, failure, hint = address.split("?")[0], "no attempt", None
    for attempt in range(attempts):
        wait_seconds = backoff_seconds * 2**attempt
        try:
            with opener.open(request, timeout=timeout_seconds) as answer:
                return _parsed(answer.read(), shown, key)
        except urllib.error.HTTPError as error:
            with error:
                failure, hint = f"answered {error.code} {_error_text(error, key)}", None
                if error.code != 429 and error.code < 500:
                    hint = "is the key right?" if error.code in (401, 403) else None
                    raise ServiceError(failure, where=shown, hint=hint) from None
                wait_seconds = _retry_after(error.headers, wait_seconds)
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            failure, hint = f"no answer: {reason or type(error).__name__}", "is the service running there?"
        if attempt + 1 < attempts:
            time.sleep(min(wait_seconds, MAX_WAIT_SECONDS))
    raise ServiceError(f"{failure} (attempt {attempts} of {attempts})", where=shown, hint=hint)


def check_address(address: str) -> None:
    """Raises `ConfigError` unless `address` is an http(s) address without user name or password."""
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable, parts = False, None
    if parts is not None and "@" in parts.netloc:
        raise ConfigError("an address holds a user name or password", allowed="http(s)://host:port/path")
    if not usable or not address.isascii() or not address.isprintable() or " " in address:
        raise ConfigError(f"{address!r} is no http address", allowed="http(s)://host:port/path")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


def _headers(key: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "perlhf"}
    if key:
        if not key.isascii() or not key.isprintable():  # http.client would quote the key in its own error
            raise ConfigError("the key has characters that a header can't carry", hint="look for a line break in it")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _parsed(raw: bytes, shown: str, key: str | None) -> object:
    try:
        return json.loads(raw)
    except ValueError:
        text = _excerpt(raw.decode(errors="replace"), key)
        raise ServiceError(f"answered no JSON: {text!r}", where=shown) from None


def _error_text(error: urllib.error.HTTPError, key: str | None) -> str:
    try:
        text = error.read(65536).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return _excerpt(text or str(error.reason), key)


def _excerpt(text: str, key: str | None) -> str:
    """Start of an answer on one line, the key blotted out should the server repeat it."""
    line = " ".join(text.split())
    return (line.replace(key, "[key]") if key else line)[:200]


def _retry_after(headers: email.message.Message, otherwise: float) -> float:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else otherwise
