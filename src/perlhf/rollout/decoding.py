"""Sampling steps on a GPU: recorded once as a graph and replayed, since launching their small kernels takes longer than
running them.
"""

import torch
from torch import Tensor

from perlhf.kernels.kv_cache import KeyValueCache
from perlhf.model.model import Model


class Decoding:
    """One more token for every row of a forked cache, again and again, under one adapter that is held meanwhile.

    On a GPU the first step runs as it is, the second is recorded, and all others replay it; rows that have ended stay
    until half of them have, since the rest must then be recorded anew. On a CPU every step is `Model.decode`.
    """

    def __init__(self, model: Model, cache: KeyValueCache, adapter: str | None):
        self.model, self.cache, self.adapter = model, cache, adapter
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids = self._states = torch.empty(0)

    def __call__(self, ids: Tensor) -> Tensor:
        """States [row, hidden] of one more token [row]; those of a step are overwritten by the next one."""
        self._steps += 1
        if self._steps == 1 or ids.device.type != "cuda":
            return self.model.decode(ids, self.cache, self.adapter)
        if self._graph is None:
            self._ids, graph = ids.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._states = self.model.decode(self._ids, self.cache, self.adapter)
            self._graph = graph
        self._ids.copy_(ids)
        self._graph.replay()
        return self._states

    def drops(self, left: int, rows: int) -> bool:
        """Whether rows that have ended are worth dropping, with `left` of `rows` going on."""
        return left <= rows // 2 if self.cache.fixed else left < rows

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (ascending numbers)."""
        self.cache.keep(rows)
        self._graph, self._steps = None, 0
