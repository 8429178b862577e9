"""How many tokens records have at the most, told from their bytes, so that few must be tokenised to find long ones."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perlhf.data.records import Record, Text, completions_of
from perlhf.data.store import ODD, Records
from perlhf.errors import DataError
from perlhf.model.encoding.encode import Encoder

UNKNOWN = np.iinfo(np.int64).max
MOST_SHAPES = 1000
"""Shapes of conversations of which one is tried each; records of others are tokenised."""
_SLACK = 64
"""Tokens beside twice those of the template, in case it writes more around some texts than around others."""
_KEEPS_LENGTH = {"Prepend", "Strip", "Sequence"}
_CAN_GROW = {"NFC": 3, "NFD": 3}
"""Normalisers under which UTF-8 grows to at most so many times its bytes (unicode.org/faq/normalization)."""


def most_tokens(encoder: Encoder, records: Records) -> NDArray[np.int64]:
    """No record has more tokens than this, in prompt and longest completion; UNKNOWN where its bytes don't tell.

    Every token of a subword tokenizer stands for at least a byte of what its normaliser made of the text. So a text of
    n bytes has at most n tokens, where the normaliser leaves its length; NFC and NFD leave ASCII alone and make at most
    three bytes of one. What the template writes around texts is measured by a record of the same shape whose texts are
    one letter each. Records with tools or with messages that have more than role and content are UNKNOWN, since a
    template may write those in any way, and so is everything under another normaliser.
    """
    facts = records.facts
    growth = _growth(encoder.tokenizer)
    most = np.full(len(records), UNKNOWN)
    if growth is None:
        return most
    size = facts.prompt_bytes.astype(np.int64) + facts.completion_bytes
    size *= np.where(facts.ascii, 1, growth)
    shapes, first, place = np.unique(facts.shape, return_index=True, return_inverse=True)
    for number, shape in enumerate(shapes[:MOST_SHAPES]):
        if shape != ODD and (template := _template_tokens(encoder, records[int(first[number])])) is not None:
            alike = place == number
            most[alike] = size[alike] + 2 * template + _SLACK
    return most


def to_tokenise(encoder: Encoder, records: Records) -> NDArray[np.intp]:
    """Numbers of the records that must be tokenised to know that all fit: those that may be longer than `max_tokens`,
    and one of each shape, since a template can refuse it."""
    wanted = most_tokens(encoder, records) > encoder.max_tokens
    wanted[np.unique(records.facts.shape, return_index=True)[1]] = True
    return np.flatnonzero(wanted)


def telling(records: Records, count: int) -> NDArray[np.intp]:
    """Numbers of at most `count` records by which a template, or a limit of tokens, is tried before all are encoded:
    the first of each shape (half of them at the most), and the longest."""
    facts = records.facts
    shapes = np.unique(facts.shape, return_index=True)[1][: max(1, count // 2)]
    size = facts.prompt_bytes.astype(np.int64) + facts.completion_bytes
    longest = np.argsort(-size, kind="stable")[: count - len(shapes)]
    return np.union1d(shapes, longest)


def _template_tokens(encoder: Encoder, record: Record) -> int | None:
    """Tokens of a record with one letter for each text; None where the encoder refuses it."""
    texts = [_one_letter(text) for text in (record.prompt, *completions_of(record))]
    try:
        examples = encoder.examples(texts[0], texts[1:])
    except DataError:
        return None
    return max(len(example.tokens.ids) for example in examples)


def _one_letter(text: Text) -> Text:
    return "x" if isinstance(text, str) else [{**message, "content": "x"} for message in text]


def _growth(tokenizer: Any) -> int | None:
    """How many times its bytes a text that isn't ASCII may have tokens; None where that isn't known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    growth, vocabulary = 1, tokenizer.get_vocab()
    for step in _steps(backend.normalizer, "normalizers"):
        if step["type"] in _CAN_GROW:
            growth *= _CAN_GROW[step["type"]]
        elif step["type"] == "Replace":
            # SentencePiece's space is one token, where it is one at all.
            if step["pattern"] != {"String": " "} or step["content"] not in vocabulary:
                return None
        elif step["type"] not in _KEEPS_LENGTH:
            return None
    for step in _steps(backend.pre_tokenizer, "pretokenizers"):
        if step.get("add_prefix_space"):  # before every piece
            return None
        if step["type"] == "Metaspace" and step["replacement"] not in vocabulary:
            return None
    return growth


def _steps(component: Any, inside: str) -> list[dict[str, Any]]:
    """A normaliser or pre-tokenizer as its steps, each with its settings."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state[inside] if state["type"] == "Sequence" else [state]
