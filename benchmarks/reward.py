"""Reward training, side by side: ours against TRL's RewardTrainer and against transformers' Trainer with PEFT.

Every side gets the same token ids, rank (16, attention), dtype (what `dtype: auto` takes on a CPU) and optimiser. Peers
pad their batches (8 pairs, 4 ratings); ours computes micro-batches of a token budget, so memory compares defaults, not
methods alone. `reward_lora_vs_full` compares our two tunings, `matmul_share` our speed with the machine's own matmul
rate. TRL and PEFT come with the extra `bench`. Run: python benchmarks/reward.py reward_hh_vs_trl
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

import harness
from harness import Benchmark, Work

PAIRS, PAIRS_PER_UPDATE = 16, 8
RATINGS = 48
"""At least this many, of whole conversations, make the update that is timed."""
PADDED_BATCH = 4
RANK, LEARNING_RATE = 16, 1e-4


def ours(
    recipe: str,
    packing: Literal["tree", "none"] = "tree",
    tuning: Literal["lora", "full"] = "lora",
    quantize: str = "none",
) -> Work:
    """Our own updates; the first one (of pairs), or one on a few of the ratings, warms up."""
    from perlhf.method.packing import batches
    from perlhf.model.open import new_adapter
    from perlhf.training import optim
    from perlhf.training import reward as reward_stage

    config = _config(recipe, packing=packing, tuning=tuning, quantize=quantize)
    model, _, items, updates = _examples(config)
    adapter = new_adapter(model, reward_stage.NAME, "reward", config)
    optimizer = optim.build({reward_stage.NAME: (adapter.trainable_by_name(), LEARNING_RATE)}, config.optim)[
        reward_stage.NAME
    ]
    weights = {True: 1.0, False: 1.0}
    shares = reward_stage.Shares(1.0, 0.0) if recipe == "hh" else reward_stage.Shares(0.0, 1.0)

    def update(numbers: Sequence[int]) -> None:
        some = [items[i] for i in numbers]
        reward_stage._update(model, [adapter], {adapter.name: optimizer}, some, weights, shares, 1, 10, config)

    timed = updates[1:] or updates
    update(updates[0][:PAIRS_PER_UPDATE])
    began = time.perf_counter()
    for numbers in timed:
        update(numbers)
    seconds = time.perf_counter() - began
    distinct = alone = 0
    for numbers in timed:
        own = [items[i].sequences for i in numbers]
        alone += sum(len(tokens.ids) for sequences in own for tokens in sequences)
        distinct += sum(batch.tokens for batch in batches(own, config.microbatch_tokens, "tree"))
    details = {"tokens_alone": alone, "tokens_distinct": distinct, "dtype": str(model.dtype)}
    return Work(sum(map(len, timed)), seconds, details)


def trl(by_length: bool = False) -> Work:
    """TRL's RewardTrainer on the same pairs, already tokenised; unlike its default it recomputes no activations.

    By length: the pairs that are timed are sorted, so that little is padded (TRL's sampler sorts 50 batches at once).
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportMissingImports]  of the extra `bench`

    config = _config("hh")
    model, encoder, items, updates = _examples(config)
    dtype = model.dtype
    del model
    numbers = [i for update in updates for i in update]
    warm, timed = numbers[:PAIRS_PER_UPDATE], numbers[PAIRS_PER_UPDATE:]
    if by_length:
        timed.sort(key=lambda i: _longest(items[i]), reverse=True)
    chosen = [items[i] for i in (*warm, *timed)]
    rows = [{"chosen_ids": list(item.sequences[0].ids), "rejected_ids": list(item.sequences[1].ids)} for item in chosen]
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        arguments = RewardConfig(
            directory,
            max_length=config.encoding.max_tokens,
            per_device_train_batch_size=PAIRS_PER_UPDATE,
            train_sampling_strategy="sequential",
            **trainer_arguments(len(updates), dtype),
        )
        RewardTrainer(
            classifier(config, dtype, encoder.pad_id),
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=encoder.tokenizer,
            peft_config=lora("SEQ_CLS"),
            callbacks=[clock.callback()],
        ).train()
    return Work(PAIRS_PER_UPDATE * (len(updates) - 1), clock.seconds, {"dtype": str(dtype)})


