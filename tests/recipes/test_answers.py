"""`perlhf label answers`: who answers what, and what a project asks about it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_world import Runs, make_runs
from toy import prompts, read_lines, write_rows
from vllm_server import vllm

from perlhf.commands import answers
from perlhf.config.labelling import ProjectConfig, QuestionsConfig
from perlhf.labelling.database.store import Store
from perlhf.labelling.questions import questions
from perlhf.rollout.local import Ends, sample

__all__ = ["vllm"]

COMMON = "--max-completion-tokens 6 --data.validation 0.25 --device cpu --dtype float32".split()


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The policies `kind` and `curt` and the reward run `judge`, on one base."""
    return make_runs(tmp_path_factory.mktemp("runs"), tiny_base)


@pytest.fixture
def words(runs: Runs, tmp_path: Path) -> list[str]:
    """The command with `kind`, `curt` at 0 and the base."""
    data = write_rows(tmp_path / "prompts.jsonl", prompts(24))
    by = ["--by", str(runs.place / "kind"), f"short={runs.place / 'curt'}@0", "base"]
    return ["label", "answers", str(tmp_path / "answers.jsonl"), "--data.paths", str(data), *by, *COMMON]


def test_each_answers_each_prompt_and_a_project_asks_about_them(words, tmp_path, perlhf, runs) -> None:
    done = perlhf(*words, "--answers", "2")
    assert done.code == 0 and "answers to" in done.out, done.err
    rows = read_lines(tmp_path / "answers.jsonl")
    assert 0 < len(rows) < 24, "held-out groups are left out"
    for row in rows:
        assert row["by"] == ["kind", "kind", "short@0", "short@0", "base", "base"]
        assert row["completions"][2] == row["completions"][3], "greedy"
    assert any(row["completions"][0] != row["completions"][1] for row in rows)
    model, encoder = runs.model, runs.encoder
    given: dict[str, Any] = {
        "adapter": "curt",
        "draws": torch.zeros(1, 6),
        "ends": Ends.of(encoder),
        "temperature": 0.0,
    }
    said = sample(model, [encoder.prompt(rows[0]["prompt"])], max_completion_tokens=6, **given)
    assert given["ends"].text(said.completions[0]) == rows[0]["completions"][2]
    project = ProjectConfig(questions=QuestionsConfig(paths=(str(tmp_path / "answers.jsonl"),)))
    asked = questions(project)
    pairs = {tuple(sorted((one, other))) for row in rows for one in row["completions"] for other in row["completions"]}
    assert asked and all(tuple(sorted(map(str, question.answers))) in pairs for question in asked)
    assert {question.group for question in asked} <= {row["group"] for row in rows}
    again = perlhf(*words)
    assert again.code == 2 and "is there already" in again.err
    assert read_lines(tmp_path / "answers.jsonl") == rows


def test_a_project_asks_as_answers_come_and_what_was_killed_goes_on(words, tmp_path, perlhf, monkeypatch) -> None:
    monkeypatch.setattr("perlhf.evaluation.shared.ROWS", 4)
    assert perlhf(*words).code == 0
    whole = read_lines(tmp_path / "answers.jsonl")
    asked, project = answers.bring, tmp_path / "project"
    words[2] = str(tmp_path / "as-they-come.jsonl")
    seen: list[int] = []

    def bring(*given: Any) -> int:
        new = asked(*given)
        seen.append(len(Store(project / "labels.sqlite").keys()))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return new

    monkeypatch.setattr(answers, "bring", bring)
    assert perlhf(*words, "--project", str(project)).code == 130
    assert len(read_lines(tmp_path / "as-they-come.jsonl")) == 8
    assert 0 == seen[0] < seen[1] < seen[2], "each batch is asked about before the next is sampled"
    assert perlhf(*words, "--project", str(project)).code == 0
    assert read_lines(tmp_path / "as-they-come.jsonl") == whole
    own = ProjectConfig(questions=QuestionsConfig(paths=(words[2],)))
    assert Store(project / "labels.sqlite").keys() == {question.key for question in questions(own)}
    for other in (("--answers", "1"), ("--seed", "5"), ("--system", "In French."), ("--max-completion-tokens", "9")):
        more = perlhf(*words, "--project", str(project), *other)
        assert more.code == 2 and "as-they-come.jsonl:1" in more.err, more.err
    assert read_lines(tmp_path / "as-they-come.jsonl") == whole


