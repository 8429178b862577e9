"""Win rate by a larger model, asked in both orders (PAPER.md section 1; after Lee et al., arXiv 2309.00267).

The judge is any service with OpenAI's chat completions interface; its key, if it needs one, is PERLHF_JUDGE_KEY.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from perlhf.config.addresses import JUDGE_KEY, check_address, filled, shown
from perlhf.data.records import Text, text_of
from perlhf.errors import DataError, ServiceError
from perlhf.system.http import Service, post_all

Outcome = Literal["win", "tie", "loss"]

MAX_ANSWER_TOKENS = 1024
"""The answer is one character; the room is for services that think first and return the answer alone."""

TEMPLATE = """\
Compare two replies to the same conversation. The better reply does more of what the user needs: it is correct, \
relevant, harmless and no longer than it has to be. The order in which the replies are shown means nothing.

<conversation>
{prompt}
</conversation>

<reply_1>
{first}
</reply_1>

<reply_2>
{second}
</reply_2>

Which reply is better? Answer with the single character 1 or 2 and nothing else."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge said of each pair in order; `unparsable` counts answers (two a pair) that were neither 1 nor 2."""

    outcomes: tuple[Outcome, ...]
    unparsable: int

    @property
    def points(self) -> NDArray[np.float64]:
        """[n]: 1 for a win of the first completion, 0.5 for a tie, 0 for a loss; their mean is the win rate."""
        return np.array([{"win": 1.0, "tie": 0.5, "loss": 0.0}[outcome] for outcome in self.outcomes])


def judge(
    prompts: Sequence[Text],
    firsts: Sequence[str],
    seconds: Sequence[str],
    address: str,
    model: str,
    *,
    timeout_seconds: float = 60.0,
    attempts: int = 4,
    backoff_seconds: float = 1.0,
    at_once: int = 4,
) -> Judgement:
    """Asks which completion is better, in both orders, and says how the first ones fared.

    Preferred in both orders is a win, in one a tie, in none a loss. An unparsable answer is no preference: it can't be
    part of a win or of a loss, so its pair is a tie.

    Args:
        prompts, firsts, seconds: [n] each; `firsts[i]` and `seconds[i]` answer `prompts[i]`.
        address: base address of the service (`http://localhost:8000/v1`) or its full `.../chat/completions`.
        model: name that the service knows the judge by.
        timeout_seconds, attempts, backoff_seconds, at_once: as in `perlhf.system.http.post_all`.

    Raises:
        ConfigError: no http(s) address, one that holds a secret, or an unusable key.
        DataError: unequal lengths, or nothing to judge.
        ServiceError: the service failed after all attempts; no further request is started.
    """
    if not len(prompts) == len(firsts) == len(seconds) or not prompts:
        raise DataError(
            f"{len(prompts)} prompts, {len(firsts)} first and {len(seconds)} second completions",
            allowed="as many of each, above 0",
        )
    check_address(address, JUDGE_KEY)
    before, question, query = address.partition("?")
    path = before.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    url, hidden = filled(path + question + query)
    service = Service(url, shown(path), os.environ.get(JUDGE_KEY), JUDGE_KEY, hidden, "judge_timeout_seconds")

    def asked(prompt: Text, shown_first: str, shown_second: str) -> dict[str, object]:
        content = TEMPLATE.format(prompt=text_of(prompt), first=shown_first, second=shown_second)
        messages = [{"role": "user", "content": content}]
        return {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_ANSWER_TOKENS}

    bodies = list(map(asked, [*prompts, *prompts], [*firsts, *seconds], [*seconds, *firsts]))
    replies = post_all(
        service, bodies, timeout_seconds=timeout_seconds, attempts=attempts, backoff_seconds=backoff_seconds,
        at_once=at_once,
    )  # fmt: skip
    answers: list[Literal[1, 2] | None] = [parse_answer(_content(reply, service.shown)) for reply in replies]
    orders = zip(answers[: len(prompts)], answers[len(prompts) :], strict=True)
    return Judgement(tuple(_outcome(forward, backward) for forward, backward in orders), answers.count(None))


def parse_answer(text: str | None) -> Literal[1, 2] | None:
    """1 or 2 if that is all the judge said, white space aside; else None."""
    match (text or "").strip():
        case "1":
            return 1
        case "2":
            return 2
        case _:
            return None


def _outcome(forward: Literal[1, 2] | None, backward: Literal[1, 2] | None) -> Outcome:
    """`forward` showed the first completion as reply 1, `backward` as reply 2."""
    if (forward, backward) == (1, 2):
        return "win"
    return "loss" if (forward, backward) == (2, 1) else "tie"


def _content(answer: object, where: str) -> str | None:
    """The text of a chat completion; None when the model returned none."""
    match answer:
        case {"choices": [{"message": Mapping() as message}, *_]}:
            content = message.get("content")
            return content if isinstance(content, str) else None
        case _:
            raise ServiceError(
                "the answer is no chat completion", where=where, allowed='{"choices": [{"message": {"content": ...}}]}'
            )
