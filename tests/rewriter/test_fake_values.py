"""Fake values of new nodes: what the operators themselves would say, however often they were asked before."""

import pytest
import torch

from dorafx._compat.tensors import fake_mode, fake_mode_of, storage_id
from dorafx.rewriter.fake_values import FakeValues

OPERATORS = {
    "a product": lambda x, w: torch.addmm(x, x, w, alpha=0.5),
    "a view": lambda x, w: x.flatten(0, -2).t(),
    "a detached view": lambda x, w: w.detach(),
    "a division": lambda x, w: torch.div(x, w),
    "an operator of dorafx": lambda x, w: torch.ops.dorafx.row_norm(w, w, w, 1.0, "auto"),
}


def described(value: torch.Tensor) -> tuple[object, ...]:
    return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("gradients", [True, False])
def test_as_the_operator_says(name, gradients):
    function = OPERATORS[name]
    mode = fake_mode()
    values = FakeValues()
    with mode:
        pairs = [
            (torch.empty(4, 4, requires_grad=gradients), torch.empty(4, 4)),
            (torch.empty(4, 4, requires_grad=gradients), torch.empty(4, 4)),  # the same layouts
            (torch.empty(4, 4), torch.empty(4, 4, requires_grad=gradients)),
            (torch.empty(4, 4, dtype=torch.float64), torch.empty(4, 4, dtype=torch.float64)),
            (torch.empty(8, 4)[::2], torch.empty(4, 4).t()),
        ]
    for x, w in pairs:
        with mode:
            expected = function(x, w)
        result = values(function, (x, w), {}, mode)
        assert described(result) == described(expected)
        assert fake_mode_of(result) is mode
        for operand in (x, w):
            shared = storage_id(expected) == storage_id(operand)
            assert (storage_id(result) == storage_id(operand)) == shared


def test_once_for_equal_layouts():
    calls = []

    def operator(x: torch.Tensor, scale: float) -> torch.Tensor:
        calls.append(scale)
        return torch.mul(x, scale)

    mode = fake_mode()
    values = FakeValues()
    with mode:
        inputs = [torch.empty(2, 3) for _ in range(3)]
    for x in inputs:
        values(operator, (x, 2.0), {}, mode)
    assert calls == [2.0]
    values(operator, (inputs[0], 3.0), {}, mode)
    values(operator, (inputs[0],), {"scale": 3.0}, mode)
    with torch.no_grad():
        values(operator, (inputs[0], 2.0), {}, mode)
    assert calls == [2.0, 3.0, 3.0, 2.0]


def test_symbolic_sizes_are_asked_each_time():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())
    calls = []

    def operator(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x.flatten(0, -2)

    x = mode.from_tensor(torch.empty(5, 3, 4), static_shapes=False)
    values = FakeValues()
    for _ in range(2):
        assert values(operator, (x,), {}, mode).shape[-1] == x.shape[-1]
    assert len(calls) == 2
