"""Where the demo runs, and a size of model that suits the device."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import torch

from dorafx.bench.models import Size
from dorafx.errors import DorafxError

ON_CPU = Size(hidden=1024, layers=1, rank=128, tokens=256)
# By the GiB of memory that are free. The four processes are on the device at the same time, and stock PEFT's training step takes most.
ON_GPU = {
    24: Size(hidden=4096, layers=2, rank=128, tokens=2048),
    8: Size(hidden=2048, layers=2, rank=128, tokens=1024),
    0: Size(hidden=1024, layers=1, rank=128, tokens=512),
}
_LEAST_CAPABILITY = (7, 0)
"""Of a GPU that Triton compiles for, and with it Inductor."""


@dataclass(frozen=True)
class Setting:
    """What the demo measures, and where.

    Attributes:
        device: ``"cpu"`` or a CUDA device.
        dtype: name of the model's dtype: float32 on a CPU, bfloat16 on a GPU.
        where: the device in words.
        note: why the demo does not run on a GPU that might be expected to serve; else empty.
    """

    device: str
    dtype: str
    size: Size
    where: str
    note: str = ""

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"


def choose_setting(device: str | None = None, **sizes: int | None) -> Setting:
    """The device and the size of the model.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None takes a GPU if torch can use one.
        sizes: fields of :class:`Size` to take instead of the ones that suit the device; None is left to the device.

    Raises:
        DorafxError: the device is of another type, or is not there.
        ValueError: wrong sizes.
    """
    note = ""
    if device is None:
        device, note = _found()
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise DorafxError(f"--device must be cpu, cuda or cuda:N, not {device}")
    if kind == "cpu":
        return Setting("cpu", "float32", _size(ON_CPU, sizes), f"on the CPU ({_threads()})", note)
    try:
        free, _ = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise DorafxError(f"--device {device}: torch cannot use it: {_first_line(error)}") from error
    suits = next(size for least, size in ON_GPU.items() if free >= least << 30)
    return Setting(device, "bfloat16", _size(suits, sizes), f"on {name}")


def _found() -> tuple[str, str]:
    """The device, and a note if there may be a GPU that cannot be used."""
    # An old driver or a broken installation is a warning of torch's, in several lines; its first says what is wrong.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return "cpu", f"torch cannot use a GPU here: {_first_line(said[0].message)}" if said else ""
    try:
        capability = torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:  # one that another process has for itself
        return "cpu", f"torch cannot use a GPU here: {_first_line(error)}"
    if torch.version.cuda and capability < _LEAST_CAPABILITY:
        return "cpu", f"{torch.cuda.get_device_name()} is older than what torch.compile supports"
    return "cuda", ""


def _size(suits: Size, sizes: dict[str, int | None]) -> Size:
    # Not ``replace``: the fields that are derived from the hidden size are derived again.
    chosen = {key: asdict(suits)[key] if value is None else value for key, value in sizes.items()}
    return Size(**{key: asdict(suits)[key] for key in ("hidden", "layers", "rank", "tokens")} | chosen)


def _threads() -> str:
    threads = torch.get_num_threads()
    return "1 thread" if threads == 1 else f"{threads} threads"


def _first_line(error: object) -> str:
    """Of an exception's or a warning's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
