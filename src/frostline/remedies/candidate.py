"""A repair to be tried, and what it is tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from frostline.causes.registry import treated_by
from frostline.measure import Bench
from frostline.rules.predicates import overrides_phase
from frostline.types.codes import Fix, probe_name
from frostline.types.facts import ModelFacts, SiteFacts, Vocabulary
from frostline.types.measured import Cause, Measurement, Probe


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A repair with what the model is then.

    Attributes:
        name: In a few words.
        fix: As in :class:`~frostline.types.measured.Remedy`.
        treats: Codes of the causes that it is for.
        text: What it does, one sentence.
        after: Inference with the repair; ``None`` where that cannot be known before training.
        python: The line to paste.
        shell: The command to paste.
        note: What to know before using it.
        accuracy: Accuracy with the repair, where only that is known.
        harms: It does harm beyond these data, as the note says, and is not recommended.
    """

    name: str
    fix: Fix
    treats: tuple[str, ...]
    text: str
    after: Probe | None = None
    python: str | None = None
    shell: str | None = None
    note: str | None = None
    accuracy: float | None = None
    harms: bool = False


@dataclass(frozen=True, eq=False)
class Workplace:
    """What repairs are tried on: the bench, what is known, and the causes, first one first."""

    bench: Bench
    facts: ModelFacts
    measurement: Measurement
    causes: Sequence[Cause]
    notes: dict[str, str] = field(default_factory=dict)

    @cached_property
    def codes(self) -> tuple[str, ...]:
        """Codes of the causes, first one first."""
        return tuple(cause.code for cause in self.causes)

    @cached_property
    def sites(self) -> dict[str, SiteFacts]:
        """Path -> facts, in execution order."""
        return {site.site.path: site for site in self.facts}

    @property
    def words(self) -> Vocabulary:
        """How to speak of the model."""
        return self.facts.words

    def treated(self, fix: Fix) -> tuple[str, ...]:
        """Which of the causes that this repair treats were found, the most important first.

        None that is a matter of the validation data: repairs are tried on the others.
        """
        codes = treated_by(fix)
        causes = [cause for cause in self.causes if "validation_loss" not in cause.evidence]
        return tuple(cause.code for cause in causes if cause.code in codes)

    @cached_property
    def overriding(self) -> dict[str, float]:
        """Path -> λ at inference of the sites whose caller overrides the phase it is given."""
        return {
            path: float(seen.inference or 0.0)
            for path, seen in self.measurement.behaviour.items()
            if path in self.sites and overrides_phase(self.facts, self.sites[path], seen.inference)
        }

    @cached_property
    def shifted_by_dropout(self) -> tuple[str, ...]:
        """Causes that are not BN, but which left statistics that do not suit inference."""
        return tuple(cause.code for cause in self.causes if cause.evidence.get("variance_shift"))

    def blamed(self, *codes: str) -> tuple[str, ...]:
        """Sites that these causes blame, in execution order."""
        found = {path for cause in self.causes if cause.code in codes for path in cause.sites}
        return tuple(path for path in self.sites if path in found)

    def probe(self, name: str) -> Probe | None:
        """A probe that was made already."""
        return self.measurement.probes.get(probe_name(name))

    def population(self, group: str) -> Probe | None:
        """Inference with the data's own statistics at a group of sites; ``None`` if it is empty.

        Sites that override the phase go on with the batch, whatever is stored there.
        """
        name = "population" if group == "all" else f"population {group}"
        if self.overriding:
            statistics = self.bench.population(group)
            blend = {p: value for p, value in self.overriding.items() if p in self.bench.paths}
            tried = f"{name}, phase overridden"
            return (
                self.bench.probe(tried, blend=blend, statistics=statistics) if statistics else None
            )
        known = self.probe(name)
        if known is not None:
            return known
        statistics = self.bench.population(group)
        return self.bench.probe(name, statistics=statistics) if statistics else None
