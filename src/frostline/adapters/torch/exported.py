"""A graph of ``torch.export`` with its convolutions and BN layers as modules again.

Such a graph calls operations on parameters that bare modules hold. What folds and cuts looks for
modules; the parameters stay where they are.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import fx, nn

from frostline.adapters.torch.copying import copied
from frostline.adapters.torch.graph import fixed_in_graphs, site_modules
from frostline.adapters.torch.locked import lock

_ATEN = torch.ops.aten
_CONVOLUTIONS = {
    _ATEN.conv1d.default: nn.Conv1d,
    _ATEN.conv2d.default: nn.Conv2d,
    _ATEN.conv3d.default: nn.Conv3d,
}
#: Number of axes of the input -> BN that takes it.
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


#: Graph -> the module of modules that computes the same, while the graph is there.
_TWINS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def as_modules(root: Any) -> Any:
    """A module of modules with the parameters of an exported graph; any other model itself.

    Its BN layers are locked, as in the graph, which normalises with stored statistics in any mode.
    """
    if not fixed_in_graphs(root, exported=True):
        return root
    if root not in _TWINS:
        kept = {id(t): t for t in (*root.parameters(), *root.buffers())}
        twin = modules_again(copied(root, kept))
        for module in site_modules(twin).values():
            if type(module) in _NORMS.values():
                lock(module)
        _TWINS[root] = twin
    return _TWINS[root]


def modules_again(root: Any) -> Any:
    """Change a graph in place, so that modules make its calls where that is the same."""
    if not isinstance(root, fx.GraphModule):
        return root
    for node in list(root.graph.nodes):
        made = _module(root, node) if node.op == "call_function" else None
        if made is None:
            continue
        name, module = made
        holder, _, last = name.rpartition(".")
        setattr(root.get_submodule(holder), last, module)
        with root.graph.inserting_before(node):
            call = root.graph.call_module(name, (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        root.graph.erase_node(node)
    for node in reversed(list(root.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            root.graph.erase_node(node)
    root.recompile()
    return root


def _module(root: Any, node: Any) -> tuple[str, Any] | None:
    """Name of the holder and the module that is to take its place; ``None``: it stays."""
    norm = node.target is _ATEN.batch_norm.default and node.args[5] is False
    if not norm and node.target not in (*_CONVOLUTIONS, _ATEN.linear.default):
        return None
    held = node.args[1:5] if norm else node.args[1:3]
    names = [n.target for n in held if isinstance(n, fx.Node) and n.op == "get_attr"]
    owners = {name.rpartition(".")[0] for name in names}
    if len(owners) != 1 or len(names) != sum(n is not None for n in held):
        return None
    (owner,) = owners
    holder = root.get_submodule(owner)
    once = sum(n.op == "get_attr" and n.target == names[0] for n in root.graph.nodes) == 1
    reads = [n for n in root.graph.nodes if n.op == "get_attr" and n.target == names[0]]
    shared = not once or any(len(n.users) > 1 for n in reads)
    if not owner or type(holder) is not nn.Module or holder._modules or shared:
        return None
    module = _norm(node) if norm else _linear(holder, node)
    if module is None:
        return None
    for table in ("_parameters", "_buffers"):
        mine = getattr(module, table)
        for name in mine:
            mine[name] = getattr(holder, table).get(name)
    module.training = False
    return owner, module


def _norm(node: Any) -> Any:
    value = node.args[0].meta.get("val")
    kind = _NORMS.get(getattr(value, "ndim", 0))
    if kind is None or node.args[3] is None:
        return None
    momentum, epsilon = node.args[6:8]
    affine = node.args[1] is not None
    return kind(value.shape[1], epsilon, momentum, affine=affine, device="meta")


def _linear(holder: Any, node: Any) -> Any:
    weight = holder.weight
    biased = len(node.args) > 2 and node.args[2] is not None
    if node.target not in _CONVOLUTIONS:
        out, inner = weight.shape
        return nn.Linear(inner, out, biased, device="meta")
    kind = _CONVOLUTIONS[node.target]
    names = ("stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args[3:], strict=False)) | dict(node.kwargs)
    if not given.keys() <= set(names):
        return None
    groups = given.pop("groups", 1)
    out, inner, *size = weight.shape
    sides = {name: tuple(value) * (len(size) // len(value)) for name, value in given.items()}
    return kind(
        inner * groups, out, tuple(size), groups=groups, bias=biased, device="meta", **sides
    )
