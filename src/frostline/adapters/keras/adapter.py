"""The Keras view: what the rest of Frostline may ask of a Keras model, on any backend.

Forward passes run inside ``keras.StatelessScope``, which catches every assignment, so a
training-mode pass updates nothing. They are compiled once per phase, set of `trainable` flags and
batch shape on TensorFlow and JAX, and run eagerly on torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import keras

from frostline.adapters.keras import (
    behaviour as keras_behaviour,
    compare as keras_compare,
    edit as keras_edit,
    facts as keras_facts,
    fold as keras_fold,
    graph as keras_graph,
    momentum as keras_momentum,
    native as keras_native,
    noise as keras_noise,
    random as keras_random,
    rehearsal as keras_rehearsal,
    split as keras_split,
    state as keras_state,
    trial as keras_trial,
)
from frostline.adapters.keras.blend import BlendForward
from frostline.adapters.keras.forward_pass import (
    Collected,
    compiled_pass,
    float32,
    inference,
    readable_labels,
    tensors,
)
from frostline.adapters.keras.graph import is_site
from frostline.adapters.keras.loss import computes_loss
from frostline.adapters.keras.moments import MomentRecorder
from frostline.adapters.keras.pipeline import all_prepared, prepared
from frostline.adapters.keras.random import fixed_randomness, seeds
from frostline.adapters.together import ALONE, Together
from frostline.data.batch import Batch
from frostline.graph.addresses import Place
from frostline.types import Boundary, ModelError
from frostline.types.measured import Behaviour, Difference


class KerasView:
    """A Keras model seen in numpy and dataclasses; see :class:`frostline.adapters.Adapter`."""

    framework = "keras"
    saved_as: Literal["model", "state"] = "model"
    loop = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.backend: str = keras.backend.backend()
        self._steps: dict[Any, Callable[..., Any]] = {}
        # Questions that another file of this folder answers.
        self.sites = partial(keras_graph.sites, model)
        self.facts = partial(keras_facts.facts, model)
        self.boundary = partial(keras_graph.resolve, model)
        self.frozen_prefix = partial(keras_graph.frozen_prefix, model)
        self.noise_layers = partial(keras_noise.noise_layers, model)
        self.preserved = partial(keras_state.preserved, model)
        self.snapshot = partial(keras_state.all_that_edits_touch, model)
        self.surroundings = partial(keras_state.surroundings, model)
        self.modes = keras_state.modes
        self.full_precision = partial(keras_native.full_precision, model)
        self.set_frozen = partial(keras_edit.set_frozen, model)
        self.set_decay = partial(keras_momentum.set_decay, model)
        self.convert = partial(keras_edit.convert, model)
        self.restore = partial(keras_edit.to_stock, model)
        self.fold = partial(keras_fold.fold, model)
        self.split = partial(keras_split.split, model)
        self.trial = partial(keras_trial.trial, model)
        self.rehearsal = partial(keras_rehearsal.rehearsal, model)

    @property
    def channel_axis(self) -> int:
        """1 where the first layer that has a data format wants ``channels_first``, else -1."""
        formats = (getattr(p.layer, "data_format", None) for p in keras_graph.walk(self.model))
        return 1 if next(filter(None, formats), None) == "channels_first" else -1

    def before(self, boundary: Boundary) -> frozenset[str]:
        """Paths of the layers before a boundary: those that freezing up to it freezes."""
        places = keras_edit.side(keras_graph.walk(self.model), boundary, before=True)
        return frozenset(place.path for place in places)

    def generators(self, data: Any = None) -> Callable[[], None]:
        """Remember Keras' generators and torch's; returns what puts them back."""
        return keras_random.generators(self.model, data)

    def forward(self, x: Any, *, training: bool, step: int = 0) -> Any:
        """Return the outputs of one batch; no variable of the model changes.

        Args:
            x: Inputs of one batch, in the structure that the model takes.
            training: Phase 1 (dropout on, batch statistics where the layers use them) or phase 0.
            step: Number of the batch: dropout masks are the same in every call for the same step
                and differ between steps.

        Returns:
            Arrays in the structure of the model's outputs, float32.
        """
        outputs, _ = self._run(x, None, None, training, step)
        return outputs

    def score(
        self, x: Any, y: Any, sample_weight: Any = None, *, training: bool, step: int = 0
    ) -> tuple[Any, float | None]:
        """Return outputs and compiled loss of one batch; no variable of the model changes.

        The loss is the compiled one with its additional losses (regularizers), or ``None`` when the
        model is not compiled with a loss. Arguments are those of :meth:`forward`.

        Raises:
            DataError: The compiled loss does not take these labels.
        """
        outputs, loss = self._run(x, y, sample_weight, training, step)
        return outputs, None if loss is None else float(loss)

    def objective(self) -> tuple[str | None, bool | None]:
        """Return the snake-case name of the compiled loss and its ``from_logits``."""
        loss = self.model.loss if getattr(self.model, "compiled", False) else None
        if loss is None or isinstance(loss, (dict, list, tuple)):
            return None, None
        if isinstance(loss, str):
            return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", loss).lower(), None
        name = getattr(loss, "__name__", None) or type(loss).__name__
        snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        return snake, getattr(loss, "_fn_kwargs", {}).get("from_logits")

    def inputs(self, *, labels: bool = False) -> int:
        """How many tensors the model takes; one where only its own code knows.

        Labels are never among them.
        """
        with suppress(AttributeError, ValueError):  # a Sequential that is not built yet
            return 1 if labels else len(self.model.inputs or ()) or 1
        return 1

    def meter(
        self,
        paths: Sequence[str],
        ranks: Together = ALONE,
        step: Any = None,
    ) -> MomentRecorder:
        """What measures and stores the statistics of these sites.

        Raises:
            ModelError: A path is not a built Keras BN layer; or a step.
        """
        if step is not None:
            raise ModelError(
                "the statistics of a Keras model are measured on its inputs: leave step= out and "
                "give (x, y) or (x,). Received: a step"
            )
        return MomentRecorder(self.model, paths, ranks)

    def together(self, process_group: Any = None) -> Together:
        """This process alone.

        Raises:
            ModelError: A process group of torch was given.
        """
        if process_group is None or process_group is False:
            return ALONE
        raise ModelError(
            "process_group is for torch modules under torch.distributed. Received: a Keras model "
            f"and process_group={process_group!r}"
        )

    def blend_forward(
        self, loss: Any = None, step: Any = None, paths: Sequence[str] | None = None
    ) -> BlendForward:
        """Forward passes with λ and the stored statistics as arguments.

        Args:
            loss: Whatever ``compile`` takes as a loss, or any callable ``(y, outputs)`` with one
                number per sample; ``None`` for the compiled loss.
            step: The user's own ``step(model, batch)``.
            paths: Sites to blend, in the order of the blend vector; ``None`` for all of them.

        Raises:
            ModelError: An unknown path, or a site that is not built.
        """
        return BlendForward(self.model, paths, loss=loss, step=step)

    def behaviour(self, batches: Iterable[Any], step: Any = None) -> dict[str, Behaviour]:
        """What every site does in a training-mode and in an inference pass of the model."""
        collected = [Batch(*part) if isinstance(part, tuple) else part for part in batches]
        if step is not None:
            self._require_built([p for p in keras_graph.walk(self.model) if is_site(p.layer)])
        elif collected:
            self._build(tensors(collected[0].x))
        return keras_behaviour.behaviour(self.model, collected, step)

    def moved_at_inference(self, batch: Batch, step: Any = None) -> dict[str, str]:
        """Nothing: no layer of Keras moves state of its own at inference; others are not asked."""
        del batch, step
        return {}

    def round_trip(self, x: Any) -> float:
        """Save, load, run inference on ``x``: largest change relative to the largest output.

        Raises:
            ModelError: The model cannot be saved or loaded; the text says why.
        """
        self._build(tensors(x))
        return keras_compare.round_trip(self.model, partial(_outputs, x))

    def difference(self, reference: Any, x: Any = None) -> Difference:
        """Compare with a model, a file or arrays; see :func:`.keras_compare.difference`."""
        if x is not None:
            self._build(tensors(x))
        outputs = None if x is None else partial(_outputs, x)
        return keras_compare.difference(self.model, reference, outputs)

    def evaluate(self, batches: Iterable[tuple[Any, ...]]) -> Mapping[str, float]:
        """Run the model's own ``evaluate``; metric states come back untouched.

        Args:
            batches: ``(x, y)`` or ``(x, y, sample_weight)`` tuples.

        Returns:
            Metric name -> value with ``loss``; empty when the model is not compiled.
        """
        if not getattr(self.model, "compiled", False):
            return {}
        collected = Collected(all_prepared(self.model, batches))
        with keras_state.preserved(self.model), readable_labels(self.model, collected.labels):
            # An `evaluate` of the user's own ends in this one, and may take other data.
            logs = keras.Model.evaluate(self.model, collected, verbose=0, return_dict=True)
        return {name: float(value) for name, value in logs.items()}

    @property
    def train(self) -> Any:
        """What cached training needs of Keras' own ``fit``."""
        from frostline.adapters.keras import cached_fit

        return cached_fit

    def judges_itself(self) -> bool:
        """Never: a Keras model is called with its inputs."""
        return False

    def own_loss(self) -> Any:
        """What the model was compiled with, or its ``compute_loss`` if it has one of its own."""
        found = getattr(self.model, "loss", None)
        return self.model.compute_loss if found is None and computes_loss(self.model) else found

    def compiled(self) -> bool:
        """Whether the model is compiled for training."""
        return bool(getattr(self.model, "compiled", False))

    # --- the step -----------------------------------------------------------------------------

    def _run(self, x: Any, y: Any, weight: Any, training: bool, step: int) -> tuple[Any, Any]:
        model = self.model
        x, y, weight = (tensors(part) for part in prepared(model, x, y, weight))
        self._build(x)
        with_loss = y is not None and self.compiled() and self.own_loss() is not None
        # A compiled step holds these flags as constants, so other flags need another step.
        flags = keras_graph.flags_of(model)
        objective = getattr(model, "_compile_loss", None) if with_loss else None
        key = (training, objective, weight is not None, flags)
        if key not in self._steps:
            self._steps[key] = compiled_pass(model, training, with_loss)
        with fixed_randomness(model, step), readable_labels(model, y):
            if with_loss:
                self._build_loss(x, y)
            outputs, loss = self._steps[key](x, y, weight, seeds(model, step))
        convert = keras.tree.map_structure(float32, outputs)
        return convert, None if loss is None else keras.ops.convert_to_numpy(loss)

    def _build(self, x: Any) -> None:
        if not self.model.built:
            self._require_built(keras_graph.walk(self.model))
            with keras_state.preserved(self.model):
                self.model(x, training=False)

    def _require_built(self, places: Iterable[Place]) -> None:
        """Raise where looking at a model would make its weights.

        They cannot be taken away again: Keras lets a layer that was built add no others.
        """
        unbuilt = [place.path for place in places if not place.layer.built]
        if unbuilt and not self.model.built:
            raise ModelError(
                f"'{unbuilt[0]}' is not built yet, so it has no weights to look at; call the model "
                f"on one batch first. Received: an unbuilt model {self.model.name!r}"
            )

    def _build_loss(self, x: Any, y: Any) -> None:
        """Let a compiled loss that has met no data yet create its trackers, outside any trace."""
        loss = getattr(self.model, "_compile_loss", None)
        if loss is not None and not loss.built:
            loss.build(y, inference(self.model, x))


def _outputs(x: Any, model: Any) -> Any:
    """Inference outputs of any Keras model."""
    return KerasView(model).forward(x, training=False)
