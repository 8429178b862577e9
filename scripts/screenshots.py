"""Takes the pictures of the labelling page, the chat page and a loop's page that docs/ shows, from the real commands.

    python scripts/screenshots.py --loop RUN --reward RUN [--output docs/images]

The run of `--loop` is what `perlhf loop --demo` left. That of `--reward` explains its scores; it is one on the embedded
feedback (`perlhf reward recipes/coffee-bar/reward.yaml --sft None`). Three simulated people have labelled before, so
that the owner's page has something to show.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect

from perlhf.data.coffee_bar.gold import gold
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Said
from perlhf.labelling.progress import LEARNED
from perlhf.labelling.project import LABELS
from perlhf.reports import loop
from perlhf.system.files import read_json

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "browser"))
PEOPLE = {"Ana": 0.05, "Bo": 0.15, "Cy": 0.4}
"""Who has labelled before, and in which share of the questions they say the other answer."""
LABELS_EACH = 41
ORDERS = ("Hi, could I get a large latte with oat milk, please?", "And a blueberry muffin to go.")
TALK = [
    {"role": "user", "content": "How do I count the words of a file?"},
    {"role": "assistant", "content": "With `wc`:\n\n```\nwc -w notes.txt\n```"},
    {"role": "user", "content": "And of all text files here, the longest first?"},
]
ANSWER = """Count each of them and sort the lines by their numbers:

```
wc -w *.txt | sort -rn
```

| part | what it does |
|---|---|
| `wc -w` | counts the words of each file |
| `sort -rn` | puts the largest number first |

The first line is the sum of all."""


def main() -> None:
    from people import chromium

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", type=Path, required=True)
    parser.add_argument("--reward", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        place = Path(directory)
        comparisons(browser, place / "project", options)
        thumbs(browser, place, options.output)
        chat(browser, place / "served", options)
        (place / "loop.html").write_bytes(loop.render(read_json(options.loop / "loop.json"), "Coffee bar"))
        page = screen(browser, 992, 820)
        page.goto((place / "loop.html").as_uri())
        page.add_style_tag(content="section { padding: 1rem }")
        page.locator("section").screenshot(path=options.output / "loop.png")


def screen(browser: Browser, width: int, height: int, **more: Any) -> Page:
    """A page of a browser window of that size."""
    return browser.new_context(viewport={"width": width, "height": height}, **more).new_page()


def comparisons(browser: Browser, project: Path, options: argparse.Namespace) -> None:
    """Two answers side by side, on three screens; what moved their scores; the owner's page."""
    from people import opened, press

    given = ["--settings.questions.overlap", "0.5", "--settings.explain", str(options.reward.resolve())]
    with opened("label", str(project), "--port", "0", *given) as running:
        label_before(project)
        shutil.copy(options.loop / "labels" / LEARNED, project)
        page = entered(screen(browser, 1100, 430), running.address)
        page.screenshot(path=options.output / "label.png")
        press(page, "ArrowLeft")
        page.keyboard.press("w")
        expect(page.locator("#why .scored")).to_have_count(2, timeout=60_000)
        page.set_viewport_size({"width": 1100, "height": 820})
        page.screenshot(path=options.output / "label-why.png")
        page.goto(running.address + "owner")
        page.screenshot(path=options.output / "label-owner.png", full_page=True)
        page = entered(screen(browser, 1100, 560, color_scheme="dark"), running.address)
        page.screenshot(path=options.output / "label-dark.png")
        page = entered(screen(browser, 390, 760, is_mobile=True, has_touch=True), running.address)
        page.screenshot(path=options.output / "label-phone.png")


def thumbs(browser: Browser, place: Path, output: Path) -> None:
    """A single answer at the end of a conversation."""
    from people import opened

    (place / "talk.jsonl").write_text(json.dumps({"prompt": TALK, "completions": [ANSWER]}) + "\n")
    given = ["--settings.kind", "rating", "--settings.title", "Is this a good answer?"]
    given += ["--settings.questions.paths", str(place / "talk.jsonl")]
    with opened("label", str(place / "thumbs"), "--port", "0", *given) as running:
        entered(screen(browser, 900, 760), running.address).screenshot(path=output / "label-thumbs.png")


def chat(browser: Browser, project: Path, options: argparse.Namespace) -> None:
    """A conversation with the loop's policy, and its answer beside the base's, on three screens."""
    from people import opened

    runs = [f"policy={options.loop.resolve()}", f"reward={options.reward.resolve()}"]
    with opened("serve", *runs, "--project", str(project), "--port", "0") as running:
        wide, phone = (1100, 640), (390, 760)
        for name, size, more in (
            ("chat", wide, {}),
            ("chat-dark", wide, {"color_scheme": "dark"}),
            ("chat-phone", phone, {"is_mobile": True, "has_touch": True}),
        ):
            page = screen(browser, *size, **more)
            page.goto(running.address)
            page.wait_for_selector("#model option", state="attached")
            page.click("#show-settings")
            page.fill("#temperature", "0")
            page.keyboard.press("Escape")
            page.fill("#text", ORDERS[0])
            page.press("#text", "Enter")
            page.locator(".answered [data-thumb=up]").click(timeout=60_000)
            expect(page.locator(".stored")).to_have_text("Stored.")
            page.check("#twice")
            page.select_option("#other", "base")
            page.fill("#text", ORDERS[1])
            page.press("#text", "Enter")
            expect(page.locator(".verdicts")).to_be_visible(timeout=60_000)
            if size == wide:
                page.evaluate("() => window.scrollTo(0, 0)")
            page.screenshot(path=options.output / f"{name}.png")


def entered(page: Page, address: str) -> Page:
    """The page of somebody who has given a name."""
    page.goto(address)
    page.fill("#name", "Dora")
    page.keyboard.press("Enter")
    page.wait_for_selector("article")
    page.wait_for_load_state("load")
    return page


def label_before(project: Path) -> None:
    """What three people said who go by the rules of the embedded feedback, more or less."""
    store, draw = Store(project / LABELS), random.Random(0)
    for number in range(LABELS_EACH):
        for name, wrong in PEOPLE.items():
            person = store.labeller(name)
            task = store.next_task(person, 3600)
            assert task is not None
            first, second = (gold(task.question.prompt, str(answer)) for answer in task.question.answers)
            better = (first > second) != (draw.random() < wrong)
            verdict = "equal" if first == second else "first" if better else "second"
            store.say(person, task.id, Said(verdict), f"{name}: {number}", draw.uniform(4, 20))
    store.close()


if __name__ == "__main__":
    main()
