"""The files of a loop's rounds, and what they have shown: loop.json, loop.html, and what the owner's page shows."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perlhf.config.loop import LoopConfig
from perlhf.data.coffee_bar.gold import gold
from perlhf.data.splits import split_of
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Label
from perlhf.labelling.progress import LEARNED
from perlhf.labelling.questions import Question
from perlhf.labelling.rounds import figures
from perlhf.labelling.rounds.order import Floats
from perlhf.reports import loop as page
from perlhf.runs.evaluations import as_json, mapping, read_evaluation
from perlhf.runs.manifest import RESULT
from perlhf.system.files import damaged, read_json, write_atomic, write_json

LEARN, MEASURE, DUEL = "learn", "measure", "duel"
"""What a question is for: to learn from, to measure reward models, to hold a policy beside the start."""


@dataclass(frozen=True)
class Asked:
    """A question, what for, and what it was worth when it was chosen; of a duel, the number of its prompt."""

    what: str
    question: Question
    known: dict[str, float]


@dataclass(frozen=True)
class Places:
    """Where the files of a round are."""

    config: LoopConfig
    number: int

    @property
    def directory(self) -> Path:
        """Of the round."""
        return self.config.run / f"round-{self.number:04d}"

    @property
    def answers(self) -> Path:
        """Answers to training prompts."""
        return self.directory / "answers" / "answers.jsonl"

    @property
    def held_out_answers(self) -> Path:
        """Of the first round: answers to held-out prompts."""
        return self.directory / "answers" / "held-out.jsonl"

    @property
    def questions(self) -> Path:
        """What is asked to learn from and to measure with."""
        return self.directory / "questions" / "questions.jsonl"

    @property
    def duels(self) -> Path:
        """What is asked about the round's policy and the start."""
        return self.directory / "evaluation" / "duels.jsonl"

    @property
    def labels(self) -> Path:
        """All labels so far."""
        return self.directory / "labels"

    @property
    def records(self) -> Path:
        """What the round's reward models learn from."""
        return self.labels / "records.jsonl"

    @property
    def policy(self) -> Path:
        """The policy's run."""
        return self.directory / "policy"

    @property
    def evaluation(self) -> Path:
        """The policy's."""
        return self.directory / "evaluation" / "evaluation.json"

    @property
    def scores(self) -> Path:
        """What the reward models say of held-out pairs and of duels: the last file of a round."""
        return self.directory / "evaluation" / "scores.json"

    @property
    def seconds(self) -> Path:
        """How long its steps took."""
        return self.directory / "seconds.json"

    @property
    def reward(self) -> Path:
        """The run of the reward adapters."""
        return self.directory / "reward"

    def seconds_so_far(self) -> dict[str, Any]:
        """Of the steps that are done."""
        return read_json(self.seconds) if self.seconds.exists() else {}

    def asked(self, *what: str) -> list[Asked]:
        """What was asked in this round for these purposes."""
        found = [row for file in (self.questions, self.duels) if file.exists() for row in rows(file)]
        return [
            Asked(
                row["what"],
                Question(**(row["question"] | {"answers": tuple(row["question"]["answers"])})),
                row["known"],
            )
            for row in found
            if row["what"] in what
        ]

    def write_asked(self, file: Path, asked: Iterable[Asked]) -> None:
        """Writes one of its files of questions."""
        write_atomic(file, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in asked))


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file that a loop wrote.

    Raises:
        RunError: it is damaged.
    """
    try:
        yield from (json.loads(line) for line in file.read_text("utf-8").split("\n") if line)
    except (OSError, ValueError) as error:
        raise damaged(file, str(error)) from error


def write(config: LoopConfig, store: Store) -> dict[str, Any]:
    """Writes loop.json, loop.html and the project's learned.json about all finished rounds, also where fewer are asked
    for now; returns the first.
    """
    finished = 1
    while Places(config, finished + 1).scores.exists():
        finished += 1
    found = conclude(config, store, finished)
    write_json(config.run / "loop.json", found)
    write_atomic(config.run / "loop.html", page.render(found, config.run.name))
    shown = {"sentence": found["curve"]["sentence"]}
    shown["rounds"] = [{key: one[key] for key in ("round", "labels", "accuracy")} for one in found["rounds"]]
    write_json(config.labels / LEARNED, shown)
    return found


def conclude(config: LoopConfig, store: Store, finished: int) -> dict[str, Any]:
    """What loop.json holds."""
    said = _verdicts(store.labels())
    held_out = [one.question for one in Places(config, 1).asked(MEASURE)]
    first = np.array(read_json(Places(config, 1).scores)["held_out"], dtype=float)
    # What is too long for the models is so in every round.
    scored = set(np.flatnonzero(np.isfinite(first).all(axis=(0, 2))).tolist())
    judged, known = _judged(held_out, [said.get(one.key) for one in held_out], scored)
    golden = _golden_verdicts(held_out, config)
    by_gold, known_by_gold = _judged(held_out, golden, scored)
    correct: list[Floats] = []
    rounds: list[dict[str, Any]] = []
    predicted, preferred, groups = list[Floats](), list[Floats](), list[str]()
    for number in range(1, finished + 1):
        places = Places(config, number)
        found = read_json(places.scores)
        scores = {key: np.array(found[key], dtype=float) for key in ("held_out", "duels")}
        evaluation = read_evaluation(places.evaluation)
        groups = [row["group"] for row in evaluation.samples]
        verdicts = {int(one.known["prompt"]): said.get(one.question.key) for one in places.asked(DUEL)}
        duels = enumerate(evaluation.samples)
        preferred.append(np.array([figures.points(verdicts.get(at), row["before"], row["after"]) for at, row in duels]))
        predicted.append(figures.of_members(scores["duels"]))
        correct.append(figures.right(scores["held_out"][:, known], judged))
        own = config.bootstrap, config.seed
        one: dict[str, Any] = {
            "round": number,
            **_counts(places, config, said),
            "accuracy": figures.measured(correct[-1], judged.groups, *own),
            "disagreement": figures.spread(np.concatenate([scores["held_out"], scores["duels"]], axis=1)),
            "predicted": figures.measured(predicted[-1], groups, *own),
            "preferred": figures.measured(preferred[-1], groups, *own),
            "judged_duels": int((~np.isnan(preferred[-1])).sum()),
            "stopped": read_json(places.policy / RESULT).get("stopped"),
        }
        if "in_use" in found:
            one["accuracy_in_use"] = _in_use(found, *own)
        if golden:
            right = figures.right(scores["held_out"][:, known_by_gold], by_gold)
            one["accuracy_by_rules"] = figures.measured(right, by_gold.groups, *own)
        shown = as_json(evaluation)
        for key in ("gold", "score", "tokens", "end_rate"):
            one[key] = {side: mapping(shown.get(side)).get(key) for side in ("before", "after")}
        one["kl"] = mapping(shown.get("after")).get("kl")
        one["seconds"] = places.seconds_so_far()
        rounds.append(one)
    own = config.bootstrap, config.seed
    labels = [one["labels"] for one in rounds]
    curve = figures.learning_curve(labels, np.array(correct), judged, *own)
    since, sentence = figures.pleasing_alone(predicted, preferred, groups, *own)
    return {
        "labeller": _labeller(config),
        "order": config.order,
        "random_share": config.random_share,
        "members": config.reward.members,
        "held_out_questions": len(judged.groups),
        "duels": len(groups),
        "rounds": rounds,
        "curve": curve,
        "pleasing_alone_since": since,
        "verdict": sentence,
    }


def _in_use(scored: dict[str, Any], resamples: int, seed: int) -> dict[str, float | None] | None:
    """How often reward models agree with what people chose between served answers to held-out prompts."""
    scores, first = np.array(scored["in_use"], dtype=float), np.array(scored["in_use_first"], dtype=bool)
    known = np.flatnonzero(~np.isnan(scores).any(axis=(0, 2)))
    judged = figures.Judged(first[known], [scored["in_use_groups"][at] for at in known])
    return figures.measured(figures.right(scores[:, known], judged), judged.groups, resamples, seed)


def _counts(places: Places, config: LoopConfig, said: dict[str, str]) -> dict[str, Any]:
    """Labels that the round's reward models learned from, and by what its own questions were chosen."""
    learned = [row for row in rows(places.records) if split_of(row["group"], config.data) == "train"]
    asked = places.asked(LEARN)
    used = read_json(places.reward / RESULT)
    return {
        "labels": used["train_examples"],
        "too_long": used["counts"]["dropped_long"],
        "served": sum(str(row.get("source", "")).startswith("serve") for row in learned),
        "asked": len(asked),
        "answered": sum(one.question.key in said for one in asked),
        "drawn": dict(sorted(Counter(one.question.drawn for one in asked).items())),
    }


