"""The report of ``lint`` and ``diagnose``: everything that is known of a model's BN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from frostline.types.findings import Finding, Skipped
from frostline.types.measured import Attribution, Cause, Gap, Measurement, Remedy
from frostline.types.sites import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """What is known of a model's BN: by rules alone (``lint``), or measured (``diagnose``).

    Two reports are equal when their JSON forms are.

    Attributes:
        verdict: One sentence with the number that decides it.
        origin: Where the report comes from, name -> value: model, backend, samples, versions.
        causes: Explanations of the gap, the largest share first; empty without data.
        remedies: Repairs, each with its measured effect, the best first; empty without data.
        findings: Errors first, then warnings, then notes; by code within them.
        sites: Every BN layer of the model, in execution order.
        rules: Codes of the rules that were applied.
        skipped: Rules that were not applied, each with the reason.
        measurement: Everything that was measured; ``None`` without data.
    """

    verdict: str
    origin: Mapping[str, str] = field(default_factory=dict)
    causes: tuple[Cause, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    findings: tuple[Finding, ...] = ()
    sites: tuple[Site, ...] = ()
    rules: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    measurement: Measurement | None = field(default=None, repr=False)

    @property
    def gap(self) -> Gap | None:
        """Training mode minus inference on the same samples; ``None`` when not measured.

        The part of it that is BN is ``report.measurement.gaps["bn"]``.
        """
        return None if self.measurement is None else self.measurement.gaps.get("total")

    @property
    def attribution(self) -> Attribution | None:
        """How the BN gap splits among the sites; ``None`` when there is none."""
        return None if self.measurement is None else self.measurement.attribution

    @property
    def clean(self) -> bool:
        """Nothing but notes was found, and no cause of a gap."""
        found = any(finding.severity != "info" for finding in self.findings)
        return not found and all(cause.code == "NONE" for cause in self.causes)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain types for JSON; ``frostline/report/schema.py`` has the rules."""
        from frostline.report import schema

        return schema.as_dict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Read what :meth:`as_dict` gave.

        Raises:
            DataError: Another schema version, or not a report.
        """
        from frostline.report import schema

        return schema.from_dict(cls, plain)

    def as_json(self) -> str:
        """The report as JSON text: one line per array of numbers, the rest indented."""
        from frostline.report import files

        return files.as_json(self)

    def save(self, path: str | Path) -> Path:
        """Write the report; the ending decides the form. The file is complete or not there.

        Args:
            path: ``report.html``, ``report.json`` or ``report.txt``; overwritten.

        Returns:
            The path.

        Raises:
            OutputError: Another ending, or the file cannot be written.
        """
        from frostline.report import files

        return files.save(self, Path(path))

    def plot(self) -> Figure:
        """Draw what was measured; for notebooks and papers, on a white ground.

        Returns:
            A matplotlib figure outside of pyplot: ``report.plot().savefig("report.png")``.
        """
        from frostline.report import figures

        return figures.overview(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Report):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        from frostline.report import files

        return files.as_plain_text(self)

    def _repr_html_(self) -> str:
        """Jupyter's rendering: the page without its frame, styles limited to itself."""
        from frostline.report import html

        return html.fragment(self)
