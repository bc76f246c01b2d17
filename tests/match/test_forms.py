"""Each built-in form's statement, in plain PyTorch, is that form: lifted, matched, rewritten, and computed right."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import dorafx
from dorafx import rewrite_log
from dorafx.match import CompositionPlan, Emit, Match, forms

S = 0.5


BUILT_IN = {name: form for name, form in forms().items() if type(form).__module__.startswith("dorafx.patterns")}


def arguments_of(name: str, with_bias: bool) -> dict[str, Any]:
    """Arguments of a form's statement like its example's, with random numbers; all that is floating has a gradient but the base weight."""
    arguments: dict[str, Any] = {}
    for key, like in BUILT_IN[name].example().items():  # type: ignore[attr-defined]
        if like.is_floating_point():
            value = torch.randn(like.shape, dtype=torch.float64, requires_grad=key not in ("W", "E"))
        else:
            value = torch.randint(0, 6, like.shape)
        arguments[key] = value
    arguments["s"] = S
    if not with_bias:
        arguments.pop("bias", None)
    return arguments


def test_every_form_has_a_statement() -> None:
    assert set(BUILT_IN) == {
        "linear",
        "linear_dropout",
        "linear_columns",
        "linear_weight_delta",
        "embedding",
        "convolution",
    }
    for name, form in BUILT_IN.items():
        statement = form.statement  # type: ignore[attr-defined]
        assert set(inspect.signature(statement).parameters) == set(arguments_of(name, True))


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_statement(name: str, codegen: str) -> None:
    """Forward and backward; also with a bias, where the statement has one."""
    torch.manual_seed(0)
    statement = forms()[name].statement  # type: ignore[attr-defined]
    for bias in (False, True) if "bias" in inspect.signature(statement).parameters else (False,):
        torch._dynamo.reset()
        rewrite_log().clear()
        arguments = arguments_of(name, bias)
        leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]

        def program(arguments: dict[str, Any]) -> torch.Tensor:
            y: torch.Tensor = statement(**arguments)
            return y

        options = {"dorafx.codegen": codegen, "dorafx.strict": True}
        actual, expected = torch.compile(program, backend="dorafx", options=options)(arguments), program(arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        for gradient, expected_gradient in zip(
            torch.autograd.grad(actual.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), leaves)
        ):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)
        assert [r.pattern for r in rewrite_log().rewrites] == [name]


def test_extension_is_all_that_a_form_needs() -> None:
    """The example, and the form in the API reference, import nothing else of dorafx's."""
    from pathlib import Path

    text = (Path(dorafx.__file__).parents[1] / "examples" / "custom_pattern.py").read_text(encoding="utf-8")
    imports = {line.split()[1] for line in text.splitlines() if line.startswith(("import dorafx", "from dorafx"))}
    assert imports == {"dorafx", "dorafx.extension"}


def test_the_emitter_has_what_is_promised() -> None:
    from dorafx.rewriter import Emitter

    promised = [name for name in vars(Emit) if not name.startswith("_")]
    assert len(promised) >= 14
    for name in promised:
        expected, actual = (list(inspect.signature(getattr(of, name)).parameters) for of in (Emit, Emitter))
        assert expected == actual, name


@pytest.mark.parametrize(
    ("name", "compose"), [("linear", "accumulated"), ("linear", "epilogue"), ("convolution", "auto")]
)
def test_a_form_is_given_the_plan_of_its_composition(name: str, compose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = type(forms()["linear"])
    rewrite, plans = form.rewrite, []

    def observed(self: Any, match: Match, plan: CompositionPlan, emit: Emit) -> Any:
        plans.append(plan)
        assert plan.match is match
        return rewrite(self, match, plan, emit)

    monkeypatch.setattr(form, "rewrite", observed)
    statement, arguments = BUILT_IN[name].statement, arguments_of(name, False)  # type: ignore[attr-defined]
    options = {"dorafx.codegen": "eager", "dorafx.strict": True, "dorafx.compose": compose}
    torch.compile(lambda arguments: statement(**arguments), backend="dorafx", options=options)(arguments)
    (plan,) = plans
    assert (plan.accumulate, plan.match.channels_first) == (compose == "accumulated", name == "convolution")
