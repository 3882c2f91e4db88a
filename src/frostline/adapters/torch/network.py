"""The graph of a torch module in both phases, as far as ``torch.fx`` can follow it.

A module reads ``self.training`` while it is traced, so that one trace holds for one phase. Here it
is traced in both; where only arguments differ (``dropout(x, training=self.training)``), both sets
are kept. What cannot be followed, or is another graph in training, is kept whole as one call.

This room reads only: modes and flags are put back.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from frostline.adapters.torch.graph import modes_kept, unwrapped
from frostline.adapters.torch.trace import Tracer
from frostline.types import ModelError
from frostline.types.reasons import first_line

#: Classes whose subclasses, a convolution that pads in its own way for example, are one call.
_ONE_CALL = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
Modes = Mapping[Any, bool]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A traced module.

    Attributes:
        root: The module, without wrappers.
        graph: Its graph at inference.
        training: Node -> ``(args, kwargs)`` in training, where they are others than at inference.
        modes: Module -> its mode in a training step.
        whole: Name of each module that is kept whole -> why.
        varying: Names of those that are another graph in training than at inference.
    """

    root: Any
    graph: Any
    training: Mapping[Any, tuple[Any, Any]]
    modes: Modes
    whole: Mapping[str, str]
    varying: frozenset[str]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The nodes of the model inputs."""
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def calls(self) -> tuple[Any, ...]:
        """All other nodes but the output, in execution order."""
        nodes = self.graph.nodes
        return tuple(node for node in nodes if node.op not in ("placeholder", "output"))

    @property
    def output(self) -> Any:
        """The node that returns."""
        return next(node for node in self.graph.nodes if node.op == "output")

    def module(self, node: Any) -> Any | None:
        """The module that a node calls, if it calls one."""
        return self.root.get_submodule(node.target) if node.op == "call_module" else None

    def modules(self, node: Any) -> tuple[Any, ...]:
        """The module that a node calls and all that is in it."""
        module = self.module(node)
        return () if module is None else tuple(module.modules())

    def arguments(self, node: Any, *, training: bool) -> tuple[Any, Any]:
        """``(args, kwargs)`` of a node in a phase."""
        own = (node.args, node.kwargs)
        return self.training.get(node, own) if training else own

    def run(self, node: Any, values: Mapping[Any, Any], *, training: bool) -> Any:
        """Compute one node; modules run in the modes that they are in."""
        given = self.arguments(node, training=training)
        args, kwargs = fx.node.map_arg(given, lambda each: values[each])
        if node.op == "get_attr":
            return attribute(self.root, node.target)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        operation: Any = self.module(node) if node.op == "call_module" else node.target
        return operation(*args, **kwargs)

    def name(self, node: Any) -> str:
        """Path of the module that a node calls; of a function, that of the module it is in."""
        if node.op in ("call_module", "get_attr"):
            return str(node.target).replace(".", "/")
        owner = owner_of(node)
        return f"{owner.replace('.', '/')}/{node.name}" if owner else str(node.name)


def attribute(root: Any, name: str) -> Any:
    """A tensor or module by its dotted name."""
    return functools.reduce(getattr, name.split("."), root)


def owner_of(node: Any) -> str:
    """Dotted name of the innermost module in whose ``forward`` a node was made; "" for the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def training_modes(model: Any) -> Modes:
    """Mode of each module in a training step.

    As they are now where the model is in training mode; else as its own ``train()`` leaves them.
    """
    root = unwrapped(model)
    with modes_kept(root):
        if not root.training:
            root.train()
        return {module: bool(module.training) for module in root.modules()}


