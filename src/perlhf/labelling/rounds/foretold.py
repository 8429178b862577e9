"""What a loop would do, before anything is done: prompts, labels, and roughly how long (`perlhf loop --dry-run`)."""

import time
from statistics import fmean

import torch

from perlhf.config.loop import LoopConfig
from perlhf.data.records import text_of
from perlhf.data.splits import SPLITS
from perlhf.errors import ModelError
from perlhf.labelling.questions import prompts_of
from perlhf.labelling.rounds.loop import MORE
from perlhf.labelling.rounds.results import Places
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import end_ids, load_tokenizer, without_weights
from perlhf.model.encoding.encode import Encoder
from perlhf.model.open import with_day
from perlhf.rollout.vllm.connection import Connection, introduction
from perlhf.runs.earlier import check_runs
from perlhf.runs.words import duration
from perlhf.system.files import read_json

SECONDS_A_LABEL = 20.0
"""Of a person."""
LETTERS_A_TOKEN, TEMPLATE_TOKENS = 4.0, 30
SHARE_OF_PEAK = 0.8
"""Of what a product of matrices in float32 reaches: what SmolLM2 gets in bfloat16 with short sequences."""
LEARNED, SAMPLED = 3.0, 3.0
"""What a token that is learned from, and one that is sampled, takes in passes forward."""
MEASURED_SIDE = 1024


def foretell(config: LoopConfig) -> list[tuple[str, str]]:
    """Lines of a table.

    Raises:
        DataError: no prompts; ModelError: no base; RunError: `sft` isn't finished.
        ServiceError, ConfigError: a server that is to sample isn't there, or can't (`rollout.vllm.connection`).
    """
    check_runs("sft", [] if config.sft is None else [config.sft])
    sides = {side: prompts_of(config.data, side) for side in SPLITS}
    server = _server(config) if config.sampler == "vllm" else None
    rows = [(f"prompts, {side}", f"{len(found):,}") for side, found in sides.items()]
    rows += [("rounds", f"{config.rounds:,}"), ("who answers", config.labeller)]
    rows += [("what samples", server)] if server else []
    labels = _labels_in_all(config, **{side: len(found) for side, found in sides.items()})
    rows += [(f"labels {what}", f"{count:,}") for what, count in labels.items()]
    share = "" if config.order == "random" else f", {config.random_share:.0%} of each round's at random"
    rows.append(("questions", f"by {config.order}{share}; those of the first round at random"))
    if config.labeller == "people":
        hours = duration(sum(labels.values()) * SECONDS_A_LABEL)
        rows.append(("people's time", f"about {hours} at {SECONDS_A_LABEL:.0f} s a label"))
    letters = fmean(len(text_of(record.prompt)) for record in sides["train"])
    done = [places for number in range(1, config.rounds + 1) if (places := Places(config, number)).scores.exists()]
    left = config.rounds - len(done)
    rows.append(("rounds that are done", f"{len(done)}"))
    if done:
        each = fmean(_computed(places) for places in done)
        rows.append(("the machine's time left", f"about {duration(left * each)}, as rounds so far took"))
    else:
        rows.append(("the machine's time", f"roughly {duration(_seconds(config, letters))}, from its speed alone"))
    return rows


def _labels_in_all(config: LoopConfig, train: int, validation: int, test: int) -> dict[str, int]:
    """At most how many labels are asked for: to learn from, to measure reward models with, and for the duels of
    policies with the start; no prompt is asked about twice in a round.

    Pairs of which both answers are the same text need none.

    Args:
        train, validation, test: prompts of each side.
    """
    return {
        "to learn from, at most": config.rounds * min(config.labels_per_round, train),
        "to measure with, at most": min(config.held_out_labels, validation + test),
        "for duels, at most": config.rounds * min(config.duels, test),
    }


def _server(config: LoopConfig) -> str:
    """Asks the server that is to sample whether it can; not where the packaged base isn't here yet."""
    connection = Connection(config.vllm.url, config.vllm.timeout_seconds)
    try:
        base = Base.find(config.base)
    except ModelError:
        return f"vLLM at {connection.shown}, which isn't asked before the base is here"
    stage = with_day(config.stage(), base)
    introduction(connection, Encoder(load_tokenizer(base), stage.encoding, end_ids(base)))
    return f"vLLM at {connection.shown}, which must hold {config.slots} adapters"


def passes_forward(config: LoopConfig, letters: float, layers: int) -> float:
    """Tokens of all rounds, each counted as passes forward of a token.

    Args:
        letters: of a prompt, on average.
        layers: of the network; what lies below those that members adapt is computed once for all of them.
    """
    prompt, answer = letters / LETTERS_A_TOKEN + TEMPLATE_TOKENS, 0.6 * config.policy.max_completion_tokens
    pair = prompt + 2 * answer
    reward, policy, adapted = config.reward, config.policy, config.reward.adapter.layers
    own = 1.0 if adapted == "all" else min(1.0, int(adapted.removeprefix("last:")) / layers)
    scored, learning = (1 - own + times * own * reward.members for times in (1, LEARNED))
    of_answers = config.prompts_per_round * (prompt + SAMPLED * answer * config.answers_per_prompt)
    candidates = config.prompts_per_round * (prompt + answer * config.answers_per_prompt) * scored
    learned = config.rounds * (config.rounds + 1) / 2 * config.labels_per_round * reward.epochs * learning
    completions = policy.prompts_per_update * policy.completions_per_prompt
    update = policy.prompts_per_update * prompt * (LEARNED + 2 + scored) + completions * answer * (
        SAMPLED + LEARNED + 1 + scored
    )
    held_out = (config.held_out_labels + config.duels) * pair * scored + 2 * config.duels * (prompt + SAMPLED * answer)
    validated = 6 * policy.validation_prompts * (prompt + (SAMPLED + 1 + scored) * answer)
    first = MORE * config.held_out_labels * (prompt + 2 * SAMPLED * answer)
    each = of_answers + candidates + policy.updates * update + held_out + validated
    return first + learned * pair + config.rounds * each


def _seconds(config: LoopConfig, letters: float) -> float:
    """By the speed of one product of matrices, measured now, and two operations a weight and token."""
    network = without_weights(config.base)
    weights, layers = network.num_parameters(), int(network.config.get_text_config().num_hidden_layers)
    square, times = torch.randn(MEASURED_SIDE, MEASURED_SIDE), list[float]()
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(square, square)
        times.append(time.perf_counter() - began)
    speed = 2 * MEASURED_SIDE**3 / min(times)
    return 2 * weights * passes_forward(config, letters, layers) / (speed * SHARE_OF_PEAK)


def _computed(places: Places) -> float:
    """Seconds of a round, those left out in which people were waited for."""
    found = read_json(places.seconds) if places.seconds.exists() else {}
    return sum(seconds for name, seconds in found.items() if name != "labels")
