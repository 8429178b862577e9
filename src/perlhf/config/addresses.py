"""Addresses of services (rewards, judges): what they may hold, so that no secret reaches a file.

What is given as an address is written to config.yaml, evaluation.json, reports and logs. So it must hold no secret:
those come from the environment, as a key that is sent as a bearer token (PERLHF_REWARD_KEY and its like), or as
`${NAME}` inside the address, which is saved as it was written and filled in when the service is asked.
"""

import os
import re
from collections.abc import Iterable
from typing import Annotated, NamedTuple
from urllib.parse import quote, unquote_plus, urlsplit

from pydantic import AfterValidator

from perlhf.errors import ConfigError

ALLOWED = "http(s)://host:port/path"
REWARD_KEY, JUDGE_KEY, VLLM_KEY = "PERLHF_REWARD_KEY", "PERLHF_JUDGE_KEY", "PERLHF_VLLM_KEY"

HARMLESS = frozenset(
    "adapter api-version api_version batch batch_size dataset dim dimension domain dtype format head lang language "
    "locale max_length max_tokens metric mode model model_id model_name n name normalize output raw_scores revision "
    "return_format scale split task temperature top_k top_p truncate type v version".split()
)
"""Names in a query whose values are shown and saved as they are. Whatever isn't here may be a secret under a name that
nobody thought of (`code`, `sig`, `k`), and is taken from the environment."""

_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
_LIKE_ADDRESS = re.compile(r"\s*[A-Za-z][-+.A-Za-z0-9]+:/")
_PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET = re.compile(
    r"^(sk|pk|rk|hf|gh[pousr]|glpat|xox[a-z]|AKIA|ASIA|AIza|eyJ|Bearer)[-_A-Za-z0-9]{12,}|^[0-9a-f]{32,}$"
    r"|^(?=.*[0-9])(?=.*[a-z])(?=.*[A-Z])[A-Za-z0-9_+=]{24,}$"
)
"""Values that look like keys: the prefixes that services give theirs, long hexadecimal numbers, long random text."""


class Filled(NamedTuple):
    """An address to be asked, and what came from the environment, which no message may show."""

    url: str
    hidden: tuple[str, ...]


def _host(name: str) -> str:
    if not _HOST.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a host; allowed: NAME or NAME:PORT, as browsers send it")
    return name


HostName = Annotated[str, AfterValidator(_host)]
"""`name`, or `name:port`, under which a server of ours is asked."""


def is_address(source: str) -> bool:
    """Whether a reward is named by an address, be it a mistyped one, rather than as a function or run directory."""
    return _LIKE_ADDRESS.match(source) is not None


def check_address(address: str, key_variable: str = REWARD_KEY) -> None:
    """Refuses an address that can't be asked, and one that holds what may be a secret.

    Raises:
        ConfigError: it says what to do, and repeats no part of the address that may be a secret.
    """
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable, parts = False, None
    # Where it can't be told what the host is, a password may hold what ends a host: `http://me:a/b#c@host`.
    if "@" in (parts.netloc + parts.fragment if parts and usable else address):
        raise ConfigError(
            "an address holds a user name or password",
            allowed=ALLOWED,
            hint=f"put the service's key into the environment variable {key_variable}: it is sent as a bearer token",
        )
    plain = address.isascii() and address.isprintable() and not set(address) & set(' "<>\\^`')
    if parts is None or not usable or not plain or "$" in parts.netloc:
        raise ConfigError(f"{shown(address)!r} is no http address", allowed=ALLOWED)
    if parts.fragment:
        raise ConfigError("what follows # in an address is never sent", where=shown(address), allowed=ALLOWED)
    path, *parameters = parts.path.split(";")
    _check_path(path, address)
    for given in (*parameters, parts.query):
        _check_query(given, address, key_variable)


def check_addresses(sources: Iterable[str]) -> None:
    """`check_address` of those sources of rewards that are addresses."""
    for source in sources:
        if is_address(source):
            check_address(source)


def filled(address: str, key_variable: str = REWARD_KEY) -> Filled:
    """The address with each `${NAME}` replaced by that environment variable.

    Raises:
        ConfigError: a variable that isn't set, or is empty; an address that `check_address` refuses.
    """
    check_address(address, key_variable)
    hidden: list[str] = []

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not (secret := os.environ.get(name)):
            raise ConfigError(f"the environment variable {name} isn't set", where=shown(address), hint=f"export {name}")
        hidden.extend((secret, quote(secret, safe="/")))
        return quote(secret, safe="/")

    return Filled(_PLACEHOLDER.sub(value, address), tuple(hidden))


def shown(address: str) -> str:
    """What errors call an address: without query, fragment, parameters, user name and password."""
    before = re.split(r"[?#;]", address, maxsplit=1)[0]
    scheme, separator, rest = before.rpartition("://")
    host, slash, path = rest.partition("/")
    return scheme + separator + host.rpartition("@")[2] + slash + path


def _check_path(path: str, address: str) -> None:
    if any(_SECRET.search(unquote_plus(part)) for part in path.split("/")):
        where = "/".join(shown(address).split("/")[:3])
        raise ConfigError(
            "a part of the address's path looks like a key: it would be saved with the run",
            where=where,
            hint=f"put it into an environment variable, and write its name: {where}/${{MY_KEY}}/...",
        )


def _check_query(query: str, address: str, key_variable: str) -> None:
    for pair in re.split("[&;]", query) if query else []:
        name, equals, given = pair.partition("=")
        literal = unquote_plus(_PLACEHOLDER.sub("", given))
        if equals and not literal:
            continue
        if equals and unquote_plus(name).lower() in HARMLESS and not _SECRET.search(literal):
            continue
        called = f"a value for {unquote_plus(name)!r}" if equals and len(name) <= 40 else "a query"
        example = f"{name if equals and len(name) <= 40 else 'token'}=${{MY_KEY}}"
        raise ConfigError(
            f"the address holds {called}, which may be a secret: it would be saved with the run",
            where=shown(address),
            allowed="secrets from the environment alone",
            hint=f"set {key_variable}, which is sent as a bearer token, or write ?{example} (in a shell in single "
            "quotes) and set MY_KEY",
        )
