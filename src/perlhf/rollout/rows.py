"""Rows that are sampled together and come and go, each under its own adapter and at its own place in its text.

`Rows` keeps keys and values in a pool: every step is one pass over one new token of each row and over the next tokens
of prompts that have just come, so that nobody waits for anybody's end. Prompts that begin as an earlier sequence of the
same adapter, such as the next turn of a conversation, are computed from where they differ. `Groups` is for what can't
be mixed (networks that are computed in rows, adapters of whole weights): rows of one adapter that begin together.

Both draw as `local.sample` does. Log-probabilities are those of its distribution: at the row's temperature (1 where it
is 0), before `top_p` takes anything away.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perlhf.kernels.attention.tree_attention import Tree
from perlhf.kernels.kv_cache import Placed, Pool
from perlhf.kernels.members import Beside, Mixed, beside
from perlhf.method.packing import Ids, Node, Span
from perlhf.model.model import Cache, Held, Model
from perlhf.rollout.ensemble import in_one_pass
from perlhf.rollout.local import draw
from perlhf.rollout.places import Part, Places, beginning, filled, in_common

PASS_TOKENS = 256
"""Tokens of one step, so that a long prompt holds up nobody's next token for long."""


@dataclass(frozen=True)
class Under:
    """What a row is computed with: an adapter as it is."""

    key: Hashable
    """Another one for each adapter and version."""
    held: Held


@dataclass(frozen=True)
class Wish:
    """How the tokens of a row are drawn, and what is told of them."""

    temperature: float = 1.0
    """0 takes the likeliest."""
    top_p: float = 1.0
    """Draws among the likeliest tokens whose probabilities together reach this."""
    likeliest: int = 0
    """Of so many tokens the log-probability is told at each place."""


@dataclass(eq=False)
class Row:
    """One completion that is being sampled."""

    under: Under
    wish: Wish
    draws: np.random.Generator
    ids: list[int] = field(default_factory=list[int])
    """Sampled so far."""
    prompt: Ids = ()
    parts: list[tuple[Part, int]] = field(default_factory=list[tuple[Part, int]])
    """Where the prompt lies."""
    own: list[Part] = field(default_factory=list[Part])
    """Where the completion does."""

    @property
    def depth(self) -> int:
        """Tokens that are computed before the last sampled one."""
        return len(self.prompt) + len(self.ids) - 1


@dataclass(frozen=True)
class Token:
    """What a step sampled for a row."""

    row: Row
    id: int
    logprob: float
    """Not a number where the network's aren't."""
    likeliest: list[tuple[int, float]]
    """Tokens and their log-probabilities, the likeliest first."""


@dataclass(eq=False)
class _Coming:
    """A prompt that is being computed, for one row or several."""

    under: Under
    ids: Ids
    done: int
    """Of its tokens, those that another sequence brought among them."""
    shared: list[tuple[Part, int]]
    own: list[Part]
    rows: list[Row]
    behind: "tuple[_Coming, int] | None" = None
    """Whose first tokens those of `shared` are, and how many, where that prompt was still being computed."""

    @cached_property
    def array(self) -> NDArray[np.int64]:
        """Its tokens."""
        return np.array(self.ids, dtype=np.int64)

    @property
    def parts(self) -> list[tuple[Part, int]]:
        """Where all of its tokens lie."""
        return [*self.shared, *filled(self.own, len(self.ids) - sum(used for _, used in self.shared))]

    @property
    def new(self) -> int:
        """Computed tokens that no other sequence brought."""
        return self.done - sum(used for _, used in self.shared)


