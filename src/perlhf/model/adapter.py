"""One adapter: everything that one role trains."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from perlhf.method.lora import LowRank

Role = Literal["sft", "reward", "policy", "value"]


@dataclass
class Adapter:
    """Low-rank pairs by the path of their layer, or full weights by name; a scalar head for reward and value."""

    name: str
    role: Role
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    pairs: dict[str, LowRank] = field(default_factory=dict)
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    score_head: nn.Parameter | None = None
    bias: nn.Parameter | None = None
    beneath: str | None = None
    source: Path | None = None
    """The directory that it was loaded from."""
    version: int = 0
    """Raised by whoever changes its weights: the optimiser's step, and a checkpoint that is put back."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """All its tensors by a stable name."""
        named = {f"{path}.lora_A": pair.a for path, pair in self.pairs.items()}
        named |= {f"{path}.lora_B": pair.b for path, pair in self.pairs.items()}
        named |= {f"base.{name}": weight for name, weight in self.weights.items()}
        if self.score_head is not None and self.bias is not None:
            named |= {"score.weight": self.score_head, "score.bias": self.bias}
        return named

    def trainable_by_name(self) -> dict[str, nn.Parameter]:
        """Its parameters with gradients by a stable name."""
        return {name: p for name, p in self.tensors().items() if p.requires_grad}

    def trainable(self) -> list[nn.Parameter]:
        """Its parameters with gradients."""
        return list(self.trainable_by_name().values())

    def copied(self, name: str, role: Role) -> "Adapter":
        """A trainable copy without head."""
        new = Adapter(name, role, self.rank, self.alpha, self.dropout, beneath=self.beneath)
        new.pairs = {path: LowRank(_copied(p.a), _copied(p.b), p.scale, p.dropout) for path, p in self.pairs.items()}
        new.weights = {name: _copied(weight) for name, weight in self.weights.items()}
        return new

    def add_head(self, hidden_size: int, device: torch.device) -> None:
        """A zero head where the role has one; a reward's bias is not trained by gradients."""
        if self.role in ("reward", "value"):
            self.score_head = nn.Parameter(torch.zeros(1, hidden_size, device=device))
            self.bias = nn.Parameter(torch.zeros(1, device=device), requires_grad=self.role == "value")


def _copied(tensor: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())
