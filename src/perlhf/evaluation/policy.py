"""Evaluation of a policy run: its answers beside the reference's, to the same held-out prompts with the same draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perlhf.config.commands import EvaluateConfig
from perlhf.config.stages import PolicyConfig
from perlhf.data import order
from perlhf.data.coffee_bar.gold import gold
from perlhf.data.files import BUILTIN
from perlhf.data.records import Prompt, Record
from perlhf.errors import AdapterError, RewardFunctionError
from perlhf.evaluation.judge import judge
from perlhf.evaluation.shared import ROWS, Sampling, both_sides, measure, plain, progress, seen_groups, server_of
from perlhf.method import advantages, metrics
from perlhf.method.packing import batches, completed
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import FinishedRun
from perlhf.model.model import Model
from perlhf.model.open import load_earlier, load_sft
from perlhf.parallel.workers import Workers
from perlhf.rollout.functions import TrainerState
from perlhf.rollout.local import Rollout
from perlhf.rollout.scorers import Scorers, load_scorers
from perlhf.runs.evaluations import EVALUATION, Evaluation, Measured, Measures, WinRate, mapping
from perlhf.runs.manifest import RESULT
from perlhf.system.files import read_json
from perlhf.system.progress import Progress

JUDGED = 8
"""Pairs that the judge is asked about between two steps of the bar."""


@dataclass(frozen=True)
class Setting:
    """What both sides of an evaluation have in common."""

    config: EvaluateConfig
    policy: PolicyConfig
    model: Model
    encoder: Encoder
    scorers: Scorers
    records: list[Prompt]
    sampling: Sampling
    temperature: float
    reference: str | None
    policy_adapter: str
    """Whose answers are held beside the reference's."""
    workers: Workers
    """Who shares sampling and scoring."""

    @property
    def groups(self) -> list[str]:
        """Of the prompts."""
        return [record.group for record in self.records]

    def mean(self, values: NDArray[np.float64]) -> Measured:
        """The mean over the prompts of what each of them reached; nan marks a prompt that has no such value."""
        known = ~np.isnan(values)
        groups = [group for group, has in zip(self.groups, known, strict=True) if has]
        values = values[known]
        mean = measure(lambda indices: float(values[indices].mean()), groups, self.config) if groups else None
        if mean is None:
            raise RewardFunctionError("no answer got a score: all that scores returned None", where="reward")
        return mean


@dataclass(frozen=True)
class Answers:
    """One completion of each prompt, in the order of the prompts; each array is float64 [prompt]."""

    texts: list[str]
    members: NDArray[np.float64]
    """Of each source of scores: [members, prompt]."""
    scores: NDArray[np.float64]
    tokens: NDArray[np.float64]
    ended: NDArray[np.float64]
    kl: NDArray[np.float64] | None
    """To the reference, in nats a completion, at the sampling temperature; None where that is 0."""
    gold: NDArray[np.float64] | None


def evaluate_policy(run: FinishedRun, config: EvaluateConfig, workers: Workers) -> Callable[[], Evaluation]:
    """The evaluation of a policy run, once one of the workers that have sampled and scored concludes."""
    setting, trained_on = _set_up(run, config, workers)
    sampling, sides = setting.sampling, (setting.reference, setting.policy_adapter)
    given = setting.model, setting.encoder, sampling.prompts, sides
    max_gap, key = setting.policy.max_sampler_gap, config.output or run.path / EVALUATION
    with server_of(config, *given, run=run.path, key=key, max_gap=max_gap, workers=workers) as server:
        setting = replace(setting, sampling=replace(sampling, server=server, workers=workers))
        return _measured(setting, trained_on, run)


def _measured(setting: Setting, trained_on: Sequence[Record], run: FinishedRun) -> Callable[[], Evaluation]:
    """All that is sampled and scored; what concludes from it."""
    at_one = setting.temperature != 1
    with progress((2 + at_one) * len(setting.sampling.own(setting.workers)), "answers") as bar:
        before = _answers(setting, setting.reference, bar)
        setting = replace(setting, scorers=setting.scorers.on_level(before.members))
        before = replace(before, scores=setting.scorers.combined(before.members))
        after = _answers(setting, setting.policy_adapter, bar)
        # A KL at another temperature than that of the samples would be no expectation under the policy: sample again.
        kl_at_one = _kl_at_one(setting, setting.policy_adapter, bar) if at_one else after.kl
    assert kl_at_one is not None
    best_of = _best_of(setting, before, run) if setting.config.best_of else None
    return lambda: _concluded(setting, trained_on, before, after, kl_at_one, best_of)


