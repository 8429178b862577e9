import difflib
from typing import Any

import pytest

from perlhf.labelling.labels import Task
from perlhf.labelling.pages.shown import Answer, answers
from perlhf.labelling.questions import Question

COMPARED = 1_000_000


def shown(left: str, right: str) -> list[Answer]:
    return answers(Task(1, Question("k", "p", (left, right), "g", "f:1", 0.5), False, 0.0))


def test_words_that_the_other_lacks_are_marked() -> None:
    left, right = shown("A  small <cat>\nsat on a mat.", "A  big <cat>\nsat on the old mat. Well")
    assert left.differences == "A  <mark>small</mark> &lt;cat&gt;\nsat on <mark>a</mark> mat."
    assert right.differences == "A  <mark>big</mark> &lt;cat&gt;\nsat on <mark>the old</mark> mat. <mark>Well</mark>"
    assert [side.differences for side in shown("\n one ", "one\n")] == ["\n one ", "one\n"]
    assert [side.differences for side in shown("one", "two")] == ["<mark>one</mark>", "<mark>two</mark>"]


@pytest.mark.parametrize("words", [400, 700, 1200, 3999])
def test_answers_that_repeat_themselves_take_bounded_work(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = difflib.SequenceMatcher[str].find_longest_match

    def counted(self: Any, low: int, high: int, other: int, end: int) -> Any:
        looked.append(sum(1 + len(self.b2j.get(word, ())) for word in self.a[low:high]))
        return real(self, low, high, other, end)

    monkeypatch.setattr(difflib.SequenceMatcher, "find_longest_match", counted)
    same = "very " * words
    other = " ".join("good" if at % 7 == 0 else "very" for at in range(words))
    left, right = shown(same, other)
    assert sum(looked) <= COMPARED
    assert (left.text, left.differences, right.differences) == (same, "", "")


def test_long_answers_that_do_not_repeat_themselves_keep_their_differences() -> None:
    text = " ".join(f"the word{at} of" for at in range(400))
    left, right = shown(text, text.replace("word200", "else"))
    assert "<mark>word200</mark>" in left.differences and "<mark>else</mark>" in right.differences
