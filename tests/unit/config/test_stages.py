"""What configurations of stages refuse."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from perlhf.config.stages import RewardConfig


def test_all_weights_are_not_learned_where_they_are_spread():
    with pytest.raises(ValidationError, match="shard: full spreads weights that stay as they are"):
        RewardConfig(run=Path("r"), tuning="full", shard="full")
    assert "shard" not in RewardConfig(run=Path("r")).model_dump()
