"""Reward stage: a score head on an adapter, from comparisons (Bradley-Terry), ratings (cross-entropy), or both.

Beside the paper: ratings use the correct second term of the cross-entropy; the score's bias holds the log-odds of the
ratings, so that update 0 predicts their share; the kept checkpoint is the best on held-out groups, the probe's start
included. With `members: K` an ensemble of K adapters learns from the same records in the same updates, each weighing
them otherwise.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from perlhf.config.stages import RewardConfig
from perlhf.data import order
from perlhf.data.records import Comparison, Rating, Record
from perlhf.data.splits import check_labels
from perlhf.data.store import COMPARISON, NO_LABEL, RATING, Records, hold
from perlhf.errors import DataError
from perlhf.method import linear_probe, metrics
from perlhf.method.losses import bradley_terry, rating_cross_entropy
from perlhf.method.packing import Batch, Tokens, batches
from perlhf.model import saved
from perlhf.model.adapter import Adapter
from perlhf.model.bases.found import Base
from perlhf.model.encoding.encode import Encoder, Example
from perlhf.model.foretold.memory import keep_or_recompute
from perlhf.model.model import Model
from perlhf.model.open import load_sft, load_starts, new_adapter, open_model, with_day
from perlhf.model.supported import told
from perlhf.parallel.shares import own_batches, own_of
from perlhf.parallel.together import together
from perlhf.parallel.workers import ALONE, Workers
from perlhf.rollout.ensemble import member_scores, passes
from perlhf.rollout.scorers import mean_scores, score_members
from perlhf.runs.run import Run
from perlhf.training import loop, optim
from perlhf.training.loop import Keeper

NAME = "reward_0"
"""Of the first member's adapter."""


@dataclass(frozen=True)
class Item:
    """One encoded comparison (chosen, rejected; `label` None) or rating."""

    sequences: tuple[Tokens, ...]
    label: bool | None
    weight: float
    margin: float
    group: str


@dataclass(frozen=True)
class Shares:
    """Of the training records, which are comparisons and which ratings: together 1."""

    comparisons: float
    ratings: float

    @classmethod
    def of(cls, records: Records) -> "Shares":
        """Those of `records`."""
        compared = int((records.facts.kind == COMPARISON).sum())
        return cls(compared / len(records), (len(records) - compared) / len(records))


def train_reward(config: RewardConfig) -> dict[str, Any]:
    """Trains a reward adapter into `config.run` and returns its result.

    Raises:
        DataError: unusable records; ConfigError, ModelError, AdapterError, RunError as the parts say.
        DivergenceError: loss or gradient not finite; the last checkpoint is kept.
    """
    with together() as workers:
        workers.check_enough(config.examples_per_update, "examples_per_update")
        base = Base.find(config.base)
        config = with_day(config, base, workers)
        with loop.opened(config, "reward", base, workers) as run:
            return workers.once(run.result) if run.finished else _train(config, base, run, workers)


