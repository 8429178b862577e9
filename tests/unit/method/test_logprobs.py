"""Log-probabilities from the chunked head equal the slow twin's, values and gradients, and two computed by hand."""

import math

import pytest
import torch

from perlhf.method import logprobs as head


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_TOKENS", 3)


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(tokens, 5, generator=generator), torch.randn(11, 5, generator=generator)
    return states.requires_grad_(), weight, torch.randint(0, 11, (tokens,), generator=generator)


def test_by_hand() -> None:
    # Logits 0 and ln 3 at temperature 1: probabilities 1/4 and 3/4. At temperature 1/2 the second logit is ln 9.
    states, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [math.log(3)]])
    logprobs, entropy = head.token_logprobs(states, weight, torch.tensor([0]), 1.0)
    assert logprobs.item() == pytest.approx(math.log(1 / 4))
    assert entropy.item() == pytest.approx(-(math.log(1 / 4) + 3 * math.log(3 / 4)) / 4)
    # d log p(0) / d state = w_0 - sum_v p_v w_v = -3/4 ln 3.
    (slope,) = torch.autograd.grad(logprobs.sum(), states)
    assert slope.item() == pytest.approx(-3 / 4 * math.log(3))
    logprobs, _ = head.token_logprobs(states, weight, torch.tensor([1]), 0.5)
    assert logprobs.item() == pytest.approx(math.log(9 / 10))


@pytest.mark.parametrize("tokens", [0, 1, 3, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained_head", [False, True])
def test_equals_the_slow_twin(tokens: int, temperature: float, trained_head: bool) -> None:
    states, weight, targets = inputs(tokens)
    weight.requires_grad_(trained_head)
    learned = [states, weight] if trained_head else [states]
    upstream = torch.linspace(-1, 2, tokens)
    wanted, wanted_entropy = head.slow_logprobs(states, weight, targets, temperature)
    found, entropy = head.token_logprobs(states, weight, targets, temperature)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(entropy, wanted_entropy)
    assert not entropy.requires_grad
    if tokens:
        grads = torch.autograd.grad((found * upstream).sum(), learned)
        for grad, want in zip(grads, torch.autograd.grad((wanted * upstream).sum(), learned), strict=True):
            torch.testing.assert_close(grad, want, atol=1e-6, rtol=1e-5)


def test_bfloat16_is_as_near_as_the_slow_twin() -> None:
    states, weight, targets = inputs(7)
    exact, _ = head.slow_logprobs(states, weight, targets, 1.0)
    (slope,) = torch.autograd.grad(exact.sum(), states)
    coarse = states.detach().bfloat16().requires_grad_()
    found, _ = head.token_logprobs(coarse, weight.bfloat16(), targets, 1.0)
    (grad,) = torch.autograd.grad(found.sum(), coarse)
    assert found.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact, atol=0.06, rtol=0.02)
    torch.testing.assert_close(grad.float(), slope, atol=0.06, rtol=0.02)


def confident(probability: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States along their tokens' rows of the head, so long that each token has about `probability`."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, 64, generator=generator).to(dtype).double()
    targets = torch.arange(12)
    rows = weight[targets] / weight[targets].norm(dim=-1, keepdim=True)
    low, high = torch.zeros(12, 1, dtype=torch.float64), torch.full((12, 1), 64.0, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        found = torch.softmax(middle * rows @ weight.t(), -1).gather(-1, targets[:, None])
        low, high = torch.where(found < probability, middle, low), torch.where(found < probability, high, middle)
    return (low * rows).to(dtype), weight.to(dtype), targets


@pytest.mark.parametrize("probability", [0.5, 0.99, 0.9999])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradient_of_confident_tokens(probability: float, dtype: torch.dtype, limit: float, temperature: float) -> None:
    """Against float64 of the same numbers, relative to the gradient's own size, however small that is."""
    states, weight, targets = confident(probability, dtype)
    exact = (temperature * states.double()).requires_grad_()
    all_of_them = torch.log_softmax(exact @ weight.double().t() / temperature, -1)
    wanted = all_of_them.gather(-1, targets[:, None]).squeeze(-1)
    assert wanted.exp().mean().item() == pytest.approx(probability, abs=1e-3)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    coarse = (temperature * states).requires_grad_()
    found, _ = head.token_logprobs(coarse, weight, targets, temperature)
    (grad,) = torch.autograd.grad(found.sum(), coarse)
    error = (grad.double() - slope).norm(dim=-1) / slope.norm(dim=-1)
    assert error.median() < limit


def test_extreme_logits_stay_finite() -> None:
    states, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[-1e4], [1e4]])
    logprobs, entropy = head.token_logprobs(states, weight, torch.tensor([0]), 1.0)
    assert logprobs.item() == -2e4 and entropy.item() == 0
    assert torch.isfinite(torch.autograd.grad(logprobs.sum(), states)[0]).all()


def test_large_vocabularies_take_fewer_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [head.chunk_tokens(vocab) for vocab in (49_152, 131_072, 131_073, 262_144)] == [256, 256, 128, 128]
    generator = torch.Generator().manual_seed(2)
    states, weight = torch.randn(9, 4, generator=generator), torch.randn(5, 4, generator=generator)
    targets = torch.arange(9) % 5
    whole = head.token_logprobs(states, weight, targets, 1.0)
    monkeypatch.setattr(head, "LARGE", 4)
    monkeypatch.setattr(head, "CHUNK_TOKENS", 4)
    for found, expected in zip(head.token_logprobs(states, weight, targets, 1.0), whole, strict=True):
        torch.testing.assert_close(found, expected)
