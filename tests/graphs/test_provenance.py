"""The name of the module that a record speaks of."""

from __future__ import annotations

import pytest
import torch

from dorafx import rewrite_log
from dorafx.graphs.provenance import module_path


@pytest.mark.parametrize(
    ("access", "name"),
    [
        ("L['self']", ""),
        ("L['self'].layers.0.q_proj", "layers.0.q_proj"),
        ("L['self']._modules['layers'].0.q_proj", "layers.0.q_proj"),
        ("L['self'].__dict__['_modules']['head']", "head"),
        ("getattr(L['self'].layers, '0').q_proj", "layers.0.q_proj"),
        ("L['fn'].layers[3]", "layers.3"),
        ("L['adapters']['default']", "adapters.default"),
        ("G['MODEL'].head", "MODEL.head"),
        ("self.head", "head"),
        ("self_attn.q_proj", "self_attn.q_proj"),
        ("L['___stack0']", ""),
        ("L['___stack12'].lora_A", "lora_A"),
        ("L['args'][0]._modules['model']._modules['layers']._modules['0']", "model.layers.0"),
        ("L['args'][1]._modules['layer']", "args.1.layer"),
    ],
)
def test_names(access: str, name: str) -> None:
    assert module_path(access) == name


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.a, self.b, self.m = (
            torch.nn.Parameter(torch.randn(shape)) for shape in [(6, 5), (2, 5), (6, 2), (6,)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = (self.weight + self.b @ self.a).norm(dim=1)
        return self.m / norm * (x @ self.weight.T + x @ self.a.T @ self.b.T)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = Layer(), torch.nn.Linear(6, 5), Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


def test_a_frame_that_a_hook_ends_names_no_variable_of_dynamo() -> None:
    """Dynamo cannot trace the hook: what comes after it is compiled by itself, with the next layer on the stack."""
    model = Model()
    model.first.register_forward_hook(torch.compiler.disable(lambda module, inputs, output: None))
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager"})
    x = torch.randn(3, 5)
    torch.testing.assert_close(compiled(x), model(x))
    sites = [record.site for record in rewrite_log().rewrites]
    assert len(sites) == 2
    assert not any("stack" in site for site in sites), sites
