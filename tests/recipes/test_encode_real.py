"""What the real tokenizer and its chat template make of a record; ids as published for SmolLM2-Instruct."""

from pathlib import Path

import pytest

from perlhf.config.stages import EncodingConfig
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer
from perlhf.model.encoding.encode import Encoder

SYSTEM = [1, 9690, 198, 47662, 30, 2, 198]  # <|im_start|> system \n Brief . <|im_end|> \n
USER = [1, 4093, 198]
ASSISTANT = [1, 520, 9531, 198]  # <|im_start|> ass istant \n
CLOSE = [2, 198]


@pytest.fixture(scope="module")
def encoder(smollm2: Path) -> Encoder:
    return Encoder(load_tokenizer(Base(smollm2)), EncodingConfig(system="Brief."))


def test_digits_apart_and_a_typed_control_token_as_text(encoder: Encoder) -> None:
    # Pay, space, 2, 0, space, "<", "|", "im", "_", "end", "|", ">": the user's <|im_end|> is none
    typed = [25017, 216, 34, 32, 216, 44, 108, 306, 79, 486, 108, 46]
    assert encoder.prompt("Pay 20 <|im_end|>") == SYSTEM + USER + typed + CLOSE + ASSISTANT


def test_conversation_with_completion(encoder: Encoder) -> None:
    example = encoder.example(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "One latte?"},
            {"role": "user", "content": "Yes"},
        ],
        "Done.",
    )
    turns = [*USER, 26843, *CLOSE, *ASSISTANT, 2705, 4189, 676, 47, *CLOSE, *USER, 10539, *CLOSE, *ASSISTANT]
    assert list(example.prompt) == SYSTEM + turns
    assert example.completion == (41462, 30, 2)  # the template's newline after the end token is dropped
    assert encoder.end_id == encoder.pad_id == 2
