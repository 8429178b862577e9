"""The judge against a real chat completions service on this machine."""

import re
import threading

import pytest

from perlhf.errors import ConfigError, DataError, ServiceError
from perlhf.evaluation.judge import Judgement, judge, parse_answer

PROMPTS = ["tea?", "milk?", "cake?"]
SHORT, LONG = ["a", "b", "c"], ["aaaa", "bbbb", "cccc"]


def completion(text):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def shown(asked):
    """The two replies as the judge was shown them."""
    content = asked.body["messages"][0]["content"]
    return [re.findall(rf"<reply_{i}>\n(.*)\n</reply_{i}>", content, re.DOTALL)[0] for i in (1, 2)]


def longer(asked):
    first, second = shown(asked)
    return completion("1" if len(first) > len(second) else "2")


def test_a_judge_that_goes_by_position_yields_ties(serve):
    for answer in ("1", "2"):
        address = serve(lambda asked, answer=answer: completion(answer))
        assert judge(PROMPTS, LONG, SHORT, address, "m") == Judgement(("tie", "tie", "tie"), 0)


def test_a_judge_of_length_yields_wins_and_losses_in_order(serve):
    address = serve(longer)
    assert judge(PROMPTS, LONG, SHORT, address, "m").outcomes == ("win", "win", "win")
    assert judge(PROMPTS, SHORT, LONG, address, "m").outcomes == ("loss", "loss", "loss")
    mixed = judge(PROMPTS, ["aaaa", "b", "cccc"], ["a", "bbbb", "c"], address, "m")
    assert mixed.outcomes == ("win", "loss", "win")


def test_order_is_kept_when_answers_arrive_out_of_order(serve):
    later = threading.Event()

    def answer(asked):
        if shown(asked)[0] == "first":
            later.wait(10)
        else:
            later.set()
        return longer(asked)

    address = serve(answer)
    found = judge(["p", "q"], ["first", "x"], ["f", "xx"], address, "m", at_once=2)
    assert found.outcomes == ("win", "loss")


def test_each_pair_is_asked_once_in_each_order(serve):
    asked = []
    address = serve(lambda request: (asked.append(request), longer(request))[1])
    judge(["why {this}?"], ["one {0}"], ["two"], f"{address}/v1/", "the-judge")
    assert [request.path for request in asked] == ["/v1/chat/completions"] * 2
    assert sorted(map(shown, asked)) == [["one {0}", "two"], ["two", "one {0}"]]
    for request in asked:
        assert request.body["model"] == "the-judge" and request.body["temperature"] == 0
        assert "<conversation>\nwhy {this}?\n</conversation>" in request.body["messages"][0]["content"]


def test_full_address_is_used_as_it_is(serve):
    paths = []
    address = serve(lambda asked: (paths.append(asked.path), longer(asked))[1])
    judge(["p"], ["a"], ["b"], f"{address}/proxy/chat/completions", "m")
    assert set(paths) == {"/proxy/chat/completions"}


def test_chat_prompt_is_shown_with_roles(serve):
    contents = []
    address = serve(lambda asked: (contents.append(asked.body["messages"][0]["content"]), longer(asked))[1])
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    judge([messages], ["a"], ["b"], address, "m")
    assert "<conversation>\nuser: hi\nassistant: hello\n</conversation>" in contents[0]


def test_unparsable_answers_are_counted_and_prefer_nothing(serve):
    def answer(asked):
        first, second = shown(asked)
        if "mute" in (first, second):
            return completion(None)
        if "half" in first:  # parsable only when shown second, where it is preferred
            return completion("Both are good")
        return completion("2" if "half" in second else "1")

    address = serve(answer)
    found = judge(["p", "q", "r"], ["mute", "half", "good"], ["x", "y", "half"], address, "m")
    assert found.outcomes == ("tie", "tie", "tie")  # once preferred and once unparsable is a tie for either side
    assert found.unparsable == 2 + 1 + 1


