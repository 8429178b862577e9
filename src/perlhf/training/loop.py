"""What the three loops share: opening a stage, the order of updates, one optimiser step, and saving so that a
resumed run is bit-equal.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from perlhf.config.stages import RewardConfig, SftConfig, StageConfig
from perlhf.data import order
from perlhf.data.records import Record, completions_of
from perlhf.data.splits import TIES, Splits, content_hash, hashes_beside, oddities, read_splits
from perlhf.data.store import NO_LABEL, Records, count_groups
from perlhf.errors import DataError, DivergenceError, Interrupted, RunError
from perlhf.kernels import cpu
from perlhf.model.adapter import Adapter
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import pick_device
from perlhf.model.bases.quantised import identity
from perlhf.model.encoding.encode import Encoder, Example, TooLong
from perlhf.model.encoding.lengths import to_tokenise
from perlhf.model.model import Model
from perlhf.parallel.workers import ALONE, Workers
from perlhf.rollout.functions import code_of
from perlhf.runs.earlier import adapter_of, earlier_runs, files_hash
from perlhf.runs.onlooker import look_on
from perlhf.runs.recorded import check_own
from perlhf.runs.run import Run, open_run
from perlhf.system.console import note, warn
from perlhf.system.machine import environment
from perlhf.system.progress import counted
from perlhf.training import checkpoint, optim

Item = TypeVar("Item")
SLOW_VALIDATION = 4
"""A validation of so many times the records that are learned from between two is worth a line: learning from one takes
some three times as long as scoring it."""
LOSS_LIMIT = 1000.0
"""Nats a token (SFT) or an example (reward) above which a run has exploded; ln of a vocabulary is about 10, and weights
of records may be above 1."""
KL_LIMIT = 1000.0
"""Nats a completion above which a policy has."""


@dataclass
class Keeper:
    """Which checkpoint is kept: the one with the best validation. Saved with every checkpoint."""

    step: int | None = None
    """None: nothing was validated. 0: before the first update."""
    value: float = -math.inf
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    worse: int = 0
    """Validations in a row that were no better."""
    start: list[float | None] | None = None
    """What the first that was offered reached on each item, where that is known; None of an item: unknown."""

    def offer(
        self, step: int, value: float, metrics: dict[str, float], each: Sequence[float | None] | None = None
    ) -> bool:
        """Takes the weights of `step` as those to keep if `value` is above all values before; whether it did.

        Args:
            each: what `value` is the mean of, where items are few and noisy. Then the start is left for weights alone
                that are above it by more than a standard error, item by item: the best of several that are equal would
                always look better.
        """
        self.worse += 1
        if not value > self.value:  # a value that is no number is no better
            return False
        if self.step is None:
            self.start = None if each is None else list(each)
        elif each is not None and self.start is not None and not clearly_above(each, self.start):
            return False
        self.take(step, value, metrics)
        return True

    def take(self, step: int, value: float, metrics: dict[str, float]) -> None:
        """Keeps the weights of `step`, whatever was before."""
        self.step, self.value, self.metrics, self.worse = step, value, metrics, 0


def validated(measured: Mapping[str, float], began: float) -> dict[str, float]:
    """What metrics.jsonl has of a validation that began so, by `time.perf_counter`.

    Its seconds stand apart: `tokens_per_second` and `seconds_...` are of the update alone.
    """
    seconds = time.perf_counter() - began
    return {f"validation_{key}": value for key, value in measured.items()} | {"validation_seconds": seconds}


def clearly_above(ours: Sequence[float | None], theirs: Sequence[float | None]) -> bool:
    """Whether the mean of the differences of what both know is above their standard error; of one: above 0."""
    pairs = zip(ours, theirs, strict=True)
    differences = np.array([one - other for one, other in pairs if one is not None and other is not None])
    if len(differences) < 2:
        return bool((differences > 0).any())
    return bool(differences.mean() > differences.std(ddof=1) / len(differences) ** 0.5)


def facts(config: StageConfig, base: Base) -> dict[str, Any]:
    """What a run's result depends on besides its configuration (`runs.recorded`); sets the threads and compiles the
    kernels, so that the manifest tells what is really used.

    Raises:
        RunError: an earlier run whose adapter was changed; DataError, ModelError: a file can't be read;
        ConfigError, RewardFunctionError: a reward function's module can't be imported.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if pick_device(config.device).type == "cpu":
        cpu.library()
    recorded: dict[str, Any] = {
        "data": content_hash(config.data),
        "beside": hashes_beside(config.data),
        "base": identity(base, config.quantize),
    }
    for key in ("reward", "validation_reward"):
        if sources := getattr(config, key, ()):
            recorded["code"] = recorded.get("code", {}) | code_of(sources, key)
    template = Path(config.encoding.template)
    if template.is_file():
        recorded["template"] = hashlib.sha256(template.read_bytes()).hexdigest()
    earlier = earlier_runs(config)
    for key, named in earlier.items():
        for run in named:
            check_own(run, key)
    runs = [run for named in earlier.values() for run in named]
    adapters = {str(run): files_hash(directory) for run in runs if (directory := adapter_of(run)) is not None}
    return recorded | ({"adapters": adapters} if adapters else {})


