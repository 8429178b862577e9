"""Reward functions of users: found, called by the names that they ask for, and their mistakes shown as theirs."""

import asyncio
import math
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from perlhf.data.records import Text
from perlhf.errors import ConfigError, PerlhfError, RewardFunctionError
from perlhf.method.packing import Ids
from perlhf.rollout.functions import Asked, TrainerState, load_function
from perlhf.rollout.scorers import function_scores
from perlhf.system.waiting import finish

REWARD = """
import numpy as np
import pandas
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

"""

CHAT = [{"role": "user", "content": "hi"}]


def load(name: str, columns: Mapping[str, list[Any]] | None = None):
    """The function as a caller of prompts and completions, with the data's other columns."""
    function = load_function(name, columns=set(columns or {}))

    def call(prompts: list[Text], completions: list[str], **more: Any) -> list[float]:
        given = columns or {}
        rows: list[Mapping[str, Any]] = [{name: given[name][at] for name in given} for at in range(len(prompts))]
        ids: list[Ids] = [[number, 1] for number in range(len(prompts))]
        (found,) = function_scores([function], Asked(prompts, completions, ids, rows, TrainerState(4, 9)))
        return found

    return call


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
    score = load("my_rewards:length")
    assert score(["ab", "c"], ["x", "yyyy"]) == [3.0, 5.0]
    assert all(type(value) is float for value in score(["ab"], ["x"]))


@pytest.mark.parametrize("function", ["as_array", "as_tensor"])
def test_arrays_and_tensors_are_scores(here, function):
    assert load(f"my_rewards:{function}")(["p", "q"], ["x", "yyy"]) == [0.5, 1.5]


def test_function_in_a_package(here):
    (here / "mine").mkdir()
    (here / "mine" / "rewards.py").write_text("def one(prompts, completions):\n    return [1] * len(prompts)\n")
    assert load("mine.rewards:one")(["p"], ["c"]) == [1.0]


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


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0, 2.0]", "my_rewards:returns: returned 2 scores for 3 completions"),
        ("[0.5, float('nan'), 1]", "score 1 is nan"),
        ("[0.5, 1, -float('inf')]", "score 2 is -inf"),
        ("['0.5', 1, 1]", "score 0 is '0.5'"),
        ("np.zeros((3, 2))", r"score 0 is array\(\[0., 0.\]\)"),
        ("torch.zeros(3, 2)", r"score 0 is tensor\(\[0., 0.\]\)"),
        ("None", "returned NoneType"),
        ("0.5", "returned float"),
        ("'abc'", "returned str"),
        ("{0: 1, 1: 1, 2: 1}", "returned dict"),
        ("{1.0, 2.0, 3.0}", "returned set"),
        ("frozenset([1.0, 2.0, 3.0])", "returned frozenset"),
        ("dict.fromkeys([1.0, 2.0, 3.0]).keys()", "returned dict_keys"),
        ("bytearray(3)", "returned bytearray"),
        ("pandas.DataFrame({1: [0], 2: [0], 3: [0]})", "returned DataFrame"),
    ],
)
def test_wrong_scores_are_named(here, returned, message):
    with pytest.raises(PerlhfError, match=message):
        load("my_rewards:returns")(["p"] * 3, [returned, "", ""])


def write(here, text: str) -> None:
    """A new module `mine` in the current directory."""
    (here / "mine.py").write_text(text)
    sys.modules.pop("mine", None)


