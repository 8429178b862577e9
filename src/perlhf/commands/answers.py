"""Answers of runs to prompts, as a file whose rows a labelling project asks people about, or asks at once."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perlhf.config.labelling import LabelAnswersConfig, ProjectConfig
from perlhf.data.order import keyed_seed
from perlhf.data.records import Prompt, text_of
from perlhf.errors import ConfigError
from perlhf.evaluation.shared import Sampling, progress, server_of
from perlhf.labelling.database.store import Store
from perlhf.labelling.project import LABELS, bring, made
from perlhf.labelling.questions import Question, asked, prompts_of
from perlhf.labelling.rounds.network import answered
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import Given, read_run
from perlhf.rollout.vllm.probe import PROBE_TOKENS
from perlhf.serving.models import BASE, Models, Speaker
from perlhf.system.files import from_json, storage_errors, write_atomic

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
    """Samples each source's answers to each prompt and writes them: all or nothing, or with `project` batch by batch,
    each of which the project asks about at once.

    Returns:
        The number of prompts.

    Raises:
        ConfigError, RunError: a source that is none, one twice; a file with other answers; a project whose settings
            are none. DataError: no prompts, or one with tools.
        ServiceError, StaleSamplerError: of `sampler: vllm`, as `server_of`. As `bring`, of a project with an order.
    """
    with storage_errors(config.output):
        config.output.parent.mkdir(parents=True, exist_ok=True)  # what can't be is told before anything is sampled
    if config.project is None and config.output.exists():
        what, hint = f"{config.output} is there already", "name another file, or remove this one"
        raise ConfigError(what, where="output", allowed="a new file", hint=hint)
    sources = sources_of(config.by)
    prompts = prompts_of(config.data, config.split)
    rows = _answered_before(config, prompts, sources)
    runs = {str(source.run): source.run for source in sources if source.run is not None}
    for run in runs.values():
        read_run(run, ("policy", "sft"), Given(config.base, accept_changes=config.accept_changes))
    if config.project is None:
        for new in _sampled(config, sources, runs, prompts, rows):
            rows |= new
        _write(config.output, rows)
        return len(prompts)
    project = made(config.project)
    store = Store(config.project / LABELS)
    try:
        bring(project, store, _questions(project, prompts, rows))  # of which a kill may have left some
        for new in _sampled(config, sources, runs, prompts, rows):
            rows |= new
            _write(config.output, rows)
            bring(project, store, _questions(project, prompts, new))
    finally:
        store.close()
    return len(prompts)


def _sampled(
    config: LabelAnswersConfig,
    sources: Sequence[Source],
    runs: Mapping[str, Path],
    prompts: Sequence[Prompt],
    before: Mapping[int, object],
) -> Iterator[dict[int, dict[str, Any]]]:
    """Batches of rows of the prompts that have none before, by their numbers."""
    if len(before) == len(prompts):
        return
    models = Models(runs, config.base, config.device, config.dtype, accept_changes=config.accept_changes)
    speakers = {source.name: _speaker(models, source, config) for source in sources}
    adapters = {name: next(iter(one.adapters), None) for name, one in speakers.items()}
    longest, options = config.max_completion_tokens, _options(config)
    cut = {
        name: [one.encoder.cut_prompt(record.prompt, longest) for record in prompts] for name, one in speakers.items()
    }
    # A server needs room for the longest of these, not for all that a conversation may have.
    room = max(len(ids) for asked in cut.values() for ids in asked) + max(longest, PROBE_TOKENS)
    first = next(iter(speakers))
    encoder = _changed(speakers[first].encoder, max_tokens=room)
    given: dict[str, Any] = {"run": config.output.parent, "key": config.output}
    with server_of(config, models.model, encoder, cut[first], adapters.values(), **given) as server:
        samplings = {
            name: Sampling(
                models.model,
                one.encoder,
                cut[name],
                longest,
                keyed_seed(config.seed, "answers", name),
                one.stop,
                server,
            )
            for name, one in speakers.items()
        }
        left = [[number for number in batch if number not in before] for batch in samplings[first].batches]
        left = [batch for batch in left if batch]
        with progress(len(left), "answers") as bar:
            for batch in left:
                found = {
                    name: sampling.texts_of(batch, adapters[name], speakers[name].temperature, config.answers)
                    for name, sampling in samplings.items()
                }
                rows = answered([prompts[number] for number in batch], found)
                yield {number: row | {"options": options} for number, row in zip(batch, rows, strict=True)}
                bar.advance()


def _answered_before(
    config: LabelAnswersConfig, prompts: Sequence[Prompt], sources: Sequence[Source]
) -> dict[int, dict[str, Any]]:
    """Rows that the file holds already, by the numbers of their prompts.

    Raises:
        ConfigError: it holds something else than answers of these to some of the prompts.
    """
    if not config.output.exists():
        return {}
    by = [source.name for source in sources for _ in range(config.answers)]
    numbers: dict[tuple[str, str], list[int]] = {}
    for number, record in enumerate(prompts):
        numbers.setdefault((text_of(record.prompt), record.group), []).append(number)
    found: dict[int, dict[str, Any]] = {}
    for line, text in enumerate(config.output.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            row = from_json(text)
            number = numbers[text_of(row["prompt"]), row["group"]].pop(0)
            fits = row["by"] == by and len(row["completions"]) == len(by) and row["options"] == _options(config)
        except (ValueError, TypeError, LookupError, AttributeError):
            fits, number = False, -1
        if not fits:
            what = "it holds something else than answers of these, with these options, to these prompts"
            where, hint = f"{config.output}:{line}", "name another file, or go on with the same options"
            raise ConfigError(what, where=where, allowed="a new file, or one that this command began", hint=hint)
        found[number] = row
    return found


def _options(config: LabelAnswersConfig) -> str:
    """A hash of what decides how prompts are answered, so that a file isn't continued otherwise."""
    elsewhere = {"output", "project", "data", "split", "sampler", "vllm", "device", "accept_changes"}
    said = config.model_dump_json(exclude=elsewhere)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _questions(project: ProjectConfig, prompts: Sequence[Prompt], rows: Mapping[int, dict[str, Any]]) -> list[Question]:
    """What the project asks about the answers."""
    answers = [replace(prompts[number], columns={"completions": row["completions"]}) for number, row in rows.items()]
    return list(asked(answers, project))


def _write(file: Path, rows: Mapping[int, Mapping[str, Any]]) -> None:
    write_atomic(file, "".join(json.dumps(rows[number], ensure_ascii=False) + "\n" for number in sorted(rows)))


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
