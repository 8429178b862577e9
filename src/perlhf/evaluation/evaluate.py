"""Evaluation of finished runs on held-out groups, and scores for a file.

    evaluate(config) -> Evaluation     what RUN/evaluation.json holds; `reward`, `policy` and `sft` measure it
    score(config)    -> list           records with the scores of a reward run

A number that can't be computed (AUC of one class, an interval of one group) is null.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perlhf.config.commands import EvaluateConfig, ScoreConfig
from perlhf.config.stages import DataConfig, PolicyConfig
from perlhf.data.records import Comparison, Record, completions_of
from perlhf.data.splits import content_hash, load
from perlhf.data.tools import jsonl_lines
from perlhf.errors import ConfigError
from perlhf.evaluation.explain import explain, mean_explanation
from perlhf.evaluation.policy import evaluate_policy
from perlhf.evaluation.reward import evaluate_reward, mean_of_members, score_by_members
from perlhf.evaluation.sft import evaluate_sft
from perlhf.evaluation.shared import progress
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import FinishedRun, Given, read_run
from perlhf.model.model import Model
from perlhf.parallel.together import together
from perlhf.parallel.workers import Workers
from perlhf.rollout.functions import code_of, importable
from perlhf.runs.earlier import files_hash, is_adapter
from perlhf.runs.evaluations import EVALUATION, Evaluation, evaluation_of, write_evaluation
from perlhf.system.console import json_line, note
from perlhf.system.files import read_json, storage_errors, strict_json, write_atomic
from perlhf.system.machine import environment


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluates a run of any stage, writes the result to `config.output` (RUN/evaluation.json) and returns it.

    Raises:
        RunError: no run directory, or a run that isn't finished.
        DataError, ModelError, AdapterError, ServiceError: as the parts say.
        ConfigError: as the parts say; what only a policy can be asked, of another run; an adapter without `output`.
        StorageError: the result can't be written.
    """
    with together() as workers:
        return _evaluate(config, workers)


def _evaluate(config: EvaluateConfig, workers: Workers) -> Evaluation:
    reward = config.reward if is_adapter(config.run) else ()
    given = Given(config.base, config.data, config.encoding, config.dtype, reward, config.accept_changes)
    run = read_run(config.run, given=given)
    _check_asked(run, config)
    changed = _changed(run, config)
    _agree(run, config, config.data or run.config.data, workers)
    match run.stage:
        case "sft":
            conclude = evaluate_sft(run, config, workers)
        case "reward":
            conclude = evaluate_reward(run, config, workers)
        case "policy":
            conclude = evaluate_policy(run, config, workers)
    path = config.output or config.run / EVALUATION
    return evaluation_of(workers.once(lambda: _written(path, conclude(), changed, config)), path)


def _written(path: Path, evaluation: Evaluation, changed: list[str], config: EvaluateConfig) -> dict[str, Any]:
    """What the file holds, once it is written."""
    if config.split in ("validation", "test") and (seen := evaluation.groups_seen_in_training):
        note(f"the run was trained on {seen} of these {evaluation.groups} groups; they aren't unseen")
    if config.data is not None:  # not the run's own
        evaluation = replace(evaluation, data=list(config.data.paths))
    if changed:
        evaluation = replace(evaluation, changed=changed)
    write_evaluation(path, evaluation)
    return read_json(path)


def _agree(run: FinishedRun, config: EvaluateConfig | ScoreConfig, data: DataConfig, workers: Workers) -> None:
    """Raises ConfigError where a worker has another command, run, base or data than the first one."""
    if workers.count > 1:
        said = {
            "adapter": [files_hash(directory) for directory in run.members.values()],
            "base": run.base.fingerprint,
            "records": content_hash(data),
        }
        workers.agree(config.model_dump(mode="json") | said | {"versions": environment()["versions"]})


def _changed(run: FinishedRun, config: EvaluateConfig) -> list[str]:
    """What isn't as the run recorded it, of all that its evaluation reads (`FinishedRun.check`)."""
    if not isinstance(run.config, PolicyConfig) or run.foreign:
        return run.check(data=True)
    if run.started_in is not None:
        importable(run.started_in)  # where its reward functions were found
    own = not config.reward or bool(config.best_of)
    return run.check(
        data=True, runs=("sft", "reward") if own else ("sft",), code=code_of(run.config.reward) if own else None
    )


