"""What an export loses against the run itself, measured on a few of the run's records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perlhf.commands.exports import elsewhere
from perlhf.config.commands import ExportConfig
from perlhf.config.stages import DataConfig
from perlhf.data import order
from perlhf.data.records import Record
from perlhf.data.splits import load
from perlhf.evaluation.reward import score_records
from perlhf.method.packing import Ids, Tokens, pack, pad
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import FinishedRun
from perlhf.model.model import Model

PROMPTS = 8
"""Prompts on which the error of merging is measured."""
JUDGED = 64
"""Comparisons and ratings on which a reward model's is."""


def records_of(run: FinishedRun, config: ExportConfig) -> list[Record]:
    """What the export is measured on: a few of the run's own records, held out for validation (or of all).

    Of an adapter of another tool, nobody knows its records: those of the embedded set stand in.
    """
    data = config.data or run.config.data
    if config.data is None and run.foreign:
        data = DataConfig()
    split = "validation" if data.validation else "all"
    if run.stage == "reward":
        return order.choose(load(data, ("comparison", "rating"), split), JUDGED, 0)
    return order.choose(load(data, ("prompt",), split), PROMPTS, 0)


def scores_error(
    run: FinishedRun, model: Model, encoder: Encoder, directory: Path, records: Sequence[Record]
) -> dict[str, Any]:
    """Scores as plain transformers reads them from the files, against those of `perlhf score`."""
    adapter = model.adapters[run.stage]
    assert adapter.bias is not None
    budget, packing = run.config.microbatch_tokens, model.packing(run.config.packing)
    scored, _ = score_records(model, encoder, records, run.stage, budget, packing)
    tokenizer = elsewhere.tokenizer_of(directory)
    wanted: list[float] = []
    texts: list[str] = []
    tokens: list[Ids] = []
    for record, scores in zip(records, scored, strict=True):
        examples = elsewhere.examples(encoder, record)
        if scores is None or any(example.cut for example in examples):  # others see the whole prompt
            continue
        wanted += scores
        texts += elsewhere.rendered(encoder, record, tokenizer)
        tokens += [example.tokens.ids for example in examples]
    if not texts:
        return {"texts_measured": 0}
    found, ids = elsewhere.scores(directory, tokenizer, texts, model.device)
    error = (torch.tensor(found) + adapter.bias.item() - torch.tensor(wanted)).abs()
    deviation = torch.tensor(wanted).std(correction=0).item()
    return {
        "texts_measured": len(texts),
        "largest_score_error": error.max().item(),
        "mean_score_error": error.mean().item(),
        "deviation_of_scores": deviation,
        "error_over_deviation": error.mean().item() / deviation if deviation else None,
        "largest_score": max(map(abs, wanted)),
        "texts_with_other_tokens": sum(list(one) != list(other) for one, other in zip(ids, tokens, strict=True)),
    }


@torch.no_grad()
def logits_error(
    run: FinishedRun,
    model: Model,
    encoder: Encoder,
    network: PreTrainedModel,
    records: Sequence[Record],
    merged: bool = True,
) -> dict[str, Any]:
    """A network as its files have it against the run's own forward: logits of the token after each prompt.

    A merged network has the adapter in it; any other is compared with the base without one. Relative errors are the
    largest and the mean one over the largest and the mean logit. `share_lost` is the mean error over the mean change
    that the adapter makes to the base.
    """
    texts = [encoder.cut_prompt(record.prompt, 1, record.tools) for record in records]
    wanted, base = (_outputs(model, adapter, texts) for adapter in (run.stage, None))
    error = (_last(network, texts)[:, : model.vocabulary] - (wanted if merged else base)).abs()
    change = (wanted - base).abs()
    return {
        "texts_measured": len(texts),
        "largest_logit_error": error.max().item(),
        "mean_logit_error": error.mean().item(),
        "largest_logit": wanted.abs().max().item(),
        "largest_logit_change_by_adapter": change.max().item(),
        "largest_relative_error": (error.max() / wanted.abs().max()).item(),
        "mean_relative_error": (error.mean() / wanted.abs().mean()).item(),
        "share_lost": (error.mean() / change.mean()).item() if change.any() else None,
    }


def other_tokens(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, records: Sequence[Record]) -> dict[str, Any]:
    """How many prompts become other tokens by the exported tokenizer and its template than in training."""
    texts = [encoder.cut_prompt(record.prompt, 1, record.tools) for record in records]
    others = [elsewhere.prompt_ids(tokenizer, encoder, record) for record in records]
    different = sum(list(ids[len(ids) - len(own) :]) != list(own) for ids, own in zip(others, texts, strict=True))
    return {"texts_measured": len(texts), "texts_with_other_tokens": different}


def _outputs(model: Model, adapter: str | None, texts: Sequence[Ids]) -> Tensor:
    """Logits after each prompt [prompt, vocab], under the adapter as it is used here."""
    batch = pack([[Tokens(ids)] for ids in texts], "none", model.device)
    return model.logits(model.last_states(batch, adapter), adapter)


def _last(network: PreTrainedModel, texts: Sequence[Ids]) -> Tensor:
    """Logits after each prompt, float32 [prompt, vocab], on the same batch layout as `_outputs`."""
    logits = network(input_ids=pad(texts, 0, network.device), use_cache=False).logits
    last = torch.tensor([len(ids) - 1 for ids in texts], device=network.device)
    return logits[torch.arange(len(texts), device=network.device), last].float()
