"""What workers tell one another, in real processes over gloo."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import talk
from toy import command, finish

from perlhf.commands.names import COMMANDS
from perlhf.config.command_line import parse
from perlhf.model.bases.loading import without_weights
from perlhf.model.foretold.sizes import gathers_of
from perlhf.parallel import traffic
from perlhf.parallel.together import together
from perlhf.parallel.workers import ALONE, Workers
from perlhf.rollout.local import Ends
from perlhf.training import loop
from perlhf.training.plan import trainable_parameters, trained_tensors
from perlhf.training.policy import train_policy
from perlhf.training.reward import train_reward
from perlhf.training.sft import train_sft


def values(number: int, size: int) -> torch.Tensor:
    """Numbers whose sum depends on the order: some large, some small."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, generator=generator) * 10.0 ** torch.randint(-6, 7, (size,), generator=generator)


@pytest.mark.parametrize("size", [7, 50_001])
def test_sums_are_in_the_order_of_the_workers_and_the_same_bits_everywhere(size, tmp_path):
    found = talk(3, lambda workers: workers.sum(values(workers.number, size).view(1, -1)), tmp_path)
    expected = (values(0, size) + values(1, size)) + values(2, size)
    assert not torch.equal(values(0, size) + (values(1, size) + values(2, size)), expected)
    assert all(torch.equal(one, expected[None]) for one in found)


def test_gradients_that_nobody_has_stay_none_and_absent_ones_are_zeros(tmp_path):
    def work(workers: Workers) -> Any:
        parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
        parameters[0].grad = torch.full((2, 2), 1.0 + workers.number)
        if workers.number == 1:
            parameters[1].grad = torch.eye(2)
        workers.sum_gradients(parameters)
        return [parameter.grad for parameter in parameters]

    for first, second, third in talk(2, work, tmp_path):
        assert torch.equal(first, torch.full((2, 2), 3.0))
        assert torch.equal(second, torch.eye(2))
        assert third is None


def test_what_is_told_and_gathered_survives(tmp_path):
    def work(workers: Workers) -> Any:
        me = workers.number
        tensor = torch.full((3,), float(me))
        workers.spread([tensor])
        return {
            "once": workers.once(lambda: {"loss": 0.1, "nan": float("nan"), "text": "é", "who": me, "none": None}),
            "rows": workers.rows({} if me == 1 else {me: [me] * me, me + 10: []}),
            "gather": workers.gather(torch.arange(me)),
            "numbers": workers.numbers({"a": 0.1 * me, "b": 1.0}),
            "any": [workers.any(me == 2), workers.any(False)],
            "spread": tensor,
        }

    for found in talk(3, work, tmp_path):
        assert found["once"] == {"loss": 0.1, "nan": pytest.approx(float("nan"), nan_ok=True), "text": "é"} | {
            "who": 0,
            "none": None,
        }
        assert found["rows"] == {0: [], 10: [], 2: [2, 2], 12: []}
        assert [part.tolist() for part in found["gather"]] == [[], [0], [0, 1]]
        assert found["numbers"] == {"a": 0.0 + 0.1 + 0.2, "b": 3.0}
        assert found["any"] == [True, False]
        assert torch.equal(found["spread"], torch.zeros(3))


def test_adapters_that_differ_in_one_bit_end_the_run(tmp_path):
    def work(workers: Workers) -> Any:
        tensor = torch.ones(5)
        workers.check_same(1, [tensor])
        if workers.number == 2:
            tensor[4] = torch.nextafter(tensor[4], torch.tensor(2.0))
        with pytest.raises(ArithmeticError, match="after update 2 the adapters of worker 2 aren't those of worker 0"):
            workers.check_same(2, [tensor])

    talk(3, work, tmp_path)


def test_one_process_makes_no_group_and_changes_nothing():
    with together() as workers:
        assert workers is ALONE
        tensor = torch.ones(2)
        assert workers.sum(tensor) is tensor
        assert workers.once(lambda: (1, 2)) == (1, 2)
    assert not torch.distributed.is_initialized()


# ---- what `perlhf plan` says of it -----------------------------------------------------------------------------------

TRAIN: dict[str, Callable[[Any], Any]] = {"sft": train_sft, "reward": train_reward, "policy": train_policy}


