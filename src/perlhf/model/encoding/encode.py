"""The one function that turns a record into tokens, for training, scoring and sampling alike.

A prompt's ids are those of transformers' `apply_chat_template` (chat_template.py), and a completion's are what the
template adds to them once it is answered, up to the end token that closes the last of its turns.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from perlhf.config.stages import EncodingConfig
from perlhf.data.records import Message, Text, Tools, content_of
from perlhf.errors import ConfigError, DataError
from perlhf.method.packing import Span, Tokens
from perlhf.model.encoding.chat_template import ChatTemplate
from perlhf.model.encoding.templates import TEXT_ROLE
from perlhf.system.console import note

THOUGHT = "<think>"
CUT_PARTS = 8
"""A long prompt loses whole parts of `max_tokens`."""


@dataclass(frozen=True)
class Example:
    """A prompt and a completion as token ids; the completion ends with the end token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    cut: int = 0
    """Tokens cut from the start of the prompt."""
    turns: tuple[Span, ...] = ()
    """Where the assistant's turns lie in a completion of several messages; none where it is one turn as a whole."""

    @property
    def tokens(self) -> Tokens:
        """Prompt and completion in one sequence; of several turns the assistant's are completions."""
        assert self.prompt, "a completion needs a token to be predicted from"
        before = len(self.prompt)
        turns = self.turns or ((0, len(self.completion)),)
        return Tokens((*self.prompt, *self.completion), tuple((before + start, length) for start, length in turns))


class TooLong(DataError):
    """A completion that alone exceeds `encoding.max_tokens`."""


