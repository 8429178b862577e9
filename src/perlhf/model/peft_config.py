"""PEFT's adapter_config.json: what is read of it, what is refused, and what is written.

An adapter here is (alpha / rank) B A on linear layers. What would compute something else, or isn't known, is refused
by the name of its key, and so is a value of a wrong kind.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlhf.errors import AdapterError
from perlhf.model.adapter import Adapter

_KNOWN = frozenset(  # keys of PEFT's configuration; these are read,
    "alpha_pattern base_model_name_or_path bias init_lora_weights layers_to_transform lora_alpha lora_dropout "
    "modules_to_save peft_type r rank_pattern target_modules task_type use_rslora "
    # and these have no effect on what an adapter computes, given its tensors
    "auto_mapping ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode layers_pattern "
    "megatron_core peft_version qalora_group_size revision runtime_config".split()
)
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights as well


_PATTERNS = ("rank_pattern", "alpha_pattern")
_TEXT, _TEXTS, _TABLE, _YES = (
    (str, "text"),
    (list, "a list of names"),
    (dict, "numbers by pattern"),
    (bool, "true or false"),
)
_KINDS: dict[str, tuple[Any, str]] = {
    "peft_type": _TEXT,
    "task_type": _TEXT,
    "bias": _TEXT,
    "base_model_name_or_path": _TEXT,
    "init_lora_weights": ((bool, str), "true, false or a name"),
    "use_rslora": _YES,
    "modules_to_save": _TEXTS,
    "target_modules": ((list, str), "names, or a pattern"),
    "rank_pattern": _TABLE,
    "alpha_pattern": _TABLE,
}
"""What values of keys must be, and how that is called; null is everywhere allowed."""


def check_plain(config: dict[str, Any], file: Path) -> None:
    """Refuses every setting that isn't known to be plain LoRA, those of later peft versions included.

    Raises:
        AdapterError: it names file and key.
    """
    where = str(file)
    allowed = "plain LoRA on linear layers"
    for key, (kinds, named) in _KINDS.items():
        value = config.get(key)
        if value is not None and (not isinstance(value, kinds) or not _all_text(value)):
            raise wrong(file, f"{key} is {value!r:.100}", named)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {config.get('peft_type')}", where=where, allowed="LORA")
    if config.get("task_type") not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise AdapterError(f"task_type is {config['task_type']}", where=where, allowed="CAUSAL_LM or SEQ_CLS")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"bias: {config['bias']} isn't supported", where=where, allowed="none")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        what = f"init_lora_weights: {config['init_lora_weights']} changes the base's weights"
        raise AdapterError(what, where=where, allowed=allowed, hint="convert it to plain LoRA with peft first")
    extra = set(config.get("modules_to_save") or ()) - {"score", "classifier"}
    if extra:
        raise AdapterError(f"modules_to_save has {sorted(extra)[0]}", where=where, allowed="score")
    for key in sorted(config.keys() - _KNOWN):
        if config[key]:
            raise AdapterError(f"{key}: {config[key]} isn't supported", where=where, allowed=allowed)


@dataclass(frozen=True)
class Shape:
    """Rank, alpha and dropout as PEFT's configuration has them, of the adapter and of layers that a pattern names."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]

    @classmethod
    def of(cls, file: Path, config: dict[str, Any]) -> "Shape":
        """Raises AdapterError, which names file and key, where a number is missing or none."""
        rank, alpha = (
            _number(file, "r", config.get("r"), whole=True),
            _number(file, "lora_alpha", config.get("lora_alpha")),
        )
        dropout = _number(file, "lora_dropout", config.get("lora_dropout") or 0)
        ranks, alphas = ({str(k): v for k, v in (config.get(key) or {}).items()} for key in _PATTERNS)
        for key, pattern in (
            (key, pattern) for key, found in zip(_PATTERNS, (ranks, alphas), strict=True) for pattern in found
        ):
            try:
                re.compile(_anywhere(pattern))
            except re.error as error:
                raise wrong(file, f"{key}: {pattern!r} is no pattern ({error})", "a regular expression") from error
        ranks = {pattern: int(_number(file, "rank_pattern", rank, whole=True)) for pattern, rank in ranks.items()}
        alphas = {pattern: _number(file, "alpha_pattern", alpha) for pattern, alpha in alphas.items()}
        if not 0 <= dropout < 1:
            raise wrong(file, f"lora_dropout is {dropout!r}", "from 0 to below 1")
        return cls(int(rank), alpha, dropout, bool(config.get("use_rslora")), ranks, alphas)

    def agrees(self, details: dict[str, Any]) -> bool:
        """Whether these are the numbers that perlhf.json has."""
        theirs = (details["rank"], details["alpha"], details.get("rank_pattern", {}), details.get("alpha_pattern", {}))
        return (self.rank, self.alpha, self.ranks, self.alphas) == theirs

    def rank_of(self, path: str) -> int:
        """The rank of the layer's pair."""
        return self.ranks.get(_matching(self.ranks, path), self.rank)

    def scale(self, path: str) -> float:
        """alpha / rank of the layer's pair, alpha / sqrt(rank) of rsLoRA."""
        rank, alpha = self.rank_of(path), self.alphas.get(_matching(self.alphas, path), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _anywhere(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _matching(patterns: Mapping[str, Any], path: str) -> str:
    """The first pattern that names the layer, in PEFT's own way (`peft.utils.other.get_pattern_key`); else ""."""
    return next((key for key in patterns if re.match(_anywhere(key), path)), "")


def patterns(adapter: Adapter) -> dict[str, dict[str, float]]:
    """PEFT's `rank_pattern` and `alpha_pattern`: the layers whose pair has another rank or alpha than the adapter."""
    ranks = {path: len(pair.a) for path, pair in adapter.pairs.items()}
    alphas = {path: pair.scale * ranks[path] for path, pair in adapter.pairs.items()}
    other_ranks = {_literally(path): rank for path, rank in ranks.items() if rank != adapter.rank}
    other_alphas = {_literally(path): alpha for path, alpha in alphas.items() if not math.isclose(alpha, adapter.alpha)}
    named = {"rank_pattern": other_ranks, "alpha_pattern": other_alphas}
    return {key: pattern for key, pattern in named.items() if pattern}


def _literally(path: str) -> str:
    """A path as a pattern that matches nothing else (PEFT lets anything precede a pattern)."""
    return "^" + re.escape(path)


def settings_of(adapter: Adapter, targets: list[str], base_name: str | None) -> dict[str, Any]:
    """What the file says of an adapter.

    Args:
        targets: module names or path endings that cover all its layers.
        base_name: what other tools load as the base.
    """
    classifier = adapter.score_head is not None
    for path in adapter.pairs:
        assert any(path == end or path.endswith(f".{end}") for end in targets), f"{path} is no target"
    alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapter.rank,
        "lora_alpha": alpha,
        **patterns(adapter),
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(targets),
        "modules_to_save": ["score"] if classifier else None,
        "bias": "none",
        "inference_mode": True,
    }


def targets_of(config: dict[str, Any], adapter: Adapter) -> list[str]:
    """The listed module names; full paths where peft chose modules by a pattern or by layer."""
    names = config.get("target_modules")
    covers = isinstance(names, list) and all(
        any(path == end or path.endswith(f".{end}") for end in names) for path in adapter.pairs
    )
    everywhere = config.get("layers_to_transform") is None and not config.get("exclude_modules")
    return sorted(names or ()) if covers and everywhere else sorted(adapter.pairs)


def wrong(file: Path, what: str, allowed: str) -> AdapterError:
    """The error for a value of a wrong kind in a file of an adapter's directory."""
    return AdapterError(what, where=str(file), allowed=allowed, hint="copy or export the adapter again")


def _all_text(value: object) -> bool:
    """Whether a list has nothing but names."""
    return not isinstance(value, list) or all(isinstance(name, str) for name in value)


def _number(file: Path, key: str, value: object, whole: bool = False) -> float:
    """A finite number; with `whole`, an integer above 0."""
    if whole and type(value) is int and 0 < value < 2**31:
        return value
    if not whole and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
        return float(value)
    said = "missing" if value is None else f"{value!r:.100}"
    raise wrong(file, f"{key} is {said}", "a whole number above 0" if whole else "a number")
