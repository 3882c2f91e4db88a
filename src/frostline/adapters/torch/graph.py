"""Walk a torch module: hierarchical paths, BN sites, boundaries. Reads only.

A path is the module's own dotted name with slashes: ``layer1.0.bn1`` is ``layer1/0/bn1``. Both
spellings are understood. A module that is registered twice has the first of its names. Order is
the order of registration, which is execution order for nearly every network; a module cannot say
more without being run.
"""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from frostline.adapters.torch.locked import is_locked, unlocked_class
from frostline.types import Boundary, ModelError, Site

#: Buffers of the FrozenBatchNorm classes of torchvision, detectron2, timm and transformers.
_FROZEN_BUFFERS = frozenset({"weight", "bias", "running_mean", "running_var"})


@dataclass(frozen=True)
class Place:
    """One module of a model.

    Attributes:
        path: Its name with slashes.
        module: The module.
        order: Position in order of registration.
        calls: Under how many names it is registered.
        leaf: It holds no other module, or is a site.
        top: Index of the child of the root that it is or lies in.
    """

    path: str
    module: Any
    order: int
    calls: int
    leaf: bool
    top: int


def unwrapped(model: Any) -> Any:
    """The module inside of `torch.compile`, DataParallel and DistributedDataParallel."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def is_site(module: Any) -> bool:
    """Whether the module normalises with stored statistics, whatever class it has.

    That is torch's BN and its subclasses, InstanceNorm that tracks running statistics, a
    FrozenBatchNorm of some library, and a class of one's own that holds ``running_mean`` and
    ``running_var`` and calls ``batch_norm`` or ``instance_norm``. BN that keeps no statistics
    (``track_running_stats=False`` from the start) uses those of the batch in both phases; it is a
    site as well.
    """
    if isinstance(module, _BatchNorm) or is_frozen_kind(module):
        return True
    return _keeps_statistics(module) and (
        isinstance(module, _InstanceNorm) or _calls_norm(type(module))
    )


def _keeps_statistics(module: Any) -> bool:
    buffers = getattr(module, "_buffers", {})
    return all(buffers.get(name) is not None for name in ("running_mean", "running_var"))


@functools.cache
def _calls_norm(kind: Any) -> bool:
    """Whether the code of a class names a function that normalises with given statistics.

    A bare ``nn.Module`` holds the buffers of an exported graph, whose nodes are such calls.
    """
    codes = [
        code
        for owner in kind.__mro__
        if owner is not nn.Module
        for method in vars(owner).values()
        if (code := getattr(method, "__code__", None)) is not None
    ]
    called = {name for code in codes for name in code.co_names}
    return kind is nn.Module or not called.isdisjoint({"batch_norm", "instance_norm"})


def unknown_keepers(model: Any) -> dict[str, str]:
    """Path -> class of what keeps running statistics and is no site that is understood."""
    return {
        name.replace(".", "/") or type(module).__name__: type(module).__name__
        for name, module in unwrapped(model).named_modules()
        if not is_site(module)
        and any("running" in key or "moving" in key for key in getattr(module, "_buffers", ()))
    }


def is_frozen_kind(module: Any) -> bool:
    """Whether it is a BN layer whose parameters are all buffers, which never moves."""
    norms = (_BatchNorm, _InstanceNorm)
    return not isinstance(module, norms) and set(getattr(module, "_buffers", ())) >= _FROZEN_BUFFERS


def walk(model: Any) -> tuple[Place, ...]:
    """Every module below the root, once; the root itself where it is a site."""
    root = unwrapped(model)
    counts: dict[int, int] = {}
    for _, module in root.named_modules(remove_duplicate=False):
        counts[id(module)] = counts.get(id(module), 0) + 1
    children = {name: index for index, (name, _) in enumerate(root.named_children())}
    return tuple(
        Place(
            path=name.replace(".", "/") or type(root).__name__,
            module=module,
            order=order,
            calls=counts[id(module)],
            leaf=is_site(module) or not any(True for _ in module.children()),
            top=children.get(name.partition(".")[0], 0),
        )
        for order, (name, module) in enumerate(root.named_modules())
        if name or is_site(module)
    )


def site_places(model: Any) -> tuple[Place, ...]:
    """The places that are BN layers."""
    return tuple(place for place in walk(model) if is_site(place.module))


def site_modules(model: Any) -> dict[str, Any]:
    """Path -> module of every BN layer."""
    return {place.path: place.module for place in site_places(model)}


def sites(model: Any) -> tuple[Site, ...]:
    """Every BN layer of ``model``.

    ``stats_frozen`` is what holds in training: in a model that is in training mode, what its
    modules are in now; else what its own ``train()`` will leave frozen.
    """
    places = site_places(model)
    modes = [bool(place.module.training) for place in places]
    if not unwrapped(model).training:
        modes = modes_in_training(model, places)
    return tuple(
        _site(place, index, mode)
        for index, (place, mode) in enumerate(zip(places, modes, strict=True))
    )


def frozen_prefix(model: Any) -> tuple[int | None, str | None]:
    """How many sites lie before the first module with parameters that trains, and its path.

    A BN module trains where its parameters do, or where its statistics move.

    Returns:
        ``(None, None)`` when that is the very first one: there is no prefix. ``(sites, None)`` when
        every module is frozen.
    """
    found = {site.path: site for site in sites(model)}
    before = met = 0
    for place in walk(model):
        own = list(place.module.parameters(recurse=False))
        site = found.get(place.path)
        if site is None and not own:
            continue
        moves = site is not None and not site.stats_frozen
        if moves or any(parameter.requires_grad for parameter in own):
            return (before, place.path) if met else (None, None)
        met += 1
        before += site is not None
    return len(found), None


def modes_in_training(model: Any, places: tuple[Place, ...]) -> list[bool]:
    """Mode of each module after the model's own ``train()``, which some models override."""
    with modes_kept(model):
        set_mode(unwrapped(model), training=True)
        return [bool(place.module.training) for place in places]


