"""A program may return a norm, and its caller write to it: what is kept stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_close
from layer_support import Layer, compiled, one_row
from reuse_support import counts
from torch.utils.checkpoint import checkpoint

from dorafx import rewrite_log
from dorafx.rewriter import hoist_norms
from dorafx.runtime import norm_store
from dorafx.versions import minor

HANDED_OUT: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda n: n,
    "twice": lambda n: (n, n),
    "detached": lambda n: n.detach(),
    "reshaped": lambda n: n.reshape(-1, 1),
    "unsqueezed": lambda n: n.unsqueeze(0),
    "of the same dtype": lambda n: n.to(torch.float64),
    "of the type of another": lambda n: n.type_as(torch.ones(1, dtype=torch.float64)),
    "expanded": lambda n: n.expand(3, 10)[1],
    "as strided": lambda n: n.as_strided((5,), (2,)),
    "split": lambda n: n.split(4)[1],
    "contiguous": lambda n: n.contiguous(),
    "atleast": lambda n: torch.atleast_2d(n),
    "broadcast": lambda n: torch.broadcast_tensors(n, torch.ones(2, 10))[0][0],
    "dropout that is off": lambda n: torch.nn.functional.dropout(n, 0.5, training=False),
    "times ones": lambda n: n * torch.ones(10, dtype=torch.float64),
    "plus zeros": lambda n: n + torch.zeros(10, dtype=torch.float64),
    "in a dict": lambda n: {"norm": [n]},
}
INSIDE = ("dropout that is off", "times ones", "plus zeros")
"""What is computed of the norm that the layer reads; the others are handed out, and a caller's norm is computed by itself."""


def _spoil(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value.data.fill_(7.0)
    else:
        for item in value.values() if isinstance(value, dict) else value:
            _spoil(item)


class Telling(Layer):
    """A layer that returns its norm beside its result."""

    def __init__(self, of: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: torch.Tensor) -> Any:
        norm = self.norm()
        return self.composed(x, norm), self.of(norm)


def _decode(name: str, codegen: str) -> None:
    layer, x = Telling(HANDED_OUT[name]), one_row()
    call = compiled(layer, codegen)
    with torch.no_grad():
        for _ in range(4):
            y, told = call(x)
            expected, expected_told = layer(x)
            assert_close(y, expected, 1e-12)
            torch.testing.assert_close(told, expected_told)
            _spoil(told)
    norms = 1 if name in INSIDE else 2
    if name == "dropout that is off" and minor(torch.__version__) >= (2, 14):
        norms = 2  # Dynamo leaves it out: the norm itself is handed out
    assert counts() == (norms, 3 * norms), "reused, and never spoiled"


@pytest.mark.parametrize("name", HANDED_OUT)
def test_decoding(name: str) -> None:
    _decode(name, "eager")


@pytest.mark.parametrize(
    "name", [n if n in ("itself", "times ones") else pytest.param(n, marks=pytest.mark.slow) for n in HANDED_OUT]
)
def test_decoding_with_inductor(name: str) -> None:
    _decode(name, "inductor")


SHAPED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "times ones like another": lambda n, p: n * torch.ones_like(p),
    "plus zeros like another": lambda n, p: n + torch.zeros_like(p),
    "minus zeros of another": lambda n, p: n - p.new_zeros(10),
    "over ones of another": lambda n, p: n / p.new_full((10,), 1.0),
}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_the_shape_of_another_input_is_no_value_of_it(codegen: str, name: str) -> None:
    """Inductor finds that the result is the norm, and returns the norm itself."""
    layer, x = Layer(), one_row()
    of = SHAPED[name]

    def told(x: torch.Tensor) -> Any:
        norm = layer.norm()
        return layer.composed(x, norm), of(norm, layer.m)

    call = compiled(told, codegen)
    with torch.no_grad():
        for _ in range(3):
            y, norm = call(x)
            torch.testing.assert_close(norm, told(x)[1])
            assert_close(y, layer(x), 1e-12)
            _spoil(norm)
    assert counts()[1]


