"""Chat messages as files have them."""

from typing import Any

import pytest

from perlhf.data.readers.messages import messages, tools, transcript
from perlhf.errors import DataError

HI = {"role": "user", "content": "Hi!"}


def read(*conversation: Any) -> tuple[Any, ...]:
    return messages(list(conversation), "messages", "a:1")


def test_other_keys_are_kept_and_nulls_are_absent() -> None:
    filled = {"role": "assistant", "content": "Yes", "reasoning_content": "So.", "name": "bo", "tool_calls": None}
    assert read(HI | {"name": None}, filled) == (
        HI,
        {"role": "assistant", "content": "Yes", "reasoning_content": "So.", "name": "bo"},
    )
    assert read(HI | {"role": "Developer"})[0]["role"] == "developer"


def test_calls_keep_their_arguments() -> None:
    """Objects or JSON text: the template gets what the file has, as `apply_chat_template` would."""
    wrapped = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}}
    (found,) = read({"role": "assistant", "content": None, "tool_calls": [wrapped]})
    assert found["content"] is None
    assert found["tool_calls"] == [wrapped]
    for call in ({"name": "f", "arguments": {"x": 1, "y": None}}, '{"name": "f", "arguments": {"x": 1}}'):
        (bare,) = read({"role": "assistant", "content": "", "tool_calls": [call]})
        assert bare["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    (broken,) = read({"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": '}]})
    assert broken["tool_calls"][0]["function"]["arguments"] == '{"x": ', "what the model wrote"
    for wrong in ("now", [{"arguments": {}}], [3]):
        with pytest.raises(DataError):
            read({"role": "assistant", "content": "", "tool_calls": wrong})


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hi", "image_url": None}, {"type": "input_text", "text": "!"}, ""]
    assert read(HI | {"content": parts}) == (HI,)
    for kind in ("image", "image_url", "input_audio", "video"):
        with pytest.raises(DataError, match=f"a part of type '{kind}': perlhf reads no"):
            read(HI | {"content": [{"type": kind}]})
    with pytest.raises(DataError, match="a part of type 'thinking'"):
        read(HI | {"content": [{"type": "thinking", "thinking": "x"}]})


def test_a_struct_of_lists_is_a_list_of_objects() -> None:
    """How `datasets` stored a sequence of objects."""
    struct = {"role": ["user", "assistant"], "content": ["Hi!", "Yes"]}
    assert messages(struct, "prompt", "a:1") == (HI, {"role": "assistant", "content": "Yes"})


@pytest.mark.parametrize(
    "part", [{"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": 3}, 7]
)
def test_messages_without_content(part: Any) -> None:
    with pytest.raises(DataError) as caught:
        read(part)
    assert caught.value.where == "a:1"


def test_tools() -> None:
    bare = {"name": "f", "parameters": {"type": "object"}}
    whole = {"type": "function", "function": bare}
    for written in ([bare], [whole], '[{"name": "f", "parameters": {"type": "object"}}]', [whole | {"strict": None}]):
        assert tools(written, "a:1") == (whole,)
    assert tools("", "a:1") is tools([], "a:1") is tools("[]", "a:1") is None
    for wrong in ("{", "word", [3]):
        with pytest.raises(DataError):
            tools(wrong, "a:1")


def test_nesting_has_a_limit() -> None:
    deep: Any = {}
    for _ in range(60):
        deep = {"a": deep}
    with pytest.raises(DataError, match="nested too deeply"):
        read(HI | {"extra": deep})


def test_transcripts() -> None:
    said = [("user", "a"), ("assistant", "b\nUser: no turn"), ("user", "c"), ("assistant", "d")]
    blank = "Human: a\n\nAssistant: b\nUser: no turn\n\nHuman: c\n\nAssistant: d"
    for text in (blank, "\n\n" + blank, blank.replace("\n", "\r\n").replace("b\r\n", "b\n")):
        assert [(turn["role"], turn["content"]) for turn in transcript(text) or ()] == said
    marked = "### Human: a### Assistant: b### Human: c### Assistant: d"
    assert [turn["content"] for turn in transcript(marked) or ()] == ["a", "b", "c", "d"]
    assert transcript("Human: a") is None and transcript("Assistant: a\n\nHuman: b") is None
    assert transcript("The Human: a\n\nAssistant: b") is None


def test_calls_and_their_answers_as_roles() -> None:
    """ms-swift's agents."""
    called = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}
    assert read(called, {"role": "tool_response", "content": "3"}) == (
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "3"},
    )