def _verdicts(labels: Sequence[Label]) -> dict[str, str]:
    """What was said to each question: the most frequent verdict, "equal" where there are two."""
    votes: dict[str, Counter[str]] = {}
    for label in labels:
        if not label.labeller.left_out:
            votes.setdefault(label.question.key, Counter())[label.said.verdict] += 1
    return {key: _most(found) for key, found in votes.items()}


def _most(votes: Counter[str]) -> str:
    (first, count), *others = votes.most_common()
    return "equal" if others and others[0][1] == count else first


def _judged(
    asked: Sequence[Question], verdicts: Sequence[str | None], scored: Collection[int]
) -> tuple[figures.Judged, list[int]]:
    """Those of the questions that have a preference and are among the scored ones, and their numbers."""
    known = [at for at, verdict in enumerate(verdicts) if verdict in ("first", "second") and at in scored]
    first = np.array([verdicts[at] == "first" for at in known], dtype=bool)
    return figures.Judged(first, [asked[at].group for at in known]), known


def _golden_verdicts(asked: Sequence[Question], config: LoopConfig) -> list[str | None]:
    """What the rules of the embedded feedback say, without noise; nothing of any other set."""
    if not all(path.split("/")[0] == "builtin:coffee-bar" for path in config.data.paths):
        return []
    found: list[str | None] = []
    for one in asked:
        first, second = (gold(one.prompt, str(answer)) for answer in one.answers)
        found.append("first" if first > second else "second" if second > first else None)
    return found


def _labeller(config: LoopConfig) -> str:
    if config.labeller == "simulated":
        return f"simulated by the rules of the embedded feedback, {config.noise:.0%} of the answers wrong"
    return f"the judge {config.judge_model}" if config.labeller == "judge" else "people"
