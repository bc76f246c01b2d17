"""Fast: which forwards reuse norms, and which compute them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from integration_support import assert_close, compile_eagerly, peft_model, peft_perceptron, tokens
from reuse_support import LAYERS, OPTIMIZERS, Decoder, counts, one_token, overwrite, parameters, prompt
from torch.utils.checkpoint import checkpoint

import dorafx
from dorafx import rewrite_log
from dorafx.runtime import norm_store


@pytest.fixture
def no_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host cannot read what is in memory."""
    monkeypatch.setattr("dorafx.runtime.content._content", lambda tensor: None)


def test_decoding_and_prefill_reuse() -> None:
    decoder = Decoder().warm()
    assert counts() == (LAYERS, LAYERS)
    decoder.step(prompt())
    decoder.step(prompt())
    decoder.step()
    assert counts() == (LAYERS, 4 * LAYERS)


def test_prefill_computes_without_contents(no_contents: None) -> None:
    decoder = Decoder().warm()
    assert counts() == (LAYERS, LAYERS)
    decoder.step(prompt())
    decoder.step(prompt())
    assert counts() == (3 * LAYERS, LAYERS)
    decoder.step()
    assert counts() == (3 * LAYERS, 2 * LAYERS), "graphs of one model share the store"


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_one_token_a_sequence_is_decoding(batch: int) -> None:
    decoder = Decoder()
    x = torch.randn(batch, 1, 24)
    decoder.step(x)
    decoder.step(x)
    assert counts() == (LAYERS, LAYERS)


def test_recorded_gradients_compute_every_norm_without_contents(no_contents: None) -> None:
    decoder = Decoder().warm()
    for _ in range(2):
        decoder.compiled(one_token()).sum().backward()
    assert counts() == (3 * LAYERS, LAYERS)
    assert rewrite_log().norms.invalidated == {"a forward recorded gradients": LAYERS}
    decoder.step()
    assert counts() == (4 * LAYERS, LAYERS)


def test_never() -> None:
    decoder = Decoder(**{"dorafx.norm_reuse": "never"})
    decoder.step()
    decoder.step()
    assert counts() == (2 * LAYERS, 0)
    assert len(norm_store()) == 0


class _Marked(torch.nn.Parameter):
    """A subclass, as quantised and sharded parameters are."""


def keep(tensors: list[torch.Tensor], norm: torch.Tensor) -> None:
    norm_store().keep(norm_store().observe("n", tensors), norm)


def test_subclasses_are_not_kept() -> None:
    plain = [torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3)]
    keep(plain, torch.randn(4))
    assert len(norm_store()) == 1
    keep([_Marked(plain[0]), *plain[1:]], torch.randn(4))
    assert len(norm_store()) == 1


def test_a_write_while_a_norm_is_computed_shows() -> None:
    """Whatever another thread writes between the start of a computation and its end."""
    tensors = [torch.randn(4, 3)]
    for write in (lambda t: t.mul_(2), lambda t: t.data.mul_(2)):
        observed = norm_store().observe("n", tensors)
        write(tensors[0])
        norm_store().keep(observed, torch.randn(4))
        assert norm_store().kept("n", tensors) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_any_layout_is_sampled(dtype: torch.dtype) -> None:
    """Whatever strides a tensor has, a change of all of it shows, and none does not; one element will do."""
    for tensor in (
        torch.randn(7, 5).to(dtype),
        torch.randn(64, 65).to(dtype),
        torch.randn(7, 5).to(dtype).t(),
        torch.randn(7, 10).to(dtype)[:, ::2],
        torch.randn(6, 4).to(dtype)[2:],
        torch.randn(3, 1, 4).to(dtype).expand(3, 6, 4)[1:],
        torch.ones(1).to(dtype),
        torch.full((3, 4), float("nan")).to(dtype),
        torch.empty(0, 3).to(dtype),
    ):
        norm_store().clear()
        norm = torch.randn(4)
        keep([tensor], norm)
        assert norm_store().kept("n", [tensor]) is norm
        tensor.data.copy_(torch.full_like(tensor, 3)) if tensor.dim() < 3 else tensor.data[:, 0].add_(3)
        assert (norm_store().kept("n", [tensor]) is None) == bool(tensor.numel())


def test_samples_come_from_many_columns() -> None:
    """Also where the sizes are powers of two: the write of any half of the columns shows."""
    for start in (0, 64):
        norm_store().clear()
        tensor = torch.randn(256, 128)
        keep([tensor], torch.randn(256))
        tensor.data[:, start : start + 64] *= 2
        assert norm_store().kept("n", [tensor]) is None


