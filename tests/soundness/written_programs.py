"""Random programs that write: DoRA computed in place, with writes, views, detached aliases and reads among its steps.

A program is its own source: a list of statements, so that one that goes wrong prints itself and can be made smaller by leaving
statements out.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HEADER = ["W, A, B, m, b = p.W, p.A, p.B, p.m, p.b", "base, aux = F.linear(x, W), x.sum()"]
NORMS = (
    ["n = (W + 0.7 * (B @ A)).norm(dim=1)"],
    ["n = (W + 0.7 * (B @ A)).norm(dim=1).detach()"],
    ["V = W + 0.7 * (B @ A)", "n = torch.linalg.vector_norm(V, dim=1)", "n.detach_()"],
    ["V = B @ A", "V.mul_(0.7)", "V += W", "n = V.norm(dim=1)"],
    ["V = W.clone()", "V.addmm_(B, A, alpha=0.7)", "n = V.square().sum(1)", "n.sqrt_()"],
)
COMPOSITIONS = (
    ["y = F.linear(x, W)", "y += 0.7 * (x @ A.T @ B.T)", "y /= n", "y *= m", "y += b"],
    ["y = F.linear(x, W)", "y.add_(x @ A.T @ B.T, alpha=0.7)", "g = m / n", "y = y * g", "y.add_(b)"],
    ["y = x @ A.T @ B.T", "y *= 0.7", "y.add_(F.linear(x, W))", "y.mul_(m).div_(n)"],
    ["y = F.linear(x, W) + 0.7 * (x @ A.T @ B.T)", "g = m.clone()", "g.div_(n)", "y *= g"],
    ["g = m.clamp(0, 5)", "g /= n", "y = g * (F.linear(x, W) + 0.7 * F.linear(F.linear(x, A), B))"],
)
OPERANDS = (
    "0.5",
    "m",
    "b",
    "n",
    "m.detach()",
    "base",
    "{v}",
    "{v}.detach()",
    "base[0]",
    "torch.ones(6, dtype=x.dtype)",
)
WRITES = (
    "{v}.add_({e})",
    "{v}.mul_({e})",
    "{v} += {e}",
    "{v} *= {e}",
    "{v}.sub_({e}, alpha=0.5)",
    "{v}.div_(2.0)",
    "{v}.neg_()",
    "{v}.clamp_(-3, 3)",
    "{v} **= 2",
    "{v}.abs_()",
    "{v}.addcmul_({e}, m)",
    "{v}.lerp_({v}.detach() * 2, 0.3)",
    "{v}.detach_()",
    "{v}.relu_()",
    "F.leaky_relu({v}, 0.5, inplace=True)",
    "{v}.copy_({e})",
    "{v}.fill_(0.3)",
    "{v}.masked_fill_({v} > 1, 0.5)",
    "{v}[0] += 1",
    "{v}[..., :3].mul_(2.0)",
    "{v}[..., 1:] = 0.25",
    "{v}.unsqueeze_(0)",
    "{v}.squeeze_(0)",
    "{v}.transpose_(0, -1).transpose_(0, -1)",
    "{v}.transpose_(0, -1)",
    "torch.mul({v}, 2.0, out={v})",
    "torch._foreach_mul_([{v}], 1.5)",
    "{v}.index_add_(0, torch.tensor([0]), {v}[:1].detach())",
    "{v}.data.mul_(1.5)",
)
READS = (
    "aux = aux + {v}.sum()",
    "aux = aux + {v}.pow(2).mean()",
    "aux = aux + {v}.detach().pow(2).mean()",
    "{w} = {v}.detach()",
    "{w} = {v}.clone()",
    "{w} = {v} * 2.0",
    "{w} = {v}",
    "{w} = {v}.view({v}.shape)",
    "{w} = {v}[..., :]",
    "{w} = {v}.unsqueeze(0)[0]",
    "{w} = {v}.mT.mT if {v}.dim() > 1 else {v}.view(-1)",
    "{w} = {v}.to(x.dtype)",
    "{w} = {v}.contiguous()",
    "{w} = {v}.data",
    "{w} = {v}.expand_as({v})",
)
VARIABLES = ("y", "n", "g", "V", "base", "u", "v", "w")


class Factors(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random_values(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.W = nn.Parameter(random_values(6, 5), requires_grad=False)
        self.A, self.B = nn.Parameter(random_values(2, 5)), nn.Parameter(random_values(6, 2))
        self.m, self.b = nn.Parameter(1 + random_values(6).abs()), nn.Parameter(random_values(6))


def statements(seed: int) -> list[str]:
    """The program of a seed; some raise, and are no programs."""
    draw = random.Random(seed)
    lines = [*draw.choice(NORMS), *draw.choice(COMPOSITIONS)]
    for _ in range(draw.choice((1, 2, 2, 3, 3, 4, 5))):
        at = draw.randint(1, len(lines))
        made = [v for v in VARIABLES if any(line.startswith((f"{v} =", f"{v}, ")) for line in lines[:at])]
        variable = draw.choice([*made, "base"] if draw.random() < 0.2 or not made else made)
        line = draw.choice(WRITES if draw.random() < 0.55 else READS)
        operand = draw.choice(OPERANDS).format(v=variable)
        line = line.format(v=variable, w=draw.choice(VARIABLES[-3:]), e=operand)
        if draw.random() < 0.1:
            line = f"with torch.no_grad(): {line}"
        lines.insert(at, line)
    made = [v for v in VARIABLES if any(line.startswith(f"{v} =") for line in lines)]
    returned = draw.sample(made, min(len(made), draw.choice((0, 0, 1, 1, 2))))
    return [*lines, f"return {', '.join(['y', 'aux', *returned])}"]


def program_of(lines: list[str]) -> Any:
    """``program(p, x)`` of its statements."""
    source = "\n    ".join(["def program(p, x):", *HEADER, *lines])
    scope: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(source, "<written program>", "exec"), scope)
    return scope["program"]
