"""Stock PEFT DoRA is one graph, and computes what it computes in eager."""

from __future__ import annotations

import inspect
from typing import Any

import peft
import pytest
import torch
from capture_support import SITES, Graphs, compare, in_new_process, llama, tokens
from peft.tuners.lora import dora
from peft.utils import integrations, other
from torch import nn
from transformers.pytorch_utils import Conv1D

from dorafx import capture


def test_polyfills_are_installed_for_this_peft() -> None:
    found = capture.install()
    assert found is capture.install() is capture.status()
    assert found.peft_version == peft.__version__
    assert found.installed == [
        "peft.utils.integrations.dequantize_module_weight",
        "peft.utils.integrations.dequantize_bnb_weight",
        "peft.utils.other.transpose",
        "peft.tuners.lora.dora.DoraLinearLayer._cache_clear",
        "peft.tuners.tuners_utils.BaseTunerLayer.get_base_layer",
        "bitsandbytes.nn.modules.Linear4bit.forward",
    ]
    assert found.skipped == []


def test_eager_peft_is_left_as_it_was() -> None:
    """Every function is still PEFT's own; the substitutes live in Dynamo."""
    for owner, name in (
        (integrations, "dequantize_module_weight"),
        (dora, "dequantize_module_weight"),
        (other, "transpose"),
        (dora, "transpose"),
        (dora.DoraLinearLayer, "_cache_clear"),
    ):
        fn = getattr(owner, name)
        assert fn.__module__.startswith("peft.")
        assert fn.__code__.co_filename.startswith(peft.__path__[0])
        assert inspect.unwrap(fn) is fn


@pytest.mark.default_cases("False-0.0")
@pytest.mark.parametrize(("train", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.2)])
def test_llama_is_one_graph(train: bool, dropout: float) -> None:
    model = llama(lora_dropout=dropout).train(train)
    graphs = Graphs()
    compare(model, graphs, backward=train)
    assert len(graphs) == 1
    assert graphs.norms(inside=False) == SITES


def test_two_active_adapters() -> None:
    model = llama(adapters=("a", "b")).eval()
    model.base_model.set_adapter(["a", "b"])
    graphs = Graphs()
    compare(model, graphs)
    assert len(graphs) == 1
    assert graphs.norms(inside=False) == 2 * SITES


def test_adapters_switched_and_disabled_after_compiling() -> None:
    model = llama(adapters=("a", "b")).eval()
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    results = []
    for adapter in ("a", "b", "a"):
        model.set_adapter(adapter)
        expected = model(input_ids=tokens()).logits
        results.append(compiled(input_ids=tokens()).logits)
        torch.testing.assert_close(results[-1], expected)
    assert not torch.allclose(results[0], results[1])
    count, norms = len(graphs), graphs.norms(inside=False)
    assert count == 2 and norms == 2 * SITES
    with model.disable_adapter():
        expected = model(input_ids=tokens()).logits
        torch.testing.assert_close(compiled(input_ids=tokens()).logits, expected)
    assert len(graphs) == count + 1
    assert graphs.norms(inside=False) == norms


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


LAYERS = {
    "linear": (lambda: nn.Linear(16, 12), (2, 5, 16)),
    "linear without bias": (lambda: nn.Linear(16, 12, bias=False), (5, 16)),
    "Conv1D": (lambda: Conv1D(12, 16), (2, 5, 16)),
    "embedding": (lambda: nn.Embedding(16, 12, padding_idx=0), None),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, bias=False), (2, 8, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 3), (2, 8, 5, 5, 5)),
}


