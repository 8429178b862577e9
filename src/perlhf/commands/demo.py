"""The whole pipeline on the embedded coffee-bar feedback: SFT, reward, policy, evaluation, report.

The feedback is simulated (perlhf/data/coffee_bar), the network and the training are real. The gold score is computed by
rules that the reward model never sees, so that the demo can say whether the policy became better or only scores higher.
"""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perlhf.config.commands import DemoConfig, EvaluateConfig
from perlhf.config.stages import (
    AdapterConfig,
    DataConfig,
    EncodingConfig,
    OptimConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    ValueConfig,
)
from perlhf.data import tools
from perlhf.data.order import keyed_seed
from perlhf.data.records import Rating
from perlhf.data.splits import load
from perlhf.errors import RunError, visible
from perlhf.evaluation.evaluate import evaluate
from perlhf.model.bases.found import pull
from perlhf.model.bases.loading import pick_device, pick_dtype
from perlhf.reports.findings import direction
from perlhf.reports.page import write as write_report
from perlhf.runs.evaluations import EVALUATION, Evaluation, as_json, read_evaluation
from perlhf.runs.read import STAGES
from perlhf.system.files import read_json, write_atomic
from perlhf.training.policy import train_policy
from perlhf.training.reward import train_reward
from perlhf.training.sft import train_sft

