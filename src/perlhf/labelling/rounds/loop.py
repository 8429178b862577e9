"""`perlhf loop RECIPE`: answers, questions, labels, reward models, policy, evaluation; again.

    run/loop.yaml, data.json           the configuration, and hashes of the prompts' files
    run/labels/                        the labelling project: its database holds every label
    run/round-0001/answers/            what the policy and the start answered
                   questions/          what was asked, and by what it was chosen
                   labels/             all labels so far, as `perlhf label export` writes them: what is learned from
                   reward/             a run of `perlhf reward` with K members, trained on from the last round's
                   policy/             a run of `perlhf policy`, trained on from the last round's
                   evaluation/         `evaluation.json` beside the start, and scores of held-out pairs
    run/loop.json, loop.html           what the rounds have shown

A step is done once its last file is there, and a stage goes on from its checkpoint, so that the same command continues
a loop that was killed anywhere. The policy of a round is held beside the start by labels of the next round, or of the
end, so that people are asked once a round.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from perlhf.config.commands import EvaluateConfig
from perlhf.config.labelling import Order, ProjectConfig
from perlhf.config.loop import LoopConfig
from perlhf.config.stages import DataConfig, OptimConfig, SftConfig
from perlhf.data import order as orders
from perlhf.data.records import Prompt
from perlhf.data.splits import SPLITS, Split, content_hash, split_of
from perlhf.errors import ConfigError, DataError, RunError
from perlhf.evaluation.evaluate import evaluate
from perlhf.evaluation.shared import plain
from perlhf.labelling import records
from perlhf.labelling.database.store import Store
from perlhf.labelling.progress import progress
from perlhf.labelling.project import LABELS, made
from perlhf.labelling.questions import prompts_of, question
from perlhf.labelling.rounds import in_use, labellers, network, results
from perlhf.labelling.rounds.network import Pair
from perlhf.labelling.rounds.order import choose, disagreement, information
from perlhf.labelling.rounds.results import DUEL, LEARN, MEASURE, Asked, Places
from perlhf.labelling.settled import settled
from perlhf.model.bases.found import Base, pull
from perlhf.runs.earlier import check_runs
from perlhf.runs.manifest import LOCK, RESULT, check_continues, locked
from perlhf.system.console import note
from perlhf.system.files import damaged, from_yaml, read_json, storage_errors, write_atomic, write_json
from perlhf.training.policy import train_policy
from perlhf.training.reward import train_reward
from perlhf.training.sft import train_sft

RECIPE = "loop.yaml"
DATA = "data.json"
MAY_GROW = ("run", "demo", "rounds", "page", "bootstrap", "judge", "judge_timeout_seconds", "vllm")
"""Keys that may differ when a loop is continued: nothing that is there depends on them."""
SFT, DEMONSTRATIONS = "sft", 96
"""The demo's start: its directory, and how many demonstrations it learns from."""
MORE = 1.5
"""Held-out prompts answered for each question wanted: some get the same answer twice."""


@dataclass(frozen=True)
class Round:
    """One round of a loop."""

    config: LoopConfig
    number: int
    store: Store
    project: ProjectConfig

    @property
    def places(self) -> Places:
        """Where its files are."""
        return Places(self.config, self.number)

    @property
    def before(self) -> Places | None:
        """The files of the round before; None of the first."""
        return Places(self.config, self.number - 1) if self.number > 1 else None


def loop(config: LoopConfig) -> dict[str, Any]:
    """Runs the rounds that are missing; returns what loop.json holds, which is written after each of them.

    Raises:
        ConfigError, DataError, RunError, ModelError, StorageError: as the stages say; the directory holds another loop.
        ServiceError: the judge doesn't answer. DivergenceError: a stage's training had to stop.
        Interrupted, KeyboardInterrupt: the same command goes on.
    """
    _check(config)
    with storage_errors(config.run):
        _check_is_loop(config.run)
        config.run.mkdir(parents=True, exist_ok=True)
    with locked(config.run):
        _claim(config)
        _check_data(config)
        config = _with_start(config)
        project = _project(config)
        store = Store(config.labels / LABELS)
        try:
            store.settle(settled(project))
            if config.page is not None:
                labellers.open_page(config)
            for number in range(1, config.rounds + 1):
                _round(Round(config, number, store, project))
                results.write(config, store)
            labellers.label(config, store, [asked.question for asked in Places(config, config.rounds).asked(DUEL)])
            return results.write(config, store)
        finally:
            store.close()


