"""What in a completion moved its score: the score without each sentence, and the score as it grows token by token.

Leaving out is the honest measure: it says what this reward model would have said. It sees no sentence that matters only
together with another, and a completion without one of its sentences may be a text that nobody writes. The scores along
the tokens cost no more than one scoring, and say where the score changed, which may be later than what changed it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from perlhf.data.records import Message, Text, Tools
from perlhf.errors import DataError
from perlhf.method.packing import Packing, batches
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.rollout.local import check_finite
from perlhf.rollout.scorers import score_batches

_SENTENCE = re.compile(r".+?(?:[.!?…。！？]+[\"'”’)\]]*(?=\s|$)\s*|\n+\s*|$)", re.S)
MOST_SENTENCES = 200
"""Of one completion: the rest of a longer one is its last sentence."""


@dataclass(frozen=True)
class Sentence:
    """A part of a completion."""

    text: str
    effect: float | None
    """The score minus the score without it: what it adds. None where nothing would be left."""


@dataclass(frozen=True)
class Explanation:
    """Of one completion's score."""

    score: float
    sentences: list[Sentence]
    tokens: list[tuple[str, float]]
    """Each token and the score of the completion if it ended there."""

    @property
    def worst(self) -> int | None:
        """Number of the sentence that adds least to the score, or takes most; None where there is one alone.

        Nearly every sentence adds something to a short answer: which one adds least is what tells.
        """
        effects = [(s.effect, i) for i, s in enumerate(self.sentences) if s.effect is not None]
        return min(effects)[1] if effects else None

    def row(self) -> dict[str, Any]:
        """As JSON."""
        said = [{"text": sentence.text, "effect": sentence.effect} for sentence in self.sentences]
        return {"sentences": said, "tokens": [list(pair) for pair in self.tokens]}


def mean_explanation(members: Sequence[Explanation | None]) -> Explanation | None:
    """What moved the mean of several models' scores of one completion: effects are differences, so their means. The
    models have one tokenizer; None where the completion doesn't fit.
    """
    whole = [explanation for explanation in members if explanation is not None]
    if not whole:
        return None
    parts = zip(*(explanation.sentences for explanation in whole), strict=True)
    effects = [(same[0].text, [one.effect for one in same if one.effect is not None]) for same in parts]
    along = zip(*(explanation.tokens for explanation in whole), strict=True)
    return Explanation(
        fmean(explanation.score for explanation in whole),
        [Sentence(text, fmean(found) if found else None) for text, found in effects],
        [(same[0][0], fmean(score for _, score in same)) for same in along],
    )


def sentences(text: str) -> list[str]:
    """The text in parts that end with a full stop, question or exclamation mark before white space, or with a line;
    white space stays with what it follows, so that the parts joined are the text.
    """
    parts: list[str] = []
    for found in _SENTENCE.findall(text):
        if parts and (not parts[-1].strip() or not found.strip() or len(parts) == MOST_SENTENCES):
            parts[-1] += found
        else:
            parts.append(found)
    return parts


@torch.no_grad()
def explain(
    model: Model,
    encoder: Encoder,
    asked: Sequence[tuple[Text, Text, Tools | None]],
    adapter: str,
    max_tokens: int,
    packing: Packing,
    done: Callable[[], None] = lambda: None,
) -> list[Explanation | None]:
    """Explains the scores of completions.

    Args:
        asked: prompt, completion and tools of each.
        adapter: of the reward.
        max_tokens: computed tokens in one forward pass; a completion's variants share what they begin with.
        done: called after each completion.

    Returns:
        None for a completion that doesn't fit.
    """
    return [_explained(model, encoder, one, adapter, max_tokens, packing, done) for one in asked]


def _explained(
    model: Model,
    encoder: Encoder,
    asked: tuple[Text, Text, Tools | None],
    adapter: str,
    max_tokens: int,
    packing: Packing,
    done: Callable[[], None],
) -> Explanation | None:
    prompt, completion, tools = asked
    parts = sentences(_text(completion))
    variants = [_with_text(completion, "".join(parts[:i] + parts[i + 1 :]).strip()) for i in range(len(parts))]
    kept = [i for i, variant in enumerate(variants) if _text(variant)]
    try:
        examples = encoder.examples(prompt, [completion, *(variants[i] for i in kept)], tools=tools)
    except DataError:
        return None
    finally:
        done()
    laid_out = batches([[example.tokens] for example in examples], max_tokens, packing, model.device)
    score, *others = (line[0] for line in score_batches(model, laid_out, adapter))
    effects: dict[int, float] = dict(zip(kept, (score - other for other in others), strict=True))
    (batch,) = batches([[examples[0].tokens]], max_tokens, packing, model.device)
    places = torch.tensor(batch.places(0)[len(examples[0].prompt) :], device=model.device)
    along = model.scores_at(batch, adapter, places)
    check_finite(model, adapter, along, "scores")
    texts = [str(encoder.tokenizer.decode([token])) for token in examples[0].completion]
    tokens = list(zip(texts, along.tolist(), strict=True))
    return Explanation(score, [Sentence(part, effects.get(i)) for i, part in enumerate(parts)], tokens)


def _text(completion: Text) -> str:
    """What is explained: of several messages, the last one's."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


def _with_text(completion: Text, text: str) -> Text:
    if isinstance(completion, str):
        return text
    last: Message = {**completion[-1], "content": text}
    return [*completion[:-1], last]
