"""Features of a later frontier from those of an earlier one, instead of from the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from frostline import engines
from frostline.adapters import prefix as prefixes
from frostline.cache.features import FeatureCache
from frostline.data.arrays import map_leaves
from frostline.numerics.compare import relative_difference
from frostline.types import Array, DataError, ModelError


@dataclass(frozen=True, kw_only=True, eq=False)
class Through:
    """An earlier frontier of the same network, for the same data.

    Attributes:
        cache: Features of the earlier frontier, stored in float32 and not augmented.
        rest: Model of what lies between: earlier frontier -> later frontier.
    """

    cache: FeatureCache
    rest: Any

    @property
    def key(self) -> str:
        """Key of the earlier features."""
        return self.cache.keys[0]


def start(
    through: Through,
    prefix: Any,
    known_by: Any,
    first: Any,
    digests: Array,
    *,
    engine: str,
    samples: int | None,
    precision: str,
) -> tuple[engines.Engine, Callable[[Any, Array], Any]]:
    """Get what lies between two frontiers going, and compare both parts with the whole prefix.

    Args:
        through: The earlier frontier.
        prefix: The frozen part up to the later frontier.
        known_by: Changes whenever the prefix or the precision does.
        first: The first batch of its inputs.
        digests: Digests of these samples.
        engine: As for :func:`frostline.engines.choose`.
        samples: Likewise.
        precision: Likewise.

    Returns:
        The engine, and ``run(x, digests)`` that reads samples' earlier features.

    Raises:
        ModelError: Earlier features and what lies between do not give what the prefix gives, to a
            relative error of 1e-4, or of what the precision allows.
        DataError: A sample is none of those of the earlier cache.
    """
    rows = {digest.tobytes(): row for row, digest in enumerate(through.cache.views[0].digests())}

    def features(wanted: Array) -> Any:
        found = [rows.get(digest.tobytes()) for digest in wanted]
        if None in found:
            raise DataError(
                f"sample {found.index(None)} of a batch has no features at the earlier frontier: "
                "the data set gives other samples when it is read again."
            )
        arrays = through.cache.rows(found)
        return arrays[0] if len(arrays) == 1 else arrays

    given = features(digests)
    chosen = engines.remembered(through.rest, known_by, engine)
    if chosen is None:
        chosen = engines.choose(through.rest, given, engine, samples=samples, precision=precision)
        engines.remember(through.rest, known_by, engine, chosen)
    count = len(digests)
    if prefixes.takes_fewer(prefix, first):
        count = min(count, engines.COMPARED_SAMPLES)
    few = map_leaves(lambda leaf: leaf[:count], first)
    expected = prefixes.reference(prefix)(few)
    error = relative_difference([array[:count] for array in chosen.run(given)], expected)
    allowed = engines.TOLERANCES[precision] + 2 * engines.rounding(prefix, few, expected)
    if not error <= allowed:
        raise ModelError(
            f"features computed from an earlier frontier differ by {error:.1e} from those of the "
            f"whole frozen part, allowed is {allowed:.0e}"
        )
    # Of the whole way, which rounds twice.
    whole = replace(chosen, errors={**chosen.errors, chosen.name: error})
    return whole, lambda _, wanted: chosen.run(features(wanted))
