"""SFT stage: the `sft` adapter imitates demonstrations. It becomes the policy's start and anchor."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from perlhf.config.stages import SftConfig
from perlhf.data import order
from perlhf.data.records import Demonstration, Record
from perlhf.data.splits import load
from perlhf.method.losses import sft_loss
from perlhf.method.packing import Packing, lay_out, microbatches
from perlhf.model import saved
from perlhf.model.adapter import Adapter
from perlhf.model.base import Base
from perlhf.model.encode import Encoder, Example
from perlhf.model.model import Model
from perlhf.model.open import new_adapter, open_model
from perlhf.runs.run import open_run
from perlhf.training import loop, optim
from perlhf.training.loop import Best, Interrupted

NAME = "sft"
Weighted = tuple[Example, float, str]
"""An example, its weight and its group."""


def train_sft(config: SftConfig) -> dict[str, Any]:
    """Trains the SFT adapter into `config.run` and returns its result.

    Raises:
        DataError, ConfigError, ModelError, AdapterError, RunError: as the parts say.
        DivergenceError: loss or gradient not finite; the last checkpoint is kept.
    """
    base = Base.find(config.base)
    with open_run(config.run, "sft", config, loop.facts(config, base)) as run:
        if run.finished:
            return run.result()
        model, encoder = open_model(config, base)
        train, counts = _encode(encoder, load(config.data, ("demonstration",), "train"))
        held_out = load(config.data, ("demonstration",), "validation")
        validation, _ = _encode(encoder, loop.some(held_out, config.validation_examples, config.seed))
        adapter = new_adapter(model, NAME, "sft", config)
        plan = order.plan_updates(
            [group for _, _, group in train],
            config.examples_per_update,
            config.epochs,
            config.seed,
            config.order,
            config.max_updates,
        )
        optimizers = optim.build({NAME: (adapter.trainable_by_name(), config.learning_rate)}, config.optim)
        step, best, state = loop.restore(run, model, optimizers)
        tokens = state.get("tokens", 0)
        with run.progress(len(plan), step, "sft") as bar:
            while step < len(plan):
                step += 1
                examples = [train[i] for i in plan[step - 1]]
                values = _update(model, adapter, optimizers[NAME], examples, step, len(plan), config)
                tokens += int(values["tokens"])
                improved = False
                if step % config.validate_every == 0 or step == len(plan):
                    values["validation_loss"] = validation_loss(
                        model, validation, config.microbatch_tokens, config.packing
                    )
                    if improved := -values["validation_loss"] > best.value:
                        best = Best(step, -values["validation_loss"], {"loss": values["validation_loss"]})
                run.log(step, values)
                if improved or step % config.save_every == 0 or run.stop_requested:
                    loop.save(run, step, model, optimizers, best, {"tokens": tokens})
                bar.advance()
                if run.stop_requested and step < len(plan):
                    raise Interrupted(
                        f"stopped at update {step} of {len(plan)}", hint="run the same command to continue"
                    )
        loop.restore_best(run.path, best, adapter)
        saved.save_adapter(model, NAME, run.path / "adapter", encoder)
        result = {
            "updates": len(plan),
            "best_step": best.step,
            "validation_loss": best.metrics["loss"],
            "validation_examples": len(validation),
            "train_examples": len(train),
            "counts": counts,
            "tokens": tokens,
            "trainable_parameters": sum(p.numel() for p in adapter.trainable()),
            "tuning": config.tuning,
        }
        run.finish(result)
        return run.result()


@torch.no_grad()
def validation_loss(model: Model, examples: Sequence[Weighted], max_tokens: int, packing: Packing = "tree") -> float:
    """Mean negative log-probability of a completion token, in nats."""
    total = 0.0
    for batch in microbatches([[e.ids] for e, _, _ in examples], max_tokens, packing):
        chosen = [examples[i][0] for i in batch]
        out = model.logprobs([e.prompt for e in chosen], [e.completion for e in chosen], NAME, packing=packing)
        total -= out.logprobs.double().sum().item()
    return total / sum(len(e.completion) for e, _, _ in examples)


def _encode(encoder: Encoder, records: Sequence[Record]) -> tuple[list[Weighted], dict[str, int]]:
    demonstrations = [record for record in records if isinstance(record, Demonstration)]
    pairs = [(record.prompt, [record.completion], record.source) for record in demonstrations]
    examples, counts = loop.encode_all(encoder, pairs, encoder.config.drop_long)
    kept = zip(examples, demonstrations, strict=True)
    return [(found[0], record.weight, record.group) for found, record in kept if found is not None], counts


def _update(
    model: Model,
    adapter: Adapter,
    optimizer: torch.optim.AdamW,
    examples: Sequence[Weighted],
    step: int,
    total: int,
    config: SftConfig,
) -> dict[str, float]:
    """One optimiser step on `examples`, in micro-batches whose losses add up to the update's."""
    began = time.perf_counter()
    torch.manual_seed(order.keyed_seed(config.seed, "dropout", step))
    completion_tokens = sum(len(e.completion) for e, _, _ in examples)
    summed, tokens = 0.0, 0
    for batch in microbatches([[e.ids] for e, _, _ in examples], config.microbatch_tokens, config.packing):
        chosen = [examples[i][0] for i in batch]
        out = model.logprobs(
            [e.prompt for e in chosen],
            [e.completion for e in chosen],
            NAME,
            packing=config.packing,
            dropout=config.adapter.dropout > 0,
        )
        tokens += lay_out([e.ids for e in chosen], config.packing).tokens
        weights = torch.tensor([examples[i][1] for i in batch], device=model.device)
        loss, _ = sft_loss(out.logprobs, out.mask, weights=weights, divisor=completion_tokens)
        loss.backward()
        summed += loss.item()
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