def _with_start(config: LoopConfig) -> LoopConfig:
    """The demo starts from an SFT run on the embedded demonstrations, which is trained first."""
    if not config.demo or config.sft is not None:
        return config
    demonstrations = SftConfig(
        run=config.run / SFT,
        data=DataConfig(limit=DEMONSTRATIONS),
        adapter=config.policy.adapter,
        optim=OptimConfig(learning_rate=1e-3, schedule="linear", warmup_updates=2),
        seed=config.seed,
        **config.shared(),
    )
    train_sft(demonstrations)
    return config.model_copy(update={"sft": demonstrations.run})


def _round(this: Round) -> None:
    """The steps of a round, those that are done left out."""
    places, config = this.places, this.config
    _step(this, "answers", places.answers, lambda: _answers(this))
    _step(this, "questions", places.questions, lambda: _questions(this))
    this.store.add(asked.question for asked in places.asked(LEARN, MEASURE))
    _step(this, "labels", places.records, lambda: _labels(this))
    start = None if this.before is None else this.before.reward
    reward = config.reward_stage(places.reward, places.records, start, _seed(config, "reward"))
    _step(this, "reward", places.reward / RESULT, lambda: train_reward(reward))
    start = None if this.before is None else this.before.policy
    policy = config.policy_stage(places.policy, places.reward, start, _seed(config, "policy", this.number))
    _step(this, "policy", places.policy / RESULT, lambda: train_policy(policy))
    _step(this, "evaluation", places.scores, lambda: _evaluation(this))
    this.store.add(asked.question for asked in places.asked(DUEL))


def _step(this: Round, name: str, done: Path, work: Callable[[], object]) -> None:
    """Does a step unless its last file is there, and notes how long it took."""
    if done.exists():
        return
    note(f"round {this.number} of {this.config.rounds}: {name}")
    with storage_errors(this.places.directory):
        for folder in ("answers", "questions", "evaluation"):
            (this.places.directory / folder).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    work()
    write_json(this.places.seconds, this.places.seconds_so_far() | {name: round(time.monotonic() - began, 1)})


def _answers(this: Round) -> None:
    """The policy's and the start's answers to the round's prompts; in the first round, to held-out ones as well."""
    config, places = this.config, this.places
    trained_on = _prompts(this, "train")
    count = min(config.prompts_per_round, len(trained_on))
    numbers = dict.fromkeys(orders.cycle(len(trained_on), count, this.number, config.seed))
    chosen = [trained_on[number] for number in numbers]
    half = config.answers_per_prompt // 2
    policy = None if this.before is None else this.before.policy
    sides = {"start": (None, config.answers_per_prompt)}
    if policy is not None:
        sides = {"policy": (policy, config.answers_per_prompt - half), "start": (None, half)}
    found = network.sample_answers(config, chosen, sides, f"round {this.number}")
    if this.before is None:
        held_out = _prompts(this, "validation", "test")
        asked = orders.choose(held_out, int(MORE * config.held_out_labels) + 1, config.seed)
        answers = network.sample_answers(config, asked, {"start": (None, 2)}, "held-out")
        write_atomic(places.held_out_answers, _lines(network.answered(asked, answers)))
    write_atomic(places.answers, _lines(network.answered(chosen, found)))


def _prompts(this: Round, *splits: Split) -> list[Prompt]:
    """Those that can be asked about: what a project that masks stores of their group is on their side, too."""
    data = this.config.data
    found = [record for split in splits for record in prompts_of(data, split)]
    kept = [record for record in found if in_use.keeps_side(record.prompt, record.group, this.project, data)]
    if not kept:
        raise DataError(
            f"once they are masked, none of {len(found)} prompts is in a group of its side",
            where=", ".join(data.paths),
            allowed="prompts whose groups stay on one side of data.validation and data.test",
            hint="give the prompts a column `group` in which nothing has to be masked",
        )
    return kept


