"""Our own CPU kernels against torch's operations, their slow twin: values, gradients, ragged sizes, threads."""

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forks import forked
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from perlhf.kernels import cpu, modules
from perlhf.kernels.attention import tree_attention
from perlhf.kernels.attention.sight import FULL, Sight
from perlhf.kernels.attention.tree_attention import Tree
from perlhf.kernels.elementwise import rms_norm, rotated, silu_product
from perlhf.kernels.kv_cache import KeyValueCache
from perlhf.method.packing import lay_out

# Not skipped where a compiler fails: then every run would go without the kernels and nobody would notice.
pytestmark = pytest.mark.skipif(cpu.compiler()[0] is None, reason=f"kernels are {cpu.compiler()[1]}")
DTYPES = [torch.float32, torch.bfloat16]


def near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """To float32's accuracy, or to what rounding inputs and outputs to bfloat16 leaves."""
    bound = 2e-6 if dtype == torch.float32 else 0.012
    assert (found.float() - exact.float()).norm() <= bound * exact.float().norm().clamp_min(1.0)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 40), (5, 1, 7), (2, 1, 128)])
def test_attention(heads: int, kv_heads: int, width: int, dtype: torch.dtype, threads: int) -> None:
    """Nodes longer than a piece and shorter than a vector, paths of several spans, any width."""
    trunk = [*range(1, 151)]
    layout = lay_out(
        [[*trunk, 200], [*trunk[:40], *range(300, 320)], [*trunk[:40], *range(300, 310), 1, 2], [9]], "tree"
    )
    assert layout.nodes is not None
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(n, layout.tokens, width, generator=generator).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]
    weight = torch.randn(heads, layout.tokens, width, generator=generator).to(dtype)
    found, exact = [], []
    for results, choose in (found, lambda t: t), (exact, lambda t: t.detach().float().requires_grad_()):
        own = [choose(tensor) for tensor in tensors]
        if results is exact:
            with cpu.off():
                out = tree_attention.tree_attention(own[0], own[1], own[2], Tree(layout.nodes), 0.2)
                results += [out, *torch.autograd.grad((out * weight.float()).sum(), own)]
        else:
            out = tree_attention.tree_attention(own[0], own[1], own[2], Tree(layout.nodes), 0.2)
            results += [out, *torch.autograd.grad(out, own, weight)]
    for ours, wanted in zip(found, exact, strict=True):
        near(ours, wanted, dtype)


def test_attention_repeats_bit_for_bit() -> None:
    layout = lay_out([[*range(400)], [*range(100), *range(500, 800)]], "tree")
    assert layout.nodes is not None
    query, key, value = (torch.randn(n, layout.tokens, 64).bfloat16().requires_grad_() for n in (9, 3, 3))
    runs = []
    for _ in range(4):
        out = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), 0.125)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_what_is_not_a_number_stays_so() -> None:
    """A run that diverges has to be seen (`DivergenceError`)."""
    layout = lay_out([[1, 2, 3]], "tree")
    assert layout.nodes is not None
    query, key, value = (torch.randn(1, 3, 8) for _ in range(3))
    key[0, 1] = math.nan
    out = tree_attention.tree_attention(query, key, value, Tree(layout.nodes), 1.0)
    assert out.isfinite().all(-1).tolist() == [[True, False, False]]
    for dtype in DTYPES:
        x = torch.tensor([[1.0, math.nan, 2.0, math.inf]], dtype=dtype)
        norm = modules.RmsNorm(nn.Parameter(torch.ones(4, dtype=dtype)), 1e-5)
        assert norm(x).isnan().all()
        gated = modules.GatedMlp(nn.Identity(), nn.Identity(), nn.Identity())
        assert gated(x).isfinite().tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("largest", [1.0, 60.0, 3000.0])
