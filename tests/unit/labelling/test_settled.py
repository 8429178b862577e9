"""What can't be changed in a project's settings once questions are stored, and what an import takes."""

import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from perlhf.commands.cli import main
from perlhf.config.labelling import LabelConfig, LabelExportConfig, LabelImportConfig, ProjectConfig
from perlhf.errors import ConfigError, RunError
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Said, as_json
from perlhf.labelling.project import LABELS, PROJECT, bring, export, made, prepared, settings_of, take
from perlhf.labelling.questions import SERVED, Question, question, questions, uniform
from perlhf.labelling.records import LABELS as EXPORTED
from perlhf.labelling.settled import settled
from perlhf.serving.feedback import Answers, Feedback


def rows(file: Path, count: int = 12, begin: int = 0) -> Path:
    found = [
        {"prompt": f"p{at} ana@example.org", "chosen": f"good {at}", "rejected": f"bad {at}", "group": f"g{at}"}
        for at in range(begin, begin + count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def filled(place: Path, **settings: Any) -> Store:
    """A project whose questions are stored."""
    place.mkdir(exist_ok=True)
    said = {"questions": {"paths": [str(rows(place.parent / "rows.jsonl"))]}} | settings
    (place / PROJECT).write_text(yaml.safe_dump(said))
    project = settings_of(LabelConfig(project=place))
    store = Store(place / LABELS)
    bring(project, store, questions(project))
    return store


def changed(place: Path, **settings: Any) -> None:
    said = yaml.safe_load((place / PROJECT).read_text())
    (place / PROJECT).write_text(yaml.safe_dump(said | settings))


def answer(store: Store, name: str, said: Said, key: str) -> None:
    person = store.labeller(name)
    task = store.next_task(person, 60)
    assert task is not None and store.say(person, task.id, said, key, 1.0)


SCALE = {"kind": "scale", "criteria": ["helpful", "honest"]}
CHANGES = {
    "comparison to rating": ({}, {"kind": "rating"}, "kind is rating", "kind: comparison"),
    "rating to comparison": ({"kind": "rating"}, {"kind": "comparison"}, "kind is comparison", "kind: rating"),
    "masked later": ({}, {"redact": True}, "redact is true", "redact: false"),
    "masked no more": ({"redact": True}, {"redact": False}, "redact is false", "redact: true"),
    "other criteria": (SCALE, {"criteria": ["short"]}, "criteria is [short]", "criteria: [helpful, honest]"),
}


@pytest.mark.parametrize("before, after, found, allowed", CHANGES.values(), ids=CHANGES)
def test_what_questions_were_made_by_is_not_changed_under_them(
    before: dict[str, Any], after: dict[str, Any], found: str, allowed: str, tmp_path: Path
) -> None:
    place = tmp_path / "project"
    filled(place, **before).close()
    changed(place, **after)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / EXPORTED).write_text("")
    users: list[Callable[[], object]] = [
        lambda: prepared(LabelConfig(project=place, port=0)),
        lambda: made(place),  # label answers, loop
        lambda: Feedback(place),
        lambda: export(LabelExportConfig(project=place, output=tmp_path / "out")),
        lambda: take(LabelImportConfig(project=place, source=tmp_path / "export")),
    ]
    for use in users:
        with pytest.raises(ConfigError) as caught:
            use()
        error = caught.value
        assert found in error.what and error.allowed == allowed
        assert error.where is not None and error.where.startswith(f"{place / PROJECT}:")
        assert error.hint is not None and allowed in error.hint
    changed(place, **{"redact": False, **before, **({"kind": "comparison"} if "kind" not in before else {})})
    assert made(place).kind == before.get("kind", "comparison")


def test_what_asks_nothing_yet_may_be_changed_and_so_may_the_rest(tmp_path: Path) -> None:
    place = tmp_path / "project"
    made(place)
    Store(place / LABELS).close()
    changed(place, kind="rating")
    assert made(place).kind == "rating"
    changed(place, kind="scale", criteria=["a", "b"])
    store = filled(place, kind="scale", criteria=["a", "b"])
    store.close()
    changed(place, criteria=["b", "a"], up=2.0, title="Which?", lease_minutes=5)
    assert made(place).criteria == ("b", "a")


def test_a_database_of_before_takes_the_settings_of_its_next_opening(tmp_path: Path) -> None:
    place = tmp_path / "project"
    filled(place).close()
    with contextlib.closing(sqlite3.connect(place / LABELS)) as raw:
        raw.execute("delete from project where key in ('kind', 'criteria', 'redact')")
        raw.commit()
    made(place)
    changed(place, kind="rating")
    with pytest.raises(ConfigError, match="kind is rating"):
        made(place)


def test_a_process_that_was_begun_before_a_change_stores_nothing(tmp_path: Path) -> None:
    place = tmp_path / "project"
    early = Feedback(place)
    changed(place, redact=True)
    late = Feedback(place)
    said = {"prompt": "hi", "answer": "mail x@y.org", "thumb": "up"}
    assert late.take(said, Answers(), "Ana")["stored"]
    with pytest.raises(RunError, match="changed after this was started"):
        early.take(said | {"answer": "mail z@y.org"}, Answers(), "Ana")
    assert "z@y.org" not in str(late.store.questions())


def test_overlap_that_is_set_later_is_as_if_it_had_been_so(tmp_path: Path) -> None:
    place = tmp_path / "project"
    store = filled(place, questions={"paths": [str(rows(tmp_path / "rows.jsonl"))], "overlap": 0.0})
    other = question(ProjectConfig(), "p", ("a", "b"), "g", "round 1: learn")
    served = Question("served", "p", ("a",), "g", "serve:m@1", 0.5, SERVED, 0)
    assert other is not None
    store.add([other, served])
    assert store.progress() == (0, 13)
    changed(place, questions={"paths": [str(tmp_path / "rows.jsonl")], "overlap": 0.5})
    project = made(place)
    want = {one.key: one.wanted for one in questions(project)} | {other.key: 1, "served": 0}
    assert {one.key: one.wanted for one in store.questions().values()} == want
    assert 2 in want.values() and 1 in want.values()
    assert sum(uniform(0, "overlap", key) < 0.5 for key in list(want)[:12]) == list(want.values())[:12].count(2)
    twice = {key for key, number in want.items() if number == 2}
    for name in ("Ana", "Bo"):
        for number in range(40):
            person = store.labeller(name)
            task = store.next_task(person, 60)
            if task is not None:
                store.say(person, task.id, Said("first"), f"key {name} {number}", 1.0)
    changed(place, questions={"paths": [str(tmp_path / "rows.jsonl")], "overlap": 0.0})
    made(place)
    assert {one.key for one in store.questions().values() if one.wanted == 2} == twice, "they have two labels"
    assert store.progress() == (13 + len(twice), 13 + len(twice))


def test_what_else_is_changed_counts_for_new_questions_alone(tmp_path: Path) -> None:
    place, file = tmp_path / "project", rows(tmp_path / "rows.jsonl")
    asks = {"paths": [str(file)], "limit": 4}
    store = filled(place, questions=asks)
    first = store.questions()
    assert len(first) == 4
    tests = [str(rows(tmp_path / "tests.jsonl", count=12, begin=6))]
    for more in ({"limit": 2}, {"limit": 2, "tests": tests}, {"limit": 6, "tests": tests, "seed": 9}, {"limit": 6}):
        there = store.questions()
        changed(place, questions=asks | more)
        project = made(place)
        bring(project, store, questions(project))
        now = store.questions()
        assert {number: now[number] for number in there} == there, "nothing that is stored changes"
    ordinary = {one.prompt for one in first.values()}
    hidden = {one.prompt for one in now.values() if one.known is not None}
    assert hidden == {f"p{at} ana@example.org" for at in range(6, 18)} - ordinary and len(hidden) < 12
    assert len(now) - len(hidden) > 4, "a larger limit adds what it lets in"


# imports


def exported(tmp_path: Path, **settings: Any) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A project, its export of two labels, and the rows of that."""
    place, out = tmp_path / "project", tmp_path / "out"
    store = filled(place, **settings)
    kind = settings.get("kind", "comparison")
    said = {"comparison": Said("first"), "rating": Said("up"), "scale": Said("graded", grades={"a": 4, "b": 2})}[kind]
    answer(store, "Ana", said, "key of Ana 1")
    answer(store, "Ana", said, "key of Ana 2")
    store.close()
    export(LabelExportConfig(project=place, output=out))
    return place, out, [json.loads(line) for line in (out / EXPORTED).read_text().splitlines()]


def copy(place: Path, **settings: Any) -> Path:
    place.mkdir()
    (place / PROJECT).write_text(yaml.safe_dump({"questions": {"paths": []}} | settings))
    return place


def test_what_a_person_changed_stands_once_in_every_copy(tmp_path: Path) -> None:
    place, old, _ = exported(tmp_path)
    store = Store(place / LABELS)
    store.undo(store.labeller("Ana"))
    answer(store, "Ana", Said("second"), "key of Ana 3")
    export(LabelExportConfig(project=place, output=tmp_path / "new"))
    for at, order in enumerate(([old, tmp_path / "new"], [tmp_path / "new", old])):
        target = copy(tmp_path / f"copy {at}")
        counts = [take(LabelImportConfig(project=target, source=source)) for source in (*order, *order)]
        assert counts == ([2, 1, 0, 0] if at == 0 else [2, 0, 0, 0])
        there = Store(target / LABELS)
        assert [label.said.verdict for label in there.labels()] == ["first", "second"]
        assert there.progress() == (2, 2)
        assert take(LabelImportConfig(project=place, source=old)) == 0
    assert [label.said.verdict for label in store.labels()] == ["first", "second"]
    # Through a third copy she is still the same person.
    export(LabelExportConfig(project=tmp_path / "copy 0", output=tmp_path / "again"))
    assert take(LabelImportConfig(project=place, source=tmp_path / "again")) == 0
    assert [person.name for person in store.people()] == ["Ana"]
    third = copy(tmp_path / "third")
    take(LabelImportConfig(project=third, source=old))
    take(LabelImportConfig(project=third, source=tmp_path / "again"))
    assert [label.said.verdict for label in Store(third / LABELS).labels()] == ["first", "second"]


def test_a_question_that_is_open_here_has_the_answer_that_was_taken(tmp_path: Path) -> None:
    place, _, _ = exported(tmp_path)
    store = Store(place / LABELS)
    store.back_up(tmp_path / "copy.sqlite")
    ana = store.labeller("Ana")
    task = store.next_task(ana, 60)
    there = Store(tmp_path / "copy.sqlite")
    answer(there, "Ana", Said("second"), "said in the copy")
    assert task is not None and store.take(there.labels()) == 1
    waiting = store.next_task(ana, 60)
    assert waiting is not None and waiting.id != task.id, "it is asked no more"
    assert [label.said.verdict for label in store.labels()] == ["first", "first", "second"]
    # What she says on the page that shows it still is her last word.
    assert store.say(ana, task.id, Said("equal"), "said here", 1.0)
    assert not store.say(ana, task.id, Said("equal"), "said here", 1.0)
    assert not store.say(ana, task.id, Said("first"), "said here again", 1.0)
    assert [label.said.verdict for label in store.labels()] == ["first", "first", "equal"]
    assert store.progress()[0] == 3 and store.take(there.labels()) == 0


def test_texts_with_every_end_of_line_come_back(tmp_path: Path) -> None:
    place, _, _ = exported(tmp_path)
    store = Store(place / LABELS)
    reason = "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"
    answer(store, "Ana", Said("first", reason=reason), "key of Ana 3")
    export(LabelExportConfig(project=place, output=tmp_path / "new"))
    target = copy(tmp_path / "copy")
    assert take(LabelImportConfig(project=target, source=tmp_path / "new")) == 3
    assert Store(target / LABELS).labels()[-1].said.reason == reason


def with_question(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: row | {"question": row["question"] | values}


def with_label(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: row | values


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "seconds in words": (with_label(seconds="long"), "seconds is 'long'"),
    "no number": (with_question(place=float("nan")), "question.place is nan"),
    "an endless number": (with_label(stored=float("inf")), "stored is inf"),
    "a place beyond": (with_question(place=2), "question.place is 2"),
    "a huge number": (with_question(wanted=10**30), "question.wanted is 1000000"),
    "a time that is none": (with_label(stored=1e15), "stored is 1000000000000000.0"),
    "negative seconds": (with_label(seconds=-1), "seconds is -1"),
    "a flag for a number": (with_label(seconds=True), "seconds is True"),
    "graded without grades": (with_label(verdict="graded"), "verdict is 'graded' of 2 answers"),
    "grades that are none": (with_label(grades={"a": 9}), "grades['a'] is 9"),
    "grades of a comparison": (with_label(grades={"a": 3}), "verdict is 'first' with the grades"),
    "a reason that is a number": (with_label(reason=7), "reason is 7"),
    "an edit that is a number": (with_label(edit=5), "edit is 5"),
    "another verdict": (with_label(verdict="banana"), "verdict is 'banana'"),
    "a list of verdicts": (with_label(verdict=["first"]), "verdict is ['first']"),
    "a thumb for two": (with_label(verdict="up"), "verdict is 'up' of 2 answers"),
    "a prompt that is a number": (with_question(prompt=5), "question.prompt is 5"),
    "messages that are none": (with_question(prompt=[5]), "question.prompt is [5]"),
    "a role that is none": (with_question(prompt=[{"role": "x", "content": "y"}]), "message of role 'x'"),
    "answers in one text": (with_question(answers="ab"), "question.answers is 'ab'"),
    "an answer that is a number": (with_question(answers=["a", 5]), "question.answers[1] is 5"),
    "three answers": (with_question(answers=["a", "b", "c"]), "question.answers is ['a', 'b', 'c']"),
    "the same answer twice": (with_question(answers=["a", "a"]), "question.answers is ['a', 'a']"),
    "half a surrogate pair": (with_label(key="\ud800"), "unexpected end of hex escape"),
    "an empty key": (with_label(key=""), "key is ''"),
    "a name that is none": (with_label(labeller="\x1b[2J"), "labeller is '\\x1b[2J'"),
    "drawn in another way": (with_question(drawn="first"), "question.drawn is 'first'"),
    "a test without a verdict": (with_question(known="yes"), "question.known is 'yes'"),
    "a served answer to be asked": (with_question(drawn="served"), "question.wanted is 1"),
    "another key": (with_label(mood="good"), "mood is no key of a label"),
    "a key less": (lambda row: {key: row[key] for key in row if key != "turned"}, "turned is missing"),
    "a list": (lambda row: [row], "no label: [{"),
    "too deep": (lambda row: "[" * 10**5, "no label: "),
    "another question's key": (with_question(prompt="another"), "with another prompt or other answers"),
}


@pytest.mark.parametrize("damage, said", WRONG.values(), ids=WRONG)
def test_a_line_that_is_no_label_is_one_sentence_and_takes_nothing(
    damage: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, (first, second) = exported(tmp_path)
    bad = damage(second | {"question": first["question"] if "another" in said else second["question"]})
    lines = [json.dumps(first), bad if isinstance(bad, str) else json.dumps(bad)]
    (out / EXPORTED).write_text("\n".join(lines) + "\n")
    target = copy(tmp_path / "copy")
    assert main(["label", "import", str(target), str(out)]) == 2
    told = capsys.readouterr().err
    assert said in told.replace("\\\\", "\\"), told
    assert "allowed: " in told and "disk" not in told and "file can be called" not in told
    assert "another prompt" in said or f"{EXPORTED}:2" in told
    store = Store(target / LABELS)
    assert store.labels() == [] and store.people() == [] and store.questions() == {}
    (out / EXPORTED).write_text(lines[0] + "\n")
    assert main(["label", "import", str(target), str(out)]) == 0
    assert main(["label", "export", str(target), str(tmp_path / "after")]) == 0


KINDS = {
    "a comparison in a scale": ({}, SCALE, "about 2 answers, and the project asks for kind: scale"),
    "a thumb in a comparison": ({"kind": "rating"}, {}, "about 1 answers, and the project asks for kind: comparison"),
    "a thumb in a scale": ({"kind": "rating"}, SCALE, "verdict is 'up' in a project of kind: scale"),
    "other criteria": ({"kind": "scale", "criteria": ["a", "b"]}, SCALE, "grades are of a, b"),
}


@pytest.mark.parametrize("source, settings, said", KINDS.values(), ids=KINDS)
def test_labels_of_another_kind_of_project_are_refused(
    source: dict[str, Any],
    settings: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, _ = exported(tmp_path, **source)
    target = copy(tmp_path / "copy", **settings)
    assert main(["label", "import", str(target), str(out)]) == 2
    told = capsys.readouterr().err
    assert said in told and f"{EXPORTED}:1" in told
    assert Store(target / LABELS).questions() == {}


@pytest.mark.parametrize("kind", ["rating", "scale"])
def test_exports_of_every_kind_go_into_another_copy(kind: str, tmp_path: Path) -> None:
    settings = {"kind": kind} | ({"criteria": ["a", "b"]} if kind == "scale" else {})
    place, out, _ = exported(tmp_path, **settings)
    target = copy(tmp_path / "copy", **settings)
    assert take(LabelImportConfig(project=target, source=out)) == 2
    assert [one.said for one in Store(target / LABELS).labels()] == [one.said for one in Store(place / LABELS).labels()]


def test_a_project_that_masks_masks_what_it_takes(tmp_path: Path) -> None:
    place, _, _ = exported(tmp_path)
    store = Store(place / LABELS)
    answer(store, "Ana", Said("first", "ask bo@example.org", "cy@example.org", "dee@example.org"), "key of Ana 3")
    export(LabelExportConfig(project=place, output=tmp_path / "new"))
    target = tmp_path / "copy"
    there = filled(target, redact=True)
    assert take(LabelImportConfig(project=target, source=tmp_path / "new")) == 3
    told = "".join(as_json(label) for label in there.labels())
    assert "example.org" not in told and told.count("[mail address]") == 6
    assert len(there.questions()) == 12, "the same questions as those that it asks itself"


def test_what_comes_back_masked_asks_nothing_anew(tmp_path: Path) -> None:
    place, out, _ = exported(tmp_path)
    target = copy(tmp_path / "copy", redact=True)
    assert take(LabelImportConfig(project=target, source=out)) == 2
    export(LabelExportConfig(project=target, output=tmp_path / "masked"))
    assert take(LabelImportConfig(project=place, source=tmp_path / "masked")) == 0
    assert len(Store(place / LABELS).questions()) == 12


def test_settings_are_kept_by_a_copy_that_was_filled_by_an_import(tmp_path: Path) -> None:
    _, out, _ = exported(tmp_path)
    target = copy(tmp_path / "copy")
    take(LabelImportConfig(project=target, source=out))
    assert Store(target / LABELS).settle(settled(ProjectConfig())) == settled(ProjectConfig())
    changed(target, kind="rating")
    with pytest.raises(ConfigError, match="kind is rating"):
        made(target)


def test_the_command_says_what_was_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "project"
    filled(place).close()
    changed(place, kind="rating")
    assert main(["label", "export", str(place), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert f"{place / PROJECT}:1: kind is rating" in told and "allowed: kind: comparison" in told