@pytest.mark.parametrize(("train", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.3)])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_of_layer_is_one_graph(kind: str, train: bool, dropout: float) -> None:
    make, shape = LAYERS[kind]
    x = torch.randn(shape) if shape else torch.randint(0, 16, (2, 5))
    config = peft.LoraConfig(
        r=3,
        target_modules=["layer"],
        use_dora=True,
        use_rslora=True,
        lora_dropout=dropout,
        fan_in_fan_out=kind == "Conv1D",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(Holder(make()), config).train(train)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    leaves = [p for p in model.parameters() if p.requires_grad]
    assert len(leaves) == 3
    results = []
    for call in (model, compiled):
        torch.manual_seed(1)
        y = call(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
    assert len(graphs) == 1
    assert graphs.norms(inside=False) == 1


UNKNOWN = """
import json, sys, warnings
import torch, peft
from peft.utils import integrations
from peft.tuners.lora import dora
sys.path.insert(0, TMP)
import changed
dora.dequantize_module_weight = integrations.dequantize_module_weight = changed.dequantize_module_weight
dora.DoraLinearLayer._cache_clear = changed._cache_clear
peft.__version__ = "0.99.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch._dynamo.lookup_backend("dorafx")
    from dorafx import capture, rewrite_log
    capture.install(); found = capture.install()
from capture_support import Graphs, check_mlp
graphs = Graphs()
check_mlp(graphs, fullgraph=False)
print(json.dumps({
    "graphs": len(graphs),
    "warnings": [str(w.message) for w in caught if w.category.__name__ == "DorafxWarning"],
    "installed": [name for name in found.installed if name.startswith("peft.")],
    "skipped": found.skipped,
    "notes": list(map(str, rewrite_log().notes)),
}))
"""


@pytest.mark.slow
def test_unknown_peft_gets_no_polyfill_one_warning_and_still_works(tmp_path: Any) -> None:
    (tmp_path / "changed.py").write_text(
        "def dequantize_module_weight(module):\n"
        "    if type(module.weight).__module__.startswith('elsewhere.'):\n"
        "        return module.weight.dequantize()\n"
        "    return module.weight\n"
        "def _cache_clear(self):\n"
        "    self._dora_cache = {}\n"
    )
    answer = in_new_process(UNKNOWN.replace("TMP", repr(str(tmp_path))))
    # The same block is one graph with the polyfills (the next test): this is what they are for.
    assert answer["graphs"] > 3
    assert len(answer["warnings"]) == 1
    assert "PEFT 0.99.0" in answer["warnings"][0]
    assert answer["installed"] == [
        "peft.utils.integrations.dequantize_bnb_weight",
        "peft.utils.other.transpose",
        "peft.tuners.tuners_utils.BaseTunerLayer.get_base_layer",
    ]
    names = [name for name, _ in answer["skipped"]]
    assert names == [
        "peft.utils.integrations.dequantize_module_weight",
        "peft.tuners.lora.dora.DoraLinearLayer._cache_clear",
    ]
    for name in names:
        assert name in answer["warnings"][0]
        assert any("not installed" in note and name in note for note in answer["notes"])


LATE = """
import json, sys, threading
import torch
torch._dynamo.lookup_backend("dorafx")
imported = "peft" in sys.modules
from dorafx import capture
before = capture.install()
def finders(): return [f.name for f in sys.meta_path if type(f).__name__ == "_AfterImport"]
waiting = finders()
import importlib.util
spec = importlib.util.find_spec("peft")  # as transformers does, without importing
still = "peft" not in sys.modules
threads = [threading.Thread(target=capture.install) for _ in range(4)]
[t.start() for t in threads]
import peft
[t.join() for t in threads]
after = capture.install()
from capture_support import Graphs, check_mlp
graphs = Graphs()
check_mlp(graphs, fullgraph=True)
print(json.dumps({
    "imported": imported, "before": before.installed, "after": [name for name in after.installed if name.startswith("peft.")], "still": still,
    "waiting": waiting, "gone": "peft" not in finders(), "graphs": len(graphs), "loader": type(peft.__loader__).__name__,
    "patched": "exec_module" in vars(peft.__loader__),
}))
"""


@pytest.mark.slow
def test_peft_imported_after_the_backend() -> None:
    """The backend does not import PEFT; a PEFT imported later has its polyfills before anything is traced."""
    answer = in_new_process(LATE)
    assert answer["imported"] is False
    assert answer["before"] == []
    assert answer["still"] is True
    assert len(answer["after"]) == 5
    assert answer["waiting"].count("peft") == 1
    assert answer["gone"] is True
    assert answer["graphs"] == 1
    assert answer["loader"] == "SourceFileLoader"
    assert answer["patched"] is False
