"""A run for other tools: its adapter in PEFT's layout, or base and adapter merged into one transformers checkpoint.

Tokenizer, chat template, end tokens and generation settings come with either, so that it loads elsewhere as it is. A
reward model's template ends with the end token, whose state it scores. Merged weights are rounded, which loses part of
a young adapter's effect: what was lost is measured on the files written, read as any user of transformers reads them
(`elsewhere.py`), and recorded in perlhf_export.json and README.md.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perlhf.commands import elsewhere
from perlhf.commands.show import said
from perlhf.config.commands import ExportConfig
from perlhf.config.stages import PLAIN_TEMPLATES, DataConfig, EncodingConfig, PolicyConfig
from perlhf.data import order
from perlhf.data.records import Record
from perlhf.data.splits import load
from perlhf.errors import ConfigError
from perlhf.evaluation.reward import score_records
from perlhf.method.packing import Ids, Tokens, pack, pad
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import end_ids, holds_more_than_text, load_base, pick_dtype, vocabulary
from perlhf.model.bases.packaged import SMOLLM2, disk_errors, quiet
from perlhf.model.bases.quantised import bitsandbytes_settings
from perlhf.model.encoding.encode import Encoder
from perlhf.model.encoding.templates import on_day, templates_of
from perlhf.model.merged import merged_network
from perlhf.model.model import Model
from perlhf.model.open import FinishedRun, Given, read_run
from perlhf.runs.earlier import several_adapters
from perlhf.system.files import directory_atomic, strict_json
from perlhf.system.machine import cache_dir

DETAILS = "perlhf_export.json"
PROMPTS = 8
"""Prompts on which the error of merging is measured."""
JUDGED = 64
"""Comparisons and ratings on which a reward model's is."""
_APART = "{{ '' }}"
"""Between our tags and a template: keeps Jinja from trimming the template's own white space there."""
BENT = (
    *("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "penalty_alpha", "top_h"),
)
"""Settings of generation that would make another distribution of the one that a policy was trained to have."""
LOST = 0.05
"""Share of the scores' deviation above which an error is warned of."""


def export(config: ExportConfig) -> dict[str, Any]:
    """Writes `config.output`, whole or not at all, and returns what was written and measured.

    Raises:
        RunError: no finished run, or one of several members.
        ConfigError: full tuning has no adapter to export, or the output is a directory that holds something else.
        AdapterError, ModelError, DataError: as the parts say.
        StorageError: it can't be written.
    """
    run = read_run(config.run, given=Given(config.base, config.data, accept_changes=config.accept_changes))
    if (error := several_adapters(run.path)) is not None:
        raise error
    _check_output(config)
    run.check(data=config.format == "merged" and config.data is None)
    details = _export_peft(run, config) if config.format == "peft" else _export_merged(run, config)
    for key, value in details.items():
        said(f"{key}: {value}")
    for sentence in _notes(run, config, details):
        said(f"note: {sentence}")
    return details


def _check_output(config: ExportConfig) -> None:
    output = config.output
    if config.run.resolve() in (output.resolve(), *output.resolve().parents):
        hint = "name a directory outside the run"
        raise ConfigError("the output lies inside the run directory", where="output", hint=hint)
    if not output.exists() or (output / DETAILS).is_file():
        return
    if not output.is_dir():
        raise ConfigError(f"{output} is a file", where="output", allowed="a new directory")
    if config.format == "peft":
        saved.check_replaceable(output)
    elif any(output.iterdir()):
        raise ConfigError(f"{output} holds something else", where="output", allowed="a new or empty directory")


def _export_peft(run: FinishedRun, config: ExportConfig) -> dict[str, Any]:
    if run.config.tuning == "full":
        hint = "--format merged writes the trained weights as a checkpoint"
        raise ConfigError("a run with tuning: full has no adapter", where="format", allowed="merged", hint=hint)
    if config.dtype != "run":
        raise ConfigError("an adapter is written as it was trained, in float32", where="dtype", allowed="merged only")
    whole = saved.read_adapter(run.adapter)
    adapter = whole.adapter
    tokenizer, encoder = run.tokenizer(), Encoder(run.tokenizer(), run.config.encoding, end_ids(run.base))
    details: dict[str, Any] = {"format": "peft", "stage": run.stage, "base": whole.base["name"]}
    details |= {"base_model_name_or_path": base_name(run, config), "rank": adapter.rank, "alpha": adapter.alpha}
    details |= _quantised(run)
    if adapter.bias is not None:  # transformers' head has none: add it to the logit, or compare scores only
        details["score_bias"] = adapter.bias.item()
    _prepare(tokenizer, encoder, reward=adapter.score_head is not None, records=[])
    with directory_atomic(config.output) as temporary:
        saved.write_adapter(temporary, whole, details["base_model_name_or_path"])
        with quiet(), disk_errors(config.output):
            tokenizer.save_pretrained(temporary)
        settings = run.base.directory / "generation_config.json"
        generation = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        generation = {key: value for key, value in generation.items() if run.stage != "policy" or key not in BENT}
        generation |= {"eos_token_id": _ends(encoder)} | _sampling(run)
        (temporary / "generation_config.json").write_text(strict_json(generation, indent=2) + "\n", encoding="utf-8")
        _write_details(temporary, details, run)
    return details


def _export_merged(run: FinishedRun, config: ExportConfig) -> dict[str, Any]:
    if config.dtype == "float32":  # measured beside scores in float32: those in bfloat16 are rounded themselves
        run = replace(run, config=run.config.model_copy(update={"dtype": config.dtype}))
    model, encoder = run.open(config.device)
    adapter = model.adapters[run.stage]
    dtype = model.dtype if config.dtype == "run" else getattr(torch, config.dtype)
    records = _records(run, config)
    tokenizer = run.tokenizer()
    reward = adapter.score_head is not None
    merged = merged_network(model, adapter, run.base, dtype)
    _prepare(tokenizer, encoder, reward=reward, records=records)
    details: dict[str, Any] = {"format": "merged", "stage": run.stage, "base": model.fingerprint["name"]}
    details |= {"dtype": str(dtype).removeprefix("torch."), "tuning": run.config.tuning} | _quantised(run)
    if adapter.bias is not None:
        details["score_bias"] = adapter.bias.item()
        _fit_classifier(merged, tokenizer, adapter.bias.item())
    elif merged.generation_config is not None:
        settings = dict.fromkeys(BENT) if run.stage == "policy" else {}
        merged.generation_config.update(**{**settings, "eos_token_id": _ends(encoder), **_sampling(run)})
    with directory_atomic(config.output) as temporary:
        with quiet(), disk_errors(config.output):
            merged.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        del merged
        measure = _measure_scores if reward else _measure_logits
        details |= measure(run, model, encoder, temporary, records)
        _write_details(temporary, details, run)
    return details


def base_name(run: FinishedRun, config: ExportConfig) -> str:
    """What other tools load as the base of an adapter: as it was asked for, else a hub id, else where it is."""
    if config.base_name is not None:
        return config.base_name
    if run.base.directory == SMOLLM2.directory:
        return SMOLLM2.origin
    name = run.base.fingerprint["name"]
    local = run.base.directory.parent == cache_dir() / "bases" or Path(name).expanduser().is_dir()
    return str(run.base.directory.resolve()) if local else name


def chat_template(tokenizer: PreTrainedTokenizerBase, encoding: EncodingConfig) -> str:
    """`encoding.template` as Jinja that stands alone: with its variables, its day and its system message.

    Where a tokenizer has another template for conversations with tools, both are in it.
    """
    templates = templates_of(tokenizer, encoding.template)
    body = templates["plain" if encoding.template in PLAIN_TEMPLATES else "default"]
    if "tool_use" in templates:
        body = f"{{% if tools %}}{_APART}{templates['tool_use']}{_APART}{{% else %}}{_APART}{body}{_APART}{{% endif %}}"
    if encoding.day and "strftime_now" in body:
        body = on_day(encoding.day) + body
    for name, value in encoding.template_kwargs.items():
        literal = "none" if value is None else json.dumps(value, ensure_ascii=False)
        body = f"{{% if {name} is not defined %}}{{% set {name} = {literal} %}}{{% endif %}}{_APART}{body}"
    if encoding.system is None:
        return body
    system = json.dumps(encoding.system, ensure_ascii=False)
    lead = f"[{{'role': 'system', 'content': {system}}}]"
    unled = "not messages or messages[0]['role'] not in ('system', 'developer')"
    return f"{{% if {unled} %}}{{% set messages = {lead} + messages %}}{{% endif %}}{_APART}{body}"


def ending_with(template: str, ends: Sequence[str], doubled: bool = False) -> str:
    """A chat template whose conversations end with an end token where an assistant's turn is the last one.

    Everything else is rendered as before: what stands between turns, and what makes room for an answer.

    Args:
        template: Jinja.
        ends: the end token, and others that may close a turn in its place, such as the one after a call. The blank
            that follows the last one goes; a conversation that none of them closes is given the first.
        doubled: the template puts two of the first after an answer, of which one stays.
    """
    body = template.removesuffix("\n")  # Jinja drops it from a template's end, but not from within
    name, listed = "perlhf_conversation", json.dumps(list(ends), ensure_ascii=False)
    rest = "perlhf_parts[2]" + "".join(f".replace({json.dumps(end, ensure_ascii=False)}, '')" for end in ends)
    kept = "perlhf_parts[0]"
    if doubled:
        kept += f".rpartition(perlhf_end)[0] if loop.first and {kept}.rstrip().endswith(perlhf_end) else {kept}"
    whole = "not add_generation_prompt and messages and messages[-1]['role'] == 'assistant'"
    return (
        f"{{% set {name} %}}{_APART}{body}{_APART}{{% endset %}}"
        f"{{% if {whole} %}}{{% set perlhf = namespace(text={name} ~ {listed}[0], open=true) %}}"
        f"{{% for perlhf_end in {listed} %}}{{% set perlhf_parts = {name}.rpartition(perlhf_end) %}}"
        f"{{% if perlhf.open and perlhf_parts[1] and not {rest} | trim %}}"
        f"{{% set perlhf.text = ({kept}) ~ perlhf_end %}}"
        "{% set perlhf.open = false %}{% endif %}{% endfor %}{{ perlhf.text }}"
        f"{{% else %}}{{{{ {name} }}}}{{% endif %}}"
    )


def _prepare(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, *, reward: bool, records: Sequence[Record]) -> None:
    """Puts into the tokenizer what its users must not have to know: the template; for scores, where they are read."""
    tokenizer.chat_template = chat_template(tokenizer, encoder.config)
    if not reward:
        return
    ends = [str(tokenizer.convert_ids_to_tokens(number)) for number in encoder.end_ids]
    doubled = encoder.chat.after_answer().count(ends[0]) > 1
    tokenizer.chat_template = ending_with(tokenizer.chat_template, ends, doubled)
    texts = [text for record in records for text in elsewhere.rendered(encoder, record, tokenizer)]
    _choose_padding(tokenizer, encoder, texts)


def _choose_padding(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, texts: Sequence[str]) -> None:
    """Gives a classifier a padding token that no prompt has.

    A classifier of transformers scores the last token that isn't padding: were padding the end token, as it often is,
    the token before the end would be scored.
    """
    said = str(tokenizer.chat_template) + "".join(texts)
    named: list[Any] = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    taken = {*encoder.end_ids, *named}

    def free(number: int | None) -> bool:
        return number is not None and number not in taken and str(tokenizer.convert_ids_to_tokens(number)) not in said

    pad_id: Any = tokenizer.pad_token_id
    if free(pad_id):
        return
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if free(number)}
    likely = sorted(added, key=lambda number: ("pad" not in added[number].lower(), number))
    tokenizer.add_special_tokens({"pad_token": added[likely[0]] if likely else "<|padding|>"})


