"""The layout of a drawing's nodes and edges: layers from top to bottom, at most so many nodes beside each other.

The order within a layer and the positions come from sweeps that pull each node to the mean of its neighbours (Sugiyama, Tagawa and
Toda, 1981); the edges that pass a layer are straightened afterwards.
"""

from __future__ import annotations

import functools
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from .drawing import DrawnNode

WIDTH, HEIGHT = 124, 36  # of a node's box, in CSS pixels
_BEND = 14  # the width that a passing edge takes in a layer
_GAP, _STEP, _MARGIN = 12, 64, 8
_PORT = 16  # between the ends of two edges into one box
_SWEEPS, _LAST_SWEEPS = 16, 4
_MOST = 6  # nodes beside each other, where nothing asks for fewer

_Key = tuple[int, int]  # (node, -1), or (edge's source, layer that it passes)


@dataclass(frozen=True)
class Edge:
    """An edge as an SVG path with an arrow head, from the bottom of ``source`` to the top of ``target`` (indices of nodes)."""

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


def lay_out(nodes: Sequence[DrawnNode], most: int = _MOST) -> Picture:
    """The layout of a drawing's nodes and edges, with at most ``most`` nodes beside each other; equal for equal edges."""
    return _laid_out(tuple(node.inputs for node in nodes), most)


def fitting(nodes: Sequence[DrawnNode], width: int) -> Picture:
    """The layout with the most nodes beside each other that is no wider than ``width`` pixels; if there is none, the narrowest."""
    return _fitting(tuple(node.inputs for node in nodes), width)


# Layers of one spelling have the same edges, and a report may be written after every graph.
@functools.lru_cache(maxsize=512)
def _fitting(inputs: tuple[tuple[int, ...], ...], width: int) -> Picture:
    narrowest = picture = _laid_out(inputs, _MOST)
    most = _MOST
    while picture.width > width and most > 1:
        beside = max(Counter(y for _, y in picture.corners).values(), default=1)
        most = min(most, beside) - 1
        if most < 1:
            break
        picture = _laid_out(inputs, most)
        narrowest = min(narrowest, picture, key=lambda p: p.width)
    return picture if picture.width <= width else narrowest


