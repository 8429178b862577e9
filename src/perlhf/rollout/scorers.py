"""What scores completions: reward adapters on the same base, Python functions, HTTP addresses; how scores combine."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, SupportsFloat

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from perlhf.data.records import Text
from perlhf.errors import ConfigError, DataError, PerlhfError, ServiceError, nearest
from perlhf.method.packing import Batch, Ids, Packing, batches, completed
from perlhf.model.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.open import load_earlier
from perlhf.rollout.local import Ends
from perlhf.runs.earlier import adapter_of
from perlhf.system.http import check_address, post_json

Combine = Literal["mean", "min", "mean_minus_std"]
Scorer = Callable[[list[Text], list[str]], list[float]]
"""Prompts and their completions in, one finite score each out."""


@dataclass(frozen=True)
class Scorers:
    """Reward adapters by name (`reward_0`..) and functions; all of them score every completion."""

    adapters: tuple[str, ...]
    functions: tuple[Scorer, ...]
    how: Combine

    def scores(
        self,
        model: Model,
        encoder: Encoder,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        texts: Sequence[Text],
        max_tokens: int,
        packing: Packing = "tree",
        ends: Ends | None = None,
    ) -> NDArray[np.float64]:
        """One combined score per completion, float64 [batch].

        Reward adapters see the sampled ids as they are, but a completion that was cut gets the end token: they never
        learned from a state before it, and score such states at random (docs/experiments.md). Functions and services
        get the prompts' texts and decoded completions. A stop string and what follows it is seen by none of them; an
        end token other than the one that was trained is replaced by it.
        """
        ends = ends or Ends.of(encoder)
        members: list[list[float]] = []
        if self.adapters:
            whole = [[*_without_end(ends.before(ids), ends), encoder.end_id] for ids in completions]
            # The end token may be one too many for the context: then the prompt loses its first one.
            given = [p if len(p) + len(c) <= encoder.max_tokens else p[1:] for p, c in zip(prompts, whole, strict=True)]
            examples = [[completed(p, c)] for p, c in zip(given, whole, strict=True)]
            laid_out = batches(examples, max_tokens, packing, model.device)
            members += [[score for (score,) in score_batches(model, laid_out, name)] for name in self.adapters]
        if self.functions:
            decoded = [ends.text(ids) for ids in completions]
            members += [function(list(texts), decoded) for function in self.functions]
        return combine(np.array(members, dtype=float), self.how)


@torch.no_grad()
def score_batches(
    model: Model, laid_out: Sequence[Batch], adapter: str, done: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """Scores of each example's sequences, in the order of the examples; calls `done` after each batch."""
    scores: dict[int, list[float]] = {}
    for batch in laid_out:
        flat = model.scores(batch, adapter).tolist()
        ends = (*batch.first[1:], len(flat))
        scores |= {i: flat[at:end] for i, at, end in zip(batch.examples, batch.first, ends, strict=True)}
        done()
    return [scores[i] for i in range(len(scores))]


def load_scorers(
    model: Model,
    sources: Sequence[str],
    how: Combine,
    encoder: Encoder,
    prefix: str = "reward",
    key: str = "reward",
) -> Scorers:
    """Loads every source: an http(s) address, `module:function`, or a reward run directory, as adapter PREFIX_0, ..

    Args:
        key: of the configuration, which errors name.

    Raises:
        ConfigError: a source that is none of these; AdapterError: a reward run of another base or encoding.
    """
    adapters: list[str] = []
    functions: list[Scorer] = []
    for source in sources:
        if source.startswith(("http://", "https://")):
            functions.append(http_reward(source))
        elif adapter_of(Path(source)) is not None:
            name = f"{prefix}_{len(adapters)}"
            adapter = load_earlier(model, Path(source), name, encoder, key)
            if adapter.score_head is None:
                raise ConfigError(f"{source} holds a {adapter.role} adapter", where=key, allowed="a reward run")
            adapters.append(name)
        elif ":" in source and not Path(source).exists():
            functions.append(load_function(source, key))
        else:
            raise ConfigError(
                f"'{source}' is no finished reward run",
                where=key,
                allowed="a reward run directory, module:function, or an http(s) address",
                hint="train it with perlhf reward",
            )
    return Scorers(tuple(adapters), tuple(functions), how)


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

    A prompt is a string or a list of `{"role", "content"}`. Retries are those of `perlhf.system.http.post_json`.

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


def combine(scores: ArrayLike, how: Combine) -> NDArray[np.float64]:
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


def _without_end(ids: Ids, ends: Ends) -> Ids:
    return ids[:-1] if len(ids) and ids[-1] in ends.ids else ids


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
