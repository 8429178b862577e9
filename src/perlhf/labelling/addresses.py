"""Where our pages listen, and under which names browsers may ask for them."""

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from perlhf.errors import StorageError


def bound(host: str, port: int) -> socket.socket:
    """Listens at an address.

    Raises:
        StorageError: it isn't free, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        hint = "--port 0 takes a free one" if port else "an address of this machine"
        raise StorageError(
            f"can't listen at {host}:{port}: {error.strerror or error}", where="port", hint=hint
        ) from error
    return listening


def names(host: str, port: int, further: Sequence[str] = ()) -> frozenset[str]:
    """`name` and `name:port` under which a server at this address may be asked, in lower case."""
    own = ["localhost", "127.0.0.1", "[::1]"] if is_here(host) else []
    known = [*own, f"[{host}]" if ":" in host else host, *further]
    return frozenset(spelt for name in known for spelt in (name.lower(), f"{name.lower()}:{port}"))


def web_settings(application: Any) -> uvicorn.Config:
    """How an application is served: it says nothing of who asks, nor believes what proxies say."""
    return uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )


def is_here(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_own(origin: str, host: str, further: Sequence[str]) -> bool:
    """Whether a request's Origin is the page that it was sent to, or a further name of it, such as that of a proxy."""
    try:
        place = urlsplit(origin).netloc.lower()
    except ValueError:
        return False
    return bool(place) and (place == host.lower() or place in [name.lower() for name in further])


def is_known_elsewhere(host: str, further: Sequence[str]) -> bool:
    """Whether other machines reach a server at this address, or through a proxy under one of these names."""
    return not is_here(host) or any(not is_here(urlsplit(f"//{name}").hostname or "") for name in further)
