"""Put layers and models back as they were when a change of them fails half-way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np


@dataclass(frozen=True)
class Attributes:
    """An object's class and attributes, and what the containers among them held."""

    owner: Any
    kind: type
    values: dict[str, Any]
    contents: list[tuple[Any, Any]]

    @classmethod
    def of(cls, owner: Any) -> Attributes:
        """Read them."""
        values = dict(vars(owner))
        tracker = values.get("_tracker")  # has a set of ids per kind of object
        containers = [*values.values(), *getattr(tracker, "stored_ids", {}).values()]
        kept = [c for c in containers if isinstance(c, (list, dict, set))]
        return cls(owner, type(owner), values, [(c, _plain(c)) for c in kept])

    def restore(self) -> None:
        """Put them back; every object stays the one it is."""
        if type(self.owner) is not self.kind:
            self.owner.__class__ = self.kind
        vars(self.owner).clear()
        vars(self.owner).update(self.values)
        for container, content in self.contents:
            _refill(container, content)


@contextmanager
def undone_on_failure(owners: Iterable[Any], variables: Iterable[Any]) -> Iterator[None]:
    """Take back what the block did to some objects if it raises anything, bit for bit.

    Args:
        owners: Layers and models whose class and attributes may change.
        variables: Variables whose values, flags and regularizers may change.
    """
    kept = [Attributes.of(owner) for owner in owners]
    marks = [(variable, variable.trainable, variable.regularizer) for variable in variables]
    values = [
        (variable, np.array(keras.ops.convert_to_numpy(variable)))
        for variable, _, _ in marks
        if getattr(variable, "_value", True) is not None  # inside a running fit() of JAX
    ]
    try:
        yield
    except BaseException:
        for attributes in kept:
            attributes.restore()
        for variable, trainable, regularizer in marks:
            variable.trainable = trainable
            variable.regularizer = regularizer
        for variable, value in values:
            if keras.ops.convert_to_numpy(variable).tobytes() != value.tobytes():
                variable.assign(value)
        raise


def _plain(container: Any) -> Any:
    return _kind(container)(container)


def _kind(container: Any) -> Any:
    return next(kind for kind in (list, dict, set) if isinstance(container, kind))


def _refill(container: Any, content: Any) -> None:
    """Give a container its content back; untouched if it has it."""
    if _identities(_plain(container)) == _identities(content):
        return
    kind = _kind(container)
    add = "extend" if kind is list else "update"
    if type(container).__module__.startswith("keras."):
        # Keras' tracked containers would track all of it again: the plain methods do not.
        kind.clear(container)
        getattr(kind, add)(container, content)
    else:
        container.clear()
        getattr(container, add)(content)


def _identities(content: Any) -> Any:
    # Variables compare by value, element by element; what matters here is which they are.
    if isinstance(content, set):
        return content
    if isinstance(content, dict):
        return [(key, id(value)) for key, value in content.items()]
    return [id(value) for value in content]
