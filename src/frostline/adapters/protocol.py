"""What every adapter promises, whatever its framework."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from frostline.adapters.together import ALONE, Together
from frostline.data.arrays import leaves
from frostline.data.batch import Batch
from frostline.graph.schedule import Program
from frostline.numerics.stats import Moments
from frostline.types import (
    Array,
    Boundary,
    Crossing,
    DataError,
    ModelError,
    Policy,
    Site,
    as_float64,
)
from frostline.types.measured import Behaviour, Difference

if TYPE_CHECKING:
    from frostline.types.facts import ModelFacts

Seen = Mapping[str, Sequence[Moments]]


@dataclass(frozen=True, kw_only=True)
class FreezeRequest:
    """Which layers to freeze or thaw, and what of them.

    Attributes:
        boundary: First layer behind the prefix.
        before: Change the layers before the boundary; otherwise those from it on.
        frozen: Whether they end up frozen.
        params: Whether parameters (kernels, gamma, beta, ...) are set.
        statistics: Whether stored BN statistics are set.
        dropout: Whether dropout rates are set too: 0 while frozen, the old rate when thawed.
        paths: Change these layers, wherever they are; ``None``: one side of the boundary.
    """

    boundary: Boundary
    before: bool
    frozen: bool
    params: bool = True
    statistics: bool = True
    dropout: bool = False
    paths: frozenset[str] | None = None

    @property
    def everything(self) -> bool:
        """Whether no boundary and no choice of layers leaves anything out."""
        return self.before and self.paths is None and self.boundary.path is None


@dataclass(frozen=True, kw_only=True)
class FlagCounts:
    """What an edit of `trainable` flags touched.

    Attributes:
        layers: Layers whose flag changed.
        sites: BN layers among them.
        parameters: Numbers in their trainable weights.
        stock_sites: BN layers among them whose flag is read when a step is compiled.
        dropouts: Layers whose dropout was turned off, or given its rate back; not among ``layers``.
    """

    layers: int
    sites: int
    parameters: int
    stock_sites: int = 0
    dropouts: int = 0


@dataclass(frozen=True, kw_only=True)
class FoldedModel:
    """A new model without BN layers, and where they went: paths of sites.

    Attributes:
        model: The new model.
        absorbed: BN layers that are now part of the layer before them.
        replaced: BN layers in whose place is something that scales and shifts. A BN layer that is
            used in several places can be in both.
        notes: BN layers that are left as they were, and why.
    """

    model: Any
    absorbed: tuple[str, ...]
    replaced: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one pass of one batch gave.

    Attributes:
        outputs: Arrays in the structure of the model's outputs, float32 at least.
        losses: Loss of each unit, shape ``(units,)``, float64.
        moments: Path -> moments of what the site saw; empty unless recorded.
        unit: ``"sample"``: one loss per sample; ``"batch"``: one loss for the whole batch.
        parts: Name -> losses of one of several named losses, which add up to ``losses``.
        metrics: Name -> one number, or one per sample.
        step_trains: The step called ``train()`` on the model in inference mode, and was not obeyed.
    """

    outputs: Any
    losses: Array
    moments: Mapping[str, Moments] = field(default_factory=dict)
    unit: Literal["sample", "batch"] = "sample"
    parts: Mapping[str, Array] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    step_trains: bool = False


@dataclass(frozen=True, eq=False)
class Condition:
    """What a forward pass runs under.

    Attributes:
        blend: λ: one number in [0, 1] for all sites, or one for each of ``Forward.paths``.
        statistics: Path -> (mean, biased variance) to use in the place of what is stored.
        dropout: Run everything but BN as in training: dropout, noise, random augmentation.
        number: Of the batch: dropout masks are the same in every pass for the same number and
            differ between numbers.
        record: Also return the moments of each site's input, merged over the layer's uses.
    """

    blend: Any
    statistics: Mapping[str, tuple[Any, Any]] | None = None
    dropout: bool = False
    number: int = 0
    record: bool = False

    def shares(self, count: int) -> Array:
        """Return λ for each of ``count`` sites, shape ``(count,)``, float64.

        Raises:
            DataError: ``blend`` has another shape, or leaves [0, 1].
        """
        values = as_float64(self.blend)
        if values.shape not in ((), (count,)):
            raise DataError(
                f"blend must be one number or have one per site, shape ({count},). "
                f"Received: shape {values.shape}"
            )
        if not ((values >= 0) & (values <= 1)).all():
            raise DataError(f"blend must be between 0 and 1 everywhere. Received: {self.blend}")
        return np.broadcast_to(values, (count,)).copy()

    def replaced(self, shapes: Mapping[str, Sequence[int] | None]) -> dict[str, tuple[Any, Any]]:
        """Return ``statistics``, without those of sites that store none.

        Args:
            shapes: Path -> shape of what the site stores, or ``None`` where it stores nothing.

        Raises:
            ModelError: A path that is not among them.
            DataError: A mean or variance of another shape.
        """
        given = dict(self.statistics or {})
        for path, pair in list(given.items()):
            if path not in shapes:
                raise ModelError(
                    "statistics are given for a site that is not blended; there are "
                    f"{', '.join(shapes) or 'none'}. Received: {path!r}"
                )
            stored = shapes[path]
            if stored is None:
                del given[path]
                continue
            for value in pair:
                if np.shape(value) != tuple(stored):
                    raise DataError(
                        f"statistics of '{path}' must have shape {tuple(stored)}. "
                        f"Received: {np.shape(value)}"
                    )
        return given