ANSWERS = {"answer": ["3", "5"], "level": [1, None]}


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("prompts, completions", {"prompts", "completions"}),
        ("completions, prompts", {"prompts", "completions"}),
        ("*, completions, prompts", {"prompts", "completions"}),
        ("completions, answer", {"completions", "answer"}),
        ("answer, *, level, completions", {"completions", "answer", "level"}),
        ("completions, answer=None, gone=None", {"completions", "answer"}),
        ("prompts, completions, answer, **kwargs", {"prompts", "completions", "answer", "kwargs"}),
        ("completions, **kwargs", {"completions", "kwargs"}),
        ("completion_ids, trainer_state, **kwargs", {"completion_ids", "trainer_state", "kwargs"}),
        ("prompts, completions, answer, /", {"prompts", "completions", "answer"}),
        ("answer, completions, gone=None, /, *, level", {"completions", "answer", "level"}),
        ("completions, log_extra=None, log_metric=None, **kwargs", {"completions", "kwargs"}),
    ],
)
def test_what_a_function_asks_for_by_name(here, signature, expected):
    write(here, f"def f({signature}):\n    SEEN.append(dict(locals()))\n    return [0.5, 1]\nSEEN = []\n")
    assert load("mine:f", ANSWERS)(["p", "q"], ["a", "b"]) == [0.5, 1.0]
    (seen,) = sys.modules["mine"].SEEN
    given = {key: value for key, value in seen.items() if value is not None}
    assert set(given) == expected
    all_of_it = {
        "prompts": ["p", "q"], "completions": ["a", "b"], "completion_ids": [[0, 1], [1, 1]], "answer": ["3", "5"],
        "level": [1, None], "trainer_state": TrainerState(4, 9),
    }  # fmt: skip
    for name, value in (given | given.pop("kwargs", {})).items():
        assert name == "kwargs" or value == all_of_it[name], name
    if "kwargs" in expected:
        assert set(seen["kwargs"]) == set(all_of_it) - expected


@pytest.mark.parametrize("signature", ["a, b", "texts, outputs", "a, b=None", "a, b, c=3", "*both", "a, b, **rest"])
def test_two_parameters_without_a_known_name_are_prompts_and_completions(here, signature):
    write(here, f"def f({signature}):\n    SEEN.append(list(locals().values()))\n    return [0]\nSEEN = []\n")
    load("mine:f")(["p"], ["c"])
    assert sys.modules["mine"].SEEN[0][:2] in ([["p"], ["c"]], [(["p"], ["c"])])


def test_builtins_partials_objects_and_wrapped_functions(here):
    write(
        here,
        "import functools\n"
        "def f(scale, completions, **kwargs):\n    return [scale * len(c) for c in completions]\n"
        "doubled = functools.partial(f, 2)\n"
        "class Length:\n"
        "    def __call__(self, completions, level, **kwargs):\n        return [len(c) for c in completions]\n"
        "length = Length()\n"
        "@functools.wraps(f)\ndef wrapped(*args, **kwargs):\n    return [1.0]\n"
        "def plain(*args, **kwargs):\n    assert not args\n    return [float(len(kwargs))]\n",
    )
    level = {"level": [1]}
    assert load("mine:doubled")(["p"], ["abc"]) == [6.0]
    assert load("mine:length", level)(["p"], ["abc"]) == [3.0]
    assert load("mine:plain", level)(["p"], ["abc"]) == [5.0]
    with pytest.raises(ConfigError, match="mine:wrapped asks for 'scale'"):
        load("mine:wrapped")
    with pytest.raises(ConfigError, match=r"mine:Length is a class\n.*\n.*in mine, reward = Length\(\)"):
        load("mine:Length")


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("completions, answr", r"mine:f asks for 'answr', which no prompt of the data has\n  allowed: prompts, "
         r"completions, completion_ids, trainer_state and the data's columns answer, level\n  try: rename it to "
         "'answer'"),
        ("prompt, completions", "asks for 'prompt', .*\n.*\n  try: rename it to 'prompts'"),
        ("completions, zzz", "asks for 'zzz', .*\n.*\n  try: add the column 'zzz' to the data"),
        ("completions, log_extra", "asks for 'log_extra', which perlhf doesn't give\n.*\n  try: give it a default"),
        ("completions, environments, **kw", "asks for 'environments', which perlhf doesn't give"),
        ("a", "asks for 'a'"),
        ("a, b, c", "asks for 'a'"),
        ("", "takes no completions"),
    ],
)  # fmt: skip
def test_what_cannot_be_given_is_said_before_any_call(here, signature, message):
    write(here, f"def f({signature}):\n    return [0]\n")
    with pytest.raises(ConfigError, match=message):
        load_function("mine:f", "reward", set(ANSWERS))


def test_names_that_are_ours_win_over_columns(here):
    write(
        here,
        "def f(completions, prompts, **kwargs):\n    assert 'prompt' not in kwargs\n    return [len(completions[0])]\n",
    )
    assert load("mine:f", {"completions": ["xxx"], "prompt": ["y"]})(["p"], ["c"]) == [1.0]


AS_TRL = "[{'role': 'assistant', 'content': 'c'}]"


