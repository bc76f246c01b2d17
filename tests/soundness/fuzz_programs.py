"""Random programs: DoRA in any combination of spellings, and the same with something in it that makes it another program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from same_results import scale  # noqa: F401  (registers the operator)

S = 1.7
EPS = 1e-3

NORMS: dict[str, Callable[..., torch.Tensor]] = {
    "linalg.vector_norm": lambda w, d, k: torch.linalg.vector_norm(w, dim=d, keepdim=k),
    "linalg.norm": lambda w, d, k: torch.linalg.norm(w, dim=d, keepdim=k),
    "method": lambda w, d, k: w.norm(p=2, dim=d, keepdim=k),
    "torch.norm": lambda w, d, k: torch.norm(w, p=2, dim=d, keepdim=k),
    "negative dim": lambda w, d, k: w.norm(dim=d - 2, keepdim=k),
    "product": lambda w, d, k: torch.sqrt((w * w).sum(dim=d, keepdim=k)),
    "pow": lambda w, d, k: w.pow(2).sum(d, keepdim=k).sqrt(),
    "square": lambda w, d, k: torch.square(w).sum(d, k) ** 0.5,
    "mean": lambda w, d, k: (w.square().mean(d, keepdim=k) * w.shape[d]).sqrt(),
    "absolute values": lambda w, d, k: w.abs().pow(2).sum(d, keepdim=k).sqrt(),
    "keywords": lambda w, d, k: torch.norm(input=w, p=2, dim=d, keepdim=k),
    "einsum": lambda w, d, k: (
        torch.einsum("oi,oi->o" if d == 1 else "oi,oi->i", w, w).sqrt().view(((-1, 1), (1, -1))[1 - d] if k else (-1,))
    ),
}
DELTAS: dict[str, Callable[..., torch.Tensor]] = {
    "B @ A": lambda b, a: b @ a,
    "mm": lambda b, a: torch.mm(b, a),
    "transposed": lambda b, a: (a.T @ b.T).T,
    "identity forward": lambda b, a: F.linear(F.linear(torch.eye(a.shape[1], dtype=a.dtype), a), b).T,
    "linear": lambda b, a: F.linear(b, a.t()),
    "middle": lambda b, a: b @ torch.eye(b.shape[1], dtype=b.dtype) @ a,
    "contiguous": lambda b, a: torch.matmul(b.contiguous(), a.clone()),
    "einsum": lambda b, a: torch.einsum("or,ri->oi", b, a),
    "einsum backwards": lambda b, a: torch.einsum("ri,or->oi", a, b),
    "concatenated": lambda b, a: torch.cat([b, 0.5 * b], 1) @ torch.cat([0.5 * a, a], 0),
    "block diagonal": lambda b, a: torch.cat([b, b], 1) @ torch.block_diag(a, a)[:, : a.shape[1]],
    "stacked": lambda b, a: torch.stack([0.5 * (b @ a), (b * 0.5) @ a]).sum(0),
    "keywords": lambda b, a: torch.matmul(input=b, other=a),
    "gathered": lambda b, a: b[:, list(range(b.shape[1]))[::-1]] @ a.flip(0),
    "two halves": lambda b, a: 0.5 * (b @ a) + (b * 0.5) @ a,
    "columns times rows": lambda b, a: (
        torch.outer(b[:, 0], a[0]) + b[:, 1:] @ a[1:] if b.shape[1] > 1 else torch.outer(b[:, 0], a[0])
    ),
    "diagonal": lambda b, a: b @ torch.diag(torch.diagonal(torch.eye(b.shape[1], dtype=b.dtype))) @ a,
}
SCALED_SUMS: dict[str, Callable[..., torch.Tensor]] = {
    "number times delta": lambda w, b, a, make: w + S * make(b, a),
    "delta times number": lambda w, b, a, make: make(b, a) * S + w,
    "on B": lambda w, b, a, make: w + make(S * b, a),
    "on A": lambda w, b, a, make: w + make(b, a * S),
    "divided": lambda w, b, a, make: w + make(b, a) / (1 / S),
    "alpha": lambda w, b, a, make: torch.add(w, make(b, a), alpha=S),
    "subtracted": lambda w, b, a, make: w - (-S) * make(b, a),
    "addmm": lambda w, b, a, make: torch.addmm(w, b, a, alpha=S),
    "tensor": lambda w, b, a, make: w + make(b, a) * torch.tensor(S, dtype=w.dtype),
    "in place": lambda w, b, a, make: make(b, a).mul_(S).add_(w),
}
WRITTEN = "in place"
"""A sum formed by writing to the delta: some of its programs are left alone without a record, none is rewritten wrongly."""

EPSILONS = ("none", "added", "inside", "clamp", "clamp_min")
DETACHED = ("nothing", "delta", "norm", "both", "no_grad", "weight", "sum", "base", "scaling")
"""``no_grad``, ``base`` and ``scaling``: the norm, the base product or g is computed under ``no_grad``."""

COMPOSITIONS = (
    "direct",
    "delta form",
    "sequential",
    "in place",
    "merged",
    "merged, normalised first",
    "weight delta",
    "g - 1 on the sum",
    "interpolated",
    "reciprocal",
    "addcmul",
    "lerp",
    "F.normalize",
    "weight_norm",
    "columns",
    "einsum",
    "broadcast",
    "from the left",
    "convolution",
    "strided convolution",
    "embedding",
)
MERGED = (
    "merged",
    "merged, normalised first",
    "weight delta",
    "F.normalize",
    "weight_norm",
    "columns",
)
BIASES = ("none", "inside", "after", "taken off first")
VECTORS = ("plain", "view", "unsqueeze", "index", "reshape")
CASTS = ("none", "norm", "factor", "input")
ROUNDED = ("norm in fp32", "input in fp32", "magnitude in fp32", "factors in fp32")
"""Casts that round: the rewrite leaves out what only loses accuracy, so values agree as fp32's do."""

