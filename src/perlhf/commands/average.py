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
from torch import Tensor

from perlhf.config.commands import AverageConfig
from perlhf.config.stages import RewardConfig
from perlhf.errors import AdapterError, ConfigError
from perlhf.model.adapter_files import AdapterFiles, read_adapter, write_adapter
from perlhf.model.open import Finished, read_finished
from perlhf.model.saved import files_hash, full_meta, full_tensors, write_full
from perlhf.runs.manifest import RESULT, first_difference, start_or_continue
from perlhf.system.files import directory_atomic, write_json

ENCODING = ("system", "template_sha256", "end_token")
"""What of the encoding must agree, as when an adapter is loaded."""


def average(config: AverageConfig) -> dict[str, Any]:
    """Writes a finished reward run to `config.output`, whole or not at all, and returns its result.

    Its config.yaml is the first run's, with the data of all and the adapter's new shape.

    Raises:
        RunError: no finished reward run.
        ConfigError: the output is a file, or holds something.
        AdapterError: runs that differ in base, tuning, encoding, adapted layers or split of the data.
        StorageError: it can't be written.
    """
    runs = [read_finished(path, ("reward",)) for path in config.runs]
    _check_output(config.output)
    base = _check_alike(runs)
    members = [run.path / "adapter" for run in runs]
    hashes = {str(run.path): files_hash(member) for run, member in zip(runs, members, strict=True)}
    result: dict[str, Any] = {"stage": "reward", "tuning": runs[0].config.tuning, "averaged": hashes}
    settings = _settings(runs, config.output)
    with directory_atomic(config.output) as temporary:
        if runs[0].config.tuning == "full":
            _write_mean_weights(members, temporary / "adapter")
        else:
            files = mean_adapter([read_adapter(member) for member in members])
            write_adapter(temporary / "adapter", files)
            settings["adapter"] |= {"rank": files.rank, "alpha": files.alpha}
            result["rank"] = files.rank
        start_or_continue(temporary, "reward", settings, {"base": base, "adapters": hashes})
        write_json(temporary / RESULT, result)
    return result


def mean_adapter(members: Sequence[AdapterFiles]) -> AdapterFiles:
    """The adapter whose update of every layer is the mean of the members' updates, without approximation.

    mean_i scale_i B_i A_i = [scale_1 B_1 .. scale_n B_n] / n [A_1; ..; A_n] with scale = alpha / rank, so that its rank
    is the sum of theirs and its own scale is 1. (mean(B) mean(A) would be another update.) Head and bias are means.
    """
    count, rank = len(members), sum(member.rank for member in members)
    weights = {}
    for path in members[0].weights:
        downs = [member.weights[path][0] for member in members]
        ups = [member.weights[path][1] * (member.alpha / member.rank / count) for member in members]
        weights[path] = torch.cat(downs), torch.cat(ups, 1)
    heads = [member.head for member in members if member.head is not None]
    return replace(
        members[0],
        weights=weights,
        rank=rank,
        alpha=float(rank),
        dropout=0.0,
        targets=sorted(weights),
        head=torch.stack(heads).mean(0),
        bias=sum(member.bias for member in members) / count,
    )


def _write_mean_weights(members: Sequence[Path], output: Path) -> None:
    """Full tuning: the mean of every tensor, with one member at a time in memory beside it."""
    metas = [full_meta(member) for member in members]
    total: dict[str, Tensor] = {}
    for member, meta in zip(members, metas, strict=True):
        tensors = full_tensors(member, meta)
        total = {name: total[name] + tensor for name, tensor in tensors.items()} if total else tensors
    write_full(output, {name: tensor / len(members) for name, tensor in total.items()}, metas[0])


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        found = "holds something" if output.is_dir() else "is a file"
        raise ConfigError(f"{output} {found}", where="output", allowed="a new or empty directory")


def _check_alike(runs: Sequence[Finished]) -> dict[str, str]:
    """Refuses runs that have no common average; returns their base's fingerprint."""
    first, *others = runs
    base, expected = _traits(first)
    for run in others:
        found_base, found = _traits(run)
        what = None
        if found_base["sha256"] != base["sha256"]:
            what = f"trained on base {found_base['name']}, but {first.path} on {base['name']}"
        elif difference := first_difference(expected, found):
            key, then, now = difference
            what = f"{key} is {now!r}, but {then!r} in {first.path}"
        if what:
            allowed = "reward runs of one base, tuning, encoding, set of adapted layers and split of the data"
            hint = "train them from one recipe with different seeds"
            raise AdapterError(what, where=str(run.path), allowed=allowed, hint=hint)
    return base


def _traits(run: Finished) -> tuple[dict[str, str], dict[str, Any]]:
    """The base of a run, and what else must agree. Groups that one run holds out, no other may have learned from."""
    directory, layers = run.path / "adapter", dict[str, str]()
    if run.config.tuning == "full":
        meta = full_meta(directory)
        base, encoding = meta["base"], meta["encoding"]
    else:
        files = read_adapter(directory)
        base, encoding, layers = files.base, files.encoding, dict.fromkeys(sorted(files.weights), "adapted")
    traits = {
        "tuning": run.config.tuning,
        "encoding": {key: encoding.get(key) for key in ENCODING},
        "layers": layers,
        "data": run.config.data.model_dump(mode="json", exclude={"paths"}),
    }
    return base, traits


def _settings(runs: Sequence[Finished], output: Path) -> dict[str, Any]:
    """config.yaml of the average."""
    first = runs[0].config
    assert isinstance(first, RewardConfig)
    paths = tuple(dict.fromkeys(path for run in runs for path in run.config.data.paths))
    data = first.data.model_copy(update={"paths": paths})
    return first.model_copy(update={"run": output, "data": data}).model_dump(mode="json")