def test_parse_answer_is_strict():
    assert [parse_answer(text) for text in ("1", " 2\n", "1.", "12", "Reply 1", "", "one", None)] == [
        1,
        2,
        None,
        None,
        None,
        None,
        None,
        None,
    ]


def test_points_of_outcomes():
    found = Judgement(("win", "tie", "loss", "win"), 0)
    assert found.points.tolist() == [1, 0.5, 0, 1]


def test_survives_two_broken_answers(serve):
    broken = [500, 500]
    lock = threading.Lock()

    def answer(asked):
        with lock:
            status = broken.pop() if broken else 200
        return (longer(asked), status)

    address = serve(answer)
    assert judge(["p"], ["aa"], ["b"], address, "m", backoff_seconds=0, at_once=1).outcomes == ("win",)
    assert broken == []


def test_failure_stops_the_remaining_requests(serve):
    asked = []
    address = serve(lambda request: (asked.append(request), ({}, 500))[1])
    with pytest.raises(ServiceError, match="answered 500"):
        judge(["p"] * 100, ["a"] * 100, ["b"] * 100, address, "m", attempts=1, at_once=1)
    assert len(asked) < 150  # of 200


def test_a_judge_that_never_answers(serve):
    release = threading.Event()
    address = serve(lambda asked: release.wait(10))
    try:
        with pytest.raises(ServiceError, match="no whole answer within"):
            judge(["p"], ["a"], ["b"], address, "m", timeout_seconds=0.1, attempts=1)
    finally:
        release.set()


@pytest.mark.parametrize("body", [{"error": "x"}, {"choices": []}, [1], {"choices": [{"text": "1"}]}])
def test_an_answer_that_is_no_chat_completion(serve, body):
    address = serve(lambda asked: body)
    with pytest.raises(ServiceError, match="no chat completion"):
        judge(["p"], ["a"], ["b"], address, "m")


def test_an_address_holds_no_secret_but_may_name_one(serve, monkeypatch):
    seen = []
    address = serve(lambda asked: (seen.append(asked.path), longer(asked))[1])
    with pytest.raises(ConfigError, match="a value for 'api_key', which may be a secret") as raised:
        judge(["p"], ["a"], ["b"], f"{address}/v1?api_key=hunter2", "m")
    assert "hunter2" not in str(raised.value) and "set PERLHF_JUDGE_KEY" in str(raised.value)
    monkeypatch.setenv("MY_CODE", "hunter2")
    for written in ("/v1", "/v1/chat/completions"):
        judge(["p"], ["a"], ["b"], f"{address}{written}?api-version=2&code=${{MY_CODE}}", "m", at_once=1)
    assert set(seen) == {"/v1/chat/completions?api-version=2&code=hunter2"}


def test_key_comes_from_the_environment_alone(serve, monkeypatch, caplog, capsys):
    seen = []
    address = serve(lambda asked: (seen.append(asked.headers.get("Authorization")), longer(asked))[1])
    monkeypatch.delenv("PERLHF_JUDGE_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    judge(["p"], ["a"], ["b"], address, "m")
    monkeypatch.setenv("PERLHF_JUDGE_KEY", "sk-1")
    found = judge(["p"], ["a"], ["b"], address, "m")
    assert seen == [None, None, "Bearer sk-1", "Bearer sk-1"]
    assert "sk-1" not in repr(found) + caplog.text + "".join(capsys.readouterr())


def test_bad_arguments():
    with pytest.raises(DataError, match="2 prompts, 1 first and 1 second"):
        judge(["p", "q"], ["a"], ["b"], "http://127.0.0.1:9", "m")
    with pytest.raises(DataError, match="0 prompts"):
        judge([], [], [], "http://127.0.0.1:9", "m")
    with pytest.raises(ConfigError, match="no http address"):
        judge(["p"], ["a"], ["b"], "gpt-4", "m")
