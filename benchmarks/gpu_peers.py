"""What the rows of benchmarks/gpu.py compute with others' code: padded rows by PEFT, TRL's trainers, `generate`.

Where TRL isn't importable PEFT gets the same loss, written out; each row says which it was (`peer`). All sides have the
same networks, ids, rank, targets and optimiser. A padded micro-batch has at most `Sizes.padded` tokens, unless one
example has more.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from gpu_ours import (
    KL_COEF,
    LEARNING_RATE,
    Sizes,
    forget_peak,
    network,
    peak,
    synchronise,
    timed,
    tokenizer,
    written,
)
from perlhf.method import advantages
from perlhf.method.losses import policy_loss
from perlhf.method.packing import lay_out, pad
from reward import lora, trainer_arguments

WARM = 2
"""Updates that aren't counted, as in `gpu_ours.timed`."""


def attention(length: str, sizes: Sizes) -> dict[str, Any]:
    """Forward and backward of the scores of a pack's sequences, each in a row of its own."""
    model = _adapted_classifier("0.6b", sizes)
    sequences = sizes.pack_of(length)
    at_once = max(1, sizes.padded // len(sequences[0]))
    parts = [_rows(sequences[at : at + at_once], sizes) for at in range(0, len(sequences), at_once)]

    def update(_: int) -> None:
        for ids, mask in parts:
            with _autocast(sizes):
                model(input_ids=ids, attention_mask=mask).logits.float().sum().backward()
        model.zero_grad()

    found = timed(update, sizes.repeats)
    distinct = lay_out(sequences, "tree").tokens
    return found | {"tokens": distinct, "tokens_alone": sum(map(len, sequences)), "peer": "PEFT"}


def reward(shape: str, sizes: Sizes, recomputing: bool = False) -> dict[str, Any]:
    """Updates on comparisons: TRL's RewardTrainer, or the same by PEFT."""
    learn = _reward_by_trl if find_spec("trl") else _reward_by_peft
    updates = [sizes.pairs_of(number) for number in range(WARM + sizes.repeats)]
    timed_ones = [[ids for pair in update for ids in pair] for update in updates[WARM:]]
    tokens = round(statistics.mean(lay_out(rows, "tree").tokens for rows in timed_ones))
    return learn(shape, sizes, updates, recomputing) | {"tokens": tokens}


def policy(shape: str, sizes: Sizes) -> dict[str, Any]:
    """Steps with a second network as the reward: TRL's RLOOTrainer, or the same by PEFT."""
    learn = _policy_by_trl if find_spec("trl") else _policy_by_peft
    return learn(shape, sizes) | {"tokens": sizes.prompts * sizes.completions * sizes.new_tokens}


def generate(rows: int, sizes: Sizes) -> dict[str, Any]:
    """transformers' `generate` on the bare base: as many prompts, completions and tokens as the sampler's long turn."""
    model = network(AutoModelForCausalLM, "1.7b", sizes).eval().requires_grad_(False)
    prompts = [ids for ids in sizes.prompts_of(rows // sizes.completions) for _ in range(sizes.completions)]
    length = sizes.sampled[1]
    found = timed(lambda _: _generated(model, prompts, length, sizes), sizes.repeats)
    return found | {"tokens": rows * length, "peer": "generate, bare base"}


# ---- TRL -------------------------------------------------------------------------------------------------------------


class _Ticks(TrainerCallback):
    """When each update was done; the peak of memory begins anew once those that warm up are."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *unused: Any, **ignored: Any) -> None:
        self._tick()

    def on_step_end(self, *unused: Any, **ignored: Any) -> None:
        self._tick()
        if len(self.times) == WARM + 1:
            forget_peak()

    def _tick(self) -> None:
        synchronise()
        self.times.append(time.perf_counter())

    def found(self) -> dict[str, Any]:
        """As `gpu_ours.timed` tells it."""
        each = [after - before for before, after in itertools.pairwise(self.times)]
        return {"seconds": statistics.median(each[WARM:]), "seconds_each": each[WARM:], "seconds_first": each[0]}


def _arguments(sizes: Sizes, recomputing: bool = False) -> dict[str, Any]:
    common = trainer_arguments(WARM + sizes.repeats, sizes.dtype)
    return common | {"use_cpu": sizes.device == "cpu", "gradient_checkpointing": recomputing}


def _reward_by_trl(
    shape: str, sizes: Sizes, updates: Sequence[Sequence[tuple[list[int], list[int]]]], recomputing: bool
) -> dict[str, Any]:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportMissingImports]  of the extra `bench`

    rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for update in updates for chosen, rejected in update]
    at_once, ticks = _pairs_at_once(sizes), _Ticks()
    with tempfile.TemporaryDirectory() as directory:
        arguments = RewardConfig(
            directory,
            max_length=None,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=sizes.pairs // at_once,
            train_sampling_strategy="sequential",
            **_arguments(sizes, recomputing),
        )
        RewardTrainer(
            _classifier(shape, sizes),
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(sizes),
            peft_config=lora("SEQ_CLS"),
            callbacks=[ticks],
        ).train()
    return ticks.found() | peak() | {"peer": "TRL RewardTrainer"}


def _pairs_at_once(sizes: Sizes) -> int:
    """A divisor of an update's pairs, so that as many of the longest fit."""
    longest = 2 * (sizes.prompt[1] + sizes.completion[1])
    return max(n for n in range(1, sizes.pairs + 1) if sizes.pairs % n == 0 and (n == 1 or n * longest <= sizes.padded))


def _rows_at_once(sizes: Sizes) -> int:
    """Completions, of whole prompts, a divisor of an update's."""
    longest = sizes.completions * (sizes.prompt[1] + sizes.new_tokens)
    return sizes.completions * max(
        n for n in range(1, sizes.prompts + 1) if sizes.prompts % n == 0 and (n == 1 or n * longest <= sizes.padded)
    )


def _policy_by_trl(shape: str, sizes: Sizes) -> dict[str, Any]:
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer  # pyright: ignore[reportMissingImports]  of the extra `bench`

    prompts = [{"prompt": written(ids)} for ids in sizes.prompts_of((WARM + sizes.repeats) * sizes.prompts)]
    at_once, ticks, words = _rows_at_once(sizes), _Ticks(), tokenizer(sizes)
    with tempfile.TemporaryDirectory() as directory:
        arguments = RLOOConfig(
            directory,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=sizes.prompts * sizes.completions // at_once,
            num_generations=sizes.completions,
            max_completion_length=sizes.new_tokens,
            generation_kwargs={"min_new_tokens": sizes.new_tokens},
            beta=KL_COEF,
            **_arguments(sizes),
        )
        trainer = RLOOTrainer(
            network(AutoModelForCausalLM, shape, sizes),
            _classifier(shape, sizes),
            arguments,
            train_dataset=Dataset.from_list(prompts),
            processing_class=words,
            reward_processing_classes=words,
            peft_config=lora("CAUSAL_LM"),
            callbacks=[ticks],
        )
        parts = {
            "seconds_sample": _watch(trainer, "_generate"),
            "seconds_score": _watch(trainer, "_calculate_rewards"),
        }
        trainer.train()
    found: dict[str, Any] = ticks.found() | peak() | {"peer": "TRL RLOOTrainer"}
    return found | _split(found["seconds"], {key: spent[WARM:] for key, spent in parts.items()})


def _watch(holder: Any, name: str) -> list[float]:
    """Seconds of each call of a method from now on; none where there is no such method."""
    spent: list[float] = []
    inner: Callable[..., Any] | None = getattr(holder, name, None)

    def watched(*arguments: Any, **named: Any) -> Any:
        assert inner is not None
        synchronise()
        began = time.perf_counter()
        given = inner(*arguments, **named)
        synchronise()
        spent.append(time.perf_counter() - began)
        return given

    if inner is not None:
        setattr(holder, name, watched)
    return spent


def _split(whole: float, parts: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the parts, and what is left for learning; nothing where a part isn't known."""
    if not all(parts.values()):
        return {}
    known = {key: statistics.median(spent) for key, spent in parts.items()}
    return known | {"seconds_learn": whole - sum(known.values())}


# ---- PEFT with the loss written out ----------------------------------------------------------------------------------


def _reward_by_peft(
    shape: str, sizes: Sizes, updates: Sequence[Sequence[tuple[list[int], list[int]]]], recomputing: bool
) -> dict[str, Any]:
    model = _adapted_classifier(shape, sizes)
    if recomputing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    optimizer, at_once = _optimizer(model), _pairs_at_once(sizes)

    def update(number: int) -> None:
        pairs = updates[number]
        for at in range(0, len(pairs), at_once):
            some = pairs[at : at + at_once]
            ids, mask = _rows([chosen for chosen, _ in some] + [rejected for _, rejected in some], sizes)
            with _autocast(sizes):
                scores = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()
            chosen, rejected = scores.chunk(2)
            (-torch.nn.functional.logsigmoid(chosen - rejected).sum() / len(pairs)).backward()
        _step(model, optimizer)

    return timed(update, sizes.repeats) | {"peer": "PEFT, loss written out"}


def _policy_by_peft(shape: str, sizes: Sizes) -> dict[str, Any]:
    from peft import get_peft_model

    model: Any = get_peft_model(network(AutoModelForCausalLM, shape, sizes), lora("CAUSAL_LM"))
    scorer = _classifier(shape, sizes).eval().requires_grad_(False)
    optimizer, at_once, every = _optimizer(model), _rows_at_once(sizes), sizes.prompts * sizes.completions
    all_prompts = sizes.prompts_of((WARM + sizes.repeats) * sizes.prompts)
    sampling: list[float] = []
    scoring: list[float] = []

    def update(number: int) -> None:
        own = all_prompts[number * sizes.prompts : (number + 1) * sizes.prompts]
        prompts = [ids for ids in own for _ in range(sizes.completions)]
        began = time.perf_counter()
        with _autocast(sizes):
            ids, mask = _generated(model.eval(), prompts, sizes.new_tokens, sizes)
        synchronise()
        sampling.append(time.perf_counter() - began)
        parts = [(ids[at : at + at_once], mask[at : at + at_once]) for at in range(0, every, at_once)]
        with torch.no_grad(), _autocast(sizes):
            scores = [scorer(input_ids=i, attention_mask=m).logits.squeeze(-1).float() for i, m in parts]
        synchronise()
        scoring.append(time.perf_counter() - began - sampling[-1])
        model.train()
        for part, paid in zip(parts, scores, strict=True):
            with torch.no_grad(), model.disable_adapter():
                reference = _logprobs(model, *part, sizes)
            now = _logprobs(model, *part, sizes)
            known = torch.ones_like(now, dtype=torch.bool)
            rewards = advantages.token_rewards(paid, now, reference, known, kl_coef=KL_COEF)
            others = advantages.group_baseline(rewards.sum(-1), sizes.completions, baseline="leave_one_out")
            advantage = advantages.returns_to_go(rewards) - others[:, None]
            policy_loss(now, now, advantage, known, clip=None, divisor=every)[0].backward()
        _step(model, optimizer)

    found: dict[str, Any] = timed(update, sizes.repeats) | {"peer": "PEFT, loss written out"}
    return found | _split(found["seconds"], {"seconds_sample": sampling[WARM:], "seconds_score": scoring[WARM:]})


def _logprobs(model: Any, ids: Tensor, mask: Tensor, sizes: Sizes) -> Tensor:
    """Of the completion tokens, [row, time] in float32."""
    time_steps = sizes.new_tokens
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with _autocast(sizes):
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = model(**given, logits_to_keep=time_steps + 1, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, -time_steps:, None]).squeeze(-1)


@torch.no_grad()
def _generated(model: Any, prompts: Sequence[Sequence[int]], length: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts, padded at the left, with completions of this many tokens: [row, width]."""
    ids = pad([prompt[::-1] for prompt in prompts], 0, sizes.device).flip(1)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, sizes.device).flip(1)
    given = {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}
    out = model.generate(**given, do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length)
    return out, torch.cat([mask, mask.new_ones(len(out), length)], 1)


def _rows(sequences: Sequence[Sequence[int]], sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Ids, padded at the right with the token that a classifier knows as padding, and their mask."""
    ids = pad(sequences, _pad_id(sizes), sizes.device)
    return ids, pad([[1] * len(one) for one in sequences], 0, sizes.device)


def _pad_id(sizes: Sizes) -> int:
    return sizes.config("0.6b").vocab_size - 1


def _classifier(shape: str, sizes: Sizes) -> Any:
    kind = AutoModelForSequenceClassification
    return network(kind, shape, sizes, num_labels=1, pad_token_id=_pad_id(sizes))


def _adapted_classifier(shape: str, sizes: Sizes) -> Any:
    from peft import get_peft_model

    return get_peft_model(_classifier(shape, sizes), lora("SEQ_CLS"))


def _autocast(sizes: Sizes) -> Any:
    """As the trainers compute with `bf16`."""
    reduced = sizes.dtype == torch.bfloat16
    return torch.autocast(sizes.device, dtype=sizes.dtype) if reduced else nullcontext()


def _optimizer(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(_trainable(model)), lr=LEARNING_RATE, weight_decay=0.0)


def _trainable(model: Any) -> Iterator[Tensor]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _step(model: Any, optimizer: torch.optim.AdamW) -> None:
    torch.nn.utils.clip_grad_norm_(_trainable(model), 1.0)
    optimizer.step()
    optimizer.zero_grad()