class Rows:
    """Rows on a network that is computed as a tree.

    Args:
        model: with the adapters; none of them may hold whole weights.
        places: tokens whose keys and values are kept at one time.
        pass_tokens: at most so many are computed in a step, beyond one for each row.
    """

    def __init__(self, model: Model, places: int, pass_tokens: int = PASS_TOKENS):
        self.model, self.pass_tokens = model, pass_tokens
        self.pool, self.places = Pool(places), Places(places)
        self._rows: list[Row] = []
        self._coming: list[_Coming] = []
        self._beside: tuple[tuple[Hashable, ...], dict[torch.nn.Module, Beside]] | None = None

    def __len__(self) -> int:
        return len(self._rows) + sum(len(coming.rows) for coming in self._coming)

    def join(
        self, prompt: Ids, draws: Sequence[np.random.Generator], longest: int, under: Under, wish: Wish
    ) -> list[Row] | None:
        """A row for each of `draws`, all of one prompt; None while there is no room.

        Args:
            longest: tokens that a completion may have.
        """
        shared, behind = self._begun(under, prompt)
        known = sum(used for _, used in shared)
        own = self.places.take(len(prompt) - known)
        completions = [self.places.take(longest) for _ in draws]
        taken = [parts for parts in (own, *completions) if parts is not None]
        if own is None or len(taken) <= len(draws):
            for part in (*(part for parts in taken for part in parts), *(part for part, _ in shared)):
                self.places.give_back(part)
            return None
        rows = [Row(under, wish, draw, prompt=prompt, own=parts) for draw, parts in zip(draws, taken[1:], strict=True)]
        self._coming.append(_Coming(under, prompt, known, shared, own, list(rows), behind))
        return rows

    def _begun(self, under: Under, prompt: Ids) -> "tuple[list[tuple[Part, int]], tuple[_Coming, int] | None]":
        """Where the prompt's beginning lies already, or will by the time it is wanted, and with whose prompt."""
        kept, wanted = self.places.begun(under.key, prompt), np.array(prompt[:-1], dtype=np.int64)
        longest, behind = sum(used for _, used in kept), None
        for coming in self._coming:
            if coming.under.key == under.key:
                if (common := in_common(wanted, coming.array)) > longest:
                    longest, behind = common, (coming, common)
        if behind is None:
            return kept, None
        for part, _ in kept:
            self.places.give_back(part)
        return beginning(behind[0].parts, longest), behind

    def leave(self, row: Row) -> None:
        """The row is at its end, or nobody wants it any more. What was computed is kept for others to begin with."""
        if row in self._rows:
            self._rows.remove(row)
            used = len(row.ids) - 1
            own = self.places.shorten(row.own, used)
            self.places.keep(row.under.key, [*row.prompt, *row.ids[:used]], [*row.parts, *own])
            parts = [part for part, _ in (*row.parts, *own)]
        else:
            coming = next(coming for coming in self._coming if row in coming.rows)
            coming.rows.remove(row)
            parts = row.own
        for part in parts:
            self.places.give_back(part)
        self._drop_unwanted()

    def _drop_unwanted(self) -> None:
        """Drops prompts that no row and, of their beginnings, no other prompt waits for."""
        behind = [coming.behind for coming in self._coming if coming.behind is not None]
        waited = {first for first, known in behind if known > first.done}
        if gone := [coming for coming in self._coming if not coming.rows and coming not in waited]:
            self._coming = [coming for coming in self._coming if coming not in gone]
            for part in [part for coming in gone for part, _ in coming.parts]:
                self.places.give_back(part)
            self._drop_unwanted()

    def forget(self, under: Under) -> None:
        """Nothing that this adapter computed is kept; no row may have it."""
        self.places.forget(under.key)
        self._beside = None

    @torch.no_grad()
    def step(self) -> list[Token]:
        """One more token for each row whose prompt is computed. (A row that has come to its end must `leave`.)"""
        pieces: list[tuple[Row | _Coming, int]] = [(row, 1) for row in self._rows]
        room = max(self.pass_tokens - len(pieces), 1)
        after: dict[_Coming, int] = {}
        for coming in self._coming:
            first, known = coming.behind or (coming, 0)
            # The beginning that it shares with another may be computed in this very pass.
            if room > 0 and after.get(first, first.done) >= known:
                count = min(room, len(coming.ids) - coming.done)
                pieces.append((coming, count))
                after[coming] = coming.done + count
                room -= count
        if not pieces:
            return []
        ready: list[tuple[Row, Tensor]] = []
        for run in self._passes(pieces):
            for (piece, _), state in zip(run, self._computed(run), strict=True):
                if isinstance(piece, Row):
                    ready.append((piece, state))
                elif piece.rows and piece.done == len(piece.ids):
                    ready += [(row, state) for row in self._begin(piece)]
        self._drop_unwanted()
        return _drawn(self.model, [row for row, _ in ready], torch.stack([s for _, s in ready])) if ready else []

    # inside

    def _passes(self, pieces: list[tuple[Row | _Coming, int]]) -> list[list[tuple[Row | _Coming, int]]]:
        """What is computed together: everything, where adapters may be mixed; else what has the same one."""
        held = {id(piece.under.held): piece.under.held for piece, _ in pieces}
        paths = sorted({path for one in held.values() for name in one.adapters for path in self._paths(name)})
        if len(held) == 1 or not paths or in_one_pass(self.model, paths):
            return [pieces]
        pieces = sorted(pieces, key=lambda each: id(each[0].under.held))
        return [list(run) for _, run in groupby(pieces, key=lambda each: id(each[0].under.held))]

    def _paths(self, adapter: str) -> Sequence[str]:
        return list(self.model.adapters[adapter].pairs)

    def _computed(self, run: Sequence[tuple[Row | _Coming, int]]) -> list[Tensor]:
        """The state of each piece's last token, from one pass."""
        ids: list[int] = []
        depths: list[int] = []
        nodes: list[Node] = []
        counts: list[int] = []
        for piece, count in run:
            if isinstance(piece, Row):
                before, done, depth, new = piece.parts, len(piece.ids) - 1, piece.depth, piece.ids[-1:]
            else:
                before, done, depth = piece.shared, piece.new, piece.done
                new = piece.ids[depth : depth + count]
                piece.done += count
            nodes += _nodes(before, piece.own, done, count)
            ids += new
            depths += range(depth, depth + count)
            counts.append(count)
        device = self.model.device
        places = [at for node in nodes for at in range(node.start, node.start + node.length)]
        tree = Tree(nodes, self.model.way.sights, apart=True)
        placed = Placed(self.pool, torch.tensor(places, device=device))
        tokens, positions = torch.tensor(ids, device=device), torch.tensor(depths, device=device)
        states = self.model.extend(tokens, positions, tree, placed, self._adapter(run, counts))
        return [states[at - 1] for at in np.cumsum(counts).tolist()]

    def _adapter(self, run: Sequence[tuple[Row | _Coming, int]], counts: Sequence[int]) -> Held | Mixed:
        unders = {piece.under.key: piece.under for piece, _ in run}
        if len(unders) == 1:
            return run[0][0].under.held
        order = tuple(sorted(unders, key=str))
        if self._beside is None or self._beside[0] != order:
            self._beside = (order, beside([unders[key].held.pairs for key in order]))
        numbers = torch.tensor([order.index(piece.under.key) for piece, _ in run])
        spread = torch.repeat_interleave(numbers, torch.tensor(counts))
        return Mixed(self._beside[1], spread.to(self.model.device))

    def _begin(self, coming: _Coming) -> list[Row]:
        """The prompt's rows, now that it is computed, each an owner of its parts."""
        self._coming.remove(coming)
        parts = coming.parts
        self.places.keep(coming.under.key, coming.ids, parts)
        for part, _ in parts:
            part.owners += len(coming.rows) - 1
        for row in coming.rows:
            row.parts = parts
        self._rows += coming.rows
        return coming.rows