def _concluded(
    setting: Setting,
    trained_on: Sequence[Record],
    before: Answers,
    after: Answers,
    kl_at_one: NDArray[np.float64],
    best_of: Callable[[], dict[str, Any]] | None,
) -> Evaluation:
    config = setting.config
    changes = {"score": after.scores - before.scores, "tokens": after.tokens - before.tokens}
    if before.gold is not None and after.gold is not None:
        changes["gold"] = after.gold - before.gold
    sources = config.reward or setting.policy.reward
    by_score = replace(_win_rate(setting, _points(after.scores, before.scores)), by=", ".join(sources))
    by_judge = None if config.judge is None else _judged(setting, before, after, config.judge)
    return Evaluation(
        kind="policy",
        split=config.split,
        n=len(setting.records),
        groups=len(set(setting.groups)),
        groups_seen_in_training=seen_groups(setting.records, trained_on),
        before=_describe(before, np.zeros(len(setting.records)), setting),
        after=_describe(after, kl_at_one, setting),
        change={key: setting.mean(values) for key, values in changes.items()},
        win_rate=by_judge or by_score,
        win_rate_by_score=by_judge and by_score,
        best_of=best_of and best_of(),
        temperature=setting.temperature,
        sampler=config.sampler,
        max_completion_tokens=setting.policy.max_completion_tokens,
        reward=list(sources),
        adapter=None if config.adapter is None else str(config.adapter),
        bootstrap=config.bootstrap,
        seed=config.seed,
        samples=[_sample_row(record, before, after, i) for i, record in enumerate(setting.records)],
    )


def _set_up(run: FinishedRun, config: EvaluateConfig, workers: Workers) -> tuple[Setting, Sequence[Record]]:
    """The setting, and the prompts that the policy was trained on."""
    policy = run.config
    assert isinstance(policy, PolicyConfig)
    trained_on, held_out = both_sides(run, config, ("prompt",))
    records = _prompts(order.choose(held_out, config.prompts, config.seed))
    model, encoder = run.open(config.device, config.shard, workers)
    reference = None
    if policy.sft is not None:
        reference = load_sft(model, policy.sft, encoder)
    answers = run.stage if config.adapter is None else _load_answering(model, config.adapter, encoder)
    scorers = _scorers(config, run, model, encoder, records)
    prompts = [encoder.cut_prompt(record.prompt, policy.max_completion_tokens, record.tools) for record in records]
    stop = config.stop or policy.stop
    sampling = Sampling(model, encoder, prompts, policy.max_completion_tokens, config.seed, stop)
    temperature = policy.temperature if config.temperature is None else config.temperature
    common = config, policy, model, encoder, scorers, records, sampling, temperature
    return Setting(*common, reference, answers, workers.apart), trained_on


def _scorers(
    config: EvaluateConfig, run: FinishedRun, model: Model, encoder: Encoder, records: Sequence[Record]
) -> Scorers:
    """What scores both sides: the run's own, or what was asked for, whose levels its reference's answers will tell."""
    if not config.reward:
        return _learned_from(config, run, model, encoder, records, "reward")
    policy = run.config
    assert isinstance(policy, PolicyConfig)
    seconds = config.reward_timeout_seconds or policy.reward_timeout_seconds
    given = model, config.reward, policy.combine, encoder
    return load_scorers(*given, prompts=_prompts(records), timeout_seconds=seconds)


def _learned_from(
    config: EvaluateConfig, run: FinishedRun, model: Model, encoder: Encoder, records: Sequence[Record], name: str
) -> Scorers:
    """What the policy was paid by, weights and levels included; adapters are called `name`_0, .."""
    policy = run.config
    assert isinstance(policy, PolicyConfig)
    scorers = load_scorers(
        *(model, policy.reward, policy.combine, encoder, name),
        prompts=_prompts(records),
        weights=policy.reward_weights,
        timeout_seconds=config.reward_timeout_seconds or policy.reward_timeout_seconds,
    )
    members = None if run.foreign else mapping(read_json(run.path / RESULT).get("centre")).get("members")
    return scorers if members is None else replace(scorers, levels=tuple((mean, std) for mean, std in members))


def _load_answering(model: Model, directory: Path, encoder: Encoder) -> str:
    """The name of an adapter that answers instead of the run's own."""
    adapter = load_earlier(model, directory, "answering", encoder, "adapter")
    if adapter.score_head is not None:
        raise AdapterError(f"a {adapter.role} adapter writes no answers", where=str(directory), allowed="sft or policy")
    return adapter.name


def _prompts(records: Sequence[Any]) -> list[Prompt]:
    return [record for record in records if isinstance(record, Prompt)]


