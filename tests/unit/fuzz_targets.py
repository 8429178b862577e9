"""What damaged files are given to: whole commands on tiny bases and runs, in this process. Each must end as a person's
mistake does, whatever a file holds.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations

from perlhf.commands.cli import main
from perlhf.data.pull import safe_extract
from perlhf.errors import PerlhfError

SECONDS = 120
"""What takes longer hangs; a case takes a tenth of a second."""
EXPECTED = (0, 2, 3)
"""Exit codes: done, the user's mistake, numbers that aren't finite."""


@dataclass(frozen=True)
class Base:
    """Files that are whole: a case is a copy of them with one changed.

    Attributes:
        directory: what is copied.
        files: those that a case may change, relative to it.
        commands: command lines, of which a case takes one; they run in the copy.
    """

    directory: Path
    files: Sequence[str]
    commands: Sequence[Sequence[str]]


class Failed(Exception):
    """A case that ended neither well nor as a mistake does: how to have it again, and what was said."""


def make(kind: str, directory: Path, tiny_base: Path) -> Base:
    """The whole files of a kind, made by the real commands."""
    directory.mkdir(parents=True)
    rows = [
        {"prompt": f"tea {n}", "chosen": f"sure {n}", "rejected": f"never {n}", "group": f"g{n}"} for n in range(12)
    ]
    _write_rows(directory / "pairs.jsonl", rows)
    _write_rows(directory / "talk.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    shutil.copytree(tiny_base, directory / "base")
    with _inside(directory):
        return MAKERS[kind](directory)


def check(kind: str, base: Base, seed: int, work: Path) -> int:
    """Runs one case in `work`, which is emptied; returns the exit code.

    Raises:
        Failed: anything but `EXPECTED`, with the seed and the last lines that were printed.
    """
    draw = random.Random(f"{kind} {seed}")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base.directory, work)
    file = work / draw.choice(base.files)
    said, code = io.StringIO(), None
    with _inside(work), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _limit():
        try:
            if kind == "archives":
                code = _unpacked(draw, work)
            else:
                mutations.mutated(draw, file)
                code = main(draw.choice(base.commands))
        except SystemExit as ended:
            code = ended.code
    text = said.getvalue()
    if code not in EXPECTED or (code and "error" not in text.lower()):
        raise Failed(
            f"--kind {kind} --seed {seed} --cases 1: exit code {code} after {file.relative_to(work)}\n{text[-1500:]}"
        )
    if any(sign in text for sign in "\x1b\x9b\0"):
        raise Failed(f"--kind {kind} --seed {seed} --cases 1: control characters were printed\n{text[-1500:]!r}")
    return int(code)


def _unpacked(draw: random.Random, work: Path) -> int:
    """One archive, unpacked where it is, or read as data."""
    suffix = draw.choice((".zip", ".tar", ".gz"))
    path = work / f"a.jsonl{suffix}"
    path.write_bytes(mutations.archive(draw, suffix, (work / "pairs.jsonl").read_bytes()))
    (work / "to").mkdir()
    before = _around(work / "to")
    if suffix == ".gz":
        return main(["data", "validate", path.name])
    try:
        for file in safe_extract(path, work / "to"):
            assert file.resolve().is_relative_to(work / "to")
    except PerlhfError as error:
        print(f"error: {error}")
        return error.exit_code
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is a finding
        print(f"error: {error!r}")
        return 70
    assert _around(work / "to") == before, "something was written outside"
    return 0


def _around(directory: Path) -> dict[Path, tuple[int, int]]:
    """What is beside a directory, and how large it is."""
    entries = [entry for entry in directory.parents[1].rglob("*") if directory not in (entry, *entry.parents)]
    return {entry: (entry.lstat().st_size, entry.lstat().st_ino) for entry in entries}


# ---- the kinds ----------------------------------------------------------------------------------------------------

_COMMON = "--base base --dtype float32 --device cpu --threads 1 --encoding.max-tokens 64 --adapter.rank 2".split()
_SFT = ["sft", *_COMMON, "--data.paths", "talk.jsonl", "--data.validation", "0.2", "--examples-per-update", "4"]
_REWARD = ["reward", *_COMMON, "--data.paths", "pairs.jsonl", "--data.validation", "0.2", "--examples-per-update", "4"]


def _recipes(directory: Path) -> Base:
    """A recipe of each stage with all its keys."""
    import yaml

    from perlhf.config.stages import PolicyConfig, RewardConfig, SftConfig

    commands = []
    for name, model, more in (
        ("sft", SftConfig, {}),
        ("reward", RewardConfig, {}),
        ("policy", PolicyConfig, {"reward": ["letters:score"]}),
    ):
        own = {"base": "base", "data": {"paths": ["talk.jsonl" if name == "sft" else "pairs.jsonl"]}} | more
        values = model.model_validate(own, strict=False).model_dump(mode="json")
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        commands.append([name, f"{name}.yaml", "--dry-run"])
    return Base(directory, ["sft.yaml", "reward.yaml", "policy.yaml"], commands)


def _data(directory: Path) -> Base:
    commands = [["data", word, "pairs.jsonl", "talk.jsonl"] for word in ("validate", "inspect")]
    commands += [["data", "convert", "pairs.jsonl", "o.jsonl"], ["data", "convert", "talk.jsonl", "o.parquet"]]
    commands += [["data", "split", "pairs.jsonl", "--output", "sides"]]
    commands += [["data", "inspect", "pairs.jsonl", "talk.jsonl", "--base", "base", "--encoding.max-tokens", "64"]]
    return Base(directory, ["pairs.jsonl", "talk.jsonl"], commands)


def _models(directory: Path) -> Base:
    files = [f"base/{entry.name}" for entry in (directory / "base").iterdir()]
    once = ["--run", "run", "--max-updates", "1"]
    return Base(directory, files, [[*_SFT, "--dry-run"], [*_SFT, *once], [*_REWARD, *once]])


def _adapters(directory: Path) -> Base:
    _done(*_REWARD, "--run", "reward", "--max-updates", "2")
    _done(*_SFT, "--run", "sft", "--max-updates", "2")
    files = [f"{run}/adapter/{entry.name}" for run in ("sft", "reward") for entry in Path(run, "adapter").iterdir()]
    commands = [
        ["average", "reward", "reward", "--output", "mean"],
        ["export", "reward", "out"],
        ["export", "sft", "out"],
    ]
    commands += [[*_SFT, "--start", "sft", "--run", "more", "--max-updates", "1"]]
    commands += [["score", "reward", "pairs.jsonl", "--output", "scores.jsonl"]]
    return Base(directory, files, commands)


def _runs(directory: Path) -> Base:
    _done(*_REWARD, "--run", "reward", "--max-updates", "2")
    _done("evaluate", "reward")
    names = ("manifest.json", "config.yaml", "metrics.jsonl", "result.json", "evaluation.json")
    again = [*_REWARD, "--run", "reward", "--max-updates", "3"]
    commands = [["table", "reward"], ["report", "reward", "--output", "r.html"], again, ["evaluate", "reward"]]
    return Base(directory, [f"reward/{name}" for name in names], commands)


def _checkpoints(directory: Path) -> Base:
    words = [*_SFT, "--run", "sft", "--max-updates", "3", "--epochs", "3", "--checkpoint-every", "1"]
    _done(*words)
    shutil.rmtree("sft/adapter")
    os.unlink("sft/result.json")
    files = [str(file) for file in Path("sft/checkpoints").rglob("*") if file.is_file()]
    return Base(directory, files, [words])


def _archives(directory: Path) -> Base:
    return Base(directory, ["pairs.jsonl"], [])


MAKERS: Mapping[str, Callable[[Path], Base]] = {
    "recipes": _recipes,
    "data": _data,
    "archives": _archives,
    "models": _models,
    "adapters": _adapters,
    "runs": _runs,
    "checkpoints": _checkpoints,
}


def _done(*words: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(words)
    assert code == 0, said.getvalue()


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def _inside(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    """Ends what hangs, and says so."""

    def ring(*_: object) -> None:
        raise AssertionError(f"nothing came in {SECONDS} seconds, since {began}")

    began = time.strftime("%X")
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
