"""The report of ``lint`` and ``diagnose``: one object, and every form it is shown in.

Renderers compute no measurement: what they show is in the :class:`Report`. Names come from the
user's model, so they are never read as markup anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from frostline.report import schema
from frostline.types import DataError, Finding, OutputError, Site, Skipped
from frostline.types.measured import Attribution, Cause, Gap, Measurement, Remedy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Raised when a field of the JSON form is renamed, removed or changes its meaning.
SCHEMA_VERSION = 2

#: Forms that a report is written in, by the ending of the file.
ENDINGS = (".html", ".json", ".txt")


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
        """The report as plain types for JSON; :mod:`frostline.report.schema` has the rules."""
        return {
            "schema_version": SCHEMA_VERSION,
            "clean": self.clean,
            **{each.name: schema.encode(getattr(self, each.name)) for each in fields(self)},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Read what :meth:`as_dict` gave.

        Raises:
            DataError: Another schema version, or not a report.
        """
        version = plain.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DataError(
                f"a report of schema version {SCHEMA_VERSION} is needed. "
                f"Received: schema_version={version!r}"
            )
        read: Self = schema.decode(cls, plain)
        return read

    def as_json(self) -> str:
        """The report as JSON text: one line per array of numbers, the rest indented."""
        return _indented(self.as_dict()) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the report; the ending decides the form. The file is complete or not there.

        Args:
            path: ``report.html``, ``report.json`` or ``report.txt``; overwritten.

        Returns:
            The path.

        Raises:
            OutputError: Another ending, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".html":
            from frostline.report import html

            content = html.page(self)
        elif path.suffix == ".json":
            content = self.as_json()
        elif path.suffix == ".txt":
            content = str(self)
        else:
            raise OutputError(f"a report is written as {_endings()}. Received: {path}")
        _write(path, content)
        return path

    def plot(self) -> Figure:
        """Draw what was measured; for notebooks and papers, on a white ground.

        Returns:
            A matplotlib figure that no window knows of: ``report.plot().savefig("report.png")``.
        """
        from frostline.report import figures

        return figures.overview(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Report):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        from frostline.report import terminal, text

        return text.render(terminal.as_text(self), width=80)

    def _repr_html_(self) -> str:
        """Jupyter's rendering: the page without its frame, styles limited to itself."""
        from frostline.report import html

        return html.fragment(self)


def _endings() -> str:
    return f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"


def _indented(value: Any, indent: str = "") -> str:
    """Return JSON, indented, but with an array of plain values on one line."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        inner = [
            f"{deeper}{json.dumps(key)}: {_indented(each, deeper)}" for key, each in value.items()
        ]
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        rows = [deeper + _indented(each, deeper) for each in value]
        return "[\n" + ",\n".join(rows) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def _write(path: Path, content: str) -> None:
    """Write beside the target and rename, so that no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(content)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