def _train(config: RewardConfig, base: Base, run: Run, workers: Workers) -> dict[str, Any]:
    """The run from where it is to its end; its result."""
    model, encoder = open_model(config, base, workers=workers)
    run.note("way", told(model.way, config.packing))
    sides = loop.read_sides(config, ("comparison", "rating"))
    check_labels(sides.train, config.data)
    train, counts = encode_items(encoder, sides.train)
    held_out = loop.whole_groups(sides.validation, config.validation_examples, config.seed)
    held_out, _ = encode_items(encoder, held_out)
    check_select(config, held_out.records)
    loop.check_test_side(encoder, sides)
    validation = cache(lambda: _validation(held_out, config, model))
    weights, balance = class_weights(train, config.class_weight)
    shares = Shares.of(train.records)
    adapters = _start(model, encoder, config, train)
    run.note_session("memory", keep_or_recompute(config, model, workers))
    plan = loop.updates_of(config, train.records)
    learned = {adapter.name: (adapter.trainable_by_name(), config.learning_rate) for adapter in adapters}
    optimizers = optim.build(learned, config.optim)
    loop.tell(sides)
    loop.note_slow_validation(config, len(held_out))
    step, keeper, state = loop.restore(run, model, optimizers, workers)
    tokens = state.get("tokens", 0)
    if step < plan.total:
        loop.check_goes_on(run, step, keeper, config.validate_every)
    if config.head_start == "probe" and keeper.step is None and step == 0:
        _start_head(run, model, adapters, train, weights, shares, config, workers)
        run.log(0, _validate(keeper, 0, model, validation(), config, workers))
        loop.save(run, 0, model, optimizers, keeper, {"tokens": 0})
    with run.progress(plan.total, step, "reward") as bar:
        while step < plan.total:
            step += 1
            values = _update(
                model,
                adapters,
                optimizers,
                [train[i] for i in plan[step - 1]],
                weights,
                shares,
                step,
                plan.total,
                config,
                workers,
            )
            loop.check_same(workers, step, config.check_every, adapters)
            tokens += int(values["tokens"])
            if step % config.validate_every == 0:
                values |= _validate(keeper, step, model, validation(), config, workers)
            run.log(step, values)
            asked = workers.any(run.stop_requested)
            if keeper.step == step or step % config.save_every == 0 or step == plan.total or asked:
                loop.save(run, step, model, optimizers, keeper, {"tokens": tokens})
            bar.advance()
            loop.stop_if_asked(asked, step, plan.total)
    if step % config.validate_every:  # the end, of which checkpoints know nothing (`loop.check_goes_on`)
        run.amend(step, _validate(keeper, step, model, validation(), config, workers))
    loop.restore_best(run.path, step, keeper, adapters, workers)
    if run.writes:
        saved.save_members(model, names_of(config), run.path / "adapter", encoder)
    result = {
        "updates": plan.total,
        "best_step": keeper.step,
        "validation": keeper.metrics,
        "validation_examples": len(held_out),
        "train_examples": len(train),
        "class_balance": balance,
        "counts": counts,
        "tokens": tokens,
        "trainable_parameters": sum(p.numel() for adapter in adapters for p in adapter.trainable()),
        "tuning": config.tuning,
    } | ({"members": config.members} if config.members > 1 else {})
    run.finish(result)
    return workers.once(run.result)


def encode_items(encoder: Encoder, records: Sequence[Record]) -> tuple[loop.Encoded[Item], dict[str, int]]:
    """Comparisons and ratings as token sequences, with counts of cut and dropped ones."""
    records = hold(records)
    judged = records.take((records.facts.kind == COMPARISON) | (records.facts.kind == RATING))
    fitting, counts = loop.fitting(encoder, judged, encoder.config.drop_long)
    return loop.Encoded(encoder, fitting, _item), counts


def _item(record: Comparison | Rating, examples: list[Example]) -> Item:
    label, margin = (None, record.margin) if isinstance(record, Comparison) else (record.label, 0.0)
    return Item(tuple(example.tokens for example in examples), label, record.weight, margin, record.group)


def class_weights(items: loop.Encoded[Item], how: str) -> tuple[dict[bool, float], dict[str, int]]:
    """Loss weight of up and down ratings (`balanced`: n / (2 n_class), each counted by its weight), and their numbers.

    Raises:
        DataError: all ratings are up, or all are down, or all of one label have weight 0.
    """
    labels = _labels(items.records)
    up = sum(labels)
    balance = {"up": up, "down": len(labels) - up, "comparisons": len(items) - len(labels)}
    if not labels:
        return {True: 1.0, False: 1.0}, balance
    weight = label_weights(items.records)
    if not all(weight.values()):
        counted = "ratings that have a weight" if 0 < up < len(labels) else f"{len(labels)} ratings"
        hint = "a reward model needs both labels"
        raise DataError(f"all {counted} are {'up' if weight[True] else 'down'}", hint=hint)
    if how == "none":
        return {True: 1.0, False: 1.0}, balance
    whole = sum(weight.values())
    return {label: whole / (2 * weight[label]) for label in (True, False)}, balance


