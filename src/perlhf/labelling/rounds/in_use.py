"""What people said about served answers (`perlhf serve --project`), and to questions that a project asks besides, as a
round of a loop uses it.
"""

from collections.abc import Sequence
from dataclasses import replace

from perlhf.config.labelling import ProjectConfig
from perlhf.config.stages import DataConfig
from perlhf.data.fields import prompt_group
from perlhf.data.records import Prompt, Text
from perlhf.data.splits import split_of
from perlhf.labelling.labels import Label
from perlhf.labelling.questions import OF_A_ROUND, masked, masked_group
from perlhf.labelling.records import labelled_rows
from perlhf.system.console import note


def teaching(said: Sequence[Label], project: ProjectConfig, data: DataConfig, prompts: Sequence[Prompt]) -> list[Label]:
    """The labels of a round: those about served answers, and of questions from elsewhere, in the groups that its
    prompts have, so that what is held out stays so.

    Thumbs that all go one way would teach a constant: they wait until there are both.

    Args:
        prompts: all of the loop, training prompts first: where several groups begin alike, the last counts.
    """
    known = {prompt_group(masked(one.prompt) if project.redact else one.prompt): one.group for one in prompts}

    def moved(label: Label) -> Label:
        asked = label.question
        if OF_A_ROUND.match(asked.source):
            return label
        group = known.get(prompt_group(asked.prompt), asked.group)
        return replace(label, question=replace(asked, group=group))

    labels = [moved(label) for label in said]
    rows = (row for row, _ in labelled_rows(labels, project, "all"))
    thumbs = [row["label"] for row in rows if "label" in row and split_of(row["group"], data) == "train"]
    if len(set(thumbs)) == 1:
        way = "up" if thumbs[0] else "down"
        note(f"thumbs from serving are all {way} ({len(thumbs)}): they are learned from once there are both")
        return [label for label in labels if label.said.verdict not in ("up", "down")]
    return labels


def keeps_side(prompt: Text, group: str, project: ProjectConfig, data: DataConfig) -> bool:
    """Whether what the project stores of a prompt's group is held out as the group is: masked, it has another hash."""
    stored = masked_group(prompt, group) if project.redact else group
    return (split_of(stored, data) == "train") == (split_of(group, data) == "train")


def choices(labels: Sequence[Label], project: ProjectConfig, data: DataConfig) -> list[Label]:
    """Preferences between served answers to held-out prompts, which measure reward models as held-out questions do."""
    return [
        label
        for row, label in labelled_rows(labels, project, "all")
        if label.question.served and "chosen" in row and split_of(row["group"], data) != "train"
    ]
