"""A frozen base in parts: each worker keeps its part of every layer, and gathers a layer while it is computed.

torch's FSDP2 (`fully_shard`) does it, with nothing to learn: only all-gathers, no reduced gradients, no optimiser's
shards. Adapters aren't part of the base, and each worker has all of them as ever.

A gather needs all workers. So all must make the same passes in the same order: where one has fewer micro-batches than
another it computes empty ones (`shares.own_batches`), and where its completions have ended it goes on beside those that
haven't (`Shards.anybody`).
"""

import atexit
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from perlhf.errors import ConfigError
from perlhf.parallel.place import launched
from perlhf.parallel.workers import NEVER, Workers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Shard = Literal["none", "full", "node"]


@dataclass(frozen=True)
class Shards:
    """How the base is spread over the workers."""

    how: Shard
    workers: Workers
    count: int
    """Workers that hold one base between them."""
    mesh: "DeviceMesh"

    def spread(self, part: nn.Module, kept: Sequence[nn.Parameter] = ()) -> None:
        """From now on each worker keeps 1 / `count` of the parameters of `part` that no part inside it has.

        They are whole while `part` is called and while its gradient is computed, and inside `whole`.

        Args:
            kept: parameters that stay whole.
        """
        from torch.distributed.fsdp import fully_shard

        fully_shard(part, mesh=self.mesh, reshard_after_forward=True, ignored_params=set(kept))

    def anybody(self, said: bool) -> bool:
        """Whether at least one worker says so; all must ask."""
        return self.workers.any(said)


def shards_of(how: Shard, workers: Workers, device: torch.device) -> Shards | None:
    """The workers as parts of the base lie on them; None for `none`, where each has all of it.

    Raises:
        ConfigError: one process that nothing launched; workers that share a GPU; for `node`, workers that aren't
            numbered node by node, equally many on each.
    """
    if how == "none":
        return None
    if workers.count == 1 and not launched():
        what = f"shard: {how} spreads the base over several workers, and there is one process"
        hint = "perlhf launch --workers N STAGE recipe.yaml, or torchrun, starts them; shard: none keeps it whole"
        raise ConfigError(what, where="shard", hint=hint)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and workers.count > 1 and workers.on_cpu):
        what = "workers share a GPU" if device.type == "cuda" else f"device is {device.type}"
        allowed = "a GPU for each worker, or device: cpu"
        raise ConfigError(f"shard: {how}, but {what}", where="shard", allowed=allowed, hint="shard: none")
    from torch.distributed.device_mesh import DeviceMesh

    if not dist.is_initialized():  # one worker alone, that was launched as such
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=NEVER)  # pyright: ignore[reportPrivateImportUsage]
        atexit.register(_leave)
    numbers = torch.arange(workers.count)
    if how == "full":
        assert dist.group.WORLD is not None, "workers share a group"
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        return Shards(how, workers, workers.count, mesh)
    count = _on_each_node(workers)
    table = numbers.view(-1, count)
    groups = [_group_of(rows.tolist(), workers.number) for rows in (table.t(), table)]
    mesh = DeviceMesh.from_group(groups, device.type, table, mesh_dim_names=("node", "worker"))
    return Shards(how, workers, count, mesh)


@contextlib.contextmanager
def whole(part: nn.Module) -> Iterator[None]:
    """The parameters of a part that `Shards.spread` was given are whole inside, and may be read; all workers enter."""
    known: Any = part
    known.unshard()
    try:
        yield
    finally:
        known.reshard()


@contextlib.contextmanager
def whole_around(base: nn.Module, path: str) -> Iterator[None]:
    """`whole` for the innermost part that holds the module at `path`; nothing where the base isn't spread."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # where nobody has loaded it, nothing is spread
    names = path.split(".") if fsdp is not None else []
    for length in range(len(names), -1, -1):
        part = base.get_submodule(".".join(names[:length]))
        if fsdp is not None and isinstance(part, fsdp.FSDPModule):
            with whole(part):
                yield
            return
    yield


def _on_each_node(workers: Workers) -> int:
    """How many workers each node has.

    Raises:
        ConfigError: not all nodes have equally many, numbered one node after the other.
    """
    local, count = workers.local
    fits = workers.count % count == 0 and workers.number % count == local
    sizes = workers.gather(torch.tensor([count if fits else 0])) if workers.count > 1 else [torch.tensor([count])]
    if any(int(size) != count for size in sizes) or not fits:
        raise ConfigError(
            "shard: node needs equally many workers on each node, numbered one node after the other",
            where="shard",
            hint="start as many on each machine (torchrun --nproc-per-node), or shard: full",
        )
    return count


def _group_of(rows: Sequence[Sequence[int]], number: int) -> Any:
    """The process group that this worker is in, of those of all rows, which all workers make."""
    made = [dist.new_group(list(row), timeout=NEVER) for row in rows]
    return next(group for row, group in zip(rows, made, strict=True) if number in row)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
