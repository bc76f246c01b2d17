"""The page of what is recognised is made of the programs that the tests run, so it shows nothing else."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from negative_programs import NEGATIVES
from pages import is_current
from test_experts import COMPOSED
from test_linear_spellings import FORMS, SPELLINGS
from test_weight_deltas import PROGRAMS

PAGE = Path(__file__).resolve().parents[2] / "examples" / "guide" / "every-spelling.md"
HEAD = """# Every spelling that is tested

Programs that dorafx rewrites, and programs that look like DoRA and are not, with their code. For those who want to know
whether their own layer is among them; [what is recognised](recognised.md) says the same in short.

Each program is one that a test runs: its values and gradients are compared in fp64 with those of what dorafx made of it
(`tests/spellings`, `tests/soundness/test_negatives.py`). Any combination of their parts is recognised too:
`tests/soundness/test_fuzz.py` draws them at random. PEFT's linear, embedding and convolutional layers are in
`tests/integration`, whole models in [the zoo](zoo.md).

| in the code | means |
|---|---|
| `p` | the parameters of a layer |
| `S` | a number |
| `lora(p, x)` | `x·Aᵀ·Bᵀ` |
| `adapted(p)` | `W' = W + S·B·A` |
| `delta(p)` | `m·W'/‖W'‖ - W` |
| `column_scaling(p)` | `m/‖W'‖` by column |
| `merged(p, x)` | `x·(m·W'/‖W'‖)ᵀ + bias` |
| `merged_back(p, x)` | the same of `W'ᵀ` |

Written by `DORAFX_WRITE_PAGES=1 pytest -m page`; the same test without the variable fails where this page is not current.

"""


EXPERTS = """Weights and factors may be batches, one for each expert: `W [E, d_out, d_in]`, `A [E, r, d_in]`, `B [E, d_out, r]`, `m [E, d_out]`,
`adapted(p)` is `W + S·bmm(B, A)`. The norms of all experts are one operator call. The axis of the experts comes first in each of them, and
every expert has its own: a magnitude or a weight that they share leaves the layer to the norm alone, or as it is.

"""


def code(fn: Callable[..., torch.Tensor]) -> str:
    """A function's body as one cell of a table."""
    source = inspect.getsource(fn)
    body = source[source.index(":\n", source.index("-> torch.Tensor")) + 2 :]
    body = re.sub(r'^\s*""".*?"""\n', "", body, flags=re.DOTALL)
    lines = inspect.cleandoc(re.sub(r"\s+#.*$", "", body, flags=re.MULTILINE)).splitlines()
    return "<br>".join(
        f"<code>{html.escape(line).replace('|', '&#124;').replace('  ', '&nbsp; ')}</code>" for line in lines
    )


def named(name: str) -> str:
    return name.replace("_", " ")


@pytest.mark.page
def test_page() -> None:
    rows = [
        f"| {named(name)} | {code(fn)} | {', '.join(FORMS.get(name, ['linear']))} |" for name, fn in SPELLINGS.items()
    ]
    rows += [f"| {named(name)} | {code(fn)} | {', '.join(forms)} |" for name, (fn, forms) in PROGRAMS.items()]
    text = HEAD + f"## Rewritten whole: {len(rows)} spellings\n\n| spelling | program | form |\n|---|---|---|\n"
    text += "\n".join(rows)
    experts = [
        f"| {name} | {code(fn)} | {', '.join(form for form, _ in found)} |" for name, (fn, found) in COMPOSED.items()
    ]
    text += f"\n\n## Rewritten whole: {len(experts)} layers of experts\n\n{EXPERTS}"
    text += "| layer | program | form |\n|---|---|---|\n" + "\n".join(experts)
    lines = []
    for name, (fn, expected, reason) in NEGATIVES.items():
        what = ", ".join("left alone" if found == "missed" else found for found in expected) or "no candidate"
        lines.append(f"| {named(name)} | {code(fn)} | {what} | {html.escape(reason)} |")
    text += f"\n\n## Left alone, or rewritten in its sound part: {len(lines)} programs that look like DoRA\n\n"
    text += (
        "| program | code | what happens | part of the logged reason |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    is_current(PAGE, text)
    assert len(rows) >= 50 and len(lines) >= 40
