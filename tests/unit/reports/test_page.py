"""The report: what it says, that it asks for nothing outside itself, and that no text of a model becomes markup."""

import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from pipeline_runs import ATTACK, about, pipeline, write_run

from perlhf.config.stages import DataConfig, PolicyConfig
from perlhf.errors import ConfigError, StorageError
from perlhf.reports import figures, findings, samples
from perlhf.reports import page as report_page
from perlhf.runs.evaluations import Measured
from perlhf.runs.read import RunFiles, read_runs

VOID = ("meta", "link", "input", "img", "br", "hr")


@dataclass
class Element:
    """An element with its own and its descendants' text."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """All elements of a page, in order of their start tags."""

    elements: list[Element] = field(default_factory=list)
    unclosed: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in VOID:
            self.unclosed.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop().tag == tag, f"</{tag}> closes another element"
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        for element in self.unclosed:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]

    def one(self, tag: str, **attributes: str) -> Element:
        (found,) = (each for each in self.all(tag) if attributes.items() <= each.attributes.items())
        return found


def _parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert not page.unclosed
    return page


def _words(text: str) -> str:
    """`text` with white space as a reader sees it."""
    return re.sub(r"\s+", " ", text)


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def text(runs: list[Path]) -> str:
    return report_page.render(read_runs(runs), "Coffee bar")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return _parse(text)


# The page


def test_it_shows_the_numbers_of_every_stage(page: Page):
    body = _words(page.one("main").text)
    for words in (
        "The gold score rose from 0.431 to 0.664 on 240 unseen prompts.",
        "0.815 to 0.879",  # the interval of the reward model's AUC
        "above the strongest baseline (bag of words, AUC 0.774), and its interval excludes it",
        "Win rate against the answers before: 0.742 (0.701 to 0.783), judged by reward.",
        "1,612 up, 1,268 down",
        "LoRA, rank 16, alpha 32, attention",
        "5 min 38 s",
        "1.51 GiB",
        "versions.transformers",
        "examples_per_update: 16",
    ):
        assert words in body
    gold = next(line for line in re.findall(r"Gold score.*?\+[\d.]+", body) if "0.402" in line)
    assert gold.split() == "Gold score 0.431 0.402 to 0.460 0.664 0.637 to 0.691 +0.233".split()


def test_it_draws_the_curves_of_each_stage(page: Page):
    labels = [element.attributes["aria-label"] for element in page.all("figure")]
    titles = [label.split(":")[0] for label in labels]
    learned = ["Score", "Reward", "KL, nats", "Entropy, nats", "Length, tokens", "End-token rate"]
    assert titles == [
        *("Loss", "Gradient norm", "Learning rate", "Speed, tokens/s"),
        *("Calibration", "Loss", "AUC", "Accuracy"),
        *("Gradient norm", "Learning rate", "Speed, tokens/s"),
        *(
            "Score and gold score of 240 completions before and 240 after training; an arrow joins their means.",
            *learned,
        ),
        *("Sampler gap, nats", "Policy loss", "Value loss", "Gradient norm", "Learning rate", "Speed, tokens/s"),
        "Time of an update, s",
    ]
    auc = next(label for label in labels if label.startswith("AUC"))
    # 0.6 + 0.27 (1 - exp(-step / 50)) at the first and the last validation
    assert auc == "AUC: validation from 0.689 at step 20 to 0.863 at step 180."


def test_nothing_outside_the_page_is_asked_for(text: str, page: Page):
    asking = ("src", "href", "srcset", "action", "formaction", "data", "poster", "xlink:href", "background", "manifest")
    addresses = [value for each in page.elements for name, value in each.attributes.items() if name in asking]
    assert addresses
    assert [each for each in addresses if not each.startswith("#") and each != "data:,"] == []
    assert not re.search(r"@import|url\((?!#)|image-set|XMLHttpRequest|fetch\(|sendBeacon|WebSocket|import\(", text)
    assert "http://" not in text and "https://" not in text


def test_only_its_own_script_may_run(page: Page):
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    shown, script = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert shown.attributes == {"type": "application/json", "id": "samples"}
    assert [name for each in page.elements for name in each.attributes if name.startswith("on")] == []


def test_text_of_models_and_users_never_becomes_markup(tmp_path: Path, page: Page):
    runs = pipeline(tmp_path, updates=4, prompts=6)
    pair = {"prompt": ATTACK, "before": ATTACK, "after": f"{ATTACK} & \u2028 é \ud800", "score_after": 1.0}
    rating = {"prompt": [{"role": ATTACK, "content": ATTACK}], "completion": ATTACK, "label": True, "score": 0.5}
    evaluation = json.loads((runs[2] / "evaluation.json").read_text())
    _edit(runs[2] / "evaluation.json", samples=[pair], split=ATTACK, win_rate=evaluation["win_rate"] | {"by": ATTACK})
    _edit(runs[1] / "evaluation.json", samples=[rating])
    _edit(runs[0] / "manifest.json", commit=ATTACK, facts={ATTACK: ATTACK}, versions={"perlhf": ATTACK})
    _edit(runs[0] / "result.json", stopped=ATTACK)
    rollout = runs[2] / "rollouts" / "00000001.jsonl"
    rollout.write_text(json.dumps({"step": 1, "prompt": ATTACK, "completion": ATTACK}) + "\n")
    config = PolicyConfig(base=ATTACK, reward=(ATTACK,), data=DataConfig(paths=(ATTACK,))).model_dump_json()
    (runs[2] / "config.yaml").write_text(config)
    renamed = runs[0].rename(tmp_path / "<img src=x>&amp;")

    attacked = _parse(report_page.write([renamed, *runs[1:]], tmp_path / "report.html", ATTACK).read_text())
    assert {each.tag for each in attacked.elements} <= {each.tag for each in page.elements}
    assert len(attacked.all("script")) == 2 and not attacked.all("img")
    assert attacked.one("h1").text == ATTACK
    assert attacked.one("main").text.count(ATTACK) > 8
    embedded = json.loads(attacked.one("script", id="samples").text)
    (row,) = embedded["run-3-pairs"]["rows"]
    assert (row["prompt"], row["before"], row["after"]) == ([["", ATTACK]], ATTACK, f"{ATTACK} & \u2028 é ?")
    assert embedded["run-2-ratings"]["rows"][0]["prompt"] == [[ATTACK, ATTACK]]
    assert embedded["run-3-rollouts"]["rows"][0]["completion"] == ATTACK
    assert "<" not in attacked.one("script", id="samples").text


def test_the_script_builds_samples_from_text_alone():
    script = (resources.files("perlhf.reports") / "templates" / "report.js").read_text()
    assert "textContent" in script
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|DOMParser", script)


def test_it_can_be_read_and_used_without_a_mouse_or_a_picture(page: Page):
    ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    for each in page.elements:
        for name in ("aria-labelledby", "for"):
            assert each.attributes.get(name, ids[0]) in ids
        if (href := each.attributes.get("href", "")).startswith("#"):
            assert href[1:] in ids
    controls = [each for each in page.elements if each.tag in ("input", "select")]
    labelled = {each.attributes["for"] for each in page.all("label")}
    assert {each.attributes["id"] for each in controls if each.attributes.get("type") != "hidden"} == labelled
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert all(each.attributes.get("scope") in ("row", "col") for each in page.all("th"))
    assert all(each.attributes["aria-label"] for each in page.all("figure"))
    assert all(each.attributes["aria-hidden"] == "true" for each in page.all("svg"))
    levels = [int(each.tag[1]) for each in page.elements if re.fullmatch("h[1-6]", each.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.one("html").attributes["lang"] == "en"
    assert "width=device-width" in page.one("meta", name="viewport").attributes["content"]


def test_its_colours_can_be_told_apart_on_both_pages():
    style = (resources.files("perlhf.reports") / "templates" / "report.css").read_text()
    colours = {
        name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", style)
    }
    # WCAG 2.1: 4.5 for text, 3 for graphics
    needed = dict.fromkeys(("ink", "soft", "accent", "good", "bad", "caution"), 4.5)
    needed |= dict.fromkeys(("series-1", "series-2", "series-3", "series-was"), 3.0)
    for name, contrast in needed.items():
        for mode in (0, 1):
            assert _contrast(colours[name][mode], colours["paper"][mode]) >= contrast, (name, mode)


def _contrast(one: str, other: str) -> float:
    """WCAG 2.1 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_equal_runs_give_an_equal_page(runs: list[Path]):
    once, again = (report_page.render(read_runs(runs[1:2]), "Coffee bar") for _ in range(2))
    assert once == again