@pytest.mark.parametrize(
    ("signature", "chat", "plain"),
    [
        ("prompts, completions", "'c'", "'c'"),
        ("completions, answer=None", "'c'", "'c'"),
        ("completions, **kwargs", AS_TRL, "'c'"),
        ("completions: list[list[dict[str, str]]], **kwargs", AS_TRL, AS_TRL),
        ("completions: 'typing.List[typing.List[dict]]'", AS_TRL, AS_TRL),
        ("completions: list[str], **kwargs", "'c'", "'c'"),
        ("completions: list, **kwargs", AS_TRL, "'c'"),
    ],
)
def test_completions_of_chats_are_as_trl_gives_them_where_a_function_is_written_for_it(here, signature, chat, plain):
    write(here, f"def f({signature}):\n    SEEN.extend(map(repr, completions))\n    return [0, 0]\nSEEN = []\n")
    load("mine:f")([CHAT, "plain"], ["c", "c"])
    assert sys.modules["mine"].SEEN == [chat, plain]


def test_prompts_are_lists_of_plain_messages(here):
    write(
        here,
        "def f(prompts, completions):\n    assert prompts == [[{'role': 'user', 'content': 'hi'}]]\n    return [1]\n",
    )
    assert load("mine:f")([tuple(CHAT)], ["c"]) == [1.0]


TRL = """
import asyncio, re

def format_reward(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think>", content) else 0.0 for content in contents]

def correct(prompts, completions, answer, **kwargs):
    return [1.0 if a in c else None for c, a in zip(completions, answer)]

async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [len(c) for c in completions]

class Later:
    async def __call__(self, prompts, completions, **kwargs):
        return [2.0 for _ in completions]
an_object = Later()

def hidden_async(prompts, completions):
    return later(completions)
"""


def test_functions_as_trl_documents_them(here):
    write(here, TRL)
    assert load("mine:format_reward")([CHAT, CHAT], ["<think>x</think>y", "y"]) == [1.0, 0.0]
    found = load("mine:correct", ANSWERS)(["p", "q"], ["it is 3", "it is 3"])
    assert found[0] == 1 and math.isnan(found[1])
    assert load("mine:later")(["p", "q"], ["a", "bb"]) == [1.0, 2.0]
    assert load("mine:an_object")(["p"], ["a"]) == [2.0]
    assert load("mine:hidden_async")(["p"], ["abc"]) == [3.0]


FAULTY = """
import asyncio, json, sys

def inner(text):
    return text["content"]

def fails(prompts, completions):
    return [inner(text) for text in completions]

async def fails_later(prompts, completions):
    await asyncio.sleep(0)
    raise ValueError("two\\nlines")

def lazily(prompts, completions):
    return (1 / 0 for _ in completions)

def in_a_library(prompts, completions):
    return json.loads("{")

def exits(prompts, completions):
    sys.exit(3)

async def exits_later(prompts, completions):
    sys.exit(3)

def deep(prompts, completions):
    return deep(prompts, completions)

def listed(completions, **kwargs):
    return [len(text.split()) for text in completions]
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fails", "mine:fails: TypeError: string indices must be integers, not 'str'\n"
         "  mine.py:8, in fails\n    return [inner(text) for text in completions]\n"
         "  mine.py:8, in <listcomp>\n    return [inner(text) for text in completions]\n"
         "  mine.py:5, in inner\n    return text[\"content\"]\n  try: a completion is text here"),
        ("fails_later", "mine:fails_later: ValueError: two\nlines\n  mine.py:12, in fails_later\n    raise"),
        ("lazily", "mine:lazily: ZeroDivisionError: division by zero\n  mine.py:15, in <genexpr>\n"),
        ("in_a_library", "mine:in_a_library: JSONDecodeError: Expecting property name"),
        ("exits", "mine:exits: ended the program: SystemExit(3)\n  mine.py:21, in exits\n    sys.exit(3)"),
        ("exits_later", "mine:exits_later: ended the program: SystemExit(3)\n  mine.py:24, in exits_later\n"),
        ("deep", "mine:deep: RecursionError: maximum recursion depth exceeded"),
        ("listed", "mine:listed: AttributeError: 'list' object has no attribute 'split'\n"),
    ],
)  # fmt: skip
def test_a_functions_own_error_is_shown_with_its_lines_alone(here, function, said):
    write(here, FAULTY)
    with pytest.raises(RewardFunctionError) as raised:
        load(f"mine:{function}")([CHAT], ["c"])
    shown = str(raised.value)
    if sys.version_info >= (3, 12):  # comprehensions are no frames of their own
        said = said.replace("  mine.py:8, in <listcomp>\n    return [inner(text) for text in completions]\n", "")
    assert shown.startswith(said), shown
    assert "functions.py" not in shown and "json" not in shown.split("\n", 1)[1].replace("json.loads", "")
    assert len(shown.splitlines()) < 14
    assert raised.value.__cause__ is not None


def test_an_error_of_perlhfs_own_kind_passes_through(here):
    write(here, "from perlhf.errors import DataError\ndef f(prompts, completions):\n    raise DataError('mine')\n")
    with pytest.raises(PerlhfError, match=r"^mine$"):
        load("mine:f")(["p"], ["c"])


@pytest.mark.parametrize("text", ["x = 1\nprint(undefined)\n", "import sys\nsys.exit('no')\n"])
def test_a_module_that_fails_while_it_is_imported(here, text):
    write(here, text)
    with pytest.raises(RewardFunctionError, match=r"reward: module mine: .*\n  mine\.py:2, in <module>\n    "):
        load("mine:f")


def test_none_leaves_a_completion_out(here):
    found = load("my_rewards:returns")(["p"] * 3, ["[0.5, None, 1]", "", ""])
    assert found[0] == 0.5 and math.isnan(found[1]) and found[2] == 1
    with pytest.raises(PerlhfError, match=r"score 1 is nan\n.*\n  try: return None for a completion"):
        load("my_rewards:returns")(["p"] * 3, ["[0.5, float('nan'), 1]", "", ""])


@pytest.mark.parametrize("signature", ["completion, prompt", "responses, queries", "a, question", "outputs, b"])
def test_names_that_say_the_other_order_are_never_filled_by_position(here, signature):
    first = signature.split(",")[0]
    (here / "odd.py").write_text(f"def score({signature}):\n    return [1.0] * len({first})\n")
    with pytest.raises(ConfigError, match=f"asks for '{first}'"):
        load_function("odd:score")


DECORATED = """
import asyncio, functools, itertools, sys
import numpy as np
import torch

