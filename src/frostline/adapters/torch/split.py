"""Cut a torch module in two where the least has to cross: a pure prefix and the rest.

Both parts are graph modules that hold the model's own modules and parameters, under the names that
they have in the model: training the suffix trains the model, an optimizer built earlier stays
valid, and the keys of ``state_dict`` are the model's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from frostline.adapters.torch.forward_pass import untouched
from frostline.adapters.torch.graph import is_site, resolve, unwrapped, walk
from frostline.adapters.torch.network import Network, network, phase
from frostline.adapters.torch.parts import build
from frostline.adapters.torch.pure import Flags, Impurity, Observed, observe
from frostline.graph.addresses import Place
from frostline.graph.mincut import later_cut
from frostline.types import Crossing, ModelError

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


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A module cut in two; see :class:`frostline.Split`."""

    prefix: Any
    suffix: Any
    frontier: tuple[Crossing, ...]
    notes: tuple[str, ...]


def split(model: Any, at: Any = None, *, sample: Any = None) -> Parts:
    """Cut ``model``; see :func:`frostline.split`."""
    net = network(model)
    flags = Flags(net, model)
    pure, ends = _pure_calls(net, flags)
    if at is None:
        _require_frozen(net, pure, ends)
    else:
        pure = _before(net, flags, pure, model, at)
    seen = observe(net, pure, sample)
    constant = _constants(net)
    inside = _smallest(net, pure, seen, constant, forced=at is not None)
    if at is None and not any(_weights(net, node) for node in inside):
        kind = type(net.root).__name__
        raise ModelError(
            "nothing is worth storing: the frozen part is light to compute and its inputs are "
            f"smaller than its outputs. Freeze more of the model. Received: {kind}"
        )
    crossing = _crossing(net, inside, constant)
    prefix, suffix = build(net, inside, crossing, constant)
    _require_same(net, prefix, suffix, seen)
    return Parts(
        prefix=prefix,
        suffix=suffix,
        frontier=tuple(_described(net, node, seen) for node in crossing),
        notes=_notes(model, ends if at is None else (), seen),
    )


# --- which calls ----------------------------------------------------------------------------------


def _pure_calls(net: Network, flags: Flags) -> tuple[list[Any], list[tuple[Any, Impurity]]]:
    """Nodes that are pure with pure inputs only, and those that end them."""
    good = set(net.inputs)
    ends: list[tuple[Any, Impurity]] = []
    pure: list[Any] = []
    for node in net.calls:
        if not good.issuperset(node.all_input_nodes):
            continue
        blame = flags.impurity(node)
        if blame is None:
            pure.append(node)
            good.add(node)
        else:
            ends.append((node, blame))
    return pure, ends


def _weights(net: Network, node: Any) -> bool:
    module = net.module(node)
    return module is not None and any(True for _ in [*module.parameters(), *module.buffers()])


def _require_frozen(
    net: Network, pure: Sequence[Any], ends: Sequence[tuple[Any, Impurity]]
) -> None:
    """Refuse a model of which nothing or everything is frozen, or a BN that only seems to be."""
    kind = type(net.root).__name__
    if not any(parameter.requires_grad for parameter in net.root.parameters()):
        raise ModelError(
            "everything is frozen: nothing is left to train behind the prefix. Thaw the head, for "
            f"example fl.unfreeze(model, -1), or say where to cut (at=...). Received: {kind}"
        )
    for node, blame in ends:
        if blame.why == "statistics" and blame.seems:
            module = net.module(node)
            raise ModelError(
                f"'{blame.path}' is frozen, but {blame.text}: what it computes for one sample "
                "depends on the others, so it cannot be stored. Freeze its statistics as well: "
                f"fl.freeze(model, until=...). Received: {type(module).__name__}"
            )
    if not any(_weights(net, node) for node in pure):
        first = next((blame for _, blame in ends), None)
        why = "" if first is None else f": '{first.path}' comes first, and {first.text}"
        raise ModelError(
            f"nothing is frozen at the beginning of the model{why}. Freeze the part that shall be "
            f"computed once: fl.freeze(model, until=...). Received: {kind}"
        )


def _before(net: Network, flags: Flags, pure: Sequence[Any], model: Any, at: Any) -> list[Any]:
    """The nodes before a boundary; all of them must be pure."""
    boundary = resolve(model, at)
    if boundary.path is None:
        raise ModelError(
            f"the boundary is the end of the model: nothing is left behind it. Received: at={at!r}"
        )
    places = {id(place.module): place for place in walk(model)}
    edge = next(place for place in places.values() if place.path == boundary.path)
    allowed, good, before = set(pure), set(net.inputs), []
    for node in net.calls:
        if node.op == "get_attr" and node not in allowed:
            continue  # what reads it is not before the boundary either
        place = places.get(id(net.module(node)))
        if place is not None and _behind(place, edge, weights=_weights(net, node)):
            continue
        if not good.issuperset(node.all_input_nodes):
            continue
        if node not in allowed:
            blame = flags.impurity(node)
            path, text = (net.name(node), "") if blame is None else (blame.path, f": {blame.text}")
            raise ModelError(
                f"'{path}' is before the boundary '{boundary.path}' but not pure{text}. "
                f"fl.freeze(model, {boundary.path!r}) freezes all that is before it. "
                f"Received: at={at!r}"
            )
        before.append(node)
        good.add(node)
    if not any(node.op == "call_module" for node in before):
        raise ModelError(f"no module is before the boundary '{boundary.path}'. Received: at={at!r}")
    return before


