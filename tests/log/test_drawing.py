"""Drawings: what became of each node of a region, as data and laid out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integration_support import peft_perceptron

from dorafx import RewriteLog, explain, rewrite_log
from dorafx.log import MAX_NODES, Drawing, DrawnNode, DrawnTerms, layout
from dorafx.log.layout import HEIGHT, WIDTH, fitting, lay_out


def layer(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    norm = (w + b @ a).norm(dim=1).detach()
    return m / norm * (F.linear(x, w) + F.linear(F.linear(x, a), b))


def squashed(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    norm = (w + torch.tanh(b @ a)).norm(dim=1).detach()
    return m / norm * (F.linear(x, w) + F.linear(F.linear(x, a), b))


def lost(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    norm = (w + b @ a).norm(dim=1).detach()
    return torch.erf(m / norm).amax() * (F.linear(x, w) + F.linear(F.linear(x, a), b))


def drawing_of(program: Any) -> Drawing:
    operands = [torch.randn(s) for s in ((12, 6), (8, 6), (2, 6), (8, 2), (8,))]
    log = explain(program, *operands).log
    (record,) = log.records
    return log.drawings[record.drawing]


def operators(nodes: tuple[DrawnNode, ...], fate: str) -> list[str]:
    return sorted(n.operator for n in nodes if n.fate == fate)


def test_a_layer_before_and_after() -> None:
    drawing = drawing_of(layer)
    assert operators(drawing.before, "kept") == ["input"] * 5 + ["linear"] * 2
    assert operators(drawing.before, "removed") == [
        "add",
        "add",
        "detach",
        "linear",
        "matmul",
        "mul",
        "norm",
        "truediv",
    ]
    new = {n.operator: n for n in drawing.after if n.fate == "new"}
    assert {"row_norm.default", "addmm", "compose.default"} <= set(new)
    assert operators(drawing.after, "kept") == ["input"] * 5 + ["linear"] * 2
    removed = {n.name: n for n in drawing.before if n.fate == "removed"}
    assert sorted(removed[n].operator for n in new["row_norm.default"].replaces) == ["add", "matmul", "norm"]
    assert {removed[n].operator for n in new["compose.default"].replaces} == {
        "add",
        "detach",
        "linear",
        "mul",
        "truediv",
    }
    assert all(n.source.rpartition(":")[0] == __file__ for n in drawing.before if n.operator != "input")
    matmul = next(n for n in drawing.before if n.operator == "matmul")
    assert (matmul.shape, matmul.dtype) == ("[8, 6]", "float32")
    assert sorted(drawing.before[i].label for i in matmul.inputs) == ["a", "b"]


def test_a_miss_shows_its_cause_and_nothing_new() -> None:
    drawing = drawing_of(squashed)
    assert drawing.after == ()
    assert operators(drawing.before, "cause") == ["tanh"]
    assert operators(drawing.before, "removed") == []
    assert sorted(n.label for n in drawing.before if n.operator == "input") == ["a", "b", "w"]


def test_a_norm_alone_shows_where_it_is_lost() -> None:
    drawing = drawing_of(lost)
    assert operators(drawing.before, "cause") == ["amax"]
    assert operators(drawing.before, "removed") == ["add", "matmul", "norm"]
    assert "row_norm.default" in operators(drawing.after, "new")


def test_layers_of_one_kind_share_a_drawing() -> None:
    """And a drawing is of one layer: what comes before it is another's."""
    model = torch.nn.ModuleList([peft_perceptron().eval() for _ in range(3)])

    def run(x: torch.Tensor) -> torch.Tensor:
        return sum(part(x) for part in model)  # type: ignore[return-value]

    features = next(m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    log = explain(run, torch.randn(2, features)).log
    assert len(log.rewrites) == 3 * len({r.drawing for r in log.rewrites})
    for drawing in log.drawings.values():
        parameters = {n.label for n in drawing.before if n.label not in ("", "x")}
        assert {label.split(".")[4] for label in parameters} in ({"first"}, {"second"})
        assert len(parameters) == 5


def test_json_and_bounds() -> None:
    log = RewriteLog(max_drawings=2)
    drawings = [Drawing((DrawnNode(f"n{i}", "input"), DrawnNode("y", "mul", inputs=(0,)))) for i in range(3)]
    log.extend([], {d.key: d for d in drawings})
    assert list(log.drawings.values()) == drawings[:2]
    assert RewriteLog.from_json(log.to_json()).drawings == log.drawings
    log.clear()
    assert log.drawings == {}


def test_terms_of_both_sides() -> None:
    drawing = drawing_of(layer)
    assert drawing.terms == DrawnTerms(
        ("y = x·wᵀ·D(m·n⁻¹) + x·aᵀ·bᵀ·D(m·n⁻¹)", "n = ‖w + b·a‖"),
        (
            "y = (x·wᵀ + x·aᵀ·bᵀ)·D(m·n⁻¹)",
            "n = ‖w + b·a‖, block by block: the sum is never whole in memory",
        ),
    )
    miss = drawing_of(squashed).terms
    assert miss.after == () and miss.form == "linear" and "n = detach(‖W + s·B·A‖)" in miss.closest
    norm_alone = drawing_of(lost).terms
    assert norm_alone.before[-1] == "n = ‖w + b·a‖" and norm_alone.after == (
        "n = ‖w + b·a‖, block by block: the sum is never whole in memory",
    )


def test_a_long_input_is_called_x_where_nothing_else_is() -> None:
    def of_x(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return layer(torch.sigmoid(torch.tanh(x)), w, a, b, m)

    def of_given(given: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> Any:
        return layer(torch.sigmoid(torch.tanh(given)), w, a, b, m)

    given = "sigmoid(tanh(x))"
    assert drawing_of(of_x).terms.before[0] == f"y = {given}·wᵀ·D(m·n⁻¹) + {given}·aᵀ·bᵀ·D(m·n⁻¹)"
    terms = drawing_of(of_given).terms
    assert terms.before[0] == "y = x·wᵀ·D(m·n⁻¹) + x·aᵀ·bᵀ·D(m·n⁻¹)"
    assert terms.after[0] == "y = (x·wᵀ + x·aᵀ·bᵀ)·D(m·n⁻¹)"
    assert terms.before[2] == terms.after[2] == "x = sigmoid(tanh(given))"


def test_a_formula_does_not_stop_a_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no formula")

    monkeypatch.setattr("dorafx.recording.records.drawn_terms_of_rewrite", broken)
    drawing = drawing_of(layer)
    assert drawing.terms == DrawnTerms() and drawing.after


def test_a_log_without_terms_is_read() -> None:
    drawing = drawing_of(layer)
    assert Drawing.from_dict(drawing.to_dict()) == drawing
    older = {side: nodes for side, nodes in drawing.to_dict().items() if side != "terms"}
    assert Drawing.from_dict(older) == Drawing(drawing.before, drawing.after)
    long = DrawnTerms(("y = " + "x" * 5000,) * 20).shortened()
    assert Drawing.from_dict(Drawing(drawing.before, (), long).to_dict()).terms == long


def test_a_large_region_is_cut() -> None:
    def long(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        made = w
        for _ in range(2 * MAX_NODES):
            made = made.sin()
        return torch.erf(m / (made + b @ a).norm(dim=1).detach()) * F.linear(x, w)

    operands = [torch.randn(s) for s in ((12, 6), (8, 6), (2, 6), (8, 2), (8,))]
    log = explain(long, *operands).log
    (drawing,) = log.drawings.values()
    assert len(drawing.before) == MAX_NODES
    assert Drawing.from_dict(json.loads(json.dumps(drawing.to_dict()))) == drawing


def test_a_stream_holds_each_drawing_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    monkeypatch.setenv("DORAFX_LOG", str(path))
    operands = [torch.randn(s) for s in ((12, 6), (8, 6), (2, 6), (8, 2), (8,))]
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(layer, backend="dorafx", options={"dorafx.codegen": "eager"})(*operands)
    kinds = ["before" in json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert kinds == [True, False, False]
    again = RewriteLog.from_json(path.read_text(encoding="utf-8"))
    assert again.drawings == rewrite_log().drawings
    assert again.records == rewrite_log().records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": 3}, "must be lists"),
        ({"before": [{}] * (MAX_NODES + 1)}, "at most"),
        ({"before": ["x"]}, "a node is a str"),
        ({"before": [{"colour": "red"}]}, "unknown field 'colour'"),
        ({"before": [{"name": 3}]}, "field 'name'"),
        ({"before": [{"name": "x" * 1000}]}, "at most 400"),
        ({"before": [{"fate": "eaten"}]}, "fate 'eaten'"),
        ({"before": [{"inputs": [0]}]}, "indices of earlier nodes"),
        ({"before": [{"replaces": [3]}]}, "list of names"),
        ({"before": [], "terms": 3}, "'terms' must be lists"),
        ({"before": [], "terms": {"before": "y"}}, "'terms' must be lists"),
        ({"before": [], "terms": {"after": ["y" * 3000]}}, "'terms' must be lists"),
        ({"before": [], "terms": {"form": 3}}, "'terms' must be lists"),
    ],
)
def test_what_is_no_drawing_is_said(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Drawing.from_dict(change)
    with pytest.raises(ValueError, match=f"drawing 'k'.*{message}"):
        RewriteLog.from_json(json.dumps({"dorafx_log": 2, "drawings": {"k": change}}))


def test_no_boxes_overlap_and_edges_go_down() -> None:
    drawings = [drawing_of(layer), drawing_of(lost)]
    sides = [side for d in drawings for side in (d.before, d.after)]
    sides.append(tuple(DrawnNode(f"n{i}", "op", inputs=tuple(range(max(0, i - 5), i))) for i in range(40)))
    for nodes in sides:
        picture = lay_out(nodes)
        layout._laid_out.cache_clear()
        assert picture == lay_out(nodes)
        assert len(picture.corners) == len(nodes)
        assert len(picture.edges) == sum(len(n.inputs) for n in nodes)
        for i, (x, y) in enumerate(picture.corners):
            assert 0 <= x <= picture.width - WIDTH
            assert 0 <= y <= picture.height - HEIGHT
            assert not any(y == v and abs(x - u) < WIDTH for u, v in picture.corners[:i])
        for edge in picture.edges:
            assert picture.corners[edge.source][1] < picture.corners[edge.target][1]
    assert lay_out(()).corners == ()


def test_so_many_nodes_beside_each_other() -> None:
    drawing = drawing_of(layer)
    for most in (1, 2, 3):
        picture = lay_out(drawing.after, most)
        for _, y in picture.corners:
            assert sum(other == y for _, other in picture.corners) <= most
    pictures = [fitting(drawing.after, width) for width in (10_000, 500, 400, 10)]
    assert [p.width for p in pictures] == sorted((p.width for p in pictures), reverse=True)
    assert pictures[1].width <= 500 and pictures[2].width <= 400


def test_layers_of_one_spelling_are_laid_out_once() -> None:
    """A report may be written after every graph, and has a drawing for each shape."""
    layout._laid_out.cache_clear()
    layout._fitting.cache_clear()
    for size in range(20):
        nodes = [DrawnNode(f"n{i}", "op", shape=f"[{size}]", inputs=tuple(range(i))[-2:]) for i in range(9)]
        fitting(nodes, 500)
    assert layout._fitting.cache_info().misses == 1


def test_what_follows_each_other_stands_below_each_other() -> None:
    nodes = [DrawnNode("a", "input"), DrawnNode("b", "input")]
    nodes += [DrawnNode(f"n{i}", "op", inputs=(i - 1,)) for i in range(2, 9)]
    nodes.append(DrawnNode("end", "op", inputs=(0, 8)))
    picture = lay_out(nodes)
    assert len({x for x, _ in picture.corners[1:]}) == 1
    (edge,) = [e for e in picture.edges if (e.source, e.target) == (4, 5)]
    assert "C" not in edge.path
    (long,) = [e for e in picture.edges if (e.source, e.target) == (0, 9)]
    assert long.path.count("C") <= 2