def counted(workers: Workers, work: Callable[[], Any]) -> dict[str, int]:
    """Bytes that this worker receives in the third update of a run, by the collective that brings them."""
    received, updates = Counter[str](), list[dict[str, int]]()
    real: Any = dist
    gather, exchange, broadcast, stop = real.all_gather, real.all_to_all_single, real.broadcast, loop.stop_if_asked
    into = real.all_gather_single

    def counting_gather(parts: Any, own: torch.Tensor, **given: Any) -> Any:
        received["all_gather"] += (len(parts) - 1) * own.nbytes
        return gather(parts, own, **given)

    def counting_parts(output_tensor: torch.Tensor, input_tensor: torch.Tensor, **given: Any) -> Any:
        received["parts"] += output_tensor.nbytes - input_tensor.nbytes
        return into(output_tensor, input_tensor, **given)

    def counting_exchange(parts: torch.Tensor, own: torch.Tensor, **given: Any) -> Any:
        received["all_to_all"] += parts.nbytes - parts.nbytes // workers.count
        return exchange(parts, own, **given)

    def counting_broadcast(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
        received["broadcast"] += tensor.nbytes
        return broadcast(tensor, *given, **named)

    def at_the_end_of_an_update(*given: Any) -> None:
        updates.append(dict(received))
        received.clear()
        stop(*given)

    # In a process that was forked for this, so that nothing is to be put back.
    real.all_gather, real.all_to_all_single, real.broadcast = counting_gather, counting_exchange, counting_broadcast
    real.all_gather_single = counting_parts
    loop.stop_if_asked = at_the_end_of_an_update
    Ends.end = lambda self, ids: False  # completions of full length
    work()
    return updates[2]


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", ["--adapter.rank", "40"]),
        ("reward", []),
        ("policy", []),
        ("policy", ["--baseline", "leave_one_out", "--reward", "toy_reward:letters"]),
        ("policy", ["--clip", "0.2", "--steps-per-rollout", "2", "--adapter.rank", "40"]),
        ("sft", ["--shard", "full"]),
        ("reward", ["--shard", "full"]),
        ("policy", ["--shard", "full"]),
    ],
)
def test_an_update_exchanges_what_is_planned(stage, options, tiny_base, feedback, tmp_path):
    judge = tmp_path / "judge"
    data = {"sft": "demonstrations", "reward": "ratings", "policy": "prompts"}
    own = [
        "--updates" if stage == "policy" else "--max-updates",
        "4",
        "--validate-every",
        "100",
        "--check-every",
        "100",
    ]
    if stage == "policy":
        words = command("reward", tiny_base, feedback / "ratings.jsonl", judge, "--max-updates", "1")
        assert finish(words, tmp_path / "log", feedback) == 0
        own += ["--reward", str(judge), "toy_reward:letters"]
    words = command(stage, tiny_base, feedback / f"{data[stage]}.jsonl", tmp_path / "run", *own)
    config, _ = parse(COMMANDS[stage], [*words[1:], *options])

    def work(workers: Workers) -> dict[str, int]:
        os.chdir(feedback)
        sys.path.insert(0, str(feedback))
        return counted(workers, lambda: TRAIN[stage](config))

    found = talk(2, work, tmp_path)
    network = without_weights(str(tiny_base))
    trained = trained_tensors(config, network), sum(trainable_parameters(config, network).values())
    lengths = traffic.Lengths(1, config.max_completion_tokens if stage == "policy" else 1)
    parts = gathers_of(network, 4, 2) if config.shard == "full" else None
    planned = traffic.exchanged(config, *trained, 2, lengths, parts)
    functions = sum(":" in source for source in getattr(config, "reward", ()))
    texts = [traffic.METRICS_TEXT, functions * 8 * traffic.SCORE_TEXT] if stage == "policy" else []
    assert sum(planned.values()) > 4 * trained[1]
    assert ("all_to_all" in found[0]) == (sum(trained) > 16_384), "both ways to add up are met"
    for received in found:
        told = received.pop("broadcast", 0)
        assert sum(received.values()) == sum(planned.values()) - sum(texts)
        assert told == pytest.approx(sum(texts), rel=0.4)
