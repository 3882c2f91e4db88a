"""Smallest cut: where to separate a graph so that the least has to cross. Pure Python integers."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping


def later_cut(
    edges: Mapping[tuple[Hashable, Hashable], int], source: Hashable, sink: Hashable
) -> frozenset[Hashable]:
    """The source's side of a smallest cut; of several, the one that is closest to the sink.

    The value of a cut is the sum of the capacities of the edges that lead from the source's side to
    the other one; the least of them is the largest flow (Ford and Fulkerson 1956). The flow is
    found along shortest augmenting paths (Edmonds and Karp 1972), so it ends after at most
    ``nodes * edges`` of them whatever the capacities are.

    Args:
        edges: ``(from, to)`` -> capacity, an integer of any size that is not negative.
        source: Node that is on the one side.
        sink: Node that is on the other side.

    Returns:
        Every node that cannot reach the sink any more once the flow is at its largest.
    """
    left: dict[Hashable, dict[Hashable, int]] = {source: {}, sink: {}}
    for (start, end), capacity in edges.items():
        ahead, back = left.setdefault(start, {}), left.setdefault(end, {})
        ahead[end] = ahead.get(end, 0) + capacity
        back.setdefault(start, 0)
    while (path := _shortest(left, source, sink)) is not None:
        amount = min(left[start][end] for start, end in path)
        for start, end in path:
            left[start][end] -= amount
            left[end][start] += amount
    reaching = _reaching(left, sink)
    return frozenset(node for node in left if node not in reaching)


def _shortest(
    left: Mapping[Hashable, Mapping[Hashable, int]], source: Hashable, sink: Hashable
) -> list[tuple[Hashable, Hashable]] | None:
    """A shortest path with room on every edge, as a list of edges."""
    before: dict[Hashable, Hashable] = {source: source}
    waiting = deque([source])
    while waiting and sink not in before:
        node = waiting.popleft()
        for neighbour, room in left[node].items():
            if room > 0 and neighbour not in before:
                before[neighbour] = node
                waiting.append(neighbour)
    if sink not in before:
        return None
    path, node = [], sink
    while node != source:
        path.append((before[node], node))
        node = before[node]
    return path


def _reaching(
    left: Mapping[Hashable, Mapping[Hashable, int]], sink: Hashable
) -> frozenset[Hashable]:
    """Nodes from which a path with room leads to the sink."""
    found = {sink}
    waiting = deque([sink])
    while waiting:
        node = waiting.popleft()
        for neighbour in left[node]:  # every edge has its reverse, so these are all before `node`
            if neighbour not in found and left[neighbour][node] > 0:
                found.add(neighbour)
                waiting.append(neighbour)
    return frozenset(found)
