"""Walk a torch module: hierarchical paths, BN sites, boundaries. Reads only.

A path is the module's own dotted name with slashes: ``layer1.0.bn1`` is ``layer1/0/bn1``. Both
spellings are understood. A module that is registered twice has the first of its names. Order is
the order of registration, which is execution order for nearly every network; a module cannot say
more without being run.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from frostline.adapters.torch import script
from frostline.adapters.torch.keeping import (
    by_hand,
    calls_norm,
    keeps_any,
    may_hand_over,
    mean_of,
    replaces_norm,
)
from frostline.adapters.torch.locked import is_locked
from frostline.adapters.torch.state_kept import OF_EVERY_MODULE
from frostline.atomic import taken_back
from frostline.graph import addresses
from frostline.graph.addresses import Layers, Place
from frostline.types import Boundary, ModelError, Site

#: Buffers of the FrozenBatchNorm classes of torchvision, detectron2, timm and transformers.
_FROZEN_BUFFERS = frozenset({"weight", "bias", "running_mean", "running_var"})
_BATCH_NORM = inspect.signature(functional.batch_norm)
_OF_A_CALL = ("running_mean", "training", "momentum", "eps")


def unwrapped(model: Any) -> Any:
    """The module inside of `torch.compile`, DataParallel and DistributedDataParallel.

    Of a TorchScript program, the module that reads it, also inside of another module.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return script.read(model) if script.is_program(model) else script.host(model)


def without_values(received: str) -> ModelError:
    """The error for a model on the device that stores nothing."""
    return ModelError(
        "the model is on the 'meta' device, where tensors have no values; load its weights first: "
        f"model.to_empty(device='cpu'), then load_state_dict. Received: {received} without values"
    )


def not_built(name: str) -> ModelError:
    """The error for a module that its first data will build."""
    return ModelError(
        f"'{name}' is lazy and has seen no data yet; call the model on one batch first. "
        "Received: an uninitialised module"
    )


def require_built(root: Any) -> None:
    """Refuse a lazy module that has seen no data: the first pass would build it.

    Raises:
        ModelError: A parameter or buffer without a shape.
    """
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise not_built(name.rpartition(".")[0].replace(".", "/"))


def require_there(root: Any, known: Collection[str]) -> None:
    """Refuse a BN layer that ``forward`` makes at inference: it begins in training mode.

    Args:
        root: The module after a call.
        known: Dotted names of the modules in it before.

    Raises:
        ModelError: There is one.
    """
    for name, module in root.named_modules() if not root.training else ():
        if name not in known and module.training and is_site(module):
            raise ModelError(
                f"the model makes '{name.replace('.', '/')}' when it is called, so there is no "
                "such layer to look at yet; call the model on one batch first. "
                f"Received: {type(root).__name__}"
            )


def require_runnable(root: Any) -> None:
    """Refuse a container whose parts somebody else calls, and weights without values.

    Raises:
        ModelError: The module has no ``forward``, or a tensor on the meta device.
    """
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if tensor.device.type == "meta":
            raise without_values(f"'{name}'")
    if type(root).forward is nn.Module.forward and "forward" not in vars(root):
        parts = ", ".join(repr(name) for name, _ in root.named_children()) or "none"
        raise ModelError(
            f"{type(root).__name__} has no forward, so only your step knows how its parts are "
            "called: pass the part that is meant, or a module whose forward calls them. "
            f"Received: {type(root).__name__} of {parts}"
        )


def require_registered(root: Any) -> None:
    """Refuse a model with BN that it does not know of: a part of it could not be told apart.

    Raises:
        ModelError: Such BN, by its path.
    """
    for path, site in _unregistered(root).items():
        raise ModelError(
            f"'{path}' is in a plain list or mapping, so freezing, eval() and state_dict() do not "
            "reach it, and nothing can be said of the part that calls it. Put it into an "
            f"nn.ModuleList or nn.ModuleDict. Received: {type(site).__name__}"
        )


def is_site(module: Any) -> bool:
    """Whether the module normalises with stored statistics, whatever class it has.

    That is torch's BN and its subclasses, InstanceNorm that tracks running statistics, a
    FrozenBatchNorm of some library, and a user's own class that keeps a mean and a variance and
    calls ``batch_norm`` or ``instance_norm``, or computes the same by hand. BN that keeps no
    statistics (``track_running_stats=False`` from the start) uses those of the batch in both
    phases; it is a site as well.
    """
    if isinstance(module, _BatchNorm) or is_frozen_kind(module):
        return True
    kind: Any = type(module)
    if not isinstance(module, nn.Module) or mean_of(module) is None:
        return False
    if isinstance(module, _InstanceNorm) or calls_norm(kind):
        return True
    return by_hand(module) is not None


def keeps_unknown_statistics(module: Any) -> bool:
    """Whether it keeps running statistics and computes with them by hand, as no known BN does.

    A subclass of torch's norms whose own ``forward`` does so is a site all the same.
    """
    if is_site(module):
        kind: Any = type(module)
        own = isinstance(module, (_BatchNorm, _InstanceNorm)) and replaces_norm(kind)
        return own and by_hand(module) is None
    return keeps_any(module)


