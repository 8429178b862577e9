"""What scores completions: reward adapters on the same base, Python functions, HTTP addresses; how scores combine."""

import inspect
import os
import warnings
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from perlhf.config.addresses import REWARD_KEY, filled, is_address, shown
from perlhf.data.records import Prompt
from perlhf.errors import ConfigError, DataError, RewardFunctionError, ServiceError
from perlhf.method.packing import Batch, Ids, completed
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.open import load_earlier
from perlhf.parallel.shares import own_batches, own_of
from perlhf.parallel.workers import ALONE, Workers
from perlhf.rollout.ensemble import member_scores, passes
from perlhf.rollout.functions import Asked, Scorer, TrainerState, checked, load_function
from perlhf.rollout.local import Ends, check_finite
from perlhf.runs.earlier import adapters_of
from perlhf.system.http import Service, all_answers
from perlhf.system.waiting import finish, together_or_none

Combine = Literal["mean", "min", "mean_minus_std"]
Level = tuple[float, float]
"""Mean and population standard deviation of one member's scores of the reference's answers."""


@dataclass(frozen=True)
class Scorers:
    """Reward adapters by name (`reward_0`..) and functions; all of them score every completion."""

    adapters: tuple[str, ...]
    functions: tuple[Scorer, ...]
    how: Combine
    weights: tuple[float, ...] | None = None
    """Of the members, in the order of the configuration; None combines them as `how` says."""
    order: tuple[int, ...] = ()
    """Where each of the adapters and then each function stands in the configuration, for `weights`."""
    names: tuple[str, ...] = ()
    """Sources, and directories of a run's several members, in the order of the configuration."""
    levels: tuple[Level, ...] | None = None
    """Of the members (adapters, then functions), for `centred`; None: scores combine as they are."""

    @property
    def count(self) -> int:
        """Number of members."""
        return len(self.adapters) + len(self.functions)

    @property
    def levels_matter(self) -> bool:
        """Whether an offset of one member would change the order of the combined scores."""
        return self.how != "mean" and self.weights is None and self.count > 1

    def combined(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """One score per completion, float64 [batch], from the members' [members, batch]; nan where none gave one."""
        if self.weights is not None:
            return weighted(table[np.argsort(self.order)], self.weights)
        return combine(table if self.levels is None else centred(table, self.levels), self.how)

    def on_level(self, table: NDArray[np.float64], key: str = "reward") -> "Scorers":
        """These scorers with the levels that the members have in their scores [members, answers] of the reference.

        The same scorers where nothing depends on the members' levels: one member, a mean or a weighted sum, levels that
        are known already.

        Raises:
            RewardFunctionError: a member gave none of the answers a score.
        """
        if self.levels is not None or not self.levels_matter:
            return self
        found: list[Level] = []
        for number, row in enumerate(table):
            given = row[~np.isnan(row)]
            if not len(given):
                name = self.names[self.order[number]] if self.names else f"member {number}"
                raise RewardFunctionError(
                    f"{name} gave none of {len(row)} answers of the reference a score, so that its level isn't known",
                    where=key,
                    allowed=f"with combine: {self.how}, a score of at least one of them",
                    hint="more prompts (centre_prompts, or --prompts of evaluate), or combine: mean",
                )
            found.append((float(given.mean()), float(given.std())))
        return replace(self, levels=tuple(found))

    def members(
        self,
        model: Model,
        encoder: Encoder,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        records: Sequence[Prompt],
        max_tokens: int,
        packing: Literal["auto", "tree", "none"] = "auto",
        state: TrainerState = TrainerState(),  # noqa: B008 -- it is frozen
        ends: Ends | None = None,
        workers: Workers = ALONE,
    ) -> NDArray[np.float64]:
        """Scores float64 [members, batch] of each member, adapters before functions; nan where it gave none.

        Reward adapters see the sampled ids as they are, but a completion that was cut gets the end token: they never
        learned from a state before it, and score such states at random (docs/experiments.md). Functions and services
        get the prompts' texts and decoded completions, functions the columns of the prompts' rows as well. None of them
        sees a stop string or what follows it; an end token other than those that were trained is replaced by one.

        Workers share what adapters score. Functions and services are asked by the first one, for all at once: what they
        give may depend on the others beside a completion, and on what they keep.
        """
        ends = ends or Ends.of(encoder)
        members: list[list[float]] = []
        if self.adapters:
            whole = [[*_without_end(ends.before(ids), ends), _closing(ids, encoder)] for ids in completions]
            # The end token may be one too many for the context: then the prompt loses its first one.
            given = [p if len(p) + len(c) <= encoder.max_tokens else p[1:] for p, c in zip(prompts, whole, strict=True)]
            examples = [[completed(p, c)] for p, c in zip(given, whole, strict=True)]
            laid = model.packing(packing)
            groups = passes(model, self.adapters, laid)
            own = own_batches(examples, max(1, max_tokens // len(groups[0])), laid, model.device, workers)
            for names in groups:
                members += _scores(model, own, names, len(examples), workers)
        if self.functions:
            decoded = [ends.text(ids) for ids in completions]
            texts, columns = [record.prompt for record in records], [record.columns for record in records]
            asked = Asked(texts, decoded, list(completions), columns, state)
            members += workers.once(lambda: function_scores(self.functions, asked))
        return np.array(members, dtype=float)


def _closing(completion: Sequence[int], encoder: Encoder) -> int:
    """The end token that such a completion had in training."""
    called = len(completion) > 0 and completion[-1] == encoder.call_end_id
    return encoder.call_end_id if called else encoder.end_id


def function_scores(functions: Sequence[Scorer], asked: Asked) -> list[list[float]]:
    """Each function's scores, in order; those of async functions and of services are waited for together."""
    found: dict[int, list[float]] = {}
    together = [at for at, function in enumerate(functions) if inspect.iscoroutinefunction(function)]
    for at, function in enumerate(functions):
        if at not in together:
            found[at] = cast("list[float]", function(asked))
    if together:
        running = [cast("Coroutine[Any, Any, list[float]]", functions[at](asked)) for at in together]
        found |= dict(zip(together, finish(together_or_none(running)), strict=True))
    return [found[at] for at in range(len(functions))]


def score_batches(
    model: Model,
    laid_out: Sequence[Batch],
    adapter: str,
    done: Callable[[], None] = lambda: None,
    workers: Workers = ALONE,
) -> list[list[float]]:
    """Scores of each example's sequences by one adapter: `score_members` of it alone."""
    return score_members(model, laid_out, [(adapter,)], done, workers)[0]


def score_members(
    model: Model,
    laid_out: Sequence[Batch],
    groups: Sequence[Sequence[str]],
    done: Callable[[], None] = lambda: None,
    workers: Workers = ALONE,
) -> list[list[list[float]]]:
    """Scores of each example's sequences, in the order of the examples, by each adapter: [adapter][example][sequence].

    Args:
        laid_out: all micro-batches, which the workers share.
        groups: adapters that one pass computes (`ensemble.passes`).
        done: called after each batch of each group.

    Raises:
        AdapterError, DivergenceError: a score isn't finite (`perlhf.rollout.local.check_finite`); nan would be
            taken for one that wasn't given.
    """
    count, own = sum(len(batch.sequences) for batch in laid_out), own_of(laid_out, workers)
    places: dict[int, tuple[int, ...]] = {}
    for batch in laid_out:
        ends = (*batch.first[1:], len(batch.sequences))
        places |= {i: batch.sequences[at:end] for i, at, end in zip(batch.examples, batch.first, ends, strict=True)}
    flat = [row for names in groups for row in _scores(model, own, names, count, workers, done)]
    return [[[row[at] for at in places[i]] for i in range(len(places))] for row in flat]


def mean_scores(members: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The members' mean score of each example's sequences: [example][sequence]."""
    return [np.mean(of_members, axis=0).tolist() for of_members in zip(*members, strict=True)]


@torch.no_grad()
def _scores(
    model: Model,
    own: Sequence[Batch],
    adapters: Sequence[str],
    count: int,
    workers: Workers,
    done: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Scores [adapter, sequence] of all `count` sequences, of which this worker computes those of its micro-batches."""
    scores = torch.zeros(len(adapters), count, dtype=torch.float64)
    for batch in own:
        found = member_scores(model, batch, adapters)
        for adapter, row in zip(adapters, found, strict=True):
            check_finite(model, adapter, row, "scores")
        scores[:, list(batch.sequences)] = found.double().cpu()
        done()
    return workers.sum(scores).tolist()


def load_scorers(
    model: Model,
    sources: Sequence[str],
    how: Combine,
    encoder: Encoder,
    prefix: str = "reward",
    key: str = "reward",
    *,
    prompts: Iterable[Prompt] = (),
    weights: Sequence[float] | None = None,
    timeout_seconds: float = 60.0,
) -> Scorers:
    """Loads every source: an http(s) address, `module:function`, or a reward run directory, as adapter PREFIX_0, ..

    A run of several members stands for them, as if each were named; a weight of the run is that of their mean.

    Args:
        key: of the configuration, which errors name.
        prompts: all that may be scored; a function may ask for the columns that they have.
        weights: of the sources, for their weighted sum.
        timeout_seconds: limit of one request to a service.

    Raises:
        ConfigError: a source that is none of these, a function that asks for what the prompts haven't;
            AdapterError: a reward run of another base or encoding.
    """
    functions = load_functions(sources, key, prompts, timeout_seconds)
    adapters: dict[int, str] = {}
    scored: dict[int, Scorer] = {}
    names: list[str] = []
    shares: list[float] = []
    for at, source in enumerate(sources):
        directories = [] if at in functions else adapters_of(Path(source))
        if at in functions:
            scored[len(names)] = functions[at]
        elif not directories:
            raise ConfigError(
                f"'{source}' is no finished reward run",
                where=key,
                allowed="a reward run directory, module:function, or an http(s) address",
                hint="train it with perlhf reward",
            )
        for directory in directories:
            name = f"{prefix}_{len(adapters)}"
            adapter = load_earlier(model, directory, name, encoder, key)
            if adapter.score_head is None:
                raise ConfigError(f"{source} holds a {adapter.role} adapter", where=key, allowed="a reward run")
            adapters[len(names) + directories.index(directory)] = name
        names += [source] if len(directories) < 2 else map(str, directories)
        if weights is not None:
            shares += [weights[at] / max(1, len(directories))] * max(1, len(directories))
    order = (*adapters, *scored)
    chosen = None if weights is None else tuple(shares)
    return Scorers(tuple(adapters.values()), tuple(scored.values()), how, chosen, order, tuple(names))


def load_functions(
    sources: Sequence[str], key: str, prompts: Iterable[Prompt], timeout_seconds: float = 60.0
) -> dict[int, Scorer]:
    """The functions and services among sources of rewards, by their place there.

    Raises:
        ConfigError, RewardFunctionError: as `load_function` and `http_reward` say.
    """
    services = {at for at, source in enumerate(sources) if is_address(source)}
    named = {at for at, source in enumerate(sources) if ":" in source and not Path(source).exists()} - services
    columns = {name for prompt in prompts for name in prompt.columns} if named else set[str]()
    return {
        at: http_reward(sources[at], timeout_seconds) if at in services else load_function(sources[at], key, columns)
        for at in sorted(services | named)
    }


def http_reward(address: str, timeout_seconds: float = 60.0, attempts: int = 4, backoff_seconds: float = 1.0) -> Scorer:
    """Scores from a service: each call posts `{"prompts": [...], "completions": [...]}` and reads `{"scores": [...]}`.

    A prompt is a string or a list of `{"role", "content"}`; a score of null leaves its completion out. The service's
    key, if it needs one, is PERLHF_REWARD_KEY. Limits and retries are those of `perlhf.system.http.post_all`.

    Raises:
        ConfigError: no http(s) address, one that holds a secret, an environment variable that isn't set.
        ServiceError: at a call, the service failed or its answer has no scores.
        RewardFunctionError: at a call, another number of scores than completions, or one that is no finite number.
    """
    url, hidden = filled(address)
    service = Service(url, shown(address), os.environ.get(REWARD_KEY), REWARD_KEY, hidden, "reward_timeout_seconds")

    async def score(asked: Asked) -> list[float]:
        prompts = [p if isinstance(p, str) else [dict(message) for message in p] for p in asked.prompts]
        (answer,) = await all_answers(
            service,
            [{"prompts": prompts, "completions": asked.completions}],
            timeout_seconds=timeout_seconds,
            attempts=attempts,
            backoff_seconds=backoff_seconds,
        )
        if not isinstance(answer, Mapping) or "scores" not in answer:
            raise ServiceError("the answer has no scores", where=service.shown, allowed='{"scores": [...]}')
        return checked(answer["scores"], len(asked.completions), service.shown, service.excerpt)

    return score


def combine(scores: ArrayLike, how: Combine) -> NDArray[np.float64]:
    """One score per completion from those of several reward models; nan stands for a score that wasn't given.

    Args:
        scores: float [members, completions].
        how: `mean`, `min`, or `mean_minus_std`: the mean less the population standard deviation over members
            (0 for one member). Each is over those that gave a score.

    Returns:
        [completions], nan where no member gave a score.

    Raises:
        ConfigError: an unknown `how`.
        DataError: not two-dimensional, or no member.
    """
    table = np.asarray(scores, dtype=float)
    if table.ndim != 2 or not len(table):
        raise DataError(f"scores of shape {table.shape}", allowed="[members, completions], at least one member")
    whole = not np.isnan(table).any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of a column without any score
        match how:
            case "mean":
                return table.mean(axis=0) if whole else np.nanmean(table, axis=0)
            case "min":
                return table.min(axis=0) if whole else np.nanmin(table, axis=0)
            case "mean_minus_std":
                return table.mean(axis=0) - table.std(axis=0) if whole else np.nanmean(table, 0) - np.nanstd(table, 0)
            case _:
                raise ConfigError(f"unknown value {how!r}", where="combine", allowed="mean, min, mean_minus_std")


def centred(scores: ArrayLike, levels: Sequence[Level]) -> NDArray[np.float64]:
    """Members' scores less what each of them gives the reference's answers, spread alike.

    (score - mean of the member) * (mean deviation of all members / deviation of the member)

    Bradley-Terry leaves a reward model's zero free, and nothing makes two models spread alike. As they are, the one
    with the lowest zero is the minimum of nearly all answers, and deviations between members are those of their zeros.
    Here 0 is as good as the reference, to every member. A member that doesn't vary isn't spread, and isn't in the mean
    deviation.

    Members that give the reference 0 and 2 (mean 1, deviation 1), and 100 and 106 (mean 103, deviation 3), have the
    mean deviation 2. An answer that they score 2 and 103 gets 2 and 0: minimum 0, mean less deviation 1 - 1 = 0.

    Args:
        scores: float [members, completions]; nan stays nan.
        levels: of each member.
    """
    means, deviations = np.array(levels, dtype=float).T
    vary = deviations > 0
    common = deviations[vary].mean() if vary.any() else 1.0
    factors = np.where(vary, common / np.where(vary, deviations, 1.0), 1.0)
    return (np.asarray(scores, dtype=float) - means[:, None]) * factors[:, None]


def weighted(scores: ArrayLike, weights: Sequence[float]) -> NDArray[np.float64]:
    """The members' weighted sum, as TRL's `reward_weights` gives it; a score that wasn't given (nan) adds nothing.

    Returns:
        [completions], nan where no member gave a score.
    """
    table = np.asarray(scores, dtype=float)
    total = np.nansum(table * np.asarray(weights, dtype=float)[:, None], axis=0)
    return np.where(np.isnan(table).all(axis=0), np.nan, total)


def _without_end(ids: Ids, ends: Ends) -> Ids:
    return ids[:-1] if len(ids) and ids[-1] in ends.ids else ids
