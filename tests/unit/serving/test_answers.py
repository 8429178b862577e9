"""Calls of tools in a text, whole and while it grows."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import open_encoder

from perlhf.rollout.local import Ends
from perlhf.serving.engine import Sampled
from perlhf.serving.openai.answers import Growing, chat_pieces, parted


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


PARTED: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("No call.", "No call.", []),
    ('<tool_call>{"name": "f", "arguments": {"a": {"b": 1}}}</tool_call>', "", [call("f", '{"a": {"b": 1}}')]),
    ('Look: <tool_call>\n{"name": "f"}\n</tool_call>', "Look: ", [call("f", "{}")]),
    ('<tool_call>{"name": "f", "parameters": {"x": "}"}}', "", [call("f", '{"x": "}"}')]),
    ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [call("f", '{"x": 1}')]),
    (
        'A<tool_call>{"name": "f"}</tool_call>B<tool_call>{"name": "g"}</tool_call>C',
        "ABC",
        [call("f", "{}"), call("g", "{}")],
    ),
    ("<tool_call>{'name': 'f'}</tool_call>", "<tool_call>{'name': 'f'}</tool_call>", []),
    ('<tool_call>{"nome": "f"}</tool_call>', '<tool_call>{"nome": "f"}</tool_call>', []),
    ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ('<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("<tool_call>", "<tool_call>", []),
]


@pytest.mark.parametrize(("text", "rest", "calls"), PARTED)
def test_calls_and_the_text_around_them(text: str, rest: str, calls: list[dict[str, Any]]) -> None:
    found, called = parted(text)
    assert found == rest
    assert [{key: value for key, value in one.items() if key != "id"} for one in called] == calls


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('I look.\n<tool_call>{"name": "f"}</tool_call>', "I look."),
        ('I look.\n<tool_call>{"name": "f"}</tool_call>\nDone.', "I look.\n\nDone."),
        ("a < b and <tool> c", "a < b and <tool> c"),
        ("Never ended: <tool_call>{", "Never ended: <tool_call>{"),
        ("Half: <tool_", "Half: <tool_"),
    ],
)
@pytest.mark.parametrize("stop", [(), ("STOP",)])
def test_a_growing_text_shows_no_part_of_a_call(tiny_base: Path, text: str, shown: str, stop: tuple[str, ...]) -> None:
    encoder = open_encoder(tiny_base)
    ids: Any = encoder.tokenizer(f" {text} {stop[0] if stop else ''}")["input_ids"]
    growing = Growing(Ends.of(encoder, stop), trimmed=True, calls=True)
    pieces, last = [""], len(ids) - 1
    for at, token in enumerate(ids):
        growing.tokens.append(Sampled(0, token, -1.0, [], "stop" if at == last else None))
        new = chat_pieces(growing, 0, growing.tokens[-1:], logprobs=False, first=at == 0)
        pieces += [choice["delta"].get("content", "") for choice in new]
        if at < last:
            assert "<tool_call" not in "".join(pieces)
    assert "".join(pieces) == shown == growing.called()[0]
    assert new[-1]["finish_reason"] == ("tool_calls" if growing.called()[1] else "stop")
