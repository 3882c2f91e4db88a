"""One forward pass for every question: the blend λ and the statistics are its arguments.

Every site normalises with ``(1 - λ) * stored + λ * batch``. While a pass is traced, each BN layer
carries a ``call`` of its own that reads λ and the stored statistics from the arguments of the
trace; the layer's class and variables stay as they are. All of it runs in a ``StatelessScope``:
what a layer assigns is thrown away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from frostline.adapters import Outcome
from frostline.adapters.keras import graph as keras_graph
from frostline.adapters.keras.arrays import to_numpy
from frostline.adapters.keras.compile import compiled, without_gradients
from frostline.adapters.keras.forward_pass import called, forced_phase, inference, tensors
from frostline.adapters.keras.loss import Judge, judge_of, read_losses
from frostline.adapters.keras.pipeline import prepared
from frostline.adapters.keras.random import fixed_randomness, seed_states, seeds
from frostline.adapters.keras.recurrent import looping, step_by_step
from frostline.adapters.keras.site_handle import (
    SiteHandle,
    blended_call,
    given_call,
    replaced,
    site_handles,
    stored_call,
)
from frostline.adapters.protocol import Condition
from frostline.data.batch import Batch
from frostline.numerics.stats import Moments
from frostline.types import Array, ModelError, as_float64


class BlendForward:
    """Forward passes of a Keras model with blended statistics; the model is never changed.

    At λ = 0 a site uses its stored statistics, at λ = 1 those of the batch (biased variance, in two
    passes over the values), whatever its ``trainable`` and ``policy`` say. A layer that the model
    uses several times has one λ and the moments of each of its inputs. BN layers that are not among
    ``paths`` use what they have stored. Batch renormalisation is left out: λ = 1 is plain batch
    normalisation there. A mask is treated as the stock layer treats it.

    A subclass of BN with a ``call`` of its own runs that ``call`` in inference with the blended
    statistics in the place of the stored ones; the batch's are those of the layer's input.

    A pass is compiled once per kind of answer on TensorFlow, once per batch size too on JAX, and
    runs eagerly on torch or where the model is compiled with ``run_eagerly``.

    Args:
        model: A built Keras model: functional, sequential or subclassed, on any backend.
        paths: Sites to blend, as in ``frostline.sites``, in the order of the blend vector; ``None``
            for all of them.
        loss: Whatever ``compile`` takes as a loss, or any callable ``(y, outputs)`` that gives one
            number per sample or per batch, or a mapping of such; ``None`` for the model's own:
            its ``compute_loss`` where the class has one, else the compiled loss.
        step: The user's ``step(model, batch)`` in the place of a loss. It runs eagerly; layers are
            given the phase of the pass, whatever ``training`` it passes.

    Attributes:
        paths: The sites, one per entry of the blend vector.
        traces: How often a pass was traced; stays 0 where nothing is compiled.
        calls: Path -> how often one pass that recorded moments called the site.

    Raises:
        ModelError: An unknown path, or a site that is asked for and has no statistics: not built,
            or a torch module that does not track them.
    """

    def __init__(
        self,
        model: Any,
        paths: Sequence[str] | None = None,
        *,
        loss: Any = None,
        step: Any = None,
    ) -> None:
        self.model = model
        self.traces = 0
        self.calls: dict[str, int] = {}
        known = site_handles(model)
        self._handles = _chosen(model, known, paths)
        self.paths = tuple(self._handles)
        self._loops = looping(model)
        self._others = [handle for path, handle in known.items() if path not in self._handles]
        self._given_loss = loss
        self._step = step
        self._judge: Judge | None = None
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def only(self, paths: Sequence[str]) -> BlendForward:
        """The same passes over some of the sites, the others on what they have stored.

        Derivatives end at the first of them, so those of a few late sites cost little.
        """
        return BlendForward(self.model, paths, loss=self._given_loss, step=self._step)

    # --- questions ----------------------------------------------------------------------------

    def outputs(self, batch: Batch, condition: Condition) -> Any:
        """Return the outputs of one batch and, if asked, what the sites saw.

        Args:
            batch: Its ``x`` has the structure that the model takes.
            condition: What the pass runs under.

        Returns:
            Arrays in the structure of the model's outputs, float32 at least; with ``record`` a pair
            of them and path -> moments, float64.

        Raises:
            DataError: ``blend`` or ``statistics`` of the wrong shape or out of range.
            ModelError: ``statistics`` for an unknown site.
        """
        found, seen = self._run("outputs", Batch(batch.x), condition)
        arrays = keras.tree.map_structure(_outgoing, found)
        return (arrays, self._merged(seen)) if condition.record else arrays

    def gradient(
        self, batch: Batch, condition: Condition
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the losses, shape ``(n,)``, and d mean(losses) / dλ, shape ``(sites,)``.

        The derivative runs through the batch statistics of all sites behind. With the default
        reduction the mean of the losses is the compiled loss without the losses that layers and
        regularizers add. Arguments are those of :meth:`outputs`.

        Raises:
            DataError: Labels or weights that do not fit the outputs; as for :meth:`outputs`.
            ModelError: The model has no loss.
        """
        losses, slope = self._run("gradient", batch, condition, record=False)
        return np.atleast_1d(as_float64(to_numpy(losses))), as_float64(to_numpy(slope))

    def outcome(self, batch: Batch, condition: Condition) -> Outcome:
        """Return outputs, losses and, if asked, the sites' moments of one pass together.

        Arguments and errors are those of :meth:`outputs` and :meth:`gradient`.
        """
        backend = keras.backend.backend()
        # JAX compiles for longer than the batch's moments, which λ = 0 does without, take.
        zero = not condition.record and backend != "jax" and not np.any(as_float64(condition.blend))
        # Elsewhere they are formed anyway: one compiled pass that gives them serves both.
        together = not zero and backend != "torch" and self._recordable
        kind = "outcome at zero" if zero else "outcome"
        record = condition.record or together
        found, losses, seen = self._run(kind, batch, condition, record=record)
        return _outcome(found, losses, self._merged(seen) if condition.record else {})

    def own(self, batch: Batch, *, training: bool, number: int = 0) -> Outcome:
        """Return outputs and losses of the model's own pass: every layer as its flags have it.

        Args:
            batch: The batch.
            training: The ``training`` argument of the model's call; nothing is updated.
            number: Of the batch; fixes the dropout masks.
        """
        kind = "own training" if training else "own inference"
        found, losses, _ = self._run(kind, batch, Condition(0.0, dropout=training, number=number))
        return _outcome(found, losses, {})

    # --- the pass -----------------------------------------------------------------------------

    def _run(
        self, kind: str, batch: Batch, condition: Condition, *, record: bool | None = None
    ) -> Any:
        dtype = keras.backend.result_type(keras.config.floatx(), "float32")
        blend = ops.convert_to_tensor(condition.shares(len(self.paths)), dtype=dtype)
        stored = self._statistics(condition)
        parts = prepared(self.model, batch.x, batch.y, batch.sample_weight)
        if self._step is not None and kind != "outputs":
            parts = (batch.given, None, None)
        x, y, sample_weight = map(tensors, parts)
        moved = seeds(self.model, condition.number)
        record = condition.record if record is None else record
        with fixed_randomness(self.model, condition.number):
            if kind != "outputs" and self._judge is None and self._step is None:
                self._judge = self._prepared_judge(x, y)
            run = self._function(kind, bool(condition.dropout), bool(record))
            return run(moved, blend, stored, x, y, sample_weight)

    def _merged(self, seen: Mapping[str, Sequence[Any]]) -> dict[str, Moments]:
        self.calls |= {path: len(entries) for path, entries in seen.items()}
        return _moments(seen)

    @property
    def _recordable(self) -> bool:
        """Moments may be recorded whether or not a mask comes along."""
        return not self._loops and all(handle.axis == -1 for handle in self._handles.values())

    def _statistics(self, condition: Condition) -> Any:
        """Mean and variance of all sites for λ = 0, side by side: shape ``(2, all channels)``.

        One array: each argument of a compiled pass costs some time in every call.
        """
        own = {path: _stored(path, handle) for path, handle in self._handles.items()}
        used = own | condition.replaced({path: mean.shape for path, (mean, _) in own.items()})
        kinds = {_at_least_float32(variable) for pair in own.values() for variable in pair}
        dtype = keras.backend.result_type(*kinds, "float32")
        if not used:
            return ops.zeros((2, 0), dtype)
        moments = zip(*(used[path] for path in own), strict=True)
        return ops.stack([ops.concatenate([_read(m, dtype) for m in each]) for each in moments])

    def _of_sites(self, statistics: Any) -> list[Any]:
        """Those of each site, shape ``(2, channels)``."""
        pairs = [_stored(path, handle) for path, handle in self._handles.items()]
        if len(pairs) < 2:
            return [statistics][: len(pairs)]
        ends = np.cumsum([mean.shape[0] for mean, _ in pairs])
        return list(ops.split(statistics, ends[:-1].tolist(), axis=1))

    def _prepared_judge(self, x: Any, y: Any) -> Judge:
        """Resolve the loss outside any trace: it may create variables.

        What the outputs look like is enough. An eager pass to see them would keep all activations
        of a functional model at once, and JAX would compile each of its operations.
        """
        outputs = shaped_like_outputs(self.model, x)
        with keras.StatelessScope(), without_gradients():
            return judge_of(self.model, self._given_loss, y, outputs)

    def _function(self, kind: str, dropout: bool, record: bool) -> Callable[..., Any]:
        variables = list(self.model.variables)
        # A trace fixes these as well as shapes: our layers read gamma and beta by `trainable`.
        settings: tuple[Any, ...] = tuple((x.trainable, x.epsilon) for x in self._handles.values())
        if kind.startswith("own"):  # the layers' own calls go by the flags of every layer
            settings = keras_graph.flags_of(self.model)
        eager = self._step is not None or bool(getattr(self.model, "run_eagerly", False))
        key = (kind, dropout, record, eager, settings, tuple(map(id, variables)))
        if key not in self._compiled:
            forward = functools.partial(self._forward, kind, dropout, record)
            states = [state for state, _ in seed_states(self.model)]
            self._compiled[key] = compiled(
                forward, variables, states, slope=kind == "gradient", eager=eager
            )
        return self._compiled[key]

    def _forward(
        self,
        kind: str,
        dropout: bool,
        record: bool,
        mapping: list[tuple[Any, Any]],
        traced: bool,
        blend: Any,
        statistics: Any,
        x: Any,
        y: Any,
        sample_weight: Any,
        then: Callable[[Any], Any] | None = None,
    ) -> Any:
        self.traces += traced
        seen: dict[str, list[Any]] = {path: [] for path in self.paths}
        own = kind.startswith("own")
        if kind.endswith("at zero"):
            patched = self._given(self._of_sites(statistics))
        else:
            patched = self._blended(blend, self._of_sites(statistics), seen if record else None)
        # Regularizers and `add_loss` take weights from the scope alone.
        mapped = {id(variable) for variable, _ in mapping}
        weights = [(v, v.value) for v in self.model.trainable_weights if id(v) not in mapped]
        scope = keras.StatelessScope(state_mapping=[*mapping, *weights], collect_losses=True)
        stepping = self._step is not None and kind != "outputs"
        phase = forced_phase(self.model, dropout) if stepping else nullcontext()
        steps = step_by_step(self._loops) if record else nullcontext()
        with scope, phase, steps, nullcontext() if own else patched:
            if stepping:
                outputs, judged = None, read_losses(self._step(self.model, x))
            else:
                outputs = called(self.model, x, dropout)
                if kind == "outputs":
                    return outputs, seen
                assert self._judge is not None
                judged = self._judge(x, y, sample_weight, outputs, dropout)
            if own or kind.startswith("outcome"):
                return outputs, (judged.losses, judged.parts, judged.metrics), seen
            # Inside: a rematerialised layer runs again while torch differentiates.
            return judged.losses if then is None else then(judged.losses)

    def _blended(
        self, blend: Any, statistics: list[Any], seen: dict[str, list[Any]] | None
    ) -> AbstractContextManager[None]:
        """Give every BN layer a forward function that uses these tensors."""
        calls: list[tuple[SiteHandle, Callable[..., Any]]] = []
        for index, (path, handle) in enumerate(self._handles.items()):
            entries = None if seen is None else seen[path]
            call = functools.partial(blended_call, blend[index], statistics[index], entries)
            calls.append((handle, call))
        return replaced([*calls, *((handle, stored_call) for handle in self._others)])

    def _given(self, statistics: list[Any]) -> AbstractContextManager[None]:
        """Give every BN layer a forward function that uses these statistics and no others."""
        handles = zip(self._handles.values(), statistics, strict=True)
        calls = [(handle, functools.partial(given_call, pair)) for handle, pair in handles]
        return replaced([*calls, *((handle, stored_call) for handle in self._others)])