def _check_asked(run: FinishedRun, config: EvaluateConfig) -> None:
    """Raises ConfigError for what would be ignored, or would stand in the run's own evaluation as if it were its."""
    if run.foreign and config.data is None:
        what = f"{run.path} is an adapter, which doesn't say what to evaluate it on"
        raise ConfigError(what, where="data", hint="--data.paths FILE")
    if config.encoding is not None and not run.foreign:
        what, hint = "a run is evaluated with the encoding that it was trained with", "leave encoding out"
        raise ConfigError(what, where="encoding", allowed="encoding of directories of peft's", hint=hint)
    asked = [name for name in ("adapter", "reward", "best_of", "judge") if getattr(config, name)]
    asked += ["sampler"] if config.sampler != "local" else []
    if asked and run.stage != "policy":
        raise ConfigError(f"{config.run} holds a run of stage {run.stage}", where=asked[0], allowed="a policy run")
    if config.adapter and config.output is None:
        hint = "name a file, such as --output evaluation-of-adapter.json"
        raise ConfigError("another adapter's evaluation isn't the run's own", where="output", hint=hint)


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Scores every rating, demonstration and comparison of a file under a reward run.

    Returns:
        The rows that are also written as JSON lines (or printed): each record with TRL's column names and `score`, or
        `score_chosen` and `score_rejected`; null for a record that the run's encoding.drop_long drops. Of a run of
        several members they are means, beside `score_members` (`score_chosen_members`, ...). With `explain`,
        `explanation` (`explanation_chosen`, ...) too: `{"sentences": [{"text", "effect"}], "tokens": [[text, score]]}`.

    Raises:
        RunError: no finished reward run.
        DataError, ModelError, AdapterError: as the parts say.
        StorageError: the rows can't be written; nothing half-written is left.
    """
    with together() as workers:
        return _score(config, workers)


def _score(config: ScoreConfig, workers: Workers) -> list[dict[str, Any]]:
    accept = config.accept_changes
    given = Given(config.base, config.data, config.encoding, config.dtype, accept_changes=accept)
    run = read_run(config.run, ("reward",), given)
    run.check()
    _agree(run, config, config.data, workers)
    records = load(config.data, ("comparison", "rating", "demonstration"), "all")
    model, encoder = run.open(config.device, config.shard, workers)
    budget = config.tokens_per_microbatch or run.config.microbatch_tokens
    packing, members = model.packing(run.config.packing), tuple(run.members)
    tables, _ = score_by_members(model, encoder, records, members, budget, packing, workers)
    rows: list[dict[str, Any]] = []
    for number, (line, reached) in enumerate(zip(jsonl_lines(records), mean_of_members(tables), strict=True)):
        names = ("score_chosen", "score_rejected") if isinstance(records[number], Comparison) else ("score",)
        row = json.loads(line) | dict(zip(names, reached or [None] * len(names), strict=True))
        if len(members) > 1:
            each = zip(*(table[number] or [None] * len(names) for table in tables), strict=True)
            row |= {f"{name}_members": list(scores) for name, scores in zip(names, each, strict=True)}
        rows.append(row)
    if not workers.first:
        return rows
    if config.explain:
        _explain(model, encoder, records, rows, run, budget)
    if config.output is None:
        for row in rows:
            print(json_line(row))
    else:
        text = "".join(strict_json(row) + "\n" for row in rows)
        with storage_errors(config.output.parent):
            config.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(config.output, text)
    return rows


def _explain(
    model: Model, encoder: Encoder, records: Sequence[Record], rows: list[dict[str, Any]], run: FinishedRun, budget: int
) -> None:
    """Adds to each row what moved its scores."""
    asked = [(record.prompt, text, record.tools) for record in records for text in completions_of(record)]
    with progress(len(run.members) * len(asked), "explanations") as bar:
        packing = model.packing(run.config.packing)
        by_member = [explain(model, encoder, asked, name, budget, packing, bar.advance) for name in run.members]
    found = iter([mean_explanation(each) for each in zip(*by_member, strict=True)])
    for record, row in zip(records, rows, strict=True):
        names = ("explanation_chosen", "explanation_rejected") if isinstance(record, Comparison) else ("explanation",)
        for name in names:
            explanation = next(found)
            row[name] = explanation.row() if explanation is not None else None