def _answers(setting: Setting, adapter: str | None, bar: Progress) -> Answers:
    """Completions under `adapter` with everything that is measured of each."""
    config, policy, count = setting.config, setting.policy, len(setting.records)
    tokens, ended, kl = np.zeros(count), np.zeros(count), np.zeros(count)
    answered: dict[int, list[int]] = {}
    members = np.zeros((setting.scorers.count, count))
    for batch in setting.sampling.own(setting.workers):
        rollout = setting.sampling.answer(batch, adapter, setting.temperature)
        members[:, batch] = setting.scorers.members(
            setting.model,
            setting.encoder,
            rollout.prompts,
            rollout.completions,
            [setting.records[i] for i in batch],
            config.tokens_per_microbatch or policy.microbatch_tokens,
            state=TrainerState(policy.updates, policy.updates),
            ends=rollout.ends,
        )
        tokens[batch], ended[batch] = [len(ids) for ids in rollout.completions], rollout.ended
        if adapter != setting.reference and setting.temperature:
            kl[batch] = _kl(setting, adapter, rollout, setting.temperature)
        answered |= zip(batch, rollout.completions, strict=True)
        bar.advance()
    members, tokens, ended, kl = setting.workers.arrays(members, tokens, ended, kl)
    whole = setting.workers.rows(answered)
    texts = [setting.sampling.text(whole[i]) for i in range(count)]
    golden = _golden(setting, range(count), texts)
    scores = setting.scorers.combined(members)
    return Answers(texts, members, scores, tokens, ended, kl if setting.temperature else None, golden)


def _golden(setting: Setting, numbers: Sequence[int], texts: Sequence[str]) -> NDArray[np.float64] | None:
    """Gold scores of texts that answer the prompts of these numbers; None where the set has no gold score."""
    paths = (setting.config.data or setting.policy.data).paths
    if not all(path.split("/")[0] == BUILTIN for path in paths):
        return None
    return np.array([gold(setting.records[i].prompt, text) for i, text in zip(numbers, texts, strict=True)])