def test_large_logits(largest: float) -> None:
    """Softmaxes of one winner, whose other weights are smaller than any number."""
    layout = lay_out([[*range(70)]], "tree")
    assert layout.nodes is not None
    query, key, value = (torch.randn(2, 70, 16) for _ in range(3))
    found = tree_attention.tree_attention(query * largest, key, value, Tree(layout.nodes), 1.0)
    with cpu.off():
        exact = tree_attention.tree_attention(query * largest, key, value, Tree(layout.nodes), 1.0)
    torch.testing.assert_close(found, exact, atol=2e-4 if largest > 100 else 2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sight", [FULL, Sight(window=1), Sight(window=40), Sight(chunk=50)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 40), (5, 1, 7)])
def test_sampled_tokens(heads: int, kv_heads: int, width: int, dtype: torch.dtype, sight: Sight) -> None:
    """Prompts of one token to many, rows that finish, more rows than lanes, buffers that grow."""
    lengths, samples = [1, 30, 130], 20
    starts = [0, 1, 31]
    generator = torch.Generator().manual_seed(0)
    prompt_keys, prompt_values = torch.randn(2, kv_heads, sum(lengths), width, generator=generator).to(dtype)
    steps = [torch.randn(3, len(lengths) * samples, heads, width, generator=generator).to(dtype) for _ in range(70)]
    rows = torch.tensor([i for i in range(len(lengths) * samples) if i % 7 and not 20 <= i < 40])
    outputs: list[list[Tensor]] = []
    for native_too in (True, False):
        with cpu.sampling() if native_too else cpu.off():
            places = [range(start, start + n) for start, n in zip(starts, lengths, strict=True)]
            cache = KeyValueCache(places, torch.device("cpu"), {0: sight})
            cache.record(0, prompt_keys, prompt_values)
            cache.fork(samples)
            kept = torch.arange(len(lengths) * samples)
            found = []
            for time, step in enumerate(steps):
                if time == 40:
                    kept = rows
                    cache.keep(rows)
                query, key, value = step[:, kept, :, None]
                found.append(cache.attend(0, query, key[:, :kv_heads], value[:, :kv_heads], 0.3))
                cache.advance()
            outputs.append(found)
    for ours, wanted in zip(*outputs, strict=True):
        near(ours, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 70), width=st.integers(1, 700))
