"""Talks with a policy, an SFT run or the bare base; answers appear token by token."""

import sys
from collections.abc import Sequence

from perlhf.config.commands import ChatConfig
from perlhf.config.stages import DEFAULT_BASE, EncodingConfig, PolicyConfig
from perlhf.data.records import Message
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import end_ids, load_tokenizer, vocabulary
from perlhf.model.encoding.encode import Encoder
from perlhf.model.encoding.templates import plain_template
from perlhf.model.model import Model
from perlhf.model.open import Given, read_run
from perlhf.rollout.local import Ends, stream, uniforms

EXIT, NEW = "/exit", "/new"
TEMPERATURE = 0.7
"""Of answers by what wasn't trained at one."""


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
    model, encoder, adapter, stop, temperature = _open(config)
    ends = Ends.of(encoder, stop)
    messages: list[Message] = []
    if config.message is not None:
        return _answered(model, ends, adapter, [{"role": "user", "content": config.message}], config, temperature)
    if sys.stdin.isatty():
        import readline  # noqa: F401 -- gives `input` editing and history

        print(f"{EXIT} or Ctrl-D ends, {NEW} starts again, Ctrl-C stops an answer", file=sys.stderr)
    while (line := _line()) is not None:
        if line == NEW:
            messages = []
        elif line:
            messages = _answered(
                model, ends, adapter, [*messages, {"role": "user", "content": line}], config, temperature
            )
    return messages


def _open(config: ChatConfig) -> tuple[Model, Encoder, str | None, tuple[str, ...], float]:
    """The network, an encoder with the whole context to talk in, the adapter's name, what ends answers, temperature."""
    stop, temperature = config.stop, TEMPERATURE
    if config.run is None:
        base, adapter = Base.find(config.base or DEFAULT_BASE), None
        tokenizer = load_tokenizer(base)
        model = Model.load(base, device=config.device, vocabulary=vocabulary(tokenizer))
        ends: Sequence[int] = end_ids(base)
        encoding = EncodingConfig(template="tokenizer" if tokenizer.chat_template else plain_template(tokenizer))
    else:
        run = read_run(config.run, ("policy", "sft"), Given(config.base, accept_changes=config.accept_changes))
        run.check()
        if isinstance(run.config, PolicyConfig):
            stop, temperature = stop or run.config.stop, run.config.temperature
        model, encoder = run.open(config.device)
        adapter, tokenizer, encoding, ends = run.stage, encoder.tokenizer, encoder.config, encoder.end_ids
    context = model.longest or getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    changes = {"max_tokens": max(encoding.max_tokens, context or 0)}
    if config.system is not None:
        changes |= {"system": config.system}
    if config.temperature is not None:
        temperature = config.temperature
    return model, Encoder(tokenizer, encoding.model_copy(update=changes), ends), adapter, stop, temperature


def _line() -> str | None:
    """The next line of the user's; None at the end."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line == EXIT else line


def _answered(
    model: Model, ends: Ends, adapter: str | None, messages: list[Message], config: ChatConfig, temperature: float
) -> list[Message]:
    """The messages and the answer to them, which is printed as it grows."""
    encoder = ends.encoder
    assert encoder is not None
    prompt = encoder.cut_prompt(messages, config.max_completion_tokens)
    draws = uniforms(config.seed, len(messages), [0], 1, config.max_completion_tokens)[0]
    ids: list[int] = []
    shown = ""
    try:
        for token in stream(model, prompt, adapter, draws, ends, temperature):
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
