"""Set the decay of BN sites of a Keras model, wrapped torch modules included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from frostline.adapters.keras.graph import is_site, torch_modules, walk
from frostline.types import ModelError


def set_decay(model: Any, paths: Sequence[str], decay: float) -> tuple[int, Callable[[], None]]:
    """Give sites a decay; torch modules store its complement.

    Args:
        model: A Keras model.
        paths: Paths of BN sites.
        decay: Share of the old value that an update keeps.

    Returns:
        How many of them are stock Keras layers, whose momentum a traced step holds as a constant
        (0 on torch, whose steps are not traced), and a function that puts the old values back.

    Raises:
        ModelError: A path is no BN site; nothing is changed then.
    """
    owners = _owners(model)
    unknown = [path for path in paths if path not in owners]
    if unknown:
        raise ModelError(f"'{unknown[0]}' is not a BN site of this model. Received: {unknown!r}")
    before = [(owners[path][0], owners[path][0].momentum) for path in paths]

    def undo() -> None:
        for owner, value in before:
            owner.momentum = value

    for path in paths:
        owner, foreign = owners[path]
        owner.momentum = 1.0 - decay if foreign else decay
    stock = sum(not (owners[path][1] or hasattr(owners[path][0], "policy")) for path in paths)
    return 0 if keras.backend.backend() == "torch" else stock, undo


def momenta(model: Any) -> list[tuple[Any, Any]]:
    """What holds a momentum, and its value now."""
    return [(owner, owner.momentum) for owner, _ in _owners(model).values()]


def _owners(model: Any) -> dict[str, tuple[Any, bool]]:
    """Path -> (what has the momentum, whether in torch's convention); paths as in `sites`."""
    owners: dict[str, tuple[Any, bool]] = {}
    for place in walk(model):
        if is_site(place.layer):
            owners[place.path] = (place.layer, False)
        for path, module in torch_modules(place):
            if hasattr(module, "running_mean") and hasattr(module, "momentum"):
                owners[path] = (module, True)
    return owners