@functools.lru_cache(maxsize=64)
def _laid_out(inputs: tuple[tuple[int, ...], ...], most: int) -> Picture:
    """``inputs``: of each node the nodes that it reads, by their indices."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(inputs)))
    graph.add_edges_from((source, target) for target, sources in enumerate(inputs) for source in sources)
    level, count = _levels(graph, most)
    chains = _chains(graph, level)
    layers = _layers(chains, level, count)
    neighbours: dict[_Key, list[_Key]] = {key: [] for layer in layers for key in layer}
    for chain in chains.values():
        for one, other in pairwise(chain):
            neighbours[one].append(other)
            neighbours[other].append(one)
    places = _places(layers, neighbours)
    _straighten(places, layers, chains, level)
    left = min((places[key] - _width(key) / 2 for key in places), default=0.0)
    x = {key: round(place - left) + _MARGIN for key, place in places.items()}
    right = max((x[key] + _width(key) / 2 for key in x), default=0.0)
    corners = tuple((x[i, -1] - WIDTH // 2, level[i] * _STEP + _MARGIN) for i in range(len(inputs)))
    ports = _ports(chains, x)
    edges = tuple(Edge(s, t, _path(chain, x, level, ports[s, t])) for (s, t), chain in chains.items())
    return Picture(round(right) + _MARGIN, max(count - 1, 0) * _STEP + HEIGHT + 2 * _MARGIN, corners, edges)


def _width(key: _Key) -> int:
    return WIDTH + _GAP if key[1] < 0 else _BEND


def _levels(graph: nx.DiGraph, most: int) -> tuple[dict[int, int], int]:
    """The layer of each node, counted from the top, and the number of layers. From the bottom up each layer takes the nodes whose readers
    are all below it, first those with the longest way up; what finds no room comes above."""
    depth: dict[int, int] = {}  # the longest way to an input
    for node in nx.topological_sort(graph):
        depth[node] = max((depth[above] + 1 for above in graph.predecessors(node)), default=0)
    waiting = {node: graph.out_degree(node) for node in graph}
    ready = [node for node in graph if not waiting[node]]
    from_below: dict[int, int] = {}
    count = 0
    while ready:
        ready.sort(key=lambda node: (-depth[node], -node))
        chosen, ready = ready[:most], ready[most:]
        for node in chosen:
            from_below[node] = count
            for above in graph.predecessors(node):
                waiting[above] -= 1
                if not waiting[above]:
                    ready.append(above)
        count += 1
    return {node: count - 1 - layer for node, layer in from_below.items()}, count


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
    half = max((sum(map(_width, layer)) for layer in layers), default=0) / 2

    def sweep(upwards: bool, sort: bool) -> None:
        for layer in reversed(layers) if upwards else layers:
            desired = {
                key: sum(places[n] for n in near) / len(near) if (near := neighbours[key]) else places[key]
                for key in layer
            }
            if sort:
                layer.sort(key=desired.__getitem__)
            places.update(_apart(layer, desired, half))

    best = _crossings(layers, neighbours), [list(layer) for layer in layers], dict(places)
    for number in range(_SWEEPS):
        sweep(number % 2 == 0, sort=True)
        crossings = _crossings(layers, neighbours)
        if crossings <= best[0]:
            best = crossings, [list(layer) for layer in layers], dict(places)
    layers[:], places = best[1], best[2]
    for number in range(_LAST_SWEEPS):
        sweep(number % 2 == 0, sort=False)
    return places


def _crossings(layers: list[list[_Key]], neighbours: dict[_Key, list[_Key]]) -> int:
    """How often lines between adjacent layers cross."""
    count = 0
    for upper, lower in pairwise(layers):
        index = {key: i for i, key in enumerate(lower)}
        ends: list[int] = []  # of the lines so far, in order
        for key in upper:
            new = sorted(index[n] for n in neighbours[key] if n in index)
            count += sum(len(ends) - bisect_right(ends, end) for end in new)
            for end in new:
                insort(ends, end)
    return count


def _apart(layer: list[_Key], desired: dict[_Key, float], half: float) -> dict[_Key, float]:
    """Positions as near to the desired ones as the order and the widths allow: the mean of pushing right and pushing left. No layer
    reaches further from the middle than the widest one."""
    sides: list[list[float]] = []
    for members, sign in ((layer, 1), (layer[::-1], -1)):
        room = sum(map(_width, members))
        edge = -half
        pushed = []
        for key in members:
            room -= _width(key)
            place = max(sign * desired[key], edge + _width(key) / 2)
            place = min(place, half - room - _width(key) / 2)
            pushed.append(sign * place)
            edge = place + _width(key) / 2
        sides.append(pushed if sign > 0 else pushed[::-1])
    return {key: (right + left) / 2 for key, right, left in zip(layer, *sides)}


def _straighten(
    places: dict[_Key, float],
    layers: list[list[_Key]],
    chains: dict[tuple[int, int], list[_Key]],
    level: dict[int, int],
) -> None:
    """Move what follows each other onto as few vertical lines as the boxes beside it allow: first the nodes of the longest ways through
    the graph, then the positions at which the edges of a node pass layers."""
    left = min((places[key] - _width(key) / 2 for key in places), default=0.0)
    right = max((places[key] + _width(key) / 2 for key in places), default=0.0)
    index = {key: (layer, i) for layer in layers for i, key in enumerate(layer)}

    def room(key: _Key) -> tuple[float, float]:
        layer, i = index[key]
        low = places[layer[i - 1]] + _width(layer[i - 1]) / 2 if i else left
        high = places[layer[i + 1]] - _width(layer[i + 1]) / 2 if i + 1 < len(layer) else right
        return low + _width(key) / 2, high - _width(key) / 2

    def align(line: list[_Key], wanted: float | None) -> None:
        """``wanted``: where the line begins; None for its mean."""
        while line:
            low, high = left, right
            run: list[_Key] = []
            for key in line:
                from_, to = room(key)
                if run and max(low, from_) > min(high, to):
                    break
                run.append(key)
                low, high = max(low, from_), min(high, to)
            middle = sum(places[key] for key in run) / len(run) if wanted is None else wanted
            place = min(max(middle, low), high)
            places.update(dict.fromkeys(run, place))
            line = line[len(run) :]
            wanted = None if wanted is None else place

    for line in _lines(chains, level):
        align([(node, -1) for node in line], None)
    trunks: dict[int, dict[_Key, None]] = {}
    for (source, _), chain in chains.items():
        trunks.setdefault(source, {}).update(dict.fromkeys(chain[1:-1]))
    for source, trunk in trunks.items():
        align(sorted(trunk, key=lambda key: key[1]), places[source, -1])


def _lines(chains: dict[tuple[int, int], list[_Key]], level: dict[int, int]) -> list[list[int]]:
    """Nodes of adjacent layers that feed each other, from the bottom, each in one line at most; the longest lines first."""
    above: dict[int, list[int]] = {node: [] for node in level}
    for source, target in chains:
        if level[source] + 1 == level[target]:
            above[target].append(source)
    length: dict[int, int] = {}
    for node in sorted(level, key=lambda n: (level[n], n)):
        length[node] = 1 + max((length[source] for source in above[node]), default=0)
    free = set(level)
    lines: list[list[int]] = []
    for end in sorted(level, key=lambda n: (-length[n], -level[n], n)):
        line: list[int] = []
        following = [end] if end in free else []
        while following:
            line.append(max(following, key=lambda n: (length[n], -n)))
            free.discard(line[-1])
            following = [n for n in above[line[-1]] if n in free]
        if len(line) > 1:
            lines.append(line)
    return sorted(lines, key=len, reverse=True)


def _ports(chains: dict[tuple[int, int], list[_Key]], x: dict[_Key, int]) -> dict[tuple[int, int], int]:
    """Where each edge ends on the upper side of its target: beside each other, in the order in which they come; one that comes straight
    from above ends in the middle."""
    into: dict[int, list[tuple[int, int]]] = {}
    for edge in chains:
        into.setdefault(edge[1], []).append(edge)
    ports = {}
    for target, edges in into.items():
        edges.sort(key=lambda edge: (x[chains[edge][-2]], edge))
        between = min(_PORT, (WIDTH - 2 * _PORT) // max(len(edges) - 1, 1))
        straight = [i for i, edge in enumerate(edges) if abs(x[chains[edge][-2]] - x[target, -1]) <= 1]
        middle = straight[0] if straight and len(edges) < 5 else (len(edges) - 1) / 2
        for i, edge in enumerate(edges):
            ports[edge] = x[target, -1] + round((i - middle) * between)
    return ports


def _path(chain: list[_Key], x: dict[_Key, int], level: dict[int, int], port: int) -> str:
    """From the bottom of the first box, down through the layers that it passes, to an arrow head on the top of the last."""
    (first, _), (last, _) = chain[0], chain[-1]
    y, end = level[first] * _STEP + HEIGHT + _MARGIN, level[last] * _STEP + _MARGIN
    x_now = x[chain[0]]
    text = f"M{x_now} {y}"
    for key in chain[1:]:
        inside = key[1] >= 0
        next_x, stop = (x[key], key[1] * _STEP + _MARGIN) if inside else (port, end)
        if next_x != x_now:
            middle = (y + stop) // 2
            text += f"C{x_now} {middle} {next_x} {middle} {next_x} {stop - (0 if inside else 3)}"
        y = stop + HEIGHT if inside else stop
        text += f"V{y}"
        x_now = next_x
    return f"{text}m-4 -7l4 7l4 -7"
