"""What the matcher makes of a program: a line each, with the form's name and the terms, or the reason of a near miss."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_results import graph_of

from dorafx.lift import Atom, Poly, show
from dorafx.match import Matches, match_graph


def norm(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dim: int = 1) -> torch.Tensor:
    return (W + 2 * (B @ A)).norm(dim=dim)


def lora(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return 2 * F.linear(F.linear(x, A), B)


def both(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return F.linear(x, W) + lora(x, A, B)


def found_in(program: Callable[..., Any]) -> list[str]:
    """What the matcher finds, a line each."""
    return [re.sub(rf"{re.escape(__file__)}:\d+", "LINE", text) for text in lines(match_graph(graph_of(program).graph))]


def lines(matches: Matches) -> Iterator[str]:
    lift = matches.lift
    composed = {atom.id for m in matches.compositions for atom in lift.norms_in(m.expr)}
    for match in matches.compositions:
        yield f"{match.pattern}: {show(lift, match.expr)}"
    for atom_id in matches.norms:
        if atom_id not in composed:
            reason = matches.composition_misses.get(atom_id)
            yield f"norm only: {show(lift, Poly.var(Atom(atom_id)))}: {reason.text if reason else 'read by nobody'}"
    for atom_id, reason in matches.misses.items():
        yield f"missed: {show(lift, Poly.var(Atom(atom_id)))}: {reason.text}"
    for node, reason in matches.unknown:
        yield f"missed: {show(lift, node)}: {reason.text}"


# fmt: off
PROGRAMS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    # -- forms
    "direct": (lambda x, W, A, B, m: m / norm(W, A, B).detach() * both(x, W, A, B), ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = detach(‖W + 2·B·A‖)"]),
    "direct, differentiable, with a bias": (lambda x, W, A, B, m, b: m / norm(W, A, B) * both(x, W, A, B) + b, ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) + 𝟙·D(b) where n = ‖W + 2·B·A‖"]),
    "a scalar as the scaling": (lambda x, W, A, B, m, s: m / (W + s * (B @ A)).norm(dim=1) * (F.linear(x, W) + s * F.linear(F.linear(x, A), B)), ["linear: x·Wᵀ·D(m·n⁻¹) + s·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + s·B·A‖"]),
    "delta form": (lambda x, W, A, B, m: F.linear(x, W) + (m / norm(W, A, B) - 1) * F.linear(x, W) + m / norm(W, A, B) * lora(x, A, B), ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"]),
    "delta form, bias inside": (lambda x, W, A, B, m, b: F.linear(x, W, b) + (m / norm(W, A, B) - 1) * (F.linear(x, W, b) - b) + m / norm(W, A, B) * lora(x, A, B), ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) + 𝟙·D(b) where n = ‖W + 2·B·A‖"]),
    "merged weight": (lambda x, W, A, B, m, b: F.linear(x, (m / norm(W, A, B))[:, None] * (W + 2 * (B @ A)), b), ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) + 𝟙·D(b) where n = ‖W + 2·B·A‖"]),
    "merged weight, normalised": (lambda x, W, A, B, m: F.linear(x, F.normalize(W + B @ A, dim=1) * m[:, None]), ["linear: x·Wᵀ·D(m·max(n, 1e-12)⁻¹) + x·Aᵀ·Bᵀ·D(m·max(n, 1e-12)⁻¹) where n = ‖W + B·A‖"]),
    "an epsilon in the root": (lambda x, W, A, B, m: m * ((W + 2 * B @ A).square().sum(1) + 1e-6).rsqrt() * both(x, W, A, B), ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = √(Σ(W + 2·B·A)² + 1e-06)"]),
    "another scaling than in the norm": (lambda x, W, A, B, m: m / norm(W, A, B) * (F.linear(x, W) + 3 * F.linear(F.linear(x, A), B)), ["linear: x·Wᵀ·D(m·n⁻¹) + 3·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"]),
    "factors between factors": (lambda x, W, A, B, M, d, m: m / (W + B @ M @ (d[:, None] * A)).norm(dim=1) * (F.linear(x, W) + F.linear(d * F.linear(x, A) @ M.T, B)), ["linear: x·Wᵀ·D(m·n⁻¹) + x·Aᵀ·D(d)·Mᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + B·M·D(d)·A‖"]),
    "two adapters": (lambda x, W, A, B, M, m: m / (W + B @ A + B @ M @ A).norm(dim=1) * (F.linear(x, W) + F.linear(F.linear(x, A), B) + F.linear(F.linear(x, M @ A), B)), ["linear: x·Wᵀ·D(m·n⁻¹) + x·Aᵀ·Bᵀ·D(m·n⁻¹) + x·Aᵀ·Mᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + B·A + B·M·A‖"]),
    "a single token": (lambda token, W, A, B, m: m / norm(W, A, B) * both(token, W, A, B), ["linear: token·Wᵀ·D(m·n⁻¹) + 2·token·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"]),
    "tokens by column": (lambda x, W, A, B, m: (m / norm(W, A, B))[:, None] * (W @ x.T + 2 * B @ (A @ x.T)), ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"]),
    "two norms of one layer": (lambda x, W, A, B, m: F.linear(x, m[:, None] * (W + 2 * B @ A) / norm(W, A, B)[:, None] / norm(W, A, B, 0)), ["linear: x·D(n₁⁻¹)·Wᵀ·D(m·n₂⁻¹) + 2·x·D(n₁⁻¹)·Aᵀ·Bᵀ·D(m·n₂⁻¹) where n₁ = ‖W + 2·B·A‖_col, n₂ = ‖W + 2·B·A‖"]),
    "dropout": (lambda x, W, A, B, m: (lambda y: F.linear(x, W) + (m / norm(W, A, B) - 1) * F.linear(y, W) + m / norm(W, A, B) * lora(y, A, B))(F.dropout(x, 0.5)), ["linear_dropout: x·Wᵀ − dropout(x, 0.5)·Wᵀ + dropout(x, 0.5)·Wᵀ·D(m·n⁻¹) + 2·dropout(x, 0.5)·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"]),
    "columns": (lambda x, W, A, B, c: F.linear(x, c * (W + 2 * B @ A) / norm(W, A, B, 0)), ["linear_columns: x·D(c·n⁻¹)·Wᵀ + 2·x·D(c·n⁻¹)·Aᵀ·Bᵀ where n = ‖W + 2·B·A‖_col"]),
    "embedding": (lambda i, table, E_A, E_B, c: c / (table + 2 * E_A @ E_B).norm(dim=0) * (F.embedding(i, table) + 2 * F.embedding(i, E_A) @ E_B), ["embedding: onehot(i)·table·D(c·n⁻¹) + 2·onehot(i)·E_A·E_B·D(c·n⁻¹) where n = ‖table + 2·E_A·E_B‖_col"]),
    "convolution": (lambda image, kernel, K_A, K_B, k: (lambda n: (k / n)[:, None, None] * (F.conv2d(image, kernel) + F.conv2d(F.conv2d(image, K_A), K_B)))(torch.linalg.vector_norm(kernel + (K_B.flatten(1) @ K_A.flatten(1)).view(4, 3, 3, 3), dim=(1, 2, 3))), ["convolution: patches(channels(image))·flat(kernel)ᵀ·D(k·n⁻¹) + patches(channels(image))·flat(K_A)ᵀ·flat(K_B)ᵀ·D(k·n⁻¹) where n = ‖flat(kernel) + flat(K_B)·flat(K_A)‖"]),
    "a residual is another's": (lambda x, W, A, B, m, V: F.linear(x, V) + m / norm(W, A, B) * both(x, W, A, B), ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"]),
    "what follows is another's": (lambda x, W, A, B, m: torch.relu(m / norm(W, A, B) * both(x, W, A, B)), ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"]),
    "two layers": (lambda x, Q, A, B, W, m, c, V: m / norm(W, A, B) * both(torch.relu(c / (Q + 2 * A.T @ A).norm(dim=1) * (F.linear(x, Q) + 2 * F.linear(F.linear(x, A), A.T))), W, A, B), ["linear: x·Qᵀ·D(c·n⁻¹) + 2·x·Aᵀ·A·D(c·n⁻¹) where n = ‖Q + 2·Aᵀ·A‖", "linear: relu·Wᵀ·D(m·n⁻¹) + 2·relu·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"]),
    # -- nothing of DoRA
    "no norm": (lambda x, W, A, B: both(x, W, A, B), []),
    "a weight norm": (lambda x, W, m: F.linear(x, m[:, None] * W / W.norm(dim=1, keepdim=True)), []),
    # -- the norm alone
    "the norm is returned": (lambda W, A, B: norm(W, A, B), ["norm only: ‖W + 2·B·A‖: the norm itself is an output of the program, and scales nothing in it"]),
    "no product with the weight": (lambda x, V, W, A, B, m: m / norm(W, A, B) * (F.linear(x, V) + lora(x, A, B)), ["norm only: ‖W + 2·B·A‖: the output scaled by this norm has no product with the norm's weight"]),
    "no low-rank product": (lambda x, W, A, B, m: m / norm(W, A, B) * F.linear(x, W), ["norm only: ‖W + 2·B·A‖: the base product is scaled by the norm, but no low-rank product is added"]),
    "only the base is scaled": (lambda x, W, A, B, m: m / norm(W, A, B) * F.linear(x, W) + lora(x, A, B), ["norm only: ‖W + 2·B·A‖: a part of the output is not scaled by the same vector as the base product"]),
    "the largest norm": (lambda x, W, A, B, m: m / norm(W, A, B).amax() * both(x, W, A, B), ["norm only: ‖W + 2·B·A‖: operator amax at LINE stands between the norm and what it scales"]),
    "an operator on g": (lambda x, W, A, B, m: torch.sigmoid(m / norm(W, A, B)) * both(x, W, A, B), ["linear: x·Wᵀ·D(sigmoid(m·‖W + 2·B·A‖⁻¹)) + 2·x·Aᵀ·Bᵀ·D(sigmoid(m·‖W + 2·B·A‖⁻¹))"]),
    "an operator on the output": (lambda x, W, A, B, m: m / norm(W, A, B) * torch.relu(both(x, W, A, B)), ["norm only: ‖W + 2·B·A‖: the base product is scaled by the norm, but no low-rank product is added"]),
    "what vanishes": (lambda x, W, A, B, m: m / norm(W, A, B) * both(x, W, A, B) + 0 * m, ["linear: x·Wᵀ·D(m·n⁻¹) + 2·x·Aᵀ·Bᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖"]),
    "delta form without its base": (lambda x, W, A, B, m: (m / norm(W, A, B) - 1) * F.linear(x, W) + m / norm(W, A, B) * lora(x, A, B), ["norm only: ‖W + 2·B·A‖: a part of the output is not scaled by the same vector as the base product"]),
    # -- near misses
    "an operator on the delta": (lambda x, W, A, B, m: m / (W + torch.tanh(B @ A)).norm(dim=1) * both(x, W, A, B), ["missed: ‖W + tanh(B·A)‖: operator tanh at LINE stands between the low-rank product and the norm"]),
    "an operator on the sum": (lambda x, W, A, B, m: m / torch.tanh(W + B @ A).norm(dim=1) * both(x, W, A, B), ["missed: ‖tanh(W + B·A)‖: operator tanh at LINE stands between the low-rank product and the norm"]),
    "another delta than a product": (lambda x, W, d, b, m: m / (W + torch.kron(m[:, None], d[None].repeat(1, 3))).norm(dim=1) * F.linear(x, W), ["missed: ‖W + kron(m, repeat(d, 1, 3))‖: operator kron at LINE makes the delta, and is not known as a product of low-rank factors, which is all that a factored norm serves"]),
    "an order that is not 2": (lambda x, W, A, B, m: m / (W + 2 * B @ A).norm(p=1, dim=1) * both(x, W, A, B), ["missed: norm(W + 2·B·A, p=1, dim=1): the norm at LINE is of order 1: DoRA's is the 2-norm"]),
    "of the whole weight": (lambda x, W, A, B, m: m / (W + 2 * B @ A).norm() * both(x, W, A, B), ["missed: norm(W + 2·B·A): the norm at LINE is of the whole weight: DoRA's is by row or by column"]),
    "a sum in place of a norm": (lambda x, W, A, B, m: m / (W + 2 * B @ A).sum(1) * both(x, W, A, B), ["missed: sum(W + 2·B·A, 1): operator sum at LINE makes a vector of the adapted weight, and is not known as a norm"]),
    "squares without their root": (lambda x, W, A, B, m: m / torch.sin((W + 2 * B @ A).square().sum(1)) * both(x, W, A, B), ["missed: sin(Σ(W + 2·B·A)²): operator sin at LINE reads the sum of squares of the adapted weight before its root is taken"]),
    "two dense weights": (lambda x, W, V, A, B, m: m / (W + V + B @ A).norm(dim=1) * both(x, W, A, B), ["missed: ‖W + V + B·A‖: the norm is of a sum with 2 dense matrices (`l_w_`, `l_v_`) beside the low-rank product; one is supported"]),
    "no dense weight": (lambda x, W, A, B, M, m: m / (B @ A + B @ M @ A).norm(dim=1) * both(x, W, A, B), ["missed: ‖B·A + B·M·A‖: the norm is of a sum with no dense weight beside the low-rank product; one is supported"]),
    "a scaled weight": (lambda x, W, A, B, m: m / (m[:, None] * W + B @ A).norm(dim=1) * both(x, W, A, B), ["missed: ‖D(m)·W + B·A‖: the weight inside the norm is itself scaled by a vector"]),
    "a diagonal beside the weight": (lambda x, Q, A, B, c: c / (Q + torch.diag(c) + A.T @ A).norm(dim=1) * F.linear(x, Q), ["missed: ‖D(c) + Q + Aᵀ·A‖: the norm's operand has a scaled or diagonal part (`l_c_`) besides the weight"]),
    "a term of zeros": (lambda x, W, V, A, B, m: m / (W + 0 * V + B @ A).norm(dim=1) * both(x, W, A, B), ["missed: ‖W + B·A [without 0·V]‖: `l_v_` is multiplied by zero, or cancels out: without it the rewrite would lose its gradient (of zeros) and its NaN; leave the term out of the program where neither is needed"]),
    "a rounded product": (lambda x, W, A, B, m: m / (W + (B @ A).half().float()).norm(dim=1) * both(x, W, A, B), ["missed: ‖W + (B·A)‖: the low-rank product made at LINE is rounded to float16 and then read with more digits; a rewrite would leave the rounding out: cast the factors, or nothing"]),
    "a weight written in place": (lambda x, W, A, B, m: (lambda w: m / w.mul_(2.0).norm(dim=1) * both(x, W, A, B) + w[0, 0])(W + B @ A), ["missed: ‖mul_(add(W, B·A), 2)‖: the sum made at LINE is written in place before the norm is taken"]),
}
# fmt: on


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str) -> None:
    program, expected = PROGRAMS[name]
    assert found_in(program) == expected
