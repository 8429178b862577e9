"""Runs llama.cpp (llama-cpp-python) on a GGUF file: a program of its own, in an environment without perlhf.

Reads one JSON object on standard input and writes one on standard output.

    {"model": file, "lora": file or null, "talks": [messages], "texts": [text], "prompts": [[id]], "tokens": 32}
    {"talks": [[id]], "texts": [[id]], "greedy": [[id]], "metadata": {key: text}}

`talks` are rendered by the file's own chat template, and go on as prompts after those that are given. Everything is
computed in float32, the cache of keys and values too; nothing ends an answer but its number of tokens.
"""

import itertools
import json
import sys
from typing import Any

from llama_cpp import GGML_TYPE_F32, Llama  # pyright: ignore[reportMissingImports]
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Answers what standard input asks."""
    asked = json.load(sys.stdin)
    llama = Llama(
        asked["model"],
        lora_path=asked.get("lora"),
        n_ctx=asked.get("context", 512),
        n_threads=1,
        n_threads_batch=1,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    talks = [_rendered(llama, messages) for messages in asked.get("talks", ())]
    texts = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in asked.get("texts", ())]
    greedy = [_greedy(llama, prompt, asked["tokens"]) for prompt in [*asked.get("prompts", ()), *talks]]
    json.dump({"talks": talks, "texts": texts, "greedy": greedy, "metadata": llama.metadata}, sys.stdout)


def _rendered(llama: Llama, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation by the file's template and tokenizer."""

    def text(number: int) -> str:
        return llama.detokenize([number], special=True).decode() if number >= 0 else ""

    formatter = Jinja2ChatFormatter(
        llama.metadata["tokenizer.chat_template"],
        eos_token=text(llama.token_eos()),
        bos_token=text(llama.token_bos()),
        add_generation_prompt=True,
    )
    given: Any = messages
    return llama.tokenize(formatter(messages=given).prompt.encode(), add_bos=False, special=True)


def _greedy(llama: Llama, prompt: list[int], tokens: int) -> list[int]:
    llama.reset()
    generated = llama.generate(prompt, temp=0.0, top_k=1, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
    return list(itertools.islice(generated, tokens))


if __name__ == "__main__":
    main()
