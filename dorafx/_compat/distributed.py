"""Private API of torch.distributed.

Nothing here imports torch.distributed.tensor into a program that has not imported it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from dorafx._compat.dynamo import KnownBackend


def placements(value: Any) -> tuple[Any, ...] | None:
    """The placements of a DTensor; None for anything else."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return tuple(value.placements) if dtensor is not None and isinstance(value, dtensor) else None


def replicated() -> Any:
    """The placement of a value that every device holds completely."""
    from torch.distributed.tensor import Replicate

    return Replicate()


def is_partial(placement: Any) -> bool:
    """Whether the values of a placement have yet to be reduced over devices."""
    return bool(placement.is_partial())


def is_shard(placement: Any, dimension: int) -> bool:
    """Whether a placement splits a dimension into one contiguous piece for each device."""
    from torch.distributed.tensor import Shard

    # The exact class: a strided shard, which combined parallelisms use, interleaves the pieces.
    return type(placement) is Shard and placement.dim == dimension


def local_part(tensor: torch.Tensor, mesh: Any, target: tuple[Any, ...]) -> torch.Tensor:
    """This device's part of a tensor that is laid out by the placements ``target``; a plain tensor counts as replicated."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tuple(tensor.placements) != target:
        tensor = tensor.redistribute(mesh, target)
    local: torch.Tensor = tensor.to_local()
    return local


def from_parts(
    part: torch.Tensor, length: int, mesh: Any, current: tuple[Any, ...], target: tuple[Any, ...] | None
) -> torch.Tensor:
    """The vector of ``length`` elements whose parts have the placements ``current``, redistributed to ``target``. Parts may
    differ in length, so the length of the whole cannot be computed from one of them."""
    from torch.distributed.tensor import DTensor

    whole: torch.Tensor = DTensor.from_local(
        part, mesh, current, run_check=False, shape=torch.Size((length,)), stride=(1,)
    )
    return whole if target is None or current == target else whole.redistribute(mesh, target)  # type: ignore[attr-defined]


def partial_norm() -> Any:
    """DTensor's placement for 2-norms whose squares add up over devices: what its own ``vector_norm`` gives."""
    from torch.distributed.tensor._ops._math_ops import _NormPartial

    return _NormPartial(2)


def fully_sharded_process() -> bool:
    """Whether a module of this process is under ``fully_shard`` (FSDP2), which gathers parameters into memory and tensor
    objects that it used before, and puts the version counters back to what they were."""
    states = sys.modules.get("torch.distributed._composable_state")
    fsdp = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    if states is None or fsdp is None:
        return False
    return any(isinstance(reference(), fsdp.FSDPState) for reference in list(states._module_state_mapping.values()))


def zero3_parameter(value: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 partitions a parameter: it marks each with a number."""
    return isinstance(value, torch.Tensor) and hasattr(value, "ds_id")


# -- DistributedDataParallel ------------------------------------------------------------------------------------------

Compile = Callable[[Any, Any], Callable[..., Any]]
_splitter: ContextVar[Callable[[Any, Any, Compile], Callable[..., Any]] | None] = ContextVar("splitter", default=None)


def bucket_splitter() -> Callable[[Any, Any, Compile], Callable[..., Any]] | None:
    """Under DistributedDataParallel, a function that compiles a graph in pieces, one for each bucket of gradients:
    ``splitter(graph, inputs, compile_piece)``. None elsewhere."""
    return _splitter.get()


def rewrite_before_buckets(backend: Callable[..., Any]) -> None:
    """Make Dynamo's DDPOptimizer pass whole graphs to this backend, which splits them with :func:`bucket_splitter`.

    DDPOptimizer splits a graph at the buckets and calls the backend for each piece. A split may separate the norm of a layer from
    its composition. Other backends are not affected.
    """
    if not torch.distributed.is_available():
        return
    from torch._dynamo.backends.distributed import DDPOptimizer

    original = DDPOptimizer.compile_fn

    @functools.wraps(original)
    def compile_fn(self: Any, gm: Any, example_inputs: Any, **configs: Any) -> Any:
        if _unwrapped(self.backend_compile_fn) is not backend:
            return original(self, gm, example_inputs, **configs)

        def split(graph: Any, inputs: Any, compile_piece: Compile) -> Any:
            optimizer = DDPOptimizer(self.bucket_bytes_cap, compile_piece, self.first_bucket_cap)
            return original(optimizer, graph, inputs)

        token = _splitter.set(split)
        try:
            return self.backend_compile_fn(gm, example_inputs, **configs)
        finally:
            _splitter.reset(token)

    DDPOptimizer.compile_fn = compile_fn  # type: ignore[method-assign]


def _unwrapped(backend: Any) -> Any:
    """A backend without the wrappers of Dynamo, ``torch.compile``, :func:`dorafx.optimize` and ``functools.partial``."""
    while True:
        # In this order: Dynamo's wrapper has a copy of the attributes of what it wraps, and a KnownBackend a compiler_fn that it
        # does not call.
        if hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        elif isinstance(backend, KnownBackend):
            backend = backend.backend
        elif isinstance(backend, functools.partial):
            backend = backend.func
        elif hasattr(backend, "compiler_fn"):
            backend = backend.compiler_fn
        else:
            return backend
