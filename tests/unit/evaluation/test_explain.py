import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import open_encoder

from perlhf.evaluation.explain import Explanation, Sentence, explain, mean_explanation, sentences
from perlhf.model.bases.found import Base
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ("It costs 3.50 for v1.2 now. Fine.", ["It costs 3.50 for v1.2 now. ", "Fine."]),
        ('He said "Stop." Then he left', ['He said "Stop." ', "Then he left"]),
        ("A list:\n- one\n- two\n\nEnd", ["A list:\n", "- one\n", "- two\n\n", "End"]),
        ("Wait... what?!", ["Wait... ", "what?!"]),
        ("no end", ["no end"]),
        ("  . ", ["  . "]),
        ("", []),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts
    assert "".join(sentences(text)) == text


def test_a_long_text_keeps_its_rest_in_the_last_part() -> None:
    text = "A. " * 500
    assert len(sentences(text)) == 200 and "".join(sentences(text)) == text


def test_the_worst_is_the_one_without_which_the_score_is_highest() -> None:
    effects = (0.5, -0.25, -1.0, None)
    assert Explanation(0.0, [Sentence("x", effect) for effect in effects], []).worst == 2
    assert Explanation(0.0, [Sentence("x", 0.5), Sentence("y", 0.25)], []).worst == 1
    assert Explanation(0.0, [Sentence("x", None)], []).worst is None


def test_the_mean_of_several_is_that_of_each_number() -> None:
    one = Explanation(1.0, [Sentence("x", 0.5), Sentence("y", None)], [("a", 0.0), ("b", 1.0)])
    other = Explanation(2.0, [Sentence("x", -1.5), Sentence("y", None)], [("a", 4.0), ("b", 2.0)])
    expected = Explanation(1.5, [Sentence("x", -0.5), Sentence("y", None)], [("a", 2.0), ("b", 1.5)])
    assert mean_explanation([one, other]) == expected
    assert mean_explanation([one]) == one
    assert mean_explanation([None, None]) is None


@pytest.fixture
def scored(tiny_base: Path) -> tuple[Model, Encoder]:
    model = Model.load(Base(tiny_base), "float32", "cpu")
    adapter = model.add_adapter("reward", "reward", rank=2)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.3)
    return model, open_encoder(tiny_base)


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_effects_are_differences_of_scores(scored: tuple[Model, Encoder], packing: Any) -> None:
    model, encoder = scored

    def score(completion: str) -> float:
        from perlhf.method.packing import pack

        return model.scores(pack([[encoder.example("p", completion).tokens]], "none"), "reward").item()

    (found,) = explain(model, encoder, [("p", "Good. Bad one! Fine", None)], "reward", 64, packing)
    assert found is not None
    assert found.score == pytest.approx(score("Good. Bad one! Fine"), abs=1e-5)
    without = ("Bad one! Fine", "Good. Fine", "Good. Bad one!")
    expected = [score("Good. Bad one! Fine") - score(text) for text in without]
    assert [sentence.effect for sentence in found.sentences] == pytest.approx(expected, abs=1e-5)
    assert found.tokens[-1][1] == pytest.approx(found.score, abs=1e-5)
    assert len(found.tokens) == len(encoder.example("p", "Good. Bad one! Fine").completion)


def test_one_sentence_has_no_effect_and_messages_are_explained(scored: tuple[Model, Encoder]) -> None:
    model, encoder = scored
    turns = [{"role": "assistant", "content": "Only this"}]
    (found,) = explain(model, encoder, [("p", turns, None)], "reward", 64, "tree")
    assert found is not None and found.sentences == [Sentence("Only this", None)]
    assert json.loads(json.dumps(found.row()))["sentences"] == [{"text": "Only this", "effect": None}]
