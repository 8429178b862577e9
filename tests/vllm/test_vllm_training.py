"""A policy that learns from what vLLM samples, and answers and is evaluated there as it is here."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_server import KEY, NAME, RANK, SLOTS
from toy import command, metrics, override, prompts, read_json, read_lines, write_feedback

from perlhf.commands.cli import main
from perlhf.model.finished import read_run
from perlhf.rollout.local import Ends, sample

UPDATES, PROMPTS, COMPLETIONS, TOKENS = 3, 4, 4, 32
GAP = 1e-3
"""Nats a token in float32, by the order in which numbers are added, over 30 layers."""


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_feedback(tmp_path_factory.mktemp("feedback"))


def test_a_policy_is_trained_through_it(
    vllm: Callable[..., Any], smollm2: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(feedback))
    monkeypatch.setenv("PERLHF_VLLM_KEY", KEY)
    options = ["--enable-lora", "--max-loras", str(SLOTS), "--max-lora-rank", str(RANK)]
    options += ["--logprobs-mode", "processed_logprobs"]
    run = tmp_path / "run"
    with vllm(smollm2, "float32", *options) as server:
        own = f"--updates {UPDATES} --prompts-per-update {PROMPTS} --completions-per-prompt {COMPLETIONS} "
        own += f"--max-completion-tokens {TOKENS} --temperature 0.7 --keep last --encoding.max-tokens 192 "
        own += f"--sampler vllm --vllm.url {server.address} --max-ratio 2 --adapter.targets attention"
        words = command("policy", smollm2, feedback / "prompts.jsonl", run)
        assert main([words[0], *override(words[1:], own.split())]) == 0
        lines = metrics(run)
        assert len(lines) == UPDATES
        for line in lines:
            told = {key: value for key, value in line.items() if "gap" in key or "ratio" in key or "seconds_" in key}
            print(", ".join(f"{key} {value:.3g}" for key, value in told.items()))
            assert line["sampler_gap_mean"] < GAP
        drawn = [row for file in sorted((run / "rollouts").iterdir()) for row in read_lines(file)]
        assert len(drawn) == UPDATES * PROMPTS * COMPLETIONS
        names = [entry["id"] for entry in server.ask("/v1/models")[1]["data"]]
        assert names == [NAME], "nothing is left of its versions"
        _evaluated(run, server.address, tmp_path)

        # What was learned, by both engines: the same answers, and so the same score.
        assert server.load("learned", run / "adapter")[0] == 200
        model, encoder = read_run(run).open("cpu")
        ends = Ends.of(encoder)
        asked = [list(encoder.prompt(row["prompt"])) for row in prompts(8)]
        stop = {"stop_token_ids": list(ends.ids), "temperature": 0.0, "max_tokens": TOKENS}
        theirs = [choice["token_ids"] for choice in server.complete("learned", asked, **stop)]
        base = [choice["token_ids"] for choice in server.complete(NAME, asked, **stop)]
    draws = torch.zeros(len(asked), TOKENS, dtype=torch.float64)
    given: dict[str, Any] = {"adapter": "policy", "draws": draws, "ends": ends, "temperature": 0.0}
    ours = sample(model, asked, max_completion_tokens=TOKENS, **given).completions
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    scores = [_letters([ends.text(ids) for ids in answers]) for answers in (ours, theirs, base)]
    print(f"{same} of {len(asked)} greedy answers are ours; scores: ours {scores[0]:.4f}, vLLM's {scores[1]:.4f}")
    print(f"the base's {scores[2]:.4f}")
    assert same >= len(asked) - 1
    assert abs(scores[0] - scores[1]) < 0.05
    assert base != theirs


def _evaluated(run: Path, address: str, tmp_path: Path) -> None:
    """Greedy answers and their scores by both samplers, of the reference (the base) and of the policy."""
    found: list[dict[str, Any]] = []
    for name, through in (("local", []), ("vllm", ["--sampler", "vllm", "--vllm.url", address])):
        began = time.monotonic()
        words = ["--split", "all", "--prompts", "8", "--temperature", "0", "--best-of", "2", "--bootstrap", "20"]
        assert main(["evaluate", str(run), *words, "--output", str(tmp_path / name), *through]) == 0
        found.append(read_json(tmp_path / name))
        assert found[-1]["sampler"] == name
        score = found[-1]["after"]["score"]["value"]
        print(f"evaluated by {name}: score {score:.4f}, {time.monotonic() - began:.0f} s")
    pairs = list(zip(*(one["samples"] for one in found), strict=True))
    same = {side: sum(one[side] == other[side] for one, other in pairs) for side in ("before", "after")}
    print(f"greedy answers of {len(pairs)} that are the same: {same}")
    assert min(same.values()) >= len(pairs) - 1


def _letters(texts: list[str]) -> float:
    """`toy_reward:letters`, in the mean."""
    return sum(sum("a" <= c <= "z" for c in text) / max(1, len(text)) for text in texts) / len(texts)
