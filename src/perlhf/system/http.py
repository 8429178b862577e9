"""JSON over HTTP for judges, rewards and samplers: a deadline for each request, limits on its answer, bounded retries.

httpx2 speaks HTTP. What no client has is here: a limit on the whole of a request's time (httpx2 and urllib3 limit each
wait for a byte, so that a server which sends one byte a second is read for ever), and on the bytes and the depth of its
answer. Its lowest layer is used, which follows no redirect, reads no `.netrc` and logs no address.
"""

import asyncio
import ipaddress
import json
import os
import re
import time
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from perlhf.errors import ConfigError, ServiceError
from perlhf.system.waiting import STOP_ASKED, finish, stopped, together_or_none

if TYPE_CHECKING:
    import httpx2

MAX_WAIT_SECONDS = 60.0
"""Longest pause between attempts, whatever `Retry-After` asks for."""
MAX_ANSWER_BYTES = 16 * 2**20
"""Beyond this nothing more is read. A score takes 20 bytes, a judge's answer some thousand."""
MAX_ERROR_BYTES = 64 * 2**10
MAX_DEPTH = 64
"""Objects and lists inside one another. A chat completion has ten."""

_BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
"""Strings, ended or not, and brackets outside of them; possessive, so that no text is read twice."""
_ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 47}
"""Of answers, with zlib's `wbits`: some servers pack what was asked for as it is."""
_PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Service:
    """Whom to ask. No message shows more of it than `shown`.

    Raises:
        ConfigError: a key that a header can't carry.
    """

    url: str = field(repr=False)
    shown: str
    """What errors call it."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token."""
    key_variable: str | None = None
    """Where the key comes from, for the error when it is refused."""
    hidden: tuple[str, ...] = field(default=(), repr=False)
    """What is blotted out should the server repeat it, besides the key."""
    timeout_key: str = "timeout_seconds"
    """Option that limits the time of a request, for the error when it was too short."""

    def __post_init__(self) -> None:
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            where, hint = self.key_variable or self.shown, "look for a line break in it"
            raise ConfigError("the key has characters that a header can't carry", where=where, hint=hint)

    def excerpt(self, text: str) -> str:
        """The start of what a server said, on one line and without secrets."""
        line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
        for secret in sorted(filter(None, {self.key, *self.hidden}), key=len, reverse=True):
            line = line.replace(secret, "[hidden]")
        return line[:200]


class _Again(Exception):
    """An attempt failed in a way that another may not."""

    def __init__(
        self, failure: str, hint: str | None = None, wait_seconds: float | None = None, status: int | None = None
    ):
        super().__init__(failure)
        self.failure, self.hint, self.wait_seconds, self.status = failure, hint, wait_seconds, status


def post_json(service: Service, body: object, **limits: Any) -> object:
    """Posts `body` as JSON and returns the answer's JSON; `post_all` of one."""
    return post_all(service, [body], **limits)[0]


def post_all(
    service: Service,
    bodies: Sequence[object],
    *,
    timeout_seconds: float = 60.0,
    attempts: int = 4,
    backoff_seconds: float = 1.0,
    at_once: int = 4,
) -> list[object]:
    """Posts each body as JSON, some at a time, and returns the answers' JSON in the order of the bodies.

    Answers 429 and 5xx and refused or broken connections are tried again, up to `attempts` in all, after pauses of
    `backoff_seconds` times 1, 2, 4, ... (or what `Retry-After` asks). A request that took `timeout_seconds` is not:
    whoever answers may have done the work, and would do it once more. Redirects aren't followed: they would carry the
    key elsewhere. The environment's proxies are used, but never for this machine's own addresses.

    Args:
        bodies: what `json.dumps` takes, without nan.
        timeout_seconds: limit of one request, from the connection to the last byte of its answer.
        at_once: requests under way at a time.

    Raises:
        ServiceError: the last attempt failed, another status than 2xx, an answer that is no JSON, too long or nested
            too deeply; no further request is started.
        ConfigError: an address or a proxy that can't be used.
        Interrupted: the open run was asked to stop meanwhile.
    """
    return finish(
        all_answers(
            service,
            bodies,
            timeout_seconds=timeout_seconds,
            attempts=attempts,
            backoff_seconds=backoff_seconds,
            at_once=at_once,
        )
    )


