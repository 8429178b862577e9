"""User rewards: Python functions, HTTP services, and combining the scores of several."""

import sys

import numpy as np
import pytest

from perlhf.errors import ConfigError, DataError, PerlhfError, ServiceError
from perlhf.rollout.scorers import combine, http_reward, load_function

REWARD = """
import numpy as np
import torch

CONSTANT = 3

def length(prompts, completions):
    return [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions)]

def as_array(prompts, completions):
    return np.array([len(completion) / 2 for completion in completions], dtype=np.float32)

def as_tensor(prompts, completions):
    return torch.tensor([len(completion) / 2 for completion in completions])

def returns(prompts, completions):
    return eval(completions[0])

def fails(prompts, completions):
    raise KeyError("mine")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory that holds a module `my_rewards`; what is imported from it is forgotten afterwards."""
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_function_of_the_current_directory(here):
    score = load_function("my_rewards:length")
    assert score(["ab", "c"], ["x", "yyyy"]) == [3.0, 5.0]
    assert all(type(value) is float for value in score(["ab"], ["x"]))


@pytest.mark.parametrize("function", ["as_array", "as_tensor"])
def test_arrays_and_tensors_are_scores(here, function):
    assert load_function(f"my_rewards:{function}")(["p", "q"], ["x", "yyy"]) == [0.5, 1.5]


def test_function_in_a_package(here):
    (here / "mine").mkdir()
    (here / "mine" / "rewards.py").write_text("def one(prompts, completions):\n    return [1] * len(prompts)\n")
    assert load_function("mine.rewards:one")(["p"], ["c"]) == [1.0]


def test_nearest_function_is_named(here):
    with pytest.raises(ConfigError) as raised:
        load_function("my_rewards:lenght")
    assert str(raised.value) == (
        "reward: module my_rewards has no function 'lenght'\n  try: did you mean my_rewards:length?"
    )


def test_a_constant_is_no_function(here):
    with pytest.raises(ConfigError, match="holds no function under 'CONSTANT'"):
        load_function("my_rewards:CONSTANT")


@pytest.mark.parametrize("name", ["my_rewards", "my_rewards:", ":length", "my rewards:length", "a:b:c", "../x:y", ""])
def test_malformed_names(name):
    with pytest.raises(ConfigError, match=r"names no function\n  allowed: module:function"):
        load_function(name)


def test_missing_module(here):
    with pytest.raises(ConfigError, match=r"no module named 'no_such_rewards'\n  try: .*no_such_rewards.py"):
        load_function("no_such_rewards:length")
    with pytest.raises(ConfigError, match=r"no module named 'no_such_rewards'\n"):
        load_function("no_such_rewards.inner:length")


def test_a_module_that_does_not_import(here):
    (here / "needy.py").write_text("import no_such_dependency\n")
    with pytest.raises(ConfigError, match="module needy doesn't import: No module named 'no_such_dependency'"):
        load_function("needy:length")
    (here / "wrong_name.py").write_text("from json import no_such_name\n")
    with pytest.raises(ConfigError, match="module wrong_name doesn't import: cannot import name 'no_such_name'"):
        load_function("wrong_name:length")


def test_syntax_error_names_file_and_line(here):
    (here / "broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(ConfigError, match=r"broken\.py:2: syntax error"):
        load_function("broken:f")


def test_the_functions_own_error_passes_through(here):
    with pytest.raises(KeyError, match="mine"):
        load_function("my_rewards:fails")(["p"], ["c"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0, 2.0]", "my_rewards:returns: returned 2 scores for 3 completions"),
        ("[0.5, float('nan'), 1]", "score 1 is nan"),
        ("[0.5, 1, -float('inf')]", "score 2 is -inf"),
        ("[0.5, None, 1]", "score 1 is None"),
        ("['0.5', 1, 1]", "score 0 is '0.5'"),
        ("np.zeros((3, 2))", r"score 0 is array\(\[0., 0.\]\)"),
        ("torch.zeros(3, 2)", r"score 0 is tensor\(\[0., 0.\]\)"),
        ("None", "returned NoneType"),
        ("0.5", "returned float"),
        ("'abc'", "returned str"),
        ("{0: 1, 1: 1, 2: 1}", "returned dict"),
    ],
)
def test_wrong_scores_are_named(here, returned, message):
    with pytest.raises(PerlhfError, match=message):
        load_function("my_rewards:returns")(["p"] * 3, [returned, "", ""])


def test_http_reward_sends_texts_and_messages(serve):
    seen = []

    def answer(asked):
        seen.append(asked.body)
        return {"scores": [len(completion) for completion in asked.body["completions"]]}

    prompts = ["plain", ({"role": "user", "content": "hi"},)]
    assert http_reward(serve(answer))(prompts, ["a", "bb"]) == [1.0, 2.0]
    assert seen == [{"prompts": ["plain", [{"role": "user", "content": "hi"}]], "completions": ["a", "bb"]}]


def test_http_reward_tries_again(serve):
    statuses = [503, 429, 200]
    address = serve(lambda asked: ({"scores": [0.25]}, statuses.pop(0)))
    assert http_reward(address, backoff_seconds=0)(["p"], ["c"]) == [0.25]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ({"scores": [1]}, PerlhfError, "returned 1 scores for 2 completions"),
        ({"scores": [1, None]}, PerlhfError, "score 1 is None"),
        (b'{"scores": [1, NaN]}', PerlhfError, "score 1 is nan"),
        ({"scores": "ab"}, PerlhfError, "returned str"),
        ({"score": [1, 2]}, ServiceError, r"the answer has no scores\n  allowed: {\"scores\""),
        ([1, 2], ServiceError, "the answer has no scores"),
    ],
)
def test_http_reward_names_what_is_wrong(serve, body, error, message):
    address = serve(lambda asked: body)
    with pytest.raises(error, match=message) as raised:
        http_reward(f"{address}?token=hidden")(["p", "q"], ["a", "b"])
    assert str(raised.value).startswith(f"{address}: ")


def test_http_reward_refuses_other_addresses_before_any_call():
    with pytest.raises(ConfigError, match="no http address"):
        http_reward("file:///tmp/x")


def test_combine():
    scores = [[1.0, 4.0], [3.0, 0.0], [2.0, 5.0]]
    assert combine(scores, "mean").tolist() == [2, 3]
    assert combine(scores, "min").tolist() == [1, 0]
    # Population variances: (1 + 1 + 0) / 3 and (1 + 9 + 4) / 3.
    assert combine(scores, "mean_minus_std") == pytest.approx([2 - (2 / 3) ** 0.5, 3 - (14 / 3) ** 0.5])


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
