"""FSDP: ``fully_shard`` (FSDP2) a block at a time, and FullyShardedDataParallel (FSDP1) with the original parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from distributed_support import (
    EAGER,
    Training,
    batch,
    blocks,
    difference,
    model,
    named,
    own_batch,
    reference,
    relative,
    run_checks,
    seen,
    whole,
)
from integration_support import Perceptron
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import dorafx
from dorafx.runtime import content, watch


def sharded(adapted: Any, **options: Any) -> Any:
    """FSDP2, as PyTorch's documentation has it: each block, then the root."""
    for block in blocks(adapted):
        fully_shard(block, **options)
    return fully_shard(adapted, **options)


def train(prepare: Callable[[Any], Any], **options: Any) -> dict[str, Any]:
    wanted = reference()
    adapted = model()
    return Training().run(adapted, prepare(adapted)).against(wanted)


def blocks_before(adapted: Any, **options: Any) -> Any:
    for block in blocks(adapted):
        block.compile(backend="dorafx", options=EAGER)
    return sharded(adapted, **options)


def optimized_before(adapted: Any, **options: Any) -> Any:
    return sharded(dorafx.optimize(adapted, codegen="eager"), **options)


def optimized_after(adapted: Any, **options: Any) -> Any:
    return dorafx.optimize(sharded(adapted, **options), codegen="eager")


def compiled_after(adapted: Any, **options: Any) -> Any:
    return torch.compile(sharded(adapted, **options), backend="dorafx", options=EAGER)


def inductor(adapted: Any) -> Any:
    for block in blocks(adapted):
        block.compile(backend="dorafx")
    return sharded(adapted)


def mixed_precision() -> dict[str, Any]:
    """Parameters gathered in bf16, against stock PEFT under the same policy, and against the reference in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    exact = reference()
    stock = model()
    theirs = Training().run(stock, sharded(stock, mp_policy=policy))
    adapted = model()
    ours = Training().run(adapted, blocks_before(adapted, mp_policy=policy))
    return {
        **ours.against(exact),
        "stock": difference(theirs.gradients, exact.gradients),
        "dtype": str(next(iter(ours.parameters.values())).dtype),
    }


def checkpointed(prepare: Callable[[Any], Any]) -> dict[str, Any]:
    wanted = reference(checkpointed=True)
    adapted = model(checkpointed=True)
    return Training().run(adapted, prepare(adapted)).against(wanted)


def stale(wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Decoding steps between writes of every kind, against stock PEFT under the same wrapper. Nothing of the contents is read, as
    on a device that has no kernels to compare them: what is left to see are objects, storages and version counters."""
    is_read, watch.is_read = watch.is_read, lambda tensor: False
    read, content._content = content._content, lambda tensor: None
    stock, adapted = model().eval(), model().eval()
    dorafx.optimize(adapted, codegen="eager")
    twins = [(stock, wrap(stock)), (adapted, wrap(adapted))]
    token = batch(9)[:, :1]
    found: dict[str, Any] = {}

    def step(what: str) -> None:
        with torch.no_grad():
            expected, actual = (call(token) for _, call in twins)
        found[what] = max(relative(actual, expected), found.get(what, 0.0))

    def write(what: str, change: Callable[[Any, Any], None]) -> None:
        step(what)
        step(what)
        for one, call in twins:
            change(one, call)
        step(what)

    try:
        write("in place", _scaled)
        write("through data", _scaled_unseen)
        write("fused optimizer", _trained)
        write("other", _loaded)
    finally:
        watch.is_read, content._content = is_read, read
    return {**found, **seen()}


