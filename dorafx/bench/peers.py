"""DoRA implementations of others, from folders that a caller names; none is part of dorafx.

paper     the fork of PEFT of arXiv:2603.22276 (its repository, or one that contains it below ``vendor``), used in place of PEFT
axolotl   axolotl's kernel of the norm (its repository), inside stock PEFT's layers
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dorafx.errors import DorafxError

from .norms import NORMS

PEERS = {
    "paper": "the fork of PEFT of arXiv:2603.22276, eager",
    "axolotl": "stock PEFT with axolotl's kernel of the norm, eager",
}

_MARKS = {"paper": "peft/tuners/lora/dora_fused.py", "axolotl": "axolotl/kernels/dora.py"}
"""A file that identifies each, relative to the folder that its package is imported from."""
_ROOTS = (".", "src", "*", "*/src", "vendor/*", "vendor/*/src")


def find_peers(folders: Sequence[Path]) -> dict[str, Path]:
    """Name -> the folder that the peer's package is imported from.

    Raises:
        ValueError: a folder contains no peer.
    """
    peers: dict[str, Path] = {}
    for folder in folders:
        declared = {
            name: file.parents[mark.count("/")].resolve()
            for name, mark in _MARKS.items()
            for root in _ROOTS
            for file in sorted(folder.glob(f"{root}/{mark}" if root != "." else mark))[:1]
        }
        if not declared:
            raise ValueError(
                f"--peer-path: {folder} has neither {' nor '.join(_MARKS.values())}, there or below src or vendor"
            )
        for name, package_folder in declared.items():
            peers.setdefault(name, package_folder)
    return peers


def use_peer(name: str, folder: Path) -> None:
    """Make this process use a peer; to be called before PEFT is imported.

    Raises:
        DorafxError: PEFT is imported already; or the contents of ``folder`` cannot be used.
    """
    if name == "paper":
        if "peft" in sys.modules:
            raise DorafxError("another PEFT is imported in this process already")
        sys.path.insert(0, str(folder))
        import peft

        if not Path(peft.__file__).is_relative_to(folder):
            raise DorafxError(f"PEFT was imported from {peft.__file__}, not from {folder}")
    elif name == "axolotl":
        NORMS[name] = _axolotl_norm(folder / _MARKS[name])


def _axolotl_norm(file: Path) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Its function returns ``m / n``, so with magnitudes of one ``1 / n``."""
    package, name = types.ModuleType("axolotl_kernels"), "axolotl_kernels.dora"
    # axolotl's dequantisation needs bitsandbytes. Only dense weights are measured, which it returns unchanged.
    quantize: Any = types.ModuleType("axolotl_kernels.quantize")
    quantize.dequantize = lambda weight, state=None: weight
    sys.modules.update({package.__name__: package, quantize.__name__: quantize})
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        kernel = module.triton_dora_scale
    except Exception as error:
        raise DorafxError(f"{file} cannot be used: {type(error).__name__}: {error}") from error

    def norm(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
        ones = torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
        return 1 / kernel(weight, None, right, left, scale, ones, weight.dtype)  # type: ignore[no-any-return]

    return norm
