"""PEFT's convolutional DoRA in one to three dimensions: outputs, gradients, layout, cost, and what is left alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from running import Collecting
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dorafx import rewrite_log
from dorafx.bench.allocations import allocations
from dorafx.runtime import prologue

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Stack(nn.Module):
    """A convolution, an activation, and a convolution with a kernel of one."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        self.first = CONVS[dim](6, 12, **{"kernel_size": 3, **options})
        self.second = CONVS[dim](12, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def adapted(dim: int, dtype: torch.dtype = torch.float64, dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["first", "second"], lora_dropout=dropout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Stack(dim, **options), config).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def x_of(dim: int, dtype: torch.dtype = torch.float64, size: int = 7) -> torch.Tensor:
    return torch.randn(2, 6, *(size,) * dim, dtype=dtype, generator=torch.Generator().manual_seed(1))


def compiled(model: Any, codegen: str = "eager", **kwargs: Any) -> Any:
    torch._dynamo.reset()
    rewrite_log().clear()
    return torch.compile(model, backend="dorafx", fullgraph=True, options={"dorafx.codegen": codegen}, **kwargs)


def assert_same(model: Any, call: Any, x: torch.Tensor, tolerance: float) -> None:
    expected, actual = model(x), call(x)
    assert actual.shape == expected.shape and actual.stride() == expected.stride() and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    leaves = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected.sin().sum(), leaves)
    for got, want in zip(torch.autograd.grad(actual.sin().sum(), leaves), wanted):
        torch.testing.assert_close(got, want, rtol=tolerance * 100, atol=tolerance * 100)


def patterns() -> list[tuple[str, str]]:
    return sorted({(r.site.rpartition(".")[2], r.pattern if r.rewritten else r.reason) for r in rewrite_log().records})


BOTH = [("first", "convolution"), ("second", "convolution")]


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients(dim: int, training: bool) -> None:
    model = adapted(dim, padding=1).train(training)
    assert_same(model, compiled(model), x_of(dim), 1e-12)
    assert patterns() == BOTH


@pytest.mark.parametrize("codegen", ["inductor"])
def test_compiled_by_inductor(codegen: str) -> None:
    model = adapted(2, torch.float32, padding=1, bias=False)
    assert_same(model, compiled(model, codegen), x_of(2, torch.float32), 1e-5)
    assert patterns() == BOTH


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    dim=st.sampled_from([1, 2]),
    kernel_size=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "valid"]),
    bias=st.booleans(),
)
def test_options_of_the_convolution(dim: int, **options: Any) -> None:
    model = adapted(dim, **options)
    assert_same(model, compiled(model), x_of(dim), 1e-11)
    assert patterns() == BOTH


@pytest.mark.parametrize("dim", [1, 2])
def test_groups_are_left_alone_with_a_reason(dim: int) -> None:
    """PEFT cuts each row of the low-rank product into one row a group. By row the delta is a product too, but of as many times the
    rank: a factored norm of it takes more than the dense product, which PEFT forms of 1 / groups of the rows."""
    model = adapted(dim, groups=2, padding=1)
    layer = model.base_model.model.first
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    rank = down.shape[0]
    delta = (up.view(-1, rank) @ down.view(rank, -1)).reshape(layer.weight.shape).flatten(1)
    assert torch.linalg.matrix_rank(delta) == min(2 * rank, *delta.shape) > rank
    assert_same(model, compiled(model), x_of(dim), 1e-12)
    assert {r.site for r in rewrite_log().rewrites} == {"base_model.model.second"}
    missed = rewrite_log().misses
    assert {r.site for r in missed} == {"base_model.model.first.lora_magnitude_vector.default"}
    assert all("cuts each row of the low-rank product into 2 (a grouped convolution)" in r.reason for r in missed)


def test_grouped_convolution_of_ones_own() -> None:
    """Whole filters of a grouped convolution are normalised like any others."""
    w, a, b = torch.randn(8, 3, 3, 3), torch.randn(2, 3, 3, 3), torch.randn(8, 2, 1, 1)
    up, down = torch.randn(8, 2, 1, 1), torch.randn(2, 6, 3, 3)

    def program(x: torch.Tensor) -> torch.Tensor:
        n = (w + (b.flatten(1) @ a.flatten(1)).view(w.shape)).norm(p=2, dim=(1, 2, 3)).view(1, -1, 1, 1)
        return (F.conv2d(x, w, groups=2, dilation=2, padding=2) + F.conv2d(F.conv2d(x, down, padding=1), up)) / n

    x = x_of(2, torch.float32)
    torch.testing.assert_close(compiled(program)(x), program(x), rtol=1e-5, atol=1e-5)
    assert [r.pattern for r in rewrite_log().rewrites] == ["convolution"]


@pytest.mark.parametrize("tokens", [2, 4, 5])
def test_filters_that_are_scaled(tokens: int) -> None:
    """The scalings of a chain stand between convolutions, along the channels, whatever else has their length."""
    w, a, b, bias = torch.randn(4, 4), torch.randn(2, 4), torch.randn(4, 2), torch.randn(4)
    inner, outer = torch.randn(2), torch.randn(4)

    def program(x: torch.Tensor) -> torch.Tensor:
        up, down = outer[:, None] * b, inner[:, None] * a
        g = (1 / (w + up @ down).norm(dim=1)).view(1, -1, 1)
        low = F.conv1d(F.conv1d(x, down[..., None]), up[..., None])
        scaled = outer.view(1, -1, 1) * F.conv1d(F.conv1d(x, a[..., None]), b[..., None])
        return g * (F.conv1d(x, w[..., None], bias) + low) + g * scaled + bias[:, None]

    x = torch.randn(3, 4, tokens)
    torch.testing.assert_close(compiled(program)(x), program(x), rtol=1e-4, atol=1e-4)
    assert [r.pattern for r in rewrite_log().rewrites] == ["convolution"]


