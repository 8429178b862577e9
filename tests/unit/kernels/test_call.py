"""What a pass carries: read inside it alone, by thread, and remembered by a backward; turns of a network."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from perlhf.kernels import cpu
from perlhf.kernels.call import Call, Turns, calling, current_call
from perlhf.kernels.elementwise import rotated
from perlhf.kernels.modules import GatedMlp, RmsNorm

WAIT_SECONDS = 30.0


class TestCalling:
    def test_is_undone_also_after_an_error(self) -> None:
        before = current_call()
        with pytest.raises(ValueError), calling(Call(adapters=("policy",))):
            assert current_call().adapters == ("policy",)
            with calling(Call(dropout=True)):
                assert current_call() == Call(dropout=True)
            assert current_call().adapters == ("policy",)
            raise ValueError
        assert current_call() == before == Call()

    def test_other_threads_do_not_see_it(self) -> None:
        with calling(Call(adapters=("policy",))), ThreadPoolExecutor(1) as pool:
            assert pool.submit(current_call).result() == Call()

    def test_switches_change_nothing_else(self) -> None:
        with calling(Call(adapters=("policy",), dropout=True)), cpu.off(), cpu.sampling():
            assert current_call() == Call(("policy",), dropout=True, sampling=True, own_kernels=False)
            assert cpu.library() is None
        assert current_call() == Call()


@pytest.mark.skipif(cpu.compiler()[0] is None, reason=f"kernels are {cpu.compiler()[1]}")
@pytest.mark.parametrize("layer", ["norm", "gated", "rotated"])
def test_a_backward_does_as_its_forward_did(layer: str) -> None:
    """Whatever holds where the backward runs: the same bits as side by side, which differ between the two ways."""
    norm = RmsNorm(nn.Parameter(torch.rand(64), requires_grad=False), 1e-5)
    gated = GatedMlp(nn.Identity(), nn.Identity(), nn.Identity())
    cos, sin = torch.randn(2, 1, 9, 64)

    def out(x: Tensor) -> Tensor:
        return norm(x) if layer == "norm" else gated(x) if layer == "gated" else rotated(x, cos, sin)

    x, grad = torch.randn(1, 9, 64), torch.randn(1, 9, 64)
    if layer == "rotated":
        x, grad = torch.randn(2, 1, 9, 3, 64)

    def gradient(own_forward: bool, own_backward: bool) -> Tensor:
        own = x.clone().requires_grad_()
        with calling(Call(own_kernels=own_forward)):
            result = out(own)
        with calling(Call(own_kernels=own_backward)):
            return torch.autograd.grad(result, own, grad)[0]

    for own in (True, False):
        assert torch.equal(gradient(own, not own), gradient(own, own))


class TestTurns:
    def test_passes_run_beside_each_other(self) -> None:
        turns, both = Turns(), threading.Barrier(2)

        def pass_through() -> None:
            with turns.shared():
                both.wait(WAIT_SECONDS)

        with ThreadPoolExecutor(2) as pool:
            for task in [pool.submit(pass_through) for _ in range(2)]:
                task.result()

    @pytest.mark.parametrize("alone_first", [True, False])
    def test_who_is_alone_meets_nobody(self, alone_first: bool) -> None:
        turns, inside, may_leave = Turns(), threading.Event(), threading.Event()
        order: list[str] = []

        def first() -> None:
            with turns.alone() if alone_first else turns.shared():
                inside.set()
                may_leave.wait(WAIT_SECONDS)
                order.append("first")

        def second() -> None:
            with turns.shared() if alone_first else turns.alone():
                order.append("second")

        with ThreadPoolExecutor(2) as pool:
            tasks = [pool.submit(first)]
            assert inside.wait(WAIT_SECONDS)
            tasks.append(pool.submit(second))
            assert not order
            may_leave.set()
            for task in tasks:
                task.result()
        assert order == ["first", "second"]

    def test_an_error_lets_go(self) -> None:
        turns = Turns()
        for turn in (turns.shared, turns.alone):
            with pytest.raises(ValueError), turn():
                raise ValueError
        with turns.alone():
            pass
        with turns.shared():
            pass