def waiting(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return asyncio.run(function(*args, **kwargs))
    return call

@waiting
async def waited(completions):
    return [1.0 for _ in completions]

def column(completions):
    return np.ones((len(completions), 1))

def learning(completions):
    return torch.ones(len(completions), requires_grad=True)

def endless(completions):
    return itertools.repeat(1.0)

async def cancelled(completions):
    raise asyncio.CancelledError

async def interrupted(completions):
    raise KeyboardInterrupt

async def ends(completions):
    async def inner():
        sys.exit(3)
    await asyncio.create_task(inner())

def changes(prompts, completions, answer):
    prompts[0][0]["content"] = "changed"
    answer[0].append("changed")
    return [float(len(given)) for given in answer]
"""


@pytest.mark.parametrize("function", ["waited", "column", "learning"])
def test_a_decorator_that_waits_and_arrays_of_single_values(here, function):
    (here / "decorated.py").write_text(DECORATED)
    assert load(f"decorated:{function}")(["p", "q"], ["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("endless", RewardFunctionError, "returned more than 1 scores for 1 completions"),
        ("cancelled", RewardFunctionError, "CancelledError\n  decorated.py"),
        ("interrupted", KeyboardInterrupt, "^$"),
        ("ends", RewardFunctionError, r"ended the program: SystemExit\(3\)"),
    ],
)
def test_functions_that_end_no_way_that_is_expected(here, function, error, message):
    (here / "decorated.py").write_text(DECORATED)
    with pytest.raises(error, match=message):
        load(f"decorated:{function}")(["p"], ["c"])
    assert finish(asyncio.sleep(0, 5)) == 5, "what waits for others lives on"


def test_what_a_function_changes_is_its_own(here):
    (here / "decorated.py").write_text(DECORATED)
    chat, answers = [{"role": "user", "content": "hi"}], [["a"]]
    for _ in range(2):
        assert load("decorated:changes", {"answer": answers})([chat], ["c"]) == [2.0]
    assert chat[0]["content"] == "hi" and answers == [["a"]]


@pytest.mark.parametrize("name", ["my_rewards.py:length", "rewards/my_rewards.py:length"])
def test_a_file_is_no_module(name):
    with pytest.raises(ConfigError, match=r"names no function\n.*\n  try: .*and name my_rewards:length"):
        load_function(name)