@contextmanager
def opened(config: StageConfig, stage: str, base: Base, workers: Workers) -> Iterator[Run]:
    """The run directory, which the first worker opens; the others look on, once all agree on what they are to do.

    Raises:
        ConfigError: a worker has another configuration, version, data or base; RunError, StorageError: as `open_run`;
            what `facts` says.
    """
    what = facts(config, base)
    if workers.count > 1:
        workers.agree(config.model_dump(mode="json") | {"facts": what, "versions": environment()["versions"]})
    if workers.first:
        with open_run(config.run, stage, config, what, workers.count) as run:
            workers.once(lambda: run.finished)
            yield run
    else:
        with look_on(config.run, workers.once(lambda: False)) as run:
            yield run


@dataclass(frozen=True)
class Sides:
    """The records of a run, read once."""

    train: Records
    validation: Records
    test: Records | None
    """None where `data.test` is 0: nobody will ask for it."""
    warnings: tuple[str, ...]


def read_sides(config: StageConfig, kinds: Sequence[str]) -> Sides:
    """The records that a stage learns from and is measured on.

    What `perlhf evaluate` would refuse later is an error, before anything is trained; where it would leave a number
    out, there is a warning (`tell`). With `data.test: 0` there is nothing to evaluate, and nothing is said of it.

    Raises:
        DataError: a file or row is wrong, or a side is empty.
    """
    found = read_splits(config.data, kinds)
    train, validation = found.of("train"), found.of("validation")
    test = found.of("test") if config.data.test else None
    return Sides(
        train,
        validation,
        test,
        (*oddities(found.records.facts, found.skipped), *_left_out(found), *_side_warnings(test)),
    )


def tell(sides: Sides) -> None:
    """Says on standard error what is odd about the records, once nothing is left that could be an error instead."""
    for warning in sides.warnings:
        warn(warning)


def _left_out(found: Splits) -> Iterator[str]:
    """Rows that a reader's rule leaves out, ties excepted, which are told apart."""
    for reason, count in found.skipped.items():
        if reason not in TIES:
            yield f"{count} rows are left out: {reason}"


def _side_warnings(test: Records | None) -> Iterator[str]:
    if test is None:
        return
    groups, labels = count_groups(test.facts), test.labels[test.labels != NO_LABEL]
    if groups == 1:
        yield "the test side is a single group: `perlhf evaluate` will give no intervals"
    if len(labels) and (labels == labels[0]).all():
        label = str(bool(labels[0])).lower()
        yield f"all {len(labels)} ratings of the test side are {label}: `perlhf evaluate` will give no AUC"


class Encoded(Sequence[Item]):
    """Items that are encoded when they are asked for, so that training begins at once and memory stays small.

    Args:
        records: of which all fit (`fitting`).
        make: the item of a record, from the examples of its completions.
    """

    def __init__(self, encoder: Encoder, records: Records, make: Callable[[Any, list[Example]], Item]):
        self.records, self._encoder, self._make = records, encoder, make

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Encoded[Item]": ...
    def __getitem__(self, index: int | slice) -> "Item | Encoded[Item]":
        if isinstance(index, slice):
            return Encoded(self._encoder, self.records[index], self._make)
        record = self.records[index]
        return self._make(record, _examples(self._encoder, record))


