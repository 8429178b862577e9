"""Which linear layers an adapter is put on, by name. Imports no torch: plans count parameters by the same rules."""

from collections.abc import Sequence

from perlhf.errors import AdapterError, nearest


def match(linear: Sequence[str], targets: str | tuple[str, ...], layers: str = "all") -> list[str]:
    """Those of the paths in `linear` that are adapted, in their order.

    Args:
        linear: paths of all linear layers that may be adapted.
        targets: `attention` (inside a module called `*attn*` or `*attention*`), `all`, or names that equal a path's end
            (`q_proj`, `layers.0.mlp.up_proj`).
        layers: `all` layers of the network, or `last:N`.

    Raises:
        AdapterError: a name that matches nothing, with the nearest existing one; nothing in these layers.
    """
    last = sorted({path.split(".")[-1] for path in linear})
    if targets == "all":
        found = list(linear)
    elif targets == "attention":
        found = [p for p in linear if any("attn" in part or "attention" in part for part in p.split(".")[:-1])]
    else:
        wanted = (targets,) if isinstance(targets, str) else targets
        for target in wanted:
            if not any(_ends(path, target) for path in linear):
                raise AdapterError(
                    f"adapter target '{target}' matches no linear layer of the base",
                    where="adapter.targets",
                    allowed=f"attention, all, or names among {', '.join(last)}",
                    hint=nearest(target, last),
                )
        found = [path for path in linear if any(_ends(path, target) for target in wanted)]
    if not found:
        raise AdapterError(
            f"adapter targets '{targets}' match no linear layer of the base",
            where="adapter.targets",
            allowed=f"names among {', '.join(last) or '(the base has no nn.Linear)'}",
        )
    if layers == "all":
        return found
    first = 1 + max(map(_layer, linear)) - int(layers.removeprefix("last:"))
    kept = [path for path in found if _layer(path) >= max(first, 0)]
    if not kept:
        raise AdapterError(f"adapter targets '{targets}' match nothing in layers {layers}", where="adapter.layers")
    return kept


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _layer(path: str) -> int:
    """The layer that a module is in, from 0; -1 outside the layers."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)
