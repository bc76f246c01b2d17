"""Tensor parallelism with DTensor: weights sharded by rows (column-wise) and by columns (row-wise)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_support import EAGER, batch, difference, loss_of, model, named, relative, run_checks, seen, whole
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils.checkpoint import checkpoint

import dorafx

COLUMN = {"weight": Shard(0), "bias": Shard(0), "A": Replicate(), "B": Shard(0), "magnitude": Shard(0)}
ROW = {"weight": Shard(1), "bias": Replicate(), "A": Shard(1), "B": Replicate(), "magnitude": Replicate()}


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def distribute(module: nn.Module, name: str, placement: Any, devices: Any) -> None:
    old = getattr(module, name)
    if old is not None:
        sharded = distribute_tensor(old.detach(), devices, [placement])
        setattr(module, name, nn.Parameter(sharded, requires_grad=old.requires_grad))


# -- stock PEFT -------------------------------------------------------------------------------------------------------


def shard_peft(adapted: Any, devices: Any, names: tuple[str, ...] = ("first", "second")) -> Any:
    """``first`` column-wise, ``second`` row-wise: what is between them stays on its device."""
    for block in adapted.base_model.model.blocks:
        for layer, plan in ((getattr(block, name), COLUMN if name == "first" else ROW) for name in names):
            distribute(layer.base_layer, "weight", plan["weight"], devices)
            distribute(layer.base_layer, "bias", plan["bias"], devices)
            distribute(layer.lora_A.default, "weight", plan["A"], devices)
            distribute(layer.lora_B.default, "weight", plan["B"], devices)
            distribute(layer.lora_magnitude_vector.default, "weight", plan["magnitude"], devices)
    return adapted


# -- a layer of one's own ---------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """DoRA as its paper writes it; with ``differentiable`` the gradient flows through the norm, too."""

    def __init__(self, d_in: int, d_out: int, differentiable: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(d_in * d_out)
        self.weight = nn.Parameter(torch.randn(d_out, d_in, generator=draw) / d_in**0.5, requires_grad=False)
        self.A = nn.Parameter(torch.randn(4, d_in, generator=draw) / d_in**0.5)
        self.B = nn.Parameter(0.3 * torch.randn(d_out, 4, generator=draw))
        self.magnitude = nn.Parameter(torch.rand(d_out, generator=draw) + 0.5)
        self.differentiable = differentiable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = torch.linalg.vector_norm(self.weight + 1.5 * (self.B @ self.A), dim=1)
        n = n if self.differentiable else n.detach()
        return (self.magnitude / n) * (F.linear(x, self.weight) + 1.5 * F.linear(F.linear(x, self.A), self.B))


class Own(nn.Module):
    def __init__(self, width: int = 24, differentiable: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.first = Layer(width, 2 * width + 1, differentiable)
        self.second = Layer(2 * width + 1, width, differentiable)
        self.checkpointed = checkpointed

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.silu(self.first(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)


def shard_own(own: Own, devices: Any) -> Own:
    for layer, plan in ((own.first, COLUMN), (own.second, ROW)):
        for name in ("weight", "A", "B", "magnitude"):
            distribute(layer, name, plan[name], devices)
    return own


# -- checks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_reductions() -> Iterator[list[int]]:
    """The sizes of the all-reduces that norm prologues make. Those of DTensor itself go another way."""
    sizes: list[int] = []
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def step_of(adapted: Any, call: Callable[[Any], Any], devices: Any = None, steps: int = 2) -> tuple[Any, Any, Any, Any]:
    """Output, its placements, first gradients, and parameters after some steps of fused AdamW."""
    optimizer = torch.optim.AdamW([p for _, p in named(adapted)], lr=0.02, fused=True)
    outputs, gradients, placements = [], {}, None
    for step in range(steps):
        x = batch(step)
        output = call(x if devices is None else distribute_tensor(x, devices, [Replicate()]))
        placements = getattr(output, "placements", None)
        loss = loss_of(output.full_tensor() if isinstance(output, DTensor) else output)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {n: whole(p.grad) for n, p in named(adapted) if p.grad is not None}
        optimizer.step()
        outputs.append(whole(output))
    return torch.stack(outputs), str(placements), gradients, {n: whole(p) for n, p in named(adapted)}


def compare(
    make: Callable[[], Any], shard: Callable[[Any, Any], Any], compiler: Callable[[Any], Any], **ignored: Any
) -> dict[str, Any]:
    """Against the same model in one process, and against the same shards run eagerly."""
    devices = mesh()
    one = make()
    wanted = step_of(one, one)
    eager = shard(make(), devices)
    stock = step_of(eager, eager, devices)
    sharded = shard(make(), devices)
    call = compiler(sharded)
    with counted_reductions() as sizes:
        found = step_of(sharded, call, devices)
    return {
        "output": relative(found[0], wanted[0]),
        "gradients": difference(found[2], wanted[2]),
        "parameters": difference(found[3], wanted[3]),
        "same placements": found[1] == stock[1],
        "reductions": sizes,
        **seen(),
    }


def peft(compiler: Callable[[Any], Any], **lora: Any) -> dict[str, Any]:
    # PEFT makes B·A of an identity matrix, which is a plain tensor.
    with implicit_replication():
        return compare(lambda: model(**lora), shard_peft, compiler)


def partly() -> dict[str, Any]:
    """Plain weights beside sharded ones, in one graph."""
    with implicit_replication():
        found = compare(model, lambda adapted, devices: shard_peft(adapted, devices, ("second",)), eagerly)
        devices = mesh()
        stock, sharded = (shard_peft(model().eval(), devices, ("second",)) for _ in range(2))
        # A graph of its own: Dynamo cannot trace plain tensors among DTensors of a dynamic length.
        torch._dynamo.reset()
        compiled = eagerly(sharded)
        x = distribute_tensor(batch(9)[:, :1], devices, [Replicate()])
        worst = 0.0
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                worst = max(worst, relative(whole(compiled(x)), whole(stock(x))))
    return {**found, "modes": worst, **seen()}


def own(compiler: Callable[[Any], Any], **options: Any) -> dict[str, Any]:
    return compare(lambda: Own(**options), shard_own, compiler)


def eagerly(function: Any) -> Any:
    return torch.compile(function, backend="dorafx", options=EAGER)


def decode() -> dict[str, Any]:
    """One-token steps, and a write to one process's shard alone."""
    devices = mesh()
    stock, sharded = (shard_own(Own(), devices) for _ in range(2))
    compiled = eagerly(sharded)
    token = distribute_tensor(batch(9)[:, :1], devices, [Replicate()])
    found = {}
    for what in ("first", "second", "one shard written"):
        if what == "one shard written" and dist.get_rank() == 0:
            for one in (stock, sharded):
                one.second.A.data.to_local().mul_(1.5)
        with torch.no_grad():
            found[what] = relative(whole(compiled(token)), whole(stock(token)))
    return {**found, **seen()}