def fitting(encoder: Encoder, records: Records, drop_long: bool) -> tuple[Records, dict[str, int]]:
    """The records that fit into `max_tokens`, with counts of those whose prompts are cut and of those that are dropped.

    Only records that may be too long by their bytes are tokenised for this (`lengths`).

    Raises:
        TooLong: a completion that can't fit, unless `drop_long`.
        DataError: nothing fits, or what the encoder says.
    """
    counts = {"cut_prompts": 0, "dropped_long": 0}
    kept = np.ones(len(records), dtype=bool)
    numbers = to_tokenise(encoder, records).tolist()
    for number in counted(numbers, "tokens", len(numbers)):
        if (examples := _unless_long(encoder, records[number], drop_long)) is None:
            kept[number] = False
        else:
            counts["cut_prompts"] += examples[0].cut > 0
    counts["dropped_long"] = len(kept) - int(kept.sum())
    if not kept.any():
        raise _nothing_fits()
    return records if kept.all() else records.take(kept), counts


def encode_all(
    encoder: Encoder, records: Sequence[Record], drop_long: bool
) -> tuple[list[list[Example] | None], dict[str, int]]:
    """Examples of each record, one a completion; None for a dropped one. Counts of cut and dropped records.

    Raises:
        TooLong: a completion that can't fit, unless `drop_long`.
    """
    encoded = [_unless_long(encoder, record, drop_long) for record in counted(records, "tokens", len(records))]
    if not any(encoded):
        raise _nothing_fits()
    fit = [examples for examples in encoded if examples is not None]
    cut = sum(examples[0].cut > 0 for examples in fit)
    return encoded, {"cut_prompts": cut, "dropped_long": len(encoded) - len(fit)}


def _unless_long(encoder: Encoder, record: Record, drop_long: bool) -> list[Example] | None:
    try:
        return _examples(encoder, record)
    except TooLong:
        if not drop_long:
            raise
        return None


def _examples(encoder: Encoder, record: Record) -> list[Example]:
    return encoder.examples(record.prompt, completions_of(record), record.source, record.tools)


def _nothing_fits() -> DataError:
    return DataError("every example is longer than encoding.max_tokens", hint="raise encoding.max_tokens")


def check_test_side(encoder: Encoder, sides: Sides) -> None:
    """What `perlhf evaluate` would refuse in the test side's texts, found before training.

    Raises:
        TooLong: an answer that can't fit, unless the configuration drops those.
        DataError: nothing fits, or what the encoder says.
    """
    if sides.test is not None:
        fitting(encoder, sides.test, encoder.config.drop_long)


def note_slow_validation(config: SftConfig | RewardConfig, held_out: int) -> None:
    """Says so on standard error where a validation takes longer than the training between two of them."""
    between = config.validate_every * config.examples_per_update
    if held_out > SLOW_VALIDATION * between:
        note(
            f"{held_out} held-out records are validated every {config.validate_every} updates, which learn from "
            f"{between}; with validation_examples: {between} it would be so many"
        )


def whole_groups(records: Records, count: int | None, seed: int) -> Records:
    """About `count` of the records, of whole groups; all for None."""
    if count is None or count >= len(records):
        return records
    return records.take(np.array(order.whole_groups([record.group for record in records], count, seed)))


def updates_of(config: SftConfig | RewardConfig, records: Records) -> order.Updates:
    """Numbers of the examples of each update (`order.plan_updates`), as the configuration says.

    Args:
        records: the training examples.
    """
    size, epochs = config.examples_per_update, config.epochs
    return order.plan_updates(records.facts.group, size, epochs, config.seed, config.order, config.max_updates)


def stop_if_asked(asked: bool, step: int, total: int) -> None:
    """Raises Interrupted where a signal asked for it and updates are left; the checkpoint is saved by then."""
    if asked and step < total:
        raise Interrupted(f"stopped at update {step} of {total}", hint="run the same command to continue")


