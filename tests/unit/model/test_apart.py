"""Templates that write a prompt otherwise once it is answered, or calls of messages without content alone."""

from typing import Any, cast

import pytest
from chat_templates import TOKENIZERS

from perlhf.config.stages import EncodingConfig
from perlhf.data.records import Message
from perlhf.errors import DataError
from perlhf.model.encoding.encode import Encoder

SYSTEM: Message = {"role": "system", "content": "Be brief"}
ASKED: Message = {"role": "user", "content": "Hi there"}
SYSTEM_IN_THE_LAST_TURN = (  # as Mistral 7B v0.3: once it is answered, the last message is no user's
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% endif %}{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"
)
SHORT_PROMPTS = (  # the system message is written while an answer is to come, and never again
    "{% for m in messages %}{% if m.role != 'system' or add_generation_prompt %}{{ '<|im_start|>' + m.role + '\\n'"
    " + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EMPTY_THOUGHT = (  # as Exaone 4: prompts end with an empty thought, unless thinking is wanted
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{{ '<think>\\n' +"
    " (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}"
    "{% if not enable_thinking %}{{ '\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
CALLS_OF_NULL = (  # as DeepSeek R1
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    "{{ '<|assistant|><tool_call>' + c.function.name + c.function.arguments + '</tool_call></s>' }}{% endfor %}"
    "{% else %}{{ '<|' + m.role + '|>' + (m.content or '') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"what": "hub"}'}}


def encoder(template: str, kind: str = "byte level", **options: Any) -> Encoder:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = template
    return Encoder(tokenizer, EncodingConfig(max_tokens=4000, **options))


def text_of(coded: Encoder, ids: Any) -> str:
    return str(coded.tokenizer.decode(list(ids)))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("asked", ["Hi there", "a", "s>", "Hello you", "]"])
@pytest.mark.parametrize("answer", ["Hello you", " Hello you\n", "s", "a", "[INST]"])
def test_an_answer_is_what_the_template_writes_whether_its_prompt_changes_or_not(
    kind: str, asked: str, answer: str
) -> None:
    coded = encoder(SYSTEM_IN_THE_LAST_TURN, kind)
    question: Message = {"role": "user", "content": asked}
    with_system, alone = (coded.example(prompt, answer) for prompt in ([SYSTEM, question], [question]))
    assert text_of(coded, with_system.completion).split() == text_of(coded, alone.completion).split()
    if answer != "[INST]":  # what people type of control tokens is tokenised by itself
        assert with_system.completion == alone.completion


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("answer", ["Hello you", "  Hello you", "s", "m", "assistant\n"])
def test_the_header_of_an_answer_stays_with_the_prompt(kind: str, answer: str) -> None:
    coded = encoder(SHORT_PROMPTS, kind)
    again: list[Message] = [ASKED, {"role": "assistant", "content": answer}, ASKED]
    for prompt in ([ASKED], again):
        with_system, alone = coded.example([SYSTEM, *prompt], answer), coded.example(prompt, answer)
        assert text_of(coded, with_system.completion) == text_of(coded, alone.completion)
        assert text_of(coded, with_system.prompt).endswith(text_of(coded, alone.prompt)[-40:])


def test_a_key_that_a_switch_makes_room_for(capsys: pytest.CaptureFixture[str]) -> None:
    coded = encoder(EMPTY_THOUGHT)
    thought: Message = {"role": "assistant", "content": "4", "reasoning_content": "let me"}
    with pytest.raises(DataError, match="doesn't say where a completion with reasoning_content begins") as caught:
        coded.example([ASKED], [thought])
    assert "`encoding.template_kwargs: {enable_thinking: true}`" in str(caught.value.hint)
    switched = encoder(EMPTY_THOUGHT, template_kwargs={"enable_thinking": True})
    example = switched.example([ASKED], [thought])
    assert text_of(switched, [*example.prompt, *example.completion]).endswith(
        "<think>\nlet me\n</think>\n\n4<|im_end|>"
    )
    capsys.readouterr()


def test_the_tokenizer_is_named_where_it_joins_texts(capsys: pytest.CaptureFixture[str]) -> None:
    coded = encoder("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert text_of(coded, coded.example("us", "er").completion) == "er</s>"
    told = capsys.readouterr().err
    assert "the tokenizer joins the end of prompts with what follows" in told and "differently" not in told


@pytest.mark.parametrize("content", ["", None])
def test_calls_that_a_template_writes_where_the_content_is_null(content: str | None) -> None:
    """transformers after 5.20 leaves nulls out of messages, so that `is none` is never true."""
    called: list[Message] = [{"role": "assistant", "content": content, "tool_calls": [CALL]}]  # pyright: ignore[reportAssignmentType]
    result: Message = {"role": "tool", "content": "7"}
    expected = '<|user|>Hi there<|assistant|><tool_call>find{"what": "hub"}</tool_call></s><|tool|>7<|assistant|>'
    asked: Any = {"chat_template": "{{ messages[0].content is none }}", "tokenize": False}
    given, as_given = encoder(CALLS_OF_NULL), cast(Any, called)
    if given.tokenizer.apply_chat_template(as_given, **asked) == "True":
        assert text_of(given, given.prompt([ASKED, *called, result])) == expected
    else:
        with pytest.raises(DataError, match="leaves out 'tool_calls'") as caught:
            given.prompt([ASKED, *called, result])
        hint = str(caught.value.hint)
        assert "write `not message.content` instead (and `message.content` for `is not none`)" in hint
    mended = encoder(CALLS_OF_NULL.replace("m.content is none", "not m.content"))
    assert text_of(mended, mended.prompt([ASKED, *called, result])) == expected


@pytest.mark.parametrize("kind", ["SentencePiece", "byte level"])
def test_no_space_is_put_before_an_answer_that_begins_with_a_line_break(kind: str) -> None:
    """The prompt ends with a line break, the answer begins with one, and the tokenizer joins them."""
    template = EMPTY_THOUGHT.replace("{% if not enable_thinking %}", "{% if false %}")
    coded = encoder(template, kind)
    example = coded.example([ASKED], "Hello")
    text = text_of(coded, [*example.prompt, *example.completion])
    assert text.endswith("<think>\n\n</think>\n\nHello<|im_end|>")
    alone = coded.chat.tokenised_after("\n\nHello", rendered=True)
    assert text_of(coded, [*coded.chat.tokenised("\n"), *alone]).strip(" ") == "\n\n\nHello"