def _factors(one: Any, call: Any, change: Callable[[torch.Tensor], Any]) -> None:
    """Change every ``B``, as the wrapper documents that parameters are changed."""
    if isinstance(call, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(call):
            _change_factors(one, change)
        return
    for module in one.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    _change_factors(one, change)


def _change_factors(one: Any, change: Callable[[torch.Tensor], Any]) -> None:
    with torch.no_grad():
        for name, parameter in named(one):
            if "lora_B" in name:
                change(parameter)


def _scaled(one: Any, call: Any) -> None:
    _factors(one, call, lambda p: p.mul_(1.5))


def _scaled_unseen(one: Any, call: Any) -> None:
    _factors(one, call, lambda p: p.data.mul_(0.5))


def _trained(one: Any, call: Any) -> None:
    optimizer = torch.optim.AdamW([p for _, p in named(one)], lr=0.1, fused=True)
    call(own_batch(3)).sin().square().mean().backward()
    optimizer.step()


def _loaded(one: Any, call: Any) -> None:
    if isinstance(call, FullyShardedDataParallel):
        _scaled(one, call)
        return
    for module in one.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    state = {name: tensor * 1.25 if "lora_B" in name else tensor for name, tensor in one.state_dict().items()}
    one.load_state_dict(state)


def flat(adapted: Any, strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD, originals: bool = True) -> Any:
    return FullyShardedDataParallel(
        adapted,
        use_orig_params=originals,
        sharding_strategy=strategy,
        auto_wrap_policy=ModuleWrapPolicy({Perceptron}),
        device_id=torch.device("cpu"),
    )


def train_flat(prepare: Callable[[Any], Any], checkpoint: bool = False) -> dict[str, Any]:
    wanted = reference(checkpoint)
    adapted = model(checkpointed=checkpoint)
    call = prepare(adapted)
    training = Training()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02, fused=True)
    for step in range(3):
        optimizer.zero_grad()
        loss = call(own_batch(step)).float().sin().square().mean()
        training.losses.append(loss.item())
        loss.backward()
        if step == 0:
            with FullyShardedDataParallel.summon_full_params(call, with_grads=True):
                training.gradients = {n: whole(p.grad) for n, p in named(adapted) if p.grad is not None}
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(call):
        training.parameters = {n: whole(p) for n, p in named(adapted)}
    return training.against(wanted)


def without_originals() -> dict[str, Any]:
    """``use_orig_params=False``: frozen and trained parameters in one flat one, which FSDP1 refuses; each kind wrapped by
    itself it takes, and Dynamo does not trace such modules."""
    stock, adapted = model().eval().requires_grad_(False), model().eval().requires_grad_(False)
    dorafx.optimize(adapted, codegen="eager")
    calls = [flat(one, originals=False) for one in (stock, adapted)]
    with torch.no_grad():
        expected, actual = (call(batch(0)) for call in calls)
    return {"output": relative(actual, expected), **seen()}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "blocks compiled before": lambda: train(blocks_before),
    "blocks compiled before, not resharded": lambda: train(lambda m: blocks_before(m, reshard_after_forward=False)),
    "optimized before": lambda: train(optimized_before),
    "optimized after, not resharded": lambda: train(lambda m: optimized_after(m, reshard_after_forward=False)),
    "compiled after": lambda: train(compiled_after),
    "inductor": lambda: train(inductor),
    "mixed precision": mixed_precision,
    "optimized, checkpointed": lambda: checkpointed(optimized_before),
    "blocks compiled before, checkpointed": lambda: checkpointed(blocks_before),
    "compiled after, checkpointed": lambda: checkpointed(compiled_after),
    "stale": lambda: stale(sharded),
    "stale, not resharded": lambda: stale(lambda m: sharded(m, reshard_after_forward=False)),
    "flat, optimized before": lambda: train_flat(lambda m: flat(dorafx.optimize(m, codegen="eager"))),
    "flat, compiled after": lambda: train_flat(lambda m: _compiled_flat(m)),
    "flat, checkpointed": lambda: train_flat(lambda m: flat(dorafx.optimize(m, codegen="eager")), checkpoint=True),
    "flat, stale": lambda: stale(flat),
    "flat, stale, gradients sharded": lambda: stale(lambda m: flat(m, ShardingStrategy.SHARD_GRAD_OP)),
    "flat, without originals": without_originals,
}


def _compiled_flat(adapted: Any) -> Any:
    wrapped = flat(adapted)
    wrapped.compile(backend="dorafx", options=EAGER)
    return wrapped


if __name__ == "__main__":
    run_checks({name: CHECKS[name] for name in sys.argv[2:] or CHECKS})
