"""Fingerprint of an augmentation, part of the cache key, so that another one never hits."""

from __future__ import annotations

from typing import Any

from frostline.adapters import prefix as prefixes
from frostline.adapters.computation import hashed
from frostline.types import DataError


def augmentation_identity(augment: Any, name: str | None = None) -> str:
    """Return a string that differs when the augmentation does.

    Args:
        augment: ``(x, seed) -> x``: a function, a ``functools.partial``, any object that can be
            called, or a Keras layer.
        name: What the user calls it; then this alone counts.

    Raises:
        DataError: It uses a value that cannot be read off.
    """
    if name is not None:
        return hashed("named", name)
    found = prefixes.function_identity(augment)
    if found.private:
        raise DataError(
            f"the augmentation uses {found.private}, so a change in it would go unseen and wrong "
            "features would be reused; pass augment_name='...' and change it when the augmentation "
            f"changes. Received: {augment!r}"
        )
    return hashed("augment", found.text)
