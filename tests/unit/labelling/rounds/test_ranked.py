"""The order of a project's questions by reward runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_runs import TinyRuns, tiny_runs

from perlhf.config.labelling import ProjectConfig, QuestionsConfig
from perlhf.errors import ConfigError, RunError
from perlhf.labelling.database.store import Store
from perlhf.labelling.project import LABELS, bring, made
from perlhf.labelling.questions import Question, questions
from perlhf.labelling.rounds import ranked as module
from perlhf.labelling.rounds.ranked import ranked


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRuns:
    return tiny_runs(tmp_path_factory.getbasetemp() / "tiny_runs", tiny_base)


def project(runs: TinyRuns, share: float, **changed: Any) -> ProjectConfig:
    rewards = (str(runs.reward), str(runs.reward))
    given: dict[str, Any] = {"order": "information", "rewards": rewards, "random_share": share}
    return ProjectConfig(questions=QuestionsConfig(paths=(runs.comparisons,), **(given | changed)))


def test_the_best_come_first_and_the_random_share_keeps_its_place(runs: TinyRuns, monkeypatch) -> None:
    asked = questions(project(runs, 0.0))
    # Members that prefer the first answer of question i with scores (i, -i): information grows with i.
    each = [np.stack([[sign * at, 0.0] for at in range(len(asked))])[None] for sign in (1.0, -1.0)]
    given = iter(each * 2)
    monkeypatch.setattr(module, "_scores", lambda run, questions: next(given))
    found = ranked(project(runs, 0.0), asked)
    assert [one.place for one in found] == [(len(asked) - 1 - at) / len(asked) for at in range(len(asked))]
    assert {one.drawn for one in found} == {"information"}
    some = ranked(project(runs, 0.5), [replace(asked[0], known="first"), *asked[1:]])
    kept = [at for at, one in enumerate(some) if one.drawn == "random"]
    assert 0 in kept and 5 < len(kept) < 25 and all(some[at].place == asked[at].place for at in kept)


def test_new_questions_are_ranked_by_what_the_project_says_now(runs: TinyRuns, tmp_path: Path, monkeypatch) -> None:
    """`order` and `rewards` come later, then another `order` and run: what is there keeps its place."""
    every, place, asked_of = questions(project(runs, 0.0)), tmp_path / "project", list[str]()
    worth = {one.key: number for number, one in enumerate(every)}  # the last is the best

    def scores(run: Path, some: list[Question]) -> np.ndarray:
        asked_of.append(run.name)
        sign = 1.0 if run.name == "one" else -1.0
        return np.array([[[sign * worth[one.key], 0.0] for one in some]])

    monkeypatch.setattr(module, "_scores", scores)

    def brought(count: int, rules: str) -> list[tuple[str, float]]:
        place.mkdir(exist_ok=True)
        (place / "project.yaml").write_text(f"questions: {{paths: [x.jsonl], random_share: 0.0{rules}}}\n")
        store = Store(place / LABELS)
        bring(made(place), store, every[:count])
        found = {one.key: (one.drawn, one.place) for one in store.questions().values()}
        store.close()
        return [found[one.key] for one in every[:count]]

    first = brought(5, "")
    assert first == [("random", one.place) for one in every[:5]] and not asked_of
    second = brought(9, ", order: disagreement, rewards: [one, other]")
    assert second[:5] == first and asked_of == ["one", "other"]
    assert second[5:] == [("disagreement", at / 4) for at in (3, 2, 1, 0)]
    third = brought(11, ", order: information, rewards: [third, one]")
    assert third[:9] == second and asked_of[2:] == ["third", "one"]
    assert third[9:] == [("information", 0.5), ("information", 0.0)]


def test_reward_runs_score_both_answers(runs: TinyRuns) -> None:
    asked = questions(project(runs, 0.0))
    unscored = [replace(asked[0], answers=("x", " ")), replace(asked[1], answers=("x", "word " * 2000))]
    (scores,) = module._scores(runs.reward, [*unscored, *asked[2:]])
    assert np.isnan(scores[:2]).all() and np.isfinite(scores[2:]).all() and scores.shape == (len(asked), 2)
    assert np.array_equal(module._scores(runs.reward, asked)[0, 2:], scores[2:])
    for few in ([], unscored[:1], unscored[1:]):  # what `label answers` brings at a time
        assert np.isnan(module._scores(runs.reward, few)).all()
    with pytest.raises(RunError, match="holds a run of stage sft"):
        module._scores(runs.sft, asked)


def test_an_order_needs_two_members_and_runs_an_order(runs: TinyRuns) -> None:
    with pytest.raises(ConfigError, match="one reward model has nobody to disagree with"):
        ranked(project(runs, 0.0, rewards=(str(runs.reward),)), questions(project(runs, 0.0)))
    for changed in ({"rewards": ()}, {"order": "random"}):
        with pytest.raises(ValidationError, match="rewards"):
            project(runs, 0.0, **changed)
    rules = json.loads(project(runs, 0.0).questions.model_dump_json())
    with pytest.raises(ValidationError, match="is for kind: comparison"):
        ProjectConfig(kind="rating", questions=QuestionsConfig(**rules))
