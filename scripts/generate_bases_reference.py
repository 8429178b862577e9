"""Writes docs/bases.md: which networks of the installed transformers can be a base, which way goes through each.

    python scripts/generate_bases_reference.py

The verdicts are those that `tests/bases` holds by trying each family (`tests/bases/families.py`).
"""

import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bases"))

import families  # noqa: E402
import networks  # noqa: E402

PAGE = ROOT / "docs" / "bases.md"


def page() -> str:
    """The page as it should be."""
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
        "- greedy completions, token by token;",
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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
