"""Which state of Frostline's code a result was made on."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import frostline as fl


@functools.cache
def digest() -> str:
    """Return a hash of the sources, so that runs of one state of the code are known as such."""
    found = hashlib.sha256()
    for path in sorted(Path(fl.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]
