"""Kinds of reasons: a program for each, and the page that lists them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import outside_programs
import pytest
import torch
import torch.nn.functional as F
from negative_programs import NEGATIVES
from pages import WRITE, is_current
from programs import Layer, S, lora
from subclasses import Computing
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from transfer_functions import wrap

import dorafx
from dorafx import Record, RewriteLog, rewrite_log
from dorafx.backend import dorafx as backend
from dorafx.lift import Lifter
from dorafx.match import Candidate, Match, Reason, ReasonKind, registry
from dorafx.rewriter import CannotEmit

PAGE = Path(__file__).parents[2] / "examples" / "guide" / "reasons.md"
_FAILED = Lifter._failed  # what tests see elsewhere raises
Patch = pytest.MonkeyPatch
Program = Callable[[Layer, torch.Tensor], torch.Tensor]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def adapted(p: Layer) -> torch.Tensor:
    return p.W + S * (p.B @ p.A)


def layer(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / adapted(p).norm(dim=1).detach() * (F.linear(x, p.W) + S * lora(p, x))


def compiled(program: Program, x: torch.Tensor | None = None, **options: Any) -> None:
    p, x = Layer(), drawn(2, 5, 12) if x is None else x
    torch.compile(lambda x: program(p, x), backend=backend, options={"dorafx.codegen": "eager", **options})(x)


PROGRAMS: dict[ReasonKind, Callable[[Patch], None]] = {}
"""Of each kind a program that has a reason of it in the log."""


def giving(kind: ReasonKind) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def register(run: Callable[[Patch], None]) -> Callable[[Patch], None]:
        PROGRAMS[kind] = run
        return run

    return register


def program_of(kind: ReasonKind) -> Callable[[Program], Program]:
    """Register what is compiled as it is."""

    def register(program: Program) -> Program:
        PROGRAMS[kind] = lambda patch: compiled(program)
        return program

    return register


for _kind, _name in {
    ReasonKind.OTHER_NORM: "one_norm",
    ReasonKind.UNKNOWN_NORM: "largest_element",
    ReasonKind.SQUARES_READ: "squares_changed_before_their_root",
    ReasonKind.SCALED_WEIGHT: "weight_scaled_by_a_vector_inside",
    ReasonKind.OTHER_SUMMANDS: "two_dense_weights",
    ReasonKind.HIDDEN_DELTA: "non_linear_operator_on_the_delta",
    ReasonKind.UNKNOWN_DELTA: "kronecker_delta_of_parameters",
    ReasonKind.DELTA_PER_TOKEN: "delta_routed_by_token",
    ReasonKind.NORM_IS_OUTPUT: "norm_is_returned",
    ReasonKind.UNKNOWN_CONSUMER: "largest_norm",
    ReasonKind.NO_PRODUCT: "output_uses_another_weight",
    ReasonKind.UNEQUAL_SCALING: "adapter_scaled_by_the_magnitude_only",
    ReasonKind.OTHER_PARTS: "adapter_is_missing_in_the_output",
    ReasonKind.NOTHING_ELSE: "wrong_axis_scaling",
    ReasonKind.WRITTEN_IN_PLACE: "delta_written_through_a_view",
}.items():
    program_of(_kind)(NEGATIVES[_name][0])


@program_of(ReasonKind.GROUPED_CONVOLUTION)
def cut_rows(p: Layer, x: torch.Tensor) -> torch.Tensor:
    delta = (p.B[:5] @ torch.cat([p.A, p.A], 1)).view(p.W.shape)
    return p.m / (p.W + delta).norm(dim=1) * F.linear(x, p.W)


@program_of(ReasonKind.ROUNDED_PRODUCT)
def rounded_product(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / (p.W + (p.B @ p.A).bfloat16().double()).norm(dim=1) * F.linear(x, p.W)


@program_of(ReasonKind.VANISHING_TERM)
def zero_term(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / (adapted(p) + 0.0 * (p.B2 @ p.A2)).norm(dim=1) * F.linear(x, p.W)


@program_of(ReasonKind.SCALES_NOTHING)
def sorted_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return x.sum() * adapted(p).norm(dim=1).sort().values


@program_of(ReasonKind.NOT_EMITTED)
def squares_in_the_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / adapted(p).norm(dim=1) * adapted(p).square().sum(1) * (F.linear(x, p.W) + S * lora(p, x))


@giving(ReasonKind.BATCHED_WEIGHTS)
def _(patch: Patch) -> None:
    w, b, a = (torch.nn.Parameter(drawn(*shape).detach()) for shape in ((7, 9), (2, 7, 3), (2, 3, 9)))
    compiled(lambda p, x: (w + b @ a).norm(dim=-1) * x[0, 0, 0])


@giving(ReasonKind.SYMBOLIC_SHAPE)
def _(patch: Patch) -> None:
    def program(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return (w + b @ a).norm(dim=1)

    operands = [drawn(7, 9), drawn(7, 3), drawn(3, 9)]
    torch.compile(program, backend=backend, dynamic=True, options={"dorafx.codegen": "eager"})(*operands)


@giving(ReasonKind.MERGED_CHEAPER)
def _(patch: Patch) -> None:
    with torch.no_grad():
        compiled(lambda p, x: F.linear(x, p.m_column * F.normalize(adapted(p), dim=1)), torch.randn(4000, 12).double())


def captured(p: Layer, x: torch.Tensor) -> fx.GraphModule:
    def program(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return m / (w + b @ a).norm(dim=1) * (F.linear(x, w) + F.linear(F.linear(x, a), b))

    return make_fx(program, tracing_mode="fake")(x, p.W, p.B, p.A, p.m)


@giving(ReasonKind.MIXED_DTYPES)
def _(patch: Patch) -> None:
    """Tracing does not see that torch refuses the product."""
    with pytest.raises(RuntimeError, match="same dtype"):
        compiled(lambda p, x: (p.W + p.B.float() @ p.A).norm(dim=1) * F.linear(x, p.W))


@giving(ReasonKind.STRIDES)
def _(patch: Patch) -> None:
    """Of a graph that says of its result what no operator that is recognised gives."""
    gm = captured(Layer(), drawn(5, 12))
    (result,) = gm.graph.find_nodes(op="output")[0].all_input_nodes
    result.meta["val"] = result.meta["val"][:1].expand(5, 10)
    dorafx.rewrite(gm)


def norm_of_shards(weight: int, b: int | None, a: int | None) -> None:
    """A program that returns the norm of a weight on one device's mesh; each operand is sharded along an axis, or replicated."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, p = torch.distributed.init_device_mesh("cpu", (1,)), Layer()
        w, left, right = (
            distribute_tensor(t.detach(), mesh, [Replicate() if axis is None else Shard(axis)])
            for t, axis in ((p.W, weight), (p.B, b), (p.A, a))
        )
        compiled(lambda p, x: (w + left @ right).norm(dim=1))
    finally:
        torch.distributed.destroy_process_group()


