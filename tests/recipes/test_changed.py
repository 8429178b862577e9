"""What a run recorded of all that it depends on is held against what is there, by every command that reads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import command, write_feedback

from perlhf.commands.cli import main
from perlhf.kernels import cpu
from perlhf.rollout.functions import source_hash

SHORT = ("--updates", "1", "--prompts-per-update", "2", "--completions-per-prompt", "2")


@pytest.fixture(scope="session")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, feedback, and runs `sft`, `reward`, `policy`, each built on those before; not to be
    changed.
    """
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_base, place / "base")
    write_feedback(place / "feedback")
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished` that a test may change; the working directory is in it."""
    monkeypatch.chdir(finished)
    if not (finished / "policy").exists():
        for name, data, *options in (
            ("sft", "demonstrations"),
            ("reward", "ratings", "--max-updates", "2"),
            ("policy", "prompts", "--sft", "sft", "--reward", "reward", *SHORT),
        ):
            assert main(command(name, Path("base"), f"feedback/{data}.jsonl", Path(name), *options)) == 0
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    return copy


def retrain_sft(place: Path) -> None:
    shutil.rmtree(place / "sft")
    assert main(command("sft", Path("base"), "feedback/demonstrations.jsonl", Path("sft"), "--seed", "9")) == 0


def retrain_reward(place: Path) -> None:
    shutil.rmtree(place / "reward")
    options = ("--max-updates", "3", "--seed", "9")
    assert main(command("reward", Path("base"), "feedback/ratings.jsonl", Path("reward"), *options)) == 0


def change_tokenizer(place: Path) -> None:
    file = place / "base" / "tokenizer.json"
    settings = json.loads(file.read_text("utf-8"))
    merges = settings["model"]["merges"]
    settings["model"]["merges"] = merges[1:] + merges[:1]
    file.write_text(json.dumps(settings), "utf-8")


def change_template(place: Path) -> None:
    file = place / "base" / "chat_template.jinja"
    file.write_text(file.read_text("utf-8") + " ", "utf-8")


def change_config(place: Path) -> None:
    file = place / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"rms_norm_eps": 0.5}), "utf-8")


def change_ends(place: Path) -> None:
    (place / "base" / "generation_config.json").write_text('{"eos_token_id": [0, 1]}', "utf-8")


def replace_adapter(place: Path) -> None:
    shutil.rmtree(place / "policy" / "adapter")
    shutil.copytree(place / "sft" / "adapter", place / "policy" / "adapter")


def change_data(place: Path) -> None:
    with (place / "feedback" / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "one more", "group": "new"}\n')


CHANGES = {
    "the adapter of sft was trained again": retrain_sft,
    "the adapter of reward was trained again": retrain_reward,
    "tokenizer.json of base base was changed": change_tokenizer,
    "chat_template.jinja of base base was changed": change_template,
    "config.json of base base was changed": change_config,
    "generation_config.json of base base was changed": change_ends,
    "its own adapter was changed": replace_adapter,
    "the data in feedback/prompts.jsonl were changed": change_data,
}
EVALUATE = ("evaluate", "policy", "--prompts", "2", "--split", "all", "--bootstrap", "10", "--device", "cpu")


@pytest.mark.parametrize(("said", "change"), CHANGES.items(), ids=lambda case: getattr(case, "__name__", ""))
def test_evaluate_refuses_what_was_changed(perlhf, place: Path, said: str, change: Callable[[Path], None]):
    assert perlhf(*EVALUATE).code == 0
    before = (place / "policy" / "evaluation.json").read_bytes()
    change(place)
    done = perlhf(*EVALUATE)
    assert done.code == 2 and said in done.err and "--accept-changes" in done.err, done.err
    assert (place / "policy" / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize("change", [retrain_sft, change_ends, change_data])
def test_changes_can_be_accepted_and_are_recorded(perlhf, place: Path, change: Callable[[Path], None]):
    change(place)
    done = perlhf(*EVALUATE, "--accept-changes")
    assert done.code == 0 and "note: policy: " in done.err, done.err
    (said,) = json.loads((place / "policy" / "evaluation.json").read_text("utf-8"))["changed"]
    assert any(said.startswith(known) for known in CHANGES)


def test_every_command_that_reads_a_run_refuses_another_tokenizer(perlhf, place: Path):
    change_tokenizer(place)
    shutil.copy(place / "feedback" / "ratings.jsonl", place / "rows.jsonl")
    for arguments in (
        ("evaluate", "sft"),
        ("evaluate", "reward"),
        ("score", "reward", "rows.jsonl"),
        ("chat", "policy", "--message", "tea"),
        ("export", "sft", "out"),
        ("export", "policy", "out", "--format", "merged"),
    ):
        done = perlhf(*arguments, "--device", "cpu")
        assert done.code == 2 and "tokenizer.json of base base was changed" in done.err, (arguments, done.err)
    policy = command("policy", Path("base"), "feedback/prompts.jsonl", Path("new"), "--sft", "sft", *SHORT)
    done = perlhf(*policy, "--reward", "reward")
    assert done.code == 2 and "tokenizer.json of base base isn't the one" in done.err, done.err
    assert not (place / "out").exists() and not (place / "new").exists()


def test_a_replaced_adapter_is_built_on_by_nothing(perlhf, place: Path):
    shutil.rmtree(place / "reward" / "adapter")
    shutil.copytree(place / "sft" / "adapter", place / "reward" / "adapter")
    shutil.copytree(place / "reward", place / "twin")
    policy = command("policy", Path("base"), "feedback/prompts.jsonl", Path("new"), *SHORT, "--reward", "reward")
    for arguments in (policy, ("average", "reward", "twin", "--output", "mean"), ("score", "reward", "feedback")):
        done = perlhf(*arguments)
        assert done.code == 2 and "its own adapter was changed" in done.err, (arguments, done.err)


def test_a_run_is_not_continued_on_another_tokenizer(perlhf, place: Path):
    change_tokenizer(place)
    arguments = command("sft", Path("base"), "feedback/demonstrations.jsonl", Path("sft"), "--epochs", "9")
    done = perlhf(*arguments)
    assert done.code == 2 and "facts.base.files.tokenizer.json" in done.err, done.err


def test_runs_of_earlier_versions_are_read_and_continued(perlhf, place: Path):
    """They have hashes of data, weights and adapters alone."""
    for stage in ("sft", "reward", "policy"):
        file = place / stage / "manifest.json"
        manifest = json.loads(file.read_text("utf-8"))
        del manifest["adapter_sha256"], manifest["facts"]["base"]["files"], manifest["facts"]["beside"]
        file.write_text(json.dumps(manifest), "utf-8")
    assert perlhf(*EVALUATE).code == 0
    options = ("--sft", "sft", "--reward", "reward", *SHORT, "--updates", "2")
    assert perlhf(*command("policy", Path("base"), "feedback/prompts.jsonl", Path("policy"), *options)).code == 0
    retrain_sft(place)
    done = perlhf(*EVALUATE)
    assert done.code == 2 and "the adapter of sft was trained again" in done.err


def test_a_run_is_read_from_another_working_directory(perlhf, place: Path, monkeypatch: pytest.MonkeyPatch):
    """Names of data and runs in the manifest are those of the directory that it was started in."""
    data = Path(shutil.copytree(place / "feedback", place / "several"))
    for name in ("ratings", "comparisons", "prompts"):
        (data / f"{name}.jsonl").unlink()
    (data / "toy_reward.py").unlink()
    assert main(command("sft", Path("base"), "several", Path("of-several"))) == 0
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert perlhf("evaluate", "../policy", *EVALUATE[2:]).code == 0
    assert perlhf("evaluate", "../of-several", *EVALUATE[2:]).code == 0
    (data / "more.jsonl").write_text('{"prompt": "a", "completion": "b", "group": "new"}\n')
    done = perlhf("evaluate", "../of-several", *EVALUATE[2:])
    assert done.code == 2 and "the data in several were changed" in done.err


def test_the_code_of_a_reward_is_part_of_the_run(perlhf, place: Path, monkeypatch: pytest.MonkeyPatch):
    """With what its module takes from other modules of the user's."""
    monkeypatch.syspath_prepend(str(place))
    (place / "weights_of_mine.py").write_text("FACTOR = 1.0\ndef times(x):\n    return FACTOR * x\n")
    (place / "reward_of_mine.py").write_text(
        "from weights_of_mine import times\ndef length(completions):\n    return [times(len(c)) for c in completions]\n"
    )
    options = ("--reward", "reward_of_mine:length", *SHORT)
    arguments = command("policy", Path("base"), "feedback/prompts.jsonl", Path("other"), *options)
    assert perlhf(*arguments).code == 0
    code = json.loads((place / "other" / "manifest.json").read_text("utf-8"))["facts"]["code"]
    assert list(code) == ["reward_of_mine:length"]
    evaluation = ("evaluate", "other", *EVALUATE[2:])
    assert perlhf(*evaluation).code == 0
    (place / "weights_of_mine.py").write_text("FACTOR = 2.0\ndef times(x):\n    return FACTOR * x\n")
    done = perlhf(*evaluation)
    assert done.code == 2 and "the code of reward_of_mine:length was changed" in done.err, done.err
    done = perlhf(*arguments, "--updates", "2")
    assert done.code == 2 and "facts.code.reward_of_mine:length" in done.err, done.err
    assert source_hash("json:dumps") == source_hash("json:loads")  # a library's file, and nothing of what it needs


def test_an_average_takes_runs_of_the_same_data(perlhf, place: Path):
    options = ("--max-updates", "2")
    assert main(command("reward", Path("base"), "feedback/ratings.jsonl", Path("twin"), "--seed", "1", *options)) == 0
    assert perlhf("average", "reward", "twin", "--output", "mean").code == 0
    rows = (place / "feedback" / "ratings.jsonl").read_text("utf-8").splitlines(keepends=True)
    (place / "feedback" / "ratings.jsonl").write_text("".join(rows[2:]), "utf-8")
    done = perlhf("evaluate", "mean", "--bootstrap", "10")
    assert done.code == 2 and "the data in feedback/ratings.jsonl were changed" in done.err
    assert main(command("reward", Path("base"), "feedback/ratings.jsonl", Path("later"), *options)) == 0
    done = perlhf("average", "reward", "later", "--output", "mixed")
    assert done.code == 2 and "feedback/ratings.jsonl was changed between" in done.err


def test_the_manifest_says_what_kernels_were_used_and_a_change_is_told(
    perlhf, place: Path, monkeypatch: pytest.MonkeyPatch
):
    """A compiler that is there and fails was once taken for one that had compiled."""
    arguments = command("sft", Path("base"), "feedback/demonstrations.jsonl", Path("kernels"))
    with monkeypatch.context() as patched:
        patched.setattr(cpu, "compiler", lambda: (shutil.which("false"), "compiled"))
        cpu._load.cache_clear()
        try:
            assert perlhf(*arguments).code == 0
        finally:
            cpu._load.cache_clear()
    manifest = json.loads((place / "kernels" / "manifest.json").read_text("utf-8"))
    assert manifest["kernels"].startswith("off (false could not compile")
    done = perlhf(*arguments, "--max-updates", "4", "--epochs", "2")
    assert done.code == 0 and f'note: kernels is {cpu.state()!r} but was "off (false could' in done.err, done.err
    manifest = json.loads((place / "kernels" / "manifest.json").read_text("utf-8"))
    assert manifest["sessions"][-1]["changed"]["key"] == "kernels"