def test_norms_and_gated_products(dtype: torch.dtype, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    x, up, grad = (torch.randn(rows, width, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    weight = torch.rand(width, generator=generator).to(dtype)
    results = []
    for exact in (False, True):
        own = [t.detach().float().requires_grad_() if exact else t for t in (x, up)]
        with cpu.off() if exact else cpu.sampling():
            normed = rms_norm(own[0], weight.float() if exact else weight, 1e-5)
            gated = silu_product(*own)
            grads = [torch.autograd.grad(out, own, grad.to(out.dtype), allow_unused=True) for out in (normed, gated)]
        results.append([normed, gated, grads[0][0], *grads[1]])
    for ours, wanted in zip(*results, strict=True):
        near(ours, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "time", "heads", "width"), [(1, 70, 3, 64), (5, 1, 2, 6), (2, 3, 1, 40)])
def test_rotary_positions(batch: int, time: int, heads: int, width: int, dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, batch, time, heads, width).to(dtype)
    cos, sin = torch.randn(2, 1, time, width).to(dtype)
    results = []
    for exact in (False, True):
        own, turn, slope, above = (t.float() if exact else t for t in (x, cos, sin, grad))
        own = own.clone().requires_grad_()
        with cpu.off() if exact else cpu.sampling():
            out = rotated(own, turn, slope)
            results.append([out, *torch.autograd.grad(out, own, above)])
    for ours, wanted in zip(*results, strict=True):
        near(ours, wanted, dtype)


def test_a_gated_product_by_hand() -> None:
    # silu(ln 3) = ln 3 * 3/4; its slope = 3/4 (1 + ln 3 (1 - 3/4)).
    gate, up = torch.tensor([math.log(3.0)], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    out = silu_product(gate, up)
    assert isinstance(out, Tensor) and out.item() == pytest.approx(2 * math.log(3) * 0.75)
    by_gate, by_up = torch.autograd.grad(out, (gate, up))
    assert by_up.item() == pytest.approx(math.log(3) * 0.75)
    assert by_gate.item() == pytest.approx(2 * 0.75 * (1 + math.log(3) * 0.25))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 33, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (576, 192), (1536, 576)])
def test_linear_layers_of_few_rows(rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((rows, 1, inputs), (outputs, inputs), (16, inputs), (outputs, 16))
    )
    with cpu.sampling():
        if not cpu.few_rows(x, weight):
            pytest.skip("this processor has neither AMX nor AVX-512 for bfloat16")
        near(cpu.linear(x, weight), F.linear(x.float(), weight.float()), torch.bfloat16)
        found = cpu.linear(x, weight, cpu.padded(a, b))
        mask = torch.rand(rows, 32, generator=generator)
        masked = cpu.linear(x, weight, cpu.padded(a, b), mask)
    whole, low = F.linear(x.float(), weight.float()), F.linear(x, a).float()
    near(found, whole + F.linear(low, b.float()), torch.bfloat16)
    near(masked, whole + F.linear(low * mask[:, None, :16], b.float()), torch.bfloat16)
    a[3] = torch.inf
    with cpu.sampling():
        mask[:, 3] = 0
        assert cpu.linear(x, weight, cpu.padded(a, b), mask).isfinite().all(), "what is masked may be anything"


def four_bits(outputs: int, inputs: int) -> tuple[cpu.FourBits, Tensor]:
    """A random weight of 4 bits, and what it is worked out to."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 16, (outputs, inputs), generator=generator).to(torch.uint8)
    table, scales = torch.linspace(-1, 1, 16), torch.rand(outputs * inputs // 64, generator=generator)
    packed = (places[:, ::2] << 4) | places[:, 1::2]
    weight = (table[places.long()].reshape(-1, 64) * scales[:, None]).reshape(outputs, inputs)
    return cpu.FourBits(packed.contiguous(), scales, table, inputs, outputs), weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 7, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 1), (128, 30), (576, 192)])
def test_linear_layers_of_few_rows_and_four_bits(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, threads: int
) -> None:
    kept, weight = four_bits(outputs, inputs)
    x = torch.randn(rows, 1, inputs).to(dtype)
    with cpu.sampling():
        assert cpu.few_rows_4bit(x, kept)
        near(cpu.linear_4bit(x, kept), F.linear(x.float(), weight.to(dtype).float()), dtype)


def test_four_bits_by_hand() -> None:
    """Of 64 places, 0x0F is 0 and then 15: -1 and 1 by turns, times the scale 3; x has 1 first and 2 second."""
    kept = cpu.FourBits(
        torch.full((1, 32), 0x0F, dtype=torch.uint8), torch.tensor([3.0]), torch.linspace(-1, 1, 16), 64, 1
    )
    x = torch.zeros(1, 64)
    x[0, :2] = torch.tensor([1.0, 2.0])
    with cpu.sampling():
        assert cpu.linear_4bit(x, kept).tolist() == [[3.0]]


def test_what_the_kernel_of_four_bits_leaves_to_the_layer() -> None:
    kept, _ = four_bits(2, 128)
    x = torch.zeros(1, 128)
    assert not cpu.few_rows_4bit(x, kept)  # what learns has the same bits with and without a graph
    with cpu.sampling():
        assert cpu.few_rows_4bit(x, kept)
        assert not cpu.few_rows_4bit(torch.zeros(cpu.FEW_ROWS + 1, 128), kept)
        assert not cpu.few_rows_4bit(x.double(), kept)
        with cpu.off():
            assert not cpu.few_rows_4bit(x, kept)
    with cpu.sampling():
        assert not cpu.few_rows_4bit(torch.zeros(1, 96), cpu.FourBits(kept.packed, kept.scales, kept.table, 96, 2))


def test_what_the_kernel_of_few_rows_leaves_to_torch() -> None:
    x, weight = torch.zeros(4, 64).bfloat16(), torch.zeros(64, 64).bfloat16()
    assert not cpu.few_rows(x, weight), "a pass that learns has the same bits as one that doesn't"
    with cpu.sampling():
        for odd in (torch.zeros(65, 64), torch.zeros(4, 64).float()):
            assert not cpu.few_rows(odd, weight)
        assert not cpu.few_rows(torch.zeros(4, 40).bfloat16(), torch.zeros(64, 40).bfloat16())
        assert not cpu.few_rows(x, weight.t().contiguous()[:, :32].t())


def test_state_and_the_switch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cpu.state().startswith("compiled")
    with cpu.off():
        assert cpu.library() is None
    for variable, value, why in (
        ("PERLHF_KERNELS", "off", "off ($PERLHF_KERNELS)"),
        ("PATH", str(tmp_path), "off (no C"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            library, state = cpu._load.__wrapped__()
            assert library is None and state.startswith(why)


def test_compilers_that_fail_leave_torch_and_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "cache"))
    library, why = cpu._load.__wrapped__()
    assert library is None and "could not compile" in why
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_library_that_asks_for_other_threads_than_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler's thread library is one that torch hasn't loaded: the kernels run on one thread."""
    real = cpu._compiled

    def refuse(compiler: str, threads: str) -> Path:
        if threads == "-fopenmp":
            raise OSError("undefined symbol")
        return real(compiler, threads)

    monkeypatch.setattr(cpu, "_compiled", refuse)
    library, why = cpu._load.__wrapped__()
    assert library is not None and why == "compiled for one thread"
    x, weight, inverse = torch.tensor([[3.0, 4.0]]), torch.ones(2), torch.zeros(1)
    out, pointers = torch.empty(1, 2), ctypes.c_void_p
    sizes = ctypes.c_int64(1), ctypes.c_int64(2), ctypes.c_float(0), ctypes.c_int(4)
    library.norm_float32(*(pointers(t.data_ptr()) for t in (x, weight, out, inverse)), *sizes)
    assert out.flatten().tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5])


