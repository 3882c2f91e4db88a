"""Addresses of layers, for every framework: from what a person writes to a place in the model.

An adapter lists its model's layers as places, in execution order where that is known; all that is
done with addresses is here.
"""

from __future__ import annotations

import difflib
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from frostline.types import Boundary, ModelError, Site


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """One layer of a model with its address.

    Attributes:
        path: ``backbone/block3/bn1``: names of the containers and of the layer. Unique.
        name: The layer's own name, which several layers may share.
        layer: The layer; on torch a module.
        order: Rank in execution order (of the first use, if shared); containers come before what
            they contain.
        top: Index of the top-level layer that it is or lies in.
        calls: How often the model uses the layer.
        leaf: Holds no other layer.
    """

    path: str
    name: str
    layer: Any
    order: int
    top: int
    calls: int
    leaf: bool

    @property
    def module(self) -> Any:
        """The layer, by the word that torch has for it."""
        return self.layer

    @property
    def parent(self) -> str | None:
        """Path of the container; ``None`` at the top level."""
        return self.path.rpartition("/")[0] or None


@dataclass(frozen=True, kw_only=True, eq=False)
class Layers:
    """All layers of a model, as its framework calls and counts them.

    Attributes:
        places: Every layer once, containers and leaves, in execution order.
        top: The layers at the top level, in the order that an index counts.
        word: What the framework calls a layer: ``"layer"`` or ``"module"``.
        kind: Class of all layers.
    """

    places: tuple[Place, ...]
    top: tuple[Any, ...]
    word: str
    kind: type

    def resolve(self, reference: Any) -> Boundary:
        """Translate what a person writes into a boundary.

        Args:
            reference: A path (``backbone/block3/conv``; dots do as well as slashes) or a name that
                is unique in the model; an index into the top level, also negative, where its
                length is the end; a float in [0, 1], the share of leaves in execution order that
                lie before the boundary; a layer; a :class:`Boundary`; ``None`` for the end.

        Returns:
            The boundary: the first layer behind it and that layer's index at the top level.

        Raises:
            ModelError: No such layer (with the closest names), an ambiguous name, an index or a
                fraction out of range.
        """
        if isinstance(reference, Boundary):
            reference = reference.path
        place: Place | None
        if reference is None:
            place = None
        elif isinstance(reference, str):
            place = self._by_name(reference)
        elif isinstance(reference, self.kind):
            place = self._by_object(reference)
        elif isinstance(reference, float):
            place = self._by_fraction(reference)
        else:
            place = self._by_index(reference)
        if place is None:
            return Boundary(path=None, index=len(self.top))
        return Boundary(path=place.path, index=place.top)

    def _by_name(self, reference: str) -> Place:
        for wanted in (reference, reference.replace(".", "/")):
            for place in self.places:
                if place.path == wanted:
                    return place
        named = [place for place in self.places if place.name == reference]
        if len(named) == 1:
            return named[0]
        if named:
            listed = ", ".join(repr(place.path) for place in named[:5])
            raise ModelError(
                f"boundary {reference!r} names {len(named)} {self.word}s; use one of the paths "
                f"{listed}. Received: {reference!r}"
            )
        raise ModelError(
            f"boundary {reference!r} is not a {self.word} of this model. "
            f"{self._hint(reference.replace('.', '/'))}Received: {reference!r}"
        )

    def _hint(self, wanted: str) -> str:
        if not self.places:
            return f"The model has no {self.word}s. "
        known = [place.path for place in self.places]
        names = {place.name: place.path for place in reversed(self.places)}
        hint = closest(wanted, [*known, *names], named=names)
        return hint or f"Its {self.word}s go from {known[0]!r} to {known[-1]!r}. "

    def _by_object(self, reference: Any) -> Place:
        for place in self.places:
            if place.layer is reference:
                return place
        name = getattr(reference, "name", None) or type(reference).__name__
        raise ModelError(
            f"{self.word} {name!r} is not part of this model. "
            f"Received: {type(reference).__module__}.{type(reference).__qualname__}"
        )

    def _by_fraction(self, reference: float) -> Place | None:
        if not 0.0 <= reference <= 1.0:
            raise ModelError(
                f"a fractional boundary must be between 0.0 and 1.0. Received: {reference!r}"
            )
        leaves = [place for place in self.places if place.leaf]
        cut = round(reference * len(leaves))
        return leaves[cut] if cut < len(leaves) else None

    def _by_index(self, reference: Any) -> Place | None:
        index = None
        with suppress(TypeError):
            index = None if isinstance(reference, bool) else operator.index(reference)
        if index is None:
            raise ModelError(
                f"a boundary is a {self.word} name, a path, an index, a fraction or a {self.word}. "
                f"Received: {reference!r} ({type(reference).__name__})"
            )
        count = len(self.top)
        if not -count <= index <= count:
            raise ModelError(
                f"boundary index must be between {-count} and {count} for this model's {count} "
                f"{self.word}s. Received: {reference!r}"
            )
        return None if index == count else self._by_object(self.top[index])


def closest(wanted: str, known: Sequence[str], *, named: dict[str, str] | None = None) -> str:
    """A sentence with the three known names that are most like the wanted one; "" without any.

    Args:
        wanted: What was written.
        known: What there is.
        named: Known name -> what to print in its place.
    """
    found = difflib.get_close_matches(wanted, known, n=5, cutoff=0.5)
    paths = list(dict.fromkeys((named or {}).get(name, name) for name in found))[:3]
    return f"Closest: {', '.join(map(repr, paths))}. " if paths else ""


def is_within(path: str, container: str) -> bool:
    """Whether a path is that of a container or of something inside it."""
    return f"{path}/".startswith(f"{container}/")


def ancestors(path: str) -> tuple[str, ...]:
    """Paths of the containers around a path, innermost first."""
    parts = path.split("/")
    return tuple("/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))


def side(
    places: Iterable[Place],
    boundary: Boundary,
    *,
    before: bool,
    paths: frozenset[str] | None = None,
) -> list[Place]:
    """The places on one side of a boundary, in order; a container around it is behind it.

    With ``paths`` those with these paths, on whichever side.
    """
    places = list(places)
    if paths is not None:
        return [place for place in places if place.path in paths]
    if boundary.path is None:
        return places if before else []
    edge = next(place for place in places if place.path == boundary.path)
    if not before:
        return [place for place in places if place.order >= edge.order]
    return [p for p in places if p.order < edge.order and not is_within(boundary.path, p.path)]


def frozen_prefix(
    places: Iterable[Place], sites: Sequence[Site], trains: Callable[[Place], bool | None]
) -> tuple[int | None, str | None]:
    """How many sites lie before the first layer that trains, and the path of that layer.

    A BN layer trains where its gamma and beta do, or where its statistics move.

    Args:
        places: Every layer.
        sites: The BN layers; one may lie inside a leaf (a wrapped torch module).
        trains: Whether the weights that a layer holds itself train; ``None``: it holds none.

    Returns:
        ``(None, None)`` when that is the very first one: there is no prefix. ``(sites, None)`` when
        every layer is frozen.
    """
    count, met = 0, False
    within: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        for path in (site.path, *ancestors(site.path)):
            within[path].append(site)
    for place in places:
        inside = within.get(place.path, ()) if place.leaf else ()
        own = trains(place)
        if own is None and not inside:
            continue
        if own or not all(site.params_frozen and site.stats_frozen for site in inside):
            return (count, place.path) if met else (None, None)
        count, met = count + len(inside), True
    return len(sites), None
