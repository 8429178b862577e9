"""Bytes of an update and its passes, worked by hand; that they are what workers exchange is seen in tests/workers."""

from pathlib import Path

from perlhf.config.stages import AdapterConfig, EncodingConfig, PolicyConfig, RewardConfig, SftConfig
from perlhf.parallel.traffic import Gathers, Lengths, Pass, exchanged, of_gradients, of_rows, of_sum, passes_of

SFT = SftConfig(examples_per_update=4, encoding=EncodingConfig(max_tokens=100), tokens_per_microbatch=100)
POLICY = PolicyConfig(
    reward=("some/run", "a:b"),
    sft=Path("sft"),
    prompts_per_update=4,
    completions_per_prompt=3,
    max_completion_tokens=10,
)


def test_sums_are_sent_whole_or_in_pieces():
    assert of_sum(1, 4, 2) == 4  # the other one's
    assert of_sum(16_384, 4, 4) == 3 * 16_384 * 4
    # Of three workers each adds up a piece of 6,667: it gets two such pieces, and then two sums.
    assert of_sum(20_000, 4, 3) == (2 + 2) * 6_667 * 4
    assert of_gradients(8, 19_992, 3) == of_sum(20_000, 4, 3)
    assert of_rows(50, 2) == 2 * 8 + 50 * 8  # both lengths, then as many words as the longer one has


def test_passes_of_each_stage():
    lengths = Lengths(prompt=60, completion=40)
    assert list(passes_of(SFT, lengths)) == [Pass("learning", 4 * 100, 4 * 40, learned=True)]
    reward = RewardConfig(examples_per_update=4)
    assert list(passes_of(reward, lengths)) == [Pass("learning", 4 * (60 + 2 * 40), learned=True)]
    padded = reward.model_copy(update={"packing": "none"})
    assert list(passes_of(padded, lengths)) == [Pass("learning", 4 * 2 * 100, learned=True)]
    tokens, targets = 4 * (60 + 3 * 10), 4 * 3 * 10
    assert list(passes_of(POLICY, Lengths(60, 10))) == [
        Pass("scoring", tokens),
        Pass("reference", tokens, targets),
        Pass("old log-probabilities", tokens, targets),
        Pass("learning", tokens, learned=True),
        Pass("learning", tokens, targets, learned=True),
    ]
    one = POLICY.model_copy(update={"baseline": "leave_one_out", "reward": ("a:b",)})
    assert [p.what for p in passes_of(one, lengths)] == ["reference", "learning"]


def test_the_longest_sequences():
    assert Lengths.longest(SFT) == Lengths(50, 50)
    assert Lengths.longest(POLICY) == Lengths(1024 - 10, 10)


def test_one_worker_exchanges_nothing():
    assert exchanged(SFT, 4, 1000, 1, Lengths(50, 50)) == {}


def test_bytes_of_an_update_of_two_workers():
    found = exchanged(SFT, 4, 1000, 2, Lengths(50, 50))
    assert found == {"gradients": 1004 * 4, "agreement": 2 * 8 + 4}
    assert exchanged(RewardConfig(), 4, 1000, 2, Lengths(50, 50))["agreement"] == 4 * 8 + 4
    policy = exchanged(POLICY, 4, 1000, 2, Lengths(60, 10))
    assert policy["completions"] == (16 + 6 * 13 * 8) + (16 + 6 * 12 * 8)  # 6 of the 12 rows are another worker's
    assert policy["scores"] == 12 * 8
    assert policy["log-probabilities"] == (3 + 1) * 12 * 10 * 4
    assert policy["agreement"] == 3 * 8 + 4
    twice = exchanged(POLICY.model_copy(update={"steps_per_rollout": 2, "clip": 0.2}), 4, 1000, 2, Lengths(60, 10))
    assert twice["gradients"] == 2 * policy["gradients"] and twice["log-probabilities"] == (3 + 2) * 12 * 10 * 4


def test_a_base_in_parts_is_gathered_for_each_micro_batch():
    gathers, rows = Gathers(1000), (2 + 1) * 8
    # 400 tokens of two workers in micro-batches of 100: two each, each gathered twice.
    sft = exchanged(SFT, 4, 1000, 2, Lengths(60, 40), gathers)
    assert sft["base"] == 2 * 2 * 1000 and sft["agreement"] == 2 * 8 + 4 + rows
    config = POLICY.model_copy(
        update={"baseline": "none", "reward": ("a:b",), "adapter": AdapterConfig(), "tokens_per_microbatch": 1000}
    )
    found = exchanged(config, 4, 1000, 2, Lengths(60, 10), gathers)
    # Reference and learning; prompts, probe and nine further tokens; after each of ten whether anybody goes on.
    assert found["base"] == 1000 + 2000 + 11 * 1000
    assert found["agreement"] == 3 * 8 + 4 + rows + 10 * 4
    judged = exchanged(config.model_copy(update={"reward": ("runs/a", "runs/b")}), 4, 1000, 2, Lengths(60, 10), gathers)
    assert judged["agreement"] == found["agreement"] + rows and judged["base"] == found["base"] + 2 * 1000
