"""`perlhf loop`: two rounds with a judge over HTTP, killed and continued; with people; with a server that samples; and
what is refused.
"""

import json
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from toy import Moment, finish, lasting, prompts, read_json, read_lines, write_rows
from vllm_server import vllm

from perlhf.evaluation import shared
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Said
from perlhf.labelling.project import LABELS
from perlhf.labelling.records import labelled_rows
from perlhf.labelling.rounds import labellers
from perlhf.rollout.vllm import connection
from perlhf.serving.feedback import Answers, Feedback

__all__ = ["vllm"]

FIRST_KILL, LATER = 3, 9
"""At which file that is put in its place a loop is killed, and by how many more each continuation of it."""


def settings(base: Path, data: Path, run: Path, **changed: Any) -> dict[str, Any]:
    """A loop on the tiny base, a few updates of each stage."""
    optim = {"learning_rate": 1e-2}
    return {
        "run": str(run),
        "base": str(base),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "rounds": 2,
        "labels_per_round": 6,
        "prompts_per_round": 8,
        "answers_per_prompt": 2,
        "held_out_labels": 6,
        "duels": 4,
        "bootstrap": 20,
        "data": {"paths": [str(data)], "validation": 0.2, "test": 0.3},
        "encoding": {"max_tokens": 96},
        "reward": {"members": 2, "adapter": {"rank": 2}, "epochs": 1, "examples_per_update": 4, "optim": optim},
        "policy": {
            "adapter": {"rank": 2},
            "updates": 2,
            "prompts_per_update": 2,
            "completions_per_prompt": 2,
            "max_completion_tokens": 6,
            "validation_prompts": 2,
            "bounded": True,
            "max_disagreement": 1000.0,
            "optim": optim,
        },
    } | changed


def recipe(path: Path, values: dict[str, Any]) -> str:
    path.write_text(json.dumps(values))
    return str(path)


