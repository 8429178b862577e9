"""The splits and configurations that a set's authors made: which of them are read.

Rule: where some names say training (`train`, `train_sft`, `training`) and others say that they are held out (`test`,
`validation`, `valid`, `val`, `dev`, `eval`, `heldout`, alone or as a word of the name), only those for training are
read; where none says training, those that say nothing (`prefs` beside `prefs_test`). `data.split` names others: a whole
name, a side (`test` also takes `test_sft`), several joined by `+`, or `all`. What is left out is told in one line.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from perlhf.errors import DataError, nearest
from perlhf.system.console import note

_SIDES = {
    "train": ("train", "training", "trainset", "trn"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation", "holdout", "heldout"),
    "test": ("test", "tests", "testing", "testset", "tst"),
}
_SHARD = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")

Found = tuple[str, Any]
"""Where a row was found, and the row (or the error in its place)."""


def side_of(name: str) -> str | None:
    """The side that a split's name says: its first word that is one."""
    for word in re.split(r"[^a-z]+", name.lower()):
        for side, words in _SIDES.items():
            if word in words:
                return side
    return None


def split_of_file(path: PurePath) -> str | None:
    """The split that a file belongs to by its name (without suffixes and shard numbers), else by a folder above it."""
    stem = path.name.split(".")[0]
    for part in (_SHARD.sub("", stem), *reversed(path.parts[:-1])):
        if side_of(part):
            return part
    return None


def choose(names: Sequence[str], split: str | None, where: str) -> list[str]:
    """The names of the splits that are read, in their order.

    Raises:
        DataError: no split has the name asked for, or all are held out and none was asked for.
    """
    if split is not None:
        return _asked(names, split, where)
    sides = {name: side_of(name) for name in names}
    training = [name for name in names if sides[name] == "train"]
    held_out = [name for name in names if sides[name] in ("validation", "test")]
    if names and len(held_out) == len(names):
        raise DataError(
            f"no split is for training: {', '.join(names)}",
            where=where,
            allowed="a split named for training, or one that is named",
            hint=f"name what to read: data.split {held_out[0]!r}, or 'all'",
        )
    if not training:
        training = [name for name in names if name not in held_out]
    if not held_out:
        return list(names)
    tell_left_out(where, training, [name for name in names if name not in training])
    return training


def tell_left_out(where: str, taken: Sequence[str], left: Sequence[str]) -> None:
    """Says once which splits are read and which are not."""
    tell(
        f"{where}: the authors' split{'s' * (len(taken) > 1)} {_listed(taken)} "
        f"{'are' if len(taken) > 1 else 'is'} read, not {_listed(left)} (data.split names others)"
    )


@functools.cache
def tell(line: str) -> None:
    """One line on standard error, the same one once: a file is read for each side of a split."""
    note(line)


def once(parts: Iterable[tuple[str, Iterable[Found]]], where: str) -> Iterator[Found]:
    """Rows of several splits; what an earlier split had is left out of a later one (train_sft, train_prefs)."""
    earlier: set[bytes] = set()
    for name, rows in parts:
        own: set[bytes] = set()
        repeated = 0
        for place, row in rows:
            key = key_of(row)
            if key in earlier:
                repeated += 1
            else:
                own.add(key)
                yield place, row
        if repeated:
            tell(f"{where}: {repeated:,} rows of {name} are those of an earlier split and are read once")
        earlier |= own


def key_of(row: Any) -> bytes:
    """A short hash of a row's content."""
    return hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=12).digest()


def no_splits(where: str, split: str) -> DataError:
    """The error for a split asked of a file that has none."""
    return DataError(
        f"there is no split {split!r}: the file has none",
        where=where,
        allowed="data.split for sets with splits: `datasets` directories, hub names, directories of files named so",
        hint="leave data.split out, or name the file of that split",
    )


def matches(name: str, wanted: str) -> bool:
    """True when a split is asked for by its name or by the side that its name says."""
    return name == wanted or (wanted in _SIDES and side_of(name) == wanted)


def configs(directory: Path) -> dict[str, Any]:
    """The configurations that the head of a hub set's README lists."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
        head = text.removeprefix("---").partition("\n---")[0]
        listed = (yaml.safe_load(head) or {}).get("configs") if "configs:" in head else None
        return {str(entry["config_name"]): entry for entry in listed or ()}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def files_of_config(directory: Path, where: str, config: str, inside: Iterable[Path]) -> set[Path]:
    """Those files of a directory that a configuration has: as the README says, else those of the folder of that name.

    Raises:
        DataError: there is no such configuration, or none of its files is here.
    """
    listed = configs(directory)
    folders = sorted(part.name for part in directory.iterdir() if part.is_dir() and not part.name.startswith("."))
    known = list(listed) or folders
    if config not in known:
        near = nearest(config, known)
        raise DataError(
            f"no configuration is called {config!r}",
            where=f"{where}: data.config",
            allowed=", ".join(known) or "none: the directory has no folders",
            hint=f"did you mean {near!r}?" if near else None,
        )
    entry = listed.get(config, {})
    if "data_files" in entry:
        given = entry["data_files"] if isinstance(entry["data_files"], list) else [entry["data_files"]]
        paths = [one.get("path") if isinstance(one, dict) else one for one in given]
        patterns = [str(one) for path in paths for one in (path if isinstance(path, list) else [path]) if one]
        found = {match for pattern in patterns for match in directory.glob(pattern.lstrip("/"))} & {*inside}
    else:
        folder = directory / str(entry.get("data_dir", config)).strip("./")
        found = {file for file in inside if file.is_relative_to(folder)}
    if not found:
        raise DataError(f"the configuration {config!r} has no data file here", where=where, hint="download it whole")
    return found


def _asked(names: Sequence[str], split: str, where: str) -> list[str]:
    if split == "all":
        return list(names)
    taken: list[str] = []
    for wanted in split.split("+"):
        found = [wanted] if wanted in names else [name for name in names if matches(name, wanted)]
        if not found:
            near = nearest(wanted, names)
            hint = f"did you mean {near!r}?" if near else None
            if "[" in wanted:
                hint = "slices are not read here; data.limit takes some of the records"
            raise DataError(
                f"no split is called {wanted!r}",
                where=f"{where}: data.split",
                allowed=", ".join([*names, "all"]),
                hint=hint,
            )
        taken.extend(name for name in found if name not in taken)
    return [name for name in names if name in taken]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