CHAINS = ("B A", "B M A", "D(b) B D(d) A")
DROPOUTS = ("none", "both", "adapter", "two masks", "after the adapter", "correction")
SHARED = ("nothing", "x", "x and W", "x and A")
"""What a second layer of the program shares with the first."""

SCALINGS = ("same", "another in the output")
CAPTURES = ("make_fx", "make_fx without gradients", "dynamo", "symbolic_trace", "export")
INPUTS = ("plain", "flat", "clone", "dropout off", "scaled dropout off")
WEIGHTS = ("rows", "transposed", "view")

PERTURBATIONS = (
    "another weight in the output",
    "scaled weight in the output",
    "scaled weight in the norm",
    "negative weight in the norm",
    "reshaped weight in the output",
    "transposed weight in the output",
    "another A in the output",
    "another B in the output",
    "transposed factor in the norm",
    "another scaling in the output",
    "opposite sign in the output",
    "1-norm",
    "maximum norm",
    "sum of squares without root",
    "root of the norm",
    "wrong axis",
    "both axes",
    "weight written after the norm",
    "weight written through a view",
    "factor written after the norm",
    "sum written before the norm",
    "sum written through a view",
    "sum written by name",
    "sum written by an operator of one's own",
    "norm written before its use",
    "base written before the sum",
    "base written by name",
    "relu of the delta",
    "relu of the low-rank product",
    "relu between the factors",
    "delta dropped",
    "delta flipped",
    "rows rolled",
    "scaled along the tokens",
    "scaled twice",
    "squared scaling",
    "inverse scaling",
    "residual",
    "scaled residual",
    "sum used elsewhere",
    "norm used elsewhere",
    "magnitude used elsewhere",
    "output used twice",
    "another input for the base",
    "another input for the adapter",
    "clamped from above",
    "interpolated to another constant",
    "unscaled adapter",
    "unscaled base",
    "rounded norm",
    "one magnitude for all rows",
    "magnitude of the input side",
)


@dataclass(frozen=True)
class Spec:
    """One program."""

    d_out: int
    d_in: int
    rank: int
    leading: tuple[int, ...]
    norm: str
    delta: str
    scaled_sum: str
    epsilon: str
    detached: str
    composition: str
    bias: str
    vector: str
    cast: str
    input: str
    weight: str
    trained: bool
    perturbations: tuple[str, ...]
    capture: str
    chain: str = "B A"
    dropout: str = "none"
    shared: str = "nothing"
    scaling: str = "same"

    def __repr__(self) -> str:
        return "Spec(" + ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)) + ")"