def label_weights(records: Records) -> dict[bool, float]:
    """The weights of the ratings up and down, added up: their numbers where all weights are 1."""
    return {label: float(records.facts.weight[records.labels == int(label)].sum()) for label in (True, False)}


def _labels(records: Records) -> list[bool]:
    """Of the ratings among them."""
    return (records.labels[records.labels != NO_LABEL] == 1).tolist()


def _validation(held_out: loop.Encoded[Item], config: RewardConfig, model: Model) -> tuple[list[Item], list[Batch]]:
    items = list(held_out)
    return items, laid_out(items, config, model)


def names_of(config: RewardConfig) -> list[str]:
    """Of the members' adapters."""
    return [f"reward_{number}" for number in range(config.members)]


def laid_out(items: Sequence[Item], config: RewardConfig, model: Model) -> list[Batch]:
    """The items in micro-batches."""
    packing = model.packing(config.packing)
    at_once = config.microbatch_tokens // len(passes(model, names_of(config), packing)[0])
    return batches([item.sequences for item in items], max(1, at_once), packing, model.device)


def evaluate_items(
    model: Model, items: Sequence[Item], laid_out: Sequence[Batch], config: RewardConfig, workers: Workers = ALONE
) -> dict[str, float]:
    """Loss and accuracy of held-out items: AUC and balanced accuracy for ratings, pairwise accuracy for comparisons.

    They are of the members' mean score; beside them stand `member_...`, the mean of what each reaches alone.
    """
    groups = passes(model, names_of(config), model.packing(config.packing))
    tables = score_members(model, laid_out, groups, workers=workers)
    each = [_measured(scores, items) for scores in tables]
    if len(tables) == 1:
        return workers.once(lambda: each[0])
    measured = _measured(mean_scores(tables), items)
    return workers.once(
        lambda: measured | {f"member_{key}": float(np.mean([one[key] for one in each])) for key in measured}
    )


def _measured(scores: Sequence[Sequence[float]], items: Sequence[Item]) -> dict[str, float]:
    rated = [(values[0], item.label) for values, item in zip(scores, items, strict=True) if item.label is not None]
    compared = [values for values, item in zip(scores, items, strict=True) if item.label is None]
    return metrics.of_scores([score for score, _ in rated], [label for _, label in rated], compared)


def _start(model: Model, encoder: Encoder, config: RewardConfig, train: loop.Encoded[Item]) -> list[Adapter]:
    """The members' adapters, from an earlier reward run with its heads, or from the SFT adapter or the base.

    Where they are new, their bias is the log-odds of the (weighted) ratings.
    """
    names = names_of(config)
    if config.start is not None:
        starts = load_starts(model, config, encoder)
        pairs = zip(names, starts, strict=True)
        return [new_adapter(model, name, "reward", config, start=start) for name, start in pairs]
    start = None
    if config.sft is not None:
        start = load_sft(model, config.sft, encoder)
    adapters = [new_adapter(model, name, "reward", config, start=start) for name in names]
    weight = label_weights(train.records)
    if any(weight.values()) and config.class_weight == "none":
        for adapter in adapters:
            assert adapter.bias is not None
            adapter.bias.data.fill_(float(np.log(weight[True] / weight[False])))
    return adapters


def member_weight(config: RewardConfig, member: int, item: Item) -> float:
    """How a member weighs a record: as it is, or of several members, times a draw from Exp(1) for each of its groups.

    Members that see the same records in the same updates would hardly differ where a record says little; so weighted
    they are draws from what the records leave open (the Bayesian bootstrap: Rubin 1981).
    """
    if config.members == 1:
        return item.weight
    return item.weight * order.exponential(config.seed, "member", member, item.group)