def _best_of(setting: Setting, before: Answers, run: FinishedRun) -> Callable[[], dict[str, Any]]:
    """For each n: the reference's best of n answers by what the policy learned from, scored as the policy is.

    The first of the n is the answer `before`. No policy that chooses among n answers is further from the reference than
    log n - (n - 1) / n nats (arXiv 2401.01879).
    """
    config, policy, most = setting.config, setting.policy, max(setting.config.best_of)
    chooser = setting.scorers
    if config.reward:
        chooser = _learned_from(config, run, setting.model, setting.encoder, setting.records, "chooser")
    shape = len(setting.records), most
    of_chooser, of_scorers = np.zeros((chooser.count, *shape)), np.zeros((setting.scorers.count, *shape))
    tokens = np.zeros(shape)
    golden = np.zeros(shape) if before.gold is not None else None
    at_once = max(1, ROWS // most)
    own = setting.sampling.own(setting.workers)
    batches = [batch[at : at + at_once] for batch in own for at in range(0, len(batch), at_once)]
    with progress(len(batches), f"best of {most}") as bar:
        for batch in batches:
            rollout = setting.sampling.answer(batch, setting.reference, setting.temperature, most)
            numbers = [i for i in batch for _ in range(most)]
            given = (
                *(setting.model, setting.encoder, rollout.prompts, rollout.completions),
                [setting.records[i] for i in numbers],
                config.tokens_per_microbatch or policy.microbatch_tokens,
            )
            of_chooser[:, batch] = chooser.members(*given, ends=rollout.ends).reshape(-1, len(batch), most)
            if config.reward:
                of_scorers[:, batch] = setting.scorers.members(*given, ends=rollout.ends).reshape(-1, len(batch), most)
            tokens[batch] = np.reshape([len(ids) for ids in rollout.completions], (-1, most))
            if golden is not None:
                of_batch = _golden(setting, numbers, [setting.sampling.text(ids) for ids in rollout.completions])
                assert of_batch is not None
                golden[batch] = of_batch.reshape(-1, most)
            bar.advance()
    of_chooser, of_scorers, tokens = setting.workers.arrays(of_chooser, of_scorers, tokens)
    if golden is not None:
        (golden,) = setting.workers.arrays(golden)
    chooser = chooser.on_level(of_chooser[:, :, 0])  # of a run that didn't record it
    chosen_by = chooser.combined(of_chooser.reshape(chooser.count, -1)).reshape(shape)
    scores = chosen_by
    if config.reward:
        scores = setting.scorers.combined(of_scorers.reshape(setting.scorers.count, -1)).reshape(shape)
    given = setting, before, chosen_by, scores, tokens, golden
    return lambda: {str(n): _best_of_first(n, *given) for n in config.best_of}


def _best_of_first(
    n: int,
    setting: Setting,
    before: Answers,
    chosen_by: NDArray[np.float64],
    scores: NDArray[np.float64],
    tokens: NDArray[np.float64],
    golden: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Means of the best of the first n answers; arrays are [prompt, answer].

    An answer that what chooses left out is never the best. A prompt all of whose answers it left out has no best one:
    it is in no mean, and counted as `unscored`.
    """
    has_best = ~np.isnan(chosen_by[:, :n]).all(1)
    rows, best = np.arange(len(scores)), np.nan_to_num(chosen_by[:, :n], nan=-np.inf).argmax(1)
    reached = scores[rows, best]
    points = _points(reached, before.scores)
    # The same answer, which another batch may score otherwise in the last bits.
    points[(best == 0) & ~np.isnan(points)] = 0.5
    columns = {"score": reached, "chosen_by": chosen_by[rows, best], "tokens": tokens[rows, best], "win_rate": points}
    if golden is not None:
        columns["gold"] = golden[rows, best]
    measures = {key: setting.mean(np.where(has_best, values, np.nan)) for key, values in columns.items()}
    return {**measures, "kl_at_most": float(np.log(n) - (n - 1) / n), "unscored": int((~has_best).sum())}


@torch.no_grad()
def _kl(setting: Setting, adapter: str | None, rollout: Rollout, temperature: float) -> NDArray[np.float64]:
    """log pi - log reference of each completion, both at `temperature`, on the same batch layout."""
    model, kl = setting.model, np.zeros(len(rollout.completions))
    examples = [[completed(p, c)] for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    budget = setting.config.tokens_per_microbatch or setting.policy.microbatch_tokens
    for batch in batches(examples, budget, model.packing(setting.policy.packing), model.device):
        now = model.logprobs(batch, adapter, temperature=temperature).logprobs
        reference = model.logprobs(batch, setting.reference, temperature=temperature).logprobs
        kl[list(batch.sequences)] = advantages.completion_kl(now, reference, batch.completion_mask).cpu().numpy()
    return kl


def _kl_at_one(setting: Setting, adapter: str, bar: Progress) -> NDArray[np.float64]:
    kl = np.zeros(len(setting.records))
    for batch in setting.sampling.own(setting.workers):
        kl[batch] = _kl(setting, adapter, setting.sampling.answer(batch, adapter, 1.0), 1.0)
        bar.advance()
    return setting.workers.arrays(kl)[0]


def _describe(answers: Answers, kl_at_one: NDArray[np.float64], setting: Setting) -> Measures:
    columns = {"score": answers.scores, "gold": answers.gold, "kl": answers.kl}
    columns |= {"tokens": answers.tokens, "end_rate": answers.ended}
    described = {key: None if values is None else setting.mean(values) for key, values in columns.items()}
    for n in (1, 2):  # without interval: a resample repeats texts
        share = metrics.distinct_ngrams(answers.texts, n)
        described[f"distinct_{n}"] = Measured(share) if np.isfinite(share) else None
    return described | {"kl_temperature_1": setting.mean(kl_at_one)}


def _points(scores: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for a win, 0.5 for a tie, 0 for a loss; nan where one of the two has no score."""
    points = (scores > others) + 0.5 * (scores == others)
    return np.where(np.isnan(scores) | np.isnan(others), np.nan, points)


def _win_rate(setting: Setting, points: NDArray[np.float64]) -> WinRate:
    mean = setting.mean(points)
    return WinRate(mean.value, mean.low, mean.high)


def _judged(setting: Setting, before: Answers, after: Answers, address: str) -> WinRate:
    """Win rate of the policy over the reference by a judge."""
    parts, unparsable, name = [], 0, setting.config.judge_model
    starts = range(0, len(setting.records), JUDGED)
    with progress(len(starts), "judge") as bar:
        for start in starts:
            chosen = slice(start, start + JUDGED)
            prompts = [record.prompt for record in setting.records[chosen]]
            seconds = setting.config.judge_timeout_seconds
            answer = judge(prompts, after.texts[chosen], before.texts[chosen], address, name, timeout_seconds=seconds)
            parts.append(answer.points)
            unparsable += answer.unparsable
            bar.advance()
    by = f"judge {name}, both orders"
    return replace(_win_rate(setting, np.concatenate(parts)), by=by, unparsable=unparsable)


def _sample_row(record: Prompt, before: Answers, after: Answers, i: int) -> dict[str, Any]:
    row: dict[str, Any] = {"group": record.group, "prompt": plain(record.prompt)}
    row |= {"before": before.texts[i], "after": after.texts[i]}
    for side, answers in (("before", before), ("after", after)):
        row[f"score_{side}"] = None if np.isnan(answers.scores[i]) else answers.scores[i].item()
    row["kl"] = None if after.kl is None else after.kl[i].item()
    for side, answers in (("before", before), ("after", after)):
        row[f"gold_{side}"] = None if answers.gold is None else answers.gold[i].item()
    return row