async def all_answers(
    service: Service,
    bodies: Sequence[object],
    *,
    timeout_seconds: float,
    attempts: int = 4,
    backoff_seconds: float = 1.0,
    at_once: int = 4,
    as_text: bool = False,
) -> list[object]:
    """`post_all`, to be awaited.

    Args:
        bodies: one that is None is no post: the address is read (GET).
        as_text: answers are given as the texts that they are, whether they hold JSON or not.
    """
    contents = [None if body is None else json.dumps(body, allow_nan=False).encode() for body in bodies]
    proxy = proxy_of(service.url)
    service = replace(service, hidden=(*service.hidden, *_password(proxy)))
    turns = asyncio.Semaphore(at_once)

    async def answer(content: bytes | None) -> object:
        async with turns:
            for attempt in range(1, attempts + 1):
                try:
                    text = await _attempt(transport, service, content, proxy, timeout_seconds)
                    return text.decode(errors="replace") if as_text else _parsed(text, service)
                except _Again as again:
                    if attempt == attempts:
                        counted = f" (attempt {attempt} of {attempts})" if attempts > 1 else ""
                        error = ServiceError(again.failure + counted, where=service.shown, hint=again.hint)
                        error.status, error.passing = again.status, True
                        raise error from None
                    pause = backoff_seconds * 2 ** (attempt - 1) if again.wait_seconds is None else again.wait_seconds
                await _pause(min(pause, MAX_WAIT_SECONDS))
        raise AssertionError("the last attempt returns or raises")

    async with _transport(service, proxy) as transport:
        return await together_or_none([answer(content) for content in contents])


def proxy_of(url: str) -> str | None:
    """The environment's proxy for an address (`http_proxy`, `https_proxy`, `all_proxy`, less `no_proxy`), if any.

    None for this machine's own addresses: a proxy elsewhere would look for the service on its own machine.
    """
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    port = "" if parts.port else ":443" if parts.scheme == "https" else ":80"  # no_proxy may name it
    if not proxy or _is_here(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc + port):
        return None
    if _in_networks(parts.hostname or "", proxies.get("no", "")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_here(host: str) -> bool:
    """Whether a host is this machine: localhost, 127.0.0.0/8, ::1."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified


def _in_networks(host: str, no_proxy: str) -> bool:
    """Whether `no_proxy` has a network that holds the host, such as 10.0.0.0/8; the standard library knows names."""
    for entry in no_proxy.split(","):
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False


def _transport(service: Service, proxy: str | None) -> "httpx2.AsyncHTTPTransport":
    import httpx2

    try:
        # No certificates are read for addresses that show none.
        verify = service.url.startswith("https:") or (proxy or "").startswith("https:")
        return httpx2.AsyncHTTPTransport(verify=verify, proxy=proxy)
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        problem = "needs the package socksio" if isinstance(error, ImportError) else "isn't one that can be used"
        hint = "pip install socksio, name another proxy, or name the service's host in no_proxy"
        raise ConfigError(f"the proxy {_without_password(proxy)} {problem}", where=service.shown, hint=hint) from None


async def _attempt(
    transport: "httpx2.AsyncHTTPTransport",
    service: Service,
    content: bytes | None,
    proxy: str | None,
    timeout_seconds: float,
) -> bytes:
    """What one request is answered; raises `_Again` where another one may do better."""
    import httpx2

    through = f", through the proxy {_without_password(proxy)}" if proxy else ""
    hint = "name the service's host in no_proxy, if it needs no proxy" if proxy else "is the service running there?"
    try:
        async with asyncio.timeout(timeout_seconds):
            request = httpx2.Request(
                "GET" if content is None else "POST", service.url, headers=_headers(service), content=content
            )
            response = await transport.handle_async_request(request)
            response.request = request
            try:
                return await _answer(response, service, through)
            finally:
                await response.aclose()
    except TimeoutError:
        raise ServiceError(
            f"no whole answer within {timeout_seconds:g} seconds{through}; not asked again, since that was paid for",
            where=service.shown,
            hint=f"raise {service.timeout_key}, or see why the service is slow",
        ) from None
    except httpx2.ProxyError as error:
        failure = f"the proxy {_without_password(proxy)} refused: {service.excerpt(str(error))}"
        if str(error).startswith(("429", "5")):
            raise _Again(failure, hint) from None
        raise ServiceError(failure, where=service.shown, hint=hint) from None
    except httpx2.TransportError as error:
        failure = f"no answer: {service.excerpt(_reason(error))}{through}"
        if "CERTIFICATE_VERIFY_FAILED" in failure:
            trust = "name the file of the authority's certificate in SSL_CERT_FILE"
            raise ServiceError(failure, where=service.shown, hint=trust) from None
        raise _Again(failure, hint) from None
    except httpx2.InvalidURL:
        raise ConfigError(f"{service.shown!r} is no http address", allowed="http(s)://host:port/path") from None


async def _answer(response: "httpx2.Response", service: Service, through: str) -> bytes:
    """What an answer 2xx holds; raises for others and for what is too long."""
    status = response.status_code
    if 200 <= status < 300:
        raw, whole = await _read(response, MAX_ANSWER_BYTES, service)
        if not whole:
            failure = f"answered more than {MAX_ANSWER_BYTES // 2**20} MiB; the rest wasn't read"
            raise ServiceError(failure, where=service.shown)
        return raw
    raw, _ = await _read(response, MAX_ERROR_BYTES, service)
    text = service.excerpt(raw.decode(errors="replace") or response.reason_phrase)
    failure = f"answered {status} {text}{through}"
    if status == 429 or status >= 500:
        raise _Again(failure, None, _retry_after(response.headers.get("Retry-After", "")), status)
    error = ServiceError(failure, where=service.shown, hint=_hint(status, service, through))
    error.status = status
    raise error


def _hint(status: int, service: Service, through: str) -> str | None:
    """What to try after a refusal."""
    if status == 407:
        return "give the proxy's user name and password in http_proxy: http://NAME:PASSWORD@host:port"
    if status in (401, 403):
        if through:
            return "did the proxy refuse? name the service's host in no_proxy, if it needs no proxy"
        if service.key:
            return f"is the key in {service.key_variable} right?" if service.key_variable else "is the key right?"
        return f"put the service's key into {service.key_variable}" if service.key_variable else None
    return "redirects aren't followed: give the address that this one leads to" if 300 <= status < 400 else None


async def _read(response: "httpx2.Response", limit: int, service: Service) -> tuple[bytes, bool]:
    """What an answer holds, and whether that is all of it: nothing is read or unpacked beyond `limit` bytes."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", *_ENCODINGS):
        allowed = ", ".join(("identity", *_ENCODINGS))
        raise ServiceError(
            f"answered in the encoding {service.excerpt(encoding)!r}", where=service.shown, allowed=allowed
        )
    unpacker = zlib.decompressobj(_ENCODINGS[encoding]) if encoding in _ENCODINGS else None
    parts, size = list[bytes](), 0
    async for part in response.aiter_raw():
        try:
            parts.append(unpacker.decompress(part, limit + 1 - size) if unpacker else part)
        except zlib.error:
            raise ServiceError("the answer can't be unpacked", where=service.shown) from None
        size += len(parts[-1])
        if size > limit:
            return b"".join(parts)[:limit], False
    return b"".join(parts), True