def specs(perturbed: bool) -> st.SearchStrategy[Spec]:
    """Sizes are small and often equal: an axis taken for another shows where shapes do not tell them apart."""
    size = st.sampled_from([4, 4, 4, 4, 4, 4, 3, 3, 5, 5, 2, 2, 1])
    some = st.lists(st.sampled_from(PERTURBATIONS), min_size=1, max_size=2, unique=True).map(tuple)
    return st.builds(
        Spec,
        d_out=size,
        d_in=size,
        rank=st.sampled_from([2, 1, 3, 4, 6]),
        leading=st.sampled_from([(4,), (4,), (2, 3), (1,), (1, 1), (), (2, 1, 4), (5,), (0,)]),
        norm=st.sampled_from(sorted(NORMS)),
        delta=st.sampled_from(sorted(DELTAS)),
        scaled_sum=st.sampled_from(sorted(SCALED_SUMS if perturbed else set(SCALED_SUMS) - {WRITTEN})),
        epsilon=st.sampled_from(EPSILONS),
        detached=st.sampled_from(DETACHED),
        composition=st.sampled_from(COMPOSITIONS),
        bias=st.sampled_from(BIASES),
        vector=st.sampled_from(VECTORS),
        cast=st.sampled_from(CASTS if perturbed else (*CASTS, *CASTS, *ROUNDED)),
        input=st.sampled_from(INPUTS),
        weight=st.sampled_from(WEIGHTS),
        trained=st.booleans(),
        perturbations=some if perturbed else st.just(()),
        capture=st.sampled_from(["make_fx"] * 5 + ["dynamo"] * 5 + list(CAPTURES)),
        chain=st.sampled_from(CHAINS),
        dropout=st.sampled_from(("none",) * 5 + DROPOUTS[1:]),
        shared=st.sampled_from(("nothing",) * 5 + SHARED[1:]),
        scaling=st.sampled_from(("same", *SCALINGS)),
    )


def exemption(spec: Spec) -> str:
    """Why a program need not be rewritten whole; then the norm alone is, or a reason is given. Empty where it must be."""
    picked = spec.chain == "B M A" and spec.delta in (
        "columns times rows",
        "gathered",
        "concatenated",
        "block diagonal",
    )
    if spec.scaled_sum == WRITTEN:
        return "a sum formed by writes"
    if 1 in (spec.d_out, spec.d_in):
        return "a side of one, which is a vector by its shape"
    if not spec.leading and spec.vector != "plain":
        return "one token without an axis, scaled by a matrix of one row"
    if math.prod(spec.leading) == 1 and spec.composition == "einsum" and spec.capture != "dynamo":
        return "one token scaled by an einsum that the tracer takes apart"
    if spec.capture == "export" and spec.scaled_sum == "tensor":
        return "a constant tensor in an exported program, which detaches it in place"
    if spec.capture == "export" and spec.detached in ("no_grad", "base", "scaling"):
        return "a part under no_grad in an exported program, which is a graph of its own"
    if spec.cast == "factors in fp32" and (
        spec.chain != "B A" or spec.delta not in ("B @ A", "mm", "linear", "einsum")
    ):
        return "a product that is rounded"
    if picked and spec.capture not in ("dynamo", "export") and spec.composition in MERGED:
        # No activations have a product in front of their rows; the graph does not say that these are parameters.
        return "a merged weight with the norm of rows picked out of a product, in a graph that names no parameters"
    return ""


