"""Every kind of bad input through the command: exit code 2, one message (what, where, what to do), nothing written."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from toy import comparisons, demonstrations, metrics, ratings, read_json, write_rows

from perlhf.data.pull import sources

UP = {"prompt": "tea", "completion": "here", "label": True, "group": "a"}
DOWN = UP | {"completion": "nope", "label": False, "group": "b"}


def refused(done, *parts: str) -> str:
    """The one message of a command that ended with exit code 2; `parts` are in it, in this order."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("error:") == 1
    assert done.out == ""
    at = 0
    for part in parts:
        assert part in done.err[at:], f"{part!r} is not in {done.err[at:]!r}"
        at = done.err.index(part, at) + len(part)
    return done.err


# ---- data ---------------------------------------------------------------------------------------------------------


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def without(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "misspelt column": (
        lines(UP, without(DOWN, "completion") | {"completoin": "nope"}),
        (":2: column 'completion' is missing", "found columns", "rename 'completoin' to 'completion'"),
    ),
    "missing column": (
        lines(without(UP, "prompt")),
        (":1: column 'prompt' is missing", "found columns 'completion', 'label', 'group'", "try: add 'prompt'"),
    ),
    "label that is no boolean": (
        lines(UP, DOWN | {"label": "maybe"}),
        (":2: label is 'maybe', which is no boolean", "allowed: true or false, 1 or 0"),
    ),
    "label 3": (lines(UP | {"label": 3}), (":1: label is 3, which is no boolean", "try: grades on a scale")),
    "empty completion": (
        lines(UP, DOWN | {"completion": " \n"}),
        (":2: completion is empty", "allowed: text with at least one visible character"),
    ),
    "empty prompt": (lines(UP | {"prompt": ""}), (":1: prompt is empty", "allowed: text")),
    "invalid UTF-8": (
        lines(UP) + b'{"prompt": "caf\xe9", "completion": "x", "label": true}\n',
        (":2: byte 0xe9 is not valid UTF-8", "try: save the file as UTF-8"),
    ),
    "truncated gzip": (
        gzip.compress(lines(UP, DOWN) * 50, mtime=0)[:-12],
        (": the gzip file is truncated", "try: download or copy it again"),
    ),
    "bad JSON": (
        lines(UP, DOWN, '{"prompt": "tea", "completion": }'),
        (":3: bad JSON: Expecting value at column 33", "allowed: a JSON array, or one JSON object per line"),
    ),
    "duplicate keys": (
        lines(UP, '{"prompt": "tea", "prompt": "milk", "completion": "x", "label": true}'),
        (":2: key 'prompt' appears twice in one object",),
    ),
    "not an object": (lines(UP, "[1, 2]"), (":2: found a list where a record is expected", "allowed: a JSON object")),
    "empty file": (b"", (": the file is empty", "allowed: at least one record")),
    "blank lines only": (b"\n  \n", (": the file is empty",)),
    "all labels up": (
        lines(*[row for row in ratings() if row["label"]]),
        ("all", "ratings have the label true", "try: add records of the other label"),
    ),
    "all labels down": (
        lines(*[row for row in ratings() if not row["label"]]),
        ("all", "ratings have the label false", "try: add records of the other label"),
    ),
    "one group": (
        lines(UP, DOWN | {"group": "a"}),
        ("split is empty: none of 1 groups falls into it", "allowed: at least one group on each side", "try:"),
    ),
    "prompts only": (
        lines({"prompt": "tea"}),
        (": no record can serve as comparison or rating", "try: `perlhf data inspect` shows"),
    ),
    "negative weight": (
        lines(UP | {"weight": -1}),
        (":1: column 'weight' is -1", "allowed: a finite number of 0 or more"),
    ),
    "long completion": (
        lines(*ratings(), UP | {"completion": "tea " * 60, "group": "r1"}),
        (":65: completion of", "tokens does not fit", "allowed: encoding.max_tokens = 96", "try: raise", "drop_long"),
    ),
}


