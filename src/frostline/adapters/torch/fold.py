"""Fold the BN layers of a torch module into the layers before them; the outcome is plain torch.

With ``s = gamma / sqrt(variance + epsilon)``, a linear layer whose output goes to the BN layer
alone gets ``weight * s`` and ``(bias - mean) * s + beta``, computed in float64 (Jacob et al. 2018,
arXiv 1712.05877, section 3.2). Elsewhere a product and a sum take the BN layer's place.

A BN layer that does more than scale and shift (an activation inside its class, batch statistics at
inference) stays as it is and is named. Inside a module that ``torch.fx`` cannot follow only
pairs of a convolution and a BN layer are folded, in place. The outcome is compared with the model
on random inputs wherever these can be guessed.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from frostline.adapters.protocol import FoldedModel
from frostline.adapters.torch.graph import site_modules, unwrapped
from frostline.adapters.torch.keeping import ByHand, by_hand, mean_of, variance_of
from frostline.adapters.torch.network import followed
from frostline.adapters.torch.samples import flat, guesses
from frostline.types import ModelError
from frostline.types.reasons import first_line

#: BN classes that do nothing but normalise.
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: A fold that is off by more than this share of the largest output is wrong; rounding is far below.
_WRONG = 1e-2


def fold(model: Any) -> FoldedModel:
    """Fold every BN layer at its stored statistics.

    Args:
        model: A torch module; it is not changed.

    Returns:
        A new module, and where the BN layers went. It pickles as plain torch: ``torch.load`` of it
        needs no Frostline, unless a locked BN layer had to stay.

    Raises:
        ModelError: No BN layer, or none that can be folded, with the reason; or the outcome does
            not compute what the model computes.
    """
    root = unwrapped(model)
    sites = site_modules(root)
    if not sites:
        raise ModelError(f"no BN layer: there is nothing to fold. Received: {type(root).__name__}")
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):  # older torch copies none
            raise ModelError(
                f"'{name}' is lazy and has seen no data yet, so there is nothing to fold; call the "
                "model on one batch first. Received: an uninitialised module"
            )
    twin = copy.deepcopy(root).eval()
    work = _Fold(twin)
    wanted = next(filter(None, (work.outputs(batch) for batch in guesses(twin))), None)
    made = work.whole(inside=wanted is not None)
    done = {*work.absorbed, *work.replaced}
    if not done:
        path, reason = next(iter(work.left.items()))
        raise ModelError(
            f"no BN layer can be folded: '{path}' {reason}. Serve the module as it is in eval(): "
            f"its stored statistics cost little there. Received: {type(root).__name__}"
        )
    if wanted is not None:
        _require_same(made, *wanted)
    return FoldedModel(
        model=made,
        absorbed=tuple(dict.fromkeys(work.absorbed)),
        replaced=tuple(dict.fromkeys(work.replaced)),
        notes=tuple(f"'{path}' {reason}; it is left" for path, reason in work.left.items()),
    )


class _Fold:
    """Folds a copy of a model."""

    def __init__(self, twin: Any) -> None:
        self.twin = twin
        self.sites = site_modules(twin)
        self.paths = {id(module): path for path, module in self.sites.items()}
        self.names = Counter(id(m) for _, m in twin.named_modules(remove_duplicate=False))
        reasons = {
            path: _read_by_parent(twin, path) or _more_than_affine(module)
            for path, module in self.sites.items()
        }
        #: Path of each site that cannot be folded -> why.
        self.left: dict[str, str] = {path: why for path, why in reasons.items() if why}
        self.absorbed: list[str] = []
        self.replaced: list[str] = []

    def outputs(self, batch: Any) -> tuple[Any, list[Any]] | None:
        """A batch and what the module makes of it before the fold; ``None``: it refuses it.

        In float64 where the module's own code allows that.
        """
        for given in (batch.double(), batch) if batch.is_floating_point() else (batch,):
            try:
                return given, _run(self.twin, given)
            except Exception:  # whatever the model's own code raises on what it does not take
                continue
        return None

    def whole(self, *, inside: bool) -> Any:
        """The folded model; ``inside``: also in modules that torch.fx cannot follow."""
        unseen: dict[str, str] = {}
        try:
            graph = followed(self.twin, None, unseen)
        except ModelError as problem:
            unseen, graph = {"": str(problem)}, None
        made: Any = self.twin
        if graph is not None and not _takes_all(graph, self.twin):
            self._pairs_in(self.twin, graph)  # the model's own forward takes more than the graph
        elif graph is not None:
            graph._tracer_cls = None  # it would be pickled by name
            for node in graph.nodes:
                node.type = None  # an annotation may be text, which does not pickle
            made = fx.GraphModule(self.twin, graph)
            for node in self._nodes(graph, self.twin):
                site = self.twin.get_submodule(node.target)
                path = self.paths[id(site)]
                if self._absorb(self.twin, graph, node, site):
                    node.replace_all_uses_with(node.args[0])
                    self.absorbed.append(path)
                else:
                    _replace(made, graph, node, site)
                    self.replaced.append(path)
                graph.erase_node(node)
            made.delete_all_unused_submodules()
            made.recompile()
        for name in unseen if inside else ():
            self._in_place(self.twin.get_submodule(name))
        present = site_modules(made)
        nodes = [] if graph is None or made is not self.twin else self._nodes(graph, self.twin)
        known = {self.paths[id(self.twin.get_submodule(node.target))] for node in nodes}
        for path, site in present.items():
            if path not in self.left and (inside or path in known):
                self._exchange(made, path, site)
        why = "is called where torch.fx cannot follow it, and does not stand behind a linear layer"
        for path in present.keys() - {*self.absorbed, *self.replaced}:
            self.left.setdefault(path, why)
        self.left = {path: reason for path, reason in self.left.items() if path in present}
        return made

    def _nodes(self, graph: Any, root: Any) -> list[Any]:
        """The calls of sites that can be folded."""
        found = [(n, self.paths.get(id(root.get_submodule(n.target)))) for n in graph.nodes
                 if n.op == "call_module"]  # fmt: skip
        return [node for node, path in found if path is not None and path not in self.left]

    def _in_place(self, owner: Any) -> None:
        """Fold pairs in the largest modules below ``owner`` that torch.fx can follow."""
        for child in owner.children():
            unseen: dict[str, str] = {}
            try:
                graph = followed(child, None, unseen)
            except ModelError:
                self._in_place(child)
                continue
            self._pairs_in(child, graph)
            for name in unseen:
                self._in_place(child.get_submodule(name))

    def _pairs_in(self, part: Any, graph: Any) -> None:
        """Fold pairs of a module in it, so that its own ``forward`` stays."""
        for node in self._nodes(graph, part):
            site = part.get_submodule(node.target)
            if self.names[id(site)] > 1 or _calls(graph, node.target) > 1:
                continue
            if self._absorb(part, graph, node, site, asserted=False):
                holder, _, name = str(node.target).rpartition(".")
                setattr(part.get_submodule(holder), name, nn.Identity())
                self.absorbed.append(self.paths[id(site)])

    def _exchange(self, made: Any, path: str, site: Any) -> None:
        """Put a module of torch that scales and shifts in a site's place, under all its names."""
        held = [name for name, m in made.named_modules(remove_duplicate=False) if m is site]
        if not all(held):  # the model itself
            return
        graph = fx.Graph()
        node = graph.call_module("site", (graph.placeholder("x"),))
        graph.output(node)
        other = fx.GraphModule(nn.Module(), fx.Graph())
        other.add_module("site", site)
        _replace(other, graph, node, site)
        graph.erase_node(node)
        del other.site
        other.graph = graph
        for name in held:
            holder, _, last = name.rpartition(".")
            setattr(made.get_submodule(holder), last, other)
        self.replaced.append(path)

    def _absorb(
        self, owner: Any, graph: Any, node: Any, site: Any, *, asserted: bool = True
    ) -> bool:
        """Fold a site into the linear module whose output it alone takes."""
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            return False
        linear = owner.get_submodule(before.target)
        shared = self.names[id(linear)] > 1 or _calls(graph, before.target) > 1
        if not _is_linear(linear, site) or shared:
            return False
        if isinstance(linear, nn.Linear):
            if not asserted:
                return False
            _require_two_axes(graph, node, before)
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
        return True


