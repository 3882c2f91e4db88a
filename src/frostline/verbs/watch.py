"""Look over a training loop's shoulder: do frozen sites stay frozen, does a gap open?

Nothing here changes a model. What is watched are the numbers themselves, so any loop will do: a
plain one, Lightning, fastai, ``fit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from frostline.adapters import Adapter, adapter_of
from frostline.adapters.protocol import Condition
from frostline.adapters.together import ALONE, Together
from frostline.atomic import atomically, generators, taken_back
from frostline.data.arrays import leaves
from frostline.data.batch import Batch, failure
from frostline.graph.addresses import is_within
from frostline.measure import samples
from frostline.measure.phases import require_one, tried
from frostline.measure.ranks import pooled
from frostline.numerics.stats import mean_shift, variance_ratio
from frostline.types import Array, FrostlineError, ModelError
from frostline.types.arguments import checked
from frostline.types.facts import SiteFacts
from frostline.types.measured import Behaviour
from frostline.verbs.whole import draws_nothing, whole

#: Values of a statistic that differ by less than this, in standard deviations, have not moved:
#: a checkpoint in half precision keeps three digits.
MOVED = 1e-3


class NotFrozenError(FrostlineError, AssertionError):
    """A part of a model that should be frozen is not, or moved."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What :class:`Watch` saw at one moment.

    Attributes:
        step: Number of the check, from 1.
        drift: Path -> how far the stored statistics are from where they were when the watch began:
            the largest channel, in standard deviations for the mean, relative for the variance.
        moved: Paths of sites that were frozen when the watch began and moved nevertheless: their
            statistics, gamma or beta.
        gap: Mean loss with batch statistics where training uses them minus that of inference, on
            the held samples; without labels and a loss the mean squared distance of the outputs, in
            their variances; ``None`` without data.
    """

    step: int
    drift: Mapping[str, float]
    moved: tuple[str, ...]
    gap: float | None = None

    def scalars(self) -> dict[str, float]:
        """Numbers for a tracker, by name: ``bn/drift_max``, ``bn/frozen_moved``, ``bn/gap``."""
        values = {
            "bn/drift_max": max(self.drift.values(), default=0.0),
            "bn/frozen_moved": float(len(self.moved)),
        }
        return values if self.gap is None else {**values, "bn/gap": self.gap}


@dataclass(eq=False)
class Watch:
    """A watch over one model; see :func:`watch`.

    Attributes:
        checks: What was seen, one entry per :meth:`check`.
    """

    _adapter: Adapter = field(repr=False)
    _before: Mapping[str, SiteFacts] = field(repr=False)
    _batches: Sequence[Batch] = field(repr=False, default=())
    _loss: Any = field(repr=False, default=None)
    _step: Any = field(repr=False, default=None)
    _by_outputs: bool = field(repr=False, default=False)
    _ranks: Together = field(repr=False, default=ALONE)
    checks: list[Check] = field(default_factory=list)

    def check(self) -> Check:
        """Compare the model with what it was when the watch began; nothing of it changes.

        In a process group all ranks call this together, and get the largest drift, what moved on
        any of them, and the gap of rank 0.
        """
        with self._ranks.collective("watch"):
            mine = atomically(self._adapter.snapshot(), self._seen)
            everyone = self._ranks.values(mine)
        drift = {path: max(theirs[path] for theirs, _, _ in everyone) for path in everyone[0][0]}
        moved = tuple(path for path in drift if any(path in theirs for _, theirs, _ in everyone))
        check = Check(step=len(self.checks) + 1, drift=drift, moved=moved, gap=everyone[0][2])
        self.checks.append(check)
        return check

    def _seen(self) -> tuple[dict[str, float], list[str], float | None]:
        """Drift, what moved, and the gap, of this process."""
        now = {entry.site.path: entry for entry in self._adapter.facts()}
        # Layers may have been replaced since: what is gone has no drift.
        kept = {path: before for path, before in self._before.items() if path in now}
        drift = {path: _drift(before, now[path]) for path, before in kept.items()}
        moved = [
            path
            for path, before in kept.items()
            if (before.site.stats_frozen and drift[path] > MOVED)
            or (before.site.params_frozen and _params_moved(before, now[path]))
        ]
        return drift, moved, self._gap() if self._batches else None

    def hold(self, data: Any, loss: Any, step: Any, *, batch_size: int, max_samples: int) -> None:
        """Measure the gap on these data, too; by the outputs where losses cannot be compared.

        Raises:
            FrostlineError: Neither can; it is said before the training, not after.
        """
        ways = {"batch_size": batch_size, "max_samples": max_samples}
        with taken_back(generators()), taken_back(self._adapter.generators(data)):
            atomically(self._adapter.snapshot(), lambda: self._hold(data, loss, step, **ways))

    def _hold(self, data: Any, loss: Any, step: Any, *, batch_size: int, max_samples: int) -> None:
        self._batches = samples.hold(
            self._adapter, data, step, batch_size=batch_size, max_samples=max_samples
        )
        self._loss, self._step = loss, step
        forward = self._adapter.blend_forward(loss=loss, step=step)
        first = self._batches[0]
        with self._adapter.preserved():
            try:
                tried(forward, first)
            except FrostlineError:
                if loss is not None or step is not None or first.y is not None:
                    raise
                try:
                    outputs = forward.outputs(first, Condition(0.0))
                except FrostlineError:
                    raise
                except Exception as error:
                    raise failure(error, first) from error
                if not _floating(outputs):
                    raise
                self._by_outputs = True

    def require_unmoved(self, until: Any = None) -> Check:
        """Check, and raise if what is frozen moved.

        Args:
            until: As in :func:`assert_frozen`: nothing before it may have moved, frozen or not;
                ``None``: nothing that was frozen when the watch began.

        Raises:
            NotFrozenError: It names the layers, and how far their statistics drifted.
        """
        check = self.check()
        inside = (lambda _: False) if until is None else _inside(self._adapter, until)
        wrong = {
            path: drift
            for path, drift in check.drift.items()
            if path in check.moved or (drift > MOVED and inside(path))
        }
        if wrong:
            worst = sorted(wrong, key=lambda path: -wrong[path])
            lines = [
                f"  '{path}': "
                + (
                    f"statistics drifted by {wrong[path]:.3g} standard deviations"
                    if wrong[path] > MOVED
                    else "gamma or beta moved"
                )
                for path in worst[:10]
            ]
            more = [f"  and {len(wrong) - 10} more"] if len(wrong) > 10 else []
            raise NotFrozenError(
                f"{len(wrong)} of {len(self._before)} BN layers should be frozen, but moved:\n"
                + "\n".join([*lines, *more])
                + "\nfrostline.freeze(model, until) locks them; `frostline lint` tells why"
            )
        return check

    def _gap(self) -> float:
        forward = self._adapter.blend_forward(loss=self._loss, step=self._step)
        locked = {
            s.path for s in self._adapter.sites() if s.stats_frozen and s.policy == "inference"
        }
        training = np.array([0.0 if path in locked else 1.0 for path in forward.paths])
        gaps, counts = [], []
        for number, batch in enumerate(self._batches):
            conditions = [
                Condition(blend, number=number) for blend in (training, np.zeros_like(training))
            ]
            if self._by_outputs:
                found = [_floating(forward.outputs(batch, entry)) for entry in conditions]
                gaps.append(float(np.mean([_distance(*pair) for pair in zip(*found, strict=True)])))
            else:
                one, zero = (
                    float(np.mean(forward.outcome(batch, entry).losses)) for entry in conditions
                )
                gaps.append(one - zero)
            counts.append(batch.count or 1)
        return float(np.average(gaps, weights=counts))

    def __str__(self) -> str:
        if not self.checks:
            return "nothing checked yet"
        last = self.checks[-1]
        lines = [f"{len(self.checks)} checks of {len(self._before)} BN layers"]
        if last.drift:
            worst = max(last.drift, key=lambda path: last.drift[path])
            lines.append(
                f"largest drift of stored statistics since the start: {last.drift[worst]:.3g} "
                f"standard deviations at '{worst}'"
            )
        if last.moved:
            shown = ", ".join(repr(path) for path in last.moved[:3])
            more = f" and {len(last.moved) - 3} more" if len(last.moved) > 3 else ""
            lines.append(f"frozen, but moved: {shown}{more}")
        if last.gap is not None:
            lines.append(
                f"outputs in training mode from those of inference, dropout off: {last.gap:.4g} "
                "of their variance"
                if self._by_outputs
                else f"loss in training mode minus inference, dropout off: {last.gap:+.4g}"
            )
        return "\n".join(lines)


@checked
@contextmanager
def watch(
    model: Any,
    data: Any = None,
    *,
    loss: Any = None,
    step: Any = None,
    max_samples: int = 256,
    batch_size: int = 32,
    process_group: Any = None,
) -> Iterator[Watch]:
    """Watch a model while something trains it.

    Args:
        model: A Keras model or a torch module.
        data: What to measure the gap on at each check, as in :func:`frostline.diagnose`; a few
            hundred samples will do.
        loss: As in :func:`frostline.diagnose`; a torch module that does not compute its own needs
            one, or ``step``, where ``data`` is given.
        step: Instead of a loss, the user's own ``step(model, batch)``, as in
            :func:`frostline.diagnose`.
        max_samples: Samples held.
        batch_size: Samples per batch of the gap; use the one that you train with.
        process_group: As in :func:`frostline.recalibrate`: the ranks begin, check and end together,
            and the gap is measured on samples of all of them, with the model of rank 0.

    Yields:
        A :class:`Watch`: call ``check()`` when you like, for example after each epoch. One more
        check is made at the end.

    Raises:
        ModelError: Not a model that Frostline can read; no BN layer; a loss or step that cannot be
            used. All of it before the block runs.
        DataError: Data that cannot be used, before the block runs.

    Example:
        >>> with fl.watch(model, (x, y), loss=criterion) as seen:    # doctest: +SKIP
        ...     for epoch in range(3):
        ...         train_one_epoch(model)
        ...         print(seen.check().scalars())
    """
    ranks = adapter_of(model).together(process_group)
    with ranks.collective("watch", max_samples=max_samples, batch_size=batch_size):
        watching = watching_of(model)
        watching._ranks = ranks
        require_one(loss, step)
        inputs = adapter_of(model).inputs()
        held, size = pooled(ranks, data, max_samples=max_samples, batch_size=batch_size,
                            whole=step is not None, inputs=inputs)  # fmt: skip
        if held is not None:
            watching.hold(held, loss, step, batch_size=size or batch_size, max_samples=max_samples)
    yield watching
    watching.check()


def watching_of(model: Any) -> Watch:
    """Begin to watch the statistics of a model, for a loop that has events and no block."""
    adapter = adapter_of(model)
    found = {entry.site.path: entry for entry in adapter.facts() if entry.mean is not None}
    if not found:
        raise ModelError("no BN layer with stored statistics: there is nothing to watch")
    return Watch(adapter, found)


@whole
@draws_nothing
@checked
def assert_frozen(
    model: Any,
    until: Any = None,
    *,
    data: Any = None,
    step: Any = None,
    params: bool = True,
    statistics: bool = True,
    process_group: Any = None,
) -> None:
    """Raise unless every BN layer before a boundary is frozen; for the tests of a project.

    Flags can lie: a torch module in ``eval()`` is thawed by the next ``train()``, and a step that
    Keras compiled on TensorFlow keeps the flags of its first call. So a torch model is asked what
    its own ``train()`` leaves, a compiled step what it writes, and with ``data`` any model is run
    in training mode (nothing is updated) and its layers are watched.

    Args:
        model: A Keras model or a torch module; it is left as it was found.
        until: First layer that need not be frozen, as in :func:`frostline.freeze`; ``None``: all
            must be.
        data: A few samples, as in :func:`frostline.diagnose`; labels are not looked at.
        step: The user's own ``step(model, batch)``, for a model that takes a batch in its own way.
        params: gamma and beta must be frozen.
        statistics: The stored statistics must not move and must be what training uses.
        process_group: As in :func:`frostline.recalibrate`: all ranks ask together, and where one
            has a layer that is not frozen, all raise.

    Raises:
        NotFrozenError: An ``AssertionError`` that names the layers and what is not frozen.
        ModelError: Not a model that Frostline can read; no BN layer before the boundary.
    """
    adapter = adapter_of(model)
    ranks = adapter.together(process_group)
    with ranks.collective("assert_frozen"):
        mine = _not_frozen(adapter, until, data, step, params=params, statistics=statistics)
        everyone = ranks.values(mine)
    checked = {path for paths, _ in everyone for path in paths}
    wrong: dict[str, str] = {}
    for rank, (_, theirs) in enumerate(everyone):
        where = f" on rank {rank}" if ranks.size > 1 else ""
        wrong = {path: what + where for path, what in theirs.items()} | wrong
    if not checked:
        raise ModelError(f"no BN layer before the boundary. Received: until={until!r}")
    if wrong:
        shown = "; ".join(f"'{path}': {what}" for path, what in list(wrong.items())[:5])
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        advice = "frostline.freeze(model, until) locks them"
        if all(_STALE in what for what in wrong.values()):
            advice = "model.compile(...) again, with the same arguments, makes the step anew"
        elif all(_BY_HAND in what for what in wrong.values()):
            advice = (
                "No flag reaches code of their own: call them in inference mode, or use BN layers"
            )
        raise NotFrozenError(
            f"{len(wrong)} of {len(checked)} BN layers are not frozen ({shown}{more}). {advice}"
        )


_BY_HAND = ", whatever its flags say"
_STALE = "frozen after the training step was compiled, which still trains it"


def _not_frozen(
    adapter: Adapter, until: Any, data: Any, step: Any, *, params: bool, statistics: bool
) -> tuple[list[str], dict[str, str]]:
    """The paths that were looked at, and path -> what is not frozen there."""
    facts = adapter.facts()
    inside = _inside(adapter, until)
    chosen = [entry for entry in facts if inside(entry.site.path)]
    unknown = {path: kind for path, kind in facts.unknown.items() if inside(path)}
    checked = {entry.site.path for entry in chosen} | unknown.keys()
    wrong: dict[str, str] = {}
    asked = {name for name, on in (("parameters", params), ("statistics", statistics)) if on}
    for entry in chosen:
        site = entry.site
        if params and not site.params_frozen:
            wrong[site.path] = "gamma and beta train"
        elif statistics and entry.undone:
            wrong[site.path] = "the next train() undoes its eval()"
        elif statistics and not (site.stats_frozen and site.policy == "inference"):
            wrong[site.path] = (
                "training uses batch statistics" if site.stats_frozen else "its statistics move"
            )
        elif not entry.live and asked & (entry.stepped or frozenset()):
            wrong[site.path] = _STALE
    # A caller that hands the statistics of a layer to a function goes past what locks the layer.
    locked = {e.site.path for e in chosen if e.site.stats_frozen and e.site.policy == "inference"}
    locked -= wrong.keys()
    if data is not None and statistics:
        for path, did in _watched(adapter, data, step).items():
            if inside(path):
                checked.add(path)
                if did.moves or (did.training or 0.0) > 0:
                    moves = "its statistics move in training"
                    # A module is frozen by its mode as well; a layer of Keras has none.
                    by_hand = (path in unknown and facts.mode is None) or path in locked
                    moves += _BY_HAND if by_hand else ""
                    wrong[path] = moves if did.moves else "training uses the batch's"
    elif statistics:
        for path, kind in unknown.items():
            wrong[path] = (
                f"a {kind} that keeps statistics in its own way; data= shows whether they move"
            )
        for path, kind in facts.handed.items():
            if any(not path or is_within(entry.site.path, path) for entry in chosen):
                wrong[path or kind] = (
                    f"a {kind} that may hand statistics of a layer to a function{_BY_HAND}; data= "
                    "shows whether they move"
                )
    return sorted(checked), wrong


def _watched(adapter: Adapter, data: Any, step: Any) -> Mapping[str, Behaviour]:
    """What the sites do in training, on a few batches."""
    require_one(None, step)
    held = samples.hold(adapter, data, step, max_samples=64)
    try:
        with adapter.preserved():  # a momentum encoder moves its own parameters
            return adapter.behaviour(held, step=step)
    except FrostlineError:
        raise
    except Exception as error:
        raise failure(error, held[0]) from error


def _floating(outputs: Any) -> list[Array]:
    found = [leaf for _, leaf in leaves(outputs)]
    return (
        found if all(getattr(leaf, "dtype", np.dtype(bool)).kind == "f" for leaf in found) else []
    )


def _distance(one: Array, zero: Array) -> float:
    """Mean squared distance in variances of the second."""
    return float(np.mean(np.square(one - zero)) / max(float(np.var(zero)), 1e-12))


def _inside(adapter: Adapter, until: Any) -> Callable[[str], bool]:
    """Whether a path lies before a boundary; without one all do, the root's own as well."""
    if until is None:
        return lambda _: True
    inside = adapter.before(adapter.boundary(until))

    def holds(path: str) -> bool:  # a site inside a wrapped module has the wrapper's path above it
        return path in inside or ("/" in path and holds(path.rpartition("/")[0]))

    return holds


def _drift(before: SiteFacts, now: SiteFacts) -> float:
    if before.mean is None or before.variance is None or now.mean is None or now.variance is None:
        return 0.0
    epsilon = before.site.epsilon
    shift = mean_shift(now.mean, before.mean, np.maximum(before.variance, 0), epsilon=epsilon)
    ratio = variance_ratio(now.variance, before.variance, epsilon=epsilon)
    return float(max(np.max(shift), np.max(np.abs(ratio - 1))))


def _params_moved(before: SiteFacts, now: SiteFacts) -> bool:
    pairs = ((before.gamma, now.gamma), (before.beta, now.beta))
    return any(_differ(a, b) for a, b in pairs)


def _differ(a: Array | None, b: Array | None) -> bool:
    return a is not None and b is not None and not np.array_equal(a, b)
