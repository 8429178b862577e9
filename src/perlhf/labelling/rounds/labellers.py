"""Who answers a round's questions: people on the page, a judge, or a simulated labeller. Each answer goes into the
project's database before the next is asked, so that none is lost and none is asked twice.
"""

import threading
import time
from collections.abc import Sequence

from perlhf.config.labelling import LabelConfig
from perlhf.config.loop import LoopConfig
from perlhf.data.coffee_bar.gold import gold
from perlhf.errors import ServiceError
from perlhf.evaluation.judge import judge
from perlhf.evaluation.shared import progress
from perlhf.labelling.database.store import Store
from perlhf.labelling.labels import Label, Labeller, Said
from perlhf.labelling.project import prepared
from perlhf.labelling.questions import Question, uniform
from perlhf.system.console import note

AT_ONCE = 8
"""Questions of a judge between two transactions."""
LOOK_SECONDS = 1.0
"""Between two looks at what people have said."""
_VERDICTS = {"win": "first", "tie": "equal", "loss": "second"}


def label(config: LoopConfig, store: Store, asked: Sequence[Question]) -> None:
    """Returns once each question has an answer, or was skipped.

    Raises:
        ConfigError, ServiceError: as the judge says, or it answers neither 1 nor 2 to many in a row; what it answered
            before is stored.
    """
    open_ones = _open(store, asked)
    if not open_ones:
        return
    match config.labeller:
        case "people":
            _wait(config, store, asked, len(open_ones))
        case "judge":
            _judge(config, store, open_ones)
        case "simulated":
            store.take([_answer(question, simulated(question, config), "simulated") for question in open_ones])


def simulated(question: Question, config: LoopConfig) -> str:
    """What somebody says who goes by the rules of the embedded feedback, but is wrong in `noise` of the questions.

    Two answers that the rules hold equal are `equal`. Which answers are wrong depends on the seed and the question.
    """
    first, second = (gold(question.prompt, str(answer)) for answer in question.answers)
    if first == second:
        return "equal"
    wrong = uniform(config.seed, "noise", question.key) < config.noise
    return "first" if (first > second) != wrong else "second"


def open_page(config: LoopConfig) -> None:
    """Opens the labelling page beside the loop, until the process ends.

    Raises:
        StorageError: the port is taken.
    """
    assert config.page is not None
    settings = LabelConfig(project=config.labels, port=config.page)
    threading.Thread(target=prepared(settings), daemon=True).start()


def _open(store: Store, asked: Sequence[Question]) -> list[Question]:
    settled = {found.question.key for found in store.labels(skips=True)}
    return [question for question in asked if question.key not in settled]


def _wait(config: LoopConfig, store: Store, asked: Sequence[Question], count: int) -> None:
    where = "on its page" if config.page is not None else f"until they are answered: perlhf label {config.labels}"
    note(f"{count} questions wait {where}")
    with progress(count, "labels") as bar:
        while (left := len(_open(store, asked))) > 0:
            for _ in range(count - left):
                bar.advance()
            count = left
            time.sleep(LOOK_SECONDS)
        for _ in range(count):
            bar.advance()


def _judge(config: LoopConfig, store: Store, asked: Sequence[Question]) -> None:
    assert config.judge is not None
    unparsable = 0
    with progress(len(asked), "judge") as bar:
        for at in range(0, len(asked), AT_ONCE):
            some = asked[at : at + AT_ONCE]
            prompts = [question.prompt for question in some]
            firsts, seconds = ([str(question.answers[side]) for question in some] for side in (0, 1))
            limit = config.judge_timeout_seconds
            given = prompts, firsts, seconds, config.judge, config.judge_model
            judged = judge(*given, timeout_seconds=limit)
            if judged.unparsable == 2 * AT_ONCE:  # a few may be refused, which are ties; not all of so many
                raise ServiceError(
                    f"no answer to {AT_ONCE} questions, each asked in both orders, was 1 or 2; none of these is stored",
                    where=f"the judge {config.judge_model}",
                    allowed="the character 1 or 2 alone",
                    hint="mend the judge; the same command goes on",
                )
            unparsable += judged.unparsable
            who, answers = f"judge {config.judge_model}", zip(some, judged.outcomes, strict=True)
            store.take([_answer(one, _VERDICTS[outcome], who) for one, outcome in answers])
            for _ in some:
                bar.advance()
    if unparsable:
        note(f"{unparsable} of the judge's {2 * len(asked)} answers were neither 1 nor 2: such a question is a tie")


def _answer(question: Question, verdict: str, name: str) -> Label:
    """Its key hangs on the question alone: an answer that was stored before a kill isn't stored again."""
    return Label(f"{name}:{question.key}", question, Labeller(0, name, name), Said(verdict), False, 0.0, time.time())
