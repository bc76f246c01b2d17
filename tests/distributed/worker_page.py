"""The functions of ``examples/guide/distributed.md``, run as they stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_support import (
    Training,
    batch,
    blocks,
    difference,
    loss_of,
    model,
    named,
    reference,
    relative,
    run_checks,
    seen,
    whole,
)
from page_blocks import blocks_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

PAGE = Path(__file__).parents[2] / "examples" / "guide" / "distributed.md"
page: dict[str, Any] = {}
for block in blocks_of(PAGE.read_text(encoding="utf-8")):
    if block.language == "python":
        exec(block.code or block.shown, page)


def data_parallel() -> dict[str, Any]:
    wanted, adapted = reference(), model()
    return Training().run(adapted, page["data_parallel"](adapted)).against(wanted)


def fully_sharded() -> dict[str, Any]:
    wanted, adapted = reference(), model()
    return Training().run(adapted, page["fully_sharded"](adapted, blocks(adapted))).against(wanted)


def tensor_parallel() -> dict[str, Any]:
    """Four processes: a batch of its own for each of two groups of two."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    stock = model()
    groups = [stock(x) for x in batch(0).chunk(mesh["dp"].size())]
    torch.stack([loss_of(y) for y in groups]).mean().backward()
    own = mesh.get_local_rank("dp")
    wanted = {n: whole(p.grad) for n, p in named(stock)}
    adapted = model()
    page["tensor_parallel"](adapted, blocks(adapted), ("first",), ("second",), mesh)
    x = batch(0).chunk(mesh["dp"].size())[own]
    with implicit_replication():
        output = adapted(distribute_tensor(x, mesh["tp"], [Replicate()])).full_tensor()
        loss_of(output).backward()
    found = {n: whole(p.grad) for n, p in named(adapted)}
    return {"output": relative(output, groups[own]), "gradients": difference(found, wanted), **seen()}


if __name__ == "__main__":
    both = {"data parallel": data_parallel, "fully sharded": fully_sharded}
    dist.init_process_group("gloo")
    run_checks({"tensor parallel": tensor_parallel} if dist.get_world_size() == 4 else both)
