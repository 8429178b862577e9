import contextlib
import sqlite3
from itertools import count
from pathlib import Path

import pytest
from forks import forked
from kills import killed_at

from perlhf.errors import RunError
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Said, as_json, from_json
from perlhf.labelling.questions import Question


def question(number: int, wanted: int = 1, known: str | None = None) -> Question:
    return Question(f"k{number}", f"p{number}", ("x", "y"), f"g{number}", "f:1", number / 100, "random", wanted, known)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "labels.sqlite")
    made.add([question(number) for number in range(5)])
    return made


def answer(store: Store, name: str, verdict: str = "first", key: str | None = None) -> str:
    person = store.labeller(name)
    task = store.next_task(person, 60)
    assert task is not None
    store.say(person, task.id, Said(verdict), key or f"key-{task.id}-{person.id}", 1.5)
    return task.question.key


def test_questions_come_in_their_order_once_each(store: Store) -> None:
    assert [answer(store, "Ana") for _ in range(5)] == ["k0", "k1", "k2", "k3", "k4"]
    assert store.next_task(store.labeller("Ana"), 60) is None
    assert store.next_task(store.labeller("Bo"), 60) is None
    assert store.progress() == (5, 5)


def test_an_open_question_is_given_to_nobody_else_until_its_time_is_up(tmp_path: Path) -> None:
    clock = count(0, 10)
    store = Store(tmp_path / "labels.sqlite", now=lambda: next(clock))
    store.add([question(0), question(1)])
    ana, bo, cy = (store.labeller(name) for name in ("Ana", "Bo", "Cy"))
    first, second, none = (store.next_task(person, 100) for person in (ana, bo, cy))
    assert first and second and none is None
    assert {first.question.key, second.question.key} == {"k0", "k1"}
    same = store.next_task(ana, 100)  # a page that is loaded anew has the same question
    assert same is not None and same.id == first.id
    for _ in range(20):
        next(clock)
    taken_over = store.next_task(cy, 100)
    assert taken_over is not None and taken_over.question.key == "k0"


def test_overlap_is_answered_by_two_people_not_by_one_twice(tmp_path: Path) -> None:
    store = Store(tmp_path / "labels.sqlite")
    store.add([question(0, wanted=2)])
    answer(store, "Ana")
    assert store.next_task(store.labeller("Ana"), 60) is None
    assert answer(store, "Bo", "second") == "k0"
    assert store.progress() == (2, 2)


def test_an_answer_that_is_sent_twice_is_stored_once(store: Store) -> None:
    ana = store.labeller("Ana")
    task = store.next_task(ana, 60)
    assert task is not None
    assert store.say(ana, task.id, Said("first"), "the-same-key", 1.0)
    assert not store.say(ana, task.id, Said("first"), "the-same-key", 1.0)
    assert not store.say(ana, task.id, Said("second"), "another-key", 1.0)
    assert [label.said.verdict for label in store.labels()] == ["first"]
    with pytest.raises(RunError, match="isn't yours"):
        store.say(store.labeller("Bo"), task.id, Said("first"), "key-of-bo", 1.0)


def test_undo_opens_the_last_question_again_and_keeps_what_was_said(store: Store) -> None:
    ana = store.labeller("Ana")
    answer(store, "Ana")
    store.next_task(ana, 60)
    again = store.undo(ana)
    assert again is not None and again.question.key == "k0"
    assert store.labels() == [] and store.progress() == (0, 5)
    assert answer(store, "Ana", "second", key="after the undo") == "k0"
    assert [label.said.verdict for label in store.labels()] == ["second"]
    with contextlib.closing(sqlite3.connect(store.path)) as raw:
        assert raw.execute("select count(*) from labels where undone is not null").fetchone() == (1,)
    assert store.undo(store.labeller("Bo")) is None


def test_several_answers_are_taken_back_one_after_the_other_and_given_again(store: Store) -> None:
    ana = store.labeller("Ana")
    for number in range(3):
        answer(store, "Ana", key=f"first time {number}")
    undone = [store.undo(ana) for _ in range(4)]
    assert [task and task.question.key for task in undone] == ["k2", "k1", "k0", None]
    assert store.progress() == (0, 5)
    assert [answer(store, "Ana", "second", f"second time {number}") for number in range(5)] == [
        "k0",
        "k1",
        "k2",
        "k3",
        "k4",
    ]
    assert [label.said.verdict for label in store.labels()] == ["second"] * 5