@pytest.mark.parametrize("stage", ["sft", "reward", "policy"])
def test_a_run_that_has_only_begun_is_reported_as_such(tmp_path: Path, stage: str):
    run = write_run(tmp_path / "run", stage)
    body = _words(_parse(report_page.render(read_runs([run]), "Begun")).one("main").text)
    for words in (
        "No config.yaml: the configuration can't be shown.",
        "No metrics.jsonl: there are no curves.",
        "No result.json: the run is not finished.",
        "run is not finished: it has no result.json",
    ):
        assert words in body
    assert ("No evaluation.json" in body) == (stage != "sft")


def test_an_evaluated_sft_run_shows_its_loss_and_answers(tmp_path: Path):
    sample = {"prompt": "A latte", "before": "Ask me anything", "after": "One latte.", "demonstration": ATTACK}
    evaluation = {
        "kind": "sft",
        "split": "test",
        "n": 40,
        "metrics": {"loss": about(1.2, 0.1)},
        "before": {"loss": about(2.5, 0.2), "perplexity": about(12.0, 2.0)},
        "after": {"loss": about(1.2, 0.1), "perplexity": about(3.3, 0.3)},
        "samples": [sample],
    }
    run = write_run(tmp_path / "run", "sft", result={"validation_loss": 1.1}, evaluation=evaluation)
    text = report_page.render(read_runs([run]), "SFT")
    body = _words(_parse(text).one("main").text)
    for words in ("On 40 unseen examples", "Loss, nats a token 2.5", "Perplexity 12.0", "test loss of 1.2", "-1.3"):
        assert words in body.replace("−", "-")
    (found,) = samples.explorers(read_runs([run]))[0]
    assert found.kind == "pairs" and found.rows[0]["demonstration"] == ATTACK
    # without scores there is nothing to filter or sort by
    assert [key for key, _ in found.filters] == ["all"] and [key for key, _ in found.sorts] == ["order"]
    assert ATTACK not in text


