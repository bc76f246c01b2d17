"""One adapter layer, wherever it comes from, and what is wrong with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import dorafx.ops  # noqa: F401  (registers the norm)

from .findings import Finding, named_rows, rows_of

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Weight:
    """A base weight of which parts are read.

    Attributes:
        shape, dtype: of the whole.
        rows: reads the rows from a number to another along the first axis.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> Weight:
        """A tensor that is in memory already."""
        return Weight(tuple(tensor.shape), tensor.dtype, lambda first, last: tensor[first:last])


@dataclass
class Layer:
    """An adapter's part of one layer.

    Attributes:
        site, adapter: as in :class:`Finding`.
        left, right: factors ``[d_out, r]`` and ``[r, d_in]``; for a convolution the rest of the kernel counts as inputs. None if absent.
        magnitude: as it is stored; None if absent.
        scaling: of the low-rank product.
        weight: the base weight; None if it cannot be read.
        transposed: whether it is stored as ``[d_in, d_out]`` (an embedding, transformers' Conv1D).
        groups: of a convolution.
        by_input: whether the magnitude is one of the input axis, as some of LyCORIS's are.
        epsilon: whether the program adds something to the norm, so that it is never zero.
        dtype: in which the norm is taken; None: that of the weight.
        unread: why the weight cannot be read.
        no_data: whether the adapter's tensors cannot be read either.
    """

    site: str
    left: torch.Tensor | None
    right: torch.Tensor | None
    magnitude: torch.Tensor | None
    scaling: float
    weight: Weight | None
    transposed: bool = False
    groups: int = 1
    by_input: bool = False
    epsilon: bool = False
    dtype: torch.dtype | None = None
    unread: str = ""
    adapter: str = ""
    no_data: bool = False

    @property
    def d_out(self) -> int:
        """How many norms there are."""
        assert self.left is not None and self.right is not None
        return int(self.right.shape[1] if self.by_input else self.left.shape[0] * self.groups)


def examine(layer: Layer) -> tuple[list[Finding], bool]:
    """What is wrong with a layer, and whether its norms could be computed."""
    findings = [] if layer.no_data else list(_of_the_adapter(layer))
    if layer.unread:
        findings.append(_found(layer, "unread", f"its norms are not checked: {layer.unread}"))
    if layer.weight is None or layer.left is None or layer.right is None or layer.unread:
        return findings, False
    if 0 in (layer.left.shape[-1], layer.right.shape[0]):
        return findings, False
    misfit = _misfit(layer)
    if misfit:
        return [*findings, _found(layer, "shape", misfit)], False
    norms, finite = _norms(layer)
    findings += _of_the_norms(layer, norms, finite)
    return findings, True


def _found(layer: Layer, kind: str, text: str, mask: torch.Tensor | None = None) -> Finding:
    count, rows = (0, ()) if mask is None else rows_of(mask)
    return Finding(kind, layer.site, text, layer.adapter, count, rows)


def _masked(layer: Layer, kind: str, what: str, mask: torch.Tensor) -> Iterator[Finding]:
    """A finding about the rows where a mask is true, if there are any."""
    count, rows = rows_of(mask)
    if count:
        yield _found(layer, kind, f"{count} of {mask.numel()} {what}: {named_rows(rows, count)}", mask)


def _of_the_adapter(layer: Layer) -> Iterator[Finding]:
    """What the adapter's own tensors show."""
    for name, factor in (("B", layer.left), ("A", layer.right)):
        if factor is None:
            yield _found(layer, "missing-factor", f"it has no factor {name}")
        elif not bool(factor.isfinite().all()):
            yield _found(layer, "non-finite-factor", f"its factor {name} has entries that are NaN or infinite")
    if layer.left is not None and layer.right is not None and 0 in (layer.left.shape[-1], layer.right.shape[0]):
        yield _found(layer, "rank", "its factors have rank 0")
    m = layer.magnitude
    if m is None:
        yield _found(layer, "missing-magnitude", "it has factors, but no magnitude")
        return
    if layer.by_input:
        yield _found(
            layer,
            "magnitude-axis",
            f"its magnitude {tuple(m.shape)} is one for each input, where PEFT has one for each output",
        )
    matrices = layer.left is not None and layer.right is not None and layer.left.dim() == layer.right.dim() == 2
    if layer.left is not None and layer.right is not None and matrices and m.numel() != layer.d_out:
        d_in = int(layer.right.shape[1])
        if m.numel() == d_in:
            what = f"its magnitude {tuple(m.shape)} has an entry for each of {d_in} inputs, not for each of {layer.d_out} outputs"
            yield _found(layer, "magnitude-axis", what)
        else:
            what = f"its magnitude {tuple(m.shape)} has {m.numel()} entries, the layer {layer.d_out} outputs"
            yield _found(layer, "magnitude-shape", what)
    flat = m.detach().reshape(-1)
    yield from _masked(layer, "non-finite-magnitude", "magnitudes are NaN or infinite", ~flat.isfinite())
    yield from _masked(layer, "negative-magnitude", "magnitudes are negative", flat < 0)


