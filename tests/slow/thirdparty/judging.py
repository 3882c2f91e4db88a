"""What holds an answer to its oracle."""

from __future__ import annotations


class Wrong(AssertionError):
    """A verb's answer is not the oracle's."""


def require(holds: bool, text: str) -> None:
    """Raise where an answer is wrong."""
    if not holds:
        raise Wrong(text)
