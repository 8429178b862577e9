"""Directories of peft's wherever a run is accepted, held beside what peft itself computes on the tiny base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import open_encoder
from toy import comparisons, demonstrations, prompts, ratings, read_json, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from perlhf.config.stages import EncodingConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*were not initialized.*"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]
CPU = ("--device", "cpu")
EXACT = ("--dtype", "float32", *CPU)
ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def made(directory: Path, base: Path, seed: int = 1, **options: Any) -> Path:
    """What peft saves after training: random pairs and, for a classifier, a random head."""
    torch.manual_seed(seed)
    if options.get("task_type") == "SEQ_CLS":
        network: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    else:
        network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config: Any = LoraConfig(**({"task_type": "CAUSAL_LM", "init_lora_weights": False} | ADAPTER | options))
    trained = get_peft_model(network, config)
    trained.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def answering(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal adapter with pairs of different ranks."""
    directory = tmp_path_factory.mktemp("peft") / "answering"
    return made(directory, tiny_base, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 20}, use_rslora=True)


@pytest.fixture(scope="module")
def scoring(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two classifiers."""
    directory = tmp_path_factory.mktemp("peft")
    return [made(directory / f"scoring-{seed}", tiny_base, seed, task_type="SEQ_CLS") for seed in (1, 2)]


@torch.no_grad()
def scores_by_peft(adapter: Path, base: Path, prompt: str, completion: str) -> float:
    network: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    network.config.pad_token_id = None
    opened = PeftModel.from_pretrained(network, str(adapter)).eval()
    ids = open_encoder(base).example(prompt, completion).tokens.ids
    return opened(torch.tensor([list(ids)])).logits[0, 0].item()


def test_score_gives_the_scores_of_peft(perlhf, tiny_base, scoring, tmp_path):
    rows = comparisons(3)
    data = write_rows(tmp_path / "d.jsonl", rows)
    done = perlhf("score", str(scoring[0]), str(data), "--output", str(tmp_path / "s.jsonl"), *EXACT)
    assert done.code == 0, done.err
    scored = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    for row, found in zip(rows, scored, strict=True):
        for side in ("chosen", "rejected"):
            expected = scores_by_peft(scoring[0], tiny_base, row["prompt"], row[side])
            assert found[f"score_{side}"] == pytest.approx(expected, abs=1e-4)
    assert len({row["score_chosen"] for row in scored}) > 1


def test_evaluate_gives_the_loss_of_peft(perlhf, tiny_base, answering, tmp_path):
    rows = demonstrations(4)
    data = write_rows(tmp_path / "d.jsonl", rows)
    words = (
        "evaluate",
        str(answering),
        "--split",
        "all",
        "--prompts",
        "2",
        "--output",
        str(tmp_path / "e.json"),
        *EXACT,
    )
    done = perlhf(*words)
    assert done.code == 2 and "is an adapter, which doesn't say what to evaluate it on" in done.err
    done = perlhf(*words, "--data.paths", str(data))
    assert done.code == 0, done.err
    found = read_json(tmp_path / "e.json")
    network: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    opened: Any = PeftModel.from_pretrained(network, str(answering)).eval()
    nats, tokens = 0.0, 0
    for row in rows:
        example = open_encoder(tiny_base).example(row["prompt"], row["completion"])
        ids = torch.tensor([[*example.prompt, *example.completion]])
        with torch.no_grad():
            logprobs = torch.log_softmax(opened(ids).logits[0, len(example.prompt) - 1 : -1], -1)
        nats -= logprobs[torch.arange(len(example.completion)), torch.tensor(example.completion)].sum().item()
        tokens += len(example.completion)
    assert found["metrics"]["loss"]["value"] == pytest.approx(nats / tokens, abs=1e-4)
    assert found["before"]["loss"]["value"] != pytest.approx(nats / tokens, abs=1e-2)
    assert found["groups_seen_in_training"] == 0 and found["data"] == [str(data)]


def test_evaluate_measures_a_classifier_and_a_policy(perlhf, answering, scoring, tmp_path):
    rated, asked = (write_rows(tmp_path / f"{rows.__name__}.jsonl", rows()) for rows in (ratings, prompts))
    done = perlhf("evaluate", str(scoring[0]), "--data.paths", str(rated), "--output", str(tmp_path / "r.json"), *CPU)
    assert done.code == 0, done.err
    assert 0 <= read_json(tmp_path / "r.json")["metrics"]["auc"]["value"] <= 1
    words = ("evaluate", str(answering), "--data.paths", str(asked), "--reward", str(scoring[0]), "--prompts", "3")
    done = perlhf(*words, "--output", str(tmp_path / "p.json"), *CPU)
    assert done.code == 0, done.err
    found = read_json(tmp_path / "p.json")
    assert found["kind"] == "policy" and found["after"]["kl"]["value"] > 0


def test_a_policy_is_trained_from_and_by_them(stage, answering, scoring, tmp_path):
    """KL 0 at the start: the policy is the adapter, whose pairs no configuration could have."""
    options = ("--sft", str(answering), "--reward", str(scoring[0]), "--validation-reward", str(scoring[1]))
    run, done = stage("policy", *options)
    assert done.code == 0, done.err
    result = read_json(run / "result.json")
    assert result["before"]["kl"] == 0 and result["updates"] == 3
    facts = read_json(run / "manifest.json")["facts"]
    assert set(facts["adapters"]) == {str(answering), str(scoring[0]), str(scoring[1])}
    (scoring[1] / "notes.txt").write_text("of no account")
    _, done = stage("policy", *options)
    assert done.code == 0, "the same adapters"


@pytest.mark.parametrize(("name", "key"), [("sft", "start"), ("reward", "sft"), ("policy", "start")])
def test_other_stages_start_from_them(stage, answering, name, key):
    _, done = stage(name, f"--{key}", str(answering))
    assert done.code == 0, done.err


def test_a_reward_stage_goes_on_from_a_classifier(stage, scoring):
    _, done = stage("reward", "--start", str(scoring[0]))
    assert done.code == 0, done.err


def test_the_average_of_classifiers_is_one(perlhf, tiny_base, scoring, tmp_path):
    done = perlhf("average", *map(str, scoring), "--output", str(tmp_path / "mean"))
    assert done.code == 0, done.err
    done = perlhf("score", str(tmp_path / "mean"), str(write_rows(tmp_path / "d.jsonl", comparisons(2))), *EXACT)
    assert done.code == 0, done.err
    rows, found = comparisons(2), [json.loads(line) for line in done.out.splitlines()]
    expected = scores_by_peft(tmp_path / "mean", tiny_base, rows[0]["prompt"], rows[0]["chosen"])
    assert found[0]["score_chosen"] == pytest.approx(expected, abs=1e-4)


def test_chat_uses_the_base_that_is_named(perlhf, tiny_base, answering, tmp_path):
    words = ("--message", "a tea", "--temperature", "0", "--max-completion-tokens", "5", *CPU)
    first = perlhf("chat", str(answering), *words)
    assert first.code == 0, first.err
    config = answering / "adapter_config.json"
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "adapter_model.safetensors").write_bytes((answering / "adapter_model.safetensors").read_bytes())
    for name, message in ((None, "names no base"), ("org/elsewhere", "org/elsewhere is not in the local hub cache")):
        (moved / "adapter_config.json").write_text(
            json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name})
        )
        done = perlhf("chat", str(moved), *words)
        assert done.code == 2 and message in done.err and "--base" in done.err
        done = perlhf("chat", str(moved), "--base", str(tiny_base), *words)
        assert done.code == 0 and done.out == first.out
    assert "note: the adapter names org/elsewhere as its base" in done.err


def test_the_chat_template_beside_an_adapter_is_used(perlhf, tiny_base, answering, tmp_path):
    """TRL saves tokenizer and template beside the adapter; a base often has none."""
    beside = tmp_path / "beside"
    beside.mkdir()
    for file in answering.iterdir():
        (beside / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(beside)
    (tmp_path / "t.jinja").write_text(tokenizer.chat_template)
    encoder = open_encoder(tiny_base, EncodingConfig(template=str(tmp_path / "t.jinja")))
    data = write_rows(tmp_path / "d.jsonl", demonstrations(3))
    losses = []
    for directory, options in (
        (beside, ()),
        (answering, ("--encoding.template", str(tmp_path / "t.jinja"))),
        (answering, ()),
    ):
        words = ("evaluate", str(directory), "--split", "all", "--prompts", "1", "--data.paths", str(data), *options)
        done = perlhf(*words, "--output", str(tmp_path / "e.json"), *CPU)
        assert done.code == 0, done.err
        losses.append(read_json(tmp_path / "e.json")["metrics"]["loss"]["value"])
    assert losses[0] == losses[1] != losses[2]
    assert "[user] a tea" in str(encoder.tokenizer.decode(encoder.prompt("a tea")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora: True isn't supported"),
        ({"bias": "lora_only"}, "bias: lora_only isn't supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save has embed_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    ],
)
def test_what_cant_be_taken_is_one_error_before_anything_is_trained(
    perlhf, stage, tiny_base, tmp_path, options, message
):
    directory = made(tmp_path / "a", tiny_base, **options)
    for done in (
        perlhf("chat", str(directory), "--message", "hi", *CPU),
        stage("policy", "--sft", str(directory), "--dry-run")[1],
        stage("policy", "--sft", str(directory))[1],
    ):
        assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "policy").exists()


def test_a_pickled_adapter_is_named(perlhf, answering, tmp_path):
    directory = tmp_path / "pickled"
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes((answering / "adapter_config.json").read_bytes())
    (directory / "adapter_model.bin").write_bytes(b"\x80")
    done = perlhf("chat", str(directory), "--message", "hi", *CPU)
    assert done.code == 2
    assert "no adapter_model.safetensors in it, but adapter_model.bin" in done.err and "never read" in done.err


def test_an_encoding_is_not_changed_for_a_run(perlhf, sft_run):
    done = perlhf("evaluate", str(sft_run), "--encoding.template", "plain", *CPU)
    assert done.code == 2 and "encoding that it was trained with" in done.err
