"""Chat templates of many families, short ones of our own, and tokenizers that treat spaces and added tokens unlike.

Each template has what makes its family hard: no system role, tools, reasoning that is stripped from history, text that
is trimmed, dates, several end tokens, content in parts, a begin token of its own, markup without control tokens.
"""
# ruff: noqa: E501 -- a template is easier to read in one line

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
ANSWER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + ANSWER


def each(turn: str, answer: str = ANSWER, before: str = "", after: str = "") -> str:
    """A template that writes `turn` for each message m."""
    return f"{before}{{% for m in messages %}}{turn}{{% endfor %}}{answer}{after}"


def by_role(user: str, assistant: str, system: str, answer: str, before: str = "") -> str:
    """A template with markup for each role."""
    branches = f"{{% if m['role'] == 'user' %}}{user}{{% elif m['role'] == 'assistant' %}}{assistant}{{% else %}}{system}{{% endif %}}"
    return each(branches, f"{{% if add_generation_prompt %}}{answer}{{% endif %}}", before)


TEXT = "{{ m['content'] }}"
TRIMMED = "{{ m['content'] | trim }}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
REASONING = (  # earlier reasoning is dropped, that of the last answer stays
    "{% set text = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in text and not loop.last %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>\\n' }}"
)
REASONING_KEY = (
    "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m.reasoning_content and loop.last %}"
    "{{ '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}"
)
EMPTY_THOUGHT = (
    "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}"
)
CALLS = (
    "{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + c.function.name + (c.function.arguments | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
)
TOOLS = "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
PARTS_OR_TEXT = (
    "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}"
)
PARTS_ALONE = (
    "{{ '<|im_start|>' + m['role'] + '\\n' }}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
)

TEMPLATES: dict[str, str] = {
    "chatml": CHATML,
    "chatml, default system": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif %}"
    + CHATML,
    "chatml, no system": NO_SYSTEM + CHATML,
    "chatml, trimmed": each(TURN.replace("m['content']", "m['content'].strip()")),
    "chatml, no line break at the end": each(TURN.replace("<|im_end|>\\n", "<|im_end|>")),
    "chatml, begin token": each(TURN, before="{{ '<s>' }}"),
    "chatml, named begin token": each(TURN, before="{{ bos_token }}"),
    "chatml, two line breaks": each(TURN.replace("\\n' +", "\\n\\n' +"), ANSWER.replace("\\n", "\\n\\n")),
    "chatml, generation block": each(
        "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    ),
    "chatml, end of text at last": each(TURN, after="{% if not add_generation_prompt %}{{ '</s>' }}{% endif %}"),
    "chatml, looks at the text": each("{% if 'hello' in m['content'] %}{{ '<hi>' }}{% endif %}" + TURN),
    "chatml, counts turns": each("{{ loop.index ~ ' of ' ~ messages | length }}" + TURN),
    "chatml, numbers turns": each("{{ loop.index ~ ': ' }}" + TURN),
    "chatml, upper case": each(TURN.replace("m['content']", "m['content'].upper()")),
    "thinking, stripped": each(REASONING),
    "thinking, a key": each(REASONING_KEY),
    "thinking, empty thought": each(EMPTY_THOUGHT),
    "thinking, switch": each(
        EMPTY_THOUGHT,
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
    ),
    "thinking, opened by the prompt": each(REASONING, ANSWER.replace("assistant\\n", "assistant\\n<think>\\n")),
    "tools": each(CALLS, before=TOOLS),
    "tools, in a system message": each(
        CALLS, before="{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    ),
    "parts or text": each(PARTS_OR_TEXT),
    "parts alone": each(PARTS_ALONE),
    "header tokens": by_role(
        "<|user|>\n" + TEXT + "</s>\n",
        "<|assistant|>\n" + TEXT + "</s>\n",
        "<|system|>\n" + TEXT + "</s>\n",
        "<|assistant|>\n",
    ),
    "header tokens, trimmed": by_role(
        "<|user|>\n" + TRIMMED + "</s>\n",
        "<|assistant|>\n" + TRIMMED + "</s>\n",
        "<|system|>\n" + TRIMMED + "</s>\n",
        "<|assistant|>\n",
    ),
    "header tokens, other end": by_role(
        "<|user|>" + TEXT + "<|end|>",
        "<|assistant|>" + TEXT + "<|end|>",
        "<|system|>" + TEXT + "<|end|>",
        "<|assistant|>",
        "{{ '<s>' }}",
    ),
    "headers, date": each(
        "{{ '<|header|>' + m['role'] + '</h>\\n\\n' + m['content'] | trim + '<|eot|>' }}",
        "{% if add_generation_prompt %}{{ '<|header|>assistant</h>\\n\\n' }}{% endif %}",
        "{{ '<s>Today: ' + strftime_now('%d %b %Y') + '\\n' }}",
    ),
    "headers, given date": each(
        "{{ '<|header|>' + m['role'] + '</h>\\n\\n' + m['content'] | trim + '<|eot|>' }}",
        "{% if add_generation_prompt %}{{ '<|header|>assistant</h>\\n\\n' }}{% endif %}",
        "{% if not date_string is defined %}{% set date_string = strftime_now('%Y-%m-%d') %}{% endif %}{{ '<s>' + date_string }}",
    ),
    "instruct": by_role(
        "[INST] " + TEXT + " [/INST]", " " + TEXT + "</s>", "<<SYS>>\n" + TEXT + "\n<</SYS>>\n\n", "", "{{ '<s>' }}"
    ),
    "instruct, trimmed": by_role("[INST] " + TRIMMED + " [/INST]", " " + TRIMMED + " </s>", TRIMMED, ""),
    "instruct, begin token a turn": by_role("<s>[INST] " + TEXT + " [/INST]", TEXT + "</s>", TEXT, ""),
    "instruct, tight": by_role("[INST]" + TEXT + "[/INST]", TEXT + "</s>", TEXT, ""),
    "turns of model and user": each(
        "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + '</turn>\\n' }}",
        "{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}",
        NO_SYSTEM + "{{ bos_token }}",
    ),
    "alternating": each(
        TURN,
        before="{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}{% endfor %}",
    ),
    "lines": by_role("USER: " + TEXT + "\n", "ASSISTANT: " + TEXT + "\n", TEXT + "\n\n", "ASSISTANT:"),
    "lines, end token": by_role("USER: " + TEXT + " ", "ASSISTANT: " + TEXT + "</s>", TEXT + " ", "ASSISTANT:"),
    "lines, no end": by_role("Human: " + TEXT + "\n\n", "Bot: " + TEXT + "\n\n", TEXT + "\n\n", "Bot:"),
    "instructions": by_role(
        "### Instruction:\n" + TEXT + "\n\n",
        "### Response:\n" + TEXT + "\n\n",
        TEXT + "\n\n",
        "### Response:\n",
        "Below is an instruction.\n\n",
    ),
    "bare": each(TEXT, ""),
    "bare, spaced": each("{{ m['content'] + ' ' }}", ""),
    "bare, end token": each("{{ m['content'] + eos_token }}", ""),
    "json": each("{{ m | tojson }}{{ '\\n' }}", ""),
    "developer": each(TURN.replace("m['role']", "('system' if m['role'] == 'developer' else m['role'])")),
    "channels": each(
        "{{ '<|start|>' + m['role'] }}{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m['content'] + ('<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>') }}",
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ),
    "macro": "{% macro turn(m) %}" + TURN + "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}" + ANSWER,
    "system joined to the first turn": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\\n\\n' %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + ns.system + m['content'] + '<|im_end|>\\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}"
        + ANSWER
    ),
}

