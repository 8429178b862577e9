"""Keys and values while completions are sampled: a prompt's once for all its rows, each row's own tokens beside them.

transformers' networks call `update` in every layer, as on their own caches; `attention` then asks `attend`, which
computes the one new token of each row over its prompt and what it has sampled. Nothing is copied from step to step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perlhf.packing import length_mask

GROW = 64
"""Tokens by which the rows' own buffers grow."""


class KeyValueCache:
    """Filled by one pass over the prompts; after `fork` it takes one token a row at a time.

    Args:
        positions: for each prompt, where its tokens lie in the packed row of that pass.
        device: of the network.
    """

    def __init__(self, positions: Sequence[Sequence[int]], device: torch.device):
        self.lengths = torch.tensor([len(places) for places in positions], device=device)
        self.seen = length_mask([len(places) for places in positions], device)
        self._places = torch.zeros(self.seen.shape, dtype=torch.long, device=device)
        self._places[self.seen] = torch.tensor([at for places in positions for at in places], device=device)
        self.rows = torch.arange(0, device=device)
        """[row] the prompt of each row; none before `fork`."""
        self.time = 0
        """Tokens that each row has beyond its prompt."""
        self._prompts: list[tuple[Tensor, Tensor]] = []
        self._own: list[tuple[Tensor, Tensor]] = []
        self._layer = 0
        # Rounded logits would move the probabilities: products are float32, and on a CPU nothing is converted for them.
        self._dtype = torch.float32 if device.type == "cpu" else None

    def fork(self, samples: int) -> None:
        """`samples` rows for each prompt, ordered by prompt."""
        assert not len(self.rows), "forked already"
        self.rows = torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(samples)
        none = (len(self.rows), self._prompts[0][0].shape[1], 0)
        self._own = [(k.new_zeros(*none, k.shape[3]), v.new_zeros(*none, v.shape[3])) for k, v in self._prompts]
        self._arrange()

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (ascending numbers), and prompts that have no row left."""
        self.rows = self.rows[rows]
        self._own = [(k[rows], v[rows]) for k, v in self._own]
        left = torch.unique(self.rows)
        if len(left) < len(self.lengths):
            self._prompts = [(k[left], v[left]) for k, v in self._prompts]
            self.lengths, self.seen = self.lengths[left], self.seen[left]
            self.rows = torch.searchsorted(left, self.rows)
        self._arrange()

    def positions(self) -> Tensor:
        """[row] depth of the token that comes next."""
        return self.lengths[self.rows] + self.time

    def update(self, key: Tensor, value: Tensor, layer: int, *unused: Any, **ignored: Any) -> tuple[Tensor, Tensor]:
        """What a layer's attention calls with new keys and values [batch, kv_heads, time, width]; returns them."""
        self._layer = layer
        if not len(self.rows):
            assert len(key) == 1 and layer == len(self._prompts), "the prompts are one packed row, layer after layer"
            self._prompts.append((self._of_prompts(key[0]), self._of_prompts(value[0])))
        else:
            keys, values = self._own[layer]
            if keys.shape[2] == self.time:
                keys, values = (torch.cat([t, t.new_zeros(*t.shape[:2], GROW, t.shape[3])], 2) for t in (keys, values))
                self._own[layer] = keys, values
            keys[:, :, self.time], values[:, :, self.time] = key[:, :, 0], value[:, :, 0]
        return key, value

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """softmax(scaling * q k^T) v of the new tokens [row, heads, 1, width] in the layer updated last: same shape."""
        keys, values = self._prompts[self._layer]
        own_keys, own_values = (t[:, :, : self.time + 1].float() for t in self._own[self._layer])
        count, heads, _, width = query.shape
        kv_heads = keys.shape[1]
        q = query.float().view(count, kv_heads, heads // kv_heads, width) * scaling
        past = self._by_prompt(q) @ keys.float().transpose(2, 3)
        past = past.masked_fill_(~self.seen[:, None, None, :], -torch.inf)
        logits = torch.cat([self._by_row(past, heads // kv_heads), q @ own_keys.transpose(2, 3)], -1)
        p = torch.softmax(logits, -1)
        of_prompt, of_own = p.split([keys.shape[2], self.time + 1], -1)
        mixed = self._by_row(self._by_prompt(of_prompt) @ values.float(), heads // kv_heads) + of_own @ own_values
        return mixed.reshape(count, heads, 1, -1).to(query.dtype)

    def advance(self) -> None:
        """The token of each row has gone through all layers."""
        self.time += 1

    def get_seq_length(self, *unused: Any) -> int:
        """For networks that ask how long the cache is; positions are given to them, so that it doesn't matter."""
        return int(self.lengths.max()) + self.time

    def _of_prompts(self, packed: Tensor) -> Tensor:
        """[kv_heads, tokens, width] as [prompt, kv_heads, longest, width]; rows beyond a prompt's end are hidden."""
        return packed[:, self._places].transpose(0, 1).to(self._dtype or packed.dtype).contiguous()

    def _arrange(self) -> None:
        """Places for the rows of each prompt: all prompts get as many as the one with most rows."""
        counts = torch.bincount(self.rows, minlength=len(self.lengths))
        self._most = int(counts.max())
        first = counts.cumsum(0) - counts
        rank = torch.arange(len(self.rows), device=self.rows.device) - first[self.rows]
        self._slots = None if bool((counts == self._most).all()) else self.rows * self._most + rank

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
