"""The only rooms that know a framework: one protocol, one view per framework.

A view answers questions about a model in numpy and dataclasses and is the only way to change it.
Nothing above this package imports or names a framework.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from frostline.stats import Moments
from frostline.types import Array, Boundary, Crossing, ModelError, Policy, Site


class FlagCounts(Protocol):
    """What an edit of `trainable` flags touched."""

    @property
    def layers(self) -> int:
        """Layers whose flag changed."""
        ...

    @property
    def sites(self) -> int:
        """BN layers among them."""
        ...

    @property
    def parameters(self) -> int:
        """Numbers in their trainable weights."""
        ...

    @property
    def stock_sites(self) -> int:
        """BN layers among them whose flag is read when a step is compiled."""
        ...


class FoldedModel(Protocol):
    """A new model without BN layers, and where they went."""

    @property
    def model(self) -> Any:
        """The new model."""
        ...

    @property
    def absorbed(self) -> tuple[str, ...]:
        """Paths of BN layers that are now part of the layer before them."""
        ...

    @property
    def replaced(self) -> tuple[str, ...]:
        """Paths of BN layers in whose place is a layer that scales and shifts."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one pass of one batch gave.

    Attributes:
        outputs: Arrays in the structure of the model's outputs, float32 at least.
        losses: Loss of each sample, shape ``(n,)``, float64.
        moments: Path -> moments of what the site saw; empty unless recorded.
    """

    outputs: Any
    losses: Array
    moments: Mapping[str, Moments] = field(default_factory=dict)


class SplitModel(Protocol):
    """A model cut in two; see :class:`frostline.Split`."""

    @property
    def prefix(self) -> Any:
        """The frozen part: model inputs -> frontier."""
        ...

    @property
    def suffix(self) -> Any:
        """The rest: frontier -> model outputs."""
        ...

    @property
    def frontier(self) -> tuple[Crossing, ...]:
        """The tensors that cross."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What ended the prefix, and what was not checked."""
        ...


class Forward(Protocol):
    """Forward passes with λ and the stored statistics as arguments; the model never changes.

    ``blend`` is one number or has one per entry of ``paths``; ``statistics`` maps paths to (mean,
    biased variance) that replace what is stored; ``step`` is the batch's number, which fixes the
    dropout masks.
    """

    @property
    def paths(self) -> tuple[str, ...]:
        """The sites, in the order of the blend vector."""
        ...

    def outputs(
        self,
        x: Any,
        *,
        blend: Any,
        statistics: Mapping[str, tuple[Any, Any]] | None = None,
        dropout: bool = False,
        step: int = 0,
        record: bool = False,
    ) -> Any:
        """Outputs of one batch; with ``record`` a pair of them and path -> moments."""
        ...

    def losses(
        self,
        x: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        blend: Any,
        statistics: Mapping[str, tuple[Any, Any]] | None = None,
        dropout: bool = False,
        step: int = 0,
    ) -> Array:
        """Loss of each sample, shape ``(n,)``, float64."""
        ...

    def gradient(
        self,
        x: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        blend: Any,
        statistics: Mapping[str, tuple[Any, Any]] | None = None,
        dropout: bool = False,
        step: int = 0,
    ) -> tuple[Array, Array]:
        """Losses, shape ``(n,)``, and d mean(losses) / dλ, shape ``(sites,)``, float64."""
        ...

    def outcome(
        self,
        x: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        blend: Any,
        statistics: Mapping[str, tuple[Any, Any]] | None = None,
        dropout: bool = False,
        step: int = 0,
        record: bool = False,
    ) -> Outcome:
        """Outputs, losses and, with ``record``, the sites' moments of one pass together."""
        ...

    def own(
        self, x: Any, y: Any, sample_weight: Any = None, *, training: bool, step: int = 0
    ) -> Outcome:
        """Outputs and losses of the model's own pass, every layer as its flags have it."""
        ...


