"""What scenarios are made of in any framework: nouns, and real pixels.

The images are scikit-learn's digits, 8x8, doubled to 16x16. Nothing here knows how Frostline works.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

BACKENDS = ("tensorflow", "jax", "torch")
FILTERS = (8, 8, 16, 16)
NORMS = ("bn1", "bn2", "bn3", "bn4")
CLASSES = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """A model in trouble, and what its owner would hand to ``fl.diagnose``.

    Attributes:
        model: Compiled, as its owner has it.
        data: Second argument of ``fl.diagnose``.
        options: Further arguments.
        closable: A repair is known that brings inference to where training mode is.
        shown: What shows that the mechanism is at work, by name: measured without Frostline.
    """

    model: Any
    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    closable: bool = False
    shown: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case of the book, with the answer that its thread gives.

    Attributes:
        number: As in the book; ``H`` numbers are not in it.
        title: In a few words.
        expected: Codes of the causes that a right diagnosis names first; two for compound cases.
        build: Seed -> scenario; asserts that the mechanism shows.
        also: Codes that the book counts as right, too, in the place of the first.
        sites: Names of the BN layers to blame; ``None`` where the book names none.
        backends: Where the scenario can be built.
        everywhere: Belongs to the third that also runs on JAX and torch.
        in_suite: Is one of the tests; the others run with ``python -m tests.slow.casebook`` alone.
        source: Address of the thread that it is rebuilt from; empty for those of the book.
    """

    number: str
    title: str
    expected: tuple[str, ...]
    build: Callable[[int], Scenario]
    also: tuple[str, ...] = ()
    sites: frozenset[str] | None = None
    backends: tuple[str, ...] = BACKENDS
    everywhere: bool = False
    in_suite: bool = True
    source: str = ""


class Score(NamedTuple):
    """Mean loss and accuracy on some samples."""

    loss: float
    accuracy: float


# --- images -----------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1797 digits in a fixed random order: (n, 16, 16, 1) in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    order = np.random.default_rng(2026).permutation(len(bundle.target))
    images = (bundle.images[order] / 16.0).astype("float32")[..., None]
    return images.repeat(2, axis=1).repeat(2, axis=2), bundle.target[order].astype("int32")


def part(name: str) -> tuple[np.ndarray, np.ndarray]:
    """``"old"`` 600 images of the source, ``"new"`` 960 for fine-tuning, ``"held out"`` 237."""
    x, y = digits()
    rows = {"old": slice(0, 600), "new": slice(600, 1560), "held out": slice(1560, None)}[name]
    return x[rows].copy(), y[rows].copy()


def target(x: np.ndarray) -> np.ndarray:
    """The target domain: less contrast, brighter."""
    return 0.4 * x + 0.5