SYSTEM = "You take orders in a coffee bar."
SHOWN = 5
"""Prompts whose answers before and after are printed."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs (or continues, or reuses) every stage under `config.directory` and prints the summary.

    Returns:
        The numbers of the summary, also written to summary.json.

    Raises:
        PerlhfError: as the stages say.
    """
    console = Console()
    began = time.monotonic()
    pull(config.base)
    dtype, reason = pick_dtype("auto", pick_device(config.device))
    base = escape(visible(config.base))
    console.print(f"[bold]perlhf demo[/bold]: simulated coffee-bar feedback, real training of {base}. {reason}")
    sft, reward, policy = stages(config)
    results: dict[str, Any] = {"sft": train_sft(sft), "reward": train_reward(reward)}
    true_labels = DataConfig(paths=("builtin:coffee-bar/rating",))  # also for the control
    judged = EvaluateConfig(run=reward.run, data=true_labels, device=config.device)
    reward_evaluation = _evaluated(judged, results, "reward")
    results["policy"] = train_policy(policy)
    sampled = EvaluateConfig(run=policy.run, prompts=8 if config.quick else 200, device=config.device)
    policy_evaluation = _evaluated(sampled, results, "policy")
    page = write_report(
        (sft.run, reward.run, policy.run), config.directory / "report.html", "perlhf demo: a coffee bar"
    )
    summary = sum_up(results, reward_evaluation, policy_evaluation)
    summary |= {"dtype": str(dtype).removeprefix("torch."), "seconds_this_call": round(time.monotonic() - began, 1)}
    write_atomic(config.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    _print_summary(console, summary, policy_evaluation, page, config)
    return summary


def stages(config: DemoConfig) -> tuple[SftConfig, RewardConfig, PolicyConfig]:
    """The three recipes of the demo."""
    root, quick = config.directory, config.quick
    common: dict[str, Any] = {
        "base": config.base,
        "device": config.device,
        "seed": config.seed,
        "encoding": EncodingConfig(system=SYSTEM, max_tokens=512),
        "adapter": AdapterConfig(rank=8, targets="all"),
    }
    supervised = common | {
        "optim": OptimConfig(learning_rate=1e-3, schedule="linear", warmup_updates=2),
        "examples_per_update": 16,
        "max_updates": 2 if quick else None,
        "validate_every": 25,
    }
    sft = SftConfig(run=root / "sft", data=DataConfig(limit=32 if quick else 256), **supervised)
    reward = RewardConfig(
        run=root / "reward",
        sft=sft.run,
        data=DataConfig(paths=(str(_labels(config)),), limit=32 if quick else 600),
        select="loss",  # the scale of the scores counts against the KL, not their order alone
        **supervised,
    )
    policy = PolicyConfig(
        run=root / "policy",
        sft=sft.run,
        reward=(str(reward.run),),
        optim=OptimConfig(learning_rate=3e-4),
        kl_coef=0.1,
        value=ValueConfig(learning_rate=1e-3, warmup_updates=1),
        updates=2 if quick else 16,
        prompts_per_update=2 if quick else 8,
        completions_per_prompt=4,
        max_completion_tokens=48,
        advantage_norm="whiten",
        centre_prompts=4 if quick else 32,
        validation_prompts=4 if quick else 24,
        validate_every=8,
        **common,
    )
    return sft, reward, policy


def sum_up(results: dict[str, Any], reward: Evaluation, policy: Evaluation) -> dict[str, Any]:
    """The summary's numbers, and whether the gold score rose: its 95 % intervals before and after don't overlap."""
    of_reward, of_policy = as_json(reward), as_json(policy)
    gold = policy.before_after("gold")
    return {
        "reward_auc": of_reward["metrics"]["auc"],
        "bag_of_words_auc": of_reward["baselines"]["bag_of_words"]["auc"],
        "reward_test_ratings": reward.n,
        "gold": {side: of_policy[side]["gold"] for side in ("before", "after")},
        "gold_rose": gold is not None and direction(*gold) == "rose",
        "score": {side: of_policy[side]["score"] for side in ("before", "after")},
        "kl": of_policy["after"]["kl"],
        "test_prompts": policy.n,
        "seconds": {stage: result["seconds"] for stage, result in results.items()},
        "peak_memory_bytes": max(results[stage]["peak_memory_bytes"] for stage in STAGES),
        "trainable_parameters": {stage: results[stage]["trainable_parameters"] for stage in STAGES},
    }


def _labels(config: DemoConfig) -> Path | str:
    """What the reward model learns from: the simulated ratings, or a copy with shuffled labels (the control)."""
    if not config.shuffled_labels:
        return "builtin:coffee-bar/rating"
    path = config.directory / "shuffled.jsonl"
    records = load(DataConfig(paths=("builtin:coffee-bar/rating",)), ("rating",), "all")
    ratings = [record for record in records if isinstance(record, Rating)]
    order = sorted(range(len(ratings)), key=lambda i: keyed_seed(config.seed, "shuffle", i))
    shuffled = [
        Rating(r.prompt, r.completion, ratings[i].label, r.group, source=r.source)
        for r, i in zip(ratings, order, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, tools.jsonl_lines(shuffled))
    return path


def _evaluated(config: EvaluateConfig, results: dict[str, Any], stage: str) -> Evaluation:
    """The evaluation of a run, made once and reused; an evaluation with other settings, made by hand, is made anew."""
    path, settings = config.run / EVALUATION, config.run / "evaluation-settings.json"
    wanted = config.model_dump(mode="json") | {"seconds_of_run": results[stage]["seconds"]}
    if path.is_file() and settings.is_file() and path.stat().st_mtime <= settings.stat().st_mtime:
        with contextlib.suppress(RunError):  # damaged: made anew
            made = read_json(settings)
            if made.get("settings") == wanted and isinstance(made.get("seconds"), int | float):
                results[f"{stage} evaluation"] = {"seconds": made["seconds"]}
                return read_evaluation(path)
    began = time.monotonic()
    evaluation = evaluate(config)
    seconds = round(time.monotonic() - began, 3)
    write_atomic(settings, json.dumps({"settings": wanted, "seconds": seconds}, indent=2) + "\n")
    results[f"{stage} evaluation"] = {"seconds": seconds}
    return evaluation


def _print_summary(
    console: Console, summary: dict[str, Any], evaluation: Evaluation, page: Path, config: DemoConfig
) -> None:
    table = Table(title=f"perlhf demo, {evaluation.n} unseen prompts, one seed, 95 % intervals over prompts")
    for column in ("", "before RL (SFT)", "after RL"):
        table.add_column(column, overflow="fold")
    for name, label in (("gold", "mean gold score (rules)"), ("score", "mean reward-model score")):
        table.add_row(label, *map(_interval, summary[name].values()))
    table.add_row("KL to the SFT policy, nats a completion", "0", _interval(summary["kl"]))
    for name, label in (("tokens", "completion tokens"), ("end_rate", "ended by themselves")):
        table.add_row(label, *(_interval(asdict(side)) for side in evaluation.before_after(name) or ()))
    console.print(table)
    auc = summary["reward_auc"]
    words = summary["bag_of_words_auc"]
    console.print(
        f"reward model: AUC {_interval(auc)} on {summary['reward_test_ratings']} ratings of unseen groups "
        f"(bag of words: {_interval(words)})"
    )
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in summary["seconds"].items())
    console.print(f"time: {seconds}; peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB")
    for sample in evaluation.samples[:SHOWN]:
        _print_sample(console, sample)
    if config.quick:
        console.print("[yellow]--quick: a few updates each; these numbers prove nothing.[/yellow]")
    elif summary["gold_rose"]:
        console.print("[green]The gold score rose clearly: the intervals don't overlap.[/green]")
    else:
        console.print("[red]The gold score did NOT rise clearly: its interval is not above the one before.[/red]")
    console.print(f"report: {visible(str(page))}", soft_wrap=True, markup=False, emoji=False, highlight=False)


def _print_sample(console: Console, sample: dict[str, Any]) -> None:
    prompt = sample["prompt"]
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    console.print(f"\n[bold]customer[/bold] {escape(visible(text, lines=True))}", highlight=False, emoji=False)
    for when in ("before", "after"):
        shown = visible(sample[when], lines=True)
        console.print(
            f"  {when} (gold {sample[f'gold_{when}']:.2f}): {shown}", highlight=False, markup=False, emoji=False
        )


def _interval(value: dict[str, Any]) -> str:
    if value.get("low") is None:
        return f"{value['value']:.3g}"
    return f"{value['value']:.3g} ({value['low']:.3g} to {value['high']:.3g})"