def _questions(this: Round) -> None:
    """Chooses what is asked: pairs of the round's answers, and in the first round the held-out questions."""
    config, places = this.config, this.places
    prompts, pairs = _pairs(places.answers)
    worth = {"disagreement": None, "information": None}
    if this.before is not None and config.reward.members > 1 and config.order != "random":
        scores = network.score_pairs(config, [this.before.reward], pairs)
        worth = {"disagreement": disagreement(scores), "information": information(scores)}
    key = config.seed, "round", this.number
    chosen = choose(prompts, worth.get(config.order), config.order, config.labels_per_round, config.random_share, *key)
    asked: list[Asked] = []
    for choice in chosen:
        values = {name: found[choice.at] for name, found in worth.items() if found is not None}
        known = {name: float(value) for name, value in values.items() if np.isfinite(value)}
        asked += _asked(this, pairs[choice.at], LEARN, choice.drawn, known)
    if this.before is None:
        whose, held_out = _pairs(places.held_out_answers)
        measured = choose(whose, None, "random", config.held_out_labels, 1.0, config.seed, "held-out")
        asked += [one for choice in measured for one in _asked(this, held_out[choice.at], MEASURE)]
    for what, file in ((LEARN, places.answers), (MEASURE, places.held_out_answers)):
        if (what == LEARN or this.before is None) and not any(one.what == what for one in asked):
            raise DataError(
                f"no two answers to a prompt differ, so that there is nothing to {what}",
                where=str(file),
                hint="raise policy.temperature, answers_per_prompt, prompts_per_round or held_out_labels in a new loop "
                "(another --run)",
            )
    places.write_asked(places.questions, asked)


def _pairs(file: Path) -> tuple[list[int], list[Pair]]:
    """All pairs of different answers in a file, none of them empty, each with the number of its prompt."""
    numbers: list[int] = []
    pairs: list[Pair] = []
    for number, row in enumerate(results.rows(file)):
        texts = list(dict.fromkeys(text for text in row["completions"] if text.strip()))
        for at, first in enumerate(texts):
            for second in texts[at + 1 :]:
                numbers.append(number)
                pairs.append(Pair(row["prompt"], first, second, row["group"]))
    return numbers, pairs


def _asked(
    this: Round, pair: Pair, what: str, drawn: Order = "random", known: dict[str, float] | None = None
) -> list[Asked]:
    """The question about a pair; none where its answers are the same once they are masked."""
    source = f"round {this.number}: {what}"
    found = question(this.project, pair.prompt, (pair.first, pair.second), pair.group, source, drawn)
    return [] if found is None else [Asked(what, found, known or {})]


def _labels(this: Round) -> None:
    """Waits for the labels of this round and for those of the last round's duels; writes all labels so far."""
    config, store, places = this.config, this.store, this.places
    duels = [] if this.before is None else this.before.asked(DUEL)
    labellers.label(config, store, [one.question for one in [*places.asked(LEARN, MEASURE), *duels]])
    people = store.people()
    everybody = [one for one in store.labels(skips=True) if not one.labeller.left_out]
    prompts = [record for split in SPLITS for record in prompts_of(config.data, split)]
    said = in_use.teaching(everybody, this.project, config.data, prompts)
    numbers = progress(said, people, store.progress(), this.project.up)
    found = records.labelled_rows(said, this.project, "all")
    sides = [split_of(row["group"], config.data) for row, _ in found if "chosen" in row]
    for side, wanted in (("train", "to learn from"), ("held-out", "to measure with")):
        if not any((of == "train") == (side == "train") for of in sides):
            raise DataError(
                f"no label {wanted} prefers one of two answers",
                where=str(config.labels),
                allowed="at least one preference among training groups, and one among held-out groups",
                hint=f"take answers back (u) and judge again: perlhf label {config.labels}"
                if config.labeller == "people"
                else "begin another loop (--run NEW): with another labeller, or with more questions",
            )
    records.write(places.labels, said, this.project, numbers)


