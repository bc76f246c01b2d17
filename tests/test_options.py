from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from pages import is_current

from dorafx.options import _CHOICES, Options

PAGE = Path(__file__).parents[1] / "examples" / "guide" / "options.md"


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


def _described() -> dict[str, str]:
    """What the docstring says of each option, as Markdown. It is the one place where options are described."""
    text = inspect.cleandoc(Options.__doc__ or "").partition("Attributes:\n")[2]
    parts = re.split(r"^ {4}(\w+): ", text, flags=re.MULTILINE)[1:]
    options = {}
    for name, part in zip(parts[::2], parts[1::2]):
        first, _, rest = part.partition("\n")
        body = f"{first[0].upper()}{first[1:]}\n{textwrap.dedent(rest)}".strip().replace("``", "`")
        # A paragraph or list item a line.
        options[name] = re.sub(r"(?<=\S)\n *(?=[^\s-])", " ", body)
    return options


def _sections() -> str:
    described = _described()
    rows, sections = ["| option | default | meaning |", "|---|---|---|"], []
    for field in fields(Options):
        default, text = f"{field.default!r}".replace("'", '"'), described[field.name]
        first = text.partition("\n")[0]
        rows.append(f"| [`{field.name}`](#{field.name}) | `{default}` | {first[0].lower()}{first[1:].rstrip('.')} |")
        sections += ["", f"### {field.name}", "", f"`dorafx.{field.name}`, by default `{default}`.", ""]
        for line in text.split("\n"):
            indent = "  " if line.startswith("- ") else ""
            sections += textwrap.wrap(line, 110, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return "\n".join([*rows, *sections])


@pytest.mark.page
def test_the_page_of_options() -> None:
    """``examples/guide/options.md`` has what the docstring says."""
    described = _described()
    assert list(described) == [field.name for field in fields(Options)]
    for name, values in _CHOICES.items():
        assert all(f'`"{value}"`' in described[name] for value in values), name
    text = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- options: written from dorafx/options.py -->\n", "<!-- end of options -->"
    assert start in text and end in text
    before, after = text.partition(start)[0], text.partition(end)[2]
    is_current(PAGE, f"{before}{start}\n{_sections()}\n\n{end}{after}")


def test_the_error_that_the_page_shows() -> None:
    with pytest.raises(ValueError, match="is not one of") as raised:
        Options.split({"dorafx.norm": "fast"})
    assert f"\n{raised.value}\n" in PAGE.read_text(encoding="utf-8")
