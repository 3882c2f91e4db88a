"""Cut a torch module in two where the least has to cross: a pure prefix and the rest.

Both parts are graph modules that hold the model's own modules and parameters, under the names that
they have in the model: training the suffix trains the model, an optimizer built earlier stays
valid, and the keys of ``state_dict`` are the model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from frostline.adapters.protocol import SplitModel
from frostline.adapters.torch import replayed_parts
from frostline.adapters.torch.exported import as_modules
from frostline.adapters.torch.forward_pass import untouched
from frostline.adapters.torch.graph import (
    is_site,
    layers,
    require_registered,
    require_runnable,
    unwrapped,
    walk,
)
from frostline.adapters.torch.network import Network, attribute, input_names, network, phase
from frostline.adapters.torch.parts import build
from frostline.adapters.torch.pure import Flags, Trial, observe
from frostline.adapters.torch.random import draws_nothing
from frostline.adapters.torch.replay import is_record
from frostline.adapters.torch.samples import arguments, flat
from frostline.adapters.torch.state_kept import attributes_kept
from frostline.atomic import taken_back
from frostline.graph.mincut import frontier, smallest
from frostline.graph.purity import Graph, Impurity, Node, before, notes, pure_nodes, require_frozen
from frostline.types import Crossing, ModelError
from frostline.types.reasons import first_line

#: Modules that cost next to nothing beside a convolution: where that makes the frontier smaller,
#: the suffix computes them again.
_LIGHT_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax,
    nn.Softsign, nn.Threshold, nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.Dropout3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.Upsample, nn.PixelShuffle,
    nn.ChannelShuffle, nn.Embedding,
)  # fmt: skip
#: Functions and methods of the same kind, by name.
_LIGHT_NAMES = frozenset([
    "add", "iadd", "sub", "isub", "mul", "imul", "truediv", "div", "neg", "pow", "cat", "concat",
    "stack", "relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softmax", "softplus", "clamp", "exp", "log",
    "sqrt", "rsqrt", "abs", "flatten", "view", "reshape", "permute", "transpose", "contiguous",
    "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "chunk", "split", "getitem", "getattr",
    "size", "dim", "to", "float", "type_as", "pad", "dropout", "interpolate", "where", "roll",
])  # fmt: skip


@draws_nothing
def split(model: Any, at: Any = None, *, sample: Any = None) -> SplitModel:
    """Cut ``model``; see :func:`frostline.split`.

    By its graph where ``torch.fx`` finds one; else, with a sample, by record and replay.
    """
    whole = unwrapped(model)
    require_runnable(whole)
    require_registered(whole)
    with taken_back(attributes_kept([*whole.modules()])):  # a trace keeps constants in the model
        return _split(whole, model, at, sample)


def _split(whole: Any, model: Any, at: Any, sample: Any) -> SplitModel:
    model = model if (twin := as_modules(whole)) is whole else twin
    try:
        net = network(model, input_names(model, sample))
    except ModelError as problem:
        if sample is None:
            text, _, received = str(problem).rpartition(" Received: ")
            raise ModelError(
                f"{text} Or pass sample=, one batch as forward takes it in training: a tuple of "
                "its arguments, or a mapping by name. Objects without rows, as the graphs of PyG, "
                "cannot be stored that way: freeze such a model and train it as it is. "
                f"Received: {received}"
            ) from problem
        return replayed_parts.split(model, at, sample)
    starred = any(str(node.target).startswith("*") for node in net.inputs)
    if sample is not None and (starred or _hides_frozen(net)):
        with suppress(ModelError):
            return replayed_parts.split(model, at, sample)
    try:
        return _cut(net, model, at, sample)
    except DifferentPartsError as problem:
        if sample is None:
            raise
        try:  # a graph knows no autocast in forward, and reads a tensor after it is changed
            return replayed_parts.split(model, at, sample)
        except ModelError:
            raise problem from None
    except ModelError:
        if sample is None or (twin is whole and not _holds_several(whole, sample)):
            raise
        # Exported for batches of one size, and so tried on no smaller ones; or one argument that
        # holds several arrays, which a graph takes for one.
        return replayed_parts.split(model, at, sample)


class DifferentPartsError(ModelError):
    """The two parts together compute something else than the model."""


def _holds_several(root: Any, sample: Any) -> bool:
    """Whether one argument of a sample holds several arrays, or is a plain number."""
    placed, named = arguments(root, sample)
    held = (Mapping, list, tuple)
    several = any(is_record(value) or isinstance(value, held) for value in placed)
    return several or any(isinstance(value, (int, float)) for value in (*placed, *named.values()))


def _hides_frozen(net: Network) -> bool:
    """Whether a module that is kept whole holds frozen weights before some that train."""
    kept = [list(net.root.get_submodule(name).parameters()) for name in net.whole]
    return any(
        weights and not weights[0].requires_grad and any(p.requires_grad for p in weights)
        for weights in kept
    )


def _cut(net: Network, model: Any, at: Any, sample: Any) -> SplitModel:
    """Cut a model along its graph."""
    constant = _constants(net.calls) | _constants(net.other.nodes)
    graph = _nodes(net, model, constant)
    pure, ends = pure_nodes(graph)
    if at is None:
        require_frozen(graph, pure, ends)
    else:
        pure, ends = before(graph, pure, layers(model), at), []
    trial = observe(net, graph, pure, sample)
    seen = trial.seen.shapes or {}
    known = (*net.inputs, *(node.call for node in pure))
    sizes = {node: _bytes(node, trial) for node in known}
    inside = smallest(graph, pure, sizes, set(known) - seen.keys(), forced=at is not None)
    crossing = frontier(graph, inside)
    prefix, suffix = build(net, [node.call for node in inside], crossing, constant)
    _require_same(net, prefix, suffix, trial)
    return SplitModel(
        prefix=prefix,
        suffix=suffix,
        frontier=tuple(_described(net, node, trial) for node in crossing),
        notes=(*notes(ends), *_remarks(model, trial)),
    )


# --- which calls ----------------------------------------------------------------------------------


def _nodes(net: Network, model: Any, constant: frozenset[Any]) -> Graph:
    """The calls of both phases with what their flags say; those of one phase only are not pure."""
    flags = Flags(net, model)
    places = {id(place.module): place for place in walk(model)}
    mine: dict[Any, Any] = {twin: node for node, twin in net.twins.items()}

    def made(node: Any, blame: Impurity | None) -> Node:
        module, kind = net.module(node), getattr(node.target, "__name__", str(node.target))
        held = [] if module is None else [*module.parameters(), *module.buffers()]
        return Node(
            call=node,
            path=net.name(node),
            kind=kind if module is None else type(module).__name__,
            reads=tuple(mine.get(read, read) for read in node.all_input_nodes),
            writes=(node,),
            blame=blame,
            layer=module is not None,
            weights=bool(held),
            light=_light(net, node),
            constant=node in constant,
            # A module without weights, perhaps called in many places, is where its inputs are.
            place=places.get(id(module)) if held else None,
        )

    both = [
        made(n, flags.impurity(n) if n in net.twins else _one_phase(net, n, "at inference"))
        for n in net.calls
    ]
    rest = [made(n, _one_phase(net, n, "in training")) for n in net.in_training_only]
    returned = [n for g in (net.graph, net.other) for n in g.nodes if n.op == "output"]
    return Graph(
        nodes=(*both, *rest),
        inputs=net.inputs,
        outputs=tuple(mine.get(n, n) for node in returned for n in node.all_input_nodes),
        word="module",
        received=type(net.root).__name__,
        trains=any(_trains(net, node.call) for node in (*both, *rest)),
        in_place=True,
    )


def _trains(net: Network, node: Any) -> bool:
    """Whether a call reads anything that trains; what no call reads does not count."""
    if node.op == "get_attr":
        return bool(getattr(attribute(net.root, node.target), "requires_grad", False))
    module = net.module(node)
    return module is not None and any(p.requires_grad for p in module.parameters())


def _one_phase(net: Network, node: Any, when: str) -> Impurity:
    return Impurity(why="phase", path=net.name(node), text=f"it is called {when} only")


# --- where to cut ---------------------------------------------------------------------------------


def _constants(nodes: Iterable[Any]) -> frozenset[Any]:
    """Nodes that no input reaches, and sizes of the batch: either part makes its own."""
    found: set[Any] = set()
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        if batch_size_of(node) or found.issuperset(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def batch_size_of(node: Any) -> bool:
    """Whether a node is ``x.size(0)`` or ``x.shape[0]``."""
    if node.op == "call_method" and node.target == "size":
        return bool(node.args[1:] == (0,) or node.kwargs.get("dim") == 0)
    if getattr(node.target, "__name__", "") != "getitem" or node.args[1] != 0:
        return False
    before = node.args[0]
    whole = before.op == "call_method" and before.target == "size" and len(before.args) == 1
    shape = getattr(before.target, "__name__", "") == "getattr" and before.args[1] == "shape"
    return bool(whole or shape)


def _bytes(node: Any, trial: Trial) -> int:
    """Bytes of one sample."""
    shape = (trial.seen.shapes or {}).get(node)
    return 1 if shape is None else math.prod(shape) * trial.itemsize(node)


def _light(net: Network, node: Any) -> bool:
    module = net.module(node)
    if module is not None:
        return type(module) in _LIGHT_MODULES or is_site(module)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return node.op == "get_attr" or name in _LIGHT_NAMES or node.target is functional.batch_norm


def _require_same(net: Network, prefix: Any, suffix: Any, trial: Trial) -> None:
    """Compare ``suffix(prefix(x))`` with the model itself, at inference, on the trial batch."""
    parts = [*net.root.modules(), *suffix.modules()]
    with untouched(net.root) as root, torch.no_grad(), phase(parts, None):
        whole = trial.called(root)
        try:
            features = trial.called(prefix)
            cut = suffix(*features) if isinstance(features, tuple) else suffix(features)
        except Exception as problem:  # whatever a model raises that misses what was cut away
            raise ModelError(
                f"the two parts fail where the model does not ({first_line(problem)}): something "
                "passes between its modules beside their inputs and outputs. Cut elsewhere "
                f"(at=...), or train with fl.cached. Received: {type(root).__name__}"
            ) from problem
    for one, other in zip(flat(whole), flat(cut), strict=True):
        known = one.double()[one.isfinite()].abs()
        scale = float(known.max()) if known.numel() else 0.0
        if one.shape != other.shape or not torch.allclose(
            one.double(), other.double(), rtol=0.0, atol=1e-4 * scale, equal_nan=True
        ):
            raise DifferentPartsError(
                "the two parts together do not compute what the model computes: a tensor is "
                "changed in place while another part reads it, or forward computes under autocast. "
                "Pass sample=, one batch as forward takes it. Or cut elsewhere (at=...), or make "
                f"that step not in place. Received: {type(root).__name__}"
            )


def _described(net: Network, node: Any, trial: Trial) -> Crossing:
    shape = (trial.seen.shapes or {})[node]
    return Crossing(
        path=str(node.target) if node.op == "placeholder" else net.name(node),
        # The sides of made-up images are no property of the model.
        shape=tuple(
            None if trial.guessed and axis > 0 and len(shape) > 1 else size
            for axis, size in enumerate(shape)
        ),
        dtype=trial.seen.dtypes[node],
        bytes_per_sample=_bytes(node, trial),
        computed=node.op != "placeholder",
    )


def _remarks(model: Any, trial: Trial) -> list[str]:
    found = []
    if trial.guessed:
        shape = "x".join(map(str, next(iter(trial.batch.values())).shape[1:]))
        found.append(f"sizes are those of random inputs of shape {shape}; sample=x tells the real")
    if unwrapped(model) is not model:
        found.append(f"{type(model).__name__} was taken off: wrap the suffix in it anew")
    return found
