"""A run for other tools: its adapter in PEFT's layout, or base and adapter merged into one transformers checkpoint.

Merged weights are rounded to the base's dtype, which loses part of a young adapter's effect; what was lost is measured
on the files written and recorded in perlhf_export.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from perlhf.config.commands import ExportConfig
from perlhf.config.stages import EncodingConfig
from perlhf.data import order
from perlhf.data.splits import load
from perlhf.errors import AdapterError, ConfigError
from perlhf.method.packing import Ids, Tokens, pack, pad
from perlhf.model import saved
from perlhf.model.adapter import Adapter
from perlhf.model.base import Base, load_base, load_tokenizer
from perlhf.model.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.open import FinishedRun, read_run
from perlhf.model.packaged import disk_errors, quiet
from perlhf.system.files import directory_atomic, strict_json
from perlhf.training import loop

DETAILS = "perlhf_export.json"
PROMPTS = 8
"""Prompts (or scored texts) on which the error of merging is measured."""
_PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def export(config: ExportConfig) -> dict[str, Any]:
    """Writes `config.output`, whole or not at all, and returns what was written and measured.

    Raises:
        RunError: no finished run.
        ConfigError: full tuning has no adapter to export, or the output is a directory that holds something else.
        AdapterError, ModelError, DataError: as the parts say.
        StorageError: it can't be written.
    """
    run = read_run(config.run)
    _check_output(config)
    details = _export_peft(run, config) if config.format == "peft" else _export_merged(run, config)
    for key, value in details.items():
        print(f"{key}: {value}")
    return details


def _check_output(config: ExportConfig) -> None:
    output = config.output
    if config.run.resolve() in (output.resolve(), *output.resolve().parents):
        hint = "name a directory outside the run"
        raise ConfigError("the output lies inside the run directory", where="output", hint=hint)
    if not output.exists() or (config.format == "merged" and (output / DETAILS).is_file()):
        return
    if not output.is_dir():
        raise ConfigError(f"{output} is a file", where="output", allowed="a new directory")
    # What a peft directory may hold besides is checked where it is written.
    if config.format == "merged" and any(output.iterdir()):
        raise ConfigError(f"{output} holds something else", where="output", allowed="a new or empty directory")


def _export_peft(run: FinishedRun, config: ExportConfig) -> dict[str, Any]:
    source = run.path / "adapter"
    if run.config.tuning == "full":
        hint = "--format merged writes the trained weights as a checkpoint"
        raise ConfigError("a run with tuning: full has no adapter", where="format", allowed="merged", hint=hint)
    whole = saved.read_adapter(source)
    saved.write_adapter(config.output, whole)
    adapter = whole.adapter
    details: dict[str, Any] = {"format": "peft", "stage": run.stage, "base": whole.base["name"]}
    details |= {"rank": adapter.rank, "alpha": adapter.alpha}
    return details | ({"score_bias": adapter.bias.item()} if adapter.bias is not None else {})


def _export_merged(run: FinishedRun, config: ExportConfig) -> dict[str, Any]:
    model, encoder = run.open(config.device)
    adapter = model.adapters[run.stage]
    # Measured on prompts of held-out groups, or on those there are.
    texts = _texts(run, encoder)
    merged = _load(run.base, model, adapter)
    _merge(merged, adapter)
    tokenizer = load_tokenizer(run.base)
    tokenizer.chat_template = chat_template(tokenizer, encoder.config)
    _name_tokens(merged, tokenizer, encoder.end_id, classifier=adapter.score_head is not None)
    with directory_atomic(config.output) as temporary:
        with quiet(), disk_errors(config.output):
            merged.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        del merged
        details: dict[str, Any] = {"format": "merged", "stage": run.stage, "base": model.fingerprint["name"]}
        details |= {"dtype": str(model.dtype).removeprefix("torch."), "tuning": run.config.tuning}
        if adapter.bias is not None:  # transformers' head has none: add it to the logit, or compare scores only
            details["score_bias"] = adapter.bias.item()
        details |= _measure(model, adapter, temporary, texts)
        (temporary / DETAILS).write_text(strict_json(details, indent=2) + "\n", encoding="utf-8")
    return details


def chat_template(tokenizer: PreTrainedTokenizerBase, encoding: EncodingConfig) -> str:
    """`encoding.template` as Jinja that stands alone, led by `encoding.system` where there is no system message."""
    match encoding.template:
        case "tokenizer":
            body = str(tokenizer.chat_template)
        case "plain":
            body = _PLAIN
        case file:
            body = Path(file).read_text(encoding="utf-8")
    if encoding.system is None:
        return body
    system = json.dumps(encoding.system, ensure_ascii=False)
    lead = f"[{{'role': 'system', 'content': {system}}}]"
    return f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {lead} + messages %}}{{% endif %}}{body}"


def _load(base: Base, model: Model, adapter: Adapter) -> PreTrainedModel:
    """A second network, plain: the base, or the base with a classification head where the adapter has one."""
    if adapter.score_head is None:
        return load_base(base, model.dtype, model.device)
    return _classifier(base, model)


def _classifier(base: Base, model: Model) -> PreTrainedModel:
    with quiet():
        try:
            network = AutoModelForSequenceClassification.from_pretrained(
                base.directory, num_labels=1, dtype=model.dtype, local_files_only=True, trust_remote_code=False
            )
        except ValueError as error:
            name = type(model.base).__name__
            hint = "--format peft"
            raise ConfigError(f"transformers has no classifier beside {name}", where="format", hint=hint) from error
    head = getattr(network, "score", None)
    if not isinstance(head, nn.Linear) or head.weight.shape != (1, model.hidden_size) or head.bias is not None:
        what = f"the head of {type(network).__name__} isn't one row without bias"
        raise ConfigError(what, where="format", hint="--format peft")
    return network.to(model.device).eval().requires_grad_(False)


@torch.no_grad()
def _merge(network: PreTrainedModel, adapter: Adapter) -> None:
    """Adds the adapter to the network's weights, in float32, one weight at a time."""
    parameters = dict(network.named_parameters())
    for name, weight in adapter.weights.items():
        if name in parameters:  # a classifier has no output head
            parameters[name].copy_(weight)
    for path, pair in adapter.pairs.items():
        name = f"{path}.weight"
        if name not in parameters:
            raise AdapterError(f"{type(network).__name__} has no '{path}' to merge into", hint="--format peft")
        parameters[name].copy_(parameters[name].float() + pair.scale * (pair.b.float() @ pair.a.float()))
    if adapter.score_head is not None:
        parameters["score.weight"].copy_(adapter.score_head)


