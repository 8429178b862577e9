"""What people say about served answers, from a request's body to records that stages read."""

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kills import killed_at

from perlhf.config.labelling import LabelConfig, LabelExportConfig, ProjectConfig, QuestionsConfig
from perlhf.data.fields import prompt_group
from perlhf.data.read import read_all
from perlhf.data.records import Comparison, Demonstration, Rating
from perlhf.errors import ConfigError, PerlhfError, RunError
from perlhf.labelling import records
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Said
from perlhf.labelling.progress import progress
from perlhf.labelling.project import export, settings_of
from perlhf.labelling.questions import question
from perlhf.serving.feedback import Answers, Feedback

TALK = [{"role": "user", "content": "A large latte, please."}]
GOOD, BAD = "A large latte. Anything else?", "No."


@pytest.fixture
def answers() -> Answers:
    found = Answers()
    for index, text in enumerate((GOOD, BAD)):
        found.remember("chatcmpl-1", index, TALK, text, "policy", 3)
    return found


@pytest.fixture
def feedback(tmp_path: Path) -> Any:
    opened = Feedback(tmp_path / "project")
    yield opened
    opened.close()


def one(**said: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "index": 0, **said}


def two(verdict: str, **said: Any) -> dict[str, Any]:
    sides = {name: {"id": "chatcmpl-1", "index": at} for at, name in enumerate(("first", "second"))}
    return {**sides, "verdict": verdict, **said}


def test_thumbs_choices_and_edits_are_exported_together_and_read(feedback: Feedback, answers: Answers, tmp_path: Path):
    said = feedback.take(one(thumb="up", reason="polite"), answers, "Ana")
    expected = {"stored": True, "new": True, "verdict": "up", "source": "serve:policy@3"}
    assert said == {"object": "feedback"} | expected
    feedback.take(one(index=1, thumb="down", edit="A large latte, of course.", user="Bo"), answers, "Ana")
    feedback.take(two("first"), answers, "Ana")
    feedback.take(two("equal"), answers, "Bo")
    counts = export(LabelExportConfig(project=tmp_path / "project", output=tmp_path / "out"))
    assert counts == {"records": 3, "edits": 1, "labels": 4}
    up, down, chosen = read_all(str(tmp_path / "out" / records.RECORDS)).records
    assert isinstance(up, Rating) and isinstance(down, Rating) and isinstance(chosen, Comparison)
    assert (up.label, up.completion, up.source, up.weight) == (True, GOOD, "serve:policy@3", 1.0)
    assert (down.label, down.completion) == (False, BAD)
    assert (chosen.chosen, chosen.rejected, chosen.weight) == (GOOD, BAD, 0.5)
    assert list(chosen.prompt) == TALK and {up.group, chosen.group} == {prompt_group(TALK)}
    (edit,) = read_all(str(tmp_path / "out" / records.EDITS)).records
    assert isinstance(edit, Demonstration) and edit.completion == "A large latte, of course."
    statement = (tmp_path / "out" / records.STATEMENT).read_text()
    assert "Said about served answers, besides: 4, of serve:policy@3 (2), serve:policy@3,serve" not in statement
    assert "besides: 4, of serve:policy@3 (2), serve:policy@3,policy@3 (2)." in statement
    assert "served (3)" in statement and "Ana" not in statement


def test_the_export_as_datasets_is_read_too(feedback: Feedback, answers: Answers, tmp_path: Path) -> None:
    feedback.take(one(thumb="up"), answers, "Ana")
    feedback.take(two("second"), answers, "Ana")
    export(LabelExportConfig(project=tmp_path / "project", output=tmp_path / "out", format="datasets"))
    rated, compared = read_all(str(tmp_path / "out")).records
    assert isinstance(rated, Rating) and isinstance(compared, Comparison) and compared.chosen == BAD