SPECIAL = "<s> </s> <|im_start|> <|im_end|> <|header|> </h> <|eot|> <turn> </turn> <|start|> <|channel|> <|message|> <|return|> <|end|>".split()
PLAIN_ADDED = "<|user|> <|assistant|> <|system|> <think> </think> <tool_call> </tool_call> [INST] [/INST]".split()
"""Added tokens that aren't special, as many tokenizers have them."""

CORPUS = [
    "user assistant system hello world the a coffee, please! Instruction: Response: Human: Today\n\n 2026 ",
    "<<SYS>> name content role arguments true {} [] () 0123456789 \t tools model is it been good Be good.",
] * 4


def byte_level(rstrip: bool = False) -> PreTrainedTokenizerBase:
    """As GPT-2, Llama 3 and Qwen: no space is put before text. With `rstrip` added tokens take the space after them, as
    Phi-3's do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet))
    return _finished(tokenizer, rstrip)


def sentencepiece(prepend: str = "first") -> PreTrainedTokenizerBase:
    """As Llama 2 and Mistral: spaces are letters, and one is put before text that begins (`first`, or `always`)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_as_text = [f"<0x{number:02X}>" for number in range(256)]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=520, special_tokens=["<unk>", *bytes_as_text]))
    return _finished(tokenizer)


def with_a_space_before() -> PreTrainedTokenizerBase:
    """As older Llama files: a normaliser puts the space before, and writes spaces as letters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_as_text = [f"<0x{number:02X}>" for number in range(256)]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=520, special_tokens=["<unk>", *bytes_as_text]))
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer, rstrip: bool = False) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=rstrip) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False, rstrip=rstrip) for token in PLAIN_ADDED])
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    loaded.model_max_length = 4096
    return loaded


TOKENIZERS = {
    "byte level": byte_level,
    "SentencePiece": sentencepiece,
    "SentencePiece, always": lambda: sentencepiece("always"),
    "space before": with_a_space_before,
    "greedy tokens": lambda: byte_level(rstrip=True),
}
