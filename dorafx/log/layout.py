"""The layout of a drawing's nodes and edges: layers from top to bottom, every node in the layer just above its first reader.

The layers come from networkx; the order within a layer and the positions from sweeps that pull each node to the mean of its
neighbours (Sugiyama, Tagawa and Toda, 1981).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from .drawing import DrawnNode

WIDTH, HEIGHT = 144, 36  # of a node's box, in CSS pixels
_BEND = 26  # the width that a passing edge takes in a layer
_GAP, _STEP, _MARGIN = 14, 58, 8
_SWEEPS = 12

_Key = tuple[int, int]  # (node, -1), or (edge's source, layer that it passes)


@dataclass(frozen=True)
class Edge:
    """An edge as an SVG path, from the bottom of ``source`` to the top of ``target`` (indices of nodes)."""

    source: int
    target: int
    path: str


@dataclass(frozen=True)
class Picture:
    """The layout of a drawing: ``corners`` are the upper left corners of the boxes, in the order of the nodes."""

    width: int
    height: int
    corners: tuple[tuple[int, int], ...]
    edges: tuple[Edge, ...]


def lay_out(nodes: Sequence[DrawnNode]) -> Picture:
    """The layout of a drawing's nodes and edges; equal for equal nodes."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(nodes)))
    graph.add_edges_from((source, target) for target, node in enumerate(nodes) for source in node.inputs)
    generations = list(nx.topological_generations(graph.reverse(copy=False)))
    level = {node: len(generations) - 1 - depth for depth, members in enumerate(generations) for node in members}
    chains = _chains(graph, level)
    layers = _layers(chains, level, len(generations))
    neighbours: dict[_Key, list[_Key]] = {key: [] for layer in layers for key in layer}
    for chain in chains.values():
        for one, other in pairwise(chain):
            neighbours[one].append(other)
            neighbours[other].append(one)
    places = _places(layers, neighbours)
    left = min((places[key] - _width(key) / 2 for key in places), default=0.0)
    x = {key: round(place - left) + _MARGIN for key, place in places.items()}
    right = max((x[key] + _width(key) / 2 for key in x), default=0.0)
    corners = tuple((x[i, -1] - WIDTH // 2, level[i] * _STEP + _MARGIN) for i in range(len(nodes)))
    edges = tuple(Edge(s, t, _path(chain, x, level)) for (s, t), chain in chains.items())
    return Picture(round(right) + _MARGIN, max(len(generations) - 1, 0) * _STEP + HEIGHT + 2 * _MARGIN, corners, edges)


def _width(key: _Key) -> int:
    return WIDTH + _GAP if key[1] < 0 else _BEND


def _chains(graph: nx.DiGraph, level: dict[int, int]) -> dict[tuple[int, int], list[_Key]]:
    """The chain of positions of each edge: one in every layer that it passes, shared by the edges of a node."""
    return {
        (source, target): [(source, -1), *((source, i) for i in range(level[source] + 1, level[target])), (target, -1)]
        for source, target in sorted(graph.edges)
    }


def _layers(chains: dict[tuple[int, int], list[_Key]], level: dict[int, int], count: int) -> list[list[_Key]]:
    """The members of each layer, in the order of a depth-first search upwards from the ends, which keeps branches together."""
    above: dict[_Key, list[_Key]] = {}
    for chain in chains.values():
        for one, other in pairwise(chain):
            above.setdefault(other, []).append(one)
    layers: list[list[_Key]] = [[] for _ in range(count)]
    seen: set[_Key] = set()
    stack: list[_Key] = [(node, -1) for node in sorted(level, key=lambda n: (level[n], n))]
    while stack:
        key = stack.pop()
        if key in seen:
            continue
        seen.add(key)
        layers[level[key[0]] if key[1] < 0 else key[1]].append(key)
        stack.extend(reversed(above.get(key, [])))
    return layers


def _places(layers: list[list[_Key]], neighbours: dict[_Key, list[_Key]]) -> dict[_Key, float]:
    """The horizontal centre of each position."""
    places: dict[_Key, float] = {}
    for layer in layers:
        edge = -sum(map(_width, layer)) / 2
        for key in layer:
            places[key] = edge + _width(key) / 2
            edge += _width(key)
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 else reversed(layers):
            desired = {
                key: sum(places[n] for n in near) / len(near) if (near := neighbours[key]) else places[key]
                for key in layer
            }
            if sweep < _SWEEPS - 2:
                layer.sort(key=desired.__getitem__)
            places.update(_apart(layer, desired))
    return places


def _apart(layer: list[_Key], desired: dict[_Key, float]) -> dict[_Key, float]:
    """Positions as near to the desired ones as the order and the widths allow: the mean of pushing right and pushing left."""
    sides: list[list[float]] = []
    for members, sign in ((layer, 1), (layer[::-1], -1)):
        edge = float("-inf")
        pushed = []
        for key in members:
            place = max(sign * desired[key], edge + _width(key) / 2)
            pushed.append(sign * place)
            edge = place + _width(key) / 2
        sides.append(pushed if sign > 0 else pushed[::-1])
    return {key: (right + left) / 2 for key, right, left in zip(layer, *sides)}


def _path(chain: list[_Key], x: dict[_Key, int], level: dict[int, int]) -> str:
    """From the bottom of the first box, down through the bends, to the top of the last."""
    (first, _), (last, _) = chain[0], chain[-1]
    top, end = level[first] * _STEP + HEIGHT + _MARGIN, level[last] * _STEP + _MARGIN
    text = f"M{x[chain[0]]} {top}"
    x_now = x[chain[0]]
    for key in chain[1:]:
        next_x, stop = x[key], end if key[1] < 0 else key[1] * _STEP + _MARGIN
        middle = (top + stop) // 2
        text += f"C{x_now} {middle} {next_x} {middle} {next_x} {stop}"
        if key[1] >= 0:
            text += f"V{stop + HEIGHT}"
        x_now, top = next_x, stop + HEIGHT
    return text