def test_skipped_questions_go_to_others(store: Store) -> None:
    answer(store, "Ana", "skip")
    assert answer(store, "Ana") == "k1"
    assert answer(store, "Bo") == "k0"
    assert len(store.labels()) == 2 and len(store.labels(skips=True)) == 3


def test_hidden_tests_come_with_their_share_to_everybody(tmp_path: Path) -> None:
    store = Store(tmp_path / "labels.sqlite")
    store.add([question(number) for number in range(80)] + [question(90, known="first"), question(91, known="first")])
    for name in ("Ana", "Bo"):
        person, keys = store.labeller(name), []
        for _ in range(40):
            task = store.next_task(person, 60, test_share=0.2)
            assert task is not None
            keys.append(task.question.key)
            store.say(person, task.id, Said("first"), f"key-{task.id}", 1.0)
        assert {"k90", "k91"} <= set(keys)
    assert store.progress()[0] == 76


def test_a_link_opens_one_labeller_and_a_new_one_replaces_it(store: Store) -> None:
    token = store.invite("Ana", owner=True)
    found = store.by_token(token)
    assert found is not None and (found.name, found.owner) == ("Ana", True)
    newer = store.invite("Ana")
    assert store.by_token(token) is None and store.by_token(newer) is not None
    with contextlib.closing(sqlite3.connect(store.path)) as raw:
        assert newer not in str(raw.execute("select * from labellers").fetchall())


def pair(number: int, prompt: str, *answers: str, known: str | None = None, wanted: int = 1) -> Question:
    return Question(f"k{number}", prompt, answers, prompt, "f:1", number / 100, "random", wanted, known)


def test_a_score_is_explained_after_the_answer_which_then_stays(store: Store) -> None:
    ana, bo = store.labeller("Ana"), store.labeller("Bo")
    for person in (ana, bo):
        with pytest.raises(RunError, match="answer a question first"):
            store.explainable(person)
    store.next_task(ana, 60)
    with pytest.raises(RunError, match="answer a question first"):  # its question is open
        store.explainable(ana)
    answer(store, "Ana")
    task = store.explainable(ana)
    assert task.question.key == "k0"
    with pytest.raises(RunError, match="answer a question first"):
        store.explainable(bo)
    store.undo(ana)
    with pytest.raises(RunError, match="answer a question first"):  # it was looked into, and taken back meanwhile
        store.explained(ana, task)
    answer(store, "Ana", key="again")
    store.explained(ana, task)
    with pytest.raises(RunError, match="it stays"):
        store.undo(ana)
    answer(store, "Ana")
    with pytest.raises(RunError, match="isn't your last"):
        store.explained(ana, task)
    assert store.undo(ana) is not None  # the one after it
    answer(store, "Bo", "skip")
    with pytest.raises(RunError, match="answer a question first"):
        store.explainable(bo)
    assert len(Store(store.path).labels()) == 1


def test_a_hidden_test_and_answers_that_may_be_asked_about_are_not_explained(tmp_path: Path) -> None:
    store = Store(tmp_path / "labels.sqlite")
    store.add([pair(0, "p", "a", "b"), pair(1, "p", "b", "c"), pair(2, "p", "d", "e"), pair(3, "q", "a", "b")])
    ana, bo = store.labeller("Ana"), store.labeller("Bo")
    answer(store, "Ana")
    with pytest.raises(RunError, match="or not yet"):  # p: b is in a question that is open
        store.explainable(ana)
    answer(store, "Bo")
    assert store.explainable(ana).question.key == "k0"
    store.explained(ana, store.explainable(ana))
    store.undo(bo)  # that question would be Ana's after Bo's lease, but she knows
    assert [answer(store, "Ana"), answer(store, "Ana")] == ["k2", "k3"]
    assert store.next_task(ana, 0) is None
    tests = Store(tmp_path / "tests.sqlite")
    tests.add([pair(0, "p", "a", "b", known="first"), pair(1, "q", "a", "b"), pair(2, "q", "b", "c", known="first")])
    cy = tests.labeller("Cy")
    for share in (1.0, 1.0, 0.0):
        task = tests.next_task(cy, 60, test_share=share)
        assert task is not None
        tests.say(cy, task.id, Said("first"), f"key-of-{task.id}", 1.0)
        if task.question.known:
            with pytest.raises(RunError, match="or not yet"):
                tests.explainable(cy)
    assert tests.explainable(cy).question.key == "k1"


