"""Who uses a node."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx


def dies(node: fx.Node, site: fx.Node, order: Mapping[fx.Node, int], depth: int = 12) -> bool:
    """Whether every use of a node leads to the site and nowhere else. ``order``: the positions of the graph's nodes."""
    if depth == 0:
        return False
    return all(
        user is site or (order[user] < order[site] and bool(user.users) and dies(user, site, order, depth - 1))
        for user in node.users
    )