@giving(ReasonKind.PLACEMENTS)
def _(patch: Patch) -> None:
    """A norm of a weight that is sharded by columns, which the program returns before the devices add it up."""
    norm_of_shards(1, None, 1)


@giving(ReasonKind.INFERENCE_TENSOR)
def _(patch: Patch) -> None:
    p = Layer()
    usual = p.W.detach().clone()
    del p.W
    with torch.inference_mode():
        p.W = usual.clone()
    options = {"dorafx.codegen": "eager"}
    merged = torch.compile(lambda x: F.linear(x, F.normalize(adapted(p), dim=1)), backend=backend, options=options)
    merged(drawn(3, 12))


@giving(ReasonKind.VIEW_WITHOUT_GRADIENT)
def _(patch: Patch) -> None:
    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        down = p.A.t()
        with torch.enable_grad():
            return (p.W + S * (p.B.detach() @ down.t())).pow(2).sum(1).rsqrt() * x.sum()

    with torch.no_grad():
        compiled(program)


@giving(ReasonKind.ZERO3)
def _(patch: Patch) -> None:
    p, x = Layer(), drawn(5, 12)
    p.A.ds_id = 0  # type: ignore[attr-defined]
    torch.compile(lambda x: layer(p, x), backend=backend, options={"dorafx.codegen": "eager"})(x)


@giving(ReasonKind.SKIPPED)
def _(patch: Patch) -> None:
    compiled(layer, **{"dorafx.only": "lm_head", "dorafx.strict": True})


@giving(ReasonKind.TRANSFORMED)
def _(patch: Patch) -> None:
    p = Layer()
    compiled(lambda _, x: torch.func.vmap(lambda row: layer(p, row))(x))


