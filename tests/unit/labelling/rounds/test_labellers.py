"""Who answers a round's questions, without any network."""

import re
import threading
import urllib.request
from pathlib import Path

import pytest

from perlhf.config.labelling import ProjectConfig
from perlhf.config.loop import LoopConfig
from perlhf.errors import ServiceError, StorageError
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Said
from perlhf.labelling.questions import Question, question
from perlhf.labelling.rounds import labellers

PROMPT = [{"role": "user", "content": "A large latte to go, please."}]
GOOD, BAD = "Of course! A large latte to go. Anything else?", "Whatever."


def asked(count: int) -> list[Question]:
    found = [question(ProjectConfig(), PROMPT, (GOOD + " " * at, BAD), f"g{at}", "test") for at in range(count)]
    return [one for one in found if one is not None]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "labels.sqlite")


def test_the_simulated_labeller_goes_by_the_rules_and_is_wrong_as_often_as_stated() -> None:
    right = LoopConfig(labeller="simulated")
    questions = asked(400)
    assert {labellers.simulated(one, right) for one in questions} == {"first"}
    noisy = LoopConfig(labeller="simulated", noise=0.1)
    wrong = [one.key for one in questions if labellers.simulated(one, noisy) == "second"]
    assert 24 <= len(wrong) <= 56
    assert wrong == [one.key for one in questions if labellers.simulated(one, noisy) == "second"]
    same = question(ProjectConfig(), PROMPT, (BAD, BAD + " "), "g", "test")
    assert same is not None and labellers.simulated(same, noisy) == "equal"


def test_what_is_answered_is_not_asked_again(store: Store) -> None:
    questions, config = asked(6), LoopConfig(labeller="simulated")
    labellers.label(config, store, questions[:4])
    labellers.label(config, store, questions)
    labellers.label(config, store, questions)
    assert sorted(label.question.key for label in store.labels()) == sorted(one.key for one in questions)
    assert {label.labeller.name for label in store.labels()} == {"simulated"}


def test_a_judge_answers_and_what_it_said_before_it_failed_is_kept(store: Store, serve, monkeypatch) -> None:
    monkeypatch.setattr(labellers, "AT_ONCE", 2)
    seen: list[str] = []

    def answer(request):
        content = request.body["messages"][0]["content"]  # requests come at the same time
        seen.append(content)
        if len(seen) > 4 and len(store.labels()) < 4 and not calm:
            return {"error": "no"}, 400
        first = content.index("Whatever") > content.index("large latte to go. Any")
        return {"choices": [{"message": {"content": "1" if first else "2"}}]}

    calm: list[bool] = []
    config = LoopConfig(labeller="judge", judge=serve(answer), judge_model="large")
    questions = asked(4)
    store.add(questions)
    with pytest.raises(ServiceError):
        labellers.label(config, store, questions)
    assert len(store.labels()) == 2
    calm.append(True)
    labellers.label(config, store, questions)
    labels = store.labels()
    assert [label.said.verdict for label in labels] == ["first"] * 4
    assert {label.labeller.name for label in labels} == {"judge large"}


def test_a_judge_that_answers_rubbish_labels_nothing_and_one_that_does_at_times_is_told(
    store: Store, serve, capfd
) -> None:
    said = ["Reply one."]
    address = serve(lambda request: {"choices": [{"message": {"content": said[0]}}]})
    config, questions = LoopConfig(labeller="judge", judge=address), asked(9)
    store.add(questions)
    with pytest.raises(ServiceError, match="no answer to 8 questions, each asked in both orders, was 1 or 2"):
        labellers.label(config, store, questions)
    assert store.labels() == []
    labellers.label(config, store, questions[:2])  # which a judge may refuse
    assert "4 of the judge's 4 answers were neither 1 nor 2" in capfd.readouterr().err
    said[0] = "1"
    labellers.label(config, store, questions)
    assert [label.said.verdict for label in store.labels()] == ["equal"] * 9 and not capfd.readouterr().err.count(
        "1 nor"
    )


def test_the_page_is_open_beside_the_loop_and_a_taken_port_is_one_sentence(tmp_path: Path, capfd) -> None:
    config = LoopConfig(run=tmp_path / "loop", page=0)
    config.labels.mkdir(parents=True)
    (config.labels / "project.yaml").write_text("questions: {paths: []}\n")
    labellers.open_page(config)
    address = re.search(r"http://127.0.0.1:(\d+)/", capfd.readouterr().out)
    assert address is not None
    with urllib.request.urlopen(f"{address[0]}health", timeout=30) as answer:
        assert answer.status == 200
    with pytest.raises(StorageError, match="can't listen"):
        labellers.open_page(config.model_copy(update={"page": int(address[1])}))


def test_people_are_waited_for_and_a_skip_settles_a_question(store: Store, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(labellers, "LOOK_SECONDS", 0.01)
    questions, config = asked(3), LoopConfig(run=tmp_path / "loop")
    store.add(questions)
    waiting = threading.Thread(target=labellers.label, args=(config, store, questions))
    waiting.start()
    ana = store.labeller("ana")
    for verdict in ("first", "skip", "both_bad"):
        assert waiting.is_alive()
        task = store.next_task(ana, 60)
        assert task is not None and store.say(ana, task.id, Said(verdict), f"key of {task.id}", 1.0)
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    assert f"perlhf label {tmp_path / 'loop' / 'labels'}" in capfd.readouterr().err.replace("\n", "")