def _calls(graph: Any, target: Any) -> int:
    return sum(node.op == "call_module" and node.target == target for node in graph.nodes)


def _takes_all(graph: Any, root: Any) -> bool:
    """Whether a graph has an input for each argument of ``forward``."""
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(root.forward).parameters.values()
    own = [parameter for parameter in parameters if parameter.kind not in kinds]
    return len([node for node in graph.nodes if node.op == "placeholder"]) >= len(own)


def _read_by_parent(root: Any, path: str) -> str:
    """Why a site has to stay what it is for the module around it; "" where it need not."""
    parent = type(root.get_submodule(path.rpartition("/")[0].replace("/", ".")))
    if parent.__module__.startswith("torch.ao.nn.intrinsic.qat"):
        return (
            f"is read by {parent.__name__}, which folds it itself: "
            "torch.ao.quantization.convert(model.eval())"
        )
    return ""


def _more_than_affine(site: Any) -> str:
    """Why a site is not ``x * scale + shift`` along axis 1 at inference; "" where it is."""
    if mean_of(site) is None:
        return "keeps no statistics"
    kind = type(site)
    if kind in _PLAIN and not site._forward_hooks and not site._forward_pre_hooks:
        return ""
    scale, shift = _coefficients(site)
    twin = copy.deepcopy(site).double().eval()
    generator = torch.Generator().manual_seed(0)
    accepted = False
    hand = by_hand(site)
    for axes in ((), (3,), (3, 3), (2, 2, 2)):
        if hand is not None and len(axes) + 2 not in hand.axes:
            continue
        shape = (-1, *[1] * len(axes))
        x = torch.randn(16, len(scale), *axes, generator=generator, dtype=torch.float64) * 20
        x = x.to(scale.device)
        try:
            with torch.no_grad():
                found = twin(x.clone())
        except Exception:  # not the number of axes that it is for
            continue
        wanted = x * scale.reshape(shape) + shift.reshape(shape)
        same = found.shape == wanted.shape and torch.allclose(
            found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True
        )
        if not same:
            return f"is a BN class of its own, which does more than normalise ({kind.__name__})"
        accepted = True
    return "" if accepted else f"is a BN class of its own that takes no tensor ({kind.__name__})"


