"""What ``fl.diagnose`` is known to answer wrongly in the casebook, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Question = Literal["cause", "blame", "layers", "remedy"]

KERAS = ("tensorflow", "jax", "torch")


@dataclass(frozen=True)
class Miss:
    """One question to one case.

    Attributes:
        number: Of the case.
        question: ``"cause"``: the first cause is right. ``"blame"``: BN is not blamed for what
            others did. ``"layers"``: the right ones. ``"remedy"``: the first one closes the gap.
        reason: Why the answer is wrong.
        backends: Where it is; seeds give other weights elsewhere.
    """

    number: str
    question: Question
    reason: str
    backends: tuple[str, ...] = KERAS


MISSES: tuple[Miss, ...] = (
    Miss("22", "cause", "a call of its own that reads no stored statistics is not recognised"),
    Miss("25", "cause", "where training mode is hardly better, bessel is not asked"),
    Miss("27", "cause", "a site counts values, of which those of one image are worth few"),
    Miss("32", "cause", "two sources that are the two classes are taken for a leak of labels"),
    Miss("H1", "cause", "uses of a shared layer that cancel leave no statistics to blame"),
    Miss("H2", "cause", "two sources that are the two classes are taken for a leak of labels"),
    Miss("H4", "cause", "averaged weights look like an average that trails"),
    Miss("H5", "cause", "pruned weights look like an average that trails"),
    Miss("H7", "blame", "losses of renamed classes are compared as if they meant something"),
    Miss("N10", "blame", "statistics that an upsampling spoils look like those of other data"),
    Miss("N11", "cause", "another size of the images is not tried"),
    Miss("N11", "blame", "another size of the images is not tried"),
    Miss("C1", "cause", "a scale that batch statistics undo is not told"),
    Miss("C3", "cause", "a scale that batch statistics undo is not told"),
)
