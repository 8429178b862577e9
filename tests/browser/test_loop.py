"""A loop with its page, whose questions two browsers answer to the end; and the page that it leaves."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from people import SCREENS, enter, press, serious
from playwright.sync_api import Browser, Error, Page
from toy import prompts, read_json, write_rows

from perlhf.labelling.database.store import Store
from perlhf.reports import loop


def recipe(base: Path, directory: Path) -> dict[str, Any]:
    """Two rounds on the tiny base, a few updates and a few questions each."""
    optim = {"learning_rate": 1e-2}
    return {
        "run": str(directory / "run"),
        "base": str(base),
        "dtype": "float32",
        "threads": 1,
        "rounds": 2,
        "labels_per_round": 3,
        "prompts_per_round": 4,
        "answers_per_prompt": 2,
        "held_out_labels": 4,
        "duels": 2,
        "bootstrap": 20,
        "data": {"paths": [str(write_rows(directory / "prompts.jsonl", prompts(48)))], "validation": 0.2, "test": 0.3},
        "encoding": {"max_tokens": 96},
        "reward": {"members": 2, "adapter": {"rank": 2}, "epochs": 1, "examples_per_update": 4, "optim": optim},
        "policy": {
            "adapter": {"rank": 2},
            "updates": 1,
            "prompts_per_update": 2,
            "completions_per_prompt": 2,
            "max_completion_tokens": 6,
            "validation_prompts": 2,
            "optim": optim,
        },
    }


@pytest.fixture(scope="module")
def answered(
    browser: Browser, command: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """The run of a loop that two people answered on its page, and how often each pressed a key."""
    directory = tmp_path_factory.mktemp("loop")
    (directory / "loop.yaml").write_text(json.dumps(recipe(tiny_base, directory)))
    pressed = [0, 0]
    with command("loop", str(directory / "loop.yaml"), "--page", "0") as running:
        pages: list[Page] = []
        while running.process.poll() is None:
            if not pages and (directory / "run" / "round-0001" / "questions" / "questions.jsonl").exists():
                pages = [enter(browser.new_context(), running.address, name) for name in ("Ana", "Bo")]
            for number, page in enumerate(pages):
                try:
                    if page.locator("article").count():
                        press(page, ("ArrowLeft", "ArrowRight")[number])
                        pressed[number] += 1
                    # Without one it looks for more by itself.
                except Error:  # the loop has ended, and the page with it
                    assert running.process.wait(30) == 0
                    break
            time.sleep(0.05)
        assert running.process.returncode == 0
    return directory / "run", pressed


def test_two_people_answer_a_loop_to_its_end(answered: tuple[Path, list[int]]) -> None:
    run, pressed = answered
    store = Store(run / "labels" / "labels.sqlite")
    said = store.labels()
    assert len(said) == sum(pressed) == len({label.question.key for label in said})
    assert {label.labeller.name for label in said} == {"Ana", "Bo"} and min(pressed) > 0
    assert store.progress() == (len(said), len(said))
    store.close()
    found = read_json(run / "loop.json")
    assert [one["round"] for one in found["rounds"]] == [1, 2]
    assert found["labeller"] == "people" and found["rounds"][1]["labels"] > found["rounds"][0]["labels"]


@pytest.mark.parametrize("screen", [*SCREENS, "narrow"])
def test_the_page_of_a_loop_reads_well(
    browser: Browser, answered: tuple[Path, list[int]], tmp_path: Path, screen: str
) -> None:
    run, _ = answered
    found = read_json(run / "loop.json")
    both = {"before": {"value": 0.4321}, "after": {"value": 0.6543, "low": 0.5432, "high": 0.7654}}
    rounds = [{"accuracy_by_rules": both["after"], "gold": both} | one for one in found["rounds"]]
    rounds = [one | {"round": number} for number, one in enumerate(rounds * 2, start=1)]
    (tmp_path / "four.html").write_bytes(loop.render(found | {"rounds": rounds}, "Four rounds, with rules"))
    settings = SCREENS.get(screen, {"viewport": {"width": 1100, "height": 800}})
    page = browser.new_context(bypass_csp=True, **settings).new_page()
    for file in (run / "loop.html", tmp_path / "four.html"):
        page.goto(file.as_uri())
        assert serious(page) == []
        assert page.evaluate("() => document.documentElement.scrollWidth") <= settings["viewport"]["width"]
        if screen != "phone":  # there the table scrolls by itself
            assert page.evaluate(
                "() => [...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)"
            )