def optimiser_step(optimizer: torch.optim.AdamW, adapter: Adapter, learning_rate: float, max_grad_norm: float) -> float:
    """Clips, steps and clears gradients; returns the gradient norm before clipping.

    Raises:
        DivergenceError: the gradient isn't finite; no weight was touched.
    """
    norm = optim.clip(adapter.trainable(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    adapter.version += 1
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_bounded(name: str, value: float, step: int, limit: float = math.inf) -> None:
    """Raises DivergenceError unless `value` is finite and at most `limit`, beyond which nothing sensible is learned."""
    if not math.isfinite(value) or abs(value) > limit:
        raise DivergenceError(
            f"{name} is {value:.6g} at update {step}",
            allowed=f"at most {limit:g}" if math.isfinite(value) else "a finite number",
            hint="lower optim.learning_rate; the last checkpoint is kept",
        )


def save(
    run: Run,
    step: int,
    model: Model,
    optimizers: dict[str, torch.optim.AdamW],
    keeper: Keeper,
    state: dict[str, Any],
    frozen: Sequence[str] = (),
) -> None:
    """A checkpoint of the named adapters and their optimisers, by the worker that writes; the kept one stays.

    Args:
        frozen: adapters without optimiser that belong to it.
    """
    if not run.writes:
        return
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in (*optimizers, *frozen):
        tensors[name] = {key: t.detach() for key, t in model.adapters[name].tensors().items()}
        if name in optimizers:
            tensors[f"{name}.optimizer"] = optim.state_tensors(optimizers[name])
    best = asdict(keeper) | {"value": None if keeper.step is None else keeper.value}
    checkpoint.save(run.path, step, tensors, {"best": best, **state}, pinned=keeper.step)


def restore(
    run: Run,
    model: Model,
    optimizers: dict[str, torch.optim.AdamW],
    workers: Workers = ALONE,
    frozen: Sequence[str] = (),
) -> tuple[int, Keeper, dict[str, Any]]:
    """The newest checkpoint put back: its step (0 for none), what is kept, and the stage's own state ({} for none).

    Args:
        frozen: as that of `save`.
    """
    saved = checkpoint.load_together(run.path, None, workers)
    if saved is None:
        run.rewind(-1)
        return 0, Keeper(), {}
    for name in (*optimizers, *frozen):
        load_adapter_tensors(model.adapters[name], saved.tensors[name])
    for name, optimizer in optimizers.items():
        optim.load_state_tensors(optimizer, saved.tensors[f"{name}.optimizer"])
    run.rewind(saved.step)
    best = saved.state.pop("best")
    if run.writes:
        checkpoint.prune(run.path, saved.step, best["step"])  # what a kill in the midst of deleting left
    return saved.step, Keeper(**best | {"value": -math.inf if best["value"] is None else best["value"]}), saved.state


def check_goes_on(run: Run, step: int, keeper: Keeper, validate_every: int) -> None:
    """Makes the last line of metrics that of a run which goes on after `step`; call it where updates are left.

    The end of a run is validated even where `validate_every` doesn't ask for it. No checkpoint has that validation, so
    a run that is extended goes on as one that was to be so long from the start.

    Raises:
        RunError: the checkpoint is one of an earlier version, which did have it.
    """
    if step % validate_every == 0:
        return
    if keeper.step == step:
        hint = f"start again in another directory, with start: {run.path}"
        raise RunError(f"was finished at update {step} by an earlier version", where=str(run.path), hint=hint)
    run.withdraw(step, "validation_")


def restore_best(
    run_path: Path, step: int, keeper: Keeper, adapters: Sequence[Adapter], workers: Workers = ALONE
) -> None:
    """Puts the weights of the best validation back, unless there was none or it was that of `step`, the last one."""
    if keeper.step not in (None, step):
        saved = checkpoint.load_together(run_path, keeper.step, workers)
        assert saved is not None
        for adapter in adapters:
            load_adapter_tensors(adapter, saved.tensors[adapter.name])


def check_same(workers: Workers, step: int, every: int, adapters: Iterable[Adapter]) -> None:
    """Every so many updates: whether all workers have the same adapters.

    Raises:
        DivergenceError: they haven't; the last checkpoint is kept.
    """
    if workers.count > 1 and step % every == 0:
        workers.check_same(step, (tensor for adapter in adapters for tensor in adapter.tensors().values()))


def seed_dropout(seed: int, step: int, workers: Workers) -> int | None:
    """Has an update's dropout drawn from its seed: by this process, or, of several, by a key that all have.

    Of one process masks are drawn for one micro-batch after the other. Of several they are a function of the key and of
    the tokens up to each one, so that it doesn't matter who computes it.
    """
    keyed = order.keyed_seed(seed, "dropout", step)
    torch.manual_seed(keyed)
    return None if workers.count == 1 else keyed


@torch.no_grad()
def load_adapter_tensors(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """Copies saved tensors into an adapter of the same shape."""
    own = adapter.tensors()
    assert own.keys() == tensors.keys(), f"adapter '{adapter.name}' has other tensors than its checkpoint"
    for key, tensor in own.items():
        tensor.copy_(tensors[key])
    adapter.version += 1
