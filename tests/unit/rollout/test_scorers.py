"""HTTP services that score, and combining the scores of several."""

import asyncio
import time

import numpy as np
import pytest

from perlhf.config.addresses import REWARD_KEY
from perlhf.errors import ConfigError, DataError, PerlhfError, RewardFunctionError, ServiceError
from perlhf.rollout.functions import Asked, Scorer
from perlhf.rollout.scorers import Scorers, centred, combine, function_scores, http_reward, weighted


def scored(scorer: Scorer, asked: Asked) -> list[float]:
    (found,) = function_scores([scorer], asked)
    return found


def test_http_reward_sends_texts_and_messages(serve):
    seen = []

    def answer(asked):
        seen.append(asked.body)
        return {"scores": [len(completion) for completion in asked.body["completions"]]}

    prompts = ["plain", ({"role": "user", "content": "hi"},)]
    assert scored(http_reward(serve(answer)), Asked(prompts, ["a", "bb"])) == [1.0, 2.0]
    assert seen == [{"prompts": ["plain", [{"role": "user", "content": "hi"}]], "completions": ["a", "bb"]}]


def test_http_reward_tries_again(serve):
    statuses = [503, 429, 200]
    address = serve(lambda asked: ({"scores": [0.25]}, statuses.pop(0)))
    assert scored(http_reward(address, backoff_seconds=0), Asked(["p"], ["c"])) == [0.25]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ({"scores": [1]}, PerlhfError, "returned 1 scores for 2 completions"),
        ({"scores": [1, "2"]}, PerlhfError, "score 1 is '2'"),
        (b'{"scores": [1, NaN]}', PerlhfError, "score 1 is nan"),
        ({"scores": "ab"}, PerlhfError, "returned str"),
        ({"score": [1, 2]}, ServiceError, r"the answer has no scores\n  allowed: {\"scores\""),
        ([1, 2], ServiceError, "the answer has no scores"),
    ],
)
def test_http_reward_names_what_is_wrong(serve, body, error, message):
    address = serve(lambda asked: body)
    with pytest.raises(error, match=message) as raised:
        scored(http_reward(f"{address}?model=m"), Asked(["p", "q"], ["a", "b"]))
    assert str(raised.value).startswith(f"{address}: ")


def test_http_reward_refuses_other_addresses_before_any_call():
    with pytest.raises(ConfigError, match="no http address"):
        http_reward("file:///tmp/x")


def test_a_null_leaves_a_completion_out(serve):
    found = scored(http_reward(serve(lambda asked: {"scores": [1, None]})), Asked(["p", "q"], ["a", "b"]))
    assert found[0] == 1 and np.isnan(found[1])


def test_the_key_and_the_secrets_of_an_address_come_from_the_environment(serve, monkeypatch):
    seen = []

    def answer(asked):
        seen.append((asked.path, asked.headers.get("Authorization")))
        return f"who is {asked.path}?".encode(), 404

    monkeypatch.setenv(REWARD_KEY, "sk-1234")
    monkeypatch.setenv("HOOK", "T0/hunter2")
    address = serve(answer)
    with pytest.raises(ServiceError) as raised:
        scored(http_reward(f"{address}/${{HOOK}}?model=m"), Asked(["p"], ["c"]))
    assert seen == [("/T0/hunter2?model=m", "Bearer sk-1234")]
    assert str(raised.value).startswith(f"{address}/${{HOOK}}: answered 404 who is /[hidden]?model=m?")
    monkeypatch.delenv("HOOK")
    with pytest.raises(ConfigError, match="HOOK isn't set"):
        http_reward(f"{address}/${{HOOK}}")


def test_its_time_is_limited(serve):
    address = serve(lambda asked: time.sleep(1))
    with pytest.raises(ServiceError, match=r"within 0\.2 seconds.*\n.*raise reward_timeout_seconds"):
        scored(http_reward(address, 0.2), Asked(["p"], ["c"]))


def test_async_functions_and_services_are_waited_for_together():
    """Each waits until the other has begun."""
    begun = [asyncio.Event(), asyncio.Event()]

    def waits_for(mine: int, other: int) -> Scorer:
        async def score(asked: Asked) -> list[float]:
            begun[mine].set()
            await asyncio.wait_for(begun[other].wait(), 5)
            return [float(mine)] * len(asked.completions)

        return score

    both = [waits_for(0, 1), lambda asked: [7.0], waits_for(1, 0)]
    assert function_scores(both, Asked(["p"], ["c"])) == [[0.0], [7.0], [1.0]]


NAN = float("nan")


def test_combine_leaves_out_what_was_not_given():
    scores = [[1.0, NAN, NAN], [3.0, 5.0, NAN]]
    np.testing.assert_array_equal(combine(scores, "mean"), [2, 5, NAN])
    np.testing.assert_array_equal(combine(scores, "min"), [1, 5, NAN])
    np.testing.assert_array_equal(combine(scores, "mean_minus_std"), [1, 5, NAN])  # deviations 1 and 0


def test_weights_sum_as_trl_sums():
    scores = [[1.0, NAN, 2.0, NAN], [3.0, 5.0, -1.0, NAN]]
    # 1 - 0.5 * 3, -0.5 * 5, 2 + 0.5, nothing at all
    np.testing.assert_array_equal(weighted(scores, [1.0, -0.5]), [-0.5, -2.5, 2.5, NAN])


