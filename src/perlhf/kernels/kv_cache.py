"""Keys and values while completions are sampled: a prompt's once for all its rows, each row's own tokens beside them.

`attention` hands over what every layer attends with: the prompts' keys and values by `record`, then one token a row by
`attend`, which computes it over its prompt and what the row has sampled. Nothing is copied from step to step. On a GPU
no tensor changes its place or shape from step to step, also where prompts take turns (`put`), so that a step that was
recorded once is replayed for all of them.

A `Pool` is for rows that come and go while others are sampled, each under its own adapter (`serving`).
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from perlhf.kernels import cpu
from perlhf.kernels.attention.sight import FULL, Sight
from perlhf.method.packing import length_mask

ALIGNED = 16
"""Elements to a multiple of which rows of a mask are laid out in memory, as CUDA's kernel wants them."""
GROW = 64
"""Tokens by which the rows' own buffers grow."""
FIXED = ("cuda",)
"""Devices where a step changes no tensor's shape and so can be recorded and replayed (`rollout.local.Decoding`)."""


class KeyValueCache:
    """Filled by one pass over the prompts; after `fork` it takes one token a row at a time.

    Args:
        positions: for each prompt, where its tokens lie in the packed row of that pass.
        device: of the network.
        sights: how far back layers see, by number; those that are missing see all.
    """

    def __init__(
        self, positions: Sequence[Sequence[int]], device: torch.device, sights: Mapping[int, Sight] | None = None
    ):
        self.sights = sights or {}
        self.lengths = torch.tensor([len(places) for places in positions], device=device)
        self.seen = length_mask([len(places) for places in positions], device)
        self._places = torch.zeros(self.seen.shape, dtype=torch.long, device=device)
        self._places[self.seen] = torch.tensor([at for places in positions for at in places], device=device)
        self.rows = torch.arange(0, device=device)
        """[row] the prompt of each row; none before `fork`."""
        self.time = 0
        """Tokens that each row has beyond its prompt; on `FIXED` devices `_now` tells it, for each prompt."""
        self.fixed = device.type in FIXED
        """Whether a step changes no tensor's shape."""
        self._prompts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._own: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._times: Counter[int] = Counter()
        # Rounded logits would move the probabilities: products are float32. A CPU converts what it keeps once.
        self._dtype = torch.float32 if device.type == "cpu" and cpu.library() is None else None
        self._adds_up_wide = device.type == "cuda"  # its kernel computes them so itself

    def fork(self, samples: int, most: int | None = None, places: int | None = None) -> None:
        """`samples` rows for each prompt, ordered by prompt; on `FIXED` devices with room for `most` tokens at once.

        Args:
            places: on `FIXED` devices only so many prompts have rows at a time, at first those that come first; others
                wait to be `put` in their places. None: all have them.
        """
        assert not len(self.rows), "forked already"
        self._times.clear()
        self._waiting = self._prompts, self.lengths
        if places is not None and places < len(self.lengths):
            assert self.fixed, "steps of other devices have one time for all rows"
            self._prompts = {layer: (k[:places].clone(), v[:places].clone()) for layer, (k, v) in self._prompts.items()}
            self.lengths, self.seen = self.lengths[:places].clone(), self.seen[:places]
        device, room = self.lengths.device, most + -most % ALIGNED if most and self.fixed else GROW
        self.rows = torch.arange(len(self.lengths), device=device).repeat_interleave(samples)
        self._own = {
            layer: (self._empty(keys, room), self._empty(values, room))
            for layer, (keys, values) in self._prompts.items()
        }
        if self.fixed:
            self._longest, self._now = most, torch.zeros_like(self.lengths)
        self._arrange()

    def put(self, place: int, prompt: int) -> None:
        """The rows at this place of `fork` have ended, and are now so many new ones of another prompt."""
        prompts, lengths = self._waiting
        for turn, kept in self._prompts.items():
            for own, waiting in zip(kept, prompts[turn], strict=True):
                own[place].copy_(waiting[prompt])
        for own in (tensor for kept in self._own.values() for tensor in kept):
            # Hidden is a weight of 0, which what isn't a number would outlive.
            own[place * self._most : (place + 1) * self._most].zero_()
        self.lengths[place], self._now[place] = lengths[prompt], 0
        self._see()

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (ascending numbers), and prompts that have no row left."""
        self.rows = self.rows[rows]
        self._own = {layer: (k[rows], v[rows]) for layer, (k, v) in self._own.items()}
        left = torch.unique(self.rows)
        self._waiting = {}, self.lengths
        if len(left) < len(self.lengths):
            if self.fixed:
                self._now = self._now[left]
            self._prompts = {layer: (k[left], v[left]) for layer, (k, v) in self._prompts.items()}
            self.lengths, self.seen = self.lengths[left], self.seen[left]
            self.rows = torch.searchsorted(left, self.rows)
        self._arrange()

    def positions(self) -> Tensor:
        """[row] depth of the token that comes next."""
        return (self.lengths + (self._now if self.fixed else self.time))[self.rows]

    def record(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes keys and values of the packed prompts [kv_heads, tokens, width] in one layer, each time that it
        attends; gives those to attend over, which are the same.
        """
        assert not len(self.rows), "prompts come before rows"
        self._prompts[self._turn(layer)] = self._of_prompts(key), self._of_prompts(value)
        return key, value

    def _turn(self, layer: int) -> tuple[int, int]:
        """The layer, and how often it has attended in this pass: some networks go through their layers repeatedly, and
        some layers attend to two sorts of values.
        """
        self._times[layer] += 1
        return layer, self._times[layer]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """softmax(scaling * q k^T) v of one new token a row, kept from now on.

        Args:
            query: [row, heads, 1, width]; key, value: [row, kv_heads, 1, width].
            cap, sinks: as in `tree_attention`.

        Returns:
            [row, heads, 1, width of value].
        """
        turn = self._turn(layer)
        keys, values = self._prompts[turn]
        count, heads, _, width = query.shape
        kv_heads = keys.shape[1]
        if cap is None and sinks is None and cpu.usable(query, keys, values) and width == values.shape[-1]:
            return self._attend_natively(turn, query, key, value, scaling)
        share, dtype = heads // kv_heads, query.dtype if self._adds_up_wide else torch.float32
        q = query.to(dtype).reshape(count, kv_heads, share, width)
        sight = self.sights.get(layer, FULL)
        part = attend_part if sight == FULL and cap is None else functools.partial(written_part, cap=cap)
        hidden = self._hidden
        if sight != FULL:
            hidden = hidden.masked_fill(self._early(sight, keys.shape[2]), -torch.inf)
        past, past_sum = part(self._by_prompt(q), keys.to(dtype), values.to(dtype), scaling, hidden)
        past, past_sum = self._by_row(past, share), self._by_row(past_sum[..., None], share).squeeze(-1)
        for buffer, new in zip(self._own[turn], (key, value), strict=True):
            if self.fixed:
                at = self._now[self.rows].view(-1, 1, 1, 1)
                buffer.scatter_(2, at.expand(-1, *new.shape[1:]), new.to(buffer.dtype))
            else:
                buffer[:, :, self.time] = new[:, :, 0]
        seen, mask = (None, self._later.to(dtype)) if self.fixed else (self.time + 1, None)
        own_keys, own_values = (buffer[:, :, :seen].to(dtype) for buffer in self._own[turn])
        if sight != FULL:
            none = own_keys.new_zeros(1, 1, 1, own_keys.shape[2]) if mask is None else mask
            mask = none.masked_fill(self._early_own(sight, own_keys.shape[2]), -torch.inf)
        own, own_sum = part(q, own_keys, own_values, scaling, mask)
        mixed = join_parts((past, past_sum), (own, own_sum))
        if sinks is not None:
            log_sum = torch.logaddexp(past_sum, own_sum)
            mixed = without_sink(mixed, log_sum, sinks.view(1, kv_heads, share))
        return mixed.reshape(count, heads, 1, -1).to(query.dtype)

    def _first_seen(self, sight: Sight) -> Tensor:
        """[prompt] depth of the first token that the newest one of the prompt's rows sees."""
        return sight.first(self.lengths + (self._now if self.fixed else self.time))

    def _early(self, sight: Sight, longest: int) -> Tensor:
        """[prompt, 1, 1, longest] where a prompt's tokens lie before those."""
        depth = torch.arange(longest, device=self.lengths.device)
        return (depth < self._first_seen(sight)[:, None])[:, None, None]

    def _early_own(self, sight: Sight, room: int) -> Tensor:
        """[row, 1, 1, room] where a row's own tokens do."""
        depth = self.lengths[:, None] + torch.arange(room, device=self.lengths.device)
        return (depth < self._first_seen(sight)[:, None])[self.rows][:, None, None]

    def advance(self) -> None:
        """The token of each row has gone through all layers."""
        self.time += 1
        self._times.clear()
        if self.fixed:
            self._now.add_(1)
        if self.fixed and self._longest is not None:
            # A row that has ended stays at its last token while others go on: the network may have no place beyond.
            self._now.clamp_(max=self._longest - 1)
        elif self.time == self._room:
            self._own = {layer: (_grown(keys), _grown(values)) for layer, (keys, values) in self._own.items()}
            self._lay_out()
        if self.fixed:
            self._see()

    @property
    def _room(self) -> int:
        """Tokens of a row that its buffers take."""
        return next(iter(self._own.values()))[0].shape[2]

    def _attend_natively(
        self, turn: tuple[int, int], query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        (keys, values), (own_keys, own_values) = self._prompts[turn], self._own[turn]
        out = torch.empty_like(query)
        prompts, kv_heads, longest, width = keys.shape
        capacity, time = own_keys.shape[2], self.time + 1
        sizes = cpu.int64s([prompts, longest, query.shape[1], kv_heads, width, capacity, time])
        tensors = query, key, value, keys, values, own_keys, own_values, out, self.lengths
        tensors = *tensors, self._first_seen(self.sights.get(turn[0], FULL)), self._first_rows
        cpu.call("decode", *tensors, sizes, float(scaling))
        return out

    def _empty(self, like: Tensor, room: int) -> Tensor:
        return like.new_zeros(len(self.rows), like.shape[1], room, like.shape[3])

    def _of_prompts(self, packed: Tensor) -> Tensor:
        """[kv_heads, tokens, width] as [prompt, kv_heads, longest, width]; rows beyond a prompt's end are hidden."""
        return packed[:, self._places].transpose(0, 1).to(self._dtype or packed.dtype).contiguous()

    def _arrange(self) -> None:
        """Places for the rows of each prompt: all prompts get as many as the one with most rows. Masks, too."""
        self._lay_out()
        if self.fixed:
            self._see()
        counts = torch.bincount(self.rows, minlength=len(self.lengths))
        self._first_rows = F.pad(counts.cumsum(0), (1, 0))
        self._most = int(counts.max())
        first = counts.cumsum(0) - counts
        rank = torch.arange(len(self.rows), device=self.rows.device) - first[self.rows]
        self._slots = None if bool((counts == self._most).all()) else self.rows * self._most + rank

    def _lay_out(self) -> None:
        """Masks to be added, 0 or -inf: of prompts beyond their ends, and on `FIXED` devices of rows after now."""
        prompts, longest = self.seen.shape
        dtype = next(iter(self._prompts.values()))[0].dtype if self._adds_up_wide else torch.float32
        hidden = torch.zeros(prompts, longest + -longest % ALIGNED, dtype=dtype, device=self.seen.device)
        self._hidden = hidden[:, :longest].masked_fill_(~self.seen, -torch.inf)[:, None, None]
        if self.fixed:
            self._later = hidden.new_zeros(len(self.rows), 1, 1, self._room)

    def _see(self) -> None:
        """Writes both masks as rows are now, in their places."""
        for mask, last in ((self._hidden, self.lengths - 1), (self._later, self._now[self.rows])):
            depth = torch.arange(mask.shape[-1], device=mask.device)
            mask.zero_().masked_fill_((depth > last[:, None])[:, None, None], -torch.inf)

    def _by_prompt(self, rows: Tensor) -> Tensor:
        """[row, kv_heads, share, x] as [prompt, kv_heads, most * share, x]: a prompt's rows side by side."""
        prompts, (_, kv_heads, share, last) = len(self.lengths), rows.shape
        if self._slots is not None:
            rows = rows.new_zeros(prompts * self._most, kv_heads, share, last).index_copy_(0, self._slots, rows)
        return (
            rows.view(prompts, self._most, kv_heads, share, last)
            .transpose(1, 2)
            .reshape(prompts, kv_heads, self._most * share, last)
        )

    def _by_row(self, prompts: Tensor, share: int) -> Tensor:
        """The reverse of `_by_prompt`."""
        count, kv_heads, _, last = prompts.shape
        rows = prompts.view(count, kv_heads, self._most, share, last).transpose(1, 2)
        rows = rows.reshape(count * self._most, kv_heads, share, last)
        return rows if self._slots is None else rows[self._slots]


class Pool:
    """Keys and values of sequences that come and go, and share what they have in common: each token has a place.

    Whoever owns it knows which places are whose. The first pass tells how wide they are in each layer.
    """

    def __init__(self, places: int):
        self.places = places
        self.bytes = 0
        """That the pool may take, once a pass was made."""
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def kept(self, turn: tuple[int, int], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[kv_heads, places, width] of what attends in this turn."""
        if turn not in self._kept:
            self._kept[turn] = (self._empty(key), self._empty(value))
        return self._kept[turn]

    def _empty(self, like: Tensor) -> Tensor:
        made = like.new_empty(len(like), self.places, like.shape[2])  # memory is taken as places are first written
        self.bytes += made.numel() * made.element_size()
        return made


class Placed:
    """One pass whose tokens' keys and values go to these places of a pool; its tree says what they attend to there.

    Args:
        places: [tokens] of the packed row.
    """

    def __init__(self, pool: Pool, places: Tensor):
        self.pool, self.places = pool, places
        self._times: Counter[int] = Counter()

    def record(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes keys and values of the pass's tokens [kv_heads, tokens, width] in one layer; gives all of the pool's
        [kv_heads, places, width].
        """
        self._times[layer] += 1
        keys, values = self.pool.kept((layer, self._times[layer]), key, value)
        keys[:, self.places], values[:, self.places] = key, value
        return keys, values


def attend_part(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(scaling * q k^T + mask) v over part of what the queries see, and what joins it with other parts.

    Args:
        query: [batch, heads, n, width]; keys, values: [batch, heads, m, width] of the same dtype.
        mask: to be added, broadcast to [batch, heads, n, m]; each query sees some of the keys.

    Returns:
        [batch, heads, n, width], and the logarithm of each row's sum of exponentials, float32 [batch, heads, n].
    """
    if query.device.type == "cuda" and query.shape[-1] % 8 == values.shape[-1] % 8 == 0:
        if mask is not None:
            mask = mask.expand(*query.shape[:3], keys.shape[2])
        mixed, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, values, mask, True, 0.0, False, scale=scaling
        )
        return mixed, log_sum[..., : query.shape[2]]
    return written_part(query, keys, values, scaling, mask)


def written_part(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `attend_part`, operation by operation. A query may see nothing: its share of the whole is 0 then.

    Args:
        cap: scores s = scaling * q k^T become cap * tanh(s / cap).
    """
    logits = (query.float() @ keys.float().transpose(2, 3)) * scaling
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    logits = logits if mask is None else logits + mask
    log_sum = logits.logsumexp(-1).clamp_min(-1e30)
    return torch.exp(logits - log_sum[..., None]).to(values.dtype) @ values, log_sum


def join_parts(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the keys of two parts, as `attend_part` tells them: each weighted by its share of all
    exponentials.
    """
    weight = torch.sigmoid(second[1] - first[1])[..., None]
    return torch.lerp(first[0].float(), second[0].float(), weight).to(first[0].dtype)


def without_sink(mixed: Tensor, log_sum: Tensor, sinks: Tensor) -> Tensor:
    """What is left of attention [..., width] where a sink takes its share of the softmax.

    Args:
        log_sum: of the other scores' exponentials, [...].
        sinks: their scores, broadcast to [...].
    """
    return mixed * torch.sigmoid(log_sum - sinks.float())[..., None].to(mixed.dtype)


def _grown(buffer: Tensor) -> Tensor:
    return torch.cat([buffer, buffer.new_zeros(*buffer.shape[:2], GROW, buffer.shape[3])], 2)