def unknown_keepers(model: Any) -> dict[str, Any]:
    """Path -> module of what keeps running statistics and computes with them as no known BN.

    So does BN that torch does not know of, for it is in a plain list: ``train()``, ``eval()``,
    ``to()`` and ``state_dict()`` do not reach it.
    """
    root = unwrapped(model)
    found = {
        name.replace(".", "/") or type(root).__name__: module
        for name, module in root.named_modules()
        if keeps_unknown_statistics(module)
    }
    return found | _unregistered(root)


def _unregistered(root: Any) -> dict[str, Any]:
    """Path -> BN in training mode in a list, tuple or mapping that a module keeps."""
    inside = {id(module) for module in root.modules()}
    return {
        "/".join(filter(None, (name, attribute, str(key), inner))).replace(".", "/"): site
        for name, module in root.named_modules()
        for attribute, held in vars(module).items()
        if isinstance(held, (list, tuple, dict)) and attribute not in OF_EVERY_MODULE
        for key, outside in (held.items() if isinstance(held, dict) else enumerate(held))
        if isinstance(outside, nn.Module)
        for inner, site in outside.named_modules()
        if id(site) not in inside and site.training and keeps_any(site)
    }


def handing_over(model: Any) -> dict[str, str]:
    """Path -> class of what may hand the statistics of a layer to a function, as its code reads.

    The calls of a graph are known: nothing has to be read off their code.
    """
    return {
        name.replace(".", "/"): type(module).__name__
        for name, module in unwrapped(model).named_modules()
        if may_hand_over(module.__class__)
        and not isinstance(module, (fx.GraphModule, torch.jit.ScriptModule))
        and not is_site(module)
        and any(is_site(inner) for inner in module.modules())
    }


def is_frozen_kind(module: Any) -> bool:
    """Whether it is a BN layer whose parameters are all buffers, which never moves."""
    norms = (_BatchNorm, _InstanceNorm)
    if isinstance(module, norms) or not isinstance(module, nn.Module):
        return False
    return set(module._buffers.keys()) >= _FROZEN_BUFFERS  # TorchScript has no iterator of them


def calls_in_graphs(root: Any, *, exported: bool = False) -> dict[Any, tuple[bool, float, float]]:
    """What graphs call ``batch_norm`` with, by the holder of the statistics.

    Args:
        root: A module.
        exported: Of graphs of ``torch.export`` alone; else also of those of ``torch.fx``, such as
            the parts that :func:`frostline.split` makes once they are saved.

    Returns:
        Whether it asks for those of its input, the momentum, and epsilon.
    """
    found: dict[Any, tuple[bool, float, float]] = {}
    for module in root.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        one = type(module).train is nn.Module.train  # else it may change its graph with its mode
        for node in module.graph.nodes:
            if node.target is torch.ops.aten.batch_norm.default:
                mean, *call = (node.args[place] for place in (3, 5, 6, 7))
            elif node.target is functional.batch_norm and one and not exported:
                given = _BATCH_NORM.bind(*node.args, **node.kwargs)
                given.apply_defaults()
                mean, *call = (given.arguments[name] for name in _OF_A_CALL)
            else:
                continue
            if isinstance(mean, fx.Node) and mean.op == "get_attr":
                holder = module.get_submodule(mean.target.rpartition(".")[0])
                traced = node.target is functional.batch_norm
                # Of a module with a forward of its own the graph may be one of several callers.
                if not traced or (type(holder) is nn.Module and not any(map(_is_node, call))):
                    found[holder] = (call[0], call[1], call[2])
    return found


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def fixed_in_graphs(root: Any, *, exported: bool = False) -> set[Any]:
    """Holders of the statistics that graphs normalise with in any mode."""
    calls = calls_in_graphs(root, exported=exported)
    return {holder for holder, call in calls.items() if call[0] is False}


def is_fixed(module: Any, fixed: set[Any]) -> bool:
    """Whether what calls a site gives it stored statistics in any mode."""
    return script.is_fixed(module) or module in fixed


def walk(model: Any) -> tuple[Place, ...]:
    """Every module below the root, once; the root itself where it is a site."""
    return _walked(model)[0]


def _walked(model: Any) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """All places, and those that are BN layers."""
    root = unwrapped(model)
    found = {id(module) for module in root.modules() if is_site(module)}
    counts = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
    children = {name: index for index, (name, _) in enumerate(root.named_children())}
    places = tuple(
        Place(
            path=name.replace(".", "/") or type(root).__name__,
            name=name.rpartition(".")[2] or type(root).__name__,
            layer=module,
            order=order,
            calls=counts[id(module)],
            leaf=not any(map(_there, module._modules.values())) or id(module) in found,
            top=children.get(name.partition(".")[0], 0),
        )
        for order, (name, module) in enumerate(root.named_modules())
        if name or id(module) in found
    )
    return places, tuple(place for place in places if id(place.module) in found)