def _outcome(outputs: Any, judged: tuple[Any, Any, Any], moments: Mapping[str, Moments]) -> Outcome:
    losses, parts, metrics = judged
    found = as_float64(to_numpy(losses))
    return Outcome(
        outputs=None if outputs is None else keras.tree.map_structure(_outgoing, outputs),
        losses=np.atleast_1d(found),
        moments=moments,
        unit="sample" if found.ndim else "batch",
        parts={name: np.atleast_1d(as_float64(to_numpy(part))) for name, part in parts.items()},
        metrics={name: to_numpy(value) for name, value in metrics.items()},
    )


def _chosen(
    model: Any, known: Mapping[str, SiteHandle], paths: Sequence[str] | None
) -> dict[str, SiteHandle]:
    if paths is None:
        ready = {path: handle for path, handle in known.items() if handle.stored() is not None}
        if known and not ready and not model.built:
            raise _not_built(next(iter(known)))
        return ready
    chosen = list(paths)
    if len(set(chosen)) < len(chosen):
        raise ModelError(f"each site can be blended once. Received: {chosen}")
    for path in chosen:
        if path not in known:
            every = ", ".join(map(repr, known)) or "none"
            raise ModelError(f"no BN layer has this path; there are {every}. Received: {path!r}")
        _stored(path, known[path])
    return {path: known[path] for path in chosen}


