"""Answers of runs to prompts, as a file whose rows a labelling project asks people about."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from perlhf.config.labelling import LabelAnswersConfig
from perlhf.data.order import keyed_seed
from perlhf.data.records import Prompt
from perlhf.data.splits import load
from perlhf.errors import ConfigError, DataError
from perlhf.evaluation.shared import Sampling, server_of
from perlhf.labelling.rounds.network import answered
from perlhf.model.encoding.encode import Encoder
from perlhf.model.open import Given, read_run
from perlhf.rollout.vllm.probe import PROBE_TOKENS
from perlhf.serving.models import BASE, Models, Speaker
from perlhf.system.files import write_atomic

HEAT = re.compile(r"(.+)@(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Source:
    """Who answers, and how."""

    name: str
    run: Path | None
    """None is the base."""
    temperature: float | None
    """None is that of the run's training."""


def answer(config: LabelAnswersConfig) -> int:
    """Samples each source's answers to each prompt and writes them, all or nothing.

    Returns:
        The number of prompts.

    Raises:
        ConfigError, RunError: a source that is none, one twice. DataError: no prompts, or one with tools.
        ServiceError, StaleSamplerError: of `sampler: vllm`, as `server_of`.
    """
    if config.output.exists():
        what, hint = f"{config.output} is there already", "name another file, or remove this one"
        raise ConfigError(what, where="output", allowed="a new file", hint=hint)
    sources = sources_of(config.by)
    prompts = _prompts(config)
    runs = {str(source.run): source.run for source in sources if source.run is not None}
    for run in runs.values():
        read_run(run, ("policy", "sft"), Given(config.base, accept_changes=config.accept_changes))
    models = Models(runs, config.base, config.device, config.dtype, accept_changes=config.accept_changes)
    speakers = {source.name: _speaker(models, source, config) for source in sources}
    adapters = {name: next(iter(one.adapters), None) for name, one in speakers.items()}
    cut = {
        name: [one.encoder.cut_prompt(record.prompt, config.max_completion_tokens) for record in prompts]
        for name, one in speakers.items()
    }
    # A server needs room for the longest of these, not for all that a conversation may have.
    longest = config.max_completion_tokens
    room = max(len(ids) for asked in cut.values() for ids in asked) + max(longest, PROBE_TOKENS)
    first = next(iter(speakers))
    encoder = _changed(speakers[first].encoder, max_tokens=room)
    given: dict[str, Any] = {"run": config.output.parent, "key": config.output}
    found: dict[str, list[list[str]]] = {}
    with server_of(config, models.model, encoder, cut[first], adapters.values(), **given) as server:
        for name, one in speakers.items():
            seed = keyed_seed(config.seed, "answers", name)
            sampling = Sampling(models.model, one.encoder, cut[name], longest, seed, one.stop, server)
            found[name] = sampling.texts(adapters[name], one.temperature, config.answers, name)
    write_atomic(config.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered(prompts, found)))
    return len(prompts)


def sources_of(words: Sequence[str]) -> list[Source]:
    """Sources as they are named: `base`, DIRECTORY or NAME=DIRECTORY, with `@TEMPERATURE` behind it or without.

    Raises:
        ConfigError: no such directory; a name twice.
    """
    found: list[Source] = []
    for word in words:
        heated = HEAT.fullmatch(word) if not Path(word).exists() else None
        whole, temperature = (heated[1], float(heated[2])) if heated else (word, None)
        name, sign, rest = whole.partition("=")
        path = Path(rest if sign and not Path(whole).exists() else whole)
        named = name if sign and path == Path(rest) else path.name if whole != BASE else BASE
        if whole != BASE and not path.is_dir():
            allowed = f"{BASE}, DIRECTORY or NAME=DIRECTORY, with @TEMPERATURE behind it or without"
            raise ConfigError(f"there is no run at {path}", where="by", allowed=allowed, hint="perlhf table runs")
        source = Source(named + (f"@{heated[2]}" if heated else ""), None if whole == BASE else path, temperature)
        if any(one.name == source.name for one in found):
            what, hint = f"two who answer are called {source.name}", f"OTHER={whole} gives one another name"
            raise ConfigError(what, where="by", allowed="each name once", hint=hint)
        found.append(source)
    return found


def _prompts(config: LabelAnswersConfig) -> list[Prompt]:
    found = list(cast("Sequence[Prompt]", load(config.data, ("prompt",), config.split)))
    for record in found:
        if record.tools:
            raise DataError("its prompt comes with tools, which the labelling page can't show", where=record.source)
    return found


def _speaker(models: Models, source: Source, config: LabelAnswersConfig) -> Speaker:
    """The run, or the base, with the temperature and the system message that were asked for."""
    found = models.begin(BASE if source.run is None else str(source.run), Speaker)
    assert isinstance(found, Speaker)
    changes: dict[str, Any] = {} if source.temperature is None else {"temperature": source.temperature}
    if config.system is not None:
        changes["encoder"] = _changed(found.encoder, system=config.system)
    return replace(found, **changes)


def _changed(encoder: Encoder, **changes: Any) -> Encoder:
    return Encoder(encoder.tokenizer, encoder.config.model_copy(update=changes), encoder.end_ids)