def test_a_run_of_metrics_alone_still_gives_curves(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    page = _parse(report_page.render(read_runs([run]), "Bare"))
    assert [each.attributes["aria-label"] for each in page.all("figure")] == [
        "Loss: training from 2.50 at step 1 to 2.50 at step 1."
    ]
    assert "No manifest.json" in page.one("main").text


def test_the_time_of_validations_stands_apart(tmp_path: Path):
    lines = [{"step": 1, "loss": 2.0}, *({"step": step, "loss": 1.0, "validation_seconds": 62.5} for step in (2, 3))]
    (run,) = read_runs([write_run(tmp_path / "run", "sft", metrics=lines)])
    assert "Validation2 min 05 s" in _words(_parse(report_page.render([run], "x")).one("dl").text)


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, runs: list[Path]):
    output = tmp_path / "new" / "report.html"
    assert report_page.write(runs[:1], output, "Coffee bar") == output
    assert output.read_text().startswith("<!doctype html>\n")
    assert output.read_text().endswith("</html>\n")
    assert [each.name for each in output.parent.iterdir()] == ["report.html"]
    with pytest.raises(StorageError):
        report_page.write(runs[:1], tmp_path / "new", "Coffee bar")
    with pytest.raises(ConfigError, match="does not exist"):
        report_page.write([tmp_path / "missing"], tmp_path / "never.html", "Coffee bar")
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


def test_it_needs_no_torch(tmp_path: Path):
    run = write_run(tmp_path / "run", "sft", metrics=[{"step": 1, "loss": 2.0}])
    program = (
        "import sys; from pathlib import Path; from perlhf import report, table; "
        f"report([Path({str(run)!r})], Path({str(tmp_path / 'r.html')!r}), 'x'); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# Findings


def _policy(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], n: int = 240) -> RunFiles:
    evaluation = {"kind": "policy", "split": "test", "n": n, "groups": n, "before": before, "after": after}
    return read_runs([write_run(tmp_path / "policy", "policy", result={"updates": 1}, evaluation=evaluation)])[0]


