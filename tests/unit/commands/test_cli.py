"""The command line: what is parsed, what mistakes say, and that help and validation need no torch."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from perlhf import __version__
from perlhf.commands import cli
from perlhf.commands.cli import evaluated_data, main
from perlhf.commands.names import COMMANDS, DATA_COMMANDS, LABEL_COMMANDS
from perlhf.config import stages
from perlhf.config.command_line import parse
from perlhf.config.recipe import submodel

PERLHF = [sys.executable, "-m", "perlhf"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard error of a command that must end with exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert shown.out == ""
    return shown.err


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def plain(text: str) -> str:
    """Help text without box lines and line breaks."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and docstring of every field."""
    for name, info in model.model_fields.items():
        nested = submodel(info.annotation)
        if nested:
            yield from leaves(nested, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.description or ""


ALL = [(name,) for name in COMMANDS] + [("data", name) for name in DATA_COMMANDS]
ALL += [("label", name) for name in LABEL_COMMANDS if name != "label"] + [("label", "PROJECT")]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_has_every_option_with_its_docstring(words, capsys):
    group = {"data": DATA_COMMANDS, "label": LABEL_COMMANDS}.get(words[0], COMMANDS)
    command = group[words[-1] if words[-1] in group else words[0]]
    text = plain(help_of(capsys, *words))
    for name, docstring in leaves(command.model):
        assert docstring, f"{command.model.__name__}.{name} has no docstring"
        assert "\n" not in docstring.strip(), f"{command.model.__name__}.{name}: one line"
        shown = name.rpartition(".")[2].upper() if name in command.positionals else "--" + name.replace("_", "-")
        assert shown in text
        assert " ".join(docstring.split()) in text


def test_help_leaves_out_a_docstrings_margin(capsys):
    assert "\nEvery cell is a run in a process of its own" in help_of(capsys, "compare")


def test_overviews_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"perlhf {__version__}\n"
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.M)
    named = "demo pull base plan data label sft reward policy evaluate score launch chat serve loop compare table"
    assert listed == [*named.split(), "report", "average", "export"]
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: perlhf COMMAND")
    assert main(["data", "-h"]) == 0
    assert "usage: perlhf data COMMAND" in capsys.readouterr().out
    assert main(["label", "-h"]) == 0
    assert "usage: perlhf label PROJECT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["polcy"], ["error: unknown command 'polcy'", "try: policy"]),
        (["data", "inspekt"], ["error: unknown command 'inspekt'", "try: inspect"]),
        (["--verison"], ["error: unknown option '--verison'"]),
        (["reward", "--adapter.rnk", "4"], ["--adapter.rnk", "--adapter.rank"]),
        (["reward", "--adapter.rank", "four"], ["--adapter.rank", "four"]),
        (["reward", "--adapter.rank", "-3"], ["--adapter.rank", "can't be -3", "allowed: a whole number above 0"]),
        (["reward", "--order", "grupped"], ["--order", "grupped", "grouped"]),
        (["reward", "runs/a"], ["error: perlhf reward: 'runs/a' is not a recipe", "ending in .yaml or .yml"]),
        (["demo", "now"], ["error: perlhf demo: unexpected 'now'"]),
        (["policy"], ["error: perlhf policy: reward is empty; give a reward run"]),
        (
            ["policy", "--reward", "runs/r", "--adapter.dropout", "0.1"],
            ["error: perlhf policy: adapter.dropout must be 0"],
        ),
        (["policy", "--reward", "runs/r", "--steps-per-rollout", "2"], ["steps_per_rollout > 1 needs clip"]),
        (["evaluate"], ["RUN", "required"]),
        (["report"], ["--runs", "a list of paths, at least 1"]),
        (["score", "runs/r"], ["paths is empty; give at least one file"]),
        (["sft", "missing.yaml"], ["error: missing.yaml: no such recipe"]),
        (["sft", "--data.validation", "1"], ["--data.validation", "a number of at least 0 and below 1"]),
        (["sft", "--data.validation", "0.6", "--data.test", "0.5"], ["--data", "leaves no training group"]),
        (["data", "validate", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["launch", "--workers", "2", "compare", "x.yaml"], ["compare is no work for several workers", "--jobs"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, parts, capsys):
    message = fails(capsys, *arguments)
    for part in parts:
        assert part in message


def stage(name: str, *arguments: str):
    return parse(COMMANDS[name], arguments)


def test_options_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("adapter: {rank: 4, alpha: 8}\ndata: {paths: [a, b]}\nthreads: 3\n")
    settings, dry_run = stage("reward", str(recipe), "--adapter.rank", "2", "--threads", "null", "--dry-run")
    assert (settings.adapter.rank, settings.adapter.alpha, settings.adapter.dropout) == (2, 8.0, 0.0)
    assert settings.data.paths == ("a", "b")
    assert settings.threads is None
    assert dry_run is True
    assert stage("reward", str(recipe))[1] is False


def test_names_are_as_in_the_recipe_or_with_hyphens(tmp_path):
    for spelling in ("--examples_per_update", "--examples-per-update"):
        assert stage("sft", spelling, "5")[0].examples_per_update == 5
    assert stage("sft", "--adapter.targets", "q_proj", "v_proj")[0].adapter.targets == ("q_proj", "v_proj")
    assert stage("sft", "--adapter.targets", "all")[0].adapter.targets == "all"
    assert stage("sft", "--encoding.drop-long")[0].encoding.drop_long is True
    assert stage("sft", "--optim.learning-rate", "1e-4")[0].optim.learning_rate == 1e-4


def test_an_option_may_complete_a_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("kl_coef: 0.1\n")
    assert stage("policy", str(recipe), "--reward", "runs/r")[0].reward == ("runs/r",)


def test_a_recipe_is_blamed_for_its_own_mistakes_only(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("seed: 1\nadapter:\n  rank: 0\n")
    assert f"{recipe}:3: `adapter.rank` can't be 0" in fails(capsys, "sft", str(recipe), "--adapter.rank", "4")
    recipe.write_text("seed: 1\nadapter:\n  rank: 4\n")
    assert "--adapter.rank: `adapter.rank` can't be 0" in fails(capsys, "sft", str(recipe), "--adapter.rank", "0")


def test_names_and_values_are_typed_as_in_a_recipe(tmp_path, capsys):
    command = DATA_COMMANDS["validate"]
    for typed in ("{prompt: question, chosen: best.text}", '{"prompt": "question", "chosen": "best.text"}'):
        settings, _ = parse(command, ["a.jsonl", "--columns", typed, "--ratings.up", "4", "--ties", "error"])
        assert settings.columns == {"prompt": "question", "chosen": "best.text"}
        assert settings.ratings is not None and (settings.ratings.up, settings.ratings.down) == (4.0, None)
        assert settings.ties == "error"
    unset, _ = parse(command, ["a.jsonl"])
    assert unset.ratings is None and unset.columns == {}
    recipe = tmp_path / "a.yaml"
    recipe.write_text("data: {paths: [a], columns: {prompt: q}, ratings: {up: 3}}\n")
    config, _ = parse(COMMANDS["sft"], [str(recipe), "--data.ratings.down", "1"])
    assert config.data.columns == {"prompt": "q"} and config.data.ratings.model_dump() == {"up": 3.0, "down": 1.0}
    with pytest.raises(SystemExit) as caught:
        parse(command, ["a.jsonl", "--columns", "prompt"])
    assert caught.value.code == 2
    assert "names and values" in " ".join(capsys.readouterr().err.split())


def test_grades_are_read_by_their_rule(tmp_path, capsys):
    path = tmp_path / "stars.jsonl"
    path.write_text("".join(json.dumps({"q": "Hi", "completion": f"a{n}", "stars": n}) + "\n" for n in (1, 3, 5)))
    named = ["data", "validate", str(path), "--columns", "{prompt: q}"]
    assert main(named) == 2
    assert "data.ratings: {up: 4, down: 2}" in capsys.readouterr().err
    assert main([*named, "--ratings.up", "4", "--ratings.down", "2"]) == 0
    assert "rating" in capsys.readouterr().out
    written = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(path), str(written), *named[3:], "--ratings.up", "4"]) == 0
    assert [json.loads(line)["label"] for line in written.read_text().splitlines()] == [False, False, True]


def test_positionals():
    report, _ = stage("report", "runs/a", "runs/b", "--title", "x")
    assert report.runs == (Path("runs/a"), Path("runs/b"))
    assert stage("report", "--title", "x", "runs/a")[0].runs == (Path("runs/a"),)
    assert stage("export", "runs/a", "out", "--format", "merged")[0].output == Path("out")
    assert stage("score", "runs/a", "f.jsonl")[0].data.paths == ("f.jsonl",)
    assert stage("pull")[0].base == stages.DEFAULT_BASE
    assert stage("pull", "org/model")[0].base == "org/model"
    assert stage("chat")[0].run is None


def test_data_of_evaluate_is_null_unless_asked_for():
    assert stage("evaluate", "runs/r")[0].data is None
    assert stage("evaluate", "runs/r", "--data.limit", "5")[0].data == stages.DataConfig(limit=5)


def test_data_options_of_evaluate_start_from_the_data_of_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\ndata: {paths: [coffee.json], test: 0.3}\n")
    arguments = [str(tmp_path), "--data.limit", "5"]
    settings, _ = parse(COMMANDS["evaluate"], arguments, evaluated_data(arguments))
    assert settings.data == stages.DataConfig(paths=("coffee.json",), test=0.3, limit=5)
    assert evaluated_data([str(tmp_path)]) is None
    (tmp_path / "config.yaml").write_text("data: {paths: [me/set], split: train_sft, config: en, test: 0.3}\n")
    assert evaluated_data([str(tmp_path), "--data.split", "test"]) == {
        "data": {"paths": ["me/set"], "split": "train_sft", "config": "en", "test": 0.3}
    }
    other = {"data": {"paths": ["me/set"], "test": 0.3}}  # the split of a set says nothing about another one
    assert evaluated_data([str(tmp_path), "--data.paths", "mine.jsonl"]) == other
    assert evaluated_data([str(tmp_path / "elsewhere"), "--data.limit", "5"]) is None


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reward", "--dry-run", "--adapter.rank", "8", "--data.limit", "40", "--examples-per-update", "7"]) == 0
    shown = capsys.readouterr().out
    assert "rank: 8" in shown
    cells = dict(re.findall(r"│ (.+?) +│ (.+?) +│", shown))
    assert cells["records, train"] == "40"
    assert cells["updates"] == "6", "ceil(40 / 7)"
    # 30 layers of q and o (576 + 576), k and v (576 + 192), rank 8, and a head of 576.
    assert cells["trainable, reward"].startswith(f"{30 * 8 * (2 * 1152 + 2 * 768) + 576:,} ")
    assert "tree of shared prefixes" in cells["way"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_several_workers_tells_their_part_of_the_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stage, found = ["sft", "--dry-run", "--data.limit", "40", "--shard", "full"], dict[int, tuple[int, str]]()
    for workers in (1, 2):
        assert main(["launch", "--workers", str(workers), *stage]) == 0
        shown = capsys.readouterr().out
        cells = dict(re.findall(r"│ (.+?) +│ (.+?) +│", shown))
        found[workers] = int(cells["memory, base"].split()[0]), shown
    # The embedding, which is the head, is whole.
    assert found[2][0] / found[1][0] == pytest.approx((134_515_008 + 28_311_552) / (2 * 134_515_008), rel=0.01)
    assert "the whole base" in found[1][1] and "each of 2 workers" in found[2][1]
    assert list(tmp_path.iterdir()) == []


def test_data_commands(tmp_path, capsys):
    rows = [
        {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No.", "group": "a"},
        {"prompt": "Milk?", "chosen": "Please.", "rejected": "Never.", "group": "b"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "validate", str(path)]) == 0
    assert re.search(r"records.comparison +│ 2", capsys.readouterr().out)
    assert main(["data", "inspect", str(path)]) == 0
    assert re.search(r"groups +│ 2", capsys.readouterr().out)
    assert main(["data", "convert", str(path), str(tmp_path / "out.jsonl")]) == 0
    assert "2 records" in capsys.readouterr().out
    assert [json.loads(line)["chosen"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        "Yes.",
        "Please.",
    ]
    for side in ("train", "test"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{side}.jsonl").write_text(json.dumps(rows[side == "test"]) + "\n")
    for words in (["validate", str(tmp_path / "set")], ["inspect", str(tmp_path / "set")]):
        assert main(["data", *words, "--split", "test"]) == 0
        assert re.search(r"comparison +│ 1", capsys.readouterr().out)
    assert main(["data", "convert", str(tmp_path / "set"), str(tmp_path / "o.jsonl"), "--split", "all"]) == 0
    assert "2 records" in capsys.readouterr().out
    assert main(["data", "validate", str(tmp_path / "set"), "--config", "en"]) == 2
    assert "data.config" in capsys.readouterr().err
    assert main(["data", "formats"]) == 0
    assert "trl" in capsys.readouterr().out
    path.write_text(json.dumps({"prompt": "Tea?", "chosen": "", "rejected": "No."}) + "\n")
    assert main(["data", "validate", str(path)]) == 2
    assert f"{path.name}:1" in capsys.readouterr().err


NO_TORCH = """
import sys
from perlhf.commands.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
heavy = [name for name in ("torch", "transformers", "datasets", "matplotlib", "pyarrow") if name in sys.modules]
print(code, heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["policy", "--help"], 0), (["reward", "--adapter.rank", "0"], 2)],
    ids=["help", "validation"],
)
def test_help_and_validation_import_nothing_heavy(arguments, code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.stderr.splitlines()[-1] == f"{code} []"


HEARS_INTERRUPTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_an_interrupt_ends_with_130_and_no_traceback(tmp_path):
    pipe = tmp_path / "slow.yaml"
    os.mkfifo(pipe)
    # A shell's background job ignores SIGINT and hands that on; a person's command doesn't.
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS_INTERRUPTS, *PERLHF, "sft", str(pipe)],
        stderr=subprocess.PIPE,
        text=True,
    )
    with pipe.open("w"):  # returns once the command reads the recipe
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=300)
    assert process.returncode == 130
    assert shown == "error: interrupted\n"


def test_an_interrupt_while_a_class_is_made_is_one(monkeypatch, capsys):
    """As modules are loaded; Python 3.11 makes it the cause of an error of its own."""

    def interrupted(_: object) -> int:
        raise RuntimeError("Error calling __set_name__ on 'cached_property' instance") from KeyboardInterrupt()

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert cli.main(["data", "formats"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_full_gpu_is_a_mistake_with_a_way_out(monkeypatch, capsys):
    def full(_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

    monkeypatch.setattr(cli, "_dispatch", full)
    assert cli.main(["reward"]) == 2
    said = capsys.readouterr().err
    assert "memory is full: CUDA out of memory" in said and "tokens_per_microbatch" in said and "GPU 0" not in said
    monkeypatch.setattr(cli, "_dispatch", lambda _: (_ for _ in ()).throw(RuntimeError("other")))
    assert cli.main(["reward"]) == 70
    assert "a mistake of perlhf's own, RuntimeError: other" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m perlhf data formats | head -c 1; echo; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] in ("141", "0"), "0 where the pipe took everything before it was closed"
    assert done.stderr == ""


def run(*arguments: str, **options):
    return subprocess.run([*PERLHF, *arguments], stderr=subprocess.PIPE, text=True, timeout=300, **options)


def test_an_output_on_a_full_disk_is_one_message():
    with open("/dev/full", "w") as full:
        done = run("data", "formats", stdout=full)
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: can't read or write: No space left on device") and done.stderr.count("\n") == 2
    )


def test_closed_streams_are_no_mistake(tmp_path):
    """What is opened next would get the number of a closed stream, and messages with it."""
    for closed in (">&-", "2>&-", ">&- 2>&- <&-"):
        path = tmp_path / "a.yaml"
        path.write_text("seed: x\n")
        command = f"{' '.join(PERLHF)} sft {path} {closed}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
        assert path.read_text() == "seed: x\n"


def test_words_that_are_not_utf8_are_refused(capsys):
    assert "argument 3: '\\udcff' is not UTF-8" in fails(capsys, "sft", "--run", "\udcff")


def test_paths_that_look_like_markup_or_hold_line_breaks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}
    for name in ("[/b].jsonl", "a\nb.jsonl", "\x1b[31m.jsonl", "[bold]", "c" * 249 + ".jsonl"):
        output = Path(name)
        if output.suffix:
            Path("in.jsonl").write_text(json.dumps(row) + "\n")
            assert main(["data", "convert", "in.jsonl", name]) == 0
            assert main(["data", "inspect", name]) == 0
            assert main(["data", "validate", name]) == 0
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        assert main(["data", "split", "in.jsonl", "--output", name + "d", "--data.test", "0"]) in (0, 2)
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err and "mistake" not in shown.err


def test_a_narrow_terminal_cuts_nothing(tmp_path, monkeypatch, capsys):
    """What doesn't fit goes on in the next line; numbers and names ended in "..." instead."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "20")
    Path("a-file-with-a-long-name.jsonl").write_text('{"prompt": "Tea?", "completion": "Yes."}\n')
    assert main(["data", "inspect", "a-file-with-a-long-name.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 20
    values = "".join(line.split("│")[2].strip() for line in shown.splitlines() if line.count("│") == 3)
    assert "a-file-with-a-long-name.jsonl:1" in values