def _misfit(layer: Layer) -> str:
    """Why factors and weight do not belong together; empty if they do."""
    assert layer.left is not None and layer.right is not None and layer.weight is not None
    shape = layer.weight.shape
    sizes = f"weight {shape}, B {tuple(layer.left.shape)}, A {tuple(layer.right.shape)}"
    if len(shape) < 2 or layer.left.dim() != 2 or layer.right.dim() != 2:
        return f"they are no matrices: {sizes}"
    if layer.left.shape[1] != layer.right.shape[0]:
        return f"the factors have different ranks: {sizes}"
    columns = 1
    for size in shape[1:]:
        columns *= size
    fits = (
        (layer.left.shape[0] * layer.right.shape[1] == shape[0] * columns)
        if layer.groups > 1
        else (
            (layer.left.shape[0], layer.right.shape[1])
            == ((columns, shape[0]) if layer.transposed else (shape[0], columns))
        )
    )
    return "" if fits else f"the factors do not fit the base weight: {sizes}"


def _norms(layer: Layer) -> tuple[torch.Tensor, bool]:
    """The norms ``[d_out]`` in fp32 or fp64, and whether the base weight is finite where they are not. A block of rows of the weight is
    in memory at a time."""
    weight, left, right = layer.weight, layer.left, layer.right
    assert weight is not None and left is not None and right is not None
    left, right, transposed = left.detach(), right.detach(), layer.transposed
    if layer.by_input:
        left, right, transposed = right.T, left.T, not transposed
    dtype = layer.dtype or weight.dtype
    row_norm = torch.ops.dorafx.row_norm.default
    finite = True
    with torch.no_grad():
        if layer.groups > 1:  # PEFT multiplies the factors in shapes of their own, and reshapes the product
            whole = weight.rows(0, weight.shape[0])
            delta = (left.float() @ right.float()).reshape(whole.shape)
            norms = torch.linalg.vector_norm((whole.float() + layer.scaling * delta).flatten(1), dim=1)
            return norms, bool(whole.isfinite().all())
        height = weight.shape[0]
        width = max(1, torch.Size(weight.shape).numel() // max(1, height))
        step = max(1, _BLOCK_BYTES // (4 * width))
        parts: list[torch.Tensor] = []
        total: torch.Tensor | None = None
        for first in range(0, height, step):
            stored = weight.rows(first, first + step).detach().flatten(1)
            block = stored.to(dtype)
            if transposed:
                part = row_norm(block.T, left, right[:, first : first + step], layer.scaling, "tiled")
                # Not squares: those of large entries would overflow.
                total = part if total is None else torch.hypot(total, part)
            else:
                part = row_norm(block, left[first : first + step], right, layer.scaling, "tiled")
                parts.append(part)
            if not bool(part.isfinite().all()):
                finite &= bool(stored.isfinite().all())
        if transposed:
            return (total if total is not None else left.new_zeros(left.shape[0], dtype=torch.float32)), finite
        return (torch.cat(parts) if parts else left.new_zeros(0, dtype=torch.float32)), finite


def _of_the_norms(layer: Layer, norms: torch.Tensor, finite: bool) -> Iterator[Finding]:
    """What the norms show, beside the magnitudes."""
    assert layer.weight is not None
    dtype = layer.dtype or layer.weight.dtype
    name = str(dtype).removeprefix("torch.")
    limits = torch.finfo(dtype)
    rounded = norms.to(dtype)
    zero = rounded == 0
    exactly = (norms == 0) & (torch.promote_types(dtype, layer.weight.dtype) == dtype)
    kind = "zero-norm-with-epsilon" if layer.epsilon else "zero-norm"
    yield from _masked(layer, kind, "rows of W + s·B·A have a norm of zero", zero & exactly)
    yield from _masked(layer, kind, f"rows of W + s·B·A have a norm that is zero in {name}", zero & ~exactly)
    yield from _masked(
        layer, "tiny-norm", f"rows of W + s·B·A have a norm below {name}'s smallest normal number, {limits.tiny:.1e}",
        (norms < limits.tiny) & ~zero,
    )  # fmt: skip
    factors_finite = all(bool(f.isfinite().all()) for f in (layer.left, layer.right) if f is not None)
    wrong = ~rounded.isfinite()
    if not finite:
        yield from _masked(
            layer, "non-finite-weight", "rows of the base weight have entries that are NaN or infinite", wrong
        )
    elif factors_finite:
        what = f"rows of W + s·B·A have a norm beyond {name}'s largest number, {limits.max:.1e}"
        yield from _masked(layer, "overflowing-norm", what, wrong)
    m = layer.magnitude
    if m is None or m.numel() != norms.numel():
        return
    m = m.detach().reshape(-1).to(norms)
    yield from _masked(layer, "zero-magnitude", "magnitudes are zero where the norm is not", (m == 0) & ~zero)
    # PEFT initialises magnitudes in the base's dtype; one that was never trained differs by its rounding.
    stored = layer.magnitude.dtype if layer.magnitude is not None else dtype
    tolerance = 4 * max(limits.eps, torch.finfo(stored).eps, torch.finfo(layer.weight.dtype).eps)
    alike = torch.isclose(m, norms, rtol=tolerance, atol=float(limits.tiny)) | ~norms.isfinite()
    if norms.numel() and bool(alike.all()) and bool(norms.isfinite().any()):
        yield _found(layer, "untrained", "all magnitudes equal the norms, as at initialisation")