@pytest.mark.parametrize(("content", "parts"), FILES.values(), ids=FILES)
def test_data_that_cannot_be_used(stage, tmp_path, content, parts):
    data = tmp_path / "feedback.jsonl"
    data.write_bytes(content)
    run, done = stage("reward", data=str(data), run="runs/reward")
    refused(done, *parts)
    if parts[0].startswith(":"):
        assert f"error: {data}{parts[0]}" in done.err
    assert not run.exists()


@pytest.mark.parametrize("weight", ["none", "balanced"])
def test_labels_of_one_kind_in_the_training_split_alone(stage, tmp_path, weight):
    rows = [row for row in ratings() if row["label"]]
    run, done = stage("reward", "--class-weight", weight, data=str(write_rows(tmp_path / "up.jsonl", rows)))
    refused(done, "up.jsonl: all", "ratings have the label true", "other label")
    assert not run.exists()


@pytest.mark.parametrize("name", ["sft", "policy"])
def test_the_other_stages_refuse_data_alike(stage, tmp_path, name):
    data = tmp_path / "d.jsonl"
    data.write_bytes(lines({"prompt": "tea", "completion": "here"}, "{"))
    run, done = stage(name, data=str(data))
    refused(done, f"{data}:2: bad JSON")
    assert not run.exists()
    data.write_bytes(lines(*[row | {"group": "one"} for row in demonstrations()]))
    run, done = stage(name, data=str(data))
    refused(done, "split is empty: none of 1 groups", "try:")
    assert not run.exists()


def test_a_data_file_that_is_not_there(stage, tmp_path):
    write_rows(tmp_path / "ratings.jsonl", ratings())
    run, done = stage("reward", data=str(tmp_path / "ratngs.jsonl"))
    refused(done, str(tmp_path / "ratngs.jsonl"), "ratings.jsonl")
    assert not run.exists()


def test_no_validation_groups(stage):
    run, done = stage("reward", "--data.validation", "0")
    refused(done, "the validation split is empty", "share 0", "try: raise data.validation")
    assert not run.exists()


