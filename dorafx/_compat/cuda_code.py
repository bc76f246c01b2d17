"""The code that Inductor generates for a CUDA device, generated without one.

Without a device autograd has no CUDA tensors. So the graphs of a compiled program, forward and backward already partitioned, are
captured with CPU tensors; then each is given CUDA tensors without data, and Inductor generates its code, which is not run. The
properties of the device are those of an H100.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import fx

_H100 = {
    "name": "NVIDIA H100",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 80 << 30,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65536,
    "warp_size": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 50 << 20,
    "gcnArchName": "",
}


@dataclass(frozen=True)
class Part:
    """One graph that Inductor receives: a forward or a backward, with its operators decomposed.

    Attributes:
        inputs: tensors of the CPU without data, and numbers.
    """

    graph: fx.GraphModule
    inputs: list[Any]
    is_backward: bool
    is_inference: bool


@contextlib.contextmanager
def captured_parts() -> Iterator[list[Part]]:
    """Collect the graphs that Inductor would compile in this context, in order: for a program with gradients the forward and the
    backward. None is compiled, so the one call of the program must be expected to raise. Tensors made here have no data."""
    from torch._functorch import config as functorch
    from torch._inductor import compile_fx, config
    from torch._inductor.output_code import MockFXGraphCacheOutput
    from torch._subclasses.fake_tensor import FakeTensorMode

    parts: list[Part] = []

    def capture(gm: fx.GraphModule, example_inputs: Any, **how: Any) -> Any:
        parts.append(Part(gm, list(example_inputs), bool(how.get("is_backward")), bool(how.get("is_inference", False))))
        return MockFXGraphCacheOutput(gm)

    with (
        FakeTensorMode(),
        mock.patch.object(compile_fx, "_compile_fx_inner", capture),
        config.patch({"fx_graph_cache": False}),
        functorch.patch({"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}),
    ):
        yield parts


def cuda_code(part: Part) -> str:
    """Inductor's module of a graph, as Python source: Triton kernels, and a function ``call`` that launches them and the products.

    Raises:
        Exception: Inductor's, for a graph that it can't lower to CUDA.
    """
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    written: list[str] = []

    class Written(Exception):
        pass

    def write(lowering: Any) -> Any:
        code = lowering.codegen()[0]
        written.append(str(getattr(code, "value", code)))
        raise Written

    device = torch.device("cuda", 0)
    graph = _on(device, part.graph)
    mode = FakeTensorMode()
    with mode:
        inputs = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) if isinstance(t, torch.Tensor) else t
            for t in part.inputs
        ]
    with _pretended(), torch.no_grad():
        FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*inputs)
        with (
            mock.patch.object(GraphLowering, "compile_to_module", write),
            config.patch({"fx_graph_cache": False}),
        ):
            try:
                compile_fx.compile_fx_inner(graph, inputs, is_backward=part.is_backward, is_inference=part.is_inference)
            except Exception as error:
                if not written or "Written" not in f"{type(error).__name__}{error}":
                    raise
    return written[0]


def _on(device: torch.device, gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that creates its tensors on a device."""
    moved = fx.GraphModule(gm, fx.Graph())
    output = moved.graph.graph_copy(gm.graph, {})
    moved.graph.output(output)

    def on_device(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in moved.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, on_device)
        node.kwargs = fx.node.map_aggregate(node.kwargs, on_device)
    moved.recompile()
    return moved


@contextlib.contextmanager
def _pretended() -> Iterator[None]:
    """Replace Inductor's queries of the device by constants; no driver is needed."""
    from torch._dynamo import device_interface
    from torch._inductor import scheduler
    from torch._inductor.fx_passes import reinplace
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = SimpleNamespace(**_H100)

    class Worker(device_interface.CudaInterface.Worker):
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: properties)

    class Interface(device_interface.CudaInterface):
        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        is_available = staticmethod(lambda: True)
        get_device_properties = staticmethod(lambda device=None: properties)  # type: ignore[assignment]
        get_compute_capability = staticmethod(lambda device=None: 90)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        get_raw_stream = staticmethod(lambda device: 0)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    Interface.Worker = Worker  # type: ignore[misc]
    device_interface.get_interface_for_device("cpu")  # registers the existing ones, once
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, is_active=lambda: True
    )
    cuda = {
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "current_device": lambda: 0,
    }
    interfaces = {name: Interface for name in ("cuda", "cuda:0")}
    previous = driver._active
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        for name, answer in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", return_value=True))
        # It checks by a copy whether shapes fit, which would need the device.
        stack.enter_context(
            mock.patch.object(reinplace, "_inplace_generalized_scatter", lambda into, source, views: into)
        )
        driver.set_active(target)
        try:
            yield
        finally:
            driver._active = previous
