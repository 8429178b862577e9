"""What a round asks of the network between its training stages: answers to prompts, and scores of pairs of answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perlhf.config.loop import LoopConfig
from perlhf.data.order import keyed_seed
from perlhf.data.records import Prompt, Rating, Text, text_of
from perlhf.evaluation.reward import score_by_members
from perlhf.evaluation.shared import Sampling, plain, server_of
from perlhf.labelling.rounds.order import Floats
from perlhf.model.bases.found import Base
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.open import load_earlier, load_sft, new_adapter, open_model, with_day
from perlhf.runs.earlier import adapters_of


@dataclass(frozen=True)
class Pair:
    """Two answers of one prompt."""

    prompt: Text
    first: str
    second: str
    group: str


def sample_answers(
    config: LoopConfig, prompts: Sequence[Prompt], sides: Mapping[str, tuple[Path | None, int]], key: str
) -> dict[str, list[list[str]]]:
    """Answers to each prompt by side.

    Args:
        sides: by name, the policy run that answers (None: the start) and how many answers it gives to each prompt.
        key: of the random draws.

    Raises:
        ConfigError, ServiceError, StaleSamplerError: as `server_of`, where a server samples.
        AdapterError: adapters that the loop is to train don't fit the base.
    """
    model, encoder = _opened(config)
    start = None if config.sft is None else load_sft(model, config.sft, encoder)
    longest = config.policy.max_completion_tokens
    ids = [encoder.cut_prompt(record.prompt, longest) for record in prompts]
    adapters = {
        name: start if run is None else load_earlier(model, run, "policy", encoder).name
        for name, (run, _) in sides.items()
    }
    found: dict[str, list[list[str]]] = {}
    given: dict[str, Any] = {"run": config.run, "key": config.run}
    # What a round will need is told now, before people label: adapters are made, and a server gets the policy's.
    given |= {"slots": config.slots, "temperature": config.policy.temperature}
    sent = list(adapters.values())
    if set(sent) == {start}:
        reward = config.reward_stage(config.run, config.run, None, config.seed)
        new_adapter(model, "reward", "reward", reward)
        policy = config.policy_stage(config.run, config.run, None, config.seed)
        begun = new_adapter(model, "policy", "policy", policy, beneath=start).name
        sent += [begun] if config.sampler == "vllm" else []
    with server_of(config, model, encoder, ids, sent, **given) as server:
        for name, (_, count) in sides.items():
            seed = keyed_seed(config.seed, key, name)
            sampling = Sampling(model, encoder, ids, longest, seed, server=server)
            found[name] = sampling.texts(adapters[name], config.policy.temperature, count, name)
    return found


def answered(prompts: Sequence[Prompt], answers: Mapping[str, list[list[str]]]) -> Iterator[dict[str, Any]]:
    """A row a prompt: its group, its answers, and by whom each is."""
    for number, record in enumerate(prompts):
        by = [name for name, found in answers.items() for _ in found[number]]
        texts = [text for found in answers.values() for text in found[number]]
        yield {"prompt": plain(record.prompt), "group": record.group, "completions": texts, "by": by}


def score_pairs(config: LoopConfig, runs: Sequence[Path], pairs: Sequence[Pair]) -> Floats:
    """Scores [members, pairs, 2] of both answers by each member of the reward runs; nan of pairs of which one answer is
    empty.

    An answer that is in several pairs is scored once.
    """
    members = [directory for run in runs for directory in adapters_of(run) or [run]]
    scores = np.full((len(members), len(pairs), 2), np.nan)
    whole = [at for at, pair in enumerate(pairs) if pair.first.strip() and pair.second.strip()]
    if not whole:
        return scores
    numbers: dict[tuple[str, str], int] = {}
    records: list[Rating] = []
    places = np.zeros((len(whole), 2), dtype=int)
    for row, pair in enumerate(pairs[at] for at in whole):
        for side, answer in enumerate((pair.first, pair.second)):
            key = text_of(pair.prompt), answer
            if key not in numbers:
                numbers[key] = len(records)
                records.append(Rating(pair.prompt, answer, True, pair.group))  # judged by nobody yet
            places[row, side] = numbers[key]
    model, encoder = _opened(config)
    names = [load_earlier(model, at, f"reward_{n}", encoder, "reward").name for n, at in enumerate(members)]
    budget = config.stage().microbatch_tokens
    tables, _ = score_by_members(model, encoder, records, names, budget, model.packing("auto"))
    for member, scored in enumerate(tables):
        flat = np.array([np.nan if values is None else values[0] for values in scored])
        scores[member, whole] = flat[places]
    return scores


def _opened(config: LoopConfig) -> tuple[Model, Encoder]:
    """The base without adapters, and the encoder."""
    if config.threads:
        torch.set_num_threads(config.threads)
    base = Base.find(config.base)
    return open_model(with_day(config.stage(), base), base)
