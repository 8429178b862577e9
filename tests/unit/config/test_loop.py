"""What a loop makes of its settings for the stages of a round."""

from pathlib import Path

from perlhf.config.loop import LoopConfig


def test_a_rounds_policy_is_its_last_updates_and_paid_by_all_members() -> None:
    policy = LoopConfig(seed=3).policy_stage(Path("p"), Path("r"), Path("before"), 5)
    assert policy.keep == "last" and policy.validate_every == policy.updates
    assert policy.reward == ("r",) and policy.start == Path("before") and policy.seed == 5


def test_reward_models_of_a_round_are_one_run_of_members_on_the_base() -> None:
    config = LoopConfig(sft=Path("sft"))
    reward = config.reward_stage(Path("r"), Path("labels.jsonl"), Path("before"), 5)
    assert reward.members == config.reward.members == 4 and reward.sft is None
    assert reward.start == Path("before") and reward.data.test == 0 and reward.data.paths == ("labels.jsonl",)
