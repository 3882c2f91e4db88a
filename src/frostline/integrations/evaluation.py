"""Exact statistics for one evaluation, and the stored ones back after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from frostline.atomic import generators, taken_back
from frostline.graph.selection import GROUPS
from frostline.types import ModelError
from frostline.verbs.diagnose import sites as sites_of
from frostline.verbs.edit import Change, recalibrate


class Evaluation:
    """Statistics that a model has for an evaluation only.

    Args:
        settings: Arguments of :func:`frostline.recalibrate` beside model and data.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._change: Change | None = None

    def begin(self, model: Any, data: Callable[[], Any]) -> Change | None:
        """Recalibrate, unless that is done; the generators of random numbers are left as found."""
        if self._change is None and self._has_sites(model):
            with kept_generators():
                self._change = recalibrate(model, data(), **self._settings)
        return self._change

    def end(self) -> None:
        """Put back the statistics of the training run, bit for bit."""
        change, self._change = self._change, None
        if change is not None:
            change.undo()

    def _has_sites(self, model: Any) -> bool:
        """Whether a group such as ``"unfrozen"`` has a member now; a name must have one."""
        wanted = self._settings.get("sites", "unfrozen")
        if not isinstance(wanted, str) or wanted not in GROUPS:
            return True
        frozen = {site.stats_frozen for site in sites_of(model)}
        if not frozen:
            raise ModelError("the model has no BN layer: there is nothing to recalibrate")
        return wanted == "all" or (wanted == "frozen") in frozen


@contextmanager
def kept_generators() -> Iterator[None]:
    """Give back the states of torch's, NumPy's and Python's global generators at the end."""
    with taken_back(generators()), torch.random.fork_rng():
        yield
