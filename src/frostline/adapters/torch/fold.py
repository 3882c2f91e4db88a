"""Fold the BN layers of a torch module into the layers before them; the outcome is plain torch.

With ``s = gamma / sqrt(variance + epsilon)``, a linear layer whose output goes to the BN layer
alone gets ``weight * s`` and ``(bias - mean) * s + beta``, computed in float64 (Jacob et al. 2018,
arXiv 1712.05877, section 3.2). Elsewhere a product and a sum take the BN layer's place.

Modules that a BN class holds and applies afterwards (timm's ``BatchNormAct2d``) stay behind the
fold. A BN layer that does anything else (batch statistics at inference, another argument) stays as
it is and is named. Inside a module that ``torch.fx`` cannot follow pairs of a convolution and a BN
layer are folded in place, if the outcome can be compared with the model: on a sample, or on random
inputs where these can be guessed. What fails that comparison is folded another way, each BN layer
by itself at last.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from frostline.adapters.protocol import FoldedModel
from frostline.adapters.torch.copying import copied, copied_for_inference
from frostline.adapters.torch.exported import modules_again
from frostline.adapters.torch.graph import (
    require_built,
    require_runnable,
    site_modules,
    unwrapped,
)
from frostline.adapters.torch.keeping import ByHand, by_hand, mean_of, variance_of
from frostline.adapters.torch.network import followed
from frostline.adapters.torch.random import draws_nothing, forked, seeded
from frostline.adapters.torch.samples import arguments, flat, guesses
from frostline.types import ModelError
from frostline.types.reasons import first_line

#: BN classes that do nothing but normalise.
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: From what serves best to what asks the least of a model: along its graph; along it without its
#: Linear layers, which a BN layer fits with two axes only; in place, pairs first; in place, each BN
#: layer by itself.
_WAYS = ("graph", "convolutions", "pairs", "alone")
#: A fold that is off by more than this share of the largest output is wrong; rounding is far below.
_WRONG = 1e-2
#: As a share of each weight.
_ROUNDING = 1e-6


@draws_nothing
def fold(model: Any, *, sample: Any = None) -> FoldedModel:
    """Fold every BN layer at its stored statistics.

    Args:
        model: A torch module; it is not changed.
        sample: A batch of inputs, on which the outcome is compared with the model.

    Returns:
        A new module, and where the BN layers went. It pickles as plain torch: ``torch.load`` of it
        needs no Frostline, unless a locked BN layer had to stay.

    Raises:
        ModelError: No BN layer, or none that can be folded, with the reason; the model fails on the
            sample; or no outcome computes what the model computes.
    """
    root = unwrapped(model)
    if not site_modules(root):
        raise ModelError(f"no BN layer: there is nothing to fold. Received: {type(root).__name__}")
    require_runnable(root)
    require_built(root)  # older torch copies none that is lazy
    whole = modules_again(copied(root))
    whole.eval()
    trial = _trial(whole, sample)
    problem: ModelError | None = None
    for way in _WAYS[: 1 if trial is None else None]:
        work = _Fold(copied(whole))
        made = work.whole(way, tried=trial is not None)
        if not {*work.absorbed, *work.replaced}:
            path, reason = next(iter(work.left.items()))
            raise problem or ModelError(
                f"no BN layer can be folded: '{path}' {reason}. Serve the module as it is in "
                "eval(): its stored statistics cost little there. "
                f"Received: {type(root).__name__}"
            )
        try:
            if trial is not None:
                _require_same(made, trial)
        except ModelError as wrong:  # something passes beside the graph, or reads inside a pair
            problem = problem or wrong
            continue
        return FoldedModel(
            model=made,
            absorbed=tuple(dict.fromkeys(work.absorbed)),
            replaced=tuple(dict.fromkeys(work.replaced)),
            notes=tuple(f"'{path}' {reason}; it is left" for path, reason in work.left.items()),
        )
    assert problem is not None
    raise problem


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trial:
    """What a model is called with, and the tensors that it returns then.

    Attributes:
        whole: The model.
        args: By position.
        kwargs: By name.
        dtype: Of the model's weights in the trial; ``None``: as they are.
        wanted: Floating tensors among the outputs.
    """

    whole: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: Any
    wanted: list[Any]

    def compared(self, found: list[Any]) -> list[bool]:
        """Which of the tensors are those of the model; empty where there are others."""
        if len(found) != len(self.wanted):
            return []
        return [_near(one, other) for one, other in zip(found, self.wanted, strict=True)]

    def chosen(self) -> list[bool]:
        """Which of the model's tensors move as far when its weights move by a rounding error.

        A detector picks its boxes by scores that may be alike: which it picks says nothing.
        """
        twin = copied(self.whole)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.is_floating_point():
                    drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
                    parameter.mul_(1 + _ROUNDING * drawn)
        found = _run(twin, self.args, self.kwargs, self.dtype)
        return [not same for same in self.compared(found)] or [True] * len(self.wanted)


def _trial(whole: Any, sample: Any) -> _Trial | None:
    """A call that the model takes; ``None`` where none can be guessed.

    Raises:
        ModelError: The model fails on the sample.
    """
    calls = [arguments(whole, sample)] if sample is not None else (
        ((batch,), {}) for batch in guesses(whole)
    )  # fmt: skip
    problem = None
    for args, kwargs in calls:
        for dtype in (torch.float64, None):  # in float64 where the model's own code allows that
            given = pytree.tree_map(lambda x, d=dtype: _as(x, d), (args, kwargs))
            try:
                wanted = _run(whole, given[0], given[1], dtype)
            except ModelError:
                raise
            except Exception as refused:  # what the model's own code does not take
                problem = refused
                continue
            if not wanted:
                break
            return _Trial(whole=whole, args=given[0], kwargs=given[1], dtype=dtype, wanted=wanted)
    if sample is not None and problem is not None:
        raise ModelError(
            f"the model fails on the sample at inference ({first_line(problem)}). Pass sample=, "
            "one batch as forward takes it: a tuple of its arguments, or a mapping by name. "
            f"Received: sample of {type(sample).__name__}"
        ) from problem
    return None


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _as(value: Any, dtype: Any) -> Any:
    """A tensor of floats in another dtype; all else as it is."""
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floats and dtype is not None else value


class _Fold:
    """Folds a copy of a model."""

    def __init__(self, twin: Any) -> None:
        self.twin = twin
        self.sites = site_modules(twin)
        self.paths = {id(module): path for path, module in self.sites.items()}
        self.names = Counter(id(m) for _, m in twin.named_modules(remove_duplicate=False))
        #: Path of each site that cannot be folded -> why; of the others -> what stays behind it.
        self.left: dict[str, str] = {}
        self.after: dict[str, Any] = {}
        for path, module in self.sites.items():
            read = _read_by_parent(twin, path)
            found = read or _affine(module)
            if isinstance(found, str):
                self.left[path] = found
            else:
                self.after[path] = found
        self.absorbed: list[str] = []
        self.replaced: list[str] = []

    def whole(self, way: str, *, tried: bool) -> Any:
        """The folded model; ``tried``: its outputs are compared afterwards."""
        unseen: dict[str, str] = {}
        graph = None
        if way in ("graph", "convolutions"):
            try:
                graph = followed(self.twin, None, unseen)
            except ModelError as problem:
                unseen = {"": str(problem)}
            else:
                self._leave_what_is_read(graph)
        elif way == "pairs":
            unseen = {"": "it is folded in place"}
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
                if self._absorb(self.twin, graph, node, site, asserted=way == "graph"):
                    _instead(made, graph, node, node.args[0], self.after[path])
                    self.absorbed.append(path)
                else:
                    _replace(made, graph, node, site, self.after[path])
                    self.replaced.append(path)
                graph.erase_node(node)
            made.delete_all_unused_submodules()
            made.recompile()
        for name in unseen if tried else ():
            self._in_place(self.twin.get_submodule(name))
        # What else holds buffers of such names is what torch.fx puts there for a norm by hand.
        present = {p: site for p, site in site_modules(made).items() if id(site) in self.paths}
        nodes = [] if graph is None or made is not self.twin else self._nodes(graph, self.twin)
        known = {self.paths[id(self.twin.get_submodule(node.target))] for node in nodes}
        for path, site in present.items():
            if path not in self.left and (tried or path in known):
                self._exchange(made, path, site)
        why = (
            "is called where torch.fx cannot follow it, so that the outcome has to be compared "
            "with the model: pass sample=, one batch as forward takes it"
        )
        for path in present.keys() - {*self.absorbed, *self.replaced}:
            self.left.setdefault(path, "is the model itself" if tried else why)
        self.left = {path: reason for path, reason in self.left.items() if path in present}
        return made

    def _leave_what_is_read(self, graph: Any) -> None:
        """Leave sites whose statistics or parameters the model reads beside calling them."""
        for node in graph.nodes:
            owner = str(node.target).rpartition(".")[0]
            if node.op == "get_attr" and owner:
                path = self.paths.get(id(self.twin.get_submodule(owner)))
                if path is not None:
                    self.left.setdefault(path, "is read by the model beside being called")

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
                path = self.paths[id(site)]
                after = self.after[path]
                setattr(part.get_submodule(holder), name, nn.Identity() if after is None else after)
                self.absorbed.append(path)

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
        _replace(other, graph, node, site, self.after[path])
        graph.erase_node(node)
        del other.site
        other.graph = graph
        for name in held:
            holder, _, last = name.rpartition(".")
            setattr(made.get_submodule(holder), last, other)
        self.replaced.append(path)

    def _absorb(self, owner: Any, graph: Any, node: Any, site: Any, *, asserted: bool) -> bool:
        """Fold a site into the linear module whose output it alone takes.

        ``asserted``: the graph may refuse inputs that do not fit a folded Linear layer.
        """
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


def _output(twins: Sequence[Any], x: Any) -> Any:
    """What the first module gives that takes ``x`` in its precision, in double; ``None``: none."""
    for twin in twins:
        with suppress(Exception), torch.no_grad():
            found = twin(x.to(mean_of(twin).dtype, copy=True))
            return found.double() if isinstance(found, torch.Tensor) else found
    return None


def _affine(site: Any) -> Any:
    """What a site applies to ``x * scale + shift`` along axis 1 at inference, if that is all.

    Returns:
        ``None``: nothing; a module; or a text, why the site does something else.
    """
    if mean_of(site) is None:
        return "keeps no statistics"
    if type(site) is nn.Module:
        return "is normalised by an exported graph with the batch in any mode: export it in eval()"
    kind = type(site)
    if kind in _PLAIN and not site._forward_hooks and not site._forward_pre_hooks:
        return None
    scale, shift = _coefficients(site)
    # Where a class casts its input to single precision, double weights fail.
    twins = [copied_for_inference(site).to(dtype) for dtype in (torch.float64, torch.float32)]
    twin = twins[0]
    generator = torch.Generator().manual_seed(0)
    held = [nn.Sequential(*twin.children())] if any(True for _ in twin.children()) else []
    behind: list[Any] = [None, *held]  # what may stand behind it; the first that fits all shapes
    accepted = False
    hand = by_hand(site)
    for axes in ((), (3,), (3, 3), (2, 2, 2)):
        if hand is not None and len(axes) + 2 not in hand.axes:
            continue
        shape = (-1, *[1] * len(axes))
        x = torch.randn(16, len(scale), *axes, generator=generator, dtype=torch.float64) * 20
        x = x.to(scale.device)
        found = _output(twins, x)
        if found is None:  # not the number of axes that it is for
            continue
        wanted = x * scale.reshape(shape) + shift.reshape(shape)
        more = not isinstance(found, torch.Tensor)  # a flow's log-determinant
        behind = [] if more else [m for m in behind if _applied(m, wanted, found)]
        if not behind and kind in _PLAIN:
            return "has hooks that change what it takes or returns"
        if not behind:
            return f"is a BN class of its own, which does more than normalise ({kind.__name__})"
        accepted = True
    if not accepted:
        return f"is a BN class of its own that takes no tensor ({kind.__name__})"
    return None if behind[0] is None else nn.Sequential(*site.children())


def _applied(module: Any, x: Any, wanted: Any) -> bool:
    """Whether a module, or nothing, makes of ``x`` what is wanted."""
    try:
        with torch.no_grad():
            found = x if module is None else module(x.clone())
    except Exception:  # modules that are not for this
        return False
    return bool(
        found.shape == wanted.shape
        and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
    )


def _run(module: Any, args: Any, kwargs: Any, dtype: Any) -> list[Any]:
    """Outputs of a copy of a module, called in this precision.

    Raises:
        ModelError: The call moves parameters, which a fold would move otherwise.
    """
    twin, (args, kwargs) = copied(module), pytree.tree_map(_copied, (args, kwargs))
    twin = twin if dtype is None else twin.to(dtype)
    before = [(name, parameter.detach().clone()) for name, parameter in twin.named_parameters()]
    with torch.no_grad(), forked():
        seeded(0)
        outputs = twin(*args, **kwargs)
        outputs = list(outputs) if isinstance(outputs, Iterator) else outputs
    after = dict(twin.named_parameters())
    for name, value in before:
        if name in after and not torch.equal(after[name], value):
            raise ModelError(
                f"the model changes its parameters while it is called ('{name}'), so that a folded "
                "one would go another way. Fold the part that is served. "
                f"Received: {type(module).__name__}"
            )
    return [leaf for leaf in flat(outputs) if leaf.is_floating_point()]


def _require_same(made: Any, trial: _Trial) -> None:
    """Compare a folded module with the model.

    Raises:
        ModelError: It fails, or computes something else.
    """
    try:
        found = _run(made, trial.args, trial.kwargs, trial.dtype)
    except Exception as problem:  # whatever a model raises that misses a BN layer
        raise ModelError(
            f"the folded module fails where the model does not ({first_line(problem)}): something "
            f"reads a BN layer beside calling it. Received: {type(made).__name__}"
        ) from problem
    same = trial.compared(found)
    if not all(same) and any(same):
        chosen = trial.chosen()
        if not all(chosen):
            pairs = zip(found, trial.wanted, same, chosen, strict=True)
            same = [near or (free and _as_a_whole(a, b)) for a, b, near, free in pairs]
    if not all(same) or not same:
        raise ModelError(
            "the folded module does not compute what the model computes, on "
            f"{_words(trial)}: something reads a layer between its convolution and its BN. "
            f"Fold the parts apart. Received: {type(made).__name__}"
        )


def _near(one: Any, other: Any) -> bool:
    finite = other.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scale = float(finite.abs().max()) if other.numel() else 0.0
    near = {"rtol": 0.0, "atol": _WRONG * scale, "equal_nan": True}
    return one.shape == other.shape and bool(torch.allclose(one, other, **near))


def _as_a_whole(one: Any, other: Any) -> bool:
    """Whether two tensors hold the same values but for some, whatever their order."""
    if one.shape != other.shape:
        return False
    apart = (one.flatten().sort().values - other.flatten().sort().values).abs()
    return bool(apart.median() <= _WRONG * other.abs().max())


def _words(trial: _Trial) -> str:
    shapes = [tuple(x.shape) for x in flat([trial.args, trial.kwargs])]
    return f"inputs of shape {shapes[0]}" if shapes else "the sample"


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
    twin = copied_for_inference(site).double()
    zero = torch.zeros([2, len(mean), *[2] * (axes - 2)], dtype=mean.dtype, device=mean.device)
    with torch.no_grad():
        shift, whole = (
            flat(twin(zero + value))[0][0].reshape(len(mean), -1)[:, 0] for value in (0.0, 1.0)
        )
    return whole - shift, shift


def _require_two_axes(graph: Any, node: Any, before: Any) -> None:
    """Let the folded model refuse inputs for which the Linear's outputs are not the channels."""
    with graph.inserting_before(node):
        axes = graph.call_method("dim", (before,))
        two = graph.call_function(operator.eq, (axes, 2))
        text = (
            f"the BN layer behind '{before.target}' was folded for inputs of shape (n, features). "
            "Fold the model again with a batch of these inputs: frostline.fold(model, sample=...)"
        )
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


def _replace(made: Any, graph: Any, node: Any, site: Any, after: Any) -> None:
    """Put ``x * scale + shift`` along axis 1 in the site's place, and what stays behind it."""
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
    _instead(made, graph, node, output, after)


def _instead(made: Any, graph: Any, node: Any, value: Any, after: Any) -> None:
    """Let another value, and what stays behind a site, take the place of the site's output."""
    if after is not None:
        name = f"{str(node.target).replace('.', '_')}_after"
        made.add_module(name, after)
        with graph.inserting_before(node):
            value = graph.call_module(name, (value,))
    node.replace_all_uses_with(value)
