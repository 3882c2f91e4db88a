"""BN layers, and where the frozen part of a model ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["inference", "batch", "update"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One BN layer of a model.

    Attributes:
        path: Hierarchical address, unique in the model: ``backbone/block3/bn1``.
        name: The layer's own name.
        kind: Class name of the layer, for example ``BatchNormalization``.
        index: Position in execution order where the graph is known, else in creation order.
        channels: Number of channels; ``None`` while the layer is not built.
        axis: The channel axis, as the layer was given it.
        decay: Share of the old value that one update keeps (Keras ``momentum``).
        epsilon: Added to the variance before the square root.
        params_frozen: gamma and beta do not train.
        stats_frozen: The stored statistics do not move in training.
        policy: What the layer does in training while frozen.
        calls: How often the layer is used in the model's graph; more than 1 means shared.
        dtype: Compute dtype of the layer.
        version: Old-release preset of our own layer, else ``None``.
        debias: Whether the moving average is corrected for its start.
        trained_by: Name of an inner model that is compiled for itself and whose optimizer trains
            this site too: it may live under two regimes, as in a GAN. ``None`` otherwise.
    """

    path: str
    name: str
    kind: str
    index: int
    channels: int | None
    axis: int
    decay: float
    epsilon: float
    params_frozen: bool
    stats_frozen: bool
    policy: Policy
    calls: int = 1
    dtype: str = "float32"
    version: str | None = None
    debias: bool = False
    trained_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Where freezing ends: the layers before it are the prefix.

    Attributes:
        path: Path of the first layer *behind* the frozen prefix; ``None`` when all is frozen.
        index: Its position among the model's top-level layers.
    """

    path: str | None
    index: int


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """One tensor of the frontier: what the frozen prefix hands to the rest of the model.

    Attributes:
        path: Path of the layer that computes it; the input's name where it is a model input.
        shape: Shape of one sample; ``None`` for sizes that the model leaves open.
        dtype: Name of its dtype, for example ``"float32"``.
        bytes_per_sample: Its size; open sizes count as in the trial run of the prefix, or as 1.
        computed: ``False`` for a model input that the rest of the model reads as it is.
    """

    path: str
    shape: tuple[int | None, ...]
    dtype: str
    bytes_per_sample: int
    computed: bool = True