@dataclass(frozen=True, kw_only=True)
class OutputDistance:
    """A loss without labels: squared distance of a sample's outputs from given ones.

    Attributes:
        spread: Standard deviation of each output array over the samples: the unit of distance.
    """

    spread: tuple[float, ...]

    def __call__(self, outputs: Any, wanted: Any) -> Any:
        """Mean over the arrays of ``((output - wanted) / spread)²``, shape ``(n,)``.

        Args:
            outputs: Tensors in any structure, or arrays; those that are wanted may come first.
            wanted: One array for each of them.
        """
        total: Any = 0.0
        pairs = zip(leaves(outputs), leaves(wanted), self.spread, strict=True)
        for (_, output), (_, goal), spread in pairs:
            squares = ((output - goal) / spread) ** 2
            total = total + squares.reshape(len(squares), -1).mean(1)
        return total / len(self.spread)


@dataclass(frozen=True, kw_only=True)
class SplitModel:
    """A model cut in two; see :class:`frostline.Split`.

    Attributes:
        prefix: The frozen part: model inputs -> frontier, one tensor or several.
        suffix: The rest: frontier -> model outputs.
        frontier: The tensors that cross, in the order of the prefix's outputs.
        notes: What ended the prefix, and what was not checked.
    """

    prefix: Any
    suffix: Any
    frontier: tuple[Crossing, ...]
    notes: tuple[str, ...]


