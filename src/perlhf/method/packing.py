"""Which tokens are computed together: prefix trees, micro-batches under a token budget, and the `Batch` made of each.

Under causal attention a token's state depends on its prefix alone, so sequences that share a prefix share its states.
`tree` lays the distinct tokens of all sequences in one row without padding; `none` gives each sequence a padded row and
is the slow twin that tests compare with. A `Batch` is laid out once for all passes over it; nobody else lays out,
counts tokens or pads.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

Ids = Sequence[int]
Packing = Literal["none", "tree"]
Span = tuple[int, int]
"""First position and number of tokens."""


@dataclass(frozen=True)
class Tokens:
    """One sequence, and which of its tokens are completions (learned or scored one by one): spans, in order."""

    ids: Ids
    completions: tuple[Span, ...] = ()


def completed(prompt: Ids, completion: Ids) -> Tokens:
    """A prompt and its completion in one sequence. The prompt isn't empty: its last token predicts the first one."""
    assert prompt, "a completion needs a token to be predicted from"
    return Tokens((*prompt, *completion), ((len(prompt), len(completion)),))


@dataclass(frozen=True)
class Batch:
    """Sequences that are computed together, laid out once, on the network's device.

    A completion token is predicted from the state of the token before it. Where several spans of a sequence are
    completions, their tokens stand one after another in [batch, time].
    """

    ids: Int[Tensor, "rows width"]
    positions: Int[Tensor, "rows width"]
    """Depth of each token in its sequence."""
    nodes: "tuple[Node, ...] | None"
    """Of the prefix tree, in packed order; None for padded rows."""
    ends: Int[Tensor, " batch"]
    """Flat position (row * width + column) of each sequence's last token."""
    predicting: Int[Tensor, " tokens"]
    """Flat positions whose states predict the completion tokens, sequence by sequence."""
    targets: Int[Tensor, " tokens"]
    """The completion tokens."""
    completion_mask: Bool[Tensor, "batch time"]
    sequences: tuple[int, ...]
    """Number of each sequence among all of the update: where its row of an update's tensors is."""
    examples: tuple[int, ...]
    """Numbers of the examples in it, in the order of their sequences."""
    first: tuple[int, ...]
    """Where each example begins: its first sequence in this batch."""
    spans: tuple[tuple[Span, ...], ...]
    """Flat positions of each sequence, in order."""
    tokens: int
    """Tokens computed, padding not counted."""

    def places(self, sequence: int) -> list[int]:
        """Flat position of each token of a sequence."""
        return [at for start, length in self.spans[sequence] for at in range(start, start + length)]


@dataclass(frozen=True)
class Node:
    """New tokens of one sequence: packed positions `start .. start + length`, after the spans of their shared
    prefix.
    """

    start: int
    length: int
    prefix: tuple[Span, ...]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each sequence are computed."""

    ids: Int[Tensor, "rows width"]
    positions: Int[Tensor, "rows width"]
    """Depth of each token in its sequence."""
    nodes: tuple[Node, ...] | None
    """Of a tree, in packed order; None for padded rows."""
    spans: tuple[tuple[Span, ...], ...]
    """Flat positions of each sequence, in order."""
    tokens: int
    """Tokens computed, padding not counted."""

    def ends(self) -> list[int]:
        """Flat position of each sequence's last token."""
        return [start + length - 1 for start, length in (spans[-1] for spans in self.spans)]

    def indices(self, sequence: int, first: int, count: int) -> list[int]:
        """Flat positions of `count` consecutive tokens."""
        flat = [at for start, length in self.spans[sequence] for at in range(start, start + length)]
        return flat[first : first + count]


def lay_out(sequences: Sequence[Ids], packing: Packing) -> Layout:
    """The layout of `sequences` (at least one, none empty), on the CPU."""
    if packing == "none":
        ids = pad(sequences, 0)
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        alone = tuple(((row * ids.shape[1], len(s)),) for row, s in enumerate(sequences))
        return Layout(ids, positions, None, alone, sum(map(len, sequences)))
    # In descending order a sequence's longest shared prefix is with its neighbour, and extensions precede their
    # prefixes.
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]), reverse=True)
    packed: list[int] = []
    depths: list[int] = []
    nodes: list[Node] = []
    spans_of: list[tuple[Span, ...]] = [()] * len(sequences)
    before: Ids = ()
    spans: tuple[Span, ...] = ()
    for i in order:
        ids = sequences[i]
        shared = common_prefix(before, ids)
        spans = _first(spans, shared)
        if shared < len(ids):
            nodes.append(Node(len(packed), len(ids) - shared, spans))
            spans = (*spans, (len(packed), len(ids) - shared))
            packed.extend(ids[shared:])
            depths.extend(range(shared, len(ids)))
        spans_of[i] = spans
        before = ids
    return Layout(torch.tensor([packed]), torch.tensor([depths]), tuple(nodes), tuple(spans_of), len(packed))


def pack(examples: Sequence[Sequence[Tokens]], packing: Packing, device: torch.device | str = "cpu") -> Batch:
    """One batch of examples, each of one or more sequences."""
    return _packed(examples, range(len(examples)), _starts(examples), packing, device)