def _site(place: Place, index: int, training: bool) -> Site:
    module = place.module
    own = list(module.parameters(recurse=False))
    fixed = is_frozen_kind(module) or is_locked(module)
    stored = module.running_mean is not None
    switched_off = stored and not getattr(module, "track_running_stats", True)
    frozen = fixed or switched_off or not training
    return Site(
        path=place.path,
        name=place.path.rpartition("/")[2],
        kind=unlocked_class(type(module)).__name__,
        index=index,
        channels=_channels(module),
        axis=1,
        decay=decay_of(module),
        epsilon=float(getattr(module, "eps", 1e-5)),
        params_frozen=all(not parameter.requires_grad for parameter in own),
        stats_frozen=frozen and stored,
        policy="batch" if switched_off and not fixed else "inference" if frozen else "update",
        calls=place.calls,
        dtype=_dtype(module),
    )


def decay_of(module: Any) -> float:
    """Share of the old statistics that the next update keeps; torch stores the complement."""
    momentum = getattr(module, "momentum", 0.0)
    if momentum is None:  # cumulative average: the n-th update keeps (n - 1) / n
        counter = getattr(module, "num_batches_tracked", None)
        seen = 0 if counter is None else int(counter)
        return seen / (seen + 1)
    return 1.0 - float(momentum)


def _channels(module: Any) -> int | None:
    mean = module.running_mean
    if mean is None:
        return int(module.num_features) or None
    if isinstance(mean, nn.parameter.UninitializedTensorMixin):
        return None
    return int(mean.shape[0])


def _dtype(module: Any) -> str:
    tensors = [module.running_mean, *module.parameters(recurse=False)]
    known = [tensor for tensor in tensors if tensor is not None]
    return str(known[0].dtype).removeprefix("torch.") if known else "float32"


def set_mode(root: Any, *, training: bool) -> None:
    """Call ``train(training)``; an exported graph has its mode built in and refuses."""
    with suppress(NotImplementedError):
        root.train(training)


@contextmanager
def modes_kept(model: Any) -> Iterator[None]:
    """Put back the mode of every module and ``requires_grad`` of every parameter on any exit."""
    root = unwrapped(model)
    modes = [(module, module.training) for module in root.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def resolve(model: Any, reference: Any) -> Boundary:
    """Translate what a person writes into a boundary.

    Args:
        model: A torch module.
        reference: A path (``layer3/0/conv1`` or ``layer3.0.conv1``) or a module name that is unique
            in the model; an index into the root's children, also negative; a float in [0, 1], the
            share of leaf modules before the boundary; a module; a :class:`Boundary`; ``None`` for
            the end of the model.

    Raises:
        ModelError: No such module (with the closest names), an ambiguous name, an index or fraction
            out of range.
    """
    places = walk(model)
    count = sum(1 for _ in unwrapped(model).children())
    end = Boundary(path=None, index=count)
    if isinstance(reference, Boundary):
        reference = reference.path
    if reference is None:
        return end
    place: Place | None
    if isinstance(reference, str):
        place = _by_name(places, reference)
    elif isinstance(reference, nn.Module):
        place = _by_module(places, reference)
    elif isinstance(reference, float):
        place = _by_fraction(places, reference)
    else:
        place = _by_index(places, reference, count)
    return end if place is None else Boundary(path=place.path, index=place.top)


def _by_name(places: tuple[Place, ...], reference: str) -> Place:
    wanted = reference.replace(".", "/")
    for place in places:
        if place.path == wanted:
            return place
    named = [place for place in places if place.path.rpartition("/")[2] == reference]
    if len(named) == 1:
        return named[0]
    if named:
        listed = ", ".join(repr(place.path) for place in named[:5])
        raise ModelError(
            f"boundary {reference!r} names {len(named)} modules; use one of the paths {listed}. "
            f"Received: {reference!r}"
        )
    close = difflib.get_close_matches(wanted, [place.path for place in places], n=3, cutoff=0.5)
    hint = f"Closest: {', '.join(map(repr, close))}. " if close else ""
    raise ModelError(
        f"boundary {reference!r} is not a module of this model. {hint}Received: {reference!r}"
    )


def _by_module(places: tuple[Place, ...], reference: Any) -> Place:
    for place in places:
        if place.module is reference:
            return place
    raise ModelError(
        "this module is not part of the model. "
        f"Received: {type(reference).__module__}.{type(reference).__qualname__}"
    )


def _by_fraction(places: tuple[Place, ...], reference: float) -> Place | None:
    if not 0.0 <= reference <= 1.0:
        raise ModelError(
            f"a fractional boundary must be between 0.0 and 1.0. Received: {reference!r}"
        )
    leaves = [place for place in places if place.leaf]
    cut = round(reference * len(leaves))
    return leaves[cut] if cut < len(leaves) else None


def _by_index(places: tuple[Place, ...], reference: Any, count: int) -> Place | None:
    index = None
    with suppress(TypeError):
        index = None if isinstance(reference, bool) else operator.index(reference)
    if index is None:
        raise ModelError(
            "a boundary is a module name, a path, an index, a fraction or a module. "
            f"Received: {reference!r} ({type(reference).__name__})"
        )
    if not -count <= index <= count:
        raise ModelError(
            f"boundary index must be between {-count} and {count} for this model's {count} "
            f"children. Received: {reference!r}"
        )
    index = index + count if index < 0 else index
    return next((place for place in places if place.top == index), None) if index < count else None
