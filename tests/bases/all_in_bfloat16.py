"""Every family in bfloat16 (`make test-bases`; too long for each change): ours is as near to float32 as the network is.

Log-probabilities of the bare base, against the same network in float32 by plain passes. What transformers' own passes
in bfloat16 lose is measured beside it, since routers of experts and indexers flip by a rounded bit.
"""

import copy
from typing import Any

import families
import networks
import pytest
import torch
from test_bases import ANSWERS, PROMPTS, TEMPERATURE, of_answers

from perlhf.method.packing import completed, pack
from perlhf.model.model import Model

TOLERANCE = 0.05
"""In log-probabilities, where the network itself loses less."""


NEVER = ("inkling2_text", "xlstm")
"""Networks that fail by themselves where all of their weights are bfloat16."""


@pytest.mark.parametrize("family", [name for name in (*families.TREE, *families.ROWS) if name not in NEVER])
@torch.no_grad()
def test_in_bfloat16_a_family_loses_what_it_loses_without_us(family: str) -> None:
    network = networks.network(family, size=1.0)
    plain: Any = copy.deepcopy(network)
    expected = of_answers(plain)
    own = (of_answers(plain.bfloat16()) - expected).abs().max()
    model = Model(network.bfloat16(), {"name": family, "sha256": ""})
    assert model.way.packing == ("tree" if family in families.TREE else "none"), model.way.why
    batch = pack([[completed(p, a)] for p, a in zip(PROMPTS, ANSWERS, strict=True)], model.packing("auto"))
    found = model.logprobs(batch, None, temperature=TEMPERATURE).logprobs[batch.completion_mask]
    off = (found - expected).abs().max()
    print(f"{family}: {model.way.packing} off by {off:.4f}, the network itself by {own:.4f}")
    assert float(off) <= max(TOLERANCE, 2 * float(own))
