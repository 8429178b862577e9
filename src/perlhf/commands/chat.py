"""Talks with a policy, an SFT run or the bare base; answers appear token by token."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from perlhf.config.commands import ChatConfig
from perlhf.data.records import Message
from perlhf.model.encoding.encode import Encoder
from perlhf.model.finished import Given, read_run
from perlhf.model.model import Model
from perlhf.rollout.local import Ends, stream, uniforms
from perlhf.serving.models import BASE, Models, Speaker

EXIT, NEW = "/exit", "/new"


def chat(config: ChatConfig) -> list[Message]:
    """Answers `config.message`, or else every line of standard input until /exit or its end (Ctrl-D).

    The conversation so far is the prompt of each answer; /new forgets it. Ctrl-C stops an answer.

    Returns:
        The conversation.

    Raises:
        RunError: no finished policy or SFT run.
        ConfigError: `max_completion_tokens` leaves no room in the network's context.
        ModelError, AdapterError: as the parts say.
    """
    model, speaker = _open(config)
    messages: list[Message] = []
    if config.message is not None:
        return _answered(model, speaker, [{"role": "user", "content": config.message}], config)
    if sys.stdin.isatty():
        import readline  # noqa: F401 -- gives `input` editing and history

        print(f"{EXIT} or Ctrl-D ends, {NEW} starts again, Ctrl-C stops an answer", file=sys.stderr)
    while (line := _line()) is not None:
        if line == NEW:
            messages = []
        elif line:
            messages = _answered(model, speaker, [*messages, {"role": "user", "content": line}], config)
    return messages


def _open(config: ChatConfig) -> tuple[Model, Speaker]:
    """The network with the run's adapter, and who answers."""
    runs: dict[str, Path] = {}
    if config.run is not None:
        read_run(config.run, ("policy", "sft"), Given(config.base, accept_changes=config.accept_changes))
        runs["run"] = config.run
    models = Models(runs, config.base, config.device, accept_changes=config.accept_changes)
    found = models.begin("run" if runs else BASE, Speaker)
    assert isinstance(found, Speaker)
    changes: dict[str, Any] = {}
    if config.system is not None:
        encoder = found.encoder
        encoding = encoder.config.model_copy(update={"system": config.system})
        changes["encoder"] = Encoder(encoder.tokenizer, encoding, encoder.end_ids)
    if config.temperature is not None:
        changes["temperature"] = config.temperature
    return models.model, replace(found, stop=config.stop or found.stop, **changes)


def _line() -> str | None:
    """The next line of the user's; None at the end."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line == EXIT else line


def _answered(model: Model, speaker: Speaker, messages: list[Message], config: ChatConfig) -> list[Message]:
    """The messages and the answer to them, which is printed as it grows."""
    encoder = speaker.encoder
    ends, adapter = Ends.of(encoder, speaker.stop), next(iter(speaker.adapters), None)
    prompt = encoder.cut_prompt(messages, config.max_completion_tokens)
    draws = uniforms(config.seed, len(messages), [0], 1, config.max_completion_tokens)[0]
    ids: list[int] = []
    shown = ""
    try:
        for token in stream(model, prompt, adapter, draws, ends, speaker.temperature):
            ids.append(token)
            text = encoder.decode(ids).rstrip("\ufffd")  # half a character waits for its other half,
            shown = _show(ends.settled(text), shown)  # and what may begin a stop string for the rest of it
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    answer = ends.text(ids)
    _show(answer, shown)
    print(flush=True)
    return [*messages, {"role": "assistant", "content": answer}]


def _show(text: str, shown: str) -> str:
    """Prints what `text` adds to `shown`; control characters, which could take the terminal over, are left out."""
    added = text[len(shown) :] if text.startswith(shown) else ""
    print("".join(sign for sign in added if sign.isprintable() or sign in "\n\t"), end="", flush=True)
    return shown + added