class Forward(Protocol):
    """Forward passes with λ and the stored statistics as arguments; the model never changes.

    ``batch`` is a :class:`frostline.data.batch.Batch`.
    """

    @property
    def paths(self) -> tuple[str, ...]:
        """The sites, in the order of the blend vector."""

    def outputs(self, batch: Batch, condition: Condition) -> Any:
        """Outputs of one batch; with ``record`` a pair of them and path -> moments."""

    def outcome(self, batch: Batch, condition: Condition) -> Outcome:
        """Outputs, losses and, with ``record``, the sites' moments of one pass together."""

    def gradient(self, batch: Batch, condition: Condition) -> tuple[Array, Array]:
        """Losses as in :class:`Outcome`, and d mean(losses) / dλ, shape ``(sites,)``, float64."""

    def own(self, batch: Batch, *, training: bool, number: int = 0) -> Outcome:
        """Outputs and losses of the model's own pass, every layer as its flags have it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """Population moments of the sites that a data set uses.

    Attributes:
        moments: Path -> moments over all batches; a site that no batch used is not in it.
        batches: Batches that entered to the end.
        skipped: Batch number -> why it was left out from some site on.
        passes: Passes over the data or over stored activations that it took.
        stages: Paths in execution order; those of one stage do not depend on each other.
        notes: What else a person should know.
    """

    moments: Mapping[str, Moments]
    batches: int
    skipped: Mapping[int, str] = field(default_factory=dict)
    passes: int = 1
    stages: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """Finite batches to measure with."""

    def read(self) -> Iterator[tuple[int, Batch]]:
        """Batches with their numbers, from the beginning."""

    def require_again(self, verb: str) -> None:
        """Raise :class:`DataError` where the data can be read only once."""


class StoredStatistics(Protocol):
    """Reads and stores the statistics of sites."""

    def stored(self, path: str) -> tuple[Array, Array]:
        """Stored mean and variance, float64."""

    def epsilon(self, path: str) -> float:
        """What the site adds to the variance."""

    def store(self, path: str, mean: Array, variance: Array) -> None:
        """Store population statistics."""


class Meter(StoredStatistics, Protocol):
    """Measures and stores the statistics of the sites that it was made for."""

    def sequential(self, source: Source, paths: Sequence[str], memory_limit: int) -> Population:
        """Population moments of some sites, each with all earlier ones at their new values.

        Statistics may be stored on the way. ``memory_limit`` is in bytes of activations.
        """

    def batchwise(self, source: Source, paths: Sequence[str]) -> Population:
        """Population moments of some sites from one pass with batch statistics at all of them."""

    def batch(self) -> Callable[[Any], Seen]:
        """Compile one pass with batch statistics at all sites: a batch -> moments of each use."""

    def snapshot(self) -> Callable[[], None]:
        """Remember all statistics; returns what puts them back, bit for bit."""


class StagedMeter(StoredStatistics, Protocol):
    """What :mod:`frostline.adapters.staged` asks of a meter that knows the graph of its model."""

    def start(self, x: Any) -> tuple[Array, ...]:
        """What the first stage takes, from one batch of model inputs."""

    def programs(self, inputs: int, paths: Collection[str]) -> Sequence[Program]:
        """The stages that measure these sites, in order; the first one takes ``inputs`` arrays."""

    def stage(self, program: Any) -> Callable[[Sequence[Array]], tuple[tuple[Array, ...], Seen]]:
        """Compile a stage: arrays of one batch -> (arrays for the next stage, moments)."""


class Inspect(Protocol):
    """What a model is: its sites, its addresses, what is frozen and how it is trained."""

    model: Any
    framework: str  # "keras" | "torch"
    backend: str  # "tensorflow" | "jax" | "torch"

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in the model's inputs: -1, or 1 where they come first."""

    def sites(self) -> tuple[Site, ...]:
        """Every BN layer, in execution order where the graph is known."""

    def facts(self) -> ModelFacts:
        """What rules without data may look at."""

    def boundary(self, reference: Any) -> Boundary:
        """Translate a layer name, path, index, fraction or layer into a boundary."""

    def before(self, boundary: Boundary) -> frozenset[str]:
        """Paths of the layers before a boundary: those that freezing up to it freezes."""

    def frozen_prefix(self, found: tuple[Site, ...] | None = None) -> tuple[int | None, str | None]:
        """How many sites lie before the first layer that trains, and the path of that layer.

        ``found`` are the sites, where they are known already.

        ``(None, None)``: the first layer with weights trains, there is no frozen prefix.
        ``(sites, None)``: no layer trains.
        """

    def objective(self) -> tuple[str | None, bool | None]:
        """Snake-case name of the compiled loss and its ``from_logits``; ``None``: not known."""

    def judges_itself(self) -> bool:
        """Whether the model cannot be called without labels, so that it computes its own loss."""

    def own_loss(self) -> Any:
        """The loss or losses that the model brings along; ``None``: none."""

    def compiled(self) -> bool:
        """Whether the model is compiled for training."""

    def inputs(self, *, labels: bool = False) -> int:
        """How many arguments a call of the model needs: first items of a batch that are inputs.

        With ``labels`` arguments that are named as labels count as well.
        """

    def noise_layers(self) -> Mapping[str, str]:
        """Path of each layer that is no BN and acts in training only -> its kind.

        Kinds are ``"dropout"``, ``"noise"`` and ``"augmentation"``.
        """


class Run(Protocol):
    """Passes of a model; nothing of it changes."""

    def forward(self, x: Any, *, training: bool, step: int = 0) -> Any:
        """Forward pass of one batch, float32; no variable of the model changes."""

    def score(
        self, x: Any, y: Any, sample_weight: Any = None, *, training: bool, step: int = 0
    ) -> tuple[Any, float | None]:
        """Outputs and loss of one batch; no variable of the model changes."""

    def blend_forward(
        self, loss: Any = None, step: Any = None, paths: Sequence[str] | None = None
    ) -> Forward:
        """Forward passes with λ and the stored statistics as arguments; compiled once per shape.

        ``loss`` is whatever the framework takes as a loss; ``None``: the compiled one. ``step`` is
        the user's own ``step(model, batch)``, which calls the model and returns its loss or
        losses. ``paths``: the sites to blend; ``None``: all.
        """

    def behaviour(self, batches: Iterable[Batch], step: Any = None) -> Mapping[str, Behaviour]:
        """What every site does in a training-mode pass and in an inference pass of the model.

        Nothing is updated. The sites are watched: their inputs, their outputs and what they would
        assign. Flags are not asked. With ``step`` the user's ``step(model, batch)`` runs the model.
        """

    def moved_at_inference(self, batch: Batch, step: Any = None) -> Mapping[str, str]:
        """Path -> kind of what moves state of its own in an inference pass, beside the sites.

        Nothing is updated.
        """
        ...

    def evaluate(self, batches: Iterable[tuple[Any, ...]]) -> Mapping[str, float]:
        """The model's own ``evaluate``; metric states come back untouched."""

    def full_precision(self) -> AbstractContextManager[None]:
        """For a block, let no accelerator round products of float32 numbers (TF32)."""

    def generators(self, data: Any = None) -> Callable[[], None]:
        """Remember the framework's random generators, and those of a loader that reads ``data``.

        Returns what puts them back.
        """
        ...

    def preserved(self) -> AbstractContextManager[None]:
        """Restore every variable, flag, momentum and compile state on any exit, bit for bit."""