def test_answers_in_full_need_no_memory(feedback: Feedback) -> None:
    full = {"messages": TALK, "answer": GOOD, "model": "sft"}
    feedback.take({**full, "thumb": "down"}, Answers(), "Ana")
    parts = [{"role": "user", "content": [{"type": "text", "text": TALK[0]["content"]}]}]
    second = {"messages": parts, "answer": BAD}
    feedback.take({"first": full, "second": second, "verdict": "second"}, Answers(), "Ana")
    feedback.take({"prompt": "Once upon", "answer": " a time.", "thumb": "up"}, Answers(), "Ana")
    found = feedback.store.labels()
    assert [label.question.source for label in found[::2]] == ["serve:sft", "serve:unknown"]
    (row,) = [row for row, label in records.labelled_rows(found, feedback.project, "all") if "chosen" in row]
    assert (row["chosen"], row["rejected"]) == (BAD, GOOD)


def test_the_same_pair_is_the_same_question_whichever_comes_first(feedback: Feedback, answers: Answers) -> None:
    feedback.take(two("first"), answers, "Ana")
    turned = {"first": {"id": "chatcmpl-1", "index": 1}, "second": {"id": "chatcmpl-1"}, "verdict": "first"}
    feedback.take(turned, answers, "Bo")
    ana, bo = feedback.store.labels()
    assert ana.question.key == bo.question.key and {ana.said.verdict, bo.said.verdict} == {"first", "second"}
    chosen = [row["chosen"] for row, _ in records.labelled_rows([ana, bo], feedback.project, "all")]
    assert chosen == [GOOD, BAD]


def test_what_is_said_again_takes_the_place_of_what_was_said(feedback: Feedback, answers: Answers) -> None:
    assert feedback.take(one(thumb="up"), answers, "Ana")["new"]
    assert not feedback.take(one(thumb="up"), answers, "Ana")["new"]
    assert feedback.take(one(edit="Better."), answers, "Ana")["new"]
    (label,) = feedback.store.labels()
    assert (label.said.verdict, label.said.edit) == ("up", "Better.")
    feedback.take(one(thumb="down"), answers, "Ana")
    feedback.take(one(thumb="up"), answers, "Bo")
    feedback.take(one(thumb="up"), answers, "Ana")
    feedback.take(one(edit="Mine."), answers, "Cy")
    rows = records.labelled_rows(feedback.store.labels(), feedback.project, "all")
    assert [row["weight"] for row, _ in rows] == [0.5, 0.5], "an edit alone takes nobody's share"
    bo, ana, _ = feedback.store.labels()
    assert (bo.labeller.name, ana.labeller.name) == ("Bo", "Ana")
    assert (ana.said.verdict, ana.said.edit) == ("up", "Better.")


def test_a_key_sent_twice_is_stored_once(feedback: Feedback, answers: Answers) -> None:
    said = [feedback.take(one(thumb="up", key="k"), answers, "Ana") for _ in range(2)]
    assert [found["new"] for found in said] == [True, False]
    feedback.take(one(thumb="down"), answers, "Ana")
    assert not feedback.take(one(thumb="up", key="k"), answers, "Ana")["new"], "a request that comes late"
    (label,) = feedback.store.labels()
    assert label.said.verdict == "down"
    feedback.take(one(thumb="up", key="k"), answers, "Bo")
    with pytest.raises(RunError, match="something else"):
        feedback.take(one(index=1, thumb="up", key="k"), answers, "Ana")
    assert len(feedback.store.labels()) == 2


