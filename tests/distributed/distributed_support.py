"""What the workers share: tiny models, a training run, and how results reach the test; and how a test launches workers."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integration_support import Perceptron, lora_config, randomise
from peft import get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from workers import run_worker

from dorafx import rewrite_log
from dorafx.runtime import norm_store

HERE = Path(__file__).parent
STEPS = 3
BLOCKS = 2
SITES = 2 * BLOCKS
EAGER = {"dorafx.codegen": "eager"}


# -- in the test ------------------------------------------------------------------------------------------------------


def launch(worker: str, folder: Path, *arguments: str, processes: int = 2, timeout: int = 280) -> dict[str, Any]:
    """Run a worker under torchrun on this machine and return what it wrote: the results of every check."""
    results = folder / f"{worker}.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return run([*command, str(HERE / worker), str(results), *arguments], results, timeout)


def launch_once(worker: str, factory: pytest.TempPathFactory, *arguments: str) -> dict[str, Any]:
    """:func:`launch` for tests that share the results, also where pytest runs them in several processes."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "-".join([worker, *arguments])
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        while not done.exists():  # pytest's own timeout ends it
            time.sleep(0.2)
        results = folder / f"{worker}.json"
        assert results.exists(), "the workers failed, as the test that launched them says"
        found: dict[str, Any] = json.loads(results.read_text())
        return found
    try:
        return launch(worker, folder, *arguments, timeout=560)
    finally:
        done.touch()


def run(command: list[str], results: Path, timeout: int) -> dict[str, Any]:
    environment = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return run_worker(command, results, [HERE, HERE.parent / "support"], environment, timeout)


def check(results: dict[str, Any], name: str) -> dict[str, Any]:
    """The result of one check; the worker's traceback is the failure's text."""
    result: dict[str, Any] = results[name]
    assert "error" not in result, result["error"]
    return result


# -- in the worker ----------------------------------------------------------------------------------------------------


def run_checks(checks: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """Run every check on all processes. A check fails if it fails on one of them; of numbers the largest is kept."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    results = {}
    for name, function in checks.items():
        torch._dynamo.reset()
        rewrite_log().clear()
        norm_store().clear()
        torch.manual_seed(0)
        try:
            found: dict[str, Any] = function()
        except Exception:
            found = {"error": traceback.format_exc()}
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, found)
        results[name] = _merged(of_ranks)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


def _merged(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [r for r in of_ranks if "error" in r]
    if failed:
        return failed[0]
    return {
        key: max(r[key] for r in of_ranks) if isinstance(value, float) else value for key, value in of_ranks[0].items()
    }


class Stack(nn.Module):
    """Perceptrons one after another: the smallest model with blocks to shard one by one."""

    def __init__(self, width: int = 24, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Perceptron(width) for _ in range(BLOCKS))
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else x + block(x)
        return x


def model(width: int = 24, checkpointed: bool = False, **lora: Any) -> Any:
    """A stock PEFT model, the same on every process."""
    torch.manual_seed(0)
    config = lora_config(target_modules=["first", "second"], task_type=None, **lora)
    return randomise(get_peft_model(Stack(width, checkpointed), config)).train()


def blocks(adapted: Any) -> Any:
    return adapted.base_model.model.blocks


def batch(step: int, width: int = 24) -> torch.Tensor:
    """The batch of all processes."""
    return torch.randn((4, 5, width), generator=torch.Generator().manual_seed(step))


def own_batch(step: int) -> torch.Tensor:
    return batch(step).chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return output.float().sin().square().mean()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, of all of a sharded one."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def named(adapted: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Trained parameters under the names that they have without wrappers."""
    found = []
    for name, parameter in adapted.named_parameters():
        for part in ("_fsdp_wrapped_module.", "_orig_mod.", "module."):
            name = name.replace(part, "")
        if parameter.requires_grad:
            found.append((name, parameter))
    return found


class Training:
    """Losses, gradients of the first step and parameters of some steps of fused AdamW."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, torch.Tensor] = {}

    def run(self, adapted: Any, call: Callable[[torch.Tensor], torch.Tensor], single: bool = False) -> Training:
        """
        Args:
            adapted: whose parameters are trained.
            call: the forward.
            single: no wrapper averages gradients: take the mean loss over the batches of all processes.
        """
        optimizer = torch.optim.AdamW([p for _, p in named(adapted)], lr=0.02, fused=True)
        for step in range(STEPS):
            optimizer.zero_grad()
            if single:
                losses = [loss_of(call(x)) for x in batch(step).chunk(dist.get_world_size())]
                loss = torch.stack(losses).mean()
                self.losses.append(losses[dist.get_rank()].item())
            else:
                loss = loss_of(call(own_batch(step)))
                self.losses.append(loss.item())
            loss.backward()
            if step == 0:
                self.gradients = {n: whole(p.grad) for n, p in named(adapted) if p.grad is not None}
            optimizer.step()
        self.parameters = {n: whole(p) for n, p in named(adapted)}
        return self

    def against(self, other: Training) -> dict[str, Any]:
        """Largest differences, relative to the largest element of each tensor."""
        pairs = zip(self.losses, other.losses)
        return {
            "losses": max(abs(one - two) / abs(two) for one, two in pairs),
            "gradients": difference(self.gradients, other.gradients),
            "parameters": difference(self.parameters, other.parameters),
            **seen(),
        }


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and one, sorted(one.keys() ^ other.keys())
    return max(relative(one[name], other[name]) for name in one)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return ((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-6)).item()


def seen() -> dict[str, Any]:
    """What dorafx says it did."""
    log = rewrite_log()
    return {
        "sites": len({r.site for r in log.rewrites}),
        "rewrites": len(log.rewrites),
        "patterns": sorted({r.pattern for r in log.rewrites}),
        "placements": sorted({r.norm_placement for r in log.rewrites}),
        "misses": [f"{r.site}: {r.reason}" for r in log.misses],
        "computed": log.norms.computed,
        "reused": log.norms.reused,
    }


def reference(checkpointed: bool = False) -> Training:
    """Stock PEFT in one process, on the batches of all."""
    stock = model(checkpointed=checkpointed)
    return Training().run(stock, stock, single=True)
