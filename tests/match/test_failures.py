"""A transfer function that raises: the program runs as it is, and what DoRA loses by it is a miss with the failure as its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import Layer, lora
from same_results import check_everything, check_same, graph_of
from torch import fx
from transfer_functions import wrap

import dorafx
from dorafx import rewrite_log
from dorafx.errors import RewriteMissError
from dorafx.lift import Lifter
from dorafx.lift.lifter import Transfer, transfers
from dorafx.match import Matches, ReasonKind, match_graph

_FAILED = Lifter._failed  # what tests see elsewhere raises
SAID = "could not be followed, because dorafx failed in it: ZeroDivisionError: planted (test_failures.py:"


@pytest.fixture(autouse=True)
def _as_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lifter, "_failed", _FAILED)


def plant(patch: pytest.MonkeyPatch, name: str, fails: Callable[[fx.Node], bool] = lambda node: True) -> None:
    """Make the transfer function of an operator raise, of all its nodes or of some."""

    def around(transfer: Transfer) -> Transfer:
        def raising(lift: Lifter, node: fx.Node) -> Any:
            if fails(node):
                raise ZeroDivisionError("planted\nwith a second line")
            return transfer(lift, node)

        return raising

    wrap(patch, name, around)


def direct(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + 2.0 * (p.B @ p.A)).norm(dim=1)
    return p.m / n * (F.linear(x, p.W) + 2.0 * lora(p, x))


def of_squares(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + 2.0 * (p.B @ p.A)
    n = (adapted * adapted).sum(1).sqrt().detach()
    return p.m / n * (F.linear(x, p.W) + 2.0 * lora(p, x))


def merged(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + 2.0 * (p.B @ p.A)
    return F.linear(x, p.m[:, None] * F.normalize(adapted, dim=1))


# (program, operator, whether it costs the norm, too, and not the composition alone)
PLANTED: dict[str, tuple[Callable[[Layer, torch.Tensor], torch.Tensor], str, bool]] = {
    "the delta": (direct, "matmul", True),
    "the sum and the output": (direct, "add", True),
    "every product by element": (direct, "mul", True),
    "the norm": (direct, "norm", True),
    "the scaling": (direct, "div", False),
    "squares": (of_squares, "mul", True),
    "a sum of squares": (of_squares, "sum", True),
    "the root": (of_squares, "sqrt", True),
    "no gradient": (of_squares, "detach", False),
    "a weight over its norm": (merged, "normalize", True),
    "the product with the merged weight": (merged, "linear", True),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_program_runs_and_the_log_says_why(name: str, codegen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are the original's."""
    program, operator, norm = PLANTED[name]
    plant(monkeypatch, operator)
    check_everything(program, Layer(), torch.randn(4, 12, dtype=torch.float64), codegen=codegen)
    records = [r for r in rewrite_log().records if SAID in r.reason]
    assert records, rewrite_log().records
    assert {r.rewritten for r in records} == ({False} if norm else {True})
    for record in records:
        assert (
            record.reason.count("\n") == 0
            and record.kind == ReasonKind.OPERATOR_FAILED.value
            and "A defect of dorafx" in record.advice
        )
        assert f"operator {spelled(operator)} at {__file__}:" in record.reason
        assert record.source.startswith(f"{__file__}:")


def spelled(operator: str) -> str:
    return {"div": "truediv"}.get(operator, operator)


@pytest.mark.parametrize("name", ["the delta", "the scaling"])
def test_through_inductor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind, forward and backward, in the default run."""
    program, operator, _ = PLANTED[name]
    plant(monkeypatch, operator)
    check_same(
        program, Layer(), torch.randn(4, 12, dtype=torch.float64, requires_grad=True), **{"dorafx.codegen": "inductor"}
    )
    assert any(SAID in r.reason for r in rewrite_log().records)


@pytest.mark.parametrize("name", ["the delta", "the scaling", "the norm"])
def test_strict_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only the composition is lost, which is no miss otherwise."""
    program, operator, _ = PLANTED[name]
    plant(monkeypatch, operator)
    p = Layer()
    compiled = torch.compile(
        lambda x: program(p, x), backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True}
    )
    with pytest.raises(Exception, match=r"dorafx\.strict: .*because dorafx failed in it") as raised:
        compiled(torch.randn(4, 12, dtype=torch.float64))
    assert RewriteMissError.__name__ in repr(raised.value) or isinstance(raised.value, RewriteMissError)


