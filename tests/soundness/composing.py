"""Random programs of DoRA: fragments put together in any combination, and then, in half of them, twisted at random."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import torch
from fragments import (
    CHANGES,
    COMPOSITIONS,
    DELTAS,
    EPSILONS,
    FACTORS,
    INVERSE_NORMS,
    MERGED,
    NORMS,
    OTHER_REDUCTIONS,
    OUTPUTS,
    SUMS,
    WEIGHTS,
    WRITTEN_SUMS,
    ZEROS,
    Odd,
)
from random_programs import PREAMBLE, How, Line, Program

__all__ = ["compose"]

_NARROW = {"float": torch.float32, "bfloat16": torch.bfloat16}
LEADING = ((4,), (2, 3), (1,), (5,), (1, 1), (), (2, 1, 4), (0,), (9,))
SIZES = (4, 4, 4, 5, 3, 6, 2)


def compose(seed: int, inductor: bool = False) -> Program:
    """The program of a seed.

    Args:
        inductor: compiled by Inductor; otherwise one of the captures and codegens that take no seconds.
    """
    return _Composer(seed, inductor).program()


class _Composer:
    def __init__(self, seed: int, inductor: bool) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.inductor = inductor
        # A program of nothing but rarities is seldom DoRA: some have few of them, and a third none that may be left alone.
        self.wild = self.rng.choice((0.15, 0.35, 0.7))
        self.strict = self.chance(0.35)
        self.lines: list[Line] = []
        self.odd: list[str] = []
        self.returns: list[str] = ["y"]
        self.taken: set[str] = set()
        size = self.rng.choice
        self.sizes = {"o": size(SIZES), "i": size(SIZES), "r": size((2, 1, 3, 4))}
        if self.chance(0.4):
            self.sizes["i"] = self.sizes["o"]  # an axis taken for another shows by the values only
        if self.maybe(0.06, "a side of one"):
            self.sizes[self.rng.choice(("o", "i"))] = 1
        self.leading = self.rng.choice(LEADING) if self.chance(0.6) else (4,)
        self.dtype = (
            "float64"
            if self.strict and self.chance(0.6)
            else self.rng.choices(
                ("float64", "float32", "bfloat16", "float16", "mixed"),
                (72, 10, 5, 3, 10) if not inductor else (60, 25, 5, 0, 10),
            )[0]
        )
        self.region = ""

    # -- choosing --------------------------------------------------------------------------------------------------------

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, options: Any) -> Any:
        """Mostly the first, which is the plainest; remembers what no pattern promises to recognise."""
        chosen = options[0] if not self.chance(self.wild) else self.rng.choice(options)
        if self.strict or not self.chance(0.5 + self.wild / 2):
            plain = [one for one in options if not _is_odd(one)]
            chosen = chosen if chosen in plain else self.rng.choice(plain)
        if _is_odd(chosen):
            self.odd.append(chosen if isinstance(chosen, str) else chosen[0])
        return chosen

    def maybe(self, p: float, odd: str = "") -> bool:
        """Whether to do something that is done with a probability of about ``p``.

        Args:
            odd: why a program in which it is done may be left alone.
        """
        if not self.chance(p * self.wild * 2) or (odd and self.strict):
            return False
        if odd:
            self.odd.append(odd)
        return True

    # -- writing ---------------------------------------------------------------------------------------------------------

    def let(self, name: str, expression: str) -> str:
        """A new name for the value of an expression."""
        while name in self.taken:
            name += "1" if not name[-1].isdigit() else "_1"
        self.taken.add(name)
        self.lines.append(Line(f"{name} = {expression}", self.region))
        return name

    def write(self, text: str) -> None:
        self.lines.append(Line(text, self.region))

    # -- parts -----------------------------------------------------------------------------------------------------------

    def program(self) -> Program:
        self.operands = {}
        self.inputs: tuple[str, ...] = ("x",)
        self.x_shape = "i"
        family = self.rng.choices(
            (self.linear, self.convolution, self.embedding, self.norm_only, self.two_layers, self.from_the_left),
            (66, 9, 5, 8, 7, 5),
        )[0]
        self.declare()
        self.family = family.__name__
        family()
        if family is not self.embedding and self.maybe(0.25, "a term of zero"):
            self.write_line_of_zero()
        self.aftermath()
        self.autocast = self.full == "float32" and self.chance(0.3)
        how = self.how()
        drive = self.drive(how)
        checkpointed = how.capture == "dynamo" and self.chance(0.07)
        exempt = "; ".join(self.odd)
        p = Program(
            dict(self.sizes),
            self.operands,
            tuple(self.lines),
            tuple(self.returns),
            drive,
            how,
            self.inputs,
            checkpointed,
            exempt,
        )
        if not self.strict and self.chance(0.65):
            p = self.twisted(p)
        p = self.recording(p)
        tolerance = max(p.how.tolerance, self.tolerance_of_early_products(p))
        return replace(p, how=replace(p.how, tolerance=tolerance, gradients=self.tolerance_of_gradients(p)))

    def recording(self, p: Program) -> Program:
        """Some of those that are called with gradients switched off switch them on again."""
        rng = random.Random(f"recording {self.seed}")  # numbers of its own: the other programs stay what they are
        called = [line for line in p.drive if 'mode="no_grad"' in line or 'mode="inference"' in line]
        if p.how.capture != "dynamo" or not called or rng.random() > 0.2:
            return p
        region = rng.choice(("torch.enable_grad()", "torch.enable_grad()", "torch.inference_mode(False)"))
        first = rng.choice((0, 0, rng.randrange(len(p.lines))))
        lines = (*p.lines[:first], *(line if line.region else replace(line, region=region) for line in p.lines[first:]))
        return replace(p, lines=lines, exempt="; ".join(filter(None, (p.exempt, "gradients are switched on"))))

    def declare(self) -> None:
        if self.dtype != "float64":
            self.odd.append(f"{self.dtype} tensors")
        full = {"float64": "float64", "mixed": "float64"}.get(self.dtype, self.dtype)
        lower = self.rng.choice(("float32", "bfloat16")) if self.dtype == "mixed" else full
        self.full = full
        weight_dtype, factor_dtype = (lower, full) if self.chance(0.5) else (lower, lower)
        self.casts = (weight_dtype != full, factor_dtype != full)
        (read, stored), (down, up, a_shape, b_shape) = self.pick(WEIGHTS), self.pick(FACTORS)
        if "view_as_complex" in read and (self.sizes["o"] * self.sizes["i"] % 2 or weight_dtype != "float64"):
            read, stored = "W", "o, i"
        self.weight_read, self.down_read, self.up_read = read, down, up
        frozen = self.chance(0.55)

        def parameter(name: str, shape: str, dtype: str = full, frozen: bool = False, init: str = "") -> None:
            kind = "" if dtype == "float64" else f", dtype=torch.{dtype}"
            shape = f", {shape}" if shape else ""
            value = f'R("{name}"{shape}{kind})' + init
            self.operands[name] = f"nn.Parameter({value}{', requires_grad=False' if frozen else ''})"

        zero = ".zero_()" if self.chance(0.1) else ""  # as adapters begin
        unit = ""
        if self.chance(0.06):
            unit = ".zero_().index_fill_(-1, torch.tensor([0]), 2.0)"  # rows whose norm is a bound
        parameter("W", stored, weight_dtype, frozen, unit)
        parameter("A", a_shape, factor_dtype)
        parameter("B", b_shape, factor_dtype, False, zero)
        parameter("m", "o", full, self.chance(0.1))
        for name, shape in (
            ("bias", "o"),
            ("W2", "o, i"),
            ("A2", "r, i"),
            ("B2", "o, r"),
            ("c", "i"),
            ("extra", "4"),
            ("M", "r, r"),
        ):
            parameter(name, shape, full)
        for name, shape in (("b", "o"), ("d", "r")):
            parameter(name, shape, factor_dtype)
        parameter("u", "o", full, False, ".index_fill_(0, torch.tensor([0]), 0.0)" if self.chance(0.4) else "")
        parameter("s0", "", full, self.chance(0.5))
        if self.chance(0.04) and not unit:
            bad = self.rng.choice(("inf", "nan", "0.0"))
            self.operands["W"] = self.operands["W"].replace('")', '")', 1)
            parameter("W", stored, weight_dtype, frozen, f".index_fill_(0, torch.tensor([0]), float('{bad}'))")

    def weight(self) -> str:
        W = self.weight_read
        if self.casts[0]:
            W = f"{W}.to({'m.dtype' if self.chance(0.5) else 'torch.' + self.full})"
        return self.let("Wr", W) if W != "W" else "W"

    def factors(self) -> tuple[str, str, str, str]:
        """The two factors as a chain for the delta, and the low-rank product of x."""
        up, down = self.up_read, self.down_read
        cast = f".to(torch.{self.full})" if self.casts[1] else ""
        a = self.let("a", down + cast) if down + cast != "A" else "A"
        b = self.let("b0", up + cast) if up + cast != "B" else "B"
        low = f"F.linear(F.linear({{x}}, {a}), {b})"
        if self.maybe(0.25):
            kind = self.rng.choice(("middle", "diagonal", "dora of vera"))
            if kind == "middle":
                a1 = self.let("a1", f"M @ {a}")
                low = (
                    f"F.linear(F.linear(F.linear({{x}}, {a}), M), {b})"
                    if self.chance(0.5)
                    else f"F.linear(F.linear({{x}}, {a1}), {b})"
                )
                return a1, b, low, "chain"
            vb, vd = f"b{cast}", f"d{cast}"
            low = f"({vb} * F.linear({vd} * F.linear({{x}}, {a}), {b}))"
            return self.let("a1", f"{vd}[:, None] * {a}"), self.let("b1", f"{vb}.unsqueeze(-1) * {b}"), low, "chain"
        return a, b, low, ""

    def scaling(self) -> str:
        if not self.maybe(0.3):
            return "1.7"
        kind = self.rng.choice(("s0", "symbolic", "half", "ratio", "negative", "tensor", "zero", "rational"))
        if kind == "symbolic" and self.family_has_tokens() and len(self.leading):
            self.symbolic = True
            return self.let("s", "x.shape[0] / 10" if self.chance(0.5) else "1.0 / (x.shape[0] + 1)")
        return {
            "s0": "s0",
            "half": "0.5",
            "ratio": "(16 / r)",
            "negative": "(-0.7)",
            "zero": "0.0",
            "rational": "(1 / 3)",
            "tensor": "torch.tensor(1.7, dtype=m.dtype)",
        }.get(kind, "1.0")

    def family_has_tokens(self) -> bool:
        return self.family in ("linear", "two_layers", "norm_only")

    def adapted(self, W: str, a: str, b: str, s: str, delta_detached: bool) -> str:
        delta = self.pick(DELTAS).format(b=b, a=a)
        if delta_detached:
            delta = f"({delta}).detach()"
        if self.maybe(0.15) and not delta_detached:
            delta = f"({delta}) * 1"
        if self.maybe(0.2, "a sum formed by writes"):
            V = self.fresh("V")
            for text in self.rng.choice(WRITTEN_SUMS):
                self.write(
                    text.format(V=V, D=delta, W=W, s=s, a=a, b=b)
                    if "addmm" not in text or "tensor" not in s
                    else f"{V} = {V} + {delta}"
                )
            return V
        if self.maybe(0.15):
            D = self.let("D", delta)
            delta = D
        text = self.pick(SUMS)
        if ("addmm" in text or "baddbmm" in text or "alpha" in text) and not re.fullmatch(r"\(?-?[\d.]+\)?", s):
            text = SUMS[0]
        if delta_detached and "{b}" in text:
            text = SUMS[0]
        return self.let("V", text.format(W=W, s=s, D=delta, a=a, b=b))

    def fresh(self, name: str) -> str:
        while name in self.taken:
            name += "1"
        self.taken.add(name)
        return name

    def norm(self, V: str, axis: int, keep: bool = False) -> tuple[str, bool]:
        """The name of the norm, and whether it is 1/n."""
        inverse = self.maybe(0.25)
        if self.maybe(0.1, "another reduction than the norm"):
            text = self.rng.choice(OTHER_REDUCTIONS)
        else:
            text = self.pick(INVERSE_NORMS if inverse else NORMS)
        if self.sizes["o"] == self.sizes["i"] and self.maybe(0.12, "the other axis"):
            axis = 1 - axis
        n = self.let("n", text.format(V=V, d=axis, k=keep))
        if not inverse and self.maybe(0.3):
            n = self.let("n", self.pick(EPSILONS).format(n=n))
        if self.maybe(0.12, "a norm written in place"):
            write = self.rng.choice(
                (
                    "{n}.add_(1e-3)",
                    "{n}.clamp_(min=1.0)",
                    "{n}.mul_(2.0)",
                    "{n}.sqrt_()",
                    "{n}[0] = 1.0",
                    "{n} += 0.5",
                    "{n}.reciprocal_()",
                    "{n}[:1].mul_(3.0)",
                    "{n}.detach().mul_(2.0)",
                    "{n}.pow_(2)",
                    "torch.add({n}.detach(), 1.0, out={n}) if not {n}.requires_grad else None",
                )
            )
            if self.chance(0.6):
                n = self.let("n", f"{n}.clone()")
            self.write(write.format(n=n))
        return n, inverse

    def linear(self, x: str = "x") -> None:
        where = self.rng.choices(
            ("n", "nothing", "delta", "no_grad", "both", "V", "W", "n in place", "m", "x", "aux"),
            (30, 25, 8, 10, 5, 5, 4, 5, 3, 3, 2),
        )[0]
        W = self.weight()
        a, b, low, _ = self.factors()
        s = self.scaling()
        x = self.activations(x)
        if self.strict and where in ("n in place", "V", "W"):
            where = "n"
        merged = self.maybe(0.3, "a merged weight")
        self.region = "torch.no_grad()" if where == "no_grad" and not merged else ""
        Wn = f"{W}.detach()" if where == "W" else W
        V = self.adapted(Wn, a, b, s, where in ("delta", "both"))
        self.V, normed = V, V
        if where == "V":
            normed = f"{V}.detach()"
        if self.maybe(0.1) and self.dtype == "float32":
            normed = self.let("Vd", f"{normed}.double()")
        keep = self.chance(0.2)
        n, inverse = self.norm(normed, 1, keep)
        self.region = ""
        if keep:
            n = self.let(
                "n",
                f"{n}.{self.rng.choice(('squeeze(1)', 'view(-1)', 'reshape(-1)', 'flatten()', 'squeeze(-1)', 'T[0]', 'transpose(0, 1)'))}",
            )
            if n and "transpose" in self.lines[-1].text:
                pass
        if where in ("n", "both"):
            n = self.let("n", f"{n}.detach()")
        elif where == "n in place":
            self.write(f"{n}.detach_()")
            self.odd.append("detach_")
        self.n = n
        m = self.magnitude(where)
        if merged:
            self.merged(x, W, V, a, b, s, m, n, inverse)
        else:
            self.composed(x, W, a, b, low, s, m, n, inverse, where)

    def magnitude(self, where: str) -> str:
        m = "m"
        if where == "m":
            m = self.let("md", "m.detach()")
        if self.maybe(0.15):
            form = self.rng.choice(
                (
                    "{m}.view(1, -1)",
                    "{m}[None]",
                    "{m}.unsqueeze(0)",
                    "{m}.reshape(1, -1)",
                    "{m} * 1.0",
                    "{m}.clone()",
                    "{m}.abs()",
                    "{m}.exp()",
                    "{m}.clamp(0, 5)",
                    "{m}[:1]",
                    "{m}.mean()",
                    "({m} + 1.0)",
                    "{m} / 1.0",
                )
            )
            if any(k in form for k in ("[:1]", "mean")) and not self.maybe(1.0, "one magnitude for all rows"):
                form = "{m} * 1.0"
            m = self.let("mr", form.format(m=m))
            written = self.maybe(0.3, "a written magnitude")
            if written and self.lines[-1].text.endswith((".clone()", " * 1.0", "abs()", "exp()", "5)", "1.0)")):
                self.write(self.rng.choice((f"{m}.detach_()", f"{m}.mul_(1.5)", f"{m}.add_(1.0)")))
        return m

    def activations(self, x: str) -> str:
        if not self.maybe(0.2):
            return x
        form = self.rng.choice(
            (
                "{x}.reshape(-1, i)",
                "{x}.clone()",
                "{x} * 1.0",
                "{x}.contiguous()",
                "F.dropout({x}, 0.3, True)",
                "F.relu({x})",
                "{x}.detach()",
                "{x}[..., :]",
                "{x}.to(m.dtype)",
                "{x} + x.mean()",
            )
        )
        return self.let("xr", form.format(x=x))

    def composed(
        self, x: str, W: str, a: str, b: str, low: str, s: str, m: str, n: str, inverse: bool, where: str
    ) -> None:
        bias = self.rng.choices(("none", "after", "inside", "taken off"), (55, 20, 15, 10))[0]
        base = f"F.linear({x}, {W}{', bias' if bias == 'inside' else ''})"
        if bias == "taken off":
            base = f"(F.linear({x}, {W}, bias) - bias)"
        low = low.format(x=x)
        g = f"{m} * {n}" if inverse else f"{m} / {n}"
        if self.maybe(0.1):
            g = (
                self.rng.choice(
                    (
                        f"({m} * (1 / {n}))",
                        f"torch.div({m}, {n})",
                        f"{m}.div({n})",
                        f"{n}.reciprocal() * {m}",
                        f"torch.true_divide({m}, {n})",
                    )
                )
                if not inverse
                else f"torch.mul({n}, {m})"
            )
        if where == "aux" or self.maybe(0.1):
            with_no_grad = self.maybe(0.3)
            self.region = "torch.no_grad()" if with_no_grad else ""
            g = self.let("g0", g)
            self.region = ""
        else:
            g = f"({g})"
        template = self.pick(COMPOSITIONS)
        if (
            "{s}" in "".join(template)
            and any("alpha" in t or "value=" in t for t in template)
            and not re.fullmatch(r"\(?-?[\d.]+\)?", s)
        ):
            template = COMPOSITIONS[0]
        if inverse and any("{n}" in t for t in template):
            template = COMPOSITIONS[0]
        for k, text in enumerate(template):
            line = text.format(x=x, W=W, a=a, b=b, s=s, m=m, n=n, g=g, base=base, low=low)
            self.write(line)
            if k < len(template) - 1 and self.maybe(0.04, "an intermediate read elsewhere"):
                name = line.split()[0].split(".")[0]
                self.write(
                    self.rng.choice(
                        (f"aux = {name}.detach().pow(2).mean()", f"aux = {name}.detach()", f"aux = {name}.sum()")
                    )
                )
                self.returns.append("aux")
        if bias in ("after", "taken off"):
            self.write(
                self.rng.choice(
                    ("y = y + bias", "y = torch.add(y, bias)", "y += bias", "y.add_(bias)")
                    if self.maybe(0.5)
                    else ("y = y + bias",)
                )
            )

    def merged(self, x: str, W: str, V: str, a: str, b: str, s: str, m: str, n: str, inverse: bool) -> None:
        nc = self.let("nc", f"{n}.reshape(-1, 1)")
        if inverse:
            nc = f"(1 / {nc})"
        c = f"{m}.reshape(-1, 1)"
        for text in self.rng.choice(MERGED):
            self.write(text.format(x=x, W=W, V=V, c=c, nc=nc))
        if self.chance(0.3):
            self.write("y = y + bias")

    def two_layers(self) -> None:
        self.linear()
        self.write(f"h1 = {self.rng.choice(('F.relu(y)', 'y', 'torch.tanh(y)', 'y.detach()'))}")
        shared = self.rng.choice(("W2", "Wr" if any(line.target == "Wr" for line in self.lines) else "W2"))
        # The second takes the input again, so that any sizes fit.
        V2 = self.let("V2", f"{shared} + 1.7 * (B2 @ A2)")
        text = self.pick(NORMS).format(V=V2, d=1, k=False)
        n2 = self.let("n2", text + (".detach()" if self.chance(0.5) else ""))
        self.write(f"y = h1 + u / {n2} * (F.linear(x, {shared}) + 1.7 * F.linear(F.linear(x, A2), B2)).sum()")

    def norm_only(self) -> None:
        W = self.weight()
        a, b, _, _ = self.factors()
        s = self.scaling()
        where = self.rng.choice(("nothing", "n", "delta", "no_grad"))
        self.region = "torch.no_grad()" if where == "no_grad" else ""
        V = self.adapted(W, a, b, s, where == "delta")
        axis = self.rng.choice((1, 1, 0, -1, -2)) if not self.chance(0.2) else 1
        keep = self.chance(0.3)
        inverse = self.chance(0.4)
        text = self.rng.choice(INVERSE_NORMS if inverse else NORMS if self.chance(0.7) else OTHER_REDUCTIONS)
        n = self.let("n", text.format(V=V, d=axis % 2, k=keep))
        self.region = ""
        if where == "n":
            n = self.let("n", f"{n}.detach()")
        self.n, self.V = n, V
        if axis % 2 == 1:
            use = self.rng.choice(
                (
                    "y = F.relu(F.linear(x, {W})) * m * {n}.reshape(-1)",
                    "y = F.linear(x, {W}) / {n}.reshape(-1)",
                    "y = x.sum() * {n}",
                    "y = m - {n}.reshape(-1)",
                )
            )
        else:
            use = self.rng.choice(
                (
                    "y = x * {n}.reshape(-1) * c",
                    "y = x / {n}.reshape(-1)",
                    "y = x.sum() - {n}",
                    "y = F.linear(x / {n}.reshape(-1) * c, {W})",
                )
            )
        self.write(use.format(W=W, n=n))

    def from_the_left(self) -> None:
        W = self.weight()
        a, b, _, _ = self.factors()
        V = self.adapted(W, a, b, "1.7", False)
        n, inverse = self.norm(V, 1)
        n = self.let("n", f"{n}.detach()") if self.chance(0.6) else n
        self.n, self.V = n, V
        X = self.let("X", self.rng.choice(("x.reshape(-1, i).T", "x.reshape(-1, i).t().contiguous()")))
        g = f"(m {'*' if inverse else '/'} {n})[:, None]"
        self.write(
            self.rng.choice(
                (
                    f"y = {g} * ({W} @ {X} + 1.7 * ({b} @ ({a} @ {X})))",
                    f"y = ({W} @ {X} + 1.7 * ({b} @ ({a} @ {X}))) * {g}",
                    f"y = torch.mul({g}, torch.mm({W}, {X}) + ({b} @ ({a} @ {X})).mul(1.7))",
                )
            )
        )
        if self.chance(0.3):
            self.write(
                self.rng.choice(
                    ("y = y + bias[:, None]", "y = y.T", "y = y.T + bias", "y = y.t().contiguous()", "y = y.view(-1)")
                )
            )

    def convolution(self) -> None:
        dims = self.rng.choice((1, 2, 2, 3))
        k = ", ".join(["3"] * dims)
        ones = ", ".join(["1"] * dims)
        kind = "" if self.full == "float64" else f", dtype=torch.{self.full}"
        frozen = ", requires_grad=False" if self.chance(0.5) else ""
        layout = ".to(memory_format=torch.channels_last)" if dims == 2 and self.chance(0.2) else ""
        self.operands["K"] = f'nn.Parameter(R("K", o, i, {k}{kind}){layout}{frozen})'
        self.operands["Dn"] = f'nn.Parameter(R("Dn", r, i, {k}{kind}))'
        self.operands["Up"] = f'nn.Parameter(R("Up", o, r, {ones}{kind}))'
        self.x_shape = "conv", dims
        s = self.rng.choice(("1.7", "0.5"))
        delta = self.rng.choice(
            (
                "(Up.flatten(1) @ Dn.flatten(1)).view(K.shape)",
                "torch.mm(Up.flatten(1), Dn.flatten(1)).view_as(K)",
                "(Up.reshape(o, r) @ Dn.reshape(r, -1)).reshape(K.shape)",
            )
        )
        V = self.let("V", f"K + {s} * {delta}")
        axes = tuple(range(1, dims + 2))
        negative = tuple(a - dims - 2 for a in axes)
        d = self.rng.choice((axes, negative, axes[::-1]))
        forms = [
            "{V}.norm(p=2, dim={d}, keepdim=True)",
            "torch.linalg.vector_norm({V}, dim={d}, keepdim=True)",
            "{V}.pow(2).sum({d}, keepdim=True).sqrt()",
            "({V} ** 2).sum(dim={d}, keepdim=True) ** 0.5",
            "{V}.flatten(1).norm(dim=1).view(-1, 1, " + ones + ")",
            "({V} ** 2).mean(dim={d}, keepdim=True).sqrt()",
            "(({V} ** 2).mean(dim={d}, keepdim=True) * {V}[0].numel()).sqrt()",
            "1 / {V}.square().sum({d}, keepdim=True).rsqrt()",
            "{V}.flatten(1).square().mean(1).sqrt().view(-1, 1, " + ones + ")",
            "torch.linalg.vector_norm({V}.flatten(1), dim=-1).reshape(-1, 1, " + ones + ")",
            "{V}.std({d}, correction=0, keepdim=True) + 0.5",
            "{V}.pow(2).sum({d[0]}, keepdim=True).sum({d[1]}, keepdim=True).sqrt().flatten(1).mean(1).view(-1, 1, "
            + ones
            + ")",
            "{V}.square().sum({d}, keepdim=True).rsqrt().reciprocal()",
        ]
        n = self.let("n", self.pick(forms).format(V=V, d=d))
        if self.chance(0.5):
            n = self.let("n", f"{n}.detach()")
        n = self.let("n", f"{n}.transpose(0, 1)" if self.chance(0.5) else f"{n}.view(1, -1, {ones})")
        self.n, self.V = n, V
        conv = f"F.conv{dims}d"
        stride, padding = self.rng.choice(((1, 1), (2, 1), (1, 0)))
        bias = self.chance(0.3)
        base = f"{conv}(x, K, {'bias' if bias else 'None'}, {stride}, {padding})"
        low = f"{conv}({conv}(x, Dn, None, {stride}, {padding}), Up)"
        m = f"m.view(1, -1, {ones})"
        if self.chance(0.25):
            self.write(f"y = {conv}(x, V * (m.view(-1, 1, {ones}) / {n}.transpose(0, 1)), None, {stride}, {padding})")
            return
        form = self.rng.choice(
            (
                "y = {m} / {n} * ({base} + {s} * {low})",
                "y = ({base} + {s} * {low}) * ({m} / {n})",
                "base = {base}",
                "y = {base} + {s} * {low}",
            )
        )
        self.write(form.format(m=m, n=n, base=base, s=s, low=low))
        if form.startswith("base"):
            self.write(f"y = base + ({m} / {n} - 1) * base + {m} / {n} * {low} * {s}")
        elif "{m}" not in form:
            self.write(self.rng.choice((f"y = y * ({m} / {n})", f"y.mul_({m} / {n})")))
        if self.chance(0.2):
            self.write(f"y = y + bias.view(-1, {ones})")

    def embedding(self) -> None:
        W = self.weight()
        a, b, _, _ = self.factors()
        V = self.adapted(W, a, b, "1.7", self.chance(0.3))
        n = self.let("n", self.pick(NORMS).format(V=V, d=0, k=False))
        n = self.let("n", f"{n}.detach()") if self.chance(0.6) else n
        self.n, self.V = n, V
        self.x_shape = "tokens"
        self.write(f"y = c / {n} * (F.embedding(x, {W}) + 1.7 * (F.embedding(x, {b}) @ {a}))")

    def write_line_of_zero(self) -> None:
        line = self.rng.choice(ZEROS)
        if self.x_shape != "i" or self.family == "from_the_left":
            line = self.rng.choice(
                (
                    "y = y + 0.0 * extra.sum()",
                    "y = y + (extra - extra).sum()",
                    "y = y - 0.0 * W2.sum()",
                    "y = y + 0 * y",
                )
            )
        elif self.family == "norm_only" and "A2" in line:
            line = ZEROS[0]
        self.write(line)

    def aftermath(self) -> None:
        """What is done with the result, and what is returned besides."""
        if self.maybe(0.2):
            after = self.rng.choice(
                (
                    "y = y.contiguous()",
                    "y = y.transpose(-1, -2) if y.dim() > 1 else y",
                    "y = y.reshape(-1)",
                    "y = y * 2",
                    "y = F.dropout(y, 0.5, True)",
                    "y = F.gelu(y)",
                    "z = y.reshape(-1)\nz.mul_(2.0)",
                    "y[..., 0] = 0.0",
                    "y.mul_(0.5)",
                    "y = y.view(-1) if y.is_contiguous() else y.sum() + y",
                    "y = y.sum(-1)",
                    "y = y.to(torch.float32)",
                    "y = y * m.sum()",
                    "y = y + y.mean()",
                    "y = y.clone()",
                    "y = y.unsqueeze(0)",
                    "y = torch.relu_(y)",
                    "y = y + torch.rand_like(y)",
                    "y.masked_fill_(y > 1, 0.5)",
                    "y = y / y.norm()",
                )
            )
            for text in after.split("\n"):
                self.write(text)
        for _ in range(self.rng.choices((0, 1, 2), (65, 25, 10))[0]):
            text = self.rng.choice(OUTPUTS)
            if ".norm(dim=1)" in text and self.family == "convolution":
                text = "{n}"
            if "- m" in text and self.family not in ("linear", "norm_only", "two_layers"):
                text = "{n} ** 2"
            if text.startswith(("m / ", "{V}.T", "F.normalize")) and self.family in (
                "convolution",
                "embedding",
                "norm_only",
            ):
                text = "{V}.pow(2).sum(1).rsqrt()"
            self.returns.append(text.format(n=self.n, V=self.V))
        if self.chance(0.05):
            self.rng.shuffle(self.returns)

    # -- how it is run ---------------------------------------------------------------------------------------------------

    def how(self) -> How:
        tolerance = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 6e-2, "float16": 1e-2, "mixed": 1e-9}[self.dtype]
        text = " ".join(line.text for line in self.lines)
        if self.full == "float64" and (".float()" in text or "bfloat16" in text):
            # A parameter that is rounded is rounded alike; what is computed from it and rounded may fall to either side.
            tolerance = 1e-9 if not re.search(r"n\w*\.float\(\)", text) else 1e-5
        norm = self.rng.choices(("auto", "factored", "tiled"), (70, 20, 10))[0]
        if norm == "factored" and any("float('" in made for made in self.operands.values()):
            norm = "auto"  # the expansion of an infinite weight subtracts infinities
        if self.autocast:
            tolerance = 6e-2
        if norm == "factored":
            tolerance = max(tolerance, 1e-7)
        if self.inductor:
            dynamic = self.chance(0.2)
            compose = self.composition(text)
            return How(codegen="inductor", dynamic=dynamic, norm=norm, compose=compose, tolerance=max(tolerance, 1e-8))
        capture = self.rng.choices(("dynamo", "make_fx", "export", "symbolic_trace"), (68, 16, 8, 8))[0]
        if capture != "dynamo":
            return How(capture, tolerance=tolerance)
        return How(
            codegen=self.rng.choices(("eager", "aot_eager"), (85, 15))[0],
            dynamic=self.chance(0.8 if getattr(self, "symbolic", False) else 0.12),
            norm=norm,
            norm_reuse=self.rng.choices(("auto", "never"), (90, 10))[0],
            compose=self.composition(text),
            samples=self.chance(0.75),
            tolerance=tolerance,
        )

    def composition(self, text: str) -> str:
        """These programs have few tokens, for which nothing is accumulated in a product unless it is asked for. In a narrow dtype the sum
        would be rounded."""
        if self.dtype not in ("float64", "float32") or self.autocast or re.search(r"float|half", text):
            return "auto"
        return self.rng.choices(("auto", "accumulated", "epilogue"), (50, 40, 10))[0]

    def tolerance_of_early_products(self, p: Program) -> float:
        """What is multiplied before it is cast has few digits in the original, and may have more of them in the rewrite."""
        early = re.compile(r"[*@+-] [^=]*\)\.to\(torch\.float64\)")
        if self.dtype != "mixed" or not any(early.search(line.text) for line in p.lines):
            return 0.0
        return 6e-2 if any("torch.bfloat16" in made for made in p.operands.values()) else 2e-4

    def tolerance_of_gradients(self, p: Program) -> float:
        """Through a cast a gradient comes back in the cast's dtype."""
        text = " ".join(line.text for line in p.lines)
        own = torch.finfo(getattr(torch, self.full)).eps
        rounded = [
            torch.finfo(dtype).eps for name, dtype in _NARROW.items() if f".{name}()" in text or f".to({dtype})" in text
        ]
        return max((8 * eps for eps in rounded if eps > own), default=0.0)

    def x(self, leading: tuple[int, ...], grad: bool, k: int) -> str:
        if self.x_shape == "tokens":
            return f"torch.arange({max(1, len(leading) + 3)}) % o"
        kind = "" if self.full == "float64" else f", dtype=torch.{self.full}"
        if self.x_shape != "i":
            dims = self.x_shape[1]
            text = f'R("x{k}", 2, i, {", ".join(["4"] * dims)}{kind})'
            if dims == 2 and self.layout == "strided":
                text += ".to(memory_format=torch.channels_last)"
        else:
            shape = ", ".join(map(str, leading))
            text = f'R("x{k}", {shape + ", " if shape else ""}i{kind})'
            if self.layout == "strided" and len(leading) >= 1:
                text = f'R("x{k}", {", ".join(map(str, (*leading[:-1], "i", leading[-1])))}{kind}).transpose(-1, -2)'
            elif self.layout == "sliced" and len(leading) >= 1:
                text = f'R("x{k}", {", ".join(map(str, (*leading[:-1], 2 * leading[-1])))}, i{kind})[..., ::2, :]'
            elif self.layout == "expanded" and len(leading) >= 1:
                text = f'R("x{k}", i{kind}).expand({shape}, i)'
        return text + (".requires_grad_()" if grad else "")

    def drive(self, how: How) -> tuple[str, ...]:
        self.layout = self.rng.choices(("plain", "strided", "sliced", "expanded"), (70, 12, 10, 8))[0]
        grad = self.chance(0.5) and self.x_shape != "tokens"

        def call(k: int, mode: str, leading: tuple[int, ...]) -> str:
            extra = ""
            if autocast:
                extra += ", autocast=True"
            if mode == "grad" and self.chance(0.2):
                extra += ", summed=True"
            if self.chance(0.1):
                extra += f", write={self.rng.randrange(2)}"
            return f'call({self.x(leading, grad and mode == "grad", k)}, mode="{mode}"{extra})'

        autocast = self.autocast and how.capture == "dynamo"
        modes = ("grad", "no_grad", "inference")
        mode = self.rng.choices(modes, (60, 25, 15))[0]
        if how.capture != "dynamo":
            return (call(0, mode, self.leading),)
        lines = [call(0, mode, self.leading)]
        if how.dynamic:
            lengths = [(*self.leading[:-1], n) if self.leading else () for n in self.rng.sample((2, 3, 6, 7), 2)]
            lines += [call(k, mode, length) for k, length in enumerate(lengths, 1)]
        if self.chance(0.4 if not self.inductor else 0.25):
            lines += self.changing(how, call, mode)
        return tuple(lines)

    def changing(self, how: How, call: Any, mode: str) -> list[str]:
        """Calls with changes of the parameters between them."""
        decode = self.rng.choice(("no_grad", "inference"))
        few = self.rng.choice(((1,), self.leading))
        lines = [call(10, decode, few), call(11, decode, few)] if self.chance(0.7) else []
        modes = self.rng.choice(((decode,), (decode, mode), (mode, decode)))
        present = [
            n
            for n in ("W", "A", "B", "m", "K", "Up", "Dn", "M", "b", "d")
            if n in Program({}, self.operands, tuple(self.lines), tuple(self.returns), ()).used()
        ]
        for k in range(self.rng.choice((1, 1, 2, 3))):
            text, shown = self.rng.choice(CHANGES)
            # Without samples nothing shows it but a forward that records gradients, which there may not have been.
            if not how.samples and not shown:
                text = CHANGES[0][0]
            if self.full != "float64" and ("vector_to" in text or "W2" in text):
                text = CHANGES[0][0]
            lines.append(text.format(p=self.rng.choice(present or ["W2"])))
            lines += [call(12 + k, one, few if one == decode else self.leading) for one in modes]
        return lines

    # -- twists ----------------------------------------------------------------------------------------------------------

    def twisted(self, p: Program) -> Program:
        """One to three changes of a statement that make it another program, of which nothing is promised but that it stays right."""
        shapes = _shapes(p)
        if shapes is None:
            return p
        done = False
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            for _ in range(6):
                candidate = self.twist(p, shapes)
                if candidate is not None and _shapes(candidate) is not None:
                    p, done = candidate, True
                    shapes = _shapes(p) or shapes
                    break
        return replace(p, twisted=True, exempt=(p.exempt + "; twisted").strip("; ")) if done else p

    def twist(self, p: Program, shapes: dict[str, Any]) -> Program | None:
        lines = list(p.lines)
        if not lines:
            return None
        k = self.rng.randrange(len(lines))
        line = lines[k]
        names = sorted(n for n in line.names() if n in shapes)
        defined = [
            n for n in sorted(shapes) if n in p.operands or any(one.target == n for one in lines[:k]) or n == "x"
        ]
        kind = self.rng.choice(
            (
                "exchange",
                "exchange",
                "write",
                "write",
                "detach",
                "detach",
                "no_grad",
                "repeat",
                "return",
                "cast",
                "view",
                "scale",
                "order",
            )
        )
        if kind == "exchange" and names:
            old = self.rng.choice(names)
            like = [n for n in defined if n != old and shapes[n] == shapes[old]]
            if not like:
                return None
            lines[k] = line.renamed(old, self.rng.choice(like))
        elif kind == "write" and line.target and line.target in shapes:
            t = line.target
            text = self.rng.choice(
                (
                    "{t}.mul_(1.5)",
                    "{t}.add_(0.5)",
                    "{t}[0] = 0.5",
                    "{t}.view(-1)[0].mul_(3.0)",
                    "{t}.detach_()",
                    "{t}.detach().mul_(1.5)",
                    "{t} += 1.0",
                    "{t}.copy_({t}.detach() * 2)",
                    "torch.relu_({t})",
                    "F.leaky_relu(input={t}, negative_slope=0.5, inplace=True)",
                    "{t}.zero_()",
                    "{t}.T.mul_(0.5)",
                    "{t}.neg_()",
                    "{t}.clamp_(0.5)",
                    "{t}.div_(3.0)",
                    "{t}.fill_(2.0)",
                    "{t}.unsqueeze(0).mul_(1.5)",
                    "{t}.data.mul_(1.5)",
                    "{t}.requires_grad_(False) if not {t}.requires_grad else None",
                    "{t}.square_()",
                    "{t}.T.unsqueeze(0)[0].add_(1.0)",
                    "{t}.squeeze_()",
                    "{t}.t_()",
                    "torch.mul({t}.detach(), 2.0, out={t}.detach())",
                )
            )
            lines.insert(k + 1, Line(text.format(t=t)))
            if self.chance(0.3) and t not in p.returns:
                lines.insert(k + 2 if self.chance(0.5) else k + 1, Line(f"seen = {t}.detach() * 1.0"))
        elif kind == "detach" and names:
            old = self.rng.choice(names)
            lines[k] = replace(line, text=_once(line, old, f"{old}.detach()", self.rng))
        elif kind == "no_grad":
            lines[k] = replace(line, region="torch.no_grad()")
        elif kind == "repeat" and line.target:
            copy = f"{line.target}_again"
            lines.insert(k + 1, Line(f"{copy} = {line.expression}"))
            returns = (*p.returns, copy)
            return replace(p, lines=tuple(lines), returns=returns)
        elif kind == "return":
            targets = [one.target for one in lines if one.target in shapes]
            if targets:
                return replace(p, returns=(*p.returns, self.rng.choice(targets)))
        elif kind == "cast" and names:
            old = self.rng.choice(names)
            cast = self.rng.choice(
                (".float().to({t}.dtype)", ".bfloat16().to({t}.dtype)", ".double().to({t}.dtype)", ".to({t}.dtype)")
            )
            operand = old in p.operands or old == "x"
            if not operand and p.how.tolerance < 1e-8:
                cast = ".to({t}.dtype)"  # what is computed may round to either side
            lines[k] = replace(line, text=_once(line, old, old + cast.format(t=old), self.rng))
        elif kind == "view" and names:
            old = self.rng.choice(names)
            form = self.rng.choice(
                (
                    "{t}.clone()",
                    "{t}.flip(0)",
                    "{t}.roll(1, 0)",
                    "{t}.T",
                    "{t}.reshape(-1).view({t}.shape)",
                    "{t}.T.contiguous().T",
                    "{t} + 0",
                    "{t} * 1",
                    "(-(-{t}))",
                    "{t}.expand_as({t})",
                    "{t}.abs()",
                    "{t}.relu()",
                    "{t}.nan_to_num()",
                    "{t}.conj()",
                    "{t}.real",
                    "{t}.T.reshape({t}.shape)",
                    "{t}.as_strided({t}.shape, {t}.stride())",
                )
            )
            lines[k] = replace(line, text=_once(line, old, form.format(t=old), self.rng))
        elif kind == "scale" and names:
            old = self.rng.choice(names)
            lines[k] = replace(
                line,
                text=_once(
                    line, old, f"({old} * {self.rng.choice(('2.5', '(-1)', '0.0', 's0', 'extra[0]', '1.0'))})", self.rng
                ),
            )
        elif kind == "order" and k + 1 < len(lines) and not lines[k].region and not lines[k + 1].region:
            lines[k], lines[k + 1] = lines[k + 1], lines[k]
        else:
            return None
        return replace(p, lines=tuple(lines))