@pytest.mark.parametrize("codegen", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("inside", [False, True], ids=["around", "in the graph"])
def test_a_checkpointed_gradient(inside: bool, codegen: str) -> None:
    """Between the forward and the recomputation in the backward."""
    layer = Telling(lambda n: n)
    twin, x = copy.deepcopy(layer), one_row()

    def region(module: Any) -> Any:
        return lambda x: checkpoint(module, x, use_reentrant=False)

    ours = compiled(region(layer), codegen) if inside else region(compiled(layer, codegen))
    for call in (ours, region(twin)):
        for _ in range(2):
            y, norm = call(x.clone().requires_grad_())
            norm.data.fill_(7.0)
            y.sin().sum().backward()
    for p, q in zip(layer.parameters(), twin.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            assert_close(p.grad, q.grad, 1e-12)


def test_accumulation() -> None:
    layer, x = Telling(lambda n: n.view(2, 5)), one_row()
    call = compiled(layer)
    for _ in range(3):
        y, told = call(x)
        assert_close(y, layer(x)[0], 1e-12)
        told.mul_(2)
    assert counts() == (2, 4), "the layer's and the caller's"


@pytest.mark.parametrize("codegen", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_an_operand_of_a_region_is_handed_out_by_the_region(codegen: str) -> None:
    """The norm is computed outside, the body returns a view of it, and the program returns that."""
    layer, x = Layer(), one_row()

    def program(x: torch.Tensor) -> Any:
        norm = layer.norm()
        y, told = checkpoint(lambda x, n: (layer.composed(x, n), n.view(-1, 1)), x, norm, use_reentrant=False)
        return y, told

    call = compiled(program, codegen)
    for _ in range(3):
        y, told = call(x)
        assert_close(y, layer(x), 1e-12)
        told.data.zero_()
    assert counts() == (1, 2)


def test_nothing_is_copied_where_the_norm_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision and fp64, a cast and a power between the norm and what it divides."""
    import dorafx.pipeline

    graphs = []

    def hoist(gm: torch.fx.GraphModule) -> Any:
        hoisted = hoist_norms(gm)
        graphs.append(gm)
        return hoisted

    monkeypatch.setattr(dorafx.pipeline, "hoist_norms", hoist)
    layer = Layer()

    def inverted(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = (torch.nn.functional.linear(x, layer.w) + 1) * (layer.m * layer.norm().reciprocal())
        return y

    for program, dtype in ((layer, torch.float64), (layer, torch.bfloat16), (inverted, torch.float64)):
        layer.to(dtype)
        with torch.no_grad():
            compiled(program)(one_row().to(dtype))
        assert graphs and not any(node.target == "clone" for node in graphs.pop().graph.nodes)
    assert {r.norm_placement for r in rewrite_log().rewrites} == {"prologue"}


def test_the_kept_tensor_itself_is_never_given() -> None:
    layer = Telling(lambda n: n)
    with torch.no_grad():
        told = compiled(layer)(one_row())[1]
    (entry,) = norm_store()._entries.values()
    assert entry.norm is not None
    assert told.untyped_storage().data_ptr() != entry.norm.untyped_storage().data_ptr()


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["data", "set_", "attribute"])
def test_put_into_a_buffer(how: str, codegen: str) -> None:
    """What a buffer's ``.data`` is from then on, the norm must not be."""

    class Storing(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(10, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            norm = self.norm()
            if how == "data":
                self.last.data = norm
            elif how == "set_":
                self.last.set_(norm)
            else:
                self.last = norm
            return self.composed(x, norm)

    layer, x = Storing(), one_row()
    plain = copy.deepcopy(layer)
    call = compiled(layer, codegen)
    with torch.no_grad():
        for _ in range(4):
            assert_close(call(x), plain(x), 1e-12)
            torch.testing.assert_close(layer.last, plain.last)
            layer.last.mul_(2), plain.last.mul_(2)
