"""Local sampler: the same network and adapters that train, with a key/value cache.

Each prompt is computed once for its K completions, finished rows are dropped, the end token is kept. Randomness is
keyed by (seed, step, prompt, sample), so that a rollout doesn't depend on how rows are batched beyond rounding.
`sample` and `stream` read one loop, `_tokens`. A completion ends with an end token, or with the token that completes a
stop string, which is kept as well: what was sampled is what is learned.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from perlhf.errors import AdapterError, DivergenceError, StaleSamplerError
from perlhf.kernels.kv_cache import KeyValueCache
from perlhf.method.packing import Ids
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Cache, Held, Model

VOCAB_BLOCK = 256
"""Tokens whose probabilities are added up together before one of them is drawn."""


@dataclass(frozen=True)
class Ends:
    """What ends a completion: the network's end tokens, and strings in its text.

    Args:
        ids: end tokens.
        encoder: tells texts of tokens; needed for strings.
        stop: strings.
    """

    ids: Sequence[int]
    encoder: Encoder | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, encoder: Encoder, stop: Sequence[str] = ()) -> "Ends":
        """All of the network's end tokens, and these strings."""
        return cls(encoder.end_ids, encoder, tuple(stop))

    def end(self, ids: Ids) -> bool:
        """Whether the last of these tokens ends the completion that they are."""
        return ids[-1] in self.ids or bool(self.stop and self._stops_at(self._text(ids[-self._window :])) is not None)

    def before(self, ids: Ids) -> list[int]:
        """The tokens before the first stop string, all of them where there is none: what reward adapters score.

        A token that holds the last characters before the string as well as its first ones stays whole.
        """
        at = self._stops_at(self._text(ids)) if self.stop else None
        if at is None:
            return list(ids)
        count = 0
        while len(self._text(ids[:count])) < at:
            count += 1
        return list(ids[:count])

    def text(self, ids: Ids) -> str:
        """The text of a completion, without end token and stop string: what is shown, and what functions score."""
        assert self.encoder is not None, "texts are told by an encoder"
        whole = self._text(ids) if self.stop else ""
        at = self._stops_at(whole)
        return self.encoder.decode(ids) if at is None else whole[:at].strip()

    def untrimmed(self, ids: Ids) -> str:
        """As `text`, with the white space around it."""
        whole = self._text(ids)
        return whole if (at := self._stops_at(whole)) is None else whole[:at]

    def settled(self, text: str) -> str:
        """The part of a growing text that no stop string can take back any more."""
        text = text if (at := self._stops_at(text)) is None else text[:at]
        longest = max(
            (size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        return text[: len(text) - longest]

    @property
    def _window(self) -> int:
        """Last tokens that are sure to hold a string which the last one completes: each has a byte at the least."""
        return max(len(stop.encode()) for stop in self.stop) + 8

    def _stops_at(self, text: str) -> int | None:
        return min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)

    def _text(self, ids: Ids) -> str:
        assert self.encoder is not None, "texts are told by an encoder"
        tokens = [token for token in ids if token not in self.ids]
        decode = self.encoder.tokenizer.decode
        return str(decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Rollout:
    """Completions of prompts, ordered by prompt, then sample."""

    prompts: list[list[int]]
    """Prompt of each completion."""
    completions: list[list[int]]
    sampler_logprobs: list[list[float]]
    ended: list[bool]
    """False where the completion was stopped by its length."""
    prompt_states: Tensor
    """[prompt, hidden] states that the first tokens were sampled from: what the probe compares. Empty where several
    workers sampled, each of which has probed its own.
    """
    adapter_version: tuple[tuple[str, int], ...]
    """Of the adapters that were active: `Model.version`."""
    ends: Ends | None = None
    """What ended them, other than the encoder's end tokens alone."""

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return sum(map(len, self.completions))


def uniforms(
    seed: int, step: int, prompts: Sequence[int], samples: int, length: int, chosen: Collection[int] | None = None
) -> Tensor:
    """Random numbers in [0, 1), float64 [prompt * sample, length], each row keyed by (seed, step, prompt, sample).

    A prompt that occurs again goes on counting its samples, so that no two rows are equal.

    Args:
        chosen: places in `prompts` of those whose rows are wanted, None for all; the rows are the same ones.
    """
    rows = []
    seen: Counter[int] = Counter()
    for place, prompt in enumerate(prompts):
        first = seen[prompt]
        seen[prompt] += samples
        if chosen is not None and place not in chosen:
            continue
        for sample in range(first, first + samples):
            key = hashlib.sha256(f"{seed}:{step}:{prompt}:{sample}".encode()).digest()[:16]
            rows.append(np.random.Generator(np.random.Philox(key=int.from_bytes(key))).random(length))
    return torch.from_numpy(np.array(rows).reshape(len(rows), length))


def sample(
    model: Model,
    prompts: Sequence[Ids],
    *,
    adapter: str | None,
    draws: Tensor,
    ends: Ends,
    temperature: float,
    max_completion_tokens: int,
    cancelled: Callable[[], bool] = lambda: False,
    max_rows: int | None = None,
) -> Rollout:
    """Samples `len(draws) / len(prompts)` completions of each prompt.

    Args:
        draws: uniform numbers [prompt * sample, max_completion_tokens] (`uniforms`).
        ends: what ends a completion.
        temperature: 0 takes the most likely token; its log-probabilities are then at temperature 1.
        cancelled: is asked at every token, by whoever may no longer want them.
        max_rows: on a GPU, completions at a time: those of further prompts begin when those of others have ended. At
            least one prompt's.

    Raises:
        CancelledError: it said yes.
        AdapterError, DivergenceError: as `check_finite`, of the prompts' states.
        ModelError: as `Model.check_length`, of prompts with whole completions.
    """
    assert draws.shape[1] >= max_completion_tokens, "a draw for each token"
    samples = len(draws) // len(prompts)
    model.check_length(max(map(len, prompts)) + max_completion_tokens)
    held = model.hold(adapter)
    prompt_states, cache = model.prefill(prompts, held)
    check_finite(model, adapter, prompt_states, "states")
    completions: list[list[int]] = [[] for _ in draws]
    logprobs: list[list[float]] = [[] for _ in draws]
    draws = draws[:, :max_completion_tokens]
    ended = [False] * len(draws)
    for row, token, logprob, last in _tokens(model, held, prompt_states, cache, draws, ends, temperature, max_rows):
        if cancelled():
            raise CancelledError
        completions[row].append(token)
        logprobs[row].append(logprob)
        ended[row] = last
    return Rollout(
        [list(ids) for ids in prompts for _ in range(samples)],
        completions,
        logprobs,
        ended,
        prompt_states,
        model.version(adapter),
        ends,
    )


def stream(
    model: Model, prompt: Ids, adapter: str | None, draws: Tensor, ends: Ends, temperature: float
) -> Iterator[int]:
    """Tokens of one completion as they are sampled, the end token left out: what `sample` gives for one prompt.

    The adapter's weights must not change before the last one.

    Args:
        draws: uniform numbers [max_completion_tokens].
        ends: what ends it; a stop string is yielded, since its tokens may hold more.
        temperature: 0 takes the most likely token.

    Raises:
        AdapterError, DivergenceError, ModelError: as `sample`.
    """
    model.check_length(len(prompt) + len(draws))
    held = model.hold(adapter)
    states, cache = model.prefill([prompt], held)
    check_finite(model, adapter, states, "states")
    for _, token, _, _ in _tokens(model, held, states, cache, draws[None], ends, temperature):
        if token not in ends.ids:
            yield token


def _tokens(
    model: Model,
    held: Held,
    prompt_states: Tensor,
    cache: Cache,
    draws: Tensor,
    ends: Ends,
    temperature: float,
    max_rows: int | None = None,
) -> Iterator[tuple[int, int, float, bool]]:
    """Row, token, log-probability and whether it ends its completion, of every sampled token; end tokens too.

    Args:
        prompt_states: [prompt, hidden] of each prompt's last token; the cache is of these prompts.
        draws: uniform numbers [prompt * sample, max_completion_tokens].
        max_rows: as in `sample`.
    """
    (count, longest), prompts = draws.shape, len(prompt_states)
    samples = count // prompts
    places = prompts
    if isinstance(cache, KeyValueCache) and cache.fixed:
        places = min(prompts, max(1, (max_rows or count) // samples))
        cache.fork(samples, longest, places)
    else:
        cache.fork(samples, longest)
    waiting = deque(range(places, prompts))
    decoding = Decoding(model, cache, held)
    states, draws = prompt_states[:places].repeat_interleave(samples, 0), draws.to(model.device)
    rows = torch.arange(places * samples, device=model.device)
    """[row of the cache] number of the completion that is there."""
    going, sampled = [True] * count, [list[int]() for _ in range(count)]
    while True:
        numbers = rows.tolist()
        times = torch.tensor([min(len(sampled[row]), longest - 1) for row in numbers], device=model.device)
        tokens, logprobs = draw(model.logits(states, held), draws[rows, times], temperature)
        for row, token, logprob in zip(numbers, tokens.tolist(), logprobs.tolist(), strict=True):
            if going[row]:
                sampled[row].append(token)
                last = ends.end(sampled[row])
                going[row] = not last and len(sampled[row]) < longest
                yield row, token, logprob, last
        left = [at for at, row in enumerate(numbers) if going[row]]
        if not model.anybody(bool(left or waiting)):
            return
        left = left or [0]  # a step for nothing, beside other workers' completions
        if not waiting and decoding.drops(len(left), len(rows)):
            staying = torch.tensor(left, device=model.device)
            decoding.keep(staying)
            rows, tokens = rows[staying], tokens[staying]
        states = decoding(tokens)
        for place in range(places if waiting else 0):
            first = place * samples
            if waiting and not any(going[row] for row in numbers[first : first + samples]):
                prompt = waiting.popleft()
                assert isinstance(cache, KeyValueCache)
                cache.put(place, prompt)
                states[first : first + samples] = prompt_states[prompt]
                rows[first : first + samples] = torch.arange(samples, device=rows.device) + prompt * samples


class Decoding:
    """One more token for every row of a forked cache, again and again, under an adapter that is held meanwhile.

    On a GPU, where launching a step's small kernels takes longer than running them, the first step runs as it is, the
    second is recorded as a graph, and all others replay it. Rows that have ended stay until half of them have, and no
    prompt waits for their places, since the rest must then be recorded anew. On a CPU, and where a base is computed in
    rows or in parts, every step is `Model.decode`.
    """

    def __init__(self, model: Model, cache: Cache, held: Held):
        self.model, self.cache, self.held = model, cache, held
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids = self._states = torch.empty(0)

    def __call__(self, ids: Tensor) -> Tensor:
        """States [row, hidden] of one more token [row]; those of a step are overwritten by the next one."""
        self._steps += 1
        recorded = self.cache.fixed and ids.device.type == "cuda" and self.model.shards is None
        if self._steps == 1 or not recorded:
            return self.model.decode(ids, self.cache, self.held)
        if self._graph is None:
            self._ids, graph = ids.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._states = self.model.decode(self._ids, self.cache, self.held)
            self._graph = graph
        self._ids.copy_(ids)
        self._graph.replay()
        return self._states

    def drops(self, left: int, rows: int) -> bool:
        """Whether rows that have ended are worth dropping, with `left` of `rows` going on."""
        return left <= rows // 2 if self.cache.fixed else left < rows

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (ascending numbers)."""
        self.cache.keep(rows)
        self._graph, self._steps = None, 0


@torch.no_grad()
def probe(model: Model, rollout: Rollout, adapter: str | None) -> None:
    """Proves that `rollout` was sampled from `adapter` as it is now.

    The version must agree, and the states of the same prompts in the same batch layout must be equal bit for bit.

    Raises:
        StaleSamplerError: the sampler used other weights.
    """
    unique = [
        ids for i, ids in enumerate(rollout.prompts) if i % (len(rollout.prompts) // len(rollout.prompt_states)) == 0
    ]
    states, _ = model.prefill(unique, adapter)
    same_version = rollout.adapter_version == model.version(adapter)
    if same_version and torch.equal(states, rollout.prompt_states):
        return
    worst = (states.float() - rollout.prompt_states.float()).abs().max().item()
    raise StaleSamplerError(
        f"the sampler did not use the current adapter '{adapter}': versions {'agree' if same_version else 'differ'}, "
        f"prompt states differ by up to {worst:.3g}",
        allowed="equal versions and bit-equal states on the same batch layout",
        hint="sync the sampler's weights before every rollout",
    )


def check_finite(model: Model, adapter: str | None, values: Tensor, what: str) -> None:
    """Raises for an adapter's (or the base's) numbers that aren't finite: they would end as null, or as chance tokens.

    Raises:
        AdapterError: the adapter was loaded, so that its files are to blame.
        DivergenceError: it is the one that is trained.
    """
    if torch.isfinite(values).all():
        return
    source = None if adapter is None else model.adapters[adapter].source
    said = "the base" if adapter is None else f"adapter '{adapter}'"
    if adapter is None or source is not None:
        where = None if source is None else str(source)
        hint = "its weights aren't finite, or too large: train or fetch it again"
        raise AdapterError(f"{said} gives {what} that are not finite", where=where, allowed="finite numbers", hint=hint)
    hint = "lower optim.learning_rate; the last checkpoint is kept"
    raise DivergenceError(f"{said} gives {what} that are not finite", allowed="finite numbers", hint=hint)


def draw(logits: Tensor, draws: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: tokens [batch] and their log-probabilities from float32 logits [batch, vocab].

    The temperature may be another one for each row [batch, 1], above 0. Cumulative sums are float64, over blocks of the
    vocabulary (whose own sums are float32) and then inside the block that was hit.
    """
    if isinstance(temperature, Tensor) or temperature not in (0.0, 1.0):
        logits = logits / temperature
    top, likeliest = logits.max(-1, keepdim=True)
    weights = (logits - top).exp_()
    if missing := -weights.shape[-1] % VOCAB_BLOCK:
        weights = F.pad(weights, (0, missing))
    blocks = weights.unflatten(-1, (-1, VOCAB_BLOCK))
    cumulative = blocks.sum(-1).double().cumsum(-1)
    total = cumulative[:, -1:]
    if not isinstance(temperature, Tensor) and temperature == 0:
        tokens = likeliest
    else:
        wanted = draws[:, None] * total
        block = _first_above(cumulative, wanted)
        before = F.pad(cumulative, (1, 0)).gather(-1, block)
        inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).double().cumsum(-1)
        tokens = (block * VOCAB_BLOCK + _first_above(inside, wanted - before)).clamp_max(logits.shape[-1] - 1)
    logprobs = (logits.gather(-1, tokens) - top).double() - total.log()
    return tokens.squeeze(-1), logprobs.squeeze(-1).float()


def _first_above(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """Numbers [batch, 1] of the first entries above `wanted`; rounding of the sum's end never picks a zero weight.

    Where there is none, since a weight isn't a number, the last: `probe` says what is wrong.
    """
    below_the_end = torch.nextafter(cumulative[:, -1:], torch.zeros_like(wanted))
    numbers = torch.searchsorted(cumulative, torch.minimum(wanted, below_the_end), right=True)
    return numbers.clamp_max(cumulative.shape[-1] - 1)