def test_inference_mode_then_gradients() -> None:
    """Norms made under inference mode are ordinary tensors."""
    decoder = Decoder()
    with torch.inference_mode():
        decoder.compiled(one_token())
    decoder.step()
    assert counts() == (LAYERS, LAYERS)
    decoder.compiled(one_token()).sum().backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_accumulation_computes_norms_once_a_step(name: str) -> None:
    model = peft_perceptron().train()
    twin = copy.deepcopy(model)
    compiled = compile_eagerly(model, **{"dorafx.norm_reuse": "step"})  # another name of "auto"
    optimizers = [OPTIMIZERS[name](parameters(m)) for m in (model, twin)]
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["lr"] = 1e-2
    for step in range(3):
        for micro in range(4):
            x = torch.randn((8, 24), generator=torch.Generator().manual_seed(10 * step + micro))
            for call in (compiled, twin):
                call(x).sin().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, stock in zip(parameters(model), parameters(twin)):
        assert_close(ours, stock, 1e-4)
    assert counts() == (3 * LAYERS, 9 * LAYERS)


def test_accumulation_sees_writes_between_micro_batches() -> None:
    """Nothing but the optimizer writes within a step, as a rule, and still nothing is stale where somebody does."""
    model = peft_perceptron().train()
    compiled = compile_eagerly(model)
    x = torch.randn((8, 24), generator=torch.Generator().manual_seed(1))
    for change in (None, None, overwrite, None):
        if change is not None:
            for p in parameters(model):
                change(p)
        gradients = []
        for call in (compiled, model):
            call(x).sin().sum().backward()
            gradients.append([p.grad.clone() for p in parameters(model) if p.grad is not None])
            model.zero_grad()
        for ours, stock in zip(*gradients):
            assert_close(ours, stock, 1e-4)
    assert counts() == (2 * LAYERS, 2 * LAYERS)


@pytest.mark.default_cases("False-modules-2-2", "False-blocks-2-2")
@pytest.mark.parametrize(
    ("use_reentrant", "scope", "blocks", "steps"),
    [
        (False, "modules", 2, 2),
        (True, "modules", 2, 2),
        (False, "blocks", 2, 2),
        (True, "blocks", 2, 2),
        (False, "model", 1, 1),
        pytest.param(True, "model", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_does_not_compute_norms_again(use_reentrant: bool, scope: str, blocks: int, steps: int) -> None:
    """Neither where the blocks' bodies are in the graph, nor where each layer is a graph and is run again in the backward."""
    model = peft_model(layers=blocks).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    twin = copy.deepcopy(model)
    dorafx.optimize(model, codegen="aot_eager", scope=scope, strict=True)
    for step in range(steps):
        for m in (model, twin):
            m(input_ids=tokens(), use_cache=False).logits.sin().sum().backward()
        for ours, stock in zip(parameters(model), parameters(twin), strict=True):
            assert_close(ours.grad, stock.grad, 1e-4)
            # As by an optimizer that nobody can see: the next forward computes all norms again.
            for p in (ours, stock):
                p.data.sub_(0.1 * stock.grad)
            ours.grad = stock.grad = None
        computed = 7 * blocks * (step + 1)
        assert counts() == (computed, computed if scope == "modules" else 0), "seven layers in each block, once a step"
    assert {r.norm_placement for r in rewrite_log().rewrites} == {"prologue"}


def _recomputed(change: Callable[[torch.nn.Module], None]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of a checkpointed layer, compiled by itself and stock, with a change between forward and backward."""
    model = peft_perceptron().train()
    compiled = compile_eagerly(model)
    x = torch.randn((8, 24), generator=torch.Generator().manual_seed(1))
    found = []
    before = copy.deepcopy(model.state_dict())
    for call in (compiled, model):
        model.load_state_dict(before)
        y = checkpoint(call, x.clone().requires_grad_(), use_reentrant=True)
        change(model)
        y.sin().sum().backward()
        found.append([p.grad.clone() for p in parameters(model) if p.grad is not None])
        model.zero_grad()
    return found[0], found[1]


@pytest.mark.parametrize("changed", [False, True])
def test_a_recomputation_sees_what_was_written_since_its_forward(changed: bool) -> None:
    """Through ``.data``, which autograd does not see either: stock recomputes with the new values."""
    ours, stock = _recomputed(lambda model: [overwrite(p) for p in parameters(model)] if changed else None)
    for one, other in zip(ours, stock, strict=True):
        assert_close(one, other, 1e-4)
    assert counts() == ((2 * LAYERS, 0) if changed else (LAYERS, LAYERS))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_was_kept_for_a_recomputation_serves_nothing_else(use_reentrant: bool, no_contents: None) -> None:
    """A decoding step after training computes its norms, whatever wrote the parameters meanwhile."""
    model = peft_perceptron().train()
    compiled = compile_eagerly(model)
    x = one_token().requires_grad_()
    checkpoint(compiled, x, use_reentrant=use_reentrant).sum().backward()
    assert counts() == (LAYERS, LAYERS)
    with torch.no_grad():
        compiled(one_token())
        assert counts() == (2 * LAYERS, LAYERS)
        compiled(one_token())
    assert counts() == (2 * LAYERS, 2 * LAYERS)
