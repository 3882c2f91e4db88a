"""The two parts of a split torch module, as modules: the frozen one and the one that trains.

Both hold the model's own modules and parameters, under the names that they have in the model.
Saved, they are plain graph modules of torch, and loading one needs no Frostline.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module
from torch.nn import functional

from frostline.adapters.torch.graph import is_site
from frostline.adapters.torch.locked import EXACT, is_locked
from frostline.adapters.torch.network import Network, attribute, phase

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Part(fx.GraphModule):  # type: ignore[misc]
    """A part of a model; it holds the model's own modules under their own names."""

    @property
    def layers(self) -> Any:
        """The modules that it calls, in order; the model's own module of this name, if any."""
        return self._modules.get("layers") or self.called_modules()

    def called_modules(self) -> tuple[Any, ...]:
        """The modules that it calls, in order."""
        other = self.__dict__.get("_in_training", ())
        nodes = [node for graph in (self, *other) for node in graph.graph.nodes]
        names = dict.fromkeys(node.target for node in nodes if node.op == "call_module")
        return tuple(self.get_submodule(name) for name in names)

    def __reduce__(self) -> Any:
        """As a plain graph module that shares all tensors."""
        return self._plain().__reduce__()

    def _plain(self) -> Any:
        return _plain(self, self.graph, always=True)


class Prefix(_Part):
    """The frozen part: model inputs -> frontier, one tensor or a tuple of them.

    It computes what the model computes at inference, in whatever mode it is.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in inference; modes are put back."""
        with phase(list(self.modules()), None):
            return super().__call__(*args, **kwargs)

    def __reduce__(self) -> Any:
        """As a plain graph module; for a process that has Frostline, as what it is."""
        if not EXACT.get():
            return super().__reduce__()
        return _prefix_again, fx.GraphModule.__reduce__(self)[1]


def _prefix_again(body: dict[str, Any], imports: str) -> Any:
    made: Any = reduce_graph_module(body, imports)
    return Prefix(made, made.graph)


