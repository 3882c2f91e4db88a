"""One forward pass of a torch module for every question: the blend λ and the statistics are given.

Every site normalises with ``(1 - λ) * stored + λ * batch``. Its own ``forward`` is then run on the
normalised input with statistics that change nothing (mean 0, variance 1 − ε), so that subclasses
that do more than BN, such as BN with an activation, keep doing it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from frostline.adapters import Outcome
from frostline.adapters.torch.forward_pass import (
    arrays,
    called,
    device_of,
    replaced_forward,
    run,
    tensors,
    untouched,
)
from frostline.adapters.torch.graph import site_places
from frostline.adapters.torch.loss import per_sample
from frostline.data.batches import Batch
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
        known = {place.path: place.module for place in site_places(model)}
        chosen = list(known) if paths is None else list(paths)
        for path in chosen:
            if path not in known:
                listed = ", ".join(map(repr, known)) or "none"
                raise ModelError(
                    f"no BN layer has this path; there are {listed}. Received: {path!r}"
                )
        self._modules = {path: known[path] for path in chosen}
        self._others = [module for path, module in known.items() if path not in self._modules]
        self.paths = tuple(self._modules)
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
        seen: dict[str, list[Moments]] | None = {} if record else None
        with torch.no_grad():
            found = self._pass(batch, self._blend(blend), statistics, dropout, number, seen)
        if seen is None:
            return arrays(found)
        return arrays(found), _merged(seen)

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
            found = self._pass(batch, weights, statistics, dropout, number, None)
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
        seen: dict[str, list[Moments]] | None = {} if record else None
        with torch.no_grad():
            found = self._pass(batch, self._blend(blend), statistics, dropout, number, seen)
            losses = self._losses(found, batch)
        return Outcome(
            outputs=arrays(found), losses=as_float64(arrays(losses)), moments=_merged(seen or {})
        )

    def own(self, batch: Batch, *, training: bool, number: int = 0) -> Outcome:
        """Return outputs and losses of the module's own pass, as its ``train()`` leaves it."""
        with torch.no_grad():
            found = run(self.model, batch.x, training=training, step=number)
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
        seen: dict[str, list[Moments]] | None,
    ) -> Any:
        given = self._statistics(statistics)
        inputs = tensors(batch.x, self.model)
        changes: dict[Any, Callable[..., Any]] = {}
        for index, (path, module) in enumerate(self._modules.items()):
            entries = None if seen is None else seen.setdefault(path, [])
            changes[module] = functools.partial(
                _blended, module, module.forward, weights[index], given[path], entries
            )
        for module in self._others:
            changes[module] = functools.partial(_stored, module, module.forward)
        with untouched(self.model, step=number) as root:
            for parameter in root.parameters():
                parameter.requires_grad_(False)  # the graph then holds what depends on λ alone
            root.train(dropout)
            with replaced_forward(changes):
                found = called(root, inputs)
        if seen is not None:
            for path in [path for path, parts in seen.items() if not parts]:
                del seen[path]
        return found

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

    def _statistics(self, statistics: Statistics | None) -> dict[str, Any]:
        given = dict(statistics or {})
        unknown = [path for path in given if path not in self._modules]
        if unknown:
            raise ModelError(
                "statistics are given for a site that is not blended; there are "
                f"{', '.join(self.paths) or 'none'}. Received: {unknown[0]!r}"
            )
        pairs: dict[str, Any] = {}
        for path, module in self._modules.items():
            own = stored(module, path)
            if own is None:  # keeps no statistics: always those of the batch
                pairs[path] = None
                continue
            pair, shape = given.get(path, own), tuple(own[0].shape)
            if any(tuple(np.shape(each)) != shape for each in pair):
                raise DataError(
                    f"statistics of '{path}' must have shape {shape}. "
                    f"Received: {[np.shape(each) for each in pair]}"
                )
            device = device_of(self.model)
            pairs[path] = tuple(torch.as_tensor(v, device=device).float() for v in pair)
        return pairs


def _merged(seen: Mapping[str, list[Moments]]) -> dict[str, Moments]:
    return {path: functools.reduce(Moments.merge, parts) for path, parts in seen.items()}


