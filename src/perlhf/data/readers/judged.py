"""Readers of judged answers: UltraFeedback, HelpSteer, arenas and other pairs. Each makes rows of TRL's columns."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from perlhf.config.stages import LayoutConfig
from perlhf.data.fields import (
    TIE,
    Row,
    Skipped,
    decoded,
    items,
    label_of,
    mapping,
    message,
    number,
    numeric,
    text,
    value,
    wrong_type,
)
from perlhf.data.readers.answers import INSTRUCTION, instruction_of
from perlhf.data.readers.grades import refuse_order
from perlhf.data.readers.messages import listed, messages
from perlhf.data.readers.trl import Made, made_rows, trl, without
from perlhf.data.records import Record
from perlhf.errors import DataError

UNJUDGED = "two answers without a verdict"
PAIRS = (
    ("conversation_a", "conversation_b"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
    ("output_a", "output_b"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("answer1", "answer2"),
    ("answer_1", "answer_2"),
    ("completion_1", "completion_2"),
    ("completion1", "completion2"),
    ("output_1", "output_2"),
    ("output1", "output2"),
    ("response_0", "response_1"),
    ("answer_0", "answer_1"),
)
"""Columns of two answers, the first named first."""
VERDICTS = ("winner", "preference", "preferred", "choice", "better", "best", "chosen", "label", "vote", "judgement")
_STRENGTHS = ("overall_preference", "preference_strength")
"""Below 0 the first answer is better, above 0 the second (HelpSteer 2 and 3)."""
_WINNERS = ("winner_model_a", "winner_model_b")
_BETTER = ("better_response_id",)
_TIES = {
    "tie",
    "ties",
    "tie (bothbad)",
    "tie (bothgood)",
    "bothbad",
    "both_bad",
    "both bad",
    "both_good",
    "both",
    "equal",
}
_TIES |= {"same", "draw", "neither", "none", "no preference", "no_preference", "about the same"}
_SIDE = re.compile(
    r"(?:(?:model|response|answer|assistant|completion|output|option|conversation|text|summary|candidate)[ _-]?)?"
    r"(?P<side>a|b|0|1|2|left|right|first|second)(?:(?: is)? (?:better|wins?|won))?"
)
_ORDER = re.compile(r"(a|b)\s*(>+|<+|=+)\s*(a|b)")
"""A judge's `A>>B`, `A=B`."""
_FIRST, _SECOND = ("a", "left", "first"), ("b", "right", "second")
_LISTS = ("scores", "ratings", "rating", "grades", "rewards", "ranks", "ranking")
"""Columns with a number for each of several answers."""
_EXTRA_TURN = re.compile(r"<extra_id_1>(User|Assistant)\s*\n?")


