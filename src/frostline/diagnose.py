"""The public questions about a model: the only place that knows views, measurements and rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from frostline import measure, rules
from frostline.models import facts, view
from frostline.report.report import Report
from frostline.types import Finding, ModelError, PhaseTable, Site


def sites(model: Any) -> tuple[Site, ...]:
    """List every BN layer of a model.

    Args:
        model: A Keras 3 model; functional, sequential or subclassed, with any nesting.

    Returns:
        One :class:`~frostline.types.Site` per BN layer, in execution order where the graph is
        known. Empty for a model without BN.

    Raises:
        ModelError: Not a model that Frostline can read.
    """
    return view(model).sites()


def require_sites(found: Sequence[Site]) -> None:
    """Raise when a model has no BN layer, for verbs that have nothing to do without one.

    Raises:
        ModelError: ``found`` is empty.
    """
    if not found:
        raise ModelError("no BatchNormalization layer: BN cannot be the cause")


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
    chosen = rules.select(select, ignore)
    known = facts.read(model)
    findings, skipped = rules.check(known, chosen, options=options)
    left_out = {each.code for each in skipped}
    skipped += rules.ignored(select, ignore)
    found = tuple(each.site for each in known)
    applied = tuple(each.code for each in chosen if each.code not in left_out)
    return Report(
        verdict=_lint_verdict(found, findings, applied),
        findings=findings,
        sites=found,
        rules=applied,
        skipped=tuple(sorted(skipped, key=lambda each: each.code)),
        origin={
            "model": known.name,
            "backend": known.backend,
            "keras": metadata.version("keras"),
            "frostline": metadata.version("frostline"),
        },
    )


def _lint_verdict(
    found: Sequence[Site], findings: Sequence[Finding], applied: Sequence[str]
) -> str:
    if not found:
        return "no BatchNormalization layer: BN cannot be the cause"
    layers, checked = _count(len(found), "BN layer"), _count(len(applied), "rule")
    if not findings:
        return f"{layers}, {checked}: nothing found"
    severities = [finding.severity for finding in findings]
    errors, warnings, notes = (severities.count(each) for each in ("error", "warning", "info"))
    if not errors and not warnings:
        return f"{layers}, {checked}: nothing wrong; {_count(notes, 'note')}"
    told = [
        _count(number, word)
        for number, word in ((errors, "error"), (warnings, "warning"), (notes, "note"))
        if number
    ]
    hit = len({path for finding in findings for path in finding.sites})
    first = f"{findings[0].code} {findings[0].name}"
    return f"{', '.join(told)} at {hit} of {layers}; first: {first}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def phases(
    model: Any,
    data: Any,
    *,
    metrics: measure.Metrics | None = None,
    batch_size: int = 32,
) -> PhaseTable:
    """Compare a model with itself in the dynamic phase, phase 0 and phase 1, on the same data.

    The dynamic phase is the model's own ``evaluate``. Phase 0 is an inference forward pass. Phase
    1 is a training-mode forward pass, with dropout and with the statistics of each batch, in which
    nothing is updated. A healthy model gives nearly the same in all three; a gap between 0 and 1
    on the same samples is the sign of a layer that behaves differently in training.

    The model is left bit for bit as it was found (weights, statistics, optimizer, metric states,
    seed generators), also when interrupted.

    Args:
        model: A Keras 3 model. Without ``compile`` there is no loss and no dynamic phase.
        data: ``(x, y)`` or ``(x, y, sample_weight)`` arrays, a dataset or loader, or an iterable
            of batches. Read twice; a one-shot iterator is held in memory.
        metrics: More metrics of phases 0 and 1: name -> function of labels and outputs, arrays of
            shape ``(n, ...)``, to a number. Not weighted by ``sample_weight``, nor are the
            built-in ones; the loss is.
        batch_size: Samples per batch for data given as arrays. Phase 1 depends on it, as training
            does: use the one that you train with.

    Returns:
        A table with loss, and accuracy (AUC too for two classes) or MSE and Spearman's rank
        correlation; ``patterns`` names the tell-tale signs that are present.

    Raises:
        ModelError: Not a model that Frostline can read.
        DataError: Data without labels, or unusable; see :mod:`frostline.data`.

    Example:
        >>> table = fl.phases(model, (x, y))                             # doctest: +SKIP
        >>> table["1"].metrics["accuracy"] - table["0"].metrics["accuracy"]   # doctest: +SKIP
    """
    return measure.phase_table(view(model), data, metrics=metrics, batch_size=batch_size)
