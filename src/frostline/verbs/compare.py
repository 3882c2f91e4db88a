"""Train the rest of a model under every treatment of BN, from one cache, and say which is best."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from frostline.adapters import Adapter, Outcome, adapter_of
from frostline.cache.progress import Progress
from frostline.data.batch import Batch, take
from frostline.data.batches import batches, collect, require_reiterable
from frostline.measure.bench import joined_arrays, only, task_of
from frostline.measure.judged import judge
from frostline.measure.phases import loss_name_of, require_one
from frostline.numerics import ranking
from frostline.types import Array, DataError, FrostlineError, ModelError, as_float64
from frostline.types.arguments import checked, shown
from frostline.types.comparison import Comparison, TreatmentRow
from frostline.verbs import fit as cached_fit
from frostline.verbs.cached import cached
from frostline.verbs.treatments import Setting, Treated, Treatment, chosen
from frostline.verbs.whole import draws_nothing, whole

#: Seeds where the frozen part is cached, so that a training is cheap; else one.
CHEAP_SEEDS = 3
#: Trainings per treatment: far more than any interval needs.
MOST_SEEDS = 1000
#: Confidence level of all statements of a comparison together.
_LEVEL = 0.95
#: Metrics of which less is better.
_ERRORS = ("loss", "error", "mse", "mae")


@whole
@draws_nothing
@checked
def compare(
    model: Any,
    data: Any,
    *,
    validation: Any,
    treatments: Sequence[str] | None = None,
    boundaries: Sequence[Any] = (),
    epochs: int = 3,
    batch_size: int = 32,
    seeds: int | None = None,
    seed: int = 0,
    metric: str | None = None,
    loss: Any = None,
    step: Any = None,
    optimizer: Callable[[list[Any]], Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    stop_early: bool = True,
    verbose: Any = "auto",
) -> Comparison:
    """Find out what to do with BN while this model is fine-tuned on these data.

    Every treatment starts from the model as it is now: the same weights, optimizer, seeds and order
    of the batches. What is frozen is computed once (as in :func:`frostline.fit` and
    :func:`frostline.cached`) and serves all of them; what trains, trains for ``epochs``. The model
    comes out as it went in, bit for bit, whatever happens.

    The best treatment is called a winner only where its lead over each other one has an interval
    above zero, at 95% for all of them together: over the validation samples and, with several
    seeds, over the seeds. The numbers are those of the last epoch, never of the best one.

    A treatment is given up where it is behind the leader for certain and would stay behind even
    if every epoch to come brought as much as its best one so far: an extrapolation, so the row
    says so, and ``stop_early=False`` leaves it out.

    Treatments: ``now`` (the model as it is, always run), ``all-bn-frozen``, ``statistics-frozen``,
    ``thawed``, ``debiased``, ``recalibrated``, ``ramp`` (Keras), ``momentum-by-steps``; and
    ``from L`` for each layer in ``boundaries``. One that leaves the model as another one does, or
    is not to be had for it, is named in ``skipped`` with the reason.

    Args:
        model: A compiled Keras model, or a torch module; partly frozen
            (:func:`frostline.freeze`), or nothing can be cached.
        data: Training data, as for :func:`frostline.fit` or as a loader of your own loop:
            ``(x, y)`` arrays, which are shuffled, a data set, a ``DataLoader``, a list of batches.
        validation: Other samples, which decide; read into memory.
        treatments: Names; ``None``: all of them.
        boundaries: Layers to train from instead, earlier or later: names, paths, indices or
            fractions as for :func:`frostline.freeze`.
        epochs: Passes over the training data.
        batch_size: Samples per step, for data given as arrays.
        seeds: Trainings per treatment, at most 1000; ``None``: three where the frozen part is
            cached, else one.
        seed: The first seed.
        metric: ``"accuracy"``, ``"loss"``, or what ``step`` calls a metric; ``None``: accuracy
            where there are classes, else the loss.
        loss: Loss of a torch module, as for :func:`frostline.diagnose`.
        step: The user's own ``step(model, batch)`` in the place of a loss (torch).
        optimizer: Makes the optimizer of a torch module from its list of parameters that train,
            for example ``lambda p: torch.optim.SGD(p, 1e-3)``. A Keras model has its own.
        cache: Folder of the features; see :func:`frostline.fit`, :func:`frostline.cached`.
        engine: As in these.
        stop_early: Give up treatments as said above.
        verbose: ``0`` is silent; ``"auto"`` tells on standard error what runs.

    Returns:
        The comparison: ``print`` it, ``save("comparison.html")``, ``plot()``, ``line``.

    Raises:
        ModelError: A Keras model that is not compiled, a torch module without ``optimizer``;
            everything is frozen; an unknown treatment.
        DataError: Data that can be read only once, no validation samples, an unknown metric.

    Example:
        >>> fl.freeze(model, until="block5")                                 # doctest: +SKIP
        >>> found = fl.compare(model, (x, y), validation=(xv, yv))           # doctest: +SKIP
        >>> print(found.verdict, found.line)                                 # doctest: +SKIP
    """
    require_one(loss, step)
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("seeds", seeds or 1)):
        if value < 1:
            raise DataError(f"{name} must be at least 1. Received: {name}={value}")
    if seeds is not None and seeds > MOST_SEEDS:
        raise DataError(f"seeds must be at most {MOST_SEEDS}. Received: seeds={seeds}")
    for given in (data, validation):
        require_reiterable(given, "compare")
    adapter = adapter_of(model)
    wanted = chosen(treatments, boundaries)
    sites, boundary = adapter.frozen_prefix()
    layers = adapter.facts().layers
    if boundary is None and (sites is not None or not any(layer.trains for layer in layers)):
        raise ModelError(
            "everything in the model is frozen, so there is nothing to train: thaw its last "
            "layers, for example with fl.unfreeze(model, since=...). Received: a frozen model"
        )
    kind = _KerasTrainings if adapter.train is not None else _TorchTrainings
    trainings = kind(
        adapter=adapter,
        data=data,
        validation=validation,
        epochs=epochs,
        batch_size=batch_size,
        loss=loss,
        step=step,
        optimizer=optimizer,
        cache=cache,
        engine=engine,
    )
    trainings.prepare(boundaries)
    setting = Setting(
        model=model,
        adapter=adapter,
        data=data,
        batch_size=batch_size,
        steps=trainings.steps,
        epochs=epochs,
        boundary=boundary or layers[0].path,
        step=step,
    )
    count = seeds or (CHEAP_SEEDS if trainings.caches else 1)
    contest = _Contest(
        trainings=trainings,
        setting=setting,
        seeds=[seed + number for number in range(count)],
        metric=metric,
        treatments=len(wanted),
        stop_early=stop_early,
        progress=Progress("compare", None, verbose),
    )
    for treatment in wanted:
        contest.enter(treatment)
    return contest.result()


@dataclass(frozen=True, kw_only=True)
class _Score:
    """The validation data at one moment: the metric of each unit, and the mean loss."""

    values: Array
    loss: float


@dataclass(kw_only=True)
class _Run:
    """One training: scores before it and after each epoch, seconds, and whether it was given up."""

    scores: list[_Score] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False


@dataclass(kw_only=True)
class _Entry:
    """A treatment with its trainings, one per seed."""

    treatment: Treatment
    line: str
    runs: list[_Run] = field(default_factory=list)

    def values(self, epoch: int = -1) -> Array:
        return np.stack([run.scores[epoch].values for run in self.runs])

    @property
    def stopped(self) -> int | None:
        run = self.runs[0]
        return len(run.scores) - 1 if run.stopped else None


@dataclass(kw_only=True)
class _Contest:
    """Runs treatments one after the other and keeps what became of each."""

    trainings: Any
    setting: Setting
    seeds: list[int]
    metric: str | None
    treatments: int
    stop_early: bool
    progress: Progress
    entries: list[_Entry] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    known: dict[Any, str] = field(default_factory=dict)

    def enter(self, treatment: Treatment) -> None:
        """Train under one treatment, with every seed."""
        entry: _Entry | None = None
        for seed in self.seeds:
            with self.trainings.rehearsal(seed):
                try:
                    treated = treatment.prepare(self.setting)
                    self.trainings.require_weights()
                except FrostlineError as problem:
                    if treatment.name == "now":
                        raise
                    self.skipped[treatment.name] = str(problem)
                    return
                if entry is None:
                    state = (treated.state, *_flags(self.setting.adapter))
                    if state in self.known:
                        self.skipped[treatment.name] = f"the same as '{self.known[state]}' here"
                        return
                    self.known[state] = treatment.name
                    entry = _Entry(treatment=treatment, line=treated.line)
                    self.entries.append(entry)
                    self.progress.say(f"compare: {treatment.name}: {treatment.meaning}")
                run = _Run()
                entry.runs.append(run)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    self.trainings.run(treated, run, self._follower(entry, run))
                self._note(caught)
            if run.stopped:
                break

    def _note(self, caught: Sequence[warnings.WarningMessage]) -> None:
        for warning in caught:
            if issubclass(warning.category, UserWarning) and str(warning.message) not in self.notes:
                self.notes.append(str(warning.message))

    def _follower(self, entry: _Entry, run: _Run) -> Callable[[list[Batch], list[Outcome]], bool]:
        """What is told of the validation data after each epoch; ``True``: give up."""

        def follow(held: list[Batch], outcomes: list[Outcome]) -> bool:
            run.scores.append(self._scored(held, outcomes))
            epoch, last = len(run.scores) - 1, self.setting.epochs
            run.stopped = (
                self.stop_early and len(entry.runs) == 1 and 0 < epoch < last and self._lost(run)
            )
            return run.stopped

        return follow

    def _scored(self, held: list[Batch], outcomes: list[Outcome]) -> _Score:
        losses = np.concatenate([outcome.losses for outcome in outcomes])
        loss = float(np.mean(losses))
        if self.metric not in (None, "accuracy", "loss"):
            given = [o.metrics[self.metric] for o in outcomes if self.metric in o.metrics]
            if len(given) < len(outcomes):
                known = ", ".join(("accuracy", "loss", *outcomes[0].metrics))
                raise DataError(f"metric must be one of {known}. Received: metric={self.metric!r}")
            return _Score(values=np.concatenate(list(map(np.atleast_1d, given))), loss=loss)
        hits = None if self.metric == "loss" else _hits(self.trainings, held, outcomes)
        if hits is None and self.metric == "accuracy":
            raise DataError(
                "metric='accuracy' needs class labels and one array of outputs per sample; pass "
                "metric='loss'. Received: metric='accuracy'"
            )
        self.metric = "loss" if hits is None else "accuracy"
        return _Score(values=losses if hits is None else hits, loss=loss)

    @property
    def higher(self) -> bool:
        return not any(word in str(self.metric) for word in _ERRORS)

    def _lost(self, run: _Run) -> bool:
        """Whether a training is behind for certain, and would stay so at the best pace it had."""
        complete = [e for e in self.entries if e.runs[0] is not run and e.stopped is None]
        sign = 1.0 if self.higher else -1.0
        means = [sign * float(score.values.mean()) for score in run.scores]
        if not complete:
            return False
        leader = max(complete, key=lambda e: sign * float(e.values().mean())).runs[0]
        epoch = len(means) - 1
        gap = ranking.lead(
            leader.scores[epoch].values[None],
            run.scores[epoch].values[None],
            higher=self.higher,
            comparisons=max(self.treatments - 1, 1),
            level=_LEVEL,
        )
        pace = max(0.0, *np.diff(means))
        reach = means[-1] + pace * (self.setting.epochs - epoch)
        goal = sign * float(leader.scores[-1].values.mean())
        return not np.isfinite(means[-1]) or (gap.low > 0 and reach < goal)

    def result(self) -> Comparison:
        """Rank what was trained."""
        stopped = {e.treatment.name: e.stopped for e in self.entries if e.stopped is not None}
        values = {e.treatment.name: e.values() for e in self.entries}
        full = {name: scores for name, scores in values.items() if name not in stopped}
        found = ranking.standing(full, higher=self.higher, level=_LEVEL)
        best = next(e for e in self.entries if e.treatment.name == found.order[0])
        leads = dict(found.leads)
        for name, epoch in stopped.items():
            leads[name] = ranking.lead(
                best.values(epoch), values[name], higher=self.higher,
                comparisons=len(values) - 1, level=_LEVEL,
            )  # fmt: skip
        uncertain = tuple(name for name in stopped if not leads[name].low > 0)
        found = replace(
            found,
            leads=leads,
            tied=(*found.tied, *uncertain),
            winner=best.treatment.name
            if len(values) > 1 and not found.tied and not uncertain
            else None,
        )
        order = [*found.order, *sorted(stopped, key=lambda name: leads[name].estimate)]
        by_name = {e.treatment.name: e for e in self.entries}
        rows = tuple(_row(by_name[name], leads.get(name)) for name in order)
        trainings = self.trainings
        return Comparison(
            verdict=_verdict(found, rows, str(self.metric), len(self.seeds)),
            winner=found.winner,
            tied=found.tied,
            metric=str(self.metric),
            rows=rows,
            skipped=self.skipped,
            samples=int(values[order[0]].shape[1]),
            epochs=self.setting.epochs,
            cache_seconds=trainings.cache_seconds if trainings.caches else 0.0,
            settings={
                "backend": self.setting.adapter.backend,
                "trains from": self.setting.boundary,
                "steps per epoch": str(trainings.steps),
                "seeds": ", ".join(map(str, self.seeds)),
            },
            notes=tuple(self.notes),
        )


def _flags(adapter: Adapter) -> tuple[Any, ...]:
    """What tells two states of one model apart, but for numbers that were measured."""
    return (adapter.sites(), tuple(layer.trains for layer in adapter.facts().layers))


def _hits(trainings: Any, held: list[Batch], outcomes: list[Outcome]) -> Array | None:
    """1 where the predicted class is right; ``None`` where there are no classes."""
    outputs = only(joined_arrays([outcome.outputs for outcome in outcomes]))
    labels = only(joined_arrays([batch.y for batch in held]))
    if outputs is None or labels is None or len(outputs) != len(labels):
        return None
    sampled = all(outcome.unit == "sample" for outcome in outcomes)
    losses = np.concatenate([outcome.losses for outcome in outcomes]) if sampled else None
    task, logits = task_of(outputs, labels, trainings.objective, losses)
    hits = judge(labels, outputs, task, logits).hits
    return None if hits is None else as_float64(hits)


def _row(entry: _Entry, behind: Any) -> TreatmentRow:
    values = entry.values()
    lengths = min(len(run.scores) for run in entry.runs)
    curve = [float(entry.values(epoch).mean()) for epoch in range(lengths)]
    shares = ranking.are_hits(values)
    interval = ranking.proportion_interval if shares else ranking.crossed_interval
    return TreatmentRow(
        name=entry.treatment.name,
        meaning=entry.treatment.meaning,
        line=entry.line,
        value=interval(values, level=_LEVEL),
        loss=float(np.mean([run.scores[-1].loss for run in entry.runs])),
        behind=behind,
        curve=tuple(curve),
        seconds=float(np.mean([run.seconds for run in entry.runs])),
        seeds=len(entry.runs),
        stopped=entry.stopped,
        values=values,
    )


def _verdict(
    found: ranking.Standing, rows: tuple[TreatmentRow, ...], metric: str, seeds: int
) -> str:
    best = rows[0]
    shown = f"'{best.name}' ({metric} {best.value.estimate:.4g})"
    given_up = sum(row.stopped is not None for row in rows)
    tail = f"; {given_up} given up before the end" if given_up else ""
    tail += "; one seed: another one may order them otherwise" if seeds == 1 else ""
    if found.winner is not None:
        closest = min((row for row in rows if row.behind), key=lambda r: r.behind.low)  # type: ignore[union-attr]
        assert closest.behind is not None
        return (
            f"{shown} is best: it leads each of the other {len(rows) - 1}, '{closest.name}' by "
            f"{closest.behind.estimate:.3g} (at least {closest.behind.low:.3g}){tail}"
        )
    if len(rows) == 1:
        return f"only {shown} was trained, so there is nothing to compare it with"
    if not found.tied:
        return "every training ended in a loss that is NaN or infinite: no treatment is best"
    names = ", ".join(f"'{name}'" for name in found.tied)
    return f"no winner: {shown} leads, but {names} cannot be told from it on these data{tail}"


# --- the trainings of a framework ---------------------------------------------------------------


@dataclass(kw_only=True)
class _Trainings:
    """How a model is trained and judged; one class per kind of training loop."""

    adapter: Adapter
    data: Any
    validation: Any
    epochs: int
    batch_size: int
    loss: Any
    step: Any
    optimizer: Any
    cache: Any
    engine: str
    steps: int = 0
    caches: bool = False
    cache_seconds: float = 0.0
    objective: tuple[str | None, bool | None] = (None, None)

    def count_steps(self, data: Any) -> None:
        """Steps of one epoch; the data are read once where they do not say."""
        try:
            self.steps = len(data)
        except Exception:  # code of the user's own may raise anything
            self.steps = sum(1 for _ in batches(data, batch_size=self.batch_size))

    def require_weights(self) -> None:
        """Raise where nothing is left that an optimizer could train."""


class _KerasTrainings(_Trainings):
    """By ``fl.fit``, with the optimizer and the loss that the model was compiled with."""

    earliest: Any = None
    held: Batch

    def prepare(self, boundaries: Sequence[Any]) -> None:
        """Check what is needed, and find the boundary whose features serve all."""
        adapter = self.adapter
        for name in ("loss", "step", "optimizer"):
            if getattr(self, name) is not None:
                raise ModelError(
                    f"a Keras model trains with what it was compiled with: leave {name}= out. "
                    f"Received: {name}={getattr(self, name)!r}"
                )
        if not adapter.compiled():
            raise ModelError(
                "the model is not compiled: call model.compile(optimizer, loss, ...) first."
            )
        self.objective = adapter.objective()
        self.held = collect(self.validation, batch_size=self.batch_size)
        if self.held.y is None:
            raise DataError(
                "validation needs labels: pass (x, y); where the model's own loss reads none, the "
                "inputs again, (x, x), here and as data. Received: inputs alone"
            )
        if isinstance(self.data, tuple):
            self.steps = -(-len(collect(self.data)) // self.batch_size)
        else:
            self.count_steps(self.data)
        sites, path = adapter.frozen_prefix()
        del sites
        self.caches = path is not None
        now = adapter.boundary(path).index if path is not None else 0
        before = [(adapter.boundary(boundary).index, boundary) for boundary in boundaries]
        sooner = [pair for pair in before if pair[0] < now]
        if sooner:
            self.earliest = min(sooner, key=lambda pair: pair[0])[1]

    def rehearsal(self, seed: int) -> AbstractContextManager[None]:
        """A block after which the model is as it was."""
        block: AbstractContextManager[None] = self.adapter.rehearsal(seed, self.data)
        return block

    def run(self, treated: Treated, run: _Run, follow: Callable[..., bool]) -> None:
        """Train once."""
        del treated
        adapter, role, began = self.adapter, self.adapter.train, time.perf_counter()
        assert role is not None
        rows = np.arange(len(self.held))
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        clock = [0.0]

        def with_features(features: Any) -> Any:
            taken = features(self.held.x)
            forward = adapter.blend_forward()
            first = time.perf_counter() - began
            self.cache_seconds = max(self.cache_seconds, first)
            held = [replace(take(self.held, part), x=None) for part in parts]

            def after(epoch: int) -> bool:
                run.seconds += (time.perf_counter() - clock[0]) if epoch else 0.0
                outcomes = [
                    forward.own(replace(batch, x=taken(part)), training=False, number=number)
                    for number, (batch, part) in enumerate(zip(held, parts, strict=True))
                ]
                ends = follow(held, outcomes)
                clock[0] = time.perf_counter()
                return ends

            return role.EpochEnd(after)

        x, targets, weight = self.data, None, None
        if isinstance(self.data, tuple):
            x, targets, weight = role.unpack(self.data)
        arguments = cached_fit.arguments_of(
            epochs=self.epochs, sample_weight=weight, verbose=0,
            batch_size=self.batch_size if targets is not None else None,
        )  # fmt: skip
        how = cached_fit.Caching(
            cache=self.cache, engine=self.engine, thaw_later=self.earliest, required=False
        )
        with role.trains_anew(adapter.model):
            cached_fit.trained(adapter.model, x, targets, arguments, how, with_features)


class _TorchTrainings(_Trainings):
    """By a loop of ours over the user's loader, through ``fl.cached``."""

    held: list[Batch]
    trainer: Any

    def prepare(self, boundaries: Sequence[Any]) -> None:
        """Check what is needed, and fill the cache."""
        del boundaries
        if self.optimizer is None:
            raise ModelError(
                "a torch module has no optimizer of its own: pass optimizer=, which makes one from "
                "a list of parameters, for example lambda p: torch.optim.SGD(p, 1e-3). "
                "Received: optimizer=None"
            )
        adapter = self.adapter
        assert adapter.loop is not None
        self.objective = loss_name_of(self.loss) if self.step is None else (None, None)
        self.data = adapter.loop.as_loader(self.data, self.batch_size)
        self.count_steps(self.data)
        inputs = adapter.inputs()
        self.held = list(batches(self.validation, batch_size=self.batch_size, inputs=inputs))
        self.trainer = adapter.loop.Trainer(adapter.model, self.loss, self.step)
        self.caches = self._through(self.data) is not self.data
        if not self.caches:
            return
        began = time.perf_counter()
        with self.rehearsal(0):
            self.trainer.run(self._through(self.data))
            for _ in self._judged():
                pass
        self.cache_seconds = time.perf_counter() - began

    def _through(self, data: Any) -> Any:
        try:
            return cached(self.adapter.model, data, path=self.cache, engine=self.engine)
        except ModelError:  # nothing is frozen
            return data

    def _judged(self) -> Iterator[Outcome]:
        for batch in self._through(self.held):
            yield self.trainer.judged(batch)

    def _weights(self) -> list[Any]:
        return [each for each in self.adapter.model.parameters() if each.requires_grad]

    def require_weights(self) -> None:
        """As above."""
        if not self._weights():
            raise ModelError(
                "no parameter trains under this treatment, so an optimizer has nothing to do: "
                "thaw the last layers before, for example with frostline.unfreeze(model, "
                "since=...). Received: requires_grad=False for every parameter"
            )

    def rehearsal(self, seed: int) -> AbstractContextManager[None]:
        """A block after which the module is as it was."""
        block: AbstractContextManager[None] = self.adapter.rehearsal(seed, self.data)
        return block

    def run(self, treated: Treated, run: _Run, follow: Callable[..., bool]) -> None:
        """Train once."""
        adapter = self.adapter
        moving = [site.path for site in adapter.sites() if not site.stats_frozen]
        done = 0

        def before() -> None:
            nonlocal done
            done += 1
            if treated.momentum is not None:
                adapter.set_decay(moving, treated.momentum(done))

        try:
            optimizer = self.optimizer(self._weights())
        except Exception as error:
            raise ModelError(
                f"optimizer, given a list of parameters, raised {type(error).__name__}: {error} "
                f"Received: optimizer={shown(self.optimizer)}"
            ) from error
        if not (hasattr(optimizer, "step") and hasattr(optimizer, "zero_grad")):
            raise ModelError(
                "optimizer must return an optimizer of torch for the parameters it is given. "
                f"Received: optimizer -> {type(optimizer).__name__}"
            )
        follow(self.held, list(self._judged()))
        read = self._through(self.data)
        for _ in range(self.epochs):
            began = time.perf_counter()
            self.trainer.epoch(read, optimizer, before)
            run.seconds += time.perf_counter() - began
            if follow(self.held, list(self._judged())):
                return