class Scaled(torch.nn.Module):
    """A merged weight, normalised; without shapes of its own once it is traced."""

    def __init__(self, scale: torch.Tensor | float) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4, 6))
        self.s = scale
        self.a, self.b = torch.nn.Parameter(torch.randn(2, 6)), torch.nn.Parameter(torch.randn(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, F.normalize(torch.addmm(self.w, self.b, self.a, alpha=self.s)))


@giving(ReasonKind.UNKNOWN_SHAPES)
def _(patch: Patch) -> None:
    scale = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)
    dorafx.rewrite(fx.symbolic_trace(Scaled(scale)), torch.randn(3, 6))


def with_own_pattern(patch: Patch) -> None:
    """Register a pattern of one's own that likes nothing."""

    class Own:
        name, spellings = "own", ()

        def check(self, candidate: Candidate) -> Match | Reason:
            return Reason("not as I like it", candidate.node)

        def rewrite(self, match: Match, plan: Any, emit: Any) -> Any:
            raise AssertionError

    patch.setitem(registry._FORMS, "own", Own())


@giving(ReasonKind.FORM)
def _(patch: Patch) -> None:
    """A pattern of one's own says no more than a text."""
    with_own_pattern(patch)
    compiled(NEGATIVES["output_uses_another_weight"][0])
    assert [r.reason for r in rewrite_log().records] == ["only the norm is rewritten: not as I like it"]


