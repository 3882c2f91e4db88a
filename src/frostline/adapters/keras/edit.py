"""Change a Keras model in place: `trainable` flags, and stock BN layers into ours and back.

The verbs leave the model as it was if one raises. Optimizers keep their state: one that does
not know all variables which may train from now on is built again, slot by slot.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from frostline.adapters.dropout_rate import Rates
from frostline.adapters.keras import dropout as keras_dropout, state as keras_state
from frostline.adapters.keras.graph import is_site, walk, wrapped_module
from frostline.adapters.keras.optimizer import retarget
from frostline.adapters.protocol import FlagCounts, FreezeRequest
from frostline.graph import addresses
from frostline.graph.addresses import Place
from frostline.types import Boundary, ModelError, Policy

Stock = keras.layers.BatchNormalization


@dataclass(frozen=True, kw_only=True)
class Flags:
    """`trainable` of every layer and variable, dropout rates; put back by :func:`set_flags`."""

    layers: tuple[tuple[Any, bool], ...]
    variables: tuple[tuple[Any, bool], ...]
    policies: tuple[tuple[Any, Policy], ...]
    rates: Rates


def flags(model: Any) -> Flags:
    """Read the flags of ``model``."""
    layers = [model, *(place.layer for place in walk(model))]
    # A model that was frozen before it was built has an input layer that is not.
    every = {id(layer): layer for layer in (*layers, *model._flatten_layers())}.values()
    return Flags(
        layers=tuple((layer, bool(layer.trainable)) for layer in every),
        variables=tuple((v, bool(v.trainable)) for v in model.variables),
        policies=tuple((layer, layer.policy) for layer in layers if _ours(layer)),
        rates=keras_dropout.rates(model),
    )


def set_flags(wanted: Flags) -> None:
    """Put flags back; a container's setter flips what it contains, so containers come first.

    A layer that two containers share is flipped once more by the second one.
    """
    for layer, policy in wanted.policies:
        if _ours(layer):
            layer.policy = policy
    for layer, value in 2 * wanted.layers:
        if bool(layer.trainable) != value:
            layer.trainable = value
    for variable, value in wanted.variables:
        if variable.trainable != value:
            variable.trainable = value
    wanted.rates.restore()


def set_frozen(model: Any, request: FreezeRequest) -> tuple[FlagCounts, Callable[[], None]]:
    """Freeze or thaw every layer on one side of a boundary, in place.

    Returns:
        What changed, and what takes it back.

    Raises:
        ModelError: This layer cannot freeze one without the other, or its dropout rate is not
            known; names the layer and a way out.
    """
    places, undo = walk(model), functools.partial(set_flags, flags(model))
    there = addresses.side(places, request.boundary, before=request.before, paths=request.paths)
    frozen, params, statistics = request.frozen, request.params, request.statistics
    chosen = _with_weights(there) if params or statistics else []
    dropouts = 0
    if request.dropout:
        turn_off = keras_dropout.turn_off
        dropouts = turn_off(model, there) if frozen else keras_dropout.turn_on(there)
    changed = [place for place in chosen if set_place(place, frozen, params, statistics)]
    if not frozen:
        open_containers(model, places, chosen)
    counts = _counts([place.layer for place in changed], params, dropouts)
    if request.everything and params:  # what the model holds itself, a token for example
        own = [v for v in model._trainable_variables if v.trainable == frozen]
        for variable in own:
            variable.trainable = not frozen
        held = sum(math.prod(int(n) for n in v.shape) for v in own)
        counts = dataclasses.replace(counts, parameters=counts.parameters + held)
    return counts, undo


def _counts(changed: Sequence[Any], params: bool = True, dropouts: int = 0) -> FlagCounts:
    return FlagCounts(
        layers=len(changed),
        sites=sum(map(is_site, changed)),
        parameters=sum(map(_parameters, changed)) if params else 0,
        stock_sites=sum(is_site(layer) and not _ours(layer) for layer in changed),
        dropouts=dropouts,
    )


def side(places: tuple[Place, ...], boundary: Boundary, *, before: bool) -> list[Place]:
    """Leaves (and containers with weights of their own) on one side, in execution order."""
    return _with_weights(addresses.side(places, boundary, before=before))


def _with_weights(places: list[Place]) -> list[Place]:
    return [place for place in places if place.leaf or _has_own_weights(place.layer)]


def _has_own_weights(layer: Any) -> bool:
    return bool(layer._trainable_variables or layer._non_trainable_variables)


def _parameters(layer: Any) -> int:
    return sum(math.prod(int(n) for n in v.shape) for v in layer._trainable_variables)


def set_place(place: Place, frozen: bool, params: bool, statistics: bool) -> bool:
    """Set one layer; returns whether it changed."""
    layer = place.layer
    if wrapped_module(layer) is not None and statistics and frozen and _wraps_bn(layer):
        raise ModelError(
            f"'{place.path}' is a TorchModuleWrapper with BN inside: Keras cannot freeze the "
            "statistics of torch modules, they would go on moving. Rebuild that part from Keras "
            f"layers. Received: {place.path!r}"
        )
    if is_site(layer) and params != statistics:
        return _set_half(place, frozen, params)
    if not is_site(layer) and not params:
        return False
    if place.leaf:
        if bool(layer.trainable) == (not frozen):
            return False
        layer.trainable = not frozen
        return True
    own = layer._trainable_variables  # a container: only the weights that it holds itself
    if all(v.trainable == (not frozen) for v in own):
        return False
    for variable in own:
        variable.trainable = not frozen
    return True


def _set_half(place: Place, frozen: bool, params: bool) -> bool:
    """Freeze or thaw either gamma and beta or the statistics of a BN layer, not the other."""
    layer = place.layer
    own = [variable for variable in (layer.gamma, layer.beta) if variable is not None]
    if not params and _ours(layer):
        raise ModelError(
            f"'{place.path}': Frostline's layer freezes gamma and beta together with the "
            "statistics; fl.restore(model) gives back the stock layer, which can freeze the "
            "statistics alone. Received: params=False"
        )
    if not params:
        # Keras normalises by the flag of the layer, but trains by the flags of the variables.
        if bool(layer.trainable) == (not frozen):
            return False
        kept = [(variable, bool(variable.trainable)) for variable in own]
        layer.trainable = not frozen
        for variable, value in kept:
            variable.trainable = value
        return True
    if _ours(layer):
        # Frozen under policy "update": gamma and beta are held, batch statistics and updates go on.
        wanted: tuple[bool, Policy] = (not frozen, "update" if frozen else layer.policy)
        if (bool(layer.trainable), layer.policy) == wanted:
            return False
        layer.trainable, layer.policy = wanted
        return True
    if all(variable.trainable == (not frozen) for variable in own):
        return False
    for variable in own:
        variable.trainable = not frozen
    return True


def _wraps_bn(layer: Any) -> bool:
    norm = sys.modules["torch"].nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, norm) for module in wrapped_module(layer).modules())  # type: ignore[union-attr]


def open_containers(model: Any, places: tuple[Place, ...], thawed: list[Place]) -> None:
    """Let containers of thawed layers train, without flipping what else they contain."""
    around = {path for place in thawed for path in addresses.ancestors(place.path)}
    closed = [model] if thawed and not model.trainable else []
    closed += [p.layer for p in places if p.path in around and not p.layer.trainable]
    if not closed:
        return
    inner = [(place.layer, bool(place.layer.trainable)) for place in places]
    ids = {id(layer) for layer in closed}
    for layer in closed:
        layer.trainable = True
    for layer, value in inner:
        if id(layer) not in ids and bool(layer.trainable) != value:
            layer.trainable = value


def freezer(targets: Sequence[Any]) -> tuple[Callable[[], FlagCounts], Callable[[], None]]:
    """What freezes layers with all that they contain, and what puts the flags back."""
    before = [flags(target) for target in targets]

    def freeze() -> FlagCounts:
        # A layer may be in two of the targets, and is counted once.
        inner = {
            id(layer): layer for target in targets for layer in (target, *_layers_below(target))
        }
        leaves = [layer for layer in inner.values() if not _layers_below(layer)]
        changed = [layer for layer in leaves if layer.trainable]
        for target in targets:
            target.trainable = False
        return _counts(changed)

    def back() -> None:
        for held in before:
            set_flags(held)

    return freeze, back


def _layers_below(layer: Any) -> list[Any]:
    return [place.layer for place in walk(layer)]


# --- conversion ---------------------------------------------------------------------------------


def _ours(layer: Any) -> bool:
    from frostline.layers import BatchNormalization

    return isinstance(layer, BatchNormalization)


def convert(model: Any, *, version: str | None, policy: Policy | None, debias: bool | None) -> int:
    """Turn every BN layer of ``model`` into ours, in place; returns how many there are.

    Raises:
        ModelError: A BN layer of a user's own class or one that is not built yet, with its path;
            settings that contradict each other. The model is unchanged.
    """
    from frostline import layers

    found = [place for place in walk(model) if is_site(place.layer)]
    for place in found:
        if type(place.layer) not in (Stock, layers.BatchNormalization):
            raise ModelError(
                f"'{place.path}' is a {type(place.layer).__name__}, a BN class of your own: "
                "convert knows keras.layers.BatchNormalization only, because yours may compute "
                "something else. Derive it from frostline.layers.BatchNormalization instead. "
                f"Received: {type(place.layer).__module__}.{type(place.layer).__qualname__}"
            )
        if not place.layer.built:
            raise ModelError(
                f"'{place.path}' has no weights yet: build the model first, for example by calling "
                f"it once on a batch. Received: an unbuilt model {model.name!r}"
            )
    for place in found:
        settings = _settings(place.layer, version, policy, debias)
        try:
            layers.adopt(place.layer, **settings)
        except ValueError as problem:
            raise ModelError(str(problem)) from problem
    _renew(model)
    return len(found)


def _settings(
    layer: Any, version: str | None, policy: Policy | None, debias: bool | None
) -> dict[str, Any]:
    """The settings given; where none is given, those that the layer has."""
    if version is not None:
        given = {"policy": policy, "debias": debias}
        return {"version": version, **{k: v for k, v in given.items() if v is not None}}
    present = _current(layer) or {"policy": "inference", "debias": False, "version": None}
    if policy is None and debias is None:
        return present
    return {
        "version": None,
        "policy": present["policy"] if policy is None else policy,
        "debias": present["debias"] if debias is None else debias,
    }


def _current(layer: Any) -> dict[str, Any] | None:
    if not _ours(layer):
        return None
    return {"policy": layer.policy, "debias": layer.debias, "version": layer.version}


def to_stock(model: Any) -> int:
    """Turn every one of our layers back into a stock layer, in place; returns how many."""
    from frostline import layers

    found = [place.layer for place in walk(model) if type(place.layer) is layers.BatchNormalization]
    for layer in found:
        layers.dismiss(layer)
    _renew(model)
    return len(found)


def _renew(model: Any) -> None:
    """Drop compiled steps, and let optimizers know every variable that may train now."""
    for owner in keras_state.models_in(model):
        for name in ("train_function", "test_function", "predict_function"):
            if getattr(owner, name, None) is not None:
                setattr(owner, name, None)
        retarget(owner)
