"""A norm that runs out of memory is computed again with less; where that fails too, the first error comes out."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_quantized import CASES
from torch.utils._python_dispatch import TorchDispatchMode

import dorafx
from dorafx import DorafxWarning
from dorafx.ops import dispatch, norm, quantized, reference
from dorafx.runtime import norm_store


class Limited(TorchDispatchMode):
    """An allocator with a limit: any result of new memory beyond it fails, in the words of a device or of a CPU."""

    def __init__(self, limit: int, error: Callable[[int], RuntimeError]) -> None:
        super().__init__()
        self.limit = limit
        self.error = error
        self.failures = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(value, torch.Tensor) or value.untyped_storage()._cdata in inputs:
                continue
            if value.untyped_storage().nbytes() > self.limit:
                self.failures += 1
                raise self.error(self.failures)
        return result


def on_device(number: int) -> RuntimeError:
    return torch.OutOfMemoryError(f"CUDA out of memory, attempt {number}")


def on_cpu(number: int) -> RuntimeError:
    return RuntimeError(
        f"[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory, attempt {number}"
    )


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((128, 96), (128, 12), (12, 96))
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("error", [on_device, on_cpu])
@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_blocks(dtype: torch.dtype, algorithm: str, error: Callable[[int], RuntimeError]) -> None:
    weight, left, right = operands(dtype)
    exact = reference.row_norm(weight.double(), left.double(), right.double(), 0.5)
    limited = Limited(600, error)
    with limited, pytest.warns(DorafxWarning, match="out of memory during a norm"):
        found = norm.row_norm(weight, left, right, 0.5, algorithm)
    assert limited.failures
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


QUANTIZED = ("nf4", "bnb8", "torchao int8", "torchao intx", "hqq4 axis 0", "hqq4 axis 1")


@pytest.mark.parametrize("error", [on_device, on_cpu])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", QUANTIZED)
def test_smaller_blocks_of_a_quantised_weight(
    case: str, factors: torch.dtype, error: Callable[[int], RuntimeError]
) -> None:
    w, dense = CASES[case](torch.randn(128, 128))
    left, right = torch.randn(128, 12).to(factors), torch.randn(12, 128).to(factors)
    exact = reference.row_norm(dense.double(), left.double(), right.double(), 0.5)

    def compute() -> torch.Tensor:  # not by the operator, into which the limit would not see
        return quantized.row_norm_quantized(w, left, right, 0.5)

    compute()  # tables are made once
    limited = Limited(600, error)
    with limited, pytest.warns(DorafxWarning, match="out of memory during a norm"):
        found = compute()
    assert limited.failures
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    with Limited(64, error), pytest.raises(type(error(1)), match=r"attempt 1$"):
        compute()


def test_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [t.requires_grad_() for t in operands(torch.float32)]
    twins = [t.detach().double().requires_grad_() for t in leaves]
    reference.row_norm(*twins, 0.5).sin().sum().backward()
    total = torch.ops.dorafx.row_norm(*leaves, 0.5).sin().sum()
    original, heights = norm._block, []

    def without_room(*args: Any, shrink: int = 1) -> tuple[int, int]:
        heights.append(original(*args, shrink=shrink)[0])
        if shrink == 1:
            raise on_device(1)
        return original(*args, shrink=shrink)

    monkeypatch.setattr(norm, "_block", without_room)
    with pytest.warns(DorafxWarning, match="out of memory"):
        total.backward()
    assert len(heights) == 2 and heights[1] < heights[0]
    for leaf, twin in zip(leaves, twins):
        assert leaf.grad is not None and twin.grad is not None
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [on_device, on_cpu])
def test_the_first_error_comes_out(error: Callable[[int], RuntimeError]) -> None:
    weight, left, right = operands(torch.float32)
    with Limited(64, error), pytest.raises(type(error(1)), match=r"attempt 1$"):
        norm.row_norm(weight, left, right, 0.5)


def test_other_errors_are_not_tried_again() -> None:
    attempts: list[int] = []

    def compute(shrink: int) -> None:
        attempts.append(shrink)
        raise RuntimeError("device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        norm.with_less_memory(compute)
    assert attempts == [1]


def test_a_model_whose_norm_runs_out_of_memory_keeps_its_numbers() -> None:
    """Through the backend: the prologue's norm fails once, and the forward is the stock one's."""
    weight, left, right = operands(torch.float32)

    def program(x: torch.Tensor) -> torch.Tensor:
        n = (weight + 0.5 * left @ right).norm(dim=1).detach()
        return (x @ weight.T + 0.5 * (x @ right.T) @ left.T) / n

    x = torch.randn(7, 96)
    expected = program(x)
    compiled = torch.compile(program, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"})
    compiled(x)
    assert len(dorafx.rewrite_log().rewrites) == 1
    norm_store().clear()  # or the norm would be found by its content
    limited = Limited(4096, on_device)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(DorafxWarning, match="out of memory"):
        tiled = norm.tiled

        def under_limit(*args: Any) -> torch.Tensor:
            with limited:
                return tiled(*args)

        patch.setattr(norm, "tiled", under_limit)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert limited.failures


# -- launches, without a device ---------------------------------------------------------------------------------------


class Launcher:
    """Stands for the kernel's launcher: records what it is asked for, and fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.calls: list[tuple[int, int | None]] = []

    def launch_group(
        self, norms: Any, scale: float, parts: int | None = None, operand: Any = None
    ) -> list[torch.Tensor]:
        self._launch(len(norms), parts)
        return [reference.row_norm(*operands, scale) for operands in norms]

    def launch(
        self, weight: Any, left: Any, right: Any, scale: float, parts: int | None = None, operand: Any = None
    ) -> torch.Tensor:
        self._launch(1, parts)
        dense = quantized.dequantize_rows(weight, 0, weight.shape[0])
        return reference.row_norm(dense, left, right, scale)

    def _launch(self, count: int, parts: int | None) -> None:
        self.calls.append((count, parts))
        if self.failures:
            self.failures -= 1
            raise on_device(len(self.calls))


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    import sys

    found = Launcher()
    module = types.ModuleType("dorafx.ops.triton.row_norm")
    module.launch_group = found.launch_group  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dorafx.ops.triton.row_norm", module)
    module = types.ModuleType("dorafx.ops.triton.quantized")
    module.launch = found.launch  # type: ignore[attr-defined]
    module.serves = lambda weight: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dorafx.ops.triton.quantized", module)
    monkeypatch.setattr(dispatch, "available", lambda: True)
    return found