def _longest(item: Any) -> int:
    return max(len(tokens.ids) for tokens in item.sequences)


def trainer(recipe: str) -> Work:
    """transformers' Trainer on a PEFT sequence classifier: cross-entropy on one logit, one step a padded batch.

    Sorted by length, so that little is padded; the first batch, which warms up, comes again at the end. Every second
    rating, to save time: nothing is shared here.
    """
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    config = _config(recipe)
    model, encoder, items, updates = _examples(config)
    dtype = model.dtype
    del model
    numbers = [i for update in updates for i in update]
    chosen = sorted((items[i] for i in numbers), key=_longest, reverse=True)[::2]
    rows = [{"input_ids": list(item.sequences[0].ids), "labels": float(bool(item.label))} for item in chosen]
    rows = rows[: len(rows) // PADDED_BATCH * PADDED_BATCH]
    rows = rows[-PADDED_BATCH:] + rows
    network = get_peft_model(classifier(config, dtype, encoder.pad_id), lora("SEQ_CLS"))

    class Rated(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *unused: Any, **ignored: Any) -> Any:
            labels = inputs.pop("labels")
            logits = model(**inputs).logits.squeeze(-1).float()
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        padded = encoder.tokenizer.pad({"input_ids": [row["input_ids"] for row in chosen]}, return_tensors="pt")
        return {**padded, "labels": torch.tensor([row["labels"] for row in chosen])}

    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=PADDED_BATCH,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            **trainer_arguments(len(rows) // PADDED_BATCH, dtype),
        )
        Rated(network, arguments, collate, Dataset.from_list(rows), callbacks=[clock.callback()]).train()
    return Work(len(rows) - PADDED_BATCH, clock.seconds, {"dtype": str(dtype)})


def matmul_share() -> Work:
    """GFLOP/s of the linear layers (forward and the input gradient: 4 x weights x distinct tokens) while training."""
    import torch
    from torch import nn

    work = ours("hh")
    from perlhf.model.bases.found import Base
    from perlhf.model.open import open_model

    config = _config("hh")
    model, _ = open_model(config, Base.find(config.base))
    head = model.base.get_output_embeddings()
    weights = sum(m.weight.numel() for m in model.base.modules() if isinstance(m, nn.Linear) and m is not head)
    gflop = 4e-9 * weights * work.details["tokens_distinct"]
    details = {"matmul_gflops": matmul_rate(model.dtype), "threads": torch.get_num_threads()}
    details["share"] = gflop / work.seconds / details["matmul_gflops"]
    return Work(gflop, work.seconds, work.details | details)


def matmul_rate(dtype: Any) -> float:
    """GFLOP/s of the base's largest linear layer on 2,048 tokens, all threads, best of several."""
    import torch

    x, weight = torch.randn(2048, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - began)
    return 2 * 2048 * 576 * 1536 / min(seconds) / 1e9


def _config(recipe: str, **options: Any) -> Any:
    from perlhf.config.recipe import load_recipe
    from perlhf.config.stages import RewardConfig

    config = load_recipe(harness.REPOSITORY / "recipes" / recipe / "reward.yaml", RewardConfig)
    encoding = (
        config.encoding.model_copy(update={"max_tokens": 512, "drop_long": True}) if recipe == "hh" else config.encoding
    )
    adapter = config.adapter.model_copy(update={"rank": RANK, "targets": "attention"})
    return config.model_copy(update={"encoding": encoding, "adapter": adapter, "device": "cpu", **options})


def _examples(config: Any) -> tuple[Any, Any, list[Any], list[list[int]]]:
    """The base, the encoder, and the first updates of an epoch: what every side works on."""
    from perlhf.data import order
    from perlhf.data.records import Comparison
    from perlhf.data.splits import load
    from perlhf.model.bases.found import Base
    from perlhf.model.open import open_model
    from perlhf.training.reward import encode_items

    model, encoder = open_model(config, Base.find(config.base))
    records = load(config.data, ("comparison", "rating"), "train")
    pairs = isinstance(records[0], Comparison)
    # Twice as many comparisons as are needed, since long ones are dropped.
    count = 2 * (PAIRS + PAIRS_PER_UPDATE) if pairs else RATINGS
    chosen = order.whole_groups([record.group for record in records], count, 0)
    encoded, _ = encode_items(encoder, records.take(np.array(chosen)))
    items = list(encoded)
    if not pairs:
        return model, encoder, items, [list(range(len(items)))]
    starts = range(0, PAIRS + PAIRS_PER_UPDATE, PAIRS_PER_UPDATE)
    updates = [list(range(at, at + PAIRS_PER_UPDATE)) for at in starts]
    return model, encoder, items, updates


def classifier(config: Any, dtype: Any, pad_id: int) -> Any:
    from transformers import AutoModelForSequenceClassification

    from perlhf.model.bases.found import Base

    where = Base.find(config.base).directory
    network = AutoModelForSequenceClassification.from_pretrained(where, num_labels=1, dtype=dtype)
    network.config.pad_token_id = pad_id
    return network


def lora(task: Literal["SEQ_CLS", "CAUSAL_LM"]) -> Any:
    """PEFT's settings of the same adapter; of a classifier the head is trained too."""
    from peft import LoraConfig, TaskType

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    head = ["score"] if task == "SEQ_CLS" else None
    return LoraConfig(TaskType[task], r=RANK, lora_alpha=32, target_modules=targets, modules_to_save=head)


def trainer_arguments(steps: int, dtype: Any) -> dict[str, Any]:
    """Settings of transformers' trainers: no logs, no checkpoints, no recomputation (which costs time)."""
    import torch

    return {
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": False,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


@dataclass
class Clock:
    """Seconds from the end of a trainer's first step, or from its start, to the end of its last."""

    warm_up: bool = True
    began: float = 0.0
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Ticks(TrainerCallback):
            def on_step_begin(self, *unused: Any, **ignored: Any) -> None:
                if not clock.warm_up:
                    clock.began = clock.began or time.perf_counter()

            def on_step_end(self, *unused: Any, **ignored: Any) -> None:
                clock.ended = time.perf_counter()
                clock.began = clock.began or clock.ended

        return Ticks()


BENCHMARKS = (
    Benchmark(
        "reward_hh_vs_trl",
        "pairs/s",
        {
            "perlhf": partial(ours, "hh"),
            "TRL RewardTrainer": trl,
            "TRL by length": partial(trl, True),
        },
    ),
    Benchmark(
        "reward_coffee_vs_trainer",
        "ratings/s",
        {
            "perlhf": partial(ours, "coffee"),
            "Trainer + PEFT": partial(trainer, "coffee"),
            "perlhf, packing none": partial(ours, "coffee", "none"),
        },
    ),
    Benchmark(
        "reward_ticketing_vs_trainer",
        "ratings/s",
        {"perlhf": partial(ours, "ticketing"), "Trainer + PEFT": partial(trainer, "ticketing")},
    ),
    Benchmark(
        "reward_lora_vs_full",
        "pairs/s",
        {"LoRA": partial(ours, "hh"), "full tuning": partial(ours, "hh", "tree", "full")},
    ),
    Benchmark(
        "reward_quantised",
        "pairs/s",
        {
            "nf4": partial(ours, "hh", quantize="nf4"),
            "whole": partial(ours, "hh"),
            "int8": partial(ours, "hh", quantize="int8"),
        },
    ),
    Benchmark("matmul_share", "GFLOP/s", {"perlhf": matmul_share}),
)

if __name__ == "__main__":
    harness.main(BENCHMARKS, __doc__)
