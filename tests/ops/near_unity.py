"""The composition where g is nearly one, against the numerically stable form."""

from __future__ import annotations

from typing import Any

import torch

import dorafx.ops  # noqa: F401

SCALE = 0.1


def _run(operator: Any, backend: str, *operands: Any) -> torch.Tensor:
    """The operator's value, compiled where a backend is named: with gradients of g, as in training."""
    leaves = [t.detach().requires_grad_(t.dim() == 1) if isinstance(t, torch.Tensor) else t for t in operands]
    if not backend:
        return operator(*leaves).detach()
    return torch.compile(lambda *t: operator(*t), backend=backend, dynamic=False, fullgraph=True)(*leaves).detach()


def check_near_unity(form: str, dtype: torch.dtype, backend: str = "") -> None:
    """Sweep g over 1 ± 1e-4 (every fp32 number there is too many: 2,000 of them). In half precision ``g·x`` and ``x`` round
    to the same number nearly always, and what the adapter learned is in the difference.

    The stable form is ``base + ((g - 1)·base + g·s·lora)`` in fp32, rounded once. Both are one rounding of values that are
    exact to about 1e-7, so their errors can differ only where the exact value lies that close to the middle between two
    neighbours, where both choices are equally far off: hence the margin of 1e-5.
    """
    generator = torch.Generator().manual_seed(0)
    columns = 2000
    base, lora, result = (torch.randn(24, columns, generator=generator).to(dtype) for _ in range(3))
    g = torch.linspace(1 - 1e-4, 1 + 1e-4, columns, dtype=torch.float64).float()
    wide_base, wide_lora, wide_g = base.double(), lora.double(), g.double()
    added = (wide_g - 1) * wide_base + wide_g * SCALE * wide_lora
    stable = (g - 1) * base.float() + g * SCALE * lora.float()
    if form == "delta":
        exact, stable = result.double() + added, (result.float() + stable).to(dtype)
        found = _run(torch.ops.dorafx.compose_delta, backend, result, base, lora, g, SCALE, dtype)
    else:
        exact, stable = wide_base + added, (base.float() + stable).to(dtype)
        found = _run(torch.ops.dorafx.compose, backend, base, lora, g, None, SCALE, dtype)
    assert found.dtype == dtype
    for norm in (torch.Tensor.norm, lambda t: t.abs().max(), lambda t: t.abs().sum()):
        assert norm(found.double() - exact) <= norm(stable.double() - exact) * (1 + 1e-5)
    # What can be lost is the part (g - 1)·base, below a half-precision number's spacing: by how much the error follows it.
    change = (wide_g - 1) * wide_base

    def lost(y: torch.Tensor) -> float:
        return float(((exact - y.double()) * change).sum() / change.square().sum())

    assert abs(lost(found) - lost(stable)) < 1e-3
    # The sweep can tell: with g rounded to half precision, which is one nearly everywhere, all of it is lost.
    h = g.to(dtype)
    rounded = (0 if form == "direct" else result) + (h - float(form == "delta")) * base + h * (lora * SCALE)
    assert lost(rounded) - lost(found) > 0.6