@contextmanager
def phase(modules: Any, modes: Modes | None) -> Iterator[None]:
    """Put modules into the modes of a phase (``None``: inference) for a while."""
    before = [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = modes is not None and modes[module]
        yield
    finally:
        for module, mode in before:
            module.training = mode


def network(model: Any) -> Network:
    """Trace a module in both phases.

    Raises:
        ModelError: ``torch.fx`` cannot follow the ``forward`` of the model itself, or that is
            another graph in training than at inference.
    """
    root = unwrapped(model)
    modes = training_modes(model)
    whole: dict[str, str] = {}
    varying: set[str] = set()
    while True:
        graph = followed(root, None, whole)
        other = followed(root, modes, whole)
        place = _first_difference(graph, other)
        if place is None:
            break
        if place == "":
            raise ModelError(
                f"{type(root).__name__}.forward is another graph in training than at inference "
                "(it asks self.training which modules to call), so it has no one graph to cut. "
                "Move what only training does into a module of its own. "
                f"Received: {type(root).__name__}"
            )
        whole.setdefault(place, "it calls other things in training than at inference")
        varying.add(place)
    training = {
        node: _translated(twin, graph, other)
        for node, twin in zip(graph.nodes, other.nodes, strict=True)
        if not _alike((node.args, node.kwargs), (twin.args, twin.kwargs))
    }
    return Network(
        root=root,
        graph=graph,
        training=training,
        modes=modes,
        whole=whole,
        varying=frozenset(varying),
    )


class _Tracer(Tracer):
    """Keeps some modules whole, and remembers whose ``forward`` raised."""

    def __init__(self, whole: Mapping[str, str]) -> None:
        super().__init__()
        self.whole = whole
        self.failed: str | None = None

    def is_leaf_module(self, module: Any, name: str) -> bool:
        hooked = module._forward_hooks or module._forward_pre_hooks  # tracing would leave them out
        if name in self.whole or hooked or isinstance(module, _ONE_CALL):
            return True
        return bool(super().is_leaf_module(module, name))

    def call_module(self, module: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(module)
            raise


def followed(root: Any, modes: Modes | None, whole: dict[str, str]) -> Any:
    """The graph in one phase; modules that cannot be followed are added to ``whole``."""
    kind = type(root).__name__
    while True:
        tracer = _Tracer(whole)
        reason, moved = "", None
        with _buffers_kept(root) as changed, modes_kept(root), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with phase(list(root.modules()), modes):
                    graph = tracer.trace(root, _defaults(root))
            except Exception as problem:  # whatever the model's own code raises on a stand-in
                reason = first_line(problem)
            moved = changed()
        if not reason and moved is None:
            return _without_defaults(graph, root)
        owner = tracer.failed if reason else (moved or "").rpartition(".")[0]
        reason = reason or f"it changes its buffer {moved!r} in training"
        if not owner:
            raise ModelError(
                f"torch.fx cannot follow {kind}.forward ({reason}), so there is no graph to cut. "
                "Move that code into a module of its own: one that cannot be followed is kept "
                f"whole. Received: {kind}"
            )
        whole[owner] = reason


@contextmanager
def _buffers_kept(root: Any) -> Iterator[Callable[[], str | None]]:
    """Put buffers back on any exit; what is yielded names one that moved."""
    before = [
        (name, buffer, buffer.clone())
        for name, buffer in root.named_buffers()
        if not isinstance(buffer, nn.parameter.UninitializedTensorMixin)
    ]

    def moved() -> str | None:
        return next((name for name, now, was in before if not torch.equal(now, was)), None)

    try:
        yield moved
    finally:
        if moved() is not None:
            with torch.no_grad():
                for _, buffer, value in before:
                    buffer.copy_(value)


def _defaults(root: Any) -> dict[str, Any]:
    """Arguments of ``forward`` that need not be given; the graph is that of calls without them."""
    parameters = inspect.signature(root.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _without_defaults(graph: Any, root: Any) -> Any:
    """Take out the inputs that are constants now, and the assertions that they are."""
    names = list(_defaults(root))
    gone: list[Any] = []
    for node in graph.nodes:
        default = node.op == "placeholder" and node.target.rpartition("_")[0] in names
        if default or (gone and any(each in gone for each in node.all_input_nodes)):
            gone.append(node)
    for node in reversed(gone):
        graph.erase_node(node)
    return graph


def _first_difference(graph: Any, other: Any) -> str | None:
    """Name of the module whose calls differ first; ``None``: they are the same."""
    pairs = list(zip(graph.nodes, other.nodes, strict=False))
    for one, two in pairs:
        nodes = [each.name for each in one.all_input_nodes], [n.name for n in two.all_input_nodes]
        if (one.op, str(one.target)) != (two.op, str(two.target)) or nodes[0] != nodes[1]:
            return owner_of(two) if two.op != "output" else owner_of(one)
    return None if len(graph.nodes) == len(other.nodes) else ""


def _alike(one: Any, other: Any) -> bool:
    """Whether two argument structures are the same, nodes by their names."""
    if isinstance(one, fx.Node) or isinstance(other, fx.Node):
        return isinstance(one, fx.Node) and isinstance(other, fx.Node) and one.name == other.name
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return type(one) is type(other) and bool(one == other)


def _translated(twin: Any, graph: Any, other: Any) -> tuple[Any, Any]:
    """Arguments of a node of the other graph, in nodes of this one."""
    mine = dict(zip(other.nodes, graph.nodes, strict=True))
    found: tuple[Any, Any] = fx.node.map_arg((twin.args, dict(twin.kwargs)), lambda n: mine[n])
    return found