def test_data_mended_after_a_mistake_meet_no_remains(stage, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_bytes(lines(*demonstrations(), "{"))
    run, done = stage("sft", data=str(data))
    refused(done)
    write_rows(data, demonstrations())
    run, done = stage("sft", data=str(data))
    assert done.code == 0, "not 'another data' of a run that never began"
    assert len(metrics(run)) == 3


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_long_completions_are_dropped_and_counted_where_the_recipe_says_so(stage, tmp_path, name):
    rows = [*demonstrations(), *ratings()] if name == "sft" else ratings()
    for row in rows[:10]:
        row["completion"] = "tea " * 60
    data = str(write_rows(tmp_path / "d.jsonl", rows))
    whole, done = stage(name, "--encoding.max-tokens", "400", data=data, run="whole")
    assert done.code == 0
    run, done = stage(name, "--encoding.drop-long", data=data)
    assert done.code == 0
    found, all_of_them = read_json(run / "result.json"), read_json(whole / "result.json")
    dropped = found["counts"]["dropped_long"]
    assert dropped > 0
    assert all_of_them["counts"]["dropped_long"] == 0
    assert found["train_examples"] == all_of_them["train_examples"] - dropped
    rows = [row | {"completion": "tea " * 60} for row in rows]
    run, done = stage(name, "--encoding.drop-long", data=str(write_rows(tmp_path / "e.jsonl", rows)), run="none")
    refused(done, "every example is longer than encoding.max_tokens", "try: raise encoding.max_tokens")
    assert not run.exists()


# ---- recipes ------------------------------------------------------------------------------------------------------


RECIPES = {
    "unknown key": (
        "adapter:\n  rnk: 4\n",
        (":2: unknown key `adapter.rnk`", "allowed: rank", "`adapter.rank`"),
    ),
    "unknown key at the top": ("epoch: 2\n", (":1: unknown key `epoch`", "allowed:", "try: `epochs`")),
    "unknown value": (
        "optim:\n  schedule: cosin\n",
        (':2: `optim.schedule` can\'t be "cosin"', "allowed: constant, linear or cosine", "try: cosine"),
    ),
    "number out of range": ("seed: 1\nepochs: 0\n", (":2: `epochs` can't be 0", "allowed: a whole number above 0")),
    "text for a number": ("epochs: two\n", (':1: `epochs` can\'t be "two"', "allowed: a whole number above 0")),
    "no for false": ("encoding: {drop_long: no}\n", (':1: `encoding.drop_long` can\'t be "no"', "true or false")),
    "repeated key": ("seed: 1\nepochs: 2\nseed: 3\n", (":3: `seed` is given twice, first on line 1",)),
    "bad YAML": ("data: {paths: [a\n", ("recipe.yaml:", "bad YAML")),
    "empty": ("", ("recipe.yaml: the recipe is empty", "allowed: `key: value` lines")),
    "shares": (
        "data: {validation: 0.6, test: 0.5}\n",
        ("data: validation + test = 1.1 leaves no training", "below 1"),
    ),
    "unknown format": ("data: {format: trll}\n", ("unknown format 'trll'", "allowed:", "did you mean 'trl'")),
}


@pytest.mark.parametrize(("content", "parts"), RECIPES.values(), ids=RECIPES)
def test_recipes_that_cannot_be_used(perlhf, tiny_base, feedback, tmp_path, content, parts):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    options = ("--base", str(tiny_base), "--run", str(tmp_path / "run"))
    if "paths" not in content:
        options += ("--data.paths", str(feedback / "ratings.jsonl"))
    refused(perlhf("reward", str(recipe), *options), *parts)
    assert not (tmp_path / "run").exists()


POLICY_OPTIONS = {
    "steps without clip": (("--steps-per-rollout", "2"), ("steps_per_rollout > 1 needs clip",)),
    "one completion": (
        ("--baseline", "leave_one_out", "--completions-per-prompt", "1"),
        ("baseline: leave_one_out needs completions_per_prompt of 2 or more",),
    ),
    "dropout": (("--adapter.dropout", "0.1"), ("adapter.dropout must be 0",)),
    "no room for a prompt": (
        ("--max-completion-tokens", "96"),
        ("encoding.max_tokens: max_completion_tokens 96 leaves no room", "allowed: more than 96"),
    ),
    "no such reward": (
        ("--reward", "runs/nowhere"),
        ("reward: 'runs/nowhere' is no finished reward run", "allowed: a reward run directory, module:function"),
    ),
    "no such module": (("--reward", "toy_rewards:letters"), ("reward: no module named 'toy_rewards'", "try:")),
    "no such function": (
        ("--reward", "toy_reward:leters"),
        ("module toy_reward has no function 'leters'", "did you mean toy_reward:letters?"),
    ),
    "no such SFT run": (("--sft", "runs/nowhere"), ("runs/nowhere is no finished run", "try: name a finished run")),
    "device": (("--device", "tpu"), ("tpu", "allowed: auto, cpu")),
}


@pytest.mark.parametrize(("options", "parts"), POLICY_OPTIONS.values(), ids=POLICY_OPTIONS)
def test_policy_options_that_cannot_be_used(stage, options, parts):
    run, done = stage("policy", *options)
    refused(done, *parts)
    assert not run.exists()


def test_an_sft_run_as_reward(stage, sft_run):
    run, done = stage("policy", "--reward", str(sft_run))
    refused(done, "reward", "holds a sft adapter", "allowed: a reward run")
    assert not run.exists()


# ---- models and adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "policy"])
def test_adapter_targets_that_match_nothing(stage, name):
    run, done = stage(name, "--adapter.targets", "q_prj")
    refused(done, "'q_prj'", "allowed:", "q_proj", "try:", "q_proj")
    assert not run.exists()


ARCHITECTURES = {
    "sliding window": (
        transformers.MistralConfig(hidden_size=64, num_hidden_layers=2, sliding_window=128),
        ("mistral can't be a base", "sliding window of 128 tokens"),
    ),
    "recurrent": (
        transformers.MambaConfig(hidden_size=64, num_hidden_layers=2),
        ("mamba can't be a base", "it has linear_attention layers"),
    ),
    "encoder-decoder": (
        transformers.T5Config(d_model=64, num_layers=2),
        ("t5 can't be a base", "it is an encoder-decoder"),
    ),
}


@pytest.mark.parametrize(("architecture", "parts"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_architectures_that_training_does_not_fit(stage, tiny_base, tmp_path, architecture, parts):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "config.json").write_text(architecture.to_json_string())
    run, done = stage("sft", base=other)
    refused(done, "base: ", *parts, "allowed: decoder-only language models with full causal attention")
    assert not run.exists()


def test_a_base_that_is_not_here(stage, tmp_path):
    run, done = stage("sft", base=tmp_path / "nowhere")
    refused(done, "base: ", "nowhere", "try:", "perlhf pull")
    assert not run.exists()
    run, done = stage("sft", "--base", "smollm2-135m-instruct-q4_0")
    refused(done, "smollm2-135m-instruct-q4_0", "perlhf pull smollm2-135m-instruct-q4_1")
    assert not run.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_base_with_a_file_missing(stage, tiny_base, tmp_path, file):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / file).unlink()
    run, done = stage("sft", base=other)
    refused(done, str(other), file.split(".")[0].replace("model", "model.safetensors"))
    assert not run.exists()


@pytest.fixture
def other_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with one weight changed."""
    other = tmp_path / "other_base"
    shutil.copytree(tiny_base, other)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(other)
    return other


@pytest.mark.parametrize(("name", "option"), [("policy", "--sft"), ("policy", "--reward"), ("reward", "--sft")])
def test_an_adapter_of_another_base_names_both(stage, tiny_base, other_base, sft_run, reward_run, name, option):
    source = sft_run if option == "--sft" else reward_run
    run, done = stage(name, option, str(source), base=other_base)
    message = refused(done)
    assert str(tiny_base) in message
    assert str(other_base) in message
    assert not run.exists()


def test_a_full_copy_of_another_base_names_both(stage, tiny_base, other_base):
    full, done = stage("sft", "--tuning", "full", "--max-updates", "1", run="full")
    assert done.code == 0
    run, done = stage("policy", "--sft", str(full), base=other_base)
    refused(done, str(tiny_base), str(other_base), f"try: --base {tiny_base}")
    assert not run.exists()


def test_an_adapter_trained_with_another_encoding(stage, reward_run):
    run, done = stage("policy", "--reward", str(reward_run), "--encoding.system", "Be kind.")
    refused(done, "encoding.system", "None", "'Be kind.'", "try: use the same encoding in every stage")
    assert not run.exists()


# ---- pull ---------------------------------------------------------------------------------------------------------


def published(directory: Path, name: str, file: str, content: bytes, sha256: str | None = None) -> Path:
    """A local copy of a published set, with the manifest that `data pull --source` reads."""
    place = directory / name / file
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    entry = {"file": f"{name}/{file}", "sha256": sha256 or hashlib.sha256(content).hexdigest()}
    (directory / "MANIFEST.json").write_text(json.dumps({"files": [entry]}))
    return directory


def test_a_pulled_file_with_another_sha256(perlhf, tmp_path):
    name = next(iter(sources()))
    source = published(tmp_path / "source", name, "a.jsonl", b"{}\n", sha256="0" * 64)
    done = perlhf("data", "pull", name, "--source", str(source), "--output", str(tmp_path / "data"))
    refused(done, "the SHA-256 is", f"allowed: {'0' * 64}", "try: the file was changed or damaged")
    assert str(source / name / "a.jsonl") in done.err
    assert not (tmp_path / "data" / name).exists()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_an_archive_that_leaves_its_directory(perlhf, tmp_path):
    name = next(iter(sources()))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in ("fine.txt", "../../escaped.txt"):
            member = tarfile.TarInfo(path)
            member.size = 2
            archive.addfile(member, io.BytesIO(b"hi"))
    source = published(tmp_path / "source", name, "a.tar.gz", packed.getvalue())
    done = perlhf("data", "pull", name, "--source", str(source), "--output", str(tmp_path / "data"))
    refused(done, "a.tar.gz", "'../../escaped.txt'", "outside its directory", "allowed: regular files", "try:")
    assert not (tmp_path / "data" / name).exists()
    assert not list(tmp_path.rglob("escaped.txt"))
    assert not list(tmp_path.rglob("fine.txt"))


def test_a_set_that_is_not_known(perlhf, tmp_path):
    done = perlhf("data", "pull", "hh-harmles", "--output", str(tmp_path / "data"))
    refused(done, "no set is called 'hh-harmles'", "allowed:")
    assert not (tmp_path / "data").exists()


# ---- what `perlhf data validate` says -----------------------------------------------------------------------------


def test_validate_lists_every_wrong_line(perlhf, tmp_path):
    path = tmp_path / "d.jsonl"
    rows = comparisons(3)
    path.write_bytes(lines(rows[0], rows[1] | {"chosen": ""}, "{", rows[2]))
    done = perlhf("data", "validate", str(path))
    assert done.code == 2
    assert "Traceback" not in done.err
    assert f"{path}:2" in done.err
    assert f"{path}:3" in done.err
    assert f"{path}:1" not in done.err


# ---- runs that others need ----------------------------------------------------------------------------------------


def test_a_reward_run_as_sft(stage, reward_run):
    for name in ("policy", "reward"):
        run, done = stage(name, "--sft", str(reward_run))
        refused(done, "sft", "holds a reward adapter", "an SFT run")
        assert not run.exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_policy_without_its_runs(stage, tmp_path, dry):
    run, done = stage("policy", "--sft", str(tmp_path / "nowhere"), *dry)
    refused(done, str(tmp_path / "nowhere"), "perlhf sft" if dry else "")
    run, done = stage("policy", "--reward", str(tmp_path / "nothing"), *dry)
    refused(done, str(tmp_path / "nothing"), "perlhf reward")
    assert not run.exists()


def test_a_dry_run_needs_validation_groups_as_training_does(stage):
    _, done = stage("reward", "--data.validation", "0", "--dry-run")
    refused(done, "the validation split is empty")


def test_an_earlier_run_that_was_trained_anew_is_noticed(stage, tiny_base, feedback, tmp_path, sft_run):
    copy = tmp_path / "sft"
    shutil.copytree(sft_run, copy)
    _, done = stage("reward", "--sft", str(copy))
    assert done.code == 0
    other, done = stage("sft", "--seed", "9", run="other")
    assert done.code == 0
    shutil.rmtree(copy)
    shutil.copytree(other, copy)
    _, done = stage("reward", "--sft", str(copy))
    refused(done, "adapters")


def test_a_template_that_is_not_text(stage, tmp_path):
    (tmp_path / "template.jinja").write_bytes(b"\xff\xfe")
    run, done = stage("sft", "--encoding.template", str(tmp_path / "template.jinja"))
    refused(done, "encoding.template", "not UTF-8")
    assert not run.exists()


def test_a_published_set_that_was_not_pulled(stage):
    _, done = stage("reward", "--data.paths", "taskmaster-coffee/reward")
    refused(done, "taskmaster-coffee/reward", "perlhf data pull taskmaster-coffee")


def test_a_full_copy_with_a_part_missing(stage):
    run, done = stage("sft", "--tuning", "full", "--optim.learning-rate", "1e-3", run="full")
    assert done.code == 0
    details = run / "adapter" / "perlhf.json"
    whole = details.read_text()
    details.write_text(json.dumps({key: value for key, value in json.loads(whole).items() if key != "base"}))
    _, done = stage("policy", "--sft", str(run), "--tuning", "full")
    refused(done, "its own adapter was changed since it was trained")
    _, done = stage("policy", "--sft", str(run / "adapter"), "--tuning", "full")
    refused(done, "perlhf.json", "changed after saving")
    details.write_text(whole)
    (run / "adapter" / "full_weights.safetensors").unlink()
    _, done = stage("policy", "--sft", str(run / "adapter"), "--tuning", "full")
    refused(done, "no full_weights.safetensors in it")