def _reward(tmp_path: Path, auc: dict[str, float], baselines: dict[str, Any]) -> RunFiles:
    evaluation = {"kind": "reward", "split": "test", "n": 500, "metrics": {"auc": auc}, "baselines": baselines}
    return read_runs([write_run(tmp_path / "reward", "reward", result={"updates": 1}, evaluation=evaluation)])[0]


def _texts(run: RunFiles, tone: str) -> list[str]:
    return [remark.text for remark in findings.remarks([run]) if remark.tone == tone]


@pytest.mark.parametrize(
    ("after", "tone", "sentence"),
    [
        (about(0.6, 0.05), "good", "The gold score rose from 0.400 to 0.600 on 240 unseen prompts."),
        (
            about(0.45, 0.05),
            "caution",
            "did not clearly rise: from 0.400 to 0.450 on 240 unseen prompts, and the intervals",
        ),
        (about(0.2, 0.05), "caution", "The gold score fell from 0.400 to 0.200"),
        (0.9, "caution", "did not clearly rise: from 0.400 to 0.900 on 240 unseen prompts, and there is no interval"),
    ],
)
def test_the_headline_says_whether_gold_rose(tmp_path: Path, after: Any, tone: str, sentence: str):
    headline = findings.headline([_policy(tmp_path, {"gold": about(0.4, 0.05)}, {"gold": after})])
    assert headline.tone == tone
    assert sentence in headline.text


def test_a_reward_that_never_varied_and_a_negative_kl_are_remarked(tmp_path: Path):
    run = _policy(tmp_path, {"kl": 0.0}, {"kl": -0.02})
    constant = replace(run, metrics=[{"step": step, "score_std": 1e-17} for step in (1, 2)])
    assert any("a reward that never varies teaches nothing" in text for text in _texts(constant, "caution"))
    assert any("The KL is −0.020: an estimate" in text for text in _texts(constant, "note"))
    varied = replace(
        _policy(tmp_path / "b", {"kl": 0.0}, {"kl": 0.02}),
        metrics=[{"step": 1, "score_std": 0.0}, {"step": 2, "score_std": 0.1}],
    )
    assert not any(
        "never varies" in text or "The KL" in text for tone in ("caution", "note") for text in _texts(varied, tone)
    )


def test_intervals_that_touch_are_no_rise():
    assert findings.direction(Measured(1, 0, 2), Measured(3, 2, 4)) == "unclear"
    assert findings.direction(Measured(1, 0, 2), Measured(3, 2.1, 4)) == "rose"
    assert findings.direction(Measured(3, 2.1, 4), Measured(1, 0, 2)) == "fell"


def test_without_gold_the_headline_says_who_judged(tmp_path: Path):
    run = _policy(tmp_path, {"score": about(0, 0.1)}, {"score": about(1, 0.1)})
    assert findings.headline([run]).text.endswith("on 240 unseen prompts by the reward model's own judgement.")


def test_scores_of_another_judge_are_said_to_be_its(tmp_path: Path):
    run = _policy(tmp_path, {"score": about(0, 0.1)}, {"score": about(1, 0.1)})
    scored = replace(run, evaluation=replace(run.evaluation, reward=["runs/other-half/"]))
    assert findings.headline([scored]).text.endswith("on 240 unseen prompts by other-half.")
    rows = [{"step": step, "score_mean": 1.0, "validation_score": 5.0, "kl": 0.1} for step in (1, 2)]
    alike = replace(run, metrics=rows)
    assert [chart.title for chart in figures.of_training(alike)] == ["Score", "KL, nats"]
    judged = replace(alike, config=run.config | {"validation_reward": ["other"]})
    titles = [chart.title for chart in figures.of_training(judged)]
    assert titles == ["Score", "Score by validation_reward", "KL, nats"]