class Operands(torch.nn.Module):
    """The parameters that a program reads, in fp64, bounded away from norms of zero."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator))

        stored = (spec.d_in, spec.d_out) if spec.weight == "transposed" else (spec.d_out, spec.d_in)
        self.W, self.W2 = parameter(*stored), parameter(spec.d_out, spec.d_in)
        self.A, self.A2 = parameter(spec.rank, spec.d_in), parameter(spec.rank, spec.d_in)
        self.B, self.B2 = parameter(spec.d_out, spec.rank), parameter(spec.d_out, spec.rank)
        self.m, self.bias = parameter(spec.d_out), parameter(spec.d_out)
        self.K, self.D = parameter(spec.d_out, spec.d_in, 3), parameter(spec.rank, spec.d_in, 3)
        self.M, self.b, self.d = parameter(spec.rank, spec.rank), parameter(spec.d_out), parameter(spec.rank)
        self.W.requires_grad_(spec.trained)


def program(spec: Spec, p: Operands, x: torch.Tensor) -> torch.Tensor:
    """The program that a spec describes. Perturbations are no-ops where the sizes do not admit them."""
    has = spec.perturbations.__contains__
    square = spec.d_out == spec.d_in
    weight = {"rows": lambda: p.W, "transposed": lambda: p.W.T, "view": lambda: p.W.view(-1).view(p.W.shape)}[
        spec.weight
    ]()
    own = any(has(k) for k in ("weight written after the norm", "weight written through a view"))
    weight = weight.clone() if own else weight
    down, up = p.A, (p.B.clone() if has("factor written after the norm") else p.B)

    with torch.set_grad_enabled(torch.is_grad_enabled() and spec.detached != "no_grad"):
        norm, adapted = _norm(spec, p, weight, down, up)
    if has("weight written after the norm"):
        weight.mul_(0.5)
    if has("weight written through a view"):
        weight[0].add_(1.0)
    if has("factor written after the norm"):
        up.add_(0.25)
    if has("norm written before its use"):
        norm = norm.clone()
        norm.mul_(2.0)
    if spec.detached in ("norm", "both"):
        norm = norm.detach()
    if spec.cast == "norm":
        norm = norm.to(p.W.dtype)

    out_weight = weight
    if has("another weight in the output"):
        out_weight = p.W2
    if has("scaled weight in the output"):
        out_weight = out_weight * 1.5
    if has("reshaped weight in the output"):
        out_weight = out_weight.reshape(spec.d_in, spec.d_out).t()
    if has("transposed weight in the output") and square:
        out_weight = out_weight.t()
    down = p.A2 if has("another A in the output") else down
    up = p.B2 if has("another B in the output") else up
    y = _composed(spec, p, x, norm, out_weight, down, up)
    if spec.shared != "nothing":
        y = y + _second(spec, p, x)
    if has("sum used elsewhere"):
        y = y + adapted.sum()
    if has("norm used elsewhere"):
        y = y + norm.sum()
    if has("magnitude used elsewhere"):
        y = y * p.m.sin()
    if has("output used twice"):
        y = y + torch.relu(y) * 0.5
    return y


def _second(spec: Spec, p: Operands, x: torch.Tensor) -> torch.Tensor:
    """Another layer of the program."""
    own = (p.W.T if spec.weight == "transposed" else p.W) if spec.shared == "x and W" else p.W2
    down = p.A if spec.shared == "x and A" else p.A2
    n = torch.linalg.norm(own + S * (p.B2 @ down), dim=1)
    # Summed: a program may have another shape than its layers, as an embedding's has.
    return ((p.b / n) * (F.linear(x, own) + S * F.linear(F.linear(x, down), p.B2))).sum()


def _norm(
    spec: Spec, p: Operands, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    has = spec.perturbations.__contains__
    square = spec.d_out == spec.d_in
    inside = weight.detach() if spec.detached == "weight" else weight
    if has("scaled weight in the norm"):
        inside = 2.5 * inside
    if has("negative weight in the norm"):
        inside = -inside

    def make(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        if has("transposed factor in the norm") and spec.rank == spec.d_out:
            b = b.T
        if has("relu between the factors"):
            b = torch.relu(b)
        if spec.chain == "B M A":
            a = p.M @ a
        elif spec.chain == "D(b) B D(d) A":
            b, a = p.b[:, None] * b, p.d.unsqueeze(-1) * a
        if spec.cast == "factors in fp32":
            b, a = b.float(), a.float()
        delta = DELTAS[spec.delta](b, a).to(weight.dtype)
        if has("relu of the delta"):
            delta = torch.relu(delta)
        if has("delta dropped"):
            delta = F.dropout(delta, 1.0, True)
        if has("delta flipped"):
            delta = delta.flip(1)
        return delta.detach() if spec.detached in ("delta", "both") else delta

    adapted = SCALED_SUMS[spec.scaled_sum](inside, up, down, make)
    if has("sum written before the norm"):
        adapted.add_(0.5)
    if has("sum written through a view"):
        adapted[:, 0].mul_(3.0)
    if has("sum written by name"):
        F.leaky_relu(input=adapted, negative_slope=0.5, inplace=True)  # no row of zeros, whose norm has no gradient
    if has("sum written by an operator of one's own"):
        torch.ops.dorafx_tests.scale(adapted.detach(), 3.0)
    if has("rows rolled"):
        adapted = adapted.roll(1, 0)
    normed = adapted.detach() if spec.detached == "sum" else adapted
    normed = normed.float() if spec.cast == "norm in fp32" else normed
    dim = 0 if has("wrong axis") and square else 1
    if has("1-norm"):
        norm = normed.norm(p=1, dim=dim)
    elif has("maximum norm"):
        norm = torch.linalg.vector_norm(normed, float("inf"), dim=dim)
    elif has("both axes"):
        norm = normed.norm().expand(spec.d_out)
    elif has("sum of squares without root"):
        norm = normed.pow(2).sum(dim)
    elif spec.epsilon == "inside":
        norm = (normed.pow(2).sum(dim) + EPS).sqrt()
    elif spec.vector == "reshape":
        norm = NORMS[spec.norm](normed, dim, True).reshape(-1)
    else:
        norm = NORMS[spec.norm](normed, dim, False)
    norm = norm.double()
    norm = norm + EPS if spec.epsilon == "added" else norm
    norm = norm.clamp(min=1e-6) if spec.epsilon == "clamp" else norm
    norm = norm.clamp_min(0.5) if spec.epsilon == "clamp_min" else norm
    norm = norm.sqrt() if has("root of the norm") else norm
    norm = norm.clamp(1e-6, 2.0) if has("clamped from above") else norm
    return norm.round(decimals=1) + 0.05 if has("rounded norm") else norm, adapted


def _composed(
    spec: Spec,
    p: Operands,
    x: torch.Tensor,
    n: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
) -> torch.Tensor:
    has = spec.perturbations.__contains__
    x_base = torch.relu(x) if has("another input for the base") else x
    x_low = torch.tanh(x) if has("another input for the adapter") else x
    if spec.cast == "input in fp32":
        x_base, x_low = x_base.float().double(), x_low.float().double()
    if spec.input == "dropout off":
        x_low = F.dropout(x_low, 0.5, False)
    elif spec.input == "scaled dropout off":
        x_low = F.dropout(x_low, 0.0, True)
    elif spec.input == "clone":
        x_low = x_low.clone()
    shape = (*spec.leading, spec.d_out)
    if spec.input == "flat":
        x_base, x_low = x_base.reshape(-1, spec.d_in), x_low.reshape(-1, spec.d_in)
    if spec.cast == "input":
        x_base = x_base.to(weight.dtype)
    x_dropped = x_base
    if spec.dropout != "none" and spec.dropout != "after the adapter":
        x_dropped = F.dropout(x_base, 0.5, True)
        x_low = F.dropout(x_low, 0.5, True) if spec.dropout == "two masks" else x_dropped
    s = S
    if has("another scaling in the output") or spec.scaling == "another in the output":
        s = 0.6
    if has("opposite sign in the output"):
        s = -s
    m = p.m.to(n.dtype) if spec.cast == "factor" else p.m
    m = m.float().double() if spec.cast == "magnitude in fp32" else m
    if has("one magnitude for all rows"):
        m = m[:1]
    if has("magnitude of the input side") and spec.d_out == spec.d_in:
        x_base, x_low, m = x_base * m, x_low * m, torch.ones_like(m)
    if has("inverse scaling"):
        m, n = n, m
    if has("squared scaling"):
        m, n = m * m, n * n

    if spec.composition in MERGED:
        up, down = _effective(spec, p, up, down)
        y = _merged(spec, p, x_dropped, m, n, weight + s * (up @ down))
        return y.view(shape) if spec.input == "flat" else y

    bias = p.bias if spec.bias in ("inside", "taken off first") else None
    if spec.composition == "embedding":
        return _embedded(spec, p, m, weight, down, up)
    if spec.composition == "strided convolution" and math.prod(spec.leading):
        return _strided(spec, p, x, m)
    if spec.composition == "convolution" and math.prod(spec.leading):  # torch refuses to convolve nothing
        y = _convolved(spec, p, x_dropped, x_low, m / n, weight, *_effective(spec, p, up, down))
        return y.reshape(shape)
    if spec.composition == "from the left":
        return _from_the_left(spec, p, x_dropped, m / n, weight, *_effective(spec, p, up, down))
    with torch.set_grad_enabled(torch.is_grad_enabled() and spec.detached != "base"):
        base = F.linear(x_base, weight, bias)
    low = _low_rank(spec, p, x_low, down, up)
    if has("relu of the low-rank product"):
        low = torch.relu(low)
    if spec.dropout == "after the adapter":
        low = F.dropout(low, 0.5, True)
    result = base
    if spec.dropout in ("both", "two masks"):
        base = F.linear(x_dropped, weight, bias)
        result = result if spec.composition == "delta form" else base
    if spec.bias == "taken off first":
        base = base - p.bias
    if has("base written before the sum"):
        base = base * 1.0
        base.mul_(0.5)
    if has("base written by name"):
        base = base * 1.0
        F.leaky_relu(input=base, inplace=True)
    g = _shaped(spec, m / n)
    with torch.set_grad_enabled(torch.is_grad_enabled() and spec.detached != "scaling"):
        g = g.expand_as(base) if spec.composition == "broadcast" else g.clone()
    if has("unscaled adapter"):
        low = low / g
    if has("unscaled base"):
        base = base / g
    bracket = base + low * s
    if spec.dropout == "correction":
        bracket = bracket + F.linear(x_dropped - x_base, weight)
    if has("scaled residual") and spec.d_out == spec.d_in:
        bracket = bracket + x_base
    if spec.composition == "direct":
        y = g * bracket
    elif spec.composition == "delta form":
        y = result + ((g - 1) * base + g * low * s)
        if spec.dropout == "correction":
            y = y + (g - 1) * F.linear(x_dropped - x_base, weight)
    elif spec.composition == "sequential":
        y = bracket / _shaped(spec, n) * _shaped(spec, m)
    elif spec.composition == "in place":
        y = base.clone()
        y += low * s
        y /= _shaped(spec, n)
        y *= _shaped(spec, m)
    elif spec.composition == "g - 1 on the sum":
        y = bracket + (g - 1) * bracket
    elif spec.composition == "einsum":
        y = torch.einsum("...o,o->...o", bracket, m / n)
    elif spec.composition == "broadcast":
        y = bracket * g
    elif spec.composition == "addcmul":
        y = torch.addcmul(torch.addcmul(base, g - 1, base), g, low, value=s)
    elif spec.composition == "lerp":
        y = torch.lerp(torch.ones_like(g), g, 0.25) * bracket
    elif spec.composition == "interpolated":
        k = 0.5
        y = (k * (g - 1) + (k if has("interpolated to another constant") else 1)) * bracket
    else:
        y = m * (1 / n) * bracket
    if spec.bias == "taken off first" and spec.composition != "delta form":
        y = y + p.bias
    if spec.bias == "after":
        y = y + p.bias
    if has("residual") and spec.d_out == spec.d_in:
        y = y + torch.relu(x_base)
    if has("scaled twice"):
        y = y * g
    tokens = spec.leading[-1:] if spec.input != "flat" else (math.prod(spec.leading),)
    if has("scaled along the tokens") and tokens == (spec.d_out,):
        y = y * (p.m / n)[:, None]
    return y.view(shape) if spec.input == "flat" else y


def _effective(spec: Spec, p: Operands, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of the chain."""
    if spec.chain == "B M A":
        return up, p.M @ down
    return (p.b[:, None] * up, p.d[:, None] * down) if spec.chain == "D(b) B D(d) A" else (up, down)


