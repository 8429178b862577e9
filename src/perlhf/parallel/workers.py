"""What several workers tell one another: sums in the order of the workers, and what the first one says.

Only tensors travel. With one process every function here gives back what it was given, and no group is made.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from perlhf.errors import ConfigError, DivergenceError
from perlhf.parallel.watch import Watch

Value = TypeVar("Value")

AT_ONCE = 16_384
"""Numbers up to which each worker gets all parts of a sum; of more, each adds up its piece and hands that on."""
NEVER = timedelta(days=365)
"""Lives are watched (`watch`), so that nothing else limits how long somebody may be waited for."""


class Workers:
    """This worker among all: `number` of `count`, from 0. The first one alone writes and speaks.

    All workers must call the same methods in the same order.
    """

    def __init__(
        self,
        number: int = 0,
        count: int = 1,
        watch: Watch | None = None,
        on_cpu: bool = True,
        local: tuple[int, int] = (0, 1),
    ):
        self.number, self.count = number, count
        self.local = local
        """Its number on its machine, and how many are there."""
        self.on_cpu = on_cpu
        """Whether what they tell one another travels through the CPU's memory."""
        self.in_step = False
        """Whether all must make the same passes through the base, each holding a part of it (`shard`)."""
        self._watch = watch

    @property
    def first(self) -> bool:
        """Whether this is the worker that writes and speaks."""
        return self.number == 0

    @property
    def apart(self) -> "Workers":
        """Those that share what isn't laid out for passes in step: where these are asked for, each does all of it."""
        return ALONE if self.in_step else self

    def sum(self, values: Tensor) -> Tensor:
        """The workers' tensors of one shape, added up from the first to the last: the same bits everywhere.

        Rows that one worker has and the others have as zeros stay as they are.
        """
        if self.count == 1:
            return values
        flat = self._to_group(values.detach().reshape(-1))
        if flat.numel() <= AT_ONCE:
            return self._back(_in_order(self._all(flat)), values)
        # Each adds up one piece of all: with n workers every one sends and gets 2 (n - 1) / n of the whole.
        piece = -(-flat.numel() // self.count)
        padded = torch.nn.functional.pad(flat, (0, piece * self.count - flat.numel()))
        parts = torch.empty_like(padded)
        self._done(dist.all_to_all_single(parts, padded, async_op=True))
        total = _in_order(list(parts.view(self.count, piece)))
        whole = torch.cat(self._all(total))
        return self._back(whole[: flat.numel()], values)

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Replaces gradients by their sums over the workers, in one float32 sum; one that nobody has stays None."""
        if self.count == 1:
            return
        given = list(parameters)
        has = torch.tensor([float(p.grad is not None) for p in given], device=given[0].device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in given]
        flat = self.sum(torch.cat([has, *(part.reshape(-1).float() for part in parts)]))
        anybody, at = flat[: len(given)].tolist(), len(given)
        for parameter, somebody in zip(given, anybody, strict=True):
            if somebody:
                parameter.grad = flat[at : at + parameter.numel()].view_as(parameter).to(parameter.dtype)
            at += parameter.numel()

    def numbers(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each number's sum over the workers, in float64."""
        if self.count == 1:
            return dict(values)
        total = self.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def any(self, said: bool) -> bool:
        """Whether at least one worker says so."""
        return said if self.count == 1 else self.sum(torch.tensor([float(said)])).item() > 0

    def once(self, work: Callable[[], Value]) -> Value:
        """Has the first worker alone do it; all get what it gives, which survives JSON."""
        if self.count == 1:
            return work()
        said = json.dumps(work()).encode() if self.first else b""
        size = int(self.sum(torch.tensor([len(said)])).item())
        text = torch.zeros(size, dtype=torch.uint8)
        if self.first:
            text = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        self._done(dist.broadcast(text, 0, async_op=True))
        return json.loads(text.numpy().tobytes())

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites tensors by those of the first worker."""
        for tensor in tensors if self.count > 1 else ():
            held = self._to_group(tensor.detach().contiguous())
            self._done(dist.broadcast(held, 0, async_op=True))
            tensor.detach().copy_(held)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The workers' tensors of one dimension, of whatever length each has, in the workers' order; on the CPU."""
        if self.count == 1:
            return [values]
        lengths = torch.zeros(self.count, dtype=torch.int64)
        lengths[self.number] = len(values)
        sizes: list[int] = self.sum(lengths).tolist()
        if not max(sizes):
            return [values.cpu()] * self.count
        padded = torch.nn.functional.pad(values.cpu(), (0, max(sizes) - len(values)))
        return [part[:size] for part, size in zip(self._all(padded), sizes, strict=True)]

    def arrays(self, *own: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Each array's sum over the workers: whole ones, where each filled in its part and left 0 elsewhere."""
        if self.count == 1:
            return list(own)
        return [self.sum(torch.from_numpy(np.ascontiguousarray(one))).numpy() for one in own]

    def rows(self, own: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """Rows of numbers, of any length, that the workers have under different numbers."""
        if self.count == 1:
            return {number: list(row) for number, row in own.items()}
        said = [word for number, row in own.items() for word in (number, len(row), *row)]
        found: dict[int, list[int]] = {}
        for part in self.gather(torch.tensor(said, dtype=torch.int64)):
            words, at = part.tolist(), 0
            while at < len(words):
                number, length = words[at : at + 2]
                found[number] = words[at + 2 : at + 2 + length]
                at += 2 + length
        return found

    def check_same(self, step: int, tensors: Iterable[Tensor]) -> None:
        """Raises DivergenceError unless all workers hold the same bits."""
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        found = self._all(own)
        if others := [k for k, other in enumerate(found) if not torch.equal(other, found[0])]:
            raise DivergenceError(
                f"after update {step} the adapters of worker {', '.join(map(str, others))} aren't those of worker 0",
                allowed="the same bits on all workers",
                hint="use machines and devices of one kind, with the same versions; the last checkpoint is kept",
            )

    def agree(self, what: Mapping[str, Any]) -> None:
        """Raises ConfigError, on a worker that says something else of itself than the first one does."""
        if self.count == 1:
            return
        own = _leaves(json.loads(json.dumps(what, default=str)))
        first = _leaves(self.once(lambda: json.loads(json.dumps(what, default=str))))
        differing = next((key for key in (first | own) if first.get(key) != own.get(key)), None)
        if differing is not None:
            ours, theirs = own.get(differing, "not set"), first.get(differing, "not set")
            hint = "start all workers with the same command, and with the same files and versions on each machine"
            raise ConfigError(f"{differing} is {ours!r:.200}, but {theirs!r:.200} on worker 0", hint=hint)
        self.wait()  # nobody goes on before all agree

    def check_enough(self, items: int, key: str) -> None:
        """Raises ConfigError where an update has fewer items than there are workers."""
        if items < self.count:
            raise ConfigError(
                f"{self.count} workers share an update of {items}: some would have nothing to do",
                where=key,
                allowed=f"at least {self.count}",
                hint=f"raise {key}, or start at most {items} workers",
            )

    def wait(self) -> None:
        """Until all workers are here."""
        self.any(False)

    # inside

    def _all(self, flat: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(flat) for _ in range(self.count)]
        self._done(dist.all_gather(parts, flat, async_op=True))
        return parts

    def _done(self, work: Any) -> None:
        """Waits for the others, and notices where one of them failed meanwhile."""
        assert self._watch is not None
        pause = 0.00002
        try:
            while not work.is_completed():
                self._watch.check()
                time.sleep(pause)
                pause = min(1.3 * pause, 0.002)
            work.wait()
        except RuntimeError as error:
            self._watch.check()
            raise self._watch.error(self._watch.broken()) from error

    def _to_group(self, flat: Tensor) -> Tensor:
        return flat.cpu() if self.on_cpu else flat

    def _back(self, flat: Tensor, like: Tensor) -> Tensor:
        return flat.to(like.device).view(like.shape)


ALONE = Workers()
"""The only process."""


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _leaves(value: Any, above: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    if not isinstance(value, dict):
        return {above.rstrip("."): value}
    return {key: leaf for name, inner in value.items() for key, leaf in _leaves(inner, f"{above}{name}.").items()}
