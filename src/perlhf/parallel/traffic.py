"""What an update costs several workers: its passes through the network, and the bytes that they tell one another.

Bytes are those that one worker receives, by the rules of `workers.Workers`; it sends as many, but for what the first
worker alone says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from perlhf.config.stages import PolicyConfig, RewardConfig, SftConfig
from perlhf.parallel.workers import AT_ONCE
from perlhf.runs.earlier import reward_adapters, reward_runs

Stage = SftConfig | RewardConfig | PolicyConfig

METRICS_TEXT = 900
"""Bytes of an update's numbers as the first worker tells them, about."""
SCORE_TEXT = 20
"""Bytes of a function's or service's score as text, about."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of each prompt and of each completion."""

    prompt: int
    completion: int

    @classmethod
    def longest(cls, config: Stage) -> "Lengths":
        """The longest that a configuration lets through: half and half, where it names no completion's length."""
        most = config.encoding.max_tokens
        completion = config.max_completion_tokens if isinstance(config, PolicyConfig) else max(1, most // 2)
        return cls(max(1, most - completion), completion)


@dataclass(frozen=True)
class Pass:
    """One way of all an update's tokens through the network."""

    what: str
    tokens: int
    """Computed by all workers together."""
    targets: int = 0
    """Those that the output head is applied to."""
    learned: bool = False


@dataclass(frozen=True)
class Gathers:
    """Bytes that a device receives of a base that several have in parts (`shard`)."""

    forward: int
    """In a pass, and for its gradient once more."""

    def of(self, one: Pass) -> int:
        """In one micro-batch."""
        return self.forward * (1 + one.learned)


def passes_of(config: Stage, lengths: Lengths) -> Iterator[Pass]:
    """The passes of an update, sampling left out; a reward's records are comparisons.

    In a tree a prompt that several completions follow is computed once.
    """
    prompts, rows = 1, 1
    match config:
        case SftConfig():
            prompts = config.examples_per_update
        case RewardConfig():
            prompts, rows = config.examples_per_update, 2
        case PolicyConfig():
            prompts, rows = config.prompts_per_update, config.completions_per_prompt
    targets = prompts * rows * lengths.completion
    tokens = prompts * (rows if config.packing == "none" else 1) * lengths.prompt + targets
    if not isinstance(config, PolicyConfig):
        for _ in range(config.members if isinstance(config, RewardConfig) else 1):  # fewer tokens over a shared trunk
            yield Pass("learning", tokens, targets if isinstance(config, SftConfig) else 0, learned=True)
        return
    for _ in range(reward_adapters(config.reward)):
        yield Pass("scoring", tokens)
    yield Pass("reference", tokens, targets)
    if not one_pass_learns(config):
        yield Pass("old log-probabilities", tokens, targets)
    for _ in range(config.steps_per_rollout):
        if config.baseline == "value":
            yield Pass("learning", tokens, learned=True)
        yield Pass("learning", tokens, targets, learned=True)


def one_pass_learns(config: PolicyConfig) -> bool:
    """Whether the pass that tells old log-probabilities learns as well, as far as the configuration decides it
    (`training.policy_step.whole_prompts`)."""
    return config.baseline != "value" and config.advantage_norm == "none" and config.steps_per_rollout == 1


def microbatches_of(one: Pass, config: Stage, workers: int) -> int:
    """Micro-batches of a worker, each of which is filled."""
    return -(-one.tokens // (workers * config.microbatch_tokens))


def exchanged(
    config: Stage,
    tensors: int,
    parameters: int,
    workers: int,
    lengths: Lengths,
    gathers: Gathers | None = None,
) -> dict[str, int]:
    """Bytes that a worker receives in an update, by what they are; none with one worker.

    All but `words` is exact where completions have their full length and workers have as many prompts each. Validation
    and the comparison of adapters (32 bytes from each other worker, every `check_every` updates) come on top.

    Args:
        tensors: with gradients, of all adapters.
        parameters: with gradients.
        lengths: of the update's sequences.
        gathers: of a base in parts.
    """
    if workers == 1:
        return {}
    steps, sums, found = 1, 4 if isinstance(config, RewardConfig) else 2, dict[str, int]()
    if isinstance(config, PolicyConfig):
        steps, sums = config.steps_per_rollout, 3
        found |= _told(config, workers, lengths)
    found["gradients"] = steps * of_gradients(tensors, parameters, workers)
    found["agreement"] = steps * of_sum(sums, 8, workers) + of_sum(1, 4, workers)
    if gathers is not None:
        passes = list(passes_of(config, lengths))
        found["base"] = sum(microbatches_of(one, config, workers) * gathers.of(one) for one in passes)
        # Who has most micro-batches: in scoring, whose micro-batches are its own, and in all other passes.
        found["agreement"] += len({one.what == "scoring" for one in passes}) * of_rows(1, workers)
        if isinstance(config, PolicyConfig):
            # Prompts, their probe, and each token after the first; logits of all tokens.
            found["base"] += (1 + lengths.completion) * gathers.forward
            found["agreement"] += lengths.completion * of_sum(1, 4, workers)  # whether anybody goes on
    return found


def _told(config: PolicyConfig, workers: int, lengths: Lengths) -> Mapping[str, int]:
    """What workers tell of completions, their scores and log-probabilities."""
    rows, time = config.prompts_per_update * config.completions_per_prompt, lengths.completion
    most = -(-config.prompts_per_update // workers) * config.completions_per_prompt
    adapters = reward_adapters(config.reward)
    columns = [5] if one_pass_learns(config) else [3, *[1] * (config.steps_per_rollout * (config.baseline == "value"))]
    words = of_once(METRICS_TEXT, workers)
    if functions := len(config.reward) - len(reward_runs(config.reward)):
        words += of_once(functions * rows * SCORE_TEXT, workers)
    return {
        # Of each row its number, how many words follow, and its tokens after whether it ended; then log-probabilities.
        "completions": of_rows(most * (3 + time), workers) + of_rows(most * (2 + time), workers),
        "scores": adapters * of_sum(rows, 8, workers),
        "log-probabilities": sum(of_sum(width * rows * time, 4, workers) for width in columns),
        "words": words,
    }


# ---- what `Workers` does ---------------------------------------------------------------------------------------------


def of_sum(numbers: int, itemsize: int, workers: int) -> int:
    """Of `Workers.sum` of so many numbers."""
    if numbers <= AT_ONCE:
        return (workers - 1) * numbers * itemsize
    return 2 * (workers - 1) * -(-numbers // workers) * itemsize


def of_gradients(tensors: int, parameters: int, workers: int) -> int:
    """Of `Workers.sum_gradients`: a float32 number for each parameter, and one for each tensor, of who has it."""
    return of_sum(tensors + parameters, 4, workers)


def of_rows(longest: int, workers: int) -> int:
    """Of `Workers.rows`, where the worker with most has so many words: its lengths first, then int64 words."""
    return of_sum(workers, 8, workers) + (workers - 1) * longest * 8


def of_once(text: int, workers: int) -> int:
    """Of `Workers.once`, where the first worker says so many bytes."""
    return of_sum(1, 8, workers) + text
