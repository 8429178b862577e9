"""What a loop makes of its settings for the stages of a round."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from perlhf.config.loop import LoopConfig
from perlhf.config.stages import VllmConfig


def test_a_rounds_policy_is_its_last_updates_and_paid_by_all_members() -> None:
    policy = LoopConfig(seed=3).policy_stage(Path("p"), Path("r"), Path("before"), 5)
    assert policy.keep == "last" and policy.validate_every == policy.updates
    assert policy.reward == ("r",) and policy.start == Path("before") and policy.seed == 5


def test_reward_models_of_a_round_are_one_run_of_members_on_the_base() -> None:
    config = LoopConfig(sft=Path("sft"))
    reward = config.reward_stage(Path("r"), Path("labels.jsonl"), Path("before"), 5)
    assert reward.members == config.reward.members == 4 and reward.sft is None
    assert reward.start == Path("before") and reward.data.test == 0 and reward.data.paths == ("labels.jsonl",)


def test_a_rounds_policy_is_sampled_by_the_loops_server() -> None:
    config = LoopConfig(sampler="vllm", vllm=VllmConfig(timeout_seconds=9))
    policy = config.policy_stage(Path("p"), Path("r"), None, 5)
    assert (policy.sampler, policy.vllm) == ("vllm", config.vllm)
    with pytest.raises(ValidationError, match="vllm is of sampler: vllm"):
        LoopConfig(vllm=config.vllm)
    assert not {"sampler", "vllm"} & LoopConfig().model_dump().keys(), "a record without them is the same loop"