def _behind(place: Place, edge: Place, *, weights: bool) -> bool:
    """Whether a call of a module is not before a boundary.

    One without weights, a ReLU that is called in many places, is where its inputs are.
    """
    if f"{place.path}/".startswith(f"{edge.path}/") or edge.path.startswith(f"{place.path}/"):
        return True
    return weights and place.order >= edge.order


# --- where to cut ---------------------------------------------------------------------------------


def _constants(net: Network) -> frozenset[Any]:
    """Nodes that no input reaches, and sizes of the batch: either part makes its own."""
    found: set[Any] = set()
    for node in net.calls:
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


def _smallest(
    net: Network, pure: Sequence[Any], seen: Observed, constant: frozenset[Any], *, forced: bool
) -> list[Any]:
    """The pure nodes that stay in the prefix so that the fewest bytes cross.

    A node with real work stays; one that is light moves behind the frontier where that makes it
    smaller. What is no tensor whose rows are the samples must not be cut: whatever stands between
    it and the inputs moves too.
    """
    usable = [node for node in pure if node not in constant]
    known = [*net.inputs, *usable]
    sizes = {node: _bytes(node, seen) for node in known}
    work = sum(sizes.values()) + 1
    never = work * (len(net.calls) + 1)
    unlimited = never * (len(sizes) + 2)
    home: dict[Any, Hashable] = dict.fromkeys(net.inputs, "source")
    home.update({node: node for node in usable})
    edges: dict[tuple[Hashable, Hashable], int] = {}
    for node, producer in home.items():
        edges[producer, ("tensor", node)] = sizes[node] if node in seen.shapes else never
    for node in [*net.calls, net.output]:
        if node in constant:
            continue
        reader: Hashable = node if node in home else "sink"
        reads = [each for each in node.all_input_nodes if each in home]
        for each in reads:
            edges[("tensor", each), reader] = unlimited  # a reader behind the cut pays for it
        if reader != "sink":
            # What a node in front of the cut reads is computed in front of it as well.
            edges.update({(node, home[each]): unlimited for each in reads})
            edges["source", node] = work if forced or not _light(net, node) else 0
    kept = later_cut(edges, "source", "sink")
    return [node for node in usable if node in kept]


def _bytes(node: Any, seen: Observed) -> int:
    """Bytes of one sample."""
    if node not in seen.shapes:
        return 1
    return math.prod(seen.shapes[node]) * int(seen.dtypes[node].itemsize)


def _light(net: Network, node: Any) -> bool:
    module = net.module(node)
    if module is not None:
        return type(module) in _LIGHT_MODULES or is_site(module)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return node.op == "get_attr" or name in _LIGHT_NAMES or node.target is functional.batch_norm


def _crossing(net: Network, inside: Sequence[Any], constant: frozenset[Any]) -> list[Any]:
    """Nodes that the suffix reads, in the order in which they are computed."""
    ours = set(inside) | constant
    behind = [node for node in [*net.calls, net.output] if node not in ours]
    read = {each for node in behind for each in node.all_input_nodes}
    return [node for node in [*net.inputs, *inside] if node in read]


def _require_same(net: Network, prefix: Any, suffix: Any, seen: Observed) -> None:
    """Compare ``suffix(prefix(x))`` with the model itself, at inference, on the trial batch."""
    parts = [*net.root.modules(), *suffix.modules()]
    with untouched(net.root) as root, torch.no_grad(), phase(parts, None):
        whole = root(*(each.clone() for each in seen.batch))
        features = prefix(*(each.clone() for each in seen.batch))
        cut = suffix(*features) if isinstance(features, tuple) else suffix(features)
    for one, other in zip(_flat(whole), _flat(cut), strict=True):
        scale = float(one.double().abs().max()) if one.numel() else 0.0
        if one.shape != other.shape or not torch.allclose(
            one.double(), other.double(), rtol=0.0, atol=1e-4 * scale, equal_nan=True
        ):
            raise ModelError(
                "the two parts together do not compute what the model computes: a tensor is "
                "changed in place while another part reads it. Cut elsewhere (at=...), or make "
                f"that step not in place. Received: {type(root).__name__}"
            )


def _flat(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return (
        [leaf for item in value for leaf in _flat(item)] if isinstance(value, (list, tuple)) else []
    )


# --- what is told ---------------------------------------------------------------------------------


def _described(net: Network, node: Any, seen: Observed) -> Crossing:
    shape = seen.shapes[node]
    return Crossing(
        path=str(node.target) if node.op == "placeholder" else net.name(node),
        # The sides of made-up images are no property of the model.
        shape=tuple(
            None if seen.guessed and axis > 0 and len(shape) > 1 else size
            for axis, size in enumerate(shape)
        ),
        dtype=str(seen.dtypes[node]).removeprefix("torch."),
        bytes_per_sample=_bytes(node, seen),
        computed=node.op != "placeholder",
    )


def _notes(model: Any, ends: Sequence[tuple[Any, Impurity]], seen: Observed) -> tuple[str, ...]:
    told = {blame.path: blame.text for _, blame in ends if blame.why == "random"}
    notes = [f"the prefix ends at '{path}': {text}" for path, text in told.items()]
    if seen.guessed:
        shape = "x".join(map(str, seen.batch[0].shape[1:]))
        notes.append(f"sizes are those of random inputs of shape {shape}; sample=x tells the real")
    if unwrapped(model) is model:
        return tuple(notes)
    return (*notes, f"{type(model).__name__} was taken off: wrap the suffix in it anew")