def _name_tokens(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_id: int, *, classifier: bool
) -> None:
    """Puts the end token into the generation configuration, and gives a classifier a padding token of its own.

    A classifier of transformers scores the last token that isn't padding: were padding the end token, as it often is,
    the token before the end would be scored.
    """
    if not classifier:
        if network.generation_config is not None:
            network.generation_config.eos_token_id = end_id
        return
    others = [token for token in tokenizer.all_special_ids if token != end_id]
    if tokenizer.pad_token_id in (None, end_id) and others:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0])
    pad_id = None if tokenizer.pad_token_id == end_id else tokenizer.pad_token_id
    network.config.get_text_config().pad_token_id = pad_id


def _texts(run: FinishedRun, encoder: Encoder) -> list[Ids]:
    """Ids of a few prompts, for a reward run with a completion, of the groups held out for tests (or of all)."""
    data, reward = run.config.data, run.stage == "reward"
    kinds = ("comparison", "rating") if reward else ("prompt",)
    records = order.choose(load(data, kinds, "test" if data.test else "all"), PROMPTS, 0)
    if not reward:
        return [encoder.cut_prompt(record.prompt, 1, record.tools) for record in records]
    examples, _ = loop.encode_all(encoder, records, drop_long=True)
    return [encoded[0].tokens.ids for encoded in examples if encoded is not None]


@torch.no_grad()
def _measure(model: Model, adapter: Adapter, directory: Path, texts: Sequence[Ids]) -> dict[str, Any]:
    """Merged files against the adapter's own forward: logits of the token after each prompt, or scores.

    `share_lost` is the mean error over the mean change that the adapter makes to the base (without it for scores, which
    the base has none of).
    """
    what = "logit" if adapter.score_head is None else "score"
    wanted = _outputs(model, adapter.name, texts)
    if adapter.score_head is None:
        network = load_base(Base(directory), model.dtype, model.device)
        outputs = _last(network, texts)
    else:
        assert adapter.bias is not None
        network = _classifier(Base(directory), model)
        outputs = torch.cat([_one(network, ids) for ids in texts]) + adapter.bias
    error = (outputs - wanted).abs()
    measured: dict[str, Any] = {
        "texts_measured": len(texts),
        f"largest_{what}_error": error.max().item(),
        f"mean_{what}_error": error.mean().item(),
        f"largest_{what}": wanted.abs().max().item(),
    }
    if adapter.score_head is None:
        change = (wanted - _outputs(model, None, texts)).abs()
        measured |= {"largest_logit_change_by_adapter": change.max().item()}
        measured["share_lost"] = (error.mean() / change.mean()).item() if change.any() else None
    return measured


def _outputs(model: Model, adapter: str | None, texts: Sequence[Ids]) -> Tensor:
    """Logits after each prompt [prompt, vocab] or scores [text], under the adapter as it is used here."""
    batch = pack([[Tokens(ids)] for ids in texts], "none", model.device)
    if adapter is not None and model.adapters[adapter].score_head is not None:
        return model.scores(batch, adapter)
    return model.logits(model.last_states(batch, adapter), adapter)


def _last(network: PreTrainedModel, texts: Sequence[Ids]) -> Tensor:
    """Logits after each prompt, float32 [prompt, vocab], on the same batch layout as `_outputs`."""
    logits = network(input_ids=pad(texts, 0, network.device), use_cache=False).logits
    last = torch.tensor([len(ids) - 1 for ids in texts], device=network.device)
    return logits[torch.arange(len(texts), device=network.device), last].float()


def _one(network: PreTrainedModel, ids: Ids) -> Tensor:
    return network(input_ids=torch.tensor([list(ids)], device=network.device)).logits[:, 0].float()
