"""A model of the table: how it is built, its batches, and how its own library judges it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A model with data, as its library uses it.

    Attributes:
        model: A torch module or a Keras model, with statistics that a few updates left.
        batches: What its loader yields.
        ask: The library's own way: ``(model, batch) -> loss``, a scalar tensor; ``None`` for a
            model without a loss.
        options: What a user writes beside model and data: ``loss=``, ``step=``.
        call: ``(model, batch) -> outputs`` in the model's present mode; tensors somewhere inside.
        sample: What ``split`` is given as a sample; ``None``: nothing.
        in_training_mode: The library computes its loss in training mode only.
        plain: Makes the module that an exported program was made from: its calls are seen by a
            function mode, those of the program are not.
        seen: ``model -> outputs`` that a folded model is compared by, where its last step picks
            among scores that are alike.
        fixed: It normalises as it was exported, whatever its mode.
        lags: Its averages lag, so that inference is worse than training: BN is to blame.
        more_in_training: In training it returns more than at inference, and its loss adds it up.
        healthy: Its averages have caught up: nothing of BN may be blamed.
        own_ways: What it does at a pass depends on the passes before it, or is random: its loss is
            the library's to within a fifth.
        until: Where its user freezes; ``None``: in the middle of its BN layers.
        recompile: ``(model) -> None``: how its user compiles it again; Keras.
        no_help: What a refusal tells that is not so of this program, or was done, or cannot be: a
            refusal with such words is wrong.
    """

    model: Any
    batches: Sequence[Any]
    ask: Callable[[Any, Any], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    call: Callable[[Any, Any], Any] = lambda model, batch: model(batch[0])
    sample: Any = None
    in_training_mode: bool = False
    plain: Callable[[], Any] | None = None
    seen: Callable[[Any], Any] | None = None
    fixed: bool = False
    lags: bool = False
    more_in_training: bool = False
    healthy: bool = False
    own_ways: bool = False
    until: str | None = None
    recompile: Callable[[Any], None] | None = None
    no_help: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table.

    Attributes:
        name: Of the model.
        library: Distribution that it comes from.
        kind: What it is for.
        build: Makes the program.
        framework: ``"torch"`` or ``"keras"``.
    """

    name: str
    library: str
    kind: str
    build: Callable[[], Program]
    framework: str = "torch"


ENTRIES: dict[str, Entry] = {}
_BOTH = (
    "sites", "lint", "phases", "recalibrate", "freeze", "assert_frozen", "watch", "diagnose",
    "split", "fold", "set_momentum", "unfreeze", "cache_features",
)  # fmt: skip
#: What a model of each framework is asked with: a loop of torch has a cache, Keras has ``fit``.
VERBS = {"torch": (*_BOTH, "cached"), "keras": (*_BOTH, "fit")}


def entry(
    name: str, library: str, kind: str, *, framework: str = "torch"
) -> Callable[[Callable[[], Program]], Any]:
    """Register a builder under a name."""

    def register(build: Callable[[], Program]) -> Callable[[], Program]:
        ENTRIES[name] = Entry(
            name=name, library=library, kind=kind, build=build, framework=framework
        )
        return build

    return register
