"""A reward that knows the right answer: whether a completion names the element that a UIBert instruction means.

    perlhf data pull uibert
    export PERLHF_DATA=data
    perlhf sft recipes/uibert/sft.yaml
    perlhf policy recipes/uibert/policy.yaml

The recipe names it as `reward: [examples.ui_reward:score]`, from the root of the repository; from this directory it is
`ui_reward:score`. Another recipe must read its prompts from the same files (`paths: [uibert]`, `format: uibert`).
"""

from collections.abc import Sequence
from functools import cache

from perlhf.data.read import read
from perlhf.data.records import Demonstration, Text
from perlhf.errors import DataError


def score(prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
    """1 for a completion that is the number of the right element and nothing else, 0 for any other.

    A prompt is the text that perlhf's reader makes of a screen, or chat messages of which the last one is.

    Raises:
        DataError: the files aren't under $PERLHF_DATA, or a prompt is none of their screens.
    """
    return [float(text.strip() == _right(prompt)) for prompt, text in zip(prompts, completions, strict=True)]


def _right(prompt: Text) -> str:
    shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if shown not in _answers():
        hint = "read the prompts with paths: [uibert], format: uibert"
        raise DataError(f"no UIBert screen has the prompt {shown[:60]!r}", where="examples/ui_reward.py", hint=hint)
    return _answers()[shown]


@cache
def _answers() -> dict[str, str]:
    """The right number by prompt, of all screens."""
    records = [record for record in read("uibert", "uibert") if isinstance(record, Demonstration)]
    return {str(record.prompt): str(record.completion).strip() for record in records}
