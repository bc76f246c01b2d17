"""Scripts that rebuild a graph: they compute what the program computes, show where dorafx does not, and hold none of its data."""

from __future__ import annotations

import ast
import operator
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integration_support import call, peft_model, peft_perceptron, tokens
from programs import LINEAR, Layer
from quantized_support import quantized
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import dorafx
from dorafx import Record, RewriteLog, pipeline, rewrite_log
from dorafx._compat.tensors import fake_mode
from dorafx.recording import scripts

EAGER = {"dorafx.codegen": "eager"}
SECRET = 1234.5678
"""A value of the user's: it is in every tensor."""


class Adapted(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, hidden: bool = False) -> None:
        super().__init__()
        self.hidden = hidden
        self.w = nn.Parameter(torch.randn(16, 12, dtype=dtype), requires_grad=False)
        self.a, self.b = (nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in ((2, 12), (16, 2)))
        self.m = nn.Parameter(torch.rand(16, dtype=dtype) + 1)
        self.register_buffer("scale", torch.full((), SECRET, dtype=dtype))
        with torch.no_grad():
            self.w[0, 0] = SECRET

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = self.b @ self.a
        n = (self.w + (delta.tanh() if self.hidden else delta)).norm(dim=1).detach()
        return self.m / n * (F.linear(x, self.w) + F.linear(F.linear(x, self.a), self.b)) * self.scale


def x(*shape: int, **settings: Any) -> torch.Tensor:
    return torch.randn(*(shape or (3, 12)), **settings)


