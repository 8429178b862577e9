"""`export --gguf` on runs of the real stages: what our own reader makes of the files is what the run computes."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_export import TALK, logits
from tiny_runs import TinyRuns, tiny_runs
from transformers import AutoModelForCausalLM

from perlhf.commands.exports import export as exporting
from perlhf.commands.exports.export import DETAILS, export
from perlhf.config.commands import ExportConfig
from perlhf.config.stages import SftConfig
from perlhf.errors import ConfigError, StorageError
from perlhf.model.bases.found import Base
from perlhf.model.bases.gguf.header import read_header
from perlhf.model.bases.gguf.tokenizer import read_tokenizer
from perlhf.model.bases.loading import load_base
from perlhf.model.finished import read_run
from perlhf.model.merged import merged_network, rounded_to
from perlhf.training.sft import train_sft


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRuns:
    """One run of each stage."""
    return tiny_runs(tmp_path_factory.getbasetemp() / "tiny_runs", tiny_base)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "cache"))


def made(run: Path, output: Path, **options: Any) -> dict[str, Any]:
    return export(ExportConfig(run=run, output=output, gguf=True, device="cpu", **options))


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {str(one.name): torch.tensor(one.data.copy()) for one in gguf.GGUFReader(file).tensors}


def settings(file: Path) -> dict[str, Any]:
    return {name: one.contents() for name, one in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("stage", ["sft", "policy"])
def test_a_merged_file_as_a_base_is_the_run(runs: TinyRuns, stage: str, tmp_path: Path, own_cache: None):
    run = read_run(getattr(runs, stage))
    model, encoder = run.open("cpu")
    ids = encoder.prompt(TALK)
    wanted = merged_network(model, model.adapters[stage], run.base, torch.float32)
    rounded_to(wanted, torch.bfloat16)  # a base that was a GGUF file is kept in it
    details = made(run.path, tmp_path / "out", format="merged", dtype="bfloat16")
    base = Base.find(str(tmp_path / "out" / "model.gguf"))
    read = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    torch.testing.assert_close(logits(read, ids), logits(wanted, ids), rtol=0, atol=1e-5)
    before = load_base(run.base, torch.float32, "cpu")
    assert (logits(read, ids) - logits(before, ids)).abs().max() > 1e-2
    assert (details["dtype"], details["gguf"], details["texts_with_other_tokens"]) == ("bfloat16", "model.gguf", 0)
    assert 0 < details["largest_logit_error"] < 1e-1 and details["largest_logit_change_by_adapter"] > 1e-2
    assert json.loads((tmp_path / "out" / DETAILS).read_text()) == details
    assert "llama-server -m model.gguf" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_with_its_adapter_is_the_merged_file(stage: Any, sft_run: Path, tmp_path: Path):
    """The adapter of a policy of another rank than its SFT run has both in it."""
    run, done = stage("policy", "--sft", str(sft_run), "--adapter.rank", "2")
    assert done.code == 0, done.err
    details = made(run, tmp_path / "apart")
    files = ["README.md", "adapter.gguf", "base.gguf", DETAILS]
    assert sorted(file.name for file in (tmp_path / "apart").iterdir()) == sorted(files)
    assert (details["rank"], details["dtype"]) == (2 + 4, "float32")
    assert details["largest_logit_error"] < 1e-4 < 1e-2 < details["largest_logit_change_by_adapter"]
    merged = made(run, tmp_path / "merged", format="merged")
    assert merged["largest_logit_error"] < 1e-4 and merged["share_lost"] < 1e-3
    base, pairs = (tensors(tmp_path / "apart" / f"{name}.gguf") for name in ("base", "adapter"))
    alpha, changed = settings(tmp_path / "apart" / "adapter.gguf")["adapter.lora.alpha"], 0
    for name, weight in tensors(tmp_path / "merged" / "model.gguf").items():
        expected = base[name]
        if f"{name}.lora_a" in pairs:
            a, b = pairs[f"{name}.lora_a"], pairs[f"{name}.lora_b"]
            expected = expected + alpha / a.shape[0] * b @ a
            changed += not torch.equal(weight, base[name])
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    assert 2 * changed == len(pairs) > 0
    assert "--lora adapter.gguf" in (tmp_path / "apart" / "README.md").read_text()


def test_the_file_talks_as_the_run_was_trained(runs: TinyRuns, tmp_path: Path):
    """Its template and end token, at its temperature; an SFT run has none."""
    for stage in ("policy", "sft"):
        made(getattr(runs, stage), tmp_path / stage, format="merged")
    file = tmp_path / "policy" / "model.gguf"
    _, encoder = read_run(runs.policy).open("cpu")
    tokenizer = read_tokenizer(read_header(file))
    text = str(tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False))
    assert tokenizer(text)["input_ids"] == encoder.prompt(TALK)
    assert tokenizer.eos_token_id == encoder.end_id
    assert settings(file)["general.sampling.temp"] == 1.0
    assert "general.sampling.temp" not in settings(tmp_path / "sft" / "model.gguf")


def test_full_tuning_is_written_merged_only(runs: TinyRuns, tmp_path: Path):
    config = read_run(runs.sft).config.model_dump()
    run = tmp_path / "sft"
    train_sft(SftConfig.model_validate(config | {"run": run, "tuning": "full", "max_updates": 1}))
    with pytest.raises(ConfigError, match=r"a run with tuning: full has no adapter(.|\n)*--format merged"):
        made(run, tmp_path / "out")
    details = made(run, tmp_path / "out", format="merged")
    assert details["tuning"] == "full" and details["largest_logit_error"] < 1e-4


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_a_quantised_base_is_written_as_it_is_read_back(stage: Any, perlhf: Any, tmp_path: Path, format: str):
    pytest.importorskip("bitsandbytes")
    run, done = stage("sft", "--max-updates", "2", "--quantize", "nf4", "--dtype", "float32")
    assert done.code == 0, done.err
    done = perlhf("export", str(run), str(tmp_path / "out"), "--gguf", "--format", format, "--device", "cpu")
    assert done.code == 0, done.err
    details = json.loads((tmp_path / "out" / DETAILS).read_text())
    assert details["quantize"] == "nf4"
    if format == "merged":
        assert details["largest_relative_error"] < 1e-3


@pytest.mark.parametrize("members", ["1", "2"])
def test_a_reward_run_is_refused_with_what_to_do(stage: Any, perlhf: Any, tmp_path: Path, members: str):
    run, done = stage("reward", "--max-updates", "1", "--members", members)
    assert done.code == 0, done.err
    done = perlhf("export", str(run), str(tmp_path / "out"), "--gguf")
    assert (done.code, (tmp_path / "out").exists()) == (2, False)
    assert "gguf: llama.cpp has no place for the score head of a reward model" in done.err
    assert "leave out --gguf: --format merged writes a classifier" in " ".join(done.err.split())


def test_an_adapter_of_another_tool_is_written(runs: TinyRuns, tiny_base: Path, tmp_path: Path):
    export(ExportConfig(run=runs.sft, output=tmp_path / "peft", device="cpu"))
    for name in ("perlhf.json", DETAILS):
        (tmp_path / "peft" / name).unlink()
    details = made(tmp_path / "peft", tmp_path / "theirs", base=str(tiny_base), dtype="float32")
    assert (details["stage"], details["texts_with_other_tokens"]) == ("sft", 0)
    made(runs.sft, tmp_path / "ours")
    theirs, ours = (tensors(tmp_path / name / "adapter.gguf") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_another_family_is_refused_by_name(tiny_base: Path, stage: Any, perlhf: Any, tmp_path: Path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    run, done = stage("sft", "--max-updates", "1", base=base)
    assert done.code == 0, done.err
    done = perlhf("export", str(run), str(tmp_path / "out"), "--gguf")
    assert (done.code, (tmp_path / "out").exists(), "Traceback" in done.err) == (2, False, False)
    assert "no GGUF file is written of a mistral network" in done.err
    assert "Llama, Qwen 2, Qwen 3 and Gemma 3" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gguf", "--base-name", "org/name"), "base_name is for PEFT's files"),
        (("--format", "merged", "--dtype", "float16"), "float16 is for GGUF files alone"),
        (("--gguf", "--dtype", "int4"), "--dtype"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    runs: TinyRuns, perlhf: Any, options: tuple[str, ...], message: str, tmp_path: Path
):
    done = perlhf("export", str(runs.sft), str(tmp_path / "out"), *options)
    assert (done.code, (tmp_path / "out").exists()) == (2, False)
    assert message in done.err


def test_whole_or_not_at_all(runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk is full after the first file; what was there before stays."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made(runs.sft, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(exporting, "write_adapter", full)
    with pytest.raises(StorageError, match="No space left"):
        made(runs.policy, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(StorageError):
        made(runs.policy, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_with_something_else_is_not_overwritten(runs: TinyRuns, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds something else"):
        made(runs.sft, tmp_path / "out")


def test_an_unknown_way_of_cutting_words_is_refused(tiny_base: Path, stage: Any, perlhf: Any, tmp_path: Path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    state = json.loads((base / "tokenizer.json").read_text())
    state["pre_tokenizer"]["add_prefix_space"] = True
    (base / "tokenizer.json").write_text(json.dumps(state))
    run, done = stage("sft", "--max-updates", "1", base=base)
    assert done.code == 0, done.err
    done = perlhf("export", str(run), str(tmp_path / "out"), "--gguf")
    assert (done.code, (tmp_path / "out").exists()) == (2, False)
    assert "the tokenizer cuts words in a way that has no name in llama.cpp" in done.err