def test_groups_that_training_saw_are_not_called_unseen(tmp_path: Path):
    evaluation = {
        "split": "test",
        "n": 240,
        "groups_seen_in_training": 31,
        "before": {"score": 0},
        "after": {"score": 1},
    }
    (run,) = read_runs([write_run(tmp_path / "a", "policy", result={"updates": 1}, evaluation=evaluation)])
    assert "240 prompts, 31 groups of them seen in training," in findings.size(run)
    assert "unseen" not in findings.headline([run]).text


@pytest.mark.parametrize("split", ["train", "validation", "all"])
def test_only_the_test_split_is_called_unseen(tmp_path: Path, split: str):
    evaluation = {"split": split, "n": 240, "before": {"score": 0}, "after": {"score": 1}}
    (run,) = read_runs([write_run(tmp_path / "a", "policy", result={"updates": 1}, evaluation=evaluation)])
    assert f"on 240 prompts of the {split} split" in findings.headline([run]).text
    assert _texts(run, "caution") == [f"The policy evaluation is of the {split} split, which training saw."]
    assert "unseen" not in findings.size(run)


def test_a_score_that_rose_without_gold_is_called_out(tmp_path: Path):
    before = {"score": about(0, 0.1), "gold": about(0.4, 0.05)}
    hacked = _policy(tmp_path / "a", before, {"score": about(1, 0.1), "gold": about(0.4, 0.05)})
    honest = _policy(tmp_path / "b", before, {"score": about(1, 0.1), "gold": about(0.6, 0.05)})
    said = [
        any("learned what the reward model likes" in text for text in _texts(run, "caution"))
        for run in (hacked, honest)
    ]
    assert said == [True, False]


def test_side_effects_of_training_are_named(tmp_path: Path):
    before = {"end_rate": 0.9, "distinct_2": 0.5, "tokens": 20.0}
    worse = _policy(tmp_path / "a", before, {"end_rate": 0.7, "distinct_2": 0.3, "tokens": 40.0})
    assert _texts(worse, "caution")[:2] == [
        "Fewer completions end by themselves: 0.900 before, 0.700 after.",
        "Completions became less varied: share of distinct bigrams 0.500 before, 0.300 after.",
    ]
    assert "The length of completions changed much: 20.0 tokens before, 40.0 after." in _texts(worse, "note")
    same = _policy(tmp_path / "b", before, before)
    assert _texts(same, "caution") == []


def test_a_reward_model_is_held_against_its_strongest_baseline(tmp_path: Path):
    baselines = {"position": {"auc": 0.55}, "bag_of_words": {"auc": {"value": 0.75, "low": 0.7, "high": 0.8}}}
    strongest = "the strongest baseline (bag of words, AUC 0.750)"
    above, within, below = (_reward(tmp_path / str(auc), about(auc, 0.04), baselines) for auc in (0.82, 0.77, 0.74))
    assert _texts(above, "good") == [f"The reward model is above {strongest}, and its interval excludes it."]
    assert _texts(within, "caution") == [
        f"The reward model is above {strongest}, but its interval does not exclude it."
    ]
    assert _texts(below, "caution") == [f"The reward model, at 0.740, is not better than {strongest}."]


def test_few_prompts_one_seed_and_simulated_feedback_are_said(tmp_path: Path, runs: list[Path]):
    (few,) = _texts(_policy(tmp_path, {}, {}, n=199), "caution")
    assert few == "The policy evaluation rests on 199 unseen prompts in 199 groups: too few for small differences."
    notes = [remark.text for remark in findings.remarks(read_runs(runs)) if remark.tone == "note"]
    assert any("simulated" in note for note in notes)
    assert any(note.startswith("A single run of each stage (seed 0)") for note in notes)


def test_several_seeds_are_listed(tmp_path: Path):
    reward = ("module:function",)
    seeded = [
        write_run(tmp_path / name, "policy", config=PolicyConfig(seed=seed, reward=reward))
        for name, seed in (("a", 0), ("b", 3))
    ]
    notes = [remark.text for remark in findings.remarks(read_runs(seeded))]
    assert any(note.startswith("Several seeds: policy seeds 0, 3.") for note in notes)
    assert "The policy run is not finished: it has no result.json (a)." in notes


def test_a_start_that_was_kept_is_told(runs: list[Path]):
    _edit(runs[2] / "result.json", best_step=0)
    texts = [remark.text for remark in findings.remarks(read_runs(runs))]
    assert any("No update of the policy run did better on held-out groups than its start" in text for text in texts)


