"""Scores from a Python function or an HTTP address instead of a reward adapter; and how several scores become one."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perlhf.data.records import Text
from perlhf.errors import ConfigError, DataError, PerlhfError, ServiceError, nearest
from perlhf.system.http import check_address, post_json

Scorer = Callable[[list[Text], list[str]], list[float]]
"""Prompts and their completions in, one finite score each out."""


def load_function(name: str, key: str = "reward") -> Scorer:
    """The function that `module:function` names, its scores checked at every call.

    `key` of the configuration is named by errors. The current directory is importable, as it is for `python -m`. What
    the function itself raises passes through.

    Raises:
        ConfigError: malformed name, no such module or one that doesn't import, no such function (with the nearest).
        PerlhfError: at a call, another number of scores than completions, or one that is no finite number.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ConfigError(f"{name!r} names no function", where=key, allowed="module:function")
    module = _imported(module_name, key)
    function = getattr(module, attribute, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = nearest(attribute, callables)
        problem = "has no function" if function is None else "holds no function under"
        hint = f"did you mean {module_name}:{close}?" if close else None
        raise ConfigError(f"module {module_name} {problem} {attribute!r}", where=key, hint=hint)

    def score(prompts: list[Text], completions: list[str]) -> list[float]:
        return _checked(function(prompts, completions), len(completions), name)

    return score


def http_reward(address: str, timeout_seconds: float = 60.0, attempts: int = 4, backoff_seconds: float = 1.0) -> Scorer:
    """Scores from a service: each call posts `{"prompts": [...], "completions": [...]}` and reads `{"scores": [...]}`.

    A prompt is a string or a list of `{"role", "content"}`. Retries are those of `perlhf.http.post_json`.

    Raises:
        ConfigError: no http(s) address.
        ServiceError: at a call, the service failed or its answer has no scores.
        PerlhfError: at a call, another number of scores than completions, or one that is no finite number.
    """
    check_address(address)
    shown = address.split("?")[0]

    def score(prompts: list[Text], completions: list[str]) -> list[float]:
        plain = [prompt if isinstance(prompt, str) else [dict(message) for message in prompt] for prompt in prompts]
        answer = post_json(
            address,
            {"prompts": plain, "completions": completions},
            timeout_seconds=timeout_seconds,
            attempts=attempts,
            backoff_seconds=backoff_seconds,
        )
        if not isinstance(answer, Mapping) or "scores" not in answer:
            raise ServiceError("the answer has no scores", where=shown, allowed='{"scores": [...]}')
        return _checked(answer["scores"], len(completions), shown)

    return score


def combine(scores: ArrayLike, how: Literal["mean", "min", "mean_minus_std"]) -> NDArray[np.float64]:
    """One score per completion from those of several reward models.

    Args:
        scores: float [members, completions].
        how: `mean`, `min`, or `mean_minus_std`: the mean less the population standard deviation over members
            (0 for one member).

    Raises:
        ConfigError: an unknown `how`.
        DataError: not two-dimensional, or no member.
    """
    table = np.asarray(scores, dtype=float)
    if table.ndim != 2 or not len(table):
        raise DataError(f"scores of shape {table.shape}", allowed="[members, completions], at least one member")
    match how:
        case "mean":
            return table.mean(axis=0)
        case "min":
            return table.min(axis=0)
        case "mean_minus_std":
            return table.mean(axis=0) - table.std(axis=0)
        case _:
            raise ConfigError(f"unknown value {how!r}", where="combine", allowed="mean, min, mean_minus_std")


def _imported(module_name: str, key: str):
    """The module, looked up in the current directory too."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"no module named {error.name!r}",
                where=key,
                hint=f"start perlhf in the directory that holds {error.name.split('.')[0]}.py, or install it",
            ) from None
        raise ConfigError(f"module {module_name} doesn't import: {error}", where=key) from error
    except ImportError as error:
        raise ConfigError(f"module {module_name} doesn't import: {error}", where=key) from error
    except SyntaxError as error:
        raise ConfigError(f"syntax error: {error.msg}", where=f"{error.filename}:{error.lineno}") from error


def _checked(scores: object, count: int, where: str) -> list[float]:
    """`scores` as floats; raises `PerlhfError` naming index and value unless there are `count` finite ones."""
    if not isinstance(scores, Iterable) or isinstance(scores, str | bytes | Mapping):
        raise PerlhfError(f"returned {type(scores).__name__}", where=where, allowed="a list of scores")
    values = list(scores)
    if len(values) != count:
        raise PerlhfError(f"returned {len(values)} scores for {count} completions", where=where, allowed="one each")
    return [_finite(value, index, where) for index, value in enumerate(values)]


def _finite(value: object, index: int, where: str) -> float:
    number = math.nan
    if isinstance(value, SupportsFloat):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # an array or tensor of several values
            number = math.nan
    if not math.isfinite(number):
        raise PerlhfError(f"score {index} is {value!r}", where=where, allowed="a finite number")
    return number
