"""The graph of a torch module in both phases, as far as ``torch.fx`` can follow it.

A module reads ``self.training`` while it is traced, so that one trace holds for one phase. Here it
is traced in both, and the nodes that do the same in both are matched. A module that cannot be
followed, or calls other things in training than at inference, is kept whole as one call; where the
model itself does so (an auxiliary head that only training uses), both graphs are kept.

This room reads only: modes and flags are put back.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from frostline.adapters.torch.graph import is_site, modes_kept, unwrapped
from frostline.adapters.torch.state_kept import same_values, state_kept
from frostline.adapters.torch.surroundings import modes as modes_around
from frostline.atomic import Guard, taken_back
from frostline.types import ModelError
from frostline.types.reasons import first_line

#: Classes whose subclasses, a convolution that pads in its own way for example, are one call.
_ONE_CALL: tuple[Any, ...] = (
    nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention,
    torch.jit.ScriptModule,  # one that cannot be read
)  # fmt: skip
Modes = Mapping[Any, bool]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A traced module.

    Attributes:
        root: The module, without wrappers.
        graph: Its graph at inference.
        other: Its graph in training.
        twins: Node of ``graph`` -> the node of ``other`` that does the same, up to constants.
        modes: Module -> its mode in a training step.
        whole: Name of each module that is kept whole -> why.
        varying: Names of those that are another graph in training than at inference.
    """

    root: Any
    graph: Any
    other: Any
    twins: Mapping[Any, Any]
    modes: Modes
    whole: Mapping[str, str]
    varying: frozenset[str]

    @functools.cached_property
    def phased(self) -> Mapping[Any, tuple[Any, Any]]:
        """Node -> its arguments in training, where these are others than at inference."""
        mine = {twin: node for node, twin in self.twins.items()}
        return {
            node: fx.node.map_arg((twin.args, dict(twin.kwargs)), lambda each: mine[each])
            for node, twin in self.twins.items()
            if not _alike((node.args, node.kwargs), (twin.args, twin.kwargs), self.twins)
        }

    @property
    def in_training_only(self) -> tuple[Any, ...]:
        """Nodes of the graph in training that have no counterpart at inference."""
        known = set(self.twins.values())
        return tuple(n for n in self.other.nodes if n not in known and n.op != "output")

    @property
    def phases_differ(self) -> bool:
        """Whether training is another graph than inference, or has other arguments."""
        same = len(self.twins) == len(self.graph.nodes) == len(self.other.nodes)
        return not same or bool(self.phased)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The nodes of the model inputs."""
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def calls(self) -> tuple[Any, ...]:
        """All other nodes but the output, in execution order."""
        nodes = self.graph.nodes
        return tuple(node for node in nodes if node.op not in ("placeholder", "output"))

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
        return self.phased.get(node, own) if training else own

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

    def back() -> None:
        for module, mode in before:
            module.training = mode

    with taken_back(back):
        for module, _ in before:
            module.training = modes is not None and modes[module]
        yield


def network(model: Any, given: Collection[str] | None = None) -> Network:
    """Trace a module in both phases.

    Args:
        model: A torch module.
        given: Names of the arguments of ``forward`` that are given; others keep their defaults.

    Raises:
        ModelError: ``torch.fx`` cannot follow the ``forward`` of the model itself.
    """
    root = unwrapped(model)
    modes = training_modes(model)
    whole: dict[str, str] = {}
    varying: set[str] = set()
    while True:
        graph = followed(root, None, whole, given)
        known = set(whole)
        other = followed(root, modes, whole, given)
        if found := whole.keys() - known:  # in training only
            varying |= found
            continue
        owners = _differing(graph, other) - whole.keys() - {""}
        if not owners:
            break
        whole.update(dict.fromkeys(owners, "it calls other things in training than at inference"))
        varying |= owners
    return Network(
        root=root,
        graph=graph,
        other=other,
        twins=_twins(graph, other),
        modes=modes,
        whole=whole,
        varying=frozenset(varying),
    )


def input_names(model: Any, sample: Any = None) -> frozenset[str]:
    """Arguments of ``forward`` that a sample gives, and those that have no default."""
    kinds = inspect.Parameter
    parameters = [
        p for p in inspect.signature(unwrapped(model).forward).parameters.values()
        if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    ]  # fmt: skip
    names = [p.name for p in parameters]
    required = {p.name for p in parameters if p.default is kinds.empty}
    if isinstance(sample, Mapping):
        return frozenset(required.union(name for name in names if sample.get(name) is not None))
    count = len(sample) if isinstance(sample, (tuple, list)) else 0 if required else 1
    return frozenset(required.union(names[:count]))


class _Tracer(fx.Tracer):  # type: ignore[misc]
    """Keeps sites and some modules whole, and remembers whose ``forward`` raised."""

    def __init__(self, whole: Mapping[str, str]) -> None:
        super().__init__()
        self.whole = whole
        self.failed: str | None = None

    def is_leaf_module(self, module: Any, name: str) -> bool:
        hooked = module._forward_hooks or module._forward_pre_hooks  # tracing would leave them out
        if name in self.whole or hooked or is_site(module) or isinstance(module, _ONE_CALL):
            return True
        return bool(super().is_leaf_module(module, name))

    def create_arg(self, value: Any) -> Any:
        """Let a mapping stay of its class, which ``torch.fx`` would make a ``dict``."""
        kind = type(value)
        if isinstance(value, Mapping) and kind is not dict and all(map(_is_name, value)):
            fields = {key: self.create_arg(item) for key, item in value.items()}
            return self.create_node("call_function", kind, (), fields)
        return super().create_arg(value)

    def call_module(self, module: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(module)
            raise


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier()


def followed(
    root: Any, modes: Modes | None, whole: dict[str, str], given: Collection[str] | None = None
) -> Any:
    """The graph in one phase; modules that cannot be followed are added to ``whole``."""
    given = input_names(root) if given is None else given
    kind = type(root).__name__
    while True:
        tracer = _Tracer(whole)
        reason, moved = "", None
        known, constants = set(vars(root)), dict[str, Any]()
        with _state_kept(root) as changed, modes_kept(root), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with phase(list(root.modules()), modes):
                    trace = functools.partial(tracer.trace, root, _defaults(root, given))
                    graph = Guard(modes_around()).over(trace)
                read = {node.target for node in graph.nodes if node.op == "get_attr"}
                constants = {k: v for k, v in vars(root).items() if k in read - known}
            except Exception as problem:  # whatever the model's own code raises on a stand-in
                reason = first_line(problem)
            moved = changed()
        if not reason and moved is None:
            vars(root).update(constants)  # tensors that forward made and the graph reads
            return _without_defaults(graph, _defaults(root, given))
        owner = tracer.failed if reason else (moved or "").rpartition(".")[0]
        reason = reason or f"it changes its buffer {moved!r} in training"
        if not owner or owner in whole:  # it is whole already, which did not help
            raise ModelError(
                f"torch.fx cannot follow {kind}.forward ({reason}), so there is no graph to cut. "
                "Move that code into a module of its own: one that cannot be followed is kept "
                f"whole. Received: {kind}"
            )
        whole[owner] = reason


@contextmanager
def _state_kept(root: Any) -> Iterator[Callable[[], str | None]]:
    """Put back what modules keep, on any exit; what is yielded names a buffer that moved.

    What ``forward`` keeps or registers while it is traced is no tensor but a stand-in.
    """
    before = [
        (name, buffer, buffer.clone())
        for name, buffer in root.named_buffers()
        if not isinstance(buffer, nn.parameter.UninitializedTensorMixin)
    ]

    def moved() -> str | None:
        return next((name for name, now, was in before if not same_values(now, was)), None)

    with taken_back(state_kept([*root.modules()])):
        yield moved


def _defaults(root: Any, given: Collection[str]) -> dict[str, Any]:
    """Arguments of ``forward`` that are not given; the graph is that of calls without them."""
    parameters = inspect.signature(root.forward).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.default is not inspect.Parameter.empty and p.name not in given
    }


def _without_defaults(graph: Any, names: Collection[str]) -> Any:
    """Take out the inputs that are constants now, and the assertions that they are."""
    gone: list[Any] = []
    for node in graph.nodes:
        default = node.op == "placeholder" and node.target.rpartition("_")[0] in names
        if default or (gone and any(read in gone for read in node.all_input_nodes)):
            gone.append(node)
    for node in reversed(gone):
        graph.erase_node(node)
    return graph


def _twins(graph: Any, other: Any) -> dict[Any, Any]:
    """Node -> the node of the other graph that calls the same on the same inputs."""
    waiting: dict[Any, list[Any]] = {}
    for node in other.nodes:
        key = (node.op, str(node.target), tuple(node.all_input_nodes))
        waiting.setdefault(key, []).append(node)
    found: dict[Any, Any] = {}
    for node in graph.nodes:
        reads = tuple(found.get(read) for read in node.all_input_nodes)
        same = waiting.get((node.op, str(node.target), reads), [])
        if same and _alike_in_kind(node, same[0]):
            found[node] = same.pop(0)
    return found


def _alike_in_kind(node: Any, twin: Any) -> bool:
    """Whether both have as many arguments, by the same names."""
    return len(node.args) == len(twin.args) and node.kwargs.keys() == twin.kwargs.keys()


def _differing(graph: Any, other: Any) -> set[str]:
    """Names of the modules whose ``forward`` makes other calls in one graph than in the other.

    How many calls is not asked: the model may call the whole module once more in training.
    """

    def calls(each: Any) -> set[tuple[str, str, str]]:
        return {(_caller(n), n.op, str(n.target)) for n in each.nodes if n.op != "output"}

    return {caller for caller, _, _ in calls(graph) ^ calls(other)}


def _caller(node: Any) -> str:
    """Name of the module in whose ``forward`` a node was made; "" for the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    stack = stack[:-1] if node.op == "call_module" else stack  # it ends with the called module
    return str(stack[-1][0]) if stack else ""


def _alike(one: Any, other: Any, twins: Mapping[Any, Any]) -> bool:
    """Whether two argument structures are the same, nodes by their twins."""
    if isinstance(one, fx.Node) or isinstance(other, fx.Node):
        return isinstance(one, fx.Node) and twins.get(one) is other
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(
            _alike(a, b, twins) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[k], other[k], twins) for k in one)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return type(one) is type(other) and bool(one == other)
