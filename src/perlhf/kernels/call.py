"""What one pass of the network carries: transformers calls our modules with their input alone, so they read it here.

Nothing of it is kept on the network or in a global: a context variable holds it while the pass runs, so that passes in
several threads don't disturb each other.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from perlhf.kernels.attention.tree_attention import Tree
    from perlhf.kernels.kv_cache import KeyValueCache, Placed
    from perlhf.kernels.members import Mixed


@dataclass(frozen=True)
class HeldPair:
    """What a layer's active adapters add to it, in the base's dtype."""

    pair: tuple[Tensor, Tensor]
    padded: tuple[Tensor, Tensor]
    """The same with zeros to a rank that the kernel of few rows takes (`cpu.padded`)."""


@dataclass(frozen=True)
class Call:
    """How one pass computes, the same for all of its tokens."""

    adapters: tuple[str, ...] = ()
    """The active ones, from the lowest to the uppermost."""
    dropout: bool = False
    """Whether the uppermost adapter's input is dropped."""
    dropout_keys: Tensor | None = None
    """Of the pass's tokens, in their shape: what is dropped is a function of them (`method.lora.keyed_dropout`). None:
    it is drawn.
    """
    sampling: bool = False
    """Whether sums may be added up in another order than in a pass that learns, which must have the same bits as a pass
    that doesn't.
    """
    held: Mapping[nn.Module, HeldPair] | None = None
    """By layer, instead of the adapters' own pairs; layers that it lacks are the base's. None: pairs are converted in
    this pass.
    """
    tree: "Tree | None" = None
    """What the tokens of a packed row attend to. (Some networks hand no further arguments to their attention.)"""
    sampled: "KeyValueCache | Placed | None" = None
    """Takes the prompts' keys and values, or attends with one more token a row."""
    own_kernels: bool = True
    """Whether a CPU's own kernels may compute; else torch's operations do."""
    members: tuple[tuple[str, ...], ...] = ()
    """Adapters of each equal part of the tokens, one after the other (`members`); () where all have `adapters`."""
    mixed: "Mixed | None" = None
    """Another adapter for each token, instead of `adapters`."""


_current: ContextVar[Call] = ContextVar("call", default=Call())  # noqa: B039 -- frozen
current_call: Callable[[], Call] = _current.get
"""What the pass carries that this is called in; outside of one the bare base's."""


@contextmanager
def calling(call: Call) -> Iterator[None]:
    """Modules that run inside, in this thread, read `call`."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


def continued(call: Call) -> None:
    """The rest of the pass that runs in this thread computes by `call`; it must be inside `calling`."""
    _current.set(call)


class Turns:
    """Passes through one network: many at a time, or one alone, while it has other weights in its place."""

    def __init__(self) -> None:
        self._entrance = threading.Lock()
        self._left = threading.Condition()
        self._inside: set[object] = set()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Runs beside others."""
        turn = object()
        try:
            with self._entrance, self._left:
                self._inside.add(turn)
            yield
        finally:
            with self._left:
                self._inside.discard(turn)
                self._left.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until all others have left; nobody enters meanwhile."""
        with self._entrance:
            with self._left:
                self._left.wait_for(lambda: not self._inside)
            yield
