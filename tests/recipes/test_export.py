"""`export` on runs of the real stages with the tiny base: what other libraries load gives what perlhf computes."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_models import apart
from tiny_runs import SYSTEM, TinyRuns, tiny_runs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from perlhf.commands.exports import export as exporting
from perlhf.commands.exports.export import DETAILS, _prepare, export
from perlhf.commands.exports.templates import chat_template
from perlhf.config.commands import ExportConfig
from perlhf.config.stages import EncodingConfig, SftConfig
from perlhf.data.records import Rating
from perlhf.data.splits import load
from perlhf.errors import AdapterError, ConfigError
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import read_run
from perlhf.training.sft import train_sft

# peft asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
DOCS_BLOCKS = re.findall(r"^```py\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
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


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_a_policy_is_sampled_elsewhere_as_it_was_trained(runs: TinyRuns, tiny_base: Path, tmp_path: Path, format: Any):
    """At its temperature, from all tokens, whatever the base's own settings are."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    bent = {"eos_token_id": 1, "do_sample": False, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
    (base / "generation_config.json").write_text(json.dumps(bent))
    run = shutil.copytree(runs.policy, tmp_path / "cold")
    said = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(said.replace("temperature: 1.0", "temperature: 0.6"))
    export(ExportConfig(run=run, output=tmp_path / "out", format=format, base=str(base), device="cpu"))
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.6, 0, 1.0)
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.eos_token_id == read_run(runs.policy).open("cpu")[1].end_id


def test_an_sft_run_keeps_the_settings_of_its_base(exported: Any):
    output, _ = exported("sft", "merged")
    assert "temperature" not in json.loads((output / "generation_config.json").read_text())