def test_explain_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "norm")
    p = Layer()
    explanation = dorafx.explain(lambda x: direct(p, x), torch.randn(4, 12, dtype=torch.float64))
    (miss,) = explanation.misses
    assert SAID in miss.reason and f"missed  (function): {miss.reason}" in str(explanation)
    assert explanation.terms[0].norm == "norm(W + 2·B·A, dim=1)"


# -- one node at a time -----------------------------------------------------------------------------------------------


def norm(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return (W + 2 * (B @ A)).norm(dim=1)


DORA: dict[str, Callable[..., Any]] = {
    "direct": lambda x, W, A, B, m: m / norm(W, A, B) * (F.linear(x, W) + 2 * F.linear(F.linear(x, A), B)),
    "transposes": lambda x, W, A, B, m: m.view(1, -1) / (W + (A.t() @ B.t()).t()).norm(dim=1).detach()[None] * (x @ W.t() + x @ A.t() @ B.t()),
    "merged": lambda x, W, A, B, m: F.linear(x, (m / norm(W, A, B))[:, None] * (W + 2 * (B @ A))),
    "squares": lambda x, W, A, B, m: F.linear(x, W + B @ A) * m * (W + B @ A).square().sum(1).add(1e-6).rsqrt(),
}  # fmt: skip
OTHERS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda x, W, A, B: F.linear(x, W) + 2 * F.linear(F.linear(x, A), B),
    "LoRA, merged": lambda x, W, A, B: F.linear(x, W + 2 * (B @ A)),
    "a weight norm": lambda x, W, m: F.linear(x, m[:, None] * W / W.norm(dim=1, keepdim=True)),
    "an RMS norm": lambda x, c: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * c,
    "the norm of a product": lambda x, W, A, B: F.linear(x, W) / (B @ A).norm(dim=1),
    "two linears and a residual": lambda x, W, Q, V: F.linear(torch.relu(F.linear(x, Q)) + x, W) + F.linear(x, V),
}


def each_failure(program: Callable[..., Any], patch: pytest.MonkeyPatch) -> Iterator[tuple[fx.Node, Matches]]:
    """What is found if the transfer function of one node fails, for each node in turn."""
    graph = graph_of(program).graph
    for node in graph.nodes:
        name = Lifter.name_of(node)
        if name in transfers():
            with patch.context() as planted:
                plant(planted, name, lambda other, node=node: other is node)
                yield node, match_graph(graph)


@pytest.mark.parametrize("name", DORA)
def test_no_failure_is_silent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is either without consequence, or the reason of what is lost."""
    whole = match_graph(graph_of(DORA[name]).graph)
    assert len(whole.compositions) == 1 and not whole.failures
    blamed = 0
    for node, matches in each_failure(DORA[name], monkeypatch):
        assert set(matches.lift.failures) == {node}
        if len(matches.compositions) == 1 and len(matches.norms) == 1:
            assert not matches.failures
            continue
        reasons = {*matches.misses.values(), *matches.composition_misses.values(), *(r for _, r in matches.unknown)}
        assert matches.failures and {reason.node for reason in matches.failures} == {node}, (node, reasons)
        assert set(matches.failures) <= reasons
        blamed += 1
    assert blamed >= 5


@pytest.mark.parametrize("name", OTHERS)
def test_nobody_hears_of_failures_in_other_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, matches in each_failure(OTHERS[name], monkeypatch):
        assert matches.lift.failures
        assert not (matches.failures or matches.misses or matches.composition_misses or matches.unknown)


def test_a_failure_in_what_a_layer_is_given_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(x: Any, W: Any, A: Any, B: Any, m: Any, Q: Any) -> Any:
        hidden = F.linear(x, Q)
        return m / norm(W, A, B) * F.linear(hidden, W) + F.linear(F.linear(hidden, A), B)

    for node, matches in each_failure(program, monkeypatch):
        if node.name == "hidden" or (node.target is F.linear and node.args[1].name == "l_q_"):
            (reason,) = matches.composition_misses.values()
            assert "is not scaled by the same vector" in reason.text and not matches.failures
            break
    else:
        pytest.fail("there is no such node")
