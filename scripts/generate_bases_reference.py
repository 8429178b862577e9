"""Writes docs/bases.md: which networks of the installed transformers can be a base, which way goes through each.

    python scripts/generate_bases_reference.py

The verdicts are those that `tests/bases` holds by trying each family (`tests/bases/families.py`). What is adapted is
read from its small networks, and held by the same tests.
"""

import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from perlhf.errors import AdapterError
from perlhf.kernels.modules import fused_experts
from perlhf.model.model import Model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bases"))

import families  # noqa: E402
import networks  # noqa: E402

PAGE = ROOT / "docs" / "bases.md"


Layers = tuple[str, str, str]
"""Last names of the layers that `attention` adapts, of those that `all` adds, and of fused experts."""


def layers_of(model: Model) -> Layers:
    """What can be adapted of a base."""
    found: dict[str, list[str]] = {}
    for targets in ("attention", "all"):
        try:
            found[targets] = model.targets(targets)
        except AdapterError:
            found[targets] = []
    attention = {*found["attention"]}
    added = [path for path in found["all"] if path not in attention]
    return _names_of(found["attention"]), _names_of(added), _names_of(fused_experts(model.base.named_modules()))


def layers_said(page: str) -> dict[str, Layers]:
    """What a page says of each family."""
    table = page.partition("## What is adapted")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {name.strip("`"): (row[1], row[2], row[3]) for row in rows for name in row[0].split(", ")}


def page(layers: Mapping[str, Layers]) -> str:
    """The page as it should be.

    Args:
        layers: of each family that opens.
    """
    tree, rows, closed = len(families.TREE), len(families.ROWS), len(families.CLOSED)
    total = tree + rows + closed
    variants = [f"| {name} | `{family}` | {what} |" for name, (family, what, _) in networks.VARIANTS.items()]
    lines = [
        "# Bases",
        "",
        f"transformers {version('transformers')} has {total + len(families.OTHERS)} types with a causal language "
        f"model. {total} of them are decoder-only, and {tree + rows} of these ({(tree + rows) / total:.0%}) open: "
        f"{tree} ({tree / total:.0%}) as a tree of prefixes, where what sequences share is computed once, and "
        f"{rows} in padded rows by their own forward, which gives the same and takes longer. What becomes of a network "
        "is found out by running a few tokens through it, not by its name: `perlhf base MODEL` says it of one.",
        "",
        "Each family below is tried by `tests/bases`, as a random network of some layers in float32, with a low-rank "
        "adapter on each of its linear layers (`all`; `attention` is a part of them, and takes none where a "
        "network has no attention). The plain network with the update added to its weights by hand must agree with:",
        "",
        "- scores, log-probabilities (to 0.001) and the gradients of all adapters (to 0.002 of their norm), of "
        "sequences that share prefixes, as a tree and in rows where both go;",
        "- greedy completions, token by token, and with transformers' `generate`;",
        "- the adapter written and read again (bit for bit), and the merged checkpoint as it is loaded as a base.",
        "",
        "`make test-bases` tries them in bfloat16, too, where a network must lose no more than twice what it loses "
        "without us, or 0.05.",
        "",
        "Sequences longer than LongRoPE's or dynamic scaling's first length are refused: one of them would turn the "
        "positions of all rows that are computed with it.",
        "",
        f"Checked with torch {version('torch').split('+')[0]}, transformers {version('transformers')} and peft "
        f"{version('peft')}, on {platform.machine()} CPUs.",
        "",
        f"## As a tree ({tree})",
        "",
        *_names(families.TREE),
        "",
        f"## In rows ({rows})",
        "",
        "| why not as a tree | families |",
        "|---|---|",
        *_by_reason(families.ROWS),
        "",
        "## What is adapted",
        "",
        "Linear layers by the last part of their names, of the small networks that are tried. Output heads, routers of "
        "experts and experts that are fused into one tensor never are, nor what no text reaches.",
        "",
        "| families | `attention` | `all` adds | fused experts |",
        "|---|---|---|---|",
        *_by_layers(layers),
        "",
        f"## Settings of real checkpoints ({len(variants)})",
        "",
        "The same is seen to hold, but for files, of these:",
        "",
        "| | family | what it has |",
        "|---|---|---|",
        *variants,
        "",
        f"## Not open ({closed})",
        "",
        "| why | families |",
        "|---|---|",
        *_by_reason(families.CLOSED),
        "",
        f"## Not decoder-only ({len(families.OTHERS)})",
        "",
        "| what it is | types |",
        "|---|---|",
        *_by_reason(families.OTHERS),
        "",
    ]
    return "\n".join(lines)


def _names(names: Sequence[str]) -> list[str]:
    return [", ".join(f"`{name}`" for name in sorted(names))]


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    return [
        f"| {reason} | {_names([name for name, why in reasons.items() if why == reason])[0]} |"
        for reason in dict.fromkeys(reasons.values())
    ]


def _by_layers(layers: Mapping[str, Layers]) -> list[str]:
    return [
        f"| {_names([name for name, its in layers.items() if its == alike])[0]} | {' | '.join(alike)} |"
        for alike in dict.fromkeys(layers[family] for family in sorted(layers))
    ]


def _names_of(paths: Sequence[str]) -> str:
    return " ".join(f"`{name}`" for name in dict.fromkeys(path.rpartition(".")[2] for path in paths)) or "–"


if __name__ == "__main__":
    opened = {
        family: layers_of(Model(networks.network(family), {"name": family, "sha256": "0" * 64}))
        for family in (*families.TREE, *families.ROWS)
    }
    PAGE.write_text(page(opened), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
