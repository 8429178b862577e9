"""The order of a project's questions by reward models that it names: `perlhf label` with `questions.order`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from perlhf.config.labelling import ProjectConfig
from perlhf.data.records import Comparison, completions_of, text_of
from perlhf.errors import ConfigError
from perlhf.evaluation.reward import score_by_members
from perlhf.labelling.questions import Question, uniform
from perlhf.labelling.rounds.order import Floats, disagreement, information
from perlhf.model.encoding.encode import Encoder, TooLong
from perlhf.model.finished import read_run


def ranked(project: ProjectConfig, questions: Sequence[Question]) -> list[Question]:
    """The questions, those that aren't in the random share at places by their worth, the best first.

    Hidden tests, and questions of which an answer is empty or too long for a model, keep their random places.

    Raises:
        RunError: no finished reward run; ConfigError: a single reward model; ModelError, AdapterError: as one says when
            it is opened.
    """
    rules = project.questions
    scores = np.concatenate([_scores(Path(run), questions) for run in rules.rewards])
    if len(scores) < 2:
        allowed = "two or more reward runs, or one of several members"
        raise ConfigError("one reward model has nobody to disagree with", where="questions.rewards", allowed=allowed)
    worth = disagreement(scores) if rules.order == "disagreement" else information(scores)
    best = sorted((at for at in range(len(questions)) if not np.isnan(worth[at])), key=lambda at: -worth[at])
    found = list(questions)
    for rank, at in enumerate(best):
        if questions[at].known is None and uniform(rules.seed, "drawn", questions[at].key) >= rules.random_share:
            found[at] = replace(questions[at], place=rank / len(best), drawn=rules.order)
    return found


def _scores(run: Path, questions: Sequence[Question]) -> Floats:
    """Of both answers by each member: [members, questions, 2]; nan where there is none."""
    opened = read_run(run, ("reward",))
    model, encoder = opened.open("auto")
    asked = {
        at: Comparison(one.prompt, one.answers[0], one.answers[1], one.group, source=one.source)
        for at, one in enumerate(questions)
        if all(text_of(answer).strip() for answer in one.answers)
    }
    fitting = {at: record for at, record in asked.items() if _fits(encoder, record)}
    scores = np.full((len(opened.members), len(questions), 2), np.nan)
    if fitting:
        budget, packing = opened.config.microbatch_tokens, model.packing(opened.config.packing)
        records = list(fitting.values())
        tables, _ = score_by_members(model, encoder, records, tuple(opened.members), budget, packing)
        scores[:, list(fitting)] = np.array(tables, dtype=float)
    return scores


def _fits(encoder: Encoder, record: Comparison) -> bool:
    """Whether both answers can be scored; a project that people answer isn't stopped by one that can't."""
    try:
        encoder.examples(record.prompt, completions_of(record), record.source)
    except TooLong:
        return False
    return True
