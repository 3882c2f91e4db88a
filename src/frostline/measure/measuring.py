"""All measurements of a diagnosis, one after the other: ``(adapter, data) -> Measurement``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from frostline.adapters import Adapter, Outcome
from frostline.data.arrays import leaves
from frostline.data.batch import Batch
from frostline.measure import inputs, located, shares, sweep
from frostline.measure.bench import Bench, joined_arrays, only
from frostline.measure.history import parse
from frostline.measure.judged import class_labels, predicted_classes
from frostline.measure.phases import STEP_TRAINS, tried
from frostline.measure.samples import draw, rebatched
from frostline.measure.setting import finite_samples, make_bench
from frostline.numerics import stats
from frostline.types import Array, DataError
from frostline.types.facts import ModelFacts
from frostline.types.measured import Behaviour, Gap, Interval, Measurement, Probe
from frostline.types.reasons import first_line

#: Epsilon of a new layer of Keras and of torch: what a conversion that forgets it leaves.
DEFAULTS = (1e-3, 1e-5)

#: ``(what is measured now, part that is done)``.
Progress = Callable[[str, float], None]

#: Gaps by name: the probe that is looked at, and the one that it is compared with.
GAPS = {
    "total": ("training", "inference"),
    "bn": ("training blend", "inference"),
    "dropout": ("dropout", "inference"),
    "all batch": ("batch", "inference"),
    "lag": ("population unfrozen", "inference"),
    "population": ("population", "inference"),
    "sorted": ("sorted", "batch"),
    "given": ("given", "given inference"),
}

#: Inference of so many right answers leaves nothing that another encoding of the inputs could add.
NOTHING_TO_GAIN = 0.99

#: Accuracy above which images are of the right size, or near it.
DOES_WELL = 0.9

#: Difference of a sample's losses, absolute or relative, or of outputs as a share of the largest
#: one, at which two passes are the same.
SAME = 1e-4

#: Samples on which encodings of the inputs are tried; the best is then judged on all of them.
TRIAL_SAMPLES = 32

#: Distance of a batch from all of them, in standard deviations beyond that of a mixed one, from
#: which batches are of different sources; agreement of statistics ends at the same one.
UNLIKE = 0.25

#: Batches, and samples in each, with fewer of which batches that cannot be mixed tell nothing.
FEWEST_UNMIXED = 8

#: Of batches sorted by class every fourth is tried first, where that makes at least eight.
TRIED_FIRST, FEWEST_TRIED = 4, 8

#: Validation data are a check, not the subject: so many of ``max_samples``.
VALIDATION_PART = 2


def measure(
    adapter: Adapter,
    data: Any,
    *,
    validation: Any = None,
    loss: Any = None,
    step: Any = None,
    facts: ModelFacts | None = None,
    batch_size: int | None = None,
    reference: Any = None,
    history: Any = None,
    max_samples: int = 1024,
    seed: int = 0,
    round_trip: bool = False,
    progress: Progress | None = None,
    first: Callable[[Mapping[str, Probe]], None] | None = None,
) -> tuple[Measurement, Bench]:
    """Run every probe on the same samples of the data.

    The model is left bit for bit as it was found, on any exit.

    Args:
        adapter: The model.
        data: Labelled data; see :mod:`frostline.data.batches`. Read once.
        validation: Labelled data that the model was not trained on; ``None`` to leave them out.
        loss: Whatever the framework takes as a loss; ``None`` for the compiled one, or else the
            usual one for the labels and outputs.
        step: The user's own ``step(model, batch)`` in the place of a loss.
        facts: Of the model, where they have been read.
        batch_size: Samples per batch in training; ``None`` for that of the data's own batches, and
            32 for arrays.
        reference: A model or checkpoint to compare with.
        history: The training run; see :func:`frostline.measure.history.parse`.
        max_samples: At most so many samples are drawn from the data.
        seed: Of the draw and of all intervals.
        round_trip: Save and load the model, and compare the outputs.
        progress: Called before each step.
        first: Called with the probes of the first three passes, while the rest is to come.

    Returns:
        The measurement, and the bench on which remedies can be tried.

    Raises:
        DataError: Data that cannot be used.
        ModelError: A model without a loss that could be inferred.
    """
    if max_samples < 1:
        raise DataError(f"max_samples must be at least 1. Received: max_samples={max_samples}")
    past = parse(history)  # before the long part, in case it cannot be read
    with adapter.preserved():
        if progress is not None:
            progress("samples", 0.0)
        facts = adapter.facts() if facts is None else facts
        bench, behaviour, notes = make_bench(
            adapter,
            data,
            facts=facts,
            loss=loss,
            step=step,
            batch_size=batch_size,
            max_samples=max_samples,
            seed=seed,
        )
        run = _Run(bench, behaviour, facts, seed=seed, max_samples=max_samples)
        run.steps(validation, reference, round_trip, progress, first)
    return replace(run.measurement(), history=past, notes=(*notes, *run.notes)), run.bench


class _Run:
    """One measurement in the making."""

    def __init__(
        self,
        bench: Bench,
        behaviour: dict[str, Behaviour],
        facts: ModelFacts,
        *,
        seed: int,
        max_samples: int,
    ) -> None:
        self.bench, self.behaviour = bench, behaviour
        self.seed, self.max_samples = seed, max_samples
        self.facts = facts
        self.probes: dict[str, Probe] = {}
        self.found: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.outputs: tuple[Array, ...] | None = (
            None  # of the model's own inference, in the samples' order
        )
        self.recorded: tuple[Mapping[str, Any], ...] = ()
        self.recorded_noisy: tuple[Mapping[str, Any], ...] = ()
        self.apart: dict[str, float] = {}
        self.notes: list[str] = []

    def steps(
        self,
        validation: Any,
        reference: Any,
        round_trip: bool,
        progress: Progress | None,
        first: Callable[[Mapping[str, Probe]], None] | None = None,
    ) -> None:
        """Run all measurements; what cannot be made, or would tell nothing, is noted."""
        steps: list[tuple[str, Callable[[], None]]] = [
            ("inference", self.inference),
            ("training", self.training),
            ("batch", self.batch),
            ("stored", self.stored),
            ("training blend", self.training_blend),
            ("dropout", self.dropout),
            ("statistics with dropout", self.noisy),
            ("population", self.population),
            ("sorted", self.sorted),
            ("given", self.given),
            ("sites", self.sites),
            ("attribution", self.attribution),
            ("sweep", self.sweep),
            ("neighbours", self.neighbours),
            ("input", self.input),
            ("input trials", self.input_trials),
            ("validation", lambda: self.validation(validation)),
            ("difference", lambda: self.difference(reference)),
            ("epsilon", self.epsilon),
            ("round trip", lambda: self.round_trip(round_trip)),
        ]
        for number, (name, step) in enumerate(steps):
            if progress is not None:
                progress(name, number / len(steps))
            begin = time.perf_counter()
            if number < 2:
                step()  # without these two there is no diagnosis
                continue
            try:
                step()
            except _Skip as reason:
                self.skipped[name] = str(reason)
            except Exception as error:
                # One measurement that fails must not take the others with it.
                self.skipped[name] = first_line(error)
            else:
                self.bench.cost.setdefault(name, time.perf_counter() - begin)
            if name == "batch" and first is not None:
                first(dict(self.probes))

    # --- the model's own passes -----------------------------------------------------------------

    def inference(self) -> None:
        """The model's own inference; its outputs are kept."""
        bench, own, trains = self.bench, self.bench.own(training=False), set[bool]()

        def run(batch: Batch, number: int) -> Outcome:
            outcome = own(batch, number)
            trains.add(outcome.step_trains)
            return outcome

        probe, self.outputs, _ = bench.passes(
            "inference",
            run,
            bench.batches,
            keep=max(sweep.SAMPLES, sweep.NEIGHBOUR_BATCHES * bench.batch_size),
        )
        self.probes["inference"] = bench.remember(("own", False), probe)
        self.notes += [STEP_TRAINS] if True in trains else []
        if bench.task in ("binary", "multiclass"):
            self._classes()
        elif bench.task == "regression" and bench.labels is not None:
            targets = np.asarray(bench.labels, np.float64).reshape(len(bench.labels), -1)
            self.found["chance"] = float(targets.var(axis=0).mean())

    def _classes(self) -> None:
        from scipy.optimize import linear_sum_assignment

        labels, outputs = self.bench.labels, only(self.outputs)
        assert labels is not None
        assert outputs is not None
        columns = 1 if outputs.ndim == 1 else outputs.shape[1]
        classes = max(2, columns)
        confusion = _confusion(labels, outputs, classes, self.bench.logits)
        best = linear_sum_assignment(-confusion)
        self.found["classes"] = classes
        self.found["confusion"] = confusion
        self.found["relabelled"] = float(confusion[best].sum() / len(labels))
        self.found["chance"] = float(np.bincount(labels).max() / len(labels))

    def training(self) -> None:
        """The model's own training mode.

        One batch of it, and λ for the rest, where λ gives the same for that batch and nothing acts
        at random: a pass over all samples would then be the next probe once more.
        """
        bench = self.bench
        blended = None
        if not bench.noisy:
            with suppress(Exception):  # the step that needs this probe reports the error
                blended = self._blended()
        if blended is not None:
            first = bench.batches[0]
            begin = time.perf_counter()
            own = tried(bench.forward, first, training=True).losses
            known = blended.losses[: len(own)]
            bench.spend(
                "training", time.perf_counter() - begin, (first.count or 1) / len(bench.samples)
            )
            if np.allclose(own, known, rtol=SAME, atol=SAME, equal_nan=True):
                self.probes["training"] = bench.remember(
                    ("own", True), replace(blended, name="training")
                )
                return
            # No layer is known for it, and yet more than BN acts in training only.
            self.bench = bench = replace(bench, noisy=True)
        self.probes["training"] = bench.nominal(training=True)

    def _blended(self) -> Probe | None:
        """λ as training uses it; ``None`` where that is not known, or cannot be run."""
        bench = self.bench
        if bench.blend_in_training is None:
            return None
        if not bench.paths:
            return self.probes["inference"]
        return bench.probe("training blend", blend=bench.blend_in_training)

    # --- λ --------------------------------------------------------------------------------------

    def batch(self) -> None:
        """λ = 1 everywhere, with the moments that the sites see."""
        if not self.bench.paths:
            raise _Skip("the model has no BN layer")
        bench = self.bench
        run = bench.blended(1.0, record=True)
        probe, _, self.recorded = bench.passes("batch", run, bench.batches)
        self.probes["batch"] = bench.remember(bench.condition(1.0), probe)

    def stored(self) -> None:
        """λ = 0 everywhere: inference, unless a layer uses the batch in inference as well."""
        uses_stored = all(
            behaviour.inference in (0.0, None) for behaviour in self.behaviour.values()
        )
        if uses_stored:
            self.bench.remember(self.bench.condition(0.0), self.probes["inference"])
        self.probes["stored"] = self.bench.probe("stored")

    def training_blend(self) -> None:
        """λ as training uses it."""
        self._require_sites()
        blended = self._blended()
        if blended is None:
            raise _Skip("what the sites use in training is not known")
        self.probes["training blend"] = blended

    def dropout(self) -> None:
        """λ = 0 and everything else as in training."""
        if not self.bench.noisy:
            raise _Skip("no layer but BN acts in training only")
        probe, _ = self._with_dropout("dropout", self.bench.blend(0.0))
        self.probes["dropout"] = probe

    def noisy(self) -> None:
        """Moments that the sites see in training, with everything else as in training, too."""
        self._require_sites()
        bench = self.bench
        if not bench.noisy:
            raise _Skip("no layer but BN acts in training only")
        if (weights := bench.blend_in_training) is None or not weights.any():
            raise _Skip("no site uses batch statistics in training")
        _, self.recorded_noisy = self._with_dropout("statistics with dropout", weights)

    def _with_dropout(self, name: str, blend: Array) -> tuple[Probe, tuple[Any, ...]]:
        """A probe with dropout, and the moments: both uses ask for them, so that one trace serves.

        Moments of what a probe sees cost nothing beside a second compilation.
        """
        bench = self.bench
        run = bench.blended(blend, dropout=True, record=bool(bench.paths))
        probe, _, recorded = bench.passes(name, run, bench.batches)
        return bench.remember(bench.condition(blend, None, True), probe), recorded

    def population(self) -> None:
        """λ = 0 with exact statistics at all sites, at the unfrozen and at the frozen ones."""
        self._require_sites()
        bench = self.bench
        self.probes["population"] = bench.probe("population", statistics=bench.population("all"))
        for group in ("unfrozen", "frozen"):
            name = f"population {group}"
            statistics = bench.population(group)
            if statistics:
                self.probes[name] = bench.probe(name, statistics=statistics)
            else:
                self.skipped[name] = f"no site is {group}"

    def sorted(self) -> None:
        """λ = 1 in class-sorted batches, in the samples' own order afterwards."""
        self._require_sites()
        bench = self.bench
        if bench.labels is None:
            raise _Skip("the task has no one label per sample to sort by")
        if bench.unit == "batch":
            raise _Skip("the loss is one number per batch: other batches have other losses")
        keys = np.asarray(bench.labels).reshape(len(bench.labels), -1)[:, 0]
        self._require_other_batches()
        if len(bench.batches) < 2 or len(np.unique(keys)) < 2:
            raise _Skip("one batch, or one class: sorting changes nothing")
        order = np.argsort(keys, kind="stable")
        size, losses, run = bench.batch_size, [], bench.blended(1.0)
        parts = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        first = len(parts[::TRIED_FIRST])
        order = np.concatenate(parts[::TRIED_FIRST] + [
            part for number, part in enumerate(parts) if number % TRIED_FIRST
        ])  # fmt: skip

        def noted(batch: Batch, number: int) -> Outcome:
            losses.append((outcome := run(batch, number)).losses)
            return outcome

        def promising() -> Iterator[Batch]:
            for number, batch in enumerate(rebatched(bench.samples, size, order)):
                if number == first >= FEWEST_TRIED and self._worse(np.concatenate(losses), order):
                    return
                yield batch

        probe, _, _ = bench.passes("sorted", noted, promising())
        if len(known := probe.losses) < len(order):
            raise _Skip(
                f"batches of one class do worse for certain on the first {len(known)} samples: "
                f"loss {probe.loss:.3g}, against "
                f"{self.probes['batch'].losses[order[: len(known)]].mean():.3g} in mixed batches"
            )
        self.probes["sorted"] = in_order(probe, np.argsort(order))

    def _worse(self, losses: Array, order: Array) -> bool:
        """Losses of the first samples of an order are higher for certain than in mixed batches.

        Higher than those of inference, too: batches of one class explain something only where
        they do better.
        """
        names = [name for name in ("batch", "inference") if name in self.probes]
        known = order[: len(losses)]
        return len(names) == 2 and all(
            self._better(self.probes[name].losses[known], losses) for name in names
        )

    def given(self) -> None:
        """Training mode on the batches as they come: mixed, they are not what training saw.

        One pass; where the sites see these batches scatter as mixed ones do, it is all.
        """
        self._require_sites()
        bench, parts, blend = self.bench, self.bench.samples.as_read, self.bench.blend_in_training
        if blend is None or not blend.any():
            return
        if bench.samples.fixed is not None:
            self._unmixed()
            return
        if len(parts) < 2:  # arrays
            return
        given, _, seen = bench.passes("given", bench.blended(blend, record=True), parts)
        for path in bench.paths:
            mixed, own = (
                [moments[path] for moments in recorded if path in moments]
                for recorded in (self.recorded, seen)
            )
            if mixed and own:
                self.apart[path] = located.beyond_mixed(own, mixed)
        farthest = max(self.apart, key=lambda path: self.apart[path], default=None)
        if farthest is None or not self.apart[farthest] > UNLIKE:
            return
        self.probes["given"] = given
        self.probes["given inference"] = bench.own_probe("given inference", parts)
        mixed_loss = self.probes["training blend"].loss
        self.notes.append(
            f"the batches as they come are not alike: one is {self.apart[farthest]:.3g} standard "
            f"deviations from all of them at '{farthest}', beyond the scatter of mixed batches. In "
            f"training mode they give a loss of {given.loss:.4g} as they come, and of "
            f"{mixed_loss:.4g} mixed; the other numbers here are of mixed batches"
        )

    def _unmixed(self) -> None:
        """The same of batches that cannot be mixed, by the most that mixed ones would scatter.

        The mean of n samples drawn at random deviates by at most 1/√n of the standard deviation.
        """
        bench = self.bench
        if len(bench.batches) < FEWEST_UNMIXED or bench.batch_size < FEWEST_UNMIXED:
            return
        for path in bench.paths:
            own = [moments[path] for moments in self.recorded if path in moments]
            if len(own) == len(bench.batches):
                noise = located.noise(own)
                # Twice the square: it is an estimate from few batches.
                self.apart[path] = float(np.sqrt(max(0.0, noise**2 - 2 / bench.batch_size)))
        if any(apart > UNLIKE for apart in self.apart.values()):
            for name, same in (("given", "training blend"), ("given inference", "inference")):
                self.probes[name] = replace(self.probes[same], name=name)

    # --- sites ----------------------------------------------------------------------------------

    def sites(self) -> None:
        """Stored statistics beside those of the data."""
        self._require_sites()
        population = self.bench.population("all")
        self.found["sites"] = located.site_measurements(
            self.bench, self.recorded, population, noisy=self.recorded_noisy, apart=self.apart
        )

    def attribution(self) -> None:
        """Shares of the gap between the training blend and λ = 0."""
        self._require_sites()
        blend = self.bench.blend_in_training
        training, stored = self.probes.get("training blend"), self.probes.get("stored")
        if blend is None or training is None or stored is None:
            raise _Skip("the BN gap was not measured")
        if not blend.any():
            raise _Skip("no site uses batch statistics in training")
        gap = self.interval(training.losses, stored.losses)
        if not gap.excludes_zero:
            interval = f"{100 * gap.level:.0f}% interval {gap.low:+.3g} to {gap.high:+.3g}"
            if np.isinf(gap.low):
                interval = "and one batch gives no interval"
            raise _Skip(f"the BN gap is not told from 0: {gap.estimate:+.3g}, {interval}")
        sites = self.found.get("sites", {})
        self.found["attribution"] = shares.attribute(
            self.bench,
            blend,
            training=training,
            stored=stored,
            quotient=max((located.quotient(site) for site in sites.values()), default=1.0),
        )

    def sweep(self) -> None:
        """Batch sizes."""
        if self.facts.batch is not None:
            raise _Skip(f"the model takes batches of {self.facts.batch} samples only")
        self._require_other_batches()
        stored = all(behaviour.inference == 0.0 for behaviour in self.behaviour.values())
        self.found["sweep"] = sweep.sweep(self.bench, self.outputs, stored=stored)

    def neighbours(self) -> None:
        """The same samples in other company."""
        self._require_other_batches()
        self.found["neighbours"] = sweep.neighbours(self.bench, self.outputs, seed=self.seed)
        points = self.found.get("sweep", ())
        changes = [self.found["neighbours"], *(point.inference_change for point in points)]
        if any(change > SAME for change in changes):
            self.found["repeated"] = sweep.repeated(self.bench, self.outputs)
            bench = self.bench
            moved = bench.adapter.moved_at_inference(bench.batches[0], step=bench.step)
            self.found["moved_at_inference"] = dict(moved)

    # --- inputs ---------------------------------------------------------------------------------

    def input(self) -> None:
        """Moments of the inputs."""
        self.found["input"] = inputs.moments(self.bench.batches, axis=self.bench.channels)
        if self.found["input"] is None:
            raise _Skip("several inputs, no numbers, or channels whose number changes")

    def input_trials(self) -> None:
        """Inference with the inputs in other encodings."""
        seen, accuracy = self.found.get("input"), self.probes["inference"].accuracy
        if self.bench.step:
            raise _Skip("the inputs reach the model through step= alone")
        leaf = leaves(self.bench.batches[0].x)[0][1]
        if seen is None or leaf.ndim != 4:
            raise _Skip("the inputs are not images")
        if accuracy is not None and accuracy >= NOTHING_TO_GAIN:
            raise _Skip(f"inference is right already: accuracy {accuracy:.3f}")
        bench = self.bench
        part = bench.samples.first(TRIAL_SAMPLES)
        units = len(part) if bench.unit == "sample" else len(part.batches)
        base = self.probes["inference"].losses[:units]
        trials, tried = {"x": float(base.mean())}, {}
        changes = inputs.transforms(seen, axis=bench.channels)
        if self.facts.any_size:
            changes |= inputs.resolutions(leaf.shape, axis=bench.channels)
        if self.facts.any_size and self._does_badly():
            changes |= inputs.other_sizes(leaf.shape, axis=bench.channels)
        for name, change in changes.items():
            try:
                probe = bench.own_probe("input trials", part.batches, transform=change)
            except Exception:
                if not name.startswith(inputs.SIZED):
                    raise
                continue  # the model takes no images of this size
            trials[name], tried[name] = probe.loss, probe.losses
        self.found["input_trials"] = trials
        finite = [name for name in trials if np.isfinite(trials[name])]
        if not finite:
            raise _Skip("no encoding of the inputs gives a finite loss")
        best = min(finite, key=trials.__getitem__)
        if best == "x" or not self._better(tried[best], base):
            return
        probe = bench.own_probe(f"input {best}", bench.batches, transform=changes[best])
        if self._better(probe.losses, self.probes["inference"].losses):
            self.probes[probe.name] = probe
            off = {
                name: located.first_misfit(bench, part.batches, change)
                for name, change in (("x", None), (best, changes[best]))
            }
            self.found["input_misfits"] = {k: v for k, v in off.items() if v is not None}

    def _does_badly(self) -> bool:
        """No statistics make most answers right, so that the size of images may be another one."""
        tried = ("inference", "training blend", "population")
        found = [self.probes[name].accuracy for name in tried if name in self.probes]
        return max((value for value in found if value is not None), default=1.0) < DOES_WELL

    def _better(self, losses: Array, than: Array) -> bool:
        """Lower for sure."""
        gap = self.interval(losses, than)
        return gap.excludes_zero and gap.estimate < 0

    # --- what else was given --------------------------------------------------------------------

    def validation(self, data: Any) -> None:
        """Probes of data that the model was not trained on."""
        if data is None:
            raise _Skip("no validation data given: validation=")
        bench = self.bench
        samples = draw(
            data,
            max_samples=max(1, self.max_samples // VALIDATION_PART),
            batch_size=bench.batch_size,
            seed=self.seed,
            fixed=self.facts.batch is not None,
            labels=leaves(bench.batches[0].y) != [],
            whole=bench.step is not None,
            inputs=bench.adapter.inputs(),
            finite=partial(finite_samples, bench.adapter, bench.step),
            cut=bench.samples.cut,
        )
        if isinstance(bench.samples.batches[0].y, tuple) and not samples.batches[0].y:
            raise _Skip("outputs are compared, and validation data without labels add nothing")
        other = replace(bench, samples=samples, labels=None, cost={}, _probes={}, _populations={})
        name = "validation inference"
        seen, outputs, _ = other.passes(name, other.own(training=False), samples.batches)
        self.probes[name] = seen
        self.found["validation_input"] = inputs.moments(samples.batches, axis=bench.channels)
        truth, answers = only(joined_arrays([batch.y for batch in samples.batches])), only(outputs)
        if "classes" in self.found and truth is not None and answers is not None:
            self.found["validation_confusion"] = _confusion(
                class_labels(truth, answers), answers, self.found["classes"], bench.logits
            )
        if bench.paths:
            name = "validation batch"
            self.probes[name] = other.probe(name, blend=1.0)
            name = "validation population"
            self.probes[name] = other.probe(name, statistics=bench.population("all"))
            if self._better(self.probes["validation batch"].losses, seen.losses):
                name = "validation recalibrated"
                self.probes[name] = other.probe(name, statistics=other.population("all"))
        self._resized(other)
        for name, amount in other.cost.items():
            bench.cost[name] = amount * (
                len(samples) / len(bench.samples) if name.endswith("(passes)") else 1.0
            )

    def _resized(self, other: Bench) -> None:
        """Validation images in the size of the training images, where theirs is another one."""
        sizes = [self.found.get(name) for name in ("input", "validation_input")]
        wanted, given = [() if moments is None else moments.size for moments in sizes]
        if other.step or wanted == given or len(wanted) != 2 or len(given) != 2:
            return
        name, change = "validation resized", inputs.resized(wanted, axis=other.channels)
        self.probes[name] = other.own_probe(name, other.batches, transform=change)

    def epsilon(self) -> None:
        """Inference with the epsilon of the reference, or of most sites, as another variance.

        Without either the defaults of the frameworks, where they matter; the best one is kept.
        """
        known, odd = self.found.get("difference"), self.facts.odd_epsilons
        if known is not None and known.epsilons:
            odd = {path: theirs for path, (_, theirs) in known.epsilons.items()}
        if odd or known is not None:
            probe = self._with_epsilons(odd)
            if probe is not None:
                self.probes["epsilon"] = probe
            return
        tried = {
            default: probe
            for default in DEFAULTS
            if self._epsilon_matters(default)
            if (probe := self._with_epsilons({f.site.path: default for f in self.facts}))
        }
        if tried:
            best = min(tried, key=lambda default: tried[default].loss)
            self.probes["epsilon"], self.found["epsilon"] = tried[best], best

    def _epsilon_matters(self, epsilon: float) -> bool:
        """Whether it changes the scale of half of a site's channels by more than a tenth."""
        return any(
            float(np.median(np.abs(np.log((own + epsilon) / (own + facts.site.epsilon))))) > 0.2
            for facts in self.facts
            if facts.variance is not None and facts.variance.size
            if np.isfinite(own := np.maximum(facts.variance, 0.0)).all()
        )

    def _with_epsilons(self, odd: Mapping[str, float]) -> Probe | None:
        statistics = {
            facts.site.path: (
                facts.mean,
                facts.variance + (odd[facts.site.path] - facts.site.epsilon),
            )
            for facts in self.facts
            if facts.site.path in odd and facts.mean is not None and facts.variance is not None
        }
        return self.bench.probe("epsilon", statistics=statistics) if statistics else None

    def difference(self, reference: Any) -> None:
        """The reference, weight by weight."""
        if reference is None:
            raise _Skip("no reference given: reference=")
        self.found["difference"] = self.bench.adapter.difference(reference, self.bench.batches[0].x)

    def round_trip(self, asked: bool) -> None:
        """Save and load."""
        if not asked:
            raise _Skip("not asked for: round_trip=True")
        self.found["round_trip"] = float(self.bench.adapter.round_trip(self.bench.batches[0].x))

    # --- the outcome ----------------------------------------------------------------------------

    def interval(self, a: Array, b: Array) -> Interval:
        """Paired bootstrap interval over the samples that are finite in both."""
        sound = np.isfinite(a) & np.isfinite(b)
        if not sound.any():
            return Interval(float("nan"), float("nan"), float("nan"), 0.95)
        return stats.paired_bootstrap(a[sound], b[sound], seed=self.seed)

    def gaps(self) -> dict[str, Gap]:
        """Differences of probes with intervals."""
        found = {}
        for name, (of, minus) in GAPS.items():
            if of in self.probes and minus in self.probes:
                found[name] = self.gap(name, of, minus)
        for of in self.probes:
            if of.startswith("input "):
                found[of] = self.gap(of, of, "inference")
        return found

    def gap(self, name: str, of: str, minus: str) -> Gap:
        """One difference of two probes."""
        a, b = self.probes[of], self.probes[minus]
        accuracy = None
        if a.hits is not None and b.hits is not None:
            accuracy = self.interval(a.hits, b.hits)
        return Gap(
            name=name, of=of, minus=minus, loss=self.interval(a.losses, b.losses), accuracy=accuracy
        )

    def measurement(self) -> Measurement:
        """Everything that was found."""
        bench = self.bench
        found = Measurement(
            samples=len(bench.samples),
            batch_size=bench.batch_size,
            task=bench.task,
            steps=self.facts.steps,
            probes=dict(self.probes),
            gaps=self.gaps(),
            behaviour=self.behaviour,
            noise_layers=dict(bench.adapter.noise_layers()),
            cost=dict(bench.cost),
            skipped=dict(self.skipped),
            **self.found,
        )
        if not found.unused:
            return found
        unused = [facts.site.path for facts in self.facts if facts.site.path in found.unused]
        shown = ", ".join(map(repr, unused[:3])) + (", ..." if len(unused) > 3 else "")
        what = f"{len(unused)} of {len(self.facts.sites)} are not used on these data ({shown})"
        return replace(found, skipped={**found.skipped, "sites without a pass": what})

    def _require_other_batches(self) -> None:
        if self.bench.samples.fixed is not None:
            raise _Skip(self.bench.samples.fixed)
        if any(batch.count is None for batch in self.bench.batches):
            raise _Skip("the number of samples in a batch is not known")

    def _require_sites(self) -> None:
        if not self.bench.paths:
            raise _Skip("the model has no BN layer")


class _Skip(Exception):  # noqa: N818 - not an error: a reason
    """A measurement that would tell nothing, or has nothing to work on."""


def _confusion(labels: Array, outputs: Array, classes: int, logits: bool) -> Array:
    """Counts of the samples with finite outputs, rows true class, columns predicted."""
    predicted = predicted_classes(outputs, logits)
    sound = np.isfinite(outputs.reshape(len(outputs), -1)).all(axis=1)
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels[sound], predicted[sound]), 1)
    return counts


def in_order(probe: Probe, order: Array) -> Probe:
    """The same probe with its samples in another order."""
    hits = None if probe.hits is None else probe.hits[order]
    return replace(probe, losses=probe.losses[order], hits=hits)


__all__ = ["GAPS", "Progress", "in_order", "measure"]
