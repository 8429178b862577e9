"""How far back the tokens of each layer see: told by the network's own masks, for every way that attends.

transformers makes a layer's mask from a function of two positions. `watching` hands out the masks of one pass, and sees
which of them each layer attends with; `Sight.of` reads the function. So nothing here depends on a network's name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

FAR = 1 << 20
"""A depth beyond every window and chunk that networks have."""
_Depth = TypeVar("_Depth", int, Tensor)


@dataclass(frozen=True)
class Sight:
    """What a token sees of its path: all of it, a window, or the chunk that it is in. Depths count from 0."""

    window: int | None = None
    """It and the tokens before it, this many in all."""
    chunk: int | None = None
    """From the last depth that is a multiple of this."""

    @classmethod
    def of(cls, sees: Callable[..., Any]) -> "Sight | None":
        """The sight that a mask function of transformers describes; None where it is none of these.

        Args:
            sees: (row, head, depth of the query, depths of keys) to booleans.
        """
        first = _first_seen(sees, FAR)
        if first == 0:
            return cls()
        if first is None:
            return None
        sight = cls(window=FAR - first + 1)
        if _first_seen(sees, FAR + 1) != first + 1:
            before = _first_seen(sees, first - 1)
            sight = cls(chunk=first - before) if before is not None and before < first else cls()
        depths = {0, 1, 2, *((sight.window or sight.chunk or 0) + near for near in (-1, 0, 1, 2)), 12345, FAR - 1}
        return sight if all(_first_seen(sees, depth) == sight.first(depth) for depth in depths if depth >= 0) else None

    def first(self, depth: _Depth) -> _Depth:
        """Depth of the first token that one at `depth` sees."""
        if self.window is not None:
            start = depth - self.window + 1
            return start.clamp_min(0) if isinstance(start, Tensor) else max(start, 0)
        return depth - depth % self.chunk if self.chunk is not None else depth * 0


FULL = Sight()


@dataclass
class Watch:
    """What one pass shows of its masks."""

    functions: dict[int, Callable[..., Tensor]] = field(default_factory=dict)
    """By the address of the mask that was made of each."""
    masks: list[Tensor] = field(default_factory=list)
    """Kept, so that no address is given twice."""
    layers: dict[int, Sight | None] = field(default_factory=dict)
    """By number; None where a layer attends with a mask that isn't as it was made, or is of no known form."""


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watching() -> Iterator[Watch]:
    """Masks that are made inside, and layers that attend with them, are noted."""
    token = _watch.set(Watch())
    try:
        watch = _watch.get()
        assert watch is not None
        yield watch
    finally:
        _watch.reset(token)


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """What transformers calls to make a mask: that of scaled-dot-product attention. Noted where somebody watches."""
    watch = _watch.get()
    if watch is None:
        return sdpa_mask(*args, **kwargs)
    made = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    assert made is not None
    watch.functions[made.data_ptr()] = kwargs["mask_function"]
    watch.masks.append(made)
    return made


def note(layer: int, given: Tensor | None) -> None:
    """A layer attends with this mask."""
    watch = _watch.get()
    if watch is None:
        return
    known = [made for made in watch.masks if given is not None and made.data_ptr() == given.data_ptr()]
    same = bool(known) and given is not None and known[0].shape == given.shape
    sight = Sight.of(watch.functions[known[0].data_ptr()]) if same else None
    watch.layers[layer] = sight if watch.layers.get(layer, sight) == sight else None


def _first_seen(sees: Callable[..., Any], depth: int) -> int | None:
    """Depth of the first token that is seen; None unless it and all up to `depth` are, and none after."""
    keys = torch.arange(depth + 3)
    seen = torch.as_tensor(sees(torch.tensor(0), torch.tensor(0), torch.tensor(depth), keys)).expand(len(keys))
    first = int(seen.int().argmax())
    return first if torch.equal(seen, (keys >= first) & (keys <= depth)) else None
