"""What a loop is foretold to take: by hand."""

from typing import Any

import pytest

from perlhf.config.loop import LoopConfig, LoopPolicyConfig, LoopRewardConfig
from perlhf.config.stages import AdapterConfig
from perlhf.labelling.rounds.foretold import passes_forward


def test_tokens_of_one_round_by_hand() -> None:
    policy = LoopPolicyConfig(
        updates=1, prompts_per_update=1, completions_per_prompt=2, max_completion_tokens=10, validation_prompts=1
    )
    reward = LoopRewardConfig(members=1, epochs=1)
    sizes: dict[str, Any] = {
        "labels_per_round": 1,
        "prompts_per_round": 1,
        "answers_per_prompt": 2,
        "held_out_labels": 2,
        "duels": 1,
    }
    config = LoopConfig(rounds=1, order="random", reward=reward, policy=policy, **sizes)
    # 40 letters are 10 tokens and the template's 30: prompts of 40 tokens, answers of 6, pairs of 52.
    held_out_answers = 1.5 * 2 * (40 + 2 * 3 * 6)
    answers, candidates = 40 + 3 * 6 * 2, 40 + 6 * 2
    learned = 3 * 52
    update = 40 * (3 + 2 + 1) + 2 * 6 * (3 + 3 + 1 + 1)
    evaluated = (2 + 1) * 52 + 2 * (40 + 3 * 6)
    validated = 6 * (40 + (3 + 1 + 1) * 6)
    by_hand = held_out_answers + answers + candidates + learned + update + evaluated + validated
    assert passes_forward(config, 40.0, 30) == pytest.approx(by_hand)
    # Two members in the last 3 of 30 layers: 0.9 + 2 * 0.1 = 1.1 passes to score, 0.9 + 3 * 2 * 0.1 = 1.5 to learn.
    shared = LoopRewardConfig(members=2, epochs=1, adapter=AdapterConfig(layers="last:3"))
    more = 0.1 * (candidates + (40 + 2 * 6) + (2 + 1) * 52 + 6 * 6) + (1.5 - 3) * 52
    found = passes_forward(config.model_copy(update={"reward": shared}), 40.0, 30)
    assert found == pytest.approx(by_hand + more)


def test_twice_the_rounds_take_more_than_twice() -> None:
    few, many = LoopConfig(rounds=2), LoopConfig(rounds=4)
    assert 2 < passes_forward(many, 200.0, 30) / passes_forward(few, 200.0, 30) < 4
