import math

import pytest
import torch
from torch.nn import Parameter

from perlhf.config.stages import OptimConfig
from perlhf.errors import CheckpointError, DivergenceError
from perlhf.training.optim import build, clip, learning_rate_at, load_state_tensors, state_tensors


def config(**changes) -> OptimConfig:
    return OptimConfig.model_validate(changes)


def with_gradient(values: list[float], gradient: list[float]) -> Parameter:
    parameter = Parameter(torch.tensor(values))
    parameter.grad = torch.tensor(gradient)
    return parameter


def test_first_step_moves_each_weight_by_the_learning_rate_against_the_sign_of_its_gradient():
    # Bias-corrected moments of the first step are g and g^2, so the update is lr * g / (|g| + eps) = lr * sign(g).
    parameter = with_gradient([1.0, -2.0, 3.0], [0.5, -4.0, 100.0])
    optimizer = build({"policy": ({"a": parameter}, 0.1)}, config())["policy"]
    optimizer.step()
    assert parameter.tolist() == pytest.approx([0.9, -1.9, 2.9], abs=1e-6)


def test_second_step_by_hand():
    # Gradients 1, then 3; both betas 0.5: m = (0.25 * 1 + 0.5 * 3) / 0.75, v = (0.25 * 1 + 0.5 * 9) / 0.75.
    parameter = with_gradient([0.0], [1.0])
    optimizer = build({"sft": ({"a": parameter}, 0.1)}, config(beta1=0.5, beta2=0.5))["sft"]
    optimizer.step()
    parameter.grad = torch.tensor([3.0])
    optimizer.step()
    assert parameter.item() == pytest.approx(-0.1 - 0.1 * (1.75 / 0.75) / math.sqrt(4.75 / 0.75), abs=1e-6)


def test_weight_decay_is_decoupled_from_the_gradient():
    # Weight 2 shrinks by lr * decay * 2 = 0.1 * 0.5 * 2, then moves by lr against the gradient's sign.
    parameter = with_gradient([2.0], [7.0])
    build({"sft": ({"a": parameter}, 0.1)}, config(weight_decay=0.5))["sft"].step()
    assert parameter.item() == pytest.approx(2.0 - 0.1 - 0.1, abs=1e-6)