def test_a_plain_template_becomes_jinja(tiny_base: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    encoding = EncodingConfig(template="plain", system="Be brief.")
    tokenizer.chat_template = chat_template(tokenizer, encoding)
    rendered = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert rendered == "system: Be brief.\nuser: a tea\nassistant: sure\nuser: ok\nassistant:"
    assert Encoder(tokenizer, encoding).decode(Encoder(tokenizer, encoding).prompt(TALK)) == rendered


CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "text between turns": CHAT,
    "no text between turns": CHAT.replace("<|im_end|>\\n' }}", "<|im_end|>' }}"),
    "looks at the text": (
        "{% for m in messages %}{% set text = m['content'] %}{% if '</think>' in text and not loop.last %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ text.strip() }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "no end token": (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' ;\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    ),
    "sets messages, and has white space about it": (
        "\n\n{%- set messages = messages[0:] %}\n{%- macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>{% endmacro %}\n  {% for m in messages %}{{ turn(m) }}\n  {% endfor %}\n"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
    ),
    "an end token of its own before the answer": (
        "{% for m in messages %}<|im_start|>{{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' else '\n' }} "
        "{% endfor %}"
    ),
}
SAID = [
    [{"role": "user", "content": "a tea"}, {"role": "assistant", "content": "<think>so</think> sure"}],
    [*TALK, {"role": "assistant", "content": "here you go "}],
    [*TALK, {"role": "assistant", "content": "<|im_end|>"}],
]


@pytest.mark.parametrize("system", [None, "Sell tea."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_scored_conversation_ends_with_the_end_token_and_nothing_else_changes(
    tiny_base: Path, name: str, system: str | None
):
    """Only what follows the last end token goes: not what stands between turns, nor anything of a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TEMPLATES[name]

    def text(messages: Any, generation: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))

    lead = [] if system is None else [{"role": "system", "content": system}]
    conversations = [*SAID, TALK, TALK[:1]]
    before = [text([*lead, *messages]) for messages in conversations]
    prompts = [text([*lead, *messages], True) for messages in conversations]
    _prepare(tokenizer, Encoder(tokenizer, EncodingConfig(system=system)), reward=True, records=[])
    assert [text(messages, True) for messages in conversations] == prompts
    for messages, was in zip(conversations, before, strict=True):
        now = text(messages)
        if messages[-1]["role"] != "assistant":
            assert now == was
        elif "<|im_end|>" in TEMPLATES[name]:
            assert now == was[: was.rindex("<|im_end|>")] + "<|im_end|>"
        else:
            assert now == was + "<|im_end|>"


THINKING = CHAT.replace(
    "{% for", "{% if enable_thinking is not defined or enable_thinking %}THINK {% endif %}{% for", 1
)
DATED = CHAT.replace("{% for", "{{ strftime_now('%d %B %Y') }} {% for", 1)
TOOLS = [{"type": "function", "function": {"name": "brew", "description": "Brews.", "parameters": {}}}]


@pytest.mark.parametrize(
    ("template", "encoding"),
    [
        ({"default": CHAT, "tool_use": "{{ tools[0].function.name }} " + CHAT}, {}),
        ({"default": CHAT, "rag": "RAG " + CHAT}, {"template": "name:rag"}),
        (THINKING, {"template_kwargs": {"enable_thinking": False}}),
        (DATED, {"day": "2026-01-31"}),
        (THINKING, {"template_kwargs": {"enable_thinking": False}, "system": "Sell tea."}),
    ],
)
@pytest.mark.parametrize("reward", [False, True])
def test_the_exported_template_gives_the_tokens_of_training(
    tiny_base: Path, template: Any, encoding: dict[str, Any], reward: bool
):
    """Named templates, those for tools, variables and the day: as they were in training, without being told again."""
    trained_with, exported = (AutoTokenizer.from_pretrained(tiny_base) for _ in range(2))
    trained_with.chat_template = exported.chat_template = template
    encoder = Encoder(trained_with, EncodingConfig.model_validate(encoding))
    _prepare(exported, encoder, reward=reward, records=[])
    for tools in (None, TOOLS) if isinstance(template, dict) and "tool_use" in template else (None,):
        for messages in SAID[:2]:
            *asked, said = messages
            example = encoder.example(asked, said["content"], tools=tools)
            options: dict[str, Any] = {"tools": tools, "return_dict": True}
            prompt = exported.apply_chat_template(asked, add_generation_prompt=True, **options)["input_ids"]
            assert tuple(prompt) == example.prompt
            if reward:
                assert tuple(exported.apply_chat_template(messages, **options)["input_ids"]) == example.tokens.ids


CALLING = (
    "{% for m in messages %}{{ m.role }}:<br>{{ m.content or m.tool_calls[0].function.name }}"
    "{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}{% endfor %}{% if not add_generation_prompt %}<|im_end|>"
    "{% endif %}{% if add_generation_prompt %}assistant:<br>{% endif %}"
)
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "brew", "arguments": {}}}]}


@pytest.mark.parametrize("closing", ["", "<|im_end|>"])
def test_calls_that_end_with_a_token_of_their_own_are_scored_there(tiny_base: Path, closing: str):
    """And of two end tokens after an answer, the first is read, as in training."""
    tokenizer, exported = (AutoTokenizer.from_pretrained(tiny_base) for _ in range(2))
    for one in (tokenizer, exported):
        one.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
        one.chat_template = CALLING.replace("prompt %}<|im_end|>", f"prompt %}}{closing}")
    encoder = Encoder(tokenizer, EncodingConfig(), [tokenizer.convert_tokens_to_ids("<|call|>")])
    _prepare(exported, encoder, reward=True, records=[])
    for asked in (TALK[:1], [*TALK[:1], CALL, *TALK[:1]]):
        for answer in ({"role": "assistant", "content": "sure"}, CALL):
            ids = encoder.example(asked, [answer]).tokens.ids
            assert tuple(exported.apply_chat_template([*asked, answer], return_dict=False)) == ids


def test_a_template_without_room_for_the_end_token_is_given_it(tiny_base: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    encoder = Encoder(tokenizer, EncodingConfig(template="plain"))
    _prepare(tokenizer, encoder, reward=True, records=[])
    ids = tokenizer.apply_chat_template(SAID[0], return_dict=True)["input_ids"]
    ours = encoder.example(SAID[0][:1], SAID[0][1]["content"]).tokens.ids
    assert ids[-1] == ours[-1] == encoder.end_id and tokenizer.decode(ids) == tokenizer.decode(list(ours))


def test_the_padding_token_is_one_that_no_prompt_has(runs: TinyRuns, tiny_base: Path, exported: Any):
    """All special tokens of the tiny base stand in its prompts: one is added, and has a row of its own."""
    output, _ = exported("reward", "merged")
    tokenizer, network = AutoTokenizer.from_pretrained(output), plain_base(output, classifier=True)
    base = AutoTokenizer.from_pretrained(tiny_base)
    assert tokenizer.pad_token_id not in base.get_vocab().values()
    assert network.config.pad_token_id == tokenizer.pad_token_id == network.get_input_embeddings().weight.shape[0] - 1
    assert network.config.score_bias == json.loads((output / DETAILS).read_text())["score_bias"]
    base.add_special_tokens({"additional_special_tokens": ["<|other|>", "<|a_pad|>"]})
    base.chat_template = "<|other|>" + base.chat_template
    _prepare(base, Encoder(base, EncodingConfig()), reward=True, records=[])
    assert base.pad_token == "<|a_pad|>"


@pytest.mark.parametrize(("where", "format"), [("docs", "merged"), ("README", "merged"), ("README", "peft")])
def test_the_snippet_gives_the_scores_of_perlhf(
    runs: TinyRuns, exported: Any, monkeypatch: pytest.MonkeyPatch, where: str, format: str
):
    """Through the exported template, several at a time, as the docs and each export's README say."""
    output, details = exported("reward", format)
    monkeypatch.chdir(output.parent)
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", (output / "README.md").read_text("utf-8"), re.M | re.S)
    if where == "docs":
        blocks = [block for block in DOCS_BLOCKS if "SequenceClassification" in block]
        assert "DIRECTORY" not in blocks[0]
    (block,) = blocks
    named = "out/reward-merged" if where == "docs" else "DIRECTORY"
    names: dict[str, Any] = {}
    exec(compile(block.replace(named, str(output)), "snippet", "exec"), names)
    run = read_run(runs.reward)
    model, encoder = run.open("cpu")
    records = [record for record in load(run.config.data, ("rating",), "test") if isinstance(record, Rating)]
    conversations = [[*r.prompt, {"role": "assistant", "content": r.completion}] for r in records]
    wanted = model.scores(
        apart([encoder.example(r.prompt, r.completion).tokens.ids for r in records], packing="none"), "reward"
    )
    found = names["scores"](conversations)
    if where == "docs":
        found = found + details["score_bias"]
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    assert len(records) > 5 and wanted.std() > 1e-2
    if format == "merged":
        assert details["largest_score_error"] < 1e-3 and details["texts_measured"] > 5
        assert details["texts_with_other_tokens"] == 0


@pytest.mark.parametrize("stage", ["sft", "policy"])
def test_peft_loads_an_export_with_its_base_and_tokenizer(runs: TinyRuns, exported: Any, stage: str):
    output, details = exported(stage, "peft")
    assert Path(details["base_model_name_or_path"]).is_absolute(), "the tiny base has no hub id"
    network = AutoPeftModelForCausalLM.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    model, encoder = read_run(getattr(runs, stage)).open("cpu")
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == encoder.prompt(TALK)
    states, _ = model.prefill([ids], stage)
    with torch.no_grad():
        found = network(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(found, model.logits(states, stage)[0], atol=1e-4, rtol=0)
    generation = GenerationConfig.from_pretrained(output)
    assert generation.eos_token_id == encoder.end_id
    block = re.findall(r"^```python\n(.*?)^```", (output / "README.md").read_text("utf-8"), re.M | re.S)[0]
    exec(compile(block.replace("DIRECTORY", str(output)), "snippet", "exec"), {})


def test_the_base_is_named_as_others_find_it(runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = ExportConfig(run=runs.sft, output=tmp_path / "out", base_name="org/base")
    assert export(config)["base_model_name_or_path"] == "org/base"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert "org/base" in (tmp_path / "out" / "README.md").read_text() and "note" not in capsys.readouterr().out
    export(config.model_copy(update={"base_name": None}))  # replaced
    assert "--base-name ID" in capsys.readouterr().out
    assert read_run(tmp_path / "out").stage == "sft"


def test_scores_that_rounding_spoils_are_warned_of(
    runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exporting, "LOST", 1e-4)
    config = ExportConfig(run=runs.reward, output=tmp_path / "out", format="merged", dtype="bfloat16", device="cpu")
    details = export(config)
    assert details["dtype"] == "bfloat16"
    assert details["error_over_deviation"] == details["mean_score_error"] / details["deviation_of_scores"] > 1e-4
    shown = capsys.readouterr().out
    assert "of the scores' deviation; --dtype float32" in shown
    details = export(config.model_copy(update={"dtype": "float32"}))
    assert details["largest_score_error"] < 1e-3 and "note" not in capsys.readouterr().out


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
