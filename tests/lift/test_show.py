"""What every transfer function makes of its operators, as it is printed: a line each. And the notation itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import LINEAR, Layer
from same_results import graph_of, operand, show_of
from torch import fx, nn
from transfer_functions import wrap

from dorafx.lift import Atom, Expr, Lifter, MatrixValue, Notation, Poly, VectorValue, show
from dorafx.lift.algebra import ONES
from dorafx.lift.lifter import Transfer, transfers

# (the operator's name in the table, a program of operands by name, the term of its result, the tracer if it is not Dynamo).
# fmt: off
LINES: list[tuple[Any, ...]] = [
    # -- arithmetic
    ("add", lambda W, V: W + V, "W + V"),
    ("add", lambda W, V: W.add(V, alpha=-0.5), "W − 0.5·V"),
    ("add", lambda x, W, b: F.linear(x, W) + b, "x·Wᵀ + 𝟙·D(b)"),
    ("add", lambda m, b: m + 2 + b, "m + b + 2"),
    ("add", lambda m, c: m[:, None] + c, "add(m, c)"),
    ("add", lambda W, s: W + s, "add(W, s)"),
    ("add", lambda W, B, A: W + (B @ A)[None], "add(W, B·A)"),
    ("sub", lambda W, V: W - V, "W − V"),
    ("sub", lambda W: W - W, "0 [without W − W]"),
    ("sub", lambda m: 1 - m, "1 − m"),
    ("rsub", lambda m, b: torch.rsub(m, b), "b − m"),
    ("rsub", lambda m, b: torch.rsub(m, b, alpha=2), "rsub(m, b, alpha=2)"),
    ("mul", lambda W: W * W, "(W)²"),
    ("mul", lambda W, V: W * V, "mul(W, V)"),
    ("mul", lambda W, m: W * m[:, None], "D(m)·W"),
    ("mul", lambda W, c: c * W, "W·D(c)"),
    ("mul", lambda W, s: 3 * s * W, "3·s·W"),
    ("mul", lambda m, b: m * b * m, "m²·b"),
    ("mul", lambda m, c: m[:, None] * c, "D(m)·𝟙·D(c)"),
    ("mul", lambda m, b, c: (m + b)[:, None] * c, "mul(m + b, c)"),
    ("mul", lambda W: 0.0 * W, "0 [without 0·W]"),
    ("div", lambda W, m: W / m[:, None], "D(m⁻¹)·W"),
    ("div", lambda m, b: m / b / b, "m·b⁻²"),
    ("div", lambda m, b: m / (m + b), "m·(m + b)⁻¹"),
    ("div", lambda m: m / m, "1 [without m·m⁻¹]"),
    ("div", lambda W, V: W / V, "truediv(W, V)"),
    ("div", lambda m: torch.div(m, 2, rounding_mode="floor"), 'div(m, 2, rounding_mode="floor")'),
    ("addcmul", lambda W, V, m: torch.addcmul(W, V, m[:, None], value=2), "W + 2·D(m)·V"),
    ("addcdiv", lambda m, b: torch.addcdiv(m, b, m, value=0.5), "0.5·b·m⁻¹ + m", "make_fx"),
    ("lerp", lambda m, b, s: torch.lerp(m, b, s), "m − m·s + b·s"),
    ("lerp", lambda W, V, m: torch.lerp(W, V, m[:, None]), "W − D(m)·W + D(m)·V"),
    # -- elementwise
    ("neg", lambda W: -W, "−W"),
    ("neg", lambda m: -m, "−m"),
    ("abs", lambda W: W.abs(), "abs(W)"),
    ("abs", lambda W: W.abs() ** 2, "(W)²"),
    ("reciprocal", lambda m: m.reciprocal(), "m⁻¹"),
    ("reciprocal", lambda m: (m + 1).reciprocal(), "(m + 1)⁻¹"),
    ("reciprocal", lambda W: W.reciprocal(), "reciprocal(W)"),
    ("square", lambda W: W.square(), "(W)²"),
    ("square", lambda m: (m + 1).square(), "2·m + m² + 1"),
    ("pow", lambda W: W**2, "(W)²"),
    ("pow", lambda W: W**3, "pow(W, 3)"),
    ("pow", lambda m: m**-1, "m⁻¹"),
    ("pow", lambda W: (W**2).sum(1) ** 0.5, "‖W‖"),
    ("pow", lambda W: (W**2).sum(1) ** -0.5, "‖W‖⁻¹"),
    ("pow", lambda m: m**0.5, "pow(m, 0.5)"),
    ("sqrt", lambda W: W.square().sum(1).sqrt(), "‖W‖"),
    ("sqrt", lambda W: (W.square().sum(1) + 1e-6).sqrt(), "√(Σ(W)² + 1e-06)"),
    ("sqrt", lambda W: (4 * W.square().sum(0)).sqrt(), "2·‖W‖_col"),
    ("sqrt", lambda m: m.sqrt(), "sqrt(m)"),
    ("rsqrt", lambda W, m: m * W.square().sum(1).rsqrt(), "m·‖W‖⁻¹"),
    ("clamp_min", lambda m: m.clamp_min(1e-12), "max(m, 1e-12)"),
    ("clamp", lambda m: m.clamp(min=0.5), "max(m, 0.5)"),
    ("clamp", lambda m: m.clamp(0.5, 2.0), "clamp(m, 0.5, 2)"),
    ("maximum", lambda m: torch.maximum(m, torch.full_like(m, 0.5)), "maximum(m, 0.5)"),
    ("maximum", lambda m, b: torch.maximum(m, b), "maximum(m, b)"),
    ("full", lambda m: m + torch.full((7,), 0.5), "m + 0.5"),
    ("full", lambda W: W + torch.full((7, 6), 0.5), "W + full([7, 6], 0.5)"),
    ("zeros", lambda m: m + torch.zeros(7), "m"),
    ("ones", lambda m: m + torch.ones(7), "m + 1"),
    ("full_like", lambda m: m * torch.full_like(m, 3.0), "3·m"),
    ("full_like", lambda m: m * torch.full_like(m, 0.1, dtype=torch.bfloat16), "m·full_like(m, 0.1, dtype=bfloat16)"),
    ("zeros_like", lambda m: m + torch.zeros_like(m), "m"),
    ("ones_like", lambda m: m + torch.ones_like(m), "m + 1"),
    ("new_full", lambda m: m + m.new_full((7,), 0.25), "m + 0.25"),
    ("new_zeros", lambda m: m + m.new_zeros(7), "m"),
    ("new_ones", lambda m: m - m.new_ones(7), "m − 1"),
    ("tensor", lambda m: m * torch.tensor(2.0), "2·m"),
    ("tensor", lambda m: m * torch.scalar_tensor(2.0), "2·m", "make_fx"),
    # -- layout
    ("view", lambda xs: xs.view(15, 6), "xs"),
    ("view", lambda x: x.view(5, 2, 3), "x"),
    ("view", lambda W, m: W * m.view(-1, 1), "D(m)·W"),
    ("view", lambda kernel: kernel.flatten(1), "flat(kernel)"),
    ("view", lambda K_B, K_A: (K_B.flatten(1) @ K_A.flatten(1)).view(4, 3, 3, 3), "flat(K_B)·flat(K_A)"),
    ("view", lambda row: row.squeeze(0).view(1, 6), "row"),
    ("view", lambda column: column.view(-1), "column"),
    ("expand", lambda m, W: W * m[:, None].expand(7, 6), "D(m)·W"),
    ("expand", lambda c: c.expand(7, 6), "𝟙·D(c)"),
    ("t", lambda B, A: (B @ A).t(), "Aᵀ·Bᵀ"),
    ("t", lambda m: m.t(), "m"),
    ("transpose", lambda B, A: (B @ A).transpose(0, 1), "Aᵀ·Bᵀ"),
    ("transpose", lambda W: W.transpose(-1, -1), "W"),
    ("transpose", lambda xs: xs.transpose(0, 1), "transpose(xs, 0, 1)"),
    ("transpose", lambda m: m[None, :, None].transpose(0, 1), "m"),
    ("permute", lambda W: W.permute(1, 0), "Wᵀ"),
    ("permute", lambda xs: xs.permute(2, 0, 1), "permute(xs, 2, 0, 1)"),
    ("getattr", lambda W, c: W.T * c[:, None], "D(c)·Wᵀ", "symbolic_trace"),
    ("getattr", lambda W: W.mT @ W, "Wᵀ·W", "symbolic_trace"),
    ("detach", lambda m: m.detach(), "detach(m)"),
    ("detach", lambda B, A: 2 * (B @ A).detach(), "detach(2·B·A)"),
    ("detach", lambda B, A: B @ A.detach(), "B·detach(A)"),
    ("detach", lambda W, B, A: (W + B @ A).detach(), "detach(W + B·A)"),
    ("detach", lambda m: m - m.detach(), "m − detach(m)"),
    ("data", lambda B, A: (B @ A).data, "detach(B·A)"),
    ("cast", lambda W: W.double(), "W"),
    ("cast", lambda W: W.bfloat16().float(), "bfloat16(W)"),
    ("cast", lambda m, b: (m + b).half(), "float16(m + b)"),
    ("cast", lambda B, A: (B @ A).half(), "B·A"),
    ("cast", lambda W: W.to(torch.float8_e4m3fn).float(), "float(to(W, float8_e4m3fn))"),
    ("identity", lambda W: W.clone().contiguous(), "W"),
    ("dropout", lambda x: F.dropout(x, 0.5), "dropout(x, 0.5)"),
    ("dropout", lambda x: F.dropout(x, 0.5, training=False), "x"),
    ("dropout", lambda x: F.dropout(x, 0.5) + F.dropout(x, 0.5), "dropout(x, 0.5) + dropout(x, 0.5)₂"),
    # -- indexing
    ("getitem", lambda W, m: W * m[:, None], "D(m)·W"),
    ("getitem", lambda W: W[...], "W"),
    ("getitem", lambda W: W[1:], "W[1:]"),
    ("getitem", lambda W: W[..., 2], "W[…, 2]"),
    ("getitem", lambda m: m[None, :], "m"),
    ("slice", lambda W: torch.ops.aten.slice.Tensor(W, 0, 0, 7), "W"),
    ("slice", lambda W: torch.ops.aten.slice.Tensor(W, 0, 0, 3), "slice(W, 0, 0, 3)"),
    # -- products
    ("matmul", lambda x, W: x @ W.t(), "x·Wᵀ"),
    ("matmul", lambda xs, W: torch.matmul(xs, W.t()), "xs·Wᵀ"),
    ("matmul", lambda W, token: W @ token, "token·Wᵀ"),
    ("matmul", lambda x, V: (x + x.relu()) @ V.t(), "(x + relu(x))·Vᵀ"),
    ("matmul", lambda x, W, V: x @ (W + V).t(), "x·Wᵀ + x·Vᵀ"),
    ("mv", lambda W, token: torch.mv(W, token), "token·Wᵀ"),
    ("linear", lambda x, W, b: F.linear(x, W, b), "x·Wᵀ + 𝟙·D(b)"),
    ("linear", lambda token, W: F.linear(token, W), "token·Wᵀ"),
    ("linear", lambda x, A, B: F.linear(F.linear(x, A), B), "x·Aᵀ·Bᵀ"),
    ("linear", lambda A, B: F.linear(F.linear(torch.eye(6), A), B).T, "B·A"),
    ("linear", lambda x, W, m: F.linear(x, m[:, None] * W), "x·Wᵀ·D(m)"),
    ("addmm", lambda W, B, A: torch.addmm(W, B, A, beta=0.5, alpha=2), "0.5·W + 2·B·A"),
    ("addmm", lambda b, x, W: torch.addmm(b, x, W.t()), "x·Wᵀ + 𝟙·D(b)"),
    ("outer", lambda m, c: torch.outer(m, c), "D(m)·𝟙·D(c)"),
    ("outer", lambda m, b, c: torch.outer(m + b, c), "outer(m + b, c)"),
    ("embedding", lambda i, table: F.embedding(i, table), "onehot(i)·table"),
    ("embedding", lambda i, E_A, E_B: 2 * F.embedding(i, E_A) @ E_B, "2·onehot(i)·E_A·E_B"),
    ("tensordot", lambda x, W: torch.tensordot(x, W, dims=([1], [1])), "x·Wᵀ"),
    ("tensordot", lambda B, A: torch.tensordot(B, A, dims=1), "B·A"),
    ("tensordot", lambda B, A: torch.tensordot(B, A, dims=0), "tensordot(B, A, dims=0)"),
    ("multi_dot", lambda B, M, A: torch.linalg.multi_dot([B, M, A]), "B·M·A"),
    ("eye", lambda W: W @ torch.eye(6), "W"),
    ("eye", lambda: torch.eye(6), "I"),
    ("eye", lambda: torch.eye(6, 5), "eye(6, 5)"),
    ("diag", lambda B, A, d: B @ torch.diag(d) @ A, "B·D(d)·A"),
    ("diag", lambda d, M: torch.diag(M), "diag(M)"),
    # -- batched
    ("bmm", lambda B, A: torch.bmm(B[None], A[None]), "B·A"),
    ("bmm", lambda xs, W: torch.bmm(xs, W.t().expand(3, 6, 7)), "xs·Wᵀ"),
    ("baddbmm", lambda xs, W, V: torch.baddbmm(F.linear(xs, W), xs, V.t().expand(3, 6, 7), alpha=2), "xs·Wᵀ + 2·xs·Vᵀ"),
    ("stack", lambda W, V: torch.stack([W, V]), "stack([W, V])"),
    ("stack", lambda W, V: torch.stack([W, V]).sum(0), "W + V"),
    ("mean", lambda W, V: torch.stack([W, V]).mean(0), "0.5·W + 0.5·V"),
    ("sum", lambda W, V: torch.stack([W, V]).sum(dim=0), "W + V"),
    # -- norms
    ("norm", lambda W: W.norm(dim=1), "‖W‖"),
    ("norm", lambda W: torch.norm(W, p=2, dim=0, keepdim=True), "‖W‖_col"),
    ("norm", lambda W: W.norm(), "norm(W)"),
    ("norm", lambda W: W.norm(p=1, dim=1), "norm(W, p=1, dim=1)"),
    ("vector_norm", lambda kernel: torch.linalg.vector_norm(kernel, dim=(1, 2, 3)), "‖flat(kernel)‖"),
    ("vector_norm", lambda kernel: torch.linalg.vector_norm(kernel, dim=(2, 3)), "linalg_vector_norm(kernel, dim=[2, 3])"),
    ("norm", lambda x: x.norm(dim=-1), "‖x‖"),
    ("linalg_norm", lambda W, B, A: torch.linalg.norm(W + 2 * B @ A, dim=1), "‖W + 2·B·A‖"),
    ("linalg_norm", lambda W: torch.linalg.norm(W, 2, dim=(0, 1)), "linalg_norm(W, 2, dim=[0, 1])"),
    ("vector_norm", lambda W, m: m / torch.linalg.vector_norm(W, dim=1), "m·‖W‖⁻¹"),
    ("vector_norm", lambda W: torch.linalg.vector_norm(W, 1, dim=1), "linalg_vector_norm(W, 1, dim=1)"),
    ("sum", lambda W: W.square().sum(1), "Σ(W)²"),
    ("sum", lambda W: (W * W).sum(0), "Σ_col(W)²"),
    ("sum", lambda W: W.sum(1), "sum(W, 1)"),
    ("mean", lambda W: W.square().mean(1), "0.166667·Σ(W)²"),
    ("mean", lambda W: W.mean(1), "mean(W, 1)"),
    ("normalize", lambda W: F.normalize(W, dim=1), "D(max(n, 1e-12)⁻¹)·W where n = ‖W‖"),
    ("normalize", lambda W: F.normalize(W, dim=0, eps=1e-6), "W·D(max(n, 1e-06)⁻¹) where n = ‖W‖_col"),
    ("normalize", lambda W: F.normalize(W, p=1), "normalize(W, p=1)"),
    ("weight_norm", lambda W, column: torch._weight_norm(W, column, 0), "D(column·n⁻¹)·W where n = ‖W‖"),
    ("weight_norm_interface", lambda W, column: torch._weight_norm_interface(W, column)[0], "D(column·n⁻¹)·W where n = ‖W‖", "make_fx"),
    # -- einsum
    ("einsum", lambda x, W: torch.einsum("bi,oi->bo", x, W), "x·Wᵀ"),
    ("einsum", lambda B, A: torch.einsum("or,ri->oi", B, A), "B·A"),
    ("einsum", lambda B, d, A: torch.einsum("or,r,ri->oi", B, d, A), "B·D(d)·A"),
    ("einsum", lambda m, c: torch.einsum("o,i->oi", m, c), "D(m)·𝟙·D(c)"),
    ("einsum", lambda W: torch.einsum("oi,oi->o", W, W), "Σ(W)²"),
    ("einsum", lambda W: torch.einsum("oi,oi->i", W, W), "Σ_col(W)²"),
    ("einsum", lambda xs, W: torch.einsum("...i,oi->...o", xs, W), "xs·Wᵀ"),
    ("einsum", lambda W: torch.einsum("ii->i", W @ W.T), 'einsum("ii->i", W·Wᵀ)'),
    # -- squares, in other words
    ("float_power", lambda W: torch.float_power(W, 2).sum(1), "Σ(W)²"),
    ("float_power", lambda m: torch.float_power(m, 2), "float_power(m, 2)"),
    ("diagonal", lambda W: torch.diagonal(W @ W.T), "Σ(W)²"),
    ("diagonal", lambda W: (W.T @ W).diagonal(dim1=-2, dim2=-1), "Σ(Wᵀ)²"),
    ("diagonal", lambda W, V: torch.diagonal(W @ V.T), "diagonal(W·Vᵀ)"),
    ("diagonal", lambda W: torch.diagonal(W @ W.T, 1), "diagonal(W·Wᵀ, 1)"),
    ("diag", lambda W: torch.diag(W @ W.T), "Σ(W)²"),
    # -- blocks of rows and columns
    ("cat", lambda A, B, W: torch.cat([W[:2] + B[:2] @ A, W[2:]]), "W + rows(0:2)·B[:2]·A"),
    ("cat", lambda A, B: torch.cat([B @ A, torch.zeros_like(B)], 1), "B·A·rows(0:6)ᵀ"),
    ("cat", lambda A, B: torch.cat([B, B]) @ A, "cat([B, B])·A"),
    ("pad", lambda A, B: F.pad(B @ A, (0, 0, 1, 2)), "rows(1:8)·B·A"),
    ("pad", lambda A, B: F.pad(B @ A, (0, 1)), "B·A·rows(0:6)ᵀ", "make_fx"),
    ("pad", lambda B, A: F.pad(B, (0, 0, 1, 2)) @ A, 'pad(B, [0, 0, 1, 2], "constant", None)·A'),
    ("pad", lambda A, B: F.pad(B @ A, (0, 1), value=1.0), 'pad(B·A, [0, 1], "constant", 1)'),
    # -- convolutions
    ("conv", lambda image, kernel: F.conv2d(image, kernel), "patches(channels(image))·flat(kernel)ᵀ"),
    ("conv", lambda image, kernel, k: F.conv2d(image, kernel, k, padding=1), "patches(channels(image))·flat(kernel)ᵀ + 𝟙·D(k)"),
    ("conv", lambda image, K_A, K_B: F.conv2d(F.conv2d(image, K_A), K_B), "patches(channels(image))·flat(K_A)ᵀ·flat(K_B)ᵀ"),
    ("convolution", lambda image, kernel: F.conv2d(image, kernel, stride=2), "patches(channels(image))·flat(kernel)ᵀ", "make_fx"),
    # -- rearranged
    ("select", lambda B, A: torch.bmm(B[None], A[None]).select(0, 0), "B·A"),
    ("select", lambda W: W.select(0, 1), "select(W, 0, 1)"),
    ("bmm", lambda B, A: torch.einsum("or,ri->oi", B, A), "B·A", "make_fx"),
    ("mul", lambda m, W: torch.einsum("o,oi->oi", m, W), "D(m)·W", "make_fx"),
    ("permute", lambda B, A: torch.einsum("or,ri->io", B, A), "Aᵀ·Bᵀ", "make_fx"),
    ("view", lambda B, d, A: torch.einsum("or,r,ri->oi", B, d, A), "B·D(d)·A", "make_fx"),
]
# fmt: on
OTHERS = {"dequantize": "reads a tensor of a library that is not always there: test_a_dequantised_weight_is_the_weight"}


@pytest.mark.parametrize("line", [pytest.param(line, id=f"{line[0]}-{i}") for i, line in enumerate(LINES)])
def test_line(line: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    name, program, expected, *tracer = line
    met: list[fx.Node] = []

    def around(transfer: Transfer) -> Transfer:
        def watched(lift: Lifter, node: fx.Node) -> Any:
            met.append(node)
            return transfer(lift, node)

        return watched

    wrap(monkeypatch, name, around)
    assert show_of(program, *tracer) == expected
    assert met, f"the program has no operator that the table calls {name}"


def test_every_transfer_function_has_a_line() -> None:
    assert {line[0] for line in LINES} | set(OTHERS) == set(transfers())
    assert not {line[0] for line in LINES} & set(OTHERS)


def test_a_dequantised_weight_is_the_weight() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(32, 16, bias=False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    given = {"W": linear.weight, "x": torch.randn(5, 32)}
    assert show_of(lambda x, W: F.linear(x, W.dequantize()), **given) == "x·Wᵀ"
    assert show_of(lambda x, W: F.linear(x, W), **given) == "x·Wᵀ"


# -- the notation -----------------------------------------------------------------------------------------------------


def norm(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return (W + 2 * (B @ A)).norm(dim=1)


def lora(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return 2 * F.linear(F.linear(x, A), B)


# fmt: off
WHOLE: dict[str, tuple[Callable[..., Any], str]] = {
    "direct": (
        lambda x, W, A, B, m: m / norm(W, A, B).detach() * (F.linear(x, W) + lora(x, A, B)),
        "x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = detach(‖W + 2·B·A‖)"),
    "differentiable": (
        lambda x, W, A, B, m: m / norm(W, A, B) * (F.linear(x, W) + lora(x, A, B)),
        "x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"),
    "delta form, with a bias": (
        lambda x, W, A, B, m, b: F.linear(x, W) + b + (m / norm(W, A, B) - 1) * F.linear(x, W) + m / norm(W, A, B) * lora(x, A, B),
        "x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) + 𝟙·D(b) where n = ‖W + 2·B·A‖"),
    "dropout": (
        lambda x, W, A, B, m: F.linear(x, W) + m / norm(W, A, B) * lora(F.dropout(x, 0.1), A, B),
        "x·Wᵀ + 2·dropout(x, 0.1)·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"),
    "two norms": (
        lambda x, W, A, B, m: F.linear(x, m[:, None] * W / norm(W, A, B)[:, None] / W.norm(dim=0)),
        "x·D(n₁⁻¹)·Wᵀ·D(m·n₂⁻¹) where n₁ = ‖W‖_col, n₂ = ‖W + 2·B·A‖"),
    "a norm with and without its gradient": (
        lambda x, W, A, B, m: F.linear(x, W) * norm(W, A, B) / norm(W, A, B).detach(),
        "x·Wᵀ·D(n·detach(n)⁻¹) where n = ‖W + 2·B·A‖"),
    "a vector has its norm in it": (lambda W, A, B, m: m / norm(W, A, B) - 1, "m·‖W + 2·B·A‖⁻¹ − 1"),
    "a norm of a norm": (
        lambda W, A, B, m: (m[:, None] * W / W.norm(dim=1, keepdim=True) + B @ A).norm(dim=1),
        "‖D(m·‖W‖⁻¹)·W + B·A‖"),
    "a factor that is detached": (lambda x, A, B: F.linear(F.linear(x, A.detach()), B), "x·detach(A)ᵀ·Bᵀ"),
    "products that are detached": (lambda W, A, B, V: W + V + (B @ A).detach(), "W + V + detach(B·A)"),
    "a number that is a norm's": (lambda x, n: F.linear(x, n / n.norm(dim=1, keepdim=True)), "x·nᵀ·D(norm⁻¹) where norm = ‖n‖"),
    "long operands": (lambda x, W, V: F.linear(torch.softmax(torch.sigmoid(torch.tanh(torch.relu(x * 1.25 + 0.125 * x.sin()) * 1.25) * 1.25), -1), W), "softmax·Wᵀ"),
    "deep operands": (lambda x, W: F.linear(x.sin().cos().sin().cos().sin().cos(), W), "cos_2·Wᵀ"),
    "squares in an operator": (lambda W: torch.tanh(W * W), "tanh((W)²)"),
    "written in place": (lambda x, W, V: F.linear(x, W.detach().clone().mul_(2.0) + V), "x·Vᵀ + x·mul_(clone(W), 2)ᵀ"),
}
# fmt: on


@pytest.mark.parametrize("name", WHOLE)
def test_whole_terms(name: str) -> None:
    program, expected = WHOLE[name]
    given = {"n": operand("W")} if name == "a number that is a norm's" else {}
    assert show_of(program, **given) == expected


def lifted(program: Callable[..., Any], **given: Any) -> tuple[Lifter, fx.Node]:
    gm = graph_of(program, **given)
    (result,) = next(node for node in gm.graph.nodes if node.op == "output").all_input_nodes
    return Lifter(gm.graph).run(), result


def test_all_kinds_of_terms() -> None:
    lift, result = lifted(lambda x, W, A, B, m: m / norm(W, A, B) * F.linear(x, W))
    value = lift.values[result]
    assert isinstance(value, MatrixValue)
    text = "x·Wᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"
    (((_, chain), _),) = value.expr.items
    assert {show(lift, term) for term in (result, value, value.expr, chain, Expr.chain(chain))} == {text}
    assert [show(lift, factor) for factor in chain] == ["x", "Wᵀ", "D(m·n⁻¹) where n = ‖W + 2·B·A‖"]
    (n,) = lift.norms_in(value.expr)
    assert [show(lift, term) for term in (n, Poly.var(n), VectorValue(Poly.var(n), -1))] == ["‖W + 2·B·A‖"] * 3
    assert [show(lift, term) for term in (None, (), Poly(()), Expr(()), Poly.const(-0.5), ONES)] == [
        "unknown", "I", "0", "0", "−0.5", "𝟙",
    ]  # fmt: skip
    assert show(lift, Atom(n.id, True)) == "detach(‖W + 2·B·A‖)"


def test_terms_beside_each_other_share_their_names() -> None:
    lift, result = lifted(lambda x, W, A, B, m: m / norm(W, A, B).detach() * F.linear(x, W))
    (n,) = (Poly.var(atom) for atom in lift.norms_in(lift.values[result].expr))  # type: ignore[union-attr]
    notation = Notation(lift, (result, n))
    assert notation.term(result) == "x·Wᵀ·D(m·n⁻¹)"
    assert notation.norms() == {"n": "detach(‖W + 2·B·A‖)"}


def test_names_are_as_short_as_tells_them_apart() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(6, 7, bias=False)
            self.lora_A, self.lora_B = (
                nn.ModuleDict({"default": nn.Linear(6, 2)}),
                nn.ModuleDict({"default": nn.Linear(2, 7)}),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            product = self.lora_B["default"].weight @ self.lora_A["default"].weight
            return x @ (self.base_layer.weight + product).T

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x) + self.layers[1](x)

    one, both = Layer(), Two()
    assert show_of(lambda x: one(x)) == "x·base_layerᵀ + x·lora_Aᵀ·lora_Bᵀ"
    assert show_of(lambda x: both.layers[1](x)) == "x·base_layerᵀ + x·lora_Aᵀ·lora_Bᵀ"
    text = show_of(lambda x: both(x))
    assert "x·0.base_layer.weightᵀ" in text and "x·1.lora_A.default.weightᵀ·1.lora_B.default.weightᵀ" in text


@pytest.mark.parametrize("name", LINEAR)
def test_no_value_of_a_graph_is_printed_as_python_has_it(name: str) -> None:
    p = Layer()
    gm = graph_of(lambda x: LINEAR[name](p, x), x=torch.randn(4, 12, dtype=torch.float64))
    lift = Lifter(gm.graph).run()
    for node in gm.graph.nodes:
        if node.op != "output":
            text = show(lift, node)
            assert not re.search(r"Atom|Mat\(|Diag|Poly|Expr|Value|torch\.|<|\(\(|object", text), text
            assert text == show(lift, node) and len(text) < 500