def test_each_adapter_has_its_own_learning_rate():
    policy, value = with_gradient([0.0], [1.0]), with_gradient([0.0], [1.0])
    optimizers = build({"policy": ({"a": policy}, 0.1), "value": ({"a": value}, 0.01)}, config())
    assert list(optimizers) == ["policy", "value"]
    for optimizer in optimizers.values():
        optimizer.step()
    assert (policy.item(), value.item()) == pytest.approx((-0.1, -0.01), abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        # left = 1, 3/4, 1/2, 1/4; (1 - cos(pi * left)) / 2
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedules_with_two_warmup_updates_of_six(schedule, expected):
    rates = [learning_rate_at(step, 6, 2.0, config(schedule=schedule, warmup_updates=2)) for step in range(1, 7)]
    assert rates == pytest.approx([2.0 * rate for rate in expected])


def test_linear_schedule_without_warmup_starts_at_the_peak():
    rates = [learning_rate_at(step, 4, 1.0, config(schedule="linear")) for step in (1, 2, 3, 4)]
    assert rates == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("warmup", [4, 10])
def test_a_warmup_as_long_as_the_run_or_longer(warmup):
    assert learning_rate_at(4, 4, 1.0, config(schedule="cosine", warmup_updates=warmup)) == pytest.approx(4 / warmup)


@pytest.mark.parametrize("step", [0, 5])
def test_updates_count_from_one_to_total(step):
    with pytest.raises(AssertionError, match=f"update {step} of 4"):
        learning_rate_at(step, 4, 1.0, config())


def test_clip_scales_jointly_and_returns_the_norm_before():
    # sqrt(3^2 + 4^2 + 12^2) = 13
    first, second = with_gradient([0.0, 0.0], [3.0, 4.0]), with_gradient([0.0], [12.0])
    untouched = Parameter(torch.ones(1))
    assert clip([first, second, untouched], 6.5) == pytest.approx(13.0)
    assert first.grad is not None and second.grad is not None and untouched.grad is None
    assert first.grad.tolist() == pytest.approx([1.5, 2.0])
    assert second.grad.tolist() == pytest.approx([6.0])


def test_clip_leaves_a_small_gradient_bit_equal():
    parameter = with_gradient([0.0, 0.0], [0.3, 0.4])
    assert clip(iter([parameter]), 1.0) == pytest.approx(0.5)
    assert parameter.grad is not None and torch.equal(parameter.grad, torch.tensor([0.3, 0.4]))


def test_clip_measures_bfloat16_gradients_in_float32():
    # 301^2 gradients of 1: norm 301. Summed in bfloat16 the squares would stop at 256, and 301 itself is 300 there.
    parameter = Parameter(torch.zeros(301 * 301, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert clip([parameter], 1000.0) == pytest.approx(301.0, abs=0.01)


def test_clip_without_gradients_is_zero():
    assert clip([Parameter(torch.ones(2))], 1.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clip_refuses_a_gradient_that_is_not_finite_and_changes_nothing(bad):
    fine, broken = with_gradient([0.0], [3.0]), with_gradient([0.0], [bad])
    with pytest.raises(DivergenceError, match=f"gradient norm is {bad}"):
        clip([fine, broken], 1.0)
    assert fine.grad is not None and fine.grad.item() == 3.0


def pair(seed: int) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(4, 3, generator=generator)), Parameter(torch.randn(5, generator=generator))]


def named(parameters: list[Parameter]) -> dict[str, Parameter]:
    return dict(zip(("a.lora_A", "b"), parameters, strict=True))


def take_steps(optimizer: torch.optim.AdamW, parameters: list[Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_reloaded_state_continues_bit_equal():
    kept = pair(0)
    optimizer = build({"policy": (named(kept), 0.01)}, config(weight_decay=0.1))["policy"]
    take_steps(optimizer, kept, range(3))
    saved = {name: tensor.clone() for name, tensor in state_tensors(optimizer).items()}
    weights = [parameter.detach().clone() for parameter in kept]

    reloaded = [Parameter(weight) for weight in weights]
    fresh = build({"policy": (named(reloaded), 0.01)}, config(weight_decay=0.1))["policy"]
    load_state_tensors(fresh, saved)
    without = [Parameter(weight.clone()) for weight in weights]
    take_steps(optimizer, kept, range(3, 8))
    take_steps(fresh, reloaded, range(3, 8))
    take_steps(build({"policy": (named(without), 0.01)}, config(weight_decay=0.1))["policy"], without, range(3, 8))

    assert all(torch.equal(a, b) for a, b in zip(kept, reloaded, strict=True))
    assert not torch.equal(kept[0], without[0]), "the moments matter"
    assert saved["b.step"].item() == 3, "the loaded tensors are copies"


def test_moments_find_their_parameter_in_another_order():
    kept = [Parameter(torch.ones(3)), Parameter(torch.zeros(3))]  # of one shape, so that nothing refuses a wrong one
    optimizer = build({"policy": (named(kept), 0.01)}, config())["policy"]
    take_steps(optimizer, kept, range(3))
    turned = {name: Parameter(one.detach().clone()) for name, one in reversed(named(kept).items())}
    fresh = build({"policy": (turned, 0.01)}, config())["policy"]
    load_state_tensors(fresh, state_tensors(optimizer))
    take_steps(optimizer, kept, range(3, 5))
    take_steps(fresh, [turned[name] for name in named(kept)], range(3, 5))
    assert all(torch.equal(one, turned[name]) for name, one in named(kept).items())


def test_state_tensors_names_and_values():
    parameters = [with_gradient([0.0, 0.0], [1.0, -2.0]), Parameter(torch.zeros(3))]
    optimizer = build({"sft": (named(parameters), 0.1)}, config(beta1=0.5, beta2=0.75))["sft"]
    assert state_tensors(optimizer) == {}
    optimizer.step()
    tensors = state_tensors(optimizer)
    assert sorted(tensors) == ["a.lora_A.exp_avg", "a.lora_A.exp_avg_sq", "a.lora_A.step"], (
        "the second parameter had no gradient"
    )
    assert tensors["a.lora_A.exp_avg"].tolist() == pytest.approx([0.5, -1.0])
    assert tensors["a.lora_A.exp_avg_sq"].tolist() == pytest.approx([0.25, 1.0])
    assert tensors["a.lora_A.step"].item() == 1


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [("1.exp_avg", (5,), "parameter '1'"), ("b.exp_avg", (4,), r"b\.exp_avg has shape \(4,\)[^5]*\(5,\)")],
)
def test_state_of_other_parameters_is_refused_and_changes_nothing(key, shape, message):
    parameters = pair(0)
    optimizer = build({"sft": (named(parameters), 0.1)}, config())["sft"]
    take_steps(optimizer, parameters, range(1))
    before = {name: tensor.clone() for name, tensor in state_tensors(optimizer).items()}
    with pytest.raises(CheckpointError, match=message):
        load_state_tensors(optimizer, {**before, key: torch.zeros(shape)})
    after = state_tensors(optimizer)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_without_parameters_is_an_internal_error():
    with pytest.raises(AssertionError, match="value has no trainable parameter"):
        build({"value": ({}, 0.1)}, config())