def _parsed(raw: bytes, service: Service) -> object:
    if any(depth > MAX_DEPTH for depth in _depths(raw)):
        raise ServiceError(f"answered JSON that is nested more than {MAX_DEPTH} deep", where=service.shown)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        text = service.excerpt(raw[:MAX_ERROR_BYTES].decode(errors="replace"))
        raise ServiceError(f"answered no JSON: {text!r}", where=service.shown) from None


def _depths(raw: bytes) -> Iterator[int]:
    """How deep each bracket of JSON text is; in UTF-8, which is what JSON is sent in."""
    depth = 0
    for match in _BRACKETS.finditer(raw):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
        yield depth


def _headers(service: Service) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "perlhf"}
    headers["Accept-Encoding"] = "identity"
    return headers | ({"Authorization": f"Bearer {service.key}"} if service.key else {})


async def _pause(seconds: float) -> None:
    """Waits, unless the run is asked to stop."""
    until = asyncio.get_running_loop().time() + seconds
    while True:
        if STOP_ASKED.get()():
            raise stopped()
        left = until - asyncio.get_running_loop().time()
        if left <= 0:
            return
        await asyncio.sleep(min(left, _PAUSE_SECONDS))


def _retry_after(value: str) -> float | None:
    """Seconds from now that a `Retry-After` asks for, as a number or a date; None where it has neither."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _password(proxy: str | None) -> Iterator[str]:
    """The proxy's password, as it is written there and as it is meant."""
    given = (proxy or "").partition("://")[2].rpartition("@")[0].partition(":")[2]
    if given:
        yield from (given, unquote(given))


def _without_password(proxy: str | None) -> str:
    """The proxy as messages name it; a password may hold any character, `#` and `/` too."""
    scheme, separator, rest = (proxy or "").partition("://")
    return scheme + separator + re.split("[/?#]", rest.rpartition("@")[2], maxsplit=1)[0]


def _reason(error: BaseException) -> str:
    """What the system said, which the client wraps several times."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        if isinstance(found, OSError) and found.errno is not None and found.strerror:
            return os.strerror(found.errno) if found.errno > 0 else found.strerror
        found = found.__cause__ or found.__context__
    return str(error) or type(error).__name__