def test_dropout() -> None:
    model = adapted(2, dropout=0.4, padding=1).train()
    x = x_of(2)
    call = compiled(model)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(call(x), expected, rtol=1e-12, atol=1e-12)
    assert patterns() == BOTH


def test_two_adapters_and_none() -> None:
    model = adapted(2, padding=1)
    config = LoraConfig(r=2, use_dora=True, target_modules=["first", "second"])
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "other" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    x, call = x_of(2), compiled(model)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        assert_same(model, call, x, 1e-12)
    with model.disable_adapter():
        torch.testing.assert_close(call(x), model(x), rtol=1e-12, atol=1e-12)


def test_channels_last_is_kept() -> None:
    model = adapted(2, padding=1)
    x = x_of(2).to(memory_format=torch.channels_last)
    assert_same(model, compiled(model), x, 1e-12)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


def test_no_dense_delta_is_formed() -> None:
    """FLOPs: the convolutions, and 2·d_out·d_in·r for a norm. No allocation for a norm as large as an eighth of the weight."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, use_dora=True, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Conv2d(64, 128, 3)), config).eval()
    x = torch.randn(1, 64, 3, 3)
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        torch.compile(model, backend=Collecting(True, counter), fullgraph=True, dynamic=False)(x)
    weight = 128 * 64 * 9
    base, down, up = 2 * weight, 2 * 4 * 64 * 9, 2 * 128 * 4
    assert counter.get_total_flops() == base + down + up + 2 * weight * 4
    record = rewrite_log().rewrites[0]
    assert (record.d_out, record.d_in, record.rank) == (128, 576, 4)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    def norm() -> None:
        torch.ops.dorafx.row_norm(layer.weight.detach().flatten(1), b.flatten(1), a.flatten(1), 1.0)

    assert allocations(norm, "cpu").largest < weight * 4 / 8


def test_filters_in_channels_last_are_not_copied_for_their_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a matrix as they lie in memory, with the columns in another order, which the right factor is brought to."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, use_dora=True, target_modules=["0"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convolution = nn.Conv2d(48, 64, (3, 2)).to(memory_format=torch.channels_last)
        model = get_peft_model(nn.Sequential(convolution), config).eval()
    weight = convolution.weight
    x = torch.randn(1, 48, 5, 5).to(memory_format=torch.channels_last)
    largest: list[int] = []
    compute = prologue._compute

    def watched(*args: Any) -> Any:
        found: list[Any] = []
        largest.append(allocations(lambda: found.append(compute(*args)), "cpu").largest)
        return found[0]

    monkeypatch.setattr(prologue, "_compute", watched)
    call = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(call(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(largest) == 1 and largest[0] < weight.numel() * 4 / 8
    assert [r.norm_placement for r in rewrite_log().rewrites] == ["prologue"]


def test_another_norm_is_rewritten_alone_or_not_at_all() -> None:
    """A norm of single kernels is none of filters; a filter of another convolution leaves the norm to itself."""
    w, a, b = torch.randn(8, 6, 3, 3), torch.randn(2, 6, 3, 3), torch.randn(8, 2, 1, 1)

    def kernels(x: torch.Tensor) -> torch.Tensor:
        n = (w + (b.flatten(1) @ a.flatten(1)).view(w.shape)).norm(p=2, dim=(2, 3))
        return F.conv2d(x, w / n[..., None, None])

    def other(x: torch.Tensor) -> torch.Tensor:
        n = (w + (b.flatten(1) @ a.flatten(1)).view(w.shape)).norm(p=2, dim=(1, 2, 3))
        return F.conv2d(x, w.flip(0)) / n.view(1, -1, 1, 1)

    x = x_of(2, torch.float32)
    for program, expected in ((kernels, []), (other, ["norm_only"])):
        torch.testing.assert_close(compiled(program)(x), program(x), rtol=1e-5, atol=1e-5)
        assert [r.pattern for r in rewrite_log().rewrites] == expected


def test_spectral_norm_is_another() -> None:
    w, a, b = torch.randn(8, 6, 3), torch.randn(2, 6, 3), torch.randn(8, 2, 1)

    def program(x: torch.Tensor) -> torch.Tensor:
        n = torch.linalg.norm(w + (b.flatten(1) @ a.flatten(1)).view(w.shape), ord=2, dim=(1, 2))
        return F.conv1d(x, w) / n.view(1, -1, 1)

    x = x_of(1, torch.float32)
    torch.testing.assert_close(compiled(program)(x), program(x), rtol=1e-5, atol=1e-5)
    assert rewrite_log().rewrites == []


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_batch_of_none(dim: int, codegen: str) -> None:
    """Inductor's backward of a convolution over nothing raises, the frozen layer's too; such a graph runs operator by operator. Others of
    the model do not."""
    model = adapted(dim)
    call = compiled(model, codegen)
    for batch in (0, 2, 0):
        x = x_of(dim)[:batch].requires_grad_()
        results = []
        for run in (model, call):
            y = run(x)
            trained = [p for p in model.parameters() if p.requires_grad]
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
        for wanted, got in zip(*results):
            torch.testing.assert_close(got, wanted)
        assert results[0][0].stride() == results[1][0].stride()
    assert len({r.site for r in rewrite_log().rewrites}) == 2