def _fit_classifier(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bias: float) -> None:
    """Names the padding token and the bias in its configuration; a token that is new gets a row of its own."""
    embedding: Any = network.get_input_embeddings()
    rows = vocabulary(tokenizer)
    if rows > embedding.weight.shape[0]:
        with quiet():
            network.resize_token_embeddings(rows, mean_resizing=False)
        embedding = network.get_input_embeddings()
        embedding.weight.data[-1].zero_()
    network.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    network.config.score_bias = bias


def _sampling(run: FinishedRun) -> dict[str, Any]:
    """How a policy was sampled in training, as generation_config.json has it: at its temperature, from all tokens."""
    if not isinstance(run.config, PolicyConfig):
        return {}
    return {"do_sample": True, "temperature": run.config.temperature, "top_k": 0, "top_p": 1.0}


def _ends(encoder: Encoder) -> int | list[int]:
    """The end tokens as generation_config.json has them."""
    others = sorted({*encoder.end_ids} - {encoder.end_id})
    return [encoder.end_id, *others] if others else encoder.end_id


def _write_details(directory: Path, details: dict[str, Any], run: FinishedRun) -> None:
    (directory / DETAILS).write_text(strict_json(details, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(elsewhere.readme(details, run), encoding="utf-8")


def _notes(run: FinishedRun, config: ExportConfig, details: dict[str, Any]) -> list[str]:
    """What the user of an export should know before anyone else gets it."""
    notes = []
    if config.format == "peft" and Path(details["base_model_name_or_path"]).is_absolute():
        notes.append(
            f"base_model_name_or_path is {details['base_model_name_or_path']}, which is there on this machine alone; "
            "--base-name ID names the base as others find it"
        )
    if config.format == "peft" and holds_more_than_text(run.base):
        notes.append(
            "the base is a multimodal checkpoint: other tools must load its text model under this adapter, not the "
            "whole; --format merged writes a text model that they load as it is"
        )
    if (share := details.get("error_over_deviation")) is not None and share > LOST:
        hint = "" if details["dtype"] == "float32" else "; --dtype float32 writes weights that aren't rounded"
        notes.append(f"the mean error of a score is {share:.1%} of the scores' deviation{hint}")
    if other := details.get("texts_with_other_tokens"):
        notes.append(
            f"{other} of {details['texts_measured']} texts become other tokens elsewhere than in training, such as "
            "texts that hold control tokens"
        )
    return notes


def _quantised(run: FinishedRun) -> dict[str, Any]:
    """How the base of the run was quantised while loading; {} where it wasn't."""
    if run.config.quantize == "none":
        return {}
    dtype = str(pick_dtype(run.config.dtype, "auto")[0]).removeprefix("torch.")
    settings = bitsandbytes_settings(run.config.quantize, dtype)
    return {"quantize": run.config.quantize, "quantization_config": settings}


def _records(run: FinishedRun, config: ExportConfig) -> list[Record]:
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


def _measure_scores(
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
def _measure_logits(
    run: FinishedRun, model: Model, encoder: Encoder, directory: Path, records: Sequence[Record]
) -> dict[str, Any]:
    """Merged files against the adapter's own forward: logits of the token after each prompt.

    Relative errors are the largest and the mean one over the largest and the mean logit. `share_lost` is the mean error
    over the mean change that the adapter makes to the base.
    """
    texts = [encoder.cut_prompt(record.prompt, 1, record.tools) for record in records]
    wanted, base = (_outputs(model, adapter, texts) for adapter in (run.stage, None))
    network = load_base(Base(directory), model.dtype, model.device)
    error = (_last(network, texts)[:, : model.vocabulary] - wanted).abs()
    change = (wanted - base).abs()
    tokenizer = elsewhere.tokenizer_of(directory)
    others = [elsewhere.prompt_ids(tokenizer, encoder, record) for record in records]
    return {
        "texts_measured": len(texts),
        "largest_logit_error": error.max().item(),
        "mean_logit_error": error.mean().item(),
        "largest_logit": wanted.abs().max().item(),
        "largest_logit_change_by_adapter": change.max().item(),
        "largest_relative_error": (error.max() / wanted.abs().max()).item(),
        "mean_relative_error": (error.mean() / wanted.abs().mean()).item(),
        "share_lost": (error.mean() / change.mean()).item() if change.any() else None,
        "texts_with_other_tokens": sum(
            list(ids[len(ids) - len(own) :]) != list(own) for ids, own in zip(others, texts, strict=True)
        ),
    }


def _outputs(model: Model, adapter: str | None, texts: Sequence[Ids]) -> Tensor:
    """Logits after each prompt [prompt, vocab], under the adapter as it is used here."""
    batch = pack([[Tokens(ids)] for ids in texts], "none", model.device)
    return model.logits(model.last_states(batch, adapter), adapter)


def _last(network: PreTrainedModel, texts: Sequence[Ids]) -> Tensor:
    """Logits after each prompt, float32 [prompt, vocab], on the same batch layout as `_outputs`."""
    logits = network(input_ids=pad(texts, 0, network.device), use_cache=False).logits
    last = torch.tensor([len(ids) - 1 for ids in texts], device=network.device)
    return logits[torch.arange(len(texts), device=network.device), last].float()
