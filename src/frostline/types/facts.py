"""What rules may know of a model: plain data, no framework.

Rules are tested with facts written by hand. Nothing is computed here that a rule should judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from frostline.types import Array, Site


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """One site with its stored numbers and what surrounds it.

    Attributes:
        site: The site.
        mean: Stored mean, shape ``(channels,)``, float64; ``None`` when the layer is not built or
            keeps no statistics. So are the next three.
        variance: Stored variance as the framework stores it (torch: unbiased).
        gamma: Scale; ``None`` without one.
        beta: Offset; ``None`` without one.
        shadow_variance: With ``renorm``: the variance that the next update will derive
            ``variance`` from, ``moving_stddev**2 - epsilon``, at least 0.
        dtype: Name of the dtype in which the statistics are stored, for example ``"float16"``.
        live: A flip of ``trainable`` takes effect without ``compile``.
        optimized: gamma or beta are in the optimizer's list of variables; ``None`` when there is
            no such list yet, or nothing to be in it.
        wrapper_frozen: ``trainable`` of the ``TorchModuleWrapper`` around the site is ``False``;
            ``None`` outside of one.
        undone: Put into inference mode by hand in a model that trains: the next ``train()`` of any
            parent puts it back (torch).
        mode: Whether the module is in training mode now (torch); ``None`` where there is no such
            thing.
        updates: How often the statistics were updated, where the layer counts it
            (``num_batches_tracked``).
        cumulative: The stored statistics are the plain mean over all updates, so `decay` grows.
        training: Value of ``training=`` that is written at the nearest call around the site in a
            functional graph; ``None`` when none is.
        values: Values per channel in one sample (height times width); ``None`` when not known.
        two_regimes: ``site.trained_by`` trains it, and in this model it is frozen, now or in the
            step that the model was compiled for.
    """

    site: Site
    mean: Array | None = None
    variance: Array | None = None
    gamma: Array | None = None
    beta: Array | None = None
    shadow_variance: Array | None = None
    dtype: str = "float32"
    live: bool = False
    optimized: bool | None = None
    wrapper_frozen: bool | None = None
    undone: bool = False
    mode: bool | None = None
    updates: int | None = None
    cumulative: bool = False
    training: bool | None = None
    values: int | None = None
    two_regimes: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A layer with weights that holds no other layer.

    Attributes:
        path: As in :class:`~frostline.types.Site`.
        order: Rank in execution order, on one scale with :attr:`ModelFacts.order`.
        trains: At least one of its variables will be trained.
    """

    path: str
    order: int
    trains: bool


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Everything that rules without data may look at.

    Attributes:
        name: The model's name.
        backend: ``"tensorflow"``, ``"jax"`` or ``"torch"``.
        framework: ``"keras"``, or ``"torch"`` for a native module.
        mode: Whether the model is in training mode now (torch), as of a site.
        sites: In execution order.
        layers: Layers with weights that are not sites, in execution order.
        order: Path of a site -> its rank in execution order.
        batch: Batch size that is fixed in the model's input; ``None`` when it is free.
        any_size: The model's input says that images of any height and width may come.
        steps: Training steps since the optimizer was made; ``None`` without an optimizer. Of a
            native torch module: the most updates that any site has counted.
        traced: A compiled training step exists, made under the flags of that moment.
    """

    name: str = "model"
    backend: str = "tensorflow"
    framework: str = "keras"
    mode: bool | None = None
    sites: tuple[SiteFacts, ...] = ()
    layers: tuple[LayerFacts, ...] = ()
    order: dict[str, int] = field(default_factory=dict)
    batch: int | None = None
    any_size: bool = False
    steps: int | None = None
    traced: bool = False

    def __iter__(self) -> Iterator[SiteFacts]:
        return iter(self.sites)

    @property
    def native(self) -> bool:
        """A torch module that is no Keras model."""
        return self.framework == "torch"

    def is_torch(self, each: SiteFacts) -> bool:
        """Whether a site is a torch module: of a native model, or wrapped in a Keras one."""
        return self.native or each.site.kind.startswith("torch.")

    def cancels(self, each: SiteFacts) -> bool:
        """Whether a batch variance is E[x²] − E[x]² in float32: Keras' layer on torch."""
        return self.backend == "torch" and not self.is_torch(each)

    def flip_effect(self, *, frozen: bool) -> str | None:
        """What the next training step does after a flip of ``trainable``; ``None``: as meant.

        Measured on Keras 3.15, see the tests of the rule.
        """
        if self.backend == "jax" or (self.backend == "torch" and not frozen):
            return "the next training step raises"
        if self.backend == "torch":
            return None
        if self.traced:
            return "it still trains" if frozen else "it still does not train"
        return None if frozen else "the next training step raises"
