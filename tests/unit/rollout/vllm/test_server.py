"""What a server samples is what the local engine would: ends, log-probabilities, ids, and versions by name."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from policy_stages import POLICY, new_stage
from tiny_models import END, randomise
from vllm_server import FakeVllm, vllm

from perlhf.errors import ServiceError, StaleSamplerError
from perlhf.rollout import local
from perlhf.rollout.completions import Setup
from perlhf.rollout.local import Ends
from perlhf.rollout.vllm.server import Server, seeds_of

__all__ = ["vllm"]
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


@pytest.fixture
def stage(tiny_base: Path) -> Setup:
    return new_stage(tiny_base)


@pytest.fixture
def server(stage: Setup, vllm: FakeVllm, tmp_path: Path) -> Iterator[Server]:
    given = {"url": f"{vllm.url}/v1/", "directory": tmp_path / "versions", "run": tmp_path / "run"}
    with Server(
        stage.model, stage.encoder, stage.workers, prompts=PROMPTS[:2], max_gap=0.2, timeout_seconds=20, **given
    ) as opened:
        opened.check(POLICY, temperature=1.0, slots=2)
        yield opened


def changed(stage: Setup, seed: int = 1) -> None:
    randomise(stage.model, POLICY, seed)
    stage.model.adapters[POLICY].version += 1


@pytest.mark.parametrize(("stop", "early"), [((), False), (("e",), False), (("e",), True)])
def test_greedy_completions_are_the_local_engines(server, stage, vllm, stop, early):
    changed(stage)
    ends = Ends((END, 40, 41, 42), stage.encoder, stop)
    vllm.early = early
    given = {"ends": ends, "temperature": 0.0, "max_completion_tokens": 24}
    found = server.sample(server.version(POLICY), PROMPTS, [1, 2, 3], samples=1, **given)
    draws = torch.zeros(3, 24, dtype=torch.float64)
    expected = local.sample(stage.model, PROMPTS, adapter=POLICY, draws=draws, **given)
    assert found.completions == expected.completions and found.ended == expected.ended
    assert found.prompts == expected.prompts and found.adapter_version == stage.model.version(POLICY)
    for one, other in zip(found.sampler_logprobs, expected.sampler_logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_what_goes_on_beyond_an_end_is_cut_there(server, stage, monkeypatch):
    """A server's stop string may end later than the token that completes it."""
    ids, logprobs = [50, 40, 60, 61], [-1.0, -2.0, -3.0, -4.0]
    answer = {"choices": [{"index": 0, "token_ids": ids, "logprobs": {"token_logprobs": logprobs}}]}
    monkeypatch.setattr(server._connection, "once", lambda *_, **__: [answer])
    ends = Ends((40,), stage.encoder)
    given = {"ends": ends, "temperature": 1.0, "max_completion_tokens": 4}
    found = server.sample(server.version(None), PROMPTS[:1], [1], samples=1, **given)
    assert (found.completions, found.sampler_logprobs, found.ended) == ([[50, 40]], [[-1.0, -2.0]], [True])


@pytest.mark.parametrize(
    "choice",
    [
        {"token_ids": [50, 51], "logprobs": {"token_logprobs": [-1.0]}},
        {"token_ids": [50, 51], "logprobs": {"token_logprobs": [-1.0, float("nan")]}},
        {"token_ids": [50, 51, 52], "logprobs": None},
        {"token_ids": [50], "logprobs": {"token_logprobs": [-1.0]}},  # too short, and no end
        {"text": "tea"},
    ],
)
def test_answers_without_what_was_asked_for_are_refused(server, stage, monkeypatch, choice):
    monkeypatch.setattr(server._connection, "once", lambda *_, **__: [{"choices": [choice | {"index": 0}]}])
    given = {"ends": Ends((40,), stage.encoder), "temperature": 1.0, "max_completion_tokens": 2}
    with pytest.raises(ServiceError):
        server.sample(server.version(None), PROMPTS[:1], [1], samples=1, **given)


def test_every_version_has_a_name_and_the_one_before_it_stays(server, stage, vllm, tmp_path):
    names = [server.version(POLICY).name]
    assert server.version(POLICY).name == names[0], "nothing was learned since"
    for seed in range(1, 4):
        changed(stage, seed)
        names.append(server.version(POLICY).name)
    assert len(set(names)) == 4 and sorted(vllm.loaded) == sorted(names[2:])
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == sorted(names[2:])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (tmp_path / "versions" / names[-1]).iterdir()
    }


def test_what_a_killed_session_left_is_swept(server, stage, vllm, tmp_path):
    left = server.version(POLICY).name
    given = {"url": vllm.url, "directory": tmp_path / "versions", "run": tmp_path / "run"}
    with Server(
        stage.model, stage.encoder, stage.workers, prompts=PROMPTS[:2], max_gap=0.2, timeout_seconds=20, **given
    ) as again:
        again.check(POLICY, temperature=1.0, slots=2)
        assert left not in vllm.loaded and not (tmp_path / "versions" / left).exists()
        assert list(vllm.loaded) == [again.version(POLICY).name]


def test_a_stale_adapter_is_seen_by_its_logprobs_alone(server, stage, vllm):
    """Greedy tokens are the same after a small step."""
    changed(stage)
    server.version(POLICY)
    vllm.stale, vllm._first = True, server.version(POLICY).name
    with torch.no_grad():
        for tensor in stage.model.adapters[POLICY].tensors().values():
            tensor.mul_(1.002)
    stage.model.adapters[POLICY].version += 1
    with pytest.raises(StaleSamplerError, match="those of the version before"):
        server.version(POLICY)


def test_another_adapter_in_its_place_is_seen(server, stage, vllm):
    """Such as the one that it started from, after a small step."""
    changed(stage)
    vllm.stale, vllm._first = True, server.version(POLICY).name
    other = stage.model.copy_adapter(POLICY, "other", "policy")
    with torch.no_grad():
        for tensor in other.tensors().values():
            tensor.mul_(1.002)
    with pytest.raises(StaleSamplerError, match=f"those of '{POLICY}'"):
        server.version("other")


def test_a_server_without_the_adapter_is_seen(server, stage, vllm, monkeypatch):
    changed(stage)
    complete = vllm._complete
    monkeypatch.setattr(vllm, "_complete", lambda body: complete(body | {"model": "tiny"}))
    with pytest.raises(StaleSamplerError):
        server.version(POLICY)


def test_seeds_are_keyed_by_seed_step_and_prompt():
    assert seeds_of(0, 1, [4, 9], 2, [1]) == seeds_of(0, 1, [7, 9], 2, [1])
    found = seeds_of(0, 1, [4, 9, 4], 2, [0, 1, 2])
    assert len({*found, *seeds_of(0, 2, [4, 9], 2, [0, 1]), *seeds_of(1, 1, [4, 9], 2, [0, 1])}) == 7
    assert all(0 <= seed < 2**48 for seed in found)