def empty(packing: Packing, device: torch.device | str = "cpu") -> Batch:
    """A batch without sequences, of which one token is computed: a pass for nothing."""
    none = torch.zeros(0, dtype=torch.long, device=device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    nodes = (Node(0, 1, ()),) if packing == "tree" else None
    return Batch(token, token, nodes, none, none, none, length_mask([], device), (), (), (), (), 0)


def batches(
    examples: Sequence[Sequence[Tokens]],
    max_tokens: int,
    packing: Packing,
    device: torch.device | str = "cpu",
    chosen: Sequence[int] | None = None,
) -> list[Batch]:
    """Examples in micro-batches of at most `max_tokens` each; an example's sequences stay together.

    Args:
        chosen: numbers of the examples to lay out, None for all. Their numbers, and those of their sequences, stay.
    """
    chosen = range(len(examples)) if chosen is None else chosen
    groups = microbatches([[tokens.ids for tokens in examples[i]] for i in chosen], max_tokens, packing)
    starts = _starts(examples)
    return [_packed(examples, [chosen[at] for at in group], starts, packing, device) for group in groups]


def _starts(examples: Sequence[Sequence[Tokens]]) -> list[int]:
    """Number of each example's first sequence among all sequences."""
    return list(itertools.accumulate(map(len, examples), initial=0))[:-1]


def _packed(
    examples: Sequence[Sequence[Tokens]],
    numbers: Sequence[int],
    starts: Sequence[int],
    packing: Packing,
    device: torch.device | str,
) -> Batch:
    """The batch of the examples that `numbers` names."""
    own = [examples[i] for i in numbers]
    rows = [tokens for example in own for tokens in example]
    layout = lay_out([tokens.ids for tokens in rows], packing)
    spans = [(row, start, length) for row, tokens in enumerate(rows) for start, length in tokens.completions]
    predicting = [at for row, start, length in spans for at in layout.indices(row, start - 1, length)]
    targets = [token for row, start, length in spans for token in rows[row].ids[start : start + length]]
    return Batch(
        ids=layout.ids.to(device),
        positions=layout.positions.to(device),
        nodes=layout.nodes,
        ends=torch.tensor(layout.ends(), dtype=torch.long, device=device),
        predicting=torch.tensor(predicting, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        completion_mask=length_mask([sum(length for _, length in tokens.completions) for tokens in rows], device),
        sequences=tuple(starts[i] + at for i in numbers for at in range(len(examples[i]))),
        examples=tuple(numbers),
        first=tuple(_starts(own)),
        spans=layout.spans,
        tokens=layout.tokens,
    )


def join_rows(
    laid_out: Sequence[Batch], parts: Sequence[Tensor], shape: tuple[int, int] | None = None
) -> Shaped[Tensor, "batch time"]:
    """One tensor of the whole update from those of its micro-batches, [batch, time] each; 0 beyond them.

    Args:
        shape: of the whole, where these micro-batches are a part of it.
    """
    if shape is None:
        shape = sum(len(batch.sequences) for batch in laid_out), max(part.shape[1] for part in parts)
    whole = parts[0].new_zeros(shape) if parts else torch.zeros(shape)
    for batch, part in zip(laid_out, parts, strict=True):
        whole[list(batch.sequences), : part.shape[1]] = part
    return whole


def rows_of(whole: Shaped[Tensor, "batch time"], batch: Batch) -> Shaped[Tensor, "rows width"]:
    """The micro-batch's part of a tensor of the whole update."""
    return whole[list(batch.sequences), : batch.completion_mask.shape[1]]


def microbatches(examples: Sequence[Sequence[Ids]], max_tokens: int, packing: Packing) -> list[list[int]]:
    """Splits examples (each a list of sequences computed together) into groups of example numbers.

    Computed tokens (padding included) stay within `max_tokens` unless one example alone exceeds it. The result depends
    on nothing but the arguments, so that a resumed run splits alike.
    """
    if packing == "none":
        longest = [max(map(len, example)) for example in examples]
        order = sorted(range(len(examples)), key=lambda i: (-longest[i], i))
        batches: list[list[int]] = []
        rows, width = 0, 0
        for i in order:
            if not batches or (rows + len(examples[i])) * width > max_tokens:
                batches.append([])
                rows, width = 0, longest[i]
            batches[-1].append(i)
            rows += len(examples[i])
        return batches
    order = sorted(range(len(examples)), key=lambda i: tuple(examples[i][0]), reverse=True)
    batches = []
    total = 0
    for i in order:
        first, *others = examples[i]
        own = sum(len(ids) - common_prefix(first, ids) for ids in others)
        shared = common_prefix(examples[batches[-1][-1]][0], first) if batches else 0
        cost = len(first) - shared + own
        if not batches or total + cost > max_tokens:
            batches.append([])
            total, cost = 0, len(first) + own
        batches[-1].append(i)
        total += cost
    return batches


def common_prefix(first: Ids, second: Ids) -> int:
    """Number of leading tokens that agree."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if tuple(first[low:middle]) == tuple(second[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def pad(sequences: Sequence[Ids], value: int, device: torch.device | str = "cpu") -> Int[Tensor, "batch time"]:
    """Right-padded ids. Causal attention never looks right, so real positions need no mask."""
    width = max((len(ids) for ids in sequences), default=0)
    out = torch.full((len(sequences), width), value, dtype=torch.long)
    for row, ids in enumerate(sequences):
        out[row, : len(ids)] = torch.tensor(list(ids), dtype=torch.long)
    return out.to(device)


def length_mask(lengths: Sequence[int], device: torch.device | str = "cpu") -> Bool[Tensor, "batch time"]:
    """True at positions before each length: masks come from lengths, never from ids."""
    width = max(lengths, default=0)
    return (torch.arange(width)[None, :] < torch.tensor(list(lengths), dtype=torch.long)[:, None]).to(device)


def _first(spans: tuple[Span, ...], count: int) -> tuple[Span, ...]:
    """The spans of the first `count` tokens."""
    beginning: list[Span] = []
    for start, length in spans:
        if count <= 0:
            break
        beginning.append((start, min(length, count)))
        count -= length
    return tuple(beginning)


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """Values of the True positions, in order, into [batch, time]; 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device)
    return out.masked_scatter(mask, flat)
