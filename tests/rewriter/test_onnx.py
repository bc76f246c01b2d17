"""A portable program as ONNX: what onnxruntime computes, and what the graph holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import assert_close, dora_sites, peft_perceptron, rewritten_sites

import dorafx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WIDTH = 96
"""Wide enough for the exporter not to fold the norms into constants."""


def exported(program: Any, file: Path) -> Any:
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    made.save(file)
    return onnx.shape_inference.infer_shapes(onnx.load(file)).graph


def sizes(graph: Any) -> dict[str, int]:
    """Elements of every intermediate value of known shape that is computed of parameters, and not merely moved."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    shapes = {name: shape for name, shape in shapes.items() if all(shape)}  # 0: the batch
    moved = ("Transpose", "Reshape", "Slice")
    return {
        f"{node.op_type} {name}": math.prod(shapes[name])
        for node in graph.node
        for name in node.output
        if name in shapes and node.op_type not in moved
    }


@torch.no_grad()
def test_runs_in_onnxruntime(tmp_path: Path) -> None:
    model = peft_perceptron(WIDTH).base_model.model
    x = torch.randn(3, 5, WIDTH)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    stock = exported(program, tmp_path / "stock.onnx")
    graph = exported(dorafx.rewrite(program, portable=True), tmp_path / "dorafx.onnx")
    assert rewritten_sites() == dora_sites(model)
    session = onnxruntime.InferenceSession(tmp_path / "dorafx.onnx", providers=["CPUExecutionProvider"])
    for batch in (3, 1, 7):
        x = torch.randn(batch, 5, WIDTH)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(found), model(x), 1e-5)
    assert {node.domain for node in graph.node} == {""}, "standard operators only"
    # Nothing of the weight's size is computed; of the norm there are blocks of a tenth of the rows.
    weight = 2 * WIDTH * WIDTH
    dense = [name for name, size in sizes(stock).items() if size >= weight]
    assert any(name.startswith(("Gemm", "MatMul")) for name in dense), (
        "stock forms the product, or this test sees nothing"
    )
    assert max(sizes(graph).values()) <= math.ceil(2 * WIDTH / 10) * WIDTH
    norms = [node for node in graph.node if node.op_type == "ReduceL2"]
    assert len(norms) == 20
    # Stock keeps the identity matrices that PEFT multiplies its factors by.
    identity = (2 * WIDTH) ** 2
    assert any(math.prod(i.dims) == identity for i in stock.initializer)
    assert max(math.prod(i.dims) for i in graph.initializer) == weight


@torch.no_grad()
def test_small_norms_become_constants(tmp_path: Path) -> None:
    """The exporter computes what depends on small parameters alone: what is left is LoRA and a scale by row."""
    model = peft_perceptron(24).base_model.model
    x = torch.randn(3, 5, 24)
    graph = exported(dorafx.rewrite(torch.export.export(model, (x,)), portable=True), tmp_path / "small.onnx")
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMul") + kinds.count("Gemm") == 6 and not {"ReduceL2", "Sqrt", "Div"} & set(kinds)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(found), model(x), 1e-5)