def _there(module: Any) -> bool:
    return module is not None


def site_places(model: Any) -> tuple[Place, ...]:
    """The places that are BN layers."""
    return _walked(model)[1]


def site_modules(model: Any) -> dict[str, Any]:
    """Path -> module of every BN layer."""
    return {place.path: place.module for place in site_places(model)}


def sites(model: Any) -> tuple[Site, ...]:
    """Every BN layer of ``model``.

    ``stats_frozen`` is what holds in training: in a model that is in training mode, what its
    modules are in now; else what its own ``train()`` will leave frozen.
    """
    all_places, places = _walked(model)
    modes = [bool(place.module.training) for place in places]
    if not unwrapped(model).training:
        modes = modes_in_training(model, places)
    around, calls = _frozen_around(all_places), calls_in_graphs(unwrapped(model))
    return tuple(
        _site(place, index, mode, around[place.path], calls.get(place.module))
        for index, (place, mode) in enumerate(zip(places, modes, strict=True))
    )


def _frozen_around(places: tuple[Place, ...]) -> dict[str, bool]:
    """Path of each place -> whether the parameters before it (at the beginning: behind) are frozen.

    That is what "frozen" means for a site without parameters of its own.
    """
    owned = [(place.path, own_parameters(place.module)) for place in places]
    known = [not any(p.requires_grad for p in own) for _, own in owned if own]
    before = known[0] if known else True
    found: dict[str, bool] = {}
    for path, own in owned:
        if own:
            before = not any(p.requires_grad for p in own)
        found[path] = before
    return found


def frozen_prefix(
    model: Any, found: tuple[Site, ...] | None = None
) -> tuple[int | None, str | None]:
    """How many sites lie before the first module with parameters that trains, and its path."""

    def trains(place: Place) -> bool | None:
        own = own_parameters(place.module)
        return any(parameter.requires_grad for parameter in own) if own else None

    return addresses.frozen_prefix(walk(model), sites(model) if found is None else found, trains)


def modes_in_training(model: Any, places: tuple[Place, ...]) -> list[bool]:
    """Mode of each module after the model's own ``train()``, which some models override."""
    with modes_kept(model):
        set_mode(unwrapped(model), training=True)
        return [bool(place.module.training) for place in places]


def own_parameters(module: Any) -> list[Any]:
    """Parameters that a module holds itself."""
    held = {id(parameter): parameter for parameter in module._parameters.values()}
    return [parameter for parameter in held.values() if parameter is not None]


def _site(
    place: Place, index: int, training: bool, around: bool, call: tuple[bool, float, float] | None
) -> Site:
    """A site as it is in training; ``call``: what an exported graph calls it with."""
    module = place.module
    epsilon, decay = float(getattr(module, "eps", 1e-5)), decay_of(module)
    if call is not None:
        training, epsilon, decay = call[0], call[2], 1.0 - call[1]
    own = own_parameters(module)
    fixed = is_frozen_kind(module) or is_locked(module)
    stored = mean_of(module) is not None
    switched_off = stored and not getattr(module, "track_running_stats", True)
    frozen = fixed or switched_off or not training
    return Site(
        path=place.path,
        name=place.path.rpartition("/")[2],
        kind=type(module).__name__,
        index=index,
        channels=_channels(module),
        axis=1,
        decay=decay,
        epsilon=epsilon,
        params_frozen=around or (not own and frozen and stored),
        stats_frozen=frozen and stored,
        policy="batch" if switched_off and not fixed else "inference" if frozen else "update",
        calls=place.calls,
        dtype=_dtype(module),
    )


def decay_of(module: Any) -> float:
    """Share of the old statistics that the next update keeps; torch stores the complement."""
    if (hand := by_hand(module)) is not None:
        return hand.decay_of(module)
    # A class that has none calls torch's function, most likely with the default.
    momentum = getattr(module, "momentum", 0.0 if is_frozen_kind(module) else 0.1)
    if momentum is None:  # cumulative average: the n-th update keeps (n - 1) / n
        counter = getattr(module, "num_batches_tracked", None)
        seen = 0 if counter is None else int(counter)
        return seen / (seen + 1)
    return 1.0 - float(momentum)


def _channels(module: Any) -> int | None:
    mean = mean_of(module)
    if mean is None:
        return int(module.num_features) or None
    if isinstance(mean, nn.parameter.UninitializedTensorMixin):
        return None
    return int(mean.shape[0])


def _dtype(module: Any) -> str:
    tensors = [mean_of(module), *own_parameters(module)]
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

    def back() -> None:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    with taken_back(back):
        yield


def layers(model: Any) -> Layers:
    """All modules with their addresses."""
    top = tuple(unwrapped(model).children())
    return Layers(places=walk(model), top=top, word="module", kind=nn.Module)


def resolve(model: Any, reference: Any) -> Boundary:
    """Translate a module name, path, index, fraction or module into a boundary."""
    return layers(model).resolve(reference)