def stored(module: Any, path: str) -> tuple[Any, Any] | None:
    """Stored mean and variance of a site; ``None`` where it keeps none.

    Raises:
        ModelError: A lazy module without statistics yet.
    """
    if module.running_mean is None:
        return None
    if isinstance(module.running_mean, torch.nn.parameter.UninitializedTensorMixin):
        raise ModelError(
            f"'{path}' is lazy and has seen no data yet, so it has no statistics; call the model "
            "on one batch first. Received: an uninitialised module"
        )
    return module.running_mean.detach(), module.running_var.detach()


def batch_statistics(x: Any) -> tuple[Any, Any]:
    """Mean and biased variance per channel (axis 1), in two passes, float32 at least."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    mean = x.mean(axes)
    deviations = x - along(mean, x)
    # In place where nothing is differentiated: a second tensor costs more than the sum.
    squares = deviations.square() if deviations.requires_grad else deviations.square_()
    return mean, squares.mean(axes)


def along(values: Any, x: Any) -> Any:
    """Shape ``(channels,)`` -> the shape that broadcasts along axis 1 of ``x``."""
    return values.reshape([1, -1, *[1] * (x.ndim - 2)])


def moments_of(x: Any) -> Moments:
    """Moments of a site's input, float64."""
    wide = x.detach().double()
    count = wide.numel() // wide.shape[1]
    mean, variance = batch_statistics(wide)
    return Moments(count, mean.cpu().numpy(), variance.cpu().numpy() * count)


def _blended(
    module: Any,
    forward: Callable[..., Any],
    weight: Any,
    given: tuple[Any, Any] | None,
    entries: list[Moments] | None,
    x: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    wide = x if x.dtype == torch.float64 else x.float()
    if entries is not None:
        entries.append(moments_of(wide))
    if given is not None and entries is None and not weight.requires_grad and float(weight) == 0:
        mean, variance = (old.to(wide.dtype) for old in given)  # nobody needs the batch
        return normalised(module, forward, x, wide, mean, variance, args, kwargs)
    mean, variance = batch_statistics(wide)
    if given is not None:
        mean, variance = (
            _mixed(weight.to(new.dtype), old.to(new.dtype), new)
            for old, new in zip(given, (mean, variance), strict=True)
        )
    return normalised(module, forward, x, wide, mean, variance, args, kwargs)


def normalised(
    module: Any,
    forward: Callable[..., Any],
    x: Any,
    wide: Any,
    mean: Any,
    variance: Any,
    args: Any,
    kwargs: Any,
) -> Any:
    """Run the module's own ``forward`` as if these were its statistics; differentiable in them."""
    epsilon = float(getattr(module, "eps", 1e-5))
    scale = torch.rsqrt(variance + epsilon)
    centred = (wide - along(mean, wide)) * along(scale, wide)
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = {name: module._buffers[name] for name in names if name in module._buffers}
    flags = module.training, getattr(module, "track_running_stats", None)
    try:
        module._buffers["running_mean"] = torch.zeros_like(mean.detach())
        module._buffers["running_var"] = torch.full_like(mean.detach(), 1.0 - epsilon)
        module.training = False
        if flags[1] is not None:
            module.track_running_stats = True
        return forward(centred.to(x.dtype), *args, **kwargs)
    finally:
        module._buffers.update(before)
        module.training = flags[0]
        if flags[1] is not None:
            module.track_running_stats = flags[1]


def _stored(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The module's output in inference, whatever phase the model runs in."""
    before = module.training
    module.training = False
    try:
        return forward(*args, **kwargs)
    finally:
        module.training = before


def _mixed(weight: Any, old: Any, new: Any) -> Any:
    """``(1 - λ) stored + λ batch``, where a share of nothing counts nothing, even of NaN."""
    safe_new = torch.where((weight > 0) | torch.isfinite(new), new, old)
    safe_old = torch.where((weight < 1) | torch.isfinite(old), old, new)
    return (1 - weight) * safe_old + weight * safe_new