class Encoder:
    """Tokens of prompts and completions under one `EncodingConfig`.

    Args:
        network_ends: ids that the network itself ends an answer with (`model.base.end_ids`); each of them ends a
            completion that is sampled, beside the one that completions are trained to end with.
        untrained: tokens that the network never learned (`model.bases.untrained`); of each that is met, it is told.
        remembers: whether ids of texts are kept for when they come again, as those of records do.

    Raises:
        ConfigError: a template that isn't there.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: EncodingConfig,
        network_ends: Sequence[int] = (),
        untrained: Mapping[int, str] | None = None,
        *,
        remembers: bool = True,
    ):
        self.tokenizer, self.config = tokenizer, config
        self._untrained = dict(untrained or {})
        self._told: set[str] = set()
        self.max_tokens = min(config.max_tokens, tokenizer.model_max_length)
        own_limit = tokenizer.init_kwargs.get("model_max_length") or self.max_tokens
        if own_limit < self.max_tokens:
            self._tell(
                f"the tokenizer names a limit of {own_limit} tokens (model_max_length), the network takes more: "
                f"encoding.max_tokens = {config.max_tokens} holds"
            )
        self.chat = ChatTemplate(tokenizer, config, self._tell, remembers=remembers)
        self.end_id = self.chat.end_id
        ends = [self.end_id, tokenizer.eos_token_id, *network_ends]
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys(int(end) for end in ends if isinstance(end, int)))
        """All ids that end a completion, the trained one first."""
        self.call_end_id = next((end for end in self.chat.added_after_call() if end in self.end_ids), self.end_id)
        """What a completion that calls a tool ends with; seldom another one."""
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id

    def prompt(self, text: Text, tools: Tools | None = None) -> list[int]:
        """Ids of a prompt, up to where the completion starts; one that ends with an assistant's turn is gone on with.

        Raises:
            DataError: the template refuses it, or leaves out what it says.
        """
        messages = self._messages(text)
        self.chat.check(messages, tools)
        ids = self.chat.ids(messages, _ending(messages), tools)
        self._check_trained(ids)
        return ids

    def examples(
        self, prompt: Text, completions: Sequence[Text], where: str = "", tools: Tools | None = None
    ) -> list[Example]:
        """Each completion with the prompt, whose start is cut alike for all so that the longest fits in `max_tokens`.

        A cut takes whole eighths of `max_tokens` where that leaves half of the room, so that the next turns of a
        conversation are cut at the same place and share their beginning.

        Raises:
            TooLong: a completion leaves no room for a token of prompt.
            DataError: the template refuses the conversation, or leaves out what it says.
        """
        try:
            messages = self._messages(prompt)
            self.chat.check(messages, tools)
            ids = self.chat.ids(messages, _ending(messages), tools)
            answers = [self._answer(messages, ids, completion, tools) for completion in completions]
        except DataError as error:
            raise DataError(error.what, where=where or error.where, allowed=error.allowed, hint=error.hint) from error
        self._check_trained(ids, *(answer for answer, _ in answers))
        longest = max(len(answer) for answer, _ in answers)
        room = self.max_tokens - longest
        if room < 1:
            limit = "encoding.max_tokens" if self.max_tokens == self.config.max_tokens else "the base's context"
            raise TooLong(
                f"completion of {longest} tokens does not fit",
                where=where or None,
                allowed=f"{limit} = {self.max_tokens}, of which one must stay for the prompt",
                hint="raise encoding.max_tokens, or set encoding.drop_long: true to drop and count such records",
            )
        cut = max(0, len(ids) - room)
        step = max(1, self.max_tokens // CUT_PARTS)
        rounded = -(-cut // step) * step
        if len(ids) - rounded >= max(1, room // 2):
            cut = rounded
        return [Example(tuple(ids[cut:]), tuple(answer), cut, turns) for answer, turns in answers]

    def example(self, prompt: Text, completion: Text, where: str = "", tools: Tools | None = None) -> Example:
        """One prompt and completion (`examples`)."""
        return self.examples(prompt, [completion], where, tools)[0]

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
        """Text of a completion, end tokens left out."""
        tokens = [i for i in ids if i not in self.end_ids]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip()

    def identity(self) -> dict[str, Any]:
        """What must agree between training and scoring; saved with every adapter."""
        template = "plain" if self.config.template == "plain" else self.chat.text
        return {
            **self.config.model_dump(),
            "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "end_token": str(self.tokenizer.convert_ids_to_tokens(self.end_id)),
        }

    def _messages(self, text: Text) -> list[Message]:
        if isinstance(text, str):
            as_it_is = self.chat.is_plain and self.config.system is None
            messages: list[Message] = [{"role": TEXT_ROLE if as_it_is else "user", "content": text}]
        else:
            messages = list(text)
        if self.config.system is not None and not (messages and messages[0]["role"] in ("system", "developer")):
            messages = [{"role": "system", "content": self.config.system}, *messages]
        if not messages:
            raise DataError("a prompt without messages", allowed="at least one message")
        return messages

    def _answer(
        self, messages: Sequence[Message], prompt: Sequence[int], completion: Text, tools: Tools | None
    ) -> tuple[list[int], tuple[Span, ...]]:
        """Ids of a completion after its prompt, and where the assistant's turns lie in them (`Example.turns`)."""
        before, answer = _joined(messages, completion)
        self.chat.check([*before, *answer], tools)
        whole = self.chat.ids([*before, *answer], "closed", tools)
        turns: list[Span] = []
        for number, message in enumerate(answer):
            if message["role"] != "assistant":
                continue
            earlier = [*before, *answer[:number]]
            begin = prompt if number == 0 else self.chat.ids(earlier, "answer", tools)
            if whole[: len(begin)] != begin:
                return self._tokenised_apart(messages, before, answer, tools), ()
            if number < len(answer) - 1:
                stop = self._end_of_earlier_turn(whole, len(begin), [*earlier, message], answer[number + 1 :], tools)
            else:
                whole, stop = self._ended(whole, len(begin))
            turns.append((len(begin) - len(prompt), stop - len(begin)))
        last_start, last_length = turns[-1]
        ids = whole[len(prompt) : len(prompt) + last_start + last_length]
        return ids, tuple(turns) if len(answer) > 1 else ()

    def _ended(self, whole: list[int], begin: int) -> tuple[list[int], int]:
        """A conversation whose last turn ends with an end token, and the place after that."""
        ends = [at for at in range(begin, len(whole)) if whole[at] == self.end_id]
        # Reasoning may have an end of its own before the answer. Without ours, another of the network's own closes the
        # turn, such as the one after a call.
        others = [at for at in range(begin, len(whole)) if whole[at] in self.end_ids]
        for at in [*ends, *others]:
            if not self.decode(whole[at + 1 :]):
                return whole, at + 1
        if ends:
            return whole, ends[0] + 1
        return [*whole, self.end_id], len(whole) + 1

    def _end_of_earlier_turn(
        self,
        whole: Sequence[int],
        begin: int,
        turn: Sequence[Message],
        later: Sequence[Message],
        tools: Tools | None,
    ) -> int:
        """Where the assistant's turn that is the last one of `turn` ends in a conversation that goes on with `later`.

        It is after the last end token before the next message's content: reasoning and calls may be messages of their
        own to a template, each with its end.
        """
        other = {**later[0], "content": "0" if content_of(later[0]).startswith("1") else "1"}
        try:
            limit = _common(whole, self.chat.ids([*turn, other, *later[1:]], "closed", tools))
        except DataError:
            limit = len(whole)
        closed = _common(whole, self.chat.ids(turn, "closed", tools))
        if limit == len(whole):
            limit = closed + 1
        ends = {*self.end_ids, self.chat.earlier_end_id}
        last = next((at for at in range(min(limit, len(whole)) - 1, begin - 1, -1) if whole[at] in ends), None)
        return min(closed, limit) if last is None else last + 1

    def _tokenised_apart(
        self, messages: Sequence[Message], before: Sequence[Message], answer: Sequence[Message], tools: Tools | None
    ) -> list[int]:
        """Ids of a completion where the template, or the tokenizer, makes something else of its prompt afterwards."""
        closed = self.chat.rendered([*before, *answer], "closed", tools)
        opened = self.chat.rendered(messages, _ending(messages), tools)
        goes_on = closed.startswith(opened)
        if len(answer) > 1:
            raise DataError(
                "the tokenizer joins the end of earlier turns with what follows them"
                if goes_on
                else "the chat template writes earlier turns differently once there are later ones",
                allowed="a completion of one turn",
                hint="learn from each turn as a record of its own",
            )
        self._tell(
            "the tokenizer joins the end of prompts with what follows: completions are tokenised by themselves"
            if goes_on
            else "the chat template writes prompts differently once they are answered: completions stand after them"
        )
        text, header = content_of(answer[0]), self.chat.header(messages, tools)
        begin = len(opened) if goes_on else _answer_begins(closed, header, text)
        typed = self.chat.control_token_in(answer)
        if begin is not None and not typed:
            whole, until = self.chat.tokenised(closed), self.chat.tokenised(closed[:begin])
            joined = whole[: len(until)] != until
            ids = self.chat.tokenised_after(closed[begin:], rendered=True) if joined else whole[len(until) :]
            return ids[: ids.index(self.end_id) + 1] if self.end_id in ids else [*ids, self.end_id]
        keys = ", ".join(sorted(answer[0].keys() - {"role", "content"}))
        switch = self.chat.switch_for(messages, before, answer, tools) if keys or THOUGHT in text else None
        if keys:
            raise DataError(
                f"the chat template doesn't say where a completion with {keys} begins",
                allowed="text alone",
                hint=f"with `encoding.template_kwargs: {{{switch}}}` prompts end where such completions begin"
                if switch
                else None,
            )
        if before != messages:
            text = text[len(content_of(messages[-1])) :]
        elif opened.rstrip().endswith(THOUGHT) and text.lstrip().startswith(THOUGHT):  # the prompt begins it already
            text = text.lstrip().removeprefix(THOUGHT)
            text = text.lstrip("\n") if opened.endswith("\n") else text
        elif switch and text.lstrip().startswith(THOUGHT):
            self._tell(
                "completions begin a thought, and prompts end with one already: "
                f"`encoding.template_kwargs: {{{switch}}}` leaves theirs alone"
            )
        elif begin is not None and (at := closed.find(text.strip(), begin)) >= 0:
            text = closed[begin:at] + text.lstrip() if closed[begin:at].isspace() else text
        return [*self.chat.tokenised_after(text, rendered=False), self.end_id]

    def _check_trained(self, *sequences: Sequence[int]) -> None:
        """Tells of each token that is used and that the network never learned."""
        met = self._untrained.keys() & {number for ids in sequences for number in ids} if self._untrained else ()
        for number in sorted(met):
            token = self.tokenizer.convert_ids_to_tokens(number)
            self._tell(
                f"records or their template use {token!r} ({number}), which the base never learned: its embedding "
                f"{self._untrained[number]}, and no adapter trains it"
            )

    def _tell(self, sentence: str) -> None:
        """Says it once, on standard error."""
        if sentence not in self._told:
            self._told.add(sentence)
            note(sentence)


