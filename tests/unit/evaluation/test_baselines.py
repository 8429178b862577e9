"""Baselines on records whose answer is plain: words, lengths and turns."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from perlhf.data.records import Comparison, Rating, text_of
from perlhf.errors import DataError
from perlhf.evaluation.baselines import bag_of_words, length_baseline, position_baseline


def rating(prompt, completion, label, **more):
    return Rating(prompt=prompt, completion=completion, label=label, group="g", **more)


def comparison(chosen, rejected):
    return Comparison(prompt="p", chosen=chosen, rejected=rejected, group="g")


def turns(count):
    return tuple({"role": ("user", "assistant")[index % 2], "content": "word"} for index in range(count))


def test_text_of():
    assert text_of("as it\nis") == "as it\nis"
    assert text_of(({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"})) == (
        "user: hi\nassistant: yes?"
    )


def test_bag_of_words_finds_the_word_in_the_completion():
    train = [rating(f"p{i}", f"{'thanks' if i % 2 else 'sorry'} number {i}", i % 2 == 1) for i in range(20)]
    scores = bag_of_words(train, [rating("new", "sorry about 99", False), rating("new", "thanks for 98", True)])
    assert scores[0] < 0 < scores[1]


def test_bag_of_words_reads_the_prompt():
    train = [rating(f"{'coffee' if i % 2 else 'tickets'} please", "done", i % 2 == 1) for i in range(20)]
    scores = bag_of_words(train, [rating("two tickets", "done", False), rating("a coffee", "done", True)])
    assert scores[0] < 0 < scores[1]


def test_bag_of_words_sees_pairs_of_words():
    train = [rating("p", "not good" if i % 2 else "good not", i % 2 == 1) for i in range(20)]
    scores = bag_of_words(train, [rating("p", "good not", False), rating("p", "not good", True)])
    assert scores[0] < 0 < scores[1]


def test_bag_of_words_of_comparisons():
    train = [comparison(f"glad to help {i}", f"no {i}") for i in range(10)]
    test = [comparison("glad", "no"), comparison("no", "glad"), comparison("unseen", "words")]
    scores = bag_of_words(train, test)
    assert scores.shape == (3, 2)
    assert scores[0, 0] > 0 > scores[0, 1]
    assert scores[1].tolist() == scores[0, ::-1].tolist()
    assert scores[2].tolist() == [0, 0]  # no intercept: nothing known is a tie
    mirrored = bag_of_words([comparison(pair.rejected, pair.chosen) for pair in train], test)
    assert mirrored == pytest.approx(-scores, abs=1e-5)


def test_baselines_are_deterministic_and_heed_weights():
    train = [rating(f"p{i}", "up" if i % 2 else "down", i % 2 == 1) for i in range(10)]
    test = [rating("q", "up", True), rating("q", "down", False)]
    once = bag_of_words(train, test)
    assert once.tolist() == bag_of_words(train, test).tolist()
    contrary = [replace(record, label=not record.label, weight=0.0) for record in train * 3]
    assert bag_of_words(train + contrary, test)[0] > 0 > bag_of_words(train + contrary, test)[1]
    heavy = [replace(record, weight=1.0) for record in contrary]
    assert bag_of_words(train + heavy, test)[0] < 0 < bag_of_words(train + heavy, test)[1]


def test_position_baseline_counts_turns_of_the_prompt():
    train = [rating(turns(count), "same", count < 5) for count in (1, 3, 7, 9)]
    scores = position_baseline(
        train, [rating(turns(1), "x", True), rating("one turn", "x", True), rating(turns(9), "x", False)]
    )
    assert scores[0] == scores[1] > 0 > scores[2]


def test_position_baseline_without_any_difference_is_constant():
    train = [rating("p", "x", label) for label in (True, True, True, False)]
    scores = position_baseline(train, [rating("q", "y", True), rating("r", "z", False)])
    # Only the intercept is learned: log-odds of 3 ups to 1 down.
    assert scores == pytest.approx([math.log(3)] * 2, abs=1e-3)


def test_position_baseline_refuses_comparisons():
    with pytest.raises(DataError, match="needs ratings"):
        position_baseline([comparison("a", "b")], [comparison("a", "b")])  # pyright: ignore[reportArgumentType]  (the wrong kind is the point)


def test_length_baseline_of_comparisons_picks_what_won_in_training():
    test = [comparison("ab", "abcde"), comparison(turns(1), "x")]
    lengths = [[2, 5], [len("user: word"), 1]]
    longer, shorter, same = comparison("long", "s"), comparison("s", "much longer"), comparison("ab", "cd")
    assert length_baseline([longer, shorter, longer, same], test).tolist() == lengths
    for train in ([shorter, longer, shorter], [longer, shorter], [same]):
        assert length_baseline(train, test).tolist() == [[-one, -other] for one, other in lengths]


def test_length_baseline_of_ratings_is_fitted():
    train = [rating("p", "x" * length, length > 50) for length in (5, 10, 20, 80, 160, 320)]
    test = [rating("p", "y" * 4, False), rating("p", "y" * 400, True)]
    scores = length_baseline(train, test)
    assert scores[0] < 0 < scores[1]
    flipped = length_baseline([replace(record, label=not record.label) for record in train], test)
    assert flipped == pytest.approx(-scores, abs=1e-4)


@pytest.mark.parametrize("baseline", [bag_of_words, length_baseline, position_baseline])
def test_baselines_refuse_what_they_cannot_use(baseline):
    ups = [rating("p", "x", True)] * 3
    with pytest.raises(DataError, match="all 3 labels are up"):
        baseline(ups, ups)
    with pytest.raises(DataError, match="0 train and 3 test"):
        baseline([], ups)
    with pytest.raises(DataError, match="3 train and 0 test"):
        baseline(ups, [])
    with pytest.raises(DataError, match="kind Comparison, Rating"):
        baseline(ups, [comparison("a", "b")])


def test_bag_of_words_needs_words():
    with pytest.raises(DataError, match="no word in any train text"):
        bag_of_words([rating("?", "!", True), rating("?", "...", False)], [rating("?", "word", True)])
    with pytest.raises(DataError, match="one comparison"):
        bag_of_words([comparison("a", "b")], [comparison("a", "b")])


def test_import_is_light():
    code = (
        "import sys, perlhf.evaluation.baselines; print([m for m in ('torch', 'sklearn', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
