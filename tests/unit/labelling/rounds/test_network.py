"""Answers, by this process and by a server; scores of pairs of answers, beside those of `perlhf score`."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import SYSTEM, TinyRuns, tiny_runs
from vllm_server import FakeVllm, vllm

from perlhf.config.commands import ScoreConfig
from perlhf.config.loop import LoopConfig, LoopEncodingConfig, LoopPolicyConfig
from perlhf.config.stages import DataConfig, VllmConfig
from perlhf.data.records import Prompt
from perlhf.evaluation.evaluate import score
from perlhf.labelling.rounds import results
from perlhf.labelling.rounds.network import Pair, sample_answers, score_pairs

__all__ = ["vllm"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRuns:
    return tiny_runs(tmp_path_factory.getbasetemp() / "tiny_runs", tiny_base)


def settings(base: Path, runs: TinyRuns) -> LoopConfig:
    encoding = LoopEncodingConfig(system=SYSTEM, max_tokens=256)
    return LoopConfig(base=str(base), dtype="float32", threads=1, sft=runs.sft, encoding=encoding)


def test_scores_are_those_of_perlhf_score(runs: TinyRuns, tiny_base: Path, tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "a small coffee please"}]
    answers = ["sure", "never", "sure one coffee"]
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": prompt, "completion": answer, "label": True} for answer in answers]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(paths=(str(file),))
    expected = [row["score"] for row in score(ScoreConfig(run=runs.reward, data=data, output=tmp_path / "out.jsonl"))]
    pairs = [Pair(prompt, answers[a], answers[b], "g") for a, b in ((0, 1), (0, 2), (2, 1))]
    found = score_pairs(settings(tiny_base, runs), [runs.reward, runs.reward], [*pairs, Pair(prompt, "x", " ", "g")])
    assert found.shape == (2, 4, 2) and np.isnan(found[:, 3]).all()
    by_hand = [[expected[0], expected[1]], [expected[0], expected[2]], [expected[2], expected[1]]]
    assert found[0, :3] == pytest.approx(np.array(by_hand), abs=1e-5)
    assert (found[0, :3] == found[1, :3]).all()


def test_answers_depend_on_the_side_and_the_key_alone(runs: TinyRuns, tiny_base: Path) -> None:
    config = settings(tiny_base, runs)
    prompts = [Prompt(f"a tea {at}", f"g{at}") for at in range(3)]
    sides = {"policy": (runs.policy, 2), "start": (None, 1)}
    found = sample_answers(config, prompts, sides, "round 2")
    assert [len(one) for one in found["policy"]] == [2, 2, 2] and [len(one) for one in found["start"]] == [1, 1, 1]
    assert found == sample_answers(config, prompts, sides, "round 2")
    assert found["start"] != sample_answers(config, prompts, {"start": (None, 1)}, "round 3")["start"]


def test_a_servers_answers_are_the_local_engines(
    runs: TinyRuns, tiny_base: Path, tmp_path: Path, vllm: FakeVllm
) -> None:
    """At a temperature at which the likeliest token is the one that is drawn."""
    policy = LoopPolicyConfig(temperature=1e-5, max_completion_tokens=8)
    config = settings(tiny_base, runs).model_copy(update={"policy": policy, "run": tmp_path})
    prompts = [Prompt(f"a tea {at}", f"g{at}") for at in range(3)]
    sides = {"policy": (runs.policy, 2), "start": (None, 1)}
    through = config.model_copy(update={"sampler": "vllm", "vllm": VllmConfig(url=vllm.url)})
    assert sample_answers(through, prompts, sides, "round 2") == sample_answers(config, prompts, sides, "round 2")
    loads = [name for what, name in vllm.log if what == "load"]
    assert len(loads) == 2 and vllm.sampled == loads, "the start, which is an SFT adapter, and the policy"
    assert vllm.loaded == {} and not list(tmp_path.iterdir()), "nothing is left, there or here"


def test_rows_of_a_round_may_hold_any_text(tmp_path: Path) -> None:
    written = [{"prompt": "a\u2028b\u2029c\x85d"}, {"prompt": "e"}]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), "utf-8")
    assert list(results.rows(file)) == written
