from __future__ import annotations

import pytest
import torch

from dorafx.options import Options


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
            "dorafx.codegen, dorafx.norm, dorafx.compose, dorafx.norm_reuse, dorafx.verify, dorafx.strict",
        ),
        ({"dorafx.norm": "fast"}, "'auto', 'tiled', 'factored'"),
        ({"dorafx.compose": 3}, "'auto', 'accumulated', 'epilogue'"),
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
