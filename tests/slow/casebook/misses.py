"""What ``fl.diagnose`` is known to answer wrongly in the casebook, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Question = Literal["cause", "blame", "layers", "remedy"]

KERAS = ("tensorflow", "jax", "torch")
NATIVE = ("native",)


@dataclass(frozen=True)
class Miss:
    """One question to one case.

    Attributes:
        number: Of the case.
        question: ``"cause"``: the first cause is right. ``"blame"``: BN is not blamed for what
            others did. ``"layers"``: the right ones. ``"remedy"``: the first one closes the gap.
        reason: Why the answer is wrong.
        backends: Where it is; seeds give other weights elsewhere.
        sometimes: The answer turns on the rounding of a machine; a right one is luck.
    """

    number: str
    question: Question
    reason: str
    backends: tuple[str, ...] = KERAS
    sometimes: bool = False


MISSES: tuple[Miss, ...] = (
    Miss(
        "H4",
        "cause",
        "averaged weights leave the same traces as large steps that a short average trails; the "
        "checkpoint from before, as reference=, tells them apart",
    ),
    Miss(
        "TS1",
        "cause",
        "as H4: weights that were averaged look like those that a short average trails; the first "
        "site is near the limit that decides, so that seeds and machines differ",
        NATIVE,
        sometimes=True,
    ),
    Miss(
        "A2",
        "cause",
        "one client's statistics in averaged weights leave the same traces as averages that trail: "
        "the answer says both, and what would tell them apart",
        NATIVE,
        sometimes=True,
    ),
    Miss(
        "A5",
        "cause",
        "as H4 and TS1: the answer says both, and what would tell",
        NATIVE,
        sometimes=True,
    ),
    Miss(
        "A9",
        "cause",
        "a class by hand counts no updates, and its weights moved so much that its statistics are "
        "on no line from 0 and 1: the answer is other data, or weights that have moved since, "
        "'inferred', and what would tell",
        NATIVE,
    ),
)