@torch.no_grad()
def _start_head(
    run: Run,
    model: Model,
    adapters: Sequence[Adapter],
    train: loop.Encoded[Item],
    weight: dict[bool, float],
    shares: Shares,
    config: RewardConfig,
    workers: Workers = ALONE,
) -> None:
    """Fits each head (and its constant bias) on the states before the first update: `linear_probe`.

    Members' states are the same then: each adapter leaves the network as it is, or as the SFT run left it.
    """
    numbers = order.whole_groups([record.group for record in train.records], config.probe_examples, config.seed)
    items = [train[i] for i in numbers]
    microbatches = own_of(laid_out(items, config, model), workers)
    whole = torch.zeros(sum(len(item.sequences) for item in items), model.hidden_size, dtype=torch.float64)
    with run.progress(len(microbatches), 0, "score head") as bar:
        for batch in microbatches:
            whole[list(batch.sequences)] = model.last_states(batch, NAME).double().cpu()
            bar.advance()
    starts = np.cumsum([len(item.sequences) for item in items])[:-1]
    states = np.split(workers.sum(whole).numpy(), starts)
    labels = [item.label for item in items]
    for member, adapter in enumerate(adapters):
        assert adapter.score_head is not None and adapter.bias is not None
        weights = [
            member_weight(config, member, item)
            * (
                config.comparison_weight / shares.comparisons
                if item.label is None
                else config.rating_weight / shares.ratings * weight[item.label]
            )
            for item in items
        ]
        probe = linear_probe.fit(states, labels, [item.group for item in items], weights)
        adapter.score_head.copy_(torch.from_numpy(probe.weight)[None])
        adapter.bias.fill_(probe.bias)
        workers.spread([adapter.score_head, adapter.bias])  # a fit needn't have the same bits on machines of two kinds


