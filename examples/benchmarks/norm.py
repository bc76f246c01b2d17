"""Row norm of W + s·B·A on this machine: stock PEFT's identity trick, the dense product, and dorafx.

    python examples/benchmarks/norm.py [--size 4096] [--ranks 16 128 384]

Each configuration runs in a process of its own; milliseconds are medians of seven calls after two that warm up.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def identity_trick(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(w.shape[1])
    return torch.linalg.norm(w + 2.0 * F.linear(F.linear(eye, a), b).T, dim=1)


def dense_product(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.linalg.norm(w + 2.0 * (b @ a), dim=1)


def dorafx_norm(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    import dorafx.ops  # noqa: F401

    return torch.ops.dorafx.row_norm(w, b, a, 2.0)


CONFIGURATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "identity": identity_trick,
    "dense": dense_product,
    "dorafx": dorafx_norm,
}


def measure(name: str, size: int, rank: int) -> float:
    w, b, a = torch.randn(size, size), torch.randn(size, rank), torch.randn(rank, size)
    samples = []
    for i in range(9):
        start = time.perf_counter()
        CONFIGURATIONS[name](w, b, a)
        if i > 1:
            samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128, 384])
    parser.add_argument("--one", nargs=2, metavar=("NAME", "RANK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(options.one[0], options.size, int(options.one[1])))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, [{options.size}, {options.size}] fp32, ms")
    for rank in options.ranks:
        times = {}
        for name in CONFIGURATIONS:
            command = [sys.executable, __file__, "--size", str(options.size), "--one", name, str(rank)]
            times[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"rank {rank}: " + ", ".join(f"{name} {t:.1f}" for name, t in times.items()))


if __name__ == "__main__":
    main()