def judged(request: Any) -> dict[str, Any]:
    """Prefers the reply with more letters of the first half of the alphabet; of as many, the longer."""
    content = request.body["messages"][0]["content"]
    first, second = re.findall(r"<reply_\d>\n(.*?)\n</reply_\d>", content, re.S)
    worth = [(sum("a" <= c <= "m" for c in text.lower()), len(text), text) for text in (first, second)]
    return {"choices": [{"message": {"content": "1" if worth[0] > worth[1] else "2"}}]}


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same whether or not a loop was killed."""
    found = read_json(run / "loop.json")
    for one in found["rounds"]:
        one.pop("seconds")
    result: dict[str, Any] = {"loop": found}
    for number in (1, 2):
        place = run / f"round-{number:04d}"
        rows = [
            {k: v for k, v in row.items() if k != "annotator"} for row in read_lines(place / "labels/records.jsonl")
        ]
        result[f"records {number}"] = sorted(rows, key=json.dumps)
        for name in ("reward", "policy"):
            for file in sorted((place / name / "adapter").rglob("*.safetensors")):
                result[f"{name} {number} {file.parent.name}"] = file.read_bytes()
            result[f"{name} result {number}"] = lasting(read_json(place / name / "result.json"))
    return result


def test_a_loop_killed_anywhere_ends_as_one_that_was_not(tiny_base, feedback, tmp_path, serve):
    data = write_rows(tmp_path / "prompts.jsonl", prompts(64))
    given = {"labeller": "judge", "judge": serve(judged)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["loop", recipe(tmp_path / "whole.yaml", settings(tiny_base, data, whole, **given))]
    assert finish(command, tmp_path / "whole.log", tmp_path) == 0
    command = ["loop", recipe(tmp_path / "killed.yaml", settings(tiny_base, data, killed, **given))]
    ended: list[int | None] = [-9]
    while ended[-1] == -9:
        at = FIRST_KILL + LATER * (len(ended) - 1)
        ended.append(finish(command, tmp_path / "killed.log", tmp_path, Moment("posix.replace", at)))
    assert ended[-1] == 0 and len(ended) > 4
    found, expected = outcome(killed), outcome(whole)
    assert found["loop"] == expected["loop"]
    assert [key for key in expected if found[key] != expected[key]] == []
    store = Store(killed / "labels" / LABELS)
    said = store.labels()
    assert max(Counter(label.question.key for label in said).values()) == 1, "nothing was asked twice"
    log = (tmp_path / "killed.log").read_text()
    assert "Traceback" not in log

    for number in (1, 2):
        policy = whole / f"round-000{number}" / "policy"
        assert read_json(policy / "result.json")["best_step"] == 2, "the last is kept"
        last = load_file(policy / "checkpoints" / "00000002" / "policy.safetensors")
        kept = load_file(policy / "adapter" / "adapter_model.safetensors").values()
        shapes = sorted((tuple(tensor.shape), float(tensor.sum())) for tensor in last.values())
        assert sorted((tuple(tensor.shape), float(tensor.sum())) for tensor in kept) == shapes
    assert sum(key.startswith("reward 2 ") for key in expected) == 2, "members"
    first, second = expected["loop"]["rounds"]
    assert second["kl"]["value"] != 0
    assert first["drawn"] == {"random": 6} and second["drawn"] == {"disagreement": 4, "random": 2}
    assert second["labels"] > first["labels"] and first["kl"] is not None
    assert {"accuracy", "predicted", "preferred", "disagreement", "tokens"} <= first.keys()
    page = (whole / "loop.html").read_text()
    assert expected["loop"]["verdict"] in page and "<script" not in page
    assert read_json(whole / "labels" / "learned.json")["sentence"] == expected["loop"]["curve"]["sentence"]


@pytest.fixture(scope="module")
def held_out() -> Any:
    """Whether the loop holds a group out."""
    from perlhf.config.stages import DataConfig
    from perlhf.data.splits import split_of

    return lambda group: split_of(group, DataConfig(validation=0.2, test=0.3)) != "train"


def test_people_answer_on_the_page_and_held_out_groups_are_never_learned_from(
    tiny_base, tmp_path, monkeypatch, capfd, held_out
):
    from perlhf.commands.cli import main

    monkeypatch.setattr(labellers, "LOOK_SECONDS", 0.02)
    data, run = write_rows(tmp_path / "prompts.jsonl", prompts(64)), tmp_path / "run"
    given = settings(tiny_base, data, run, order="information", random_share=0.0)
    ended: list[int] = []
    loop = threading.Thread(target=lambda: ended.append(main(["loop", recipe(tmp_path / "loop.yaml", given)])))
    loop.start()
    while not (run / "round-0001" / "questions" / "questions.jsonl").exists():
        assert loop.is_alive()
        time.sleep(0.05)
    store = Store(run / "labels" / LABELS)
    said_in_use(run / "labels", [row["prompt"] for row in read_lines(data)])
    people = [store.labeller("ana"), store.labeller("bo")]
    number = 0
    while loop.is_alive():
        person = people[number % 2]
        task = store.next_task(person, 60)
        if task is None:
            time.sleep(0.02)
            continue
        number += 1
        verdict = "both_bad" if number % 7 == 0 else "first" if number % 2 else "second"
        assert store.say(person, task.id, Said(verdict), f"key of {task.id}", 1.0)
    loop.join()
    assert ended == [0]
    assert "questions wait" in capfd.readouterr().err
    rows = read_lines(run / "round-0002" / "labels" / "records.jsonl")
    learned = [row for row in rows if not held_out(row["group"])]
    assert read_json(run / "round-0002" / "reward" / "result.json")["train_examples"] == len(learned) < len(rows)
    for asked in (
        row for file in run.glob("round-*/*/*.jsonl") if file.stem in ("questions", "duels") for row in read_lines(file)
    ):
        assert held_out(asked["question"]["group"]) == (asked["what"] != "learn")
        if asked["what"] == "learn" and asked["question"]["drawn"] == "information":
            assert 0 <= asked["known"]["information"] <= 0.6932
    assert len(list(labelled_rows(store.labels(), _project(run), "all"))) >= len(rows)
    found = read_json(run / "loop.json")["rounds"][1]
    served = [row for row in rows if "source" in row]
    pairs = {"serve:policy@1,sft@2", "serve:sft@2,policy@1"}
    assert {row["source"] for row in served} == {"serve:policy@1", *pairs} and len(served) == 192
    assert found["served"] == sum(not held_out(row["group"]) for row in served)
    chosen = [row for row in served if "chosen" in row and held_out(row["group"])]
    assert 0 < found["accuracy_in_use"]["value"] <= 1 and len(chosen) > 10
    scores = read_json(run / "round-0002" / "evaluation" / "scores.json")
    assert scores["in_use_groups"] == [row["group"] for row in chosen] and len(scores["in_use"][0]) == len(chosen)
    page = (run / "loop.html").read_text()
    assert f"{found['served']} from serving" in page and "choices made in use on held-out prompts" in page
    assert "192, of serve:policy@1 (128)" in (run / "round-0002" / "labels" / "statement.md").read_text()


def said_in_use(project: Path, asked: list[Any]) -> None:
    """A thumb for either of two answers to each prompt, and which is better."""
    answers, feedback = Answers(), Feedback(project)
    for number, prompt in enumerate(asked):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answers.remember("a", 0, messages, f"Yes, {number}.", "policy", 1)
        answers.remember("b", 0, messages, "no", "sft", 2)
        feedback.take({"id": "a", "thumb": "up"}, answers, "cy")
        messages = [*messages, {"role": "assistant", "content": "What?"}, {"role": "user", "content": "Please."}]
        answers.remember("c", 0, messages, "Well, no.", "policy", 1)
        feedback.take({"id": "c", "thumb": "down"}, answers, "cy")
        feedback.take({"first": {"id": "b"}, "second": {"id": "a"}, "verdict": "second"}, answers, "cy")
    feedback.close()


def _project(run: Path) -> Any:
    from perlhf.config.labelling import ProjectConfig
    from perlhf.config.recipe import load_recipe

    return load_recipe(run / "labels" / "project.yaml", ProjectConfig)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"labeller": "judge"}, ("labeller: judge and judge: ADDRESS belong together",)),
        ({"labeller": "simulated"}, ("labeller: simulated answers by the rules of builtin:coffee-bar",)),
        ({"noise": 0.1}, ("noise is of a simulated labeller",)),
        ({"noise": 0.7}, ("loop.yaml:", "`noise` can't be 0.7")),
        ({"order": "informaton"}, ("`order` can't be", "allowed: random, disagreement or information")),
        ({"labels_per_round": 99}, ("labels_per_round 99 exceeds prompts_per_round 8",)),
        ({"reward": {"members": 1}}, ("order: disagreement needs reward.members of 2 or more",)),
        ({"reward": {"adapter": {"dropout": 0.1}}}, ("reward.adapter.dropout must be 0 with reward.members above 1",)),
        ({"sft": "nowhere"}, ("nowhere is no finished run",)),
        ({"data": {"paths": ["nowhere.jsonl"]}}, ("nowhere.jsonl",)),
        ({"data": {"test": 0.0}}, ("data.validation and data.test must be above 0",)),
        ({"base": "nowhere"}, ("nowhere",)),
        ({"judge": "http://me:secret@host/"}, ("judge",)),
    ],
)
def test_a_wrong_recipe_is_one_sentence(changed, parts, tiny_base, tmp_path, capfd):
    from perlhf.commands.cli import main

    data = write_rows(tmp_path / "prompts.jsonl", prompts(64))
    values = settings(tiny_base, data, tmp_path / "run") | changed
    assert main(["loop", recipe(tmp_path / "loop.yaml", values)]) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said and "secret" not in said
    for part in parts:
        assert part in said.replace("\n", " "), said


def test_a_directory_of_something_else_and_another_loop_are_refused(tiny_base, tmp_path, capfd):
    from perlhf.commands.cli import main

    data, run = write_rows(tmp_path / "prompts.jsonl", prompts(64)), tmp_path / "run"
    path = recipe(tmp_path / "loop.yaml", settings(tiny_base, data, run))
    run.mkdir()
    (run / "diary.txt").write_text("mine")
    assert main(["loop", path]) == 2
    assert "holds 'diary.txt' and no loop" in capfd.readouterr().err
    (run / "diary.txt").unlink()
    (run / "loop.yaml").write_text("- what")
    assert main(["loop", path]) == 2
    assert "loop.yaml" in capfd.readouterr().err
    values = yaml.safe_load(Path(path).read_text()) | {"seed": 5}
    from perlhf.config.loop import LoopConfig

    then = LoopConfig(**values)
    (run / "loop.yaml").write_text(yaml.safe_dump(json.loads(then.model_dump_json())))
    assert main(["loop", path]) == 2
    assert "seed is 0, but 5 in the loop that is here" in capfd.readouterr().err


def test_a_project_that_masks_asks_about_groups_that_stay_on_their_side(tiny_base, tmp_path, serve, held_out):
    from perlhf.commands.cli import main

    rows = [{"prompt": f"Call +49 170 {1000000 + 7 * at} when table {at % 9} is free."} for at in range(96)]
    data, run, project = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "run", tmp_path / "project"
    project.mkdir()
    (project / "project.yaml").write_text("redact: true\nquestions: {paths: []}\n")
    given = {"labeller": "judge", "judge": serve(judged), "project": str(project), "rounds": 1, "duels": 12}
    assert main(["loop", recipe(tmp_path / "loop.yaml", settings(tiny_base, data, run, **given))]) == 0
    place = run / "round-0001"
    asked = [
        row for file in ("questions/questions.jsonl", "evaluation/duels.jsonl") for row in read_lines(place / file)
    ]
    assert {row["what"] for row in asked} == {"learn", "measure", "duel"}
    for row in asked:
        assert held_out(row["question"]["group"]) == (row["what"] != "learn")
        assert "[phone number]" in row["question"]["prompt"]
    assert read_json(run / "loop.json")["rounds"][0]["judged_duels"] < read_json(run / "loop.json")["duels"] == 12


def test_what_may_change_between_two_runs_of_a_loop(tiny_base, tmp_path, serve, capfd):
    from perlhf.commands.cli import main

    data, run = write_rows(tmp_path / "prompts.jsonl", prompts(24)), tmp_path / "run"
    values = settings(tiny_base, data, run, labeller="judge", judge=serve(judged), duels=40)
    words = ["loop", recipe(tmp_path / "loop.yaml", values)]
    assert main(words) == 0
    whole = (run / "loop.json").read_bytes()
    assert json.loads(whole)["duels"] == len(read_json(run / "round-0001/evaluation/evaluation.json")["samples"]) < 40
    assert main([*words, "--rounds", "1", "--judge", serve(judged)]) == 0
    assert (run / "loop.json").read_bytes() == whole, "what more rounds have shown stays"
    capfd.readouterr()
    write_rows(data, prompts(25))
    assert main(words) == 2
    said = capfd.readouterr().err
    assert "prompts.jsonl isn't what it was when the loop began" in said and "--project" in said
    assert main([*words, "--run", str(tmp_path / "new"), "--project", str(run / "labels"), "--rounds", "1"]) == 0
    records = [len(read_lines(place / "round-0001/labels/records.jsonl")) for place in (run, tmp_path / "new")]
    assert records[1] > records[0], "labels of the other loop are learned from"


def test_what_is_too_long_is_neither_asked_for_its_worth_nor_counted(tiny_base, tmp_path, serve):
    from perlhf.commands.cli import main

    data, run = write_rows(tmp_path / "prompts.jsonl", prompts(64)), tmp_path / "run"
    short = {"encoding": {"max_tokens": 12, "drop_long": True}, "held_out_labels": 16, "prompts_per_round": 24}
    values = settings(tiny_base, data, run, labeller="judge", judge=serve(judged), random_share=0.0, **short)
    assert main(["loop", recipe(tmp_path / "loop.yaml", values)]) == 0
    asked = read_lines(run / "round-0002/questions/questions.jsonl")
    assert all(row["known"].keys() == {"disagreement", "information"} for row in asked)
    found, scores = read_json(run / "loop.json"), read_json(run / "round-0001/evaluation/scores.json")["held_out"]
    measure = [row["question"]["key"] for row in read_lines(run / "round-0001/questions/questions.jsonl")][-16:]
    said = {label.question.key: label.said.verdict for label in Store(run / "labels" / LABELS).labels()}
    judged_ones = [said[key] in ("first", "second") for key in measure]
    both = [judged and None not in pair for judged, pair in zip(judged_ones, scores[0], strict=True)]
    assert 0 < found["held_out_questions"] == sum(both) < sum(judged_ones)
    for one in found["rounds"]:
        place = run / f"round-{one['round']:04d}"
        assert one["labels"] == read_json(place / "reward/result.json")["train_examples"]


def test_labels_about_answers_that_are_too_long_are_left_out_and_told(tiny_base, tmp_path, serve, held_out):
    from perlhf.commands.cli import main
    from perlhf.labelling.project import made

    data, run = write_rows(tmp_path / "prompts.jsonl", prompts(64)), tmp_path / "run"
    asked = [row["prompt"] for row in read_lines(data)]
    project = tmp_path / "project"
    made(project)
    answers, feedback = Answers(), Feedback(project)
    for prompt in asked:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answers.remember("long", 0, messages, "word " * 200, "policy", 1)
        answers.remember("short", 0, messages, "no", "sft", 2)
        feedback.take({"first": {"id": "long"}, "second": {"id": "short"}, "verdict": "second"}, answers, "cy")
    feedback.close()
    values = settings(tiny_base, data, run, labeller="judge", judge=serve(judged), rounds=1)
    assert main(["loop", recipe(tmp_path / "loop.yaml", values | {"project": str(project)})]) == 0
    (found,) = read_json(run / "loop.json")["rounds"]
    rows = read_lines(run / "round-0001/labels/records.jsonl")
    served = [row for row in rows if "source" in row]
    assert len(served) == len(asked), "they are labels as others are"
    assert found["too_long"] == sum(not held_out(row["group"]) for row in served) > 0
    assert found["labels"] == len(rows) - len(served) - sum(
        held_out(row["group"]) for row in rows if "source" not in row
    )
    scores = read_json(run / "round-0001/evaluation/scores.json")
    assert scores["in_use"] and all(pair[0] is None or pair[1] is None for pair in scores["in_use"][0])
    assert found["accuracy_in_use"] is None
    assert (
        f"{found['too_long']} labels are about answers longer than encoding.max_tokens"
        in (run / "loop.html").read_text()
    )


def test_adapters_that_do_not_fit_are_told_before_anybody_labels(tiny_base, tmp_path, capfd, monkeypatch):
    from perlhf.commands.cli import main

    monkeypatch.setattr(labellers, "label", lambda *_: pytest.fail("people were asked"))
    data = write_rows(tmp_path / "prompts.jsonl", prompts(64))
    for stage in ("reward", "policy"):
        words = ["loop", recipe(tmp_path / "loop.yaml", settings(tiny_base, data, tmp_path / stage))]
        assert main([*words, f"--{stage}.adapter.targets", "nonsense"]) == 2
        assert "adapter target 'nonsense' matches no linear layer" in capfd.readouterr().err


def test_a_dry_run_says_how_many_labels_and_writes_nothing(tiny_base, tmp_path, capfd):
    from perlhf.commands.cli import main

    data = write_rows(tmp_path / "prompts.jsonl", prompts(64))
    path = recipe(tmp_path / "loop.yaml", settings(tiny_base, data, tmp_path / "run"))
    assert main(["loop", path, "--dry-run", "--rounds", "3"]) == 0
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "labels to learn from, at most 18" in said and "labels to measure with, at most 6" in said
    assert "labels for duels, at most 12" in said and "people's time about 12" in said, said
    assert not (tmp_path / "run").exists()
    few = write_rows(tmp_path / "few.jsonl", prompts(8))
    given = settings(tiny_base, few, tmp_path / "run", labels_per_round=8, held_out_labels=40, duels=40)
    assert main(["loop", recipe(tmp_path / "few.yaml", given), "--dry-run"]) == 0
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    train, validation, test = (int(number) for number in re.findall(r"prompts, \w+ (\d+)", said))
    assert train + validation + test == 8 and f"to learn from, at most {2 * train} " in said
    assert f"to measure with, at most {validation + test} " in said and f"for duels, at most {2 * test} " in said


def test_a_dry_run_asks_the_server_that_is_to_sample(tiny_base, tmp_path, capfd, vllm):
    from perlhf.commands.cli import main

    data, run = write_rows(tmp_path / "prompts.jsonl", prompts(64)), tmp_path / "run"

    def dry(**server: str) -> tuple[int, str]:
        values = settings(tiny_base, data, run, sampler="vllm", vllm=server)
        code = main(["loop", recipe(tmp_path / "loop.yaml", values), "--dry-run"])
        found = capfd.readouterr()
        return code, " ".join((found.out + found.err).replace("│", " ").split())

    code, said = dry(url=vllm.url)
    assert code == 0 and f"vLLM at {vllm.url}, which must hold 2 adapters" in said and not vllm.loaded, said
    code, said = dry(url="http://127.0.0.1:9")
    assert code == 2 and said.count("error: ") == 1 and "--vllm.url http://HOST:8000" in said, said
    vllm.version = "0.12.1"
    code, said = dry(url=vllm.url)
    assert code == 2 and "allowed: vLLM 0.32" in said, said
    assert not run.exists()


def test_a_server_that_could_not_train_is_told_before_anybody_labels(tiny_base, tmp_path, capfd, monkeypatch, vllm):
    """The start is the base: an adapter is sent for the first answers to see whether it can be."""
    from perlhf.commands.cli import main

    monkeypatch.setattr(labellers, "label", lambda *_: pytest.fail("people were asked"))
    data, run = write_rows(tmp_path / "prompts.jsonl", prompts(64)), tmp_path / "run"
    values = settings(tiny_base, data, run, sampler="vllm", vllm={"url": vllm.url})
    vllm.max_loras = 1
    assert main(["loop", recipe(tmp_path / "loop.yaml", values)]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "the server holds 1 adapters at a time" in said and "--max-loras 2" in said, said
    vllm.max_loras, vllm.max_rank = 2, 1
    assert main(["loop", recipe(tmp_path / "loop.yaml", values), "--run", str(tmp_path / "narrow")]) == 2
    assert "--max-lora-rank 8" in " ".join(capfd.readouterr().err.split())
    vllm.max_rank, vllm.updating = 8, False
    assert main(["loop", recipe(tmp_path / "loop.yaml", values), "--run", str(tmp_path / "fixed")]) == 2
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in " ".join(capfd.readouterr().err.split())
    vllm.updating, vllm.raw = True, True
    values["policy"]["temperature"] = 0.7
    assert main(["loop", recipe(tmp_path / "loop.yaml", values), "--run", str(tmp_path / "warm")]) == 2
    assert "--logprobs-mode processed_logprobs" in " ".join(capfd.readouterr().err.split())
    assert not list(tmp_path.rglob("answers.jsonl"))


def test_a_server_samples_for_every_step(tiny_base, tmp_path, capfd, monkeypatch, serve, vllm):
    """Answers, training and duels come from it, it is started again on the way, and goes on at another address."""
    from perlhf.commands.cli import main

    monkeypatch.setattr(shared, "sample", lambda *_, **__: pytest.fail("this process sampled"))
    monkeypatch.setattr(connection, "PAUSE_SECONDS", 0.1)
    data, run = write_rows(tmp_path / "prompts.jsonl", prompts(64)), tmp_path / "run"
    given = {"labeller": "judge", "judge": serve(judged), "sampler": "vllm"}
    values = settings(tiny_base, data, run, **given)
    words = ["loop", recipe(tmp_path / "loop.yaml", values | {"vllm": {"url": "http://127.0.0.1:9"}})]
    assert main(words) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "docs/vllm.md" in said
    assert not list((run / "round-0001" / "answers").iterdir())
    vllm.forgets_at, vllm.away_seconds = 40, 0.3
    words = ["loop", recipe(tmp_path / "loop.yaml", values | {"vllm": {"url": vllm.url}})]
    assert main(words) == 0
    assert "answers again" in capfd.readouterr().err
    for number in (1, 2):
        place = run / f"round-{number:04d}"
        assert read_json(place / "evaluation" / "evaluation.json")["sampler"] == "vllm"
        assert "sampler_logprobs" in read_lines(place / "policy" / "rollouts" / "00000001.jsonl")[0]
    assert {row["by"][0] for row in read_lines(run / "round-0002" / "answers" / "answers.jsonl")} == {"policy"}
    assert vllm.loaded == {} and not list(run.rglob("sampler")), "nothing is left, there or here"
