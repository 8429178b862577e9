"""SFT stage: the `sft` adapter imitates demonstrations. It becomes the policy's start and anchor."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from perlhf.config.stages import SftConfig
from perlhf.data.records import Demonstration, Record
from perlhf.data.store import DEMONSTRATION, hold
from perlhf.method.losses import sft_loss
from perlhf.method.packing import Batch, Tokens, batches
from perlhf.model import saved
from perlhf.model.adapter import Adapter
from perlhf.model.bases.found import Base
from perlhf.model.encoding.encode import Encoder, Example
from perlhf.model.foretold.memory import keep_or_recompute
from perlhf.model.model import Model
from perlhf.model.open import load_start, new_adapter, open_model, with_day
from perlhf.model.supported import told
from perlhf.parallel.shares import own_batches, own_of
from perlhf.parallel.together import together
from perlhf.parallel.workers import ALONE, Workers
from perlhf.runs.run import Run
from perlhf.training import loop, optim
from perlhf.training.loop import Keeper

NAME = "sft"


@dataclass(frozen=True)
class Item:
    """One encoded demonstration."""

    tokens: Tokens
    weight: float
    group: str


def train_sft(config: SftConfig) -> dict[str, Any]:
    """Trains the SFT adapter into `config.run` and returns its result.

    Raises:
        DataError, ConfigError, ModelError, AdapterError, RunError: as the parts say.
        DivergenceError: loss or gradient not finite; the last checkpoint is kept.
    """
    with together() as workers:
        workers.check_enough(config.examples_per_update, "examples_per_update")
        base = Base.find(config.base)
        config = with_day(config, base, workers)
        with loop.opened(config, "sft", base, workers) as run:
            return workers.once(run.result) if run.finished else _train(config, base, run, workers)


def _train(config: SftConfig, base: Base, run: Run, workers: Workers) -> dict[str, Any]:
    """The run from where it is to its end; its result."""
    model, encoder = open_model(config, base, workers=workers)
    run.note("way", told(model.way, config.packing))
    sides = loop.read_sides(config, ("demonstration",))
    train, counts = encode_items(encoder, sides.train)
    held_out = loop.whole_groups(sides.validation, config.validation_examples, config.seed)
    held_out, _ = encode_items(encoder, held_out)
    loop.check_test_side(encoder, sides)
    validation = cache(lambda: laid_out(held_out, config, model))
    start = None if config.start is None else load_start(model, config, encoder, "sft")
    adapter = new_adapter(model, NAME, "sft", config, start=start)
    run.note_session("memory", keep_or_recompute(config, model, workers))
    plan = loop.updates_of(config, train.records)
    optimizers = optim.build({NAME: (adapter.trainable_by_name(), config.learning_rate)}, config.optim)
    loop.tell(sides)
    loop.note_slow_validation(config, len(held_out))
    step, keeper, state = loop.restore(run, model, optimizers, workers)
    tokens = state.get("tokens", 0)
    if step < plan.total:
        loop.check_goes_on(run, step, keeper, config.validate_every)
    with run.progress(plan.total, step, "sft") as bar:
        while step < plan.total:
            step += 1
            items = [train[i] for i in plan[step - 1]]
            values = _update(model, adapter, optimizers[NAME], items, step, plan.total, config, workers)
            loop.check_same(workers, step, config.check_every, [adapter])
            tokens += int(values["tokens"])
            if step % config.validate_every == 0:
                values |= _validate(keeper, step, model, validation(), workers)
            run.log(step, values)
            asked = workers.any(run.stop_requested)
            if keeper.step == step or step % config.save_every == 0 or step == plan.total or asked:
                loop.save(run, step, model, optimizers, keeper, {"tokens": tokens})
            bar.advance()
            loop.stop_if_asked(asked, step, plan.total)
    if step % config.validate_every:  # the end, of which checkpoints know nothing (`loop.check_goes_on`)
        run.amend(step, _validate(keeper, step, model, validation(), workers))
    loop.restore_best(run.path, step, keeper, [adapter], workers)
    if run.writes:
        saved.save_adapter(model, NAME, run.path / "adapter", encoder)
    result = {
        "updates": plan.total,
        "best_step": keeper.step,
        "validation_loss": keeper.metrics["loss"],
        "validation_examples": len(held_out),
        "train_examples": len(train),
        "counts": counts,
        "tokens": tokens,
        "trainable_parameters": sum(p.numel() for p in adapter.trainable()),
        "tuning": config.tuning,
    }
    run.finish(result)
    return workers.once(run.result)


@torch.no_grad()
def validation_loss(model: Model, laid_out: Sequence[Batch], workers: Workers = ALONE) -> float:
    """Mean negative log-probability of a completion token under the `sft` adapter, in nats."""
    total = 0.0
    for batch in own_of(laid_out, workers):
        total -= model.logprobs(batch, NAME).logprobs.double().sum().item()
    return workers.numbers({"loss": total})["loss"] / sum(len(batch.targets) for batch in laid_out)


def _validate(keeper: Keeper, step: int, model: Model, laid_out: Sequence[Batch], workers: Workers) -> dict[str, float]:
    """Offers the weights of `step` to the keeper; the loss of held-out items, as metrics.jsonl has it."""
    began = time.perf_counter()
    loss = validation_loss(model, laid_out, workers)
    keeper.offer(step, -loss, {"loss": loss})
    return loop.validated({"loss": loss}, began)


def laid_out(items: Sequence[Item], config: SftConfig, model: Model) -> list[Batch]:
    """The items in micro-batches."""
    packing = model.packing(config.packing)
    return batches([[item.tokens] for item in items], config.microbatch_tokens, packing, model.device)


def encode_items(encoder: Encoder, records: Sequence[Record]) -> tuple[loop.Encoded[Item], dict[str, int]]:
    """Demonstrations as tokens, with counts of cut and dropped ones."""
    records = hold(records)
    demonstrations = records.take(records.facts.kind == DEMONSTRATION)
    fitting, counts = loop.fitting(encoder, demonstrations, encoder.config.drop_long)
    return loop.Encoded(encoder, fitting, _item), counts


def _item(record: Demonstration, examples: list[Example]) -> Item:
    return Item(examples[0].tokens, record.weight, record.group)


def _update(
    model: Model,
    adapter: Adapter,
    optimizer: torch.optim.AdamW,
    items: Sequence[Item],
    step: int,
    total: int,
    config: SftConfig,
    workers: Workers = ALONE,
) -> dict[str, float]:
    """One optimiser step on `items`, in micro-batches of all workers whose losses add up to the update's."""
    began = time.perf_counter()
    key, dropout = loop.seed_dropout(config.seed, step, workers), config.adapter.dropout > 0
    completion_tokens = sum(length for item in items for _, length in item.tokens.completions)
    summed, tokens = 0.0, 0
    examples, packing = [[item.tokens] for item in items], model.packing(config.packing)
    for batch in own_batches(examples, config.microbatch_tokens, packing, model.device, workers):
        out = model.logprobs(batch, NAME, dropout=dropout, dropout_key=key)
        weights = torch.tensor([items[i].weight for i in batch.examples], device=model.device)
        loss, _ = sft_loss(out.logprobs, batch.completion_mask, weights=weights, divisor=completion_tokens)
        loss.backward()
        summed += loss.item()
        tokens += batch.tokens
    sums = workers.numbers({"loss": summed, "tokens": tokens})
    loop.check_bounded("loss", sums["loss"], step, loop.LOSS_LIMIT)
    workers.sum_gradients(adapter.trainable())
    learning_rate = optim.learning_rate_at(step, total, config.learning_rate, config.optim)
    norm = loop.optimiser_step(optimizer, adapter, learning_rate, config.optim.max_grad_norm)
    return {
        "loss": sums["loss"],
        "learning_rate": learning_rate,
        "grad_norm": norm,
        "tokens": int(sums["tokens"]),
        "tokens_per_second": sums["tokens"] / (time.perf_counter() - began),
    }
