"""Attributes of Keras objects, replaced for a block without Keras tracking the new values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from frostline.atomic import taken_back

_ABSENT = object()


@contextmanager
def overridden(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes of objects; on any exit each object has its own again.

    Args:
        changes: (object, name of the attribute, value).
    """
    changes = list(changes)
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in changes]

    def back() -> None:
        for owner, name, value in before:
            vars(owner).pop(name, None)
            if value is not _ABSENT:
                vars(owner)[name] = value

    with taken_back(back):
        for owner, name, value in changes:
            vars(owner)[name] = value
        yield
