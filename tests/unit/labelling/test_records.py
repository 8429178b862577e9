import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from perlhf.config.labelling import ProjectConfig, QuestionsConfig
from perlhf.data.read import read_all
from perlhf.data.records import Comparison, Demonstration, Rating
from perlhf.errors import DataError
from perlhf.labelling import records
from perlhf.labelling.labels import Label, Labeller, Said
from perlhf.labelling.progress import agreement, progress
from perlhf.labelling.questions import Question

ANA, BO, CY = (Labeller(i, name, f"labeller-{i}") for i, name in enumerate(("Ana", "Bo", "Cy")))


def label(person: Labeller, verdict: str, question: int = 0, seconds: float = 4.0, **said: Any) -> Label:
    asked = Question(f"k{question}", f"p{question}", ("x", "y"), f"g{question}", "f:1", 0.5)
    return Label(f"{person.id}-{question}", asked, person, Said(verdict, **said), False, seconds, 1_790_000_000.0)


def rows(labels: list[Label], project: ProjectConfig | None = None, overlap: Any = "all") -> list[dict[str, Any]]:
    return [row for row, _ in records.labelled_rows(labels, project or ProjectConfig(), overlap)]


def test_labels_of_one_question_weigh_one_together() -> None:
    found = rows([label(ANA, "first"), label(BO, "second"), label(CY, "equal"), label(ANA, "second", 1)])
    assert [(row["chosen"], row["rejected"], row["weight"], row["annotator"]) for row in found] == [
        ("x", "y", 1 / 3, "labeller-0"),
        ("y", "x", 1 / 3, "labeller-1"),
        ("y", "x", 1.0, "labeller-0"),
    ]


def test_a_majority_stands_for_all_and_a_draw_for_none() -> None:
    three = [label(ANA, "first"), label(BO, "second"), label(CY, "first")]
    assert [(row["chosen"], row["weight"]) for row in rows(three, overlap="majority")] == [("x", 1.0)]
    assert rows(three[:2], overlap="majority") == []


def test_grades_become_thumbs_by_the_projects_rule() -> None:
    project = ProjectConfig(kind="scale", criteria=("helpful", "honest"), up=3.5)
    graded = [
        label(ANA, "graded", grades={"helpful": 5, "honest": 2}),
        label(BO, "graded", 1, grades={"helpful": 4, "honest": 2}),
    ]
    assert [(row["completion"], row["label"]) for row in rows(graded, project)] == [("x", True), ("x", False)]


def test_an_export_is_read_by_every_stage_and_taken_back(tmp_path: Path) -> None:
    said = [label(ANA, "first", edit="a better one", reason="why"), label(BO, "skip", 1), label(BO, "both_bad", 2)]
    numbers = progress(said, [ANA, BO], (2, 5), 4.0)
    counts = records.write(tmp_path / "out", said, ProjectConfig(), numbers)
    assert counts == {"records": 1, "edits": 1, "labels": 3}
    (record,) = read_all(str(tmp_path / "out" / records.RECORDS)).records
    assert isinstance(record, Comparison)
    assert (record.prompt, record.chosen, record.rejected) == ("p0", "x", "y")
    assert (record.group, record.annotator, record.weight) == ("g0", "labeller-0", 1.0)
    (edit,) = read_all(str(tmp_path / "out" / records.EDITS)).records
    assert isinstance(edit, Demonstration) and edit.completion == "a better one"
    assert [one.said for one in records.read(tmp_path / "out")] == [one.said for one in said]
    assert "Ana" not in "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    statement = (tmp_path / "out" / records.STATEMENT).read_text()
    assert "2 of 2 people" in statement and "not known" in statement
    assert "reward model scores it" not in statement
    explaining = ProjectConfig(explain=("runs/reward",))
    assert "reward model scores it" in records.statement(explaining, numbers, 1, "all", [])


def test_ratings_are_read_too(tmp_path: Path) -> None:
    project = ProjectConfig(kind="rating")
    said = [label(ANA, "up"), label(BO, "down", 1)]
    records.write(tmp_path / "out", said, project, progress(said, [ANA, BO], (2, 2), 4.0))
    found = read_all(str(tmp_path / "out" / records.RECORDS)).records
    assert [record.label for record in found if isinstance(record, Rating)] == [True, False]


def test_datasets_opens_what_is_written_for_it(tmp_path: Path) -> None:
    said = [label(ANA, "first"), label(BO, "second", 1)]
    records.write(tmp_path / "out", said, ProjectConfig(), progress(said, [ANA, BO], (2, 2), 4.0), datasets=True)
    found: Any = datasets.load_from_disk(str(tmp_path / "out"))
    assert found["annotator"][:] == ["labeller-0", "labeller-1"]
    assert found["drawn"][:] == ["random", "random"] and found["labelled"][0].startswith("2026-09-21T")


