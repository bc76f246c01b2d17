"""Tensor subclasses that hold a weight as integer codes, and do not know dorafx's operators."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Casting", "Computing"]


class Casting(torch.Tensor):
    """Codes ``[d_out, d_in]`` and scales ``[d_out, 1]``, dequantised where it is cast, as torchao's NF4Tensor is. It has no other
    operator."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(…)"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, meta: Any, size: Any, stride: Any) -> Any:
        return cls(inner["codes"], inner["scale"])

    def plain(self) -> torch.Tensor:
        return (self.codes.to(self.scale.dtype) - 8) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to:
            return args[0].plain()
        with torch._C.DisableTorchFunctionSubclass():  # a result is no subclass unless an operator says so
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{cls.__name__}: {func}")


class Computing(Casting):
    """One that is multiplied and added as its plain value, too."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.t.default, torch.ops.aten.linear.default):
            return func(*[a.plain() if isinstance(a, cls) else a for a in args], **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)
