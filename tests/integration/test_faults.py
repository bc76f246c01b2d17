"""What goes wrong around a model: files, memory that moves, adapters that do not fit, a process that is killed."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import (
    assert_close,
    base_model,
    call,
    compile_eagerly,
    dora_sites,
    peft_model,
    peft_perceptron,
    rewritten_sites,
)
from peft import PeftModel

import dorafx
from dorafx import rewrite_log
from dorafx.cli import main
from dorafx.runtime import norm_store

# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.default_cases("modules")
@pytest.mark.parametrize("scope", ["modules", "model"])
def test_an_adapter_file_of_wrong_shapes(scope: str, tmp_path: Path) -> None:
    """PEFT's own error comes through, and the model that was optimized computes what it did before."""
    peft_model(r=6).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "r": 4}), encoding="utf-8")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base_model(), tmp_path)
    model = peft_model()
    expected = call(model, model).detach()
    dorafx.optimize(model, codegen="eager", strict=True, scope=scope)
    assert_close(call(model, model).detach(), expected, 1e-5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "wrong")
    model.set_adapter("default")
    assert_close(call(model, model).detach(), expected, 1e-5)


# -- models that move or go -------------------------------------------------------------------------------------------


def test_a_model_that_moved_between_compilation_and_call() -> None:
    """To another dtype and back, to memory that is gone, and to the meta device, where nothing can be computed."""
    model = peft_perceptron()
    x = torch.randn(1, 24)
    compiled = compile_eagerly(model)
    with torch.no_grad():
        for _ in range(2):
            assert_close(compiled(x), model(x), 1e-5)
        model.double()
        assert_close(compiled(x.double()), model(x.double()), 1e-12)
        model.float()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() * 1.1
        assert_close(compiled(x), model(x), 1e-5)
        layer = model.base_model.model.first
        layer.lora_A["default"].to("meta")
        with pytest.raises((RuntimeError, ValueError), match=r"device|meta"):
            compiled(x)
        layer.lora_A["default"].to_empty(device="cpu")
        layer.lora_A["default"].weight.data.normal_()
        assert_close(compiled(x), model(x), 1e-5)


def test_a_model_that_is_freed_between_compilation_and_call() -> None:
    """The compiled call holds the model, not the store; a second model at the first one's addresses gets its own norms."""
    for seed in range(3):
        model = peft_perceptron()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + seed)
        compiled = compile_eagerly(model)
        gone = weakref.ref(model)
        x = torch.randn(1, 24)
        with torch.no_grad():
            expected = model(x)
            assert_close(compiled(x), expected, 1e-5)
            del model
            assert_close(compiled(x), expected, 1e-5)
        del compiled
        torch._dynamo.reset()
        gc.collect()
        assert gone() is None
        assert len(norm_store()) == 0


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x80\x04\x95cposix\nsystem\n(S'touch executed'\ntR.", "not UTF-8 text"),
        (b"\x00\xff\xfe binary", "not UTF-8 text"),
        (b'{"dorafx_log": 1, "records": [{"status": "rewritten", "rank": "__import__(\'os\')"}]}', "'rank' is"),
        (b"!!python/object/apply:os.system ['touch executed']", "not JSON"),
    ],
    ids=["empty", "pickle", "binary", "expression", "yaml"],
)
def test_a_file_that_is_no_log(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.json").write_bytes(content)
    assert main(["report", "log.json"]) == 2
    error = capsys.readouterr().err.strip()
    assert "log.json: not a dorafx log: " in error or "log.json: dorafx log, record 0" in error
    assert message in error and len(error.splitlines()) == 1
    assert (tmp_path / "log.json").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.json"], "nothing was executed, and no report written"


def test_a_log_that_cannot_be_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the warning (tests/log): the run goes on, and its records are in the process's log."""
    monkeypatch.setenv("DORAFX_LOG", str(tmp_path))  # a folder
    monkeypatch.setattr(rewrite_log(), "_stream_failed", False)
    model, x = peft_perceptron(), torch.randn(3, 24)
    with pytest.warns(dorafx.DorafxWarning, match="DORAFX_LOG: cannot write"):
        assert_close(compile_eagerly(model)(x), model(x), 1e-5)
    assert rewritten_sites() == dora_sites(model)


# -- a process that dies ----------------------------------------------------------------------------------------------

_COMPILES = """
import sys, torch
from integration_support import peft_perceptron
from torch._inductor import codecache
model = peft_perceptron()
if sys.argv[1] == "announce":
    load = codecache.CppCodeCache.load_async
    # The source is written, and the C++ compiler is about to run or runs.
    def announced(*args, **kwargs):
        print("compiling", flush=True)
        return load(*args, **kwargs)
    codecache.CppCodeCache.load_async = announced
compiled = torch.compile(model, backend="dorafx", fullgraph=True, options={"dorafx.strict": True})
x = torch.randn(3, 5, 24)
with torch.no_grad():
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
print("same", flush=True)
"""


@pytest.mark.slow
def test_caches_of_a_process_killed_while_it_compiles(tmp_path: Path) -> None:
    environment: dict[str, Any] = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "DORAFX_LOG": str(tmp_path / "log.jsonl"),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    start = [sys.executable, "-W", "ignore", "-c", _COMPILES]
    with subprocess.Popen([*start, "announce"], env=environment, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline().strip() == "compiling"
        time.sleep(0.3)
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run([*start, ""], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
    # The killed one logged nothing: what is logged is what the codegen has compiled.
    records = dorafx.RewriteLog.from_json((tmp_path / "log.jsonl").read_text(encoding="utf-8")).records
    assert len(records) == 2
    assert {r.status for r in records} == {"rewritten"}