def test_a_tile_puts_its_values_on_one_axis(tmp_path: Path):
    run = _policy(tmp_path, {"score": about(0, 0)}, {"score": {"value": 1.0, "low": 0.5, "high": 2.0}})
    (tile,) = findings.tiles([run])
    # from 0 to 2 onto 4 % to 96 %
    places = [(bar.label, bar.start, bar.at, bar.end) for bar in tile.bars]
    assert places == [("before", 4.0, 4.0, 4.0), ("after", 27.0, 50.0, 96.0)]


# Figures


def test_a_running_mean_uses_what_is_there_near_the_ends():
    assert figures.running_mean([1, 2, 6, 0, 4], 3) == [1.5, 3.0, 8 / 3, 10 / 3, 2.0]
    assert figures.running_mean([1, 2, 6], 1) == [1, 2, 6]


def test_short_lines_are_not_smoothed():
    assert [figures.smoothing(points) for points in (1, 29, 30, 59, 60, 120)] == [1, 1, 5, 5, 7, 11]


def test_a_figure_takes_its_colours_from_the_page_and_has_no_ids():
    lines = [figures.Series("training", [(1, 2), (2, 1)], "1"), figures.Series("validation", [(2, 1.5)], "2")]
    svg = figures.curves(lines, best_step=2)
    assert re.findall("#[0-9a-f]{6}", svg) == []
    assert {"currentColor", "var(--rule)", "var(--series-1)", "var(--series-2)"} <= set(
        re.findall(r"[\w-]+\(--[\w-]+\)|currentColor", svg)
    )
    assert " id=" not in svg and "<style" not in svg


def test_a_figure_of_its_own_follows_the_readers_setting():
    svg = figures.alone(figures.calibration([(0.2, 0.1, 10), (0.8, 0.9, 30)]))
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg" ') and svg.endswith("</svg>\n")
    assert "prefers-color-scheme:dark" in svg and "--series-1:#0e7c8c" in svg


# Samples


def test_a_limit_is_shared_evenly_and_what_is_left_goes_to_longer_lists():
    assert samples.shares([90, 240, 1920], 500) == [90, 205, 205]
    assert samples.shares([1920, 3], 100) == [97, 3]
    assert samples.shares([5, 5], 100) == [5, 5]
    assert samples.shares([], 100) == []


def test_samples_are_spread_over_all_there_are():
    assert samples.spread(range(10), 4) == [0, 3, 6, 9]
    assert samples.spread("abc", 3) == ["a", "b", "c"]
    assert samples.spread("abc", 1) == ["a"]


def test_no_more_samples_are_embedded_than_the_limit_says(page: Page, text: str):
    embedded = json.loads(page.one("script", id="samples").text)
    sizes = {name: len(part["rows"]) for name, part in embedded.items()}
    # 205 rollouts over 10 steps: 20 of each
    assert sizes == {"run-2-ratings": 90, "run-3-pairs": 205, "run-3-rollouts": 200}
    assert "205 of 240 prompts, evenly spaced." in text
    assert "200 completions, from the rollouts of 10 of 60 steps." in text
    assert sorted({row["step"] for row in embedded["run-3-rollouts"]["rows"]})[::9] == [1, 60]


def test_long_texts_lose_their_middle():
    ((role, content),) = samples.turns("a" * 3000 + "b" * 1234 + "c" * 3000)
    assert role == ""
    assert content == "a" * 3000 + "\n… 1,234 characters left out …\n" + "c" * 3000


def test_pairs_are_judged_by_gold_where_there_is_gold(tmp_path: Path):
    pair = {"prompt": "p", "before": "b", "after": "a", "score_before": 0.0, "score_after": 1.0}
    for name, extra, scales in (
        ("a", {}, ["score"]),
        ("b", {"gold_before": 0.5, "gold_after": 0.4}, ["gold", "score"]),
    ):
        run = write_run(tmp_path / name, "policy", evaluation={"samples": [pair | extra]})
        ((explorer,),) = samples.explorers(read_runs([run]))
        assert [value for value, _ in explorer.scales] == scales