class ModelView(Protocol):
    """What the rest of Frostline may ask of a model, whatever its framework."""

    model: Any
    framework: str  # "keras" | "torch"
    backend: str  # "tensorflow" | "jax" | "torch"

    def sites(self) -> tuple[Site, ...]:
        """Every BN layer, in execution order where the graph is known."""
        ...

    def boundary(self, reference: Any) -> Boundary:
        """Translate a layer name, path, index, fraction or layer into a boundary."""
        ...

    def preserved(self) -> AbstractContextManager[None]:
        """Restore every variable, flag, momentum and compile state on any exit, bit for bit."""
        ...

    def forward(self, x: Any, *, training: bool, step: int = 0) -> Any:
        """Forward pass of one batch, float32; no variable of the model changes."""
        ...

    def score(
        self, x: Any, y: Any, sample_weight: Any = None, *, training: bool, step: int = 0
    ) -> tuple[Any, float | None]:
        """Outputs and loss of one batch; no variable of the model changes."""
        ...

    def objective(self) -> tuple[str | None, bool | None]:
        """Snake-case name of the compiled loss and its ``from_logits``; ``None``: not known."""
        ...

    def compiled(self) -> bool:
        """Whether the model is compiled for training."""
        ...

    def set_frozen(
        self, boundary: Boundary, *, before: bool, frozen: bool, params: bool, statistics: bool
    ) -> tuple[FlagCounts, Callable[[], None]]:
        """Freeze or thaw one side of a boundary; returns what changed and how to take it back."""
        ...

    def convert(self, *, version: str | None, policy: Policy | None, debias: bool | None) -> int:
        """Turn stock BN layers into ours, in place; returns how many BN layers there are."""
        ...

    def restore(self) -> int:
        """Turn our BN layers back into stock ones, in place; returns how many."""
        ...

    def fold(self) -> FoldedModel:
        """Fold every BN layer at its stored statistics into a new model."""
        ...

    def split(self, at: Any = None, *, sample: Any = None) -> SplitModel:
        """Cut the model into its frozen prefix and the rest, which share its layers."""
        ...

    def evaluate(self, batches: Iterable[tuple[Any, ...]]) -> Mapping[str, float]:
        """The model's own ``evaluate``; metric states come back untouched."""
        ...


def view(model: Any) -> ModelView:
    """Return the view of ``model``.

    Keras is asked before torch: on the torch backend every Keras model *is* an ``nn.Module``.

    Args:
        model: A Keras 3 model: functional, sequential or subclassed, on any backend; or a torch
            module, DataParallel, DDP and ``torch.compile`` around it included.

    Returns:
        A view; it holds the model and nothing of it is changed.

    Raises:
        ModelError: Not a model that Frostline can read; the text says what it is instead.
    """
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(model, getattr(keras, "Model", ())):
        from frostline.models.keras import KerasView

        return KerasView(model)
    torch = sys.modules.get("torch")
    if torch is not None and _is_native(model, torch, keras):
        from frostline.models.torch import TorchView

        return TorchView(model)
    raise ModelError(_why_not(model, keras))


def _is_native(model: Any, torch: Any, keras: Any) -> bool:
    """Whether ``model`` is a torch module and not a Keras layer on the torch backend."""
    layer = keras is not None and isinstance(model, getattr(keras, "Layer", ()))
    ancestry = (parent.__module__ for parent in type(model).__mro__)
    foreign = any(name.startswith(("keras.src.", "tensorflow.python.keras.")) for name in ancestry)
    return isinstance(model, torch.nn.Module) and not layer and not foreign


def layers_of(target: Any) -> tuple[Any, ...]:
    """Return the Keras layers that a person means: a model, a layer, or several of either.

    Raises:
        ModelError: Something else, or nothing.
    """
    keras = sys.modules.get("keras")
    kind = getattr(keras, "Layer", ())
    several = isinstance(target, (list, tuple, Iterator))
    found = tuple(target) if several else (target,)
    for each in found:
        if keras is None or not isinstance(each, kind):
            raise ModelError(_why_not(each, keras))
    if not found:
        raise ModelError("expected a model, a layer or a list of layers. Received: an empty list")
    return found


def freezing(
    layers: tuple[Any, ...],
) -> AbstractContextManager[tuple[FlagCounts, Callable[[], None]]]:
    """Freeze Keras layers for a block; see :func:`frostline.frozen`."""
    from frostline.models import keras_edit

    return keras_edit.frozen(layers)


def _why_not(model: Any, keras: Any) -> str:
    """Say what ``model`` is when it is not a Keras 3 model of this process."""
    received = f"Received: {type(model).__module__}.{type(model).__qualname__}"
    ancestry = [f"{parent.__module__}.{parent.__qualname__}" for parent in type(model).__mro__]
    if any(name.startswith(("tf_keras.", "tensorflow.python.keras.")) for name in ancestry):
        return (
            "this is a model of legacy Keras 2 (tf_keras); Frostline needs Keras 3. Load it with "
            f"keras.saving.load_model, TF_USE_LEGACY_KERAS unset. {received}"
        )
    if keras is not None and isinstance(model, getattr(keras, "Layer", ())):
        return f"this is a single layer; wrap it in a keras.Model or keras.Sequential. {received}"
    if any(name.startswith("keras.src.") for name in ancestry):
        now = keras.config.backend() if keras is not None else "unknown"
        return (
            "this Keras model was made under another backend than the one Keras runs on now "
            f"({now}); load it again in this process. {received}"
        )
    return f"not a model: expected a keras.Model or a torch.nn.Module. {received}"


__all__ = ["Array", "ModelView", "view"]
