"""`export` on runs of the real stages with the tiny base: what other libraries load gives what perlhf computes."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import apart
from tiny_runs import SYSTEM, TinyRuns, tiny_runs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from perlhf.commands.export import DETAILS, chat_template, export
from perlhf.config.commands import ExportConfig
from perlhf.config.stages import EncodingConfig, SftConfig
from perlhf.data.records import Rating
from perlhf.data.splits import load
from perlhf.errors import AdapterError, ConfigError
from perlhf.model.encode import Encoder
from perlhf.model.open import read_run
from perlhf.training.sft import train_sft

# peft asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TALK = [
    {"role": "user", "content": "a tea"},
    {"role": "assistant", "content": "sure"},
    {"role": "user", "content": "ok"},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRuns:
    """One run of each stage."""
    return tiny_runs(tmp_path_factory.getbasetemp() / "tiny_runs", tiny_base)


def plain_base(path: Path, classifier: bool = False) -> Any:
    """The network as any user of transformers loads it."""
    if classifier:
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def logits(network: Any, ids: list[int]) -> torch.Tensor:
    """[vocab] after the last token."""
    return network.eval()(torch.tensor([ids])).logits[0, -1]


@pytest.fixture(scope="module")
def exported(runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Directory and details of a stage's export in a format, made once."""

    @cache
    def made(stage: str, format: Any) -> tuple[Path, dict[str, Any]]:
        output = tmp_path_factory.mktemp("exports") / "out"
        return output, export(ExportConfig(run=getattr(runs, stage), output=output, format=format, device="cpu"))

    return made


@pytest.mark.parametrize("stage", ["sft", "policy"])
@pytest.mark.parametrize("format", ["peft", "merged"])
def test_a_language_model_gives_the_same_logits_elsewhere(
    runs: TinyRuns, tiny_base: Path, exported: Any, stage: str, format: str
):
    run = getattr(runs, stage)
    output, details = exported(stage, format)
    model, encoder = read_run(run).open("cpu")
    ids = encoder.prompt(TALK)
    states, _ = model.prefill([ids], stage)
    wanted = model.logits(states, stage)[0]
    network = plain_base(tiny_base)
    before = logits(network, ids)
    found = logits(PeftModel.from_pretrained(network, str(output)) if format == "peft" else plain_base(output), ids)
    assert (found - wanted).abs().max() < 1e-4 < 1e-2 < (before - wanted).abs().max()
    assert details["format"] == format
    if format == "merged":
        assert 0 <= details["largest_logit_error"] < 1e-4
        assert details["share_lost"] < 1e-3
        assert details["largest_logit_change_by_adapter"] > 1e-2
        assert json.loads((output / DETAILS).read_text()) == details


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_a_reward_model_gives_the_same_scores_elsewhere(runs: TinyRuns, tiny_base: Path, exported: Any, format: str):
    output, details = exported("reward", format)
    run = read_run(runs.reward)
    model, encoder = run.open("cpu")
    records = [record for record in load(run.config.data, ("rating",), "test") if isinstance(record, Rating)]
    sequences = [encoder.example(record.prompt, record.completion).tokens.ids for record in records[:5]]
    wanted = model.scores(apart(sequences, packing="none"), "reward")
    if format == "peft":
        network = PeftModel.from_pretrained(plain_base(tiny_base, classifier=True), str(output))
        network.config.pad_token_id = None
        rows = [torch.tensor([ids]) for ids in sequences]
    else:
        # Padding is what a collator would use, and must not be taken for the end token that is scored.
        pad = AutoTokenizer.from_pretrained(output).pad_token_id
        assert pad != encoder.end_id
        width = max(map(len, sequences))
        rows = [torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in sequences])]
        network = plain_base(output, classifier=True)
        assert 0 <= details["largest_score_error"] < 1e-4
    with torch.no_grad():
        found = torch.cat([network.eval()(row).logits[:, 0] for row in rows])
    assert details["score_bias"] != 0
    torch.testing.assert_close(found + details["score_bias"], wanted, atol=1e-4, rtol=0)
    assert wanted.std() > 1e-2


def test_the_error_of_rounding_to_bfloat16_is_measured(tiny_base: Path, runs: TinyRuns, tmp_path: Path):
    run = tmp_path / "sft"
    config = read_run(runs.sft).config
    train_sft(SftConfig.model_validate(config.model_dump() | {"run": run, "dtype": "bfloat16", "max_updates": 1}))
    details = export(ExportConfig(run=run, output=tmp_path / "out", format="merged", device="cpu"))
    assert details["dtype"] == "bfloat16"
    assert 0.002 < details["share_lost"]
    assert 1e-3 < details["largest_logit_error"] < 1
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype == torch.bfloat16


def test_full_tuning_is_exported_merged_only(tiny_base: Path, runs: TinyRuns, tmp_path: Path):
    run = tmp_path / "sft"
    config = read_run(runs.sft).config
    train_sft(SftConfig.model_validate(config.model_dump() | {"run": run, "tuning": "full", "max_updates": 2}))
    with pytest.raises(ConfigError, match="merged"):
        export(ExportConfig(run=run, output=tmp_path / "out", device="cpu"))
    assert not (tmp_path / "out").exists()
    export(ExportConfig(run=run, output=tmp_path / "out", format="merged", device="cpu"))
    model, encoder = read_run(run).open("cpu")
    ids = encoder.prompt(TALK)
    states, _ = model.prefill([ids], "sft")
    found = logits(plain_base(tmp_path / "out"), ids)
    assert (
        (found - model.logits(states, "sft")[0]).abs().max()
        < 1e-4
        < (found - logits(plain_base(tiny_base), ids)).abs().max()
    )


@pytest.mark.parametrize("messages", [TALK, [{"role": "system", "content": "Sell tea."}, *TALK]])
def test_the_exported_tokenizer_renders_prompts_as_in_training(runs: TinyRuns, exported: Any, messages: Any):
    output, _ = exported("sft", "merged")
    _, encoder = read_run(runs.sft).open("cpu")
    tokenizer = AutoTokenizer.from_pretrained(output)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert (SYSTEM in rendered) is (messages[0]["role"] != "system")
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == encoder.prompt(messages)
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == encoder.end_id


def test_a_plain_template_becomes_jinja(tiny_base: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    encoding = EncodingConfig(template="plain", system="Be brief.")
    tokenizer.chat_template = chat_template(tokenizer, encoding)
    rendered = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert rendered == "system: Be brief.\nuser: a tea\nassistant: sure\nuser: ok\nassistant:"
    assert Encoder(tokenizer, encoding).decode(Encoder(tokenizer, encoding).prompt(TALK)) == rendered


def test_nothing_of_the_users_is_overwritten(runs: TinyRuns, tmp_path: Path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for format, error in (("merged", ConfigError), ("peft", AdapterError)):
        with pytest.raises(error, match="holds"):
            export(ExportConfig(run=runs.sft, output=output, format=format, device="cpu"))  # pyright: ignore[reportArgumentType]
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="inside the run"):
        export(ExportConfig(run=runs.sft, output=runs.sft / "adapter", device="cpu"))


def test_an_export_is_replaced_by_the_next(runs: TinyRuns, exported: Any):
    for format in ("merged", "peft"):
        output, _ = exported("sft", format)
        (output / "adapter_model.safetensors" if format == "peft" else output / "model.safetensors").unlink()
        export(ExportConfig(run=runs.sft, output=output, format=format, device="cpu"))  # pyright: ignore[reportArgumentType]
        assert list(output.glob("*.safetensors"))
        assert [path.name for path in output.parent.iterdir()] == ["out"]
