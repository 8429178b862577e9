"""What the rows of benchmarks/gpu.py compute with perlhf, and what all rows share: networks, problems, clock and peak.

Networks have Qwen3's shapes and random weights, made where they are used. Token ids are random too, in pairs and
prompts of unequal lengths (`Sizes`), so that no two updates have the same shape.
"""

import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.attention.flex_attention as torchs
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from perlhf.config.stages import AdapterConfig, EncodingConfig, OptimConfig, PolicyConfig, RewardConfig, ValueConfig
from perlhf.data.records import Prompt
from perlhf.kernels.attention import flex
from perlhf.kernels.modules import AdaptedLinear
from perlhf.method.packing import Tokens, lay_out, pack
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.open import new_adapter
from perlhf.rollout.completions import Centre, Setup
from perlhf.rollout.local import Ends, sample, uniforms
from perlhf.rollout.scorers import Scorers
from perlhf.system.machine import peak_memory_bytes, reset_peak_memory
from perlhf.training import optim
from perlhf.training import reward as reward_stage
from perlhf.training.policy_step import POLICY, VALUE, At, policy_step

RANK, LEARNING_RATE, KL_COEF, BRANCHES = 16, 1e-4, 0.05, 4
QWEN3: dict[str, dict[str, Any]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
COMMON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300}


@dataclass(frozen=True)
class Sizes:
    """How much the rows compute. Where there are two numbers, lengths are drawn between them."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    thousand: int = 1024
    """Tokens of "1k" of a pack."""
    microbatch: int = 4096
    """Distinct tokens that ours computes at once."""
    padded: int = 8192
    """Tokens, padding included, that peers compute at once."""
    pairs: int = 16
    prompts: int = 8
    completions: int = 8
    prompt: tuple[int, int] = (40, 352)
    completion: tuple[int, int] = (20, 160)
    new_tokens: int = 64
    sampled: tuple[int, int] = (16, 144)
    """New tokens of a short and of a long turn of the sampler: their difference is the time of decoding alone."""
    matmul: int = 8192
    copied_bytes: int = 4 * 2**30
    repeats: int = 3

    def config(self, shape: str) -> Qwen3Config:
        """Of a network; tiny ones are alike."""
        shaped: dict[str, Any] = SMALL if self.device == "cpu" else QWEN3[shape] | COMMON
        return Qwen3Config(**shaped, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)

    def pack_of(self, thousands: str) -> list[list[int]]:
        """Sequences of `8k` distinct tokens: prompts of half as many, each with four equal completions. Alone they are
        2.5 times as many.
        """
        tokens, prompt = int(thousands.removesuffix("k")) * self.thousand, self.thousand // 2
        draw = np.random.default_rng(0)
        sequences: list[list[int]] = []
        for number in range(tokens // self.thousand):
            shared = [number, *self._ids(draw, prompt - 1)]
            sequences += [[*shared, at, *self._ids(draw, prompt // BRANCHES - 1)] for at in range(BRANCHES)]
        return sequences

    def pairs_of(self, update: int) -> list[tuple[list[int], list[int]]]:
        """Two sequences each with a common prompt."""
        draw = np.random.default_rng(update)
        found = []
        for _ in range(self.pairs):
            prompt = self._ids(draw, self._length(draw, self.prompt))
            chosen, rejected = (prompt + self._ids(draw, self._length(draw, self.completion)) for _ in range(2))
            found.append((chosen, rejected))
        return found

    def prompts_of(self, count: int) -> list[list[int]]:
        """Random prompts."""
        draw = np.random.default_rng(count)
        return [self._ids(draw, self._length(draw, self.prompt)) for _ in range(count)]

    def _ids(self, draw: np.random.Generator, count: int) -> list[int]:
        return draw.integers(0, self.config("0.6b").vocab_size - 1, count).tolist()

    def _length(self, draw: np.random.Generator, ends: tuple[int, int]) -> int:
        return int(draw.integers(ends[0], ends[1] + 1))


TINY = Sizes(
    device="cpu",
    dtype=torch.float32,
    thousand=32,
    microbatch=128,
    padded=256,
    pairs=4,
    prompts=2,
    completions=2,
    prompt=(6, 16),
    completion=(3, 8),
    new_tokens=4,
    sampled=(2, 6),
    matmul=256,
    copied_bytes=2**20,
    repeats=2,
)


# ---- what all rows share ---------------------------------------------------------------------------------------------


def synchronise() -> None:
    """Waits until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[int], object], repeats: int) -> dict[str, Any]:
    """Median seconds of `work(2)`, `work(3)`, ... after two that warm up, and the peak of memory meanwhile.

    Beside them the seconds of the first one, which compiles, and how many graphs each had compiled anew
    (torch.compile).
    """
    seconds, graphs = [], [_graphs()]
    for number in range(repeats + 2):
        if number == 2:
            forget_peak()
        synchronise()
        began = time.perf_counter()
        work(number)
        synchronise()
        seconds.append(time.perf_counter() - began)
        graphs.append(_graphs())
    compiled = [after - before for before, after in itertools.pairwise(graphs)]
    first = {"seconds_first": seconds[0], "graphs_by_update": compiled}
    return {"seconds": statistics.median(seconds[2:]), "seconds_each": seconds[2:], **first, **peak()}


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def forget_peak() -> None:
    """The peak of memory begins anew."""
    reset_peak_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int]:
    """Bytes that tensors took at most, weights included, and what the allocator took for them; of a CPU the process."""
    if not torch.cuda.is_available():
        return {"peak_memory_bytes": peak_memory_bytes()}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_memory_bytes": allocated, "reserved_memory_bytes": reserved}


