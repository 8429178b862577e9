"""An export as others see it: read by plain transformers through its own chat template, and explained in a README.

Nothing here uses perlhf's own tokens or network: what `export` measures is what the users of the files will get.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from perlhf.config.stages import PLAIN_TEMPLATES
from perlhf.data.records import Record, Text, completions_of
from perlhf.model.bases.packaged import SMOLLM2, quiet
from perlhf.model.encoding.encode import Encoder, Example
from perlhf.model.finished import FinishedRun

AT_ONCE = 8
"""Texts in one padded batch."""

SCORES = '''import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
model = AutoModelForSequenceClassification.from_pretrained("DIRECTORY", dtype="auto").eval()


def scores(conversations):
    """One score for each conversation, a list of {"role", "content"} that ends with the assistant's answer."""
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].float() + SCORE_BIAS'''
"""How a merged reward model is used. The docs have it, too; a test runs both."""

_PEFT_SCORES = SCORES.replace(
    "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
    "from peft import AutoPeftModelForSequenceClassification\nfrom transformers import AutoTokenizer",
).replace(
    'AutoModelForSequenceClassification.from_pretrained("DIRECTORY", dtype="auto").eval()',
    'AutoPeftModelForSequenceClassification.from_pretrained("DIRECTORY", num_labels=1).eval()\n'
    "model.config.get_text_config().pad_token_id = tokenizer.pad_token_id",
)
_ANSWERS = """from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
model = AutoModelForCausalLM.from_pretrained("DIRECTORY", dtype="auto").eval()
settings = GenerationConfig.from_pretrained("DIRECTORY", pad_token_id=tokenizer.pad_token_id)
messages = [{"role": "user", "content": "Hello!"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, generation_config=settings, max_new_tokens=64)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""


def tokenizer_of(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`."""
    with quiet():
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def conversation(prompt: Text, completion: Text | None = None) -> list[dict[str, Any]]:
    """A prompt, with its completion, as a list of messages."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if isinstance(completion, str):
        return [*messages, {"role": "assistant", "content": completion}]
    return [*messages, *(dict(message) for message in completion or ())]


def rendered(encoder: Encoder, record: Record, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The record's conversations as text, by the tokenizer's own template."""
    texts = []
    for completion in completions_of(record):
        if _is_raw(encoder, record.prompt) and isinstance(completion, str):
            end = str(tokenizer.convert_ids_to_tokens(encoder.end_id))
            texts.append(f"{record.prompt} {completion}{end}")
        else:
            messages, tools = conversation(record.prompt, completion), record.tools
            texts.append(str(tokenizer.apply_chat_template(messages, tools=_listed(tools), tokenize=False)))
    return texts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, record: Record) -> list[int]:
    """Tokens of a prompt by the tokenizer's own template."""
    if _is_raw(encoder, record.prompt):
        text = str(record.prompt)
    else:
        tools = _listed(record.tools)
        given = conversation(record.prompt)
        text = str(tokenizer.apply_chat_template(given, tools=tools, tokenize=False, add_generation_prompt=True))
    return _ids(tokenizer, text)


def examples(encoder: Encoder, record: Record) -> list[Example]:
    """The record's completions with their prompt, as training and `perlhf score` see them."""
    return encoder.examples(record.prompt, completions_of(record), record.source, record.tools)


@torch.no_grad()
def scores(
    directory: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], device: torch.device
) -> tuple[list[float], list[list[int]]]:
    """Logits of texts by the classifier in `directory`, in padded batches, as its README says; and the texts' ids."""
    with quiet():
        network = AutoModelForSequenceClassification.from_pretrained(directory, dtype="auto", local_files_only=True)
    network = network.to(device).eval()
    found: list[float] = []
    for start in range(0, len(texts), AT_ONCE):
        given = list(texts[start : start + AT_ONCE])
        batch = tokenizer(given, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
        found += network(**batch).logits[:, 0].float().tolist()
    return found, [_ids(tokenizer, text) for text in texts]


def readme(details: dict[str, Any], run: FinishedRun) -> str:
    """What the directory holds, how it is used, and what was measured."""
    if "gguf" in details:
        return _gguf_readme(details, run)
    reward, merged = "score_bias" in details, details["format"] == "merged"
    what = {"sft": "an SFT model", "reward": "a reward model", "policy": "a policy"}[run.stage]
    lines = [f"# {what[0].upper()}{what[1:]}, by perlhf", ""]
    if merged:
        lines += [f"Base and adapter in one transformers checkpoint ({details['dtype']}); base: {details['base']}.", ""]
    else:
        named = details["base_model_name_or_path"]
        lines += [f"An adapter in PEFT's layout for {named} (`base_model_name_or_path`).", ""]
        if run.base.directory == SMOLLM2.directory:
            note = "was trained on weights of it that had been quantised to 4 bits and read back, so that scores and "
            lines += [f"It {note}probabilities differ a little; a merged export has them exactly.", ""]
    snippet = (SCORES if merged else _PEFT_SCORES) if reward else _ANSWERS
    if not reward and not merged:
        snippet = snippet.replace("import AutoModelForCausalLM, ", "import ").replace("AutoModel", "AutoPeftModel")
        snippet = "from peft import AutoPeftModelForCausalLM\n" + snippet.replace(', dtype="auto"', "")
    if not merged and "quantization_config" in details:
        snippet = _on_quantised(snippet, details["quantization_config"])
        lines += ["It was trained on the base as bitsandbytes quantises it while loading, as below.", ""]
    bias = details.get("score_bias", 0.0)
    lines += ["```python", snippet.replace("SCORE_BIAS", repr(bias)), "```", ""]
    if reward:
        lines += [
            f"`score_bias` is {bias!r}: the head of transformers has none. Add it where scores are log-odds (of "
            "ratings); differences of scores don't need it.",
            "",
            "The chat template ends with the end token where the assistant's turn is the last one: that token's state "
            "is scored. The padding token occurs in no prompt.",
            "",
        ]
        if run.config.encoding.template in PLAIN_TEMPLATES and run.config.encoding.system is None:
            end = "the end token"
            lines += [f'Prompts that are plain text are scored as `prompt + " " + completion` and {end}.', ""]
    stop = getattr(run.config, "stop", ())
    if stop:
        lines += [f"Answers end at {', '.join(map(repr, stop))} as well.", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in details.items()), ""]
    return "\n".join(lines)


def _gguf_readme(details: dict[str, Any], run: FinishedRun) -> str:
    """The same for files of llama.cpp."""
    merged = details["format"] == "merged"
    given = "-m model.gguf" if merged else "-m base.gguf --lora adapter.gguf"
    dtype = details["dtype"]
    what = f"Base and adapter in one file ({dtype})" if merged else f"The base ({dtype}), and an adapter in float32"
    lines = [f"# {'A policy' if run.stage == 'policy' else 'An SFT model'} for llama.cpp, by perlhf", ""]
    lines += [f"{what}; base: {details['base']}.", ""]
    lines += ["```", f"llama-server {given}", f"llama-cli {given}", "```", ""]
    lines += ["Older versions take the file's own chat template with `--jinja` alone.", ""]
    if (temperature := getattr(run.config, "temperature", None)) is not None:
        lines += [
            f"It was trained at temperature {temperature}, on all tokens, which the file says. Where that isn't read: "
            f"`--temp {temperature} --top-k 0 --top-p 1 --min-p 0`.",
            "",
        ]
    if stop := getattr(run.config, "stop", ()):
        lines += [f"Answers end at {', '.join(map(repr, stop))} as well, which a file can't say.", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in details.items()), ""]
    return "\n".join(lines)


def _on_quantised(snippet: str, settings: dict[str, Any]) -> str:
    """The same with a base that is quantised while it is loaded."""
    given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    added = f"quantization = BitsAndBytesConfig({given})\n"
    snippet = snippet.replace("\nmodel = ", f"\n{added}model = ").replace(
        "import AutoTokenizer", "import AutoTokenizer, BitsAndBytesConfig"
    )
    return re.sub(
        r"(Auto\w+\.from_pretrained\(\"DIRECTORY\"(, num_labels=1)?)\)\.eval",
        r"\1, quantization_config=quantization).eval",
        snippet,
    )


def _is_raw(encoder: Encoder, prompt: Text) -> bool:
    """Whether a prompt is no conversation for its encoder, but text that is continued."""
    return isinstance(prompt, str) and encoder.config.template in PLAIN_TEMPLATES and encoder.config.system is None


def _listed(tools: Any) -> list[Any] | None:
    return list(tools) if tools else None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])
