"""Where scores of completions come from: reward adapters on the same base, Python functions, HTTP addresses, and
their combination.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from perlhf.data.records import Text
from perlhf.errors import ConfigError
from perlhf.method.packing import Ids, Packing, microbatches
from perlhf.model import saved
from perlhf.model.encode import Encoder
from perlhf.model.model import Model
from perlhf.rollout.scorers import Scorer, combine, http_reward, load_function


@dataclass(frozen=True)
class Rewards:
    """Reward adapters by name (`reward_0`..) and other scorers; all of them score every completion."""

    adapters: tuple[str, ...]
    scorers: tuple[Scorer, ...]
    how: Literal["mean", "min", "mean_minus_std"]

    def scores(
        self,
        model: Model,
        encoder: Encoder,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        texts: Sequence[Text],
        max_tokens: int,
        packing: Packing = "tree",
    ) -> np.ndarray:
        """One combined score per completion, float64 [batch].

        Reward adapters see the sampled ids as they are, but a completion that was cut gets the end token: they never
        learned from a state before it, and score such states at random (docs/experiments.md). Functions and services
        get the prompts' texts and decoded completions.
        """
        whole = [ids if ids and ids[-1] == encoder.end_id else [*ids, encoder.end_id] for ids in completions]
        # The end token may be one too many for the context: then the prompt loses its first one.
        given = [p if len(p) + len(c) <= encoder.max_tokens else p[1:] for p, c in zip(prompts, whole, strict=True)]
        members = [score_ids(model, given, whole, name, max_tokens, packing) for name in self.adapters]
        if self.scorers:
            decoded = [encoder.decode(ids) for ids in completions]
            members += [scorer(list(texts), decoded) for scorer in self.scorers]
        return combine(np.array(members, dtype=float), self.how)


def load_rewards(
    model: Model,
    sources: Sequence[str],
    how: Literal["mean", "min", "mean_minus_std"],
    encoder: Encoder,
    prefix: str = "reward",
    key: str = "reward",
) -> Rewards:
    """Loads every source: an http(s) address, `module:function`, or a reward run directory, as adapter PREFIX_0, ..

    Args:
        key: of the configuration, which errors name.

    Raises:
        ConfigError: a source that is none of these; AdapterError: a reward run of another base or encoding.
    """
    adapters: list[str] = []
    scorers: list[Scorer] = []
    for source in sources:
        if source.startswith(("http://", "https://")):
            scorers.append(http_reward(source))
        elif (Path(source) / "adapter").is_dir():
            name = f"{prefix}_{len(adapters)}"
            adapter = saved.load_adapter(model, Path(source) / "adapter", name, encoder)
            if adapter.head is None:
                raise ConfigError(f"{source} holds a {adapter.role} adapter", where=key, allowed="a reward run")
            model.freeze(name)
            adapters.append(name)
        elif ":" in source and not Path(source).exists():
            scorers.append(load_function(source, key))
        else:
            raise ConfigError(
                f"'{source}' is no finished reward run",
                where=key,
                allowed="a reward run directory, module:function, or an http(s) address",
                hint="train it with perlhf reward",
            )
    return Rewards(tuple(adapters), tuple(scorers), how)


@torch.no_grad()
def score_ids(
    model: Model,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    adapter: str,
    max_tokens: int,
    packing: Packing = "tree",
) -> list[float]:
    """Scores of prompt + completion ids under one reward adapter, at their last token."""
    sequences = [tuple(p) + tuple(c) for p, c in zip(prompts, completions, strict=True)]
    out = [0.0] * len(sequences)
    for batch in microbatches([[ids] for ids in sequences], max_tokens, packing):
        found = model.scores([sequences[i] for i in batch], adapter, packing=packing)
        for i, score in zip(batch, found.tolist(), strict=True):
            out[i] = score
    return out
