"""The one function that turns a record into tokens, for training, scoring and sampling alike.

The chat template is rendered around placeholders, so that its own markers and the texts of people are tokenised apart:
text can't produce control tokens, and a prefix of a conversation is a prefix of its tokens. Whatever a template
puts after
a completion's end token is dropped.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from perlhf.config.stages import EncodingConfig
from perlhf.data.records import Message, Text, Tools, content_of
from perlhf.errors import ConfigError, DataError
from perlhf.method.packing import Tokens, completed

CUT_PARTS = 8
"""A long prompt loses whole parts of `max_tokens`."""
_SLOT = "PERLHFSLOT{:06d}X"
_SLOTS = re.compile(r"PERLHFSLOT(\d{6})X")


@dataclass(frozen=True)
class Example:
    """A prompt and a completion as token ids; the completion ends with the end token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    cut: int = 0
    """Tokens cut from the start of the prompt."""

    @property
    def tokens(self) -> Tokens:
        """Prompt and completion in one sequence."""
        return completed(self.prompt, self.completion)


class TooLong(DataError):
    """A completion that alone exceeds `encoding.max_tokens`."""


class Encoder:
    """Tokens of prompts and completions under one `EncodingConfig`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig):
        self.tokenizer, self.config = tokenizer, config
        self.max_tokens = min(config.max_tokens, tokenizer.model_max_length)
        self._template = _template(tokenizer, config.template)
        self._text_ids = lru_cache(maxsize=100_000)(self._tokenise_text)
        self._markup_ids = lru_cache(maxsize=10_000)(self._tokenise_markup)
        self.end_id = self._end_token()
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id

    def prompt(self, text: Text, tools: Tools | None = None) -> list[int]:
        """Ids of a prompt, up to where the completion starts."""
        if isinstance(text, str) and self._template is None and self.config.system is None:
            return list(self._text_ids(text))
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        if self.config.system is not None and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self.config.system}, *messages]
        rendered = self._render(tuple(m["role"] for m in messages), generation=True)
        return self._fill(rendered, messages)

    def completion(self, text: Text) -> list[int]:
        """Ids of a completion, end token included."""
        if not isinstance(text, str):
            if len(text) != 1:
                raise DataError(f"a completion of {len(text)} messages", allowed="a string or one assistant message")
            text = content_of(text[0])
        space = " " if self._template is None else ""
        return [*self._text_ids(space + text), self.end_id]

    def examples(
        self, prompt: Text, completions: Sequence[Text], where: str = "", tools: Tools | None = None
    ) -> list[Example]:
        """Each completion with the prompt, whose start is cut alike for all so that the longest fits in `max_tokens`.

        A cut takes whole eighths of `max_tokens` where that leaves half of the room, so that the next turns of a
        conversation are cut at the same place and share their beginning.

        Raises:
            TooLong: a completion leaves no room for a token of prompt.
        """
        ids, answers = self.prompt(prompt, tools), [self.completion(completion) for completion in completions]
        room = self.max_tokens - max(map(len, answers))
        if room < 1:
            limit = "encoding.max_tokens" if self.max_tokens == self.config.max_tokens else "the base's context"
            raise TooLong(
                f"completion of {max(map(len, answers))} tokens does not fit",
                where=where or None,
                allowed=f"{limit} = {self.max_tokens}, of which one must stay for the prompt",
                hint="raise encoding.max_tokens, or set encoding.drop_long: true to drop and count such records",
            )
        cut = max(0, len(ids) - room)
        step = max(1, self.max_tokens // CUT_PARTS)
        rounded = -(-cut // step) * step
        if len(ids) - rounded >= max(1, room // 2):
            cut = rounded
        return [Example(tuple(ids[cut:]), tuple(answer), cut) for answer in answers]

    def example(self, prompt: Text, completion: Text, where: str = "") -> Example:
        """One prompt and completion (`examples`)."""
        return self.examples(prompt, [completion], where)[0]

    def cut_prompt(self, text: Text, max_completion_tokens: int, tools: Tools | None = None) -> list[int]:
        """Ids of a prompt whose start is cut so that `max_completion_tokens` still fit."""
        ids = self.prompt(text, tools)
        room = self.max_tokens - max_completion_tokens
        if room < 1:
            raise ConfigError(
                f"max_completion_tokens {max_completion_tokens} leaves no room for a prompt",
                where="encoding.max_tokens",
                allowed=f"more than {max_completion_tokens}",
            )
        return ids[max(0, len(ids) - room) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion, end token left out."""
        tokens = [i for i in ids if i != self.end_id]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip()

    def identity(self) -> dict[str, str | int | bool | None]:
        """What must agree between training and scoring; saved with every adapter."""
        template = self._template or "plain"
        return {
            **self.config.model_dump(),
            "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "end_token": str(self.tokenizer.convert_ids_to_tokens(self.end_id)),
        }

    def _render(self, roles: tuple[str, ...], generation: bool) -> str:
        messages = [{"role": role, "content": _SLOT.format(i)} for i, role in enumerate(roles)]
        if self._template is None:
            body = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
            return body + ("assistant:" if generation else "")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self._template, tokenize=False, add_generation_prompt=generation
                )
            )
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses the roles {', '.join(roles)}: {error}",
                where="encoding.template",
                allowed="a template that takes these roles",
                hint="set encoding.template: plain, or name a Jinja file",
            ) from error

    def _fill(self, rendered: str, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        parts = _SLOTS.split(rendered)
        for number, part in enumerate(parts):
            if number % 2:
                ids.extend(self._text_ids(messages[int(part)]["content"]))
            elif part:
                ids.extend(self._markup_ids(part))
        return ids

    def _tokenise_text(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(encoded["input_ids"])  # pyright: ignore[reportArgumentType]

    def _tokenise_markup(self, text: str) -> tuple[int, ...]:
        encoded = self.tokenizer(text, add_special_tokens=False)
        return tuple(encoded["input_ids"])  # pyright: ignore[reportArgumentType]

    def _end_token(self) -> int:
        """The control token that the template puts after an assistant's content, else the tokenizer's end token."""
        eos = self.tokenizer.eos_token_id
        if self._template is not None:
            rendered = self._render(("user", "assistant"), generation=False)
            after = _SLOTS.split(rendered)[-1]
            special = set(self.tokenizer.all_special_ids)
            endings = [i for i in self._markup_ids(after) if i in special] if after else []
            if endings:
                return endings[0]
        if eos is None:
            raise ConfigError(
                "the tokenizer has no end token", where="base", hint="set eos_token in its tokenizer_config.json"
            )
        return int(eos)  # pyright: ignore[reportArgumentType]


def _template(tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    """Jinja text, or None for `plain`."""
    if name == "plain":
        return None
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise ConfigError(
                "the base's tokenizer has no chat template",
                where="encoding.template",
                allowed="plain, or the path of a Jinja file",
                hint="encoding.template: plain",
            )
        return str(tokenizer.chat_template)
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"can't read the template '{name}': {why}",
            where="encoding.template",
            allowed="tokenizer, plain, or the path of a Jinja file",
        ) from error
