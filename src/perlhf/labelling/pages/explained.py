"""What in an answer moved its score, for the labelling page: computed by a process of its own, so that no answer waits.

Nothing here says who may see it: `Store.explainable` does. The process alone imports torch, computes on one thread and
gives way to all others; it reads questions as lines of JSON, and ends when no more can come: also when the page is
killed.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from perlhf.data.records import Text
from perlhf.errors import PerlhfError, RunError
from perlhf.labelling.questions import Question
from perlhf.runs.earlier import check_runs
from perlhf.system.console import note

WAITING = 32
"""Questions that may wait at a time."""
KEPT = 2000
"""Explanations that are kept; the oldest go first."""

Explained = list[dict[str, Any] | None]
"""Of each answer of a question, as `Explanation.row` has it with `score`; None of one that doesn't fit."""


class Explainer:
    """The process, and what it has found so far. Threads may share it.

    Args:
        runs: reward runs on one base; several explain the mean of their scores.

    Raises:
        RunError: as the runs say when they are opened.
    """

    def __init__(self, runs: Sequence[str]):
        check_runs("reward runs of explain", [Path(run) for run in runs])
        words = [sys.executable, "-m", "perlhf.labelling.pages.explained", *runs]
        own = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=own
        )
        self._asked: queue.Queue[Question | None] = queue.Queue(WAITING)
        self._found: dict[str, Explained] = {}
        self._waiting: set[str] = set()
        self._stopped, self._lock = False, threading.Lock()
        said = self._read()
        if said is None or "error" in said:
            self._end()
            raise RunError(**(said["error"] if said else {"what": "no score can be explained", "where": "explain"}))
        self.models: int = said["models"]
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, question: Question) -> Explained | None:
        """The explanation of a question's answers; None while it is computed.

        Raises:
            RunError: too many wait, or the process has ended.
        """
        with self._lock:
            if (found := self._found.get(question.key)) is not None:
                return found
            if self._stopped:
                raise RunError("Scores are no longer explained.", hint="start the page again")
            if question.key not in self._waiting:
                try:
                    self._asked.put_nowait(question)
                except queue.Full:
                    raise RunError("Many explanations are being computed. Ask again in a minute.") from None
                self._waiting.add(question.key)
            return None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        with contextlib.suppress(queue.Full):  # then the thread isn't waiting for a question
            self._asked.put_nowait(None)
        self._thread.join()
        self._end()

    # inside

    def _work(self) -> None:
        while not self._stopped:
            question = self._asked.get()
            found = self._explained(question) if question else None
            with self._lock:
                if question is None or found is None:
                    self._stopped = True
                    return
                self._found[question.key] = found
                self._waiting.discard(question.key)
                if len(self._found) > KEPT:
                    del self._found[next(iter(self._found))]

    def _explained(self, question: Question) -> Explained | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompt": question.prompt, "answers": question.answers}) + "\n")
            self._process.stdin.flush()
        except OSError:
            return None
        said = self._read()
        return None if said is None else said["answers"]

    def _read(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was written to a process that has ended
                assert pipe is not None
                pipe.close()


def main(runs: Sequence[str]) -> None:
    """The process: says that it is ready, or why not, and then what each line asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the page, with which this ends
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is none of the answers
    try:
        models, explain = _opened(runs)
    except PerlhfError as error:
        _say(output, {"error": {name: getattr(error, name) for name in ("what", "where", "allowed", "hint")}})
        return
    _say(output, {"models": models})
    os.nice(10)  # from here on answers are more urgent
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = explain(asked["prompt"], asked["answers"])
        except PerlhfError as error:
            note(f"a score can't be explained: {error.what}")
            found = [None for _ in asked["answers"]]
        _say(output, {"answers": found})


def _opened(runs: Sequence[str]) -> tuple[int, Callable[[Text, Sequence[Text]], Explained]]:
    """How many models there are, and what explains their mean: one base with the adapters of each run."""
    import torch

    from perlhf.evaluation.explain import explain, mean_explanation
    from perlhf.model.finished import read_run
    from perlhf.model.open import load_earlier

    found = [read_run(Path(run), ("reward",)) for run in runs]
    for run in found:
        run.check()
    first = found[0]
    model, encoder = first.open("auto")
    others = [directory for run in found[1:] for directory in run.members.values()]
    names = [load_earlier(model, path, f"other_{at}", encoder).name for at, path in enumerate(others)]
    names += first.members
    torch.set_num_threads(1)
    budget, packing = first.config.microbatch_tokens, model.packing(first.config.packing)

    def explained(prompt: Text, answers: Sequence[Text]) -> Explained:
        asked = [(prompt, answer, None) for answer in answers]
        members = [explain(model, encoder, asked, name, budget, packing) for name in names]
        means = [mean_explanation(each) for each in zip(*members, strict=True)]
        return [None if one is None else one.row() | {"score": one.score} for one in means]

    return len(names), explained


def _say(output: TextIO, said: object) -> None:
    output.write(json.dumps(said) + "\n")
    output.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