class Groups:
    """Rows of one adapter that begin together, on any network: others wait until all of them have left.

    Args:
        most: rows at one time.
    """

    def __init__(self, model: Model, most: int):
        self.model, self.most = model, most
        self._rows: list[Row] = []
        self._gone: set[Row] = set()
        self._longest = 0
        self._cache: Cache | None = None

    def __len__(self) -> int:
        return len(self._rows) - len(self._gone)

    def join(
        self, prompt: Ids, draws: Sequence[np.random.Generator], longest: int, under: Under, wish: Wish
    ) -> list[Row] | None:
        """As `Rows.join`; None once the others have begun, or where they have another adapter."""
        others = any(row.under.key != under.key for row in self._rows)
        if self._cache is not None or others or (self._rows and len(self._rows) + len(draws) > self.most):
            return None
        rows = [Row(under, wish, draw, prompt=prompt) for draw in draws]
        self._rows += rows
        self._longest = max(self._longest, longest)
        return rows

    def leave(self, row: Row) -> None:
        """As `Rows.leave`."""
        self._gone.add(row)
        if len(self._gone) == len(self._rows):
            self._rows, self._gone, self._cache, self._longest = [], set(), None, 0

    def forget(self, under: Under) -> None:
        """As `Rows.forget`."""

    @torch.no_grad()
    def step(self) -> list[Token]:
        """As `Rows.step`."""
        staying = [at for at, row in enumerate(self._rows) if row not in self._gone]
        if not staying:
            return []
        rows = [self._rows[at] for at in staying]
        held = rows[0].under.held
        if self._cache is None:
            states, self._cache = self.model.prefill([row.prompt for row in rows], held)
            self._cache.fork(1, self._longest)
        else:
            if self._gone:
                self._cache.keep(torch.tensor(staying, device=self.model.device))
            ids = torch.tensor([row.ids[-1] for row in rows], device=self.model.device)
            states = self.model.decode(ids, self._cache, held)
        self._rows, self._gone = rows, set()
        return _drawn(self.model, rows, states, held)


