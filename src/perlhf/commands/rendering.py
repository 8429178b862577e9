"""How the first record of each kind becomes tokens: what is read, what is trained, where the score is read."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from perlhf.config.commands import DataInspectConfig
from perlhf.data.read import read
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating, Record
from perlhf.data.splits import kind_of
from perlhf.errors import visible
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import end_ids, load_tokenizer
from perlhf.model.encoding.encode import Encoder, Example

PROMPT, TRAINED, READ, SCORED = "dim", "bold green", "cyan", "bold black on magenta"
BOUNDARY = "|"


def show(config: DataInspectConfig, console: Console | None = None) -> None:
    """Prints the tokens of the first record of each kind, one `|` between two; spaces and line breaks are visible.

    Raises:
        ModelError: the base isn't here; ConfigError, DataError: its template can't render the record.
    """
    assert config.base is not None
    base = Base.find(config.base)
    encoder = Encoder(load_tokenizer(base), config.encoding, end_ids(base))
    console = console or Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    ends = ", ".join(_shown(encoder, [number])[0] for number in encoder.end_ids)
    console.print(
        f"\ntokens of {visible(config.base)}, at most {encoder.max_tokens} a record; an answer ends with {ends}"
    )
    colours = {"prompt": PROMPT, "trained": TRAINED, "read before the score": READ, "scored here": SCORED}
    console.print(Text("  ").join(Text(what, style) for what, style in colours.items()))
    seen: set[str] = set()
    for record in (record for path in config.paths for record in read(path, config.format, rules=config)):
        if kind_of(record) not in seen:
            seen.add(kind_of(record))
            source = visible(record.source or "embedded")
            console.print(f"\n{kind_of(record)} ({source}), group {visible(f'{record.group!r:.60}')}")
            for title, line in _lines(encoder, record):
                console.print(Text(f"{title}\n  ") + line)


def _lines(encoder: Encoder, record: Record) -> Iterable[tuple[str, Text]]:
    """A title and the tokens of the prompt and of each completion."""

    def examples(*completions: object) -> list[Example]:
        return encoder.examples(record.prompt, completions, record.source, record.tools)  # pyright: ignore[reportArgumentType]

    match record:
        case Comparison():
            sides = examples(record.chosen, record.rejected)
            yield _prompt_line(encoder, sides[0].prompt, sides[0].cut)
            for name, side in zip(("chosen", "rejected"), sides, strict=True):
                yield _scored_line(encoder, name, side)
        case Rating():
            (example,) = examples(record.completion)
            yield _prompt_line(encoder, example.prompt, example.cut)
            yield _scored_line(encoder, "thumbs up" if record.label else "thumbs down", example)
        case Demonstration():
            (example,) = examples(record.completion)
            yield _prompt_line(encoder, example.prompt, example.cut)
            yield _trained_line(encoder, example)
        case Prompt():
            yield _prompt_line(encoder, encoder.prompt(record.prompt, record.tools), 0)


def _prompt_line(encoder: Encoder, ids: Sequence[int], cut: int) -> tuple[str, Text]:
    cut_before = f", after {cut} that were cut" if cut else ""
    return f"prompt: {len(ids)} tokens{cut_before}", _joined((token, PROMPT) for token in _shown(encoder, ids))


def _scored_line(encoder: Encoder, name: str, example: Example) -> tuple[str, Text]:
    *read, last = _shown(encoder, example.completion)
    tokens = _joined([*((token, READ) for token in read), (last, SCORED)])
    return f"{name}: {len(example.completion)} tokens, scored at the last", tokens


def _trained_line(encoder: Encoder, example: Example) -> tuple[str, Text]:
    first = len(example.prompt)
    trained = {at - first for start, length in example.tokens.completions for at in range(start, start + length)}
    tokens = _shown(encoder, example.completion)
    styled = _joined((token, TRAINED if at in trained else PROMPT) for at, token in enumerate(tokens))
    return f"demonstration: {len(trained)} of {len(tokens)} tokens trained", styled


def _joined(tokens: Iterable[tuple[str, str]]) -> Text:
    line = Text()
    for number, (token, style) in enumerate(tokens):
        line.append(BOUNDARY if number else "", "dim").append(token, style)
    return line


def _shown(encoder: Encoder, ids: Sequence[int]) -> list[str]:
    """Each token as text; a space is ·, a line break ⏎; where it is no whole character, the token's own name."""
    texts = [str(encoder.tokenizer.decode([number], clean_up_tokenization_spaces=False)) for number in ids]
    names = [str(encoder.tokenizer.convert_ids_to_tokens(number)) for number in ids]
    shown = [name if not text or "\ufffd" in text else text for text, name in zip(texts, names, strict=True)]
    return [visible(text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")) for text in shown]