SOURCE = '#include <cstdint>\nextern "C" int64_t answer() { return 42; }\n'


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a source that is compiled in no time."""
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(cpu, "SOURCES", tmp_path / "cpp")
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def built() -> Path:
    path, _ = cpu.compiler()
    assert path is not None
    return cpu._compiled(path, "-fopenmp-simd")


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def truncated(library: Path) -> None:
    os.truncate(library, 4096)


def changed(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def linked(library: Path) -> None:
    elsewhere = library.parents[1] / "other.so"
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


def writable(library: Path) -> None:
    library.chmod(0o777)


@pytest.mark.parametrize("damage", [truncated, changed, linked, writable], ids=lambda damage: damage.__name__)
def test_a_library_that_is_not_whole_and_our_own_is_compiled_anew(cache: Path, damage: Callable[[Path], None]) -> None:
    """A truncated one ended the process by SIGBUS, at each start; others would run what somebody else wrote."""
    library = built()
    before, made = library.read_bytes(), library.stat().st_mtime_ns
    assert built() == library and library.stat().st_mtime_ns == made, "one that is whole is kept"
    damage(library)
    again = built()
    assert again == library and not library.is_symlink() and library.read_bytes() == before
    assert library.stat().st_mode & 0o777 == 0o755 and answer(library) == 42
    assert [entry.name for entry in library.parent.iterdir()] == [library.name], "nothing is left of the compilation"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_library_or_a_directory_of_somebody_else_is_not_used(cache: Path) -> None:
    library = built()
    os.chown(library, 12345, 12345)
    assert built() == library and library.stat().st_uid == 0
    os.chown(library.parent, 12345, 12345)
    elsewhere = built()
    assert elsewhere.parent == cache / "kernels-0" and elsewhere.parent.stat().st_mode & 0o777 == 0o700


def test_a_linked_directory_is_not_used_and_one_that_others_may_write_is_closed(cache: Path) -> None:
    cache.mkdir()
    (cache / "theirs").mkdir()
    (cache / "kernels").symlink_to("theirs")
    assert built().parent == cache / f"kernels-{os.geteuid()}" and not any((cache / "theirs").iterdir())
    (cache / "kernels").unlink()
    (cache / "kernels").mkdir()
    (cache / "kernels").chmod(0o777)
    assert built().parent == cache / "kernels" and (cache / "kernels").stat().st_mode & 0o777 == 0o700


def test_what_a_killed_compilation_left_goes_with_the_next(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed() -> None:
        monkeypatch.setattr(cpu.subprocess, "run", lambda *_, **__: os._exit(9))
        monkeypatch.setattr(cpu, "_version", lambda _: "any")
        built()

    os.waitpid(forked(killed), 0)
    assert [entry.name[:5] for entry in (cache / "kernels").iterdir()] == [".tmp-"]
    assert list((cache / "kernels").iterdir()) != [built()] and len(list((cache / "kernels").iterdir())) == 1