class Record(Protocol):
    """Measuring and storing the statistics of sites."""

    def meter(self, paths: Sequence[str], ranks: Together = ALONE, step: Any = None) -> Meter:
        """What measures and stores the statistics of these sites; ``ranks`` measure together.

        With ``step`` the user's ``step(model, batch)`` runs the model.

        Raises:
            ModelError: A step, where only the model itself can be run.
        """

    def together(self, process_group: Any = None) -> Together:
        """The processes that measure together; ``None``: those of the default group, if any.

        Raises :class:`ModelError` for a group that does not exist or cannot be used.
        """


class Edit(Protocol):
    """Changes in place, and what takes them back."""

    def snapshot(self) -> Callable[[], None]:
        """Remember all that an edit may touch; returns what puts it back and can be repeated."""

    def surroundings(self) -> Callable[[], None]:
        """Remember :meth:`modes` and the random generators; returns what restores them."""

    def modes(self) -> Callable[[], None]:
        """Remember the framework's modes and precision in this process, which no verb changes.

        Returns what restores them, and can be repeated.
        """

    def set_frozen(self, request: FreezeRequest) -> tuple[FlagCounts, Callable[[], None]]:
        """Freeze or thaw one side of a boundary; returns what changed and how to take it back."""

    def set_decay(self, paths: Sequence[str], decay: float) -> tuple[int, Callable[[], None]]:
        """Set the kept share of the statistics of sites.

        Returns how many of them hold it as a constant of a compiled step, and what takes it back.
        """

    def convert(self, *, version: str | None, policy: Policy | None, debias: bool | None) -> int:
        """Turn stock BN layers into ours, in place; returns how many BN layers there are."""

    def restore(self) -> int:
        """Turn our BN layers back into stock ones, in place; returns how many."""


class Cut(Protocol):
    """New models made of parts of a model."""

    def split(self, at: Any = None, *, sample: Any = None) -> SplitModel:
        """Cut the model into its frozen prefix and the rest, which share its layers."""

    def fold(self, *, sample: Any = None) -> FoldedModel:
        """Fold every BN layer at its stored statistics into a new model."""


class Store(Protocol):
    """Files, and models to compare with."""

    #: What a file holds: the whole model, or its parameters and statistics beside the user's code.
    saved_as: Literal["model", "state"]

    def round_trip(self, x: Any) -> float:
        """Save, load, run inference on ``x``: largest change relative to the largest output.

        Raises :class:`ModelError` with the reason when the model cannot be saved or loaded.
        """

    def difference(self, reference: Any, x: Any) -> Difference:
        """Compare with a reference, layer by layer, and the inference outputs on ``x``.

        ``reference`` is a model of the same architecture, the path of a file with a model or with
        weights, or the arrays of all layers: one list per layer, or one flat list.
        """


class Train(Protocol):
    """Training by the framework itself."""

    @property
    def train(self) -> Any | None:
        """What cached training needs of a framework's own ``fit``; ``None``: it has none."""

    @property
    def loop(self) -> Any | None:
        """A training loop for a framework without a ``fit``; ``None``: it has one."""

    def rehearsal(self, seed: int, data: Any = None) -> AbstractContextManager[None]:
        """Within it, everything is seeded; on any exit the model is what it was, bit for bit.

        Classes of layers and the generators of the process and of a loader come back, too.
        """

    def trial(
        self, batches: Iterable[tuple[Any, ...]], *, policy: Policy, epochs: int
    ) -> AbstractContextManager[None]:
        """Within it, the model as it is after training on the batches with ``policy`` while frozen.

        The part that trains is trained on the ``(x, y[, sample_weight])`` tuples with the model's
        own optimizer and loss. On any exit the model is what it was, bit for bit.
        """


class Adapter(Inspect, Run, Record, Edit, Cut, Store, Train, Protocol):
    """All that the rest of Frostline may ask of a model, whatever its framework."""