def test_a_damaged_export_names_the_line(tmp_path: Path) -> None:
    (tmp_path / records.LABELS).write_text(json.dumps({"key": 1}) + "\n")
    with pytest.raises(DataError, match=r"labels\.jsonl:1"):
        records.read(tmp_path)
    with pytest.raises(DataError, match="perlhf label export"):
        records.read(tmp_path / "nowhere")


def test_agreement_by_hand() -> None:
    # Two people, four questions, verdicts 11 22 11 12. Coincidences: o11 = 4, o22 = 2, o12 = o21 = 1; n1 = 5, n2 = 3.
    # Observed disagreement 2/8; expected 2 * 5 * 3 / (8 * 7) = 30/56. Alpha = 1 - (2/8) / (30/56) = 8/15.
    pairs = [("first", "first"), ("second", "second"), ("first", "first"), ("first", "second")]
    questions = [[label(ANA, a, i), label(BO, b, i)] for i, (a, b) in enumerate(pairs)]
    assert agreement(questions) == pytest.approx(8 / 15)
    assert agreement([]) is None
    assert agreement(questions[:1]) is None  # no variation: chance agreement can't be told


def test_progress_counts_what_each_did() -> None:
    said = [label(ANA, "first"), label(BO, "second"), label(ANA, "first", 1, seconds=2000.0), label(BO, "skip", 2)]
    numbers = progress(said, [ANA, BO, CY], (3, 10), 4.0)
    ana, bo, cy = numbers.shares
    assert (ana.labels, ana.skipped, ana.agreement, ana.compared) == (2, 0, 0.0, 1)
    assert ana.hours == pytest.approx((4 + 300) / 3600)  # a pause counts as five minutes
    assert (bo.labels, bo.skipped, cy.labels, cy.median_seconds) == (1, 1, 0, 0.0)
    assert numbers.verdicts == {"first": 2, "second": 1}
    assert numbers.left == pytest.approx(2 / 3)


def about(one: Label, **changes: Any) -> Label:
    return replace(one, question=replace(one.question, **changes))


def test_grades_agree_and_pass_tests_by_what_they_become() -> None:
    said = [label(ANA, "graded", i, grades={"helpful": 5}) for i in range(3)]
    said += [label(BO, "graded", i, grades={"helpful": 1}) for i in range(3)]
    said += [label(CY, "graded", i, grades={"helpful": 4}) for i in range(3)]
    said += [about(label(ANA, "graded", i, grades={"helpful": 5}), known="up") for i in (7, 8, 9)]
    said += [about(label(BO, "graded", 7, grades={"helpful": 1}), known="up")]
    numbers = progress(said, [ANA, BO, CY], (9, 9), 4.0)
    ana, bo, cy = numbers.shares
    assert (ana.agreement, ana.compared, bo.agreement, cy.agreement) == (0.5, 6, 0.0, 0.5)
    assert (ana.tests_right, ana.tests, bo.tests_right, bo.tests) == (3, 3, 0, 1)
    assert numbers.verdicts == {"up": 6, "down": 3}
    assert progress(said, [ANA, BO, CY], (9, 9), 4.5).verdicts == {"up": 3, "down": 6}


def test_numbers_count_neither_who_is_left_out_nor_hidden_tests() -> None:
    out = replace(BO, left_out=True)
    said = [label(ANA, "first"), label(out, "second"), label(out, "second", 1), label(out, "skip", 2)]
    said += [label(CY, "second", 1), about(label(ANA, "second", 9), known="first")]
    numbers = progress(said, [ANA, out, CY], (4, 4), 4.0)
    assert (numbers.labels, numbers.left_out) == (4, 2)
    assert numbers.verdicts == {"first": 1, "second": 1} and numbers.left == pytest.approx(1 / 2)
    ana, bo, cy = numbers.shares
    assert (ana.compared, cy.compared, numbers.several) == (0, 0, 0)
    assert (bo.labels, bo.agreement, bo.compared) == (2, 0.5, 2)  # their own row holds them against labels in use


def test_the_statement_names_where_questions_came_from_and_what_applies_to_the_kind() -> None:
    said = [about(label(ANA, "first", i), source=source) for i, source in enumerate(["x/prompts.jsonl:3"] * 2)]
    said += [about(label(BO, "first", 2), source="round 2: to learn from"), label(BO, "second", 2)]
    said += [about(label(BO, "first", 3), source="tests.jsonl:1", known="first")]
    project = ProjectConfig(questions=QuestionsConfig(paths=()))
    numbers = progress(said, [ANA, BO], (3, 3), 4.0)
    text = records.statement(project, numbers, 3, "all", said[:3])
    assert "What was asked: comparison of two answers, blind, sides in random order." in text
    assert "read: round 2 of a loop (1), x/prompts.jsonl (2)." in text
    assert "its start" not in text and "tests.jsonl" not in text
    for other in (ProjectConfig(kind="rating"), ProjectConfig(kind="scale", criteria=("clear", "kind"), up=3.5)):
        text = records.statement(other, numbers, 3, "all", said)
        assert "one answer" in text and "sides" not in text
        assert ("1 to 5 on clear, kind" in text and "3.5 or more is up" in text) == (other.kind == "scale")
