"""Evaluation of a policy run: its answers beside the reference's, to the same held-out prompts with the same draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perlhf import advantages, order, statistics, store
from perlhf.config import EvaluateConfig, PolicyConfig
from perlhf.data import BUILTIN, load
from perlhf.data.coffee_bar import gold
from perlhf.data.records import Prompt, Text
from perlhf.encode import Encoder
from perlhf.evaluate.common import by_length, mean_of, plain, progress, sample_batch, seen_groups, with_interval
from perlhf.finished import Finished
from perlhf.judge import judge
from perlhf.model import Model
from perlhf.packing import microbatches
from perlhf.progress import Progress
from perlhf.rewards import Rewards, load_rewards
from perlhf.sampler import Rollout

JUDGED = 8
"""Pairs that the judge is asked about between two steps of the bar."""


@dataclass(frozen=True)
class Setting:
    """What both sides of an evaluation have in common."""

    config: EvaluateConfig
    policy: PolicyConfig
    model: Model
    encoder: Encoder
    rewards: Rewards
    records: list[Prompt]
    prompts: list[list[int]]
    batches: list[list[int]]
    reference: str | None

    @property
    def groups(self) -> list[str]:
        """Of the prompts."""
        return [record.group for record in self.records]


@dataclass(frozen=True)
class Answers:
    """One completion of each prompt, in the order of the prompts; each array is float64 [prompt]."""

    texts: list[str]
    scores: NDArray[np.float64]
    tokens: NDArray[np.float64]
    ended: NDArray[np.float64]
    kl: NDArray[np.float64] | None
    """To the reference, in nats a completion, at the sampling temperature; None where that is 0."""
    gold: NDArray[np.float64] | None


def evaluate_policy(finished: Finished, config: EvaluateConfig) -> dict[str, Any]:
    """What evaluation.json holds of a policy run."""
    setting, trained_on = _set_up(finished, config)
    sides = [setting.reference, finished.stage]
    at_one = config.temperature != 1
    with progress((len(sides) + at_one) * len(setting.batches), "answers") as bar:
        before, after = (_answers(setting, adapter, bar) for adapter in sides)
        # A KL at another temperature than that of the samples would be no expectation under the policy: sample again.
        kl_at_one = _kl_at_one(setting, finished.stage, bar) if at_one else after.kl
    assert kl_at_one is not None
    described = {"before": _describe(before, setting), "after": _describe(after, setting)}
    zero = np.zeros(len(setting.records))
    for side, values in (("before", zero), ("after", kl_at_one)):
        described[side]["kl_temperature_1"] = with_interval(mean_of(values), setting.groups, config)
    changes = {"score": after.scores - before.scores, "tokens": after.tokens - before.tokens}
    if before.gold is not None and after.gold is not None:
        changes["gold"] = after.gold - before.gold
    sources = config.reward or setting.policy.reward
    return {
        "kind": "policy",
        "split": config.split,
        "n": len(setting.records),
        "groups": len(set(setting.groups)),
        "groups_seen_in_training": seen_groups(setting.records, trained_on),
        **described,
        "change": {key: with_interval(mean_of(values), setting.groups, config) for key, values in changes.items()},
        **_win_rates(setting, before, after, ", ".join(sources)),
        "temperature": config.temperature,
        "max_completion_tokens": setting.policy.max_completion_tokens,
        "reward": list(sources),
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        "samples": [
            _sample_row(record.prompt, record.group, before, after, i) for i, record in enumerate(setting.records)
        ],
    }


def _set_up(finished: Finished, config: EvaluateConfig) -> tuple[Setting, list[Prompt]]:
    """The setting, and the prompts that the policy was trained on."""
    policy = finished.config
    assert isinstance(policy, PolicyConfig)
    trained_on = _prompts(load(policy.data, ("prompt",), "train"))
    found = _prompts(load(config.data or policy.data, ("prompt",), config.split))
    records = order.choose(found, config.prompts, config.seed)
    model, encoder = finished.open(config.device)
    reference = None
    if policy.sft is not None:
        reference = store.load_adapter(model, policy.sft / "adapter", "sft", encoder).name
        model.freeze(reference)
    rewards = load_rewards(model, config.reward or policy.reward, policy.combine, encoder)
    prompts = [encoder.cut_prompt(record.prompt, policy.max_completion_tokens) for record in records]
    setting = Setting(config, policy, model, encoder, rewards, records, prompts, by_length(prompts), reference)
    return setting, trained_on


def _prompts(records: Sequence[Any]) -> list[Prompt]:
    return [record for record in records if isinstance(record, Prompt)]


def _answers(setting: Setting, adapter: str | None, bar: Progress) -> Answers:
    """Completions under `adapter` with everything that is measured of each."""
    config, policy, count = setting.config, setting.policy, len(setting.records)
    texts, scores, tokens, ended, kl = [""] * count, np.zeros(count), np.zeros(count), np.zeros(count), np.zeros(count)
    for batch in setting.batches:
        rollout = _rollout(setting, adapter, batch, config.temperature)
        chosen: list[Text] = [setting.records[i].prompt for i in batch]
        scores[batch] = setting.rewards.scores(
            setting.model,
            setting.encoder,
            rollout.prompts,
            rollout.completions,
            chosen,
            config.tokens_per_microbatch or policy.microbatch_tokens,
        )
        tokens[batch], ended[batch] = [len(ids) for ids in rollout.completions], rollout.ended
        if adapter != setting.reference and config.temperature:
            kl[batch] = _kl(setting, adapter, rollout, config.temperature)
        for i, ids in zip(batch, rollout.completions, strict=True):
            texts[i] = setting.encoder.decode(ids)
        bar.advance()
    paths = (config.data or policy.data).paths
    golden = None
    if all(path.split("/")[0] == BUILTIN for path in paths):
        golden = np.array([gold(record.prompt, text) for record, text in zip(setting.records, texts, strict=True)])
    return Answers(texts, scores, tokens, ended, kl if config.temperature else None, golden)


def _rollout(setting: Setting, adapter: str | None, batch: list[int], temperature: float) -> Rollout:
    return sample_batch(
        setting.model,
        setting.encoder,
        setting.prompts,
        batch,
        adapter=adapter,
        temperature=temperature,
        max_completion_tokens=setting.policy.max_completion_tokens,
        seed=setting.config.seed,
    )


@torch.no_grad()
def _kl(setting: Setting, adapter: str | None, rollout: Rollout, temperature: float) -> NDArray[np.float64]:
    """log pi - log reference of each completion, both at `temperature`, on the same batch layout."""
    rows = [[(*p, *c)] for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    found, packing = np.zeros(len(rows)), setting.policy.packing
    budget = setting.config.tokens_per_microbatch or setting.policy.microbatch_tokens
    for batch in microbatches(rows, budget, packing):
        chosen = [rollout.prompts[i] for i in batch], [rollout.completions[i] for i in batch]
        now = setting.model.logprobs(*chosen, adapter, temperature=temperature, packing=packing)
        reference = setting.model.logprobs(*chosen, setting.reference, temperature=temperature, packing=packing)
        found[batch] = advantages.completion_kl(now.logprobs, reference.logprobs, now.mask).cpu().numpy()
    return found


def _kl_at_one(setting: Setting, adapter: str, bar: Progress) -> NDArray[np.float64]:
    found = np.zeros(len(setting.records))
    for batch in setting.batches:
        found[batch] = _kl(setting, adapter, _rollout(setting, adapter, batch, 1.0), 1.0)
        bar.advance()
    return found


def _describe(answers: Answers, setting: Setting) -> dict[str, Any]:
    columns = {"score": answers.scores, "gold": answers.gold, "kl": answers.kl}
    columns |= {"tokens": answers.tokens, "end_rate": answers.ended}
    described: dict[str, Any] = {
        key: None if values is None else with_interval(mean_of(values), setting.groups, setting.config)
        for key, values in columns.items()
    }
    for n in (1, 2):  # without interval: a resample repeats texts
        value = statistics.distinct_ngrams(answers.texts, n)
        described[f"distinct_{n}"] = {"value": value, "low": None, "high": None}
    return described


def _win_rates(setting: Setting, before: Answers, after: Answers, sources: str) -> dict[str, Any]:
    """Win rate of the policy over the reference: by score and, where one is named, by the judge; ties count half."""
    config, groups = setting.config, setting.groups
    points = (after.scores > before.scores) + 0.5 * (after.scores == before.scores)
    by_score = {**(with_interval(mean_of(points), groups, config) or {}), "by": sources}
    if config.judge is None:
        return {"win_rate": by_score}
    parts, unparsable = [], 0
    starts = range(0, len(groups), JUDGED)
    with progress(len(starts), "judge") as bar:
        for start in starts:
            chosen = slice(start, start + JUDGED)
            prompts = [record.prompt for record in setting.records[chosen]]
            answer = judge(prompts, after.texts[chosen], before.texts[chosen], config.judge, config.judge_model)
            parts.append(answer.points)
            unparsable += answer.unparsable
            bar.advance()
    rate = with_interval(mean_of(np.concatenate(parts)), groups, config) or {}
    by_judge = {**rate, "by": f"judge {config.judge_model}, both orders", "unparsable": unparsable}
    return {"win_rate": by_judge, "win_rate_by_score": by_score}


def _sample_row(prompt: Text, group: str, before: Answers, after: Answers, i: int) -> dict[str, Any]:
    row: dict[str, Any] = {"group": group, "prompt": plain(prompt), "before": before.texts[i], "after": after.texts[i]}
    row |= {"score_before": before.scores[i].item(), "score_after": after.scores[i].item()}
    row["kl"] = None if after.kl is None else after.kl[i].item()
    for side, answers in (("before", before), ("after", after)):
        row[f"gold_{side}"] = None if answers.gold is None else answers.gold[i].item()
    return row
