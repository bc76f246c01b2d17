"""A random program as data: statements over named operands, from which its source, and so the program itself, follows.

A program is its source: it is printed, compiled and run from the same text, so that one which fails can be copied out of
the report and run by itself. Statements are in static single assignment but for writes in place, so that
:func:`shrunk` can leave any of them out and see whether what remains is a program that still fails.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

PREAMBLE = '''\
import math
import zlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def R(name, *shape, dtype=torch.float64):
    """Random numbers that depend on the name and the shape only."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def step(optimizer):
    """A step with gradients of one."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
'''


@dataclass(frozen=True)
class Line:
    """A statement.

    Attributes:
        text: ``"name = expression"``, or a statement that writes in place.
        region: what it stands in: ``"torch.no_grad()"`` or another context manager, or nothing.
    """

    text: str
    region: str = ""

    @property
    def target(self) -> str:
        """The name that it defines; empty for a write."""
        found = re.match(r"(\w+) = ", self.text)
        return found[1] if found else ""

    @property
    def expression(self) -> str:
        return self.text[len(self.target) + 3 :] if self.target else self.text

    def names(self) -> set[str]:
        """Every identifier that it reads."""
        return set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", self.expression))

    def renamed(self, old: str, new: str) -> Line:
        """The same with one name for another, where it is read."""
        text = re.sub(rf"(?<![\w.]){old}(?![\w])(?!=[^=])", new, self.expression)
        return replace(self, text=f"{self.target} = {text}" if self.target else text)


@dataclass(frozen=True)
class How:
    """How a program is run.

    Attributes:
        capture: ``"dynamo"``, ``"make_fx"``, ``"export"`` or ``"symbolic_trace"``.
        codegen: of Dynamo's graphs: ``"eager"``, ``"aot_eager"`` or ``"inductor"``.
        dynamic: sizes are symbols.
        norm, norm_reuse, compose: options of dorafx.
        samples: whether kept norms are watched by samples of the parameters, as on a CPU, or not, as on a GPU.
        tolerance: of values and gradients, relative to the largest.
        gradients: the tolerance of gradients, where a cast rounds them.
    """

    capture: str = "dynamo"
    codegen: str = "eager"
    dynamic: bool = False
    norm: str = "auto"
    norm_reuse: str = "auto"
    compose: str = "auto"
    samples: bool = True
    tolerance: float = 1e-9
    gradients: float = 0.0


@dataclass(frozen=True)
class Program:
    """A model, the calls that are made of it, and how it is captured.

    Attributes:
        sizes: name -> length of an axis.
        operands: name -> the expression that makes the parameter or buffer.
        lines: the model's forward.
        returns: expressions.
        drive: statements that call the model and change it in between.
        checkpointed: the forward is recomputed in the backward.
        exempt: why it need not be rewritten whole; empty where it must be.
    """

    sizes: dict[str, int]
    operands: dict[str, str]
    lines: tuple[Line, ...]
    returns: tuple[str, ...]
    drive: tuple[str, ...]
    how: How = field(default_factory=How)
    inputs: tuple[str, ...] = ("x",)
    checkpointed: bool = False
    exempt: str = ""
    twisted: bool = False

    def used(self) -> list[str]:
        """The operands that it reads."""
        texts = [*(line.text for line in self.lines), *self.returns, *self.drive]
        return [n for n in self.operands if any(re.search(rf"\b{n}\b", text) for text in texts)]

    def model_source(self) -> str:
        used = self.used()
        plain = [n for n in used if not self.operands[n].startswith("#")]
        out = [
            f"{', '.join(self.sizes)} = {', '.join(map(str, self.sizes.values()))}",
            "",
            "",
            "class Model(nn.Module):",
        ]
        out += ["    def __init__(self):", "        super().__init__()"]
        out += [f"        self.{n} = {self.operands[n]}" for n in plain]
        out += ["", f"    def forward(self, {', '.join(self.inputs)}):"]
        if self.checkpointed:
            out += [
                f"        return checkpoint(self.body, {', '.join(self.inputs)}, use_reentrant=False)",
                "",
                f"    def body(self, {', '.join(self.inputs)}):",
            ]
        if plain:
            names, values = ", ".join(plain), ", ".join(f"self.{n}" for n in plain)
            out.append(f"        {names} = {values}")
        region = ""
        for line in self.lines:
            if line.region and line.region != region:
                out.append(f"        with {line.region}:")
            region = line.region
            out.append(f"        {'    ' if region else ''}{line.text}")
        out.append(f"        return {', '.join(self.returns)}")
        return "\n".join(out) + "\n"

    def source(self) -> str:
        """The program, without what compares it."""
        calls = "\n".join(f"    {line}" for line in self.drive)
        return f"{PREAMBLE}\n\n{self.model_source()}\n\ndef drive(model, call):\n{calls}\n"

    def script(self) -> str:
        """A script that prints PASS or FAIL; it needs torch and dorafx."""
        import comparing

        with open(comparing.__file__) as file:
            harness = file.read().split("# -- the harness", 1)[1]
        future = "from __future__ import annotations\n"  # the harness's, which must be a script's first
        return (
            f"{future}\n{self.source()}\n\n# -- what compares it: the harness{harness.replace(future, '')}\n\n"
            f"HOW = dict({', '.join(f'{k}={v!r}' for k, v in vars(self.how).items())})\n"
            'if __name__ == "__main__":\n'
            "    verdict = compared(globals(), **HOW)\n"
            '    print("FAIL" if verdict.wrong else "PASS", verdict)\n'
            "    raise SystemExit(bool(verdict.wrong))\n"
        )


def namespace(source: str) -> dict[str, Any]:
    """What the source defines. Its lines can be looked up, as a traceback and Dynamo do."""
    name = f"<program {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    found: dict[str, Any] = {"__name__": "a_random_program"}
    exec(compile(source, name, "exec"), found)
    return found


def shrunk(program: Program, fails: Callable[[Program], bool], budget: int = 150) -> Program:
    """A smaller program that fails as well: steps are taken as long as one of them leaves a failing program.

    Args:
        budget: how many programs may be tried.
    """
    while True:
        for smaller in _smaller(program):
            if budget <= 0:
                return program
            budget -= 1
            if fails(smaller):
                program = smaller
                break
        else:
            return program


def _smaller(p: Program) -> Iterator[Program]:
    how = p.how
    if p.checkpointed:
        yield replace(p, checkpointed=False)
    for simpler in (
        replace(how, codegen="eager"),
        replace(how, capture="dynamo"),
        replace(how, dynamic=False),
        replace(how, norm="auto"),
        replace(how, norm_reuse="auto"),
        replace(how, compose="auto"),
        replace(how, samples=True),
    ):
        if simpler != how:
            yield replace(p, how=simpler)
    for k in range(len(p.drive)):
        if len(p.drive) > 1:
            yield replace(p, drive=p.drive[:k] + p.drive[k + 1 :])
    for k in range(len(p.returns)):
        if len(p.returns) > 1:
            yield replace(p, returns=p.returns[:k] + p.returns[k + 1 :])
    live = _live(p)
    if len(live) < len(p.lines):
        yield replace(p, lines=live)
    for k, line in reversed(list(enumerate(p.lines))):
        rest = p.lines[:k] + p.lines[k + 1 :]
        yield replace(p, lines=rest)
        if line.region:
            yield replace(p, lines=(*p.lines[:k], replace(line, region=""), *p.lines[k + 1 :]))
        if line.target:
            # What it computes is one of the names that it reads.
            for name in sorted(line.names() - {"torch", "F", "math", "nn", "o", "i", "r"}):
                later = tuple(one.renamed(line.target, name) for one in p.lines[k + 1 :])
                returns = tuple(re.sub(rf"\b{line.target}\b", name, one) for one in p.returns)
                yield replace(p, lines=p.lines[:k] + later, returns=returns)
    for name, size in p.sizes.items():
        for smaller in (2, 3):
            if smaller < size:
                yield replace(p, sizes={**p.sizes, name: smaller})


def _live(p: Program) -> tuple[Line, ...]:
    """Without the statements whose results nobody reads."""
    lines = list(p.lines)
    while True:
        read = set(re.findall(r"\w+", " ".join([*(line.expression for line in lines), *p.returns])))
        kept = [line for line in lines if not line.target or line.target in read]
        if len(kept) == len(lines):
            return tuple(kept)
        lines = kept