def test_many_at_once(feedback: Feedback, answers: Answers) -> None:
    bodies = [one(thumb="up", key=f"k{at % 8}", user=f"u{at % 8}") for at in range(32)]
    threads = [threading.Thread(target=feedback.take, args=(body, answers, "Ana")) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(label.labeller.name for label in feedback.store.labels()) == [f"u{at}" for at in range(8)]


def test_a_project_that_redacts_stores_no_address(tmp_path: Path) -> None:
    settings_of(LabelConfig(project=tmp_path / "project", redact=True))
    feedback, mail = Feedback(tmp_path / "project"), "ana@example.org"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": mail}}]}
    messages = [{"role": "user", "content": f"Write to {mail}"}, call, {"role": "tool", "content": mail}]
    full = {"messages": messages, "answer": f"Sent to {mail}."}
    feedback.take({**full, "thumb": "up", "edit": f"To {mail}: sent.", "reason": mail}, Answers(), "Ana")
    feedback.take({"first": full, "second": {**full, "answer": "No."}, "verdict": "equal"}, Answers(), "Ana")
    with pytest.raises(ConfigError, match="same text"):
        other = {**full, "answer": "Sent to bo@example.org."}
        feedback.take({"first": full, "second": other, "verdict": "first"}, Answers(), "Ana")
    feedback.close()
    for file in (tmp_path / "project").iterdir():
        assert b"example" not in file.read_bytes()


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "id"),
        ({"id": "chatcmpl-1"}, "thumb"),
        ({"id": "chatcmpl-1", "thumb": "sideways"}, "thumb"),
        ({"id": "chatcmpl-1", "edit": " "}, "thumb"),
        ({"id": "chatcmpl-1", "index": True, "thumb": "up"}, "index"),
        ({"id": "chatcmpl-1", "index": 7, "thumb": "up"}, "id"),
        ({"id": "chatcmpl-9", "thumb": "up"}, "id"),
        ({"id": 3, "thumb": "up"}, "id"),
        ({"id": "chatcmpl-1", "thumbs": "up"}, "thumbs"),
        ({"id": "chatcmpl-1", "thumb": "up", "edit": 3}, "edit"),
        ({"id": "chatcmpl-1", "thumb": "up", "user": "a\tb\0"}, "user"),
        ({"id": "chatcmpl-1", "thumb": "up", "answer": "x"}, "answer"),
        ({"id": "chatcmpl-1", "thumb": "up", "reason": "\ud800"}, "body"),
        ({"answer": "x", "thumb": "up"}, "messages"),
        ({"messages": [], "answer": "x", "thumb": "up"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}], "answer": "x", "thumb": "up"}, "messages"),
        ({"messages": [{"role": "user", "content": " "}], "answer": "x", "thumb": "up"}, "messages"),
        ({"messages": TALK, "thumb": "up"}, "answer"),
        ({"first": {"id": "chatcmpl-1"}, "verdict": "first"}, "second"),
        ({"first": {"id": "chatcmpl-1"}, "second": {"id": "chatcmpl-1"}, "verdict": "first"}, "second"),
        ({"first": {"id": "chatcmpl-1"}, "second": {"id": "chatcmpl-9"}, "verdict": "first"}, "second.id"),
        ({"first": {"id": "chatcmpl-1"}, "second": {"id": "chatcmpl-1", "index": 1}}, "verdict"),
        ({"first": {"id": "chatcmpl-1"}, "second": {"prompt": "?", "answer": "x"}, "verdict": "first"}, "second"),
        (["up"], "body"),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_the_key(
    body: Any, where: str, feedback: Feedback, answers: Answers
) -> None:
    with pytest.raises(ConfigError) as caught:
        feedback.take(body, answers, "Ana")
    assert caught.value.where == where and "\n" not in caught.value.what
    assert where.rpartition(".")[2] in caught.value.what or where == "second"
    assert feedback.store.labels() == []


_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=5))
_LEAVES |= st.sampled_from(["chatcmpl-1", "up", "first", "equal", "user", "assistant", "\ud800", "\0", "a@b.org"])
_NAMES = st.sampled_from(
    "id index thumb edit reason user key first second verdict messages prompt answer model role content".split()
) | st.text(max_size=3)
_JSON = st.recursive(
    _LEAVES, lambda more: st.lists(more, max_size=3) | st.dictionaries(_NAMES, more, max_size=4), max_leaves=8
)


def mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 11).flatmap(lambda drawn: right if drawn else _JSON)


_WORDS = st.text(max_size=20)
_ROLES = st.sampled_from(["user", "assistant", "system", "tool", "developer"])
_CALLS = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": _WORDS}, optional={"x": _JSON})}))
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": mostly(st.sampled_from(["user", "assistant", "system", "tool", "developer"])),
            "content": mostly(_WORDS),
        },
        optional={"tool_calls": mostly(_CALLS), "name": mostly(_WORDS)},
    ),
    min_size=1,
    max_size=3,
)
_FULL = st.fixed_dictionaries({"messages": mostly(_MESSAGES), "answer": mostly(_WORDS)})
_SERVED = st.builds(lambda at: {"id": "chatcmpl-1", "index": at}, st.integers(0, 1))
_ANSWER = mostly(_FULL | _SERVED | st.just({"prompt": "Once", "answer": "upon"}))
_SAYS = st.fixed_dictionaries(
    {},
    optional={"edit": mostly(_WORDS), "reason": mostly(_WORDS), "user": mostly(st.just("Bo")), "key": mostly(_WORDS)},
)
_VERDICTS = mostly(st.sampled_from(["first", "second", "equal", "both_bad"]))
_PAIR = st.fixed_dictionaries({"first": _ANSWER, "second": _ANSWER, "verdict": _VERDICTS})
_PAIR |= st.builds(
    lambda full, others, verdict: {"first": full, "second": {**full, "answer": others}, "verdict": verdict},
    _FULL,
    _WORDS,
    _VERDICTS,
)
_SINGLE = st.builds(
    lambda answer, thumb: {**(answer if isinstance(answer, dict) else {}), "thumb": thumb},
    _ANSWER,
    mostly(st.sampled_from(["up", "down"])),
)
_BODIES = st.builds(lambda body, says: {**body, **says}, _PAIR | _SINGLE, _SAYS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=mostly(_BODIES))
def test_any_json_is_stored_or_refused_and_what_is_stored_is_read(
    body: Any, tmp_path_factory: pytest.TempPathFactory, fuzzed: Feedback, answers: Answers
) -> None:
    try:
        fuzzed.take(body, answers, "Ana")
    except PerlhfError:
        return
    output = tmp_path_factory.mktemp("export")
    labels = fuzzed.store.labels()[-1:]
    numbers = progress(labels, fuzzed.store.people(), fuzzed.store.progress(), 4.0)
    counts = records.write(output / "out", labels, fuzzed.project, numbers)
    for name, file in (("records", records.RECORDS), ("edits", records.EDITS)):
        if counts[name]:
            assert len(read_all(str(output / "out" / file)).records) == counts[name]
    assert [one.question for one in records.read(output / "out")] == [one.question for one in labels]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    opened = Feedback(tmp_path_factory.mktemp("fuzzed") / "project")
    yield opened
    opened.close()


def test_the_page_and_its_numbers_are_not_disturbed(answers: Answers, tmp_path: Path) -> None:
    place = tmp_path / "project"
    settings_of(LabelConfig(project=place, settings=ProjectConfig(questions=QuestionsConfig(overlap=0.5))))
    store = Store(place / "labels.sqlite")
    asked = question(ProjectConfig(), TALK, (GOOD, BAD), "their own group", "file:1")
    assert asked is not None
    feedback = Feedback(place)
    store.add([asked])
    ana = store.labeller("Ana")
    task = store.next_task(ana, 60)
    assert task is not None
    store.say(ana, task.id, Said("first"), "a key of the page", 4.0)
    before = progress(store.labels(skips=True), store.people(), store.progress(), 4.0)
    for index in range(2):
        feedback.take(one(index=index, thumb="down"), answers, "Ana")
    feedback.take(two("both_bad"), answers, "Ana")
    assert store.next_task(ana, 60) is None and store.next_task(store.labeller("Bo"), 60) is None
    after = progress(store.labels(skips=True), store.people()[:1], store.progress(), 4.0)
    assert after.served == {"serve:policy@3": 2, "serve:policy@3,policy@3": 1} and after.shares[0].served == 3
    same = ("labels", "wanted", "alpha", "several", "verdicts", "left")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    for name in ("labels", "skipped", "median_seconds", "hours", "compared"):
        assert getattr(after.shares[0], name) == getattr(before.shares[0], name)
    assert {label.question.group for label in store.labels()} == {"their own group"}
    undone = store.undo(ana)
    assert undone is not None and undone.question.key == asked.key, "the page takes back what was said on it"
    assert len(store.labels()) == 3
    feedback.close()
    store.close()


