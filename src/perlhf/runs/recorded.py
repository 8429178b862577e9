"""What a run recorded of all that its result depends on (`facts` of manifest.json), held against what is there now.

    data       {path: SHA-256}; `beside` the same for files that a reader reads besides, such as SQuALITY's stories
    base       {"name", "sha256" of the weights, "files": {name: SHA-256} of configuration, tokenizer and template}
    adapters   {run that it builds on: SHA-256 of its adapter}
    code       {module:function: SHA-256 of the files it is read from}
    template   SHA-256 of a chat template's file

Runs of earlier versions lack some of it: what wasn't recorded contradicts nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perlhf.errors import RunError
from perlhf.runs.earlier import adapter_of, adapters_of, files_hash
from perlhf.runs.manifest import ADAPTER, MANIFEST, read_manifest


def changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing in `now` that isn't as it was recorded; what either leaves out isn't compared."""
    found = [f"the data in {path} were changed" for path in _differing(recorded, now, "data")]
    found += [f"{path}, which is read with the data, was changed" for path in _differing(recorded, now, "beside", True)]
    base_then, base_now = _part(recorded, "base"), _part(now, "base")
    if base_then.get("sha256") == base_now.get("sha256"):  # another base is the adapter's matter (`saved.check_base`)
        for name in _differing(base_then, base_now, "files", True):
            found.append(f"{name} of base {base_now.get('name')} was changed")
    found += [f"the adapter of {run} was trained again or replaced" for run in _differing(recorded, now, "adapters")]
    found += [f"the code of {name} was changed" for name in _differing(recorded, now, "code")]
    return found


def own_changes(run: Path) -> list[str]:
    """As `changes`, of the adapter that a finished run made; none of a run that recorded no hash of it."""
    if not (run / MANIFEST).is_file():
        return []
    made, directory = read_manifest(run).get(ADAPTER), adapter_of(run)
    if not isinstance(made, str) or directory is None or files_hash(directory) == made:
        return []
    return ["its own adapter was changed"]


def check_own(run: Path, key: str) -> None:
    """Raises RunError, which names `key`, for a finished run whose adapter was changed since."""
    if found := own_changes(run):
        adapters = ", ".join(map(str, adapters_of(run)))
        hint = f"copy the run again, or train it in another directory; to take it as it is, name {adapters}"
        raise RunError(f"{run}: {found[0]} since it was trained", where=key, hint=hint)


def _differing(recorded: Mapping[str, Any], now: Mapping[str, Any], kind: str, whole: bool = False) -> list[str]:
    """Names whose hashes differ; with `whole`, names that only one side has, too, where both have the kind."""
    then, here = _part(recorded, kind), _part(now, kind)
    if whole and kind in recorded and kind in now:
        return sorted(name for name in {*then, *here} if then.get(name) != here.get(name))
    return [name for name in here if name in then and then[name] != here[name]]


def _part(facts: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    part = facts.get(kind)
    return part if isinstance(part, Mapping) else {}