def _stored(path: str, handle: SiteHandle) -> tuple[Any, Any]:
    pair = handle.stored()
    if pair is not None:
        return pair
    if handle.name == "call":
        raise _not_built(path)
    raise ModelError(
        f"'{path}' keeps no statistics, so there is nothing to blend with. Received: a torch "
        "module with track_running_stats=False"
    )


def _not_built(path: str) -> ModelError:
    return ModelError(
        f"Layer '{path}' is not built yet, so it has no statistics; call the model on one "
        "batch first. Received: an unbuilt layer"
    )


def shaped_like_outputs(model: Any, x: Any) -> Any:
    """Ones in the structure, shapes and types of the model's outputs; real ones where unknown."""
    if keras.backend.backend() != "torch":  # which runs the model to find out
        try:
            like = keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape, x.dtype), x)
            specs = model.compute_output_spec(like, training=False)
            alone = isinstance(specs, (list, tuple)) and len(specs) == 1
            if alone and hasattr(model, "_outputs_struct"):
                (specs,) = specs  # a functional model of `outputs=[y]` gives y when it is called
            return keras.tree.map_structure(lambda spec: ops.ones(spec.shape, spec.dtype), specs)
        except Exception:  # code of the user's own may raise anything: the pass then says what
            pass
    return inference(model, x)


# --- on the host ------------------------------------------------------------------------------


def _read(moment: Any, dtype: str) -> Any:
    """A variable's value, or an array that takes its place."""
    return ops.cast(getattr(moment, "value", moment), dtype)


def _at_least_float32(variable: Any) -> str:
    name = keras.backend.standardize_dtype(variable.dtype)
    return str(keras.backend.result_type(name, "float32"))


def _outgoing(tensor: Any) -> Array:
    """An array of a type that numpy knows: half precision becomes float32."""
    array = to_numpy(tensor)
    half = keras.backend.standardize_dtype(tensor.dtype) in ("float16", "bfloat16")
    return array.astype(np.float32) if half else array


def _moments(seen: Mapping[str, Sequence[Any]]) -> dict[str, Moments]:
    merged = {}
    for path, entries in seen.items():
        parts = []
        for count, statistics in entries:
            number, (mean, variance) = int(to_numpy(count)), as_float64(to_numpy(statistics))
            parts.append(Moments(number, mean, variance * number))
        if parts:
            merged[path] = functools.reduce(Moments.merge, parts)
    return merged