def free() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def network(kind: Any, shape: str, sizes: Sizes, **settings: Any) -> Any:
    """A network of random weights, made on the device in its dtype; `kind` is one of transformers' Auto classes."""
    torch.manual_seed(0)
    config = sizes.config(shape)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device(sizes.device):
        return kind.from_config(config, dtype=sizes.dtype)


def tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """One word, its number, for each token; the last one ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    count, end = sizes.config("0.6b").vocab_size, "<end>"
    words = Tokenizer(models.WordLevel({str(n): n for n in range(count - 1)} | {end: count - 1}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end, model_max_length=4096)


def written(ids: Sequence[int]) -> str:
    """The text that `tokenizer` makes these ids of."""
    return " ".join(map(str, ids))


def matmul_flops(model: Any, tokens: int) -> int:
    """Of linear layers below the head in training adapters: forward and the input's gradient, four a weight and token.
    Attention and the adapters' own products aren't counted.
    """
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear | AdaptedLinear) and m is not head)
    return 4 * tokens * sum(layer.weight.numel() for layer in layers)


# ---- ours ------------------------------------------------------------------------------------------------------------


def load(shape: str, sizes: Sizes) -> Model:
    """A network with our modules; the end token is never sampled."""
    base = network(AutoModelForCausalLM, shape, sizes)
    model = Model(base, {"name": "random", "sha256": "0"}, base.config.vocab_size - 1)
    assert model.way.packing == "tree", f"it isn't computed as a tree: {model.way.why}"
    return model


@contextmanager
def attention_by(way: str) -> Iterator[None]:
    """Rows of trees go by `flex`, step by step on a CPU, or under a `mask`. FlexAttention that is compiled again and
    again is an error here: torch would go on step by step, silently.
    """
    before = os.environ.get(flex.VARIABLE), flex.usable, torchs._validate_device
    os.environ[flex.VARIABLE] = way
    if way == "flex":
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    if way == "flex" and not torch.cuda.is_available():
        flex.usable = lambda query: True
        torchs._validate_device = lambda *given: None  # gradients: it refuses to, for it has no kernel there
    try:
        yield
    finally:
        variable, flex.usable, torchs._validate_device = before
        os.environ.pop(flex.VARIABLE) if variable is None else os.environ.update({flex.VARIABLE: variable})


def drop_adapters(model: Model) -> None:
    """All of them, so that the next row begins with the base."""
    for module in model.base.modules():
        if isinstance(module, AdaptedLinear):
            module.pairs.clear()
    model.adapters.clear()
    free()


def card(sizes: Sizes) -> dict[str, Any]:
    """What the device reaches alone: a large product of the dtype, and a large copy (read and written)."""
    square = [torch.randn(sizes.matmul, sizes.matmul, device=sizes.device).to(sizes.dtype) for _ in range(2)]
    out = torch.empty_like(square[0])
    matmul = timed(lambda _: [torch.matmul(*square, out=out) for _ in range(10)], 5)["seconds"] / 10
    source = torch.ones(sizes.copied_bytes, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    copy = timed(lambda _: [target.copy_(source) for _ in range(10)], 5)["seconds"] / 10
    flops, moved = 2 * sizes.matmul**3 / matmul, 2 * sizes.copied_bytes / copy
    return {"seconds": matmul + copy, "matmul_flops_per_second": flops, "bytes_per_second": moved}


def attention(model: Model, length: str, way: str, sizes: Sizes) -> dict[str, Any]:
    """Forward and backward of the scores of a pack."""
    adapter = model.add_adapter("reward_0", "reward", rank=RANK)
    sequences = sizes.pack_of(length)
    batch = pack([[Tokens(ids)] for ids in sequences], "tree", model.device)

    def update(_: int) -> None:
        model.scores(batch, "reward_0").sum().backward()
        for parameter in adapter.trainable():
            parameter.grad = None

    with attention_by(way):
        found = timed(update, sizes.repeats)
    return found | {"tokens": batch.tokens, "tokens_alone": sum(map(len, sequences))}


def reward(model: Model, way: str, sizes: Sizes) -> dict[str, Any]:
    """Updates of `perlhf reward` on comparisons: packing, loss, gradients, clipping, AdamW."""
    config = RewardConfig(
        device=sizes.device,
        adapter=AdapterConfig(rank=RANK),
        optim=OptimConfig(learning_rate=LEARNING_RATE),
        examples_per_update=sizes.pairs,
        tokens_per_microbatch=sizes.microbatch,
    )
    adapter = new_adapter(model, reward_stage.NAME, "reward", config)
    optimizers = optim.build({adapter.name: (adapter.trainable_by_name(), LEARNING_RATE)}, config.optim)
    shares, weights = reward_stage.Shares(1.0, 0.0), {True: 1.0, False: 1.0}

    def update(number: int) -> None:
        items = [
            reward_stage.Item((Tokens(chosen), Tokens(rejected)), None, 1.0, 0.0, str(at))
            for at, (chosen, rejected) in enumerate(sizes.pairs_of(number))
        ]
        reward_stage._update(model, [adapter], optimizers, items, weights, shares, number + 1, 100, config)

    with attention_by(way):
        found = timed(update, sizes.repeats)
    distinct, alone = (_mean_tokens(sizes, packing) for packing in ("tree", "none"))
    flops = matmul_flops(model.base, distinct)
    return found | {"tokens": distinct, "tokens_alone": alone, "matmul_flops": flops}


def _mean_tokens(sizes: Sizes, packing: Any) -> int:
    """Of the updates that are timed: computed as a tree, or each sequence alone."""
    updates = [[ids for pair in sizes.pairs_of(2 + n) for ids in pair] for n in range(sizes.repeats)]
    return round(statistics.mean(lay_out(sequences, packing).tokens for sequences in updates))


def policy(model: Model, way: str, sizes: Sizes) -> dict[str, Any]:
    """Steps of `perlhf policy`: leave-one-out, or a value adapter (`value`, under the mask); the reward is an adapter,
    the reference the base.
    """
    baseline = "value" if way == "value" else "leave_one_out"
    config = PolicyConfig(
        device=sizes.device,
        encoding=EncodingConfig(template="plain"),
        adapter=AdapterConfig(rank=RANK),
        optim=OptimConfig(learning_rate=LEARNING_RATE),
        reward=("unused",),
        prompts_per_update=sizes.prompts,
        completions_per_prompt=sizes.completions,
        max_completion_tokens=sizes.new_tokens,
        kl_coef=KL_COEF,
        baseline=baseline,
        value=ValueConfig(warmup_updates=0),
        tokens_per_microbatch=sizes.microbatch,
    )
    names = [POLICY, VALUE] if baseline == "value" else [POLICY]
    learned = {name: new_adapter(model, name, "policy" if name == POLICY else "value", config) for name in names}
    head = model.add_adapter("reward_0", "reward", rank=RANK).score_head
    assert head is not None
    torch.nn.init.normal_(head, std=0.02)
    model.freeze("reward_0")
    optimizers = optim.build({n: (a.trainable_by_name(), LEARNING_RATE) for n, a in learned.items()}, config.optim)
    prompts = [Prompt(written(ids), str(at)) for at, ids in enumerate(sizes.prompts_of(4 * sizes.prompts))]
    encoder = Encoder(tokenizer(sizes), config.encoding)
    setup = Setup(config, model, encoder, Scorers(("reward_0",), (), "mean"), prompts, [], None)
    parts: list[dict[str, float]] = []

    def update(number: int) -> None:
        done = policy_step(setup, optimizers, Centre(0.0, 1.0, 1.0), At(number + 1, number + 1))
        assert "grad_norm" in done.values, "the policy did not learn"
        assert bool(done.known.mask.all()), "a completion ended early"
        parts.append({key: value for key, value in done.values.items() if key.startswith("seconds_")})

    with attention_by("flex" if way == "flex" else "mask"):
        found = timed(update, sizes.repeats)
    split = {key: statistics.median(part[key] for part in parts[2:]) for key in parts[0]}
    return found | split | {"tokens": sizes.prompts * sizes.completions * sizes.new_tokens}


def sampler(model: Model, rows: int, sizes: Sizes) -> dict[str, Any]:
    """Sampling under an adapter that isn't merged, short and long turns: `sampled`."""
    model.add_adapter(POLICY, "policy", rank=RANK)
    prompts = sizes.prompts_of(rows // sizes.completions)

    def turn(length: int) -> None:
        draws = uniforms(0, 1, list(range(len(prompts))), sizes.completions, length)
        given: Any = {"adapter": POLICY, "ends": Ends([-1]), "temperature": 1.0, "max_completion_tokens": length}
        sample(model, prompts, draws=draws, **given)

    short, long = (timed(lambda _, length=length: turn(length), sizes.repeats) for length in sizes.sampled)
    steps = sizes.sampled[1] - sizes.sampled[0]
    return long | {
        "tokens": rows * sizes.sampled[1],
        "seconds_of_a_step": (long["seconds"] - short["seconds"]) / steps,
        "bytes_of_a_step": _bytes_of_a_step(model.base, prompts, rows, sum(sizes.sampled) / 2),
    }


def _bytes_of_a_step(base: Any, prompts: Sequence[Sequence[int]], rows: int, own: float) -> int:
    """The least that one token of all rows reads: all weights, keys and values of each prompt once and of each row."""
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    config, size = base.config, next(base.parameters()).element_size()
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    return round(weights + each * (sum(map(len, prompts)) + rows * own))
