"""The row norm of ``W + s·B·A`` alone, and its memory; with a quantised ``W`` the other implementations dequantise it first."""

from __future__ import annotations

from collections.abc import Callable

import torch

import dorafx.ops  # noqa: F401  (registers the operators)
from dorafx.ops import dispatch
from dorafx.runtime.on_device import NormsOnDevice, Source

from ..allocations import allocations
from ..clock import Clock
from ..implementations import Figures, Task
from ..norms import NORMS, PRODUCT, Norm, largest_error, product
from ..plan import DTYPES
from ..quantized import dense_of, random_packed

_SCALE = 2.0


def implementation(task: Task) -> Norm:
    """The norm that a name stands for."""
    if task.name == "dorafx":
        return torch.ops.dorafx.row_norm
    if task.name == PRODUCT:
        return product
    return task.compiled(NORMS[task.name.removesuffix("-inductor")])


def measure(task: Task) -> Figures:
    """Seconds of a call; bytes of its largest allocation, and the peak of its temporaries; for a dense weight also the largest relative
    error against fp64."""
    p = task.parameters
    weights, sizes = p.get("weights", "dense"), (p["d_out"], p["d_in"])
    weight = task.random(*sizes) if weights == "dense" else None
    left, right = task.random(p["d_out"], p["rank"]), task.random(p["rank"], p["d_in"])
    if "factors" in p:
        left, right = left.to(DTYPES[p["factors"]]), right.to(DTYPES[p["factors"]])
    if weight is None:
        call = _of_quantized(task, weights, left, right)
    else:
        norm = implementation(task)

        def call() -> torch.Tensor:
            return norm(weight, left, right, _SCALE)

    step: Callable[[], torch.Tensor] = torch.no_grad()(call)
    figures = task.clock.figures("time", step, cold=True)
    memory = allocations(step, task.clock.device)
    figures["largest allocation"] = ("B", [memory.largest])
    figures["temporaries"] = ("B", [memory.peak])
    if weight is not None and task.name != PRODUCT:
        figures["error"] = ("ratio", [largest_error(step(), weight, left, right, _SCALE)])
    if weight is not None and task.name == "dorafx":
        figures |= unchanged(task.clock, weight, left, right)
    return figures


def unchanged(clock: Clock, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Figures:
    """On a device whose kernels compare contents: seconds of a call that finds nothing changed, in a long forward that compares all
    bytes (if that is worth it for these), and in decoding."""
    figures: Figures = {}
    operands = (weight, left, right)
    source = Source([*operands], [], operands, _SCALE, None)
    if not dispatch.serves(weight.device) or not dispatch.takes(*operands):
        return figures
    for name, few_tokens in (("all compared", False), ("compared in decoding", True)):
        norms = NormsOnDevice(few_tokens)

        def call(norms: NormsOnDevice = norms) -> object:
            return norms.norms(operands, lambda: [source], lambda _: [torch.ops.dorafx.row_norm(*operands, _SCALE)], [])

        if few_tokens or source.worth_comparing():
            figures |= clock.figures(name, call, cold=True, warm_up=3)
    return figures


def _of_quantized(task: Task, kind: str, left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    w = random_packed(kind, left.shape[0], right.shape[1], task.dtype, task.clock.device)
    if task.name == "dorafx":
        operator, layout = torch.ops.dorafx.row_norm_quantized, (w.format, w.shape, w.group, w.dtype)
        return lambda: operator(w.packed, w.scales, w.zeros, left, right, _SCALE, *layout)
    norm, dense = implementation(task), dense_of(w)
    # PEFT casts the weight to the dtype of the activations.
    return lambda: norm(dense().to(task.dtype), left, right, _SCALE)
