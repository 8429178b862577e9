"""Weight averaging of reward models (WARM, arXiv 2401.12187): one reward run from several.

A score isn't linear in the weights, so the average's score is not the mean of the members' scores; it costs one forward
pass, not one for each member. What one adapter's files hold is averaged, an SFT adapter beneath included; no network is
loaded.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perlhf.config.commands import AverageConfig
from perlhf.config.stages import RewardConfig
from perlhf.errors import AdapterError, ConfigError, RunError
from perlhf.method import lora
from perlhf.model.adapter import Adapter
from perlhf.model.finished import FinishedRun, read_run
from perlhf.model.saved import ENCODING, SavedAdapter, read_adapter, write_adapter
from perlhf.runs.earlier import adapter_of, files_hash
from perlhf.runs.evaluations import mapping
from perlhf.runs.manifest import ADAPTER, MANIFEST, RESULT, first_difference, read_manifest, start_or_continue
from perlhf.runs.recorded import check_own
from perlhf.system.files import directory_atomic, write_json


def average(config: AverageConfig) -> dict[str, Any]:
    """Writes a finished reward run to `config.output`, whole or not at all, and returns its result.

    Its config.yaml is the first run's, with the data of all and the adapter's new shape. Of directories of peft's
    alone, nobody knows what they were trained on: their average is such a directory.

    Raises:
        RunError: no finished reward run.
        ConfigError: the output is a file, or holds something.
        AdapterError: runs that differ in base, tuning, encoding, adapted layers or split of the data.
        StorageError: it can't be written.
    """
    runs = [read_run(path, ("reward",)) for path in config.runs]
    for run in runs:
        check_own(run.path, "runs")
    _check_output(config.output)
    mean = _mean(runs)
    hashes = {str(run.path): files_hash(adapter_of(run.path) or run.adapter) for run in runs}
    result: dict[str, Any] = {"stage": "reward", "tuning": runs[0].config.tuning, "averaged": hashes}
    known = [run for run in runs if not run.foreign]
    if not known:
        write_adapter(config.output, mean)
        return result | ({"rank": mean.adapter.rank} if mean.adapter.pairs else {})
    settings, data = _settings(known, config.output), _data(known)
    if mean.adapter.pairs:
        settings["adapter"] |= {"rank": mean.adapter.rank, "alpha": mean.adapter.alpha}
        result["rank"] = mean.adapter.rank
    with directory_atomic(config.output) as temporary:
        write_adapter(temporary / "adapter", mean)
        start_or_continue(temporary, "reward", settings, {"base": mean.base, "adapters": hashes, "data": data})
        manifest = read_manifest(temporary) | {ADAPTER: files_hash(temporary / "adapter")}
        write_json(temporary / MANIFEST, manifest)
        write_json(temporary / RESULT, result)
    return result


@torch.no_grad()
def _mean(runs: Sequence[FinishedRun]) -> SavedAdapter:
    """The adapter whose update of every layer, weights, head and bias are the means of the runs' own.

    Of fully tuned weights, those of one run at a time are in memory beside their sum.
    """
    each = [(run, directory) for run in runs for directory in run.members.values()]
    if len(each) < 2:
        what, allowed = f"{runs[0].path} has one adapter", "several runs, or a run of several members"
        raise ConfigError(f"{what}, which has no average", where="runs", allowed=allowed)
    first = read_adapter(each[0][1])
    sums, members = first.adapter.weights, [first.adapter]
    for run, directory in each[1:]:
        member = read_adapter(directory)
        _check_alike(runs[0], first, run, member)
        for name, weight in member.adapter.weights.items():
            sums[name] = nn.Parameter(sums[name] + weight)
        members.append(replace(member.adapter, weights={}))
    heads: list[Tensor] = [adapter.score_head for adapter in members if adapter.score_head is not None]
    biases = [adapter.bias.item() for adapter in members if adapter.bias is not None]
    rank = sum(adapter.rank for adapter in members)
    mean = Adapter("mean", first.adapter.role, rank, float(rank))
    mean.pairs = {path: lora.mean([adapter.pairs[path] for adapter in members]) for path in first.adapter.pairs}
    mean.weights = {name: nn.Parameter(weight / len(each)) for name, weight in sums.items()}
    mean.score_head = nn.Parameter(torch.stack(heads).mean(0))
    mean.bias = nn.Parameter(torch.tensor([sum(biases) / len(each)], dtype=torch.float32))
    return replace(first, adapter=mean)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        state = "holds something" if output.is_dir() else "is a file"
        raise ConfigError(f"{output} {state}", where="output", allowed="a new or empty directory")


def _check_alike(first: FinishedRun, expected: SavedAdapter, run: FinishedRun, member: SavedAdapter) -> None:
    """Refuses a run that has no mean with the first one."""
    what = None
    if not _same_base(member.base, expected.base):
        what = f"trained on base {member.base['name']}, but {first.path} on {expected.base['name']}"
    elif difference := _difference(first, expected, run, member):
        key, then, now = difference
        what = f"{key} is {now!r}, but {then!r} in {first.path}"
    if what:
        allowed = "reward runs of one base, tuning, encoding, set of adapted layers and split of the data"
        hint = "train them from one recipe with different seeds"
        raise AdapterError(what, where=str(run.path), allowed=allowed, hint=hint)


def _same_base(one: dict[str, str], other: dict[str, str]) -> bool:
    """By the weights, or, where a tool has recorded no more, by name."""
    if one["sha256"] and other["sha256"]:
        return one["sha256"] == other["sha256"] and one.get("quantize") == other.get("quantize")
    return one["name"] == other["name"]


def _difference(
    first: FinishedRun, expected: SavedAdapter, run: FinishedRun, member: SavedAdapter
) -> tuple[str, Any, Any] | None:
    """The first trait that differs (`first_difference`); what an adapter of another tool doesn't say agrees."""
    one, other = _traits(first, expected), _traits(run, member)
    if first.foreign or run.foreign:
        del one["data"], other["data"]
    if not (expected.encoding and member.encoding):
        del one["encoding"], other["encoding"]
    return first_difference(one, other)


def _traits(run: FinishedRun, member: SavedAdapter) -> dict[str, Any]:
    """What must agree besides the base. Groups that one run holds out, no other may have learned from."""
    return {
        "tuning": run.config.tuning,
        "encoding": {key: member.encoding.get(key) for key in ENCODING},
        "layers": dict.fromkeys(sorted(member.adapter.pairs), "adapted"),
        "data": run.config.data.model_dump(mode="json", exclude={"paths"}),
    }


def _data(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """SHA-256 of the data by path, as the runs recorded it; of paths alone that lead there from here, too.

    Raises:
        RunError: two of them learned from other content under the same path.
    """
    found: dict[str, str] = {}
    for run in runs:
        for path, digest in mapping(mapping(read_manifest(run.path).get("facts")).get("data")).items():
            if path in run.config.data.paths and found.setdefault(path, digest) != digest:
                what, hint = f"{path} was changed between the training of these runs", "train them on the same data"
                raise RunError(what, where=str(run.path), hint=hint)
    return found


def _settings(runs: Sequence[FinishedRun], output: Path) -> dict[str, Any]:
    """config.yaml of the average."""
    first = runs[0].config
    assert isinstance(first, RewardConfig)
    paths = tuple(dict.fromkeys(path for run in runs for path in run.config.data.paths))
    data = first.data.model_copy(update={"paths": paths})
    return first.model_copy(update={"run": output, "data": data, "members": 1}).model_dump(mode="json")
