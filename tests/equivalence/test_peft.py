"""The real peft on the tiny base: it opens our adapters and we open its, with the same logits and scores."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import END, START, answers, apart, random_ids, randomise, reference_logprobs
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from perlhf.config.stages import EncodingConfig
from perlhf.errors import AdapterError
from perlhf.model import merged as merged_parts
from perlhf.model import saved
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model

# peft asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = random_ids([5, 9, 1], seed=1)
COMPLETIONS = random_ids([4, 1, 7], seed=2)


def network(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def check_same(model: Model, adapter: str, other: torch.nn.Module) -> None:
    with torch.no_grad():
        found = model.logprobs(answers(PROMPTS, COMPLETIONS), adapter).logprobs
        bare = model.logprobs(answers(PROMPTS, COMPLETIONS), None).logprobs
    assert (found - bare).abs().max() > 0.01  # the adapter does something
    for row, prompt, completion in zip(found, PROMPTS, COMPLETIONS, strict=True):
        expected = reference_logprobs(other, prompt, completion)
        torch.testing.assert_close(row[: len(completion)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("targets", ["attention", "all", ("q_proj", "layers.1.mlp.down_proj")])
def test_peft_gives_the_same_with_our_adapter(
    model: Model, encoder: Encoder, tiny_base: Path, tmp_path: Path, targets: str | tuple[str, ...]
) -> None:
    model.add_adapter("sft", "sft", rank=4, alpha=10.0, targets=targets)
    randomise(model, "sft")
    saved.save_adapter(model, "sft", tmp_path / "adapter", encoder)
    theirs = PeftModel.from_pretrained(network(tiny_base), str(tmp_path / "adapter")).eval()
    check_same(model, "sft", theirs)


def test_peft_gives_the_same_with_an_adapter_on_the_last_layer(
    model: Model, encoder: Encoder, tiny_base: Path, tmp_path: Path
) -> None:
    model.add_adapter("sft", "sft", rank=4, alpha=10.0, layers="last:1")
    randomise(model, "sft")
    saved.save_adapter(model, "sft", tmp_path / "adapter", encoder)
    theirs = PeftModel.from_pretrained(network(tiny_base), str(tmp_path / "adapter")).eval()
    check_same(model, "sft", theirs)


def test_peft_gives_the_same_with_stacked_adapters(
    model: Model, encoder: Encoder, tiny_base: Path, tmp_path: Path
) -> None:
    model.add_adapter("sft", "sft", rank=4, alpha=8.0)
    model.add_adapter("policy", "policy", rank=2, alpha=6.0, targets="all", beneath="sft")
    randomise(model, "sft", 1)
    randomise(model, "policy", 2)
    saved.save_adapter(model, "policy", tmp_path / "adapter", encoder)
    theirs = PeftModel.from_pretrained(network(tiny_base), str(tmp_path / "adapter")).eval()
    check_same(model, "policy", theirs)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_give_the_same_with_an_adapter_of_peft(
    model: Model, encoder: Encoder, tiny_base: Path, tmp_path: Path, use_rslora: bool
) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj"],
        init_lora_weights=False,
        use_rslora=use_rslora,
    )
    theirs = get_peft_model(network(tiny_base), config).eval()
    theirs.save_pretrained(str(tmp_path / "peft"))
    saved.load_adapter(model, tmp_path / "peft", "sft", encoder)
    check_same(model, "sft", theirs)


def test_an_adapter_of_peft_on_the_output_head_is_refused(model: Model, tiny_base: Path, tmp_path: Path) -> None:
    """Log-probabilities come from the head's weight in chunks; an update to it would silently be left out."""
    untied = network(tiny_base)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    get_peft_model(untied, config).save_pretrained(str(tmp_path / "head"), save_embedding_layers=False)
    with pytest.raises(AdapterError, match="output head 'lm_head'"):
        saved.load_adapter(model, tmp_path / "head", "head")


@pytest.mark.filterwarnings("ignore:.*were not initialized.*")
@pytest.mark.parametrize("role", ["reward", "value"])
def test_a_scoring_adapter_opens_as_sequence_classification(
    model: Model, encoder: Encoder, tiny_base: Path, tmp_path: Path, role: str
) -> None:
    """Same scores but for the bias, which holds the labels' log-odds and which peft's layout has no place for."""
    adapter = model.add_adapter("scorer", role, rank=4)  # pyright: ignore[reportArgumentType]
    randomise(model, "scorer")
    assert adapter.bias is not None
    adapter.bias.data.fill_(1.25)
    saved.save_adapter(model, "scorer", tmp_path / "adapter", encoder)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float32)
    # Transformers scores the last token that isn't pad, and would pass over the end token when the two are one.
    classifier.config.pad_token_id = START
    theirs = PeftModel.from_pretrained(classifier, str(tmp_path / "adapter")).eval()
    sequences = [[*p, *c, END] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        ours = model.scores(apart(sequences), "scorer")
        expected = torch.stack([theirs(torch.tensor([ids])).logits[0, 0] for ids in sequences])
    torch.testing.assert_close(ours - 1.25, expected, rtol=0, atol=1e-4)
    assert ours.std() > 0.1


@pytest.fixture(scope="module")
def gpt2(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose layers keep their weights as [in, out], with the tiny tokenizer."""
    directory = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("gpt2") / "base"))
    ends = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
    config = GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **ends)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def test_layers_that_keep_their_weights_the_other_way_round(gpt2: Path, tmp_path: Path) -> None:
    """Ours in peft, merged there and here, and peft's in ours."""
    encoder = Encoder(load_tokenizer(Base(gpt2)), EncodingConfig(max_tokens=64))
    model = Model.load(Base(gpt2), "float32", "cpu")
    model.add_adapter("sft", "sft", rank=4, alpha=10.0, targets="all")
    assert {path.rpartition(".")[2] for path in model.adapters["sft"].pairs} == {"c_attn", "c_proj", "c_fc"}
    randomise(model, "sft")
    saved.save_adapter(model, "sft", tmp_path / "ours", encoder)
    plain = GPT2LMHeadModel.from_pretrained(gpt2, dtype=torch.float32).eval()
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "ours")).eval()  # a warning is an error
    check_same(model, "sft", theirs)
    merged = copy.deepcopy(plain)
    merged_parts._merge(merged, model.adapters["sft"])
    check_same(model, "sft", merged)
    for name, weight in theirs.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), weight, rtol=0, atol=1e-5)
    model.add_adapter("full", "sft", tuning="full", beneath="sft")
    check_same(model, "full", merged)
    other = get_peft_model(plain, LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    other.save_pretrained(str(tmp_path / "theirs"))
    saved.load_adapter(model, tmp_path / "theirs", "theirs")
    check_same(model, "theirs", other)