def _evaluation(this: Round) -> None:
    """The round's policy beside the start on held-out prompts, and what its reward models say of held-out pairs."""
    config, places = this.config, this.places
    settings = EvaluateConfig(
        run=places.policy,
        prompts=config.duels,
        bootstrap=config.bootstrap,
        seed=config.seed,
        device=config.device,
        output=places.evaluation,
        tokens_per_microbatch=config.tokens_per_microbatch,
        sampler=config.sampler,
        vllm=config.vllm,
    )
    samples = evaluate(settings).samples
    duels = [Pair(row["prompt"], row["before"], row["after"], row["group"]) for row in samples]
    held_out = [one.question for one in Places(config, 1).asked(MEASURE)]
    pairs = [Pair(one.prompt, str(one.answers[0]), str(one.answers[1]), one.group) for one in held_out]
    choices = in_use.choices(records.read(places.labels), this.project, config.data)
    pairs += [
        Pair(plain(one.question.prompt), str(one.question.answers[0]), str(one.question.answers[1]), one.question.group)
        for one in choices
    ]
    asked_about = len(held_out)
    scores = network.score_pairs(config, [places.reward], [*pairs, *duels])
    asked = [
        one
        for at, duel in enumerate(duels)
        if duel.first.strip() and duel.second.strip() and duel.first.strip() != duel.second.strip()
        if in_use.keeps_side(duel.prompt, duel.group, this.project, config.data)
        for one in _asked(this, duel, DUEL, known={"prompt": at})
    ]
    places.write_asked(places.duels, asked)
    found: dict[str, Any] = {"held_out": scores[:, :asked_about].tolist(), "duels": scores[:, len(pairs) :].tolist()}
    if choices:
        found["in_use"] = scores[:, asked_about : len(pairs)].tolist()
        found["in_use_first"] = [one.said.verdict == "first" for one in choices]
        found["in_use_groups"] = [one.question.group for one in choices]
    write_json(places.scores, found)


def _check(config: LoopConfig) -> None:
    """Looks for what the rounds need before anything is written."""
    if config.demo:
        pull(config.base)
    Base.find(config.base)
    check_runs("sft", [] if config.sft is None else [config.sft])
    for split in SPLITS:
        prompts_of(config.data, split)


def _check_is_loop(run: Path) -> None:
    """Refuses a directory of something else before anything is written there."""
    if run.is_dir() and not (run / RECIPE).exists():
        others = [entry.name for entry in run.iterdir() if entry.name not in (LOCK, SFT) and entry.name[0] != "."]
        if others:
            raise RunError(
                f"the directory holds {min(others)!r} and no loop", where=str(run), hint="name another --run"
            )


def _claim(config: LoopConfig) -> None:
    """Writes loop.yaml, or refuses a directory that holds another loop."""
    values, path = json.loads(config.model_dump_json()), config.run / RECIPE
    if path.exists():
        try:
            then = from_yaml(path.read_bytes())
        except ValueError as error:
            raise damaged(path, str(error)) from error
        if not isinstance(then, dict):
            raise damaged(path, "it is no loop")
        check_continues(path, then, values, MAY_GROW, "loop", "--run")
        values["rounds"] = max(values["rounds"], then["rounds"])
    write_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _check_data(config: LoopConfig) -> None:
    """Refuses prompts other than those of the rounds so far: the same held-out ones measure all rounds."""
    path, now = config.run / DATA, content_hash(config.data)
    then = read_json(path) if path.exists() else now
    if changed := [name for name, found in now.items() if then.get(name) != found]:
        raise RunError(
            f"{changed[0]} isn't what it was when the loop began",
            where=str(path),
            allowed="the same prompts in all rounds, since held-out ones measure all of them",
            hint=f"put it back, or begin another loop with these labels: --run NEW --project {config.labels}",
        )
    write_json(path, now)


def _project(config: LoopConfig) -> ProjectConfig:
    """The labelling project, made where there is none; its questions come from the loop.

    Raises:
        ConfigError: a project that the loop can't ask in.
    """
    project = made(config.labels, config.seed)
    if project.kind != "comparison":
        what, where = f"the project asks for kind: {project.kind}", str(config.labels / "project.yaml")
        raise ConfigError(what, where=where, allowed="kind: comparison", hint="name another --project")
    if project.questions.paths and config.labeller != "people":
        what = f"a {config.labeller} labeller would answer questions that were meant for people"
        raise ConfigError(what, where=str(config.labels), allowed="a project of its own", hint="leave out project")
    return project


def _seed(config: LoopConfig, *parts: object) -> int:
    return orders.keyed_seed(config.seed, *parts) % 2**31


def _lines(found: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