def _run(module: Any, batch: Any) -> list[Any]:
    """Outputs of a copy of a module in the precision of the batch."""
    twin = copy.deepcopy(module)
    twin = twin.to(batch.dtype) if batch.is_floating_point() else twin
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return [leaf for leaf in flat(twin(batch.clone())) if leaf.is_floating_point()]


def _require_same(made: Any, batch: Any, wanted: list[Any]) -> None:
    try:
        found = _run(made, batch)
    except AssertionError:  # a Linear layer was folded for other inputs than these
        return
    except Exception as problem:  # whatever a model raises that misses a BN layer
        raise ModelError(
            f"the folded module fails where the model does not ({first_line(problem)}): something "
            f"reads a BN layer beside calling it. Received: {type(made).__name__}"
        ) from problem
    for one, other in zip(found, wanted, strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        close = one.shape == other.shape and torch.allclose(
            one, other, rtol=0.0, atol=_WRONG * scale, equal_nan=True
        )
        if not close:
            raise ModelError(
                "the folded module does not compute what the model computes, on random inputs of "
                f"shape {tuple(batch.shape)}: something reads a layer between its convolution and "
                f"its BN. Fold the parts apart. Received: {type(made).__name__}"
            )


def _coefficients(site: Any) -> tuple[Any, Any]:
    """Scale and shift of a site, float64, shape ``(channels,)``."""
    if (hand := by_hand(site)) is not None:
        return _measured(site, hand)
    mean, variance = mean_of(site).double(), variance_of(site).double()
    scale = torch.rsqrt(variance + float(getattr(site, "eps", 1e-5)))
    weight, bias = getattr(site, "weight", None), getattr(site, "bias", None)
    scale = scale if weight is None else scale * weight.detach().double()
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias.detach().double()


def _measured(site: Any, hand: ByHand) -> tuple[Any, Any]:
    """What a class of a user's own makes of 0 and of 1, if it scales and shifts along axis 1."""
    mean = mean_of(site).double()
    axes = min(hand.axes)
    if hand.axes[axes] != 1:
        return torch.ones_like(mean), torch.zeros_like(mean)
    twin = copy.deepcopy(site).double().eval()
    zero = torch.zeros([2, len(mean), *[2] * (axes - 2)], dtype=mean.dtype, device=mean.device)
    with torch.no_grad():
        shift, whole = (flat(twin(zero + value))[0][0].flatten(1)[:, 0] for value in (0.0, 1.0))
    return whole - shift, shift


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
    dtype = mean_of(site).dtype
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