def test_a_question_that_is_open_on_the_page_is_not_given_away(tmp_path: Path) -> None:
    clock = iter(range(0, 10_000, 100))
    store = Store(tmp_path / "labels.sqlite", now=lambda: next(clock))
    store.add([pair(0, "p", "a", "b"), pair(1, "p", "b", "c")])
    ana, bo = store.labeller("Ana"), store.labeller("Bo")
    answer(store, "Ana")
    store.next_task(ana, 1)
    task = store.next_task(bo, 1)  # Ana's time is up, but her page still shows it
    assert task is not None and task.question.key == "k1"
    store.say(bo, task.id, Said("first"), "key of Bo", 1.0)
    with pytest.raises(RunError, match="or not yet"):
        store.explainable(ana)


def test_labels_go_into_another_copy_once(store: Store, tmp_path: Path) -> None:
    answer(store, "Ana")
    answer(store, "Bo", "skip")
    said = store.labels(skips=True)
    lines = [as_json(label) for label in said]
    assert "Ana" not in "".join(lines)
    other = Store(tmp_path / "other.sqlite")
    read = [from_json(line) for line in lines]
    assert (other.take(read), other.take(read), store.take(read)) == (2, 0, 0)
    assert [label.said for label in other.labels(skips=True)] == [label.said for label in said]
    assert [label.key for label in other.labels()] == [label.key for label in store.labels()]


def test_a_copy_is_made_while_others_write(store: Store, tmp_path: Path) -> None:
    answer(store, "Ana")
    store.back_up(tmp_path / "copy.sqlite")
    answer(store, "Ana")
    assert len(Store(tmp_path / "copy.sqlite").labels()) == 1


def test_a_newer_database_and_what_is_none_are_refused(store: Store, tmp_path: Path) -> None:
    store.close()
    with contextlib.closing(sqlite3.connect(store.path)) as raw:
        raw.execute("update project set value = '99' where key = 'version'")
        raw.commit()
    with pytest.raises(RunError, match="newer perlhf"):
        Store(store.path)
    (tmp_path / "text.sqlite").write_text("no database, but text that is long enough to be looked at" * 20)
    with pytest.raises(RunError, match="can't be read"):
        Store(tmp_path / "text.sqlite")


def test_two_processes_share_the_file_and_lose_nothing(store: Store) -> None:
    import os

    store.close()

    def work(name: str) -> None:
        own = Store(store.path)
        while own.next_task(own.labeller(name), 600) is not None:
            answer(own, name)
        own.close()

    for process in [forked(lambda name=name: work(name)) for name in ("Ana", "Bo", "Cy")]:
        assert os.waitpid(process, 0)[1] == 0
    assert sorted(label.question.key for label in store.labels()) == ["k0", "k1", "k2", "k3", "k4"]


def test_killed_at_each_write_no_acknowledged_label_is_lost_or_doubled(tmp_path: Path) -> None:
    path, told = tmp_path / "labels.sqlite", tmp_path / "told"
    store = Store(path)
    store.add([question(number) for number in range(40)])
    store.close()

    def work() -> None:
        own = Store(path)
        for _ in range(4):
            key = answer(own, "Ana")
            with open(told, "a") as file:  # acknowledged
                file.write(key + "\n")
        own.close()

    events = ((Store, "next_task"), (Store, "say"))
    killed = [killed_at(number, work, *events) for number in range(1, 13)]
    assert any(killed)
    kept = [label.question.key for label in Store(path).labels()]
    assert set(told.read_text().split()) <= set(kept)
    assert len(kept) == len(set(kept))
