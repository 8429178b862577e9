"""The process that explains scores: beside `perlhf score --explain`, with what it can't do, and when it ends."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import TinyRuns, tiny_runs

from perlhf.config.commands import ScoreConfig
from perlhf.config.stages import DataConfig, RewardConfig
from perlhf.errors import RunError
from perlhf.evaluation.evaluate import score
from perlhf.labelling.labels import Task
from perlhf.labelling.pages.explained import Explained, Explainer
from perlhf.labelling.pages.shown import explanations
from perlhf.labelling.questions import Question
from perlhf.training.reward import train_reward


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRuns:
    return tiny_runs(tmp_path_factory.getbasetemp() / "tiny_runs", tiny_base)


PROMPT = [{"role": "user", "content": "a small tea please"}]
GOOD, BAD, LONG = "sure one small tea. No problem!", "never tea. Go away.", "tea " * 300


def question(number: int, *answers: str) -> Question:
    return Question(f"k{number}", PROMPT, answers, "g", "f:1", 0.0)


def waited(explainer: Explainer, asked: Question) -> Explained:
    until = time.monotonic() + 60
    while (found := explainer.ask(asked)) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def test_it_says_the_mean_of_what_score_explain_says(runs: TinyRuns, tmp_path: Path) -> None:
    config = RewardConfig.model_validate(yaml.safe_load((runs.reward / "config.yaml").read_text()))
    pair = tmp_path / "members"
    train_reward(config.model_copy(update={"run": pair, "members": 2, "seed": 5}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}) + "\n")
    data = DataConfig(paths=(str(rows),))
    of_two, of_one = (score(ScoreConfig(run=run, data=data, explain=True))[0] for run in (pair, runs.reward))

    def expected(two: float, one: float) -> Any:
        return pytest.approx((2 * two + one) / 3, abs=1e-5)

    explainer = Explainer([str(pair), str(runs.reward)])
    try:
        assert explainer.models == 3
        good, bad, too_long = [
            *waited(explainer, question(0, GOOD, BAD)),
            waited(explainer, question(1, GOOD, LONG))[1],
        ]
        assert good is not None and bad is not None and too_long is None
        for name, found in (("chosen", good), ("rejected", bad)):
            assert found["score"] == expected(of_two[f"score_{name}"], of_one[f"score_{name}"])
            two, one = of_two[f"explanation_{name}"], of_one[f"explanation_{name}"]
            for part, of_pair, alone in zip(found["sentences"], two["sentences"], one["sentences"], strict=True):
                assert part["text"] == alone["text"]
                assert part["effect"] == expected(of_pair["effect"], alone["effect"])
            assert [text for text, _ in found["tokens"]] == [text for text, _ in one["tokens"]]
        explainer._asked.maxsize = 1
        with pytest.raises(RunError, match="Many explanations"):
            for number in range(10, 60):
                assert explainer.ask(question(number, *(f"{number}. x{side}." * 20 for side in range(2)))) is None
        explainer._process.kill()
        assert explainer.ask(question(0, GOOD, BAD)) == [good, bad]  # what is known stays known
        explainer._thread.join(30)
        with pytest.raises(RunError, match="no longer"):
            explainer.ask(question(2, GOOD, BAD))
    finally:
        explainer.close()


def test_what_explains_nothing_is_one_sentence(runs: TinyRuns) -> None:
    with pytest.raises(RunError, match="no finished run"):  # told before a process is started
        Explainer(["nowhere"])
    with pytest.raises(RunError, match="sft") as caught:
        Explainer([str(runs.sft)])
    assert caught.value.where == str(runs.sft)


def test_it_ends_where_the_page_is_killed(runs: TinyRuns) -> None:
    from forks import forked

    read, write = os.pipe()

    def page() -> None:
        os.write(write, str(Explainer([str(runs.reward)])._process.pid).encode())
        os._exit(9)  # as SIGKILL, nothing of ours is done

    os.waitpid(forked(page), 0)
    number = int(os.read(read, 20))
    until = time.monotonic() + 30
    while Path(f"/proc/{number}/cmdline").exists() and Path(f"/proc/{number}/cmdline").read_bytes():
        assert time.monotonic() < until
        time.sleep(0.02)
    os.close(read)
    os.close(write)


def test_what_is_shown_stands_on_the_sides_where_the_answers_stood() -> None:
    def row(*effects: float | None) -> dict[str, object]:
        parts = [{"text": f"{number}. ", "effect": effect} for number, effect in enumerate(effects)]
        return {"score": sum(effect or 0 for effect in effects), "sentences": parts, "tokens": [["a", 0.0], ["b", 4.0]]}

    task = Task(1, question(0, GOOD, BAD), True, 0.0)
    left, right = explanations(task, [row(None), row(2.0, -1.0)])
    assert (left.name, left.score, right.name, right.score) == ("Left", 1.0, "Right", 0.0)
    assert [(one.text, one.said, one.remark, one.bar) for one in left.sentences] == [
        ("0.", "+2.00", "most", (50.0, 50.0)),
        ("1.", "−1.00", "least", (25.0, 25.0)),
    ]
    assert [(one.said, one.remark) for one in right.sentences] == [("all there is", "")]
    assert left.points == "0.0,29.0 100.0,1.0"
    assert left.along == "begins at 0.00, is at least 0.00 and at most 4.00, ends at 4.00"
    assert explanations(task, [None, None])[0].sentences == []
