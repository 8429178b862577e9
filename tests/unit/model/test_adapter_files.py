"""Adapter directories: the real peft opens ours, ours opens peft's, and whatever can't be reproduced is refused."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from perlhf.errors import AdapterError, PerlhfError, StorageError
from perlhf.model.adapter_files import AdapterFiles, check_base, read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

BASE = {"name": "tiny/base", "sha256": "ab" * 32}
TARGETS = ["k_proj", "o_proj", "q_proj", "v_proj"]
IDS = torch.tensor([[5, 17, 3, 250, 9, 31]])
RANK, ALPHA = 4, 6.0
PAD = 2


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=PAD,
    )


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny_config()).eval()


def adapter(model: LlamaForCausalLM, head: torch.Tensor | None = None) -> AdapterFiles:
    """Random pairs (B not zero) on every attention projection."""
    weights = {}
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in TARGETS:
            assert isinstance(module, torch.nn.Linear)
            weights[path] = (torch.randn(RANK, module.in_features), torch.randn(module.out_features, RANK) * 0.1)
    return AdapterFiles(
        weights=weights,
        rank=RANK,
        alpha=ALPHA,
        dropout=0.0,
        targets=TARGETS,
        head=head,
        bias=0.0 if head is None else -0.75,
        role="sft" if head is None else "reward",
        base=BASE,
        encoding={"template": "tokenizer", "max_tokens": 1024},
        extra={"step": 20},
    )


def merge_by_hand(model: LlamaForCausalLM, files: AdapterFiles, scale: float) -> None:
    """W + scale B A, written out."""
    for path, (a, b) in files.weights.items():
        model.get_parameter(f"{path}.weight").data += scale * (b @ a)


def same(found: AdapterFiles, expected: AdapterFiles) -> None:
    """Equality of everything, tensors by value."""
    assert found.weights.keys() == expected.weights.keys()
    for path, (a, b) in expected.weights.items():
        assert torch.equal(found.weights[path][0], a) and torch.equal(found.weights[path][1], b)
    if found.head is None or expected.head is None:
        assert found.head is expected.head
    else:
        assert torch.equal(found.head, expected.head)
    plain = {"weights": {}, "head": None}
    assert replace(found, **plain) == replace(expected, **plain)


def test_round_trip(tmp_path: Path, model: LlamaForCausalLM) -> None:
    for name, files in (("sft", adapter(model)), ("reward", adapter(model, head=torch.randn(1, 64)))):
        write_adapter(tmp_path / name, files)
        found = read_adapter(tmp_path / name)
        same(found, files)
        assert list(found.weights) == sorted(files.weights), "the order of an optimiser's parameters"
        names = sorted(path.name for path in (tmp_path / name).iterdir())
        assert names == ["adapter_config.json", "adapter_model.safetensors", "perlhf.json"]


def test_real_peft_gives_the_logits_of_the_hand_merged_model(tmp_path: Path, model: LlamaForCausalLM) -> None:
    files = adapter(model)
    write_adapter(tmp_path / "a", files)
    merged = LlamaForCausalLM(tiny_config()).eval()
    merged.load_state_dict(model.state_dict())
    merge_by_hand(merged, files, scale=6 / 4)
    with torch.no_grad():
        bare, expected = model(IDS).logits, merged(IDS).logits
        found = PeftModel.from_pretrained(model, str(tmp_path / "a"))(IDS).logits
    assert (expected - bare).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_real_peft_opens_a_reward_adapter_with_the_same_scores(tmp_path: Path, model: LlamaForCausalLM) -> None:
    head = torch.randn(1, 64)
    files = adapter(model, head=head)
    write_adapter(tmp_path / "reward", files)
    model.save_pretrained(tmp_path / "base")
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=PAD, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    opened = PeftModel.from_pretrained(classifier, str(tmp_path / "reward")).eval()
    padded = torch.cat([IDS, torch.full((1, 3), PAD)], dim=1)  # the score is read at the last token that is no padding
    merge_by_hand(model, files, scale=6 / 4)
    with torch.no_grad():
        found = opened(padded, attention_mask=(padded != PAD).long()).logits
        expected = model.model(IDS).last_hidden_state[:, -1] @ head.T
    assert found.shape == (1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_reads_what_real_peft_saves(tmp_path: Path, model: LlamaForCausalLM, use_rslora: bool) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=6,
        lora_dropout=0.25,
        target_modules=TARGETS,
        use_rslora=use_rslora,
        init_lora_weights=False,  # random A and B, so that the adapter does something
    )
    bare = LlamaForCausalLM(tiny_config()).eval()
    bare.load_state_dict(model.state_dict())
    trained = get_peft_model(model, config).eval()
    trained.save_pretrained(str(tmp_path / "peft"))
    files = read_adapter(tmp_path / "peft")
    assert (files.rank, files.dropout, files.role, files.bias) == (4, 0.25, "sft", 0.0)
    assert files.targets == TARGETS
    assert len(files.weights) == 8 and "model.layers.1.self_attn.o_proj" in files.weights
    # peft scales by alpha / rank, or by alpha / sqrt(rank) with rslora: 6 / 4 or 6 / 2
    assert files.alpha / files.rank == pytest.approx(3.0 if use_rslora else 1.5)
    merge_by_hand(bare, files, scale=3.0 if use_rslora else 1.5)
    with torch.no_grad():
        torch.testing.assert_close(trained(IDS).logits, bare(IDS).logits, rtol=1e-4, atol=1e-4)


def test_reads_a_classifier_of_real_peft(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(tmp_path / "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=r".*layers\.0\..*_proj")
    trained = get_peft_model(classifier, config)
    trained.save_pretrained(str(tmp_path / "peft"))
    files = read_adapter(tmp_path / "peft")
    assert files.role == "reward" and files.head is not None
    assert torch.equal(files.head, trained.get_parameter("base_model.model.score.modules_to_save.default.weight"))
    assert files.targets == sorted(files.weights)  # layer 0 only: plain names would match layer 1 as well
    assert {path.split(".")[2] for path in files.weights} == {"0"} and len(files.weights) == 7
    assert files.base == {"name": str(tmp_path / "base"), "sha256": ""}


def test_keys_and_config_are_those_of_peft(tmp_path: Path, model: LlamaForCausalLM) -> None:
    write_adapter(tmp_path / "ours", adapter(model, head=torch.randn(1, 64)))
    names = set(load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.score.weight" in names and len(names) == 17
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/base"
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert (config["r"], config["lora_alpha"]) == (4, 6)


@pytest.mark.parametrize("offset", [-1, -4000])
def test_a_flipped_byte_is_found(tmp_path: Path, model: LlamaForCausalLM, offset: int) -> None:
    write_adapter(tmp_path / "a", adapter(model))
    path = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="SHA-256") as error:
        read_adapter(tmp_path / "a")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [3]),
        ("peft_type", "LOHA"),
        ("task_type", "SEQ_2_SEQ_LM"),
        ("an_option_of_tomorrow", 1),
    ],
)
def test_refuses_what_is_not_plain_lora(tmp_path: Path, model: LlamaForCausalLM, key: str, value: object) -> None:
    write_adapter(tmp_path / "a", adapter(model))
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(AdapterError, match=key):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("perlhf.json", "bias", 9.5),
        ("perlhf.json", "bias", None),
        ("perlhf.json", "encoding", {}),
        ("perlhf.json", "seal", None),
        ("adapter_config.json", "lora_alpha", 64),
    ],
)
def test_details_that_were_changed_are_found(
    tmp_path: Path, model: LlamaForCausalLM, file: str, key: str, value: object
) -> None:
    write_adapter(tmp_path / "a", adapter(model, torch.ones(1, model.config.hidden_size)))
    details = json.loads((tmp_path / "a" / file).read_text())
    (tmp_path / "a" / file).write_text(json.dumps(details | {key: value}))
    with pytest.raises(PerlhfError, match="changed after saving"):
        read_adapter(tmp_path / "a")


def test_refuses_strange_tensors(tmp_path: Path, model: LlamaForCausalLM) -> None:
    trained = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=TARGETS))
    trained.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    cases = {
        "unknown tensor": good | {"base_model.model.lm_head.weight": torch.zeros(2)},
        "without lora_B": {name: tensor for name, tensor in good.items() if name != f"{q}B.weight"},
        "no pair of rank 4": good | {f"{q}A.weight": torch.zeros(5, 64)},
        "no lora_A": {},
        r"score head is \[2, 64\]": good | {"base_model.model.score.weight": torch.zeros(2, 64)},
    }
    for message, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(AdapterError, match=message):
            read_adapter(tmp_path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(AdapterError, match="damaged"):
        read_adapter(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path, model: LlamaForCausalLM) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path / "nowhere")
    write_adapter(tmp_path / "a", adapter(model))
    for name, text in (("perlhf.json", "{"), ("perlhf.json", "[]"), ("adapter_config.json", '{"r": ')):
        kept = (tmp_path / "a" / name).read_text()
        (tmp_path / "a" / name).write_text(text)
        with pytest.raises(AdapterError, match="damaged"):
            read_adapter(tmp_path / "a")
        (tmp_path / "a" / name).write_text(kept)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors") as error:
        read_adapter(tmp_path / "a")
    assert "never read" in str(error.value)


def test_another_base_is_refused_with_both_names(model: LlamaForCausalLM) -> None:
    files = adapter(model)
    check_base(files, BASE)
    check_base(files, {"name": "a/renamed-copy", "sha256": BASE["sha256"]})  # the weights decide
    with pytest.raises(AdapterError) as error:
        check_base(files, {"name": "other/base", "sha256": "cd" * 32})
    assert "tiny/base" in str(error.value) and "other/base" in str(error.value)
    with pytest.raises(AdapterError):
        check_base(files, {"name": BASE["name"], "sha256": "cd" * 32})  # same name, other weights


def test_base_of_a_foreign_adapter_goes_by_name(model: LlamaForCausalLM) -> None:
    foreign = replace(adapter(model), base={"name": "tiny/base", "sha256": ""})
    check_base(foreign, BASE)
    check_base(replace(foreign, base={"name": "", "sha256": ""}), BASE)
    with pytest.raises(AdapterError, match="base_model_name_or_path") as error:
        check_base(foreign, {"name": "other/base", "sha256": "cd" * 32})
    assert "tiny/base" in str(error.value) and "other/base" in str(error.value)


def test_overwrites_an_adapter_but_nothing_else(tmp_path: Path, model: LlamaForCausalLM) -> None:
    files = adapter(model)
    write_adapter(tmp_path / "a", files)
    changed = replace(files, alpha=2.5, extra={"step": 40})
    write_adapter(tmp_path / "a", changed)
    same(read_adapter(tmp_path / "a"), changed)
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"thesis\.txt"):
        write_adapter(tmp_path / "a", files)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_full_disk_leaves_the_old_adapter(tmp_path: Path, model: LlamaForCausalLM) -> None:
    files = adapter(model)
    write_adapter(tmp_path / "a", files)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a file of more than 1000 bytes fails, as on a full disk
    try:
        with pytest.raises(StorageError, match="can't write"):
            write_adapter(tmp_path / "a", replace(files, alpha=99.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same(read_adapter(tmp_path / "a"), files)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
