"""Evaluation of an SFT run: loss of held-out demonstrations and a few answers, without and with the adapter."""

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perlhf.config.commands import EvaluateConfig
from perlhf.config.stages import StageConfig
from perlhf.data import order
from perlhf.data.records import Demonstration
from perlhf.evaluation.shared import Sampling, both_sides, measure, plain, progress, seen_groups
from perlhf.method.metrics import Statistic
from perlhf.method.packing import batches
from perlhf.model.encoding.encode import Encoder, Example
from perlhf.model.finished import FinishedRun
from perlhf.model.model import Model
from perlhf.parallel.shares import own_of
from perlhf.parallel.workers import Workers
from perlhf.rollout.local import check_finite
from perlhf.runs.evaluations import Evaluation, Measured, Measures
from perlhf.training import loop

MAX_ANSWERS = 16
"""Prompts that are answered, at the most."""
COMPLETION_TOKENS = 128


def evaluate_sft(run: FinishedRun, config: EvaluateConfig, workers: Workers) -> Callable[[], Evaluation]:
    """The evaluation of an SFT run, once one of the workers that have measured it concludes."""
    trained_on, held_out = both_sides(run, config, ("demonstration",))
    demonstrations = [record for record in held_out if isinstance(record, Demonstration)]
    model, encoder = run.open(config.device, config.shard, workers)
    encoded, counts = loop.encode_all(encoder, demonstrations, encoder.config.drop_long)
    fitting = [(record, line[0]) for record, line in zip(demonstrations, encoded, strict=True) if line is not None]
    records, examples = [record for record, _ in fitting], [example for _, example in fitting]
    groups = [record.group for record in records]
    nats = [_nats(model, examples, adapter, config, run.config, workers) for adapter in (None, run.stage)]
    shown = order.choose(records, min(config.prompts, MAX_ANSWERS), config.seed)
    samples = _answered(model, encoder, shown, run.stage, config, workers.apart)

    def conclude() -> Evaluation:
        before, after = (_losses(of_side, examples, groups, config) for of_side in nats)
        return Evaluation(
            kind="sft",
            split=config.split,
            n=len(records),
            groups=len(set(groups)),
            groups_seen_in_training=seen_groups(records, trained_on),
            counts=counts,
            metrics=after,
            before=before,
            after=after,
            temperature=_temperature(config),
            bootstrap=config.bootstrap,
            seed=config.seed,
            samples=samples,
        )

    return conclude


@torch.no_grad()
def _nats(
    model: Model,
    examples: Sequence[Example],
    adapter: str | None,
    config: EvaluateConfig,
    trained: StageConfig,
    workers: Workers,
) -> NDArray[np.float64]:
    """Negative log-probability of each completion, in nats."""
    nats = np.zeros(len(examples))
    budget = config.tokens_per_microbatch or trained.microbatch_tokens
    laid_out = batches([[example.tokens] for example in examples], budget, model.packing(trained.packing), model.device)
    own = own_of(laid_out, workers)
    with progress(len(own), "loss of the base" if adapter is None else "loss") as bar:
        for batch in own:
            logprobs = model.logprobs(batch, adapter).logprobs
            check_finite(model, adapter, logprobs, "log-probabilities")
            nats[list(batch.examples)] = -logprobs.double().sum(-1).cpu().numpy()
            bar.advance()
    return workers.arrays(nats)[0]


def _losses(
    nats: NDArray[np.float64], examples: Sequence[Example], groups: Sequence[str], config: EvaluateConfig
) -> Measures:
    """Mean negative log-probability of a completion token in nats, and its exponential, with intervals."""
    tokens = np.array([len(example.completion) for example in examples], dtype=float)
    loss = measure(_per_token(nats, tokens), groups, config)
    return {"loss": loss, "perplexity": loss and Measured(*(float(np.exp(nats)) for nats in astuple(loss)))}


def _per_token(nats: NDArray[np.float64], tokens: NDArray[np.float64]) -> Statistic:
    return lambda indices: float(nats[indices].sum() / tokens[indices].sum())


def _answered(
    model: Model,
    encoder: Encoder,
    records: Sequence[Demonstration],
    adapter: str,
    config: EvaluateConfig,
    workers: Workers,
) -> list[dict[str, Any]]:
    """Answers of the base and of the adapter to the same prompts with the same draws, beside what a person wrote."""
    # At least half of the encoding's tokens stay for the prompt.
    length = min(COMPLETION_TOKENS, max(encoder.config.max_tokens // 2, 1))
    prompts = [encoder.cut_prompt(record.prompt, length, record.tools) for record in records]
    sampling = Sampling(model, encoder, prompts, length, config.seed, config.stop)
    texts: dict[str | None, dict[int, str]] = {}
    own = sampling.own(workers)
    with progress(2 * len(own), "answers") as bar:
        for name in (None, adapter):
            answers: dict[int, list[int]] = {}
            for batch in own:
                rollout = sampling.answer(batch, name, _temperature(config))
                answers |= zip(batch, rollout.completions, strict=True)
                bar.advance()
            texts[name] = {number: sampling.text(ids) for number, ids in workers.rows(answers).items()}
    return [
        {
            "prompt": plain(record.prompt),
            "before": texts[None][i],
            "after": texts[adapter][i],
            "demonstration": plain(record.completion),
        }
        for i, record in enumerate(records)
    ]


def _temperature(config: EvaluateConfig) -> float:
    """Nothing was sampled in training that would say another one."""
    return 1.0 if config.temperature is None else config.temperature
