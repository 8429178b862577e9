"""Adapter directories: the real peft opens ours, ours opens peft's, and whatever can't be reproduced is refused."""

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from perlhf.errors import AdapterError, PerlhfError, StorageError
from perlhf.method.lora import LowRank
from perlhf.model.adapter import Adapter, Role
from perlhf.model.bases.found import Base
from perlhf.model.saved import SavedAdapter, check_base, read_adapter, write_adapter
from perlhf.system.files import sealed, unsealed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # Said of a base without a name, with huggingface-hub before 2.
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume:UserWarning"),
]

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


def adapter(model: LlamaForCausalLM, head: torch.Tensor | None = None) -> SavedAdapter:
    """Random pairs (B not zero) on every attention projection."""
    made = Adapter("adapter", "sft" if head is None else "reward", RANK, ALPHA)
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in TARGETS:
            assert isinstance(module, nn.Linear)
            a, b = torch.randn(RANK, module.in_features), torch.randn(module.out_features, RANK) * 0.1
            made.pairs[path] = LowRank(nn.Parameter(a), nn.Parameter(b), ALPHA / RANK)
    if head is not None:
        made.score_head, made.bias = nn.Parameter(head), nn.Parameter(torch.tensor([-0.75]), requires_grad=False)
    return SavedAdapter(made, BASE, {"template": "tokenizer", "max_tokens": 1024}, TARGETS)


def full(role: Role = "reward") -> SavedAdapter:
    """All weights of a network with two tensors that are one."""
    weight = nn.Parameter(torch.randn(3, 2))
    made = Adapter("adapter", role, weights={"lm_head.weight": weight, "model.embed.weight": weight})
    if role in ("reward", "value"):
        made.score_head, made.bias = nn.Parameter(torch.randn(1, 2)), nn.Parameter(torch.tensor([0.1]))
    return SavedAdapter(made, BASE, {"system": "Größe ☕"})


def with_alpha(saved: SavedAdapter, alpha: float) -> SavedAdapter:
    pairs = {path: replace(pair, scale=alpha / RANK) for path, pair in saved.adapter.pairs.items()}
    return replace(saved, adapter=replace(saved.adapter, alpha=alpha, pairs=pairs))


@torch.no_grad()
def merge_by_hand(model: LlamaForCausalLM, saved: SavedAdapter, scale: float) -> None:
    """W + scale B A, written out."""
    for path, pair in saved.adapter.pairs.items():
        model.get_parameter(f"{path}.weight").data += scale * (pair.b @ pair.a)


def same(found: SavedAdapter, expected: SavedAdapter) -> None:
    """Equality of everything, tensors by value."""
    ours, theirs = found.adapter, expected.adapter
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, tensor in theirs.tensors().items():
        assert torch.equal(ours.tensors()[name], tensor), name
    assert {path: (p.scale, p.dropout) for path, p in ours.pairs.items()} == {
        path: (p.scale, p.dropout) for path, p in theirs.pairs.items()
    }
    plain: dict[str, Any] = {"pairs": {}, "weights": {}, "score_head": None, "bias": None}
    assert replace(ours, **plain) == replace(theirs, **plain)
    nothing = Adapter("", "sft")
    assert replace(found, adapter=nothing) == replace(expected, adapter=nothing)


def test_round_trip(tmp_path: Path, model: LlamaForCausalLM) -> None:
    for name, saved in (("sft", adapter(model)), ("reward", adapter(model, head=torch.randn(1, 64)))):
        write_adapter(tmp_path / name, saved)
        found = read_adapter(tmp_path / name)
        same(found, saved)
        assert list(found.adapter.pairs) == sorted(saved.adapter.pairs), "the order of an optimiser's parameters"
        names = sorted(path.name for path in (tmp_path / name).iterdir())
        assert names == ["adapter_config.json", "adapter_model.safetensors", "perlhf.json"]


@pytest.mark.parametrize("role", ["sft", "reward", "policy", "value"])
def test_round_trip_of_full_tuning(tmp_path: Path, role: Role) -> None:
    saved = full(role)
    write_adapter(tmp_path / "a", saved)
    found = read_adapter(tmp_path / "a")
    same(found, saved)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["full_weights.safetensors", "perlhf.json"]
    assert found.adapter.bias is None or found.adapter.bias.requires_grad == (role == "value")


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
    theirs = files.adapter
    assert (theirs.rank, theirs.dropout, theirs.role, theirs.bias) == (4, 0.25, "sft", None)
    assert files.targets == TARGETS
    assert len(theirs.pairs) == 8 and "model.layers.1.self_attn.o_proj" in theirs.pairs
    # peft scales by alpha / rank, or by alpha / sqrt(rank) with rslora: 6 / 4 or 6 / 2
    scale = pytest.approx(3.0 if use_rslora else 1.5)
    assert theirs.alpha / theirs.rank == scale and all(pair.scale == scale for pair in theirs.pairs.values())
    merge_by_hand(bare, files, scale=3.0 if use_rslora else 1.5)
    with torch.no_grad():
        torch.testing.assert_close(trained(IDS).logits, bare(IDS).logits, rtol=1e-4, atol=1e-4)


