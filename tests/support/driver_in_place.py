"""A driver of ours in the place of a GPU's: kernels are compiled by Triton as for a device, and none is run."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget


class Device:
    """Stands for Triton's driver of a GPU: counts the kernels that are loaded and launched, and runs none."""

    def __init__(self, key: str) -> None:
        self.key = key  # of Triton's caches of what is loaded, so that no device's are used
        self.loaded: list[str] = []
        self.launched: list[str] = []
        self.utils = self

    def get_current_device(self) -> str:
        return self.key

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, *rest: Any) -> tuple[object, object, int, int, int]:
        self.loaded.append(name)
        return object(), object(), 64, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(metadata.name)

    def forget(self) -> None:
        self.loaded.clear()
        self.launched.clear()
