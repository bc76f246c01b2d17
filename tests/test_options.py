from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from pages import is_current

from dorafx.options import _CHOICES, Options


def test_split() -> None:
    ours, rest = Options.split({"dorafx.norm": "factored", "dorafx.strict": True, "max_autotune": True})
    assert ours == Options(norm="factored", strict=True)
    assert rest == {"max_autotune": True}
    assert Options.split(None) == (Options(), {})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"dorafx.nrom": "tiled"},
            "dorafx.codegen, dorafx.norm, dorafx.compose, dorafx.norm_reuse, dorafx.zero_rows, dorafx.verify, dorafx.strict, "
            "dorafx.skip, dorafx.only, dorafx.explain",
        ),
        ({"dorafx.norm": "fast"}, "'auto', 'tiled', 'factored'"),
        ({"dorafx.compose": 3}, "'auto', 'accumulated', 'epilogue'"),
        ({"dorafx.zero_rows": "nan"}, "'peft', 'finite'"),
        ({"dorafx.strict": 1}, "True or False"),
        ({"dorafx.codegen": ""}, "'inductor', 'eager'"),
    ],
)
def test_wrong_options_name_what_is_allowed(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Options.split(options)


def test_every_choice_computes_the_same() -> None:
    from programs import LINEAR, Layer

    layer, x = Layer(), torch.randn(3, 12, dtype=torch.float64)
    expected = LINEAR["direct"](layer, x)
    for name, values in (
        ("norm", ("tiled", "factored")),
        ("compose", ("accumulated", "epilogue", "triton", "triton_linear")),
    ):
        for value in values:
            torch._dynamo.reset()
            options = {"dorafx.codegen": "eager", f"dorafx.{name}": value, "dorafx.strict": True}
            compiled = torch.compile(LINEAR["direct"], backend="dorafx", options=options)
            torch.testing.assert_close(compiled(layer, x), expected)


@pytest.mark.page
def test_table_in_the_readme() -> None:
    """The options are described in one place, the docstring."""
    described = inspect.cleandoc(Options.__doc__ or "").partition("Attributes:")[2]
    texts = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", described, flags=re.MULTILINE))
    assert list(texts) == [field.name for field in fields(Options)]
    rows = []
    for field in fields(Options):
        meaning = " ".join(texts[field.name].split()).replace("``", "`")
        rows.append(f"| `dorafx.{field.name}` | `{field.default!r}` | {meaning} |".replace("'", '"'))
        for value in _CHOICES.get(field.name, ()):
            assert f'`"{value}"`' in meaning, (field.name, value)
    readme = Path(__file__).parents[1] / "README.md"
    text = readme.read_text(encoding="utf-8")
    start, end = "<!-- options: written from dorafx/options.py -->\n", "<!-- end of options -->"
    assert start in text and end in text
    before, after = text.partition(start)[0], text.partition(end)[2]
    table = "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])
    is_current(readme, f"{before}{start}{table}\n{end}{after}")