def _drawn(model: Model, rows: Sequence[Row], states: Tensor, held: Held | None = None) -> list[Token]:
    """The next token of each row from the state before it [row, hidden], which is added to the row's."""
    logits = model.logits(states, held)
    wishes = [row.wish for row in rows]
    draws = torch.tensor([row.draws.random() for row in rows], dtype=torch.float64, device=logits.device)
    temperatures = sorted({wish.temperature for wish in wishes})
    if len(temperatures) == 1:
        heat: float | Tensor = temperatures[0]
        scaled = logits if heat == 0 else logits / heat
    else:
        heat = torch.tensor([wish.temperature or 1.0 for wish in wishes], device=logits.device)[:, None]
        scaled = logits / heat
    chosen, cut = logits, [at for at, wish in enumerate(wishes) if wish.top_p < 1 and wish.temperature > 0]
    if cut:
        chosen = logits.clone()
        shares = torch.tensor([wishes[at].top_p for at in cut], device=logits.device)
        chosen[cut] = chosen[cut].masked_fill(~_nucleus(scaled[cut], shares), -torch.inf)
    tokens, logprobs = draw(chosen, draws, heat)
    greedy = [at for at, wish in enumerate(wishes) if wish.temperature == 0]
    if greedy and len(temperatures) > 1:
        tokens[greedy] = logits[greedy].argmax(-1)
    if again := sorted({*cut, *(greedy if len(temperatures) > 1 else ())}):
        logprobs[again] = scaled[again].log_softmax(-1).gather(-1, tokens[again, None]).squeeze(-1)
    told = [at for at, wish in enumerate(wishes) if wish.likeliest]
    likeliest: dict[int, list[tuple[int, float]]] = {}
    if told:
        best = scaled[told].log_softmax(-1).topk(max(wishes[at].likeliest for at in told))
        for at, values, numbers in zip(told, best.values.tolist(), best.indices.tolist(), strict=True):
            likeliest[at] = list(zip(numbers, values, strict=True))[: wishes[at].likeliest]
    found: list[Token] = []
    for at, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)):
        row.ids.append(token)
        found.append(Token(row, token, logprob, likeliest.get(at, [])))
    return found


def _nucleus(logits: Tensor, shares: Tensor) -> Tensor:
    """[row, vocab] whether a token is among the likeliest whose probabilities together reach the row's share."""
    ordered, places = logits.softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(before, dtype=torch.bool).scatter_(-1, places, before < shares[:, None])


def _nodes(before: Sequence[tuple[Part, int]], own: Sequence[Part], done: int, count: int) -> list[Node]:
    """Where the next `count` tokens of a sequence lie in its own parts, of which it has filled `done` places."""
    nodes: list[Node] = []
    spans: list[Span] = [(part.start, used) for part, used in before if used]
    for part in own:
        if done >= part.length:
            done -= part.length
            spans.append((part.start, part.length))
        elif count:
            length = min(count, part.length - done)
            prefix = (*spans, (part.start, done)) if done else tuple(spans)
            nodes.append(Node(part.start + done, length, prefix))
            spans.append((part.start, done + length))
            done, count = 0, count - length
    return nodes
