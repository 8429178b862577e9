"""Scores of answers by the reward runs that are served: as `perlhf score` gives them, whatever else is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from perlhf.data.records import Text, Tools
from perlhf.errors import DataError
from perlhf.evaluation.explain import explain, mean_explanation
from perlhf.method.packing import batches
from perlhf.model.model import Model
from perlhf.rollout.ensemble import passes
from perlhf.rollout.scorers import score_members
from perlhf.serving.engine import Refused
from perlhf.serving.models import Judge
from perlhf.serving.openai.requests import Keys, conversation

MOST_ANSWERS = 256
AT_ONCE = 8
"""Answers of one job, so that streams go on between two of them."""


@dataclass(frozen=True)
class Scoring:
    """A request of `/v1/score` or `/v1/rerank`, checked."""

    models: tuple[str, ...]
    prompt: Text
    answers: tuple[Text, ...]
    explain: bool = False
    tools: Tools | None = None
    top: int | None = None
    with_documents: bool = False


@dataclass(frozen=True)
class Scored:
    """One answer's scores."""

    members: dict[str, list[float]]
    """Of each reward run, by each of its members."""
    explanation: dict[str, Any] | None = None

    @property
    def all(self) -> list[float]:
        """Every member's."""
        return [score for scores in self.members.values() for score in scores]

    def row(self, index: int) -> dict[str, Any]:
        """As `/v1/score` tells it: the runs' mean score, and how far the members lie apart."""
        means = {name: fmean(scores) for name, scores in self.members.items()}
        row: dict[str, Any] = {"object": "score", "index": index, "score": fmean(means.values())}
        row |= {"spread": pstdev(self.all), "scores": means, "members": self.members}
        return row if self.explanation is None else row | {"explanation": self.explanation}


def scoring(given: Keys) -> Scoring:
    """A request of `/v1/score`: a prompt (or messages) and answers; or messages of which the last is the answer.

    Raises:
        Refused: naming the key.
    """
    models = _models(given.required("model"))
    prompt, said = given.take("prompt"), given.take("messages")
    if (prompt is None) == (said is None):
        raise Refused("there is no conversation", where="messages", allowed="messages, or a prompt as text")
    turns = conversation(said) if said is not None else None
    if turns is None and (not isinstance(prompt, str) or not prompt):
        raise Refused("prompt is no text", where="prompt", allowed="a text that isn't empty")
    one, several = given.take("answer"), given.take("answers")
    if one is not None and several is not None:
        raise Refused("answer and answers", where="answers", allowed="one of them")
    if one is None and several is None:
        if turns is None or len(turns) < 2 or turns[-1]["role"] != "assistant":
            allowed = "answer, answers, or messages of which the last is the assistant's"
            raise Refused("there is no answer to score", where="answers", allowed=allowed)
        found: tuple[Text, ...] = (turns[-1:],)
        turns = turns[:-1]
    else:
        found = _answers([one] if several is None else several, "answers" if one is None else "answer")
    asked = Scoring(models, turns if turns is not None else str(prompt), found, given.flag("explain"))
    given.finish()
    return asked


def reranking(given: Keys) -> Scoring:
    """A request of `/v1/rerank`: which of the documents answers the query best.

    Raises:
        Refused: naming the key.
    """
    models = _models(given.required("model"))
    query = given.text("query")
    if not query:
        raise Refused("query is missing", where="query", allowed="a text")
    documents = given.required("documents")
    if isinstance(documents, list):
        documents = [one.get("text") if isinstance(one, dict) else one for one in documents]
    found = _answers(documents, "documents")
    top, shown = given.whole("top_n", 1), given.flag("return_documents")
    given.finish()
    return Scoring(models, query, found, top=top, with_documents=shown)


def parts(asked: Scoring) -> list[Sequence[Text]]:
    """The answers in the parts that are scored at once."""
    return [asked.answers[at : at + AT_ONCE] for at in range(0, len(asked.answers), AT_ONCE)]


def job(model: Model, judges: Sequence[Judge], asked: Scoring, answers: Sequence[Text]) -> Callable[[], list[Scored]]:
    """What scores some of a request's answers, for the thread that computes.

    Raises (when it is done):
        Refused: an answer that doesn't fit, or a conversation that the template refuses.
    """

    def scored() -> list[Scored]:
        members: list[dict[str, list[float]]] = [{} for _ in answers]
        explained: list[list[Any]] = [[] for _ in answers]
        for judge in judges:
            try:
                examples = [
                    [judge.encoder.example(asked.prompt, answer, tools=asked.tools).tokens] for answer in answers
                ]
            except DataError as error:
                raise Refused(error.what, where="messages", allowed=error.allowed, hint=error.hint) from error
            groups = passes(model, judge.adapters, judge.packing)
            laid_out = batches(examples, max(1, judge.max_tokens // len(groups[0])), judge.packing, model.device)
            for lines in score_members(model, laid_out, groups):
                for own, (score,) in zip(members, lines, strict=True):
                    own.setdefault(judge.name, []).append(score)
            if asked.explain:
                triples = [(asked.prompt, answer, asked.tools) for answer in answers]
                for adapter in judge.adapters:
                    found = explain(model, judge.encoder, triples, adapter, judge.max_tokens, judge.packing)
                    for own, one in zip(explained, found, strict=True):
                        own.append(one)
        means = [mean_explanation(each) if each else None for each in explained]
        rows = [None if mean is None else mean.row() | {"score": mean.score} for mean in means]
        return [Scored(own, row) for own, row in zip(members, rows, strict=True)]

    return scored


def _models(value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise Refused("model is no name", where="model", allowed="a reward run of /v1/models, or a list of them")
    return tuple(dict.fromkeys(names))


def _answers(values: Any, key: str) -> tuple[Text, ...]:
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_ANSWERS:
        raise Refused(f"{key} is no list of answers", where=key, allowed=f"1 to {MOST_ANSWERS} texts")
    found: list[Text] = []
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise Refused(f"{key} holds something else than a text", where=key, allowed="texts that aren't empty")
        found.append(value)
    return tuple(found)
