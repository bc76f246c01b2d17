"""The same checks on a real GPU: ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

import dorafx.ops  # noqa: F401
from dorafx.ops import norm, reference
from dorafx.ops.quantized import Packed, dequantize_rows
from dorafx.ops.triton import configs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(1, 1, 1), (5, 123, 3), (130, 257, 17), (4096, 4096, 16), (1000, 3000, 384), (8192, 1024, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_row_norm(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    d_out, d_in, rank = shape
    generator = torch.Generator().manual_seed(0)
    weight, left, right = (
        torch.randn(s, generator=generator).to(dtype).cuda() for s in ((d_out, d_in), (d_out, rank), (rank, d_in))
    )
    exact = reference.row_norm(weight.double(), left.double(), right.double(), 0.1)
    for w in (weight, weight.t().contiguous().t()):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        got = torch.ops.dorafx.row_norm(w, left, right, 0.1)
        transient = torch.cuda.max_memory_allocated() - before
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-6)
        assert transient <= max(d_out * d_in * weight.element_size() // 8, 1 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_row_norms_in_one_launch(dtype: torch.dtype) -> None:
    """Three equal norms with few rows, so that d_in is divided, and one of another shape; sums that do not change between runs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 8192, 16), (64, 8192, 16), (130, 257, 17), (64, 8192, 16)]
    made = [
        [torch.randn(s, generator=generator).to(dtype).cuda() for s in ((o, i), (o, r), (r, i))] for o, i, r in shapes
    ]
    lists = [list(column) for column in zip(*made)]
    scales = [0.1, 0.1, 0.7, 0.1]
    if dtype != torch.float64:
        processors = configs.multiprocessors(torch.device("cuda", torch.cuda.current_device()))
        assert configs.splits(3, 64, processors) > 1
    found = torch.ops.dorafx.row_norms(*lists, scales, "auto", [])
    again = torch.ops.dorafx.row_norms(*lists, scales, "auto", [])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for n, same, operands, scale in zip(found, again, made, scales, strict=True):
        exact = reference.row_norm(*(t.double() for t in operands), scale)
        torch.testing.assert_close(n.double(), exact, rtol=tolerance, atol=1e-6)
        assert torch.equal(n, same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_norms_of_a_batch(dtype: torch.dtype) -> None:
    """Of more experts than a launch has place for, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 300, 500), (20, 300, 16), (20, 16, 500))
    tensors = [torch.randn(s, generator=generator).to(dtype).cuda().requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    found = torch.ops.dorafx.row_norm_batched(*tensors, 0.1)
    wanted = torch.linalg.vector_norm(exact[0] + 0.1 * exact[1] @ exact[2], dim=2)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=1e-6)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-4}.get(dtype, 1e-2)
    for got, right in zip(torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(wanted.sum(), exact)):
        torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


def test_a_group_is_one_launch() -> None:
    operands = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((4096, 512), (4096, 8), (8, 512))]
    lists = [[t.clone() for _ in range(3)] for t in operands]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.ops.dorafx.row_norms(*lists, [0.5] * 3, "auto", [])
    assert [e.name for e in profile.events() if "row_norm" in e.name] == ["row_norm_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_kept_squares(dtype: torch.dtype) -> None:
    """The factored form with ``‖W‖²`` given, on a device; of a wide factor on a narrow weight, too."""
    generator = torch.Generator().manual_seed(0)
    for factors in {dtype, torch.float64}:
        weight = torch.randn(300, 500, generator=generator).to(dtype).cuda()
        left, right = (torch.randn(s, generator=generator).to(factors).cuda() for s in ((300, 9), (9, 500)))
        squares = norm.row_squares(weight, norm.compute_dtype(weight, left, right))
        (n,) = torch.ops.dorafx.row_norms([weight], [left], [right], [0.7], "factored", [squares])
        exact = reference.row_norm(weight.double(), left.double(), right.double(), 0.7)
        tolerance = 1e-12 if torch.float64 in (dtype, factors) else 2e-5
        torch.testing.assert_close(n.double(), exact, rtol=tolerance, atol=1e-6)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator).cuda().requires_grad_() for s in ((70, 90), (70, 9), (9, 90))]
    torch.ops.dorafx.row_norm(*leaves, 0.7).sin().sum().backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (exact[0] + 0.7 * exact[1] @ exact[2]).norm(dim=1).sin().sum().backward()
    for leaf, wanted in zip(leaves, exact):
        assert leaf.grad is not None and wanted.grad is not None
        torch.testing.assert_close(leaf.grad.double(), wanted.grad, rtol=1e-3, atol=1e-4)


LEADS = [(1,), (7,), (2, 123), (3, 5, 17), (4096,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("d", [1, 33, 123, 1024, 5000])
@pytest.mark.parametrize("lead", LEADS)
def test_composition(lead: tuple[int, ...], d: int, dtype: torch.dtype) -> None:
    """Values and gradients of both forms in any layout; sums over tokens that do not change between runs."""
    generator = torch.Generator().manual_seed(0)
    base, lora, result, upstream = (torch.randn(*lead, d, generator=generator).to(dtype).cuda() for _ in range(4))
    g, bias = (torch.rand(d, generator=generator) + 0.5).cuda(), torch.randn(d, generator=generator).to(dtype).cuda()
    g = g.double() if dtype == torch.float64 else g
    if len(lead) > 1:
        base = base.transpose(0, 1).contiguous().transpose(0, 1)
    one_rounding = 0.51 * torch.finfo(dtype).eps
    for form in ("direct", "delta"):
        operands = (result, base, lora, g) if form == "delta" else (base, lora, g, bias)
        leaves = [t.detach().requires_grad_() for t in operands]
        wide = [t.detach().double().requires_grad_() for t in operands]
        if form == "delta":
            y, exact = torch.ops.dorafx.compose_delta(*leaves, 1.3, dtype), reference.compose_delta(*wide, 1.3)
        else:
            y, exact = torch.ops.dorafx.compose(*leaves, 1.3, dtype), reference.compose(*wide, 1.3)
        assert ((y.double() - exact).abs() <= one_rounding * exact.abs() + 4e-6).all()
        found = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(y, leaves, upstream)))
        for got, wanted in zip(found, torch.autograd.grad(exact, wide, upstream.double())):
            tolerance = (4 if got.dim() == 1 else 1) * torch.finfo(dtype).eps
            assert ((got.double() - wanted).abs() <= tolerance * wanted.abs().max() + 1e-5).all()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_composition_is_one_launch_each_way(trained: bool) -> None:
    """Where g is trained, a second one adds the blocks' sums over tokens, in a fixed order."""
    base, lora = (torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    g = torch.rand(1024, device="cuda", requires_grad=trained)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = torch.ops.dorafx.compose(base, lora, g, None, 1.3, torch.bfloat16)
        y.backward(torch.ones_like(y))
    names = [e.name for e in profile.events() if "compose" in e.name or "add_parts" in e.name]
    added = ["add_parts_kernel"] if trained else []
    assert sorted(names) == [*added, "compose_backward_kernel", "compose_kernel"]


def test_composition_past_2_31_elements() -> None:
    """4 GiB a tensor: more elements than 31 bits count."""
    tokens, d = 2**31 // 4096 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    base = torch.ones(tokens, d, device="cuda", dtype=torch.bfloat16)
    lora = torch.full_like(base, 2)
    lora[-1] = 3
    g = torch.full((d,), 0.5, device="cuda")
    y = torch.ops.dorafx.compose(base, lora, g, None, 1.0, torch.bfloat16)
    assert (y[:-1] == 1.5).all()
    assert (y[-1] == 2).all()
    upstream = torch.zeros_like(y)
    upstream[-1] = 2
    leaves = [t.requires_grad_() for t in (base, lora, g)]
    del y
    y = torch.ops.dorafx.compose(*leaves, None, 1.0, torch.bfloat16)
    d_base, d_lora, d_g = torch.autograd.grad(y, leaves, upstream)
    for gradient in (d_base, d_lora):
        assert (gradient[-1] == 1).all()
        assert not gradient[:-1].any()
    assert (d_g == 8).all()  # the last token's sum, 4, times 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4096, 4096, 16), (7, 33, 65, 3), (300, 1000, 3000, 64), (4096, 4096, 4096, 384)])
def test_linear(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, d_out, d_in, rank = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, d_in), (d_out, d_in), (tokens, rank), (d_out, rank))
    leaves = [(torch.randn(s, generator=generator) / 8).to(dtype).cuda().requires_grad_() for s in sizes]
    leaves.append((torch.rand(d_out, generator=generator) + 0.5).cuda().requires_grad_())
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = torch.ops.dorafx.dora_linear(*leaves, None, 0.7, dtype)
    exact = wide[4] * (wide[0] @ wide[1].mT + 0.7 * wide[2] @ wide[3].mT)
    assert (y.double() - exact).norm() <= torch.finfo(dtype).eps * 4 * exact.norm()
    upstream = torch.randn(tokens, d_out, generator=generator).to(dtype).cuda()
    for got, wanted in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(exact, wide, upstream.double())
    ):
        assert (got.double() - wanted).norm() <= max(torch.finfo(dtype).eps * 8, 1e-3) * wanted.norm()


