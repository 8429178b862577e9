"""Writes the tables of docs/scale.md: what training takes on 1 to 1,024 devices, by the model of `perlhf plan`.

    python scripts/generate_scale.py

Nothing but benchmarks/plan.json is measured: planned and measured bytes, as `benchmarks/plan.py` writes them. The other
tables know of no machine, so that a test can hold the page. Run by `make docs`.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from perlhf.config.recipe import load_recipe
from perlhf.config.stages import EncodingConfig, PolicyConfig, RewardConfig, SftConfig
from perlhf.model.bases.loading import by_configuration
from perlhf.model.foretold.memory import memory_of, with_recompute
from perlhf.model.foretold.sizes import Devices, gathers_of
from perlhf.parallel.traffic import Gathers, Lengths, exchanged
from perlhf.runs.words import number
from perlhf.training.plan import Part, Rates, parts_of, trainable_parameters, trained_tensors

ROOT = Path(__file__).resolve().parents[1]
PAGE, MEASURED = ROOT / "docs" / "scale.md", ROOT / "benchmarks" / "plan.json"
COUNTS = (1, 8, 64, 256, 1024)
MICROBATCHES = (8192, 4096, 2048, 1024)
"""Tokens; the last is one sequence."""
DEVICE_BYTES, NODE = 80 * 10**9, 8
RATES = Rates(flops=300e12, read=2.5e12, link=400e9, node_link=50e9, node=NODE)
LENGTHS, PROMPTS, SAMPLES = Lengths(512, 512), 8, 8
_LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
_SMALL: dict[str, Any] = _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
_SMALL |= {"num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True}
_QWEN: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}


CARDS = ROOT / "recipes" / "qwen3-4b"
_QWEN_4B: dict[str, Any] = json.loads((CARDS / "config.json").read_text("utf-8"))
_QWEN_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_GLM: dict[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
}


def shapes() -> dict[str, Any]:
    """Configurations with the sizes that their authors published."""
    return {
        "Llama 3.2 1B": LlamaConfig(**_SMALL),
        "Llama 3.1 8B": LlamaConfig(
            **_LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
        ),
        "Qwen3 32B": Qwen3Config(
            **_QWEN,
            hidden_size=5120,
            intermediate_size=25600,
            num_hidden_layers=64,
            num_attention_heads=64,
            num_key_value_heads=8,
        ),
        "Llama 3.1 70B": LlamaConfig(
            **_LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
        ),
        "Llama 3.1 405B": LlamaConfig(
            **_LLAMA, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128
        ),
        "Qwen3 30B-A3B (experts)": Qwen3MoeConfig(
            **_QWEN,
            hidden_size=2048,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
        ),
        "gpt-oss 120B (experts)": GptOssConfig(
            vocab_size=201088,
            hidden_size=2880,
            intermediate_size=2880,
            num_hidden_layers=36,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            num_local_experts=128,
            num_experts_per_tok=4,
        ),
        "Qwen3 235B-A22B (experts)": Qwen3MoeConfig(
            **_QWEN,
            hidden_size=4096,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
        ),
        "GLM-4.5 355B-A32B (experts)": Glm4MoeConfig(**_GLM),
    }


@cache
def network_of(name: str) -> Any:
    """The network on torch's meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shapes()[name])


@cache
def trained(name: str) -> tuple[dict[str, int], int]:
    """Trainable parameters by adapter, and their tensors."""
    config, network = policy(1, 1024), network_of(name)
    return trainable_parameters(config, network), trained_tensors(config, network)


def policy(devices: int, microbatch: int) -> PolicyConfig:
    """The policy that the tables are for: as much work for each device, however many there are."""
    return PolicyConfig(
        device="cuda",
        sft=Path("sft"),
        reward=("reward",),
        encoding=EncodingConfig(max_tokens=LENGTHS.prompt + LENGTHS.completion),
        max_completion_tokens=LENGTHS.completion,
        tokens_per_microbatch=microbatch,
        prompts_per_update=PROMPTS * devices,
        completions_per_prompt=SAMPLES,
    )


@cache
def gathered(name: str, shards: int) -> Gathers | None:
    return gathers_of(network_of(name), 2, shards)


