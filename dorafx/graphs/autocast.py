"""The autocast regions of a graph, and to what products are rounded in them."""

from __future__ import annotations

import torch
from torch import fx

Region = tuple[fx.Node, ...]
"""The nodes that enter the regions that a node is in, outermost first; empty for a node that is in none."""


def regions_of(graph: fx.Graph) -> dict[fx.Node, Region]:
    """The region of each node of a graph."""
    regions: dict[fx.Node, Region] = {}
    here: Region = ()
    for node in graph.nodes:
        regions[node] = here
        called = getattr(node.target, "__name__", "")
        if called == "_enter_autocast":
            here = (*here, node)
        elif called == "_exit_autocast":
            here = tuple(entered for entered in here if entered is not node.args[0])
    return regions


def rounds_to(region: Region, device: str) -> torch.dtype | None:
    """The dtype to which products of a device are rounded in a region; None where they are not. Outside of all regions it is what the graph
    is compiled under."""
    for entered in reversed(region):
        kind, dtype, enabled = (*entered.args, None, True)[:3] if len(entered.args) < 3 else entered.args[:3]
        if kind == device:
            return None if not enabled else _default(device) if dtype is None else dtype  # type: ignore[return-value]
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return _default(device) if on else None


def is_decided(region: Region, device: str) -> bool:
    """Whether a region says itself if it rounds products of a device, and what surrounds the graph does not matter."""
    return any(entered.args[0] == device for entered in region)


def _default(device: str) -> torch.dtype:
    return torch.get_autocast_dtype(device)
