"""How many tokens rated turns of the real files share: a trie holds each distinct prefix once."""

from pathlib import Path

import pytest

from perlhf.config.recipe import load_recipe
from perlhf.config.stages import RewardConfig
from perlhf.data.splits import load
from perlhf.method.packing import lay_out
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer
from perlhf.model.encoding.encode import Encoder
from perlhf.training.reward import encode_items

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


# A rated turn's tokens are those of the longer conversation up to its end token; a prompt that is cut shares less.
@pytest.mark.parametrize(("name", "most"), [("coffee", 0.40), ("ticketing", 0.12)])
def test_a_trie_of_all_ratings(feedback_root: Path, name: str, most: float) -> None:
    config = load_recipe(RECIPES / name / "reward.yaml", RewardConfig)
    folder = feedback_root / f"taskmaster-{name}" / "reward"
    everything = config.data.model_copy(update={"paths": (str(folder),)})
    encoder = Encoder(load_tokenizer(Base.find(config.base)), config.encoding)
    items, counts = encode_items(encoder, load(everything, ("rating",), "all"))
    assert len(items) > 2600 and counts["dropped_long"] == 0
    sequences = [tokens.ids for item in items for tokens in item.sequences]
    share = lay_out(sequences, "tree").tokens / sum(map(len, sequences))
    print(f"{name}: {share:.3f}")
    assert share <= most