def test_graded_projects_take_thumbs(answers: Answers, tmp_path: Path) -> None:
    settings_of(LabelConfig(project=tmp_path, settings=ProjectConfig(kind="scale", criteria=("helpful",))))
    feedback = Feedback(tmp_path)
    for name in ("Ana", "Bo"):
        feedback.take(one(thumb="up"), answers, name)
    assert export(LabelExportConfig(project=tmp_path, output=tmp_path / "out"))["records"] == 2
    feedback.close()


def test_an_empty_answer_is_kept_and_nobody_learns_from_it(feedback: Feedback, tmp_path: Path) -> None:
    full = {"messages": TALK, "answer": ""}
    feedback.take({**full, "thumb": "down", "edit": "Yes."}, Answers(), "Ana")
    counts = export(LabelExportConfig(project=tmp_path / "project", output=tmp_path / "out"))
    assert counts == {"records": 0, "edits": 1, "labels": 1}


def test_killed_around_each_write_nothing_acknowledged_is_lost_or_doubled(answers: Answers, tmp_path: Path) -> None:
    told = tmp_path / "told"
    Feedback(tmp_path / "project").close()

    def work() -> None:
        own = Feedback(tmp_path / "project")
        for number in range(6):
            own.take(one(thumb="up", user=f"u{number}", key=f"k{number}"), answers, "Ana")
            with open(told, "a") as file:  # acknowledged
                file.write(f"u{number}\n")
        own.close()

    killed = [killed_at(number, work, (Store, "tell")) for number in range(1, 13)]
    assert any(killed)
    store = Store(tmp_path / "project" / "labels.sqlite")
    kept = [label.labeller.name for label in store.labels()]
    assert set(told.read_text().split()) <= set(kept) and sorted(kept) == [f"u{number}" for number in range(6)]
    store.close()


def test_an_export_goes_into_another_copy(feedback: Feedback, answers: Answers, tmp_path: Path) -> None:
    feedback.take(one(thumb="up"), answers, "Ana")
    feedback.take(one(thumb="down"), answers, "Ana")
    export(LabelExportConfig(project=tmp_path / "project", output=tmp_path / "out"))
    other = Store(tmp_path / "other.sqlite")
    labels = records.read(tmp_path / "out")
    assert (other.take(labels), other.take(labels)) == (1, 0)
    assert [label.said.verdict for label in other.labels()] == ["down"] and other.progress() == (0, 0)
    other.close()


def test_answers_are_bounded_by_number_and_bytes() -> None:
    few = Answers(most=2)
    for at in range(3):
        few.remember("r", at, "p", str(at), "m", 1)
    assert [few.find("r", at) is None for at in range(3)] == [True, False, False]
    small = Answers(most_bytes=100)
    small.remember("a", 0, "p" * 40, "", "m", 1)
    small.remember("b", 0, "p" * 40, "", "m", 1)
    small.remember("b", 0, "p" * 30, "t" * 20, "m", 1)
    assert small.find("a", 0) is not None
    small.remember("c", 0, "p" * 40, "", "m", 1)
    assert small.find("a", 0) is None and small.find("c", 0) is not None
    small.remember("d", 0, "p" * 101, "", "m", 1)
    assert small.find("d", 0) is None