PATTERNS: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*\.v_proj": 8}},
    "alphas": {"alpha_pattern": {"o_proj": 3, "q_proj": 20}},
    "both, rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5, "k_proj": 9}, "use_rslora": True},
    "regex": {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["k_proj"]},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_pairs_of_different_ranks_are_those_of_real_peft(tmp_path: Path, model: LlamaForCausalLM, name: str) -> None:
    """Read, written and read by peft again: three times the same logits."""
    options: dict[str, Any] = {"r": RANK, "lora_alpha": 6, "target_modules": TARGETS} | PATTERNS[name]
    bare = LlamaForCausalLM(tiny_config()).eval()
    bare.load_state_dict(model.state_dict())
    again = LlamaForCausalLM(tiny_config()).eval()
    again.load_state_dict(model.state_dict())
    trained = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)).eval()
    trained.save_pretrained(str(tmp_path / "peft"))
    files = read_adapter(tmp_path / "peft")
    write_adapter(tmp_path / "ours", replace(files, base=BASE))
    same(read_adapter(tmp_path / "ours"), replace(files, base=BASE))
    with torch.no_grad():
        expected, before = trained(IDS).logits, bare(IDS).logits
        for path, pair in files.adapter.pairs.items():
            bare.get_parameter(f"{path}.weight").data += pair.scale * (pair.b @ pair.a)
        torch.testing.assert_close(bare(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        opened = PeftModel.from_pretrained(again, str(tmp_path / "ours"))
        torch.testing.assert_close(opened(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 0.01


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_embedding_or_head_that_real_peft_adapts_is_named(
    tmp_path: Path, model: LlamaForCausalLM, module: str
) -> None:
    trained = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=["q_proj", module]))
    trained.save_pretrained(str(tmp_path), save_embedding_layers=True)
    with pytest.raises(AdapterError, match=rf"target_modules: .*{module} isn't a linear layer below the output head"):
        read_adapter(tmp_path)


def test_reads_a_classifier_of_real_peft(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(tmp_path / "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=r".*layers\.0\..*_proj")
    trained = get_peft_model(classifier, config)
    trained.save_pretrained(str(tmp_path / "peft"))
    files = read_adapter(tmp_path / "peft")
    theirs = files.adapter
    assert (
        theirs.role == "reward"
        and theirs.score_head is not None
        and theirs.bias is not None
        and theirs.bias.item() == 0
    )
    assert torch.equal(
        theirs.score_head, trained.get_parameter("base_model.model.score.modules_to_save.default.weight")
    )
    assert files.targets == sorted(theirs.pairs)  # layer 0 only: plain names would match layer 1 as well
    assert {path.split(".")[2] for path in theirs.pairs} == {"0"} and len(theirs.pairs) == 7
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


@pytest.mark.parametrize(("tuning", "offset"), [("lora", -1), ("lora", -4000), ("full", -1), ("full", 20)])
def test_a_flipped_byte_is_found(tmp_path: Path, model: LlamaForCausalLM, tuning: str, offset: int) -> None:
    write_adapter(tmp_path / "a", adapter(model) if tuning == "lora" else full())
    path = next((tmp_path / "a").glob("*.safetensors"))
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
        ("adapter_config.json", "alpha_pattern", {"q_proj": 64}),
        ("adapter_config.json", "rank_pattern", {"q_proj": 8}),
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


def test_details_of_full_tuning_that_were_changed_are_found(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", full())
    file = tmp_path / "a" / "perlhf.json"
    file.write_text(file.read_text().replace('"role": "reward"', '"role": "value"'))
    with pytest.raises(AdapterError, match=r"perlhf\.json: damaged: it was changed after saving"):
        read_adapter(tmp_path / "a")


def test_files_of_an_earlier_version_are_refused_as_such(tmp_path: Path, model: LlamaForCausalLM) -> None:
    write_adapter(tmp_path / "a", adapter(model))
    file = tmp_path / "a" / "perlhf.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    with pytest.raises(AdapterError, match=r"perlhf\.json: format 1, of another version of perlhf\n"):
        read_adapter(tmp_path / "a")
    write_adapter(tmp_path / "full", full())
    (tmp_path / "full" / "perlhf.json").rename(tmp_path / "full" / "perlhf_full.json")
    with pytest.raises(AdapterError, match=r"without perlhf\.json: .*, or made by an earlier version"):
        read_adapter(tmp_path / "full")


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
    with pytest.raises(AdapterError, match="no adapter at"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
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
    config = tmp_path / "a" / "adapter_config.json"
    (tmp_path / "a" / "adapter_model.bin").rename(tmp_path / "a" / "adapter_model.safetensors")
    for number in (0, "many", None):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": number}))
        with pytest.raises(AdapterError, match="r is "):
            read_adapter(tmp_path / "a")


def test_another_base_is_refused_with_both_names(model: LlamaForCausalLM) -> None:
    files = adapter(model)
    check_base(files, BASE)
    check_base(files, {"name": "a/renamed-copy", "sha256": BASE["sha256"]})  # the weights decide
    with pytest.raises(AdapterError) as error:
        check_base(files, {"name": "other/base", "sha256": "cd" * 32})
    assert "tiny/base" in str(error.value) and "other/base" in str(error.value)
    with pytest.raises(AdapterError):
        check_base(files, {"name": BASE["name"], "sha256": "cd" * 32})  # same name, other weights


def test_base_of_a_foreign_adapter_goes_by_name(
    model: LlamaForCausalLM, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = replace(adapter(model), base={"name": "tiny/base", "sha256": ""})
    check_base(foreign, BASE)
    check_base(replace(foreign, base={"name": "", "sha256": ""}), BASE)
    assert capsys.readouterr().err == ""
    check_base(foreign, {"name": "other/base", "sha256": "cd" * 32})  # nobody here knows what tiny/base is
    assert "names tiny/base as its base, which isn't here; taken to be other/base" in capsys.readouterr().err
    here = replace(foreign, base={"name": str(tiny_base), "sha256": ""})
    check_base(here, {"name": "a/renamed-copy", "sha256": Base.find(str(tiny_base)).fingerprint["sha256"]})
    with pytest.raises(AdapterError, match="base_model_name_or_path") as error:
        check_base(here, {"name": "other/base", "sha256": "cd" * 32})
    assert str(tiny_base) in str(error.value) and "other/base" in str(error.value)


def test_overwrites_an_adapter_but_nothing_else(tmp_path: Path, model: LlamaForCausalLM) -> None:
    files = adapter(model)
    write_adapter(tmp_path / "a", files)
    changed = with_alpha(replace(files, encoding={"max_tokens": 512}), 2.5)
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
            write_adapter(tmp_path / "a", with_alpha(files, 99.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same(read_adapter(tmp_path / "a"), files)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def our_directory(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    write_adapter(tmp_path / "ours", adapter(model))
    return tmp_path / "ours"


def peft_directory(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    directory = our_directory(model, tmp_path)
    (directory / "perlhf.json").unlink()
    return directory


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "4"),
        ("r", True),
        ("r", None),
        ("lora_alpha", [8]),
        ("lora_alpha", float("nan")),
        ("lora_dropout", {"x": 1}),
        ("lora_dropout", 2),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("modules_to_save", 3),
        ("modules_to_save", [3]),
        ("target_modules", [3]),
        ("task_type", {}),
        ("init_lora_weights", []),
        ("base_model_name_or_path", 3),
    ],
)
def test_values_of_a_wrong_kind_in_pefts_configuration_name_their_key(model, tmp_path, key, value):
    directory = peft_directory(model, tmp_path)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(AdapterError, match=key) as error:
        read_adapter(directory)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("role", "judge"), ("bias", "x"), ("bias", None), ("base", []), ("base", {"name": 3}), ("encoding", 1)],
)
def test_values_of_a_wrong_kind_in_our_own_file_name_their_key(model, tmp_path, key, value):
    directory = our_directory(model, tmp_path)
    said = unsealed(directory / "perlhf.json")
    (directory / "perlhf.json").write_bytes(sealed(said | {key: value}))
    with pytest.raises(AdapterError, match=f"{key} is"):
        read_adapter(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_whose_numbers_are_none_is_refused(model, tmp_path, value):
    """Every score of it would be null."""
    directory = peft_directory(model, tmp_path)
    tensors = load_file(directory / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="values that aren't finite"):
        read_adapter(directory)


def test_an_adapter_says_which_file_of_its_base_was_changed(model):
    files_then = {"tokenizer.json": "aa", "config.json": "bb"}
    recorded = BASE | {"files": files_then}
    saved = replace(adapter(model), base=recorded)
    check_base(saved, recorded)
    for name, changed in (("tokenizer.json", {"tokenizer.json": "cc", "config.json": "bb"}), ("new.json", None)):
        files = changed or files_then | {"new.json": "dd"}
        with pytest.raises(AdapterError, match=f"{name} of base"):
            check_base(saved, BASE | {"files": files})
    check_base(saved, BASE)
    check_base(replace(saved, base=BASE), recorded)  # made by an earlier version, which recorded no files


def test_the_commit_of_a_hub_base_goes_with_the_adapter_and_comes_back(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """In the key that peft gives to transformers; where the base is named otherwise, nobody knows its commit."""
    of_hub = replace(adapter(model), base={"name": "org/base", "sha256": "a" * 64, "files": {}, "revision": "b" * 40})
    write_adapter(tmp_path / "ours", of_hub)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["revision"] == "b" * 40
    (tmp_path / "ours" / "perlhf.json").unlink()
    assert read_adapter(tmp_path / "ours").base["name"] == "org/base@" + "b" * 40
    write_adapter(tmp_path / "elsewhere", of_hub, "/models/base")
    assert "revision" not in json.loads((tmp_path / "elsewhere" / "adapter_config.json").read_text())
