"""Launches are counted in code that is generated for a GPU, without one."""

from __future__ import annotations

import re

import pytest
import torch

from dorafx._compat.cuda_code import captured_parts, cuda_code

pytest.importorskip("triton")


def test_code_for_a_device_that_there_is_not() -> None:
    def program(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight).sin() + torch.zeros(8, device="cpu")

    torch._dynamo.reset()
    with captured_parts() as parts:
        x, weight = torch.empty(4, 16), torch.empty(8, 16, requires_grad=True)
        with pytest.raises(TypeError):
            torch.compile(program, backend="inductor", fullgraph=True)(x, weight)
    assert [part.is_backward for part in parts] == [False, True]
    forward, backward = map(cuda_code, parts)
    for code in (forward, backward):
        body = code[code.index("def call(") :]
        assert len(re.findall(r"extern_kernels\.mm\(", body)) == 1  # the product; the gradient of the weight
        assert len(re.findall(r"triton_\w+\.run\(", body)) == 1
        assert "cuda" in body and "cpu" not in body
    assert not torch.cuda.is_available() or torch.cuda.current_device() >= 0  # nothing that was pretended stays


@pytest.mark.slow
def test_a_decoder_layer_of_adapters() -> None:
    """Two more launches than LoRA's in the forward, for queries and keys: what is kept of these is read again where the rotary embedding
    turns them. In the backward two more to turn them again, where LoRA saves what was turned; and two for each linear whose sum over tokens
    Inductor makes in two stages, none for the two of the MLP that are summed where their gradient is made."""
    from dorafx.bench.launches import launches
    from dorafx.bench.shapes import PRESETS

    shape = PRESETS["llama-3-8b"]
    forward, backward = launches("dorafx", shape, 16, 4096).counts
    plain_forward, plain_backward = launches("lora", shape, 16, 4096).counts
    assert forward <= plain_forward + 2
    assert backward <= plain_backward + 12


def test_unknown_implementation() -> None:
    from dorafx.bench.launches import launches
    from dorafx.bench.shapes import PRESETS

    with pytest.raises(ValueError, match="dorafx, lora, peft"):
        launches("qlora", PRESETS["llama-3-8b"], 16, 128)
