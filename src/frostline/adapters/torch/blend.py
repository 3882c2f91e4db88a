"""One forward pass of a torch module for every question: the blend λ and the statistics are given.

Every site normalises with ``(1 - λ) * stored + λ * batch``: its calls are answered, see
:mod:`frostline.adapters.torch.calls`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from frostline.adapters import Outcome
from frostline.adapters.torch.calls import Call, answered, statistics as batch_statistics, stored
from frostline.adapters.torch.forward_pass import (
    arrays,
    called,
    device_of,
    run,
    tensors,
    untouched,
)
from frostline.adapters.torch.graph import set_mode, site_modules
from frostline.adapters.torch.loss import per_sample
from frostline.data.batches import Batch
from frostline.numerics.blend import mixed
from frostline.numerics.stats import Moments
from frostline.types import DataError, ModelError, as_float64

Statistics = Mapping[str, tuple[Any, Any]]


class TorchForward:
    """Forward passes of a torch module with blended statistics; see ``models.Forward``.

    Runs eagerly. At λ = 0 a site uses its stored statistics, at λ = 1 those of the batch (biased
    variance), whatever its mode. A site that stores nothing always uses those of the batch.

    Args:
        model: A torch module; DataParallel, DDP and ``torch.compile`` are taken off.
        paths: Sites to blend, in the order of the blend vector; ``None`` for all of them.
        loss: A torch loss, any callable ``(outputs, targets)``, or a name; ``None``: none.

    Raises:
        ModelError: An unknown path, or a lazy module that has not seen data yet.
    """

    def __init__(
        self,
        model: Any,
        paths: Sequence[str] | None = None,
        *,
        loss: Any = None,
        step: Any = None,
    ) -> None:
        if step is not None:
            raise ModelError("step= is not supported here yet: pass loss=. Received: a step")
        self.model = model
        self._sites = site_modules(model)
        self.paths = tuple(self._sites if paths is None else paths)
        for path in self.paths:
            if path not in self._sites:
                listed = ", ".join(map(repr, self._sites)) or "none"
                raise ModelError(
                    f"no BN layer has this path; there are {listed}. Received: {path!r}"
                )
        self._loss = None if loss is None else per_sample(loss)

    def outputs(
        self,
        batch: Batch,
        *,
        blend: Any,
        statistics: Statistics | None = None,
        dropout: bool = False,
        number: int = 0,
        record: bool = False,
    ) -> Any:
        """Return the outputs of one batch and, with ``record``, what each site saw."""
        seen: dict[str, Moments] = {}
        with torch.no_grad():
            weights = self._blend(blend)
            found = self._pass(batch, weights, statistics, dropout, number, seen, record)
        return (arrays(found), seen) if record else arrays(found)

    def gradient(
        self,
        batch: Batch,
        *,
        blend: Any,
        statistics: Statistics | None = None,
        dropout: bool = False,
        number: int = 0,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the losses, shape ``(n,)``, and d mean(losses) / dλ, shape ``(sites,)``."""
        weights = self._blend(blend).requires_grad_(True)
        with torch.enable_grad():
            found = self._pass(batch, weights, statistics, dropout, number, {}, False)
            losses = self._losses(found, batch)
            slope = None
            if losses.requires_grad:
                (slope,) = torch.autograd.grad(losses.mean(), weights, allow_unused=True)
        zero = torch.zeros_like(weights)
        return as_float64(arrays(losses)), as_float64(arrays(zero if slope is None else slope))

    def outcome(
        self,
        batch: Batch,
        *,
        blend: Any,
        statistics: Statistics | None = None,
        dropout: bool = False,
        number: int = 0,
        record: bool = False,
    ) -> Outcome:
        """Return outputs, losses and, with ``record``, the sites' moments of one pass together."""
        seen: dict[str, Moments] = {}
        with torch.no_grad():
            weights = self._blend(blend)
            found = self._pass(batch, weights, statistics, dropout, number, seen, record)
            losses = self._losses(found, batch)
        return Outcome(outputs=arrays(found), losses=as_float64(arrays(losses)), moments=seen)

    def own(self, batch: Batch, *, training: bool, number: int = 0) -> Outcome:
        """Return outputs and losses of the module's own pass, as its ``train()`` leaves it."""
        with torch.no_grad():
            found = run(self.model, batch.x, training=training, number=number)
            losses = self._losses(found, batch)
        return Outcome(outputs=arrays(found), losses=as_float64(arrays(losses)))

    # --- the pass -----------------------------------------------------------------------------

    def _pass(
        self,
        batch: Batch,
        weights: Any,
        statistics: Statistics | None,
        dropout: bool,
        number: int,
        seen: dict[str, Moments],
        record: bool,
    ) -> Any:
        given = self._statistics(statistics)
        inputs = tensors(batch.x, self.model)
        shares = dict(zip(self.paths, weights.detach().tolist(), strict=True))
        places = {path: index for index, path in enumerate(self.paths)}

        def answer(call: Call) -> Any:
            path = call.path
            if path not in self._sites:
                return call.run()
            if path in places and record:
                moments = call.moments()
                seen[path] = seen[path].merge(moments) if path in seen else moments
            if call.mean is None or not call.x.numel():
                return call.run()
            pair = given.get(str(path), (call.mean, call.variance))
            if path not in places or (shares[path] == 0 and not weights.requires_grad):
                as_it_is = path not in given and not call.training
                return call.run() if as_it_is else call.with_statistics(*pair)
            weight = weights[places[path]]
            if shares[path] == 1 and not weights.requires_grad:
                return call.with_batch()
            fresh = batch_statistics(call.wide, single=call.single)
            mean, variance = (
                mixed(weight.to(new.dtype), old.to(new.dtype), new, torch)
                for old, new in zip(pair, fresh, strict=True)
            )
            return call.differentiable(mean, variance)

        with untouched(self.model, number=number) as root:
            for parameter in root.parameters():
                parameter.requires_grad_(False)  # the graph then holds what depends on λ alone
            set_mode(root, training=dropout)
            for module in self._sites.values():
                module.training = False
            with answered(root, self._sites, answer):
                return called(root, inputs)

    def _losses(self, outputs: Any, batch: Batch) -> Any:
        if self._loss is None:
            raise ModelError(
                "a torch module has no compiled loss: pass loss=, for example "
                "torch.nn.CrossEntropyLoss(). Received: loss=None"
            )
        if batch.y is None:
            raise DataError("a loss needs labels. Received: y=None")
        losses = self._loss(outputs, tensors(batch.y, self.model))
        if batch.sample_weight is None:
            return losses
        return losses * tensors(batch.sample_weight, self.model).to(losses.dtype)

    def _blend(self, blend: Any) -> Any:
        values, count = as_float64(blend), len(self.paths)
        if values.shape not in ((), (count,)):
            raise DataError(
                f"blend must be one number or have one per site, shape ({count},). "
                f"Received: shape {values.shape}"
            )
        if not ((values >= 0) & (values <= 1)).all():
            raise DataError(f"blend must be between 0 and 1 everywhere. Received: {blend}")
        spread = np.broadcast_to(values, (count,)).astype(np.float32)
        return torch.as_tensor(spread.copy(), device=device_of(self.model))

    def _statistics(self, statistics: Statistics | None) -> dict[str, tuple[Any, Any]]:
        """Check what is given in the place of stored statistics, and lazy modules."""
        pairs: dict[str, tuple[Any, Any]] = {}
        own = {path: stored(self._sites[path], path) for path in self.paths}
        for path, pair in (statistics or {}).items():
            if path not in own:
                raise ModelError(
                    "statistics are given for a site that is not blended; there are "
                    f"{', '.join(self.paths) or 'none'}. Received: {path!r}"
                )
            kept = own[path]
            if kept is None:  # keeps no statistics: always those of the batch
                continue
            shape = tuple(kept[0].shape)
            if any(tuple(np.shape(each)) != shape for each in pair):
                raise DataError(
                    f"statistics of '{path}' must have shape {shape}. "
                    f"Received: {[np.shape(each) for each in pair]}"
                )
            device = device_of(self.model)
            mean, variance = (torch.as_tensor(v, device=device).float() for v in pair)
            pairs[path] = mean, variance
        return pairs