def ultrafeedback(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """UltraFeedback and other sets of several graded or ranked answers: `instruction` and `completions`.

    Rule: every pair of answers with different grades is a comparison whose margin is the difference; equal grades are
    skipped. The grade is `fine-grained_score`, else the mean rating of `annotations`, else `overall_score`, `score`,
    `rating` or StackExchange's `pm_score`. Answers with a `rank` (Nectar's `answers`) are graded by it, 1 being best.
    Answers may also be a list of texts beside a list of `scores`, `ratings`, `ranks`, or `ranking` where it says the
    same as ranks and as an order of the answers. With `data.ratings` each answer
    is a rating instead. The binarized sets (`chosen`, `rejected`, scores of both) are read as `trl`.
    Group: first user turn.
    """
    rules = rules or LayoutConfig()
    if rules.ratings is None and rules.grades is None:
        rules = rules.model_copy(update={"grades": "comparisons"})
    for row in rows:
        yield from trl(made_rows([row], _answers_row), rules)


def helpsteer(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """HelpSteer's grades (`prompt`, `response`, `helpfulness`) and the preferences of HelpSteer 2 and 3.

    Rule: grades become records as `data.ratings` or `data.grades` says; `data.columns: {rating: correctness}` takes
    another one. A preference (`preference_strength`, `overall_preference`) below 0 is for the first response, above 0
    for the second, and its size is the margin; 0 is a tie. `context` (messages) is the prompt; a prompt with
    `<extra_id_1>` marks becomes turns. Group: first user turn.
    """
    yield from trl(made_rows(rows, _helpsteer_row), rules)


def arena(rows: Iterable[Row], rules: LayoutConfig | None = None) -> Iterator[Record | Skipped]:
    """Battles of two answers with a winner: `conversation_a`, `conversation_b` and `winner`, or any such pair.

    Rule: the winner is `model_a` or `model_b` (or a, b, left, right, 1, 2, the name of a model or of a column), or
    stands in `winner_model_a`, `winner_model_b`, `better_response_id`, or follows from `score_0` and `score_1`. Ties
    are skipped (`data.ties`). What both conversations begin with is the prompt, the turns that follow are the answers;
    after the judged `turn` they are cut. Prompts and answers that are JSON of a list are the turns of a conversation.
    A row whose verdict is empty is skipped. Group: first user turn.
    """
    yield from trl(_judged_rows(rows), rules)


def _judged_rows(rows: Iterable[Row]) -> Iterator[Row | Skipped]:
    for where, row in rows:
        if _lacks_verdict(row):
            yield Skipped(UNJUDGED, where)
        else:
            yield from made_rows([(where, row)], pair_row)


def _lacks_verdict(row: Mapping[str, Any]) -> bool:
    """True where nobody has filled in who won."""
    given = {name for name, content in row.items() if content is not None and str(content).strip()}
    others = (*VERDICTS, *_STRENGTHS, *_WINNERS, *_BETTER)
    pair = pair_of(row)
    scored = pair is not None and given.issuperset(_scores_of(pair))
    return any(name in row for name in VERDICTS) and given.isdisjoint(others) and not scored


def _answers_row(row: dict[str, Any], where: str) -> list[Made]:
    column = next(
        (name for name in ("completions", "answers", "responses", "generations") if name in row), "completions"
    )
    asked = next((name for name in ("prompt", "instruction", "question", "query") if name in row), "prompt")
    rest = without(row, column, asked, "models", "source", *_LISTS) | {"prompt": value(row, asked, where)}
    if asked == "instruction" and isinstance(row[asked], str):
        rest = without(rest, *INSTRUCTION) | {"prompt": instruction_of(row, where)}
    made: list[Made] = []
    for answer in _with_grades(items(row, column, where), row, where):
        answer = mapping(answer, f"an answer of {column!r}", where)
        written = next(
            (name for name in ("response", "answer", "completion", "text", "content") if name in answer), "text"
        )
        if not text(answer, written, where).strip():
            made.append(Skipped("empty completion", where))
            continue
        grade = _grade_of(answer, where)
        if grade is None:
            made.append(Skipped("an answer without a grade", where))
        else:
            made.append(rest | {"completion": answer[written], "rating": grade})
    return made


def _with_grades(answers: list[Any], row: dict[str, Any], where: str) -> list[Any]:
    """Answers with their grades, where the file has texts in one list and grades or ranks in another."""
    lists = {name: found for name in _LISTS if isinstance(found := decoded(row.get(name)), list)}
    if not lists or not all(isinstance(answer, str) for answer in answers):
        return answers
    name, grades = next(iter(lists.items()))
    if len(grades) != len(answers):
        raise DataError(
            f"there are {len(answers)} answers and {len(grades)} {name}",
            where=where,
            allowed="one of each answer",
        )
    if name == "ranking":
        refuse_order(grades, where)
    key = "rank" if name.startswith("rank") else "rating"
    return [{"text": answer, key: grade} for answer, grade in zip(answers, grades, strict=True)]


def _grade_of(answer: dict[str, Any], where: str) -> float | None:
    """The grade of one of several answers; None where it has none."""
    aspects = answer.get("annotations")
    if answer.get("fine-grained_score") is None and isinstance(aspects, dict):
        given = [aspect.get("Rating", aspect.get("rating")) for aspect in aspects.values() if isinstance(aspect, dict)]
        numbers = [_float(part) for part in given]
        counted = [part for part in numbers if part is not None]
        if counted:
            return sum(counted) / len(counted)
    names = ("fine-grained_score", "overall_score", "score", "rating", "grade", "reward", "pm_score")
    name = next((name for name in names if answer.get(name) is not None), None)
    if name is not None:
        return _float(answer[name])
    return -number(answer, "rank", 0.0, where) if answer.get("rank") is not None else None


def _float(written: Any) -> float | None:
    """A number that may be written as text; None for anything else ("N/A")."""
    if isinstance(written, bool) or not isinstance(written, int | float | str):
        return None
    try:
        found = float(written)
    except (ValueError, OverflowError):
        return None
    return found if -1e300 < found < 1e300 else None


def _helpsteer_row(row: dict[str, Any], where: str) -> Made:
    if "context" in row and "prompt" not in row:
        row = without(row, "context") | {"prompt": row["context"]}
    marked = row.get("prompt")
    if isinstance(marked, str) and "<extra_id_1>" in marked:
        first, *parts = _EXTRA_TURN.split(marked)
        roles = ["user" if mark == "User" else "assistant" for mark in parts[::2]]
        turns = [message(role, part.strip()) for role, part in zip(roles, parts[1::2], strict=True)]
        asked = [message("user", first.strip()), *turns]
        row = row | {"prompt": asked if asked[-1]["role"] == "user" or asked[-1]["content"] else asked[:-1]}
    if any(name in row for name in _STRENGTHS):
        return pair_row(row, where)
    return row if "rating" in row else without(row, "helpfulness") | {"rating": value(row, "helpfulness", where)}


def pair_of(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a row that hold two answers."""
    return next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)


def is_judged_pair(names: Collection[str]) -> bool:
    """Whether columns hold two answers, and a verdict or a score of each."""
    pair = next((pair for pair in PAIRS if pair[0] in names and pair[1] in names), None)
    return pair is not None and (
        any(name in names for name in VERDICTS) or all(name in names for name in _scores_of(pair))
    )


def _scores_of(pair: tuple[str, str]) -> list[str]:
    return [name.replace(name.rstrip("ab012").rstrip("_"), "score") for name in pair]


def pair_row(row: dict[str, Any], where: str) -> Made:
    """Two answers and a verdict as `chosen` and `rejected`."""
    pair = pair_of(row)
    if pair is None:
        raise DataError(
            "no two columns hold the answers",
            where=where,
            allowed="such as " + ", ".join(f"{first} and {second}" for first, second in PAIRS[:6]),
            hint="`data.columns: {response_a: ..., response_b: ...}` names them",
        )
    better, margin, used = _verdict(row, pair, where)
    if better is None:
        return Skipped(TIE, where)
    rest = without(row, *pair, *used, "chosen", "rejected", "turn", "label")
    if isinstance(rest.get("instruction"), str) and "prompt" not in rest and not pair[0].startswith("conversation"):
        rest = without(rest, *INSTRUCTION) | {"prompt": instruction_of(rest, where)}
    asked = _json_list(row.get("prompt"))
    first, second = (_judged_turns(row, name, asked is not None, where) for name in pair)
    if first is None or second is None:
        return Skipped("empty completion", where)
    sides = {"chosen": (first, second)[better], "rejected": (first, second)[1 - better]}
    if "annotator" not in rest and isinstance(rest.get("judge"), str):
        rest["annotator"] = rest["judge"]
    if pair[0].startswith("conversation"):
        return without(rest, "prompt", "messages") | sides
    if asked is not None:
        whole = {name: _interleaved(asked, answers, where) for name, answers in sides.items()}
        return without(rest, "prompt") | whole if all(whole.values()) else Skipped("empty completion", where)
    if margin is not None and "margin" not in rest:
        rest["margin"] = margin
    question = decoded(rest.get("question"))
    if isinstance(question, dict) and (question is rest["question"] or "full_text" in question):
        rest["question"] = text(question, "full_text", where)
    return rest | sides


def _judged_turns(row: dict[str, Any], name: str, several: bool, where: str) -> Any:
    """One side as text or list; a conversation is cut after the turn that was judged. None where it is blank.

    With `several`, the prompt is JSON of the questions of some turns, and so are the answers.
    """
    if several:
        return _json_list(row[name]) or row[name]
    side = listed(row[name])
    if isinstance(side, str):
        return side if side.strip() else None
    turn = numeric(row.get("turn"))
    if name.startswith("conversation") and isinstance(side, list) and isinstance(turn, int) and turn > 0:
        turns = messages(side, name, where)
        asked = [at for at, one in enumerate(turns) if one["role"] == "user"]
        return [dict(one) for one in (turns[: asked[turn]] if len(asked) > turn else turns)]
    return side


def _json_list(content: Any) -> list[Any] | None:
    """The texts of a JSON list in a text (one a turn); None for anything else."""
    if not isinstance(content, str) or not content.lstrip().startswith("["):
        return None
    try:
        decoded = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, list) and all(isinstance(part, str | None) for part in decoded) else None


def _interleaved(asked: list[Any], answers: Any, where: str) -> list[dict[str, Any]] | None:
    """A conversation of questions and answers in turn; None where one is blank."""
    if not isinstance(answers, list) or len(asked) != len(answers):
        raise DataError(
            f"there are {len(asked)} questions and {len(answers) if isinstance(answers, list) else 1} answers",
            where=where,
            allowed="as many answers as questions",
        )
    if not all(isinstance(part, str) and part.strip() for part in (*asked, *answers)):
        return None
    return [
        dict(message(role, part))
        for pair in zip(asked, answers, strict=True)
        for role, part in zip(("user", "assistant"), pair, strict=True)
    ]


def _verdict(row: dict[str, Any], pair: tuple[str, str], where: str) -> tuple[int | None, float | None, list[str]]:
    """Which answer is better (None: a tie), by how much where that is said, and the columns that say so."""
    strength = next((name for name in _STRENGTHS if name in row), None)
    if strength is not None:
        by = _float(row[strength])
        if by is None:
            wrong_type(row[strength], f"column {strength!r}", "a number", where)
        return (None if by == 0 else int(by > 0)), abs(by), [strength]
    if all(name in row for name in _WINNERS):
        won = [label_of(row[name]) for name in _WINNERS]
        if None in won or won == [True, True]:
            raise DataError(
                f"columns {' and '.join(_WINNERS)} are {row[_WINNERS[0]]!r:.30} and {row[_WINNERS[1]]!r:.30}",
                where=where,
                allowed="1 and 0, 0 and 1, or 0 and 0 for a tie",
            )
        return (None if won == [False, False] else int(won[1] is True)), None, [*_WINNERS, "winner_tie"]
    if any(name in row for name in _BETTER):
        return _side(row[_BETTER[0]], _BETTER[0], row, pair, where), None, [*_BETTER]
    name = next((name for name in VERDICTS if name in row), None)
    if name is not None:
        return _side(row[name], name, row, pair, where), None, [name]
    scores = _scores_of(pair)
    graded = [_float(row.get(name)) for name in scores]
    if graded[0] is not None and graded[1] is not None:
        by = graded[1] - graded[0]
        return (None if by == 0 else int(by > 0)), abs(by), [*scores]
    raise DataError(
        f"there are two answers ({pair[0]}, {pair[1]}) and nothing says which is better",
        where=where,
        allowed=f"found columns {', '.join(map(repr, row))}",
        hint="`data.columns: {winner: ...}` names the column of the verdict",
    )


def _side(verdict: Any, name: str, row: dict[str, Any], pair: tuple[str, str], where: str) -> int | None:
    """0 or 1 for the first or second answer, None for a tie."""
    side = side_of(verdict, row, pair)
    if side == "":
        zero = str(verdict) in ("0", "0.0")
        raise DataError(
            f"column {name!r} is {verdict!r:.60}",
            where=where,
            allowed=f"model_a, model_b, a, b, left, right, {pair[0]}, {pair[1]}, 1 or 2, or tie",
            hint=f"where 0 is the first answer: `data.columns: {{response_0: {pair[0]}, response_1: {pair[1]}}}`"
            if zero
            else None,
        )
    return side


def side_of(verdict: Any, row: Mapping[str, Any], pair: tuple[str, str]) -> Any:
    """0 or 1 for the first or second answer, None for a tie, "" for what is no verdict."""
    if isinstance(verdict, str) and isinstance(found := numeric(verdict), int):
        verdict = found  # of "1.0", as pandas writes a column with empty cells
    if isinstance(verdict, float) and verdict.is_integer():
        verdict = int(verdict)
    if isinstance(verdict, int) and not isinstance(verdict, bool):
        verdict = str(verdict) if abs(verdict) < 10 else ""
    if not isinstance(verdict, str):
        return ""
    word = verdict.strip().lower().removeprefix("[[").removesuffix("]]")
    named = (row.get("model_a"), row.get("model_b"))
    if verdict in named and named[0] != named[1]:
        return named.index(verdict)
    if word in (part.lower() for part in pair):
        return [part.lower() for part in pair].index(word)
    word = re.sub(r"\s*\(\s*both[ _-]?(bad|good)\s*\)", r" (both\1)", word)
    if word in _TIES or (word == "c" and "[[" in verdict):
        return None
    if (order := _ORDER.fullmatch(word)) and order[1] != order[3]:
        return None if order[2][0] == "=" else int((order[1] == "b") == (order[2][0] == ">"))
    match = _SIDE.fullmatch(word)
    if match is None:
        return ""
    side, from_zero = match["side"], pair[0].endswith("0")
    if side in _FIRST or side in _SECOND:
        return int(side in _SECOND)
    numbers = ("0", "1") if from_zero else ("1", "2")
    return numbers.index(side) if side in numbers else ""
