"""Dropout of one side of a torch module: which rates it has, to be turned off and given back.

Seen are modules by the name of their class, and numbers that any module keeps as ``dropout`` or
``attention_dropout``, as torch's recurrent and attention modules do for what they compute inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frostline.adapters.dropout_rate import DropoutRate, Rates, dropout_rates, turned_on
from frostline.adapters.torch.forward_pass import noise_layers
from frostline.adapters.torch.graph import unwrapped
from frostline.graph.addresses import Place
from frostline.types import ModelError

_ANYWHERE = ("dropout", "attention_dropout")


def rates(model: Any) -> Rates:
    """Every rate of a module as it is now."""
    return Rates.of(rate for module in unwrapped(model).modules() for rate in dropout_rates(module))


def turn_off(model: Any, chosen: Sequence[Place]) -> int:
    """Turn off all dropout in these places; returns the number of modules that dropped something.

    Raises:
        ModelError: A module that drops, but none of whose attributes is known to be its rate; no
            rate has changed then.
    """
    kinds = noise_layers(model)
    found: list[tuple[str, list[DropoutRate]]] = []
    for place in chosen:
        drops = kinds.get(place.path) == "dropout"
        own = [
            rate
            for rate in dropout_rates(place.module)
            if not rate.is_off and (drops or rate.name in _ANYWHERE)
        ]
        inside = any(path.startswith(f"{place.path}/") for path in kinds)
        if drops and not own and not inside:
            raise ModelError(
                f"'{place.path}' drops values in training, but none of its attributes is known to "
                "be the rate; set it to 0 yourself and freeze without dropout=True. "
                f"Received: {type(place.module).__module__}.{type(place.module).__qualname__}"
            )
        if own:
            found.append((place.path, own))
    for _, group in found:
        for rate in group:
            rate.turn_off()
    return _innermost([path for path, _ in found])


def turn_on(chosen: Sequence[Place]) -> int:
    """Give back what :func:`turn_off` took in these places; returns the number of modules."""
    return _innermost([place.path for place in chosen if turned_on(dropout_rates(place.module))])


def _innermost(paths: Sequence[str]) -> int:
    """How many of these hold none of the others."""
    return sum(not any(other.startswith(f"{path}/") for other in paths) for path in paths)