def _group() -> list[list[torch.Tensor]]:
    return [list(column) for column in zip(*(operands(torch.float32) for _ in range(3)))]


def test_launches_shrink_too(launcher: Launcher) -> None:
    launcher.failures = 1
    with pytest.warns(DorafxWarning, match="out of memory"):
        found = dispatch.row_norms(*_group(), [0.5] * 3, "auto", [])
    assert launcher.calls == [(3, None), (1, 1), (1, 1), (1, 1)]
    exact = reference.row_norm(*operands(torch.float32), 0.5)
    for value in found:
        torch.testing.assert_close(value, exact)
    launcher.failures = 100
    launcher.calls.clear()
    with pytest.raises(torch.OutOfMemoryError, match=r"attempt 1$"):
        dispatch.row_norm(*operands(torch.float32), 0.5)


def test_the_launch_of_a_quantised_weight_shrinks_too(launcher: Launcher) -> None:
    w, dense = CASES["nf4"](torch.randn(64, 64))
    left, right = torch.randn(64, 3), torch.randn(3, 64)
    launcher.failures = 1
    with pytest.warns(DorafxWarning, match="out of memory"):
        found = dispatch.row_norm_quantized(w, left, right, 0.5)
    assert launcher.calls == [(1, None), (1, 1)]
    torch.testing.assert_close(found, reference.row_norm(dense, left, right, 0.5))
    launcher.failures = 100
    with pytest.raises(torch.OutOfMemoryError, match=r"attempt 3$"):
        dispatch.row_norm_quantized(w, left, right, 0.5)


def test_a_captured_group_is_launched_as_any_other(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the calls before a capture did not launch would be compiled and loaded in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(dispatch, "being_captured", lambda: True)
        dispatch.row_norms(*_group(), [0.5] * 3, "auto", [])
    assert launcher.calls == [(3, None)]
