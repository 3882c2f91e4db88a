"""Population moments of what the sites of a torch module see, and where they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from frostline.adapters.protocol import Population, Source
from frostline.adapters.staged import with_batch_statistics
from frostline.adapters.together import ALONE, Together
from frostline.adapters.torch.asking import call, with_gradients
from frostline.adapters.torch.calls import Call, answered, stored
from frostline.adapters.torch.distributed import require_same_model
from frostline.adapters.torch.forward_pass import (
    arrays,
    frozen_parameters_kept,
    mover,
    set_inference,
    untouched,
)
from frostline.adapters.torch.graph import site_modules
from frostline.adapters.torch.keeping import mean_of, variance_of
from frostline.adapters.torch.lockstep import KINDS, population
from frostline.data.batch import Batch
from frostline.numerics.stats import Moments
from frostline.types import Array, ModelError, as_float64


class TorchMoments:
    """Measures and stores the statistics of chosen sites of one torch module.

    A stored variance is used by inference as it is, so the biased population variance is stored;
    torch's own training step would store the unbiased one, n/(n − 1) as large.

    Args:
        model: A torch module.
        paths: Paths of BN sites, as in ``frostline.sites``.
        ranks: Processes that measure together.
        step: The user's ``step(model, batch)``, which runs the module instead of a call.

    Raises:
        ModelError: A path is no BN site, or a site that keeps no statistics; the ranks hold
            different models.
    """

    def __init__(
        self, model: Any, paths: Sequence[str], ranks: Together = ALONE, step: Any = None
    ) -> None:
        self.model, self._step = model, step
        self._trains = False  # the step runs in training mode only
        self._ranks = ranks
        require_same_model(ranks, model, [path.replace("/", ".") for path in paths])
        self._sites = site_modules(model)
        self.modules = {path: _require(path, self._sites.get(path)) for path in paths}

    def sequential(self, source: Source, paths: Sequence[str], memory_limit: int) -> Population:
        """Population moments of some sites; the model is not changed."""
        return self._in_a_mode(
            source,
            lambda: population(
                self.model,
                self._sites,
                paths,
                source,
                memory_limit=memory_limit,
                ranks=self._ranks,
                step=self._step,
                trains=self._trains,
            ),
        )

    def batchwise(self, source: Source, paths: Sequence[str]) -> Population:
        """Population moments of some sites from one pass with batch statistics."""
        return self._in_a_mode(
            source,
            lambda: with_batch_statistics(self.batch(), source, paths, self._ranks, KINDS),
        )

    def _in_a_mode(self, source: Source, found: Callable[[], Population]) -> Population:
        """Run in evaluation mode; a step that fails there is run in training mode."""
        with frozen_parameters_kept(self.model):
            return self._in_either(source, found)

    def _in_either(self, source: Source, found: Callable[[], Population]) -> Population:
        try:
            return found()
        except ModelError as error:
            if self._step is None or self._trains or self._ranks.size > 1:
                raise
            step = with_gradients(self._step, error)
            source.require_again(
                "a step that fails in evaluation mode" if step is None else "a step with gradients"
            )
            if step is not None:
                self._step = step
                return self._in_either(source, found)
            self._trains = True
            try:
                return found()
            except ModelError:
                self._trains = False
            raise

    def batch(self) -> Callable[[Batch], Mapping[str, Sequence[Moments]]]:
        """One pass with batch statistics at all chosen sites: a batch -> moments of each use."""

        def run(batch: Batch) -> Mapping[str, Sequence[Moments]]:
            seen: dict[str, list[Moments]] = {path: [] for path in self.modules}

            def answer(call: Call) -> Any:
                if call.path not in seen or not call.x.numel():
                    return call.run()
                seen[call.path].append(call.moments())
                return call.with_batch()

            with untouched(self.model) as root, torch.no_grad():
                set_inference(root, self._sites, trains=self._trains)
                with answered(self._sites, answer, quiet=self._trains):
                    call(root, batch, mover(self.model), step=self._step)
            return seen

        return run

    def stored(self, path: str) -> tuple[Array, Array]:
        """Stored mean and variance of a site, float64, shape ``(channels,)`` each."""
        module = self.modules[path]
        return as_float64(arrays(mean_of(module))), as_float64(arrays(variance_of(module)))

    def epsilon(self, path: str) -> float:
        """What the site adds to the variance."""
        return float(getattr(self.modules[path], "eps", 1e-5))

    def store(self, path: str, mean: Array, variance: Array) -> None:
        """Store population statistics, in place: buffers stay the objects they are."""
        module = self.modules[path]
        with torch.no_grad():
            mean_of(module).copy_(torch.as_tensor(mean))
            variance_of(module).copy_(torch.as_tensor(variance))

    def snapshot(self) -> Callable[[], None]:
        """Remember the statistics of the chosen sites; returns what puts them back, bit for bit."""
        before = [
            (buffer, buffer.detach().clone())
            for module in self.modules.values()
            for buffer in (mean_of(module), variance_of(module))
        ]

        def restore() -> None:
            for buffer, value in before:
                buffer.detach().copy_(value)  # no mode to be left on where this is interrupted

        return restore


def _require(path: str, module: Any) -> Any:
    if module is None:
        raise ModelError(f"'{path}' is not a BN site of this model. Received: {path!r}")
    if stored(module, path) is None:
        raise ModelError(
            f"'{path}' keeps no statistics (track_running_stats=False), so there is nothing to "
            f"recalibrate; leave it out of sites=. Received: {path!r}"
        )
    return module
