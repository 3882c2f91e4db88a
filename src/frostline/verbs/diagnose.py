"""The public questions about a model: the only place that knows views, measurements and rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any, Literal

from frostline import measure, rules
from frostline.adapters import Adapter, adapter_of
from frostline.causes import causes as explain, verdict as verdicts
from frostline.measure.ranks import as_rank_0, pooled
from frostline.remedies import remedies as repairs_for
from frostline.report.sites import Sites
from frostline.types import ModelError, PhaseTable, Site
from frostline.types.arguments import checked
from frostline.types.facts import ModelFacts
from frostline.types.measured import Measurement
from frostline.types.report import Report
from frostline.verbs.whole import brief, whole


@brief
@whole
def sites(model: Any) -> Sites:
    """List every BN layer of a model.

    Args:
        model: A Keras 3 model; functional, sequential or subclassed, with any nesting; or a torch
            module.

    Returns:
        A tuple with one :class:`~frostline.types.Site` per BN layer, in execution order where the
        graph is known; empty for a model without BN. ``print`` shows it as a table with a line
        where the frozen prefix ends.

    Raises:
        ModelError: Not a model that Frostline can read.
    """
    adapter = adapter_of(model)
    found = adapter.sites()
    before, boundary = adapter.frozen_prefix(found)
    return Sites(found, before=before, boundary=boundary)


def require_sites(found: Sequence[Site]) -> None:
    """Raise when a model has no BN layer, for verbs that have nothing to do without one.

    Raises:
        ModelError: ``found`` is empty.
    """
    if not found:
        raise ModelError("no BatchNormalization layer: BN cannot be the cause")


@brief
@whole
@checked
def lint(
    model: Any,
    *,
    select: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Report:
    """Check the configuration and the stored numbers of a model's BN layers; needs no data.

    Args:
        model: A Keras 3 model. Not built: only flags and graph are checked. Compiled and trained:
            the number of steps too. Nothing of it changes.
        select: Rules to apply: codes, prefixes of codes (``"FL2"``), or names. Default: all but
            the FL9xx.
        ignore: Rules to leave out, in the same words; the longer prefix decides. A mapping gives
            the reason of each, which the report repeats.
        options: Code -> thresholds, as ``{"FL203": {"max_share": 0.5}}``.

    Returns:
        A report: ``verdict``, ``findings``, ``skipped``; prints as text.

    Raises:
        ModelError: Not a model that Frostline can read.
        FrostlineError: No such rule, or no such option.

    Example:
        >>> report = fl.lint(model, ignore={"FL115": "reached by path"})   # doctest: +SKIP
        >>> [finding.code for finding in report.findings]                  # doctest: +SKIP
    """
    adapter = adapter_of(model)
    known = adapter.facts()
    checked = _checked(known, None, select, ignore, options)
    return Report(
        verdict=verdicts.with_unknown(
            verdicts.of_rules(checked["sites"], checked["findings"], checked["rules"]),
            known.unknown,
        ),
        origin=_origin(adapter, known),
        **checked,
    )


@whole
@checked
def diagnose(
    model: Any,
    data: Any,
    *,
    validation: Any = None,
    loss: Any = None,
    step: Any = None,
    batch_size: int | None = None,
    reference: Any = None,
    history: Any = None,
    max_samples: int = 1024,
    seed: int = 0,
    verbose: Literal["auto", 0, 1, 2] = "auto",
    round_trip: bool = False,
    select: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
    process_group: Any = None,
) -> Report:
    """Find out why a model behaves differently in training and at inference, and what helps.

    The same samples are looked at in many ways: as in training, as at inference, with the
    statistics of batches, with exact ones. What differs is split among the BN layers, explained,
    and each repair that could help is tried, without changing the model: it is left bit for bit as
    it was found, also when interrupted. On an NVIDIA card it is computed in full float32 precision:
    products rounded to TF32 there would differ by 1e-3 from batch size to batch size.

    In a process group of ``torch.distributed`` the call is collective, as
    :func:`frostline.recalibrate` is: samples are drawn from the data of all ranks, which look at
    them with the statistics of rank 0, and all return its report. Where one rank raises, or is
    gone, all raise.

    Args:
        model: A Keras 3 model, or a torch module.
        data: Best those that the model was trained on, prepared in the same way: ``(x, y)`` or
            ``(x, y, sample_weight)`` arrays, a dataset or loader, or an iterable of batches. A
            batch is what the loader yields: a mapping, a list of images, an object with tensors;
            it is cut only where it is arrays of one length. Read once.
        validation: Labelled data that the model was not trained on.
        loss: What the framework takes as a loss; default: the compiled one, one that the model
            computes itself, else the usual one for these labels and outputs. Without labels and
            loss the outputs of the two phases are compared.
        step: Instead of a loss, the user's own ``step(model, batch)``: it calls the model on a
            batch as the loader yields it, on the model's device, and returns one loss, a loss per
            sample, a mapping of named losses (added up), or ``(loss, metrics)``. What is compared
            is samples where losses come per sample, else batches; the report says which. A
            torch model is held in the mode that is asked for: ``train()`` in a step, as a training
            step calls it, is not obeyed, ``eval()`` is. If your evaluation calls such a step, it
            runs on the statistics of each batch: phase 1 is what it gives.
        batch_size: Samples per batch in training; default: that of the data's own batches, and 32
            for arrays.
        reference: A model or checkpoint to compare with, for example the one that training began
            from.
        history: The training run: a Keras ``History``, a dict of lists, a list of dicts, or the
            path of a CSV log.
        max_samples: At most so many samples are drawn, at random.
        seed: Of the draw and of all intervals.
        verbose: ``"auto"``: a progress bar on a terminal. 0: nothing, 1: a bar, 2: a line per step.
        round_trip: Also save and load the model, and compare its outputs.
        select: Rules to apply, as for :func:`lint`.
        ignore: Rules to leave out.
        process_group: As in :func:`frostline.recalibrate`.

    Returns:
        A report: ``verdict``, ``gap``, ``causes``, ``remedies``, ``attribution``, ``findings``.

    Raises:
        ModelError: Not a model that Frostline can read, or none with a loss.
        DataError: Data that are unusable, or without the labels that the loss needs; see
            :mod:`frostline.data.batches`.
        FrostlineError: No such rule.

    Example:
        >>> report = fl.diagnose(model, (x, y))                          # doctest: +SKIP
        >>> print(report)                                                # doctest: +SKIP
    """
    rules.select(select, ignore)  # report a misspelt code before the long part
    adapter = adapter_of(model)
    ranks = adapter.together(process_group)
    with (
        ranks.collective("diagnose", max_samples=max_samples, seed=seed, batch_size=batch_size),
        adapter.full_precision(),
        as_rank_0(adapter, ranks) as apart,
        _progress(verbose if ranks.rank == 0 else 0) as (shown, say),
    ):

        def progress(name: str, done: float) -> None:
            ranks.exchange(b"")  # one that is gone is noticed here, and not at the end
            shown(name, done)

        (data, size), (validation, _) = (
            pooled(ranks, source, max_samples=max_samples, batch_size=batch_size, seed=seed,
                   whole=step is not None, inputs=adapter.inputs())
            for source in (data, validation)
        )  # fmt: skip
        known = adapter.facts()
        measured, bench = measure.measure(
            adapter,
            data,
            validation=validation,
            loss=loss,
            step=step,
            facts=known,
            batch_size=size,
            reference=reference,
            history=history,
            max_samples=max_samples,
            seed=seed,
            round_trip=round_trip,
            progress=progress,
            first=lambda probes: say(verdicts.first(probes, seed=seed)),
        )
        if apart:
            measured = replace(measured, notes=(*measured.notes, apart))
        progress("remedies", 1.0)
        checked = _checked(known, measured, select, ignore, None)
        causes = explain(known, measured, checked["findings"])
        with adapter.preserved():
            remedies = repairs_for(bench, known, measured, causes)
        report = Report(
            verdict=verdicts.with_unknown(
                verdicts.of_measurement(measured, causes, remedies, len(checked["sites"])),
                known.unknown,
                _foreign(known, measured),
            ),
            origin=_origin(adapter, known, samples=measured.samples, seed=seed),
            causes=causes,
            remedies=remedies,
            measurement=measured,
            **checked,
        )
        if ranks.size > 1:
            report = Report.from_dict(ranks.values(report.as_dict())[0])
    return report


def _foreign(known: ModelFacts, measured: Measurement) -> dict[str, str]:
    """What was seen to normalise with statistics that no site keeps, as ``facts.unknown``."""
    sites = {entry.site.path for entry in known.sites}
    return {path: "a call of batch_norm" for path in measured.behaviour if path not in sites}


def _checked(
    known: ModelFacts,
    measured: Measurement | None,
    select: str | Iterable[str] | None,
    ignore: str | Iterable[str] | None,
    options: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """What rules say, as fields of a report."""
    chosen = rules.select(select, ignore)
    findings, skipped = rules.check(known, chosen, measurement=measured, options=options)
    left_out = {rule.code for rule in skipped}
    skipped += rules.ignored(select, ignore)
    return {
        "findings": findings,
        "sites": tuple(fact.site for fact in known),
        "rules": tuple(rule.code for rule in chosen if rule.code not in left_out),
        "skipped": tuple(sorted(skipped, key=lambda rule: rule.code)),
    }


def _origin(adapter: Adapter, known: ModelFacts, **more: Any) -> dict[str, str]:
    return {
        "model": known.name,
        "backend": known.backend,
        **{name: str(value) for name, value in more.items()},
        adapter.framework: metadata.version(adapter.framework),
        "frostline": metadata.version("frostline"),
    }


@contextmanager
def _progress(verbose: Any) -> Iterator[tuple[measure.Progress, Callable[[str], None]]]:
    """What is called before each step of a diagnosis, and what prints a line meanwhile."""
    from frostline.report import text as shown

    console = shown.console(stderr=True)
    if verbose == 0 or (verbose == "auto" and not console.is_terminal):
        yield lambda name, done: None, lambda text: None  # noqa: ARG005
        return

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if verbose == 2:
        yield lambda name, done: say(f"{done:4.0%} {name}"), say
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("samples", total=1.0)
        yield lambda name, done: bar.update(task, description=name, completed=done), say


@whole
@checked
def phases(
    model: Any,
    data: Any,
    *,
    metrics: measure.Metrics | None = None,
    loss: Any = None,
    step: Any = None,
    batch_size: int = 32,
    process_group: Any = None,
) -> PhaseTable:
    """Compare a model with itself in the dynamic phase, phase 0 and phase 1, on the same data.

    The dynamic phase is the model's own ``evaluate``. Phase 0 is an inference forward pass. Phase
    1 is a training-mode forward pass, with dropout and with the statistics of each batch, in which
    nothing is updated. A healthy model gives nearly the same in all three; a gap between 0 and 1
    on the same samples is the sign of a layer that behaves differently in training.

    The model is left bit for bit as it was found (weights, statistics, optimizer, metric states,
    seed generators), also when interrupted.

    Args:
        model: A Keras 3 model, or a torch module. Without ``compile`` there is no dynamic phase,
            and no loss but ``loss``, ``step`` or one that the model computes itself.
        data: As in :func:`diagnose`. Read twice; a one-shot iterator is held in memory.
        metrics: More metrics of phases 0 and 1: name -> function of labels and outputs, arrays of
            shape ``(n, ...)``, to a number. Not weighted by ``sample_weight``, nor are the
            built-in ones; the loss is.
        loss: Loss of phases 0 and 1, as in :func:`diagnose`; default: the compiled one.
        step: Instead of a loss, the user's own ``step(model, batch)``, as in :func:`diagnose`.
        batch_size: Samples per batch for data given as arrays. Phase 1 depends on it, as training
            does: use the one that you train with.
        process_group: As in :func:`frostline.recalibrate`. In a process group each rank passes its
            own share of the data, which may be empty, and all return the table of all samples;
            where the ranks store different statistics, those of rank 0 are used.

    Returns:
        A table with loss, and accuracy (AUC too for two classes) or MSE and Spearman's rank
        correlation; each named loss and metric of a step; without labels and loss the distance of
        the phases' outputs. ``patterns`` names the tell-tale signs that are present.

    Raises:
        ModelError: Not a model that Frostline can read.
        DataError: Data that are unusable, or without the labels that the loss needs; see
            :mod:`frostline.data.batches`.

    Example:
        >>> table = fl.phases(model, (x, y))                             # doctest: +SKIP
        >>> table["1"].metrics["accuracy"] - table["0"].metrics["accuracy"]   # doctest: +SKIP
    """
    adapter = adapter_of(model)
    ranks = adapter.together(process_group)
    with ranks.collective("phases"):
        return measure.phase_table(
            adapter,
            data,
            metrics=metrics,
            loss=loss,
            step=step,
            batch_size=batch_size,
            ranks=ranks,
        )
