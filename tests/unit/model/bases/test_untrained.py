"""Added tokens that a network never learned are told from those that it did, and told of when they are used."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perlhf.config.stages import EncodingConfig
from perlhf.model.bases import loading
from perlhf.model.bases.found import Base
from perlhf.model.bases.untrained import untrained_tokens
from perlhf.model.encoding.encode import Encoder

ZERO, MEAN, TWIN, OTHER_TWIN, LEARNED = "<|zero|>", "<|mean|>", "<|twin|>", "<|other|>", "<|learned|>"


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def enlarged(tiny_base: Path, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A tokenizer with five more tokens, and a network with rows of each kind for them."""
    tokenizer = loading.load_tokenizer(Base(tiny_base))
    network: Any = loading.load_base(Base(tiny_base), torch.float32, "cpu")
    tokenizer.add_tokens([ZERO, MEAN, TWIN, OTHER_TWIN, LEARNED])
    torch.manual_seed(0)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=True)  # as transformers makes them by default
    rows = network.get_input_embeddings().weight.data
    named = tokenizer.convert_tokens_to_ids
    rows[named(ZERO)] = 0
    rows[named(TWIN)] = rows[named(OTHER_TWIN)] = torch.randn(rows.shape[1]) * rows[:272].std()
    rows[named(LEARNED)] = torch.randn(rows.shape[1]) * rows[:272].std()
    return tokenizer, network.to(request.param)


def test_rows_that_are_zero_shared_or_the_mean_were_never_trained(enlarged: tuple[Any, Any]) -> None:
    tokenizer, network = enlarged
    found = untrained_tokens(network, tokenizer)
    said = {tokenizer.convert_ids_to_tokens(number): why for number, why in found.items()}
    reserve = "is the same as that of other tokens in reserve"
    assert {token: said.get(token) for token in (ZERO, TWIN, OTHER_TWIN, LEARNED)} == {
        ZERO: "is zero",
        TWIN: reserve,
        OTHER_TWIN: reserve,
        LEARNED: None,
    }
    assert said[MEAN] == "is the mean of all tokens', as adding it made it"
    assert set(said) == {ZERO, MEAN, TWIN, OTHER_TWIN}  # none of the base's own


def test_a_record_that_uses_one_is_told_of_once(enlarged: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, network = enlarged
    encoder = Encoder(tokenizer, EncodingConfig(template="plain"), (), untrained_tokens(network, tokenizer))
    encoder.example("a plain prompt", f"and {LEARNED} an answer")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        encoder.example(f"with {ZERO} in it", f"{MEAN} and so on")
        encoder.prompt(f"with {ZERO} again")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("note: records or their template use ") for line in lines)
    assert "its embedding is zero, and no adapter trains it" in lines[0] and repr(ZERO) in lines[0]


def test_a_network_without_added_tokens_costs_nothing(tiny_base: Path) -> None:
    network = loading.without_weights(str(tiny_base))
    assert untrained_tokens(network, loading.load_tokenizer(Base(tiny_base))) == {}