@pytest.mark.parametrize("killed", [False, True])
def test_two_at_once_on_one_file_answer_and_ask_everything_once(words, tmp_path, perlhf, monkeypatch, killed) -> None:
    """The other begins and ends between two batches of the one, which may be killed after its next one."""
    monkeypatch.setattr("perlhf.evaluation.shared.ROWS", 4)
    assert perlhf(*words).code == 0
    whole, asked = read_lines(tmp_path / "answers.jsonl"), answers.bring
    file, project = tmp_path / "both.jsonl", tmp_path / "project"
    words = [*words[:2], str(file), *words[3:], "--project", str(project)]
    new: list[int] = []

    def bring(*given: Any) -> int:
        new.append(asked(*given))
        if len(new) == 2:
            assert perlhf(*words).code == 0 and read_lines(file) == whole
            new.append(-1)
        if killed and new[-2:-1] == [-1]:
            raise KeyboardInterrupt
        return new[-1]

    monkeypatch.setattr(answers, "bring", bring)
    assert perlhf(*words).code == (130 if killed else 0)
    after = new[new.index(-1) + 1 :]
    assert after and not any(after), "what the other has asked isn't asked again"
    if killed:
        assert 4 < len(read_lines(file)) < len(whole), "the one has written what it has answered"
        assert perlhf(*words).code == 0
    assert read_lines(file) == whole
    own = ProjectConfig(questions=QuestionsConfig(paths=(str(file),)))
    assert Store(project / "labels.sqlite").keys() == {question.key for question in questions(own)}


def test_any_text_is_read_back_and_a_place_is_made_or_told_first(words, tmp_path, perlhf) -> None:
    odd = "tea\u2028or\u2029coffee\x85?"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": odd}) + "\n", "utf-8")
    words[2] = str(tmp_path / "new" / "place" / "answers.jsonl")
    words += ["--split", "all", "--project", str(tmp_path / "project")]
    assert [perlhf(*words).code, perlhf(*words).code] == [0, 0]
    assert [row["prompt"] for row in read_lines(Path(words[2]))] == [odd]
    Path(words[2]).write_bytes(b"\xff\n")
    done = perlhf(*words)
    assert done.code == 2 and "answers.jsonl:1" in done.err, done.err
    words[2] = str(tmp_path / "prompts.jsonl" / "answers.jsonl")
    done = perlhf(*words)
    assert done.code == 2 and "answers 1/1" not in done.err, done.err


def test_a_server_answers_the_same(words, tmp_path, perlhf, vllm, monkeypatch) -> None:
    monkeypatch.setattr("perlhf.rollout.vllm.connection.PAUSE_SECONDS", 0.1)
    greedy = [word if not word.endswith("kind") and word != "base" else f"{word}@0" for word in words]
    assert perlhf(*greedy, "--answers", "1").code == 0
    expected = read_lines(tmp_path / "answers.jsonl")
    served = [*greedy, "--answers", "1", "--sampler", "vllm", "--vllm.url", vllm.url]
    served[2] = str(tmp_path / "served.jsonl")
    vllm.forgets_at, vllm.away_seconds = 12, 0.3
    vllm.longest = 64  # of the 256 tokens that a conversation could have
    done = perlhf(*served)
    assert done.code == 0 and "answers again" in done.err, done.err
    assert read_lines(tmp_path / "served.jsonl") == expected
    assert vllm.loaded == {} and not (tmp_path / "sampler").exists(), "nothing is left"


def test_a_stale_adapter_ends_it_before_anything_is_written(words, tmp_path, perlhf, vllm) -> None:
    vllm.stale = True
    done = perlhf(*words, "--sampler", "vllm", "--vllm.url", vllm.url)
    assert done.code == 4 and "as it was written" in done.err, done.err
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (["nowhere"], "there is no run at nowhere"),
        (["base", "base"], "two who answer are called base"),
        (["{place}/judge"], "reward"),
    ],
)
def test_bad_input_is_one_error(words, perlhf, tmp_path, runs, by, said) -> None:
    at = words.index("--by")
    own = [one.format(place=runs.place) for one in by]
    done = perlhf(*words[: at + 1], *own, *words[at + 4 :])
    assert done.code == 2 and said in done.err and done.err.count("error: ") == 1, done.err
    assert not (tmp_path / "answers.jsonl").exists()
