"""Each version of PEFT that the polyfills were written for, in a process of its own."""

from __future__ import annotations

import os

import pytest
from capture_support import SITES, in_new_process

PEFTS = os.environ.get("DORAFX_PEFT_DIRS", "").split()
"""Search paths, separated by blanks, each with a PEFT (and whatever else that PEFT needs)."""

PROGRAM = """
import json, warnings
warnings.simplefilter("ignore")
import peft, torch, transformers
from capture_support import Graphs, compare, llama
from dorafx import capture
found = capture.install()
answer = {"peft": peft.__version__, "transformers": transformers.__version__,
          "installed": found.installed, "skipped": found.skipped, "peft_version": found.peft_version}
for name, train, dropout in (("eval", False, 0.0), ("train", True, 0.0), ("dropout", True, 0.2)):
    graphs = Graphs()
    compare(llama(lora_dropout=dropout).train(train), graphs, backward=train)
    answer[name] = [len(graphs), graphs.norms(inside=False)]
for use_dora in (False, True):
    model = llama(use_dora=use_dora).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    torch._dynamo.reset()
    graphs = Graphs()
    compare(model, graphs, backward=True, fullgraph=False)
    answer["checkpointed DoRA" if use_dora else "checkpointed LoRA"] = [len(graphs), graphs.norms(inside=True)]
print(json.dumps(answer))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PEFTS, reason="DORAFX_PEFT_DIRS names no directories with versions of PEFT")
@pytest.mark.parametrize("path", PEFTS)
def test_each_version_is_one_graph(path: str) -> None:
    answer = in_new_process(PROGRAM, path)
    print(answer)
    assert answer["peft_version"] == answer["peft"]
    assert answer["skipped"] == []
    assert "peft.utils.integrations.dequantize_module_weight" in answer["installed"]
    for case in ("eval", "train", "dropout"):
        assert answer[case] == [1, SITES]
    assert answer["checkpointed DoRA"] == [answer["checkpointed LoRA"][0], SITES]