def fails(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("a fault that is planted")


@giving(ReasonKind.NORM_IN_OPERATOR)
def _(patch: Patch) -> None:
    """A layer that is scaled by two norms is left alone: one of them a node computes by itself."""
    from dorafx.rewriter import Emitter

    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        n = adapted(p).norm(dim=1, keepdim=True)
        return F.linear(x, F.normalize(adapted(p), dim=0) / n)

    patch.setattr(Emitter, "expression", fails)
    patch.setattr(Emitter, "compose", fails)
    compiled(program)


@giving(ReasonKind.REPLACEMENT_FAILED)
def _(patch: Patch) -> None:
    from dorafx.rewriter import Emitter

    patch.setattr(Emitter, "compose", fails)
    compiled(layer)


@giving(ReasonKind.TENSOR_SUBCLASS)
def _(patch: Patch) -> None:
    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        n = (p.W + S * (p.B @ p.A)).norm(dim=1).detach()
        return p.m / n * (x @ p.W.t() + S * lora(p, x))

    p = Layer()
    codes, scale = torch.randint(0, 16, (10, 12), dtype=torch.uint8), torch.rand(10, 1).double()
    p.W = torch.nn.Parameter(Computing(codes, scale), requires_grad=False)
    torch.compile(lambda x: program(p, x), backend=backend, options={"dorafx.codegen": "eager"})(drawn(2, 12))


@giving(ReasonKind.OPERATOR_FAILED)
def _(patch: Patch) -> None:
    patch.setattr(Lifter, "_failed", _FAILED)
    wrap(patch, "norm", lambda transfer: fails)
    compiled(layer)


@giving(ReasonKind.MERGED_ROUNDS_ONCE)
def _(patch: Patch) -> None:
    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            V = p.W.float() + p.B.float() @ p.A.float()
            V = p.m.float()[:, None] * (V / V.norm(dim=1, keepdim=True))
            return F.linear(x.float(), V)

    compiled(program)


for _kind, _run in outside_programs.PROGRAMS.items():
    PROGRAMS[_kind] = lambda patch, run=_run: run("eager")  # type: ignore[misc]


@giving(ReasonKind.FORM_FAILED)
def _(patch: Patch) -> None:
    """Of the forms that are asked, one fails; the others do not know the layer."""
    patch.setattr(registry._FORMS["linear"], "check", fails, raising=False)
    compiled(layer)


@giving(ReasonKind.CODEGEN_FAILED)
def _(patch: Patch) -> None:
    from dorafx import codegen

    original = codegen.compile_graph

    def compile_graph(gm: fx.GraphModule, *rest: Any) -> Any:
        return (fails if any("dorafx" in str(node.target) for node in gm.graph.nodes) else original)(gm, *rest)

    patch.setattr(codegen, "compile_graph", compile_graph)
    compiled(layer)


@giving(ReasonKind.INTERNAL_FAILURE)
def _(patch: Patch) -> None:
    import dorafx.pipeline

    patch.setattr(dorafx.pipeline, "make_plan", fails)
    compiled(layer)


@giving(ReasonKind.VERIFICATION)
def _(patch: Patch) -> None:
    from dorafx.rewriter import Emitter

    right = Emitter.compose
    patch.setattr(Emitter, "compose", lambda self, *args: self.call(torch.mul, right(self, *args), 1.01))
    compiled(layer, **{"dorafx.verify": True})


@giving(ReasonKind.NOT_VERIFIED)
def _(patch: Patch) -> None:
    from dorafx.validation import Region

    patch.setattr(Region, "_run", fails)
    compiled(layer, **{"dorafx.verify": True})


@pytest.mark.parametrize("kind", ReasonKind, ids=lambda kind: kind.value)
def test_a_program_of_each_kind(kind: ReasonKind, monkeypatch: Patch) -> None:
    assert kind in PROGRAMS, f"no program has a reason of the kind {kind.value!r}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dorafx.DorafxWarning)
        PROGRAMS[kind](monkeypatch)
    records = rewrite_log().records
    found = [r for r in records if r.kind == kind.value]
    assert found, [(r.kind, r.reason) for r in records]
    assert all(r.reason and r.advice == kind.advice for r in found)


def test_kinds() -> None:
    # An Enum takes a value that is there already for another name of the same member.
    assert len({kind.value for kind in ReasonKind.__members__.values()}) == len(ReasonKind.__members__)
    for kind in ReasonKind:
        assert kind.value == kind.value.lower().replace("_", "-").strip() and " " not in kind.value
        for text in (kind.sentence, kind.advice):
            assert text[:1].isupper() or text.startswith(("dorafx ", "torch "))
            assert text.endswith((".", ")."))
    assert ReasonKind.named("merged-cheaper") is ReasonKind.MERGED_CHEAPER
    assert ReasonKind.named("") is None and ReasonKind.named("of a later version") is None


def test_a_reason_needs_no_kind() -> None:
    assert Reason("a text", None).kind is Reason("a text", None, False).kind is ReasonKind.FORM
    assert CannotEmit("a text").reason == Reason("a text", kind=ReasonKind.NOT_EMITTED)


def test_in_the_log() -> None:
    log = RewriteLog()
    log.add(Record("missed", "a", reason="why", kind="hidden-delta"))
    assert json.loads(log.to_json())["records"][0]["kind"] == "hidden-delta"
    again = RewriteLog.from_json(log.to_json())
    assert again.records == log.records
    assert again.records[0].advice == ReasonKind.HIDDEN_DELTA.advice in str(again).replace("\n", " ")


@pytest.mark.parametrize("kind", ["", "of a later version"])
def test_logs_of_other_versions(kind: str, tmp_path: Path) -> None:
    """What to do is not guessed of a text."""
    line = {
        "status": "missed",
        "site": "a.b",
        "reason": "operator tanh stands between the low-rank product and the norm",
    }
    log = RewriteLog.from_json(json.dumps({**line, **({"kind": kind} if kind else {})}))
    (record,) = log.records
    assert (record.kind, record.advice) == (kind, "")
    assert "what to do" not in str(log)
    assert "What to do" not in log.to_html(tmp_path / "report.html").read_text(encoding="utf-8")


SUBJECTS = {
    ReasonKind.OTHER_NORM: "The norm",
    ReasonKind.HIDDEN_DELTA: "The delta inside the norm",
    ReasonKind.SCALES_NOTHING: "What the norm scales",
    ReasonKind.WRITTEN_IN_PLACE: "The program around the layer",
    ReasonKind.RECOMPILE_LIMIT: "Layers that no graph contains",
    ReasonKind.SKIPPED: "Your options",
    ReasonKind.NOT_EMITTED: "Failures and refusals of dorafx",
}
"""The headings of the page, each by the first kind under it."""


def page() -> str:
    """The page of all kinds."""
    text = (
        "# Reasons\n\n"
        "Why a layer is left alone, or rewritten only in part, and what to do about it. For anybody whose log shows a miss. Look up\n"
        "the record's `kind` here; the report filters by it.\n\n"
        "The names are stable: a program can use them and need not read the text. In your own patterns,\n"
        '`dorafx.extension.Reason(text, node)` has the kind `form`, and `Reason(text, node, kind=ReasonKind("no-product"))` another.\n\n'
        f"Written by `{WRITE}`.\n"
    )
    for kind in ReasonKind:
        if kind in SUBJECTS:
            text += f"\n## {SUBJECTS[kind]}\n\n| kind | what the reason says | what to do |\n|---|---|---|\n"
        text += f"| `{kind.value}` | {kind.sentence} | {kind.advice} |\n"
    return text


@pytest.mark.page
def test_page() -> None:
    is_current(PAGE, page())
