"""A reward adapter with its head, as `perlhf export` writes it, loaded by vLLM as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_server import NAME, RANK
from toy import command, comparisons, write_feedback

from perlhf.commands.cli import main
from perlhf.commands.exports import elsewhere
from perlhf.method.packing import pack
from perlhf.model.finished import read_run

NEAR = 1e-3
"""Scores in float32 differ by the order in which numbers are added, over 30 layers."""


@pytest.fixture(scope="module")
def reward(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward run by the command line."""
    directory = tmp_path_factory.mktemp("reward")
    feedback = write_feedback(directory / "feedback")
    words = command(
        "reward", smollm2, feedback / "comparisons.jsonl", directory / "run", "--encoding.max-tokens", "192"
    )
    assert main(words) == 0
    return directory


def test_a_reward_adapter_classifies(vllm: Callable[..., Any], reward: Path, smollm2: Path) -> None:
    """By tokens and by conversations, at the base's side; without the export's template a newline would be scored."""
    out = reward / "peft"
    assert main(["export", str(reward / "run"), str(out), "--format", "peft", "--device", "cpu"]) == 0
    model, encoder = read_run(reward / "run").open("cpu")
    talks = [(row["prompt"], row[side]) for row in comparisons(8) for side in ("chosen", "rejected")]
    own, given = [], []
    for prompt, completion in talks:
        (example,) = encoder.examples(prompt, [completion], "a test", None)
        with torch.no_grad():
            own.append(model.scores(pack([[example.tokens]], "none"), "reward").item())
        given.append([*example.prompt, *example.completion])
    options = ["--runner", "pooling", "--convert", "classify", "--enable-lora", "--max-lora-rank", str(RANK)]
    options += ["--lora-modules", f"helpful={out}", "--chat-template", str(out / "chat_template.jinja")]
    with vllm(smollm2, "float32", *options) as server:
        status, answer = server.ask("/classify", {"model": "helpful", "input": given, "use_activation": False})
        assert status == 200, answer
        scores = [row["probs"][0] for row in answer["data"]]
        differences = [abs(one - other) for one, other in zip(own, scores, strict=True)]
        print(f"{len(own)} scores from {min(own):.2f} to {max(own):.2f}, differences up to {max(differences):.2g}")
        assert max(differences) < NEAR and max(own) - min(own) > 100 * NEAR
        for (prompt, completion), score in list(zip(talks, own, strict=True))[:3]:
            body: dict[str, Any] = {"model": "helpful", "messages": elsewhere.conversation(prompt, completion)}
            body |= {"use_activation": False, "add_generation_prompt": False}
            status, answer = server.ask("/classify", body)
            assert status == 200, answer
            assert answer["data"][0]["probs"] == pytest.approx([score], abs=NEAR)
        assert server.ask("/classify", {"model": NAME, "input": given[:1]})[1]["data"][0]["num_classes"] != 1
