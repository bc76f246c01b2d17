"""``TrainingArguments(torch_compile_backend="dorafx")``: the name, where dorafx is imported and where it is not."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from integration_support import assert_same_run, call, dora_sites, peft_model, rewritten_sites, run

from dorafx import rewrite_log

pytest.importorskip("accelerate")

REFUSED = """
from transformers import Trainer, TrainingArguments
import torch, tempfile
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, use_cpu=True, report_to=[], torch_compile_backend="dorafx")
    try:
        Trainer(torch.nn.Linear(2, 2), arguments)
    except ValueError as error:
        print(error)
"""


def printed_by(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_without_the_import_accelerate_refuses_the_name() -> None:
    """Nothing of dorafx runs by then. Should accelerate learn of backends of others one day, the guide's answer is out of date."""
    assert printed_by(REFUSED) == "'DORAFX' is not a valid DynamoBackend"


@pytest.mark.parametrize("order", ["import dorafx, accelerate", "import accelerate, dorafx", "import dorafx.backend"])
def test_the_name(order: str) -> None:
    """In either order of the imports, and for accelerate's own interface."""
    program = f"""
{order}
import os
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
print(TorchDynamoPlugin(backend="dorafx").to_kwargs())
os.environ["ACCELERATE_DYNAMO_BACKEND"] = "DORAFX"
print(Accelerator(cpu=True).state.dynamo_plugin.to_dict()["backend"])
"""
    assert printed_by(program).splitlines() == ["{'backend': 'dorafx'}", "dorafx"]


def test_the_member_is_as_others_are() -> None:
    from accelerate.utils import DynamoBackend

    member = DynamoBackend("DORAFX")
    assert isinstance(member, DynamoBackend) and member is DynamoBackend("DORAFX")
    assert (member.name, member.value, str(member), member == "DORAFX") == ("DORAFX", "DORAFX", "DORAFX", True)
    assert member not in (DynamoBackend.NO, DynamoBackend.INDUCTOR) and hash(member) == hash("DORAFX")
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert DynamoBackend("INDUCTOR") is DynamoBackend.INDUCTOR
    with pytest.raises(ValueError, match="'FOO' is not a valid DynamoBackend"):
        DynamoBackend("FOO")


@pytest.mark.parametrize("regional", [False, True])
def test_accelerate_compiles_with_it(regional: bool) -> None:
    """``Accelerator.prepare``, which is what the Trainer's ``torch_compile`` calls; its regional compilation too."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import TorchDynamoPlugin

    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's settings
    model = peft_model(layers=2).train()
    expected = run(model, lambda: call(model, model))
    options = {"dorafx.codegen": "eager", "dorafx.strict": True}
    plugin = TorchDynamoPlugin(backend="dorafx", options=options, use_regional_compilation=regional)
    prepared = Accelerator(cpu=True, dynamo_plugin=plugin).prepare(model)
    assert_same_run(run(model, lambda: call(prepared, model)), expected)
    assert len(rewritten_sites()) >= len(dora_sites(model)) == 14 and not rewrite_log().misses
    torch._dynamo.reset()
