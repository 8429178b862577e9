"""What of a project is settled once questions are stored, and labels of an export as a project stores them."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from perlhf.config.labelling import ProjectConfig
from perlhf.config.recipe import read_recipe
from perlhf.errors import ConfigError, DataError
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Label
from perlhf.labelling.pages.server import VERDICTS
from perlhf.labelling.questions import OF_A_ROUND, labels_wanted, question, served_key
from perlhf.labelling.redact import redacted


def settled(project: ProjectConfig) -> dict[str, str]:
    """The settings that stored questions were made by, as JSON: they can't be changed under them."""
    kept = {"kind": project.kind, "criteria": sorted(project.criteria), "redact": project.redact}
    return {name: json.dumps(value) for name, value in kept.items()}


def check(project: ProjectConfig, file: Path, database: Path) -> None:
    """Compares settings with those that stored questions were made by; a database of before has none and takes these.
    Questions that are there want as many labels as if `overlap` had always been what it is now.

    Args:
        file: that of the settings.

    Raises:
        ConfigError: they differ.
    """
    if not database.is_file():
        return
    store = Store(database)
    try:
        kept, now = store.settle(settled(project)), settled(project)
        for name, was in kept.items():
            if was != now[name]:
                _refuse(name, now[name], was, file)
        rules = project.questions
        store.want(lambda key, source: 1 if OF_A_ROUND.match(source) else labels_wanted(rules, key))
    finally:
        store.close()


def _refuse(name: str, now: str, was: str, file: Path) -> None:
    now, was = (text.replace('"', "") for text in (now, was))
    what = f"{name} is {now}, but questions are stored that were made with {name}: {was}"
    where = read_recipe(file).where((name,))
    hint = f"put {name}: {was} back, or name another directory for a new project"
    if name == "redact":
        hint = f"put {name}: {was} back, then take the labels into another project, of {name}: {now} (label export)"
    raise ConfigError(what, where=where, allowed=f"{name}: {was}", hint=hint)


def as_stored(labels: Iterable[Label], project: ProjectConfig, file: Path) -> list[Label]:
    """Labels of an export, one a line of `file`, as the project stores them: masked where it masks.

    Raises:
        DataError: one fits no question that the project asks.
    """
    found: list[Label | None] = []
    for number, label in enumerate(labels, 1):
        _check_fits(label, project, f"{file}:{number}")
        found.append(_masked(label, project) if project.redact else label)
    return [label for label in found if label is not None]


def _check_fits(label: Label, project: ProjectConfig, where: str) -> None:
    asked, said = label.question, label.said
    if asked.served:  # in a project of any kind
        if said.verdict == "graded":
            raise DataError("a served answer is graded", where=where, allowed="up, down, edited")
        return
    if (len(asked.answers) == 2) != (project.kind == "comparison"):
        what = f"it is about {len(asked.answers)} answers, and the project asks for kind: {project.kind}"
        hint = "take it into a project of the kind that it was exported from"
        raise DataError(what, where=where, allowed=f"labels of kind: {project.kind}", hint=hint)
    if said.verdict not in VERDICTS[project.kind]:
        what = f"verdict is {said.verdict!r} in a project of kind: {project.kind}"
        raise DataError(what, where=where, allowed=", ".join(VERDICTS[project.kind]))
    if said.verdict == "graded" and set(said.grades) != set(project.criteria):
        what = f"grades are of {', '.join(said.grades):.80}"
        raise DataError(what, where=where, allowed="grades of the project's criteria: " + ", ".join(project.criteria))


def _masked(label: Label, project: ProjectConfig) -> Label | None:
    """A label with all texts masked; None where both answers are the same then."""
    asked, said = label.question, label.said
    said = replace(said, reason=redacted(said.reason), span=redacted(said.span), edit=redacted(said.edit))
    found = question(project, asked.prompt, asked.answers, asked.group, asked.source)
    if found is None:
        return None
    if (found.prompt, found.answers) == (asked.prompt, asked.answers):
        return replace(label, said=said, question=replace(asked, group=found.group))
    key = served_key(asked.source, found.key) if asked.served else found.key
    texts = replace(asked, key=key, prompt=found.prompt, answers=found.answers, group=found.group)
    return replace(label, said=said, question=texts)