def two_dimensional() -> dict[str, Any]:
    """FSDP2 over one dimension of the mesh, tensor parallelism over the other."""
    world = dist.get_world_size()
    devices = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))

    def step(compiled: bool) -> tuple[torch.Tensor, Any]:
        adapted = shard_own(Own(), devices["tp"])
        for layer in (adapted.first, adapted.second):
            if compiled:
                layer.compile(backend="dorafx", options=EAGER)
            fully_shard(layer, mesh=devices["dp"])
        fully_shard(adapted, mesh=devices["dp"])
        x = batch(0).chunk(world // 2)[devices.get_local_rank("dp")]
        output = adapted(distribute_tensor(x, devices["tp"], [Replicate()]))
        loss_of(output.full_tensor()).backward()
        gradients = {n: whole(p.grad) for n, p in named(adapted)}
        return whole(output), gradients

    wanted, found = step(False), step(True)
    return {"output": relative(found[0], wanted[0]), "gradients": difference(found[1], wanted[1]), **seen()}


class ByHand(nn.Module):
    """Row-wise without DTensor: this process's columns as plain tensors, and collectives of one's own."""

    def __init__(self) -> None:
        super().__init__()
        whole_layer, rank, world = Layer(48, 24), dist.get_rank(), dist.get_world_size()
        self.weight = nn.Parameter(whole_layer.weight.detach().chunk(world, 1)[rank].contiguous(), requires_grad=False)
        self.A = nn.Parameter(whole_layer.A.detach().chunk(world, 1)[rank].contiguous())
        self.B, self.magnitude = whole_layer.B, whole_layer.magnitude

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = dist.group.WORLD
        adapted = (self.weight + 1.5 * (self.B @ self.A)).detach()
        n = all_reduce(adapted.square().sum(dim=1), "sum", group).sqrt()
        partial = F.linear(x, self.weight) + 1.5 * F.linear(F.linear(x, self.A), self.B)
        return (self.magnitude / n) * all_reduce(partial, "sum", group)


def by_hand() -> dict[str, Any]:
    one, other = ByHand(), ByHand()
    x = torch.randn((4, 24), generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.no_grad():
        return {"output": relative(eagerly(one)(x), other(x)), **seen()}


class NormAlone(Layer):
    """A norm that nothing known is done with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = torch.linalg.vector_norm(self.weight + 1.5 * (self.B @ self.A), dim=1).detach()
        return F.linear(x, self.weight) * torch.tanh(n)


def norm_alone(plan: dict[str, Any]) -> dict[str, Any]:
    devices, x = mesh(), batch(0)
    layer = NormAlone(24, 48)
    wanted = layer(x).detach()
    for name in ("weight", "A", "B", "magnitude"):
        distribute(layer, name, plan[name], devices)
    found = eagerly(layer)(distribute_tensor(x, devices, [Replicate()]))
    return {"output": relative(whole(found), wanted), **seen()}


def lengths() -> dict[str, Any]:
    """Sequences of several lengths: Dynamo's second graph has a symbolic one."""
    devices = mesh()
    stock, sharded = (shard_own(Own(), devices) for _ in range(2))
    compiled, worst = eagerly(sharded), 0.0
    for length in (5, 4, 3):
        x = distribute_tensor(batch(0)[:, :length], devices, [Replicate()])
        worst = max(worst, relative(whole(compiled(x)), whole(stock(x))))
    return {"output": worst, **seen()}


def without_gradients() -> dict[str, Any]:
    """Under ``no_grad`` and under inference mode, where an operator has no autograd kernel."""
    devices = mesh()
    wanted = Own()(batch(0)).detach()
    sharded = shard_own(Own(), devices)
    found = {}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = eagerly(sharded)(distribute_tensor(batch(0), devices, [Replicate()]))
            found[mode.__name__] = relative(output.full_tensor(), wanted)
    return {**found, **seen()}


def mixed() -> dict[str, Any]:
    """Without ``implicit_replication`` stock PEFT mixes plain tensors and DTensors, which torch refuses: its error stays."""
    sharded = shard_peft(model(), mesh())
    x = distribute_tensor(batch(0), mesh(), [Replicate()])
    errors = []
    for call in (sharded, eagerly(sharded)):
        try:
            call(x)
        except Exception as error:
            errors.append("mixed torch.Tensor and DTensor" in str(error))
    return {"refused": errors, **seen()}


def verified() -> dict[str, Any]:
    """``dorafx.verify`` checks the arithmetic, on plain tensors."""
    devices = mesh()
    report = dorafx.verify(shard_own(Own(), devices), distribute_tensor(batch(0), devices, [Replicate()]))
    return {"passed": report.passed, "text": str(report), **seen()}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "peft": lambda: peft(eagerly),
    "peft optimized": lambda: peft(lambda m: dorafx.optimize(m, codegen="eager")),
    "peft checkpointed": lambda: peft(lambda m: dorafx.optimize(m, codegen="eager"), checkpointed=True),
    "partly": partly,
    "own": lambda: own(eagerly),
    "own checkpointed": lambda: own(eagerly, checkpointed=True),
    "own inductor": lambda: own(lambda m: torch.compile(m, backend="dorafx")),
    "own differentiable": lambda: own(eagerly, differentiable=True),
    "decode": decode,
    "by hand": by_hand,
    "norm alone by rows": lambda: norm_alone(COLUMN),
    "norm alone by columns": lambda: norm_alone(ROW),
    "lengths": lengths,
    "without gradients": without_gradients,
    "mixed": mixed,
    "verified": verified,
    "two dimensions": two_dimensional,
}

if __name__ == "__main__":
    run_checks({name: CHECKS[name] for name in sys.argv[2:] or CHECKS})
