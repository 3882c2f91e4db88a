"""Thaw a frozen model on a schedule, without compiling at any of its steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from frostline.adapters.keras import edit as keras_edit, graph as keras_graph
from frostline.adapters.keras.optimizer import retarget, strategy_scope
from frostline.adapters.keras.weight_hold import WeightHold
from frostline.graph.addresses import Place
from frostline.types import ModelError

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class _Planned:
    """A place that a schedule thaws, and the epoch in which."""

    place: Place
    epoch: int

    @property
    def site(self) -> bool:
        return keras_graph.is_site(self.place.layer)


class GradualUnfreeze(keras.callbacks.Callback):  # type: ignore[misc]
    """Thaw a frozen model step by step during ``fit``, without compiling at any of the steps.

    At the start of an epoch in the schedule, everything from its boundary on is thawed, as by
    ``frostline.unfreeze(model, since=boundary)`` (but dropout that :func:`frostline.freeze` turned
    off stays off); what is before it stays as it is. The training
    step is compiled once, for all that the schedule will ever thaw: what is not thawed yet keeps
    its bits under any optimizer, and its slots start when it does. So the optimizer's state, its
    counters and its learning rate go on. The price is that the gradients of all these layers are
    computed from the first epoch on.

    ``ramp=n``: a BN site that is thawed normalises with a blend of stored and batch statistics
    whose λ goes from 0 to 1 in n training steps; switching all of it at once is a shock to what
    was trained behind it.

    In the epochs between, a layer that waits reads ``trainable = True`` (the optimizer must know
    it), except BN sites. After the last epoch all flags say what was thawed. If ``fit`` is
    interrupted, :meth:`close` does that.

    Args:
        schedule: Epoch, counted from 0, -> boundary: a layer name, path, index, fraction or layer,
            as for :func:`frostline.freeze`.
        ramp: Training steps that λ takes from 0 to 1; 0 for none.

    Raises:
        ModelError: At the start of ``fit``: an unknown boundary; a BN site to be thawed that is a
            stock layer or inside a torch module, whose ``trainable`` is not live
            (``frostline.convert`` makes it so); a ``MultiOptimizer``. The model is unchanged.

    Example:
        >>> fl.freeze(model, until="head")                                    # doctest: +SKIP
        >>> schedule = {2: "block5", 4: "block3"}                             # doctest: +SKIP
        >>> model.fit(x, y, epochs=8, callbacks=[                             # doctest: +SKIP
        ...     fl.callbacks.GradualUnfreeze(schedule, ramp=100)])
    """

    def __init__(self, schedule: Mapping[int, Any], *, ramp: int = 0) -> None:
        super().__init__()
        for epoch in schedule:
            if type(epoch) is not int or epoch < 0:
                raise ModelError(
                    f"schedule must have epochs, counted from 0, as keys. Received: {epoch!r}"
                )
        if type(ramp) is not int or ramp < 0:
            raise ModelError(f"ramp must be a number of steps, at least 0. Received: {ramp!r}")
        self.schedule = dict(sorted(schedule.items()))
        self.ramp = ramp
        self._waiting: list[_Planned] = []
        self._ramped: list[Any] = []
        self._hold: WeightHold | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Prepare the optimizer and the training step for all that will be thawed."""
        self.close()
        model = self.model
        places = keras_graph.walk(model)
        planned = self._plan(model, places)
        _require_live(planned)
        before, optimizer = keras_edit.flags(model), model.optimizer
        try:
            for thaw in planned:
                if not thaw.site:
                    keras_edit.set_place(thaw.place, False, True, True)
            keras_edit.open_containers(model, places, [thaw.place for thaw in planned])
            retarget(model)
            self._waiting = planned
            held = [v for thaw in planned if not thaw.site for v in _own(thaw.place.layer)]
            if planned:
                self._hold = WeightHold(model, held)
            self._reserve_ramps(model)
            model.make_train_function(force=True)
        except BaseException:
            self._release(model)
            keras_edit.set_flags(before)
            model.optimizer = optimizer
            raise

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Thaw what is due; of a resumed ``fit`` also what was due before."""
        due = [thaw for thaw in self._waiting if thaw.epoch <= epoch]
        if not due:
            return
        model = self.model  # on JAX this brings the weights back from the running fit
        self._waiting = [thaw for thaw in self._waiting if thaw.epoch > epoch]
        if self._hold is not None:
            self._hold.open(v for thaw in due if not thaw.site for v in _own(thaw.place.layer))
        uses = {id(thaw.place.layer): thaw.place.calls for thaw in due if thaw.site}
        for thaw in due:
            if thaw.site:
                thaw.place.layer.trainable = True
                if thaw.epoch == epoch and any(thaw.place.layer is x for x in self._ramped):
                    thaw.place.layer.start_ramp(self.ramp * uses[id(thaw.place.layer)])
        log.info(
            "epoch %d of '%s': thawed %d layers from '%s' on",
            epoch,
            model.name,
            len(due),
            due[0].place.path,
        )

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Let flags, optimizer and the next training step be plain again."""
        self.close()

    def close(self) -> None:
        """End the schedule where it is; for a ``fit`` that was interrupted."""
        if self._model is None or not (self._waiting or self._hold or self._ramped):
            return
        model = self.model
        for thaw in self._waiting:
            keras_edit.set_place(thaw.place, True, True, True)
        self._release(model)
        retarget(model, always=True)
        model.train_function = None

    def will_thaw(self, model: Any) -> list[Place]:
        """Every layer that the schedule will thaw; ``fl.fit`` keeps no features of them."""
        return [thaw.place for thaw in self._plan(model, keras_graph.walk(model))]

    def _plan(self, model: Any, places: tuple[Place, ...]) -> list[_Planned]:
        """What is frozen and will be thawed, in execution order, each at its first epoch."""
        found: dict[str, _Planned] = {}
        for epoch, reference in self.schedule.items():
            boundary = keras_graph.resolve(model, reference)
            for place in keras_edit.side(places, boundary, before=False):
                if _frozen(place):
                    found.setdefault(place.path, _Planned(place, epoch))
        return sorted(found.values(), key=lambda thaw: thaw.place.order)

    def _reserve_ramps(self, model: Any) -> None:
        if not self.ramp:
            return
        for thaw in self._waiting:
            layer = thaw.place.layer
            if thaw.site and layer.policy == "inference" and not layer.renorm:
                with strategy_scope(model):
                    layer.reserve_ramp()
                self._ramped.append(layer)

    def _release(self, model: Any) -> None:
        for layer in self._ramped:
            layer.release_ramp()
        if self._hold is not None:
            self._hold.remove()
        self._waiting, self._ramped, self._hold = [], [], None
        model.train_function = None


def _own(layer: Any) -> list[Any]:
    return list(layer._trainable_variables)


def _frozen(place: Place) -> bool:
    own = _own(place.layer)
    if keras_graph.is_site(place.layer) or (place.leaf and not own):
        return not place.layer.trainable
    waits = not all(variable.trainable for variable in own)
    return waits or (place.leaf and not place.layer.trainable)


def _require_live(planned: Sequence[_Planned]) -> None:
    for thaw in planned:
        wrapped = keras_graph.wrapped_module(thaw.place.layer) is not None
        if wrapped or (thaw.site and not getattr(thaw.place.layer, "live", False)):
            raise ModelError(
                f"'{thaw.place.path}' cannot be thawed without compiling: its `trainable` is not "
                "live. frostline.convert(model) makes stock BN layers live. "
                f"Received: {type(thaw.place.layer).__name__}"
            )