class Planned:
    """The policy on a base and so many devices, the base in so many parts."""

    def __init__(self, name: str, count: int, shards: int, microbatch: int, recompute: str = "never"):
        self.name, self.microbatch = name, microbatch
        self.config = policy(count, microbatch).model_copy(update={"recompute": recompute})
        self.devices = Devices(count, shards)
        self.memory = memory_of(self.config, network_of(name), trained(name)[0], self.devices, LENGTHS)

    @cached_property
    def received(self) -> dict[str, int]:
        """Bytes of an update, by what they are."""
        trainable, tensors = trained(self.name)
        gathers = gathered(self.name, self.devices.shards)
        return exchanged(self.config, tensors, sum(trainable.values()), self.devices.count, LENGTHS, gathers)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """What takes time."""
        gathers = gathered(self.name, self.devices.shards)
        return parts_of(self.config, network_of(self.name), self.devices, LENGTHS, RATES, self.received, gathers)

    @property
    def fits(self) -> bool:
        """Into a device's memory."""
        return self.memory.total <= DEVICE_BYTES

    @property
    def seconds(self) -> float:
        """Of an update."""
        return sum(part.seconds for part in self.parts.values())


def choose(name: str, count: int) -> tuple[int, Planned]:
    """The fewest parts of the base that fit with the largest micro-batch, recomputed where none else does and the base
    is whole, and the plan with them; of none that fits the one that takes least."""
    found = 1, Planned(name, count, 1, MICROBATCHES[-1])
    for shards in dict.fromkeys([1, min(count, NODE), count]):
        for recompute in ("never", "always") if shards == 1 else ("never",):
            for microbatch in MICROBATCHES:
                found = shards, Planned(name, count, shards, microbatch, recompute)
                if found[1].fits:
                    return found
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f}" if size >= 10e9 else f"{size / 1e9:.2g}"


def in_parts(shards: int, count: int) -> str:
    if shards == 1:
        return "whole"
    return f"{shards} parts" if shards == NODE < count else f"{shards} parts, all devices"


def memory_rows() -> Iterable[list[str]]:
    for name in shapes():
        network = network_of(name)
        for shards in (1, 8, 64):
            found, large = (Planned(name, max(shards, NODE), shards, size) for size in (1024, 8192))
            held, passing = found.memory.held, found.memory.passing
            adapters = sum(size for part, size in held.items() if part not in ("libraries", "base", "gathered layers"))
            yield [
                f"{name}, {network.num_parameters() / 1e9:,.1f}B" if shards == 1 else "",
                "whole" if shards == 1 else f"{shards} parts",
                gigabytes(held["base"]),
                gigabytes(held.get("gathered layers", 0)) if shards > 1 else "",
                gigabytes(adapters),
                gigabytes(passing["activations"]),
                gigabytes(large.memory.passing["activations"]),
                gigabytes(passing["sampling"]),
                *(f"**{gigabytes(p.memory.total)}**" if p.fits else gigabytes(p.memory.total) for p in (found, large)),
            ]


def update_rows() -> Iterable[list[str]]:
    for name in shapes():
        alone: float | None = None
        for count in COUNTS:
            shards, found = choose(name, count)
            if not found.fits:
                yield [name if count == 1 else "", f"{count:,}", "doesn't fit", *[""] * 8]
                continue
            alone = alone or found.seconds
            longest = max(found.parts, key=lambda part: found.parts[part].seconds)
            told = sum(size for what, size in found.received.items() if what != "base")
            yield [
                name if count == 1 else "",
                f"{count:,}",
                in_parts(shards, count),
                f"{found.microbatch:,}" + (", recomputed" if found.config.recompute == "always" else ""),
                number(sum(found.received.values()) / 1e9) if count > 1 else "",
                number(told / 1e9) if count > 1 else "",
                number(found.seconds),
                number(found.parts["sampling"].seconds),
                number(3600 / found.seconds),
                f"{alone / found.seconds:.0%}",
                f"{longest}: {found.parts[longest].bound}",
            ]


def card_rows() -> Iterable[list[str]]:
    """The recipes for one card, the longest sequences that they let through, without the weights: by config.json."""
    network = by_configuration(str(CARDS))
    for card in (24, 80):
        for stage, kind in (("sft", SftConfig), ("reward", RewardConfig), ("policy", PolicyConfig)):
            config = load_recipe(CARDS / f"{stage}-{card}gb.yaml", kind).model_copy(update={"device": "cuda"})
            own, lengths = trainable_parameters(config, network), Lengths.longest(config)
            config = with_recompute(config, network, own, Devices(), lengths, card * 10**9)
            memory = memory_of(config, network, own, Devices(), lengths)
            kept = sum(size for part, size in memory.held.items() if part not in ("libraries", "base"))
            yield [
                f"{card} GB" if stage == "sft" else "",
                stage,
                f"{config.microbatch_tokens:,}",
                "yes" if config.recompute == "always" else "no",
                gigabytes(memory.held["base"]),
                gigabytes(kept),
                gigabytes(memory.passing["activations"]),
                gigabytes(memory.passing["sampling"]) if "sampling" in memory.passing else "",
                f"**{gigabytes(memory.total)}**" if memory.total <= card * 10**9 else gigabytes(memory.total),
            ]


