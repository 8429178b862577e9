"""What a round makes of what people said about served answers."""

from pathlib import Path

import pytest

from perlhf.config.labelling import ProjectConfig
from perlhf.config.stages import DataConfig
from perlhf.data.fields import prompt_group
from perlhf.data.records import Prompt
from perlhf.data.splits import split_of
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Said
from perlhf.labelling.questions import question
from perlhf.labelling.rounds import in_use
from perlhf.labelling.rounds.in_use import keeps_side
from perlhf.serving.feedback import Answers, Feedback

DATA = DataConfig(validation=0.3, test=0.3)
HELD = next(f"g{at}" for at in range(99) if split_of(f"g{at}", DATA) != "train")
LEARNED = next(f"g{at}" for at in range(99) if split_of(f"g{at}", DATA) == "train")
COFFEE, TEA = ([{"role": "user", "content": text}] for text in ("A large latte, please.", "Tea!"))


def test_a_round_holds_out_what_its_prompts_hold_out_and_waits_for_both_thumbs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    feedback, answers = Feedback(tmp_path), Answers()
    latte = {"messages": COFFEE, "answer": "A latte."}
    feedback.take({**latte, "thumb": "up"}, answers, "Ana")
    feedback.take({"first": latte, "second": {**latte, "answer": "No."}, "verdict": "first"}, answers, "Ana")
    feedback.take({"messages": TEA, "answer": "Tea.", "thumb": "up"}, answers, "Ana")
    prompts = [Prompt(COFFEE, LEARNED), Prompt("tea", LEARNED), Prompt(COFFEE, HELD)]
    said = feedback.store.labels()
    taught = in_use.teaching(said, feedback.project, DATA, prompts)
    assert [label.said for label in taught] == [said[1].said], "thumbs of one way teach a constant"
    assert "thumbs from serving are all up (1)" in capfd.readouterr().err
    assert [label.question.group for label in in_use.choices(taught, feedback.project, DATA)] == [HELD]
    feedback.take({"messages": TEA, "answer": "No tea.", "thumb": "down"}, answers, "Ana")
    taught = in_use.teaching(feedback.store.labels(), feedback.project, DATA, prompts)
    assert [label.question.group for label in taught] == [HELD, HELD, LEARNED, LEARNED]
    feedback.close()


def test_questions_from_elsewhere_about_a_held_out_prompt_are_not_learned_from(tmp_path: Path) -> None:
    store, project = Store(tmp_path / "labels.sqlite"), ProjectConfig()
    sources = {"own.jsonl:1": LEARNED, "round 1: learn": LEARNED}
    answers = iter((("Yes.", "No."), ("Yes!", "No!")))
    asked = [question(project, COFFEE, next(answers), group, source) for source, group in sources.items()]
    store.add(one for one in asked if one is not None)
    ana = store.labeller("ana")
    while (task := store.next_task(ana, 60)) is not None:
        store.say(ana, task.id, Said("first"), f"key of {task.id}", 1.0)
    taught = in_use.teaching(store.labels(), project, DATA, [Prompt(COFFEE, HELD)])
    assert {one.question.source: one.question.group for one in taught} == sources | {"own.jsonl:1": HELD}
    store.close()


def test_a_masked_group_may_be_on_another_side() -> None:
    masked, plain = ProjectConfig(redact=True), ProjectConfig()
    prompts = [f"mail ana{at}@example.com please" for at in range(40)]
    # Groups that are named are masked; those that are the prompt's own are of the masked prompt.
    for groups, now in ((prompts, "mail [mail address] please"), (list(map(prompt_group, prompts)), None)):
        stored = split_of(now or prompt_group("mail [mail address] please"), DATA)
        kept = [group for prompt, group in zip(prompts, groups, strict=True) if keeps_side(prompt, group, masked, DATA)]
        assert kept == [group for group in groups if (split_of(group, DATA) == "train") == (stored == "train")]
        assert 0 < len(kept) < 40
        assert all(keeps_side(prompt, group, plain, DATA) for prompt, group in zip(prompts, groups, strict=True))
