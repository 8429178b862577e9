"""SFT stage: the `sft` adapter imitates demonstrations. It becomes the policy's start and anchor."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from perlhf.config.stages import SftConfig
from perlhf.data import order
from perlhf.data.records import Demonstration, Record
from perlhf.data.store import DEMONSTRATION, hold
from perlhf.method.losses import sft_loss
from perlhf.method.packing import Batch, Tokens, batches
from perlhf.model import saved
from perlhf.model.adapter import Adapter
from perlhf.model.bases.found import Base
from perlhf.model.encoding.encode import Encoder, Example
from perlhf.model.model import Model
from perlhf.model.open import load_start, new_adapter, open_model, with_day
from perlhf.model.supported import told
from perlhf.runs.run import open_run
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
    base = Base.find(config.base)
    config = with_day(config, base)
    with open_run(config.run, "sft", config, loop.facts(config, base)) as run:
        if run.finished:
            return run.result()
        model, encoder = open_model(config, base)
        run.note("way", told(model.way, config.packing))
        sides = loop.read_sides(config, ("demonstration",))
        train, counts = encode_items(encoder, sides.train)
        held_out = loop.whole_groups(sides.validation, config.validation_examples, config.seed)
        held_out, _ = encode_items(encoder, held_out)
        loop.check_test_side(encoder, sides)
        validation = cache(lambda: laid_out(held_out, config, model))
        start = None if config.start is None else load_start(model, config, encoder, "sft")
        adapter = new_adapter(model, NAME, "sft", config, start=start)
        plan = loop.updates_of(config, train.records)
        optimizers = optim.build({NAME: (adapter.trainable_by_name(), config.learning_rate)}, config.optim)
        loop.tell(sides)
        loop.note_slow_validation(config, len(held_out))
        step, keeper, state = loop.restore(run, model, optimizers)
        tokens = state.get("tokens", 0)
        if step < plan.total:
            loop.check_goes_on(run, step, keeper, config.validate_every)
        with run.progress(plan.total, step, "sft") as bar:
            while step < plan.total:
                step += 1
                items = [train[i] for i in plan[step - 1]]
                values = _update(model, adapter, optimizers[NAME], items, step, plan.total, config)
                tokens += int(values["tokens"])
                if step % config.validate_every == 0:
                    values |= _validate(keeper, step, model, validation())
                run.log(step, values)
                if keeper.step == step or step % config.save_every == 0 or step == plan.total or run.stop_requested:
                    loop.save(run, step, model, optimizers, keeper, {"tokens": tokens})
                bar.advance()
                loop.stop_if_asked(run, step, plan.total)
        if step % config.validate_every:  # the end, of which checkpoints know nothing (`loop.check_goes_on`)
            run.amend(step, _validate(keeper, step, model, validation()))
        loop.restore_best(run.path, step, keeper, adapter)
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
        return run.result()


@torch.no_grad()
def validation_loss(model: Model, laid_out: Sequence[Batch]) -> float:
    """Mean negative log-probability of a completion token under the `sft` adapter, in nats."""
    total = 0.0
    for batch in laid_out:
        total -= model.logprobs(batch, NAME).logprobs.double().sum().item()
    return total / sum(len(batch.targets) for batch in laid_out)


def _validate(keeper: Keeper, step: int, model: Model, laid_out: Sequence[Batch]) -> dict[str, float]:
    """Offers the weights of `step` to the keeper; the loss of held-out items, as metrics.jsonl has it."""
    began = time.perf_counter()
    loss = validation_loss(model, laid_out)
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
) -> dict[str, float]:
    """One optimiser step on `items`, in micro-batches whose losses add up to the update's."""
    began = time.perf_counter()
    torch.manual_seed(order.keyed_seed(config.seed, "dropout", step))
    microbatches = laid_out(items, config, model)
    completion_tokens = sum(len(batch.targets) for batch in microbatches)
    summed = 0.0
    for batch in microbatches:
        out = model.logprobs(batch, NAME, dropout=config.adapter.dropout > 0)
        weights = torch.tensor([items[i].weight for i in batch.examples], device=model.device)
        loss, _ = sft_loss(out.logprobs, batch.completion_mask, weights=weights, divisor=completion_tokens)
        loss.backward()
        summed += loss.item()
    tokens = sum(batch.tokens for batch in microbatches)
    loop.check_bounded("loss", summed, step, loop.LOSS_LIMIT)
    learning_rate = optim.learning_rate_at(step, total, config.learning_rate, config.optim)
    norm = loop.optimiser_step(optimizer, adapter, learning_rate, config.optim.max_grad_norm)
    return {
        "loss": summed,
        "learning_rate": learning_rate,
        "grad_norm": norm,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }
