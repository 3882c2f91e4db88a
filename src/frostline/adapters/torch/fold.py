"""Fold the BN layers of a torch module into the layers before them; the outcome is plain torch.

With ``s = gamma / sqrt(variance + epsilon)``, a linear layer whose output goes to the BN layer
alone gets ``weight * s`` and ``(bias - mean) * s + beta``, computed in float64 (Jacob et al. 2018,
arXiv 1712.05877, section 3.2). Elsewhere a product and a sum take the BN layer's place.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from frostline.adapters.torch.graph import is_frozen_kind, site_places, unwrapped
from frostline.adapters.torch.locked import unlocked_class
from frostline.adapters.torch.trace import trace
from frostline.types import ModelError

#: BN classes that do nothing but normalise.
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A new module without BN layers, and where they went: paths of sites."""

    model: Any
    absorbed: tuple[str, ...]
    replaced: tuple[str, ...]


def fold(model: Any) -> Folded:
    """Fold every BN layer at its stored statistics.

    Args:
        model: A torch module that ``torch.fx`` can trace; it is not changed.

    Raises:
        ModelError: No graph can be traced; a BN layer of a user's own class, or one that keeps no
            statistics, with its path.
    """
    _require_foldable(model)
    twin = copy.deepcopy(unwrapped(model)).eval()
    graph, reason = trace(twin)
    if graph is None:
        raise ModelError(
            f"torch.fx cannot trace this model ({reason}), so what lies before a BN layer is not "
            f"known. Received: {type(twin).__name__}"
        )
    made = fx.GraphModule(twin, graph)
    paths = {id(place.module): place.path for place in site_places(twin)}
    absorbed: list[str] = []
    replaced: list[str] = []
    for node in list(graph.nodes):
        if node.op != "call_module" or id(twin.get_submodule(node.target)) not in paths:
            continue
        site = twin.get_submodule(node.target)
        path = paths[id(site)]
        if _absorb(made, graph, node, site):
            absorbed.append(path)
        else:
            _replace(made, graph, node, site)
            replaced.append(path)
        graph.erase_node(node)
    made.delete_all_unused_submodules()
    made.recompile()
    return Folded(
        model=made,
        absorbed=tuple(dict.fromkeys(absorbed)),
        replaced=tuple(dict.fromkeys(replaced)),
    )


def _require_foldable(model: Any) -> None:
    places = site_places(model)
    if not places:
        raise ModelError(
            f"no BN layer: there is nothing to fold. Received: {type(unwrapped(model)).__name__}"
        )
    for place in places:
        module = place.module
        if module.running_mean is None:
            raise ModelError(
                f"'{place.path}' keeps no statistics, so it cannot be folded. "
                f"Received: {place.path!r}"
            )
        kind = unlocked_class(type(module))
        if kind not in _PLAIN and not is_frozen_kind(module):
            raise ModelError(
                f"'{place.path}' is a BN class of its own, which may do more than normalise. "
                f"Received: {kind.__module__}.{kind.__qualname__}"
            )


def _coefficients(site: Any) -> tuple[Any, Any]:
    """Scale and shift of a site, float64, shape ``(channels,)``."""
    mean, variance = site.running_mean.double(), site.running_var.double()
    scale = torch.rsqrt(variance + float(getattr(site, "eps", 1e-5)))
    scale = scale if site.weight is None else scale * site.weight.detach().double()
    shift = -mean * scale
    return scale, shift if site.bias is None else shift + site.bias.detach().double()


def _absorb(made: Any, graph: Any, node: Any, site: Any) -> bool:
    """Fold a site into the linear module whose output it alone takes."""
    before = node.args[0] if node.args else None
    if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
        return False
    linear = made.get_submodule(before.target)
    uses = sum(n.op == "call_module" and n.target == before.target for n in graph.nodes)
    shared = sum(module is linear for _, module in made.named_modules(remove_duplicate=False)) > 1
    if not _is_linear(linear, site) or uses > 1 or shared:
        return False
    scale, shift = _coefficients(site)
    weight = linear.weight.detach().double()
    bias = 0.0 if linear.bias is None else linear.bias.detach().double()
    with torch.no_grad():
        linear.weight.copy_(_scaled(linear, weight, scale))
        folded = (bias * scale + shift).to(linear.weight.dtype)
        if linear.bias is None:
            linear.bias = nn.Parameter(folded, requires_grad=linear.weight.requires_grad)
        else:
            linear.bias.copy_(folded)
    if isinstance(linear, nn.Linear):
        _require_two_axes(graph, node, before)
    node.replace_all_uses_with(before)
    return True


def _require_two_axes(graph: Any, node: Any, before: Any) -> None:
    """Let the folded model refuse inputs for which the Linear's outputs are not the channels."""
    with graph.inserting_before(node):
        axes = graph.call_method("dim", (before,))
        two = graph.call_function(operator.eq, (axes, 2))
        text = f"the BN layer behind '{before.target}' was folded for inputs of shape (n, features)"
        graph.call_function(torch._assert, (two, text))


def _is_linear(module: Any, site: Any) -> bool:
    """A convolution or Linear whose outputs are the site's channels (axis 1)."""
    if hasattr(module, "parametrizations") or module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, nn.Linear):
        return isinstance(site, _BatchNorm) and module.out_features == site.num_features
    return isinstance(module, _ConvNd) and type(module).__module__ == "torch.nn.modules.conv"


def _scaled(linear: Any, weight: Any, scale: Any) -> Any:
    if not isinstance(linear, _ConvTransposeNd):
        return weight * scale.reshape([-1, *[1] * (weight.ndim - 1)])
    # Transposed: (in, out / groups, ...); output channels run over the groups.
    groups = linear.groups
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    per_group = scale.reshape([groups, 1, -1, *[1] * (weight.ndim - 2)])
    return (grouped * per_group).reshape(weight.shape)


def _replace(made: Any, graph: Any, node: Any, site: Any) -> None:
    """Put ``x * scale + shift`` along axis 1 in the site's place."""
    dtype = site.running_mean.dtype
    names = []
    for kind, values in zip(("scale", "shift"), _coefficients(site), strict=True):
        name = f"{str(node.target).replace('.', '_')}_{kind}"
        made.register_buffer(name, values.to(dtype))
        names.append(name)
    x = node.args[0] if node.args else next(iter(node.kwargs.values()))
    with graph.inserting_before(node):
        scale, shift = (graph.get_attr(name) for name in names)
        last = graph.call_method("movedim", (x, 1, -1))
        scaled = graph.call_function(torch.mul, (last, scale))
        moved = graph.call_function(torch.add, (scaled, shift))
        output = graph.call_method("movedim", (moved, -1, 1))
    node.replace_all_uses_with(output)