def role_rows() -> Iterable[list[str]]:
    """Four roles on one base, adapters of rank 16 on attention, and as four networks of which two learn adapters."""
    for name, config in (("Qwen3 4B", Qwen3Config(**_QWEN_4B)), ("Qwen2.5 7B", Qwen2Config(**_QWEN_7B))):
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        stage = policy(1, MICROBATCHES[0])
        own = trainable_parameters(stage, network)
        memory, again = (
            memory_of(stage.model_copy(update={"recompute": how}), network, own, Devices(), LENGTHS)
            for how in ("never", "always")
        )
        held = memory.held
        four = memory.total + 3 * held["base"]
        yield [
            f"{name}, {network.num_parameters() / 1e9:,.1f}B",
            gigabytes(held["base"]),
            *(gigabytes(held[role]) for role in ("adapter policy", "adapter value", "reference", "reward adapters")),
            *(gigabytes(one.passing["activations"]) for one in (memory, again)),
            gigabytes(memory.passing["sampling"]),
            *(gigabytes(size) for size in (memory.total, again.total, four)),
        ]


def peer_rows() -> Iterable[list[str]]:
    """What a device receives in an update on 8 devices: weights for its sampler, and gradients."""
    count = 8
    for name in ("Llama 3.2 1B", "Llama 3.1 8B", "Llama 3.1 70B"):
        network = network_of(name)
        _, ours = choose(name, count)
        own, _ = trained(name)[0].values()
        whole, reduced = 2 * network.num_parameters(), 2 * (count - 1) / count * 4 * own
        sides = (
            ("perlhf, policy and value", 0.0, float(ours.received["gradients"])),
            ("verl", (count - 1) / count * 4 * own, reduced),
            ("TRL", float(whole), reduced),
            ("OpenRLHF", float(whole), reduced),
        )
        for at, (side, weights, gradients) in enumerate(sides):
            yield [name if at == 0 else "", side, *(number(size / 1e9) for size in (weights, gradients))]


def measured_rows() -> Iterable[list[str]]:
    for row in json.loads(MEASURED.read_text("utf-8")):
        planned, peaks = row["planned_bytes"], row["measured_bytes"]
        yield [
            row["shape"],
            row["stage"]
            + (", 1,024 tokens" if "--tokens-per-microbatch 1024" in row["options"] else "")
            + (", recomputed" if "--recompute always" in row["options"] else ""),
            f"{row['workers']}" + (", with AMX" if row["options"].startswith("benchmarks") else ""),
            f"{planned / 2**20:,.0f}",
            " and ".join(f"{size / 2**20:,.0f}" for size in peaks),
            f"{planned / max(peaks) - 1:+.0%}",
        ]


TABLES = {
    "cards": (
        "card|stage|micro-batch|recomputed|base|adapters|learning|sampling|peak".split("|"),
        card_rows,
    ),
    "roles": (
        ("base||policy|value|reference|reward|learning, 8,192|recomputed|sampling|peak|recomputed|four networks").split(
            "|"
        ),
        role_rows,
    ),
    "measured": (["shape", "stage", "workers", "planned, MiB", "measured, MiB", "off by"], measured_rows),
    "memory": (
        "base|weights are|base|gathered|adapters|learning, 1,024|8,192|sampling|peak, 1,024|8,192".split("|"),
        memory_rows,
    ),
    "updates": (
        (
            "base|devices|weights are|micro-batch|received, GB|but for weights|seconds|sampling|updates an hour|"
            "efficiency|what binds"
        ).split("|"),
        update_rows,
    ),
    "peers": (["base", "", "weights for the sampler, GB", "gradients, GB"], peer_rows),
}


def page(text: str) -> str:
    """The page with its tables as they should be; they stand between comments."""
    for name, (header, rows) in TABLES.items():
        begin, end = f"<!-- {name}: written by scripts/generate_scale.py -->\n\n", "<!-- end -->"
        before, found, after = text.partition(begin)
        assert found, f"no place for the table {name}"
        text = before + begin + "\n".join(table(header, rows())) + "\n" + after[after.index(end) :]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), encoding="utf-8")