class Suffix(_Part):
    """The rest: frontier -> the model's outputs. ``train()`` and ``eval()`` are the model's own.

    A model may override ``train``, to keep some of its BN layers in inference; so the suffix asks
    the model, which sets the modes of the modules that both hold. Where training is another graph
    than inference, the suffix has both, and the mode of the model says which one runs.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the phase that the model is in."""
        other = self._other
        if other is not None and self._model.training:
            return other(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the whole model, and of what is the suffix' own."""
        super().train(mode)
        if self._model is not self:
            self._model.train(mode)
        return self

    @property
    def _model(self) -> Any:
        """The model; a copy of the suffix knows none and is its own. In a tuple: no submodule."""
        return self.__dict__.get("_whole", (self,))[0]

    @property
    def _other(self) -> Any:
        """The graph in training as a module, where it is another one."""
        return self.__dict__.get("_in_training", (None,))[0]

    def __deepcopy__(self, memo: Any) -> Any:
        """Copy without the model."""
        own = [name for name in ("_whole", "_in_training") if name in self.__dict__]
        kept: dict[str, Any] = {name: self.__dict__.pop(name) for name in own}
        try:
            made = super().__deepcopy__(memo)
        finally:
            self.__dict__.update(kept)
        made.training = self._model.training
        if self._other is not None:
            other = copy.deepcopy(self._other, memo)
            _attach(made, other.graph)
            for name in _targets(other.graph):
                _hold(made, name, attribute(other, name))
        return made

    def _plain(self) -> Any:
        other = self._other
        if other is None:
            return _plain(self, self.graph)
        if self.__dict__.get("_drops_only"):
            return _plain(self, self.graph, drops=_told_drops(self.graph, other.graph))
        training = bool(self._model.training)
        warnings.warn(
            "training is another graph than inference in this model: what is saved of the suffix "
            f"is its graph {'in training' if training else 'at inference'}, the mode that it is in",
            stacklevel=4,
        )
        return _plain(self, other.graph if training else self.graph)


def _told_drops(graph: Any, other: Any) -> frozenset[str]:
    """Names of the calls of ``dropout`` that get another phase in the other graph."""
    return frozenset(
        one.name
        for one, two in zip(graph.nodes, other.nodes, strict=True)
        if one.target is functional.dropout
        and (one.args[1:], one.kwargs) != (two.args[1:], two.kwargs)
    )


def build(
    net: Network, inside: Sequence[Any], crossing: Sequence[Any], constant: frozenset[Any]
) -> tuple[Prefix, Suffix]:
    """Make both parts.

    Args:
        net: The traced model.
        inside: The nodes of the prefix, in order.
        crossing: The nodes whose values cross, in order; the suffix takes them as arguments.
        constant: Nodes of either graph that either part makes itself.
    """
    front = _Writer(constant)
    for node in net.inputs:
        front.copy(node)
    for node in inside:
        front.copy(node)
    leaves = tuple(front.known[node] for node in crossing)
    front.graph.output(leaves[0] if len(leaves) == 1 else leaves)
    name = type(net.root).__name__
    prefix = Prefix(_held(net, front.graph), front.graph, class_name=f"{name}Prefix")
    back = _behind(net.graph, inside, crossing, constant)
    suffix = Suffix(_held(net, back), back, class_name=f"{name}Suffix")
    if net.phases_differ:
        ours, cut = ([net.twins[node] for node in nodes] for nodes in (inside, crossing))
        other = _behind(net.other, ours, cut, constant)
        for target, value in _held(net, other).items():
            _hold(suffix, target, value)
        _attach(suffix, other)
        matched = len(net.twins) == len(net.graph.nodes) == len(net.other.nodes)
        drops = all(node.target is functional.dropout for node in net.phased)
        suffix.__dict__["_drops_only"] = matched and drops
    for part, mode in ((prefix, False), (suffix, net.root.training)):
        for module in part.modules():
            if module not in net.modes:  # the containers that are the part's own
                module.training = mode
    suffix.__dict__["_whole"] = (net.root,)
    return prefix, suffix


def _behind(
    graph: Any, inside: Sequence[Any], crossing: Sequence[Any], constant: frozenset[Any]
) -> Any:
    """The graph behind the frontier, in one phase."""
    back, ours = _Writer(constant), set(inside)
    for number, node in enumerate(crossing):
        back.known[node] = back.graph.placeholder(f"frontier_{number}")
    back.rows = back.known[crossing[0]]
    for node in graph.nodes:
        if node.op == "output":
            back.graph.output(fx.node.map_arg(node.args[0], back.value))
        elif node.op != "placeholder" and node not in ours and node not in constant:
            back.copy(node)
    return back.graph


class _Writer:
    """Copies nodes of the model's graph into a new one."""

    def __init__(self, constant: frozenset[Any]) -> None:
        self.constant = constant
        self.graph = fx.Graph()
        self.known: dict[Any, Any] = {}
        self.rows: Any = None  # a tensor whose rows are the samples

    def copy(self, node: Any) -> Any:
        """Copy a node whose inputs are known, or can be made."""
        copied = self.known[node] = self.graph.node_copy(node, self.value)
        copied.type = None  # an annotation may be text, which does not pickle
        return copied

    def value(self, node: Any) -> Any:
        """The copy of a node."""
        if node in self.known:
            return self.known[node]
        if any(n not in self.known and n not in self.constant for n in node.all_input_nodes):
            # The size of a batch that is not here: any tensor of the frontier has it.
            self.known[node] = self.graph.call_method("size", (self.rows, 0))
            return self.known[node]
        return self.copy(node)


def _targets(graph: Any) -> list[str]:
    """Names of the modules and tensors that a graph reads."""
    return sorted({n.target for n in graph.nodes if n.op in ("call_module", "get_attr")})


def _held(net: Network, graph: Any) -> dict[str, Any]:
    return {name: attribute(net.root, name) for name in _targets(graph)}


def _attach(suffix: Any, graph: Any) -> None:
    """Give a suffix the graph that holds in training; it must hold all that this one reads."""
    suffix.__dict__["_in_training"] = (fx.GraphModule(suffix, graph),)


def _hold(part: Any, name: str, value: Any) -> None:
    """Register a module or tensor under a dotted name."""
    *path, leaf = name.split(".")
    for parent in path:
        if not hasattr(part, parent):
            part.add_module(parent, nn.Module())
        part = getattr(part, parent)
    if getattr(part, leaf, None) is value:
        return
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        part.register_buffer(leaf, value)
    else:
        setattr(part, leaf, value)


def _plain(
    part: Any, graph: Any, *, always: bool = False, drops: frozenset[str] = frozenset()
) -> Any:
    """A graph module of torch's own classes that shares all tensors.

    Locked BN layers become calls of ``batch_norm`` with what they have stored, which no mode
    changes, and so do all BN layers with ``always``; the calls of ``dropout`` in ``drops`` become
    modules, which have a mode.
    """
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    added: dict[str, Any] = {}
    for node in list(made.nodes):
        if node.name in drops:
            rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            added[f"{node.name}_module"] = nn.Dropout(rate)
            with made.inserting_before(node):
                other = made.call_module(f"{node.name}_module", (node.args[0],))
        elif node.op == "call_module" and _stored(part.get_submodule(node.target), always):
            other = _stored_norm(made, node, part.get_submodule(node.target))
        else:
            continue
        node.replace_all_uses_with(other)
        made.erase_node(node)
    held = {name: attribute(part, name) for name in _targets(made) if name not in added}
    whole = fx.GraphModule({**held, **added}, made, class_name=type(part).__name__)
    whole.training = part.training
    return whole


def _stored(module: Any, always: bool) -> bool:
    return type(module) in _PLAIN and (
        is_locked(module) or (always and is_site(module) and module.running_mean is not None)
    )


def _stored_norm(graph: Any, node: Any, site: Any) -> Any:
    """A call of ``batch_norm`` in place of a BN layer."""
    names = ("running_mean", "running_var", "weight", "bias")
    with graph.inserting_before(node):
        stored = [
            None if getattr(site, name) is None else graph.get_attr(f"{node.target}.{name}")
            for name in names
        ]
        args = (node.args[0] if node.args else node.kwargs["input"], *stored, False, 0.0, site.eps)
        return graph.call_function(functional.batch_norm, args)
