"""Norms of DTensors: each device computes with its own shard, and partial norms are reduced in one collective a process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dorafx._compat import distributed as _distributed


@dataclass(frozen=True)
class Placed:
    """How the operands of one norm are distributed.

    Attributes:
        mesh: the device mesh.
        weight: a placement for each dimension of the mesh: replicated, sharded by rows (0), or by columns (1).
        d_out: rows of the whole weight.
    """

    mesh: Any
    weight: tuple[Any, ...]
    d_out: int


def local_operands(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Placed | None]:
    """This device's shards of the operands of a row norm, and how these are distributed; None for plain tensors.

    The weight, which is large, is not moved; the factors are redistributed to match it. A plain tensor among DTensors counts as
    replicated.
    """
    operands = weight, left, right
    distributed = [t for t in operands if _distributed.placements(t) is not None]
    if not distributed:
        return operands, None
    mesh: Any = distributed[0].device_mesh  # type: ignore[attr-defined]
    of_weight = _distributed.placements(weight) or (_distributed.replicated(),) * mesh.ndim
    of_weight = tuple(
        p if _distributed.is_shard(p, 0) or _distributed.is_shard(p, 1) else _distributed.replicated()
        for p in of_weight
    )
    of_left = tuple(p if _distributed.is_shard(p, 0) else _distributed.replicated() for p in of_weight)
    of_right = tuple(p if _distributed.is_shard(p, 1) else _distributed.replicated() for p in of_weight)
    parts = tuple(
        _distributed.local_part(t, mesh, target) for t, target in zip(operands, (of_weight, of_left, of_right))
    )
    return parts, Placed(mesh, of_weight, int(weight.shape[0]))  # type: ignore[return-value]


def placed_norms(
    norms: Sequence[torch.Tensor], placed: Sequence[Placed | None], targets: Sequence[tuple[Any, ...] | None]
) -> list[torch.Tensor]:
    """The norms of whole rows, from the norms that this device computed from its shards.

    If a weight is sharded by columns this is a collective: every device of its group must call it with the same weights in the same
    order. One all-reduce serves all of them: ``4·Σ d_out`` bytes of squares in fp32.

    Args:
        norms: ``[d_out of this device's shard]`` each.
        placed: how the operands of each are distributed.
        targets: the placements with which the graph reads each; None for plain tensors.
    """
    values = list(norms)
    # A norm that the graph reads as partial is reduced by the graph.
    shared = [
        (i, dimension)
        for i, (layout, placements) in enumerate(zip(placed, targets))
        if layout is not None
        for dimension, p in enumerate(layout.weight)
        if _distributed.is_shard(p, 1) and not _is_partial(placements, dimension)
    ]
    _reduce(values, shared, placed)
    results = []
    for norm, layout, placements in zip(values, placed, targets):
        if layout is None:
            results.append(norm)
            continue
        current = tuple(
            p
            if _distributed.is_shard(p, 0)
            else _distributed.partial_norm()
            if _distributed.is_shard(p, 1) and _is_partial(placements, dimension)
            else _distributed.replicated()
            for dimension, p in enumerate(layout.weight)
        )
        results.append(_distributed.from_parts(norm, layout.d_out, layout.mesh, current, placements))
    return results


def _reduce(values: list[torch.Tensor], shared: list[tuple[int, int]], placed: Sequence[Placed | None]) -> None:
    """Replace partial norms in the list by reduced ones, all of one group and dtype together."""
    groups: dict[Any, list[int]] = {}
    for i, dimension in shared:
        layout = placed[i]
        assert layout is not None
        groups.setdefault((layout.mesh.get_group(dimension), values[i].dtype), []).append(i)
    for (group, _), members in groups.items():
        squares = torch.cat([values[i].square() for i in members])
        torch.distributed.all_reduce(squares, group=group)
        wholes = torch.split(squares.sqrt_(), [values[i].numel() for i in members])
        for i, whole in zip(members, wholes):
            values[i] = whole


def _is_partial(placements: tuple[Any, ...] | None, dimension: int) -> bool:
    return placements is not None and _distributed.is_partial(placements[dimension])