def met(program: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> RewriteLog:
    """The log of a call of the compiled program."""
    torch.compile(program, backend="dorafx", options=EAGER if options is None else options, **kwargs)(*args)
    return rewrite_log()


def executed(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output of a script."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    return int(end.value.code or 0), capsys.readouterr().out


def outcomes(records: list[Record]) -> list[tuple[str, ...]]:
    """What became of candidates, without where they are."""
    kept = ("status", "pattern", "kind", "d_out", "d_in", "rank", "dtype", "norm_algorithm")
    return sorted(tuple(str(getattr(r, name)) for name in kept) for r in records)


def replay(log: RewriteLog, tmp_path: Path, capsys: pytest.CaptureFixture[str], left_out: str = "") -> str:
    """The script of the one graph in a log, after it has run: dorafx does in it what it did in the program, and nothing differs."""
    assert len({r.repro for r in log.records}) == 1
    path = tmp_path / "repro.py"
    records = log.records
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert log.save_repro(records[0], path) == path
    assert bool(left_out) == bool(seen) and all(left_out in str(w.message) for w in seen), [
        str(w.message) for w in seen
    ]
    rewrite_log().clear()
    code, output = executed(path, capsys)
    assert code == 0, output
    assert output.endswith("no difference\n")
    again = [r for r in rewrite_log().records if r.graph == rewrite_log().records[-1].graph]
    assert outcomes(again) == outcomes(records)
    text = path.read_text(encoding="utf-8")
    ast.parse(text)
    assert "1234.5" not in text and str(Path.cwd()) not in text and "/site-packages" not in text
    if not left_out:
        assert "What is not as in the program" not in text
    return text


PROGRAMS: dict[str, Callable[[], RewriteLog]] = {}


def program(run: Callable[[], RewriteLog]) -> Callable[[], RewriteLog]:
    PROGRAMS[run.__name__.strip("_")] = run
    return run


@program
def checkpointed() -> RewriteLog:
    layer = Adapted()
    return met(lambda x: checkpoint(layer, x.sin(), use_reentrant=False).cos(), x(requires_grad=True))


@program
def autocast_inside() -> RewriteLog:
    layer = Adapted()

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            with torch.autocast("cpu", enabled=False):
                y = y.float() * 2
        return y * 2

    return met(forward, x())


@program
def autocast_outside() -> RewriteLog:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return met(Adapted(), x())


@program
def no_grad_outside() -> RewriteLog:
    with torch.no_grad():
        return met(Adapted(), x())


@program
def no_grad_inside() -> RewriteLog:
    p = Layer()
    return met(lambda x: LINEAR["norm_under_no_grad"](p, x), x(dtype=torch.float64))


@program
def inference() -> RewriteLog:
    with torch.inference_mode():
        return met(Adapted(), x())


@program
def half() -> RewriteLog:
    return met(Adapted(torch.bfloat16), x(dtype=torch.bfloat16))


@program
def transposed_input() -> RewriteLog:
    return met(Adapted(), x(12, 3).t())


@program
def expanded_input() -> RewriteLog:
    return met(Adapted(), x(1, 12).expand(3, 12))


@program
def symbolic_sizes() -> RewriteLog:
    layer = Adapted()
    return met(lambda x: layer(x.view(-1, 12)).view(*x.shape[:-1], 16), x(3, 4, 12), dynamic=True)


@program
def a_number() -> RewriteLog:
    layer = Adapted()
    return met(lambda x, s: layer(x) * s, x(), 0.5, dynamic=True)


@program
def indices_and_masks() -> RewriteLog:
    layer = Adapted()
    mask = torch.tensor([[True], [False]])
    return met(lambda x, i, q: layer(x)[i].masked_fill(q, float("-inf"))[..., 1:] * 3, x(), torch.tensor([0, 2]), mask)


@program
def writes() -> RewriteLog:
    p, layer = Layer(), Adapted()

    def forward(x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y = layer(x)
        y[:, 0:2] = 1.0
        y += 1
        z.mul_(2)
        return y, {"z": LINEAR["sequential_in_place"](p, z)}

    return met(forward, x(), x(dtype=torch.float64))


@program
def missed() -> RewriteLog:
    return met(Adapted(hidden=True), x())


@program
def dropout() -> RewriteLog:
    model = peft_perceptron(lora_dropout=0.3).train()
    return met(model, x(3, 24))


@program
def dropout_by_inductor() -> RewriteLog:
    model = peft_perceptron(lora_dropout=0.3).train()
    return met(model, x(3, 24), options={"dorafx.norm": "factored"})


@program
def language_model() -> RewriteLog:
    model = peft_model(layers=1)
    return met(lambda ids: model(input_ids=ids).logits, tokens())


@program
def branches() -> RewriteLog:
    layer = Adapted()
    return met(lambda x: torch.cond(x.sum() > 0, lambda x: layer(x), lambda x: layer(x) * 2, (x,)), x())


@program
def float8_weight() -> RewriteLog:
    """torch does not say of float8 which values are finite."""
    layer = Adapted()
    layer.w.data = layer.w.detach().to(torch.float8_e4m3fn)

    def forward(x: torch.Tensor) -> torch.Tensor:
        w = layer.w.float()
        n = (w + layer.b @ layer.a).norm(dim=1).detach()
        return layer.m / n * (F.linear(x, w) + F.linear(F.linear(x, layer.a), layer.b))

    return met(forward, x())


def spelled(name: str) -> RewriteLog:
    p = Layer()
    return met(lambda x: LINEAR[name](p, x), x(dtype=torch.float64))


for _name in ("clamped_norm", "identity_forward_delta_form", "flattened_tokens", "column_norm", "scaling_as_a_tensor"):
    PROGRAMS[_name] = partial(spelled, _name)


def test_what_is_nowhere_finite_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A root of drawn values is NaN: equal, but no evidence."""
    layer = Adapted()
    log = met(lambda x: layer(x.sqrt()), x().abs())
    log.save_repro(log.records[0], tmp_path / "repro.py")
    code, output = executed(tmp_path / "repro.py", capsys)
    assert code == 0 and output.endswith("no difference\n")
    assert "output 0: no number is finite on the drawn values, so none is compared" in output
    assert "gradient of p_b: " in output


SLOW = ("dropout_by_inductor", "language_model")


@pytest.mark.parametrize("name", [n if n not in SLOW else pytest.param(n, marks=pytest.mark.slow) for n in PROGRAMS])
def test_a_graph_is_rebuilt(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = PROGRAMS[name]()
    assert log.records
    text = replay(log, tmp_path, capsys)
    if name == "autocast_outside":
        assert "autocast={'cpu': torch.bfloat16}" in text
    if name == "symbolic_sizes":
        assert "symbolic=(0, 1, 2)" in text or "symbolic=(0, 1)" in text
        assert re.search(r"s\d+ = \w+\.size\(\d\)  # \d", text)
    if name == "dropout_by_inductor":
        assert "OPTIONS = {'dorafx.norm': 'factored'}" in text
    if name == "missed":
        assert "test_repro.py:" in text and "delta.tanh() if self.hidden" in text


def test_by_itself(tmp_path: Path) -> None:
    """In a process of its own, with torch and dorafx alone."""
    met(Adapted(), x())
    path = rewrite_log().save_repro(rewrite_log().records[0], tmp_path / "repro.py")
    modules = set(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert modules <= {"torch", "dorafx", "math", "operator"}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gradient of p_b: difference" in done.stdout and done.stdout.endswith("no difference\n")


# -- where dorafx is wrong ---------------------------------------------------------------------------------------------


def planted(monkeypatch: pytest.MonkeyPatch, target: Any, *args: Any) -> None:
    """Let every rewrite of a graph change its first output."""
    original = pipeline.apply_plan

    def wrong(*call: Any) -> Any:
        new, copied = original(*call)
        (output,) = new.graph.find_nodes(op="output")
        value = output.all_input_nodes[0]
        with new.graph.inserting_before(output):
            changed = new.graph.call_function(target, (value, *args))
        changed.meta.update(value.meta)
        output.replace_input_with(value, changed)
        new.recompile()
        return new, copied

    monkeypatch.setattr(pipeline, "apply_plan", wrong)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize(
    ("target", "args", "text"),
    [
        (operator.mul, (1.0001,), "output 0 differs by 1.0e-04"),
        (torch.Tensor.detach, (), "output 0 .*requires"),
        (torch.fill, (float("nan"),), "output 0"),
    ],
    ids=["values", "gradients", "nan"],
)
@pytest.mark.default_cases("values-eager", "gradients-eager", "nan-eager", "values-inductor")
def test_a_wrong_rewrite(
    target: Any,
    args: Any,
    text: str,
    codegen: str,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = met(Adapted(), x(), options={"dorafx.codegen": codegen})
    path = log.save_repro(log.records[0], tmp_path / "repro.py")
    assert executed(path, capsys)[0] == 0
    planted(monkeypatch, target, *args)
    code, output = executed(path, capsys)
    assert code == 1
    assert re.search(rf"DIFFERENT: on random values in fp64, {text}", output), output
    assert "DIFFERENT: compiled, call 2" in output or target is torch.Tensor.detach, output
    assert re.search(r"^\d+ differences$", output, re.MULTILINE)


def test_a_failing_rewrite(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(pipeline, "apply_plan", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dorafx.DorafxWarning)
        log = met(Adapted(), x())
        (record,) = log.records
        assert record.kind == "internal-failure"
        code, output = executed(log.save_repro(record, tmp_path / "repro.py"), capsys)
    assert code == 1
    assert "DIFFERENT: dorafx failed: RuntimeError: planted" in output and "in fails" in output


# -- what cannot be rebuilt --------------------------------------------------------------------------------------------


@torch.library.custom_op("dorafx_repro_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


twice.register_fake(torch.empty_like)


def test_an_operator_of_another_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its result is drawn: of parameters as a parameter, so that the layer behind it is still one."""
    layer = Adapted()

    def forward(x: torch.Tensor) -> torch.Tensor:
        w = twice(layer.w)
        n = (w + layer.b @ layer.a).norm(dim=1).detach()
        y = layer.m / n * (F.linear(x, w) + F.linear(F.linear(x, layer.a), layer.b))
        return twice(y.detach()) + y

    text = replay(met(forward, x()), tmp_path, capsys, left_out="dorafx_repro_test.twice")
    assert "What is not as in the program:" in text and "drawn at random, through which no gradient flows back" in text
    assert re.search(r"self\.p_\w+ = draw\.parameter\(\(16, 12\), torch\.float32\)  # stands for the result of", text)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8", "hqq 4 bit"])
@pytest.mark.default_cases("nf4")
def test_quantised_weights(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dense ones stand for them, and the script says so."""
    log = met(quantized(kind), x(3, 64))
    assert len(log.rewrites) == 2
    with pytest.warns(dorafx.DorafxWarning, match="drawn at random|a plain dense tensor stands for it"):
        path = log.save_repro(log.records[0], tmp_path / "repro.py")
    text = path.read_text(encoding="utf-8")
    assert "What is not as in the program:" in text and " at 0x" not in text
    log.clear()
    code, output = executed(path, capsys)
    assert code == 0, output
    assert len(log.rewrites) >= 2


def test_constants_and_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Constants of a graph of ``make_fx``, and a module that ``fx.symbolic_trace`` does not look into."""
    layer, constant = Adapted(), torch.full((12,), SECRET)

    def forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        n = (w + b @ a).norm(dim=1)
        return m / n * (F.linear(x * constant, w) + F.linear(F.linear(x * constant, a), b))

    operands = (x(), layer.w, layer.b, layer.a, layer.m)
    dorafx.rewrite(make_fx(forward)(*operands))
    log = rewrite_log()
    (record,) = log.records
    with pytest.warns(dorafx.DorafxWarning, match="constant .* drawn at random"):
        path = log.save_repro(record, tmp_path / "repro.py")
    assert "1234.5" not in path.read_text(encoding="utf-8")
    assert executed(path, capsys)[0] == 0

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.last = nn.Sequential(nn.LayerNorm(16), nn.GELU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.layer(x))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return name == "last"

    log.clear()
    deep = Deep()
    dorafx.rewrite(fx.GraphModule(deep, Tracer().trace(deep)), x())
    with pytest.warns(dorafx.DorafxWarning, match="calls the module last"):
        path = log.save_repro(log.records[0], tmp_path / "repro.py")
    assert executed(path, capsys)[0] == 0


def test_exported_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad():
        dorafx.rewrite(torch.export.export(Adapted(), (x(),)))
    log = rewrite_log()
    code, output = executed(log.save_repro(log.records[0], tmp_path / "repro.py"), capsys)
    assert code == 0, output


def test_distributed_tensors(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, p = torch.distributed.init_device_mesh("cpu", (1,)), Layer()
        w, b, a = (distribute_tensor(t.detach(), mesh, [Shard(0)]) for t in (p.W, p.B, p.A))
        log = met(lambda x: (w + b @ a).norm(dim=1), x(10))
        assert log.records
        with pytest.raises(dorafx.DorafxError, match="is a DTensor: a graph of several processes"):
            log.save_repro(log.records[0], tmp_path / "repro.py")
    finally:
        torch.distributed.destroy_process_group()


def test_no_script(tmp_path: Path, monkeypatch: Any) -> None:
    """Each error says why."""
    path = tmp_path / "repro.py"
    log = met(Adapted(), x())
    (record,) = log.records
    read = RewriteLog.from_json(log.to_json())
    assert read.records == [record] and "class Graph" not in log.to_json()
    with pytest.raises(dorafx.DorafxError, match="read from a file"):
        read.save_repro(read.records[0], path)
    with pytest.raises(dorafx.DorafxError, match=r"script of a\.b: the record is of no graph"):
        log.save_repro(Record("missed", "a.b"), path)
    with pytest.raises(OSError, match="absent"):
        log.save_repro(record, tmp_path / "absent" / "repro.py")
    log.clear()
    with pytest.raises(dorafx.DorafxError, match="cleared"):
        log.save_repro(record, path)
    torch._dynamo.reset()
    monkeypatch.setattr(scripts, "MOST_NODES", 3)
    log = met(Adapted(), x())
    with pytest.raises(
        dorafx.DorafxError, match="scripts of more than 3 are made only while DORAFX_REPRO=folder is set"
    ):
        log.save_repro(log.records[0], path)
    torch._dynamo.reset()
    log.clear()
    monkeypatch.setattr(scripts._Script, "made", lambda self: 1 / 0)
    log = met(Adapted(), x())
    assert log.rewrites  # the program does not notice
    monkeypatch.setattr(scripts, "MOST_NODES", 4000)
    torch._dynamo.reset()
    log.clear()
    log = met(Adapted(), x())
    with pytest.raises(dorafx.DorafxError, match="could not be made: ZeroDivisionError"):
        log.save_repro(log.records[0], path)
    assert not path.exists()


# -- what a log keeps --------------------------------------------------------------------------------------------------


def test_equal_graphs_have_one_script() -> None:
    """The same key in each process, layer and log; another where options differ."""
    one, other = Adapted(), Adapted()
    keys = set()
    for layer in (one, other):
        torch._dynamo.reset()
        keys |= {r.repro for r in met(layer, x()).records}
    keys |= {r.repro for r in dorafx.explain(one, x()).log.records}  # the default codegen: another script
    assert len(keys) == 2
    torch._dynamo.reset()
    log = met(one, x(), options={**EAGER, "dorafx.norm": "factored"})
    assert len({r.repro for r in log.records}) == 2 == len(log.reproductions)


def test_a_log_is_bounded() -> None:
    from dorafx.log import Reproduction

    log = RewriteLog()
    for i in range(200):
        log.extend((), reproductions={str(i): Reproduction(str(i), os.urandom(10))})
    assert list(log.reproductions) == [str(i) for i in range(136, 200)]
    for i in range(8):
        log.extend((), reproductions={f"large {i}": Reproduction(f"large {i}", os.urandom(1 << 20))})
    assert list(log.reproductions) == [f"large {i}" for i in range(4, 8)]
    log.clear()
    assert log.reproductions == {}


def test_explain_keeps_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explanation = dorafx.explain(Adapted(hidden=True), x())
    path = explanation.log.save_repro(explanation.misses[0], tmp_path / "repro.py")
    assert executed(path, capsys)[0] == 0


# -- DORAFX_REPRO ------------------------------------------------------------------------------------------------------


def test_folder_of_scripts(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A script for each distinct graph, however large, rewritten or missed, while it happens."""
    folder = tmp_path / "new" / "scripts"
    monkeypatch.setenv("DORAFX_REPRO", str(folder))
    monkeypatch.setattr(scripts, "MOST_NODES", 3)
    met(Adapted(), x())
    torch._dynamo.reset()
    met(Adapted(), x())
    met(Adapted(hidden=True), x())
    met(lambda x: x + 1, x())  # nothing to rewrite, nothing to miss
    log = rewrite_log()
    assert len(log.records) == 3
    assert sorted(p.name for p in folder.iterdir()) == sorted({f"{r.repro}.py" for r in log.records})
    for path in folder.iterdir():
        assert executed(path, capsys)[0] == 0


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.default_cases("eager")
def test_a_folder_that_cannot_be_written(codegen: str, tmp_path: Path, monkeypatch: Any) -> None:
    """One warning, and the model runs."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DORAFX_REPRO", str(tmp_path / "file"))
    monkeypatch.setattr(rewrite_log(), "_repro_failed", False)
    model = peft_perceptron()
    expected = call(model, model)
    with pytest.warns(dorafx.DorafxWarning, match="DORAFX_REPRO: cannot write into .*file") as seen:
        compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": codegen}, dynamic=False)
        torch.testing.assert_close(call(compiled, model), expected)
        compiled(x(2, 24))
    assert len(seen) == 1
    monkeypatch.setattr(rewrite_log(), "_repro_failed", False)


def test_a_script_that_cannot_be_made(tmp_path: Path, monkeypatch: Any) -> None:
    """A warning for each graph, and the model runs."""
    monkeypatch.setenv("DORAFX_REPRO", str(tmp_path))
    monkeypatch.setattr(scripts._Script, "made", lambda self: 1 / 0)
    with pytest.warns(dorafx.DorafxWarning, match="DORAFX_REPRO: there is no script of a graph: .*ZeroDivisionError"):
        log = met(Adapted(), x())
    assert log.rewrites and not list(tmp_path.iterdir())


def test_a_graph_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is none the script runs on the CPU."""
    with fake_mode():
        operands = [torch.empty(shape, device="cuda") for shape in ((3, 12), (16, 12), (16, 2), (2, 12), (16,))]

        def forward(
            x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, m: torch.Tensor
        ) -> torch.Tensor:
            y = m / (w + b @ a).norm(dim=1) * (F.linear(x, w) + F.linear(F.linear(x, a), b))
            return y + torch.ones(16, device="cuda")

        gm = make_fx(forward)(*operands)
    dorafx.rewrite(gm)
    log = rewrite_log()
    path = log.save_repro(log.records[0], tmp_path / "repro.py")
    text = path.read_text(encoding="utf-8")
    assert "draw.tensor((16, 12), torch.float32, device=DEVICE)" in text and "device=torch.device(DEVICE)" in text
    assert executed(path, capsys)[0] == 0