def _low_rank(spec: Spec, p: Operands, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The chain, applied to activations factor by factor."""
    low = F.linear(x, down)
    if spec.chain == "B M A":
        low = F.linear(low, p.M)
    return p.b * F.linear(p.d * low, up) if spec.chain == "D(b) B D(d) A" else F.linear(low, up)


def _convolved(
    spec: Spec,
    p: Operands,
    x: torch.Tensor,
    x_low: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """The tokens as the pixels of one image, the layer as a convolution."""
    image, other = (t.reshape(1, -1, spec.d_in).transpose(1, 2) for t in (x, x_low))
    base = F.conv1d(image, weight[..., None], p.bias if spec.bias == "inside" else None)
    low = F.conv1d(F.conv1d(other, down[..., None]), up[..., None])
    y = g.view(1, -1, 1) * (base + S * low)
    y = y + p.bias[:, None] if spec.bias == "after" else y
    return y.transpose(1, 2).reshape(*spec.leading, spec.d_out)


def _strided(spec: Spec, p: Operands, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """The tokens as the pixels of one image, the layer as a convolution with stride and padding."""
    image = x.reshape(1, -1, spec.d_in).transpose(1, 2)
    delta = torch.mm(p.B.flatten(1), p.D.flatten(1)).view(p.K.shape)
    n = (p.K + S * delta.detach()).norm(p=2, dim=(1, 2), keepdim=True).transpose(1, 0)
    low = F.conv1d(F.conv1d(image, p.D, stride=2, padding=1), p.B[..., None])
    return (m.view(1, -1, 1) / n) * (F.conv1d(image, p.K, None, 2, 1) + S * low)


def _from_the_left(
    spec: Spec,
    p: Operands,
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """The weight before the tokens, which are columns."""
    tokens = x.reshape(-1, spec.d_in).T
    y = g.unsqueeze(-1) * (weight @ tokens + S * (up @ (down @ tokens)))
    y = y + p.bias[:, None] if spec.bias == "after" else y
    return y.T.reshape(*spec.leading, spec.d_out)


def _embedded(
    spec: Spec, p: Operands, m: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """An embedding of d_out tokens in d_in dimensions."""
    indices = torch.arange(math.prod(spec.leading)).view(spec.leading) % spec.d_out
    up, down = _effective(spec, p, up, down)
    n = NORMS[spec.norm](weight + S * (up @ down).detach(), 0, False).detach()
    return (p.W2[0] / n) * (F.embedding(indices, weight) + S * (F.embedding(indices, up) @ down)) + m.sum()


def _merged(
    spec: Spec, p: Operands, x: torch.Tensor, m: torch.Tensor, n: torch.Tensor, adapted: torch.Tensor
) -> torch.Tensor:
    column, divisor = m[:, None], n.unsqueeze(-1)
    if "scaled along the tokens" in spec.perturbations and spec.d_out == spec.d_in:
        divisor = n
    merged = (
        column * (adapted / divisor) if spec.composition == "merged, normalised first" else column * adapted / divisor
    )
    bias = p.bias if spec.bias != "none" else None
    if spec.composition == "F.normalize":
        return F.linear(x, column * F.normalize(adapted, dim=1), bias)
    if spec.composition == "weight_norm" and m.numel() == spec.d_out:
        return F.linear(x, torch._weight_norm(adapted, column, 0), bias)
    if spec.composition == "columns":
        return F.linear(x, p.W2[0] * adapted / NORMS[spec.norm](adapted, 0, True), bias)
    if spec.composition == "weight delta":
        first = p.W.T if spec.weight == "transposed" else p.W
        return F.linear(x, first, bias) + F.linear(x, merged - first)
    return F.linear(x, merged, bias)


def _shaped(spec: Spec, v: torch.Tensor) -> torch.Tensor:
    shapes: dict[str, Callable[[], Any]] = {
        "plain": lambda: v,
        "view": lambda: v.view(1, -1),
        "unsqueeze": lambda: v.unsqueeze(0),
        "index": lambda: v[None],
        "reshape": lambda: v.reshape(1, -1),
    }
    return shapes[spec.vector]()