@pytest.mark.parametrize("compose", ["auto", "triton", "triton_linear"])
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_peft_model(codegen: str, compose: str) -> None:
    pytest.importorskip("peft")
    from integration_support import assert_same_run, peft_perceptron, run

    import dorafx

    dorafx.rewrite_log().clear()
    model = peft_perceptron().cuda().train()
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(6)).cuda()
    expected = run(model, lambda: model(x))
    options = {"dorafx.codegen": codegen, "dorafx.compose": compose, "dorafx.strict": True}
    compiled = torch.compile(model, backend="dorafx", options=options)
    assert_same_run(run(model, lambda: compiled(x)), expected, 1e-4)
    said = {"triton": "composed by a Triton kernel", "triton_linear": "the whole layer is one Triton kernel"}.get(
        compose, ""
    )
    assert {r.decision for r in dorafx.rewrite_log().rewrites} == {said}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [4, 32, 200])
@pytest.mark.parametrize("format", ["nf4", "fp4", "bnb8", "affine"])
def test_row_norm_of_a_quantized_weight(format: str, rank: int, dtype: torch.dtype) -> None:
    d_out, d_in, group = 1000, 2048, 2048 if format == "bnb8" else 64
    generator = torch.Generator().manual_seed(0)
    four_bits = format in ("nf4", "fp4")
    codes = torch.randint(
        0 if four_bits else -128, 256 if four_bits else 128, (d_out, d_in // (1 + four_bits)), generator=generator
    )
    scales = torch.rand(d_out, d_in // group, generator=generator)
    weight = Packed(
        codes.to(torch.uint8 if four_bits else torch.int8).cuda(),
        (scales.to(dtype) if format == "affine" else scales).cuda(),
        None,
        format,
        (d_out, d_in),
        group,
        torch.float32 if format == "bnb8" else dtype,
    )
    left, right = (torch.randn(s, generator=generator).to(dtype).cuda() for s in ((d_out, rank), (rank, d_in)))
    exact = reference.row_norm(dequantize_rows(weight, 0, d_out).double(), left.double(), right.double(), 0.3)
    got = torch.ops.dorafx.row_norm_quantized(
        weight.packed, weight.scales, None, left, right, 0.3, format, [d_out, d_in], group, weight.dtype
    )
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=1e-5)