def _update(
    model: Model,
    adapters: Sequence[Adapter],
    optimizers: dict[str, torch.optim.AdamW],
    items: Sequence[Item],
    class_weight: dict[bool, float],
    shares: Shares,
    step: int,
    total: int,
    config: RewardConfig,
    workers: Workers = ALONE,
) -> dict[str, float]:
    """One optimiser step of each member on `items`, in micro-batches of all workers whose losses add up.
    What is told is the members' mean.
    """
    began = time.perf_counter()
    key, dropout = loop.seed_dropout(config.seed, step, workers), config.adapter.dropout > 0
    sums = {"loss": 0.0, "right": 0.0, "count": 0.0, "tokens": 0.0}
    examples, packing = [item.sequences for item in items], model.packing(config.packing)
    groups = passes(model, [adapter.name for adapter in adapters], packing)
    at_once = max(1, config.microbatch_tokens // len(groups[0]))
    for batch in own_batches(examples, at_once, packing, model.device, workers):
        numbers = iter(range(len(adapters)))
        for names in groups:
            if len(names) == 1:
                scores = model.scores(batch, names[0], dropout=dropout, dropout_key=key)[None]
            else:
                scores = member_scores(model, batch, names)
            loss = torch.stack(
                [_loss(row, batch, items, next(numbers), class_weight, shares, config, sums) for row in scores]
            ).sum()
            loss.backward()
            sums["loss"] += loss.item()
        sums["tokens"] += batch.tokens
    sums = workers.numbers(sums)
    sums["loss"] /= len(adapters)
    workers.sum_gradients([p for adapter in adapters for p in adapter.trainable()])
    loop.check_bounded("loss", sums["loss"], step, loop.LOSS_LIMIT)
    learning_rate = optim.learning_rate_at(step, total, config.learning_rate, config.optim)
    limit = config.optim.max_grad_norm
    norms = [loop.optimiser_step(optimizers[a.name], a, learning_rate, limit) for a in adapters]
    return {
        "loss": sums["loss"],
        "accuracy": sums["right"] / sums["count"],
        "learning_rate": learning_rate,
        "grad_norm": sum(norms) / len(norms),
        "tokens": sums["tokens"],
        "examples": len(items),
        "groups": len({item.group for item in items}),
        "tokens_per_second": sums["tokens"] / (time.perf_counter() - began),
    }


def _loss(
    scores: torch.Tensor,
    batch: Batch,
    items: Sequence[Item],
    member: int,
    class_weight: dict[bool, float],
    shares: Shares,
    config: RewardConfig,
    sums: dict[str, float],
) -> torch.Tensor:
    """A member's loss of a micro-batch, from its scores [batch]; what is counted goes into `sums`.

    Divisors are what an update of this size has of a kind on average. Its own numbers would weigh the one rating among
    sixteen records like the fifteen comparisons, and nothing where there is none: more the smaller the update is.
    """
    compared, rated = len(items) * shares.comparisons, len(items) * shares.ratings
    known = [(items[i], at) for i, at in zip(batch.examples, batch.first, strict=True)]
    pairs = [(item, at) for item, at in known if item.label is None]
    ratings = [(item, at, item.label) for item, at in known if item.label is not None]
    loss = scores[:0].sum()  # 0, with a gradient: a batch may be empty (`shares.own_batches`)
    if pairs:
        part, counted = bradley_terry(
            scores[[at for _, at in pairs]],
            scores[[at + 1 for _, at in pairs]],
            weights=_floats([member_weight(config, member, item) for item, _ in pairs], scores),
            margins=_floats([config.margin * item.margin for item, _ in pairs], scores),
            label_smoothing=config.label_smoothing,
            divisor=compared,
        )
        loss = loss + config.comparison_weight * part
        _add(sums, counted)
    if ratings:
        weights = [member_weight(config, member, item) * class_weight[label] for item, _, label in ratings]
        part, counted = rating_cross_entropy(
            scores[[at for _, at, _ in ratings]],
            torch.tensor([label for _, _, label in ratings], device=scores.device),
            weights=_floats(weights, scores),
            label_smoothing=config.label_smoothing,
            divisor=rated,
        )
        loss = loss + config.rating_weight * part
        _add(sums, counted)
    return loss


def _validate(
    keeper: Keeper,
    step: int,
    model: Model,
    validation: tuple[list[Item], list[Batch]],
    config: RewardConfig,
    workers: Workers = ALONE,
) -> dict[str, float]:
    """Offers the weights of `step` to the keeper; the metrics of held-out items, as metrics.jsonl has them."""
    began = time.perf_counter()
    measured = evaluate_items(model, *validation, config, workers)
    keeper.offer(step, _quality(measured, config), measured)
    return loop.validated(measured, began)


def _quality(measured: dict[str, float], config: RewardConfig) -> float:
    """The number that picks the kept checkpoint; higher is better."""
    wanted = config.select
    if wanted == "auto":
        wanted = "auc" if "auc" in measured else "pairwise_accuracy" if "pairwise_accuracy" in measured else "loss"
    return -measured["loss"] if wanted == "loss" else measured[wanted]


def check_select(config: RewardConfig, held_out: Records) -> None:
    """Raises DataError where the validation records can't give the metric that `select` names."""
    given = ["loss"]
    if (held_out.facts.kind == COMPARISON).any():
        given.append("pairwise_accuracy")
    if len(set(_labels(held_out))) == 2:
        given.append("auc")
    if config.select not in ("auto", *given):
        raise DataError(
            f"the validation groups give no {config.select}",
            where="select",
            allowed=", ".join(given),
            hint="raise data.validation or name another metric",
        )


def _floats(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _add(sums: dict[str, float], counted: dict[str, float]) -> None:
    for key, value in counted.items():
        sums[key] = sums.get(key, 0.0) + value