def _ending(messages: Sequence[Message]) -> Any:
    """How a prompt ends: an assistant's turn is gone on with, after all others an answer is to come."""
    return "unfinished" if messages[-1]["role"] == "assistant" else "answer"


def _answer_begins(closed: str, header: str, content: str) -> int | None:
    """Where the last answer begins in a closed conversation: after the header, and before spaces of the template's own.

    None where no header stands before it, such as for an answer that the template writes otherwise.
    """
    words, content = header.rstrip(), content.strip()
    at = closed.rfind(content) if words and content else -1
    while at >= 0:
        before = closed[:at].rstrip()
        if before.endswith(words):
            spaces = header[len(words) :]
            return len(before) + len(spaces) if closed[len(before) : at].startswith(spaces) else at
        at = closed.rfind(content, 0, at + len(content) - 1)
    return None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _joined(messages: Sequence[Message], completion: Text) -> tuple[Sequence[Message], list[Message]]:
    """The messages before the completion, and its own; an assistant's turn that it goes on with is the first of them.

    Raises:
        DataError: it doesn't begin and end with an assistant's message.
    """
    answer: list[Message] = (
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    )
    if not answer or not answer[0]["role"] == answer[-1]["role"] == "assistant":
        roles = ", ".join(message["role"] for message in answer) or "nothing"
        raise DataError(
            f"a completion of {roles}", allowed="text, or messages of which the first and the last are the assistant's"
        )
    if messages[-1]["role"] != "assistant":
        return messages, answer
    begun = messages[-1]
    first = {**begun, **answer[0], "content": content_of(begun) + content_of(answer[0])}
    return messages[:-1], [first, *answer[1:]]
