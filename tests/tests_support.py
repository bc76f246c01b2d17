"""What several test folders need: run a program as it is and through dorafx, and compare values and gradients."""

from __future__ import annotations

from typing import Any

import torch

from dorafx.backend import dorafx as backend


def check_same(program: Any, layer: Any, x: torch.Tensor, tolerance: float = 1e-12, **options: Any) -> None:
    """Outputs and gradients of ``program(layer, x)``, original against rewritten (eager codegen), in fp64."""
    leaves = [x, *layer.trainable()]
    expected = program(layer, x)
    expected_grads = torch.autograd.grad(expected.sin().sum(), leaves, allow_unused=True)

    def run(value: torch.Tensor) -> torch.Tensor:
        return program(layer, value)

    torch._dynamo.reset()
    compiled = torch.compile(
        run,
        backend=backend,
        fullgraph=True,
        dynamic=False,
        options={"dorafx.codegen": "eager", "dorafx.strict": False, **options},
    )
    actual = compiled(x)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    actual_grads = torch.autograd.grad(actual.sin().sum(), leaves, allow_unused=True)
    for leaf, got, wanted in zip(leaves, actual_grads, expected_grads):
        assert (got is None) == (wanted is None), f"gradient flow changed for a leaf of shape {tuple(leaf.shape)}"
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=tolerance * 100, atol=tolerance * 100)


@torch.library.custom_op("dorafx_tests::scale", mutates_args=("t",))
def scale(t: torch.Tensor, by: float) -> None:
    """An operator of somebody's own that writes to its argument: ``torch.ops.dorafx_tests.scale`` in a graph."""
    t.mul_(by)