def _once(line: Line, old: str, new: str, rng: random.Random) -> str:
    """The statement with one of its readings of a name replaced."""
    places = list(re.finditer(rf"(?<![\w.]){old}(?!\w)(?!=[^=])", line.expression))
    place = rng.choice(places)
    text = line.expression[: place.start()] + new + line.expression[place.end() :]
    return f"{line.target} = {text}" if line.target else text


def _is_odd(option: Any) -> bool:
    return isinstance(option, Odd) or (isinstance(option, tuple) and any(isinstance(one, Odd) for one in option))


def _shapes(p: Program) -> dict[str, Any] | None:
    """The shape and dtype of every name of a program; None where it fails."""
    space: dict[str, Any] = {"__name__": "shapes"}
    try:
        exec(PREAMBLE + "\n\n" + replace(p, checkpointed=False, returns=("locals()",)).model_source(), space)
        found: list[dict[str, Any]] = []

        def call(*inputs: Any, **how: Any) -> None:
            found.append(space["Model"]()(*inputs))
            raise StopIteration

        space["call"] = call
        exec("def drive(model, call):\n" + "\n".join(f"    {line}" for line in p.drive), space)
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast=True" in p.drive[0]):
            space["drive"](space["Model"](), call)
    except StopIteration:
        names = {k: v for k, v in found[0].items() if isinstance(v, torch.Tensor)}
        return {k: (tuple(v.shape), v.dtype) for k, v in names.items()}
    except Exception:
        return None
    return None
