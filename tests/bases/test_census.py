"""Every type that transformers calls a causal language model has its place, and the page says what the lists say."""

import runpy
from pathlib import Path

import families
import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from perlhf.errors import ModelError
from perlhf.model.supported import check_supported

ROOT = Path(__file__).resolve().parents[2]
TOLD_BY_NAME = ("it is an encoder-decoder",)


pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith("5.23."), reason="the lists are of transformers 5.23"
)


def test_each_type_is_in_one_list() -> None:
    lists = [*families.TREE, *families.ROWS, *families.CLOSED, *families.OTHERS]
    assert len(lists) == len(set(lists))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == set(lists)


def test_most_open_and_most_of_them_as_a_tree() -> None:
    total = len(families.TREE) + len(families.ROWS) + len(families.CLOSED)
    assert (len(families.TREE) + len(families.ROWS)) / total >= 0.95
    assert len(families.TREE) / total >= 0.65


def test_encoder_decoders_are_refused_by_their_configuration() -> None:
    for family in (name for name, why in families.OTHERS.items() if why in TOLD_BY_NAME):
        try:
            check_supported(CONFIG_MAPPING[family]())
        except ModelError as error:
            assert "it is an encoder-decoder" in str(error), family
        else:
            raise AssertionError(family)


def test_the_page_says_what_the_lists_say() -> None:
    made = runpy.run_path(str(ROOT / "scripts/generate_bases_reference.py"))
    said = (ROOT / "docs/bases.md").read_text("utf-8")
    layers = made["layers_said"](said)
    assert set(layers) == {*families.TREE, *families.ROWS}
    assert said == made["page"](layers), "make docs"  # what is adapted is held by test_bases.py
