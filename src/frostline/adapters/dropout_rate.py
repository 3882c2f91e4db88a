"""Turn dropout off by its rate, and give it back; the same for Keras layers and torch modules.

A rate of 0 is the identity in training and at inference, it is what every reader of a model takes
for "no dropout", and Keras saves it. The old value stays beside it, on the object itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: Attribute that says how much is dropped -> its value where nothing is.
OFF: Mapping[str, float] = {
    "rate": 0.0,
    "p": 0.0,
    "drop_prob": 0.0,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "_dropout": 0.0,
    "attention_dropout": 0.0,
    "recurrent_dropout": 0.0,
    "stddev": 0.0,
    "survival_probability": 1.0,
}
#: What to do about dropout in a part that should be frozen, behind what it does there.
TURN_OFF = "; freeze(dropout=True) turns it off"
#: Where an object keeps the rates that were turned off.
KEPT_RATES = "_frostline_rates"


@dataclass(frozen=True, eq=False)
class DropoutRate:
    """An attribute of an object that holds a rate."""

    owner: Any
    name: str

    @property
    def value(self) -> float:
        """The rate as it is now."""
        return float(getattr(self.owner, self.name))

    @property
    def is_off(self) -> bool:
        """Whether nothing is dropped."""
        return self.value == OFF[self.name]

    @property
    def kept(self) -> Any:
        """The rate before :meth:`turn_off`, or ``None``."""
        return vars(self.owner).get(KEPT_RATES, {}).get(self.name)

    def turn_off(self) -> bool:
        """Set it to the identity; returns whether it was another value."""
        if self.is_off:
            return False
        self._keep(getattr(self.owner, self.name))
        setattr(self.owner, self.name, type(getattr(self.owner, self.name))(OFF[self.name]))
        return True

    def turn_on(self) -> bool:
        """Give it the rate that :meth:`turn_off` found; returns whether it changed."""
        kept = self.kept
        if kept is None:
            return False
        self._keep(None)
        if not self.is_off:  # somebody has set it since
            return False
        setattr(self.owner, self.name, kept)
        return True

    def _keep(self, value: Any) -> None:
        # Not by setattr: Keras would track the dict, and freeze it into what it saves.
        others = {k: v for k, v in vars(self.owner).get(KEPT_RATES, {}).items() if k != self.name}
        found = others if value is None else {**others, self.name: value}
        if found:
            vars(self.owner)[KEPT_RATES] = found
        else:
            vars(self.owner).pop(KEPT_RATES, None)


@dataclass(frozen=True, eq=False)
class Rates:
    """Values of dropout rates, to be put back."""

    values: tuple[tuple[DropoutRate, Any, Any], ...]

    @classmethod
    def of(cls, rates: Iterable[DropoutRate]) -> Rates:
        """Read them."""
        return cls(tuple((rate, getattr(rate.owner, rate.name), rate.kept) for rate in rates))

    def restore(self) -> None:
        """Put them back, and what was kept."""
        for rate, value, kept in self.values:
            if getattr(rate.owner, rate.name) != value:
                setattr(rate.owner, rate.name, value)
            rate._keep(kept)


def dropout_rates(owner: Any) -> list[DropoutRate]:
    """The rates that an object holds itself; a property that reads another object's is none."""
    return [
        DropoutRate(owner, name)
        for name in OFF
        if isinstance(vars(owner).get(name), (int, float))
        and not isinstance(vars(owner).get(name), bool)
    ]


def turned_on(found: Iterable[DropoutRate]) -> bool:
    """Turn every one of them on; returns whether any changed."""
    changed = [rate.turn_on() for rate in found]
    return any(changed)


def all_off(owner: Any) -> bool:
    """Whether an object has rates, as attributes or properties, and all of them drop nothing."""
    values = {name: getattr(owner, name) for name in OFF if hasattr(owner, name)}
    numbers = {name: v for name, v in values.items() if isinstance(v, (int, float))}
    return bool(numbers) and all(value == OFF[name] for name, value in numbers.items())
