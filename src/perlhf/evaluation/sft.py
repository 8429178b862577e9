"""Evaluation of an SFT run: loss of held-out demonstrations and a few answers, without and with the adapter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perlhf.config.commands import EvaluateConfig
from perlhf.config.stages import StageConfig
from perlhf.data import order
from perlhf.data.records import Demonstration
from perlhf.data.splits import load
from perlhf.evaluation.shared import Statistic, by_length, plain, progress, sample_batch, seen_groups, with_interval
from perlhf.method.packing import batches
from perlhf.model.encode import Encoder, Example
from perlhf.model.model import Model
from perlhf.model.open import FinishedRun
from perlhf.training import loop

MAX_SAMPLES = 16
COMPLETION_TOKENS = 128


def evaluate_sft(run: FinishedRun, config: EvaluateConfig) -> dict[str, Any]:
    """What evaluation.json holds of an SFT run."""
    trained_on = load(run.config.data, ("demonstration",), "train")
    found = load(config.data or run.config.data, ("demonstration",), config.split)
    demonstrations = [record for record in found if isinstance(record, Demonstration)]
    model, encoder = run.open(config.device)
    triples = [(record.prompt, [record.completion], record.source) for record in demonstrations]
    encoded, counts = loop.encode_all(encoder, triples, encoder.config.drop_long)
    kept = [(record, found[0]) for record, found in zip(demonstrations, encoded, strict=True) if found is not None]
    groups = [record.group for record, _ in kept]
    sides = {"before": None, "after": run.stage}
    measured = {
        side: _losses(model, [example for _, example in kept], adapter, config, run.config, groups)
        for side, adapter in sides.items()
    }
    shown = order.choose([record for record, _ in kept], min(config.prompts, MAX_SAMPLES), config.seed)
    return {
        "kind": "sft",
        "split": config.split,
        "n": len(kept),
        "groups": len(set(groups)),
        "groups_seen_in_training": seen_groups([record for record, _ in kept], trained_on),
        "counts": counts,
        "metrics": measured["after"],
        **measured,
        "temperature": config.temperature,
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        "samples": _samples(model, encoder, shown, run.stage, config),
    }


@torch.no_grad()
def _losses(
    model: Model,
    examples: Sequence[Example],
    adapter: str | None,
    config: EvaluateConfig,
    trained: StageConfig,
    groups: Sequence[str],
) -> dict[str, Any]:
    """Mean negative log-probability of a completion token in nats, and its exponential, with intervals."""
    nats, tokens = np.zeros(len(examples)), np.array([len(example.completion) for example in examples], dtype=float)
    budget = config.tokens_per_microbatch or trained.microbatch_tokens
    laid_out = batches([[example.tokens] for example in examples], budget, trained.packing, model.device)
    with progress(len(laid_out), "loss of the base" if adapter is None else "loss") as bar:
        for batch in laid_out:
            logprobs = model.logprobs(batch, adapter).logprobs
            nats[list(batch.examples)] = -logprobs.double().sum(-1).cpu().numpy()
            bar.advance()
    loss = with_interval(_per_token(nats, tokens), groups, config)
    perplexity = None if loss is None else {key: float(np.exp(value)) for key, value in loss.items()}
    return {"loss": loss, "perplexity": perplexity}


def _per_token(nats: NDArray[np.float64], tokens: NDArray[np.float64]) -> Statistic:
    return lambda indices: float(nats[indices].sum() / tokens[indices].sum())


def _samples(
    model: Model, encoder: Encoder, records: Sequence[Demonstration], adapter: str, config: EvaluateConfig
) -> list[dict[str, Any]]:
    """Answers of the base and of the adapter to the same prompts with the same draws, beside what a person wrote."""
    # At least half of the encoding's tokens stay for the prompt.
    length = min(COMPLETION_TOKENS, max(encoder.config.max_tokens // 2, 1))
    prompts = [encoder.cut_prompt(record.prompt, length) for record in records]
    batches = by_length(prompts)
    before: dict[int, str] = {}
    after: dict[int, str] = {}
    with progress(2 * len(batches), "answers") as bar:
        for name, texts in ((None, before), (adapter, after)):
            for batch in batches:
                rollout = sample_batch(
                    model,
                    encoder,
                    prompts,
                    batch,
                    adapter=name,
                    temperature=config.temperature,
                    max_completion_tokens=length,
                    seed=config.seed,
                )
                texts |= zip(batch, map(encoder.decode, rollout.completions), strict=True)
                bar.advance()
    return [
        {
            "prompt": plain(record.prompt),
            "before": before[i],
            "after": after[i],
            "demonstration": plain(record.completion),
        }
        for i, record in enumerate(records)
    ]
