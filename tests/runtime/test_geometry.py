"""Never stale: the same memory read in another way, another tensor in the same memory, other content in the same object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_close
from layer_support import Layer, compiled, one_row, rows
from torch import nn

from dorafx import rewrite_log
from dorafx.runtime import norm_store, watch


@pytest.fixture(params=["samples", "no samples"])
def sampling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no samples":
        monkeypatch.setattr(watch, "is_read", lambda tensor: False)


def _truncated(layer: Layer) -> None:
    layer.a.data, layer.b.data = layer.a.data[:2], layer.b.data[:, :2]


def _wide(layer: Layer) -> None:
    """A weight that is a window of a larger one; moved by one row."""
    layer.whole = torch.randn(11, 10, dtype=torch.float64)
    layer.w.data = layer.whole[:10]


def _swapped(layer: Layer) -> None:
    torch.utils.swap_tensors(layer.a, nn.Parameter(layer.a.detach() * 2))


def _swapped_back_after_a_write(layer: Layer) -> None:
    """What the object holds has the version and the place that were seen, and another counter."""
    other = nn.Parameter(layer.a.data)
    other.data.mul_(2)
    torch.utils.swap_tensors(layer.a, other)


CHANGES: dict[str, Callable[[Any], None]] = {
    "transposed": lambda s: setattr(s.w, "data", s.w.data.t()),
    "flipped back": lambda s: setattr(s.w, "data", s.w.data.as_strided((10, 10), (1, 10))),
    "rank truncated": _truncated,
    "first row everywhere": lambda s: setattr(s.w, "data", s.w.data[:1].expand(10, 10)),
    "one number everywhere": lambda s: setattr(s.b, "data", s.b.data.as_strided((10, 4), (0, 0))),
    "negated": lambda s: setattr(s.b, "data", torch._neg_view(s.b.data)),
    "another window": lambda s: setattr(s.w, "data", s.whole[1:]),
    "swapped": _swapped,
    "swapped with its alias": _swapped_back_after_a_write,
}


@pytest.mark.usefixtures("sampling")
@pytest.mark.parametrize("name", CHANGES)
def test_decoding(name: str) -> None:
    layer = Layer()
    _wide(layer)
    call, x = compiled(layer), one_row()
    with torch.no_grad():
        for _ in range(2):
            call(x)
        assert rewrite_log().norms.reused == 1
        CHANGES[name](layer)
        for _ in range(2):
            assert_close(call(x), layer(x), 1e-12)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_squares_in_training(codegen: str) -> None:
    layer, x = Layer(), rows()
    call = compiled(layer, codegen, norm="factored")
    for change in (CHANGES["transposed"], CHANGES["first row everywhere"]):
        call(x)
        change(layer)
        try:
            y = call(x)
        except AssertionError:
            return _raised_by_inductor_itself(change, x)
        assert_close(y, layer(x), 1e-9)


def _raised_by_inductor_itself(change: Callable[[Any], None], x: torch.Tensor) -> None:
    """Before torch 2.13 nothing guards on a parameter's strides, and Inductor's own check of them raises."""
    layer = Layer()
    call = torch.compile(layer)
    call(x)
    change(layer)
    with pytest.raises(AssertionError):
        call(x)


def test_dtypes_of_one_size() -> None:
    """No layer does that; the store is asked directly."""
    tensor = torch.randn(4, 4)
    norm_store().keep(norm_store().observe("n", [tensor]), torch.randn(4))
    floats = tensor.data
    tensor.data = floats.view(torch.int32)
    assert norm_store().kept("n", [tensor]) is None
    assert rewrite_log().norms.invalidated == {"a parameter's shape, strides or dtype changed": 1}


@pytest.mark.usefixtures("sampling")
def test_the_exact_comparison_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch offers no check of many tensors at once."""
    from dorafx._compat import tensors

    monkeypatch.setattr(tensors, "_geometry_check", lambda tensors: None)
    layer = Layer()
    call, x = compiled(layer), one_row()
    with torch.no_grad():
        for _ in range(2):
            call(x)
        assert rewrite_log().norms.reused == 1
        CHANGES["transposed"](layer)
        assert_close(call(x), layer(x), 1e-12)


def test_modes_do_not_look_like_changes() -> None:
    layer = Layer().float()
    call, x = compiled(layer), one_row().float()
    with torch.no_grad():
        call(x)
    for mode in (torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad()):
        with torch.no_grad(), mode:
            call(x)
            call(x)
    assert rewrite_log().norms.invalidated == {}
    # Under autocast the program rounds the factors, so that the norm is another one.
    assert rewrite_log().norms.computed == 2
    assert rewrite_log().norms.reused == 5


def test_another_object_in_the_place_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """``p = nn.Parameter(p.data.mul_(2))``: the same memory, a counter of its own that stands where the first one's did, and, after
    one that came between, often the same address."""
    monkeypatch.setattr(watch, "is_read", lambda tensor: False)
    layer = Layer()
    call, x = compiled(layer), one_row()
    addresses = set()
    with torch.no_grad():
        for _ in range(12):
            address = id(layer.a)
            addresses.add(address)
            assert_close(call(x), layer(x), 1e-12)
            for _ in range(3):
                layer.a = nn.Parameter(layer.a.data.mul_(1.1))
                if id(layer.a) == address:
                    break
    assert len(addresses) < 12, "the test has met an address twice"
