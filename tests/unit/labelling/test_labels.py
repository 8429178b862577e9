"""Every line that an export writes is read back as the label that it was."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from perlhf.data.readers.messages import ROLES, messages
from perlhf.labelling.labels import VERDICTS_OF, Label, Labeller, Said, as_json, from_json
from perlhf.labelling.questions import Question

SIGNS = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from("\u2028\u2029\x85\r\n\x00\ufeff😀👩‍🚀\u0301")
)
TEXTS = st.text(SIGNS, max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": TEXTS, "arguments": ANYTHING})}, optional={"id": ANYTHING}
    ),
    max_size=2,
)


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Messages as the readers of files make them, of what files may hold."""
    raw: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 3))):
        extra = draw(st.dictionaries(TEXTS | st.sampled_from(["name", "thinking", "model_fields", "copy"]), ANYTHING))
        for key in ("role", "from", "value", "tool_calls", "function_call", "refusal"):
            extra.pop(key, None)
        raw.append(extra | {"role": draw(st.sampled_from(ROLES)), "content": draw(TEXTS)})
        if draw(st.booleans()):
            raw[-1]["tool_calls"] = draw(CALLS)
        if raw[-1].get("tool_calls") and draw(st.booleans()):
            raw[-1]["content"] = None
    return [dict(turn) for turn in messages(raw, "prompt", "a test")]


@st.composite
def labels(draw: st.DrawFn) -> Label:
    """What a project's database may hold."""
    texts = TEXTS | turns()
    answers = draw(st.lists(texts, min_size=1, max_size=2, unique_by=lambda one: json.dumps(one, sort_keys=True)))
    served, fitting = draw(st.booleans()), st.sampled_from(VERDICTS_OF[len(answers)])
    known = draw(st.none() | fitting)
    drawn, wanted = ("served", 0) if served else (draw(st.sampled_from(["random", "disagreement", "information"])), 2)
    place = draw(st.floats(0, 1))
    question = Question("k" * 64, draw(texts), tuple(answers), draw(TEXTS), draw(TEXTS), place, drawn, wanted, known)
    verdict = draw(fitting)
    edit = draw(TEXTS) + ("better" if verdict == "edited" else "")
    grades = draw(st.dictionaries(TEXTS, st.integers(1, 5), min_size=1)) if verdict == "graded" else {}
    said = Said(verdict, draw(TEXTS), draw(TEXTS), edit, grades)
    person = Labeller(0, "labeller-0123abcd", "labeller-0123abcd")
    seconds, stored = round(draw(st.floats(0, 86400)), 3), draw(st.floats(0, 2e9))
    return Label("some key", question, person, said, draw(st.booleans()), seconds, stored)


@given(labels())
def test_what_is_written_is_read_to_the_same_label(label: Label) -> None:
    line = as_json(label)
    assert "\n" not in line and "\r" not in line
    assert from_json(line) == label
