"""Writes docs/commands.md from the commands and their configuration models. Run by `make docs`; a test compares."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from perlhf.commands.names import COMMANDS, DATA_COMMANDS, DATA_SUMMARY, LABEL_COMMANDS, summaries
from perlhf.config.command_line import FLAGS, Command
from perlhf.config.recipe import describe, submodel

TARGET = Path(__file__).resolve().parents[1] / "docs" / "commands.md"

INTRODUCTION = """# Commands

Generated from the code by `make docs`; every text below is also in `perlhf COMMAND --help`.

A training command takes a recipe, which is a YAML file with the keys below, and options, which override it:

    perlhf reward recipes/coffee/reward.yaml --adapter.rank 4

In a recipe the dots are nesting (`adapter:` with `rank: 4` beneath it). `null` leaves a value unset. Lists are written
`[a, b]` in a recipe and `a b` after an option, names with values `{a: b}` in both (quoted after an option). A switch is
`--encoding.drop-long` or `--encoding.no-drop-long`.

Exit codes: 0 done, 2 a mistake in a recipe, option, file or run directory, 3 training had to stop (a loss that is not
finite, or a sampler that did not use the adapter), 70 a mistake of perlhf's own (its traceback is in a file that the
message names), 130 interrupted.
"""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    parts += [_section(name, command, "##") for name, command in COMMANDS.items()]
    parts.append(f"## data\n\n{DATA_SUMMARY}\n")
    parts += [f"- [`perlhf data {name}`](#data-{name}): {text}" for name, text in summaries(DATA_COMMANDS).items()]
    parts.append("")
    parts += [_section(f"data {name}", command, "###") for name, command in DATA_COMMANDS.items()]
    for name, command in LABEL_COMMANDS.items():
        parts.append(_section("label", command, "##") if name == "label" else _section(f"label {name}", command, "###"))
    return "\n".join(parts).rstrip("\n") + "\n"


def _section(name: str, command: Command[Any], level: str) -> str:
    words = " ".join(_positional(command.model, field) for field in command.positionals)
    recipe = " [recipe.yaml]" if command.dry_run else ""
    lines = [f"{level} {name}", "", command.about, ""]
    lines += [f"    {command.prog}{recipe}{' ' + words if words else ''} [--option value ...]", ""]
    rows = list(_rows(command.model, command.positionals))
    if command.flag:
        rows.append((f"`--{command.flag.replace('_', '-')}`", "switch", "", FLAGS[command.flag]))
    if rows:
        lines += ["| option | allowed | default | |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _positional(model: type[BaseModel], name: str) -> str:
    info, shown = _field(model, name), name.rpartition(".")[2].upper()
    if str(info.annotation).startswith("tuple"):
        return f"{shown} [{shown} ...]"
    return shown if info.is_required() else f"[{shown}]"


def _field(model: type[BaseModel], name: str) -> Any:
    first, _, rest = name.partition(".")
    info = model.model_fields[first]
    nested = submodel(info.annotation)
    return _field(nested, rest) if nested and rest else info


def _rows(
    model: type[BaseModel], positionals: tuple[str, ...], prefix: str = "", unset: bool = False
) -> Iterator[tuple[str, ...]]:
    """A row for each option; with `unset`, those of a model that may be left out whole, so that none is required."""
    for name, info in model.model_fields.items():
        nested = submodel(info.annotation)
        if nested:
            yield from _rows(nested, positionals, f"{prefix}{name}.", unset or info.default is None)
            continue
        path = f"{prefix}{name}"
        option = path.rpartition(".")[2].upper() if path in positionals else f"--{path.replace('_', '-')}"
        default = "required" if info.is_required() else f"`{_default(info.get_default(call_default_factory=True))}`"
        default = "with the others" if info.is_required() and unset else default
        yield f"`{option}`", describe(info.annotation, tuple(info.metadata)), default, (info.description or "").strip()


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(str(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value, default=str).strip('"')


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