def test_combine():
    scores = [[1.0, 4.0], [3.0, 0.0], [2.0, 5.0]]
    assert combine(scores, "mean").tolist() == [2, 3]
    assert combine(scores, "min").tolist() == [1, 0]
    # Population variances: (1 + 1 + 0) / 3 and (1 + 9 + 4) / 3.
    assert combine(scores, "mean_minus_std") == pytest.approx([2 - (2 / 3) ** 0.5, 3 - (14 / 3) ** 0.5])


REFERENCE = np.array([[0.0, 2.0], [100.0, 106.0]])
"""Means 1 and 103, deviations 1 and 3, whose mean is 2."""


def nothing(asked: Asked) -> list[float]:
    return []


def members(how, names=("a", "b")) -> Scorers:
    return Scorers((), (nothing,) * len(names), how, order=tuple(range(len(names))), names=names)


def test_members_are_centred_and_spread_alike():
    """(2 - 1) * 2 / 1 = 2 and (103 - 103) * 2 / 3 = 0; (1 - 1) * 2 = 0 and (109 - 103) * 2 / 3 = 4."""
    answers = np.array([[2.0, 1.0], [103.0, 109.0]])
    np.testing.assert_allclose(centred(answers, [(1.0, 1.0), (103.0, 3.0)]), [[2, 0], [0, 4]])
    assert members("min").on_level(REFERENCE).levels == ((1.0, 1.0), (103.0, 3.0))
    assert members("min").on_level(REFERENCE).combined(answers).tolist() == [0, 0]
    # means 1 and 2, deviations 1 and 2
    assert members("mean_minus_std").on_level(REFERENCE).combined(answers) == pytest.approx([0, 0])


@pytest.mark.parametrize("how", ["min", "mean_minus_std"])
def test_an_offset_of_one_member_changes_nothing(how):
    reference, answers = np.random.default_rng(0).normal(size=(2, 3, 40))
    moved = np.array([[0.0], [100.0], [0.0]])
    alone = members(how, "abc").on_level(reference).combined(answers)
    again = members(how, "abc").on_level(reference + moved).combined(answers + moved)
    np.testing.assert_allclose(alone, again, atol=1e-9)
    plain = combine(answers, how)
    assert np.abs(np.diff(combine(answers + moved, how) - plain)).max() > 1, "as they are, the order changes"


def test_one_member_is_no_longer_the_minimum_of_nearly_all_answers():
    """Zeros 0, -1 and 3 of members that spread by 0.5: 0.92 of the minima are one member's, a third once centred."""
    drawn = np.random.default_rng(1).normal(size=(2, 3, 1000)) * 0.5 + np.array([[0.0], [-1.0], [3.0]])
    scorers = members("min", "abc").on_level(drawn[0])
    assert scorers.levels is not None
    before, after = (np.bincount(table.argmin(0)).max() for table in (drawn[1], centred(drawn[1], scorers.levels)))
    assert before > 900 and after < 400


def test_levels_are_left_alone_where_nothing_depends_on_them():
    for scorers, table in (
        (members("mean"), REFERENCE),
        (members("min", "a"), REFERENCE[:1]),
        (Scorers((), (nothing,) * 2, "mean", weights=(1.0, 1.0), order=(0, 1)), REFERENCE),
    ):
        assert scorers.on_level(table) is scorers
    assert members("mean").combined(REFERENCE).tolist() == [50, 54]
    known = members("min").on_level(REFERENCE)
    assert known.on_level(REFERENCE + 7) is known, "found once, before training"


def test_levels_of_members_that_do_not_vary_or_give_no_score():
    """The second spreads by 0, so that the mean deviation is the first's alone; nan is left out of means."""
    scorers = members("min").on_level(np.array([[0.0, 2.0, NAN], [5.0, 5.0, 5.0]]))
    assert scorers.levels == ((1.0, 1.0), (5.0, 0.0))
    np.testing.assert_array_equal(scorers.combined(np.array([[3.0, NAN], [6.0, NAN]])), [1, NAN])
    with pytest.raises(RewardFunctionError, match=r"reward: b gave none of 2 answers of the reference.*\n.*min"):
        members("min").on_level(np.array([[0.0, 2.0], [NAN, NAN]]))


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_std"])
def test_one_member_is_itself(how):
    assert combine(np.array([[1.5, -2.0, 0.0]]), how).tolist() == [1.5, -2, 0]


def test_combine_refuses():
    with pytest.raises(DataError, match=r"shape \(2,\)"):
        combine([1.0, 2.0], "mean")
    with pytest.raises(DataError, match=r"shape \(0, 3\)"):
        combine(np.zeros((0, 3)), "mean")
    with pytest.raises(ConfigError, match="'median'"):
        combine([[1.0]], "median")  # pyright: ignore[reportArgumentType]  (the wrong value is the point)


def test_what_a_service_sends_for_a_score_shows_no_key(serve, monkeypatch):
    monkeypatch.setenv("PERLHF_REWARD_KEY", "sk-of-the-service")
    address = serve(lambda asked: {"scores": [asked.headers["Authorization"]]})
    with pytest.raises(RewardFunctionError, match=r"score 0 is 'Bearer \[hidden\]'"):
        scored(http_reward(address), Asked(["p"], ["c"]))
