"""Smallest cut: where to separate a graph so that the least has to cross. Pure Python integers.

:func:`later_cut` is the algorithm; :func:`smallest` poses the question for a model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence

from frostline.graph.purity import Graph, Node, Value
from frostline.types import ModelError


class NothingToStoreError(ModelError):
    """Caching the frozen part of a model would not pay, or cannot be done sample by sample."""


def smallest(
    graph: Graph,
    pure: Sequence[Node],
    sizes: Mapping[Value, int],
    uncuttable: Collection[Value],
    *,
    forced: bool,
) -> list[Node]:
    """The pure nodes that stay in the prefix so that the fewest bytes cross.

    A node with real work stays; one that is light moves behind the frontier where that makes it
    smaller, for example a ReLU whose input crosses as well. Values that must not be cut (with a
    mask, or whose rows are not the samples) cost more than all work, so that whatever stands
    between them and the inputs moves too.

    Args:
        graph: The model.
        pure: Its pure nodes.
        sizes: Value -> bytes of one sample; of the inputs and of all that pure nodes write.
        uncuttable: Values that cannot be stored sample by sample.
        forced: The user said where to cut: whatever is light stays, too.

    Raises:
        NothingToStoreError: Not forced, and nothing that stays holds weights.
    """
    usable = [node for node in pure if not node.constant]
    home: dict[Value, Hashable] = dict.fromkeys(graph.inputs, "source")
    home.update({value: id(node) for node in usable for value in node.writes})
    work = sum(sizes[value] for value in home) + 1
    never = work * (len(graph.nodes) + 1)
    unlimited = never * (len(home) + 2)
    edges: dict[tuple[Hashable, Hashable], int] = {}
    for value, producer in home.items():
        edges[producer, ("value", value)] = never if value in uncuttable else sizes[value]
    inside = {id(node) for node in usable}
    for node in graph.nodes:
        if node.constant:
            continue
        reader: Hashable = id(node) if id(node) in inside else "sink"
        reads = [value for value in node.reads if value in home]
        for value in reads:
            edges[("value", value), reader] = unlimited  # a reader behind the cut pays for it
        if reader != "sink":
            # Everything that a node before the cut reads is computed before it, too.
            edges.update({(reader, home[value]): unlimited for value in reads})
            edges["source", reader] = work if forced or not node.light else 0
    for value in graph.outputs:
        if value in home:
            edges[("value", value), "sink"] = unlimited
    kept = later_cut(edges, "source", "sink")
    found = [node for node in usable if id(node) in kept]
    if not forced and not any(node.weights for node in found):
        raise NothingToStoreError(
            "nothing is worth storing: the frozen part is light to compute and its inputs are "
            "smaller than its outputs, or its outputs cannot be stored sample by sample. Freeze "
            f"more of the model. Received: {graph.received}"
        )
    return found


def frontier(graph: Graph, inside: Sequence[Node]) -> list[Value]:
    """Values that the rest of the model reads, in the order in which they are computed."""
    ours = {id(node) for node in inside}
    behind = [node for node in graph.nodes if id(node) not in ours and not node.constant]
    read = {value for node in behind for value in node.reads} | set(graph.outputs)
    known = [*graph.inputs, *(value for node in inside for value in node.writes)]
    return [value for value in known if value in read]


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
