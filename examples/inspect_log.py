"""Reading the log as data: what was rewritten, what was not and why, what it saved, and the report as a page.

Takes about 5 s on two CPU cores. Needs torch and dorafx alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import dorafx


def good(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    norm = (w + b @ a).norm(dim=1).detach()
    return m / norm * (F.linear(x, w) + F.linear(F.linear(x, a), b))


def squashed(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Not DoRA: the delta passes through tanh, and no factored norm can serve that."""
    norm = (w + torch.tanh(b @ a)).norm(dim=1).detach()
    return m / norm * (F.linear(x, w) + F.linear(F.linear(x, a), b))


def main() -> None:
    torch.manual_seed(0)
    x, w, a, b, m = torch.randn(4, 64), torch.randn(96, 64), torch.randn(4, 64), torch.randn(96, 4), torch.rand(96)
    for program in (good, squashed):
        torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})(x, w, a, b, m)
    log = dorafx.rewrite_log()
    for record in log.rewrites:
        print(
            f"rewritten: {record.pattern} [{record.d_out}, {record.d_in}] rank {record.rank}, {record.source.rsplit('/', 1)[-1]}"
        )
    for record in log.misses:
        print(f"left alone: {record.reason}")
    print("bytes of dense intermediates avoided:", sum(r["dense_bytes_avoided"] for r in log.to_records()))
    path = log.to_html(Path(tempfile.mkdtemp()) / "report.html")
    print("report:", path.name, path.stat().st_size > 0)


if __name__ == "__main__":
    main()
