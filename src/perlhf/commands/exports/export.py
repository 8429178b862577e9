"""A run for other tools: its adapter in PEFT's layout, or base and adapter merged into one transformers checkpoint; or
either as GGUF files, for llama.cpp.

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
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perlhf.commands.exports import elsewhere
from perlhf.commands.exports.measured import logits_error, other_tokens, records_of, scores_error
from perlhf.commands.exports.templates import chat_template, ending_with
from perlhf.commands.show import said
from perlhf.config.commands import ExportConfig
from perlhf.config.stages import PolicyConfig
from perlhf.data.records import Record
from perlhf.errors import ConfigError
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.gguf.header import read_header
from perlhf.model.bases.gguf.tokenizer import read_tokenizer
from perlhf.model.bases.loading import configuration, end_ids, holds_more_than_text, load_base, pick_dtype, vocabulary
from perlhf.model.bases.packaged import SMOLLM2, disk_errors, quiet
from perlhf.model.bases.quantised import bitsandbytes_settings
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import FinishedRun, Given, read_run
from perlhf.model.merged import bare_network, merged_network, rounded_to
from perlhf.model.to_gguf.files import write_adapter, write_network
from perlhf.model.to_gguf.settings import check_shape
from perlhf.model.to_gguf.vocabulary import ends_left_out, vocabulary_of
from perlhf.runs.earlier import several_adapters
from perlhf.system.files import directory_atomic, strict_json
from perlhf.system.machine import cache_dir

DETAILS = "perlhf_export.json"
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
    _check_format(run, config)
    if (error := several_adapters(run.path)) is not None:
        raise error
    _check_output(config)
    run.check(data=(config.gguf or config.format == "merged") and config.data is None)
    if config.gguf:
        details = _export_gguf(run, config)
    else:
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
    if config.format == "peft" and not config.gguf:
        saved.check_replaceable(output)
    elif any(output.iterdir()):
        raise ConfigError(f"{output} holds something else", where="output", allowed="a new or empty directory")


def _check_format(run: FinishedRun, config: ExportConfig) -> None:
    """Refuses what a run can't be written as, before anything of it is loaded."""
    if config.gguf and run.stage == "reward":
        what = "llama.cpp has no place for the score head of a reward model"
        hint = (
            "leave out --gguf: --format merged writes a classifier for transformers; perlhf score reads the run itself"
        )
        raise ConfigError(what, where="gguf", allowed="SFT and policy runs", hint=hint)
    if config.gguf:
        check_shape(configuration(run.base))
    if config.format == "merged":
        return
    if run.config.tuning == "full":
        hint = "--format merged writes the trained weights as a checkpoint"
        raise ConfigError("a run with tuning: full has no adapter", where="format", allowed="merged", hint=hint)
    if config.dtype != "run" and not config.gguf:
        raise ConfigError("an adapter is written as it was trained, in float32", where="dtype", allowed="merged only")


def _export_peft(run: FinishedRun, config: ExportConfig) -> dict[str, Any]:
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
    records = records_of(run, config)
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
        if reward:
            details |= scores_error(run, model, encoder, temporary, records)
        else:
            details |= logits_error(run, model, encoder, load_base(Base(temporary), model.dtype, model.device), records)
            details |= other_tokens(elsewhere.tokenizer_of(temporary), encoder, records)
        _write_details(temporary, details, run)
    return details


def _export_gguf(run: FinishedRun, config: ExportConfig) -> dict[str, Any]:
    """Files for llama.cpp: `model.gguf`, or `base.gguf` and `adapter.gguf`.

    A network in float32 is rounded to another dtype of the file before it is measured.
    """
    if config.dtype == "float32":
        run = replace(run, config=run.config.model_copy(update={"dtype": config.dtype}))
    model, encoder = run.open(config.device)
    adapter, apart = model.adapters[run.stage], config.format == "peft"
    dtype = model.dtype if config.dtype == "run" else getattr(torch, config.dtype)
    held = torch.bfloat16 if dtype == model.dtype == torch.bfloat16 else torch.float32
    network = bare_network(model, run.base, held) if apart else merged_network(model, adapter, run.base, held)
    rounded_to(network, dtype)
    tokenizer, records = run.tokenizer(), records_of(run, config)
    _prepare(tokenizer, encoder, reward=False, records=records)
    embedding: Any = network.get_input_embeddings()
    vocabulary = vocabulary_of(tokenizer, embedding.weight.shape[0], encoder.end_ids)
    name = f"{Path(model.fingerprint['name']).name} {run.stage}"
    details: dict[str, Any] = {"format": config.format, "stage": run.stage, "base": model.fingerprint["name"]}
    details |= {"gguf": "base.gguf, adapter.gguf" if apart else "model.gguf"}
    details |= {"dtype": str(dtype).removeprefix("torch."), "tuning": run.config.tuning} | _quantised(run)
    if apart:
        details |= {"rank": adapter.rank, "alpha": adapter.alpha}
    if left_out := ends_left_out(tokenizer, encoder.end_ids):
        details["end_tokens_left_out"] = left_out
    with directory_atomic(config.output) as temporary, disk_errors(config.output):
        file = temporary / ("base.gguf" if apart else "model.gguf")
        write_network(file, network, vocabulary, dtype, name, _sampling(run))
        if apart:
            write_adapter(temporary / "adapter.gguf", network.config, adapter, name)
        details |= logits_error(run, model, encoder, network, records, merged=not apart)
        details |= other_tokens(read_tokenizer(read_header(file)), encoder, records)
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
    apart = config.format == "peft" and not config.gguf
    if apart and Path(details["base_model_name_or_path"]).is_absolute():
        notes.append(
            f"base_model_name_or_path is {details['base_model_name_or_path']}, which is there on this machine alone; "
            "--base-name ID names the base as others find it"
        )
    if apart and holds_more_than_text(run.base):
        notes.append(
            "the base is a multimodal checkpoint: other tools must load its text model under this adapter, not the "
            "whole; --format merged writes a text model that they load as it is"
        )
    if (share := details.get("error_over_deviation")) is not None and share > LOST:
        hint = "" if details["dtype"] == "float32" else "; --dtype float32 writes weights that aren't rounded"
        notes.append(f"the mean error of a score is {share:.1%} of the scores' deviation{hint}")
    if left_out := details.get("end_tokens_left_out"):
        notes.append(f"a GGUF file has a place for three end tokens; answers don't end there at {', '.join(left_out)}")
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
